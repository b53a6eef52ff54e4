"""Deterministic, resumable order over a loader; sample ids.

The order of a ``DataLoader`` over a map-style dataset becomes a function of (seed, epoch), and what its dataset and
collate function draw a function of (seed, epoch, sample): whatever the number of workers, and wherever a run was cut.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    StackDataset,
    Subset,
    TensorDataset,
    default_collate,
    default_convert,
    get_worker_info,
)
from typing_extensions import override

from .batches import batch_size_of, count_weight, forward_arguments, split_batch, to_device
from .errors import ArgumentError, DataError
from .randomness import Randomness, Stream, derive_seed

__all__ = [
    "Fetched",
    "ResumableLoader",
    "batch_size_of",
    "count_weight",
    "forward_arguments",
    "split_batch",
    "to_device",
]

_TRAIN = "Trainer.fit(train_loader=)"
_EXAMPLE = "trainer.fit(model, DataLoader(dataset, batch_size=32, shuffle=True), duration='3ep')"
# Batches whose indices are drawn at once: putting the global generators aside costs as much as some ten batches' indices.
_DRAWN = 256


class Fetched(NamedTuple):
    """One batch of a loader.

    Args:
        batch: What the loader yields.
        sample_ids: What the sampler called its samples, where it is known and they are whole numbers.
        samples: How many samples it was made of.
    """

    batch: Any
    sample_ids: tuple[int, ...] | None
    samples: int


class ResumableLoader:
    """A loader read in an order that depends on the seed and the epoch alone, from any batch on.

    A ``DataLoader`` over a map-style dataset goes on at any batch without loading those before it. Iterating leaves
    the global random generators of torch, NumPy and Python as they are, and the caller's loader untouched. A dataset
    with a ``__getitems__`` of its own is seeded once a batch, any other once a sample.

    Args:
        loader: A ``DataLoader``, a list of ready batches, or any iterable of batches.
        seed: Seed of the run.
        argument: The argument the loader was passed as, for errors.

    Raises:
        ArgumentError: It is not an iterable of batches.
        DataError: It says that it has no batches.

    Example:
        >>> dataset = TensorDataset(torch.arange(6))
        >>> loader = ResumableLoader(DataLoader(dataset, batch_size=2, shuffle=True), seed=0)
        >>> whole = [fetched.sample_ids for fetched in loader.batches(epoch=1)]
        >>> whole[2:] == [fetched.sample_ids for fetched in loader.batches(epoch=1, start=2)]
        True
        >>> loader.length, loader.exact, loader.limits
        (3, True, ())
    """

    def __init__(self, loader: Iterable[Any], *, seed: int, argument: str = _TRAIN) -> None:
        _check_loader(loader, argument)
        self._loader = loader
        self._name = argument.partition("(")[2].rstrip("=)") or argument
        self._length = _length(loader)
        if self._length == 0:
            raise self._empty()
        self._source = _source(loader, seed, self._name)

    @property
    def length(self) -> int | None:
        """Batches of an epoch, or None where the loader does not say."""
        return self._length

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError(f"{self._name} of type {type(self._loader).__name__} does not say how many batches it has")
        return self._length

    @property
    def exact(self) -> bool:
        """Whether a run that is cut anywhere goes on with exactly the batches it would have had."""
        return not self.limits

    @property
    def limits(self) -> tuple[str, ...]:
        """What cannot be resumed exactly, one sentence each."""
        return self._source.limits

    def batches(self, epoch: int, start: int = 0) -> Iterator[Fetched]:
        """Yield the batches of an epoch.

        Args:
            epoch: Number of the epoch, from 0.
            start: Number of the first batch wanted, from 0.

        Raises:
            DataError: The epoch has no batches at all, or the loader can be read only once and was.
        """
        empty = True
        for fetched in self._source.batches(epoch, start):
            empty = False
            yield fetched
        if empty and not start:
            raise self._empty()

    def close(self) -> None:
        """Stop workers that persist between epochs."""
        self._source.close()

    def _empty(self) -> DataError:
        return DataError(f"{self._name} yields no batch: got {_account(self._loader)}")


# -- sources: how each kind of loader is read ------------------------------------------------------------------------------


class _Source(Protocol):
    limits: tuple[str, ...]

    def batches(self, epoch: int, start: int) -> Iterator[Fetched]: ...

    def close(self) -> None: ...


def _source(loader: Iterable[Any], seed: int, name: str) -> _Source:
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        kind = type(loader)
        if kind.__iter__ is DataLoader.__iter__ and kind._get_iterator is DataLoader._get_iterator:
            return _MapSource(loader, seed)
    if isinstance(loader, Sequence):
        return _ListSource(loader)
    return _IterableSource(loader, seed, name)


class _ListSource:
    """Batches that lie ready."""

    limits = ()

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches

    def batches(self, epoch: int, start: int) -> Iterator[Fetched]:
        for number in range(start, len(self._batches)):
            batch = self._batches[number]
            yield Fetched(batch, None, _samples_in(batch))

    def close(self) -> None: ...


class _IterableSource:
    """Anything that can only be read from its beginning; what it draws comes from a stream of random numbers apart."""

    def __init__(self, loader: Iterable[Any], seed: int, name: str) -> None:
        self._loader = loader
        self._seed = seed
        self._name = name
        self._once = isinstance(loader, Iterator)
        self._read = False
        kind = type(loader).__name__
        if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset):
            kind = f"{kind} over {type(loader.dataset).__name__}"
        if self._once:
            text = f"{name} is a {kind}, which can be read once: a run that is cut inside it cannot be resumed exactly."
        else:
            text = (
                f"{name} is a {kind}, which can only be read from its beginning: a resumed run loads again and drops the "
                "batches it had, and continues exactly only if they come again as they were."
            )
        self.limits: tuple[str, ...] = (text,)

    def batches(self, epoch: int, start: int) -> Iterator[Fetched]:
        if self._once and (self._read or epoch):
            raise DataError(
                f"{self._name} is a {type(self._loader).__name__}, which can be read once, and epoch {epoch} reads it "
                "again. Write: a list of its batches, a DataLoader, or an object whose __iter__ starts anew."
            )
        self._read = True
        _tell_epoch(self._loader, epoch)
        stream = Stream(Randomness(self._loader), derive_seed(self._seed, "iterable", epoch))
        with stream:
            iterator = iter(self._loader)
        while True:
            with stream:
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            if start:
                start -= 1
            else:
                yield Fetched(batch, None, _samples_in(batch))

    def close(self) -> None: ...


class _MapSource:
    """A DataLoader over a map-style dataset, read through a second one that is given keys instead of indices."""

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        self._seed = seed
        self._batched = loader.batch_sampler is not None
        self._indices: Iterable[Any] = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
        self._keys = _Keys()
        self._generator = torch.Generator()
        self._twin: DataLoader[Any] | None = _twin(loader, _KeyedDataset(loader, seed), self._keys, self._generator)
        self._make = lambda: _twin(loader, _KeyedDataset(loader, seed), self._keys, self._generator)
        self.limits = tuple(_hidden_state(each) for each in _samplers(self._indices) if _keeps_state(each, seed))

    def batches(self, epoch: int, start: int) -> Iterator[Fetched]:
        if self._twin is None:
            self._twin = self._make()
        drawn: deque[Any] = deque()
        self._keys.next = self._draw(epoch, start, drawn)
        # Workers are seeded by a number from here, and not from the global generator.
        self._generator.manual_seed(derive_seed(self._seed, "workers", epoch, start))
        for batch in self._twin:
            indices = drawn.popleft()
            ids = _sample_ids(indices)
            if self._batched:
                yield Fetched(batch, ids, len(indices))
            else:
                samples = _samples_in(batch)
                yield Fetched(batch, ids if ids is not None and len(ids) == samples else None, samples)

    def close(self) -> None:
        self._twin = None

    def _draw(self, epoch: int, start: int, drawn: deque[Any]) -> Iterator[_Key]:
        for indices in islice(_order(self._indices, self._seed, epoch), start, None):
            drawn.append(indices)
            yield _Key(epoch, indices)


# -- the order of an epoch -------------------------------------------------------------------------------------------------


def _order(indices: Iterable[Any], seed: int, epoch: int) -> Iterator[Any]:
    """Yield what a sampler or batch sampler yields in an epoch, as a function of (seed, epoch)."""
    samplers = _samplers(indices)
    for sampler in samplers:
        _tell_epoch(sampler, epoch)
    stream = Stream(Randomness(*samplers), derive_seed(seed, "order", epoch))
    with stream:
        iterator = iter(indices)
    while True:
        with stream:
            chunk = list(islice(iterator, _DRAWN))
        yield from chunk
        if len(chunk) < _DRAWN:
            return


def _samplers(indices: object) -> list[object]:
    """Return a batch sampler and the samplers that it draws from, outermost first."""
    found: list[object] = []
    while indices is not None and not any(each is indices for each in found):
        found.append(indices)
        indices = getattr(indices, "sampler", None)
    return found


def _tell_epoch(thing: object, epoch: int) -> None:
    """Call ``set_epoch`` of a sampler, or of a loader and what it is made of."""
    for each in (thing, *(getattr(thing, name, None) for name in ("dataset", "sampler", "batch_sampler"))):
        if callable(tell := getattr(each, "set_epoch", None)):
            tell(epoch)


def _keeps_state(sampler: object, seed: int) -> bool:
    """Return whether a sampler of the user's, drawn from twice with the same random numbers, gives two orders.

    It is tried on a copy, lists included, so that a counter or a list shuffled in place stays as it is.
    """
    if type(sampler).__module__.startswith("torch.utils.data") or not hasattr(sampler, "__dict__"):
        return False
    try:
        trial = object.__new__(type(sampler))
        vars(trial).update({key: list(each) if type(each) is list else each for key, each in vars(sampler).items()})
    except TypeError:
        return False
    if not isinstance(trial, Iterable):
        return False
    randomness = Randomness(*_samplers(trial))
    draws: list[str] = []
    for _ in range(2):
        with randomness.kept():
            randomness.seed(derive_seed(seed, "trial"))
            draws.append(repr(list(islice(iter(trial), _DRAWN))))
    return draws[0] != draws[1]


def _hidden_state(sampler: object) -> str:
    kind = type(sampler).__name__
    return (
        f"the sampler {kind} keeps state of its own between epochs, so its order is not a function of the epoch: a "
        f"resumed run may see another one. Write: {kind}.set_epoch(epoch), and derive the order from it."
    )


# -- the second loader -----------------------------------------------------------------------------------------------------


class _Key(NamedTuple):
    """What the second loader's sampler yields: all that loading a batch depends on, besides the seed."""

    epoch: int
    indices: Any


