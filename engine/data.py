"""Deterministic, resumable order over a loader; sample ids.

The order of a ``DataLoader`` over a map-style dataset becomes a function of (seed, epoch), and what its dataset and
collate function draw a function of (seed, epoch, sample): whatever the number of workers, and wherever a run was cut.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice, repeat
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from .batches import (
    Fetched,
    Unloaded,
    batch_size_of,
    count_weight,
    forward_arguments,
    samples_in,
    split_batch,
    to_device,
)
from .errors import ArgumentError, CheckpointError, DataError, warn, with_article
from .keyed import Key, KeyedDataset, Keys, copied_dataset, keyed_loader
from .log import get_logger
from .order import copied_sampler, epoch_order, order_limits, tell_epoch
from .randomness import Randomness, Stream, derive_seed
from .shares import Share, check_shares, digest_of
from .stateful import StatefulSource, is_stateful
from .typing import Json
from .workers import outliving

__all__ = [
    "Fetched",
    "ResumableLoader",
    "Unloaded",
    "batch_size_of",
    "count_weight",
    "forward_arguments",
    "gathered",
    "split_batch",
    "to_device",
]

log = get_logger(__name__)
_TRAIN = "Trainer.fit(train_loader=)"
# In a third of the time of Fetched(…), once a batch.
_new = tuple.__new__
# Batches whose samples are drawn at once where none of them is loaded.
_AHEAD = 64
_EXAMPLE = "trainer.fit(model, DataLoader(dataset, batch_size=32, shuffle=True), duration='3ep')"


class ResumableLoader:
    """A loader read in an order that depends on the seed and the epoch alone, from any batch on.

    A ``DataLoader`` over a map-style dataset goes on at any batch without loading those before it. Iterating leaves
    the global random generators of torch, NumPy and Python as they are, and the caller's loader untouched. A dataset
    with a ``__getitems__`` of its own is seeded once a batch, any other once a sample. A loader with ``state_dict``
    and ``load_state_dict`` is used as it is.

    Args:
        loader: A ``DataLoader``, a list of ready batches, or any iterable of batches.
        seed: Seed of the run.
        argument: The argument the loader was passed as, for errors.
        accumulate: How many batches are fetched for a step; the state before them can be asked for until the next.
        share: Which part of each batch is this rank's; None for the whole of it. A ``DataLoader`` over a map-style dataset
            loads that part alone; of others the batch is loaded whole, on every rank, and cut.

    Raises:
        ArgumentError: It is not an iterable of batches.
        DataError: It says that it has no batches.
        DistributedError: Its full batches cannot be shared evenly, or it shares its data out itself.

    Example:
        >>> dataset = torch.utils.data.TensorDataset(torch.arange(6))
        >>> loader = ResumableLoader(DataLoader(dataset, batch_size=2, shuffle=True), seed=0)
        >>> whole = [fetched.sample_ids for fetched in loader.batches(epoch=1)]
        >>> whole[2:] == [fetched.sample_ids for fetched in loader.batches(epoch=1, start=2)]
        True
        >>> loader.length, loader.exact, loader.limits
        (3, True, ())
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        seed: int,
        argument: str = _TRAIN,
        accumulate: int = 1,
        share: Share | None = None,
    ) -> None:
        _check_loader(loader, argument)
        self._loader = loader
        self._name = argument.partition("(")[2].rstrip("=)") or argument
        self._length = _length(loader)
        if self._length == 0:
            raise self._empty()
        if share is not None and argument == _TRAIN:
            share = share.with_homes(seed)
        self._source = _source(loader, seed, self._name, accumulate, share)
        self._share = None if isinstance(self._source, _MapSource) and self._source.loads_a_share else share
        self._first_size: int | None = None
        self._digests: list[str] = []
        if share is not None:
            self._first_size = next(iter(self._source.sizes(0) or ()), None)
            check_shares(loader, self._first_size, share.world, self._name, even=argument == _TRAIN)

    @property
    def length(self) -> int | None:
        """Batches of an epoch, or None where the loader does not say."""
        return self._length

    def say_limits(self, *, resumable: bool) -> None:
        """Say what a resumed run cannot continue exactly: a warning where somebody may resume it, else a line of the log."""
        for limit in self.limits:
            if resumable:
                warn(limit)
            else:
                log.warning("data order", limit=limit)

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError(f"{self._name} of type {type(self._loader).__name__} does not say how many batches it has")
        return self._length

    @property
    def facts(self) -> dict[str, Json]:
        """What has to be the same on all ranks: batches of an epoch, samples, and those of the first batch; None where unknown."""
        source = self._source
        samples = source.samples if isinstance(source, _MapSource) else None
        return {"batches": self._length, "samples": samples, "samples of the first batch": self._first_size}

    def digest(self) -> str:
        """Return a hash of the first batch that was read, or of the first sample of all: what is equal on ranks that read the same."""
        return self._digests[0] if self._digests else digest_of(self.peek(1))

    @property
    def exact(self) -> bool:
        """Whether a run that is cut anywhere goes on with exactly the batches it would have had."""
        return not self.limits

    @property
    def limits(self) -> tuple[str, ...]:
        """What cannot be resumed exactly, one sentence each."""
        return self._source.limits

    def batches(self, epoch: int, start: int = 0, *, unloaded_for: torch.device | None = None) -> Iterator[Fetched]:
        """Return the batches of an epoch, the first of which is read at once.

        Args:
            epoch: Number of the epoch, from 0.
            start: Number of the first batch wanted, from 0.
            unloaded_for: Yield each as an :class:`~thawline.engine.batches.Unloaded` for this device, where the loader's
                sampler tells the samples of each.

        Raises:
            DataError: The epoch has no batches at all, or the loader can be read only once and was.
        """
        source = self._source
        if unloaded_for is not None and isinstance(source, _MapSource) and source.can_wait:
            batches = source.unloaded(epoch, start, unloaded_for)
        else:
            batches = source.batches(epoch, start)
        if self._share is not None:
            batches = self._share.cut(batches, self._digests.append)
        first = next(batches, None)
        if first is None and not start:
            raise self._empty()
        return batches if first is None else chain((first,), batches)

    def sizes(self, epoch: int) -> Iterator[int] | None:
        """Yield the samples in each batch of an epoch without loading one; None where the loader does not say."""
        return self._source.sizes(epoch)

    def peek(self, samples: int | None = None) -> Any:
        """Return the first batch, or its first ``samples``, loaded on the side; None where that would disturb the loader.

        Neither the sampler nor a worker has a part in it, and random number generators are as before.
        """
        return self._source.peek(samples)

    def state_dict(self, epoch: int, start: int) -> dict[str, Any] | None:
        """Return the state of a loader that keeps its place itself, as it was before a batch; None for any other.

        Args:
            epoch: Number of the epoch.
            start: Number of the batch that comes next, or the first of the step that is in hand.
        """
        source = self._source
        return source.state_dict(epoch, start) if isinstance(source, StatefulSource) else None

    def load_state_dict(self, state: Mapping[str, Any] | None, epoch: int, start: int) -> None:
        """Put back what :meth:`state_dict` returned for the same place.

        Raises:
            CheckpointError: One of the two loaders keeps its place itself, and the other does not.
        """
        source = self._source
        if (state is not None) != isinstance(source, StatefulSource):
            had, has = ("a", "no") if state is not None else ("no", "a")
            raise CheckpointError(
                f"the run was saved with {had} {self._name} that has a state_dict of its own, and is given one with {has} "
                "state_dict now: their orders differ. Give the same kind of loader."
            )
        if state is not None and isinstance(source, StatefulSource):
            source.load_state_dict(state, epoch, start)

    def close(self) -> None:
        """Stop workers that persist between epochs."""
        self._source.close()

    def _empty(self) -> DataError:
        return DataError(f"{self._name} yields no batch: got {_account(self._loader)}")


