"""Signals that ask a fit to stop: it ends before the next step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from attrs import define, field
from torch.utils.data import get_worker_info

from .log import get_logger

log = get_logger(__name__)

STOPPING = tuple(
    number for name in ("SIGTERM", "SIGINT", "SIGUSR1") if (number := getattr(signal, name, None)) is not None
)
"""What a scheduler, a terminal and SLURM's ``--signal=USR1@90`` send."""


@define(eq=False)
class StopSignals:
    """Listens for SIGTERM, SIGINT and SIGUSR1 while it is entered: the first one is remembered, the next acts as before.

    Handlers can only be set in the main thread; elsewhere signals are left alone. So is a signal that the process
    ignores, as under ``nohup``, or whose handler was not set from Python and could not be put back.

    Args:
        on_first: Called inside the handler, so it may do no more than set flags.
        shared: Whether the processes of a fit agree first: the handler takes note of a signal, and :meth:`heed`
            makes it received.

    Example:
        >>> before = signal.getsignal(signal.SIGTERM)
        >>> with StopSignals() as signals:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     signals.received
        'SIGTERM'
        >>> signal.getsignal(signal.SIGTERM) is before
        True
    """

    on_first: Callable[[], None] = lambda: None
    shared: bool = field(default=False, kw_only=True)
    received: str | None = field(default=None, init=False)
    noticed: str | None = field(default=None, init=False)
    _before: dict[signal.Signals, Any] = field(factory=dict, init=False, repr=False)
    _process: int = field(default=0, init=False, repr=False)

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            log.info("signals are left alone: only the main thread can listen for them")
            return self
        self._process = os.getpid()
        for number in STOPPING:
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN and before is not None:
                self._before[number] = before
                signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._put_back()

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - what a handler is called with
        if os.getpid() != self._process:  # a child, forked during the fit
            # The fit decides when its loader's workers end. Any other child has nothing to do with the fit.
            if get_worker_info() is None:
                self._put_back()
                os.kill(os.getpid(), number)
            return
        self._put_back()
        self.noticed = signal.Signals(number).name
        if not self.shared:
            self.heed(self.noticed)

    def heed(self, name: str) -> None:
        """Take a signal for received."""
        self.received = name
        self.on_first()

    def _put_back(self) -> None:
        """Put back every handler that is still ours."""
        for number, before in self._before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, before)
        self._before.clear()
