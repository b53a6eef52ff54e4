"""Models, losses and launches that weights in shards do not take as whole ones: the same numbers, or a typed error in time."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ranks
from forked import together
from thawline.algorithms import LayerThaw
from thawline.engine import Event, FullyShard, Replicate, State, on

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
IN_SHARDS = FullyShard(timeout=30)
cross_entropy = nn.functional.cross_entropy


def fit(net: nn.Module, **given: Any) -> dict[str, Tensor]:
    """Train for two epochs in shards, where there are several ranks; return the weights."""
    given = {"duration": "2ep", "distributed": IN_SHARDS} | given
    weights: dict[str, Tensor] = ranks.fitted(net, given.pop("algorithms", ()), **given)["weights"]
    return weights


class Block(nn.Module):
    """A block that hands its tensor on inside an object."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, given: Any) -> Any:
        return SimpleNamespace(hidden=torch.tanh(self.linear(given.hidden)))


class Wrapped(nn.Module):
    """A model whose blocks, or which itself, returns objects that torch does not look into."""

    def __init__(self, *, blocks: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(2 if blocks else 0))

    def forward(self, x: Tensor) -> Any:
        given = SimpleNamespace(hidden=self.stem(x))
        for block in self.blocks:
            given = block(given)
        logits = self.head(given.hidden)
        return logits if len(self.blocks) else SimpleNamespace(logits=logits)


class Sparse(nn.Module):
    """A model with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 8, sparse=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed((x[:, :4] * 10).long().abs() % 5).mean(1))


def with_kept_parameters() -> Any:
    """Train with a penalty on parameters that were listed before the fit."""
    net = ranks.model()
    kept = list(net.parameters())
    return fit(net, loss_fn=lambda out, y: cross_entropy(out, y) + sum(each.square().sum() for each in kept))


def with_a_hook() -> Any:
    """Train a model that masks a gradient."""
    net = ranks.model()
    net.head.weight.register_hook(torch.zeros_like)
    return fit(net)


class Normed(ranks.Net):
    """A model whose normalization keeps its statistics in single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


