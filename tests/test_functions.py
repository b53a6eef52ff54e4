"""Algorithms made of functions: when they are called, what they may do, and what is refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from thawline.engine import Algorithm, ArgumentError, Event, LedgerClosedError, Stage, State, Trainer, on, registered
from thawline.engine.testing import ConformanceError, Trace, check_algorithm, tiny_loader, tiny_models


@on(Event.EPOCH_END, every="2ep")
def count_tensors(state: State) -> None:
    """Log how many tensors train."""
    state.log({"tensors": len(state.ledger.trainable), "at": state.clock.epoch})


@on(Event.BATCH_START, Event.BATCH_END, every="3ba", stage=Stage.TRAINABILITY)
def hold_more(state: State, owner: str) -> None:
    """Freeze the layer whose turn it is."""
    layers = [layer.name for layer in state.layers if layer.name != "head"]
    state.ledger.freeze(layers[: state.clock.batch // 3], owner=owner)


def fit(*algorithms: Algorithm, duration: str = "5ep") -> Any:
    """Fit a small model for epochs of two batches."""
    trainer = Trainer(
        algorithms=algorithms,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        loss_fn=nn.functional.cross_entropy,
        progress=False,
        debug=True,
    )
    return trainer.fit(tiny_models()["mlp"](), tiny_loader(16), duration=duration)


def test_a_function_is_called_each_interval() -> None:
    """At EPOCH_END of every second epoch, and not where the duration ends in between."""
    rows = fit(count_tensors()).history
    assert [row.get("at") for row in rows] == [None, 2, 2, 4, 4]


def test_a_function_with_two_events_is_called_at_the_first_that_is_due() -> None:
    """Once an interval, whichever event comes first after it, under its own name in the ledger."""
    trace = Trace()
    fit(hold_more(), trace, duration="7ba")
    assert [line for line in trace if "freeze" in line] == [
        "BATCH_END 3: freeze blocks[0]",
        "BATCH_END 6: freeze blocks[1]",
    ]


@pytest.mark.parametrize("kind", [count_tensors, hold_more])
def test_functions_keep_the_contract(kind: type[Algorithm]) -> None:
    """They resume, describe themselves and stay apart as classes do."""
    check_algorithm(kind)


def test_a_function_is_registered_under_its_name() -> None:
    """Recipes name it; its docstring and module are the function's; running the cell again replaces it."""
    assert registered("count_tensors") is count_tensors
    assert (count_tensors.__doc__, count_tensors.__module__) == ("Log how many tensors train.", __name__)
    assert hold_more.stage is Stage.TRAINABILITY
    assert count_tensors().describe() == {"name": "count_tensors", "arguments": {}}


def test_a_function_obeys_the_ledger() -> None:
    """Where it is closed, a call is the same typed error."""

    @on(Event.AFTER_LOSS)
    def too_early(state: State, owner: str) -> None:
        state.ledger.freeze("head", owner=owner)

    with pytest.raises(LedgerClosedError) as caught:
        fit(too_early())
    assert "in too_early.apply at AFTER_LOSS" in caught.value.__notes__[0]


async def later(state: State) -> None:
    """Would never be awaited."""


def bit_by_bit(state: State) -> Any:
    """Would never be asked for anything."""
    yield state


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (on, "on()"),
        (lambda: on("epoch_end"), "on()"),
        (lambda: on(Event.EPOCH_END, "batch_ends", "batch_ends"), "on()"),
        (lambda: on(Event.EPOCH_END, Event.EPOCH_END), "on()"),
        (lambda: on(Event.EPOCH_END)(later), "on()"),
        (lambda: on(Event.EPOCH_END)(bit_by_bit), "on()"),
        (lambda: on(Event.EPOCH_END, every="soon"), "on(every=)"),
        (lambda: on(Event.EPOCH_END, every=0), "on(every=)"),
        (lambda: on(Event.EPOCH_END, stage=3), "on(stage=)"),
        (lambda: on(Event.EPOCH_END)(lambda: None), "on()"),
        (lambda: on(Event.EPOCH_END)(lambda a, b, c: None), "on()"),
        (lambda: on(Event.EPOCH_END)(lambda *, state: None), "on()"),
        (lambda: on(Event.EPOCH_END)(print), "on()"),
    ],
)
def test_wrong_arguments_name_themselves(make: Any, argument: str) -> None:
    """With an example of the decorator."""
    with pytest.raises(ArgumentError) as caught:
        make()
    assert caught.value.argument == argument
    assert caught.value.example.startswith("@on(Event.")


def test_a_wrong_event_is_shown_with_the_nearest() -> None:
    """One of several, once, and not the whole list."""
    with pytest.raises(ArgumentError, match=r"got 'batch_ends'\. Write: @on\(Event\.BATCH_END\)"):
        on(Event.EPOCH_END, "batch_ends", "batch_ends")  # type: ignore[arg-type]


def test_a_function_is_listed_by_a_call_without_arguments() -> None:
    """The class itself, and a call as if it were the function still, say what to write."""
    with pytest.raises(ArgumentError, match=r"Write: Trainer\(algorithms=\[count_tensors\(\)\]\)"):
        fit(count_tensors)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"takes no arguments.*Write: Trainer\(algorithms=\[count_tensors\(\)\]\)"):
        count_tensors("state")  # type: ignore[call-arg]


def test_the_kit_tells_a_function_what_fits_a_function() -> None:
    """It has no self and no state_dict."""
    seen: list[float] = []

    @on(Event.BATCH_END)
    def remember(state: State) -> None:
        seen.append(state.loss.item() if state.loss is not None else 0.0)
        state.log({"mean": sum(seen) / len(seen), "noise": torch.rand(()).item()})

    checks = ["leaves_the_global_generators_alone", "starts_afresh", "resumes"]
    with pytest.raises(ConformanceError) as caught:
        check_algorithm(remember, partners=[], checks=checks)
    assert set(caught.value.failures) == set(checks)
    assert "self" not in str(caught.value)
    assert "derive_seed(state.seed, owner, state.clock.batch)" in str(caught.value)
    assert "write a class" in caught.value.failures["starts_afresh"]
