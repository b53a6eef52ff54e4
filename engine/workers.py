"""Workers of a loader that die: noticed only where their batch is waited for, and replaced."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, Self

from attrs import define, field
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from .log import get_logger

log = get_logger(__name__)

MAX_DEATHS = 3
"""How often in an epoch the workers of a loader are replaced."""
_DEATH = "DataLoader worker (pid"


def outliving(make: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """Yield batches from a loader with workers; where one dies, from the next loader.

    Args:
        make: Returns a loader that begins with the first batch not yet yielded.

    Raises:
        RuntimeError, OSError, EOFError: torch's own, where workers died more than :data:`MAX_DEATHS` times.
    """
    for deaths in range(MAX_DEATHS + 1):
        batches: Any = iter(make())
        death: Exception | None = None
        while death is None:
            try:
                with _Waiting():
                    batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                if not _is_death(error):
                    raise
                death = error
            else:
                yield batch
        # Before others start, and before torch, which knows the dead by their numbers, could raise a second time.
        batches._shutdown_workers()
        if deaths == MAX_DEATHS:
            raise death
        log.warning("a worker of the loader died; all are started anew", error=str(death), deaths=deaths + 1)


def _is_death(error: Exception) -> bool:
    """Return whether a worker died: torch says so, or the connection broke over which it was sending a batch."""
    if isinstance(error, RuntimeError):
        return str(error).startswith(_DEATH)
    # What the user's dataset raised in a worker begins with other words.
    return isinstance(error, (ConnectionError, FileNotFoundError, EOFError)) and not str(error).startswith("Caught ")


class _Waiting:
    """The time in which the death of a worker may raise."""

    depth = 0

    def __enter__(self) -> None:
        _Waiting.depth += 1

    def __exit__(self, *exception: object) -> None:
        _Waiting.depth -= 1


@define(eq=False)
class DeferredDeaths:
    """Keeps the death of a worker from raising anywhere else than where a batch is waited for.

    torch raises it from a handler of SIGCHLD, at whatever line the main thread has reached: inside the optimizer's step
    it would leave half of the weights moved. A death that is passed over here is noticed when the loader waits, by the
    loader's own look at its workers every five seconds.

    Args:
        loaders: What the fit reads from; without workers, or outside of the main thread, nothing is done.
    """

    loaders: tuple[Iterable[Any] | None, ...]
    _before: Any = field(default=None, init=False, repr=False)

    def __enter__(self) -> Self:
        have_workers = any(isinstance(each, DataLoader) and each.num_workers for each in self.loaders)
        if have_workers and hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
            signal_handling._set_SIGCHLD_handler()  # torch's own is set once a process, and has to lie below
            before = signal.getsignal(signal.SIGCHLD)
            if callable(before):
                self._before = before
                signal.signal(signal.SIGCHLD, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is not None and signal.getsignal(signal.SIGCHLD) == self._handle:
            signal.signal(signal.SIGCHLD, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        try:
            self._before(number, frame)
        except RuntimeError as error:
            if _Waiting.depth or not str(error).startswith(_DEATH):
                raise
