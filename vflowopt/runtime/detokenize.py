"""From generated tokens to text that no later token changes."""

from __future__ import annotations

from collections.abc import Sequence

from vflowopt.runtime.chat import ChatFormat

_UNFINISHED = "\ufffd"


class TextStream:
    """Turns tokens into text deltas; holds back text that may still change or become part of a stop string.

    Args:
        chat: decodes tokens.
        stop: strings that end the answer; none of them is part of the text.

    Attributes:
        text: all text returned so far.
        stopped: whether a stop string was found; then no more text follows.
    """

    def __init__(self, chat: ChatFormat, stop: Sequence[str] = ()) -> None:
        self._chat = chat
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        # Tokens before _settled have their final text. Those from _context on are decoded again with what follows: the
        # text of a token (its space, its bytes) may depend on its neighbour, but on no other token.
        self._context = self._settled = 0
        self._decoded = ""
        self.text = ""
        self.stopped = False

    @property
    def tokens_shown(self) -> int:
        """How many tokens, from the first on, are wholly contained in the text returned so far."""
        shown = len(self._tokens)
        while not self.text.startswith(self._chat.decode(self._tokens[:shown])):
            shown -= 1
        return shown

    def push(self, token: int) -> str:
        """Add one token; returns the text that no later token can change, possibly none."""
        self._tokens.append(token)
        return self._hand_out(final=False)

    def finish(self) -> str:
        """Return the rest of the text; no more tokens may follow."""
        return self._hand_out(final=True)

    def _decode(self, *, final: bool) -> None:
        """Decode the new tokens, unless they end within a character."""
        known = self._chat.decode(self._tokens[self._context : self._settled])
        text = self._chat.decode(self._tokens[self._context :])
        if final or not text.endswith(_UNFINISHED):
            self._decoded += text[len(known) :]
            self._context, self._settled = self._settled, len(self._tokens)

    def _hand_out(self, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._decode(final=final)
        safe = len(self._decoded) if final else len(self._decoded) - self._held_back()
        # No stop string begins in the text returned so far: it would have been held back.
        met = [place for stop in self._stop if (place := self._decoded.find(stop, len(self.text))) >= 0]
        if met:
            self.stopped, safe = True, min(met)
        delta = self._decoded[len(self.text) : safe]
        self.text += delta
        return delta

    def _held_back(self) -> int:
        """How many characters at the end of the text may be the beginning of a stop string."""
        return max(
            (size for stop in self._stop for size in range(1, len(stop)) if self._decoded.endswith(stop[:size])),
            default=0,
        )
