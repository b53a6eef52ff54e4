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

    Example:
        >>> store, head = RowStore(budget=10_000), torch.nn.Linear(16, 1)
        >>> store.add([3, 8, 1], "a", [torch.tensor([3.0, 8.0, 1.0])[:, None].expand(3, 16), torch.tensor([30, 80, 10])])
        True
        >>> replay, ahead = Replay(head, None, {}, {}, (head,)), [(8, 1), (3,), (3, 7)]
        >>> feed = Feed(store, replay, "")
        >>> inputs, targets = feed.batch(Unloaded(ahead, 0, None))
        >>> inputs.shape, inputs[:, 0], targets
        (torch.Size([2, 16]), tensor([8., 1.]), tensor([80, 10]))
        >>> Feed(store, replay, "labels").batch(Unloaded(ahead, 1, None))["labels"], feed.batch(Unloaded(ahead, 2, None))
        (tensor([30]), None)
        >>> torch.equal(feed.head(inputs), head(inputs)), torch.equal(feed.head(inputs=inputs), head(inputs)), feed.hits
        (True, True, 2)
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
        """Gather the batch, and those after it.

        Example:
            >>> store, head = RowStore(budget=10_000), torch.nn.Linear(16, 1)
            >>> store.add(range(4), "a", [torch.arange(4.0)[:, None].expand(4, 16), torch.arange(4)])
            True
            >>> feed, ahead = Feed(store, Replay(head, None, {}, {}, (head,)), ""), [(0,), (2, 3), (1,)]
            >>> feed.batch(Unloaded(ahead, 1, None))[1], [targets.tolist() for _, targets in feed._made]
            (tensor([2, 3]), [[2, 3], [1]])
            >>> feed.batch(Unloaded(ahead, 2, None))[1], feed.batch(Unloaded(ahead, 0, None))[1], len(feed._made)
            (tensor([1]), tensor([0]), 3)
        """
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


def fed_or_loaded(batch: Any, feed: Feed | None) -> tuple[Any, list[Unloaded]]:
    """Return what stands for a batch that is not loaded, and what was not loaded of it; else the batch, loaded, and nothing.

    Example:
        >>> store, head = RowStore(budget=10_000), torch.nn.Linear(16, 1)
        >>> store.add([3, 8], "a", [torch.ones(2, 16), torch.tensor([30, 80])])
        True
        >>> feed = Feed(store, Replay(head, None, {}, {}, (head,)), "")
        >>> first, second, unseen = (Unloaded([(3,), (8,), (7,)], place, "abc".__getitem__) for place in range(3))
        >>> (inputs, targets), spared = fed_or_loaded(first, feed)
        >>> inputs.shape, targets, spared == [first]
        (torch.Size([1, 16]), tensor([30]), True)
        >>> fed_or_loaded(unseen, feed), fed_or_loaded(first, None), fed_or_loaded("loaded", feed)
        (('c', []), ('a', []), ('loaded', []))
        >>> several, spared = fed_or_loaded([first, second], feed)  # as they come with accumulate=2
        >>> [targets for _, targets in several], spared == [first, second]
        ([tensor([30]), tensor([80])], True)
        >>> fed_or_loaded([first, unseen], feed), fed_or_loaded([first, "loaded"], feed), fed_or_loaded([first, second], None)
        ((['a', 'c'], []), (['a', 'loaded'], []), (['a', 'b'], []))
    """
    parts = batch if type(batch) is list else [batch]
    if feed is not None and all(type(each) is Unloaded for each in parts):
        made = [feed.batch(each) for each in parts]
        if all(each is not None for each in made):
            return made if type(batch) is list else made[0], parts
    loaded = [each.load() if type(each) is Unloaded else each for each in parts]
    return loaded if type(batch) is list else loaded[0], []


def loaded_part(batches: Sequence[Unloaded], ids: Sequence[int]) -> Any:
    """Load the one of the batches that holds the samples, and return their rows of it.

    Example:
        >>> rows = {"x": torch.tensor([3.0, 8.0, 1.0]), "name": "digits"}
        >>> batches = [Unloaded([(4, 5), (3, 8, 1)], place, [None, rows].__getitem__) for place in (0, 1)]
        >>> loaded_part(batches, (1, 3)), loaded_part(batches, (3, 8, 1)) is rows
        ({'x': tensor([1., 3.]), 'name': 'digits'}, True)
    """
    one = next(each for each in batches if set(ids) <= set(each.sample_ids))
    batch, known = one.load(), list(one.sample_ids)
    if list(ids) == known:
        return batch
    places = [known.index(each) for each in ids]
    return tree_map(lambda part: part[places] if is_batched(part, len(known)) else part, batch)
