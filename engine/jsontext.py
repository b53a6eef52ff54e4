"""JSON without the liberties that Python takes: no NaN, no key twice, no text that takes more memory than it may."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

from .errors import CheckpointError, shorten

if TYPE_CHECKING:
    from .typing import Json

MAX_TEXT = 64 << 20
"""The longest JSON text that is read or written, in bytes."""
MEMORY = 192 << 20
"""What parsing a JSON text may cost in bytes, beyond the size of the tensors that came with it."""


def dump_json(value: Json, *, budget: int = MEMORY, indent: int | None = None) -> bytes:
    """Return ``value`` as strict JSON text in ASCII.

    Args:
        value: Finite numbers only.
        budget: What :func:`load_json` will be allowed to spend on it.
        indent: As in :func:`json.dumps`.

    Raises:
        CheckpointError: The value is not strict JSON, or its text longer or dearer to read than may be.

    Example:
        >>> dump_json({"step": 120})
        b'{"step":120}'
    """
    separators = (",", ":") if indent is None else (",", ": ")
    try:
        text = json.dumps(value, allow_nan=False, separators=separators, indent=indent).encode("ascii")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"Not strict JSON: {error}.") from None
    _check_cost(text, budget)
    return text


def load_json(text: bytes, *, budget: int = MEMORY) -> Json:
    """Return what strict JSON ``text`` holds.

    Args:
        text: UTF-8.
        budget: What parsing may cost, in bytes, estimated from above before anything is parsed.

    Raises:
        CheckpointError: It is not JSON, has a key twice, holds NaN or an infinity, or would cost more than ``budget``.

    Example:
        >>> load_json(b'{"step": 120}')
        {'step': 120}
        >>> load_json(b'{"step": NaN}')
        Traceback (most recent call last):
        thawline.engine.errors.CheckpointError: Not strict JSON: NaN is not in it.
    """
    _check_cost(text, budget)
    try:
        loaded: Json = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:  # ValueError also: too many digits, bad UTF-8
        raise CheckpointError(f"Not JSON that thawline wrote: {shorten(str(error))}.") from None
    return loaded


def json_cost(text: bytes) -> int:
    """Return about how many bytes parsing and decoding ``text`` takes at most.

    Each dict, list and element counts as CPython stores it, containers twice: the decoded tree stands beside the parsed one.

    Example:
        >>> json_cost(b"[[],[],[]]")
        712
    """
    return 4 * len(text) + 400 * text.count(b"{") + 128 * text.count(b"[") + 80 * text.count(b",")


def _check_cost(text: bytes, budget: int) -> None:
    if len(text) > MAX_TEXT:
        raise CheckpointError(f"A JSON text of {len(text)} bytes, at most {MAX_TEXT} are allowed.")
    if (cost := json_cost(text)) > budget:
        raise CheckpointError(
            f"A JSON text of so many small values that reading it would take about {cost >> 20} MiB; "
            f"{budget >> 20} MiB are allowed. Keep long lists of numbers as tensors."
        )


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise CheckpointError("Not strict JSON: an object has the same key twice.")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise CheckpointError("Not strict JSON: a number is too large for a float.")
    return number


def _no_constant(name: str) -> float:
    raise CheckpointError(f"Not strict JSON: {name} is not in it.")