def with_a_gradient_penalty() -> Any:
    """Train with a loss on the gradient of the inputs."""

    def forward(net: nn.Module, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_(True)
        out: Tensor = net(x)
        slope = torch.autograd.grad(out.sum(), x, create_graph=True)[0]
        return out + slope.square().sum(1, keepdim=True)

    return fit(ranks.model(), forward_fn=forward)


class Empty(ranks.Net):
    """A model with a parameter of no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(0, 4))


def with_two_dtypes() -> Any:
    """Train a model of two dtypes."""
    net = ranks.model(ranks.Net, torch.float32)
    net.stem.double()
    net.stem.register_forward_pre_hook(lambda _, args: (args[0].double(),))
    net.stem.register_forward_hook(lambda _, __, out: out.float())
    return fit(net, batches=ranks.loader(dtype=torch.float32))


def with_an_operation_that_wants_float32() -> Any:
    """Train a normalization of batches in bfloat16."""
    batches = ranks.loader(dtype=torch.float32)
    return fit(ranks.model(Normed, torch.float32), batches=batches, distributed=FullyShard(mixed_precision="bf16"))


REFUSED: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "kept parameters": (with_kept_parameters, ("'stem.weight' as it was before the fit", "weight_decay=", "Replicate()")),
    "a hook": (with_a_hook, ("'head.weight' has a hook on its gradient", "Event.BEFORE_STEP", "Replicate()")),
    "a block's object": (
        lambda: fit(ranks.model(partial(Wrapped, blocks=True))),
        ("blocks.0 returns a SimpleNamespace", "Return a tensor, a tuple, or a dict", "Replicate()"),
    ),
    "a model's object": (
        lambda: fit(ranks.model(partial(Wrapped, blocks=False))),
        ("the model returns a SimpleNamespace", "{'logits': …}", "Replicate()"),
    ),
    "sparse gradients": (
        lambda: fit(ranks.model(Sparse), optimizer=partial(torch.optim.SGD, lr=0.1)),
        ("a gradient is sparse", "nn.Embedding(…, sparse=False)"),
    ),
    "two dtypes": (with_two_dtypes, ("weights of several dtypes train in one block", "model.float()", "Replicate()")),
    "a gradient penalty": (with_a_gradient_penalty, ("torch.autograd.grad is called inside of a batch", "Replicate()")),
    "no elements": (lambda: fit(ranks.model(Empty)), ("'nothing' has no elements", "Replicate()")),
    "mixed precision": (
        with_an_operation_that_wants_float32,
        ("does not compute in bfloat16 alone", "Trainer(precision='bf16', distributed=FullyShard())"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_go_wrong_silently_or_inside_torch_is_refused(case: str) -> None:
    """Every rank ends with a typed error that says what to write instead."""
    function, words = REFUSED[case]
    for said in together(lambda rank: ranks.raised(function)).values():
        assert said.startswith("DistributedError: ")
        for each in words:
            assert each in said


class Scaled(torch.optim.SGD):
    """An optimizer that reads a factor off each parameter."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for each in group["params"]:
                if each.grad is not None:
                    each.grad.mul_(getattr(each, "factor", 1.0))
        return super().step(closure)


def marked() -> dict[str, Tensor]:
    """Train a model of which the user has marked a parameter."""
    net = ranks.model()
    net.head.weight.factor = 0.0  # type: ignore[assignment]
    return fit(net, optimizer=partial(Scaled, lr=0.1))


class Aside(ranks.Net):
    """A model one of whose outputs is not part of the loss, and goes through more blocks than the other."""

    def forward(self, x: Tensor) -> Any:
        first = self.blocks[0](self.stem(x))
        return {"logits": self.head(first), "aside": self.blocks[2](self.blocks[1](first))}


def few() -> dict[str, Tensor]:
    """Train such a model on a batch in which one rank has no sample."""
    return fit(ranks.model(Aside), batches=DataLoader(ranks.data(13), batch_size=12, shuffle=True))


@pytest.mark.parametrize("function", [marked, few])
def test_shards_train_as_one_process(function: Callable[[], dict[str, Tensor]]) -> None:
    """What users write on parameters is kept, and a rank without samples goes back through what the others go back through."""
    one = function()
    for found in together(lambda rank: function()).values():
        for name, value in one.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12, msg=name)


def test_a_memory_format_is_given_back() -> None:
    """Parameters lie in memory after the fit as they did before."""

    def trained(rank: int) -> list[bool]:
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Unflatten(1, (2, 1, 3)), nn.Conv2d(2, 8, 2, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 2), nn.Flatten(), nn.Linear(9, 3)
        ).to(torch.float64, memory_format=torch.channels_last)  # fmt: skip
        before = [each.stride() for each in net.parameters()]
        fit(net, algorithms=[LayerThaw(every="2ba")])
        return [each.stride() == old for each, old in zip(net.parameters(), before, strict=True)]

    for same in together(trained).values():
        assert all(same)


def test_each_fit_has_its_own_timeout() -> None:
    """A rank that hangs while shards are gathered is waited for as long as this fit says, whatever an earlier one said."""

    @on(Event.BEFORE_FORWARD)
    def hang(state: State) -> None:
        if os.environ["RANK"] == "1" and state.clock.batch == 2:
            os.kill(os.getpid(), signal.SIGSTOP)

    def train(rank: int) -> str:
        fit(ranks.model(), distributed=Replicate(timeout=300))
        return ranks.raised(lambda: fit(ranks.model(), algorithms=[hang()], distributed=FullyShard(timeout=2)))

    found = together(train, silent=[1])
    assert found[0].startswith("DistributedError: rank 0 of 2 lost another one while gathering weights")
    assert "is given up after 2 s" in found[0]
