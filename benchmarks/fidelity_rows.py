"""From single replies to the rows of the fidelity table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks.answering import Reply
from benchmarks.ask import SINGLE
from benchmarks.bootstrap import difference, share
from benchmarks.table import Row

ALL = "all"
"""The turn of rows over all turns of the conversations."""


@dataclass(frozen=True)
class Mark:
    """One reply compared with the true answer and with the unpruned model's reply.

    Attributes:
        picture: the picture's number in the whole run.
        turn: ``"single"``, or the turn from 1.
        right: whether it is the true answer.
        agrees: whether it is the unpruned model's answer in the same place.
        cosine: cosine similarity of the prompt's last hidden state with the unpruned model's.
        divergence: KL divergence, in nats, of the first token's distribution from the unpruned model's.
        kv_bytes: KV bytes of the picture.
        groups: the groups in which it is also counted.
    """

    picture: int
    turn: str | int
    right: bool
    agrees: bool
    cosine: float
    divergence: float
    kv_bytes: int
    groups: tuple[str, ...]


def compare(reply: Reply, reference: Reply) -> tuple[bool, float, float]:
    """Agreement, cosine and KL divergence of a reply with the unpruned model's, see :class:`Mark`."""
    cosine = torch.cosine_similarity(reply.state, reference.state, dim=0)
    pruned, whole = reply.logits.double().log_softmax(-1), reference.logits.double().log_softmax(-1)
    divergence = (whole.exp() * (whole - pruned)).sum().clamp_min(0.0)
    return reply.answer == reference.answer, float(cosine), float(divergence)


@dataclass
class Scores:
    """All marks of a run, by method and retention, in the order in which these were first seen."""

    marks: dict[tuple[str, float], list[Mark]] = field(default_factory=lambda: defaultdict(list))

    def rows(self, pictures: int, ours: str) -> list[Row]:
        """One row for each method, retention and turn: ``single``, ``all`` and each turn from 1.

        ``versus`` compares each with the method ``ours`` at the same retention and turn, if it was measured there:
        ``difference`` is its accuracy less that of ``ours``, with a 95% interval; "tie" if the interval includes zero.
        """
        tallies = {
            (method, retention, turn): (chosen, *_tally(chosen, pictures))
            for (method, retention), marks in self.marks.items()
            for turn, chosen in _turns(marks)
        }
        rows: list[Row] = []
        for (method, retention, turn), (chosen, hits, asked) in tallies.items():
            accuracy, base = share(hits, asked), tallies.get((ours, retention, turn))
            versus = difference(hits, base[1], asked) if base and method != ours else None
            rows.append(
                {
                    "method": method,
                    "retention": retention,
                    "turn": turn,
                    "accuracy": accuracy.value,
                    "low": accuracy.low,
                    "high": accuracy.high,
                    "agreement": _mean(mark.agrees for mark in chosen),
                    "cosine": _mean(mark.cosine for mark in chosen),
                    "kl_divergence": _mean(mark.divergence for mark in chosen),
                    "kv_bytes": round(_mean(mark.kv_bytes for mark in chosen)),
                    "questions": len(chosen),
                    "versus": versus and versus.verdict,
                    "difference": versus and versus.value,
                    "difference_low": versus and versus.low,
                    "difference_high": versus and versus.high,
                    "groups": _by_group(chosen),
                }
            )
        return rows


def summary(rows: Sequence[Row]) -> list[Row]:
    """The rows as a table for the screen: one line for each method and retention."""
    lines: dict[tuple[object, object], dict[str, object]] = {}
    for row in rows:
        key = row["method"], row["retention"]
        line = lines.setdefault(key, {"method": f"{row['method']} @ {row['retention']:.0%}"})
        turn = row["turn"]
        if turn == SINGLE:
            line["asked_alone"] = row["accuracy"]
            line["cosine"], line["kl_nats"] = row["cosine"], row["kl_divergence"]
        elif turn == ALL:
            line |= {
                "conversation": row["accuracy"],
                "low": row["low"],
                "high": row["high"],
                "agreement": row["agreement"],
                "versus": row["versus"],
                "by": row["difference"],
                "by_low": row["difference_low"],
                "by_high": row["difference_high"],
                "kv_bytes": row["kv_bytes"],
            }
        else:
            line[f"turn_{turn}"] = row["accuracy"]
    return list(lines.values())


def group_summary(rows: Sequence[Row]) -> list[Row]:
    """One line for each method and retention: the accuracy of each group over all turns of the conversations."""
    lines: list[Row] = []
    for row in rows:
        groups = row["groups"]
        if row["turn"] == ALL and isinstance(groups, dict) and groups:
            lines.append({"method": f"{row['method']} @ {row['retention']:.0%}", **groups})
    return lines


def _turns(marks: Sequence[Mark]) -> list[tuple[str | int, list[Mark]]]:
    """The marks of each turn, none of them empty."""
    last = max(mark.turn for mark in marks if isinstance(mark.turn, int))
    chosen: list[tuple[str | int, list[Mark]]] = [
        (SINGLE, [mark for mark in marks if mark.turn == SINGLE]),
        (ALL, [mark for mark in marks if mark.turn != SINGLE]),
    ]
    chosen += [(turn, [mark for mark in marks if mark.turn == turn]) for turn in range(1, last + 1)]
    return [(turn, of_turn) for turn, of_turn in chosen if of_turn]


def _tally(marks: Sequence[Mark], pictures: int) -> tuple[np.ndarray, np.ndarray]:
    """Per picture, how many answers were right and how many questions were asked, each [pictures]."""
    hits, asked = np.zeros(pictures), np.zeros(pictures)
    for mark in marks:
        hits[mark.picture] += mark.right
        asked[mark.picture] += 1
    return hits, asked


def _by_group(marks: Sequence[Mark]) -> dict[str, float]:
    groups: dict[str, list[bool]] = defaultdict(list)
    for mark in marks:
        for group in mark.groups:
            groups[group].append(mark.right)
    return {group: _mean(right) for group, right in sorted(groups.items())}


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