class _Keys(Sampler[Any]):
    """A sampler that yields the keys it was handed last, so that one loader (and its workers) serves all epochs."""

    def __init__(self) -> None:
        self.next: Iterator[_Key] = iter(())

    @override
    def __iter__(self) -> Iterator[_Key]:
        return self.next


class _KeyedDataset(Dataset[Any]):
    """The user's dataset and collate function, called for a key with the random generators seeded from it."""

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        self.dataset: Any = loader.dataset
        self._collate: Callable[[Any], Any] = loader.collate_fn
        self._seed = seed
        self._batched = loader.batch_sampler is not None
        self._at_once = _takes_batches(loader.dataset)
        self._seeds_samples = not _is_plain(loader.dataset)
        self._seeds_collate = loader.collate_fn is not default_collate and loader.collate_fn is not default_convert
        self._found: Randomness | None = None

    @override
    def __getitem__(self, key: _Key) -> Any:
        if not (self._seeds_samples or self._seeds_collate):
            return self._collate(self._fetch(key, None))
        if self._found is None:  # in a worker, its copies of the generators and not the ones they were copied from
            self._found = Randomness(self.dataset, self._collate)
        if get_worker_info() is not None:
            return self._load(key, self._found)
        with self._found.kept():
            return self._load(key, self._found)

    def _load(self, key: _Key, randomness: Randomness) -> Any:
        samples = self._fetch(key, randomness if self._seeds_samples else None)
        if self._seeds_collate:
            randomness.seed(derive_seed(self._seed, "collate", key.epoch, _canonical(key.indices)))
        return self._collate(samples)

    def _fetch(self, key: _Key, randomness: Randomness | None) -> Any:
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

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_found": None}


