"""The report: what was measured so far, whole in its file at every moment."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from benchmarks.device_check.part import Part
from benchmarks.table import Row, render

State = Literal["waiting", "running", "done", "failed", "out of time"]


class PartReport:
    """What one part measured.

    Attributes:
        state: where it stands.
        seconds: how long it ran.
        error: the end of its traceback, if it failed.
        rows: what it has measured so far.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: State = "waiting"
        self.seconds = 0.0
        self.error: str | None = None
        self.rows: list[Row] = []


class Report:
    """The parts and the verdicts, and the file that holds them.

    Args:
        path: the file; None: nothing is written.
        parts: the parts that are to run.
        about: what else belongs at the top.
    """

    def __init__(self, path: Path | None, parts: Sequence[Part], about: Mapping[str, object]) -> None:
        self._path = path
        self._about = {"began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **about}
        self.parts = {part.name: PartReport(part.name) for part in parts}
        self.targets: Sequence[Row] = ()
        self.finished = False
        self.write()

    def write(self) -> None:
        """Replace the file in one move, so that it can be read whole at every moment."""
        if self._path is None:
            return
        document = {
            **self._about,
            "finished": self.finished,
            "parts": [vars(part) for part in self.parts.values()],
            "targets": self.targets,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        aside = self._path.with_name(f"{self._path.name}.part")
        aside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, self._path)

    def rows(self, part: str) -> Sequence[Row]:
        """What a part has measured; nothing if it does not run."""
        return self.parts[part].rows if part in self.parts else ()

    def text(self, part: str) -> str:
        """A part as text: a table for each run of rows with the same columns, and its error."""
        found = self.parts[part]
        tables: list[list[Row]] = []
        for row in found.rows:
            if tables and list(tables[-1][-1]) == list(row):
                tables[-1].append(row)
            else:
                tables.append([row])
        heading = f"{part}: {found.state} after {found.seconds:.1f} s"
        return "\n\n".join([heading, *map(render, tables), *([found.error] if found.error else [])])
