"""The documented loop by hand equals the Trainer."""

import copy
import inspect

import pytest
import torch
from torch.nn.functional import cross_entropy

import bare_loop
from helpers import same_weights, weights
from thawline.algorithms import EMA, GradClip, LayerThaw, LoRAInject
from thawline.engine import Algorithm, Trainer, linear
from thawline.engine.testing import tiny_loader, tiny_models


@pytest.mark.parametrize(
    ("model", "beside"),
    [("mlp", []), ("cnn", []), ("tied", []), ("mlp", [LoRAInject(rank=2)]), ("transformer", [LoRAInject(rank=2)])],
)
def test_the_bare_loop_gives_the_trainers_weights_bit_for_bit(model: str, beside: list[Algorithm]) -> None:
    """Thaw, clip, average and adapters, over three epochs: weights, averages and flags are the Trainer's."""
    torch.manual_seed(0)
    one = tiny_models()[model]()
    other = copy.deepcopy(one)
    batches = [(x, y) for x, y in tiny_loader(shuffle=False)]
    averages = EMA(half_life="3ba"), EMA(half_life="3ba")
    trainer = Trainer(
        algorithms=[LayerThaw(), GradClip(0.5), averages[0], *beside],
        optimizer=bare_loop.ADAMW,
        schedule=linear(),
        loss_fn=cross_entropy,
        progress=False,
    )
    trainer.fit(one, batches, duration="3ep")
    for each in beside:
        each.reset()
    bare_loop.train(other, batches, cross_entropy, [LayerThaw(), GradClip(0.5), averages[1], *beside], epochs=3)
    assert same_weights(weights(one), weights(other))
    assert same_weights(averages[0].average, averages[1].average)
    assert [each.requires_grad for each in one.parameters()] == [each.requires_grad for each in other.parameters()]


def test_the_bare_loop_fits_on_a_screen() -> None:
    """About 30 lines with signature and docstring."""
    assert len(inspect.getsource(bare_loop.train).splitlines()) <= 32
