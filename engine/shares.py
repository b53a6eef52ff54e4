"""Which samples of a batch are a rank's: a function of the batch, the seed, the rank, and how many ranks there are."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from attrs import evolve, frozen
from torch import Tensor
from torch.utils.data import DistributedSampler

from .batches import Fetched, part_of_batch
from .errors import DistributedError
from .pristine import fingerprint

_WORD = 2**64 - 1


@frozen
class Share:
    """The share of one rank in every batch.

    A loader's batch is that of all ranks together. Each rank takes a piece of it, the pieces being equal up to one
    sample; so the order of an epoch, how many batches it has and where a checkpoint is cut do not depend on how many ranks
    there are.

    With a seed a sample goes to its home, the same rank in every epoch, as far as the sizes of the pieces allow: what a rank
    keeps of its samples is there when they come again. Where a batch has more samples of a home than fit, those drawn to
    stay last go to the rank after it, mostly the same ones each time.

    Args:
        rank: Number of the rank, from 0.
        world: How many ranks there are.
        seed: Of the samples' homes; None cuts each batch in order of rank.

    Example:
        >>> [Share(rank, 3).of(range(8)) for rank in range(3)]
        [range(0, 2), range(2, 5), range(5, 8)]
        >>> [Share(rank, 3, seed=0).of(range(8)) for rank in range(3)]
        [[0, 6], [2, 3, 5], [1, 4, 7]]
    """

    rank: int
    world: int
    seed: int | None = None

    def with_homes(self, seed: int) -> Share:
        """Return the share that sends samples home."""
        return evolve(self, seed=seed)

    def limits(self, samples: int) -> tuple[int, int]:
        """Return where the rank's piece of so many samples begins and ends."""
        return samples * self.rank // self.world, samples * (self.rank + 1) // self.world

    def of(self, samples: Sequence[Any]) -> Sequence[Any]:
        """Return the rank's piece, in the batch's order; it is empty where there are more ranks than samples."""
        keys = None if self.seed is None else _keys(samples, self.seed)
        if keys is None:
            start, end = self.limits(len(samples))
            return samples[start:end]
        return [samples[place] for place in self._places(keys)]

    def _places(self, keys: np.ndarray[Any, Any]) -> list[int]:
        """Return the places of the samples that are this rank's: each takes its home, or the next rank with room."""
        shares = (Share(rank, self.world).limits(len(keys)) for rank in range(self.world))
        room = [end - start for start, end in shares]
        homes, mine = (keys % np.uint64(self.world)).tolist(), []
        for place in np.argsort(keys, kind="stable").tolist():
            rank = homes[place]
            while not room[rank]:
                rank = (rank + 1) % self.world
            room[rank] -= 1
            if rank == self.rank:
                mine.append(place)
        return sorted(mine)

    def taken(self, samples: Sequence[Any]) -> Sequence[Any]:
        """Return what the rank loads: its piece, or the first sample where that is empty.

        So every rank has a batch that models and algorithms can look at; that sample counts nothing in it.
        """
        own = self.of(samples)
        return own if len(own) else samples[:1]

    def cut(self, fetched: Iterable[Fetched], note: Callable[[Any], None]) -> Iterator[Fetched]:
        """Yield the rank's part of batches that were loaded whole, the first of which is noted."""
        for number, (batch, ids, _, whole) in enumerate(fetched):
            if not number:
                note(digest_of(batch))
            start, end = self.limits(whole)
            part = part_of_batch(batch, start, end) if start < end else part_of_batch(batch, 0, 1)
            yield Fetched(part, None if ids is None else ids[start:end], end - start, whole)


def check_shares(loader: Any, size: int | None, world: int, name: str, *, even: bool) -> None:
    """Refuse a loader that shares its data out itself, or whose batches cannot be shared out evenly.

    Args:
        loader: The user's loader.
        size: Samples in its first batch, where that is known.
        world: How many ranks there are.
        name: What the loader is called.
        even: Whether full batches have to be divisible by the ranks.

    Raises:
        DistributedError: It is one of these.
    """
    if isinstance(getattr(loader, "sampler", None), DistributedSampler):
        raise DistributedError(
            f"{name} has a DistributedSampler, and each rank is given its share of every batch here: it would train on "
            f"1/{world} of its 1/{world}. Write: DataLoader(dataset, batch_size=<of all ranks together>, shuffle=True)."
        )
    if even and size is not None and size % world:
        nearby = max(world, round(size / world) * world)
        raise DistributedError(
            f"{name} has batches of {size} samples, which {world} ranks cannot share evenly: got {size}, wanted a multiple of "
            f"{world}. batch_size is that of all ranks together. Write: DataLoader(dataset, batch_size={nearby})."
        )


def digest_of(batch: Any) -> str:
    """Return a hash of the numbers and the text in a batch; what else is in it is passed over.

    Example:
        >>> digest_of({"x": torch.ones(2)}) == digest_of({"x": torch.ones(2)}) != digest_of({"x": torch.zeros(2)})
        True
    """
    found = hashlib.sha256()
    ahead = [batch]
    while ahead:
        each = ahead.pop()
        if isinstance(each, Mapping):
            ahead += each.values()
        elif isinstance(each, (tuple, list)):
            ahead += each
        elif isinstance(each, Tensor):
            found.update(fingerprint(each).encode() if each.layout is torch.strided else b"")
        elif isinstance(each, (str, int, float, np.ndarray, np.generic)):
            found.update(repr(each).encode())
    return found.hexdigest()


def _keys(samples: Sequence[Any], seed: int) -> np.ndarray[Any, Any] | None:
    """Return a number for each sample that depends on it and the seed alone; None where samples are no whole numbers.

    The numbers are those of splitmix64 (Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014).
    """
    try:
        numbers = np.array([operator.index(each) & _WORD for each in samples], dtype=np.uint64)
    except TypeError:
        return None
    mixed = (numbers + np.uint64(seed & _WORD)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
