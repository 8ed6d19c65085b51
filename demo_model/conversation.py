"""Conversations as training rows: their tokens, their positions, and which tokens are answers. It uses no weights."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerFast

from demo_model.anyres import token_sources
from demo_model.questions import Question, plural
from demo_model.scene import COLOURS, SHAPES
from demo_model.tokenizer import ASSISTANT, END, USER, token_id

NOT_ASKED = -100
"""Target of a token whose next token is not trained."""

PICTURE, NEWLINE = -1, -2
"""Stand in for ids: a picture's token, the newline at the end of a row of it."""


@dataclass(frozen=True)
class Row:
    """One conversation about one picture.

    Attributes:
        ids: token ids (length,), with ``PICTURE`` and ``NEWLINE`` where the picture is.
        positions: position ids (length,); a dropped visual token leaves a gap.
        targets: the token that is to follow where it belongs to an answer, else ``NOT_ASKED``.
        hints: what is to be answered, from the word that the question is about on, else ``NOT_ASKED``.
        features: rows of the picture's cached features that stand at ``PICTURE``, in order.
        turns: for every token the number of the question that it belongs to; -1 for what comes before the questions.
    """

    ids: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    hints: np.ndarray
    features: np.ndarray
    turns: np.ndarray


class Conversation:
    """Writes conversations in the chat template's form."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._user, self._assistant, self._end = (token_id(tokenizer, token) for token in (USER, ASSISTANT, END))
        self._encode = lru_cache(maxsize=65536)(self._tokens)
        names = (*SHAPES, *(plural(shape) for shape in SHAPES), *COLOURS, "background")
        self._names = {token for name in names for token in self._encode(name)}

    def _tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def row(
        self,
        size: tuple[int, int],
        questions: list[Question],
        *,
        keep: np.ndarray | None = None,
        order: str = "picture first",
    ) -> Row:
        """Lay out a conversation.

        Args:
            size: the picture's width and height in pixels.
            questions: one turn each, answered truly.
            keep: which of the picture's visual tokens to keep, ascending; newlines stay beside them. All by default.
            order: "picture first", "question first" (the first question comes before the picture in its turn) or "own
                turn" (the picture is a turn without a question).
        """
        sources = token_sources(*size)
        picture = np.where(sources >= 0, PICTURE, NEWLINE)
        ids: list[int] = [self._user]
        targets: list[int] = [NOT_ASKED]
        turns: list[int] = [-1]
        hints: list[int] = [NOT_ASKED]

        def hint(first: int, question: Question) -> None:
            """Hints: the answer's distinguishing token is known from the last name in the question on."""
            named = [place for place in range(first, len(ids)) if ids[place] in self._names]
            answer = self._encode(question.answer)
            if named:  # a lone digit is a space and the digit
                hints[named[-1] :] = [answer[1] if question.kind == "count" else answer[0]] * (len(ids) - named[-1])
                if question.kind == "code":  # nothing else trains its second character before it has to be answered
                    hints[named[-1]] = answer[1]

        def say(tokens: tuple[int, ...], turn: int, learn: bool = False) -> None:
            for token in tokens:
                if learn:
                    targets[-1] = token
                ids.append(token)
                targets.append(NOT_ASKED)
                hints.append(NOT_ASKED)
                turns.append(turn)

        if order == "question first":
            say(self._encode(questions[0].text), 0)
        say(tuple(picture.tolist()), -1)
        if order == "own turn":
            say((self._end, self._user), -1)
        for number, question in enumerate(questions):
            start = len(ids)
            if number:
                say((self._user,), number)
            if number or order != "question first":
                say(self._encode(question.text), number)
            say((self._end,), number)
            if number or order != "question first":
                hint(start, question)
            say((self._assistant,), number)
            say((*self._encode(question.answer), self._end), number, learn=True)

        row = Row(
            ids=np.array(ids),
            positions=np.arange(len(ids)),
            targets=np.array(targets),
            hints=np.array(hints),
            features=np.arange(int((sources >= 0).sum())),
            turns=np.array(turns),
        )
        return row if keep is None else _thin(row, keep)


def _thin(row: Row, chosen: np.ndarray) -> Row:
    stays = row.ids != PICTURE
    stays[np.flatnonzero(~stays)[chosen]] = True
    return Row(
        ids=row.ids[stays],
        positions=row.positions[stays],
        targets=row.targets[stays],
        hints=row.hints[stays],
        features=row.features[chosen],
        turns=row.turns[stays],
    )
