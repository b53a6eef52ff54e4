"""Where a model's stem, blocks and head are: by its own grouping, its repeated blocks, or its children in order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from attrs import Factory, define, frozen
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from .log import get_logger

log = get_logger(__name__)

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# Modules that belong to what stands before them: a block ends with its normalization.
_FOLLOWERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU)
_HEAD = re.compile(r"(.*_)?(heads?|classifier)\d*|fc|out|output|output_layer|logits|readout|score")
# In timm's matchers the last number of a group that has no place of its own and joins the one before.
_JOINS = 99999.0
_Group: TypeAlias = tuple[float, ...]


@frozen
class Split:
    """Where a model's parameters lie, as it was found.

    Args:
        of: Name of a parameter, further names of tied ones included, to ``"stem"``, ``"blocks[i]"`` or ``"head"``.
        doubt: Why the order of registration may not be the order of use; empty where nothing speaks for it.
        settled: Whether the order does not matter, because the model says where each of its parameters lies.
    """

    of: Mapping[str, str]
    doubt: str = ""
    settled: bool = False


def find_split(model: nn.Module, order: Sequence[str]) -> Split:
    """Split a model by its own ``group_matcher`` (timm), else by its repeated blocks, else by its children.

    What stands before the first block is the stem, and what stands after the last one the head. What stands between
    two blocks belongs to the one with which it shares more of its path, and else to the earlier.

    Args:
        model: The model.
        order: Names of all parameters, those of tied ones too, in the order of registration or of use.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> split = find_split(model, [name for name, _ in model.named_parameters()])
        >>> split.of["0.weight"], split.of["2.bias"]
        ('blocks[0]', 'head')
    """
    own = _by_matcher(model, order)
    if own is not None:
        return Split(_filled(order, own), settled=len(own) == len(order))
    if kinds := _block_paths(model):
        names = _in_order(kinds, order)
        of = _filled(order, _labelled(order, {f"blocks[{index}]": block for index, block in enumerate(names)}))
        return Split(of, _doubt(model, order, of, in_layers={"stem"}))
    of = _filled(order, _labelled(order, _unit_layers(model, order)))
    return Split(of, _doubt(model, order, of, in_layers=set(of.values()) - {"head"}))


def depends_on_order(model: nn.Module) -> bool:
    """Return whether a forward pass may tell more of a model's layers than its registration does."""
    named = dict(model.named_parameters(remove_duplicate=False))
    if not named or any(map(is_lazy, named.values())):
        return False
    return not find_split(model, tuple(named)).settled


# -- the model's own grouping ----------------------------------------------------------------------------------


def _by_matcher(model: nn.Module, order: Sequence[str]) -> dict[str, str] | None:
    """Follow ``group_matcher`` of the model, or of the one part of it that holds most of its parameters."""
    found: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        inside = any(not above or path.startswith(f"{above}.") for above, _ in found)
        if not inside and callable(getattr(type(module), "group_matcher", None)):
            found.append((path, module))
    total = sum(each.numel() for each in model.parameters())
    if len(found) != 1 or 2 * sum(each.numel() for each in found[0][1].parameters()) < total:
        return None
    path, module = found[0]
    prefix = f"{path}." if path else ""
    names = [name.removeprefix(prefix) for name in order if name.startswith(prefix)]
    try:
        labels = _group_labels(names, module.group_matcher(coarse=False))  # type: ignore[operator]  # it is callable
    except Exception as error:  # noqa: BLE001 - the model's own code; without it the model is split as others are
        log.warning("group_matcher failed", model=type(module).__name__, error=repr(error))
        return None
    return {f"{prefix}{name}": label for name, label in labels.items()} or None


def _group_labels(names: Iterable[str], matcher: Any) -> dict[str, str]:
    """Return the layer of each name that a matcher puts in a group; empty where all is one group.

    A matcher is a function from a name to its group's number or numbers, or, after timm, a mapping in depth order of
    names such as ``"stem"`` to a regular expression or to pairs ``(expression, numbers)``: the group is then the place
    in the mapping with the numbers that the expression captures or that are given. What nothing matches is the head.
    """
    group_of, stem = (_by_function(matcher), None) if callable(matcher) else _by_expressions(matcher)
    groups = {name: group for name in names if (group := group_of(name)) is not None}
    ranked: list[list[_Group]] = []
    for group in sorted(set(groups.values())):
        if ranked and group[-1] == _JOINS:
            ranked[-1].append(group)
        else:
            ranked.append([group])
    if len(ranked) < 2:
        return {}
    first = ranked[0][0][0] if stem is None and len(ranked) > 2 else stem
    label_of: dict[_Group, str] = {}
    blocks = 0
    for index, merged in enumerate(ranked):
        if merged[0][0] == first:
            label = "stem"
        elif merged[0][0] == float("inf") or (stem is None and index == len(ranked) - 1):
            label = "head"
        else:
            label, blocks = f"blocks[{blocks}]", blocks + 1
        label_of.update(dict.fromkeys(merged, label))
    return {name: label_of[group] for name, group in groups.items()}


