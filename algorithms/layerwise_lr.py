"""Layer-wise learning rates: smaller from the head to the input."""

from __future__ import annotations

from typing import ClassVar, Literal, TypeAlias

import attrs
from typing_extensions import override

from ..engine import Algorithm, Event, LayerMap, Stage, State, register
from .arguments import check_in_range, check_one_of, in_range, one_of, positive
from .train_only import warn_of_frozen_trunk

Convention: TypeAlias = Literal["timm", "beit", "electra"]
CONVENTIONS = ("timm", "beit", "electra")


def layer_factors(layers: LayerMap, decay: float, convention: Convention = "timm") -> dict[str, float]:
    """Return each layer's factor, ``decay`` to the power of its distance from the top; the head's is 1.

    With n blocks, the stem being at depth 0 and ``blocks[i]`` at depth i + 1, the conventions differ in where the top is:

    - ``"timm"``: the last layer that has parameters, so n + 1 with a head and n without;
    - ``"beit"``: n + 1, the place of the head, whether there is one or not;
    - ``"electra"``: n + 2, one further, so that the last block is at ``decay ** 2``.

    Args:
        layers: The model's layers, those without parameters left out.
        decay: Factor from a layer to the one below it, above 0 and at most 1.
        convention: Where the top is.

    Raises:
        ArgumentError: A decay out of range, or another convention.

    Source: ``param_groups_layer_decay`` of timm; ``LayerDecayValueAssigner`` of BEiT, arXiv:2106.08254;
        ``_get_layer_lrs`` of ELECTRA, arXiv:2003.10555.

    Example:
        >>> from torch import nn
        >>> layers = LayerMap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
        >>> layer_factors(layers, 0.5), layer_factors(layers, 0.5, "electra")
        ({'blocks[0]': 0.5, 'head': 1.0}, {'blocks[0]': 0.25, 'head': 1.0})
        >>> headless = LayerMap(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), {"stem": "0", "blocks": ["1"]})
        >>> layer_factors(headless, 0.5), layer_factors(headless, 0.5, "beit"), layer_factors(headless, 1.0)
        ({'stem': 0.5, 'blocks[0]': 1.0}, {'stem': 0.25, 'blocks[0]': 0.5}, {'stem': 1.0, 'blocks[0]': 1.0})
        >>> layer_factors(layers, 0.0)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: layer_factors(decay=) takes a number above 0 and 1 or below, got 0.0. Write: layer_factors(layers, 0.75)
        >>> layer_factors(layers, 0.5, "deit")
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: layer_factors(convention=) takes one of 'timm', 'beit', 'electra', got 'deit'. Write: layer_factors(layers, 0.75, 'timm')
    """
    check_in_range("layer_factors(decay=)", decay, above=0, at_most=1, example="layer_factors(layers, 0.75)")
    check_one_of("layer_factors(convention=)", convention, CONVENTIONS, example="layer_factors(layers, 0.75, 'timm')")
    present = [layer.name for layer in layers]
    counted = present if convention == "timm" else [name for name in layers.names if name in present or name == "head"]
    beyond = 1 if convention == "electra" else 0
    distance = {name: place + (beyond if name != "head" else 0) for place, name in enumerate(reversed(counted))}
    return {name: decay ** distance[name] for name in present}


@register
@attrs.define(slots=False, eq=False)
class LayerwiseLR(Algorithm):
    """Multiply each layer's learning rate by ``decay`` to the power of its distance from the head.

    Args:
        decay: Factor from a layer to the one below it, above 0 and at most 1.
        lowest: Instead, the factor of the layer beside the input, those between on a geometric line.
        lr_head: Absolute base rate of the head; None leaves the optimizer's.
        convention: Whose way of counting layers: ``"timm"``, ``"beit"`` or ``"electra"``; see :func:`layer_factors`.

    Raises:
        ArgumentError: An argument of the wrong type or out of range.

    Source: Clark et al., ELECTRA, arXiv:2003.10555, appendix B; Howard and Ruder, arXiv:1801.06146.

    Example:
        >>> import torch
        >>> from thawline.engine import Trainer
        >>> from thawline.engine.testing import tiny_loader, tiny_models
        >>> trainer = Trainer(optimizer=lambda each: torch.optim.AdamW(each, lr=1.0), algorithms=[LayerwiseLR(decay=0.5)])
        >>> plan = trainer.plan(tiny_models()["residual"](), tiny_loader(), duration="1ep")
        >>> plan.samples[0].rates
        {'stem': 0.0625, 'blocks[0]': 0.125, 'blocks[1]': 0.25, 'blocks[2]': 0.5, 'head': 1.0}
        >>> trainer.algorithms = [LayerwiseLR(lowest=0.0001, lr_head=3.0)]
        >>> plan = trainer.plan(tiny_models()["residual"](), tiny_loader(), duration="1ep")
        >>> {layer: round(rate, 6) for layer, rate in plan.samples[0].rates.items()}
        {'stem': 0.0001, 'blocks[0]': 0.001, 'blocks[1]': 0.01, 'blocks[2]': 0.1, 'head': 3.0}
    """

    events = frozenset({Event.FIT_START})
    stage: ClassVar[Stage] = Stage.TRAINABILITY

    decay: float = attrs.field(default=0.9, validator=in_range(above=0, at_most=1))
    lr_head: float | None = attrs.field(default=None, validator=positive(or_none=True, example=1e-3))
    convention: Convention = attrs.field(default="timm", validator=one_of(CONVENTIONS))
    lowest: float | None = attrs.field(
        default=None, kw_only=True, validator=in_range(above=0, at_most=1, or_none=True, example=0.01)
    )

    @override
    def apply(self, event: Event, state: State) -> None:
        """Set the factors, and the head's rate."""
        decay = self.decay if self.lowest is None else self.lowest ** (1 / max(1, len(state.layers) - 1))
        warn_of_frozen_trunk(state, "LayerwiseLR")
        with state.ledger.at_once():
            for layer, factor in layer_factors(state.layers, decay, self.convention).items():
                if factor != 1.0:
                    state.ledger.scale(layer, factor, owner=self.owner)
            if self.lr_head is not None:
                state.ledger.set_lr("head", self.lr_head, owner=self.owner)
