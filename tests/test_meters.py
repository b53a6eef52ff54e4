"""Metrics: what is none is refused when the Trainer is made, what gives none when it is called; both by name."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor
from torch.nn.functional import cross_entropy

from helpers import loader, mlp
from thawline.engine import ArgumentError, DataError, Trainer

Accuracy = torchmetrics.classification.MulticlassAccuracy
Trainer_ = partial(Trainer, loss_fn=cross_entropy, progress=False)


def error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the share that is wrong."""
    return (outputs.argmax(-1) != targets).float().mean()


class Updates:
    """A metric that takes whole batches."""

    def update(self, batch: Any) -> None:
        """Take in a batch."""

    def compute(self) -> float:
        """Return a number."""
        return 0.0

    def reset(self) -> None:
        """Forget."""


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"acc": Accuracy}, r"'acc': …}\) takes an instance .* Write: .*{'acc': MulticlassAccuracy\(…\)}"),
        ({"acc": lambda outputs: 1.0}, r"'acc': …}\) takes a function \(outputs, targets\) -> number"),
        ({"acc": lambda outputs, targets, more: 1.0}, r"'acc': …}\) takes a function \(outputs, targets\)"),
        ({"acc": Updates()}, r"'acc': …}\) takes an update\(outputs, targets\)"),
        ({"acc": "accuracy"}, r"'acc': …}\) takes a function"),
        ({"loss": error}, r"'loss': …}\) takes another name than 'loss'.*Write: .*'my_loss'"),
        ({"": error}, "takes a mapping of names"),
        ({1: error}, "takes a mapping of names"),
    ],
)
def test_what_is_no_metric_is_refused_by_name(metrics: Any, message: str) -> None:
    """At construction, before an epoch is spent."""
    with pytest.raises(ArgumentError, match=message):
        Trainer(metrics=metrics)


@pytest.mark.parametrize(
    "metric",
    [
        lambda outputs, targets: "good",
        lambda outputs, targets: "0.5",
        lambda outputs, targets: outputs,
        lambda outputs, targets: None,
        lambda outputs, targets: 10**400,
        Accuracy(2, average=None),
    ],
)
def test_a_metric_that_gives_no_number_is_named(metric: Any) -> None:
    """Text, vectors, None, and objects that compute a vector."""
    with pytest.raises(
        ArgumentError, match=r"'acc': …}\) takes a metric that gives one number, got (.|\n)*Write: Trainer"
    ):
        Trainer_(metrics={"acc": metric}).evaluate(mlp(), loader())


@pytest.mark.parametrize("value", [0.5, torch.tensor(0.5), torch.tensor([0.5]), True, float("nan")])
def test_every_kind_of_number_is_one(value: Any) -> None:
    """NaN too: a metric may be undefined."""
    found = Trainer_(metrics={"it": lambda outputs, targets: value}).evaluate(mlp(), loader())["eval/it"]
    assert found == pytest.approx(float(value), nan_ok=True)


def test_an_error_inside_a_metric_keeps_its_type_and_gains_its_name() -> None:
    """It is the user's own; a note says which metric it was."""

    def broken(outputs: Tensor, targets: Tensor) -> float:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        Trainer_(metrics={"acc": broken}).evaluate(mlp(), loader())
    assert "in the metric 'acc'" in caught.value.__notes__[0]


@pytest.mark.parametrize("metric", [error, Accuracy(2)])
def test_a_metric_that_misses_targets_says_so(metric: Any) -> None:
    """Where a batch has none, the metric's own error is only the cause."""
    with pytest.raises(DataError, match=r"metric 'acc' failed on a batch without targets.*Write: an eval_loader"):
        Trainer_(metrics={"acc": metric}).evaluate(mlp(), [(torch.randn(8, 4),)])
