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
from .groups import Course
from .schedules import schedule_from_description
from .selectors import Selection

Moments: TypeAlias = Literal["drop", "keep"]
Mode: TypeAlias = Literal["eval", "train"] | None
USER = "user"


@frozen(slots=True)
class Hold:
    """How one owner holds a parameter.

    Args:
        moments: Whether the optimizer's state is dropped or kept while the parameter is frozen.
        mode: ``"eval"``: modules that are wholly held so stand in eval mode (no dropout). ``"train"``: normalization
            layers that everybody holds so stay in train mode.
    """

    moments: Moments = "drop"
    mode: Mode = None


@frozen(slots=True)
class Setting:
    """What one owner set for a parameter: its base rate, its course, or an option of its group."""

    value: float | Course
    owner: str


@frozen(eq=False)
class Holds:
    """The wishes of all owners.

    Args:
        held: Owner to the parameters it holds.
        standing: Owner to its patterns (layers, globs, modules), the latest last. They go on to cover
            parameters attached later: a Hold freezes them, None does not.
        factors: Owner to its factor on each parameter's learning rate.
        settings: By kind (``"lr"``, ``"schedule"``, or the name of an option): what was set for which parameter.
        warmups: Warmup asked for by owners who released a parameter, while others still held it.
    """

    held: dict[str, dict[str, Hold]] = field(factory=dict)
    standing: dict[str, dict[str, Hold | None]] = field(factory=dict)
    factors: dict[str, dict[str, float]] = field(factory=dict)
    settings: dict[str, dict[str, Setting]] = field(factory=dict)
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

    def put(self, kind: str, selection: Selection, owner: str, value: float | Course | None) -> list[str]:
        """Set a value, or with None take back the owner's own; return the names for which that is a change.

        Raises:
            LedgerError: Another owner has set it.
        """
        table = self.settings.get(kind, {})
        if value is None:
            mine = [name for name in selection.names if name in table and table[name].owner == owner]
            for name in mine:
                del table[name]
            return mine
        self.check_undisputed(kind, selection, owner, value)
        setting = Setting(value, owner)
        changed = [name for name in selection.names if table.get(name) != setting]
        self.settings.setdefault(kind, {}).update(dict.fromkeys(selection.names, setting))
        return changed

    def check_undisputed(self, kind: str, selection: Selection, owner: str, value: float | Course) -> None:
        """Raise a LedgerError where another owner has set the value."""
        table = self.settings.get(kind, {})
        for name in selection.names:
            known = table.get(name)
            if known is not None and known.owner != owner:
                raise LedgerError(_disputed(kind, name, known, owner, value))

    def set_for(self, name: str) -> dict[str, Any]:
        """Return what was set for the parameter, by kind."""
        return {kind: table[name].value for kind, table in self.settings.items() if name in table}

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
        return any(name in mine and mine[name].mode == "eval" for mine in self.held.values())

    def tracks(self, name: str) -> bool:
        """Return whether it is held, and all who hold it do with ``mode="train"``."""
        modes = [mine[name].mode for mine in self.held.values() if name in mine]
        return bool(modes) and all(mode == "train" for mode in modes)

    def factor(self, name: str) -> float:
        """Return the product of all owners' factors: by size, so that its last bit does not depend on who set which."""
        return math.prod(sorted(mine[name] for mine in self.factors.values() if name in mine), start=1.0)

    def enroll(self, name: str, beside: str, owner: str, covers: Callable[[str, str], bool]) -> None:
        """Take in a parameter that ``owner`` attached beside another.

        It gets the factors and the settings of its neighbor. Other owners' patterns cover it; the attaching
        owner's do not, since it attached it to train it.
        """
        tables: list[dict[str, Any]] = [*self.factors.values(), *self.settings.values()]
        for table in tables:
            if beside in table:
                table[name] = table[beside]
        for other, patterns in self.standing.items():
            hold = None
            for pattern, wish in patterns.items():
                if other != owner and covers(pattern, name):
                    hold = wish
            if hold is not None:
                self.held.setdefault(other, {})[name] = hold

    def forget(self, names: Iterable[str]) -> None:
        """Drop everything about parameters that were detached."""
        tables: list[dict[str, Any]] = [
            *self.held.values(),
            *self.factors.values(),
            *self.settings.values(),
            self.warmups,
        ]
        for name in names:
            for table in tables:
                table.pop(name, None)
        for owner in [owner for owner, mine in self.held.items() if not mine]:
            del self.held[owner]

    def dismiss(self, owner: str) -> list[str]:
        """Drop all wishes of an owner; return the names that it held."""
        held = list(self.held.pop(owner, {}))
        for table in (self.standing, self.factors):
            table.pop(owner, None)
        for settings in self.settings.values():
            for name in [name for name, setting in settings.items() if setting.owner == owner]:
                del settings[name]
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
                    [pattern, None if wish is None else [wish.moments, wish.mode]] for pattern, wish in mine.items()
                ]
                for owner, mine in self.standing.items()
            },
            "factors": {owner: dict(mine) for owner, mine in self.factors.items()},
            "settings": {kind: _by_setting(table) for kind, table in self.settings.items()},
            "warmups": {
                name: {owner: str(time) for owner, time in each.items()} for name, each in self.warmups.items()
            },
        }

    @classmethod
    def from_state(cls, saved: Mapping[str, Any]) -> Holds:
        """Build from :meth:`state_dict`."""
        held: dict[str, dict[str, Hold]] = {}
        for owner, entries in saved["held"].items():
            for moments, mode, names in entries:
                held.setdefault(owner, {}).update(dict.fromkeys(names, Hold(moments, mode)))
        return cls(
            held=held,
            standing={
                owner: {pattern: None if wish is None else Hold(*wish) for pattern, wish in mine}
                for owner, mine in saved["standing"].items()
            },
            factors={owner: dict(mine) for owner, mine in saved["factors"].items()},
            settings={
                kind: {
                    name: setting
                    for value, owner, names in entries
                    for name, setting in dict.fromkeys(names, Setting(_value(value), owner)).items()
                }
                for kind, entries in saved["settings"].items()
            },
            warmups={name: {owner: Time(t) for owner, t in each.items()} for name, each in saved["warmups"].items()},
        )


