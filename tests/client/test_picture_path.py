"""The names of pictures as people write them."""

import os
import shlex
import unicodedata
from pathlib import Path

import pytest

from vflow_client.commands.typed_paths import typed_paths
from vflow_client.picture_path import names_picture, read_picture, to_path

NAMES = [
    "a.png",
    "a b.png",
    "it's.png",
    'the "best".png',
    "é ü.png",
    "back\\slash.png",
    "100%25.png",
    "#1?.png",
    "~.png",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in NAMES:
        (tmp_path / name).write_bytes(name.encode())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_every_way_to_write_a_name(folder: Path, name: str) -> None:
    path = folder / name
    escaped = "".join(letter if letter.isalnum() or letter in "/._-" else "\\" + letter for letter in str(path))
    for typed in (name, str(path), f"  {path} ", shlex.quote(str(path)), escaped, path.as_uri(), f"~/{name}"):
        (found,) = typed_paths(typed)
        assert read_picture(found) == name.encode(), typed
    assert read_picture(path.as_uri()) == read_picture(path) == name.encode()
    assert names_picture(name) and names_picture(str(path))


def test_several_files_are_dropped_at_once(folder: Path) -> None:
    assert typed_paths("a.png 'a b.png' é\\ ü.png") == ["a.png", "a b.png", "é ü.png"]
    assert typed_paths(f"{(folder / 'a b.png').as_uri()} a.png") == [(folder / "a b.png").as_uri(), "a.png"]
    assert typed_paths("a.png missing.png") == ["a.png", "missing.png"]
    assert typed_paths("no such file.png") == ["no such file.png"]
    assert typed_paths("it's not there.png") == ["it's not there.png"]


@pytest.mark.parametrize("path", [r"C:\new\table.png", r"\\server\new\table.png", r'"C:\new folder\table.png"'])
def test_backslashes_of_windows_escape_nothing(path: str) -> None:
    assert typed_paths(path) == [path.strip('"')]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_in_another_unicode_form(tmp_path: Path, form: str) -> None:
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    (tmp_path / unicodedata.normalize(form, "é.png")).write_bytes(b"picture")  # type: ignore[arg-type]
    assert read_picture(tmp_path / unicodedata.normalize(other, "é.png")) == b"picture"  # type: ignore[arg-type]


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")
    Path(name).write_bytes(b"picture")
    assert read_picture(name) == b"picture" and typed_paths(name) == [name]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("http://example.org/a.png", "http://example.org/a.png is not fetched: download it"),
        ("https://example.org/a.png", "is not fetched"),
        ("s3://bucket/a.png", "no address of a file"),
        ("file://elsewhere/a.png", "of another machine"),
        ("data:image/png;base64,AAAA", "b64decode"),
        ("a\0.png", "no name of a file"),
    ],
)
def test_what_is_no_file_here(name: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read_picture(name)


def test_a_missing_file_suggests_one_that_is_there(folder: Path) -> None:
    for typed in ("A.PNG", "a.pmg"):
        with pytest.raises(FileNotFoundError, match=r"did you mean 'a.png'\?"):
            read_picture(typed)
    with pytest.raises(FileNotFoundError) as plain:
        read_picture("entirely different")
    assert "did you mean" not in str(plain.value)
    with pytest.raises(FileNotFoundError):
        read_picture("/no/such/folder/a.png")
    with pytest.raises(IsADirectoryError):
        read_picture(folder)


def test_only_the_name_of_a_picture_that_exists_is_one(folder: Path) -> None:
    (folder / "notes.txt").write_text("")
    (folder / "folder.png").mkdir()
    for text in ("What is a.png?", "notes.txt", "b.png", "folder.png", "a.png\n", "", "x" * 5000 + ".png", "\0.png"):
        assert names_picture(text) == (text == "a.png\n") or "\n" in text
    assert to_path("a.png") == Path("a.png")
