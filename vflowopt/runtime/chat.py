"""From the parts of a chat turn to the items that are appended to a sequence's log.

The model's own chat template (Jinja, beside its tokenizer) writes the control tokens. The text of a user never passes
through the template: a mark of private-use characters does, and the text replaces it afterwards. A text that contains
special tokens is tokenized by itself, as plain text. So nothing that a user types can act as control.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from vflowopt.compression.pieces import Pieces, whole
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.media.video import Video, Visual
from vflowopt.runtime.sequence import Item

V = TypeVar("V", bound=Visual | CompressedImage)

_MARK = "\ue000{}\ue001"
_MARKS = re.compile("\ue000([0-9]+)\ue001")
_LINE_END = "\n"
"""Tokenized before a text that follows an answer: a text whose tokens never merge with those of the next one."""

_QUIET = {"verbose": False}
"""No warning of a text that is longer than the model's context: it is refused."""

_PIECE = 1 << 14
"""Characters that are tokenized in one piece to find out how many tokens a long text has at least."""


class TextTooLong(ValueError):
    """A text has more tokens than it may.

    Attributes:
        tokens: how many it has at least.
    """

    def __init__(self, tokens: int, most: int) -> None:
        super().__init__(f"the text has at least {tokens} tokens, and there is space for {most}; send less")
        self.tokens = tokens


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
        # A tokenizer of its own for users' texts: to switch one between the two ways to read special tokens while
        # another thread uses it is not safe.
        self._plain: Any = copy.deepcopy(tokenizer)
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
        return whole(self.turning(turns_before, parts, generate=generate))

    def turning(
        self, turns_before: int, parts: Sequence[str | V], *, generate: bool = True, most: int | None = None
    ) -> Pieces[list[int | V]]:
        """:meth:`turn` in pieces. For any thread; it may run while others do.

        Args:
            turns_before: see :meth:`turn`.
            parts: see there.
            generate: see there.
            most: tokens of the texts at most; None: without limit. A text that has certainly more is not tokenized to
                its end, so the work is bounded by ``most`` and not by the text.

        Raises:
            TextTooLong: the texts have more than ``most`` tokens. Fewer than a third more may pass.
            ValueError: see there.
        """
        if most is not None:
            yield from self._check_length([part for part in parts if isinstance(part, str)], most)
        visuals = [part for part in parts if not isinstance(part, str)]
        if not (visuals or generate):
            raise ValueError("a turn without a picture has nothing to prefill before its question")
        marks = [self._mark(visual) for visual in visuals]
        rendered = self._rendered(turns_before, parts, marks)
        if self._marks.findall(rendered) != marks:
            # Some templates put pictures before videos. What was prefilled before its question cannot move any more,
            # so all stay in the order in which they came.
            marks = [self.image_token] * len(visuals)
            rendered = self._rendered(turns_before, parts, marks)
        items: list[int | V] = [] if turns_before or rendered.startswith(self._bos) else [*self._opening]
        before, *behind = self._marks.split(rendered)
        items += self._segment(before, parts, _LINE_END if turns_before else "")
        end = 0
        for visual, mark, text in zip(visuals, marks, behind, strict=True):
            yield
            items.append(visual)
            end = len(items)
            items += self._segment(text, parts, mark)
        return items if generate else items[:end]

    def _check_length(self, texts: Sequence[str], most: int) -> Pieces[None]:
        """Refuse texts of many characters that have more than ``most`` tokens.

        Cut in pieces, a text has more tokens than in one: at each cut a few may not merge. A quarter is far more.
        """
        if sum(map(len, texts)) <= _PIECE:
            return
        tokens = 0
        for text in texts:
            for begin in range(0, len(text), _PIECE):
                tokens += len(self.text(text[begin : begin + _PIECE]))
                if (at_least := tokens * 3 // 4) > most:
                    raise TextTooLong(at_least, most)
                yield

    def _mark(self, visual: Visual | CompressedImage) -> str:
        moving = isinstance(visual, Video) or (isinstance(visual, CompressedImage) and visual.frames)
        return self.video_mark if moving and self.video_mark else self.image_token

    def text(self, text: str) -> list[int]:
        """Token ids of a user's text; special tokens in it are plain text."""
        ids: list[int] = self._plain(text, add_special_tokens=False, split_special_tokens=True, **_QUIET)["input_ids"]
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
        ids: list[int] = self.tokenizer(behind + text, add_special_tokens=False, **_QUIET)["input_ids"]
        if ids[: len(before)] == before:
            return ids[len(before) :]
        return self._read(text)  # tokens of the two merged

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens, without special ones."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def _rendered(self, turns_before: int, parts: Sequence[object], marks: Sequence[str]) -> str:
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
