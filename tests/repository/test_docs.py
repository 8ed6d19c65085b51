"""The documentation: the site builds without a warning and needs nothing from elsewhere, and no link leads nowhere."""

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vflow_client
from benchmarks.service import running_service
from docs._generate import commands, contract, library, links, settings
from tests.repository.source import ROOT

WRITTEN = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), ROOT / "vflowopt/demo/MODEL_CARD.md"]
LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
ASSET = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//|<link\b[^>]*\bhref=[\"']?(?:https?:)?//"
)
IMPORT = re.compile(r"(?:@import|url\()\s*[\"']?(?:https?:)?//")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_the_site_is_built_without_a_warning(site: Path) -> None:
    assert "x7" in (site / "tutorial.html").read_text()
    for page, content in {
        "client": "vflow_client.Session.ask",
        "client-aio": "vflow_client.aio.AsyncSession.ask",
        "library/compression": "vflowopt.compression.strategy.Strategy",
        "contract/conversations": "ChatOptions",
        "contract/errors": "SESSION_BUSY",
        "settings": "--kv-budget",
        "metrics": "vflow_first_token_seconds",
        "command-line": "vflow strategies compare",
    }.items():
        assert content in (site / f"reference/{page}.html").read_text(), page


def test_every_name_of_the_client_is_on_its_page(site: Path) -> None:
    page = (site / "reference/client.html").read_text()
    assert not [name for name in vflow_client.__all__ if not re.search(rf"\b{name}\b", page)]


def test_docstrings_are_shown_without_what_only_sphinx_reads(site: Path) -> None:
    left = re.compile(r":(class|func|meth|attr|mod): ?<code|::</p>")
    assert "questions about it follow:</p>" in (site / "reference/library.html").read_text()
    assert not [page.name for page in site.glob("reference/**/*.html") if left.search(page.read_text())]


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    assert ASSET.search('<script src="https://example.com/a.js">'), "the scan finds what it looks for"
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    assert not [page.name for page in pages if ASSET.search(page.read_text())]
    assert not [style.name for style in site.rglob("*.css") if IMPORT.search(style.read_text())]


def relative_links(path: Path) -> Iterator[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    yield from (link for link in LINK.findall(text) if not re.match(r"[a-z]+:|#", link))


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(path: Path) -> None:
    made = {f"docs/reference/{name}.md" for name in ("settings", "metrics", "command-line")}
    made |= {f"docs/reference/contract/{path.stem}.md" for path in (ROOT / "proto/vflow/v1").glob("*.proto")}
    made |= {f"docs/reference/library/{name}.md" for name in library.pages(ROOT / "vflowopt")}
    for link in relative_links(path):
        target = Path(os.path.normpath(path.parent / link.partition("#")[0]))
        assert target.exists() or target.relative_to(ROOT).as_posix() in made, link


def test_the_readme_is_short_and_links_to_files_that_are_there_without_a_build() -> None:
    readme = ROOT / "README.md"
    assert len(readme.read_text().split()) < 900
    found = list(relative_links(readme))
    assert len(found) > 15
    assert all((ROOT / link.partition("#")[0]).exists() for link in found)


def blocks(document: str, language: str) -> list[str]:
    """The blocks of code in a document that are in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.M | re.S)


def test_the_first_programs_print_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (readme,) = blocks("README.md", "python")
    first, full = blocks("docs/tutorial.md", "python")
    shown = blocks("docs/tutorial.md", "text")[1]
    changed = full.partition("\n")[0]
    with running_service("--log-level", "warning") as address:

        def printed(program: str) -> str:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(program.replace("localhost:50051", address))
            return out.getvalue()

        assert printed(readme) == "x7\n"
        assert printed(first) == shown
        unpruned = printed("\n".join(changed if line.startswith("with ") else line for line in first.splitlines()))
    assert re.findall("-> .*", unpruned) == re.findall("-> .*", shown)
    tutorial = (ROOT / "docs/tutorial.md").read_text()
    assert all(text.splitlines()[-1].partition(" ")[0] in tutorial for text in (unpruned, shown))


def test_the_programs_of_the_library_print_what_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    programs, said = blocks("docs/how-to/library.md", "python"), blocks("docs/how-to/library.md", "text")
    for program, printed in zip(programs, said, strict=True):
        exec(program, names)
        assert capsys.readouterr().out == printed


def test_every_option_has_a_row_and_every_command_a_section() -> None:
    assert "| `25%` |" in settings.page()
    sections = re.findall(r"^## (vflow.*)$", commands.page(), re.M)
    assert {"vflow", "vflow serve", "vflow strategies", "vflow strategies compare", "vflow health"} <= set(sections)


def test_a_contract_is_read_with_what_is_nested_linked_and_required(tmp_path: Path) -> None:
    (tmp_path / "google").symlink_to(ROOT / "proto/google")
    (tmp_path / "vflow").mkdir()
    (tmp_path / "vflow/talks.proto").write_text(
        """
        syntax = "proto3";
        package vflow;
        import "google/api/field_behavior.proto";

        // What it is.
        service Talks {
          // Says it.
          rpc Say(Saying) returns (stream Saying) {
            option deprecated = true;
          }
        }

        // Words.
        message Saying {
          // How.
          enum Tone {
            // [ABORTED] Loud.
            LOUD = 0;
          }

          // Which.
          oneof what {
            // Text.
            string text = 1;
          }
          // One | two:
          // - a
          // - b.
          repeated Tone tones = 2 [
            (google.api.field_behavior) = REQUIRED,
            (google.api.field_behavior) = IMMUTABLE
          ];
          // Less < more.
          optional int32 number = 3;
        }
        """
    )
    page = contract.pages(tmp_path)["talks"]
    rows = [line for line in page.splitlines() if line and not line.startswith("|--")]
    assert rows == [
        "# talks.proto",
        "## service Talks { #Talks }",
        "What it is.",
        "### Say { #Talks.Say }",
        "[Saying](talks.md#Saying) → stream [Saying](talks.md#Saying)",
        "Says it.",
        "## message Saying { #Saying }",
        "Words.",
        "| Field | Type | Meaning |",
        "| `text` | `string` | One of `what`. Text. |",
        r"| `tones` | repeated [Saying.Tone](talks.md#Saying.Tone), required, immutable | One \| two:<br>• a<br>• b. |",
        "| `number` | `int32`, optional | Less &lt; more. |",
        "## enum Saying.Tone { #Saying.Tone }",
        "How.",
        "| Value | Meaning |",
        "| `LOUD` | `ABORTED` Loud. |",
    ]


def test_links_of_a_page_lead_to_pages_of_the_site(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    (docs / "guides").mkdir(parents=True)
    (tmp_path / "SECURITY.md").touch()
    (tmp_path / "unit").touch()

    def moved(markdown: str) -> str:
        return links.site_links(
            markdown,
            origin=docs / "guides/a.md",
            page="guides/a.md",
            root=tmp_path,
            docs=docs,
            moved={"SECURITY.md": "project/security.md"},
        )

    assert moved("[s](../../SECURITY.md#x)") == "[s](../project/security.md#x)"
    assert moved("[the `unit`](../../unit) [unit](../../unit)") == "the `unit` unit (`unit`)"
    assert (
        moved("![p](../p.svg) [w](https://a.b) [h](#c) [b](b.md)")
        == "![p](../p.svg) [w](https://a.b) [h](#c) [b](b.md)"
    )
    with pytest.raises(links.MissingFile):
        moved("[n](../../nothing)")
