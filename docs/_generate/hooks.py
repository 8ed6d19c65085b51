"""Hooks of MkDocs: they add the generated pages, and the pages that are files elsewhere in the repository."""

from __future__ import annotations

import logging
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs._generate import commands, contract, library, metrics, settings
from docs._generate.links import MissingFile, site_links

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

MOVED = {
    "CHANGELOG.md": "project/changelog.md",
    "CODE_OF_CONDUCT.md": "project/conduct.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "vflowopt/demo/MODEL_CARD.md": "reference/embedded-model.md",
}
"""Files outside `docs/` that are pages of the site: where they are in the repository, and where on the site."""

# MkDocs counts the warnings of this logger, and --strict fails for one.
log = logging.getLogger("mkdocs.hooks")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is generated."""
    made = {
        "reference/settings.md": settings.page(),
        "reference/metrics.md": metrics.page(),
        "reference/command-line.md": commands.page(),
    }
    made |= {f"reference/contract/{name}.md": page for name, page in contract.pages(ROOT / "proto").items()}
    made |= {f"reference/library/{name}.md": page for name, page in library.pages(ROOT / "vflowopt").items()}
    made |= {page: (ROOT / name).read_text(encoding="utf-8") for name, page in MOVED.items()}
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to files of the repository to where they are on the site."""
    path = page.file.src_uri
    origins = {site: ROOT / name for name, site in MOVED.items()}
    try:
        return site_links(markdown, origin=origins.get(path, DOCS / path), page=path, root=ROOT, docs=DOCS, moved=MOVED)
    except MissingFile as error:
        log.warning(str(error))
        return markdown