def gathered(
    fetched: Sequence[Fetched], accumulate: int, device: torch.device
) -> tuple[Any, tuple[int, ...] | None, int]:
    """Return a step's batch on the device, or a list of them where it accumulates, its sample ids, and its samples over all ranks."""
    if accumulate == 1:
        ((batch, sample_ids, _, samples),) = fetched
        return to_device(batch, device), sample_ids, samples
    batches = [to_device(each.batch, device) for each in fetched]
    ids = [each.sample_ids for each in fetched]
    known = None if None in ids else tuple(chain.from_iterable(each for each in ids if each is not None))
    return batches, known, sum(each.whole for each in fetched)


# -- sources: how each kind of loader is read ------------------------------------------------------------------------------


class _Source(Protocol):
    limits: tuple[str, ...]

    def batches(self, epoch: int, start: int) -> Iterator[Fetched]: ...

    def sizes(self, epoch: int) -> Iterator[int] | None: ...

    def peek(self, samples: int | None) -> Any: ...

    def close(self) -> None: ...


def _source(loader: Iterable[Any], seed: int, name: str, accumulate: int, share: Share | None) -> _Source:
    if is_stateful(loader):
        return StatefulSource(loader, seed, name, accumulate)
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        kind = type(loader)
        if kind.__iter__ is DataLoader.__iter__ and kind._get_iterator is DataLoader._get_iterator:
            return _MapSource(loader, seed, share)
    if isinstance(loader, Sequence):
        return _ListSource(loader)
    return _IterableSource(loader, seed, name)


