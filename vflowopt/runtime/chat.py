"""From the parts of a chat turn to the items that are appended to a sequence's log.

The model's own chat template (Jinja, beside its tokenizer) writes the control tokens. The text of a user never passes
through the template: a mark of private-use characters does, and the text replaces it afterwards. A text that contains
special tokens is tokenized by itself, as plain text. So nothing that a user types can act as control.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from vflowopt.compression.pipeline import CompressedImage
from vflowopt.runtime.sequence import Item

_MARK = "\ue000{}\ue001"
_MARKS = re.compile("\ue000([0-9]+)\ue001")
_LINE_END = "\n"
"""Tokenized before a text that follows an answer: a text whose tokens never merge with those of the next one."""


class ChatFormat:
    """The chat format of one model.

    Args:
        tokenizer: its chat template takes contents as lists of parts.
        image_token: what the template writes for a picture.
        stop_ids: tokens that end an answer.
        video_mark: what the template writes for a video; None: the model takes no videos.
    """

    def __init__(
        self, tokenizer: Any, image_token: str, stop_ids: frozenset[int], video_mark: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.image_token = image_token
        self.video_mark = video_mark
        self._marks = re.compile("|".join(re.escape(mark) for mark in (image_token, video_mark) if mark))
        self.stop_ids = stop_ids
        # Tokens that a tokenizer (Llama's, Mistral's) puts before everything, unless the template itself writes them.
        self._opening: list[int] = tokenizer("")["input_ids"]
        self._bos: str = tokenizer.bos_token or ""
        self._added = frozenset(tokenizer.added_tokens_decoder)

    def turn(self, turns_before: int, parts: Sequence[str | CompressedImage], *, generate: bool = True) -> list[Item]:
        """The items that the next user turn adds to the log.

        They begin with the end of the answer before them, if there is one, as the template writes it.

        Args:
            turns_before: number of finished turns in the log.
            parts: text, pictures and videos in the user's order; the template may move text behind the others.
            generate: True: the whole turn, with the prompt for an answer. False: only up to and including the last
                picture, for one that arrives before its question; the items of the whole turn begin with these.

        Raises:
            ValueError: ``generate`` is False and there is no picture.
        """
        visuals = [part for part in parts if isinstance(part, CompressedImage)]
        if not (visuals or generate):
            raise ValueError("a turn without a picture has nothing to prefill before its question")
        marks = [self._mark(visual) for visual in visuals]
        rendered = self._rendered(turns_before, parts, marks)
        if self._marks.findall(rendered) != marks:
            # Some templates put pictures before videos. What was prefilled before its question cannot move any more,
            # so all stay in the order in which they came.
            marks = [self.image_token] * len(visuals)
            rendered = self._rendered(turns_before, parts, marks)
        items: list[Item] = [] if turns_before or rendered.startswith(self._bos) else [*self._opening]
        before, *behind = self._marks.split(rendered)
        items += self._segment(before, parts, _LINE_END if turns_before else "")
        end = 0
        for visual, mark, text in zip(visuals, marks, behind, strict=True):
            items.append(visual)
            end = len(items)
            items += self._segment(text, parts, mark)
        return items if generate else items[:end]

    def _mark(self, visual: CompressedImage) -> str:
        return self.video_mark if visual.frames and self.video_mark else self.image_token

    def text(self, text: str) -> list[int]:
        """Token ids of a user's text; special tokens in it are plain text."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def _segment(self, rendered: str, parts: Sequence[object], behind: str) -> list[int]:
        """Token ids of rendered text: control text, and marks for the texts in ``parts``.

        All pieces are tokenized together, as Hugging Face does it, because the tokens of a word depend on what is
        before it. Only if a user's text contains special tokens is every piece tokenized by itself.
        """
        chunk = [int(piece) if place % 2 else piece for place, piece in enumerate(_MARKS.split(rendered)) if piece]
        texts = [str(parts[piece]) if isinstance(piece, int) else piece for piece in chunk]
        control = [token for piece in chunk if isinstance(piece, str) for token in self._read(piece)]
        whole = self._read("".join(texts), behind)
        if [each for each in whole if each in self._added] == [each for each in control if each in self._added]:
            return whole
        return [
            token
            for piece, text in zip(chunk, texts, strict=True)
            for token in (self.text(text) if isinstance(piece, int) else self._read(text))
        ]

    def _read(self, text: str, behind: str = "") -> list[int]:
        """Token ids of control text that follows the text ``behind``.

        The tokenizers of Llama and related models add a space before the first word of a text, and before no other.
        """
        before: list[int] = self.tokenizer(behind, add_special_tokens=False)["input_ids"] if behind else []
        ids: list[int] = self.tokenizer(behind + text, add_special_tokens=False)["input_ids"]
        if ids[: len(before)] == before:
            return ids[len(before) :]
        return self._read(text)  # tokens of the two merged

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens, without special ones."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def _rendered(self, turns_before: int, parts: Sequence[str | CompressedImage], marks: Sequence[str]) -> str:
        """The template's text of this turn, from the end of the previous answer on.

        Marks stand for the user's texts. ``marks`` says in order whether each visual is a picture or a video.
        """
        kinds = iter("image" if mark == self.image_token else "video" for mark in marks)
        content = [
            {"type": "text", "text": _MARK.format(index)} if isinstance(part, str) else {"type": next(kinds)}
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
