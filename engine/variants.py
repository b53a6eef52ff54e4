"""Calls of an algorithm with other arguments than it was given: those that its types name, and its errors' corrected calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .algorithm import Algorithm
from .clock import Time
from .errors import ArgumentError
from .specimens import SHORT, Nothing, Specimen, arguments_of


def other_calls(algorithm: Algorithm) -> list[Specimen]:
    """Return calls of an algorithm's class that each differ from the one that built it in one value, where the rest allows it.

    Other values come from the type of an argument (the other truth value, the other choices of a ``Literal``, a short
    :class:`Time`, another number, None) and from the corrected call of the :class:`ArgumentError` that a wrong one raises.

    Example:
        >>> from thawline.engine import Event, register
        >>> @register
        ... class Noting(Algorithm):
        ...     events = frozenset({Event.BATCH_END})
        ...     def __init__(self, every: int = 2, loudly: bool = False) -> None:
        ...         self.every, self.loudly = every, loudly
        >>> other_calls(Noting())
        [Noting(every=3, loudly=False), Noting(every=2, loudly=True)]
    """
    build, given = type(algorithm), algorithm._bound()
    calls: list[dict[str, Any]] = []
    for name in inspect.signature(build).parameters:
        corrected = _corrected(build, given, name)
        # A check writes nothing where an example says so.
        shown = [] if corrected is None or isinstance(corrected[name], PurePath) else [corrected[name]]
        for value in [*_of_type(_hints(build).get(name), given[name]), *shown]:
            made = _made(build, given | {name: value}) or (corrected if value in shown else None)
            if made is not None and made != given and made not in calls:
                calls.append(made)
    return [Specimen(build, each) for each in calls]


def together(calls: list[Specimen], algorithm: Algorithm) -> list[Specimen]:
    """Return fewer calls with the same values: as many in one call as go together.

    Example:
        >>> from thawline.engine import registered
        >>> noting = registered("Noting")()
        >>> together(other_calls(noting), noting)
        [Noting(every=3, loudly=True)]
    """
    given = algorithm._bound()
    found: list[dict[str, Any]] = []
    for call in calls:
        changed = differing(call, given)
        for place, known in enumerate(found):
            merged = None if changed.keys() & differing(known, given).keys() else _made(call.build, known | changed)
            if merged is not None:
                found[place] = merged
                break
        else:
            found.append(dict(call.arguments))
    return [Specimen(type(algorithm), each) for each in found]


def halves(call: Specimen, algorithm: Algorithm) -> list[Specimen]:
    """Return two calls that each have half of a call's other values; none where it has but one."""
    given = algorithm._bound()
    changed = list(differing(call.arguments, given).items())
    parts = [changed[: len(changed) // 2], changed[len(changed) // 2 :]] if len(changed) > 1 else []
    made = [_made(call.build, given | dict(part)) for part in parts]
    return [Specimen(call.build, each) for each in made if each is not None]


def differing(arguments: Mapping[str, Any] | Specimen, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that are other than the given ones."""
    there = arguments.arguments if isinstance(arguments, Specimen) else arguments
    return {name: value for name, value in there.items() if value != given[name]}


def _made(build: Callable[..., Algorithm], arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments as the class keeps them; None where it refuses them."""
    try:
        return build(**arguments)._bound()
    except (ValueError, TypeError):
        return None


def _corrected(build: type[Algorithm], given: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Return all arguments of the call that the error of a wrong one says to write; None where it says none."""
    try:
        build(**{**given, name: Nothing()})
    except ArgumentError as error:
        try:
            return _made(build, arguments_of(error.example, build))
        except ArgumentError:
            return None
    except Exception:  # noqa: BLE001 - what is wrong with it, refuses_bad_arguments says
        return None
    return None


def _hints(build: type[Algorithm]) -> dict[str, Any]:
    try:
        return get_type_hints(build) | get_type_hints(build.__init__)
    except NameError:  # names that exist for type checkers only
        return {}


def _of_type(hint: Any, value: object) -> Iterator[Any]:
    """Yield values of a type that are other than this one."""
    if get_origin(hint) in (Union, UnionType):
        for each in get_args(hint):
            yield from _of_type(each, value)
    elif get_origin(hint) is Literal:
        yield from (each for each in get_args(hint) if each != value)
    elif hint is type(None):
        yield from [] if value is None else [None]
    elif hint is bool:
        yield from [not value] if isinstance(value, bool) else [True, False]
    elif hint is Time:
        yield from [SHORT["ba"]] if value != SHORT["ba"] else [Time("1ep")]
    elif hint is int and type(value) is int:
        yield value + 1
    elif hint is float and type(value) in (int, float):
        yield value / 2 or 0.5  # type: ignore[operator]  # a number, as just checked
