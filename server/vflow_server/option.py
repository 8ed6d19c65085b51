"""An option of the service: one declaration gives its flag, environment variable, TOML key, type and help."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

_SIZES = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class OptionError(ValueError):
    """A value that an option cannot have; the message says where it came from and what was expected."""


@dataclass(frozen=True)
class Option:
    """The declaration of an option, without its name and default value.

    Attributes:
        group: heading under which ``--help`` shows it.
        help: text for ``--help``.
        parse: from text to value; raises ValueError saying what was expected.
        metavar: placeholder of the value in ``--help``.
        shown: the default, as a user would write it; None if it is unset.
    """

    group: str
    help: str
    parse: Callable[[str], Any]
    metavar: str
    shown: str | None

    def described(self) -> str:
        """The help text, with the default where there is one."""
        return self.help if self.shown is None else f"{self.help} (default: {self.shown})"


def option(
    group: str, default: str | None, help: str, parse: Callable[[str], Any] = str, *, metavar: str = "TEXT"
) -> Any:
    """Declare a field of a settings dataclass. ``default`` is written as a user would write it; None means unset."""
    value = None if default is None else parse(default)
    return field(default=value, metadata={"option": Option(group, help, parse, metavar, default)})


def size(text: str) -> int:
    """Bytes: ``512MiB``, ``2GiB``, or a bare number."""
    return int(_quantity(text, _SIZES, "a size such as 512MiB or 2GiB"))


@dataclass(frozen=True)
class Share:
    """A share, in percent, of something that is measured later."""

    percent: float

    def of(self, whole: int) -> int:
        """The share of ``whole``."""
        return int(whole * self.percent / 100)

    def __str__(self) -> str:
        return f"{self.percent:g}%"


def size_or_share(text: str) -> int | Share:
    """Bytes as for :func:`size`, or a share such as ``25%``."""
    if not text.strip().endswith("%"):
        return int(_quantity(text, _SIZES, "a size such as 512MiB, or a share such as 25%"))
    try:
        percent = float(text.strip()[:-1])
    except ValueError:
        percent = 0.0
    if not 0 < percent <= 100:
        raise ValueError("expected a share above 0% and up to 100%")
    return Share(percent)


def seconds(text: str) -> float:
    """Seconds: ``90s``, ``15m``, ``1h``, or a bare number."""
    return _quantity(text, _SECONDS, "a duration such as 90s, 15m or 1h")


def seconds_or_off(text: str) -> float | None:
    """Seconds as for :func:`seconds`; None for ``off``."""
    if text.strip() == "off":
        return None
    return _quantity(text, _SECONDS, "a duration such as 90s, 15m or 1h, or off")


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A whole number in a range."""

    def parse(text: str) -> int:
        expected = f"a whole number from {least}" + (f" to {most}" if most is not None else " on")
        try:
            number = int(text)
        except ValueError:
            raise ValueError(f"expected {expected}") from None
        if number < least or (most is not None and number > most):
            raise ValueError(f"expected {expected}")
        return number

    return parse


def fraction(text: str) -> float:
    """A number from 0 to 1, such as ``0.01`` or ``1%``."""
    try:
        number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        number = -1.0
    if not 0.0 <= number <= 1.0:
        raise ValueError("expected a number from 0 to 1, or a percentage such as 1%")
    return number


def switch(text: str) -> bool:
    """``on`` or ``off``."""
    if text not in ("on", "off"):
        raise ValueError("expected on or off")
    return text == "on"


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """One of a few words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return text

    return parse


def host_name(text: str) -> str:
    """An address or a name without a port; an IPv6 address may stand in brackets, as it does before a port."""
    host = text.strip()
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    expected = "expected an address such as 127.0.0.1, 0.0.0.0 or ::1, or a host name, without a port"
    if ":" in host:
        try:
            ipaddress.IPv6Address(bare)
        except ValueError:
            raise ValueError(expected) from None
    elif bare != host or not re.fullmatch(r"[\w.-]+", host):
        raise ValueError(expected)
    return bare


def device_name(text: str) -> str:
    """``cpu``, ``cuda`` or ``cuda:N``."""
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", text):
        raise ValueError("expected cpu, cuda or cuda:N")
    return text


def _quantity(text: str, units: dict[str, Any], expected: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in units:
        raise ValueError(f"expected {expected}")
    amount = float(match[1]) * float(units[match[2]])
    if amount <= 0:
        raise ValueError(f"expected {expected}, above zero")
    return amount
