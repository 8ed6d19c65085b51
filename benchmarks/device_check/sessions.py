"""Part: how many sessions about one picture fit into the device's memory beside the model, at every budget."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.decode_step import fill
from benchmarks.device_check.part import Setting
from benchmarks.device_check.shapes import ONEVISION, runtime_for
from benchmarks.geometry import BUDGETS, QUESTION_TOKENS
from benchmarks.table import Row
from vflowopt.compression.strategy import Strategy
from vflowopt.runtime.cache import PoolExhausted
from vflowopt.runtime.sequence import Sequence

_NEW_TOKENS = 24
"""Tokens of the answer to the one question of each session."""


def rows(setting: Setting) -> Iterator[Row]:
    """A row for each budget: all pages of the pool are given out to sessions, until one more does not fit."""
    model = ONEVISION.model(setting)
    runtime = runtime_for(model, (4 << 20) if setting.rehearse else 1 << 40)
    for budget in sorted(BUDGETS):
        strategy = Strategy.full() if budget == 1 else Strategy.preset(budget, runtime.layers)
        (image,) = runtime.compress([ONEVISION.shown(setting)], strategy)
        sessions: list[Sequence] = []
        try:
            while True:
                sessions.append(fill(runtime, strategy, image, QUESTION_TOKENS + _NEW_TOKENS))
        except PoolExhausted:
            pass
        yield {
            "retention": f"{budget:.0%}",
            "pool_GiB": runtime.pool.bytes_total / 2**30,
            "sessions": len(sessions),
            "MB_per_session": sessions[0].kv_bytes / 1e6 if sessions else None,
        }
        for session in sessions:
            session.release()
