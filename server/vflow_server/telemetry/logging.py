"""Logs: structlog to standard error, for people (console) or for machines (JSON lines).

All that the process writes to standard error goes the same way and has the same form: the log of libraries, Python's
warnings and tracebacks, and the lines of native code and of child processes. A :class:`LogSink` writes it.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import logging
import os
import stat
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from io import TextIOBase
from types import TracebackType
from typing import Any

import structlog

from vflow_server.telemetry.log_sink import LogSink
from vflow_server.watchdog.pulse import Pulse

MOST_FOREIGN = 100
"""Lines a second that others than this service may log. Callers can cause some, as by a failed TLS handshake."""

LONGEST_FOREIGN = 16 * 1024
"""Bytes after which a line of others is broken."""

_LAST_WORDS = 2.0
"""Seconds that the end of the process waits for the last lines."""

log = structlog.get_logger(__name__)

_sink: LogSink | None = None


def configure(log_format: str, log_level: str) -> None:
    """Set up logging for the process, once.

    Standard error becomes a pipe into the log, also for native code and for child processes.

    Args:
        log_format: ``console`` or ``json``.
        log_level: ``debug``, ``info``, ``warning`` or ``error``.
    """
    global _sink
    machine = log_format == "json"
    colors = not machine and os.isatty(2)
    # Plain tracebacks in both: those with local variables would write users' texts and pictures into the log.
    renderer: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if machine
        else [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)]
    )
    processors: list[structlog.typing.Processor] = [
        # Of the call during which a line is logged: request, tenant, session, trace.
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=machine),
        *renderer,
    ]

    def lost(lines: int) -> str:
        message = "log lines could not be written and were lost"
        return _machine_line(message, "error", lines=lines) if machine else f"vflow: {lines} {message}"

    descriptor, foreign = _capture_standard_error()
    sink = _sink = LogSink(descriptor, lost)
    level = logging.getLevelNamesMapping()[log_level.upper()]
    structlog.configure(
        processors=[_Rendering(processors)],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *names: _Lines(sink),
        cache_logger_on_first_use=True,
    )
    others = _Foreign(sink, machine=machine)
    sys.stderr = _StandardError(others.put)
    threading.Thread(target=_forward, args=(foreign, others.put), name="vflow-stderr", daemon=True).start()
    faulthandler.enable(_unblocked(descriptor))  # a process that crashes cannot wait for a thread
    _log_exceptions()
    atexit.register(flush, _LAST_WORDS)
    logging.captureWarnings(True)
    logging.basicConfig(handlers=[_Handler()], level=max(level, logging.WARNING), force=True)


def log_pulse() -> Pulse | None:
    """The pulse of the thread that writes the log; None before :func:`configure`."""
    return _sink.pulse if _sink else None


def dropped_lines() -> int:
    """Number of log lines that could not be written so far."""
    return _sink.dropped if _sink else 0


def flush(patience: float) -> None:
    """Wait until what was logged is written, at most ``patience`` seconds."""
    if _sink:
        _sink.flush(patience)


def refuse(message: str, *, machine: bool) -> None:
    """Say on standard error why the process ends; ``machine`` makes a JSON line of it. Raises no exception."""
    line = _machine_line(message, "error") if machine else f"vflow: {message}"
    if _sink:
        _sink.put(line)
        return
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass  # the exit code remains


def _machine_line(message: str, level: str, **further: object) -> str:
    timestamp = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    return json.dumps({"event": message, "level": level, "timestamp": timestamp, **further})


class _Rendering:
    """A processor that runs others, and makes a line even where one of them fails."""

    def __init__(self, processors: list[structlog.typing.Processor]) -> None:
        self._processors = processors

    def __call__(self, logger: Any, method: str, event: structlog.typing.EventDict) -> Any:
        rendered: Any = dict(event)
        try:
            for process in self._processors:
                rendered = process(logger, method, rendered)
        except Exception as error:  # as of a value whose repr() fails
            return _machine_line(str(event.get("event")), method, unloggable=type(error).__name__)
        return rendered


class _Lines:
    """What structlog takes for a logger: each of its methods writes a line."""

    def __init__(self, sink: LogSink) -> None:
        self.msg = self.log = self.debug = self.info = self.warning = sink.put
        self.error = self.critical = self.exception = self.fatal = self.failure = self.warn = sink.put


class _Foreign:
    """Lines that others than this service write."""

    def __init__(self, sink: LogSink, *, machine: bool) -> None:
        self._sink = sink
        self._machine = machine
        self._second = 0
        self._lines = 0

    def put(self, line: str) -> None:
        """Log ``line``, unless there are too many of its kind."""
        if not (line := line.rstrip()):
            return
        if (second := int(time.monotonic())) != self._second:
            self._second, self._lines = second, 0
        self._lines += 1
        if self._lines > MOST_FOREIGN:
            self._sink.drop()
        else:
            self._sink.put(_machine_line(line, "warning", logger="stderr") if self._machine else line)


class _StandardError(TextIOBase):
    """Takes the place of ``sys.stderr``, and makes lines of what is printed. Writing never fails and never blocks."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, put: Callable[[str], None]) -> None:
        self._put = put
        self._begun = threading.local()  # of each thread, so that no two share a line

    def write(self, text: str) -> int:
        """Log the lines that are complete."""
        *lines, rest = (getattr(self._begun, "line", "") + str(text)).split("\n")
        for line in lines:
            self._put(line)
        if len(rest) > LONGEST_FOREIGN:
            self._put(rest)
            rest = ""
        self._begun.line = rest
        return len(text)

    def writable(self) -> bool:
        """It is."""
        return True

    def fileno(self) -> int:
        """The descriptor of standard error, which leads into the log, too."""
        return 2


