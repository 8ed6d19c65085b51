"""What a method's cache answers: each question alone, and all of them as the turns of one conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from benchmarks.answering import Reply, reply
from benchmarks.asked_pictures import Asked
from benchmarks.rivals import Compressed
from vflowopt.conversation import Conversation
from vflowopt.runtime import Runtime

SINGLE = "single"
"""The turn of a question that is asked alone."""


@dataclass(frozen=True, eq=False)
class Told:
    """One reply.

    Attributes:
        picture: the picture's place in the batch.
        number: the question's number, from 0.
        turn: ``SINGLE``, or the turn of the conversation, from 1.
        reply: what came back.
        kv_bytes: of the picture's tokens in the cache, without those of the text.
    """

    picture: int
    number: int
    turn: str | int
    reply: Reply
    kv_bytes: int


def converse(
    runtime: Runtime, images: Sequence[Compressed], asked: Sequence[Sequence[Asked]], longest: int
) -> list[Told]:
    """One conversation per picture, all in step: each question meets the cache that picture and earlier turns left.

    Args:
        runtime: the model.
        images: one per picture.
        asked: per picture, the questions in order.
        longest: tokens of an answer at most.
    """
    conversations = [runtime.start(image.strategy) for image in images]
    told = []
    for turn, questions in enumerate(zip_longest(*asked)):
        taking = [(place, question.text) for place, question in enumerate(questions) if question is not None]
        prompts = [
            runtime.chat.turn(turn, [*([images[place].image] if turn == 0 else []), text]) for place, text in taking
        ]
        speaking = [conversations[place] for place, _ in taking]
        replies = reply(runtime, speaking, prompts, longest)
        told += [
            Told(place, turn, turn + 1, answer, picture_bytes(conversation))
            for (place, _), conversation, answer in zip(taking, speaking, replies, strict=True)
        ]
    for conversation in conversations:
        conversation.release()
    return told


def ask_alone(
    runtime: Runtime, images: Sequence[Sequence[Compressed]], asked: Sequence[Sequence[Asked]], longest: int
) -> list[Told]:
    """Every question as the first one about its picture. Where questions share an image, it is prefilled once.

    Args:
        runtime: the model.
        images: per picture, one for each of its questions.
        asked: per picture, the questions.
        longest: tokens of an answer at most.
    """
    prefilled: dict[Compressed, Conversation] = {}
    for image in (each for of_picture in images for each in of_picture):
        if image not in prefilled:
            prefilled[image] = conversation = runtime.start(image.strategy)
            conversation.log.extend(runtime.chat.turn(0, [image.image, ""], generate=False))
    runtime.advance(list(prefilled.values()), want_logits=False)
    places, conversations, prompts = [], [], []
    for place, questions in enumerate(asked):
        for number, question in enumerate(questions):
            image = images[place][number]
            conversation = prefilled[image].fork()
            places.append((place, number))
            prompts.append(runtime.chat.turn(0, [image.image, question.text])[len(conversation.log) :])
            conversations.append(conversation)
    replies = reply(runtime, conversations, prompts, longest)
    told = [
        Told(place, number, SINGLE, answer, picture_bytes(conversation))
        for (place, number), answer, conversation in zip(places, replies, conversations, strict=True)
    ]
    for conversation in (*conversations, *prefilled.values()):
        conversation.release()
    return told


def picture_bytes(conversation: Conversation) -> int:
    """Bytes of keys and values that the one picture of a conversation takes, read off its cache's lengths."""
    text = conversation.cached_items - 1
    cache = conversation.cache
    return sum((stage.length - text) * len(stage.layers) for stage in cache.stages) * cache.pool.token_bytes
