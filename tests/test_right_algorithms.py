"""Algorithms as users write them, each of them right: no check of the kit may find a fault."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from thawline.engine import (
    Algorithm,
    Attachment,
    Event,
    NonFiniteError,
    Stage,
    State,
    derive_seed,
    on,
    register,
    surgery_op,
)
from thawline.engine.surgery import Site
from thawline.engine.testing import check_algorithm

LOOKED_ON = ["is_shown_as_it_happens", "is_recorded_as_it_happened", "keeps_true_records", "trains_in_bf16", "resumes"]
IN_PARTS = ["does_not_count_microbatches", "repeats_what_does_not_fit", "resumes"]


def stopping(event: Event, batch: int) -> Callable[[], Algorithm]:
    """Return what stops a fit at an event after so many batches."""

    @on(event)
    def stop(state: State) -> None:
        if state.clock.batch >= batch:
            state.stop("enough")

    return stop


@pytest.mark.parametrize(
    ("event", "batch"),
    [
        (Event.FIT_START, 0),
        (Event.BATCH_START, 0),
        (Event.BATCH_START, 5),
        (Event.BATCH_END, 1),
        (Event.BATCH_END, 4),
        (Event.EPOCH_END, 3),
        (Event.EVAL_END, 2),
    ],
    ids=lambda each: getattr(each, "name", each),
)
def test_an_early_end(event: Event, batch: int) -> None:
    """Wherever a fit is stopped, also before its first batch."""
    check_algorithm(stopping(event, batch), checks=LOOKED_ON)


class Ends(Algorithm):
    """Ends a fit whose loss is not finite by an exception of its own."""

    events = frozenset({Event.AFTER_LOSS})
    error: ClassVar[type[Exception]] = FloatingPointError

    def apply(self, event: Event, state: State) -> None:
        if state.loss is not None and not bool(state.loss.isfinite()):
            raise self.error("the loss is not finite")


class EndsTyped(Ends):
    """The same by the engine's error."""

    error = NonFiniteError


@pytest.mark.parametrize("kind", [Ends, EndsTyped])
def test_an_end_by_an_exception(kind: type[Algorithm]) -> None:
    """Such a fit has nothing to go back to."""
    check_algorithm(kind, checks=["recovers_from_faults"], thorough=True)


@on(Event.EPOCH_START, Event.BATCH_START)
def follow_the_rates(state: State, owner: str) -> None:
    """Sets a rate by another one, before the batch's are written."""
    rates = state.ledger.rates
    state.log({"rate before": rates["blocks[0]"]})
    state.ledger.set_lr("head", max(0.9 * rates["blocks[0]"], 1e-5), owner=owner)


def test_what_follows_from_the_rates() -> None:
    """Rates are the last batch's until the next one begins, resumed or not."""
    check_algorithm(follow_the_rates, checks=["resumes", "keeps_true_records", "follows_from_its_calls"])
    check_algorithm(follow_the_rates, checks=["holds_in_drawn_fits"], thorough=True)


class SideLinear(nn.Linear):
    """A linear layer with a path beside it, with dropout of its own."""

    side_down: Tensor
    side_up: Tensor
    side_dropout: float

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as nn.Linear has it
        side = linear(dropout(input, self.side_dropout, self.training), self.side_down)
        return super().forward(input) + linear(side, self.side_up)


@surgery_op("tests/side")
def side(site: Site) -> list[Attachment]:
    """Attach the path, of numbers that follow from the module's name."""
    weight: Any = site.module.weight
    generator = torch.Generator().manual_seed(derive_seed(0, site.name))
    down = torch.randn(2, weight.shape[1], generator=generator) / math.sqrt(weight.shape[1])
    up = torch.randn(weight.shape[0], 2, generator=generator) / 10
    parameters = {"side_down": nn.Parameter(down.to(weight)), "side_up": nn.Parameter(up.to(weight))}
    return [Attachment(site.name, parameters=parameters, attributes={"side_dropout": 0.1}, new_class=SideLinear)]


@register
class SidePaths(Algorithm):
    """Attaches a path to each linear layer below the head."""

    events = frozenset({Event.FIT_START})
    stage = Stage.SURGERY

    def apply(self, event: Event, state: State) -> None:
        below = [layer.name for layer in state.layers if layer.name != "head"]
        inside = {name.rpartition(".")[0] for name in state.ledger.select(below)}
        plain = [name for name, each in state.model.named_modules() if type(each) is nn.Linear and name in inside]
        state.ledger.attach(plain, "tests/side", owner=self.owner)


def test_attached_dropout() -> None:
    """Parts of a batch see other numbers than the whole, which no algorithm can help."""
    check_algorithm(SidePaths, checks=IN_PARTS)
