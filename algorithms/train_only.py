"""Train a fixed part of a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar

import attrs
from typing_extensions import override

from ..engine import Algorithm, ArgumentError, Event, Layer, LayerMap, Stage, State, register
from .arguments import check_selectors


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
    return [select for layer in layers for select in rest_of(layer, chosen)]


def rest_of(layer: Layer, names: Collection[str]) -> list[str]:
    """Return selectors of a layer's parameters but ``names``: the layer, where it has none of them."""
    rest = [name for name in layer.parameters if name not in names]
    return [layer.name] if len(rest) == len(layer.parameters) else rest


def _selectors(value: object) -> tuple[str, ...]:
    return check_selectors("TrainOnly(select=)", value, example="TrainOnly('head')")


def _rates(value: object) -> dict[str, float]:
    if value is None:
        return {}
    if isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(lr, (int, float)) and not isinstance(lr, bool) and 0 < lr < float("inf")
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
