"""Gradient clipping: one pass to measure, a second only where something is to be clipped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor
from typing_extensions import override

from ..engine import Algorithm, ArgumentError, Event, Stage, State, register, unsharded
from .arguments import check_in_range, flag, positive

# As in torch.nn.utils.clip_grad_norm_, so that both scale by the same number.
_EPSILON = 1e-6


@torch.no_grad()
def gradient_norm(gradients: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """Return the norm of all gradients, as if they were one vector.

    Args:
        gradients: Dense tensors of any shape, dtype and device.
        norm_type: The p of the p-norm, above 0; ``math.inf`` is the largest magnitude.

    Returns:
        A scalar on the device of the first gradient. The norm of float16 and bfloat16 is taken in float32:
        in float16 a norm above 65504 would be infinite.

    Raises:
        ArgumentError: A gradient is sparse.

    Example:
        >>> gradient_norm([torch.tensor([3.0]), torch.tensor([[-4.0]])])
        tensor(5.)
        >>> gradient_norm([torch.tensor([3.0]), torch.tensor([[-4.0]])], math.inf)
        tensor(4.)
        >>> gradient_norm([torch.full((4,), 40000.0, dtype=torch.float16)])
        tensor(80000.)
        >>> gradient_norm([])
        tensor(0.)
        >>> gradient_norm([torch.ones(2).to_sparse()])
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: GradClip takes dense gradients, got 'a sparse gradient'. Write: nn.Embedding(…, sparse=False)
    """
    if not gradients:
        return torch.zeros(())
    try:
        norms = _norms(list(gradients), norm_type)
    except NotImplementedError:
        raise ArgumentError(
            "GradClip", got="a sparse gradient", takes="dense gradients", example="nn.Embedding(…, sparse=False)"
        ) from None
    total = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return unsharded(total)


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[Tensor] | Tensor,
    *,
    max_norm: float | None = None,
    value: float | None = None,
    adaptive: float | None = None,
    norm_type: float = 2.0,
    floor: float = 1e-3,
) -> Tensor:
    """Clip the gradients of ``parameters`` in place, and return their norm before it.

    With ``max_norm`` all gradients are multiplied by ``max_norm / (norm + 1e-6)`` where that is below 1, with
    ``value`` every element is clamped to ``[-value, value]``; numbers as in ``torch.nn.utils.clip_grad_norm_`` and
    ``clip_grad_value_``. With ``adaptive`` each unit of a weight, a row or a filter, is limited by its own norm, by
    :func:`clip_adaptively`. Nothing is written where nothing is to be clipped, nor where the norm is NaN or infinite:
    ``inf * 0`` would put NaN into every weight, and a clamped infinity would hide an overflow.

    Args:
        parameters: What trains; those without a gradient are passed over.
        max_norm: The largest norm that passes.
        value: The largest magnitude of an element that passes.
        adaptive: The largest norm of a unit's gradient over that of its weight.
        norm_type: The p of the p-norm, above 0; ``math.inf`` is the largest magnitude.
        floor: What the norm of a unit's weight counts at least, for ``adaptive``.

    Returns:
        The norm, a scalar on the CPU: bringing it there is the only wait for the device.

    Raises:
        ArgumentError: Not exactly one of ``max_norm``, ``value`` and ``adaptive``, one that is not above 0, or sparse
            gradients.

    Source:
        Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", arXiv:1211.5063,
        algorithm 1.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_gradients([weight], max_norm=8.0), weight.grad
        (tensor(5.), tensor([3., 4.]))
        >>> clip_gradients([weight], max_norm=1.0), weight.grad
        (tensor(5.), tensor([0.6000, 0.8000]))
        >>> weight.grad = torch.tensor([-3.0, 0.5])
        >>> clip_gradients(weight, value=1.0), weight.grad
        (tensor(3.0414), tensor([-1.0000,  0.5000]))
        >>> weight.grad = torch.tensor([math.inf, 4.0])
        >>> clip_gradients([weight, torch.zeros(2)], max_norm=1.0), weight.grad
        (tensor(inf), tensor([inf, 4.]))
    """
    limits = _Limits(max_norm, value, adaptive, norm_type, floor)
    limits.check("clip_gradients", "clip_gradients(parameters, max_norm=1.0")
    each_parameter = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    return _clip(each_parameter, limits)


@torch.no_grad()
def clip_adaptively(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], factor: float, *, floor: float = 1e-3
) -> None:
    """Limit the norm of each unit's gradient to ``factor`` times that of its weight, in place.

    A unit is what belongs to one output: a row of a matrix, a filter of a convolution; of vectors and scalars the whole.

    Args:
        weights: The weights.
        gradients: Theirs, of the same shapes.
        factor: Above 0; the paper takes 0.01 to 0.16.
        floor: What the norm of a weight counts at least, so that those that begin at zero can learn.

    Source: Brock, De, Smith, Simonyan, High-Performance Large-Scale Image Recognition Without Normalization, equation 3,
        arXiv:2102.06171.

    Example:
        >>> weight, gradient = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 2.0]])
        >>> clip_adaptively([weight], [gradient], 0.1)
        >>> gradient
        tensor([[0.0000e+00, 5.0000e-01],
                [0.0000e+00, 1.0000e-04]])
    """
    for weight, gradient in zip(weights, gradients, strict=True):
        limit = _unit_norm(weight).clamp_(min=floor).mul_(factor)
        norm = _unit_norm(gradient)
        scale = torch.where(norm > limit, limit / norm.clamp(min=1e-6), 1.0)
        gradient.mul_(scale.to(gradient.dtype))


@torch.no_grad()
def clip_by_layer(layers: Sequence[Sequence[Tensor]], max_norm: float, *, norm_type: float = 2.0) -> Tensor:
    """Clip the gradients of each layer in place so that its own norm is at most ``max_norm``.

    Args:
        layers: The gradients, layer by layer; none is empty.
        max_norm: The largest norm of a layer's gradients together.
        norm_type: The p of the p-norm.

    Returns:
        The norm of all gradients before, a scalar on the CPU.

    Example:
        >>> first, second = torch.tensor([3.0, 4.0]), torch.tensor([0.5])
        >>> clip_by_layer([[first], [second]], 1.0).round(decimals=3), first, second
        (tensor(5.0250), tensor([0.6000, 0.8000]), tensor([0.5000]))
        >>> clip_by_layer([[first], [torch.tensor([math.inf])]], 0.1), first
        (tensor(inf), tensor([0.6000, 0.8000]))
        >>> clip_by_layer([], 1.0)
        tensor(0.)
    """
    if not layers:
        return torch.zeros(())
    found = [gradient_norm(each, norm_type) for each in layers]
    norms = torch.stack([each.to(found[0].device) for each in found]).cpu()
    total: Tensor = torch.linalg.vector_norm(norms, norm_type)
    if math.isfinite(total):
        for gradients, coefficient in zip(layers, (max_norm / (norms + _EPSILON)).tolist(), strict=True):
            if coefficient < 1.0:
                torch._foreach_mul_(list(gradients), coefficient)  # pyright: ignore[reportPrivateImportUsage]
    return total


@attrs.frozen
class _Limits:
    """What is clipped, and by how much."""

    max_norm: float | None
    value: float | None
    adaptive: float | None
    norm_type: float
    floor: float

    def check(self, call: str, example: str) -> None:
        """Raise an ArgumentError where a limit is wrong, or not exactly one is given.

        Example:
            >>> _Limits(None, None, 0.01, norm_type=math.inf, floor=1e-3).check("GradClip", "GradClip(max_norm=1.0")
            >>> GradClip(max_norm=1.0, value=0.5)
            Traceback (most recent call last):
            thawline.engine.errors.ArgumentError: GradClip(max_norm=, value=, adaptive=) takes exactly one of the three, got 'max_norm=1.0, value=0.5'. Write: GradClip(max_norm=1.0)
            >>> clip_gradients([], max_norm=1.0, norm_type=0.0)
            Traceback (most recent call last):
            thawline.engine.errors.ArgumentError: clip_gradients(norm_type=) takes a number above 0, got 0.0. Write: clip_gradients(parameters, max_norm=1.0, norm_type=2.0)
            >>> clip_gradients([], adaptive=0.01, floor=0.0)
            Traceback (most recent call last):
            thawline.engine.errors.ArgumentError: clip_gradients(floor=) takes a number above 0, got 0.0. Write: clip_gradients(adaptive=0.01, floor=1e-3)
        """
        given = {
            name: limit
            for name, limit in (("max_norm", self.max_norm), ("value", self.value), ("adaptive", self.adaptive))
            if limit is not None
        }
        if len(given) != 1:
            got = ", ".join(f"{name}={limit}" for name, limit in given.items()) or "none"
            takes = "exactly one of the three"
            raise ArgumentError(f"{call}(max_norm=, value=, adaptive=)", got=got, takes=takes, example=f"{example})")
        ((name, limit),) = given.items()
        check_in_range(f"{call}({name}=)", limit, above=0, example=f"{example})")
        check_in_range(f"{call}(floor=)", self.floor, above=0, example=f"{call}(adaptive=0.01, floor=1e-3)")
        if not (isinstance(self.norm_type, float) and self.norm_type == math.inf):
            check_in_range(f"{call}(norm_type=)", self.norm_type, above=0, example=f"{example}, norm_type=2.0)")


def _clip(parameters: Sequence[Tensor], limits: _Limits) -> Tensor:
    """Clip the gradients of those parameters that have one.

    Example:
        >>> weight, other = torch.tensor([[3.0, 4.0]], requires_grad=True), torch.ones(2)
        >>> weight.grad = torch.tensor([[0.0, 2.0]])
        >>> _clip([weight, other], _Limits(None, None, 0.1, 2.0, 1e-3)), weight.grad, other.grad
        (tensor(2.), tensor([[0.0000, 0.5000]]), None)
    """
    gradients = [grad for each in parameters if (grad := each.grad) is not None]
    norm = gradient_norm(gradients, limits.norm_type).cpu()
    if not math.isfinite(norm):
        return norm
    if limits.max_norm is not None:
        coefficient = float(limits.max_norm / (norm + _EPSILON))
        if coefficient < 1.0:
            torch._foreach_mul_(gradients, coefficient)  # pyright: ignore[reportPrivateImportUsage]
    elif limits.value is not None:
        if float(norm) > limits.value:  # no element is larger than the norm
            torch._foreach_clamp_min_(gradients, -limits.value)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_clamp_max_(gradients, limits.value)  # pyright: ignore[reportPrivateImportUsage]
    elif limits.adaptive is not None:
        trained = [each for each in parameters if each.grad is not None]
        clip_adaptively(trained, gradients, limits.adaptive, floor=limits.floor)
    return norm


def _unit_norm(tensor: Tensor) -> Tensor:
    """Return the norm of each row or filter, shaped to divide by; of a vector or scalar that of the whole.

    Example:
        >>> _unit_norm(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([[5.],
                [2.]])
        >>> _unit_norm(torch.tensor([3.0, 4.0])), _unit_norm(torch.ones(8, 1, 2, 2)).shape
        (tensor(5.), torch.Size([8, 1, 1, 1]))
    """
    dims = tuple(range(1, tensor.ndim)) if tensor.ndim > 1 else None
    norm: Tensor = torch.linalg.vector_norm(tensor, 2, dims, keepdim=dims is not None, dtype=_wide(tensor.dtype))
    return norm if dims else unsharded(norm)  # a row lies whole on one rank, a vector does not


@register
@attrs.define(slots=False, eq=False)
class GradClip(Algorithm):
    """Clips the gradients of what trains before each step, by :func:`clip_gradients`.

    The gradients are whole (all microbatches), reduced and unscaled by then. The norm before clipping becomes
    ``state.grad_norm`` and is logged as ``"grad_norm"``. Where it is NaN or infinite the gradients stay as they are and
    the Trainer's ``on_nonfinite`` decides about the step. Of two in a list the second measures what the first left.

    Args:
        max_norm: The largest norm of all gradients together.
        value: The largest magnitude of a gradient's element.
        norm_type: The p of the p-norm, above 0; ``math.inf`` is the largest magnitude.
        adaptive: The largest norm of a unit's gradient over that of its weight, where a unit is a row of a matrix or a
            filter of a convolution; see :func:`clip_adaptively`. Exactly one of ``max_norm``, ``value`` and ``adaptive`` is given.
        floor: What the norm of a unit's weight counts at least, for ``adaptive``.
        per_layer: Let ``max_norm`` limit each layer's gradients for themselves.

    Raises:
        ArgumentError: Not exactly one of ``max_norm``, ``value`` and ``adaptive``, one that is not above 0, or ``per_layer``
            without ``max_norm``.

    Source:
        arXiv:1211.5063, algorithm 1; adaptive: Brock et al., arXiv:2102.06171, equation 3.

    Example:
        >>> from thawline.engine import Trainer, on
        >>> from thawline.engine.testing import tiny_loader, tiny_models
        >>> norms = []
        >>> @on(Event.BEFORE_STEP)
        ... def note_norm(state):
        ...     norms.append(round(float(gradient_norm([each.grad for each in state.ledger.trainable_parameters])), 4))
        >>> trainer = Trainer(loss_fn=torch.nn.functional.cross_entropy, algorithms=[GradClip(max_norm=0.1), note_norm()])
        >>> result = trainer.fit(tiny_models()["residual"](), tiny_loader(), duration="3ba")
        >>> norms
        [0.1, 0.1, 0.1]
        >>> trainer = Trainer(loss_fn=torch.nn.functional.cross_entropy, algorithms=[GradClip(max_norm=0.01, per_layer=True), note_norm()])
        >>> result = trainer.fit(tiny_models()["residual"](), tiny_loader(), duration="1ba")
        >>> norms[-1] <= round(0.01 * 5**0.5, 4)  # five layers, each clipped by itself
        True
        >>> result.metrics["grad_norm"] > 0.1  # the norm before
        True
        >>> GradClip(1.0)
        GradClip(max_norm=1.0, value=None, norm_type=2.0, adaptive=None, floor=0.001, per_layer=False)
        >>> GradClip(value=1.0, per_layer=True)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: GradClip(per_layer=) takes max_norm= beside it, got True. Write: GradClip(max_norm=1.0, per_layer=True)
    """

    stage: ClassVar[Stage] = Stage.GRADIENTS
    events = frozenset({Event.BEFORE_STEP})

    max_norm: float | None = attrs.field(default=None, validator=positive(example=1.0, or_none=True))
    value: float | None = attrs.field(default=None, validator=positive(example=0.5, or_none=True))
    norm_type: float = attrs.field(default=2.0)
    adaptive: float | None = attrs.field(default=None, validator=positive(example=0.01, or_none=True))
    floor: float = attrs.field(default=1e-3, validator=positive())
    per_layer: bool = attrs.field(default=False, validator=flag())
    _limits: _Limits = attrs.field(init=False, repr=False)
    _layers: list[list[Tensor]] = attrs.field(init=False, factory=list, repr=False)
    _version: int | None = attrs.field(init=False, default=None, repr=False)

    def __attrs_post_init__(self) -> None:
        self._limits = _Limits(self.max_norm, self.value, self.adaptive, self.norm_type, self.floor)
        self._limits.check("GradClip", "GradClip(max_norm=1.0")
        if self.per_layer and self.max_norm is None:
            takes, example = "max_norm= beside it", "GradClip(max_norm=1.0, per_layer=True)"
            raise ArgumentError("GradClip(per_layer=)", got=True, takes=takes, example=example)

    @override
    def apply(self, event: Event, state: State) -> None:
        with torch.no_grad():
            if self.per_layer and self.max_norm is not None:
                found = clip_by_layer(self._gathered(state), self.max_norm, norm_type=self.norm_type)
            else:
                found = _clip(state.ledger.trainable_parameters, self._limits)
        norm = float(found)
        state.grad_norm = norm
        state.log({"grad_norm": norm})

    @override
    def close(self) -> None:
        self._layers, self._version = [], None

    def _gathered(self, state: State) -> list[list[Tensor]]:
        """Return the gradients there are, layer by layer.

        Example:
            >>> from thawline.engine import ParameterLedger
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
            >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters())))
            >>> clipping = GradClip(max_norm=1.0, per_layer=True)
            >>> model[2](torch.ones(1, 2)).sum().backward()
            >>> [len(gradients) for gradients in clipping._gathered(state)]
            [2]
            >>> model(torch.ones(1, 2)).sum().backward()
            >>> [len(gradients) for gradients in clipping._gathered(state)]
            [2, 2]
            >>> state.ledger.freeze("0.bias", owner="me")
            >>> [len(gradients) for gradients in clipping._gathered(state)]
            [1, 2]
        """
        if state.ledger.version != self._version:
            parameters, trainable = state.ledger.parameters, state.ledger.trainable
            layers: Iterable[list[Tensor]] = (
                [parameters[name] for name in layer.parameters if name in trainable] for layer in state.layers
            )
            self._layers, self._version = [each for each in layers if each], state.ledger.version
        gradients = ([grad for each in layer if (grad := each.grad) is not None] for layer in self._layers)
        return [each for each in gradients if each]


def _norms(gradients: list[Tensor], norm_type: float) -> list[Tensor]:
    """Return the norm of each gradient, all on the device of the first; those of one dtype together.

    Example:
        >>> _norms([torch.ones(4), torch.ones(9, dtype=torch.bfloat16), torch.ones(16)], 2.0)
        [tensor(2.), tensor(4.), tensor(3.)]
    """
    norms: list[Tensor] = []
    if math.isinf(norm_type):  # a rank's rows may be none, and nothing is the largest of them
        gradients = [unsharded(each) for each in gradients]
    dtypes = dict.fromkeys([each.dtype for each in gradients])
    for dtype in dtypes:
        alike = gradients if len(dtypes) == 1 else [each for each in gradients if each.dtype is dtype]
        norms += torch._foreach_norm(alike, norm_type, dtype=_wide(dtype))  # pyright: ignore[reportPrivateImportUsage]
    if len({each.device for each in norms}) == 1:
        return norms
    return [each.to(norms[0].device) for each in norms]


def _wide(dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype in which to take the norm of ``dtype``, None for its own.

    Example:
        >>> _wide(torch.float16), _wide(torch.float32), _wide(torch.float64)
        (torch.float32, None, None)
    """
    return torch.float32 if dtype.itemsize < 4 else None