class _WorkerInit:
    """Shows the worker the user's own dataset in ``get_worker_info()``, then does what the user asked for."""

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self._then = then

    def __call__(self, worker: int) -> None:
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, _KeyedDataset):
            info.dataset._found = None
            # The class forbids assignment, and says the same of every other way.
            object.__setattr__(info, "dataset", info.dataset.dataset)
        if self._then is not None:
            self._then(worker)


def _twin(loader: DataLoader[Any], dataset: _KeyedDataset, keys: _Keys, generator: torch.Generator) -> DataLoader[Any]:
    """Return a loader of the same settings that yields batches for keys."""
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


def _as_it_is(batch: Any) -> Any:
    return batch


def _takes_batches(dataset: object) -> bool:
    """Return whether ``__getitems__`` is the dataset's own, and not one that asks for sample after sample."""
    if isinstance(dataset, Subset) and type(dataset).__getitems__ is Subset.__getitems__:
        return _takes_batches(dataset.dataset)
    return callable(getattr(dataset, "__getitems__", None))


def _is_plain(dataset: object) -> bool:
    """Return whether looking up a sample draws no random numbers: tensors, arrays and lists, and parts of them."""
    kind = type(dataset)
    if kind is Subset:
        return _is_plain(dataset.dataset)  # type: ignore[attr-defined]
    if kind is ConcatDataset:
        return all(_is_plain(each) for each in dataset.datasets)  # type: ignore[attr-defined]
    if kind is StackDataset:
        parts = dataset.datasets  # type: ignore[attr-defined]
        return all(_is_plain(each) for each in (parts.values() if isinstance(parts, dict) else parts))
    return kind in {TensorDataset, list, tuple, dict, range, np.ndarray, Tensor}


