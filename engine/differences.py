"""Where two plain values differ, leaf by leaf."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from typing_extensions import override

from .errors import shorten

_SHOWN = 80


class _Nothing:
    @override
    def __repr__(self) -> str:
        return "nothing"


_NOTHING: Any = _Nothing()


def differing(name: str, got: Any, wanted: Any) -> Iterator[tuple[str, str, str]]:
    """Yield the place of each leaf that differs, and how it is shown on either side.

    Args:
        name: What the whole is called.
        got: One of the two: mappings, lists and what else JSON can hold.
        wanted: The other one.

    Example:
        >>> [*differing("clips", [{"norm": 1.0, "type": 2}], [{"norm": 3.0}])]
        [('clips[0], norm', '1.0', '3.0'), ('clips[0], type', '2', 'nothing')]
    """
    mine, other = _parts(got), _parts(wanted)
    if mine is None or other is None:
        if got != wanted:
            yield name, shorten(got, _SHOWN), shorten(wanted, _SHOWN)
        return
    for key in {**other, **mine}:
        yield from differing(name + key, mine.get(key, _NOTHING), other.get(key, _NOTHING))


def _parts(value: Any) -> dict[str, Any] | None:
    """Return the parts of a value by what is added to its name; None for one that is shown as a whole, as a shape is."""
    if isinstance(value, Mapping):
        return {f", {key}": each for key, each in value.items()}
    if isinstance(value, list) and any(isinstance(each, (Mapping, list)) for each in value):
        return {f"[{place}]": each for place, each in enumerate(value)}
    return None
