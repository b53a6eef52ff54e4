"""How much room PrefixCache may take, and where."""

from __future__ import annotations

import re
from pathlib import Path

from ..engine import ArgumentError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_EXAMPLE = "PrefixCache(budget='4GB')"


def bytes_of(value: object) -> int:
    """Return a budget in bytes.

    Example:
        >>> [bytes_of(each) for each in (7, "500MB", "1.5 kB", "4GiB", "1KiB", "2b", "3TB")]
        [7, 500000000, 1500, 4294967296, 1024, 2, 3000000000000]
        >>> bytes_of("1.2.3MB")
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: PrefixCache(budget=) takes a number of bytes above 0: a whole number, '500MB' or '4GB', got '1.2.3MB'. Write: PrefixCache(budget='4GB')
    """
    found = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(i?)b\s*", value.lower()) if isinstance(value, str) else None
    if found is not None and found[1].count(".") < 2 and found[1] != ".":
        factor = 1024 ** "kmgt".find(found[2]) * 1024 if found[3] and found[2] else _UNITS[found[2]]
        value = int(float(found[1]) * factor)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    takes = "a number of bytes above 0: a whole number, '500MB' or '4GB'"
    raise ArgumentError("PrefixCache(budget=)", got=value, takes=takes, example=_EXAMPLE)


def folder_of(value: object) -> Path | None:
    """Return a directory, or None for memory.

    Example:
        >>> folder_of("cache").name, folder_of(Path("cache")).name, folder_of(None)
        ('cache', 'cache', None)
    """
    if value is None or (isinstance(value, (str, Path)) and str(value)):
        return None if value is None else Path(value)
    example = "PrefixCache(folder='cache')"
    raise ArgumentError("PrefixCache(folder=)", got=value, takes="a directory, or None for memory", example=example)


__all__ = ["bytes_of", "folder_of"]
