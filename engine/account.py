"""An account of what was asked of a ledger, kept beside it in plain dictionaries: what must train, at which rates, in which modes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from attrs import frozen
from torch import nn

from .clock import Clock, Time
from .ledger import ParameterLedger
from .oracle import LedgerOracle, covered
from .schedules import Schedule, as_schedule
from .selectors import Selector
from .state import State

Home = Mapping[str, Any]


@frozen
class Rise:
    """From when on a rate rises from zero, and for how long."""

    span: Time
    start: float


class Account(LedgerOracle):
    """What a ledger must say after the calls on it, which it hears of once :meth:`listen` was called.

    Nothing is asked of the ledger but which parameters a selector means, and which there are.

    Args:
        state: The fit's, before its first call on the ledger.
        home_of: The rate and the options that a parameter has from the optimizer, by itself and by what it was attached beside, if it was.
        factor: The fit's schedule, from progress to factor.
        min_lr: Below which no rate falls.

    Example:
        >>> import torch
        >>> from thawline.engine.doubles import mlp
        >>> ledger = ParameterLedger(model := mlp(), lambda each: torch.optim.SGD(each, lr=0.1))
        >>> state = State(model, ledger, duration="1ba")
        >>> account = Account(state, home_of=lambda each, beside: {"lr": 0.1}, factor=lambda progress: 1.0)
        >>> account.listen()
        >>> ledger.freeze("blocks[0]", owner="me")
        >>> ledger.scale("head", 0.5, owner="me")
        >>> sorted(account.trainable()), account.rate("4.bias", Clock())
        (['2.bias', '2.weight', '4.bias', '4.weight'], 0.05)
    """

    def __init__(
        self,
        state: State,
        *,
        home_of: Callable[[nn.Parameter, nn.Parameter | None], Home],
        factor: Callable[[float], float],
        min_lr: float = 0.0,
    ) -> None:
        super().__init__(state.ledger, ())
        self.state, self.home_of, self.factor, self.min_lr = state, home_of, factor, min_lr
        self.holds, self.rules, self.scales = defaultdict(set), defaultdict(list), defaultdict(dict)
        self.modes: dict[str, dict[str, str | None]] = defaultdict(dict)
        self.asked: dict[str, list[str | None]] = defaultdict(list)  # the mode of each rule
        self.calm: dict[str, frozenset[str]] = {}
        self.pending: dict[str, dict[str, Time]] = defaultdict(dict)
        self.rises: dict[str, Rise] = {}
        self.own: dict[str, dict[str, Any]] = {"lr": {}, "schedule": {}}
        self.moments: dict[str, Any] = {}
        for name, each in state.ledger.parameters.items():
            self._house(name, each, None)
            if not each.requires_grad:
                self.holds["user"].add(name)

    def listen(self) -> None:
        """Hear of every call on the ledger that does not fail, from now on."""
        ledger = self.state.ledger
        for call in ("freeze", "thaw", "scale", "set_lr", "set_options", "set_schedule", "evaluate_frozen"):
            object.__setattr__(ledger, call, self._heard(getattr(ledger, call), getattr(self, f"_{call}")))
        for call in ("attach", "detach", "dismiss", "drop_moments"):
            object.__setattr__(ledger, call, self._heard(getattr(ledger, call), getattr(self, f"_{call}"), plain=True))

    def _heard(
        self, call: Callable[..., None], note: Callable[..., None], *, plain: bool = False
    ) -> Callable[..., None]:
        def heard(select: Any, *arguments: Any, **options: Any) -> None:
            before = self.trainable()
            call(select, *arguments, **options)
            if plain:
                note(select, *arguments, **options)
            else:
                names = () if select is None else self.state.ledger.select(select)
                note(select, names, *arguments, **options)
            self._follow(before)

        return heard

    # -- calls -------------------------------------------------------------------------------------------------

    def _freeze(
        self, select: Selector, names: Sequence[str], *, owner: str, moments: str = "drop", mode: str | None = None
    ) -> None:
        self.freeze(select, names, owner)
        self.asked[owner].append(mode)
        for name in names:
            self.modes[owner][name] = mode
            self.pending[name].pop(owner, None)
            if moments == "drop":
                self.moments.pop(name, None)

    def _thaw(
        self, select: Selector, names: Sequence[str], *, owner: str, warmup: Time | str | int | None = None
    ) -> None:
        released = [name for name in names if name in self.holds[owner]]
        self.thaw(select, names, owner)
        self.asked[owner].append(None)
        if warmup is not None:
            for name in released:
                self.pending[name][owner] = Time(warmup)

    def _scale(self, _: Selector, names: Sequence[str], factor: float, *, owner: str) -> None:
        self.scale(names, factor, owner)

    def _set_lr(self, _: Selector, names: Sequence[str], lr: float | None, *, owner: str) -> None:
        self._put("lr", self.rates, names, lr, owner)

    def _set_options(self, _: Selector, names: Sequence[str], *, owner: str, **options: float | None) -> None:
        for option, value in options.items():
            self._put(option, self.options.setdefault(option, {}), names, value, owner)

    def _set_schedule(
        self,
        _: Selector,
        names: Sequence[str],
        schedule: Schedule | None,
        *,
        owner: str,
        span: Time | str | int | None = None,
    ) -> None:
        course: Callable[[Clock], float] | None = None
        if schedule is not None and span is not None:
            course = partial(_along, as_schedule(schedule), Time(span), elapsed(Time(span), self.state.clock))
        self._put("schedule", self.courses, names, course, owner)

    def _evaluate_frozen(self, select: Selector | None, names: Sequence[str], *, owner: str) -> None:
        self.calm[owner] = frozenset() if select is None else frozenset(names)

    def _attach(self, modules: str | Sequence[str], op: str, *, owner: str, **arguments: Any) -> None:  # noqa: ARG002 - a call's signature
        ledger = self.state.ledger
        known, self.names = set(self.names), list(ledger.parameters)
        for name in self.names:
            if name in known:
                continue
            beside = beside_of(name, known)
            self._house(name, ledger.parameters[name], None if beside is None else ledger.parameters[beside])
            if beside is not None:
                for table in (*self._tables(), *self.own.values()):
                    if beside in table:
                        table[name] = table[beside]
            for other, rules in self.rules.items():
                wishes = [place for place, (selector, _) in enumerate(rules) if covers(selector, name, ledger)]
                if other != owner and wishes and rules[wishes[-1]][1]:
                    self.holds[other].add(name)
                    self.modes[other][name] = self.asked[other][wishes[-1]]

    def _detach(self, module: str, op: str, *, owner: str) -> None:  # noqa: ARG002 - a call's signature
        gone = set(self.names) - set(self.state.ledger.parameters)
        for name in gone:
            self.detach(self.state.ledger, name)
            for table in (self.moments, self.pending, self.rises, *self.own.values()):
                table.pop(name, None)

    def _dismiss(self, owner: str) -> None:
        self.holds.pop(owner, None)
        self.rules.pop(owner, None)
        self.scales.pop(owner, None)
        self.modes.pop(owner, None)
        self.asked.pop(owner, None)
        tables: dict[str, dict[str, Any]] = {"lr": self.rates, "schedule": self.courses, **self.options}
        for option, table in tables.items():
            for name in [name for name, who in self.own.get(option, {}).items() if who == owner]:
                table.pop(name, None)
                del self.own[option][name]
        for asked in self.pending.values():
            asked.pop(owner, None)

    def _drop_moments(self, select: Selector, *, owner: str) -> None:  # noqa: ARG002 - a call's signature
        for name in self.state.ledger.select(select):
            self.moments.pop(name, None)

    # -- inside ------------------------------------------------------------------------------------------------

    def _house(self, name: str, parameter: nn.Parameter, beside: nn.Parameter | None) -> None:
        home = self.home_of(parameter, beside)
        self.base[name] = home["lr"]
        self.given[name] = {key: value for key, value in home.items() if key != "lr"}

    def _put(self, kind: str, table: dict[str, Any], names: Sequence[str], value: Any, owner: str) -> None:
        owners = self.own.setdefault(kind, {})
        for name in names:
            if value is not None:
                table[name], owners[name] = value, owner
            elif owners.get(name) == owner:
                del table[name], owners[name]

    def _follow(self, before: set[str]) -> None:
        """Let rates rise from zero in what begins to train, where that was asked for."""
        now = self.trainable()
        for name in before - now:
            self.rises.pop(name, None)
        for name in now - before:
            if asked := self.pending.pop(name, None):
                span = max(asked.values(), key=lambda time: (time.unit, time.value))
                self.rises[name] = Rise(span, elapsed(span, self.state.clock))

    # -- what must be ------------------------------------------------------------------------------------------

    def rate(self, name: str, clock: Clock) -> float:
        """Return the learning rate of a parameter in the batch that begins at ``clock``."""
        value = self.rates.get(name, self.base[name])
        assert value is not None, "the factories here give rates"
        value *= math.prod(mine.get(name, 1.0) for mine in self.scales.values())
        value *= self.courses[name](clock) if name in self.courses else self.factor(clock.progress)  # type: ignore[arg-type]
        if rise := self.rises.get(name):
            passed = elapsed(rise.span, clock) - rise.start
            value *= min(1.0, max(0.0, passed / rise.span.value)) if rise.span.value else 1.0
        return max(value, self.min_lr)

    def told(self, clock: Clock, layer_of: Callable[[str], str]) -> dict[str, float]:
        """Return the highest rate of all that trains, and in each layer, by the names under which they are told."""
        layers = [each.name for each in self.state.layers if each.parameters]
        told = dict.fromkeys(["lr", *(f"lr/{each}" for each in layers)], 0.0)
        for name in self.trainable():
            rate = self.rate(name, clock)
            for place in ("lr", f"lr/{layer_of(name)}"):
                told[place] = max(rate, told[place])
        return told

    def tracks(self, name: str) -> bool:
        """Return whether a frozen parameter's statistics go on: all who hold it ask for it."""
        modes = [self.modes[owner].get(name) for owner, mine in self.holds.items() if name in mine]
        return bool(modes) and all(mode == "train" for mode in modes)

    def evaluates(self, name: str) -> bool:
        """Return whether somebody wants the modules of a parameter in eval mode while it is frozen."""
        held = any(name in mine and self.modes[owner].get(name) == "eval" for owner, mine in self.holds.items())
        asked = any(name in names for names in self.calm.values())
        return held or (asked and name not in self.trainable() and not self.tracks(name))

    def mode_of(self, module: nn.Module) -> bool | None:
        """Return whether a module must stand in train mode in a forward pass; None where that follows from others."""
        first = {id(each): name for name, each in self.state.ledger.parameters.items()}
        names = [first[id(each)] for each in module.parameters() if id(each) in first]
        if not names:
            asked = self.calm or any("eval" in mine.values() for mine in self.modes.values())
            return None if asked or hasattr(module, "running_mean") else True
        if all(map(self.evaluates, names)):
            return False
        statistics = getattr(module, "running_mean", None) is not None
        trains = not self.trainable().isdisjoint(names) or any(map(self.tracks, names))
        return trains if statistics else True


