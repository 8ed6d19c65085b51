"""Messages of the contract as JSON, for programs."""

import json
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message


def as_json(message: Message) -> dict[str, Any]:
    """The message as JSON values, in protobuf's mapping with the contract's field names, false, 0 and "" included."""
    fields: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return fields


def print_json(value: object) -> None:
    """Prints a JSON value on the standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False), flush=True)
