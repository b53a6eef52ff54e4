"""One writer per run directory."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import socket
from datetime import UTC, datetime
from errno import ENOLCK, ENOSYS, EOPNOTSUPP
from pathlib import Path
from typing import TYPE_CHECKING, Self
from weakref import WeakSet

from attrs import define, field

from .errors import CheckpointError, RunDirError
from .log import get_logger

if TYPE_CHECKING:
    from types import TracebackType

LOCK_NAME = ".lock"

_log = get_logger(__name__)
# A flock belongs to the open file, which a forked process (a DataLoader's worker) shares and can outlive us with. So a
# child lets go at birth; otherwise a killed run could not be resumed before its orphans have noticed.
_held: WeakSet[RunLock] = WeakSet()


@define(eq=False)
class RunLock:
    """The lock on ``folder``, held from construction until :meth:`close` or the end of the process, however it ends.

    Args:
        folder: An existing directory. The lock is a file ``.lock`` in it, which stays there and says who holds it.

    Raises:
        RunDirError: Somebody holds it; the message says which process on which machine.
        CheckpointError: The lock file cannot be opened.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder, RunLock(folder) as lock:
        ...     lock.held
        True
    """

    folder: Path = field(converter=Path)
    _descriptor: int | None = field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        path = self.folder / LOCK_NAME
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise CheckpointError(f"Cannot lock {self.folder}: {error}. Give a directory you may write to.") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise RunDirError(
                f"{self.folder} is in use by {holder}. Wait until it ends, or give another run_dir."
            ) from None
        except OSError as error:
            if error.errno not in (ENOLCK, ENOSYS, EOPNOTSUPP):
                os.close(descriptor)
                raise CheckpointError(f"Cannot lock {self.folder}: {error}.") from error
            _log.warning("run directory not locked", folder=str(self.folder), reason=str(error))
        _sign(descriptor)
        self._descriptor = descriptor
        _hook_fork()
        _held.add(self)

    @property
    def held(self) -> bool:
        """Whether this object, in this process, holds the lock."""
        return self._descriptor is not None

    def close(self) -> None:
        """Release the lock. A second call does nothing."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._forget()

    def _forget(self) -> None:
        """Close the file without unlocking it, as the process that forked us still holds it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@functools.cache  # once a process
def _hook_fork() -> None:
    os.register_at_fork(after_in_child=_forget_all)


def _forget_all() -> None:
    for lock in list(_held):
        lock._forget()


def _sign(descriptor: int) -> None:
    """Write who we are into the lock file. On a full disk we hold the lock all the same."""
    who = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(who).encode(), 0)


def holder(folder: Path) -> str:
    """Return who has signed the lock of a directory last, held or not; an empty text where there is none.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder, RunLock(folder):
        ...     holder(Path(folder)).startswith("process ")
        True
    """
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return _named(_signed(descriptor))
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    who = _signed(descriptor)
    mine = who is not None and who[:2] == (os.getpid(), socket.gethostname())
    return _named(who) + ", which is this process" * mine


def _named(who: tuple[int, str, str] | None) -> str:
    """Name who has signed; None: it has not signed yet."""
    return "another process" if who is None else f"process {who[0]} on {who[1]!r} since {who[2]}"


def _signed(descriptor: int) -> tuple[int, str, str] | None:
    try:
        who = json.loads(os.pread(descriptor, 4096, 0))
        return int(who["pid"]), str(who["host"])[:64], str(who["since"])[:64]
    except (OSError, ValueError, KeyError, TypeError):
        return None
