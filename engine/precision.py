"""Precision, decided once a fit: what the forward pass runs in, and how gradients are scaled."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, ParamSpec, TypeAlias, TypeVar

import torch
from attrs import define, field
from torch import Tensor
from torch.optim import Optimizer

from .errors import ArgumentError, CheckpointError
from .typing import Json

PrecisionKind: TypeAlias = Literal["fp32", "bf16", "fp16"]

P = ParamSpec("P")
T = TypeVar("T")
_ARGUMENT = "Trainer(precision=)"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A disabled autocast costs ten times as much as this.
_NOTHING: AbstractContextManager[None] = nullcontext()


@define(eq=False, init=False)
class Precision:
    """The precision of a fit: ``"fp32"``, ``"bf16"`` under autocast, or ``"fp16"`` under autocast with a gradient scaler.

    A step is ``autocast``, ``backward``, ``unscale``, ``step``. Weights stay in their own precision: Micikevicius et
    al., Mixed Precision Training (2018), sections 3.1 and 3.2.

    Args:
        kind: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        device: Where the model lies.

    Raises:
        ArgumentError: Another kind, or one that the device cannot run.

    Example:
        >>> weight = torch.ones(1, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> precision = Precision("bf16", torch.device("cpu"))
        >>> with precision.autocast():
        ...     loss = (weight * 3).sum()
        >>> precision.backward(loss)
        >>> precision.unscale([optimizer])
        >>> precision.step([optimizer]), weight.item()
        (True, -0.5)
    """

    kind: PrecisionKind
    device: torch.device
    _context: AbstractContextManager[object] = field(repr=False)
    _scaler: torch.amp.GradScaler | None = field(repr=False)
    _unscaled: bool = field(repr=False)

    def __init__(self, kind: PrecisionKind, device: torch.device) -> None:
        if not isinstance(kind, str) or kind not in _DTYPES:
            raise ArgumentError(
                _ARGUMENT, got=kind, takes="'fp32', 'bf16' or 'fp16'", example="Trainer(precision='bf16')"
            )
        self.kind = kind
        self.device = device
        self._context = _NOTHING if kind == "fp32" else _autocast(kind, device)
        self._scaler = torch.amp.GradScaler(device.type) if kind == "fp16" else None
        self._unscaled = False

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which the forward pass and the loss are computed; one object, not to be nested."""
        return self._context

    def autocasted(self, function: Callable[P, T]) -> Callable[P, T]:
        """Return a function that runs in :meth:`autocast`: ``function`` itself where that is nothing."""
        return function if self._context is _NOTHING else self._context(function)  # type: ignore[operator]

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``, a scalar, to the parameters' ``.grad``: times :attr:`scale` with fp16."""
        if self._scaler is not None:
            self._unscaled = False
            loss = self._scaler.scale(loss)
        loss.backward()  # type: ignore[no-untyped-call]

    def unscale(self, optimizers: Sequence[Optimizer]) -> None:
        """Divide the gradients by the scale, once a step, so that they can be clipped and read.

        Args:
            optimizers: Every optimizer of the fit.

        Raises:
            ArgumentError: With fp16, weights that are float16 themselves: they leave no room for a scale.
        """
        if self._scaler is None or self._unscaled:
            return
        for optimizer in optimizers:
            try:
                self._scaler.unscale_(optimizer)
            except ValueError as error:
                raise ArgumentError(
                    _ARGUMENT,
                    got=self.kind,
                    takes="weights in float32 with 'fp16': these have float16 gradients, which cannot be unscaled",
                    example="model.float(), or Trainer(precision='bf16')",
                ) from error
        self._unscaled = True

    def step(self, optimizers: Sequence[Optimizer]) -> bool:
        """Step the optimizers, or with fp16 none of them where any gradient overflowed.

        Args:
            optimizers: Every optimizer of the fit; their gradients are unscaled here where they were not before.

        Returns:
            Whether the optimizers moved.
        """
        if self._scaler is None:
            for optimizer in optimizers:
                optimizer.step()
            return True
        self.unscale(optimizers)
        self._unscaled = False
        # GradScaler.step decides for each optimizer by itself, which would move one half of the model and not the other.
        overflows = list(self._overflows(optimizers))
        moved = not any(flag.item() for flag in overflows)
        if moved:
            for optimizer in optimizers:
                optimizer.step()
        if overflows:
            self._scaler.update()
        return moved

    @property
    def scale(self) -> float:
        """What gradients are multiplied with between ``backward`` and ``unscale``; 1 without a scaler."""
        return 1.0 if self._scaler is None else self._scaler.get_scale()

    def state_dict(self) -> dict[str, Json]:
        """Return what a resumed fit needs: the scaler's scale and how long it went without an overflow."""
        if self._scaler is None:
            return {}
        state = self._scaler.state_dict()
        return {"scale": float(state["scale"]), "growth_tracker": int(state["_growth_tracker"])}

    def load_state_dict(self, saved: Mapping[str, Json]) -> None:
        """Continue from ``saved``. What another precision saved is nothing to this one: the scaler starts anew.

        Args:
            saved: What :meth:`state_dict` returned.

        Raises:
            CheckpointError: The scale is not a finite number above 0, or the count is not a whole one.
        """
        if self._scaler is None or not saved:
            return
        scale, tracker = saved.get("scale"), saved.get("growth_tracker")
        if not isinstance(scale, float) or not 0 < scale < math.inf or not isinstance(tracker, int) or tracker < 0:
            raise CheckpointError(
                f"the gradient scaler's state is a scale above 0 and a count of steps, got {dict(saved)!r}. "
                "Resume from an older checkpoint."
            )
        self._scaler.load_state_dict({**self._scaler.state_dict(), "scale": scale, "_growth_tracker": tracker})

    def _overflows(self, optimizers: Iterable[Optimizer]) -> Iterable[Tensor]:
        """Yield a flag for each device of each optimizer that has gradients: above 0 where one of them is inf or NaN."""
        assert self._scaler is not None
        for optimizer in optimizers:
            # No public way leads to the flags; torch's own sharded scaler reads them here, too.
            states = self._scaler._per_optimizer_states
            yield from states[id(optimizer)]["found_inf_per_device"].values()


def _autocast(kind: PrecisionKind, device: torch.device) -> AbstractContextManager[object]:
    """Return the autocast context of ``kind``, refusing what torch would turn off with only a warning."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return torch.autocast(device.type, dtype=_DTYPES[kind])
    except (RuntimeError, UserWarning) as error:
        other = "bf16" if kind == "fp16" and torch.amp.is_autocast_available(device.type) else "fp32"
        takes = f"what the device {str(device)!r} can run ({str(error).strip().rstrip('.')})"
        raise ArgumentError(_ARGUMENT, got=kind, takes=takes, example=f"Trainer(precision={other!r})") from error
