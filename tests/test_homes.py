"""Optimizers that hold what cannot train: the message says which parameter it is."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from helpers import mlp
from thawline.engine import OptimizerError, ParameterLedger


def test_an_integer_parameter_is_called_by_name() -> None:
    """It is the model's own, and has to be left out."""
    net = mlp()
    net.register_parameter("ids", nn.Parameter(torch.arange(3), requires_grad=False))
    message = (
        r"SGD holds 'ids' of torch.int64, which cannot train. Write: optimizer=SGD\(\[p for p in model.parameters\(\)"
    )
    with pytest.raises(OptimizerError, match=message):
        ParameterLedger(net, torch.optim.SGD(net.parameters(), lr=0.1))
    trained = torch.optim.SGD([each for each in net.parameters() if each.is_floating_point()], lr=0.1)
    assert "ids" in ParameterLedger(net, trained).frozen


def test_a_foreign_parameter_is_called_by_its_place_and_shape() -> None:
    """With the name that the optimizer has for it, and the one of the model's that it may stand for."""
    net, other = mlp(), nn.Linear(4, 2)
    groups = [{"params": list(net.parameters())}, {"params": [nn.Parameter(torch.zeros(7)), *other.parameters()]}]
    message = r"that is not in the model: params\[0\] of param_groups\[1\], of shape \(7,\). Write: optimizer=AdamW\("
    with pytest.raises(OptimizerError, match=message):
        ParameterLedger(net, torch.optim.AdamW(groups))
    message = (
        r"which it calls 'weight', that .* params\[0\] of param_groups\[0\], of shape \(2, 4\); '4.weight' has that"
    )
    with pytest.raises(OptimizerError, match=message):
        ParameterLedger(net, torch.optim.SGD(other.named_parameters(), lr=0.1))


@pytest.mark.parametrize(
    "factory", [partial(torch.optim.AdamW, lr=-1), lambda: None, partial(torch.optim.SGD, lr="fast")]
)
def test_a_factory_that_fails_is_shown(factory: Any) -> None:
    """With what it said, and one that works."""
    with pytest.raises(OptimizerError, match=r"the optimizer factory .* failed: .* Write: optimizer=partial\("):
        ParameterLedger(mlp(), factory)
