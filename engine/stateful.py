"""Loaders that keep their place themselves, as torchdata's ``StatefulDataLoader`` does: used as they are."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import repeat
from typing import Any, Protocol, TypeGuard, runtime_checkable

from torch.utils.data import DataLoader

from .batches import Fetched, samples_in
from .keyed import is_plain
from .order import tell_epoch
from .randomness import Randomness, Stream, derive_seed
from .typing import Json

_END = object()


@runtime_checkable
class StatefulLoader(Protocol):
    """An iterable of batches that says where it stands, and goes on from there at the next ``iter``."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]:
        """Return what the batches to come depend on."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next iterator go on from where ``state_dict`` was taken."""
        ...


def is_stateful(loader: object) -> TypeGuard[StatefulLoader]:
    """Return whether a loader keeps its place itself."""
    return isinstance(loader, StatefulLoader)


class StatefulSource:
    """Reads a stateful loader, and knows its state before each of the last batches.

    The order is the loader's own, and so are the generators it keeps. What it draws from the global ones comes from a
    stream apart, which is part of the state.

    Args:
        loader: The loader.
        seed: Seed of the run.
        name: What the loader is called in messages.
        behind: How many batches may have been fetched when the state before the first of them is asked for.
    """

    def __init__(self, loader: StatefulLoader, seed: int, name: str, behind: int) -> None:
        self._loader: Any = loader
        self._seed = seed
        self._states: deque[tuple[tuple[int, int], dict[str, Any]]] = deque(maxlen=behind)
        self._stream = self._fresh_stream("start")
        draws = getattr(loader, "num_workers", 0) and not is_plain(getattr(loader, "dataset", None))
        text = (
            f"{name} is a {type(loader).__name__} with workers, whose random numbers are no part of its state: where the "
            "dataset draws some, a resumed run sees others. Write: a DataLoader, or num_workers=0."
        )
        self.limits: tuple[str, ...] = (text,) if draws else ()

    def batches(self, epoch: int, start: int) -> Iterator[Fetched]:
        """Yield the batches of an epoch from ``start`` on."""
        parts = (getattr(self._loader, name, None) for name in ("dataset", "sampler", "batch_sampler"))
        tell_epoch((self._loader, *parts), epoch)
        known = self._known(epoch, start)
        place = 0 if known is None else start
        batches = self._iterator(self._now() if known is None else known, epoch)
        if known is not None and place:
            self._stream.inside = known["stream"]
        ended = False
        while True:
            self._states.append(((epoch, place), self._now()))
            with self._stream:
                batch = next(batches, _END)
            if batch is not _END:
                place += 1
                if place > start:
                    samples = samples_in(batch)
                    yield Fetched(batch, None, samples, samples)
            elif place or ended:
                return
            else:  # the state was that of an epoch's end, and now the next one begins
                ended, batches = True, self._iterator(self._now(), epoch)

    def state_dict(self, epoch: int, start: int) -> dict[str, Any]:
        """Return the state from which batch ``start`` of an epoch comes next."""
        return self._known(epoch, start) or self._now()

    def load_state_dict(self, state: Mapping[str, Json], epoch: int, start: int) -> None:
        """Go on from a state when batch ``start`` of ``epoch`` is asked for."""
        self._states.clear()
        self._states.append(((epoch, start), dict(state)))

    def sizes(self, epoch: int) -> Iterator[int] | None:  # noqa: ARG002 - the same in every epoch
        """Yield the samples in each batch, where the loader says."""
        size = self._loader.batch_size if isinstance(self._loader, DataLoader) else None
        return None if size is None else repeat(size)

    def peek(self, samples: int | None) -> Any:  # noqa: ARG002 - it would move the loader
        """Return None: there is nothing to read on the side."""
        return None

    def close(self) -> None:
        """Do nothing: the loader is the caller's."""

    def _known(self, epoch: int, start: int) -> dict[str, Any] | None:
        return next((state for place, state in self._states if place == (epoch, start)), None)

    def _now(self) -> dict[str, Any]:
        # torchdata makes its iterator for this, if there is none, and that draws.
        with self._stream:
            loader = copy.deepcopy(self._loader.state_dict())
        return {"loader": loader, "stream": self._stream.inside}

    def _iterator(self, state: dict[str, Any], epoch: int) -> Iterator[Any]:
        """Return an iterator that goes on from ``state``, and let the stream start anew, however much that has drawn.

        Also where the loader stands there already: going on without draws other numbers in torchdata's loader.
        """
        self._loader.load_state_dict(copy.deepcopy(state["loader"]))
        with self._fresh_stream("iterator", epoch):
            batches: Iterator[Any] = iter(self._loader)
        self._stream = self._fresh_stream("batches", epoch)
        return batches

    def _fresh_stream(self, *purpose: object) -> Stream:
        return Stream(Randomness(), derive_seed(self._seed, "stateful", *purpose))
