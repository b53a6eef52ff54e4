"""Selectors: which parameters a caller means."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from attrs import frozen
from torch import nn

from .errors import SelectorError, nearest, shorten
from .layers import Layer, LayerMap

Selector = str | Layer | Sequence["str | Layer"] | Callable[..., bool]
_GLOB = frozenset("*?[")


@frozen(slots=True)
class Selection:
    """What a selector meant when it was resolved.

    Args:
        names: Canonical names of the selected parameters.
        patterns: The layers, globs and modules in it, which go on to cover parameters attached
            later; exact names and predicates do not.
    """

    names: Sequence[str]
    patterns: tuple[str, ...] = ()


def resolve(
    selector: Selector, parameters: Mapping[str, nn.Parameter], aliases: Mapping[str, str], layers: LayerMap
) -> Selection:
    """Find the parameters that ``selector`` means.

    Args:
        selector: A layer (``"head"``, ``"blocks[2:6]"``), a parameter's name, a module's name, a glob over
            parameter names, a list of these, or a predicate ``(name, parameter) -> bool``.
        parameters: The parameters by canonical name.
        aliases: Further names of tied parameters, to the canonical ones.
        layers: The model's layers.

    Raises:
        SelectorError: The selector, or a part of it, matches nothing.
    """
    if callable(selector):
        return Selection(_chosen(selector, parameters))
    if isinstance(selector, (str, Layer)):
        return _one(selector, parameters, aliases, layers)
    if not isinstance(selector, Sequence) or not selector:
        raise SelectorError(
            f"a selector is a layer such as 'head' or 'blocks[-1]', a glob such as '*.bias', a list of names or a "
            f"predicate (name, parameter) -> bool, got {shorten(selector)}."
        )
    names: dict[str, None] = {}
    patterns: list[str] = []
    if all(map(parameters.__contains__, selector)):  # the fast path of long lists of exact names
        return Selection(tuple(dict.fromkeys(selector)))  # type: ignore[arg-type]
    for part in selector:
        found = _one(part, parameters, aliases, layers)
        names.update(dict.fromkeys(found.names))
        patterns.extend(found.patterns)
    return Selection(tuple(names), tuple(patterns))


def covers(pattern: str, name: str, layers: LayerMap) -> bool:
    """Return whether a pattern of a :class:`Selection` covers the parameter called ``name``."""
    if layers.names_layer(pattern):
        return name in layers.parameters(pattern)
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def _one(
    part: str | Layer, parameters: Mapping[str, nn.Parameter], aliases: Mapping[str, str], layers: LayerMap
) -> Selection:
    text = part.name if isinstance(part, Layer) else part
    if not isinstance(text, str):
        raise SelectorError(f"a selector's parts are strings, got {shorten(text)}. Write the parameter's name.")
    if text in parameters:
        return Selection((text,))
    if text in aliases:
        return Selection((aliases[text],))
    if layers.names_layer(text):
        names = layers.parameters(text)
        if not names:
            raise SelectorError(f"the selector {text!r} matches nothing: that layer has no parameters in\n{layers}")
        return Selection(names, (text,))
    prefix = f"{text}."
    found = [name for name in parameters if name.startswith(prefix)]
    found += [true for alias, true in aliases.items() if alias.startswith(prefix)]
    if not found and not _GLOB.isdisjoint(text):
        found = [name for name in parameters if fnmatchcase(name, text)]
        found += [true for alias, true in aliases.items() if fnmatchcase(alias, text)]
    if not found:
        there = [layer.name for layer in layers]
        raise SelectorError(
            f"the selector {text!r} matches nothing. Nearest names: {nearest(text, [*there, *parameters])}. "
            f"Layers: {', '.join(there)}. Write a layer, one of these names, or a glob such as '*.bias'."
        )
    return Selection(tuple(dict.fromkeys(found)), (text,))


def _chosen(predicate: Callable[..., bool], parameters: Mapping[str, nn.Parameter]) -> tuple[str, ...]:
    try:
        takes = len(inspect.signature(predicate).parameters)
    except (TypeError, ValueError):
        takes = 2
    by_name = takes == 1
    names = tuple(name for name, each in parameters.items() if (predicate(name) if by_name else predicate(name, each)))
    if not names:
        label = getattr(predicate, "__qualname__", repr(predicate))
        raise SelectorError(
            f"the predicate {label} chose none of {len(parameters)} parameters, such as {nearest('', parameters)}. "
            "It is called with (name, parameter) and returns True for those that are meant."
        )
    return names
