"""The directory of a run: its checkpoints, its trackers, and what a resumed fit starts from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .checkpoint import well_formed
from .checkpointing import Checkpointing
from .clock import Clock
from .errors import CheckpointError, RunDirError, warn
from .log import get_logger
from .monitor import direction_of, is_better, missing_metric, of_evaluation
from .pristine import Pristine
from .snapshot import read_checkpoint
from .store import CheckpointStore, checkpoints_in
from .tracking import JsonlTracker, Tracker, Trackers

log = get_logger(__name__)


class RunDir:
    """Opens store and trackers, finds what to resume from, and refuses a directory that holds another run.

    Args:
        folder: The run's directory; None for a fit that leaves nothing behind.
        policy: When to save and what to keep.
        trackers: Where metrics go besides the directory.
        resume: True: the newest checkpoint, if there is one; a path: that checkpoint, or the newest of that run's
            directory; False: none.
        writes: Whether this process is the one that writes. Another one of the same fit opens nothing, and asks for
            checkpoints where the one that writes does.

    Raises:
        RunDirError: The directory holds a run and ``resume`` is False, is a file or cannot be made, or somebody else
            writes there.
        CheckpointError: What is to be resumed from is missing or damaged.
    """

    def __init__(
        self,
        folder: Path | None,
        policy: Checkpointing,
        trackers: Sequence[Tracker],
        *,
        resume: bool | str | Path,
        writes: bool = True,
    ) -> None:
        self.policy = policy
        self.folder = folder
        self.saves = folder is not None
        self.due = False
        self.warned = self._unwritten = self._permanent = False
        self.best_metric: float | None = None
        self._known: tuple[Path | None, Path | None] = None, None
        self.loaded: tuple[Path, dict[str, Any]] | None = None
        self._store: CheckpointStore | None = None
        self._jsonl: JsonlTracker | None = None
        if isinstance(resume, (str, Path)):
            if folder is not None and Path(resume).resolve() == folder.resolve() and _checkpoints(folder):
                resume = True
            else:
                self.loaded = load_checkpoint(Path(resume))
        if folder is not None and writes:
            self._store = _opened(folder, policy)
            try:
                self._find_run(self._store, folder, resume=resume)
            except BaseException:
                self._store.close()
                raise
            self.best_metric = self._store.best_metric
            self._jsonl = JsonlTracker(folder)
            if self.loaded is None:  # a run that was cut before its first checkpoint starts anew
                self._jsonl.truncate_after(-1)
        local = [] if self._jsonl is None else [self._jsonl]
        self.trackers = Trackers([*local, *trackers] if writes else [], run_dir=folder if writes else None)

    @property
    def best(self) -> Path | None:
        """The checkpoint with the best monitored metric."""
        return self._known[0] if self._store is None else self._store.best

    @property
    def last(self) -> Path | None:
        """The newest checkpoint."""
        return self._known[1] if self._store is None else self._store.latest()

    def know(self, best: Path | None, last: Path | None) -> None:
        """Take note of the checkpoints that another process of the same fit keeps."""
        self._known = best, last

    def pristine(self, model: nn.Module) -> Pristine | None:
        """Return the model's tensors as they are now, where checkpoints are to hold fingerprints of what stays so."""
        return Pristine(model) if self._store is not None and self.policy.frozen == "fingerprint" else None

    def note(self, before: Clock, after: Clock) -> None:
        """Remember that a checkpoint is due where an interval's end lies between two ticks."""
        if self.saves:
            self.due |= any(time.crossed(before, after) for time in self.policy.times)
            self._permanent |= self.policy.keep_every is not None and self.policy.keep_every.crossed(before, after)

    def note_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Remember that a checkpoint is due where the monitored metric is the best so far: these weights were evaluated."""
        monitor = self.policy.monitor
        if not self.saves or not of_evaluation(monitor):
            return
        value = metrics.get(str(monitor), math.nan)
        if is_better(value, self.best_metric, direction_of(monitor, self.policy.mode)):
            self.best_metric, self.due = float(value), True

    def save(
        self, tree: Callable[[], dict[str, Any]], *, step: int, metrics: Mapping[str, float], evaluated_at: int | None
    ) -> None:
        """Write a checkpoint; a full disk leaves the old one, warns, and is tried again at the next interval.

        Args:
            tree: Returns what to save.
            step: Batches completed.
            metrics: What was logged.
            evaluated_at: The batch of the latest evaluation. What it measured is this checkpoint's if that is its step,
                and from then on a monitored metric is missed.
        """
        self.due = False
        if self._store is None:
            return
        monitor = self.policy.monitor
        metric = None if monitor is None else metrics.get(monitor)
        score = metric if not of_evaluation(monitor) or evaluated_at == step else None
        try:
            path = self._store.save(tree(), step=step, metric=score, permanent=self._permanent)
        except CheckpointError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            log.error("checkpoint not written; trying again at the next interval", error=str(error))
            self._warn_unwritten(error)
        else:
            self._permanent = False
            log.info("checkpoint", path=str(path))
        if monitor is not None and metric is None and evaluated_at is not None:
            self._warn_missing(monitor, metrics)

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest whole checkpoint of this run and what it holds; None where there is none yet."""
        return None if self._store is None else self._store.load_newest()

    def forget_after(self, step: int) -> None:
        """Drop the lines of ``metrics.jsonl`` past ``step``, which a resumed run writes anew."""
        if self._jsonl is not None:
            self._jsonl.truncate_after(step)

    def close(self) -> None:
        """Close the trackers and release the directory."""
        self.trackers.close()
        if self._store is not None:
            self._store.close()

    def _warn_unwritten(self, error: CheckpointError) -> None:
        if not self._unwritten:
            self._unwritten = True
            text = f"a checkpoint was not written, and the run goes on; the next interval tries again: {error}"
            warn(text)

    def _warn_missing(self, monitor: str, metrics: Mapping[str, float]) -> None:
        """Say once that there will be no best checkpoint; the start of the fit has said so where nothing is evaluated."""
        if self.warned or (of_evaluation(monitor) and not any(map(of_evaluation, metrics))):
            return
        self.warned = True
        missing = missing_metric(monitor, metrics, call="Checkpointing(monitor=)")
        warn(f"there is no best checkpoint: {missing}")

    def _find_run(self, store: CheckpointStore, folder: Path, *, resume: bool | str | Path) -> None:
        if resume is True:
            tried = store.checkpoints
            self.loaded = store.load_newest()
            if self.loaded is not None and self.loaded[0] != tried[-1]:
                warn(
                    f"{tried[-1]} is damaged and was set aside as .bad-{tried[-1].name}: the fit goes on from the newest "
                    f"whole checkpoint, {self.loaded[0].name}."
                )
        elif self.loaded is not None:
            if self.loaded[0].resolve().parent == folder.resolve():
                with well_formed():
                    step = int(self.loaded[1]["clock"]["batch"])
                store.rewind(step)
        elif store.holds_run or (folder / "metrics.jsonl").exists():
            raise RunDirError(
                f"{folder} holds a run already. Continue it: trainer.fit(…, resume=True), or start another one: "
                "Trainer(run_dir=<another directory>)."
            )


