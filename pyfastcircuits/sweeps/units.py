"""Amounts, bytes and times in words, with three significant digits."""

AMOUNTS = (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))
BYTES = (("TiB", 1024.0**4), ("GiB", 1024.0**3), ("MiB", 1024.0**2), ("KiB", 1024.0))
TIMES = (("years", 365 * 86400.0), ("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3))


def amount(count: float) -> str:
    """A count with a prefix of the SI: 3.40 T."""
    return _in(count, AMOUNTS)


def size(count: float) -> str:
    """Bytes: 3.40 GiB."""
    return _in(count, BYTES)


def duration(seconds: float) -> str:
    """A time: 3.40 h."""
    return _in(seconds, TIMES)


def _in(value: float, units: tuple[tuple[str, float], ...]) -> str:
    """In the largest unit of which there is one, or else in the smallest."""
    name, scale = next((unit for unit in units if value >= unit[1]), units[-1])
    shown = value / scale
    digits = f"{shown:,.0f}" if shown >= 100 else f"{shown:.{2 if shown < 10 else 1}f}"
    return f"{digits} {name}".strip()
