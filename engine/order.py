"""The order of an epoch: what a sampler yields, as a function of (seed, epoch)."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import BatchSampler

from .randomness import Randomness, Stream, derive_seed

# Indices drawn at once: putting the global generators aside costs as much as drawing some tens of batches.
_DRAWN = 256


def epoch_order(indices: Iterable[Any], seed: int, epoch: int, start: int = 0) -> Iterator[Any]:
    """Yield what a sampler or batch sampler yields in an epoch, as a function of (seed, epoch).

    All the generators it draws from, the global ones and those it keeps, are seeded for the draw and put back.

    Args:
        indices: A sampler or batch sampler; a ``set_epoch`` of its own, or of one it draws from, is called.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
        start: How many to leave out.

    Example:
        >>> from torch.utils.data import RandomSampler
        >>> sampler = RandomSampler(range(100))
        >>> list(epoch_order(sampler, 0, 3)) == list(epoch_order(sampler, 0, 3)) != list(epoch_order(sampler, 0, 4))
        True
    """
    samplers = _samplers(indices)
    tell_epoch(samplers, epoch)
    stream = Stream(Randomness(*samplers), derive_seed(seed, "order", epoch))
    with stream:
        iterator = _from(indices, start)
        chunk = list(islice(iterator, _DRAWN))
    while True:
        yield from chunk
        if len(chunk) < _DRAWN:
            return
        with stream:
            chunk = list(islice(iterator, _DRAWN))


def _from(indices: Iterable[Any], start: int) -> Iterator[Any]:
    """Iterate from ``start`` on; torch's batch sampler without making the batches before."""
    if type(indices) is not BatchSampler:
        return islice(indices, start, None)
    size, drop_last = indices.batch_size, indices.drop_last
    samples = islice(indices.sampler, start * size, None) if start else iter(indices.sampler)
    batches = iter(lambda: list(islice(samples, size)), [])
    return (batch for batch in batches if len(batch) == size) if drop_last else batches


def tell_epoch(things: Iterable[object], epoch: int) -> None:
    """Call ``set_epoch`` of each thing that has one."""
    for each in things:
        if callable(tell := getattr(each, "set_epoch", None)):
            tell(epoch)


def order_limits(indices: Iterable[Any], seed: int) -> tuple[str, ...]:
    """Return a sentence for each sampler whose order is not a function of (seed, epoch).

    A sampler of the user's is drawn from twice with the same random numbers, on a copy, so that a counter or a list
    shuffled in place stays as it is.
    """
    return tuple(_sentence(each) for each in _samplers(indices) if _keeps_state(each, seed))


def copied_sampler(indices: Iterable[Any]) -> Iterable[Any] | None:
    """Return a sampler to draw from that leaves the user's as it is; None where drawing uses it up."""
    if isinstance(indices, Iterator) or any(
        isinstance(each, Iterator) for each in getattr(indices, "__dict__", {}).values()
    ):
        return None
    return _trial(indices) if hasattr(indices, "__dict__") else indices


def _samplers(indices: object) -> list[object]:
    """Return a batch sampler and the samplers that it draws from, outermost first."""
    found: list[object] = []
    while indices is not None and not any(each is indices for each in found):
        found.append(indices)
        indices = getattr(indices, "sampler", None)
    return found


def _keeps_state(sampler: object, seed: int) -> bool:
    if isinstance(sampler, Iterator):
        return True
    if type(sampler).__module__.startswith("torch.utils.data") or not hasattr(sampler, "__dict__"):
        return False
    if any(isinstance(each, Iterator) for each in vars(sampler).values()):
        return True
    trial = _trial(sampler)
    randomness = Randomness(*_samplers(trial))
    draws: list[str] = []
    for _ in range(2):
        with randomness.kept():
            randomness.seed(derive_seed(seed, "trial"))
            draws.append(repr(list(islice(iter(trial), _DRAWN))))
    return draws[0] != draws[1]


def _trial(sampler: Any) -> Any:
    """Return a copy of a sampler, and of those it draws from, that shares nothing it is likely to change."""
    trial = copy.copy(sampler)
    for name, value in vars(sampler).items():
        if isinstance(value, Tensor):
            vars(trial)[name] = value.clone()
        elif isinstance(value, (list, dict, set, deque, np.ndarray)):
            vars(trial)[name] = copy.copy(value)
        elif name == "sampler" and hasattr(value, "__dict__"):
            vars(trial)[name] = _trial(value)
    return trial


def _sentence(sampler: object) -> str:
    kind = type(sampler).__name__
    return (
        f"the sampler {kind} keeps state of its own between epochs, so its order is not a function of the epoch: a "
        f"resumed run may see another one. Write: {kind}.set_epoch(epoch), and derive the order from it."
    )
