"""LISA: few random layers train at a time, between embeddings and head."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from typing_extensions import override

from ..engine import ArgumentError, LayerMap, State, Time, register
from .arguments import check_selectors, check_time, check_whole, whole
from .layer_thaw import cannot_fire
from .turns import Turns, shuffled


def sampled_layers(layers: Sequence[str], count: int, *, seed: int, owner: str, interval: int) -> tuple[str, ...]:
    """Return ``count`` of ``layers``, each set of them equally likely, in the order in which they were given.

    Args:
        layers: Names to choose from.
        count: How many, at least 1 and at most all.
        seed: Seed of the run.
        owner: Who samples; two of them sample apart.
        interval: Number of the interval, from 0.

    Raises:
        ArgumentError: There are fewer layers.

    Example:
        >>> blocks = ["blocks[0]", "blocks[1]", "blocks[2]"]
        >>> [sampled_layers(blocks, 2, seed=0, owner="LISA", interval=interval) for interval in range(3)]
        [('blocks[0]', 'blocks[1]'), ('blocks[1]', 'blocks[2]'), ('blocks[0]', 'blocks[2]')]
        >>> sampled_layers(blocks, 3, seed=1, owner="LISA#2", interval=0)
        ('blocks[0]', 'blocks[1]', 'blocks[2]')
        >>> sampled_layers(blocks, 4, seed=0, owner="LISA", interval=0)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: LISA(layers=) takes at most 3, the layers of this model that may be sampled, got 4. Write: LISA(layers=1)
        >>> sampled_layers(blocks, 0, seed=0, owner="LISA", interval=0)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: LISA(layers=) takes a whole number, 1 or above, got 0. Write: LISA(layers=2)
    """
    check_whole("LISA(layers=)", count, at_least=1, example="LISA(layers=2)")
    if count > len(layers):
        takes = f"at most {len(layers)}, the layers of this model that may be sampled"
        raise ArgumentError("LISA(layers=)", got=count, takes=takes, example=f"LISA(layers={max(1, len(layers) // 2)})")
    chosen = sorted(shuffled(len(layers), seed, owner, interval)[:count])
    return tuple(layers[index] for index in chosen)


def _every(value: str | int | Time) -> Time:
    return check_time("LISA(every=)", value, example="LISA(every='20ba')")


def _always(value: object) -> tuple[str, ...]:
    return check_selectors("LISA(always=)", value, example="LISA(always=('stem', 'head'))", empty=True)


@register
@attrs.define(slots=False, eq=False)
class LISA(Turns):
    """Train embeddings, head, and in each interval ``layers`` of the layers between, drawn at random.

    The others are frozen and their optimizer state is dropped: a large model needs moments for a few layers only. A
    layer that is drawn twice in a row goes on with its moments. What is drawn is a pure function of the run's seed and
    the number of the interval; the global generators are left alone.

    Args:
        every: The interval: an int is epochs; in epochs it acts at EPOCH_START, else at BATCH_START. The paper's K.
        layers: How many layers train in each interval. The paper's gamma.
        always: Selectors of what trains all the time; what is neither among them nor between stem and head stays frozen.

    Raises:
        ArgumentError: An argument of the wrong type or out of range; at the start of a fit, more layers than there are.
        LayerError: At the start of a fit, a model without layers between.

    Warns:
        ThawlineWarning: At the start of a fit that ends within the first interval.

    Source: Pan et al., LISA, arXiv:2403.17919, algorithm 1.

    Example:
        >>> from thawline.engine import Trainer
        >>> from thawline.engine.testing import tiny_loader, tiny_models
        >>> trainer = Trainer(algorithms=[LISA(every="1ep", layers=1)])
        >>> plan = trainer.plan(tiny_models()["residual"](), tiny_loader(), duration="2ep")
        >>> [(span.start.epoch, *span.layers) for span in plan.spans]
        [(0, 'stem', 'blocks[0]', 'head'), (1, 'stem', 'blocks[2]', 'head')]
        >>> LISA()
        LISA(every=Time('20ba'), layers=2, always=('stem', 'head'))
    """

    every: Time = attrs.field(default=Time("20ba"), converter=_every)
    layers: int = attrs.field(default=2, validator=whole(at_least=1))
    always: tuple[str, ...] = attrs.field(default=("stem", "head"), converter=_always)
    turn: int = attrs.field(default=0, init=False, repr=False)
    active: tuple[str, ...] = attrs.field(default=(), init=False, repr=False)

    @override
    def candidates(self, layers: LayerMap) -> list[str]:
        """Return the layers between stem and head.

        Example:
            >>> from torch import nn
            >>> layers = LayerMap(nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)]), {"stem": "0", "blocks": ["1"], "head": "2"})
            >>> LISA().candidates(layers)
            ['blocks[0]']
        """
        return [layer.name for layer in layers if layer.name not in ("stem", "head")]

    @override
    def choose(self, candidates: Sequence[str], turn: int, seed: int) -> tuple[str, ...]:
        """Return the layers drawn in this interval."""
        return sampled_layers(candidates, self.layers, seed=seed, owner=self.owner, interval=turn)

    @override
    def leaving(self, chosen: Sequence[str]) -> tuple[str, ...]:
        """Return those that are not drawn again.

        Example:
            >>> drawing = LISA()
            >>> drawing.active = ("blocks[0]", "blocks[2]")
            >>> drawing.leaving(["blocks[1]", "blocks[2]"])
            ('blocks[0]',)
        """
        return tuple(each for each in self.active if each not in chosen)

    @override
    def idle(self, candidates: Sequence[str], state: State) -> str | None:
        """Return that it draws only once.

        Example:
            >>> import torch
            >>> from thawline.engine import ParameterLedger
            >>> model = torch.nn.Linear(2, 1)
            >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters())), duration="2ep")
            >>> blocks = ["blocks[0]", "blocks[1]"]
            >>> LISA("2ep", layers=1).idle(blocks, state), LISA("1ep", layers=1).idle(blocks, state)
            ('draws only once', None)
            >>> LISA("2ep", layers=2).idle(blocks, state)  # all of them, so that there is nothing to draw again
        """
        return "draws only once" if len(candidates) > self.layers and cannot_fire(self.every, state) else None
