"""Parameter groups: derived from canonical order, trainable set and homes, never edited."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import Any

from attrs import define, frozen
from torch import Tensor
from torch.optim import Optimizer

from .clock import Clock, Time
from .homes import MANAGED, Home
from .layers import LayerMap, stretches
from .schedules import Schedule

# A group's name has to fit into a table.
_MOST = 4


@frozen(slots=True)
class Origin:
    """When a group was born late, and how long its own warmup is."""

    warmup: Time
    start: float

    def factor(self, clock: Clock) -> float:
        """Return the warmup's factor: 0 at birth, 1 once ``warmup`` has passed."""
        return (
            min(1.0, max(0.0, (self.warmup.elapsed(clock) - self.start) / self.warmup.value))
            if self.warmup.value
            else 1.0
        )


@frozen(slots=True, eq=False)
class Course:
    """A schedule of a group's own, in place of the fit's.

    Args:
        schedule: Progress through the course (0 to 1) to the factor.
        span: How long the course is; after it the last factor stays.
        start: When it began, in the unit of ``span``.
    """

    schedule: Schedule
    span: Time
    start: float

    def factor(self, clock: Clock) -> float:
        """Return the factor at ``clock``."""
        return self.schedule(min(1.0, max(0.0, (self.span.elapsed(clock) - self.start) / self.span.value)))


@define(eq=False, slots=True)
class Slot:
    """The parameters that share a home, a base rate, a factor, an origin, a course and set options: one group.

    Slots are interned: equal ones are the same object, so that grouping compares identities.
    """

    home: Home
    base_lr: float | None
    scale: float
    origin: Origin | None
    course: Course | None = None
    options: tuple[tuple[str, float], ...] = ()

    @property
    def moves(self) -> bool:
        """Whether the rate moves with the clock by itself."""
        return self.origin is not None or self.course is not None

    @property
    def set_options(self) -> dict[str, float]:
        """The options that somebody set for parameters of this home: as set for these, else as given."""
        return {**self.home.replaced, **dict(self.options)}

    def lr(self, factor: float, clock: Clock, floor: float) -> float:
        """Return ``max(base_lr * scale * factor * warmup, floor)``; the factor is the course's where there is one."""
        assert self.base_lr is not None
        warm = 1.0 if self.origin is None else self.origin.factor(clock)
        shape = factor if self.course is None else self.course.factor(clock)
        return max(self.base_lr * self.scale * shape * warm, floor)


@frozen
class Group:
    """One parameter group, as :attr:`ParameterLedger.groups` shows it.

    Args:
        name: Unique name, made of the layers it spans.
        parameters: Names of its parameters in canonical order.
        lr: The learning rate now; None where the optimizer has none.
        base_lr: The home or absolute rate, before factors and schedule.
        scale: Product of all owners' factors.
        optimizer: Index of the optimizer in :attr:`ParameterLedger.optimizers`.
        options: Weight decay, betas and whatever else the optimizer keeps in the group.
    """

    name: str
    parameters: tuple[str, ...]
    lr: float | None
    base_lr: float | None
    scale: float
    optimizer: int
    options: Mapping[str, Any]


def derive_groups(
    names: Iterable[str], trainable: AbstractSet[str], slots: Mapping[str, Slot], before: Mapping[Slot, dict[str, Any]]
) -> tuple[dict[Slot, dict[str, Any]], dict[Slot, list[str]], list[dict[str, Any]]]:
    """Derive the groups: one for each slot that has trainable members, by home, then by canonical order.

    Dictionaries survive: a slot keeps its own, a new slot takes one that a vanished slot of the same
    home leaves or the home's last one, and is given a copy only where none is free. So whatever an optimizer
    keeps in its groups stays there.

    Returns:
        The groups' dictionaries and the members by slot, and the dictionaries that no group uses any more.
    """
    members: dict[Slot, list[str]] = {}
    last, mine = None, list[str]()  # neighbors mostly share a slot
    for name in names:
        if name in trainable:
            slot = slots[name]
            if slot is not last:
                last, mine = slot, members.setdefault(slot, [])
            mine.append(name)
    spare: dict[Home, list[dict[str, Any]]] = {}
    for slot, group in before.items():
        if slot not in members:
            spare.setdefault(slot.home, []).append(group)
    living = {slot.home for slot in before}
    live: dict[Slot, dict[str, Any]] = {}
    renewed: set[Home] = set()
    for slot in sorted(members, key=lambda slot: slot.home.index):
        if slot in before:
            group = before[slot]
        else:
            unused = spare.setdefault(slot.home, [] if slot.home in living else [slot.home.template])
            group = unused.pop(0) if unused else copied(slot.home.template)
        live[slot] = group
        if slot.home not in renewed:
            renewed.add(slot.home)
            slot.home.template = group
    return live, members, [group for groups in spare.values() for group in groups]


def name_groups(
    live: Mapping[Slot, dict[str, Any]],
    members: Mapping[Slot, list[str]],
    layers: LayerMap,
    optimizers: Sequence[Optimizer],
) -> tuple[str, ...]:
    """Return unique names of the groups, made of the layers they span, and of the optimizer where there are several."""
    taken: dict[str, int] = {}
    names = []
    for slot, group in live.items():
        name = _span(members[slot], layers)
        if isinstance(group.get("name"), str):
            name = f"{group['name']}:{name}"
        if len(optimizers) > 1:
            name = f"{name} ({type(optimizers[slot.home.optimizer]).__name__})"
        taken[name] = taken.get(name, 0) + 1
        names.append(f"{name}/{taken[name]}" if taken[name] > 1 else name)
    return tuple(names)


def layers_of_groups(members: Iterable[Iterable[str]], layers: LayerMap) -> list[tuple[str, ...]]:
    """Return for each group the layers that it has parameters of."""
    return [tuple(dict.fromkeys(layers.of(name).name for name in names)) for names in members]


def view_groups(
    live: Mapping[Slot, dict[str, Any]], members: Mapping[Slot, list[str]], names: Iterable[str]
) -> tuple[Group, ...]:
    """Show the groups under their names."""
    views = []
    for name, (slot, group) in zip(names, live.items(), strict=True):
        lr = group.get("lr")
        options = {key: value for key, value in options_of(group).items() if key != "lr"}
        rate = None if lr is None else float(lr)
        views.append(
            Group(
                name,
                tuple(members[slot]),
                rate,
                slot.base_lr,
                slot.scale,
                slot.home.optimizer,
                MappingProxyType(options),
            )
        )
    return tuple(views)


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a group says besides its parameters and their names."""
    return {key: value for key, value in group.items() if key not in MANAGED}


def copied(template: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a group's dictionary; a learning rate that is a tensor is not shared."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in template.items()}


def _span(names: Iterable[str], layers: LayerMap) -> str:
    found = stretches({layers.of(name).name for name in names}, [layer.name for layer in layers])
    texts = [each[0] if len(each) == 1 else f"{each[0]}..{each[-1]}" for each in found]
    return "+".join(texts if len(texts) <= _MOST else [*texts[: _MOST - 1], f"{len(texts) - _MOST + 1} more"])


def but_rate(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's options without the rate: that is a function of the clock, and here still the step's before."""
    return {key: value for key, value in options.items() if key != "lr"}
