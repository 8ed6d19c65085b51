"""What the commands say about themselves."""

import contextlib
import io
from functools import cache

from vflow_server.cli import main


@cache
def told_by(*command: str) -> str:
    """What `vflow COMMAND --help` says.

    Raises:
        LookupError: there is no such command.
    """
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            main([*command, "--help"])
    except SystemExit as ended:
        if ended.code != 0:
            raise LookupError(f"vflow {' '.join(command)}: {output.getvalue()}") from None
    return output.getvalue()