class _ListSource:
    """Batches that lie ready."""

    limits: tuple[str, ...] = ()

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches

    def batches(self, epoch: int, start: int) -> Iterator[Fetched]:  # noqa: ARG002 - the same in every epoch
        for number in range(start, len(self._batches)):
            batch = self._batches[number]
            samples = samples_in(batch)
            yield _new(Fetched, (batch, None, samples, samples))

    def sizes(self, epoch: int) -> Iterator[int] | None:  # noqa: ARG002 - the same in every epoch
        return map(samples_in, self._batches) if self._lie_ready else None

    def peek(self, samples: int | None) -> Any:  # noqa: ARG002 - a batch lies ready as it is
        return self._batches[0] if self._lie_ready else None

    @property
    def _lie_ready(self) -> bool:
        return isinstance(self._batches, (list, tuple))

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
            text = f"{name} is {with_article(kind)}, which can be read once: a run that is cut inside it cannot be resumed exactly."
        else:
            text = (
                f"{name} is {with_article(kind)}, which can only be read from its beginning: a resumed run loads again and drops the "
                "batches it had, and continues exactly only if they come again as they were."
            )
        self.limits: tuple[str, ...] = (text,)

    def batches(self, epoch: int, start: int) -> Iterator[Fetched]:
        if self._once and (self._read or epoch):
            raise DataError(
                f"{self._name} is {with_article(type(self._loader).__name__)}, which can be read once, and epoch {epoch} reads it "
                "again. Write: a list of its batches, a DataLoader, or an object whose __iter__ starts anew."
            )
        self._read = True
        parts = (getattr(self._loader, name, None) for name in ("dataset", "sampler", "batch_sampler"))
        tell_epoch((self._loader, *parts), epoch)
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
                samples = samples_in(batch)
                yield Fetched(batch, None, samples, samples)

    def sizes(self, epoch: int) -> Iterator[int] | None:  # noqa: ARG002 - the same in every epoch
        size = self._loader.batch_size if isinstance(self._loader, DataLoader) else None
        return None if size is None else repeat(size)

    def peek(self, samples: int | None) -> Any:  # noqa: ARG002 - there is nothing to read without using it up
        return None

    def close(self) -> None: ...