def elapsed(time: Time, clock: Clock) -> float:
    """Return how much has passed, in the unit of a time.

    Example:
        >>> elapsed(Time("3ep"), Clock(epoch=1, batch=5, batch_in_epoch=1, batches_per_epoch=4))
        1.25
    """
    inside = clock.batch_in_epoch / clock.batches_per_epoch if clock.batches_per_epoch else 0.0
    return {"ba": clock.batch, "sp": clock.sample, "dur": clock.progress, "ep": clock.epoch + inside}[time.unit]


def _along(shape: Callable[[float], float], span: Time, start: float, clock: Clock) -> float:
    """Return the factor of a schedule that began at ``start``; after its span the last one stays."""
    return shape(min(1.0, max(0.0, (elapsed(span, clock) - start) / span.value)))


def beside_of(name: str, known: set[str]) -> str | None:
    """Return beside which weight an attached parameter stands: that of its module, or of the next one around it.

    Example:
        >>> beside_of("block.query.lora_A", {"block.query.bias", "block.query.weight", "head.weight"})
        'block.query.weight'
    """
    module = name
    while module:
        module = module.rpartition(".")[0]
        there = [each for each in sorted(known) if each.rpartition(".")[0] == module]
        weights = [each for each in there if each.endswith("weight")]
        if there:
            return (weights or there)[0]
    return None


def covers(selector: Any, name: str, ledger: ParameterLedger) -> bool:
    """Return whether a selector, or one of a list of them, goes on to cover what is attached later."""
    if isinstance(selector, (list, tuple)):
        return any(covers(each, name, ledger) for each in selector)
    selector = getattr(selector, "name", selector)
    if isinstance(selector, str) and ledger.layers.names_layer(selector):
        return name in ledger.layers.parameters(selector)
    return covered(selector, name, ledger)
