"""A fork server: torch is imported and warm in one process, and every run that is killed is a fork of it."""

from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attrs import define

from thawline.engine import Event, FitResult, State

from .rig import Witness

PROGRESS = "progress"


@define
class Fork:
    """A running child; what it printed lies in ``stderr`` in its folder, its report in ``report``.

    Args:
        folder: Where it works.
        pid: Its process.
    """

    folder: Path
    pid: int

    def wait(self) -> tuple[int, Any]:
        """Wait for its end; return the exit code, negative for a signal, and what it reported."""
        _, status = os.waitpid(self.pid, 0)
        report = self.folder / "report"
        return os.waitstatus_to_exitcode(status), json.loads(report.read_text()) if report.exists() else None

    def kill(self) -> None:
        """Kill it, if it still runs."""
        os.kill(self.pid, signal.SIGKILL)


def fork(folder: Path, work: Callable[[], Any]) -> Fork:
    """Start a child that does ``work`` and reports what it returns, which is JSON or the result of a fit, or the error it ends with."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report").unlink(missing_ok=True)
    if pid := os.fork():
        return Fork(folder, pid)
    code = 3
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it
    try:
        printed = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        report: Any = None
        try:
            returned = work()
            report = None if isinstance(returned, FitResult) else returned
        except BaseException as error:  # noqa: BLE001 - how it ended is what the parent asks
            traceback.print_exc()
            report = {"error": type(error).__name__, "text": str(error), "notes": getattr(error, "__notes__", [])}
        if report is not None:
            (folder / "report").write_text(json.dumps(report))
        code = 0
    finally:
        os._exit(code)


def run(folder: Path, work: Callable[[], Any]) -> tuple[int, Any]:
    """Do ``work`` in a child to its end."""
    return fork(folder, work).wait()


def trail(folder: Path) -> None:
    """Let the run in this process note every batch that it completes."""
    noted = os.open(folder / PROGRESS, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def note(event: Event, state: State) -> None:
        if event is Event.BATCH_END:
            os.pwrite(noted, b"%09d" % state.clock.batch, 0)

    Witness.strike = note


def completed(folder: Path) -> int:
    """Return how many batches the last run had completed."""
    progress = folder / PROGRESS
    return int(progress.read_text() or 0) if progress.exists() else 0