def _opened(folder: Path, policy: Checkpointing) -> CheckpointStore:
    try:
        return CheckpointStore(folder, policy.keep, monitor=policy.monitor, mode=policy.mode)
    except CheckpointError as error:
        if isinstance(error, RunDirError):
            raise
        if not isinstance(error.__cause__, (FileExistsError, NotADirectoryError)):
            raise RunDirError(f"{error} Write: Trainer(run_dir='runs/first')") from error
        raise RunDirError(
            f"{folder} is a file, or lies in one, and a run needs a directory. Write: Trainer(run_dir='runs/first')"
        ) from error


def load_checkpoint(given: Path, *, call: str = "trainer.fit(…, resume={!r})") -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint that a path means, itself or the newest one in it, and its tree.

    Args:
        given: A checkpoint, or a run's directory.
        call: What to write with another path instead, for the error.

    Raises:
        CheckpointError: There is none, or it is damaged; the message says which others there are.
    """
    inside = _checkpoints(given)
    path = inside[-1] if inside else given
    try:
        return path, read_checkpoint(path)
    except CheckpointError as error:
        others = [str(each) for each in inside or _checkpoints(given.parent) if each != path]
        there = f" There are {', '.join(others[-5:])}." if others else ""
        example = others[-1] if others else "runs/first/ba00000120"
        raise type(error)(f"{error}{there} Write: {call.format(example)}") from error


def _checkpoints(folder: Path) -> tuple[Path, ...]:
    try:
        return checkpoints_in(folder)
    except CheckpointError:  # no directory, or one that cannot be read
        return ()
