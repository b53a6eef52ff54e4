"""EarlyStop as tables of values, as laws, and in a fit."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from helpers import loader, mlp
from thawline.algorithms.early_stop import EarlyStop, improved
from thawline.engine import (
    Algorithm,
    ArgumentError,
    Clock,
    Engine,
    Event,
    ParameterLedger,
    State,
    ThawlineWarning,
    Time,
    Trainer,
)

NAN, INF = math.nan, math.inf
VALUES = st.floats(-3, 3).map(lambda value: round(value, 1)) | st.sampled_from([NAN, INF, -INF])


class Run:
    """Evaluations of a loop of one's own, four batches of eight samples apart, ten epochs of eight batches."""

    def __init__(self, stop: EarlyStop) -> None:
        model = mlp()
        ledger = ParameterLedger(model, partial(torch.optim.SGD, lr=0.1))
        self.state = State(model, ledger, "10ep")
        self.state.clock = Clock(batches_per_epoch=8)
        self.engine, self.stop = Engine([stop], self.state, debug=True), stop

    def evaluate(self, value: float) -> bool:
        """Train a little, log a value, evaluate; return whether the fit is to stop."""
        for _ in range(4):
            if self.state.clock.batch_in_epoch == 8:
                self.state.tick_epoch()
            self.state.tick(8)
        self.state.log({self.stop.monitor: value})
        self.engine.emit(Event.EVAL_END)
        self.engine.emit(Event.EPOCH_END)  # opens the ledger
        return self.state.stop_reason is not None

    def stops_at(self, values: list[float]) -> int | None:
        """Return the first evaluation after which the fit is to stop, counted from 1."""
        return next((index for index, value in enumerate(values, 1) if self.evaluate(value)), None)


@pytest.mark.parametrize(
    ("values", "arguments", "at"),
    [
        ([3, 2, 1, 0], {"patience": 1}, None),
        ([3, 3], {"patience": 1}, 2),
        ([3, 2, 2.5, 2.4, 2.3], {"patience": 3}, 5),
        ([3, 2, 2.5, 2.4, 1.9, 2.3, 2.3], {"patience": 3}, None),
        ([3, 2.95, 2.9, 2.85], {"patience": 2, "min_delta": 0.1}, 3),
        ([3, 2.8, 2.6, 2.4], {"patience": 1, "min_delta": 0.1}, None),
        ([1, 2, 3, 2, 1], {"patience": 2, "mode": "max"}, 5),
        ([1, 2, 3], {"patience": 2, "mode": "min"}, 3),
        ([1, NAN, NAN], {"patience": 2}, 3),
        ([NAN, NAN], {"patience": 2}, 2),
        ([NAN, 1, NAN, 0.5], {"patience": 2}, None),
        ([INF, INF], {"patience": 2}, 2),
        ([1, -INF, -INF, -INF], {"patience": 2}, 4),
        # A time is measured from the last improvement; evaluations are half an epoch, or 4 batches, apart.
        ([3, 2, 2, 2, 2], {"patience": "1ep"}, 4),
        ([3, 2, 2, 2, 2], {"patience": "5ba"}, 4),
        ([3, 2, 2, 2, 2], {"patience": "4ba"}, 3),
        ([3, 2, 2, 2, 2], {"patience": "96sp"}, 5),
        ([3, 2, 2, 2, 2], {"patience": "0.1dur"}, 4),
        ([NAN, NAN, NAN], {"patience": "1ep"}, 3),
    ],
    ids=str,
)
def test_it_stops_after_the_patience_without_improvement(
    values: list[float], arguments: dict[str, Any], at: int | None
) -> None:
    """Sequences of the monitored value, and the evaluation after which the fit stops."""
    assert Run(EarlyStop("eval/loss", **arguments)).stops_at(values) == at