def _by_function(matcher: Callable[[str], Any]) -> Callable[[str], _Group | None]:
    def group_of(name: str) -> _Group | None:
        found = matcher(name)
        return None if found is None else tuple(map(float, found if isinstance(found, Iterable) else (found,)))

    return group_of


def _by_expressions(matcher: Mapping[str, Any]) -> tuple[Callable[[str], _Group], float]:
    """Return the function, and the first number of the stem's groups (-1 where none is called so)."""
    rules: list[tuple[float, re.Pattern[str], Iterable[float]]] = []
    for place, spec in enumerate(matcher.values()):
        pairs = () if spec is None else ((spec, None),) if isinstance(spec, str) else spec
        rules += [(place, re.compile(expression), numbers or ()) for expression, numbers in pairs]

    def group_of(name: str) -> _Group:
        for place, expression, numbers in rules:
            if found := expression.match(name):
                captured = [each for each in found.groups() if each is not None]
                return (float(place), *map(float, captured), *map(float, numbers))
        return (float("inf"),)

    return group_of, list(matcher).index("stem") if "stem" in matcher else -1.0


# -- repeated blocks -------------------------------------------------------------------------------------------


@define
class _Kind:
    """A class whose instances are repeated in containers."""

    names: list[str] = Factory(list)
    sizes: list[int] = Factory(list)
    weights: list[int] = Factory(
        list
    )  # tensors of two or more dimensions in each: a unit such as conv-norm-act has one
    containers: set[type[nn.Module]] = Factory(set)
    repeated: bool = False  # whether one instance alone fills a container, several times

    @property
    def held(self) -> int:
        return sum(self.sizes)

    @property
    def is_block(self) -> bool:
        return min(self.weights) > 1

    def inside(self, other: _Kind) -> bool:
        return all(any(path in other.names for path in ancestors(name)) for name in self.names)


def _block_paths(model: nn.Module) -> list[tuple[str, ...]]:
    """Return the paths of each block; one that stands in several places has several."""
    names = [name for kind in _block_kinds(model) for name in kind]
    paths: dict[nn.Module, list[str]] = {model.get_submodule(name): [] for name in names}
    for path, module in model.named_modules(remove_duplicate=False) if paths else ():
        if module in paths:
            paths[module].append(path)
    return [tuple(each) for each in paths.values()]


def _block_kinds(model: nn.Module) -> list[list[str]]:
    """Find the modules that are the blocks: the class that holds most, and others of its measure beside it."""
    kinds = sorted(_repeated(model), key=lambda kind: -kind.held)
    if not kinds:
        return []
    best = _refined(kinds[0], kinds)
    found = [best]
    for kind in kinds:
        alike = kind.is_block and 4 * kind.held * len(best.names) >= best.held * len(kind.names)
        if alike and not any(_overlap(kind, other) for other in found):
            found.append(_refined(kind, kinds))
    return [kind.names for kind in found]


def _repeated(model: nn.Module) -> list[_Kind]:
    kinds: dict[type[nn.Module], _Kind] = {}
    for parent_name, parent in model.named_modules():
        if not isinstance(parent, _CONTAINERS):
            continue
        for child_name, child in parent.named_children():
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            kind = kinds.setdefault(type(child), _Kind())
            parameters = list(child.parameters())
            nested = any(path in kind.names for path in ancestors(name))
            whole = (
                next(child.children(), None) is None or is_parametrized(child) or "parametrizations" in name.split(".")
            )
            if nested or not parameters or whole:
                continue
            kind.names.append(name)
            kind.sizes.append(sum(each.numel() for each in parameters))
            kind.weights.append(sum(each.ndim > 1 for each in parameters))
            kind.containers.add(type(parent))
            kind.repeated |= len(parent._modules) > 1 and all(each is child for each in parent._modules.values())
    return [kind for kind in kinds.values() if len(kind.names) > 1 or kind.repeated]


