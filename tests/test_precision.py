"""Precision: autocast and the gradient scaler, against torch used by hand."""

import json
import math

import pytest
import torch
from torch import nn

from thawline.engine import ArgumentError, CheckpointError
from thawline.engine.precision import Precision, PrecisionKind

CPU = torch.device("cpu")


def regression() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """Return a model and data, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(4, 2)
    with torch.no_grad():
        for each in model.parameters():
            each.copy_(torch.randn(each.shape, generator=generator))
    return model, torch.randn(8, 4, generator=generator), torch.randn(8, 2, generator=generator)


def train(kind: PrecisionKind, steps: int = 8) -> nn.Linear:
    """Return a model trained with :class:`Precision`."""
    model, x, y = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precision = Precision(kind, CPU)
    for _ in range(steps):
        with precision.autocast():
            loss = nn.functional.mse_loss(model(x).float(), y)
        precision.backward(loss)
        precision.unscale([optimizer])
        precision.step([optimizer])
        optimizer.zero_grad()
    return model


def by_hand(dtype: torch.dtype, steps: int = 8) -> nn.Linear:
    """Return a model trained with torch's own autocast and scaler."""
    model, x, y = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    for _ in range(steps):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = nn.functional.mse_loss(model(x).float(), y)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("kind, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_training_equals_torch_by_hand(kind: PrecisionKind, dtype: torch.dtype) -> None:
    """Eight steps, overflows of the first scales included, give the bits of autocast and GradScaler used by hand."""
    ours, theirs = train(kind), by_hand(dtype)
    assert torch.equal(ours.weight, theirs.weight)
    assert not torch.equal(ours.weight, regression()[0].weight)
    assert ours.weight.dtype == torch.float32


@pytest.mark.parametrize("kind, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_forward_runs_in_the_precision(kind: PrecisionKind, dtype: torch.dtype) -> None:
    """A linear layer gives outputs of the precision's type, time after time in the one context."""
    model, x, _ = regression()
    precision = Precision(kind, CPU)
    for _ in range(2):
        with precision.autocast():
            assert model(x).dtype == dtype
    assert model(x).dtype == torch.float32


def test_fp32_shares_a_context_that_does_nothing() -> None:
    """A disabled autocast costs ten times as much as none."""
    context = Precision("fp32", CPU).autocast()
    assert context is Precision("fp32", CPU).autocast()
    assert not isinstance(context, torch.autocast)


def test_gradients_are_unscaled_once_and_true() -> None:
    """Between ``unscale`` and ``step`` gradients are those of the loss; a second call does not divide again."""
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    precision = Precision("fp16", CPU)
    precision.backward((weight * 2).sum())
    assert weight.grad is not None
    assert weight.grad.tolist() == [2 * precision.scale] * 3
    precision.unscale([optimizer])
    precision.unscale([optimizer])
    assert weight.grad.tolist() == [2.0] * 3


def test_accumulated_gradients_are_unscaled_together() -> None:
    """Several backward passes add up before the one division."""
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    precision = Precision("fp16", CPU)
    for _ in range(3):
        precision.backward((weight * 2).sum())
    assert precision.step([optimizer])
    assert weight.item() == 1.0 - 6.0


@pytest.mark.parametrize("overflowing", [0, 1])
def test_an_overflow_anywhere_stops_every_optimizer(overflowing: int) -> None:
    """One half of the model does not move without the other, and the scale is halved."""
    weights = [torch.ones(1, requires_grad=True) for _ in range(2)]
    optimizers = [torch.optim.SGD([each], lr=0.1) for each in weights]
    precision = Precision("fp16", CPU)
    before = precision.scale
    factors = [math.inf if index == overflowing else 1.0 for index in range(2)]
    precision.backward(sum(each * factor for each, factor in zip(weights, factors, strict=True)).sum())  # type: ignore[union-attr]
    precision.unscale(optimizers)
    assert not precision.step(optimizers)
    assert [each.item() for each in weights] == [1.0, 1.0]
    assert precision.scale == before / 2


def test_the_fit_goes_on_after_an_overflow() -> None:
    """The next step is an ordinary one."""
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.5)
    precision = Precision("fp16", CPU)
    moved: list[bool] = []
    for factor in (math.inf, 1.0):
        precision.backward((weight * factor).sum())
        precision.unscale([optimizer])
        moved.append(precision.step([optimizer]))
        optimizer.zero_grad()
    assert moved == [False, True]
    assert weight.item() == 0.5


def test_an_optimizer_without_gradients_is_no_hindrance() -> None:
    """Where one of two optimizers has nothing that trains, the other one steps; where none has, nothing fails."""
    weight, idle = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    optimizers = [torch.optim.SGD([weight], lr=0.5), torch.optim.SGD([idle], lr=0.5)]
    precision = Precision("fp16", CPU)
    precision.backward(weight.sum())
    assert precision.step(optimizers)
    assert [weight.item(), idle.item()] == [0.5, 1.0]
    for optimizer in optimizers:
        optimizer.zero_grad()
    precision.backward(torch.ones(1, requires_grad=True).sum())
    assert precision.step(optimizers)


def test_the_scaler_continues_where_it_was() -> None:
    """Scale and growth tracker go through JSON into a fresh scaler, before and after its first use."""
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.5)
    precision = Precision("fp16", CPU)
    for factor in (math.inf, 1.0, 1.0):
        precision.backward((weight * factor).sum())
        precision.step([optimizer])
        optimizer.zero_grad()
    saved = json.loads(json.dumps(precision.state_dict()))
    assert saved == {"scale": 32768.0, "growth_tracker": 2}
    fresh = Precision("fp16", CPU)
    fresh.load_state_dict(saved)
    assert fresh.state_dict() == saved
    fresh.backward(weight.sum())
    assert weight.grad is not None
    assert weight.grad.item() == 32768.0
    fresh.load_state_dict({"scale": 8.0, "growth_tracker": 1})
    assert fresh.state_dict() == {"scale": 8.0, "growth_tracker": 1}


