"""The reference of the contract: one page for each file under `proto/`, made from its descriptors and comments."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Protobuf can read `field_behavior` only if the extension is imported before a file is parsed.
from google.api.field_behavior_pb2 import FieldBehavior, field_behavior
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from google.protobuf.message import Message

Place = tuple[int, ...]
"""Path of a declaration in the descriptor of its file, by which the source information knows its comment."""

_KINDS = ("service", "message_type", "nested_type", "enum_type")
"""Fields of descriptors that hold declarations with a section of their own, in the order of the sections."""


def pages(contract: Path) -> dict[str, str]:
    """The Markdown page of each file of the contract, by the file's stem.

    Args:
        contract: the folder of the contract. Its own files are in the folder `vflow` there.

    Raises:
        subprocess.CalledProcessError: buf cannot compile the contract. It has printed why.
    """
    buf = Path(sys.executable).with_name("buf")
    command = [str(buf), "build", str(contract), f"--path={contract / 'vflow'}", "--exclude-imports", "--output=-"]
    files = FileDescriptorSet.FromString(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout).file
    homes = {f".{file.package}.{name}": Path(file.name).stem for file in files for _, name, _ in _declared(file)}
    return {Path(file.name).stem: _Page(file, homes).text() for file in files}


def _members(scope: Message, kind: str, path: Place) -> Iterator[tuple[Place, Any]]:
    """What a field of a descriptor holds, each with its path."""
    number = scope.DESCRIPTOR.fields_by_name[kind].number
    yield from (((*path, number, index), each) for index, each in enumerate(getattr(scope, kind)))


def _declared(scope: Message, path: Place = (), around: str = "") -> Iterator[tuple[Place, str, Any]]:
    """The path, name and descriptor of each service, message and enum; names include those of the messages around."""
    for kind in _KINDS:
        if kind in scope.DESCRIPTOR.fields_by_name:
            for here, each in _members(scope, kind, path):
                yield here, around + each.name, each
                yield from _declared(each, here, f"{around}{each.name}.")


class _Page:
    """The page of one file.

    Args:
        file: its descriptor.
        homes: for each type of the contract, the stem of the file that declares it.
    """

    def __init__(self, file: FileDescriptorProto, homes: dict[str, str]) -> None:
        self._file = file
        self._homes = homes
        self._comments = {
            tuple(place.path): textwrap.dedent(place.leading_comments).strip().replace("<", "&lt;").replace("*", r"\*")
            for place in file.source_code_info.location
        }

    def text(self) -> str:
        lines = [f"# {Path(self._file.name).name}", ""]
        for path, name, declared in _declared(self._file):
            match declared:
                case ServiceDescriptorProto():
                    kind, members = "service", self._methods(declared, path)
                case EnumDescriptorProto():
                    kind, members = "enum", self._values(declared, path)
                case _:
                    kind, members = "message", self._fields(declared, path)
            lines += [f"## {kind} {name} {{ #{name} }}", "", self._comments[path], "", *members, ""]
        return "\n".join(lines)

    def _methods(self, service: ServiceDescriptorProto, path: Place) -> Iterator[str]:
        for here, method in _members(service, "method", path):
            response = "stream " * method.server_streaming + self._linked(method.output_type)
            yield from (f"### {method.name} {{ #{service.name}.{method.name} }}", "")
            yield from (f"{self._linked(method.input_type)} → {response}", "", self._comments[here], "")

    def _fields(self, message: DescriptorProto, path: Place) -> Iterator[str]:
        if message.field:
            yield from ("| Field | Type | Meaning |", "|---|---|---|")
        for here, field in _members(message, "field", path):
            chosen = field.HasField("oneof_index") and not field.proto3_optional
            choice = f"One of `{message.oneof_decl[field.oneof_index].name}`. " if chosen else ""
            yield f"| `{field.name}` | {self._type(field)} | {choice}{self._cell(here)} |"

    def _values(self, enum: EnumDescriptorProto, path: Place) -> Iterator[str]:
        yield from ("| Value | Meaning |", "|---|---|")
        for here, value in _members(enum, "value", path):
            # The comment of an error's reason begins with its status code.
            meaning = re.sub(r"^\[([A-Z_]+)\] ", r"`\1` ", self._cell(here))
            yield f"| `{value.name}` | {meaning} |"

    def _type(self, field: FieldDescriptorProto) -> str:
        """The type of a field, and how it behaves: "repeated Part, required"."""
        name = field.type_name or field.Type.Name(field.type).removeprefix("TYPE_").lower()
        label = "repeated " if field.label == field.LABEL_REPEATED else ""
        behaviour = [FieldBehavior.Name(each) for each in field.options.Extensions[field_behavior]]
        if field.proto3_optional and "OPTIONAL" not in behaviour:
            behaviour.append("OPTIONAL")
        return ", ".join([label + self._linked(name), *(each.lower().replace("_", " ") for each in behaviour)])

    def _linked(self, name: str) -> str:
        """A type, as a link where the contract declares it."""
        short = name.removeprefix(f".{self._file.package}.").removeprefix(".")
        return f"[{short}]({self._homes[name]}.md#{short})" if name in self._homes else f"`{short}`"

    def _cell(self, path: Place) -> str:
        """A comment as one cell of a table; the items of a list in it go on lines of their own."""
        lines = re.sub(r"\n- ", "<br>• ", self._comments[path]).replace("\n  ", " ")
        return lines.replace("\n", " ").replace("|", r"\|")
