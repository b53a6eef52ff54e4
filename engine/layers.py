"""The layers of a model in depth order: stem, blocks, head."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from attrs import frozen
from torch import nn
from typing_extensions import override

from .errors import LayerError, SelectorError, nearest, shorten

LayerSpec: TypeAlias = Mapping[str, "str | Sequence[str] | Sequence[Sequence[str]]"]
_LAYER = re.compile(r"([A-Za-z_]\w*)(?:\[\s*(-?\d*)\s*(:\s*(-?\d*)\s*)?\])?")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Modules that belong to what stands before them: a block ends with its normalization.
_FOLLOWERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU)


@frozen(slots=True)
class Layer:
    """One layer: its name (``"stem"``, ``"blocks[3]"``, ``"head"``), modules and parameters."""

    name: str
    parameters: tuple[str, ...]
    modules: tuple[str, ...] = ()


class LayerMap:
    """The parameters of a model in depth order; every one lies in exactly one layer.

    Found are, in this order: what ``layers`` says; the class of block modules, repeated in
    ``ModuleList`` or ``Sequential``, that holds most of the parameters; the children in order. What
    stands before the first block is the stem, what stands after the last one the head, what stands
    between two blocks belongs to the earlier. A tied parameter lies in its earliest layer.

    Args:
        model: The model to split.
        layers: Layer name to globs over parameter names or module names, in depth order. ``"blocks"``
            takes a list with an entry (a glob or a list of them) for each block, or one glob over *module*
            names. Other names are parts of their own, such as ``"structure_module"``.

    Raises:
        LayerError: The model has no parameters, or ``layers`` leaves one out or names none.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> layers = LayerMap(model)
        >>> len(layers.blocks), layers.head.parameters, layers.of("2.bias").name
        (2, ('4.weight', '4.bias'), 'blocks[1]')
    """

    def __init__(self, model: nn.Module, layers: LayerSpec | None = None) -> None:
        names = [name for name, _ in model.named_parameters()]
        if not names:
            raise LayerError(f"{type(model).__name__} has no parameters, so there is nothing to train or to split.")
        self._modules: dict[str, tuple[str, ...]] = {}
        if layers is None:
            self._of = self._found(model, names)
        else:
            self._of = self._given(model, names, layers)
        self._order = _depth_order(self._of, layers)
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
        return found is not None and (found[1] == "blocks" or (found[1] in self._order and found[2] is None))

    def parameters(self, text: str) -> tuple[str, ...]:
        """Return the parameter names of a layer or slice of blocks, in depth order."""
        return tuple(name for layer in self._named(text) for name in self._members[layer])

    def __getitem__(self, text: str) -> tuple[Layer, ...]:
        """Return the layers that ``text`` names: ``layers["blocks[-2:]"]`` has two of them."""
        return tuple(self._layer(name) for name in self._named(text))

    @override
    def __str__(self) -> str:
        rows = [("layer", "modules", "tensors")]
        rows += [(each.name, shorten_list(each.modules), str(len(each.parameters))) for each in self]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)

    # -- following surgery -------------------------------------------------------------------------------------

    def follow(self, names: Sequence[str], beside: Mapping[str, str]) -> None:
        """Take over the model's parameter names after surgery.

        Args:
            names: All parameter names, in registration order.
            beside: For each new name, the parameter in whose layer it lies.
        """
        self._of = {name: self._of[name] if name in self._of else self._of[beside[name]] for name in names}
        self._index()

    # -- making ------------------------------------------------------------------------------------------------

    def _index(self) -> None:
        members: dict[str, list[str]] = {name: [] for name in self._order}
        for name, layer in self._of.items():
            members[layer].append(name)
        self._members = {layer: tuple(names) for layer, names in members.items()}
        assert sum(len(names) for names in self._members.values()) == len(self._of), "every parameter lies in one layer"

    def _layer(self, name: str) -> Layer:
        members = self._members[name]
        modules = self._modules.get(name) or tuple(dict.fromkeys(each.rpartition(".")[0] for each in members))
        return Layer(name, members, modules)

    def _named(self, text: str) -> list[str]:
        found = _LAYER.fullmatch(text)
        if found is None or not self.names_layer(text):
            raise SelectorError(
                f"{text!r} names no layer. Layers: {', '.join(self._order)}. Write 'head' or 'blocks[-1]'."
            )
        blocks = [name for name in self._order if name.startswith("blocks[")]
        if found[1] != "blocks":
            return [found[1]]
        if found[2] is None:
            return blocks
        start, stop = found[2], found[4]
        if found[3] is not None:
            return blocks[int(start) if start else None : int(stop) if stop else None]
        index = int(start) if start else 0
        if not -len(blocks) <= index < len(blocks):
            raise SelectorError(f"{text!r} names no block: there are {len(blocks)}, 'blocks[0]' to 'blocks[-1]'.")
        return [blocks[index]]

    def _found(self, model: nn.Module, names: list[str]) -> dict[str, str]:
        blocks = _block_modules(model) or _units(model)
        last = _after_blocks(names, blocks)
        stem_only = blocks and isinstance(model.get_submodule(blocks[0][0]) if blocks[0][0] else model, nn.Embedding)
        if not last:  # nothing follows the blocks: the last of them is the head
            head, blocks = blocks[-1], blocks[:-1]
        else:
            head = ()
        if stem_only and len(blocks) > 1:
            blocks = blocks[1:]
        layer, of = "stem", {}
        block_of = {prefix: index for index, prefixes in enumerate(blocks) for prefix in prefixes}
        for name in names:
            block = next((block_of[path] for path in _ancestors(name) if path in block_of), None)
            if block is not None:
                layer = f"blocks[{block}]"
            elif name in last or _inside(name, head):
                layer = "head"
            of[name] = layer
        for index, prefixes in enumerate(blocks):
            self._modules[f"blocks[{index}]"] = prefixes
        return of

    def _given(self, model: nn.Module, names: list[str], layers: LayerSpec) -> dict[str, str]:
        if not isinstance(layers, Mapping) or not layers:
            raise LayerError(
                f"layers= takes a mapping of layer names to globs, got {shorten(layers)}. "
                "Write: layers={'stem': 'embeddings', 'blocks': 'encoder.layer.*', 'head': 'classifier'}"
            )
        of: dict[str, str] = {}
        for layer, globs in _entries(model, layers):
            matched = [name for name in names if any(_matches(name, glob) for glob in globs)]
            if not matched:
                raise LayerError(
                    f"layers[{layer!r}] = {list(globs)} matches nothing. Nearest: {nearest(globs[0], names)}."
                )
            for name in matched:
                if of.setdefault(name, layer) != layer:
                    raise LayerError(f"layers= puts {name!r} both in {of[name]!r} and in {layer!r}. Name it once.")
        left = [name for name in names if name not in of]
        if left:
            raise LayerError(
                f"layers= leaves out {len(left)} of {len(names)} parameters: {shorten_list(left)}. "
                "Every parameter lies in exactly one layer: add them to 'stem', to a block or to 'head'."
            )
        return of


def shorten_list(names: Sequence[str], limit: int = 4) -> str:
    """Return the first names joined by commas, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _depth_order(of: Mapping[str, str], layers: LayerSpec | None) -> tuple[str, ...]:
    blocks = sorted({name for name in of.values() if name.startswith("blocks[")}, key=lambda name: int(name[7:-1]))
    parts = [name for name in layers or () if name not in {"stem", "blocks", "head"}]
    return ("stem", *blocks, *parts, "head")


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