class _Handler(logging.Handler):
    """Logs what libraries log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Log ``record`` under the name of its logger."""
        try:
            method = (
                record.levelname.lower() if record.levelname.lower() in ("warning", "error", "critical") else "info"
            )
            further = {"exc_info": record.exc_info} if record.exc_info else {}
            getattr(log, method)(record.getMessage(), logger=record.name, **further)
        except Exception:  # a library's message may not fit its arguments
            log.error("a library logged what cannot be shown", logger=record.name)


def _capture_standard_error() -> tuple[int, int]:
    """Put a pipe in the place of standard error; returns what it was, and the end of the pipe to read from."""
    descriptor = os.dup(2)
    reading, writing = os.pipe()
    # Native code may write while it holds the interpreter's lock, without which nobody reads.
    os.set_blocking(writing, False)
    os.dup2(writing, 2)
    os.close(writing)
    return descriptor, reading


def _unblocked(descriptor: int) -> int:
    """A descriptor of the same pipe, so that a crash does not wait for its reader either; or ``descriptor`` itself."""
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        return descriptor
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # nobody reads the pipe, or there is no /proc
        return descriptor


def _forward(reading: int, put: Callable[[str], None]) -> None:
    """Log the lines that arrive from native code and from child processes."""
    with open(reading, "rb") as lines:
        while line := lines.readline(LONGEST_FOREIGN):
            put(line.decode(errors="backslashreplace"))


def _log_exceptions() -> None:
    """Log the exceptions that nobody handles."""

    def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        log.critical("an exception ended the process", exc_info=(kind, error, trace))

    def in_thread(failure: threading.ExceptHookArgs) -> None:
        name = failure.thread.name if failure.thread else "unknown"
        value = failure.exc_value or failure.exc_type()
        log.critical(
            "an exception ended a thread", thread=name, exc_info=(failure.exc_type, value, failure.exc_traceback)
        )

    def unraisable(failure: sys.UnraisableHookArgs) -> None:
        what = getattr(failure.object, "__qualname__", type(failure.object).__name__)
        value = failure.exc_value or failure.exc_type()
        log.error(
            failure.err_msg or "an exception was ignored",
            where=what,
            exc_info=(failure.exc_type, value, failure.exc_traceback),
        )

    sys.excepthook, threading.excepthook, sys.unraisablehook = uncaught, in_thread, unraisable
