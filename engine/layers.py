"""The layers of a model in depth order: stem, blocks, head."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import groupby
from typing import TypeAlias

from attrs import frozen
from torch import nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from .errors import ArgumentError, LayerError, SelectorError, nearest, shorten, warn
from .forward_order import forward_order
from .log import get_logger
from .splits import ancestors, find_split

log = get_logger(__name__)

LayerSpec: TypeAlias = Mapping[str, "str | Sequence[str] | Sequence[Sequence[str]]"]
# An index, or a slice of which either end may be missing; so many digits no model has layers.
_LAYER = re.compile(r"([A-Za-z_]\w*)(?:\[\s*(?:(-?\d{1,18})|(-?\d{1,18})?\s*(:)\s*(-?\d{1,18})?)\s*\])?", re.ASCII)
_EXAMPLE = "layers={'stem': 'embeddings', 'blocks': 'encoder.layer.*', 'head': 'classifier'}"


@frozen(slots=True)
class Layer:
    """One layer.

    Args:
        name: ``"stem"``, ``"blocks[3]"``, ``"head"``, or a part that the user named.
        parameters: Names of its parameters.
        modules: The largest modules that lie in it as a whole, and the parameters beside them.
        tied: Names that would lie here and are further names of weights in an earlier layer, such as a language
            model's ``lm_head.weight``, which is its embedding's.
    """

    name: str
    parameters: tuple[str, ...]
    modules: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()


class LayerMap:
    """The parameters of a model in depth order; every one lies in exactly one layer.

    Found are, in this order: what ``layers`` says; the model's own ``group_matcher``, which timm's models have; the
    class of block modules, repeated in ``ModuleList`` or ``Sequential``, that holds most of the parameters, and others of
    its measure beside it, such as a decoder's; the children in order. What stands before the first block is the stem,
    what stands after the last one the head, what stands between two blocks belongs to the one with which it shares
    more of its path, else to the earlier. A tied parameter lies in its earliest layer.

    Args:
        model: The model to split.
        layers: Layer name to globs over parameter names or module names, in depth order. ``"blocks"``
            takes a list with an entry (a glob or a list of them) for each block, or one glob over *module*
            names. Other names are parts of their own, such as ``"structure_module"``.
        forward: Runs the model once, ``lambda: model(inputs)``. Layers then follow the order in which it uses its
            parameters, and not that in which they are registered. The pass leaves no trace.

    Raises:
        ArgumentError: ``model`` is no module, or ``forward`` no function.
        LayerError: The model has no parameters, or ones that have no shape yet; ``layers`` leaves one out or names none.

    Warns:
        ThawlineWarning: What looks like the head is registered before the body, and no ``forward`` tells.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> layers = LayerMap(model)
        >>> len(layers.blocks), layers.head.parameters, layers.of("2.bias").name
        (2, ('4.weight', '4.bias'), 'blocks[1]')
    """

    def __init__(
        self, model: nn.Module, layers: LayerSpec | None = None, *, forward: Callable[[], object] | None = None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentError("LayerMap(model=)", got=model, takes="a torch.nn.Module", example="LayerMap(model)")
        if forward is not None and not callable(forward):
            example = "LayerMap(model, forward=lambda: model(inputs))"
            raise ArgumentError("LayerMap(forward=)", got=forward, takes="a function, or None", example=example)
        if layers is not None and forward is not None:
            raise LayerError("LayerMap takes layers= or forward=, not both: given layers stand in the order given.")
        named = dict(model.named_parameters(remove_duplicate=False))
        _check_parameters(model, named)
        first: dict[int, str] = {}
        self._canonical = {name: first.setdefault(id(each), name) for name, each in named.items()}
        self._sizes = {name: named[name].numel() for name in first.values()}
        self._model = type(model).__name__
        if layers is None:
            places = _found(model, tuple(named), forward)
            order = _depth_order(places)
            self._of = _earliest(places, self._canonical, order)
            renamed = _without_gaps(self._of, order)
            self._order = ("stem", *(each for each in renamed.values() if each.startswith("blocks[")), "head")
            self._of = {name: renamed[layer] for name, layer in self._of.items()}
            self._places = {name: renamed.get(layer, layer) for name, layer in places.items()}
        else:
            self._places = _given(model, tuple(named), self._canonical, layers)
            self._order = _depth_order(self._places, layers)
            self._of = _earliest(self._places, self._canonical, self._order)
            _check_given(self._places, self._of)
        self._index()

    # -- reading -----------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all layers in depth order, empty stem and head included."""
        return self._order

    @property
    def stem(self) -> Layer:
        """What stands before the first block: embeddings, patch projection. May be empty."""
        return self._layer("stem")

    @property
    def blocks(self) -> tuple[Layer, ...]:
        """The repeated body, from the input side to the output side."""
        return tuple(self._layer(name) for name in self._order if name.startswith("blocks["))

    @property
    def head(self) -> Layer:
        """What stands after the last block: final norm, pooler, classifier."""
        return self._layer("head")

    def __iter__(self) -> Iterator[Layer]:
        """Iterate over the layers that have parameters, in depth order."""
        return (self._layer(name) for name in self._order if self._members[name])

    def __len__(self) -> int:
        """Return the number of layers that have parameters."""
        return sum(1 for name in self._order if self._members[name])

    def of(self, parameter: str) -> Layer:
        """Return the layer in which a parameter lies."""
        try:
            return self._layer(self._of[parameter])
        except KeyError:
            raise SelectorError(f"{parameter!r} is no parameter. Nearest: {nearest(parameter, self._of)}.") from None

    def depth(self, parameter: str) -> int:
        """Return the place of a parameter's layer in depth order, the stem being 0."""
        return self._order.index(self._of[parameter])

    def names_layer(self, text: str) -> bool:
        """Return whether ``text`` is the name or slice of a layer, such as ``"head"`` or ``"blocks[2:6]"``."""
        found = _LAYER.fullmatch(text)
        return found is not None and (found[1] == "blocks" or found[0] in self._order)

    def parameters(self, text: str) -> tuple[str, ...]:
        """Return the parameter names of a layer or slice of blocks, in depth order."""
        return tuple(name for layer in self._named(text) for name in self._members[layer])

    def __getitem__(self, text: str) -> tuple[Layer, ...]:
        """Return the layers that ``text`` names: ``layers["blocks[-2:]"]`` has two of them."""
        return tuple(self._layer(name) for name in self._named(text))

    @override
    def __str__(self) -> str:
        rows = [("layer", "modules", "parameters")]
        for layer in self:
            ties = {name.rpartition(".")[0]: self._of[self._canonical[name]] for name in layer.tied}
            shown = [path or self._model for path in layer.modules]
            shown += [f"{path} (tied, lies in {home})" for path, home in ties.items()]
            numel = sum(self._sizes[name] for name in layer.parameters)
            rows.append((layer.name, shorten_list(shown), f"{numel:,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)

    # -- following surgery -------------------------------------------------------------------------------------

    def follow(self, parameters: Mapping[str, nn.Parameter], beside: Mapping[str, str]) -> None:
        """Take over the model's parameters after surgery.

        Args:
            parameters: All of them by name, in registration order.
            beside: For each new name, the parameter in whose layer it lies.
        """
        self._of = {name: self._of[name] if name in self._of else self._of[beside[name]] for name in parameters}
        self._sizes = {name: each.numel() for name, each in parameters.items()}
        self._index()

    def check(self, parameters: Iterable[str]) -> None:
        """Check that these are the layers of the model with these parameters.

        Raises:
            LayerError: They are another model's, or surgery has changed the model since.
        """
        if odd := sorted(set(parameters) ^ set(self._of)):
            raise LayerError(
                f"layers= is the LayerMap of another model, or of this one before surgery: {shorten_list(odd)} "
                f"{'differs' if len(odd) == 1 else 'differ'}. Write: layers=LayerMap(model), or {_EXAMPLE}"
            )

    # -- making ------------------------------------------------------------------------------------------------

    def _index(self) -> None:
        members: dict[str, list[str]] = {name: [] for name in self._order}
        for name, layer in self._of.items():
            members[layer].append(name)
        self._members = {layer: tuple(names) for layer, names in members.items()}
        self._layers: dict[str, Layer] = {}
        assert sum(len(names) for names in self._members.values()) == len(self._of), "every parameter lies in one layer"

    def _layer(self, name: str) -> Layer:
        if not self._layers:
            tied: dict[str, list[str]] = {}
            for each, layer in self._places.items():
                home = self._of.get(self._canonical[each])
                if home is not None and home != layer:
                    tied.setdefault(layer, []).append(each)
            modules = self._whole_modules()
            for layer, members in self._members.items():
                self._layers[layer] = Layer(layer, members, modules.get(layer, ()), tuple(tied.get(layer, ())))
        return self._layers[name]

    def _whole_modules(self) -> dict[str, tuple[str, ...]]:
        """Return for each layer the largest modules that lie in it whole, a tied weight standing under the name it has there."""
        shown = {
            self._canonical[each]: each
            for each, layer in reversed(self._places.items())
            if self._of.get(self._canonical[each]) == layer
        }
        names = {shown.get(name, name): layer for name, layer in self._of.items()}
        total = Counter(path for name in names for path in ancestors(name))
        inside = Counter((layer, path) for name, layer in names.items() for path in ancestors(name))
        found: dict[str, dict[str, None]] = {}
        for name, layer in names.items():
            whole = [path for path in ancestors(name) if inside[layer, path] == total[path]]
            found.setdefault(layer, {})[whole[-1] if whole else name] = None
        return {layer: tuple(paths) for layer, paths in found.items()}

    def _named(self, text: str) -> list[str]:
        found = _LAYER.fullmatch(text)
        if found is None or not self.names_layer(text):
            raise SelectorError(
                f"{text!r} names no layer. Layers: {', '.join(layer.name for layer in self)}. Write 'head' or 'blocks[-1]'."
            )
        blocks = [name for name in self._order if name.startswith("blocks[")]
        if found[1] == "blocks" and not blocks:
            raise SelectorError(f"{text!r} names no block: none was found in {self._model}. Pass them: {_EXAMPLE}")
        if found[1] != "blocks":
            return [found[1]]
        if found[2] is None and found[4] is None:
            return blocks
        start, stop = found[3], found[5]
        if found[4] is not None:
            return blocks[int(start) if start else None : int(stop) if stop else None]
        index = int(found[2])
        if not -len(blocks) <= index < len(blocks):
            raise SelectorError(f"{text!r} names no block: there are {len(blocks)}, 'blocks[0]' to 'blocks[-1]'.")
        return [blocks[index]]


def _found(model: nn.Module, names: tuple[str, ...], forward: Callable[[], object] | None) -> Mapping[str, str]:
    """Return the layer of each name, those of tied parameters too: in the order of use, or of registration."""
    split = find_split(model, names)
    order = None if forward is None else forward_order(model, forward)
    if order is None:
        if split.doubt:
            warn(
                f"{split.doubt}: layers follow the order in which modules are registered. To follow the order of use, "
                f"write: trainer.fit(…, layers=LayerMap(model, forward=lambda: model(inputs))), or {_EXAMPLE}",
            )
        return split.of
    used = find_split(model, order)
    moved = [name for name in names if used.of[name] != split.of[name]]
    if moved:
        log.info("layers follow the order of use", model=type(model).__name__, moved=moved)
    return used.of


def _given(model: nn.Module, names: Sequence[str], canonical: Mapping[str, str], layers: LayerSpec) -> dict[str, str]:
    """Return the layer of each name that ``layers`` matches."""
    if not isinstance(layers, Mapping) or not layers:
        raise LayerError(f"layers= takes a mapping of layer names to globs, got {shorten(layers)}. Write: {_EXAMPLE}")
    places: dict[str, str] = {}
    for layer, globs in _entries(model, layers):
        matched = [name for name in names if any(_matches(name, glob) for glob in globs)]
        if not matched:
            raise LayerError(f"layers[{layer!r}] = {list(globs)} matches nothing. Nearest: {nearest(globs[0], names)}.")
        for name in matched:
            if places.setdefault(name, layer) != layer:
                raise LayerError(f"layers= puts {name!r} both in {places[name]!r} and in {layer!r}. Name it once.")
    placed = {canonical[name] for name in places}
    unique = dict.fromkeys(canonical.values())
    left = [name for name in unique if name not in placed]
    if left:
        raise LayerError(
            f"layers= leaves out {len(left)} of {len(unique)} parameters: {shorten_list(left)}. "
            "Every parameter lies in exactly one layer: add them to 'stem', to a block or to 'head'."
        )
    return places


def _check_parameters(model: nn.Module, named: Mapping[str, nn.Parameter]) -> None:
    if not named:
        raise LayerError(f"{type(model).__name__} has no parameters, so there is nothing to train or to split.")
    lazy = [name for name, each in named.items() if is_lazy(each)]
    if lazy:
        raise LayerError(
            f"{shorten_list(lazy)} of {type(model).__name__} have no shape yet. Run the model once first: model(inputs)"
        )


def _check_given(places: Mapping[str, str], of: Mapping[str, str]) -> None:
    held = set(of.values())
    for name, layer in places.items():
        if layer not in held:
            raise LayerError(
                f"layers[{layer!r}] holds {name!r} alone, which is tied to a weight of an earlier layer and lies there. "
                f"Leave {layer!r} out, or leave the weight's other names out of the layers before it."
            )


def shorten_list(names: Sequence[str], limit: int = 4) -> str:
    """Return the first names joined by commas, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _depth_order(places: Mapping[str, str], layers: Iterable[str] = ("blocks",)) -> tuple[str, ...]:
    """Return the names of layers: the stem first, the head last, between them what is found or given in its order."""
    found = {name for name in places.values() if name.startswith("blocks[")}
    blocks = sorted(found, key=lambda name: int(name[7:-1]))
    middle = [blocks if name == "blocks" else [name] for name in layers if name not in {"stem", "head"}]
    return ("stem", *(name for names in middle for name in names), "head")


def _earliest(places: Mapping[str, str], canonical: Mapping[str, str], order: Sequence[str]) -> dict[str, str]:
    """Return the layer of each parameter: of all the places that its names have, the earliest."""
    depth = {layer: index for index, layer in enumerate(order)}
    of: dict[str, str] = {}
    for name, layer in places.items():
        known = of.setdefault(canonical[name], layer)
        if depth[layer] < depth[known]:
            of[canonical[name]] = layer
    return {name: of[name] for name in dict.fromkeys(canonical.values())}


def _without_gaps(of: Mapping[str, str], order: Sequence[str]) -> dict[str, str]:
    """Rename layers that are found: blocks without a parameter of their own go, and where nothing follows the blocks the last is the head."""
    held = [layer for layer in order if layer in set(of.values())]
    blocks = [layer for layer in held if layer not in {"stem", "head"}]
    renamed = {"stem": "stem", "head": "head"} | {layer: f"blocks[{index}]" for index, layer in enumerate(blocks)}
    if "head" not in held:
        renamed[held[-1]] = "head"
    return renamed


def _entries(model: nn.Module, layers: LayerSpec) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each layer's name and globs, the blocks counted."""
    for name, value in layers.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise LayerError(f"a layer's name is a word such as 'structure_module', got {shorten(name)}.")
        if name != "blocks":
            yield name, _globs(name, value)
            continue
        entries: Sequence[str | Sequence[str]] = (
            [
                each
                for each, _ in model.named_modules()
                if fnmatchcase(each, value) and each.count(".") == value.count(".")
            ]
            if isinstance(value, str)
            else value
            if isinstance(value, Sequence)
            else _globs(name, value)
        )
        if not entries:
            known = nearest(str(value), [each for each, _ in model.named_modules() if each])
            raise LayerError(f"layers['blocks'] = {value!r} matches no module. Nearest: {known}.")
        for index, entry in enumerate(entries):
            yield f"blocks[{index}]", _globs(f"blocks[{index}]", entry)


def _globs(layer: str, value: object) -> tuple[str, ...]:
    globs = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
    if not globs or not all(isinstance(each, str) for each in globs):
        raise LayerError(f"layers[{layer!r}] takes a glob or a list of globs, got {shorten(value)}. Write: 'encoder.*'")
    return globs


def _matches(name: str, glob: str) -> bool:
    return name.startswith(f"{glob}.") or fnmatchcase(name, glob)


def stretches(layers: Collection[str], order: Iterable[str]) -> list[tuple[str, ...]]:
    """Return layers as stretches without gaps, in depth order.

    Args:
        layers: Names of some layers.
        order: The names of all layers that have parameters, in depth order.

    Example:
        >>> stretches(["a", "b", "d"], ["a", "b", "c", "d"])
        [('a', 'b'), ('d',)]
    """
    groups = groupby(order, key=frozenset(layers).__contains__)
    return [tuple(names) for inside, names in groups if inside]
