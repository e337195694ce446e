"""Sizes in bytes as people write them: `20GB`, `512MiB`."""

from __future__ import annotations

import re

from kd.common.errors import DataError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def byte_count(text: str) -> int:
    """The number of bytes that `20GB`, `512MiB`, `1.5G` or a plain number stands for. Raises DataError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] not in UNITS:
        raise DataError("this is not a number of bytes", found=repr(text), expected="e.g. 20GB, 512MiB or 1000000")
    return int(float(match[1]) * UNITS[match[2]])


def shown_bytes(count: int) -> str:
    """A number of bytes for people, in powers of 1000: `1.5 GB`."""
    value, units = float(count), iter(("B", "KB", "MB", "GB", "TB"))
    unit = next(units)
    while value >= 999.5 and unit != "TB":
        value, unit = value / 1000, next(units)
    return f"{value:.3g} {unit}" if unit != "B" else f"{count} B"
