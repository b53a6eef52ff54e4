"""Optimizers that hold what cannot train: the message says which parameter it is."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from helpers import cnn, decay_groups, gain, is_matrix, mlp
from thawline.engine import LedgerError, OptimizerError, ParameterLedger


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


def test_what_is_attached_goes_home_with_its_kind() -> None:
    """A vector beside a matrix, which has an optimizer of its own: to the others' options of vectors, not of kernels."""
    assert gain is not None

    def others(parameters: Any) -> torch.optim.Optimizer:
        found = list(parameters)
        flat, kernels = ([each for each in found if (each.ndim <= 1) is kind] for kind in (True, False))
        return torch.optim.AdamW([{"params": kernels, "lr": 0.1}, {"params": flat, "lr": 0.2}])

    ledger = ParameterLedger(cnn(), [(is_matrix, partial(torch.optim.SGD, lr=0.3)), ("*", others)])
    ledger.attach("8", "gain", owner="me", size=4)
    rates = {name: group.base_lr for group in ledger.groups for name in group.parameters}
    assert (rates["0.weight"], rates["8.weight"], rates["8.gain"]) == (0.1, 0.3, 0.2)


def test_an_optimizer_of_other_groups_is_not_the_saved_one() -> None:
    """The same class, of one group where there were two."""
    saved = ParameterLedger(net := mlp(), decay_groups(net)).state_dict()
    with pytest.raises(LedgerError, match="saved with 2 groups of its own and has 1 now. Build it as in the run"):
        ParameterLedger(mlp(), partial(torch.optim.AdamW, lr=0.02)).load_state_dict(saved)


def test_a_rate_that_torch_shares_between_groups_is_each_groups_own() -> None:
    """A tensor given for all groups is one tensor in all of them, and a factor on one must not reach the others."""
    net = mlp()
    parameters = list(net.parameters())
    groups = [{"params": parameters[:-2]}, {"params": parameters[-2:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=(rate := torch.tensor(0.5)), foreach=False)
    assert all(each["lr"] is rate for each in optimizer.param_groups)
    ledger = ParameterLedger(net, optimizer)
    ledger.scale("head", 0.25, owner="test")
    assert [float(each["lr"]) for each in optimizer.param_groups] == [0.5, 0.125]
    assert optimizer.param_groups[0]["lr"] is rate
