"""From generated tokens to text that can be shown at once."""

from __future__ import annotations

from collections.abc import Sequence

from vflowopt.chat import ChatFormat

_UNFINISHED = "\ufffd"


class TextStream:
    """Turns tokens into text deltas; holds back what may still change or become part of a stop string.

    Args:
        chat: decodes tokens.
        stop: strings that end the answer; none of them is part of the text.

    Attributes:
        text: everything handed out so far.
        stopped: a stop string was met; nothing more comes.
    """

    def __init__(self, chat: ChatFormat, stop: Sequence[str] = ()) -> None:
        self._chat = chat
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one token; returns the text that is now safe to show, often of this token, possibly none."""
        self._tokens.append(token)
        return self._hand_out(final=False)

    def finish(self) -> str:
        """The rest of the text, when no more tokens come."""
        return self._hand_out(final=True)

    def _hand_out(self, *, final: bool) -> str:
        if self.stopped:
            return ""
        # Decoding everything again keeps spaces and bytes right for any tokenizer; answers are short.
        text = self._chat.decode(self._tokens)
        met = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if met:
            self.stopped = True
            text = text[: min(met)]
        elif not final:
            # A character whose bytes are not all there yet decodes to the replacement character.
            text = text.rstrip(_UNFINISHED)
            text = text[: len(text) - self._held_back(text)]
        if not text.startswith(self.text):
            return ""
        delta, self.text = text[len(self.text) :], text
        return delta

    def _held_back(self, text: str) -> int:
        """Characters at the end of ``text`` that may be the beginning of a stop string."""
        return max(
            (size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
        )
