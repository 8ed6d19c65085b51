"""The exit codes of ``vflow serve``, for whoever decides whether to start it again."""

from __future__ import annotations

STOPPED = 0
"""It was told to stop, and did."""

USAGE = 2
"""Wrong arguments or settings, or a model that cannot be served. It will not get better by itself."""

FAILED = 70
"""A part that the service needs has failed (EX_SOFTWARE of ``sysexits.h``): start it again."""

NOT_NOW = 75
"""It cannot start as things are, but may later (EX_TEMPFAIL): a port is taken, a folder is in use, a disk is full."""
