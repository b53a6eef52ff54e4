"""One writer a run directory, whoever dies."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from thawline.engine.errors import CheckpointError, RunDirError
from thawline.engine.lock import LOCK_NAME, RunLock

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

HOLD = """
import os, sys
from thawline.engine.lock import RunLock
lock = RunLock(sys.argv[1])
if not os.fork():
    assert not lock.held
    print(os.getpid(), flush=True)  # says so itself: by now it has let go of the lock
    sys.stdin.read()
    os._exit(0)
sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Generator[tuple[subprocess.Popen[str], int]]:
    """A process that holds the lock, and the id of one it forked that outlives it; both end with the block."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        orphan = int(process.stdout.readline())
        try:
            yield process, orphan
        finally:
            process.kill()


def test_a_second_writer_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    """It fails at once, with the process and the machine of the first."""
    with holder(tmp_path) as (process, _), pytest.raises(RunDirError) as raised:
        RunLock(tmp_path)
    assert f"in use by process {process.pid} on {socket.gethostname()!r}" in str(raised.value)
    assert "give another run_dir" in str(raised.value)


def test_a_killed_writer_releases_the_lock_though_its_children_live(tmp_path: Path) -> None:
    """A run that was killed can be resumed at once, while the workers it forked have not noticed yet."""
    with holder(tmp_path) as (process, orphan):
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.kill(orphan, 0)  # it is there
        with RunLock(tmp_path) as lock:
            assert lock.held


def test_a_second_lock_in_the_same_process_is_refused(tmp_path: Path) -> None:
    """Two trainers in one notebook exclude each other as two processes do."""
    with RunLock(tmp_path), pytest.raises(RunDirError, match=f"process {os.getpid()} .*which is this process"):
        RunLock(tmp_path)


def test_a_closed_lock_can_be_taken_again(tmp_path: Path) -> None:
    """Closing releases it, twice is once, and the file stays."""
    lock = RunLock(tmp_path)
    lock.close()
    lock.close()
    assert not lock.held
    with RunLock(tmp_path) as again:
        assert again.held
    assert (tmp_path / LOCK_NAME).exists()


def test_a_holder_that_has_not_signed_is_named_as_unknown(tmp_path: Path) -> None:
    """What stands in the lock file is for the message only: rubbish does no harm."""
    with RunLock(tmp_path):
        (tmp_path / LOCK_NAME).write_bytes(b"\xff[")
        with pytest.raises(RunDirError, match="in use by another process"):
            RunLock(tmp_path)


def link(path: Path) -> Any:
    """A link out of the directory."""
    path.symlink_to(path.parent.parent / "victim")


@pytest.mark.parametrize("make", [link, os.mkdir], ids=["link", "directory"])
def test_a_lock_file_that_is_none_is_a_typed_error(tmp_path: Path, make: Any) -> None:
    """A link is not followed, so that nothing outside of the run directory is written."""
    folder = tmp_path / "run"
    folder.mkdir()
    make(folder / LOCK_NAME)
    with pytest.raises(CheckpointError, match="Cannot lock"):
        RunLock(folder)
    assert not (tmp_path / "victim").exists()


@pytest.mark.slow
def test_a_file_system_without_locks_is_a_warning(tmp_path: Path) -> None:
    """Some clusters' file systems know no locks: the run goes on, and the log says that it is not protected."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace makes flock fail, and is not installed")
    script = (
        "import sys\n"
        "from thawline.engine.log import configure_logging\n"
        "from thawline.engine.lock import RunLock\n"
        "configure_logging('json')\n"
        "print(RunLock(sys.argv[1]).held)\n"
    )
    inject = [strace, "-f", "-qq", "-o", "/dev/null", "-e", "trace=flock", "-e", "inject=flock:error=ENOLCK"]
    done = subprocess.run(
        [*inject, sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    if "ptrace" in done.stderr:
        pytest.skip("strace is not permitted here")
    assert done.stdout == "True\n"
    assert "run directory not locked" in done.stderr
