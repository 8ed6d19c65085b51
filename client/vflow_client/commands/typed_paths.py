"""The paths of files as a person types them, or drops them on a terminal: quoted, escaped, several at once."""

import os
import re
import shlex

from vflow_client.picture_path import to_path

_WINDOWS = re.compile(r"""["']?([A-Za-z]:[\\/]|\\\\)""")
"""How a path of Windows begins. A backslash in it escapes nothing."""


def typed_paths(text: str) -> list[str]:
    """The paths that `text` names, with `~` expanded.

    A text that is the name of a file as it stands is one path, whatever is in it. Any other is split as a shell would:
    at white space, unless quotes or a backslash protect it. If none of the parts is a file, the text is one path, so
    that a message about it shows what was typed.
    """
    whole = os.path.expanduser(text.strip())
    if _exists(whole):
        return [whole]
    parts = [os.path.expanduser(part) for part in _split(text)]
    if len(parts) == 1 or any(map(_exists, parts)):
        return parts
    return [whole]


def _split(text: str) -> list[str]:
    lexer = shlex.shlex(text, posix=True, punctuation_chars="")
    lexer.whitespace_split = True
    lexer.commenters = ""
    if os.name == "nt" or _WINDOWS.match(text.strip()):
        lexer.escape = ""
    try:
        return list(lexer)
    except ValueError:  # a quote without its other half: an apostrophe
        return text.split()


def _exists(name: str) -> bool:
    try:
        return to_path(name).exists()
    except (OSError, ValueError):
        return False
