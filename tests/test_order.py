"""The order of an epoch as a function of (seed, epoch)."""

# ruff: noqa: NPY002 - users' code draws from NumPy's global generator, and that is what is tested

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, SequentialSampler, WeightedRandomSampler

from thawline.engine.order import epoch_order, order_limits

SIZE = 600  # more than is drawn at once


class Shuffled:
    """A sampler that draws from Python's and NumPy's global generators."""

    def __iter__(self) -> Iterator[int]:
        order = random.sample(range(SIZE), SIZE)
        return iter(np.random.permutation(order).tolist())


class Private:
    """A sampler with a generator of its own, under a name of its own."""

    def __init__(self) -> None:
        self.dice = np.random.default_rng()

    def __iter__(self) -> Iterator[int]:
        for _ in range(SIZE):
            yield int(self.dice.integers(SIZE))


class Epochs:
    """A sampler whose order is derived from ``set_epoch``."""

    def __init__(self) -> None:
        self.epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter([self.epoch, 1, 2])


class Counter:
    """A sampler that counts its epochs by itself."""

    def __init__(self) -> None:
        self.times = 0

    def __iter__(self) -> Iterator[int]:
        self.times += 1
        return iter([self.times, 1, 2])


class InPlace:
    """A sampler that shuffles what it keeps."""

    def __init__(self, indices: Any) -> None:
        self.indices = indices

    def __iter__(self) -> Iterator[int]:
        np.random.shuffle(self.indices)
        return iter(list(self.indices))


class Around:
    """A sampler around another one."""

    def __init__(self, sampler: Iterable[int]) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)


class Endless:
    """A sampler without an end."""

    def __iter__(self) -> Iterator[int]:
        return (random.randrange(SIZE) for _ in count())


SAMPLERS: list[Callable[[], Iterable[Any]]] = [
    lambda: RandomSampler(range(SIZE)),
    lambda: RandomSampler(range(SIZE), generator=torch.Generator()),
    lambda: RandomSampler(range(SIZE), replacement=True, num_samples=2 * SIZE),
    lambda: WeightedRandomSampler(torch.arange(1.0, SIZE).tolist(), SIZE),
    lambda: BatchSampler(RandomSampler(range(SIZE), generator=torch.Generator()), 2, drop_last=False),
    lambda: DistributedSampler(range(SIZE), num_replicas=2, rank=1),  # type: ignore[arg-type]
    Shuffled,
    Private,
    lambda: BatchSampler(Private(), 1, drop_last=False),
]


@pytest.mark.parametrize("make", SAMPLERS)
def test_the_order_is_a_function_of_seed_and_epoch(make: Callable[[], Iterable[Any]]) -> None:
    """The same in another process's sampler and after other epochs; another one for another seed or epoch."""
    torch.manual_seed(1)
    sampler = make()
    order = [list(epoch_order(sampler, 5, epoch)) for epoch in range(3)]
    torch.manual_seed(2)
    again = make()
    assert [list(epoch_order(again, 5, epoch)) for epoch in (2, 0, 1)] == [order[2], order[0], order[1]]
    assert order[0] != order[1] != order[2]
    if not isinstance(sampler, DistributedSampler):  # it has a seed of its own
        assert list(epoch_order(again, 6, 0)) != order[0]


@pytest.mark.parametrize("make", SAMPLERS)
def test_drawing_leaves_every_generator_alone(make: Callable[[], Iterable[Any]]) -> None:
    """The global generators and the sampler's own stand as before, wherever the reading stops."""
    sampler = make()
    own: torch.Generator = getattr(sampler, "generator", None) or torch.Generator()
    kept = own.get_state()
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    for _ in islice(epoch_order(sampler, 0, 0), 300):
        assert random.getstate() == before[0]
    assert str(np.random.get_state()) == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.equal(own.get_state(), kept)


def test_shuffling_is_torchs_own() -> None:
    """Every index comes once, as the sampler says; a sequence stays one."""
    assert sorted(epoch_order(RandomSampler(range(SIZE)), 0, 0)) == list(range(SIZE))
    assert list(epoch_order(SequentialSampler(range(SIZE)), 0, 3)) == list(range(SIZE))


def test_an_endless_sampler_is_read_as_far_as_needed() -> None:
    """It is not materialised; its order is a function of (seed, epoch) all the same."""
    first = list(islice(epoch_order(Endless(), 0, 0), 700))
    assert list(islice(epoch_order(Endless(), 0, 0), 700)) == first


def test_samplers_are_told_the_epoch() -> None:
    """Also one inside of another one."""
    sampler = Epochs()
    assert [next(epoch_order(sampler, 0, epoch)) for epoch in (3, 1)] == [3, 1]
    assert next(epoch_order(BatchSampler(sampler, 2, drop_last=False), 0, 7)) == [7, 1]


@pytest.mark.parametrize("make", [*SAMPLERS, Epochs, Endless, lambda: [[0, 1], [2]]])
def test_an_order_that_can_be_had_again_has_no_limits(make: Callable[[], Iterable[Any]]) -> None:
    """Nothing is said where nothing is wrong."""
    assert order_limits(make(), 0) == ()


@pytest.mark.parametrize(
    "make",
    [
        Counter,
        lambda: InPlace(list(range(9))),
        lambda: InPlace(np.arange(9)),
        lambda: BatchSampler(Counter(), 2, drop_last=False),
        lambda: InPlace(iter([1])),
        lambda: iter([1, 2]),
    ],
)
def test_a_sampler_with_hidden_state_is_told(make: Callable[[], Iterable[Any]]) -> None:
    """Before the fit starts, by name, with what to write; trying it out changes neither it nor the generators."""
    sampler = make()
    state = random.getstate(), torch.get_rng_state()
    inside: Any = getattr(sampler, "sampler", sampler)
    before = repr(getattr(inside, "__dict__", None))
    (sentence,) = order_limits(sampler, 0)
    assert f"the sampler {type(inside).__name__} keeps state of its own" in sentence
    assert "set_epoch(epoch)" in sentence
    assert repr(getattr(inside, "__dict__", None)) == before
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


def test_a_sampler_around_another_one_is_tried_apart_from_it() -> None:
    """Both are named, and the inner one has not counted."""
    inner = Counter()
    assert len(order_limits(Around(inner), 0)) == 2
    assert inner.times == 0
