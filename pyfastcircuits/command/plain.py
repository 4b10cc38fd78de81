"""Text and figures for people: what is not printable is escaped, and small figures keep their digits."""

import math
from collections.abc import Sequence

UNITS = {"nats": 1.0, "millinats": 1e3, "micronats": 1e6}


def significant(value: float, digits: int = 3, *, signed: bool = False) -> str:
    """A figure with so many significant digits, whatever its size: 12.3, 0.0123, 1.2e-5; zero is 0."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}".removeprefix("-") if value == 0 else str(value)
    sign, exponent = "+" if signed else "", math.floor(math.log10(abs(value)))
    if -3 <= exponent < 6:
        return f"{value:{sign}.{max(0, digits - 1 - exponent)}f}"
    mantissa, _, power = f"{value:{sign}.{digits - 2}e}".partition("e")
    return f"{mantissa}e{int(power)}"


def percent(share: float) -> str:
    """A share of 1 in percent."""
    return f"{significant(100 * share)}%"


def in_nats(values: Sequence[float], *, signed: bool = False) -> tuple[str, list[str]]:
    """The largest unit in which some of the values reach 1 (or the smallest unit), and the values in it."""
    largest = max((abs(x) for x in values if math.isfinite(x)), default=0)
    unit = next((name for name, scale in UNITS.items() if largest * scale >= 1), "micronats" if largest else "nats")
    return unit, [significant(x * UNITS[unit], 4, signed=signed) for x in values]
