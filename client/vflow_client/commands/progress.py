"""The progress of a search, shown while it runs: a bar on a terminal, elsewhere a line for each trial."""

from typing import Protocol, TextIO

from vflow_client.commands.objective_chart import best_until
from vflow_client.commands.output import console_on
from vflow_client.quantities import counted, duration
from vflow_client.v1.strategies_pb2 import RetuneMetadata


class SearchProgress(Protocol):
    """Shows the progress of a search."""

    def show(self, metadata: RetuneMetadata) -> None:
        """Shows the state in `metadata`."""

    def close(self) -> None:
        """Leaves the stream at the beginning of a line."""


def progress_on(stream: TextIO) -> SearchProgress:
    """The form of progress that suits `stream`: a bar only where it can be redrawn in place."""
    # An environment may ask for colours in a file (FORCE_COLOR); that does not make it a terminal.
    return ProgressBar(stream) if stream.isatty() and console_on(stream).is_interactive else ProgressLog(stream)


class ProgressBar:
    """One line of a terminal, redrawn in place."""

    def __init__(self, stream: TextIO) -> None:
        """Begins on the line of `stream` where the cursor is."""
        from rich.progress import BarColumn, Progress, TextColumn

        console = console_on(stream)
        # Redrawn when the service reports something new: there is nothing to animate in between.
        self._progress = Progress(
            BarColumn(bar_width=max(console.width // 4, 4)),
            TextColumn("{task.description}", markup=False),
            console=console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task("")
        self._progress.start()

    def show(self, metadata: RetuneMetadata) -> None:
        """Redraws the line."""
        self._progress.update(
            self._task,
            completed=len(metadata.tried),
            total=max(metadata.trials, 1),
            description=_describe(metadata),
            refresh=True,
        )

    def close(self) -> None:
        """Leaves the bar as it is and moves on to the next line."""
        self._progress.stop()


class ProgressLog:
    """A line for each phase and each trial, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        """Writes nothing yet."""
        self._stream = stream
        self._phases: set[int] = set()
        self._num_trials = 0

    def show(self, metadata: RetuneMetadata) -> None:
        """Writes what is new since the last call."""
        # A service may go from picture to picture, and come back to a phase for each.
        if metadata.phase not in self._phases and metadata.phase in _PHASES:
            self._print(_describe(metadata))
        self._phases.add(metadata.phase)
        best = best_until(metadata.tried)
        for number in range(self._num_trials, len(metadata.tried)):
            trial = metadata.tried[number]
            early = " (stopped early)" if trial.stopped_early else ""
            self._print(
                f"trial {number + 1} of {metadata.trials}: {trial.objective:.4f}{early}, best {best[number]:.4f}"
            )
        self._num_trials = len(metadata.tried)

    def close(self) -> None:
        """Does nothing: every line is complete."""

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


_PHASES = {
    RetuneMetadata.ENCODING: "encoding {samples}",
    RetuneMetadata.ANSWERING: "answering with the unpruned model",
}


def _describe(metadata: RetuneMetadata) -> str:
    if metadata.phase in _PHASES:
        return _PHASES[metadata.phase].format(samples=counted(metadata.samples, "picture"))
    parts = [f"trial {len(metadata.tried)} of {metadata.trials}"]
    if metadata.HasField("best_objective"):
        parts.append(f"best {metadata.best_objective:.4f}")
    if metadata.HasField("base_objective"):
        parts.append(f"base {metadata.base_objective:.4f}")
    if metadata.HasField("remaining") and metadata.phase != RetuneMetadata.ENDED:
        parts.append(f"{duration(metadata.remaining.ToNanoseconds() / 1e9)} left")
    return ", ".join(parts)
