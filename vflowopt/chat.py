"""From the parts of a chat turn to the items that a conversation's log grows by.

The model's own chat template (Jinja, beside its tokenizer) writes the control tokens. What a user typed never passes
through the template: a mark of private-use characters does, and the text is put in its place after tokenization, with
special tokens taken as plain text. So nothing a user types can act as control.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from vflowopt.compression import CompressedImage
from vflowopt.conversation import Item

_MARK = "\ue000{}\ue001"
_MARKS = re.compile("\ue000([0-9]+|answer)\ue001")


class ChatFormat:
    """How one model writes conversations.

    Args:
        tokenizer: with a chat template that takes contents as lists of parts.
        image_token: what the template writes for a picture.
        stop_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, image_token: str, stop_ids: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        self.image_token = image_token
        self.stop_ids = stop_ids
        # What a tokenizer puts before everything (Llama's and Mistral's do), unless the template itself writes it.
        self._opening: list[int] = tokenizer("")["input_ids"]
        self._bos: str = tokenizer.bos_token or ""

    def turn(self, turns_before: int, parts: Sequence[str | CompressedImage], *, generate: bool = True) -> list[Item]:
        """The items that the next user turn adds to the log.

        They begin by closing the answer before them, if there is one, as the template does.

        Args:
            turns_before: finished turns in the log.
            parts: text and pictures as the user ordered them; the template may move pictures to the front.
            generate: with the prompt for an answer. False: only up to and including the last picture, for a picture
                that arrives ahead of its question; the complete turn's items begin with exactly these.

        Raises:
            ValueError: ``generate`` is False and there is no picture.
        """
        pictures = [part for part in parts if isinstance(part, CompressedImage)]
        rendered = self._rendered(turns_before, parts)
        items: list[Item] = [] if turns_before or rendered.startswith(self._bos) else [*self._opening]
        for position, piece in enumerate(_pieces(rendered, self.image_token)):
            if isinstance(piece, int):
                items += self.text(str(parts[piece]))
            elif piece == self.image_token and position % 2:
                items.append(pictures.pop(0))
                end = len(items)
            elif piece:
                items += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        if generate:
            return items
        if not any(isinstance(part, CompressedImage) for part in parts):
            raise ValueError("a turn without a picture has nothing to read ahead of its question")
        return items[:end]

    def text(self, text: str) -> list[int]:
        """Token ids of what a user typed; special tokens in it are plain text."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens, without special ones."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def _rendered(self, turns_before: int, parts: Sequence[str | CompressedImage]) -> str:
        """The template's text of this turn, user text as marks, from the end of the previous answer on."""
        content = [
            {"type": "text", "text": _MARK.format(index)} if isinstance(part, str) else {"type": "image"}
            for index, part in enumerate(parts)
        ]
        messages = [{"role": "user", "content": content}]
        if turns_before:
            # One earlier turn stands for all: a template writes its preamble before the first message only.
            answer = [{"type": "text", "text": _MARK.format("answer")}]
            earlier = [{"type": "text", "text": _MARK.format(len(parts))}]
            messages = [{"role": "user", "content": earlier}, {"role": "assistant", "content": answer}, *messages]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return str(text).rpartition(_MARK.format("answer"))[2] if turns_before else str(text)


def _pieces(rendered: str, image_token: str) -> list[str | int]:
    """Split at pictures and marks: control text at even places; an image token or the index of a part at odd ones."""
    pattern = f"({re.escape(image_token)}|{_MARKS.pattern.replace('(', '(?:')})"
    pieces: list[str | int] = []
    for place, piece in enumerate(re.split(pattern, rendered)):
        mark = _MARKS.fullmatch(piece)
        pieces.append(int(mark[1]) if place % 2 and mark else piece)
    return pieces