def _canonical(index: Any) -> Any:
    """Return an index so that its ``repr`` is the same for 5, ``np.int64(5)`` and ``torch.tensor(5)``."""
    if isinstance(index, (list, tuple)):
        return [_canonical(each) for each in index]
    try:
        return operator.index(index)
    except TypeError:
        return index


def _sample_ids(indices: Any) -> tuple[int, ...] | None:
    try:
        return tuple(map(operator.index, indices if isinstance(indices, (list, tuple)) else (indices,)))
    except TypeError:
        return None


# -- checks and counts -----------------------------------------------------------------------------------------------------


def _check_loader(loader: object, argument: str) -> None:
    iterable = isinstance(loader, Iterable) or (hasattr(loader, "__getitem__") and hasattr(loader, "__len__"))
    single = isinstance(loader, (str, bytes, Mapping, Tensor, np.ndarray))
    bare = isinstance(loader, Dataset) and not isinstance(loader, (DataLoader, IterableDataset))
    if not iterable or single or bare:
        got = f"a dataset ({type(loader).__name__}) without a loader" if bare else loader
        takes = "a DataLoader, a list of batches, or another iterable of batches"
        raise ArgumentError(argument, got=got, takes=takes, example=_EXAMPLE)


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _samples_in(batch: Any) -> int:
    """Return the samples in a batch; one of a kind that only the user's ``forward_fn`` understands counts as one."""
    try:
        return batch_size_of(batch)
    except DataError:
        return 1


def _account(loader: Any) -> str:
    """Say what an empty loader is, and what to write instead."""
    kind = type(loader).__name__
    if not isinstance(loader, DataLoader):
        return f"a {kind} with nothing in it. Write: a DataLoader over a dataset with samples."
    size = _length(loader.dataset)
    what = f"a {kind} over {type(loader.dataset).__name__}" + ("" if size is None else f" with {size} samples")
    if size and loader.drop_last:
        return f"{what}, batch_size={loader.batch_size} and drop_last=True. Write: drop_last=False, or a smaller batch_size."
    if size:
        return f"{what}, whose sampler yields no index. Write: shuffle=True, or a sampler that can be read every epoch."
    return f"{what}. Write: a dataset with samples."
