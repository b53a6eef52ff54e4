"""FreezeOut: each layer's learning rate anneals to zero at a time of its own, the lowest first, and the layer freezes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import attrs
from typing_extensions import override

from ..engine import Algorithm, Event, Schedule, Stage, State, constant, cosine, get_logger, join, register
from .arguments import check_in_range, check_whole, flag, in_range
from .train_only import warn_of_frozen_trunk

log = get_logger(__name__)


def freeze_out_times(layers: int, *, t_0: float = 0.8, cubed: bool = True) -> tuple[float, ...]:
    """Return the share of the fit at which each layer freezes, from the input side: linear from ``t_0`` to 1.

    Args:
        layers: Number of layers.
        t_0: Of the first layer, above 0, up to 1.
        cubed: Whether each time is cubed, so that the lower layers freeze earlier still.

    Raises:
        ArgumentError: An argument out of range.

    Source: Brock et al., FreezeOut, arXiv:1706.04983, section 2.

    Example:
        >>> freeze_out_times(3, t_0=0.5, cubed=False), freeze_out_times(3, t_0=0.5)
        ((0.5, 0.75, 1.0), (0.125, 0.421875, 1.0))
        >>> freeze_out_times(1), freeze_out_times(2, t_0=1.0)
        ((1.0,), (1.0, 1.0))
        >>> freeze_out_times(0)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: freeze_out_times(layers=) takes a whole number, 1 or above, got 0. Write: freeze_out_times(12)
        >>> freeze_out_times(3, t_0=1.5)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: freeze_out_times(t_0=) takes a number above 0 and 1 or below, got 1.5. Write: freeze_out_times(12, t_0=0.8)
    """
    check_whole("freeze_out_times(layers=)", layers, at_least=1, example="freeze_out_times(12)")
    check_in_range("freeze_out_times(t_0=)", t_0, above=0, at_most=1, example="freeze_out_times(12, t_0=0.8)")
    linear = [1 - (1 - t_0) * (layers - 1 - index) / max(1, layers - 1) for index in range(layers)]
    return tuple(each**3 if cubed else each for each in linear)


def freeze_out_schedule(time: float) -> Schedule:
    """Return half a cosine from 1 to 0 at ``time``, a share of the fit, and 0 after it.

    Example:
        >>> [round(freeze_out_schedule(0.5)(progress), 3) for progress in (0.0, 0.25, 0.5, 0.75)]
        [1.0, 0.5, 0.0, 0.0]
        >>> [round(freeze_out_schedule(1.0)(progress), 3) for progress in (0.0, 0.5, 1.0)]
        [1.0, 0.5, 0.0]
    """
    return cosine() if time >= 1 else join([cosine(), constant(0.0)], [time])


@register
@attrs.define(slots=False, eq=False)
class FreezeOut(Algorithm):
    """Anneal each layer's learning rate to zero on a cosine of its own, and freeze it there.

    Layer i of n freezes at ``t_i``, linear from ``t_0`` (input) to 1 (head); at progress t its rate is
    ``0.5 * lr * (1 + cos(pi * t / t_i))``, with ``lr / t_i`` in place of ``lr`` where ``scale_lr``. It
    stands in place of the Trainer's ``schedule``; other owners' factors multiply it. What freezes loses gradient and optimizer state.

    Args:
        t_0: Share of the fit at which the first layer freezes (before cubing), above 0, up to 1.
        cubed: Whether the times are cubed.
        scale_lr: Whether each layer's rate is divided by its time, so that all move equally far.

    Raises:
        ArgumentError: An argument of the wrong type or out of range.

    Source: Brock, Lim, Ritchie, Weston, FreezeOut: Accelerate Training by Progressively Freezing Layers,
    arXiv:1706.04983; the defaults are those that they recommend.

    Example:
        >>> from thawline.engine import Trainer
        >>> from thawline.engine.testing import tiny_loader, tiny_models
        >>> trainer = Trainer(algorithms=[FreezeOut(t_0=0.5, cubed=False)])
        >>> plan = trainer.plan(tiny_models()["residual"](), tiny_loader(), duration="4ep")
        >>> [(span.start.progress, len(span.layers)) for span in plan.spans]
        [(0.0, 5), (0.5, 4), (0.625, 3), (0.75, 2), (0.875, 1)]
        >>> [round(rate, 8) for rate in plan.samples[0].rates.values()]  # 1e-4, divided by 0.5, 0.625, …
        [0.0002, 0.00016, 0.00013333, 0.00011429, 0.0001]
        >>> FreezeOut()
        FreezeOut(t_0=0.8, cubed=True, scale_lr=True)
        >>> trainer.algorithms = [FreezeOut(t_0=0.5, cubed=False, scale_lr=False)]
        >>> plan = trainer.plan(tiny_models()["residual"](), tiny_loader(), duration="4ep")
        >>> [round(rate, 8) for rate in plan.samples[0].rates.values()]
        [0.0001, 0.0001, 0.0001, 0.0001, 0.0001]
    """

    stage: ClassVar[Stage] = Stage.TRAINABILITY
    events = frozenset({Event.FIT_START, Event.BATCH_START})

    t_0: float = attrs.field(default=0.8, validator=in_range(above=0, at_most=1))
    cubed: bool = attrs.field(default=True, validator=flag())
    scale_lr: bool = attrs.field(default=True, validator=flag())
    depth: int = attrs.field(default=0, init=False, repr=False)
    """How many layers are frozen."""
    _times: tuple[float, ...] = attrs.field(default=(), init=False, repr=False)

    @override
    def attach(self, state: State) -> None:
        self._times = freeze_out_times(len(state.layers), t_0=self.t_0, cubed=self.cubed)

    @override
    def match(self, event: Event, state: State) -> bool:
        """Return whether the fit begins, or a layer is due.

        Example:
            >>> import torch
            >>> from thawline.engine import Clock, ParameterLedger
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
            >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters())))
            >>> freezing = FreezeOut(t_0=0.5, cubed=False)
            >>> freezing.attach(state)
            >>> freezing.match(Event.FIT_START, state), freezing.match(Event.BATCH_START, state)
            (True, False)
            >>> state.clock = Clock(progress=0.5)
            >>> freezing.match(Event.BATCH_START, state)
            True
            >>> freezing.apply(Event.BATCH_START, state)
            >>> sorted(state.ledger.trainable), freezing.depth, freezing.match(Event.BATCH_START, state)
            (['2.bias', '2.weight'], 1, False)
        """
        return event is Event.FIT_START or self._due(state.clock.progress) > self.depth

    @override
    def apply(self, event: Event, state: State) -> None:
        """Set the layers' schedules, or freeze what is due."""
        ledger, names = state.ledger, [layer.name for layer in state.layers]
        if event is Event.FIT_START:
            warn_of_frozen_trunk(state, "FreezeOut")
            with ledger.at_once():
                for name, time in zip(names, self._times, strict=True):
                    ledger.set_schedule(name, freeze_out_schedule(time), owner=self.owner, span="1dur")
                    if self.scale_lr:
                        ledger.scale(name, 1 / time, owner=self.owner)
            return
        due = self._due(state.clock.progress)
        ledger.freeze(names[self.depth : due], owner=self.owner)
        log.info("frozen", layers=names[self.depth : due], epoch=state.clock.epoch, batch=state.clock.batch)
        self.depth = due

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return how many layers are frozen."""
        return {"depth": self.depth}

    @override
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back how many layers are frozen."""
        self.depth = int(saved["depth"])

    def _due(self, progress: float) -> int:
        """Return how many layers are to be frozen; the last one, whose time is the end, never is.

        Example:
            >>> freezing = FreezeOut()
            >>> freezing._times = (0.25, 0.5, 1.0)
            >>> [freezing._due(progress) for progress in (0.0, 0.25, 0.49, 0.5, 1.0)]
            [0, 1, 1, 2, 2]
        """
        due = self.depth
        while due < len(self._times) - 1 and progress >= self._times[due]:
            due += 1
        return due
