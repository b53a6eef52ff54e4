"""Block coordinate descent: one block of the model trains at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import attrs
from typing_extensions import override

from ..engine import LayerMap, State, Time, register
from .arguments import check_one_of, check_selectors, check_time, flag, one_of
from .layer_thaw import cannot_fire
from .turns import Turns, shuffled

CycleOrder: TypeAlias = Literal["random", "ascending", "descending"]
ORDERS = ("random", "ascending", "descending")


def cycle_order(
    count: int, order: CycleOrder = "random", *, seed: int = 0, owner: str = "", cycle: int = 0
) -> list[int]:
    """Return the order in which ``count`` blocks train in one cycle.

    Args:
        count: How many blocks.
        order: ``"random"``, shuffled anew in each cycle, ``"ascending"`` from the input, or ``"descending"``.
        seed: Seed of the run.
        owner: Who shuffles; two of them shuffle apart.
        cycle: Number of the cycle, from 0.

    Raises:
        ArgumentError: Another order.

    Example:
        >>> cycle_order(3, "ascending"), cycle_order(3, "descending")
        ([0, 1, 2], [2, 1, 0])
        >>> cycle_order(5), cycle_order(5, cycle=1), cycle_order(5, seed=1), cycle_order(5, owner="me")
        ([2, 1, 3, 4, 0], [0, 1, 4, 3, 2], [1, 2, 0, 3, 4], [4, 0, 1, 3, 2])
        >>> cycle_order(3, "up")
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: cycle_order(order=) takes one of 'random', 'ascending', 'descending', got 'up'. Write: cycle_order(12, 'random')
    """
    check_one_of("cycle_order(order=)", order, ORDERS, example="cycle_order(12, 'random')")
    if order == "random":
        return shuffled(count, seed, owner, cycle)
    return list(range(count)) if order == "ascending" else list(range(count))[::-1]


def _every(value: str | int | Time) -> Time:
    return check_time("BlockCycle(every=)", value, example="BlockCycle(every='100ba')")


def _always(value: object) -> tuple[str, ...]:
    return check_selectors("BlockCycle(always=)", value, example="BlockCycle(always='head')", empty=True)


@register
@attrs.define(slots=False, eq=False)
class BlockCycle(Turns):
    """Train one layer at a time, all in turn, over and over: BAdam, where the optimizer is Adam.

    Each layer begins its turn without optimizer state, also where it has the last turn of a cycle and the first of the
    next. So moments are held for one layer, and for what always trains, whose moments run on.

    Args:
        every: Length of a turn: an int is epochs; in epochs it acts at EPOCH_START, else at BATCH_START. The paper's K.
        order: ``"random"``, shuffled anew in each cycle, ``"ascending"`` from the input, or ``"descending"``.
        always: Selectors of what trains all the time. A head that is not among them is a block of the cycle.
        stem: Whether the embeddings are a block of the cycle; else they are frozen, unless they always train.

    Raises:
        ArgumentError: An argument of the wrong type or out of range.
        LayerError: At the start of a fit, a model in which everything always trains.

    Warns:
        ThawlineWarning: At the start of a fit that ends before each block has had a turn.

    Source: Luo et al., BAdam, arXiv:2404.02827, algorithm 1.

    Example:
        >>> from thawline.engine import Trainer
        >>> from thawline.engine.testing import tiny_loader, tiny_models
        >>> trainer = Trainer(algorithms=[BlockCycle("1ep", order="descending", stem=False)])
        >>> plan = trainer.plan(tiny_models()["residual"](), tiny_loader(), duration="3ep")
        >>> [(span.start.epoch, *span.layers) for span in plan.spans]
        [(0, 'blocks[2]', 'head'), (1, 'blocks[1]', 'head'), (2, 'blocks[0]', 'head')]
        >>> BlockCycle()
        BlockCycle(every=Time('100ba'), order='random', always=('head',), stem=True)
        >>> trainer.algorithms = [BlockCycle("2ba", order="ascending", always=())]
        >>> plan = trainer.plan(tiny_models()["residual"](), tiny_loader(), duration="12ba")
        >>> [(span.start.batch, *span.layers) for span in plan.spans]
        [(0, 'stem'), (2, 'blocks[0]'), (4, 'blocks[1]'), (6, 'blocks[2]'), (8, 'head'), (10, 'stem')]
    """

    every: Time = attrs.field(default=Time("100ba"), converter=_every)
    order: CycleOrder = attrs.field(default="random", validator=one_of(ORDERS))
    always: tuple[str, ...] = attrs.field(default=("head",), converter=_always)
    stem: bool = attrs.field(default=True, validator=flag())
    turn: int = attrs.field(default=0, init=False, repr=False)
    active: tuple[str, ...] = attrs.field(default=(), init=False, repr=False)

    @override
    def candidates(self, layers: LayerMap) -> list[str]:
        """Return all layers, the embeddings where they are asked for.

        Example:
            >>> from torch import nn
            >>> layers = LayerMap(nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)]), {"stem": "0", "blocks": ["1"], "head": "2"})
            >>> BlockCycle().candidates(layers), BlockCycle(stem=False).candidates(layers)
            (['stem', 'blocks[0]', 'head'], ['blocks[0]', 'head'])
        """
        return [layer.name for layer in layers if self.stem or layer.name != "stem"]

    @override
    def choose(self, candidates: Sequence[str], turn: int, seed: int) -> tuple[str, ...]:
        """Return the one block of this turn.

        Example:
            >>> cycling = BlockCycle(order="descending")
            >>> [cycling.choose(["stem", "blocks[0]"], turn, seed=0) for turn in range(3)]
            [('blocks[0]',), ('stem',), ('blocks[0]',)]
            >>> [BlockCycle().choose("abcd", turn, seed=0)[0] for turn in range(8)]
            ['c', 'b', 'd', 'a', 'a', 'b', 'c', 'd']
        """
        cycle, place = divmod(turn, len(candidates))
        order = cycle_order(len(candidates), self.order, seed=seed, owner=self.owner, cycle=cycle)
        return (candidates[order[place]],)

    @override
    def leaving(self, chosen: Sequence[str]) -> tuple[str, ...]:
        """Return the block whose turn is over, though the next be its own.

        Example:
            >>> cycling = BlockCycle()
            >>> cycling.active = ("blocks[0]",)
            >>> cycling.leaving(["blocks[0]"])
            ('blocks[0]',)
        """
        return self.active

    @override
    def idle(self, candidates: Sequence[str], state: State) -> str | None:
        """Return that some blocks never have a turn.

        Example:
            >>> import torch
            >>> from thawline.engine import ParameterLedger
            >>> model = torch.nn.Linear(2, 1)
            >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters())), duration="2ep")
            >>> BlockCycle("1ep").idle(["a", "b", "c"], state)
            'does not come to each of 3 blocks'
            >>> BlockCycle("1ep").idle(["a", "b"], state), BlockCycle("9ep").idle(["a"], state)
            (None, None)
        """
        last = self.every.value * (len(candidates) - 1)
        never = last and cannot_fire(Time(f"{last}{self.every.unit}"), state)
        return f"does not come to each of {len(candidates)} blocks" if never else None
