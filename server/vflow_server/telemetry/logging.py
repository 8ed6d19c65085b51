"""Logs: structlog to standard error, for people (console) or for machines (JSON lines)."""

from __future__ import annotations

import logging
import sys

import structlog


def configure(log_format: str, log_level: str) -> None:
    """Set up logging for the process.

    Args:
        log_format: ``console`` or ``json``.
        log_level: ``debug``, ``info``, ``warning`` or ``error``.
    """
    machine = log_format == "json"
    # Plain tracebacks in both: those with local variables would write users' texts and pictures into the log.
    renderer: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if machine
        else [
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]
    )
    structlog.configure(
        processors=[
            # Of the call during which a line is logged: request, tenant, session, trace.
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=machine),
            *renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[log_level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