def test_no_scaler_has_no_state() -> None:
    """What another precision saved is left aside."""
    for kind in ("fp32", "bf16"):
        precision = Precision(kind, CPU)
        assert precision.state_dict() == {}
        precision.load_state_dict({"scale": 4.0, "growth_tracker": 0})
        assert precision.scale == 1.0
    fresh = Precision("fp16", CPU)
    fresh.load_state_dict({})
    assert fresh.scale == 65536.0


@pytest.mark.parametrize(
    "saved",
    [{"scale": math.nan, "growth_tracker": 0}, {"scale": 0.0, "growth_tracker": 0}, {"scale": 1.0}, {"scale": "1"}],
)
def test_a_damaged_scale_is_refused(saved: dict[str, float | str]) -> None:
    """A scale that would ruin the gradients is an error, not a start."""
    with pytest.raises(CheckpointError, match="a scale above 0"):
        Precision("fp16", CPU).load_state_dict(saved)


@pytest.mark.parametrize("kind", ["fp8", "float16", "", None, 16, torch.float16])
def test_an_unknown_precision_is_refused(kind: object) -> None:
    """The error names the argument and the three that there are."""
    with pytest.raises(ArgumentError, match=r"Trainer\(precision=\) takes 'fp32', 'bf16' or 'fp16'"):
        Precision(kind, CPU)  # type: ignore[arg-type]


def test_a_device_that_cannot_is_refused() -> None:
    """torch would only warn and go on in float32."""
    with pytest.raises(ArgumentError, match=r"Trainer\(precision=\) takes what the device 'meta' can run"):
        Precision("bf16", torch.device("meta"))


def test_weights_in_float16_are_refused_with_fp16() -> None:
    """A scale needs float32 weights; the error says so, with the call that helps."""
    weight = torch.ones(1, dtype=torch.float16, requires_grad=True)
    precision = Precision("fp16", CPU)
    precision.backward(weight.float().sum())
    with pytest.raises(ArgumentError, match=r"weights in float32 .*Write: model.float\(\)"):
        precision.unscale([torch.optim.SGD([weight], lr=0.1)])
