"""Counts the fields of a message before it is parsed.

A field of two bytes may take fifty in memory, and the event loop stands still while a message is parsed. So 60 MiB of
empty parts take a second and a half, and gigabytes.
"""

from __future__ import annotations

from google.protobuf.descriptor import Descriptor, FieldDescriptor

MOST_FIELDS = 10_000
"""Fields of a message at most, with those of the messages in it. The largest that makes sense, 256 calibration samples
with 8 questions each, has some 3,000."""

SMALL = 4 * MOST_FIELDS
"""Bytes of a message that need not be looked at: it cannot take much, whatever is in it."""


def has_too_many_fields(message: bytes, type: Descriptor) -> bool:
    """Whether a message of the given type has more than :data:`MOST_FIELDS` fields.

    Each entry of a repeated field counts. A message that is not valid is left to the parser.
    """
    if len(message) <= SMALL:
        return False
    return _left(message, 0, len(message), type, MOST_FIELDS) < 0


def _left(data: bytes, at: int, end: int, type: Descriptor, left: int) -> int:
    """``left`` less the fields between two places; negative as soon as there are more."""
    fields = type.fields_by_number
    while at < end and left >= 0:
        left -= 1
        tag, at = _varint(data, at, end)
        match tag & 7:  # how the field is written
            case 0:  # as a number of any length
                _, at = _varint(data, at, end)
            case 1:  # in eight bytes
                at += 8
            case 5:  # in four
                at += 4
            case 2:  # with its length before it
                size, at = _varint(data, at, end)
                field = fields.get(tag >> 3)
                if field is not None and field.message_type is not None:
                    left = _left(data, at, min(at + size, end), field.message_type, left)
                elif field is not None and field.cpp_type != FieldDescriptor.CPPTYPE_STRING:
                    left -= size  # packed numbers, of a byte each at least
                at += size
    return left


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """A number, and the place behind it; the end if there is none."""
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            break
    return 0, end
