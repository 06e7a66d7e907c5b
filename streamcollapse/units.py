"""Bytes and durations, as people write and read them. Knows nothing of models."""

import re

from streamcollapse.errors import OptionError

_MOST = 2.0**63  # bytes; offsets in files end there
_FACTORS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_bytes(text: str | int) -> int:
    """A size such as ``5GB``, ``512 MiB`` or ``1000000``, in bytes; KB, MB, ... are decimal, KiB, MiB, ... binary.

    Raises OptionError for anything else, and for zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in _FACTORS:
        raise OptionError(f"{text!r} is not a size; write a number and a unit, for example 5GB or 512MiB")
    exact = float(match[1]) * _FACTORS[match[2].upper()]
    if exact >= _MOST:
        raise OptionError(f"{str(text)[:40]} is no size that a file or a memory has; write for example 5GB")
    size = int(exact)
    if size < 1:
        raise OptionError(f"a size must be at least one byte, not {text!r}")
    return size


def format_bytes(count: float) -> str:
    """``count`` bytes in decimal units with three digits: ``22.0 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_about(seconds: float) -> str:
    """An estimate in words: ``about 20 seconds``, ``about 3 minutes``, ``about 2.5 hours``."""
    if seconds < 7.5:
        return "a few seconds"
    if seconds < 55:
        return f"about {round(seconds / 5) * 5} seconds"
    if seconds < 90 * 60:
        minutes = max(round(seconds / 60), 1)
        return f"about {minutes} minute{'s' * (minutes > 1)}"
    if seconds < 36 * 3600:
        return f"about {round(seconds / 1800) / 2:g} hours"
    return f"about {round(seconds / 43200) / 2:g} days"


def format_seconds(seconds: float) -> str:
    """``0.42 s``, ``12.3 s``, ``4 min 05 s`` or ``2 h 07 min``."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
