"""Batches of what a model's head is given, in the place of batches that are not loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..engine import Unloaded
from .prefix_pass import is_batched
from .prefix_replay import Replay
from .prefix_store import RowStore

# Rows of several batches are gathered in one go, so many bytes of them.
_AT_ONCE = 1 << 22
# A kernel may round differently where its input does not begin on such a boundary, as what it is given elsewhere does.
_ALIGNED = 64


@attrs.define(eq=False)
class Feed:
    """Makes batches of what the head is given, and of the targets.

    Args:
        store: Rows by sample: what the head is given, then the targets.
        replay: Runs the head.
        label: The name of the targets in a batch that is a mapping, ``""`` in a tuple.
        hits: How often the head ran.
    """

    store: RowStore
    replay: Replay
    label: str
    hits: int = 0
    run: Callable[[Tensor], Any] = attrs.field(init=False)
    _ahead: Sequence[tuple[int, ...]] = attrs.field(default=(), init=False)
    _first: int = attrs.field(default=0, init=False)
    _made: list[Any] = attrs.field(factory=list, init=False)

    def __attrs_post_init__(self) -> None:
        self.run = self.replay.chain[0] if len(self.replay.chain) == 1 else self.replay.run_head

    def batch(self, one: Unloaded) -> Any | None:
        """Return what stands for a batch; None where a sample is missing."""
        place = one.place - self._first
        if one.ahead is not self._ahead or not 0 <= place < len(self._made):
            self._gather(one)
            place = 0
        return self._made[place] if self._made else None

    def head(self, *inputs: Any, **named: Any) -> Any:
        """Run the head: what a model's forward is with such a batch."""
        self.hits += 1
        return self.run(inputs[0] if inputs else named["inputs"])

    def _gather(self, one: Unloaded) -> None:
        """Gather the batch, and those after it."""
        self._ahead, self._first, self._made = one.ahead, one.place, []
        size = len(one.sample_ids) * self.store.row_bytes
        count = 1 if size % _ALIGNED else max(1, _AT_ONCE // max(size, 1))
        for several in (count, 1):
            ids = one.ahead[one.place : one.place + several]
            sizes = list(map(len, ids))
            kept = self.store.take(chain.from_iterable(ids), sum(sizes), 2)
            if kept is not None:
                pairs = zip(*(torch.split(each, sizes) for each in kept), strict=True)
                label = self.label
                self._made = [{"inputs": x, label: y} for x, y in pairs] if label else list(pairs)
                return


def loaded_part(batches: Sequence[Unloaded], ids: Sequence[int]) -> Any:
    """Load the one of the batches that holds the samples, and return their rows of it."""
    one = next(each for each in batches if set(ids) <= set(each.sample_ids))
    batch, known = one.load(), list(one.sample_ids)
    if list(ids) == known:
        return batch
    places = [known.index(each) for each in ids]
    return tree_map(lambda part: part[places] if is_batched(part, len(known)) else part, batch)
