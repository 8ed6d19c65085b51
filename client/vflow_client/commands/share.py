"""Shares on a command line."""

import argparse


def share(text: str) -> float:
    """For `type=` of an argument: parses a share above 0 and up to 1, such as `0.1` or, as it is printed, `10.0%`."""
    number = text.strip()
    try:
        value = float(number[:-1]) / 100 if number.endswith("%") else float(number)
    except ValueError:
        value = -1.0
    if 0 < value <= 1:
        return value
    hint = f"; {text}% is written with its sign" if 1 < value <= 100 and not number.endswith("%") else ""
    raise argparse.ArgumentTypeError(f"expected a share such as 0.1 or 10%, got {text!r}{hint}")
