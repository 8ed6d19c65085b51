"""Links in pages that also have to work where the repository is browsed.

There `../SECURITY.md` and `../deploy/envoy/envoy.yaml` are files beside the page. On the site some of these files are
pages too, and the others are not there at all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")


class MissingFile(ValueError):
    """A page links to a file that the repository does not have."""


def site_links(markdown: str, *, origin: Path, page: str, root: Path, docs: Path, moved: Mapping[str, str]) -> str:
    """Have the links of a page lead to pages of the site, and name the files that are no pages without a link.

    Args:
        markdown: the page.
        origin: the file that it was written as; its links are relative to that.
        page: the page's own path within the site's sources.
        root: of the repository.
        docs: the folder of the site's sources.
        moved: for each file outside that folder that is a page of the site, the page's path.

    Raises:
        MissingFile: a link leads to no file of the repository.
    """

    def changed(link: re.Match[str]) -> str:
        text, target = link[1], link[2]
        path, hash_, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return link[0]
        file = Path(os.path.normpath(origin.parent / path))
        if file.is_relative_to(docs):
            site = file.relative_to(docs).as_posix()
        elif file.exists():
            name = file.relative_to(root).as_posix()
            if name not in moved:
                return text if "`" in text else f"{text} (`{name}`)"
            site = moved[name]
        else:
            raise MissingFile(f"{origin.relative_to(root)} links to {target}, which is not in the repository")
        return f"[{text}]({os.path.relpath(site, os.path.dirname(page) or '.')}{hash_}{anchor})"

    return _LINK.sub(changed, markdown)
