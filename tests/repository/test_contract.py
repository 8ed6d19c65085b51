"""The contract is well formed and documented, and the stubs are typed, documented and those of its present text."""

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import google.api
import pytest
from google.api.field_behavior_pb2 import FieldBehavior, field_behavior
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FileDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet

from tests.repository.source import ROOT
from vflow_client.v1 import (
    compression_pb2,
    compression_pb2_grpc,
    conversations_pb2,
    conversations_pb2_grpc,
    errors_pb2,
    images_pb2,
    strategies_pb2,
    strategies_pb2_grpc,
)

CONTRACT = ROOT / "proto"
FILES = sorted((CONTRACT / "vflow" / "v1").glob("*.proto"))
STUBS = [compression_pb2, conversations_pb2, errors_pb2, images_pb2, strategies_pb2]


def buf(*arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    """Runs buf, which pip installs beside Python, in the folder of the contract."""
    command = [Path(sys.executable).with_name("buf"), *arguments]
    return subprocess.run(command, cwd=CONTRACT, capture_output=True, timeout=60)


def test_buf_has_no_complaints() -> None:
    linted = buf("lint")
    assert linted.returncode == 0, linted.stdout.decode()


def test_the_files_are_formatted() -> None:
    formatted = buf("format", "--diff", "--exit-code", "--path", "vflow")
    assert formatted.returncode == 0, formatted.stdout.decode()


def test_what_it_imports_is_shipped_unchanged() -> None:
    (api,) = {Path(folder) for folder in google.api.__path__ if (Path(folder) / "resource.proto").exists()}
    shipped = sorted((CONTRACT / "google").rglob("*.proto"))
    assert shipped
    for file in shipped:
        original = api.parent / file.relative_to(CONTRACT / "google")
        # The only one that the package gives another name than the one by which it is imported.
        if original.name == "operations.proto":
            original = original.with_name("operations_proto.proto")
        assert file.read_text() == original.read_text(), f"{file} differs from googleapis-common-protos: copy it anew"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_lines_are_short(file: Path) -> None:
    assert max(len(line) for line in file.read_text().splitlines()) <= 120


def test_every_reason_states_its_status_code() -> None:
    text = (CONTRACT / "vflow/v1/errors.proto").read_text()
    for name in errors_pb2.ErrorReason.keys()[1:]:
        comment = re.search(rf"((?:^ *//.*\n)+) *{name} = ", text, re.M)
        assert comment and re.match(r"\s*// \[[A-Z_]+\] ", comment[1]), name


def test_every_field_of_a_request_says_whether_it_is_required() -> None:
    silent = [
        field.full_name
        for message in requests()
        for field in message.fields
        if not field.GetOptions().Extensions[field_behavior]
        and (field.containing_oneof is None or field.containing_oneof.name.startswith("_"))
    ]
    assert not silent


def test_resource_names_are_required_or_have_a_default() -> None:
    (name,) = conversations_pb2.GetSessionRequest.DESCRIPTOR.fields
    strategy = conversations_pb2.Session.DESCRIPTOR.fields_by_name["strategy"]
    assert list(name.GetOptions().Extensions[field_behavior]) == [FieldBehavior.REQUIRED]
    assert list(strategy.GetOptions().Extensions[field_behavior]) == [FieldBehavior.OPTIONAL, FieldBehavior.IMMUTABLE]


def requests() -> Iterator[Descriptor]:
    """The messages of the contract that requests consist of."""
    services = [service for module in STUBS for service in module.DESCRIPTOR.services_by_name.values()]
    waiting = [method.input_type for service in services for method in service.methods]
    seen: set[str] = set()
    while waiting:
        message = waiting.pop()
        if message.full_name in seen or not message.file.name.startswith("vflow/"):
            continue
        seen.add(message.full_name)
        yield message
        # What the service alone fills in is no part of a request.
        waiting += [
            field.message_type
            for field in message.fields
            if field.message_type and FieldBehavior.OUTPUT_ONLY not in field.GetOptions().Extensions[field_behavior]
        ]


def test_the_stubs_are_up_to_date(tmp_path: Path) -> None:
    """So that an editable installation that has missed a change of the contract is noticed."""
    built = buf("build", "--exclude-source-info", "--output", tmp_path / "contract.binpb")
    assert built.returncode == 0, built.stderr.decode()
    files = FileDescriptorSet.FromString((tmp_path / "contract.binpb").read_bytes()).file
    written = {file.name: file for file in files if file.name.startswith("vflow/")}
    assert sorted(written) == sorted(module.DESCRIPTOR.name for module in STUBS)
    for module in STUBS:
        stub = FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(stub)
        assert normalized(written[stub.name]) == normalized(stub)


def normalized(file: FileDescriptorProto) -> FileDescriptorProto:
    """Without what compilers add on their own, each in its way."""
    file.DiscardUnknownFields()
    waiting: list[DescriptorProto] = list(file.message_type)
    while waiting:
        message = waiting.pop()
        for field in message.field:
            field.ClearField("json_name")
        waiting += message.nested_type
    return file


def test_help_on_a_message_says_what_it_is_and_what_its_fields_are() -> None:
    text = images_pb2.ImageReceipt.__doc__
    assert text and text.startswith("What one picture or video cost, and what compression saved.")
    assert "    kept_tokens (repeated int32):\n        Number of visual tokens that each stage keeps" in text
    assert "    session (string, required):\n" in str(conversations_pb2.ChatRequest.__doc__)
    assert "    text (string, one of content):\n" in str(conversations_pb2.Part.__doc__)
    shown = subprocess.run(
        [sys.executable, "-m", "pydoc", "vflow_client.v1.images_pb2.ImageReceipt"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TERM": "dumb"},
    )
    assert "ImageReceipt in vflow_client.v1.images_pb2" in shown.stdout
    assert "Milliseconds in the vision encoder and the projector." in shown.stdout


@pytest.mark.parametrize("stub", STUBS, ids=lambda module: module.DESCRIPTOR.name)
def test_every_message_and_enum_has_a_docstring(stub: object) -> None:
    def described(scope: object, declared: list[Descriptor | EnumDescriptor]) -> Iterator[tuple[str, str | None]]:
        for each in declared:
            here = getattr(scope, each.name)
            yield each.full_name, here.__doc__
            if isinstance(each, Descriptor):
                yield from described(here, [*each.nested_types, *each.enum_types])

    file: FileDescriptor = stub.DESCRIPTOR  # type: ignore[attr-defined]
    docstrings = dict(described(stub, [*file.message_types_by_name.values(), *file.enum_types_by_name.values()]))
    assert docstrings and all(docstrings.values()), docstrings


@pytest.mark.parametrize(
    "stub",
    [
        compression_pb2_grpc.CompressionStub,
        conversations_pb2_grpc.ConversationsStub,
        strategies_pb2_grpc.StrategiesStub,
    ],
)
def test_the_docstring_of_a_service_lists_its_methods(stub: type) -> None:
    assert stub.__doc__ and "\nMethods:\n" in stub.__doc__
    service = stub.__name__.removesuffix("Stub")
    (file,) = {module.DESCRIPTOR for module in STUBS if service in module.DESCRIPTOR.services_by_name}
    for method in file.services_by_name[service].methods:
        assert f"    {method.name}({method.input_type.name}) -> " in stub.__doc__


def test_messages_can_be_pickled() -> None:
    """Because their classes know the module that they are in."""
    receipt = images_pb2.ImageReceipt(width=3)
    assert pickle.loads(pickle.dumps(receipt)) == receipt


def strictly_typed(source: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    """What mypy says of a program outside this repository's own configuration."""
    # What the stubs import is no business of a caller's: mypy is silent about installed packages. Ours is found by its
    # path instead, because an editable installation is an import hook, which mypy cannot follow.
    configuration = cache / "mypy.ini"
    configuration.write_text("[mypy]\nstrict = True\n[mypy-google.*]\nignore_missing_imports = True\n")
    command = [sys.executable, "-m", "mypy", f"--config-file={configuration}", f"--cache-dir={cache}", str(source)]
    found_by = os.environ | {"MYPYPATH": str(ROOT / "client")}
    return subprocess.run(command, cwd=cache, capture_output=True, text=True, timeout=300, env=found_by)


def test_a_caller_of_the_stubs_is_strictly_typed(tmp_path: Path) -> None:
    caller = ROOT / "tests" / "repository" / "raw_stubs.py"
    checked = strictly_typed(caller, tmp_path)
    assert checked.returncode == 0, checked.stdout
    wrong = tmp_path / "wrong.py"
    wrong.write_text(caller.read_text().replace("receipt.kept_tokens[0]", "receipt.kept_token[0]"))
    checked = strictly_typed(wrong, tmp_path)
    assert '"ImageReceipt" has no attribute "kept_token"' in checked.stdout, checked.stdout
