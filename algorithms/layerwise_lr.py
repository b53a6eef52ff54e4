"""Layer-wise learning rates: smaller from the head to the input."""

from __future__ import annotations

from typing import ClassVar

import attrs
from typing_extensions import override

from ..engine import Algorithm, Event, LayerMap, Stage, State, register
from .arguments import in_range, positive


def layer_factors(layers: LayerMap, decay: float) -> dict[str, float]:
    """Return each layer's factor: ``decay ** d`` at d layers below the head.

    Example:
        >>> from torch import nn
        >>> layer_factors(LayerMap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))), 0.5)
        {'blocks[0]': 0.5, 'head': 1.0}
    """
    names = [layer.name for layer in layers]
    return {name: decay ** (len(names) - 1 - index) for index, name in enumerate(names)}


@register
@attrs.define(slots=False, eq=False)
class LayerwiseLR(Algorithm):
    """Multiply each layer's learning rate by ``decay`` to the power of its distance from the head.

    Args:
        decay: Factor from a layer to the one below it, above 0 and at most 1.
        lowest: Instead, the factor of the layer beside the input, those between on a geometric line.
        lr_head: Absolute base rate of the head; None leaves the optimizer's.

    Raises:
        ArgumentError: An argument of the wrong type or out of range.

    Source: Clark et al., ELECTRA, arXiv:2003.10555, appendix B; Howard and Ruder, arXiv:1801.06146.

    Example:
        >>> LayerwiseLR(decay=0.8).describe()
        {'name': 'LayerwiseLR', 'arguments': {'decay': 0.8, 'lr_head': None, 'lowest': None}}
    """

    events = frozenset({Event.FIT_START})
    stage: ClassVar[Stage] = Stage.TRAINABILITY

    decay: float = attrs.field(default=0.9, validator=in_range(above=0, at_most=1))
    lr_head: float | None = attrs.field(default=None, validator=positive(or_none=True, example=1e-3))
    lowest: float | None = attrs.field(
        default=None, kw_only=True, validator=in_range(above=0, at_most=1, or_none=True, example=0.01)
    )

    @override
    def apply(self, event: Event, state: State) -> None:
        """Set the factors, and the head's rate."""
        decay = self.decay if self.lowest is None else self.lowest ** (1 / max(1, len(state.layers) - 1))
        with state.ledger.at_once():
            for layer, factor in layer_factors(state.layers, decay).items():
                if factor != 1.0:
                    state.ledger.scale(layer, factor, owner=self.owner)
            if self.lr_head is not None:
                state.ledger.set_lr("head", self.lr_head, owner=self.owner)