@given(values=st.lists(VALUES, max_size=12), patience=st.integers(1, 4), mode=st.sampled_from(["min", "max"]))
def test_it_stops_exactly_when_no_new_best_came_for_patience_evaluations(
    values: list[float], patience: int, mode: Any
) -> None:
    """With min_delta=0, against the records of the sequence found by looking at all values before each."""
    sign = 1 if mode == "min" else -1
    ranks = [INF if math.isnan(value) else sign * value for value in values]
    records = [index for index, rank in enumerate(ranks) if rank < min([INF, *ranks[:index]])]
    dry = [index - max([-1, *(each for each in records if each <= index)]) for index in range(len(ranks))]
    expected = next((index + 1 for index, length in enumerate(dry) if length >= patience), None)
    assert Run(EarlyStop("loss", patience=patience, mode=mode)).stops_at(values) == expected


@given(values=st.lists(VALUES, min_size=1, max_size=10), cut=st.integers(0, 9), time=st.booleans())
def test_a_resumed_run_stops_where_the_uninterrupted_one_does(values: list[float], cut: int, time: bool) -> None:
    """Best and patience are state: nothing restarts."""
    make = partial(EarlyStop, "eval/loss", patience="12ba" if time else 3)
    whole, first, second = Run(make()), Run(make()), Run(make())
    expected = [whole.evaluate(value) for value in values]
    got = [first.evaluate(value) for value in values[:cut]]
    second.stop.load_state_dict(first.stop.state_dict())
    second.state.clock, second.state.stop_reason = first.state.clock, first.state.stop_reason
    got += [second.evaluate(value) for value in values[cut:]]
    assert got == expected
    assert second.stop.state_dict() == whole.stop.state_dict()


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(("reset", "at"), [(True, 6), (False, 4)])
def test_it_starts_anew_when_what_trains_changes(reset: bool, at: int, resumed: bool) -> None:
    """A thaw between two evaluations gives back best and patience, also where the run was resumed in between."""
    stop = EarlyStop("eval/loss", patience=2, reset_on_change=reset)
    run = Run(stop)
    run.state.ledger.freeze("blocks[0]", owner="test")
    assert [run.evaluate(value) for value in (1.0, 0.5, 0.6)] == [False] * 3
    if resumed:
        stop.load_state_dict(stop.state_dict())
    run.state.ledger.thaw("blocks[0]", owner="test")
    assert 3 + (run.stops_at([3.0, 3.0, 3.0]) or 99) == at


def test_a_change_that_is_taken_back_before_the_evaluation_is_none() -> None:
    """What counts is what trains, not how often the ledger moved."""
    run = Run(EarlyStop("eval/loss", patience=1))
    run.evaluate(1.0)
    run.state.ledger.freeze("head", owner="test")
    run.state.ledger.scale("blocks[0]", 0.5, owner="test")
    run.state.ledger.thaw("head", owner="test")
    assert run.evaluate(1.0)


def test_the_reason_says_what_did_not_improve_on_what_for_how_long() -> None:
    """It is what FitResult.stop_reason shows."""
    run = Run(EarlyStop("eval/loss", patience=2))
    run.stops_at([0.25, 0.5, 0.5])
    assert run.state.stop_reason == "early stop: eval/loss has not improved on 0.25 for 2 evaluations"
    run = Run(EarlyStop("eval/loss", patience="1ep"))
    run.stops_at([NAN] * 5)
    assert run.state.stop_reason == "early stop: eval/loss is no number for 1ep"


@pytest.mark.parametrize(
    ("monitor", "direction"),
    [
        ("eval/loss", "min"), ("eval/accuracy", "max"), ("eval/top1_acc", "max"), ("train/loss", "min"),
        ("eval/macro-f1", "max"), ("eval/perplexity", "min"), ("eval/F1", "max"), ("eval/pace", "min"),
    ],
)  # fmt: skip
def test_the_direction_follows_from_the_name_unless_said(monitor: str, direction: str) -> None:
    """A word of the name decides; mode= overrules it."""
    assert EarlyStop(monitor).direction == direction
    assert EarlyStop(monitor, mode="min").direction == "min"


