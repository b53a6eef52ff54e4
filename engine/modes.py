"""Train or eval mode of modules, derived from what trains and never stored."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from operator import attrgetter

from attrs import define, field
from torch import nn

from .holds import Holds

_training = attrgetter("training")


@define(eq=False, slots=True)
class ModeKeeper:
    """Keeps normalization layers, and modules held with ``mode="eval"``, in the mode that follows from what trains.

    A normalization layer with running statistics stands in train mode where the model does and any of its
    parameters trains, so the statistics of a frozen one do not drift, unless all who hold it ask for ``mode="train"``.
    One without parameters follows what stands before it in the same module, else the module around it.

    Args:
        model: The model.
        asked: Whether a mode was ever asked for.
        calm: Owner to parameters whose modules stand in eval mode as long as none of them trains.
    """

    model: nn.Module
    asked: bool = False
    calm: dict[str, frozenset[str]] = field(factory=dict)
    _norms: list[tuple[nn.Module, tuple[str, ...]]] = field(init=False)
    _all: list[tuple[nn.Module, tuple[str, ...]]] = field(init=False)
    derived: list[nn.Module] = field(init=False, factory=list)
    _trains: list[bool] = field(init=False, factory=list)
    _none: list[bool] = field(init=False, factory=list)

    def __attrs_post_init__(self) -> None:
        self.scan()

    def scan(self) -> None:
        """Find the modules again after surgery."""
        first: dict[int, str] = {}
        for name, parameter in self.model.named_parameters():
            first.setdefault(id(parameter), name)
        self._all = []
        of: dict[str, tuple[str, ...]] = {}
        before: dict[str, tuple[str, ...]] = {}  # by parent: the parameters of the child before
        for path, module in self.model.named_modules():
            parent = path.rpartition(".")[0]
            mine = tuple(first[id(parameter)] for parameter in module.parameters())
            of[path] = mine or before.get(parent, ()) or of.get(parent, ())
            if mine and path:
                before[parent] = mine
            if path:  # the model's own mode is its caller's, and what the others follow
                self._all.append((module, of[path]))
        self._norms = [(module, names) for module, names in self._all if _has_statistics(module) and names]

    def refresh(self, trainable: AbstractSet[str], holds: Holds) -> None:
        """Derive the modes from the trainable set and the holds, and set them."""
        modes = {module: any(name in trainable for name in names) for module, names in self._norms}
        if self.asked:
            modes = {module: modes[module] or any(map(holds.tracks, names)) for module, names in self._norms}
            calm = frozenset[str]().union(*self.calm.values()) - trainable
            calm = frozenset(name for name in calm if not holds.tracks(name))
            for module, names in self._all:
                held = bool(names) and all(name in calm or holds.evaluates(name) for name in names)
                modes[module] = modes.get(module, True) and not held
        self.derived, self._trains, self._none = list(modes), list(modes.values()), [False] * len(modes)
        self.sync()

    def sync(self) -> None:
        """Set the derived modes; under ``model.eval()`` everything stays in eval mode."""
        wanted = self._trains if self.model.training else self._none
        if list(map(_training, self.derived)) != wanted:  # in a third of the time that looking one by one takes
            for module, mode in zip(self.derived, wanted, strict=True):
                module.training = mode


def _has_statistics(module: nn.Module) -> bool:
    return getattr(module, "running_mean", None) is not None