class _MapSource:
    """A DataLoader over a map-style dataset, read through a second one that is given keys instead of indices."""

    def __init__(self, loader: DataLoader[Any], seed: int, share: Share | None) -> None:
        self._loader = loader
        self._seed = seed
        self._batched = loader.batch_sampler is not None
        self._share = share if self._batched else None  # a batch that the dataset yields as a whole is cut by others
        self._indices: Iterable[Any] = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
        self._keys = Keys()
        self._generator = torch.Generator()
        self._dataset = KeyedDataset(loader, seed)
        self._make = partial(keyed_loader, loader, self._dataset, self._keys, self._generator)
        self._twin: DataLoader[Any] | None = None
        self.limits = order_limits(self._indices, seed)

    def batches(self, epoch: int, start: int) -> Iterator[Fetched]:
        drawn: deque[Any] = deque()
        order = epoch_order(self._indices, self._seed, epoch, start)
        # Workers are seeded by a number from here, and not from the global generator.
        self._generator.manual_seed(derive_seed(self._seed, "workers", epoch, start))

        def loader() -> DataLoader[Any]:
            """Return what goes on at the cursor: with the batches that dead workers were asked for and did not yield."""
            if self._twin is None or drawn:
                self._twin = self._make()
            asked = tuple(drawn)
            drawn.clear()
            self._keys.next = self._draw(epoch, chain(asked, order), drawn)
            return self._twin

        for batch in outliving(loader) if self._loader.num_workers else loader():
            indices = drawn.popleft()
            own = indices if self._share is None else self._share.of(indices)
            ids = _sample_ids(own)
            if self._batched:
                yield Fetched(batch, ids, len(own), len(indices))
            else:
                samples = samples_in(batch)
                yield Fetched(batch, ids if ids is not None and len(ids) == samples else None, samples, samples)

    @property
    def samples(self) -> int | None:
        """Samples of the dataset, where it says how many."""
        return _length(self._loader.dataset)

    @property
    def loads_a_share(self) -> bool:
        """Whether it loads a rank's part of each batch alone."""
        return self._share is not None

    @property
    def can_wait(self) -> bool:
        """Whether batches can be loaded later and here: nobody has set up the workers for it, and they are not shared out."""
        return self._batched and self._share is None and self._loader.worker_init_fn is None

    def unloaded(self, epoch: int, start: int, device: torch.device) -> Iterator[Fetched]:
        """Yield the batches unloaded; those whose samples have no whole numbers are loaded."""
        order = epoch_order(self._indices, self._seed, epoch, start)
        while drawn := list(islice(order, _AHEAD)):
            load = partial(self._load, epoch, drawn, device)
            ids = [known for each in drawn if (known := _sample_ids(each)) is not None]
            if len(ids) == len(drawn):  # made at once, which takes half the time
                yield from [
                    Fetched(Unloaded(ids, place, load), each, len(each), len(each)) for place, each in enumerate(ids)
                ]
            else:
                yield from (
                    Fetched(load(place), _sample_ids(each), len(each), len(each)) for place, each in enumerate(drawn)
                )

    def _load(self, epoch: int, drawn: Sequence[Any], device: torch.device, place: int) -> Any:
        return to_device(self._dataset[Key(epoch, drawn[place])], device)

    def sizes(self, epoch: int) -> Iterator[int] | None:
        if not self._batched:
            return None
        if type(self._indices) is BatchSampler:
            size, samples = self._indices.batch_size, len(self._indices.sampler)  # type: ignore[arg-type]
            tail = [] if self._indices.drop_last or not samples % size else [samples % size]
            return chain(repeat(size, samples // size), tail)
        aside = copied_sampler(self._indices)
        return None if aside is None else map(len, epoch_order(aside, self._seed, epoch))

    def peek(self, samples: int | None) -> Any:
        aside = copied_sampler(self._indices)
        if aside is None:
            return None
        try:
            dataset = KeyedDataset(self._loader, self._seed)
            dataset.dataset = copied_dataset(dataset.dataset)
            first = next(epoch_order(aside, self._seed, 0))
            return dataset[Key(0, first[:samples] if self._batched else first)]
        except Exception as error:  # noqa: BLE001 - the user's code; the fit raises it, with workers and all
            log.warning("the first batch cannot be loaded on the side", error=repr(error))
            return None

    def close(self) -> None:
        self._twin = None

    def _draw(self, epoch: int, order: Iterable[Any], drawn: deque[Any]) -> Iterator[Key]:
        for indices in order:
            drawn.append(indices)
            yield Key(epoch, indices if self._share is None else self._share.taken(indices))


# -- checks and counts -----------------------------------------------------------------------------------------------------


def _check_loader(loader: object, argument: str) -> None:
    iterable = isinstance(loader, Iterable) or (hasattr(loader, "__getitem__") and hasattr(loader, "__len__"))
    single = isinstance(loader, (str, bytes, Mapping, Tensor, np.ndarray))
    bare = isinstance(loader, Dataset) and not isinstance(loader, (DataLoader, IterableDataset))
    if not iterable or single or bare:
        got = f"a dataset ({type(loader).__name__}) without a loader" if bare else loader
        takes = "a DataLoader, a list of batches, or another iterable of batches"
        example = _EXAMPLE
        if "eval_loader" in argument:
            example = "trainer.fit(model, train_loader, DataLoader(dataset, batch_size=32), duration='3ep')"
        elif "evaluate" in argument:
            example = "trainer.evaluate(model, DataLoader(dataset, batch_size=32))"
        raise ArgumentError(argument, got=got, takes=takes, example=example)


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _account(loader: Any) -> str:
    """Say what an empty loader is, and what to write instead."""
    kind = type(loader).__name__
    if not isinstance(loader, DataLoader):
        return f"{with_article(kind)} with nothing in it. Write: a DataLoader over a dataset with samples."
    size = _length(loader.dataset)
    what = f"{with_article(kind)} over {type(loader.dataset).__name__}" + (
        "" if size is None else f" with {size} samples"
    )
    if size and loader.drop_last:
        return f"{what}, batch_size={loader.batch_size} and drop_last=True. Write: drop_last=False, or a smaller batch_size."
    if size:
        return f"{what}, whose sampler yields no index. Write: shuffle=True, or a sampler that can be read every epoch."
    return f"{what}. Write: a dataset with samples."


def _sample_ids(indices: Any) -> tuple[int, ...] | None:
    try:
        return tuple(map(operator.index, indices if isinstance(indices, (list, tuple)) else (indices,)))
    except TypeError:
        return None
