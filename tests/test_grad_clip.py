"""GradClip against torch's own clipping, float64 and a loop by hand."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typing_extensions import override

from helpers import loader, mlp, pseudo_gradients, same_weights, weights
from thawline.algorithms.grad_clip import GradClip, clip_gradients, gradient_norm
from thawline.engine import Algorithm, ArgumentError, Engine, Event, NonFiniteError, ParameterLedger, State, Trainer

SHAPES = [(3, 4), (5,), (), (2, 1, 2)]


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[nn.Parameter]:
    """Return parameters with gradients, and one without."""
    generator = torch.Generator().manual_seed(seed)
    made = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    for each in made:
        each.grad = (torch.randn(each.shape, generator=generator) * scale).to(dtype)
    return [*made, nn.Parameter(torch.zeros(2))]


def gradients(given: list[nn.Parameter]) -> list[Tensor]:
    """Return the gradients that there are."""
    return [each.grad for each in given if each.grad is not None]


def state_of(model: nn.Module) -> State:
    """Return a state over the model, with plain SGD."""
    return State(model, ParameterLedger(model, partial(torch.optim.SGD, lr=0.1)))


class Spoil(Algorithm):
    """Puts a value into one gradient of one batch."""

    events = frozenset({Event.AFTER_BACKWARD})

    def __init__(self, value: float, batch: int = 1) -> None:
        self.value, self.batch = value, batch

    @override
    def apply(self, event: Event, state: State) -> None:
        """Spoil it."""
        if state.clock.batch == self.batch:
            grad = state.ledger.trainable_parameters[0].grad
            assert grad is not None
            grad.view(-1)[0] = self.value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e3])
def test_norm_clipping_equals_torch_bit_for_bit(dtype: torch.dtype, norm_type: float, max_norm: float) -> None:
    """Norm and gradients are those of clip_grad_norm_, clipped or not."""
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    norm = clip_gradients(ours, max_norm=max_norm, norm_type=norm_type)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs, max_norm, norm_type))
    assert all(map(torch.equal, gradients(ours), gradients(theirs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [1e-3, 0.5, 1e3])
def test_value_clipping_equals_torch_bit_for_bit(dtype: torch.dtype, value: float) -> None:
    """Gradients are those of clip_grad_value_, clipped or not."""
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    clip_gradients(ours, value=value)
    nn.utils.clip_grad_value_(theirs, value)
    assert all(map(torch.equal, gradients(ours), gradients(theirs)))


@given(seed=st.integers(0, 999), max_norm=st.floats(1e-3, 1e3), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_the_clipped_norm_is_the_limit_or_the_norm_itself(seed: int, max_norm: float, scale: float) -> None:
    """In float64: direction unchanged, length min(norm, max_norm * norm / (norm + 1e-6))."""
    given_ = parameters(seed, torch.float64, scale)
    before = np.concatenate([each.numpy().ravel() for each in gradients(given_)])
    length = float(np.sqrt(np.sum(before**2)))
    assert float(clip_gradients(given_, max_norm=max_norm)) == pytest.approx(length, rel=1e-12)
    after = np.concatenate([each.numpy().ravel() for each in gradients(given_)])
    np.testing.assert_allclose(after, before * min(1.0, max_norm / (length + 1e-6)), rtol=1e-12)


@pytest.mark.parametrize("limits", [{"max_norm": 1e3}, {"value": 1e3}], ids=str)
def test_gradients_within_the_limit_are_not_written(limits: dict[str, float]) -> None:
    """Where nothing is to be clipped, the second pass over the gradients does not happen."""
    given_ = parameters()
    versions = [each._version for each in gradients(given_)]
    clip_gradients(given_, **limits)
    assert [each._version for each in gradients(given_)] == versions


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "limits", [{"max_norm": 1.0}, {"value": 0.1}, {"max_norm": 1.0, "norm_type": math.inf}], ids=str
)
def test_a_norm_that_is_not_finite_leaves_the_gradients_alone(bad: float, limits: dict[str, float]) -> None:
    """Neither NaN through inf * 0 nor a clamped infinity that hides the overflow."""
    given_ = parameters()
    gradients(given_)[1][2] = bad
    before = [each.clone() for each in gradients(given_)]
    norm = clip_gradients(given_, **limits)
    assert not math.isfinite(norm)
    for each, same in zip(gradients(given_), before, strict=True):
        torch.testing.assert_close(each, same, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_of_half_precision_is_taken_in_float32(dtype: torch.dtype) -> None:
    """Its square would overflow float16, and bfloat16 would keep three digits of it."""
    grads = [torch.full((100,), 30000.0, dtype=dtype), torch.full((7,), 3.0, dtype=dtype)]
    norm = gradient_norm(grads)
    exact = math.sqrt(sum(float((each.double() ** 2).sum()) for each in grads))
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(exact, rel=1e-6)


def test_gradients_of_several_dtypes_are_clipped_as_one_vector() -> None:
    """A model in bfloat16 with norms in float32 and a float64 head has one norm."""
    given_ = [nn.Parameter(torch.zeros(4, dtype=each)) for each in (torch.bfloat16, torch.float32, torch.float64)]
    for each in given_:
        each.grad = torch.full_like(each, 2.0)
    assert float(clip_gradients(given_, max_norm=1.0)) == pytest.approx(math.sqrt(48))
    assert float(gradient_norm(gradients(given_))) == pytest.approx(1.0, rel=1e-2)


def test_one_parameter_and_no_gradients_are_taken_as_torch_takes_them() -> None:
    """A single tensor instead of a list; a norm of zero where nothing has a gradient."""
    one = parameters()[0]
    clip_gradients(one, max_norm=0.5)
    assert float(gradient_norm(gradients([one]))) == pytest.approx(0.5, rel=1e-5)
    assert float(clip_gradients([nn.Parameter(torch.zeros(2))], max_norm=1.0)) == 0.0


def test_only_what_trains_is_measured() -> None:
    """A gradient that somebody computed for a frozen parameter neither counts nor changes."""
    model = mlp()
    state = state_of(model)
    state.ledger.freeze("blocks[0]", owner="test")
    pseudo_gradients(state.ledger.trainable_parameters, seed=1)
    frozen = state.ledger.parameters["0.weight"]
    frozen.grad = torch.full_like(frozen, 100.0)
    exact = math.sqrt(
        sum(
            float((each.grad.double() ** 2).sum())
            for each in state.ledger.trainable_parameters
            if each.grad is not None
        )
    )
    Engine([GradClip(max_norm=0.1)], state).emit(Event.BEFORE_STEP)
    assert state.grad_norm == pytest.approx(exact, rel=1e-6)
    assert state.metrics["grad_norm"] == state.grad_norm
    assert torch.equal(frozen.grad, torch.full_like(frozen, 100.0))


@pytest.mark.parametrize("limits", [{"max_norm": 0.05}, {"value": 0.01}], ids=str)
def test_a_fit_equals_the_loop_by_hand_bit_for_bit(limits: dict[str, Any]) -> None:
    """Clipped are the whole batch's gradients, over all microbatches, once, just before the step."""
    torch.manual_seed(3)
    model = mlp()
    plain = copy.deepcopy(model)
    batches = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(6)]
    optimizer = partial(torch.optim.SGD, lr=0.5, momentum=0.9)
    Trainer(
        algorithms=[GradClip(**limits)], optimizer=optimizer, loss_fn=cross_entropy, microbatch_size=4, progress=False
    ).fit(model, batches, duration="6ba")
    by_hand = optimizer(plain.parameters())
    for x, y in batches:
        for half in (slice(0, 4), slice(4, 8)):
            torch.autograd.backward(cross_entropy(plain(x[half]), y[half]) * 0.5)
        if "value" in limits:
            nn.utils.clip_grad_value_(plain.parameters(), limits["value"])
        else:
            nn.utils.clip_grad_norm_(plain.parameters(), limits["max_norm"])
        by_hand.step()
        by_hand.zero_grad()
    assert same_weights(weights(model), weights(plain))


