"""Figures in words: bytes, shares and ratios as tables and sentences print them."""

from __future__ import annotations

import math


def fixed(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """A number with so many digits after the point; "-" where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:{'+' if sign else ''}.{digits}f}"


def percent(value: float | None, digits: int = 1, *, sign: bool = False, unit: str = " %") -> str:
    """A fraction in per cent; "-" where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{round(100 * value, digits) + 0.0:{'+' if sign else ''}.{digits}f}{unit}"  # + 0.0: no minus before a zero


def bytes_text(count: float | None) -> str:
    """Bytes in the largest binary unit that leaves at least one; "-" where there are none to tell."""
    if count is None:
        return "-"
    size, unit = binary_unit(count)
    return f"{count:.0f} B" if unit == "B" else f"{count / size:.2f} {unit}"


def binary_unit(count: float) -> tuple[int, str]:
    """Bytes of the largest binary unit of which there is at least one, and its name."""
    power = min(int(math.log2(max(count, 1)) // 10), 4)
    return 1024**power, ("B", "KiB", "MiB", "GiB", "TiB")[power]


def span_text(low: float, high: float, scale: float = 1.0, spec: str = ".2f") -> str:
    """An interval as "low..high"."""
    return f"{format(scale * low, spec)}..{format(scale * high, spec)}"


def plural(count: int, noun: str) -> str:
    """A count with its noun: "1 layer", "12 layers"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def listed(names: list[str], most: int = 4) -> str:
    """Names as running text, the rest counted: "a, b and 3 more"."""
    if len(names) <= most:
        return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1] if names else ""
    return f"{', '.join(names[:most])} and {len(names) - most} more"
