"""Chunks: the tokens that one sequence adds to a forward pass, from the part of its log that is not cached yet.

A chunk knows positions and stages, but neither layers nor how tokens are embedded.
"""

from __future__ import annotations

import sys
from collections import abc
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vflowopt.compression.pipeline import CompressedImage
from vflowopt.runtime.sequence import CachedLength, Item, Sequence


@dataclass(frozen=True, eq=False)
class Chunk:
    """The tokens that one sequence adds to a forward pass.

    Attributes:
        sequence: the sequence.
        pieces: token ids, and embeddings [n, width] of visual tokens, in order.
        positions: int64 [tokens], or [axes, tokens].
        last_stages: int64 [tokens], the last stage that each token reaches; None if all reach the last one.
        counts: how many tokens enter each stage.
        to: how much of the log is cached after the pass.
    """

    sequence: Sequence
    pieces: abc.Sequence[list[int] | Tensor]
    positions: np.ndarray
    last_stages: np.ndarray | None
    counts: abc.Sequence[int]
    to: CachedLength

    def __len__(self) -> int:
        """The number of tokens that enter the first stage."""
        return int(self.positions.shape[-1])

    def staying(self, before: int, stage: int) -> np.ndarray | None:
        """Which of the tokens in stage ``before`` go on to ``stage``, bool [tokens in ``before``]; None if all do."""
        if self.last_stages is None or self.counts[before] == self.counts[stage]:
            return None
        staying: np.ndarray = self.last_stages[self.last_stages >= before] >= stage
        return staying

    @property
    def is_one_token(self) -> bool:
        """Whether it is a single token of text, which goes through all layers."""
        return len(self) == 1 and isinstance(self.pieces[0], list)

    @property
    def reaches_the_end(self) -> bool:
        """Whether it runs the rest of the log, and some of its tokens reach the last layer."""
        return self.to.items == len(self.sequence.log) and self.counts[-1] > 0

    def commit(self) -> None:
        """Count the tokens as cached; their keys and values must be written."""
        self.sequence.cached = self.to
        self.sequence.cache.advance(self.counts)


def next_chunk(sequence: Sequence, limit: int | None) -> Chunk:
    """The next chunk of a sequence.

    Args:
        sequence: the sequence.
        limit: the most first-stage tokens; None: all that are not cached.

    Raises:
        ValueError: the cache covers the whole log.
    """
    log, cached = sequence.log, sequence.cached
    if cached.items == len(log):
        raise ValueError("the sequence has nothing to run: its cache covers its whole log")
    stages = len(sequence.cache.stages)
    if cached.items == len(log) - 1 and isinstance(token := log[-1], int):
        # The most frequent case: one more token of an answer.
        to = CachedLength(len(log), 0, cached.position + 1)
        return Chunk(sequence, [[token]], np.array([cached.position]), None, [1] * stages, to)
    pieces: list[list[int] | Tensor] = []
    positions: list[np.ndarray] = []
    last_stages: list[np.ndarray] = []
    position, whole, offset, left = cached.position, cached.items, cached.offset, limit or sys.maxsize
    # Every item has a token at least, so no more than ``left`` items are needed.
    for run in _runs(log[cached.items : cached.items + left]):
        if isinstance(run, CompressedImage):
            part = slice(offset, offset + left)
            pieces.append(run.embeddings[part])
            positions.append(run.positions[..., part].numpy() + position)
            last_stages.append(run.last_stages[part].numpy())
            left -= len(pieces[-1])
            offset += len(pieces[-1])
            if offset < len(run.embeddings):
                break
            position, whole, offset = position + run.span, whole + 1, 0
        else:
            run = run[:left]
            pieces.append(run)
            positions.append(np.arange(position, position + len(run)))
            last_stages.append(np.full(len(run), stages - 1))
            left -= len(run)
            position, whole = position + len(run), whole + len(run)
        if not left:
            break
    ends = np.concatenate(last_stages)
    counts = [int((ends >= stage).sum()) for stage in range(stages)]
    to = CachedLength(whole, offset, position)
    return Chunk(sequence, pieces, joined(positions), ends, counts, to)


def joined(positions: abc.Sequence[np.ndarray]) -> np.ndarray:
    """Concatenate positions [tokens] or [axes, tokens]; if some have axes, text has the same position on every axis."""
    axes = max(part.shape[:-1] for part in positions)
    if axes:
        positions = [np.broadcast_to(part, (*axes, part.shape[-1])) for part in positions]
    return np.concatenate(positions, axis=-1)


def _runs(items: abc.Sequence[Item]) -> list[list[int] | CompressedImage]:
    """Group consecutive token ids."""
    runs: list[list[int] | CompressedImage] = []
    for item in items:
        if isinstance(item, CompressedImage):
            runs.append(item)
        elif runs and isinstance(runs[-1], list):
            runs[-1].append(item)
        else:
            runs.append([item])
    return runs
