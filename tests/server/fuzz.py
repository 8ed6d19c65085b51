"""Requests that no client would send: messages of any content, real pictures with damage, and bytes of no message."""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from google.longrunning import operations_pb2
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st
from PIL import Image

from tests.server.drawing import noise
from vflow_client.v1 import compression_pb2, conversations_pb2, strategies_pb2
from vflowopt.media.picture import FORMATS

METHODS: tuple[MethodDescriptor, ...] = tuple(
    method
    for service in (
        conversations_pb2.DESCRIPTOR.services_by_name["Conversations"],
        compression_pb2.DESCRIPTOR.services_by_name["Compression"],
        strategies_pb2.DESCRIPTOR.services_by_name["Strategies"],
        operations_pb2.DESCRIPTOR.services_by_name["Operations"],
    )
    for method in service.methods
)

SESSION = "sessions/" + "~" * 21
"""Stands for a session that lives, in as many bytes as the name of one: so it can be put in where a message is bytes
already."""

_MEANT: Mapping[str, tuple[str, ...]] = {
    "session": (SESSION,),
    "strategy": ("strategies/preset-10", ""),
    "base": ("strategies/preset-10", ""),
    "names": ("strategies/preset-10", "strategies/full"),
    "strategy_id": ("a-name", "another"),
    "text": ("What?",),
    "questions": ("What?",),
}
"""What belongs into fields of text, by their names."""

_NAME_IN = {"Conversations": SESSION, "Strategies": "strategies/full", "Operations": "operations/none"}
"""What belongs into the field `name` of the requests to a service."""

_ODD_TEXTS = ("", " ", "x" * 65, "x" * 5000, "<|im_end|>", "\0", "0" * 64, "sessions/nobody", "strategies/../x")
_NUMBERS = (-(2**31), -1, 0, 1, 2, 8, 1001, 2**31 - 1)
_FLOATS = (-1.0, 0.0, 0.1, 0.25, 0.5, 0.5, 1.0, 2.0, float("nan"), float("inf"))
_TENANTS = (*(None,) * 36, "default", "red", "RED", "a" * 64)


@dataclass(frozen=True)
class Call:
    """A method, the bytes sent to it, and the tenant that the caller names."""

    method: MethodDescriptor
    message: bytes
    tenant: str | None


def _pictures() -> tuple[bytes, ...]:
    """A small real file of each format that is read, and one with transparency."""
    out = []
    for mode, format in (*(("RGB", each) for each in FORMATS), ("RGBA", "PNG")):
        file = BytesIO()
        Image.fromarray(noise(40, 50)).convert(mode).save(file, format)
        out.append(file.getvalue())
    return tuple(out)


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Bytes of ``whole`` with up to four of them, or stretches of them, changed, cut out, doubled or put in."""
    data = bytearray(draw(whole))
    for _ in range(draw(st.integers(0, 4))):
        begin = draw(st.integers(0, len(data)))
        end = min(len(data), begin + draw(st.integers(0, 40)))
        match draw(st.sampled_from(("change", "cut", "double", "put in", "end"))):
            case "change":
                data[begin : begin + 1] = draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del data[begin:end]
            case "double":
                data[begin:begin] = data[begin:end]
            case "put in":
                data[begin:begin] = draw(st.binary(max_size=8))
            case _:
                del data[begin:]
    return bytes(data)


_FILES = damaged(st.sampled_from(_pictures()))

_ODD_TEXT = st.sampled_from(_ODD_TEXTS) | st.text(max_size=20)

_SCALARS: Mapping[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_ENUM: st.integers(-1, 4),
    FieldDescriptor.CPPTYPE_INT32: st.sampled_from(_NUMBERS) | st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: st.sampled_from(_NUMBERS) | st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: st.sampled_from(_NUMBERS).map(abs) | st.integers(0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_DOUBLE: st.sampled_from(_FLOATS) | st.floats(),
}


def _values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        return messages(field.message_type)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return _FILES
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        meant = _MEANT.get(field.name)
        return _mostly(st.sampled_from(meant), _ODD_TEXT) if meant else _ODD_TEXT
    return _SCALARS[field.cpp_type]


@st.composite
def _mostly(draw: st.DrawFn, usual: st.SearchStrategy[Any], odd: st.SearchStrategy[Any]) -> Any:
    return draw(odd if draw(st.integers(0, 7)) == 7 else usual)


def _chance(field: FieldDescriptor) -> int:
    """Of eight times, how often a field is set: what may be left out less often, or no request would get far."""
    if field.cpp_type in (FieldDescriptor.CPPTYPE_STRING, FieldDescriptor.CPPTYPE_MESSAGE):
        return 7 if field.name in _MEANT or field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE else 1
    return 1 if field.has_presence else 4


@st.composite
def messages(draw: st.DrawFn, type: Descriptor) -> Message:
    """A message with some of its fields set, to what belongs there or to anything."""
    message = message_factory.GetMessageClass(type)()
    alternatives = {field.name for oneof in type.oneofs for field in oneof.fields if len(oneof.fields) > 1}
    # Texts rather than pictures: a turn of pictures alone is refused.
    chosen = {
        draw(st.sampled_from([*oneof.fields, *(each for each in oneof.fields if each.name in _MEANT)])).name
        for oneof in type.oneofs
    }
    for field in type.fields:
        if field.name not in chosen if field.name in alternatives else draw(st.integers(1, 8)) > _chance(field):
            continue
        if field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(_values(field), min_size=1, max_size=3)))
        elif field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
            getattr(message, field.name).CopyFrom(draw(_values(field)))
        else:
            setattr(message, field.name, draw(_values(field)))
    return message


@st.composite
def _requests(draw: st.DrawFn, method: MethodDescriptor) -> bytes:
    message = draw(messages(method.input_type))
    if "name" in method.input_type.fields_by_name and draw(st.integers(0, 7)):
        message.name = _NAME_IN[method.containing_service.name]  # type: ignore[attr-defined]  # it has that field
    return message.SerializeToString()


@st.composite
def calls(draw: st.DrawFn, method: MethodDescriptor) -> Call:
    """A call of ``method``: mostly with a message, else with one that was damaged, or with any bytes."""
    sent: dict[str, st.SearchStrategy[bytes]] = {
        "message": _requests(method),
        "damaged": damaged(_requests(method)),
        "bytes": st.binary(max_size=64),
    }
    kind = draw(st.sampled_from((*("message",) * 8, "damaged", "bytes")))
    return Call(method, draw(sent[kind]), draw(st.sampled_from(_TENANTS)))
