"""A model that Hugging Face has loaded already: it answers like ``generate``, and is its owner's as before."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from tests.vflowopt.generation import Chat, picture
from tests.vflowopt.models.matrix import ONE_EACH, TinyModel
from tests.vflowopt.reference import Reference
from vflowopt.compression.strategy import Strategy
from vflowopt.models.error import ModelError
from vflowopt.models.loading import wrap_model
from vflowopt.runtime.decoder import FusedDecoder
from vflowopt.runtime.model_runner import Runtime

TURNS = [[picture(70, 150, 1), "what is this?"], ["and now?"]]
NEW_TOKENS = 6


@pytest.mark.parametrize("model", ONE_EACH, ids=lambda model: model.name)
def test_both_answer_alike_in_turn(model: TinyModel, tmp_path: Path) -> None:
    theirs = Reference(model.save(tmp_path))
    theirs.network.train()  # as one that is being trained would come
    expected = theirs.answers(TURNS, NEW_TOKENS)
    runtime = Runtime(wrap_model(theirs.network, theirs.tokenizer, theirs.processor), kv_budget=16 << 20)
    chat = Chat(runtime, Strategy.full())
    assert [chat.ask(turn, NEW_TOKENS) for turn in TURNS] == expected
    chat.sequence.release()
    assert theirs.answers(TURNS[:1], NEW_TOKENS) == expected[:1]
    assert theirs.network.training and not runtime.model.network.training


def test_no_weight_is_held_twice(plain_folder: Path) -> None:
    network, tokenizer, processor = loaded(plain_folder)
    runtime = Runtime(wrap_model(network, tokenizer, processor), kv_budget=1 << 20)
    wrapped = dict(runtime.model.network.named_parameters())
    assert wrapped.keys() == dict(network.named_parameters()).keys()
    assert all(wrapped[name] is weight for name, weight in network.named_parameters())
    assert not isinstance(runtime.decoder, FusedDecoder), "which would lay the weights out anew"


def test_a_model_loaded_by_the_library_is_not_shared(plain_folder: Path) -> None:
    assert isinstance(Runtime.load(plain_folder, kv_budget=1 << 20).decoder, FusedDecoder)


def test_another_kind_of_model(plain_folder: Path) -> None:
    _, tokenizer, processor = loaded(plain_folder)
    text_only = Qwen2ForCausalLM(Qwen2Config(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    for other in (text_only, torch.nn.Linear(1, 1)):
        message = f"got a {type(other).__name__}; give one of: .*LlavaOnevisionForConditionalGeneration"
        with pytest.raises(ModelError, match=message) as refused:
            wrap_model(other, tokenizer, processor)
        assert refused.value.reason == "MODEL_FAMILY_UNKNOWN"


def test_weights_that_are_not_there(plain_folder: Path) -> None:
    network, tokenizer, processor = loaded(plain_folder)
    network.lm_head.to("meta")
    with pytest.raises(ModelError, match="lies on cpu, meta; load it whole onto one device"):
        wrap_model(network, tokenizer, processor)


def test_an_image_processor_that_takes_tensors(plain_folder: Path) -> None:
    network, tokenizer, _ = loaded(plain_folder)
    with pytest.raises(ModelError, match=r'got a object as image processor.*backend="pil"'):
        wrap_model(network, tokenizer, object())


def test_a_tokenizer_whose_template_takes_no_pictures(plain_folder: Path) -> None:
    network, tokenizer, processor = loaded(plain_folder)
    tokenizer.chat_template = "{{ 'no picture' }}"
    with pytest.raises(ModelError, match="chat template"):
        wrap_model(network, tokenizer, processor)


def loaded(folder: Path) -> tuple[Any, Any, Any]:
    network = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return network, AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder, backend="pil")
