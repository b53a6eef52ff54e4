"""What a fit could leave in its process: open files, threads and child processes, and settings that all share."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attrs import Factory, define

_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "the handler of SIGINT": (partial(signal.getsignal, signal.SIGINT), partial(signal.signal, signal.SIGINT)),
    "the handler of SIGTERM": (partial(signal.getsignal, signal.SIGTERM), partial(signal.signal, signal.SIGTERM)),
    "sys.excepthook": (lambda: sys.excepthook, partial(setattr, sys, "excepthook")),
    "sys.stdout": (lambda: sys.stdout, partial(setattr, sys, "stdout")),
    "the handlers of logging": (lambda: logging.root.handlers[:], partial(setattr, logging.root, "handlers")),
    "the working folder": (Path.cwd, os.chdir),
    "torch's gradients, on or off": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's anomaly detection": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms,
    ),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
}  # fmt: skip


@contextmanager
def settings_kept() -> Generator[list[str], None, None]:
    """Put back the settings of the process at the end, and list there which were others by then.

    Example:
        >>> with settings_kept() as changed:
        ...     torch.set_default_dtype(torch.float64)
        >>> changed, torch.get_default_dtype()
        (["torch's default dtype"], torch.float32)
    """
    before = {name: get() for name, (get, _) in _SETTINGS.items()}
    changed: list[str] = []
    try:
        yield changed
    finally:
        for name, (get, put) in _SETTINGS.items():
            if get() != before[name]:
                changed.append(name)
                put(before[name])


def _open_files() -> Counter[str]:
    return Counter(_targets())


def _targets() -> Iterator[str]:
    """Yield what the process has open, where the system tells: paths, and pipes and sockets by number."""
    for each in Path("/proc/self/fd").glob("*"):
        with suppress(OSError):  # the folder itself is closed by then
            yield str(each.readlink())


@define
class Opened:
    """What the process had open, and what ran in it, at the time that this was made.

    Example:
        >>> opened = Opened.now()
        >>> opened.left() is None
        True
    """

    files: Counter[str] = Factory(_open_files)
    threads: list[threading.Thread] = Factory(threading.enumerate)
    children: list[Any] = Factory(multiprocessing.active_children)

    @classmethod
    def now(cls) -> Opened:
        """Look at the process once what nobody holds any more is closed."""
        gc.collect()
        return cls()

    def left(self) -> str | None:
        """Say what is there that was not; None where there is nothing."""
        return self._new(Opened()) and self._new(Opened.now())

    def _new(self, now: Opened) -> str | None:
        files = [f"the open file {each!r}" for each in sorted((now.files - self.files).elements())]
        threads = [f"the thread {each.name!r}" for each in now.threads if each not in self.threads]
        children = [f"the process {each.name!r}" for each in now.children if each not in self.children]
        return next(iter([*threads, *children, *files]), None)
