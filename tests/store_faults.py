"""Faults that only a process of its own can have: killed in the middle, a full disk, code that must not run.

    python tests/store_faults.py kills FOLDER STRIDE
    python tests/store_faults.py strikes FOLDER COUNT SEED
    python tests/store_faults.py full FOLDER COUNT
    unshare -rm python tests/store_faults.py tiny FOLDER COUNT
    python tests/store_faults.py hostile FOLDER

Each prints one JSON object. torch is imported once, and every run that is killed is a fork.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from thawline.engine.errors import CheckpointError
from thawline.engine.snapshot import TEMPORARY, read_checkpoint
from thawline.engine.store import CheckpointStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

WATCHED = {"store.py", "snapshot.py", "tensorfile.py", "lock.py"}


def tree_of(step: int, *, size: int = 1000) -> dict[str, Any]:
    """A state that shows which step it is of in every part."""
    return {
        "step": step,
        "weight": torch.full((size,), float(step)),
        "betas": (step / 2, 0.999),
        "name": f"step {step}",
    }


def is_tree_of(tree: Any, step: int, *, size: int = 1000) -> bool:
    """Whether ``tree`` is the whole state of ``step`` and nothing of another."""
    plain = {key: value for key, value in tree.items() if key != "weight"}
    expected = tree_of(step, size=size)
    return torch.equal(tree["weight"], expected.pop("weight")) and plain == expected


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """Run ``work`` in a child, which is given a pipe to write to; return its id and the reading end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    try:
        os.close(reading)
        work(writing)
    except BaseException:  # noqa: BLE001  # a fork must not go on into the parent's code
        traceback.print_exc()
        os._exit(3)
    os._exit(0)


def at_each_line(strike: Callable[[], None]) -> None:
    """Call ``strike`` before each line of the code that lays checkpoints down."""

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if Path(frame.f_code.co_filename).name not in WATCHED:
            return None
        if event == "line":
            strike()
        return trace

    sys.settrace(trace)


def after_the_kill(folder: Path, done: int) -> str | None:
    """Say what is wrong with what a killed writer left, which had finished the save of step ``done``."""
    with CheckpointStore(folder, keep=2) as store:
        found = store.load_newest()
        if found is None:
            return "nothing left"
        path, tree = found
        step = int(path.name[2:])
        if step not in (done, done + 10):
            return f"step {step} after {done} was saved"
        if not is_tree_of(tree, step):
            return f"{path.name} is not the state of step {step}"
        if any(each.name.startswith((TEMPORARY, ".bad-")) for each in folder.iterdir()):
            return "leftovers"
        # What retention had not come to is made up for by the next save.
        store.save(tree_of(step + 10), step=step + 10)
        if len(store.checkpoints) != 2:
            return f"{len(store.checkpoints)} checkpoints kept"
    return None


def kills(folder: Path, stride: int) -> dict[str, Any]:
    """Kill a save before every ``stride``-th line that it runs, until one gets through."""
    faults, count, line = [], 0, 1
    while True:
        run = folder / f"kill-{line}"
        with CheckpointStore(run, keep=2) as store:
            for step in (10, 20):
                store.save(tree_of(step), step=step)
        left = line

        def strike() -> None:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

        def work(writing: int, run: Path = run) -> None:
            at_each_line(strike)
            with CheckpointStore(run, keep=2) as store:
                store.save(tree_of(30), step=30)

        child, reading = forked(work)
        _, status = os.waitpid(child, 0)
        os.close(reading)
        if fault := after_the_kill(run, 20):
            faults.append(f"line {line}: {fault}")
        if os.WIFEXITED(status):
            return {"killed": count, "lines": line, "faults": faults, "exit": os.WEXITSTATUS(status)}
        count += 1
        line += stride


