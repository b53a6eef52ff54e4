"""Gradient clipping: one pass to measure, a second only where something is to be clipped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor
from typing_extensions import override

from ..engine import Algorithm, ArgumentError, Event, Stage, State, register
from .arguments import check_in_range, positive

_EXAMPLE = "GradClip(max_norm=1.0)"
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
        >>> gradient_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5.)
    """
    if not gradients:
        return torch.zeros(())
    try:
        norms = _norms(gradients, norm_type)
    except NotImplementedError:
        raise ArgumentError(
            "GradClip", got="a sparse gradient", takes="dense gradients", example="nn.Embedding(…, sparse=False)"
        ) from None
    total = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    gathered: Tensor = total.full_tensor() if hasattr(total, "full_tensor") else total  # DTensor: sharded weights
    return gathered


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[Tensor] | Tensor,
    *,
    max_norm: float | None = None,
    value: float | None = None,
    norm_type: float = 2.0,
) -> Tensor:
    """Clip the gradients of ``parameters`` in place, and return their norm before it.

    With ``max_norm`` all gradients are multiplied by ``max_norm / (norm + 1e-6)`` where that is below 1, with
    ``value`` every element is clamped to ``[-value, value]``; numbers as in ``torch.nn.utils.clip_grad_norm_`` and
    ``clip_grad_value_``. Nothing is written where nothing is to be clipped, nor where the norm is NaN or infinite:
    ``inf * 0`` would put NaN into every weight, and a clamped infinity would hide an overflow.

    Args:
        parameters: What trains; those without a gradient are passed over.
        max_norm: The largest norm that passes.
        value: The largest magnitude of an element that passes.
        norm_type: The p of the p-norm, above 0; ``math.inf`` is the largest magnitude.

    Returns:
        The norm, a scalar on the CPU: bringing it there is the only wait for the device.

    Raises:
        ArgumentError: Not exactly one of ``max_norm`` and ``value``, one that is not above 0, or sparse gradients.

    Source:
        Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", arXiv:1211.5063,
        algorithm 1.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_gradients([weight], max_norm=1.0), weight.grad
        (tensor(5.), tensor([0.6000, 0.8000]))
    """
    _check_limits("clip_gradients", max_norm, value, "clip_gradients(parameters, max_norm=1.0)")
    _check_norm_type("clip_gradients", norm_type, "clip_gradients(parameters, max_norm=1.0, norm_type=2.0)")
    each_parameter = [parameters] if isinstance(parameters, Tensor) else parameters
    return _clip([grad for each in each_parameter if (grad := each.grad) is not None], max_norm, value, norm_type)


def _clip(gradients: list[Tensor], max_norm: float | None, value: float | None, norm_type: float) -> Tensor:
    norm = gradient_norm(gradients, norm_type).cpu()
    if not math.isfinite(norm):
        return norm
    if max_norm is not None:
        coefficient = float(max_norm / (norm + _EPSILON))
        if coefficient < 1.0:
            torch._foreach_mul_(gradients, coefficient)  # pyright: ignore[reportPrivateImportUsage]
    elif value is not None and float(norm) > value:  # no element is larger than the norm
        torch._foreach_clamp_min_(gradients, -value)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_clamp_max_(gradients, value)  # pyright: ignore[reportPrivateImportUsage]
    return norm


@register
@attrs.define(slots=False, eq=False)
class GradClip(Algorithm):
    """Clips the gradients of what trains before each step, by :func:`clip_gradients`.

    The gradients are whole (all microbatches), reduced and unscaled by then. The norm before clipping becomes
    ``state.grad_norm`` and is logged as ``"grad_norm"``. Where it is NaN or infinite the gradients stay as they are and
    the Trainer's ``on_nonfinite`` decides about the step. Of two in a list the second measures what the first left.

    Args:
        max_norm: The largest norm of all gradients together.
        value: The largest magnitude of a gradient's element. Exactly one of ``max_norm`` and ``value`` is given.
        norm_type: The p of the p-norm, above 0; ``math.inf`` is the largest magnitude.

    Raises:
        ArgumentError: Not exactly one of ``max_norm`` and ``value``, or one that is not above 0.

    Source:
        arXiv:1211.5063, algorithm 1.

    Example:
        >>> GradClip(max_norm=1.0)
        GradClip(max_norm=1.0, value=None, norm_type=2.0)
    """

    stage: ClassVar[Stage] = Stage.GRADIENTS
    events = frozenset({Event.BEFORE_STEP})

    max_norm: float | None = attrs.field(default=None, validator=positive(example=1.0, or_none=True))
    value: float | None = attrs.field(default=None, validator=positive(example=0.5, or_none=True))
    norm_type: float = attrs.field(default=2.0)

    def __attrs_post_init__(self) -> None:
        _check_limits("GradClip", self.max_norm, self.value, _EXAMPLE)
        _check_norm_type("GradClip", self.norm_type, "GradClip(max_norm=1.0, norm_type=2.0)")

    @override
    def apply(self, event: Event, state: State) -> None:
        gradients = [grad for each in state.ledger.trainable_parameters if (grad := each.grad) is not None]
        with torch.no_grad():
            norm = float(_clip(gradients, self.max_norm, self.value, self.norm_type))
        state.grad_norm = norm
        state.log({"grad_norm": norm})


def _norms(gradients: Sequence[Tensor], norm_type: float) -> list[Tensor]:
    """Return the norm of each gradient, all on the device of the first."""
    norms: list[Tensor] = []
    for dtype in dict.fromkeys([each.dtype for each in gradients]):
        alike = [each for each in gradients if each.dtype is dtype]
        norms += torch._foreach_norm(alike, norm_type, dtype=_wide(dtype))  # pyright: ignore[reportPrivateImportUsage]
    device = norms[0].device
    return [each if each.device == device else each.to(device) for each in norms]


def _wide(dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype in which to take the norm of ``dtype``, None for its own."""
    return torch.float32 if dtype.itemsize < 4 else None


def _check_limits(call: str, max_norm: float | None, value: float | None, example: str) -> None:
    if (max_norm is None) == (value is None):
        got = {"max_norm": max_norm, "value": value}
        raise ArgumentError(f"{call}(max_norm=, value=)", got=got, takes="exactly one of the two", example=example)
    name, limit = ("max_norm", max_norm) if value is None else ("value", value)
    check_in_range(f"{call}({name}=)", limit, above=0, example=example)


def _check_norm_type(call: str, norm_type: float, example: str) -> None:
    if not (isinstance(norm_type, float) and norm_type == math.inf):
        check_in_range(f"{call}(norm_type=)", norm_type, above=0, example=example)
