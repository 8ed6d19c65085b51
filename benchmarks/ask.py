"""Asking about compressed pictures: each question alone, and all of them as the turns of one conversation."""

from __future__ import annotations

from collections import abc
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest

from benchmarks.answering import Reply, reply
from benchmarks.asked_pictures import Asked
from benchmarks.rivals import Compressed
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.sequence import Sequence

SINGLE = "single"
"""The turn of a question that is asked alone."""


@dataclass(frozen=True, eq=False)
class Answered:
    """One reply.

    Attributes:
        picture: the picture's place in the batch.
        number: the question's number, from 0.
        turn: ``SINGLE``, or the turn of the conversation, from 1.
        reply: the reply.
        kv_bytes: KV bytes of the picture's tokens, without those of the text.
    """

    picture: int
    number: int
    turn: str | int
    reply: Reply
    kv_bytes: int


def ask(
    runtime: Runtime,
    images: abc.Sequence[abc.Sequence[Compressed]],
    asked: abc.Sequence[abc.Sequence[Asked]],
    longest: int,
) -> list[Answered]:
    """Ask every question alone, and then as a turn of a conversation that starts with the first question's image.

    Args:
        runtime: runs the model.
        images: per picture, one image for each of its questions. One that several questions share is prefilled once.
        asked: per picture, its questions, at least one.
        longest: the most tokens of an answer.

    Raises:
        PoolExhausted: the caches of all conversations do not fit into the runtime's pool.
    """
    prefilled = _prefill(runtime, [image for of_picture in images for image in of_picture])
    try:
        return [
            *_ask_alone(runtime, prefilled, images, asked, longest),
            *_converse(runtime, prefilled, [of_picture[0] for of_picture in images], asked, longest),
        ]
    finally:
        for conversation in prefilled.values():
            conversation.release()


def picture_bytes(conversation: Sequence) -> int:
    """Bytes of the keys and values of a conversation's only picture, computed from the lengths of its cache."""
    text = conversation.num_cached_items - 1
    cache = conversation.cache
    return sum((stage.length - text) * len(stage.layers) for stage in cache.stages) * cache.pool.token_bytes


def _prefill(runtime: Runtime, images: abc.Sequence[Compressed]) -> dict[Compressed, Sequence]:
    """Prefill each distinct image in a conversation of its own, without a question."""
    prefilled = {image: runtime.start(image.strategy) for image in dict.fromkeys(images)}
    for image, conversation in prefilled.items():
        conversation.log.extend(runtime.chat.turn(0, [image.image, ""], generate=False))
    runtime.advance(list(prefilled.values()), want_logits=False)
    return prefilled


def _ask_alone(
    runtime: Runtime,
    prefilled: Mapping[Compressed, Sequence],
    images: abc.Sequence[abc.Sequence[Compressed]],
    asked: abc.Sequence[abc.Sequence[Asked]],
    longest: int,
) -> list[Answered]:
    places = [(place, number) for place, questions in enumerate(asked) for number in range(len(questions))]
    conversations = [prefilled[images[place][number]].fork() for place, number in places]
    prompts = [
        runtime.chat.turn(0, [images[place][number].image, asked[place][number].text])[len(conversation.log) :]
        for (place, number), conversation in zip(places, conversations, strict=True)
    ]
    replies = reply(runtime, conversations, prompts, longest)
    answered = [
        Answered(place, number, SINGLE, answer, picture_bytes(conversation))
        for (place, number), answer, conversation in zip(places, replies, conversations, strict=True)
    ]
    for conversation in conversations:
        conversation.release()
    return answered


def _converse(
    runtime: Runtime,
    prefilled: Mapping[Compressed, Sequence],
    images: abc.Sequence[Compressed],
    asked: abc.Sequence[abc.Sequence[Asked]],
    longest: int,
) -> list[Answered]:
    """One conversation per picture, all in step."""
    conversations = [prefilled[image].fork() for image in images]
    answered = []
    for turn, questions in enumerate(zip_longest(*asked)):
        taking = [(place, question.text) for place, question in enumerate(questions) if question is not None]
        speaking = [conversations[place] for place, _ in taking]
        prompts = [
            runtime.chat.turn(turn, [text])
            if turn
            else runtime.chat.turn(0, [images[place].image, text])[len(conversations[place].log) :]
            for place, text in taking
        ]
        replies = reply(runtime, speaking, prompts, longest)
        answered += [
            Answered(place, turn, turn + 1, answer, picture_bytes(conversation))
            for (place, _), conversation, answer in zip(taking, speaking, replies, strict=True)
        ]
    for conversation in conversations:
        conversation.release()
    return answered
