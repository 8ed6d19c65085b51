"""The contract is documented field by field, and the generated stubs are those of its present text."""

import re
from pathlib import Path

import pytest
from google.protobuf.descriptor import FileDescriptor

from tests.repository.source import ROOT
from vflow_client.v1 import compression_pb2, conversations_pb2, errors_pb2, images_pb2, strategies_pb2

FILES = sorted((ROOT / "proto" / "vflow" / "v1").glob("*.proto"))
STUBS = [compression_pb2, conversations_pb2, errors_pb2, images_pb2, strategies_pb2]
DECLARATION = re.compile(
    r"^\s*(?:(?:message|service|enum|rpc|oneof)\s+\w+|(?:repeated |optional )?[\w.]+ \w+ = \d+;|[A-Z_]+ = \d+;)"
)
# Their meaning is their type's, or in AIP-126's case their own name.
NEEDS_NONE = re.compile(r"_UNSPECIFIED = 0;|^message \w+(Request|Response) |^\s*oneof event ")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_declaration_has_a_comment(file: Path) -> None:
    lines = file.read_text().splitlines()
    declared = [number for number, line in enumerate(lines) if DECLARATION.match(line) and not NEEDS_NONE.search(line)]
    assert declared
    bare = [lines[number].strip() for number in declared if not lines[number - 1].strip().startswith("//")]
    assert not bare


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_lines_are_short(file: Path) -> None:
    assert max(len(line) for line in file.read_text().splitlines()) <= 120


def test_the_stubs_are_up_to_date() -> None:
    """Compares names, so that an editable installation that has missed a change of the contract is noticed."""
    written = {name for file in FILES for name in re.findall(r"^\s*(?:[\w.]+ )*(\w+) = \d+;", file.read_text(), re.M)}
    assert {module.DESCRIPTOR.name.rpartition("/")[2] for module in STUBS} == {file.name for file in FILES}
    assert written == {name for module in STUBS for name in declared_names(module.DESCRIPTOR)}


def declared_names(file: FileDescriptor) -> set[str]:
    """The names of all fields and enum values of a file."""
    names: set[str] = set()
    for message in file.message_types_by_name.values():
        names |= {field.name for field in message.fields}
        names |= {value.name for enum in message.enum_types for value in enum.values}
    for enum in file.enum_types_by_name.values():
        names |= {value.name for value in enum.values}
    return names


def test_every_reason_states_its_status_code() -> None:
    text = (ROOT / "proto/vflow/v1/errors.proto").read_text()
    for name in errors_pb2.ErrorReason.keys()[1:]:
        comment = re.search(rf"((?:^ *//.*\n)+) *{name} = ", text, re.M)
        assert comment and re.match(r"\s*// \[[A-Z_]+\] ", comment[1]), name
