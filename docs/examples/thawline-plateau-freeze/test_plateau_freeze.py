"""PlateauFreeze: the promises of every algorithm, and its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points
from typing import Any

import torch
from thawline_plateau_freeze import PlateauFreeze
from torch.nn.functional import cross_entropy

from thawline.engine import Algorithm, Event, Trainer, on, registered
from thawline.engine.testing import AlgorithmContract, Trace, tiny_loader, tiny_models


class TestPlateauFreeze(AlgorithmContract):
    """Every check of the conformance kit, each a test of its own."""

    factory: Callable[[], Algorithm] = staticmethod(partial(PlateauFreeze, patience=1))


@on(Event.EVAL_END)
def log_a_plateau(state: Any) -> None:
    """Log a metric that stands still after the first evaluation."""
    state.log({"eval/still": 1.0})


def test_it_freezes_a_layer_each_time_the_metric_stands_still() -> None:
    """Evaluations 2 and 3 find no improvement on the first; the head trains to the end."""
    trace = Trace()
    trainer = Trainer(
        algorithms=[PlateauFreeze("eval/still", patience=1), log_a_plateau(), trace],
        optimizer=partial(torch.optim.SGD, lr=0.1),
        loss_fn=cross_entropy,
        progress=False,
    )
    trainer.fit(tiny_models()["mlp"](), tiny_loader(16), tiny_loader(16), duration="5ep")
    assert [line for line in trace if "freeze" in line] == [
        "BATCH_START 6: freeze blocks[0]",
        "BATCH_START 8: freeze blocks[1]",
    ]


def test_it_is_found_by_its_entry_point() -> None:
    """Recipes name it without an import."""
    assert [each.load() for each in entry_points(group="thawline.algorithms", name="PlateauFreeze")] == [PlateauFreeze]
    assert registered("PlateauFreeze") is PlateauFreeze
