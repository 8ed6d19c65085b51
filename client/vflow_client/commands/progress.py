"""How far a search has come, told while it goes on: a bar on a terminal, else a line per trial."""

import shutil
from typing import Protocol, TextIO

from vflow_client.commands.objective_chart import best_until
from vflow_client.quantities import counted, duration
from vflow_client.v1.strategies_pb2 import RetuneMetadata


class Progress(Protocol):
    """Tells how far a search has come."""

    def show(self, metadata: RetuneMetadata) -> None:
        """Tells the state in `metadata`."""

    def close(self) -> None:
        """Leaves the stream where other text can follow."""


def progress_on(stream: TextIO) -> Progress:
    """The form of progress that suits `stream`."""
    return ProgressBar(stream) if stream.isatty() else ProgressLog(stream)


class ProgressBar:
    """One line of a terminal, written over again and again."""

    def __init__(self, stream: TextIO) -> None:
        """Begins where the cursor of `stream` is."""
        self._stream = stream
        self._shown = ""

    def show(self, metadata: RetuneMetadata) -> None:
        """Writes the line anew."""
        columns = shutil.get_terminal_size().columns
        done, trials = len(metadata.tried), max(metadata.trials, 1)
        full = max(columns // 4, 4)
        bar = "#" * (full * min(done, trials) // trials)
        line = f"[{bar:.<{full}}] {_words(metadata)}"[: columns - 1]
        self._stream.write(f"\r{line.ljust(len(self._shown))}")
        self._stream.flush()
        self._shown = line

    def close(self) -> None:
        """Goes on to the next line."""
        if self._shown:
            self._stream.write("\n")
            self._stream.flush()
            self._shown = ""


class ProgressLog:
    """A line for each phase and each trial, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        """Has told nothing yet."""
        self._stream = stream
        self._phases: set[int] = set()
        self._told = 0

    def show(self, metadata: RetuneMetadata) -> None:
        """Writes what is new."""
        # A service may go from picture to picture, and come back to a phase for each.
        if metadata.phase not in self._phases and metadata.phase in _PHASES:
            self._print(_PHASES[metadata.phase].format(samples=counted(metadata.samples, "picture")))
        self._phases.add(metadata.phase)
        best = best_until(metadata.tried)
        for number in range(self._told, len(metadata.tried)):
            trial = metadata.tried[number]
            early = " (stopped early)" if trial.stopped_early else ""
            self._print(
                f"trial {number + 1} of {metadata.trials}: {trial.objective:.4f}{early}, best {best[number]:.4f}"
            )
        self._told = len(metadata.tried)

    def close(self) -> None:
        """Nothing to leave: every line is whole."""

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


_PHASES = {
    RetuneMetadata.ENCODING: "encoding {samples}",
    RetuneMetadata.ANSWERING: "answering with the unpruned model",
}


def _words(metadata: RetuneMetadata) -> str:
    if metadata.phase in _PHASES:
        return _PHASES[metadata.phase].format(samples=counted(metadata.samples, "picture"))
    words = [f"trial {len(metadata.tried)} of {metadata.trials}"]
    if metadata.HasField("best_objective"):
        words.append(f"best {metadata.best_objective:.4f}")
    if metadata.HasField("base_objective"):
        words.append(f"base {metadata.base_objective:.4f}")
    if metadata.HasField("remaining") and metadata.phase != RetuneMetadata.ENDED:
        words.append(f"{duration(metadata.remaining.ToNanoseconds() / 1e9)} left")
    return ", ".join(words)