def strikes(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Kill, from outside and at random moments, a process that saves in a loop; each goes on from the one before."""
    rng = random.Random(seed)
    faults = []
    done = 0
    with CheckpointStore(folder) as store:
        store.save(tree_of(0), step=0)
    for strike in range(count):

        def work(writing: int) -> None:
            def leave_a_trail() -> None:
                os.write(writing, b".")

            at_each_line(leave_a_trail)
            with CheckpointStore(folder) as store:
                found = store.load_newest()
                assert found is not None
                step = int(found[1]["step"])
                while True:
                    step += 10
                    store.save(tree_of(step), step=step)
                    os.write(writing, b"%09d" % step)

        child, reading = forked(work)
        seen = b""
        # The child is killed when so much of its trail has been read; the pipe lets it run on by up to 64 KiB.
        while len(seen) < (goal := rng.randrange(500, 6000)):
            seen += os.read(reading, goal - len(seen))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(reading, 1 << 16):
            seen += more
        os.close(reading)
        steps = [int(each) for each in seen.replace(b".", b" ").split() if len(each) == 9]
        done = max([done, *steps])
        if fault := after_the_kill(folder, done):
            faults.append(f"strike {strike}: {fault}")
        done = max(done, *(int(path.name[2:]) for path in folder.glob("ba*")))
    return {"killed": count, "faults": faults, "steps": done}


def full(folder: Path, count: int) -> dict[str, Any]:
    """Let the disk be full after ever more bytes of a save, by a limit on the size of files."""
    whole = tree_of(20, size=100_000)
    faults, errors = [], 0
    for cut in range(count):
        limit = cut * 410_000 // (count - 1)  # the last lies behind the last byte

        def work(writing: int, run: Path = folder / f"full-{cut}", limit: int = limit) -> None:
            with CheckpointStore(run) as store:
                first = store.save(tree_of(10), step=10)
                _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
                outcome = "saved"
                try:
                    store.save(whole, step=20)
                except CheckpointError as error:
                    cause = error.__cause__
                    outcome = errno.errorcode[cause.errno or 0] if isinstance(cause, OSError) else repr(cause)
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
                clean = not any(each.name.startswith(TEMPORARY) for each in run.iterdir())
                intact = is_tree_of(read_checkpoint(first), 10)
                again = is_tree_of(read_checkpoint(store.save(whole, step=20)), 20, size=100_000)
            report = {"outcome": outcome, "clean": clean, "intact": intact, "again": again}
            os.write(writing, json.dumps(report).encode())

        child, reading = forked(work)
        with os.fdopen(reading, "rb") as pipe:
            report = json.loads(pipe.read() or b"null")
        os.waitpid(child, 0)
        errors += bool(report and report["outcome"] == "EFBIG")
        if report not in (
            {"outcome": "EFBIG", "clean": True, "intact": True, "again": True},
            {"outcome": "saved", "clean": True, "intact": True, "again": True},
        ):
            faults.append({"limit": limit, "report": report})
    return {"cuts": count, "refused": errors, "faults": faults}


def tiny(folder: Path, count: int) -> dict[str, Any]:
    """Save to file systems that are too small by ever less, a page at a time."""
    faults, outcomes = [], []
    for cut in range(count):
        disk = folder / f"disk-{cut}"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={32 + 4 * cut}k", "none", str(disk)], check=True)
        with CheckpointStore(disk) as store:
            first = store.save(tree_of(10), step=10)
            outcome = "saved"
            try:
                store.save(tree_of(20, size=5000), step=20)
            except CheckpointError as error:
                outcome = errno.errorcode[error.__cause__.errno or 0] if isinstance(error.__cause__, OSError) else "?"
            outcomes.append(outcome)
            if not is_tree_of(read_checkpoint(first), 10) or any(disk.glob(f"{TEMPORARY}*")):
                faults.append(f"{cut}: {outcome}, and the first checkpoint or a leftover suffered")
            if outcome == "ENOSPC" and not is_tree_of(
                read_checkpoint(store.save(tree_of(30, size=10), step=30)), 30, size=10
            ):
                faults.append(f"{cut}: the store did not go on")
    return {"outcomes": outcomes, "faults": faults}


FORBIDDEN = (
    "exec",
    "compile",
    "import",
    "pickle.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
    "socket.",
    "ctypes.",
)


def hostile(folder: Path) -> dict[str, Any]:
    """Read every checkpoint in ``folder``, each in a fork under an audit hook that forbids code to run and other files."""
    paths = sorted(folder.iterdir())
    refused(paths[0])  # whatever is imported late is imported now
    report = {}
    for path in paths:

        def work(writing: int, path: Path = path) -> None:
            os.write(writing, json.dumps(watched(path, folder)).encode())

        child, reading = forked(work)
        with os.fdopen(reading, "rb") as pipe:
            report[path.name] = json.loads(pipe.read() or b"null")
        os.waitpid(child, 0)
    return report


def watched(path: Path, folder: Path) -> dict[str, Any]:
    """Read one checkpoint and return the error's type, what was forbidden, and seconds and memory that it took."""
    forbidden: list[str] = []
    watching = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not watching:
            return
        found = event.startswith(FORBIDDEN)
        if event == "open" and isinstance(arguments[0], str) and not arguments[0].startswith(str(folder)):
            # relative to the directory
            found = arguments[0] not in ("tensors.safetensors", "state.json", "manifest.json")
        if found:
            forbidden.append(f"{event} {arguments!r}"[:200])
            raise PermissionError(forbidden[-1])

    before = peak_kib(forget=True)
    sys.addaudithook(hook)
    used = resource.getrusage(resource.RUSAGE_SELF)
    outcome = refused(path)
    spent = resource.getrusage(resource.RUSAGE_SELF)
    watching = False
    seconds = spent.ru_utime - used.ru_utime + spent.ru_stime - used.ru_stime
    return {
        "outcome": outcome, "forbidden": forbidden, "seconds": seconds, "mebibytes": (peak_kib() - before) >> 10
    }  # fmt: skip


def peak_kib(*, forget: bool = False) -> int:
    """Return the most memory that this process ever had; with ``forget``, from now on."""
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])


def refused(path: Path) -> str | None:
    """Return the type of the error that reading ``path`` raises, None if it is read."""
    try:
        read_checkpoint(path)
    except Exception as error:  # noqa: BLE001  # which one is the question
        return type(error).__name__ if isinstance(error, CheckpointError) else traceback.format_exc()
    return None


def main(name: str, folder: str, *numbers: str) -> None:
    """Run one kind of fault."""
    kinds: dict[str, Callable[..., dict[str, Any]]] = {
        "kills": kills,
        "strikes": strikes,
        "full": full,
        "tiny": tiny,
        "hostile": hostile,
    }
    json.dump(kinds[name](Path(folder), *map(int, numbers)), sys.stdout)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
