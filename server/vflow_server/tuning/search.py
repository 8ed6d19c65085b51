"""A search for a strategy, as work for the engine in idle time."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass

from vflow_client.v1 import strategies_pb2
from vflow_server.engine.encoder import EncoderThread
from vflow_server.engine.engine import Steps
from vflow_server.engine.idle_work import idle_work
from vflow_server.kv.manager import KVCacheManager
from vflow_server.tuning.proposer import Proposer
from vflowopt.search.calibration import Calibration
from vflowopt.search.pause import Aside, Pause
from vflowopt.search.tuner import Trial, Tuner

Metadata = strategies_pb2.RetuneMetadata


@dataclass(frozen=True)
class SearchProgress:
    """How far a search has come.

    Attributes:
        phase: the phase that it is in.
        trial: the trial that has just finished, if any.
        base_objective: objective of the strategy that the search started from; None until it is known.
    """

    phase: Metadata.Phase.ValueType
    trial: Trial | None
    base_objective: float | None


class Search:
    """The work of one search. Emits :class:`SearchProgress`; its result is the best trial.

    Args:
        kv: frees KV pages for it.
        encoder: encodes the samples' pictures.
        calibration: measures strategies on the samples.
        tuner: the search, which measures with ``calibration``.
    """

    def __init__(self, kv: KVCacheManager, encoder: EncoderThread, calibration: Calibration, tuner: Tuner) -> None:
        self._kv = kv
        self._encoder = encoder
        self._calibration = calibration
        self._tuner = tuner

    def __call__(self, emit: Callable[[SearchProgress], None]) -> Steps[Trial]:
        """The steps of the search."""
        proposer = Proposer()
        try:
            yield from idle_work(
                self._kv,
                self._encoder,
                self._pieces(emit),
                lambda: self._calibration.sequences,
                lambda trial: emit(self._progress(Metadata.SEARCHING, trial)),
                propose=proposer,
            )
        finally:
            proposer.close()
        assert self._tuner.best is not None  # the first trial sees all samples
        return self._tuner.best

    def _pieces(self, emit: Callable[[SearchProgress], None]) -> Generator[Trial | Pause, None, None]:
        """The tuner's pieces; emits a change of phase before the first piece of each phase."""
        last = Metadata.PHASE_UNSPECIFIED
        with closing(self._tuner.steps()) as steps:
            for piece in steps:
                if self._calibration.prepared:
                    phase = Metadata.SEARCHING
                elif isinstance(piece, Aside):
                    phase = Metadata.ENCODING
                else:
                    phase = Metadata.ANSWERING
                if phase != last:
                    emit(self._progress(phase))
                    last = phase
                yield piece

    def _progress(self, phase: Metadata.Phase.ValueType, trial: Trial | None = None) -> SearchProgress:
        return SearchProgress(phase, trial, self._tuner.base_objective)
