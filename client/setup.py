"""Build hook of the client: generates the gRPC stubs, the package `vflow_client.v1`, from the contract in `proto/`.

The stubs are written into the client's own package whenever the distribution is built or installed, editable
installs included; git ignores them. A source distribution carries them and has no `proto/` beside it: they are then
taken as they are.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from setuptools import setup

if TYPE_CHECKING:
    from google.protobuf.descriptor_pb2 import (
        DescriptorProto,
        EnumDescriptorProto,
        FieldDescriptorProto,
        FileDescriptorProto,
        ServiceDescriptorProto,
    )

HERE = Path(__file__).resolve().parent
CONTRACT = HERE.parent / "proto"
WIRE_PACKAGE = "vflow.v1"
PACKAGE = HERE / "vflow_client" / "v1"


def generate_stubs() -> None:
    """Replaces the stubs by those of the present contract. Exits with the compiler's status if it fails."""
    # Before any file is parsed: `field_behavior` is an extension, which protobuf must know to read it.
    from google.api import field_behavior_pb2  # noqa: F401
    from google.protobuf.descriptor_pb2 import FileDescriptorSet

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        compile_contract(scratch)
        files = FileDescriptorSet.FromString((scratch / "contract.binpb").read_bytes()).file
        shutil.rmtree(PACKAGE, ignore_errors=True)
        PACKAGE.mkdir(parents=True)
        for file in files:
            name = Path(file.name).stem
            generated = [f"{name}_pb2.py", f"{name}_pb2.pyi"]
            if file.service:
                generated += [f"{name}_pb2_grpc.py", f"{name}_pb2_grpc.pyi"]
            documentation = Documentation(file)
            for module in generated:
                text = relocated((scratch / WIRE_PACKAGE.replace(".", "/") / module).read_text(encoding="utf-8"))
                if module == f"{name}_pb2.py":
                    text += documentation.of_messages()
                elif module == f"{name}_pb2_grpc.py":
                    text += documentation.of_services()
                (PACKAGE / module).write_text(text, encoding="utf-8")
    (PACKAGE / "__init__.py").write_text('"""The stubs of the contract, generated from `proto/vflow/v1/`."""\n')


def compile_contract(target: Path) -> None:
    """Runs the pinned protocol compiler and its plugins over every file of the contract."""
    import grpc_tools
    from grpc_tools import protoc

    arguments = [
        "protoc",
        f"--proto_path={CONTRACT}",
        f"--proto_path={Path(grpc_tools.__file__).parent / '_proto'}",
        f"--python_out={target}",
        f"--grpc_python_out={target}",
        f"--mypy_out=quiet:{target}",
        f"--mypy_grpc_out=quiet:{target}",
        f"--descriptor_set_out={target / 'contract.binpb'}",
        "--include_source_info",
    ]
    for plugin in ("protoc-gen-mypy", "protoc-gen-mypy_grpc"):
        # Beside the interpreter, too: without build isolation its folder need not be on the PATH.
        path = shutil.which(
            plugin, path=os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
        )
        if path is None:
            sys.exit(f"{plugin} is missing: pip install mypy-protobuf")
        arguments.append(f"--plugin={plugin}={path}")
    sources = sorted(str(path.relative_to(CONTRACT)) for path in CONTRACT.glob("vflow/v1/*.proto"))
    status = protoc.main([*arguments, *sources])
    if status != 0:
        sys.exit(status)


def relocated(text: str) -> str:
    """A generated module as part of `vflow_client.v1`: the compiler takes the wire package for the Python package."""
    text = re.sub(rf"^from {re.escape(WIRE_PACKAGE)} import ", "from . import ", text, flags=re.M)
    return re.sub(rf"'{re.escape(WIRE_PACKAGE)}\.\w+_pb2'", "__name__", text)


class Documentation:
    """Turns the comments of a .proto file into statements that give its classes docstrings.

    The compiler drops the comments of messages, and type stubs are no help to `help()`.
    """

    def __init__(self, file: FileDescriptorProto) -> None:
        self._file = file
        self._comments = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}

    def of_messages(self) -> str:
        """Statements for the file's messages and enums."""
        statements = [
            *(
                line
                for index, message in enumerate(self._file.message_type)
                for line in self._message("", message, (4, index))
            ),
            *(self._enum("", enum, (5, index)) for index, enum in enumerate(self._file.enum_type)),
        ]
        return "\n" + "".join(statements)

    def of_services(self) -> str:
        """Statements for the stubs of the file's services, whose methods `help()` cannot see."""
        return "\n\n" + "".join(self._stub(service, (6, index)) for index, service in enumerate(self._file.service))

    def _message(self, scope: str, message: DescriptorProto, path: tuple[int, ...]) -> Iterator[str]:
        name = scope + message.name
        fields = [
            (f"{field.name} ({described(field, message)})", (*path, 2, index))
            for index, field in enumerate(message.field)
        ]
        yield self._statement(name, path, "Attributes", fields)
        for index, nested in enumerate(message.nested_type):
            yield from self._message(f"{name}.", nested, (*path, 3, index))
        for index, enum in enumerate(message.enum_type):
            yield self._enum(f"{name}.", enum, (*path, 4, index))

    def _enum(self, scope: str, enum: EnumDescriptorProto, path: tuple[int, ...]) -> str:
        values = [(value.name, (*path, 2, index)) for index, value in enumerate(enum.value)]
        return self._statement(scope + enum.name, path, "Values", values)

    def _stub(self, service: ServiceDescriptorProto, path: tuple[int, ...]) -> str:
        methods = [
            (
                f"{method.name}({short(method.input_type)}) -> "
                f"{'stream of ' if method.server_streaming else ''}{short(method.output_type)}",
                (*path, 2, index),
            )
            for index, method in enumerate(service.method)
        ]
        return self._statement(f"{service.name}Stub", path, "Methods", methods)

    def _statement(
        self, name: str, path: tuple[int, ...], heading: str, members: list[tuple[str, tuple[int, ...]]]
    ) -> str:
        """Gives ``name`` a docstring: its own comment, then one entry under ``heading`` for each of its members."""
        lines = [self._comment(path)]
        if members:
            lines += ["", f"{heading}:"]
        for member, place in members:
            lines.append(textwrap.indent(f"{member}:", "    "))
            lines.append(textwrap.indent(self._comment(place), "        "))
        return f"{name}.__doc__ = {chr(10).join(lines)!r}\n"

    def _comment(self, path: tuple[int, ...]) -> str:
        return textwrap.dedent(self._comments.get(path, "")).strip()


def described(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    """The type of a field as the contract writes it, and how it behaves: "repeated Part, required"."""
    from google.api.field_behavior_pb2 import FieldBehavior, field_behavior

    kind = short(field.type_name) or field.Type.Name(field.type).removeprefix("TYPE_").lower()
    words = ["repeated " + kind if field.label == field.LABEL_REPEATED else kind]
    if field.HasField("oneof_index") and not field.proto3_optional:
        words.append(f"one of {message.oneof_decl[field.oneof_index].name}")
    words += [FieldBehavior.Name(each).lower().replace("_", " ") for each in field.options.Extensions[field_behavior]]
    return ", ".join(words)


def short(type_name: str) -> str:
    """The name of a type as the contract's own package sees it."""
    return type_name.removeprefix(f".{WIRE_PACKAGE}.").removeprefix(".")


# At import, not inside a build command: setuptools looks for the packages before it runs any.
if (CONTRACT / "vflow" / "v1").is_dir():
    generate_stubs()

setup()
