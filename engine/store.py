"""The checkpoints of a run: written by one, the newest and the best kept, the newest whole one loaded."""

from __future__ import annotations

import math
import os
import re
import secrets
import shutil
from pathlib import Path
from reprlib import repr as brief  # bounded also for what is huge or deep
from typing import TYPE_CHECKING, Any, Literal, Self

from attrs import define, field

from .checkpointing import check_keep, check_mode, check_monitor
from .errors import ArgumentError, CheckpointError
from .lock import RunLock
from .log import get_logger
from .monitor import direction_of
from .snapshot import (
    TEMPORARY,
    Manifest,
    UnreadableError,
    holds,
    read_checkpoint,
    read_manifest,
    sync_directory,
    verify_checkpoint,
    write_checkpoint,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

__all__ = [
    "BAD",
    "DISCARDED",
    "CheckpointStore",
    "Manifest",
    "UnreadableError",
    "checkpoints_in",
    "read_checkpoint",
    "read_manifest",
    "step_of",
    "verify_checkpoint",
    "write_checkpoint",
]

BAD, DISCARDED = ".bad-", ".discarded-"
"""What the name of a checkpoint that was set aside begins with: a damaged one, and one newer than where a run went on."""

_STEP_NAME = re.compile(r"ba(\d{8}|[1-9]\d{8,17})")
_NEXT = ".next"
_REPLACING = re.compile(rf"{_STEP_NAME.pattern}{re.escape(_NEXT)}")
_ASIDE = re.compile(rf"({re.escape(BAD)}|{re.escape(DISCARDED)})ba\d+.*")
# Only what we name so is swept: a run directory can hold a user's own files.
_LEFTOVER = re.compile(re.escape(TEMPORARY) + r".+-[0-9a-f]{12}")

_log = get_logger(__name__)


@define(eq=False)
class CheckpointStore:
    """The checkpoints of one run: one writer, the newest and the best kept, the newest whole one loaded.

    The store holds the lock on ``folder`` until :meth:`close` or the end of the process. What an interrupted save left
    is swept when the store is opened.

    Args:
        folder: The run's directory; it is made where it is missing.
        keep: How many of the newest checkpoints to keep. The best one and permanent ones are kept besides.
        monitor: What the metric is, such as ``"eval/loss"``. Metrics saved under another name are not compared.
        mode: Whether the smallest (``"min"``) or largest (``"max"``) metric is the best; ``"auto"`` as in
            :class:`~thawline.engine.Checkpointing`. NaN never is.

    Raises:
        RunDirError: Another process, or another store in this one, holds the lock; the message says which.
        CheckpointError: The directory cannot be made or locked.
        ArgumentError: A wrong argument.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder, CheckpointStore(folder, keep=1) as store:
        ...     for step, loss in [(10, 0.3), (20, 0.5), (30, 0.4)]:
        ...         path = store.save({"step": step}, step=step, metric=loss)
        ...     [path.name for path in store.checkpoints], store.best.name, store.load_newest()[1]
        (['ba00000010', 'ba00000030'], 'ba00000010', {'step': 30})
    """

    folder: Path = field(converter=Path)
    keep: int = field(default=2, validator=check_keep)
    monitor: str | None = field(default=None, kw_only=True, validator=check_monitor)
    mode: Literal["auto", "min", "max"] = field(default="auto", kw_only=True, validator=check_mode)
    _lock: RunLock = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        try:
            _make(self.folder)
        except OSError as error:
            raise CheckpointError(f"Cannot make {self.folder}: {error}. Give another run_dir.") from error
        self._lock = RunLock(self.folder)
        for leftover in self._entries(_LEFTOVER):
            _log.info("unfinished checkpoint swept", path=str(leftover))
            _remove(leftover)
        self._finish_replacing()

    @property
    def checkpoints(self) -> tuple[Path, ...]:
        """Every checkpoint, oldest first. None has been verified."""
        return checkpoints_in(self.folder)

    @property
    def holds_run(self) -> bool:
        """Whether anything of a run lies here: checkpoints, or damaged or discarded ones."""
        return bool(self.checkpoints or self._entries(_ASIDE))

    @property
    def best(self) -> Path | None:
        """The checkpoint with the best metric, the earliest of several; None where none has one."""
        return self._best(self._manifests())

    @property
    def best_metric(self) -> float | None:
        """The metric of the best checkpoint."""
        best = self.best
        return None if best is None else float(read_manifest(best).info["metric"])

    def latest(self) -> Path | None:
        """Return the newest checkpoint, unverified; None where there is none."""
        return self.checkpoints[-1] if self.checkpoints else None

    def save(self, tree: object, *, step: int, metric: float | None = None, permanent: bool = False) -> Path:
        """Write ``tree`` as the checkpoint of ``step``; then delete what is neither among the newest nor the best.

        Nothing is deleted before the new checkpoint was read back and found to be what was given. Where the step has a
        checkpoint that holds the same already, that one stays and is returned; one that holds something else is replaced,
        as where a fit stops, evaluates and saves again before its next batch.

        Args:
            tree: What :func:`~thawline.engine.codec.flatten` takes.
            step: Batches completed; above that of every other checkpoint here. See :meth:`rewind`.
            metric: What the best checkpoint is chosen by.
            permanent: Whether to keep this checkpoint for good.

        Returns:
            The checkpoint's directory.

        Raises:
            ArgumentError: A step that is not a whole number from 0, or below that of the newest checkpoint.
            CheckpointError: It could not be written, for instance on a full disk. The older ones are untouched, and
                the store goes on working.
        """
        if not self._lock.held:
            raise CheckpointError(
                f"The store of {self.folder} is closed, or was opened before this process was forked."
            )
        newest = self.latest()
        _check_step(step, newest)
        metric = None if metric is None else _number(metric)
        if newest is not None and step_of(newest) == step:
            try:
                if holds(newest, tree):
                    return newest
            except UnreadableError:
                raise
            except CheckpointError as error:
                self._set_aside([(newest, error)])
                newest = self.latest()
        info = {"step": step, "metric": metric, "monitor": self.monitor, "permanent": bool(permanent)}
        path = self.folder / f"ba{step:08d}"
        if newest == path:
            self._replace(path, tree, info)
        else:
            write_checkpoint(self.folder, path.name, tree, parent=None if newest is None else newest.name, info=info)
        self._retire()
        return path

    def load_newest(self) -> tuple[Path, Any] | None:
        """Return the newest whole checkpoint and its tree; None where there never was one.

        Every checkpoint that is newer and damaged is set aside as ``.bad-<name>``, with a warning.

        Raises:
            CheckpointError: There are checkpoints and none is whole; then nothing is renamed. Or one cannot be read
                for a reason that is not its own, such as a missing permission.
        """
        bad: list[tuple[Path, CheckpointError]] = []
        for path in reversed(self.checkpoints):
            try:
                _check_place(path)
                tree = read_checkpoint(path)
            except UnreadableError:
                raise
            except CheckpointError as error:
                bad.append((path, error))
            else:
                self._set_aside(bad)
                return path, tree
        if bad or self._entries(_ASIDE):
            reasons = "".join(f"\n  {path.name}: {error}" for path, error in bad)
            raise CheckpointError(
                f"No checkpoint in {self.folder} is whole, and starting again at step 0 is for you to decide: "
                f"give an empty run_dir, or put a good copy in its place.{reasons}"
            )
        return None

    def rewind(self, step: int) -> None:
        """Set the checkpoints above ``step`` aside as ``.discarded-<name>``: the run goes on from ``step``.

        Call it when resuming from a checkpoint that is not the newest. Otherwise the discarded future would be taken
        for the newest state after the next crash.

        Raises:
            CheckpointError: A checkpoint cannot be renamed.
        """
        self._set_aside([(path, None) for path in self.checkpoints if step_of(path) > step])

    def close(self) -> None:
        """Release the lock. A second call does nothing."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _replace(self, path: Path, tree: object, info: dict[str, Any]) -> None:
        """Write another checkpoint in the place of a whole one; a kill at any moment leaves one of the two."""
        before = read_manifest(path)
        info["permanent"] = info["permanent"] or before.info.get("permanent") is True
        # Under a name of its own, for which the store looks when it is opened.
        new = write_checkpoint(self.folder, f"{path.name}{_NEXT}", tree, parent=before.parent, info=info)
        self._discard(path)
        _move(new, path)

    def _finish_replacing(self) -> None:
        """Give the checkpoints that were to replace another one its name, where a kill came between."""
        for new in self._entries(_REPLACING):
            path = new.with_suffix("")
            if path.exists():
                _remove(new)
            else:
                _move(new, path)

    def _discard(self, path: Path) -> None:
        """Delete a checkpoint; renamed first, so that a kill half-way leaves rubbish to sweep, not a damaged checkpoint."""
        doomed = self.folder / f"{TEMPORARY}{path.name}-{secrets.token_hex(6)}"
        try:
            path.rename(doomed)
        except OSError as error:
            _log.warning("old checkpoint not deleted", path=str(path), reason=str(error))
        else:
            _remove(doomed)

    def _entries(self, pattern: re.Pattern[str]) -> list[Path]:
        return _entries(self.folder, pattern)

    def _manifests(self) -> dict[Path, Manifest | None]:
        """Every checkpoint's manifest, None for one that cannot be read."""
        found: dict[Path, Manifest | None] = {}
        for path in self.checkpoints:
            try:
                found[path] = read_manifest(path)
            except CheckpointError:
                found[path] = None
        return found

    def _best(self, manifests: Mapping[Path, Manifest | None]) -> Path | None:
        sign = 1 if direction_of(self.monitor, self.mode) == "min" else -1
        scores: dict[Path, float] = {}
        for path, manifest in manifests.items():
            metric = manifest.info.get("metric") if manifest and manifest.info.get("monitor") == self.monitor else None
            if isinstance(metric, float) and not math.isnan(metric):
                scores[path] = sign * metric
        return min(scores, key=scores.__getitem__, default=None)

    def _retire(self) -> None:
        """Delete what is neither among the newest nor the best; :func:`write_checkpoint` has verified the newest."""
        manifests = self._manifests()
        spared = {*self.checkpoints[-self.keep :], self._best(manifests)}
        # One whose manifest cannot be read may be permanent.
        spared |= {path for path, manifest in manifests.items() if not manifest or manifest.info.get("permanent")}
        for path in manifests.keys() - spared:
            self._discard(path)

    def _set_aside(self, paths: Sequence[tuple[Path, CheckpointError | None]]) -> None:
        for path, error in paths:
            prefix = DISCARDED if error is None else BAD
            aside, count = self.folder / f"{prefix}{path.name}", 1
            while os.path.lexists(aside):
                aside, count = self.folder / f"{prefix}{path.name}-{count + 1}", count + 1
            try:
                path.rename(aside)
                sync_directory(self.folder)
            except OSError as failure:
                raise CheckpointError(f"Cannot set {path} aside: {failure}.") from failure
            reason = "the run went on from an earlier one" if error is None else str(error)
            _log.warning("checkpoint set aside", path=str(path), moved_to=aside.name, reason=reason)


def _move(new: Path, path: Path) -> None:
    try:
        new.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        raise CheckpointError(f"Cannot rename {new} to {path.name}: {error}.") from error


def checkpoints_in(folder: Path) -> tuple[Path, ...]:
    """Return every checkpoint in ``folder``, oldest first. None has been verified.

    Raises:
        CheckpointError: The directory cannot be listed.
    """
    return tuple(sorted(_entries(folder, _STEP_NAME), key=step_of))


def _entries(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if pattern.fullmatch(path.name)]
    except OSError as error:
        raise CheckpointError(f"Cannot list {folder}: {error}.") from error


def _check_step(step: object, newest: Path | None) -> None:
    if type(step) is not int or not 0 <= step < 10**18:
        takes = "the number of batches completed, an int from 0"
        raise ArgumentError("CheckpointStore.save(step=)", got=step, takes=takes, example="save(tree, step=120)")
    if newest is not None and step < step_of(newest):
        takes = f"a step not below that of the newest checkpoint, {newest.name}"
        example = f"store.rewind({step}), which discards the newer ones, and then save"
        raise ArgumentError("CheckpointStore.save(step=)", got=step, takes=takes, example=example)


def _number(metric: float) -> float:
    try:
        return float(metric)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        example = "save(tree, step=120, metric=0.3)"
        raise ArgumentError("CheckpointStore.save(metric=)", got=metric, takes="a number", example=example) from None


def _check_place(path: Path) -> None:
    """Refuse a checkpoint under another's name: a copy of an old one must not pass for the newest."""
    step = read_manifest(path).info.get("step")
    if step != step_of(path):
        raise CheckpointError(f"{path} holds the checkpoint of step {brief(step)}.")


def step_of(path: Path) -> int:
    """Return the step after which a checkpoint was cut, by its name.

    Example:
        >>> step_of(Path("runs/mine/ba00000012"))
        12
    """
    return int(path.name[2:])


def _make(folder: Path) -> None:
    """Make ``folder`` and its parents, each of them durable."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in reversed(missing):
        sync_directory(each.parent)


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        _log.warning("leftover not deleted", path=str(path), reason=str(error))