def test_gradients_of_fp16_are_unscaled_before_they_are_measured() -> None:
    """The norm is that of full precision, not 65536 times as much."""
    norms: list[float] = []
    torch.manual_seed(3)
    model = mlp()
    for precision in ("fp32", "fp16"):
        fit = Trainer(algorithms=[GradClip(max_norm=0.05)], loss_fn=cross_entropy, precision=precision, progress=False)
        norms.append(fit.fit(copy.deepcopy(model), loader(), duration="1ba").metrics["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


@pytest.mark.parametrize("clip", [GradClip(max_norm=1.0), GradClip(value=0.1)], ids=str)
def test_an_infinite_gradient_raises_by_default_and_is_skipped_on_request(clip: GradClip) -> None:
    """The finite loss does not tell; the norm does, and the Trainer's policy decides. No weight turns NaN."""
    fit = partial(Trainer, loss_fn=cross_entropy, progress=False)
    model = mlp()
    with pytest.raises(NonFiniteError, match="gradient norm is inf"):
        fit(algorithms=[Spoil(math.inf), clip]).fit(model, loader(), duration="4ba")
    fit(algorithms=[Spoil(math.inf), clip], on_nonfinite="skip").fit(model, loader(), duration="4ba")
    assert all(bool(each.isfinite().all()) for each in model.parameters())


def test_a_sparse_gradient_is_refused_by_name() -> None:
    """The error says which layer makes them."""
    embedding = nn.Embedding(4, 2, sparse=True)
    torch.autograd.backward(embedding(torch.tensor([1, 1])).sum())
    with pytest.raises(ArgumentError, match="sparse=False"):
        clip_gradients(embedding.parameters(), max_norm=1.0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "exactly one of the three, got 'none'"),
        ({"max_norm": 1.0, "value": 1.0}, "exactly one of the three, got 'max_norm=1.0, value=1.0"),
        ({"max_norm": 0.0}, "got 0.0"),
        ({"max_norm": -1}, "above 0"),
        ({"max_norm": 10**400}, "above 0"),
        ({"max_norm": 1.0, "norm_type": 10**400}, "norm_type=) takes"),
        ({"max_norm": math.inf}, "above 0"),
        ({"max_norm": math.nan}, "above 0"),
        ({"max_norm": "1"}, "got '1'"),
        ({"max_norm": True}, "got True"),
        ({"value": 0}, "above 0"),
        ({"max_norm": 1.0, "norm_type": 0}, "norm_type="),
        ({"max_norm": 1.0, "norm_type": math.nan}, "norm_type="),
        ({"max_norm": 1.0, "norm_type": "two"}, "norm_type="),
        ({"max_norm": 1.0, "norm_type": torch.zeros(3)}, "norm_type="),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_by_class_and_function(arguments: dict[str, Any], says: str) -> None:
    """A ValueError that says what was got, what is taken, and a corrected call."""
    with pytest.raises(ArgumentError, match="Write: GradClip") as refused:
        GradClip(**arguments)
    assert says in str(refused.value)
    with pytest.raises(ArgumentError, match="Write: clip_gradients") as refused:
        clip_gradients(parameters(), **arguments)
    assert says in str(refused.value)


def test_it_is_described_and_rebuilt() -> None:
    """The description holds the arguments, and makes an equal algorithm."""
    clip = GradClip(value=0.5)
    again = Algorithm.from_description(clip.describe())
    assert clip.describe() == again.describe()
    assert clip.describe()["arguments"] == {
        "max_norm": None, "value": 0.5, "norm_type": 2.0, "adaptive": None, "floor": 1e-3, "per_layer": False,
    }  # fmt: skip


@pytest.mark.parametrize("factor", [0.01, 0.2])
def test_adaptive_clipping_is_that_of_the_paper(factor: float) -> None:
    """Unit by unit, in float64, the floor on the weight's norm included; conv filters, rows, vectors and scalars."""
    torch.manual_seed(0)
    shapes = [(4, 3), (5, 2, 3, 3), (6,), ()]
    given = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    with torch.no_grad():
        given[0][1] = 0  # counts as the floor
    for each in given:
        each.grad = torch.randn_like(each)
    wanted: list[Tensor] = []
    for each in given:
        grad = gradients([each])[0].clone()
        for unit in range(len(grad)) if grad.ndim > 1 else [...]:
            limit = factor * max(float(each.detach()[unit].norm()), 1e-3)  # type: ignore[index]  # an index or all
            length = float(grad[unit].norm())  # type: ignore[index]  # as above
            grad[unit] *= min(1.0, limit / length)  # type: ignore[index]  # as above
        wanted.append(grad)
    before = torch.cat([each.flatten() for each in gradients(given)]).norm()
    norm = clip_gradients(given, adaptive=factor)
    torch.testing.assert_close(norm, before)
    for mine, theirs in zip(gradients(given), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)


def test_layers_are_clipped_for_themselves() -> None:
    """Each as torch clips it alone; the norm that is logged is that of all."""
    torch.manual_seed(0)
    model = mlp()
    state = state_of(model)
    for each in model.parameters():
        each.grad = torch.randn_like(each)
    twin = copy.deepcopy(model)
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        mine.grad = None if theirs.grad is None else theirs.grad.clone()
    clip = GradClip(max_norm=1.5, per_layer=True)
    clip.apply(Event.BEFORE_STEP, state)
    total = torch.linalg.vector_norm(torch.cat([each.flatten() for each in gradients(list(twin.parameters()))]))
    assert state.grad_norm == pytest.approx(float(total))
    for layer in (0, 2, 4):
        torch.nn.utils.clip_grad_norm_(twin[layer].parameters(), 1.5)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_per_layer_follows_what_trains_and_needs_max_norm() -> None:
    """A frozen layer is left out at the next step; without max_norm it is refused."""
    model = mlp()
    state = state_of(model)
    clip = GradClip(max_norm=0.1, per_layer=True)
    for _ in range(2):
        for each in model.parameters():
            each.grad = torch.ones_like(each) if each.requires_grad else None
        clip.apply(Event.BEFORE_STEP, state)
        model.zero_grad()
        state.ledger.freeze("blocks[0]", owner="me")
    assert state.grad_norm == pytest.approx(30**0.5)
    with pytest.raises(ArgumentError, match=r"GradClip\(per_layer=\) takes max_norm= beside it"):
        GradClip(value=1.0, per_layer=True)