def _by_hold(mine: Mapping[str, Hold]) -> list[list[Any]]:
    grouped: dict[Hold, list[str]] = {}
    for name, hold in mine.items():
        grouped.setdefault(hold, []).append(name)
    return [[hold.moments, hold.mode, sorted(names)] for hold, names in grouped.items()]


def _by_setting(table: Mapping[str, Setting]) -> list[list[Any]]:
    """Return value, owner and names of each setting; a course is one object for all who share it, before and after."""
    grouped: dict[Setting, list[str]] = {}
    for name, setting in table.items():
        grouped.setdefault(setting, []).append(name)
    return [[_json(setting.value), setting.owner, names] for setting, names in grouped.items()]


def _json(value: float | Course) -> Any:
    return [value.schedule.describe(), str(value.span), value.start] if isinstance(value, Course) else value


def _value(saved: Any) -> float | Course:
    if not isinstance(saved, (list, tuple)):
        return float(saved)
    schedule, span, start = saved
    return Course(schedule_from_description(schedule), Time(span), start)


def _disputed(kind: str, name: str, known: Setting, owner: str, value: float | Course) -> str:
    what = "learning rate" if kind == "lr" else kind
    there, here = ("its own" if isinstance(each, Course) else each for each in (known.value, value))
    text = f"the {what} of {name!r} was set to {there} by {known.owner!r}, and {owner!r} sets it to {here}: one owner a parameter. "
    text += "Let one of them choose other parameters"
    return text + (
        f", or write ledger.scale({name!r}, factor, owner={owner!r}): factors multiply." if kind == "lr" else "."
    )
