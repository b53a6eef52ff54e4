"""Which samples of a batch are a rank's: a function of the batch's size, the rank, and how many ranks there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from attrs import frozen
from torch.utils.data import DistributedSampler

from .batches import Fetched, part_of_batch
from .errors import DistributedError


@frozen
class Share:
    """The share of one rank in every batch.

    A loader's batch is that of all ranks together. Each rank takes a piece of it, in order of rank, the pieces being
    equal up to one sample; so the order of an epoch, how many batches it has and where a checkpoint is cut do not depend
    on how many ranks there are.

    Args:
        rank: Number of the rank, from 0.
        world: How many ranks there are.

    Example:
        >>> [Share(rank, 3).of(range(8)) for rank in range(3)]
        [range(0, 2), range(2, 5), range(5, 8)]
    """

    rank: int
    world: int

    def limits(self, samples: int) -> tuple[int, int]:
        """Return where the rank's piece of so many samples begins and ends."""
        return samples * self.rank // self.world, samples * (self.rank + 1) // self.world

    def of(self, samples: Sequence[Any]) -> Sequence[Any]:
        """Return the rank's piece; it is empty where there are more ranks than samples."""
        start, end = self.limits(len(samples))
        return samples[start:end]

    def taken(self, samples: Sequence[Any]) -> Sequence[Any]:
        """Return what the rank loads: its piece, or the first sample where that is empty.

        So every rank has a batch that models and algorithms can look at; that sample counts nothing in it.
        """
        own = self.of(samples)
        return own if len(own) else samples[:1]

    def cut(self, fetched: Iterable[Fetched]) -> Iterator[Fetched]:
        """Yield the rank's part of batches that were loaded whole."""
        for batch, ids, _, whole in fetched:
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
