"""What each owner wishes of each parameter: holds, factors, rates. Pure bookkeeping by name.

Holds add up and factors multiply, each owner changes only its own, so the order of the owners' calls does
not matter. Nothing here knows a tensor: the ledger makes the model and the optimizer agree with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias

from attrs import field, frozen

from .clock import Time
from .errors import LedgerError
from .schedules import Schedule, schedule_from_description
from .selectors import Selection

Moments: TypeAlias = Literal["drop", "keep"]
USER = "user"


@frozen(slots=True)
class Hold:
    """How one owner holds a parameter.

    Args:
        moments: Whether the optimizer's state is dropped or kept while the parameter is frozen.
        evaluate: Whether modules that are wholly held so stand in eval mode (no dropout).
    """

    moments: Moments = "drop"
    evaluate: bool = False


@frozen(slots=True)
class Rate:
    """An absolute base learning rate and the owner who set it."""

    lr: float
    owner: str


@frozen(eq=False)
class Holds:
    """The wishes of all owners.

    Args:
        held: Owner to the parameters it holds.
        standing: Owner to its patterns (layers, globs, modules), the latest last. They go on to cover
            parameters attached later: a Hold freezes them, None does not.
        factors: Owner to its factor on each parameter's learning rate.
        schedules: Owner to its schedule on each parameter's learning rate.
        rates: The absolute base rate of each parameter that has one.
        warmups: Warmup asked for by owners who released a parameter, while others still held it.
    """

    held: dict[str, dict[str, Hold]] = field(factory=dict)
    standing: dict[str, dict[str, Hold | None]] = field(factory=dict)
    factors: dict[str, dict[str, float]] = field(factory=dict)
    schedules: dict[str, dict[str, Schedule]] = field(factory=dict)
    rates: dict[str, Rate] = field(factory=dict)
    warmups: dict[str, dict[str, Time]] = field(factory=dict)

    def freeze(self, selection: Selection, owner: str, hold: Hold) -> None:
        """Add ``owner``'s hold."""
        self.held.setdefault(owner, {}).update(dict.fromkeys(selection.names, hold))
        self._stand(selection, owner, hold)
        if self.warmups:
            for name in selection.names:
                self.warmups.get(name, {}).pop(owner, None)

    def thaw(self, selection: Selection, owner: str, warmup: Time | None) -> list[str]:
        """Release ``owner``'s hold; return the names of which it really held one."""
        mine = self.held.get(owner, {})
        released = [name for name in selection.names if name in mine]
        for name in released:
            del mine[name]
        if owner in self.held and not mine:
            del self.held[owner]
        self._stand(selection, owner, None)
        if warmup is not None:
            for name in released:
                self.warmups.setdefault(name, {})[owner] = warmup
        return released

    def scale(self, selection: Selection, owner: str, factor: float) -> list[str]:
        """Set ``owner``'s factor; return the names for which that is a change."""
        mine = self.factors.setdefault(owner, {})
        changed = [name for name in selection.names if mine.get(name, 1.0) != factor]
        mine.update(dict.fromkeys(selection.names, factor))
        return changed

    def schedule(self, selection: Selection, owner: str, schedule: Schedule) -> list[str]:
        """Set ``owner``'s schedule; return the names for which that is a change."""
        mine = self.schedules.setdefault(owner, {})
        changed = [name for name in selection.names if mine.get(name) != schedule]
        mine.update(dict.fromkeys(selection.names, schedule))
        return changed

    def rate(self, selection: Selection, owner: str, lr: float) -> list[str]:
        """Set the absolute base rate; return the names for which that is a change.

        Raises:
            LedgerError: Another owner has set it.
        """
        for name in selection.names:
            known = self.rates.get(name)
            if known is not None and known.owner != owner:
                raise LedgerError(
                    f"the learning rate of {name!r} was set to {known.lr} by {known.owner!r}, and {owner!r} sets it to "
                    f"{lr}: one owner a parameter. Let one of them choose other parameters, or write "
                    f"ledger.scale({name!r}, factor, owner={owner!r}): factors multiply."
                )
        rate = Rate(lr, owner)
        changed = [name for name in selection.names if self.rates.get(name) != rate]
        self.rates.update(dict.fromkeys(selection.names, rate))
        return changed

    def is_held(self, name: str) -> bool:
        """Return whether anybody holds the parameter."""
        return any(name in mine for mine in self.held.values())

    def free(self, names: Iterable[str]) -> list[str]:
        """Return the names that nobody holds."""
        left = list(names)
        for mine in self.held.values():
            left = [name for name in left if name not in mine]
        return left

    def owners(self, name: str) -> tuple[str, ...]:
        """Return who holds the parameter, in alphabetical order."""
        return tuple(sorted(owner for owner, mine in self.held.items() if name in mine))

    def keeps(self, name: str) -> bool:
        """Return whether every holder wants the optimizer's state kept."""
        return all(mine[name].moments == "keep" for mine in self.held.values() if name in mine)

    def evaluates(self, name: str) -> bool:
        """Return whether somebody holds the parameter with ``mode="eval"``."""
        return any(name in mine and mine[name].evaluate for mine in self.held.values())

    def factor(self, name: str) -> float:
        """Return the product of all owners' factors: by size, so that its last bit does not depend on who set which."""
        return math.prod(sorted(mine[name] for mine in self.factors.values() if name in mine), start=1.0)

    def schedules_of(self, name: str) -> tuple[Schedule, ...]:
        """Return all owners' schedules, in the owners' alphabetical order."""
        return tuple(mine[name] for _, mine in sorted(self.schedules.items()) if name in mine)

    def enroll(self, name: str, beside: str, owner: str, covers: Callable[[str, str], bool]) -> None:
        """Take in a parameter that ``owner`` attached beside another.

        It gets the factors, the schedules and the rate of its neighbor. Other owners' patterns cover it; the attaching
        owner's do not, since it attached it to train it.
        """
        tables: list[dict[str, Any]] = [*self.factors.values(), *self.schedules.values()]
        for mine in tables:
            if beside in mine:
                mine[name] = mine[beside]
        if beside in self.rates:
            self.rates[name] = self.rates[beside]
        for other, patterns in self.standing.items():
            hold = None
            for pattern, wish in patterns.items():
                if other != owner and covers(pattern, name):
                    hold = wish
            if hold is not None:
                self.held.setdefault(other, {})[name] = hold

    def forget(self, names: Iterable[str]) -> None:
        """Drop everything about parameters that were detached."""
        owned: list[dict[str, Any]] = [*self.held.values(), *self.factors.values(), *self.schedules.values()]
        tables: list[dict[str, Any]] = [*owned, self.rates, self.warmups]
        for name in names:
            for table in tables:
                table.pop(name, None)
        for owner in [owner for owner, mine in self.held.items() if not mine]:
            del self.held[owner]

    def dismiss(self, owner: str) -> list[str]:
        """Drop all wishes of an owner; return the names that it held."""
        held = list(self.held.pop(owner, {}))
        for table in (self.standing, self.factors, self.schedules):
            table.pop(owner, None)
        for name in [name for name, rate in self.rates.items() if rate.owner == owner]:
            del self.rates[name]
        for warmups in self.warmups.values():
            warmups.pop(owner, None)
        return held

    def _stand(self, selection: Selection, owner: str, wish: Hold | None) -> None:
        if selection.patterns:
            mine = self.standing.setdefault(owner, {})
            for pattern in selection.patterns:
                mine.pop(pattern, None)
                mine[pattern] = wish

    def state_dict(self) -> dict[str, Any]:
        """Return everything as JSON."""
        return {
            "held": {owner: _by_hold(mine) for owner, mine in self.held.items()},
            "standing": {
                owner: [
                    [pattern, None if wish is None else [wish.moments, wish.evaluate]] for pattern, wish in mine.items()
                ]
                for owner, mine in self.standing.items()
            },
            "factors": {owner: dict(mine) for owner, mine in self.factors.items()},
            "schedules": {owner: _by_schedule(mine) for owner, mine in self.schedules.items()},
            "rates": {name: [rate.lr, rate.owner] for name, rate in self.rates.items()},
            "warmups": {
                name: {owner: str(time) for owner, time in each.items()} for name, each in self.warmups.items()
            },
        }

    @classmethod
    def from_state(cls, saved: Mapping[str, Any]) -> Holds:
        """Build from :meth:`state_dict`."""
        held: dict[str, dict[str, Hold]] = {}
        for owner, entries in saved["held"].items():
            for moments, evaluate, names in entries:
                held.setdefault(owner, {}).update(dict.fromkeys(names, Hold(moments, evaluate)))
        schedules: dict[str, dict[str, Schedule]] = {}
        for owner, entries in saved["schedules"].items():
            for description, names in entries:
                schedules.setdefault(owner, {}).update(dict.fromkeys(names, schedule_from_description(description)))
        return cls(
            held=held,
            standing={
                owner: {pattern: None if wish is None else Hold(*wish) for pattern, wish in mine}
                for owner, mine in saved["standing"].items()
            },
            factors={owner: dict(mine) for owner, mine in saved["factors"].items()},
            schedules=schedules,
            rates={name: Rate(*rate) for name, rate in saved["rates"].items()},
            warmups={name: {owner: Time(t) for owner, t in each.items()} for name, each in saved["warmups"].items()},
        )


def _by_hold(mine: Mapping[str, Hold]) -> list[list[Any]]:
    grouped: dict[Hold, list[str]] = {}
    for name, hold in mine.items():
        grouped.setdefault(hold, []).append(name)
    return [[hold.moments, hold.evaluate, sorted(names)] for hold, names in grouped.items()]


def _by_schedule(mine: Mapping[str, Schedule]) -> list[list[Any]]:
    grouped: dict[Schedule, list[str]] = {}
    for name, schedule in mine.items():
        grouped.setdefault(schedule, []).append(name)
    return [[schedule.describe(), sorted(names)] for schedule, names in grouped.items()]
