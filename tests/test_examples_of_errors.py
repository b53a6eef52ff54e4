"""What errors say to write can be written: every example is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from thawline import algorithms, engine
from thawline.algorithms import Phase, Plateau, ThawSchedule
from thawline.engine import ArgumentError, Trainer, join, repeat, warmup

NAMES = {"torch": torch, **{name: getattr(engine, name) for name in engine.__all__}, **vars(algorithms)}
HEAD: list[Any] = [Phase(thaw="head", until=1)]


def end(_state: object) -> bool:
    """Return that a phase never ends."""
    return False


@pytest.mark.parametrize(
    "wrong",
    [
        Phase,
        *(lambda name=name: Phase(**{"thaw": "head", name: -1}) for name in Phase.__annotations__),
        *(lambda name=name: Plateau(**{"monitor": "a", name: -1}) for name in Plateau.__annotations__),
        lambda: Phase(thaw="head", lr={}),
        lambda: Phase(thaw="head", lr={"head": 0}),
        lambda: Phase(lr=0.1, schedule="cosine"),
        lambda: Phase(thaw="head", freeze="head"),
        lambda: Phase(thaw=("head", "head")),
        lambda: Phase(thaw="head", restore_monitor="eval/loss"),
        *(lambda name=name: ThawSchedule(HEAD, **{name: -1})
          for name in ("repeat", "max_depth", "batchnorm", "base_max_lr", "end_with_last_phase")),
        lambda: ThawSchedule(3),  # type: ignore[arg-type]
        lambda: ThawSchedule([Phase(freeze="head")]),
        lambda: ThawSchedule([Phase(thaw="head")], repeat=2),
        lambda: ThawSchedule([Phase("it's", thaw="head", until=1), Phase("it's", thaw="stem")]),
        lambda: ThawSchedule([Phase(thaw="head", schedule="linear", until=end)]),
        *(lambda make=make: make(-1) for make in (algorithms.FreezeAt, algorithms.TrainOnly)),
        lambda: join([], []),
        lambda: join([engine.cosine()], ["x"]),
        lambda: join([engine.cosine(), engine.cosine()], [-1]),
        lambda: join([3, engine.cosine()], ["1ep"]),  # type: ignore[list-item]
        lambda: repeat(engine.cosine(), "x"),
        lambda: repeat(engine.cosine(), "1ep", growth=0),
        lambda: repeat(3, "1ep"),  # type: ignore[arg-type]
        lambda: warmup("x"),
        lambda: warmup("1ep", then=3),  # type: ignore[arg-type]
        lambda: warmup("1ep", start=-1),
        lambda: Trainer(checkpoint=3),  # type: ignore[arg-type]
        lambda: Trainer(checkpoint=engine.Checkpointing()),
        lambda: Trainer(loss_fn=3),  # type: ignore[arg-type]
        lambda: Trainer(loss_fn=int),
    ],
)  # fmt: skip
def test_what_an_error_says_to_write_can_be_written(
    wrong: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a call that goes through."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError) as caught:
        wrong()
    eval(caught.value.example, dict(NAMES))
