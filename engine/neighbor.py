"""Neighbors for the conformance kit's fits: they freeze, thaw, rate, attach and detach while another algorithm works."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import override

from .algorithm import Algorithm, Stage
from .errors import LedgerClosedError
from .events import Event
from .ledger import ParameterLedger
from .schedules import linear
from .state import State
from .surgery import Attachment, Site, surgery_op

GAIN = "testing_gain"


@surgery_op(GAIN)
def gain(site: Site) -> list[Attachment]:
    """Attach a learned number beside the weight: the least that surgery can do."""
    values = torch.empty(1).uniform_(-1, 1, generator=site.generator)
    return [Attachment(site.name, parameters={"gain": nn.Parameter(values)})]


class Neighbor(Algorithm):
    """Changes what trains, by the clock alone: holds every second parameter, then the others, and attaches a gain for a while.

    Example:
        >>> from thawline.engine import Time, constant
        >>> from thawline.engine.doubles import mlp
        >>> from thawline.engine.strategies import Fit
        >>> for line in Fit(mlp(depth=2), (Neighbor(),), Time("8ba"), constant(), 8, 1).trace()[1:]:
        ...     print(line)
        BATCH_START 0: freeze 0.weight, 2.weight
        BATCH_START 1: thaw 2.gain; lr 0.1 2.gain; attach testing_gain to 2
        BATCH_START 3: freeze 0.bias, 2.bias; thaw 0.weight, 2.weight
        BATCH_START 6: thaw 0.bias, 2.bias
    """

    events = frozenset({Event.BATCH_START})
    stage: ClassVar[Stage] = Stage.TRAINABILITY

    @override
    def apply(self, event: Event, state: State) -> None:
        """Do what is due at this batch."""
        ledger, batch = state.ledger, state.clock.batch
        names = [name for name in ledger.parameters if not name.endswith(".gain")]
        weights = [name for name in names if name.endswith(".weight")]
        several = len(names) > 1  # else nothing would train
        if batch == 0 and several:
            ledger.freeze(names[::2], owner=self.owner)
        elif batch == 1 and weights:
            ledger.attach(weights[-1].rpartition(".")[0], GAIN, owner=self.owner)
        elif batch == 3 and several:
            ledger.thaw(names[::2], owner=self.owner)
            ledger.freeze(names[1::2], owner=self.owner)
        elif batch == 6:
            ledger.thaw("*", owner=self.owner)
        elif batch == 7:
            for entry in [each for each in ledger.journal if each.op == GAIN]:
                ledger.detach(entry.module, GAIN, owner=self.owner)


class Before(Algorithm):
    """Calls a function at every event, before everybody else, and another one when the fit is set up."""

    stage: ClassVar[Stage] = Stage.SURGERY

    def __init__(self, at: Callable[[Event, State], object], setup: Callable[[State], object] = lambda _: None) -> None:
        self.at, self.setup, self.events = at, setup, frozenset(Event)

    @override
    def attach(self, state: State) -> None:
        """Call the other one."""
        self.setup(state)

    @override
    def apply(self, event: Event, state: State) -> None:
        """Call it."""
        self.at(event, state)

    @override
    def describe(self) -> dict[str, Any]:
        """Say only that it is one."""
        return {"name": "Before", "arguments": {}}


_SPOILED = 2
_SETS = frozenset({0, 3, 4, 7})  # in the other batches nothing changes but what goes by the clock


class Guest:
    """Makes every call on a ledger by the clock alone, and leaves to the others what they set and the last that trains.

    In one batch it makes a gradient infinite, so that the step is skipped.

    Args:
        owner: Under which name.

    Example:
        >>> from thawline.engine.doubles import mlp
        >>> from thawline.engine.ledger import ParameterLedger
        >>> ledger = ParameterLedger(model := mlp(), lambda each: torch.optim.SGD(each, lr=0.1))
        >>> Guest("guest").come(Event.FIT_START, State(model, ledger, duration="1ba"))
        >>> ledger.rates
        {'blocks[0]': 0.05, 'blocks[1]': 0.0, 'head': 0.05}
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.free: dict[int, list[list[str]]] = {}  # what it set at a batch, to set the same in a resumed fit

    def come(self, event: Event, state: State) -> None:
        """Do what is due before the others act."""
        ledger, batch = state.ledger, state.clock.batch
        if event is Event.FIT_START:
            with ledger.at_once():
                ledger.scale("*", 0.5, owner=self.owner)
                ledger.freeze(self._layer(state), owner=self.owner, mode="eval")
        elif event is Event.BATCH_END and batch - 1 in _SETS:
            everything = list(ledger.parameters)
            ledger.set_lr(everything, None, owner=self.owner)
            ledger.set_schedule(everything, None, owner=self.owner)
            ledger.set_options(everything, owner=self.owner, weight_decay=None)
        elif event is Event.BATCH_START and batch == 3:
            weights = [name for name in ledger.parameters if name.endswith(".weight")]
            for name in weights[-1:]:
                ledger.attach(name.rpartition(".")[0], GAIN, owner=self.owner)
        elif event is Event.AFTER_BACKWARD and batch == _SPOILED:
            for grad in [
                each for name in sorted(ledger.trainable) if (each := ledger.parameters[name].grad) is not None
            ][:1]:
                grad.fill_(torch.inf)
        elif event is Event.BATCH_START and batch == 6:
            for entry in [each for each in ledger.journal if each.owner == self.owner]:
                ledger.detach(entry.module, GAIN, owner=self.owner)
            ledger.dismiss(self.owner)

    def go(self, event: Event, state: State, taken: Mapping[str, Mapping[str, Any]]) -> None:
        """Do what is due once the others have acted.

        Args:
            event: The event.
            state: The fit's.
            taken: By ``"lr"``, ``"schedule"`` and the name of an option, the parameters for which somebody has set it.
        """
        ledger, batch = state.ledger, state.clock.batch
        if not event.opens_ledger:
            return
        if event is Event.BATCH_START:
            if batch == 1:
                ledger.thaw(self._layer(state), owner=self.owner, warmup="3ba")
            elif batch == 3:
                ledger.freeze(self._layer(state), owner=self.owner, moments="keep", mode="train")
            elif batch == 5:
                ledger.thaw("*", owner=self.owner)
                ledger.drop_moments(list(ledger.parameters)[::3], owner=self.owner)
        if event is Event.BATCH_START and batch in _SETS:
            rated, scheduled, decayed = self.free.setdefault(batch, _untaken(ledger, taken))
            if rated:
                ledger.set_lr(rated, 0.03, owner=self.owner)
            if scheduled:
                ledger.set_schedule(scheduled, linear(0.5), owner=self.owner, span="5ba")
            if decayed:
                ledger.set_options(decayed, owner=self.owner, weight_decay=0.2)
        if not ledger.trainable and event is not Event.EPOCH_END:
            ledger.thaw("*", owner=self.owner)

    def knock(self, ledger: ParameterLedger) -> list[str]:
        """Make each call where the ledger is closed; return the names of those that it takes."""
        module = next(iter(ledger.parameters)).rpartition(".")[0]
        calls: dict[str, Callable[[], None]] = {
            "freeze": partial(ledger.freeze, "*", owner=self.owner),
            "thaw": partial(ledger.thaw, "*", owner=self.owner),
            "scale": partial(ledger.scale, "*", 0.5, owner=self.owner),
            "set_lr": partial(ledger.set_lr, "*", 0.1, owner=self.owner),
            "set_options": partial(ledger.set_options, "*", owner=self.owner, weight_decay=0.1),
            "set_schedule": partial(ledger.set_schedule, "*", linear(), owner=self.owner),
            "evaluate_frozen": partial(ledger.evaluate_frozen, "*", owner=self.owner),
            "attach": partial(ledger.attach, module, GAIN, owner=self.owner),
            "detach": partial(ledger.detach, module, GAIN, owner=self.owner),
            "dismiss": partial(ledger.dismiss, self.owner),
            "drop_moments": partial(ledger.drop_moments, "*", owner=self.owner),
        }
        return [name for name, call in calls.items() if not _is_refused(call)]

    @staticmethod
    def _layer(state: State) -> str:
        return [each.name for each in state.layers][len(state.layers) > 2]


def _is_refused(call: Callable[[], None]) -> bool:
    try:
        call()
    except LedgerClosedError:
        return True
    return False


def _untaken(ledger: ParameterLedger, taken: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return some parameters for each of rate, schedule and weight decay, for which nobody has set it."""
    names = list(ledger.parameters)
    kinds = ("lr", "schedule", "weight_decay")
    return [[each for each in names[place::4] if each not in taken.get(kind, ())] for place, kind in enumerate(kinds)]