def _refined(stage: _Kind, kinds: Iterable[_Kind]) -> _Kind:
    """Return the blocks of a class of stages, or the class itself where it is blocks (ConvNeXt, Swin, ResNet).

    A stage is a plain sequence of blocks that hold nearly all of it. A list of modules may also be a block's experts,
    which are alike; the blocks of stages differ in width.
    """
    for kind in kinds:  # the largest first: blocks before what is in them
        sequence = kind.containers == {nn.Sequential} or len(set(kind.sizes)) > 1
        longer = len(kind.names) > len(stage.names) and kind.held >= 0.8 * stage.held
        if kind is not stage and longer and sequence and kind.is_block and kind.inside(stage):
            return kind
    return stage


def _overlap(first: _Kind, second: _Kind) -> bool:
    return any(
        path in other.names
        for one, other in ((first, second), (second, first))
        for name in one.names
        for path in (name, *ancestors(name))
    )


# -- children in order -----------------------------------------------------------------------------------------


def _unit_layers(model: nn.Module, order: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Name the units of a model without repeated blocks: embeddings the stem, the last and other heads the head."""
    loose = _in_order([(path,) for path, _ in _units(model)], order)
    follows = {path for path, module in _units(model) if isinstance(module, _FOLLOWERS)}
    units: list[tuple[str, ...]] = []
    for unit in loose:
        if units and follows.issuperset(unit):
            units[-1] += unit
        else:
            units.append(unit)
    first, last = 0, len(units) - 1
    while last and _like_head(units[last - 1][0]) and _like_head(units[-1][0]):
        last -= 1
    while first < last - 1 and isinstance(model.get_submodule(units[first][0]), _EMBEDDINGS):
        first += 1
    layers = {f"blocks[{index}]": unit for index, unit in enumerate(units[first:last])}
    return {"stem": sum(units[:first], ()), **layers, "head": sum(units[last:], ())}


def _units(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the children with parameters, those of containers and of only children flattened."""
    children = [(name, child) for name, child in model.named_children() if next(child.parameters(), None) is not None]
    if not children or is_parametrized(model):
        yield prefix, model
    for name, child in children:
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, _CONTAINERS) or len(children) == 1:
            yield from _units(child, path)
        else:
            yield path, child


# -- placing ---------------------------------------------------------------------------------------------------


def ancestors(name: str) -> Iterator[str]:
    """Yield the modules around a parameter or module, from the nearest to the root."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _in_order(blocks: Iterable[tuple[str, ...]], order: Sequence[str]) -> list[tuple[str, ...]]:
    """Sort blocks by their first parameter."""
    first: dict[str, int] = {}
    for place, name in enumerate(order):
        for path in ancestors(name):
            first.setdefault(path, place)
    return sorted(blocks, key=lambda block: min(first[path] for path in block))


def _labelled(order: Iterable[str], layers: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the layer of each parameter that lies in one of the modules of a layer."""
    label_of = {path: label for label, paths in layers.items() for path in paths}
    found = ((name, next((label_of[path] for path in ancestors(name) if path in label_of), None)) for name in order)
    return {name: label for name, label in found if label is not None}


def _filled(order: Sequence[str], labels: Mapping[str, str]) -> dict[str, str]:
    """Give every name a layer: what has none stands before, between or after those that have one."""
    following: list[str | None] = []
    for name in reversed(order):
        following.append(name if name in labels else following[-1] if following else None)
    of: dict[str, str] = {}
    before: str | None = None
    for name, after in zip(order, reversed(following), strict=True):
        before = name if name in labels else before
        if before is None:
            of[name] = "stem"
        elif after is None:
            of[name] = "head"
        else:
            of[name] = labels[after if _shared(name, after) > _shared(name, before) else before]
    return of


def _shared(first: str, second: str) -> int:
    """Return how many modules two parameters have around both."""
    return len(set(ancestors(first)) & set(ancestors(second)))


def _doubt(model: nn.Module, order: Sequence[str], of: Mapping[str, str], *, in_layers: set[str]) -> str:
    """Say what speaks against the order of registration: a head that stands before the body, and none behind it."""
    owners = {name: name.rpartition(".")[0] for name in order}
    heads = {name: path for name, path in owners.items() if any(map(_like_head, (path, *ancestors(path))))}
    if any(of[name] == "head" for name in heads):
        return ""
    kind = type(model).__name__
    for name, path in heads.items():
        if of[name] in in_layers:
            return f"{path!r} is registered before the body of {kind}, and may be its head"
    if "head" not in of.values():
        for name, path in owners.items():
            if of[name] == "stem" and isinstance(model.get_submodule(path), nn.Linear):
                return f"{path!r} is registered before the blocks of {kind}, and nothing is behind them"
    return ""


def _like_head(path: str) -> bool:
    return _HEAD.fullmatch(path.rpartition(".")[2]) is not None
