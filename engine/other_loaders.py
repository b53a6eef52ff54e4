"""One order of one task's samples, read by loaders of many kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from attrs import frozen
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from typing_extensions import override

from .doubles import uneven_loader
from .other_batches import Samples

SIZE = 8
"""Samples of a batch; the last one is shorter."""


def all_samples() -> Samples:
    """Return the samples of the task."""
    x, y = uneven_loader().dataset.tensors  # type: ignore[attr-defined]  # a TensorDataset
    return Samples(x, y, torch.arange(len(y)))


def order_in(epoch: int, count: int) -> list[int]:
    """Return the order of so many samples, of which 5 is no divisor, in an epoch.

    Example:
        >>> order_in(0, 6), order_in(1, 6)
        ([0, 5, 4, 3, 2, 1], [1, 0, 5, 4, 3, 2])
    """
    return [(epoch + 5 * place) % count for place in range(count)]


def batches_in(epoch: int, count: int) -> list[list[int]]:
    """Return the numbers of the samples in each batch of an epoch."""
    order = order_in(epoch, count)
    return [order[start : start + SIZE] for start in range(0, count, SIZE)]


class InTurn(Sampler[int]):
    """A sampler whose order depends on the epoch alone.

    Args:
        count: How many samples there are.
    """

    def __init__(self, count: int) -> None:
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch: int) -> None:
        """Hear which epoch it is."""
        self.epoch = epoch

    @override
    def __iter__(self) -> Iterator[int]:
        yield from order_in(self.epoch, self.count)

    def __len__(self) -> int:
        """Return how many samples there are."""
        return self.count


class TuplesInTurn(InTurn):
    """A sampler of whole batches."""

    @override
    def __iter__(self) -> Iterator[Any]:
        yield from map(tuple, batches_in(self.epoch, self.count))

    @override
    def __len__(self) -> int:
        return len(batches_in(0, self.count))


class Indexed(Dataset[Any]):
    """The samples, by number or by numbers.

    Args:
        samples: They.
    """

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    @override
    def __getitem__(self, index: Any) -> Samples:
        chosen = list(index) if isinstance(index, (list, tuple)) else index
        return Samples(*(each[chosen] for each in self.samples))

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.samples.y)


class Read:
    """Batches that can only be read from the beginning of an epoch, and of which nobody says how many there are.

    Args:
        samples: What they are made of.
        given: Makes a batch of some of them.
    """

    def __init__(self, samples: Samples, given: Callable[[Samples], Any]) -> None:
        self.data, self.given, self.epoch = Indexed(samples), given, 0

    def set_epoch(self, epoch: int) -> None:
        """Hear which epoch it is."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of the epoch."""
        for numbers in batches_in(self.epoch, len(self.data)):
            yield self.given(self.data[numbers])


class Streamed(IterableDataset[Any]):
    """Samples that come one after the other.

    Args:
        samples: They.
    """

    def __init__(self, samples: Samples) -> None:
        self.data, self.epoch = Indexed(samples), 0

    def set_epoch(self, epoch: int) -> None:
        """Hear which epoch it is."""
        self.epoch = epoch

    @override
    def __iter__(self) -> Iterator[Samples]:
        for number in order_in(self.epoch, len(self.data)):
            yield self.data[number]


class KeepsItsPlace:
    """A loader that says where it stands and goes on from there, as torchdata's does: at the end of an epoch an iterator that yields nothing.

    Args:
        samples: What its batches are made of.
        given: Makes a batch of some of them.
        noise: How much noise it adds to the inputs, drawn from torch's global generator.
    """

    def __init__(self, samples: Samples, given: Callable[[Samples], Any], noise: float = 0.0) -> None:
        self.data, self.given, self.noise = Indexed(samples), given, noise
        self.epoch = self.place = 0

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches that are left of the epoch."""
        batches = batches_in(self.epoch, len(self.data))
        if self.place == len(batches):
            self.epoch, self.place = self.epoch + 1, 0
            return
        while self.place < len(batches):
            found = self.data[batches[self.place]]
            self.place += 1
            yield self.given(
                found._replace(x=found.x + self.noise * torch.rand(found.x.shape)) if self.noise else found
            )

    def state_dict(self) -> dict[str, Any]:
        """Return where it stands."""
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Stand there."""
        self.epoch, self.place = state_dict["epoch"], state_dict["place"]


class _Whole(Indexed):
    """A dataset whose items are batches."""

    def __init__(self, samples: Samples, given: Callable[[Samples], Any]) -> None:
        super().__init__(samples)
        self.given = given

    @override
    def __getitem__(self, index: Any) -> Any:
        return self.given(super().__getitem__(index))


def stacked(given: Callable[[Samples], Any], samples: list[Samples]) -> Any:
    """Collate samples to a batch."""
    return given(Samples(*(torch.stack(each) for each in zip(*samples, strict=True))))


def plain(samples: Samples, given: Callable[[Samples], Any]) -> DataLoader[Any]:
    """Return a loader with a sampler."""
    collate = partial(stacked, given)
    return DataLoader(Indexed(samples), batch_size=SIZE, sampler=InTurn(len(samples.y)), collate_fn=collate)


def _of_tuples(samples: Samples, given: Callable[[Samples], Any]) -> DataLoader[Any]:
    collate = partial(stacked, given)
    return DataLoader(Indexed(samples), batch_sampler=TuplesInTurn(len(samples.y)), collate_fn=collate)


def _of_wholes(samples: Samples, given: Callable[[Samples], Any]) -> DataLoader[Any]:
    return DataLoader(_Whole(samples, given), batch_size=None, sampler=TuplesInTurn(len(samples.y)))


def _of_a_stream(samples: Samples, given: Callable[[Samples], Any]) -> DataLoader[Any]:
    return DataLoader(Streamed(samples), batch_size=SIZE, collate_fn=partial(stacked, given))


@frozen
class Kind:
    """A kind of loader.

    Args:
        name: What faults are told of.
        build: Makes one of samples, and of what makes a batch of some of them.
        tells: Whether it is known which samples a batch has.
        noisy: Whether its samples are others than those of the rest.
    """

    name: str
    build: Callable[[Samples, Callable[[Samples], Any]], Iterable[Any]]
    tells: bool = False
    noisy: bool = False


PLAIN = Kind("a loader with a sampler", plain, tells=True)
UNCOUNTED = Kind("batches without a length", Read)
KINDS: Sequence[Kind] = (
    Kind("a sampler of batches", _of_tuples, tells=True),
    Kind("a dataset of whole batches", _of_wholes, tells=True),
    Kind("a dataset that can only be iterated over", _of_a_stream),
    Kind("a loader that keeps its place", KeepsItsPlace),
    Kind("a loader that keeps its place and adds noise", partial(KeepsItsPlace, noise=0.1), noisy=True),
)
"""What is held against these two."""