def _inside(name: str, prefixes: Sequence[str]) -> bool:
    return any(not prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _ancestors(name: str) -> Iterator[str]:
    """Yield the modules around a parameter or module, from the nearest to the root."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _after_blocks(names: Sequence[str], blocks: Sequence[Sequence[str]]) -> set[str]:
    """Return the names registered after the last parameter of any block."""
    prefixes = {prefix for block in blocks for prefix in block}
    inside = [index for index, name in enumerate(names) if any(path in prefixes for path in _ancestors(name))]
    return set(names[inside[-1] + 1 :]) if inside else set()


def _block_modules(model: nn.Module) -> list[tuple[str, ...]]:
    """Find the class of block that, repeated in lists, holds most of the model's parameters."""
    instances: dict[type[nn.Module], list[str]] = {}
    lists: dict[type[nn.Module], set[type[nn.Module]]] = {}
    sizes: dict[str, int] = {}
    seen: dict[type[nn.Module], set[str]] = {}
    for parent_name, parent in model.named_modules():
        if not isinstance(parent, _CONTAINERS):
            continue
        for child_name, child in parent.named_children():
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            kind = type(child)
            nested = any(path in seen.get(kind, ()) for path in _ancestors(name))
            if next(child.children(), None) is None or nested:
                continue
            sizes[name] = sum(each.numel() for each in child.parameters())
            if sizes[name]:
                instances.setdefault(kind, []).append(name)
                seen.setdefault(kind, set()).add(name)
                lists.setdefault(kind, set()).add(type(parent))
    kinds = {kind: names for kind, names in instances.items() if len(names) > 1}
    if not kinds:
        return []
    held = {kind: sum(sizes[name] for name in names) for kind, names in kinds.items()}
    best = max(kinds, key=lambda kind: held[kind])
    # A stage that is a plain sequence of blocks is split further: its blocks are the layers (ConvNeXt, Swin).
    for kind, names in kinds.items():
        within = all(any(path in seen[best] for path in _ancestors(name)) for name in names)
        longer = len(names) > len(kinds[best]) and held[kind] >= 0.8 * held[best]
        if kind is not best and within and longer and lists[kind] == {nn.Sequential}:
            best = kind
    return [(name,) for name in kinds[best]]


def _units(model: nn.Module, prefix: str = "") -> list[tuple[str, ...]]:
    """Cut a model without repeated blocks into its children, sequences flattened, norms joined to what they follow."""
    units: list[tuple[str, ...]] = []
    children = [(name, child) for name, child in model.named_children() if next(child.parameters(), None) is not None]
    if not children:
        return [(prefix,)]
    for name, child in children:
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, _FOLLOWERS) and units:
            units[-1] = (*units[-1], path)
        elif isinstance(child, _CONTAINERS) or len(children) == 1:
            units.extend(_units(child, path))
        else:
            units.append((path,))
    return units
