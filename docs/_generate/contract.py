"""The reference of the contract: one page for each file under `proto/`, made from its declarations and comments.

Every declaration has a comment of its own directly above it, which `tests/repository/test_contract.py` checks; so the
text of a file is read line by line, and no protocol compiler is needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_OPENED = re.compile(r"^(service|message|enum|oneof) (\w+) \{(\})?$")
_METHOD = re.compile(r"^rpc (\w+)\((stream )?([\w.]+)\) returns \((stream )?([\w.]+)\)(;| \{)$")
_FIELD = re.compile(r"^(repeated |optional )?([\w.]+(?:<[\w., ]+>)?) (\w+) = \d+;$")
_VALUE = re.compile(r"^([A-Z][A-Z0-9_]*) = (\d+);$")


@dataclass
class Declaration:
    """Something that a file declares.

    Attributes:
        kind: service, rpc, message, field, oneof, enum or value.
        name: its own name, without those of the messages around it.
        comment: the text above it.
        type: of a field, its type; of a method, its request and response.
        members: what is declared inside it.
    """

    kind: str
    name: str
    comment: str
    type: tuple[str, ...] = ()
    members: list[Declaration] = field(default_factory=list)


def parse(text: str) -> Declaration:
    """Read the declarations of a file, as members of a declaration of the kind "file" whose comment is the file's.

    Raises:
        ValueError: a line is none that the contract's style has.
    """
    file = Declaration("file", "", "")
    scopes = [file]
    comment: list[str] = []
    for line in (each.strip() for each in text.splitlines()):
        scope = scopes[-1]
        if line.startswith("//"):
            comment.append(line.removeprefix("//").removeprefix(" "))
            continue
        made: Declaration | None = None
        said = "\n".join(comment)
        if opened := _OPENED.match(line):
            made = Declaration(opened[1], opened[2], said)
            if not opened[3]:
                scopes.append(made)
        elif method := _METHOD.match(line):
            request, response = (
                f"{stream or ''}{name}" for stream, name in ((method[2], method[3]), method.group(4, 5))
            )
            made = Declaration("rpc", method[1], said, (request, response))
            if method[6] != ";":
                scopes.append(made)
        elif scope.kind == "rpc":
            if line == "}":
                scopes.pop()
        elif each := _FIELD.match(line):
            made = Declaration("field", each[3], said, ((each[1] or "") + each[2],))
        elif value := _VALUE.match(line):
            made = Declaration("value", value[1], said)
        elif line == "}":
            scopes.pop()
        elif line and not re.match(r"(syntax|package|import|option|reserved)\b", line):
            raise ValueError(f"not a line of the contract's style: {line!r}")
        if made is not None:
            scope.members.append(made)
        comment = []
    return file


def pages(folder: Path) -> dict[str, str]:
    """The Markdown page of each file of the contract, by the file's stem.

    Args:
        folder: that holds the files of one package.
    """
    files = {path.stem: parse(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.proto"))}
    known = {
        name: stem for stem, file in files.items() for name, each in _all(file) if each.kind in ("message", "enum")
    }
    return {stem: _page(stem, file, known) for stem, file in files.items()}


def _all(scope: Declaration, around: str = "") -> Iterator[tuple[str, Declaration]]:
    """Every message, enum and service, each under its name with those around it."""
    for member in scope.members:
        if member.kind in ("message", "enum", "service"):
            name = f"{around}{member.name}"
            yield name, member
            yield from _all(member, f"{name}.")


def _page(stem: str, file: Declaration, known: dict[str, str]) -> str:
    lines = [f"# {stem}.proto", ""]
    for name, declared in _all(file):
        lines += [f"## {declared.kind} {name} {{ #{name} }}", "", _prose(declared.comment), ""]
        if declared.kind == "service":
            for method in declared.members:
                request, response = (_linked(each, name, known) for each in method.type)
                lines += [f"### {method.name} {{ #{name}.{method.name} }}", ""]
                lines += [f"{request} → {response}", "", _prose(method.comment), ""]
        elif declared.kind == "enum":
            lines += ["| Value | Meaning |", "|---|---|"]
            lines += [
                f"| `{value.name}` | {_coded(_cell(value.comment))} |" for value in declared.members if value.comment
            ]
        elif fields := list(_fields(declared)):
            lines += ["| Field | Type | Meaning |", "|---|---|---|"]
            for choice, each in fields:
                meaning = f"One of `{choice}`. {each.comment}" if choice else each.comment
                lines.append(f"| `{each.name}` | {_linked(each.type[0], name, known)} | {_cell(meaning)} |")
        lines.append("")
    return "\n".join(lines)


def _fields(message: Declaration) -> Iterator[tuple[str, Declaration]]:
    """The fields of a message, each with the name of the choice that it belongs to, or an empty one."""
    for member in message.members:
        if member.kind == "field":
            yield "", member
        elif member.kind == "oneof":
            yield from ((member.name, each) for each in member.members)


def _linked(type_: str, around: str, known: dict[str, str]) -> str:
    """A type with its label, as a link where the contract declares it; ``around`` is where it was named."""
    label, _, name = type_.rpartition(" ")
    scopes = around.split(".")
    for depth in range(len(scopes), -1, -1):
        whole = ".".join((*scopes[:depth], name))
        if whole in known:
            name = f"[{name}]({known[whole]}.md#{whole})"
            break
    else:
        name = f"`{name}`"
    return f"{label} {name}".strip()


def _coded(comment: str) -> str:
    """A reason's comment, with the status code in front of it as code."""
    return re.sub(r"^\[([A-Z_]+)\] ", r"`[\1]` ", comment)


def _prose(comment: str) -> str:
    return comment.replace("<", "&lt;").replace("*", r"\*")


def _cell(comment: str) -> str:
    """A comment as one cell of a table; the items of a list in it go on lines of their own."""
    lines = re.sub(r"\n- ", "<br>• ", _prose(comment)).replace("\n  ", " ")
    return lines.replace("\n", " ").replace("|", r"\|")
