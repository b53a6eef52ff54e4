"""Train a fixed part of a model."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import attrs
from typing_extensions import override

from ..engine import Algorithm, ArgumentError, Event, LayerMap, Stage, State, register


def all_but(layers: LayerMap, names: Collection[str]) -> list[str]:
    """Return selectors of everything but ``names``.

    A layer that lies wholly outside is named as a layer, so that a hold on it covers what is attached to it later.

    Args:
        layers: The model's layers.
        names: Names of parameters.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> all_but(LayerMap(model), {"2.bias", "4.weight", "4.bias"})
        ['blocks[0]', '2.weight']
    """
    chosen = frozenset(names)
    found: list[str] = []
    for layer in layers:
        rest = [name for name in layer.parameters if name not in chosen]
        found += [layer.name] if len(rest) == len(layer.parameters) else rest
    return found


def _selectors(value: object) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
    if not names or not all(isinstance(each, str) and each for each in names):
        raise ArgumentError("TrainOnly(select=)", got=value, takes="a selector or a list", example="TrainOnly('head')")
    return names


def _rates(value: object) -> dict[str, float]:
    if value is None:
        return {}
    if isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(lr, (int, float)) and not isinstance(lr, bool) and 0 < lr <= sys.float_info.max
        for name, lr in value.items()
    ):
        return {str(name): float(lr) for name, lr in value.items()}
    raise ArgumentError(
        "TrainOnly(lr=)",
        got=value,
        takes="a mapping of selectors to rates above 0, or None",
        example="TrainOnly('head', lr={'head': 1e-3})",
    )


@register
@attrs.define(slots=False, eq=False)
class TrainOnly(Algorithm):
    """Hold everything but what is selected, from the start to the end.

    Args:
        select: What trains: a selector or a list of them.
        lr: Selector to absolute base learning rate; what is not named keeps the optimizer's; None names nothing.

    Raises:
        ArgumentError: An argument of the wrong type.

    Example:
        >>> TrainOnly(["blocks[-2:]", "head"], lr={"head": 1e-3}).describe()["arguments"]["lr"]
        {'head': 0.001}
    """

    events = frozenset({Event.FIT_START})
    stage: ClassVar[Stage] = Stage.TRAINABILITY

    select: tuple[str, ...] = attrs.field(converter=_selectors)
    lr: Mapping[str, float] = attrs.field(default=None, converter=_rates)

    @override
    def apply(self, event: Event, state: State) -> None:
        """Hold the rest, and set the rates."""
        ledger = state.ledger
        if rest := all_but(state.layers, ledger.select(self.select)):
            ledger.freeze(rest, owner=self.owner)
        for select, lr in self.lr.items():
            ledger.set_lr(select, lr, owner=self.owner)
