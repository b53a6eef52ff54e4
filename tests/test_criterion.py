"""What a loss function says of itself decides how the parts of a batch are weighed."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, nll_loss

from helpers import mlp, weights
from thawline.engine import ArgumentError, Trainer

Trainer_ = partial(Trainer, optimizer=partial(torch.optim.SGD, lr=1.0), progress=False)
WEIGHT = torch.tensor([0.2, 3.0])


def _log_likelihood(outputs: torch.Tensor, targets: torch.Tensor, **options: Any) -> torch.Tensor:
    return nll_loss(outputs.log_softmax(-1), targets, **options)


LOSSES = {
    "ignored, a module": nn.CrossEntropyLoss(ignore_index=1),
    "ignored, a partial": partial(cross_entropy, ignore_index=1),
    "ignored, a partial of a partial": partial(partial(cross_entropy, ignore_index=0), ignore_index=1),
    "ignored, a partial of a function of one's own": partial(_log_likelihood, ignore_index=1),
    "weighted, a module": nn.CrossEntropyLoss(weight=WEIGHT),
    "weighted, a partial": partial(cross_entropy, weight=WEIGHT),
    "smoothed": nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.3),
    "both": nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1),
}


@pytest.mark.parametrize("name", LOSSES)
@given(
    labels=st.lists(st.integers(0, 1), min_size=8, max_size=8).filter(lambda each: 0 in each),
    size=st.integers(1, 8),
    pieces=st.sampled_from([1, 2]),
)
def test_cutting_a_batch_changes_neither_gradient_nor_evaluation(
    name: str, labels: list[int], size: int, pieces: int
) -> None:
    """One step of the whole batch and of its parts, and its loss under ``eval``, are those of torch."""
    loss_fn = LOSSES[name]
    torch.manual_seed(0)
    net, x, y = mlp(), torch.randn(8, 4), torch.tensor(labels)
    cut = copy.deepcopy(net)
    batches = list(zip(x.chunk(pieces), y.chunk(pieces), strict=True))
    trainer = Trainer_(loss_fn=loss_fn, microbatch_size=size, accumulate=pieces)
    expected = loss_fn(net(x), y)
    evaluated = trainer.evaluate(cut, list(zip(x.split(size), y.split(size), strict=True)))
    assert evaluated["eval/loss"] == pytest.approx(expected.item(), rel=1e-5)
    trainer.fit(cut, batches, duration=1)
    expected.backward()
    with torch.no_grad():
        for each in net.parameters():
            each.sub_(each.grad)
    for name_, value in weights(net).items():
        torch.testing.assert_close(weights(cut)[name_], value, atol=1e-5, rtol=1e-5)


def test_the_weight_of_another_kind_of_loss_is_none_of_the_classes() -> None:
    """BCEWithLogitsLoss and MultiMarginLoss are means over samples, whatever their weights."""
    torch.manual_seed(0)
    net, x, y = mlp(), torch.randn(8, 4), torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
    loss_fn = nn.MultiMarginLoss(weight=WEIGHT)
    expected = loss_fn(net(x), y).item()
    parts = list(zip(x.split(3), y.split(3), strict=True))
    assert Trainer_(loss_fn=loss_fn).evaluate(net, parts)["eval/loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss_fn", [nn.MSELoss(reduction="sum"), partial(mse_loss, reduction="none")])
@pytest.mark.parametrize("cut", [{"microbatch_size": 2}, {"accumulate": 2}])
def test_a_loss_that_is_no_mean_cannot_be_cut(loss_fn: Any, cut: dict[str, int]) -> None:
    """At construction; the error says what to write."""
    with pytest.raises(ArgumentError, match=r"Trainer\(loss_fn=\) takes a mean over the batch.*Write: .*'mean'"):
        Trainer_(loss_fn=loss_fn, **cut)


def test_a_sum_trains_whole_batches_and_is_evaluated_by_sample() -> None:
    """However the evaluation data are cut."""
    torch.manual_seed(0)
    net, x, y = mlp(), torch.randn(8, 4), torch.randint(2, (8,))
    loss_fn = nn.CrossEntropyLoss(reduction="sum")
    expected = loss_fn(net(x), y).item() / 8
    trainer = Trainer_(loss_fn=loss_fn)
    for size in (8, 5, 1):
        parts = list(zip(x.split(size), y.split(size), strict=True))
        assert trainer.evaluate(net, parts)["eval/loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.fit(net, [(x, y)], duration=1).history[0]["train/loss"] == pytest.approx(expected * 8, rel=1e-5)
