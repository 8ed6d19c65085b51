"""Ask a Hugging Face model that is loaded already, from a compressed picture; the model stays usable."""

from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from vflowopt import Picture, Runtime, Strategy, generate, wrap_model
from vflowopt.demo import model_path, picture_path

# Any model of a family that docs/models.md lists, loaded in any way.
network = AutoModelForImageTextToText.from_pretrained(model_path())
tokenizer = AutoTokenizer.from_pretrained(model_path())
image_processor = AutoImageProcessor.from_pretrained(model_path(), backend="pil")

# The runtime uses the same weights: nothing is copied, and nothing of the model is changed.
runtime = Runtime(wrap_model(network, tokenizer, image_processor), kv_budget=64 << 20)
strategy = Strategy.preset(0.25, runtime.layers)
(image,) = runtime.compress([Picture.decode((picture_path() / "cat.png").read_bytes())], strategy)
sequence = runtime.start(strategy)
print(*generate(runtime, sequence, runtime.chat.turn(0, [image, "Which shape is green?"])), sep="")
print(f"{image.tokens} visual tokens, kept per stage: {', '.join(str(len(kept)) for kept in image.kept)}")

# The model itself is as it was, and still generates.
prompt = tokenizer("<|user|>what colour is the star?<|end|><|assistant|>", return_tensors="pt")
generated = network.generate(**prompt, max_new_tokens=4)  # type: ignore[misc]  # whose types say that no model fits
print(tokenizer.decode(generated[0], skip_special_tokens=True))
