"""Algorithms, each with one realistic fault, and the check that is meant to find it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import attrs
import torch

from thawline.engine import Algorithm, Event, Stage, State, register

BROKEN: dict[str, type[Algorithm]] = {}
"""The name of the check, and what it catches."""


def caught_by(check: str) -> Callable[[type[Algorithm]], type[Algorithm]]:
    """Enter a broken algorithm under the check that is meant for it."""

    def enter(kind: type[Algorithm]) -> type[Algorithm]:
        BROKEN[check] = register(kind)
        return kind

    return enter


@caught_by("resumes")
@attrs.define(slots=False, eq=False)
class Forgetful(Algorithm):
    """Halves the head's rate every third batch, and does not save how often it did."""

    events = frozenset({Event.BATCH_END})
    batches: int = attrs.field(default=0, init=False)

    def apply(self, event: Event, state: State) -> None:
        self.batches += 1
        state.ledger.scale("head", 0.5 ** (self.batches // 3), owner=self.owner)


@caught_by("leaves_the_global_generators_alone")
@attrs.define(slots=False, eq=False)
class Noisy(Algorithm):
    """Adds noise from the global generator to the gradients."""

    events = frozenset({Event.BEFORE_STEP})
    stage: ClassVar[Stage] = Stage.GRADIENTS

    def apply(self, event: Event, state: State) -> None:
        for each in state.ledger.trainable_parameters:
            if each.grad is not None:
                each.grad.add_(1e-3 * torch.randn_like(each.grad))


@caught_by("leaves_nothing_behind")
@attrs.define(slots=False, eq=False)
class Clinging(Algorithm):
    """Counts forward passes with a hook, and never removes it."""

    passes: int = attrs.field(default=0, init=False)

    def attach(self, state: State) -> None:
        state.model.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.passes += 1

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self.passes}


@caught_by("keeps_the_ledger_whole")
@attrs.define(slots=False, eq=False)
class Sneaky(Algorithm):
    """Freezes the head by hand."""

    events = frozenset({Event.EPOCH_END})

    def apply(self, event: Event, state: State) -> None:
        state.model.get_parameter(state.layers.head.parameters[0]).requires_grad_(False)


@caught_by("match_is_pure")
@attrs.define(slots=False, eq=False)
class Counting(Algorithm):
    """Counts in match(), so that asking it is acting."""

    events = frozenset({Event.BATCH_END})
    asked: int = attrs.field(default=0, init=False)

    def match(self, event: Event, state: State) -> bool:
        self.asked += 1
        return self.asked % 2 == 0

    def apply(self, event: Event, state: State) -> None:
        state.log({"asked": self.asked})

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked}


@caught_by("keeps_instances_apart")
class Shared(Algorithm):
    """Keeps the losses it has seen on the class."""

    events = frozenset({Event.BATCH_END})
    losses: ClassVar[list[float]] = []

    def apply(self, event: Event, state: State) -> None:
        if state.clock.batch == 1:
            self.losses.clear()
        self.losses.append(float(state.loss))
        state.log({"mean": sum(self.losses) / len(self.losses)})

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses)}

    def load_state_dict(self, saved: Any) -> None:
        self.losses[:] = saved["losses"]


@caught_by("does_not_depend_on_order")
@attrs.define(slots=False, eq=False)
class Jealous(Algorithm):
    """Releases what others hold, where they were first."""

    events = frozenset({Event.FIT_START})
    stage: ClassVar[Stage] = Stage.TRAINABILITY

    def apply(self, event: Event, state: State) -> None:
        for name in sorted(state.ledger.frozen):
            for owner in state.ledger.owners(name):
                state.ledger.thaw(name, owner=owner)


@caught_by("survives_an_exception")
@attrs.define(slots=False, eq=False)
class Panicking(Algorithm):
    """Tidies up by hand where the fit fails, and fails itself half-way."""

    events = frozenset({Event.FIT_ABORT})

    def apply(self, event: Event, state: State) -> None:
        for number, each in enumerate(state.model.parameters()):
            each.requires_grad_(False)
            if number == 2:
                raise KeyError(number)


@caught_by("does_not_count_microbatches")
@attrs.define(slots=False, eq=False)
class Impatient(Algorithm):
    """Lowers the rate every second "step", counting backward passes."""

    events = frozenset({Event.AFTER_BACKWARD, Event.BATCH_END})
    steps: int = attrs.field(default=0, init=False)

    def apply(self, event: Event, state: State) -> None:
        if event is Event.AFTER_BACKWARD:
            self.steps += 1
        else:
            state.ledger.scale("*", 0.9 ** (self.steps // 2), owner=self.owner)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}


@caught_by("refuses_bad_arguments")
@attrs.define(slots=False, eq=False)
class Trusting(Algorithm):
    """Takes any factor."""

    events = frozenset({Event.FIT_START})
    factor: float = 0.5

    def apply(self, event: Event, state: State) -> None:
        state.ledger.scale("head", self.factor, owner=self.owner)


@caught_by("comes_back_from_its_description")
@attrs.define(slots=False, eq=False)
class Lossy(Algorithm):
    """Describes itself without its one argument."""

    events = frozenset({Event.FIT_START})
    select: str = attrs.field(default="head", validator=attrs.validators.instance_of(str))

    def apply(self, event: Event, state: State) -> None:
        state.ledger.scale(self.select, 0.5, owner=self.owner)

    def describe(self) -> dict[str, Any]:
        return {"name": "Lossy", "arguments": {}}