def test_a_monitor_that_nobody_logs_is_refused_at_the_first_evaluation() -> None:
    """The error lists what was logged and writes the call with the nearest name."""
    trainer = Trainer(algorithms=[EarlyStop("eval/los", patience=2)], loss_fn=cross_entropy, progress=False)
    said = r"nothing in this fit logs 'eval/los', which EarlyStop monitors. Write: 'eval/loss\'"
    refused = r"'eval/loss'.*Write: EarlyStop\('eval/loss', patience=2\)"
    with pytest.warns(ThawlineWarning, match=said), pytest.raises(ArgumentError, match=refused):
        trainer.fit(mlp(), loader(), loader(), duration="2ep")
    run = Run(EarlyStop("eval/loss"))
    with pytest.raises(ArgumentError, match="none was"):
        run.engine.emit(Event.EVAL_END)


@pytest.mark.parametrize("monitor", ["eval/loss", "train/loss"])
def test_a_fit_that_does_not_improve_ends_early(monitor: str) -> None:
    """With a learning rate of 0 nothing improves: one epoch for the best, two of patience."""
    trainer = Trainer(
        algorithms=[EarlyStop(monitor, patience=2, min_delta=1e-6)],
        optimizer=partial(torch.optim.SGD, lr=0.0),
        loss_fn=cross_entropy,
        progress=False,
    )
    result = trainer.fit(mlp(), loader(), loader(), duration="10ep")
    assert result.clock.epoch == 3
    assert result.stop_reason.startswith(f"early stop: {monitor} has not improved on 0.")


def test_a_second_fit_starts_afresh() -> None:
    """What the first fit used up of the patience is forgotten."""
    stop = EarlyStop("eval/loss", patience=2)
    trainer = Trainer(
        algorithms=[stop], optimizer=partial(torch.optim.SGD, lr=0.0), loss_fn=cross_entropy, progress=False
    )
    epochs = [trainer.fit(mlp(), loader(), loader(), duration="10ep").clock.epoch for _ in range(2)]
    assert epochs == [3, 3]


@given(value=st.floats(), best=st.none() | st.floats(allow_nan=False), delta=st.floats(0, 1))
def test_improvement_is_symmetric_in_its_direction(value: float, best: float | None, delta: float) -> None:
    """Larger is better for -x as smaller is for x."""
    mirrored = None if best is None else -best
    small = improved(value, best, mode="min", min_delta=delta)
    assert small == improved(-value, mirrored, mode="max", min_delta=delta)
    assert not (math.isnan(value) and small)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"monitor": ""}, "monitor="),
        ({"monitor": 3}, "got 3"),
        ({"patience": 0}, "1 or above, got 0"),
        ({"patience": -1}, "patience="),
        ({"patience": True}, "got True"),
        ({"patience": 1.5}, "got 1.5"),
        ({"patience": "soon"}, "got 'soon'"),
        ({"patience": "0ep"}, "above zero"),
        ({"min_delta": -0.1}, "0 or above"),
        ({"min_delta": NAN}, "min_delta="),
        ({"mode": "up"}, "'auto', 'min', 'max'"),
        ({"reset_on_change": 1}, "True or False"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused(arguments: dict[str, Any], says: str) -> None:
    """A ValueError that says what was got, what is taken, and a corrected call."""
    with pytest.raises(ArgumentError, match="Write: EarlyStop") as refused:
        EarlyStop(**arguments)
    assert says in str(refused.value)


@pytest.mark.parametrize("patience", [3, "2ep", Time("500ba")])
def test_it_is_described_and_rebuilt(patience: Any) -> None:
    """The description is JSON and makes an equal algorithm; an int stays a number of evaluations."""
    stop = EarlyStop("eval/f1", patience=patience, mode="max")
    again = Algorithm.from_description(stop.describe())
    assert isinstance(again, EarlyStop)
    assert again.describe() == stop.describe()
    assert again.patience == stop.patience


@pytest.mark.parametrize(
    ("monitor", "patience", "spent"), [("eval/loss", 1, "1 evaluation"), ("train/loss", 1, "1 epoch")]
)
def test_one_is_no_plural(monitor: str, patience: int, spent: str) -> None:
    """In what it may do."""
    assert EarlyStop(monitor, patience=patience).unplanned().endswith(f"not improved for {spent}")
