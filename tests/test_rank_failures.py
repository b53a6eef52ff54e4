"""What the other ranks do when one fails, dies or hangs: an error with words, in time, and never a hang."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from forked import together
from thawline.algorithms import GradClip, LayerThaw
from thawline.engine import Algorithm, Checkpointing, Event, Replicate, Stage, State, ThawlineError, Trainer
from thawline.engine.doubles import Residual
from thawline.engine.rundir import RunDir

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class At(Algorithm):
    """Calls a function at an event of one rank, once."""

    stage = Stage.TRAINABILITY

    def __init__(self, event: Event, function: Any, rank: int = 1, batch: int = 2) -> None:
        self.events = frozenset({event})
        self.function, self.rank, self.batch = function, rank, batch
        self.done = False

    def apply(self, event: Event, state: State) -> None:
        ready = state.clock.batch >= self.batch or event in (Event.FIT_START, Event.EPOCH_START)
        if int(os.environ["RANK"]) == self.rank and ready and not self.done:
            self.done = True
            self.function()

    def describe(self) -> dict[str, Any]:
        return {"name": "At", "arguments": {}}


def fail() -> None:
    """Be wrong."""
    raise ZeroDivisionError("the reason")


def stop() -> None:
    """Hang: the process neither runs nor ends."""
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    """End without a word."""
    os.kill(os.getpid(), signal.SIGKILL)


def fit(*algorithms: Algorithm, timeout: float = 30.0, **settings: Any) -> str:
    """Train a little; return the words of the error that it ends with."""
    torch.manual_seed(0)
    net = Residual(depth=3, width=8, dropout=0.0)
    x = torch.randn(24, 4)
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=6, shuffle=True)
    trainer = Trainer(
        algorithms=[*algorithms, LayerThaw(every="1ba"), GradClip(1.0)],
        optimizer=partial(torch.optim.SGD, lr=0.1), loss_fn=nn.functional.cross_entropy, device="cpu",
        distributed=Replicate(timeout=timeout), eval_every="2ba", log_every="1ba", progress=False, **settings,
    )  # fmt: skip
    began = time.monotonic()
    try:
        trainer.fit(net, loader, loader, duration="2ep")
    except (ThawlineError, ZeroDivisionError) as error:
        spent = time.monotonic() - began
        return f"{type(error).__name__}: {error}" + ("" if spent < timeout + 10 else f" AFTER {spent} s")
    return "nothing was raised"


IN_A_BATCH = "reducing gradients of batch 2"
EVENTS = {
    Event.FIT_START: "at FIT_START of batch 0", Event.EPOCH_START: "at EPOCH_START of batch 0",
    Event.BATCH_START: "at BATCH_START of batch 2", Event.BEFORE_FORWARD: IN_A_BATCH, Event.AFTER_FORWARD: IN_A_BATCH,
    Event.AFTER_LOSS: IN_A_BATCH, Event.AFTER_BACKWARD: IN_A_BATCH, Event.BEFORE_STEP: "at BATCH_END of batch 3",
    Event.AFTER_STEP: "at BATCH_END of batch 3", Event.BATCH_END: "at BATCH_END of batch 2",
    Event.EVAL_START: "at EVAL_END of batch 4", Event.EVAL_BATCH_START: "at EVAL_END of batch 4",
    Event.EVAL_BATCH_END: "at EVAL_END of batch 4", Event.EVAL_END: "at EVAL_END of batch 2",
    Event.EPOCH_END: "at EPOCH_END of batch 4",
}  # fmt: skip


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.name)
def test_an_error_on_one_rank_ends_the_other(event: Event) -> None:
    """Wherever an algorithm fails on one rank, that rank says why, and the other at once where it lost it."""
    found = together(lambda rank: fit(At(event, fail)))
    assert found[1] == "ZeroDivisionError: the reason"
    assert found[0].startswith("DistributedError: rank 0 of 2 lost another one while ")
    assert EVENTS[event] in found[0]
    assert "--max-restarts=3" in found[0]
    assert "AFTER" not in found[0]


@pytest.mark.parametrize("event", [Event.FIT_END, Event.FIT_ABORT])
def test_an_error_where_nothing_is_exchanged_is_one_ranks_own(event: Event) -> None:
    """After the last exchange a failure is that of the rank alone, and neither waits for the other."""
    broken = (At(Event.AFTER_LOSS, fail), At(event, fail)) if event is Event.FIT_ABORT else (At(event, fail),)
    found = together(lambda rank: fit(*broken))
    assert found[1] == "ZeroDivisionError: the reason"
    assert ("lost another one" in found[0]) is (event is Event.FIT_ABORT)
    assert found[0] == "nothing was raised" or event is Event.FIT_ABORT


@pytest.mark.parametrize("event", [Event.BATCH_START, Event.AFTER_BACKWARD, Event.EVAL_BATCH_END])
def test_a_rank_that_hangs_is_given_up(event: Event) -> None:
    """A rank that is stopped is waited for as long as the timeout says."""
    found = together(lambda rank: fit(At(event, stop), timeout=2), silent=[1])
    assert found[0].startswith("DistributedError: rank 0 of 2 lost another one while ")
    assert "is given up after 2 s" in found[0]
    assert "AFTER" not in found[0]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("how", [die, stop], ids=["dies", "hangs"])
def test_the_first_rank_goes_while_it_saves(
    how: Any, world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others, who wait for the checkpoint to be known, end with an error, and the one before it is whole."""
    save = RunDir.save

    def goes(self: RunDir, *args: Any, **kwargs: Any) -> None:
        if os.environ["RANK"] == "0" and kwargs["step"] == 2:
            how()
        save(self, *args, **kwargs)

    monkeypatch.setattr(RunDir, "save", goes)
    run = {"run_dir": tmp_path / "run", "checkpoint": Checkpointing(every="1ba")}
    found = together(lambda rank: fit(timeout=3, **run), world, silent=[0])
    assert sorted(found) == [*range(1, world)]
    for words in found.values():
        assert "lost another one while at EVAL_END of batch 2, and telling each other more" in words
        assert "AFTER" not in words
    monkeypatch.undo()
    assert together(lambda rank: fit(run_dir=run["run_dir"]))[0].startswith("RunDirError")


def test_a_save_that_fails_on_the_first_rank_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An algorithm whose state cannot be saved is named by the rank that writes; the others say that they lost it."""

    class Unsaved(At):
        def state_dict(self) -> dict[str, Any]:
            return {"broken": object()}

    found = together(lambda rank: fit(Unsaved(Event.FIT_END, int), run_dir=tmp_path / "run"))
    assert "CheckpointError" in found[0]
    assert "lost another one" in found[1]
