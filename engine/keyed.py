"""The second loader: given keys instead of indices, it loads a batch as a function of its key."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    Sampler,
    StackDataset,
    Subset,
    TensorDataset,
    default_collate,
    default_convert,
    get_worker_info,
)
from typing_extensions import override

from .randomness import Randomness, derive_seed


class Key(NamedTuple):
    """What the second loader's sampler yields: all that loading a batch depends on, besides the seed."""

    epoch: int
    indices: Any


class Keys(Sampler[Any]):
    """A sampler that yields the keys it was handed last, so that one loader (and its workers) serves all epochs."""

    def __init__(self) -> None:
        self.next: Iterator[Key] = iter(())

    @override
    def __iter__(self) -> Iterator[Key]:
        return self.next


def keyed_loader(
    loader: DataLoader[Any], dataset: KeyedDataset, keys: Keys, generator: torch.Generator
) -> DataLoader[Any]:
    """Return a loader of the same settings that yields batches for keys.

    Args:
        loader: The user's loader.
        dataset: Its dataset, made to take keys.
        keys: Where the keys come from.
        generator: What workers are seeded from, in place of the global generator.
    """
    options: dict[str, Any] = {"pin_memory_device": loader.pin_memory_device} if loader.pin_memory_device else {}
    if loader.num_workers:
        options["multiprocessing_context"] = loader.multiprocessing_context
        options["prefetch_factor"] = loader.prefetch_factor
        options["persistent_workers"] = loader.persistent_workers
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=keys,
        num_workers=loader.num_workers,
        collate_fn=_as_it_is,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=_WorkerInit(loader.worker_init_fn),
        generator=generator,
        **options,
    )


class KeyedDataset(Dataset[Any]):
    """The user's dataset and collate function, called for a key with the random generators seeded from it.

    A sample's seed is a function of (seed, epoch, sample), or of (seed, epoch, batch) where the dataset loads batches
    by itself; the collate function's is one of (seed, epoch, batch). What draws nothing is not seeded.

    Args:
        loader: The user's loader.
        seed: Seed of the run.
    """

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        self.dataset: Any = loader.dataset
        self._collate: Callable[[Any], Any] = loader.collate_fn
        self._seed = seed
        self._batched = loader.batch_sampler is not None
        self._at_once = _takes_batches(loader.dataset)
        self._seeds_samples = not is_plain(loader.dataset)
        self._seeds_collate = loader.collate_fn is not default_collate and loader.collate_fn is not default_convert
        self._found: Randomness | None = None

    @override
    def __getitem__(self, key: Key) -> Any:
        if not (self._seeds_samples or self._seeds_collate):
            return self._collate(self._fetch(key, None))
        if self._found is None:  # in a worker, its copies of the generators and not the ones they were copied from
            return self._first(key)
        return self._kept(key, self._found)

    def _first(self, key: Key) -> Any:
        """Load the first batch, and load it again where that has made generators: they were not seeded yet."""
        before = Randomness(self.dataset, self._collate)
        batch = self._kept(key, before)
        self._found = Randomness(self.dataset, self._collate)
        return batch if len(self._found) == len(before) else self._kept(key, self._found)

    def _kept(self, key: Key, randomness: Randomness) -> Any:
        if get_worker_info() is not None:
            return self._load(key, randomness)
        with randomness.kept():
            return self._load(key, randomness)

    def _load(self, key: Key, randomness: Randomness) -> Any:
        samples = self._fetch(key, randomness if self._seeds_samples else None)
        if self._seeds_collate:
            randomness.seed(derive_seed(self._seed, "collate", key.epoch, _canonical(key.indices)))
        return self._collate(samples)

    def _fetch(self, key: Key, randomness: Randomness | None) -> Any:
        epoch, indices = key
        if self._batched and not self._at_once:
            samples: list[Any] = []
            for index in indices:
                if randomness is not None:
                    randomness.seed(derive_seed(self._seed, "sample", epoch, _canonical(index)))
                samples.append(self.dataset[index])
            return samples
        if randomness is not None:
            randomness.seed(derive_seed(self._seed, "sample", epoch, _canonical(indices)))
        return self.dataset.__getitems__(indices) if self._batched else self.dataset[indices]


def copied_dataset(dataset: Any) -> Any:
    """Return a dataset to load from on the side: a file that it opens at its first sample is not open in the user's."""
    if not hasattr(dataset, "__dict__"):
        return dataset
    aside = copy.copy(dataset)
    if isinstance(inner := vars(dataset).get("dataset"), Dataset):
        vars(aside)["dataset"] = copied_dataset(inner)
    return aside


class _WorkerInit:
    """Shows the worker the user's own dataset in ``get_worker_info()``, then does what the user asked for."""

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self._then = then

    def __call__(self, worker: int) -> None:
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, KeyedDataset):
            # The class forbids assignment, and says the same of every other way.
            object.__setattr__(info, "dataset", info.dataset.dataset)
        if self._then is not None:
            self._then(worker)


def _as_it_is(batch: Any) -> Any:
    return batch


def _takes_batches(dataset: object) -> bool:
    """Return whether ``__getitems__`` is the dataset's own, and not one that asks for sample after sample."""
    if isinstance(dataset, Subset) and type(dataset).__getitems__ is Subset.__getitems__:
        return _takes_batches(dataset.dataset)
    return callable(getattr(dataset, "__getitems__", None))


def is_plain(dataset: object) -> bool:
    """Return whether looking up a sample draws no random numbers: tensors, arrays and lists, and parts of them."""
    kind = type(dataset)
    if kind is Subset:
        return is_plain(dataset.dataset)  # type: ignore[attr-defined]
    if kind is ConcatDataset:
        return all(is_plain(each) for each in dataset.datasets)  # type: ignore[attr-defined]
    if kind is StackDataset:
        parts = dataset.datasets  # type: ignore[attr-defined]
        return all(is_plain(each) for each in (parts.values() if isinstance(parts, dict) else parts))
    return kind in {TensorDataset, list, tuple, dict, range, np.ndarray, Tensor}


def _canonical(index: Any) -> Any:
    """Return an index so that its ``repr`` is the same for 5, ``np.int64(5)`` and ``torch.tensor(5)``."""
    if isinstance(index, (list, tuple)):
        return [_canonical(each) for each in index]
    try:
        return operator.index(index)
    except TypeError:
        return index
