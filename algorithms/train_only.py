"""Train a fixed part of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs
from typing_extensions import override

from ..engine import Algorithm, ArgumentError, Event, Stage, State, register


def _selectors(value: object) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
    if not names or not all(isinstance(each, str) and each for each in names):
        raise ArgumentError("TrainOnly(select=)", got=value, takes="a selector or a list", example="TrainOnly('head')")
    return names


def _rates(value: object) -> dict[str, float]:
    if isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(lr, (int, float)) and not isinstance(lr, bool) and 0 < lr < float("inf")
        for name, lr in value.items()
    ):
        return {str(name): float(lr) for name, lr in value.items()}
    raise ArgumentError(
        "TrainOnly(lr=)",
        got=value,
        takes="a mapping of selectors to rates above 0",
        example="TrainOnly('head', lr={'head': 1e-3})",
    )


@register
@attrs.define(slots=False, eq=False)
class TrainOnly(Algorithm):
    """Hold everything but what is selected, from the start to the end.

    Args:
        select: What trains: a selector or a list of them.
        lr: Selector to absolute base learning rate; what is not named keeps the optimizer's.

    Raises:
        ArgumentError: An argument of the wrong type.

    Example:
        >>> TrainOnly(["blocks[-2:]", "head"], lr={"head": 1e-3}).describe()["arguments"]["lr"]
        {'head': 0.001}
    """

    events = frozenset({Event.FIT_START})
    stage: ClassVar[Stage] = Stage.TRAINABILITY

    select: tuple[str, ...] = attrs.field(converter=_selectors)
    lr: dict[str, float] = attrs.field(factory=dict, converter=_rates)

    @override
    def apply(self, event: Event, state: State) -> None:
        """Hold the rest, and set the rates."""
        ledger = state.ledger
        chosen: set[str] = {name for each in self.select for name in ledger.select(each)}
        for layer in state.layers:
            inside = chosen.intersection(layer.parameters)
            if not inside:
                ledger.freeze(layer.name, owner=self.owner)  # by layer: covers what is attached there later
            elif len(inside) < len(layer.parameters):
                ledger.freeze([name for name in layer.parameters if name not in inside], owner=self.owner)
        for select, lr in self.lr.items():
            ledger.set_lr(select, lr, owner=self.owner)
