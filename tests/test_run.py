"""Where a fit stops, and that all it leaves behind agrees; schedules that fail on the way."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from helpers import loader, mlp, same_weights, weights
from thawline.engine import Algorithm, ArgumentError, Checkpointing, Event, Schedule, State, Trainer, warmup
from thawline.engine.store import read_checkpoint

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
Trainer_ = partial(Trainer, loss_fn=cross_entropy, optimizer=SGD, progress=False)


class StopAt(Algorithm):
    """Asks for the end once ``batch`` batches are completed, at one event."""

    def __init__(self, event: Event, batch: int) -> None:
        self.events, self.batch = frozenset({event}), batch

    def apply(self, event: Event, state: State) -> None:
        """Ask."""
        if state.clock.batch >= self.batch:
            state.stop("asked")


class Names(Algorithm):
    """Writes down every event."""

    events = frozenset(Event)

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def apply(self, event: Event, state: State) -> None:
        """Write it down."""
        self.seen.append(event.name)


CASES = [
    # event, batches completed when it is asked, batches in the end, rows of history
    (Event.FIT_START, 0, 0, 0),
    (Event.EPOCH_START, 0, 0, 0),
    (Event.EPOCH_START, 4, 4, 1),
    (Event.BATCH_START, 0, 0, 0),
    (Event.BATCH_START, 2, 2, 1),
    (Event.BATCH_START, 4, 4, 1),
    (Event.BATCH_START, 6, 6, 2),
    (Event.BEFORE_FORWARD, 2, 3, 1),
    (Event.BEFORE_STEP, 3, 4, 1),
    (Event.BATCH_END, 3, 3, 1),
    (Event.BATCH_END, 4, 4, 1),
    (Event.EVAL_END, 4, 4, 1),
    (Event.EPOCH_END, 4, 4, 1),
]


@pytest.mark.parametrize(("event", "batch", "trained", "rows"), CASES)
@pytest.mark.parametrize("known", [True, False], ids=["known length", "unknown length"])
def test_a_stop_at_a_start_trains_nothing_more(event: Event, batch: int, trained: int, rows: int, known: bool) -> None:
    """The weights are those of exactly so many batches; clock, history and events agree with them."""
    torch.manual_seed(3)
    start = mlp()
    batches = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(4)]

    class Stream:
        def __iter__(self) -> Any:
            return iter(batches)

    seen: list[str] = []
    net = mlp()
    net.load_state_dict(start.state_dict())
    data: Any = batches if known else Stream()
    result = Trainer_(algorithms=[StopAt(event, batch), Names(seen)]).fit(net, data, [batches[0]], duration=3)
    optimizer = SGD(start.parameters())
    for x, y in (batches * 3)[:trained]:
        optimizer.zero_grad()
        cross_entropy(start(x), y).backward()
        optimizer.step()
    assert same_weights(weights(net), weights(start))
    assert (result.clock.batch, result.clock.sample, result.stop_reason) == (trained, 8 * trained, "asked")
    assert 4 * result.clock.epoch + result.clock.batch_in_epoch == trained
    assert [row["batch"] for row in result.history] == [min(4 * (row + 1), trained) for row in range(rows)]
    assert all(row["train/loss"] == row["train/loss"] for row in result.history)
    assert seen.count("EPOCH_START") == seen.count("EPOCH_END")
    assert seen.count("BATCH_END") == seen.count("AFTER_STEP") == trained
    assert seen[-1] == "FIT_END"
    assert result.metrics["eval/loss"] == pytest.approx(cross_entropy(start(batches[0][0]), batches[0][1]).item())
    assert (result.timeline.spans[-1].end.batch if result.timeline.spans else 0) == trained


@pytest.mark.parametrize(("event", "batch", "trained", "rows"), CASES)
@pytest.mark.parametrize("every", ["1ep", "1ba", "3ba"])
def test_a_stopped_run_stays_where_it_stopped(
    event: Event, batch: int, trained: int, rows: int, every: str, tmp_path: Path
) -> None:
    """The last checkpoint is of the clock's batch; a resumed fit has nothing to do and tells the same."""

    def fit(resume: bool) -> tuple[Any, Any]:
        net, data = mlp(), loader()
        algorithms, policy = [StopAt(event, batch)], Checkpointing(every=every, keep=9)
        trainer = Trainer_(algorithms=algorithms, run_dir=tmp_path, checkpoint=policy)
        return weights(net), (trainer.fit(net, data, data, duration=3, resume=resume), weights(net))

    _, (first, expected) = fit(resume=False)
    assert first.last is not None
    saved = read_checkpoint(first.last)
    assert (saved["stop_reason"], saved["extra"]["evaluated_at"]) == ("asked", trained)
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert (first.last.name, len(first.history)) == (f"ba{trained:08d}", rows)
    _, (again, found) = fit(resume=True)
    assert same_weights(found, expected)
    assert (again.clock, again.history, again.stop_reason) == (first.clock, first.history, "asked")
    assert (again.last, again.metrics) == (first.last, first.metrics)
    assert (tmp_path / "metrics.jsonl").read_text() == lines


def test_a_run_cut_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    """Its lines of metrics.jsonl are dropped: resumed, it leaves those of a run that was never cut."""

    class Fails(Algorithm):
        """Raises at the sixth batch."""

        events = frozenset({Event.BATCH_END})

        def apply(self, event: Event, state: State) -> None:
            """Raise."""
            if state.clock.batch == 6:
                raise ValueError("cut")

    def fit(folder: str, *algorithms: Algorithm) -> list[Any]:
        trainer = Trainer_(
            algorithms=algorithms, run_dir=tmp_path / folder, checkpoint=Checkpointing(every="9ep"), log_every="1ba"
        )
        with nullcontext() if not algorithms else pytest.raises(ValueError, match="cut"):
            trainer.fit(mlp(), loader(), loader(), duration=3, resume=True)
        lines = map(json.loads, (tmp_path / folder / "metrics.jsonl").read_text().splitlines())
        return [{key: value for key, value in line.items() if key != "time"} for line in lines]

    torch.manual_seed(0)
    assert fit("cut", Fails())
    torch.manual_seed(0)
    again = fit("cut")
    torch.manual_seed(0)
    assert again == fit("whole")


# -- schedules that fail on the way ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["0.5", -0.5, None, math.nan, math.inf, 10**400, 1j, [1.0]], ids=lambda value: str(value)[:9]
)
@pytest.mark.parametrize("wrapped", [lambda f: f, lambda f: warmup(0.25, f), lambda f: Schedule("mine", {}, f)])
def test_a_factor_that_is_none_is_refused_in_the_middle_of_a_fit(value: Any, wrapped: Any) -> None:
    """Finite at both ends, and text, NaN or too large between: the schedule is named, and the progress."""

    def gap(progress: float) -> Any:
        return value if 0.3 < progress < 0.7 else 1.0

    trainer = Trainer_(schedule=wrapped(gap))
    with pytest.raises(
        ArgumentError,
        match=r"^schedule takes a finite factor of at least 0 at every progress; .* at 0.5, got .*Write: ",
    ):
        trainer.fit(mlp(), loader(), duration="1ep")


def test_a_schedule_that_fails_in_the_middle_is_named() -> None:
    """Its own error is the cause."""
    schedule = Schedule("mine", {}, lambda progress: {0.0: 1.0}[progress])
    assert schedule(0.0) == 1.0
    with pytest.raises(ArgumentError, match=r"mine gave another at 0.5, got KeyError\(0.5\)") as caught:
        schedule(0.5)
    assert isinstance(caught.value.__cause__, KeyError)
