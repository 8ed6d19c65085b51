"""Quantities as people read them."""


def size(count: float) -> str:
    """Bytes, such as `12.3 KiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def duration(seconds: float) -> str:
    """A duration to the second, such as `1 min 40 s`; from an hour on to the minute."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def counted(count: int, noun: str) -> str:
    """A count with a noun whose plural is regular, such as `1 picture` or `3 pictures`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
