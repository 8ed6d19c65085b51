"""Load a model, compress a picture once, ask about it twice."""

from vflowopt import Picture, Runtime, generate
from vflowopt.demo import model_path, picture_path

runtime = Runtime.load(model_path(), kv_budget=64 << 20)
strategy = runtime.model.strategies["diverse-10"]  # keeps a tenth of the picture's tokens
(image,) = runtime.compress([Picture.decode((picture_path() / "cat.png").read_bytes())], strategy)
sequence = runtime.start(strategy)
print(*generate(runtime, sequence, runtime.chat.turn(0, [image, "Which shape is green?"])), sep="")
print(*generate(runtime, sequence, runtime.chat.turn(1, ["Where do you see the hourglass?"])), sep="")
