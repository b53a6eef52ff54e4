"""The injections: each lets one kind of fault happen to the run of the rig, and counts what held."""

from __future__ import annotations

import os
import random
import resource
import select
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from thawline.engine import CheckpointError, Event, State
from thawline.engine.store import CheckpointStore, read_checkpoint, verify_checkpoint

from .forks import completed, fork, run, trail
from .rig import STEPS, Loss, Witness, fit, model, outcome

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
CALLS = ("openat", "write", "fsync", "close", "rename,renameat,renameat2", "mkdir", "unlink,unlinkat", "rmdir")
KIB = 1024
_EPOCH = 15  # steps


@define
class Count:
    """One line of the table.

    Args:
        fault: What was injected.
        injected: How often.
        failed: What did not hold, a sentence each.
        note: What the count is made of.
        seconds: Wall time.
    """

    fault: str
    injected: int = 0
    failed: list[str] = field(factory=list)
    note: str = ""
    seconds: float = 0.0

    def check(self, case: str, **held: bool) -> None:
        """Count a fault, and what of it did not hold."""
        self.injected += 1
        if wrong := [name.replace("_", " ") for name, value in held.items() if not value]:
            self.failed.append(f"{case}: not {', not '.join(wrong)}")


class Injector:
    """Folders and references that the injections share.

    Args:
        folder: An empty directory, but for the uncut run with all its checkpoints in ``whole``.
        quick: Whether the counts are those of CI.
        seed: Of what is drawn.
    """

    def __init__(self, folder: Path, *, quick: bool, seed: int) -> None:
        self.folder = folder
        self.whole = folder / "whole"
        self.expected = outcome(self.whole)
        self.quick = quick
        self.seed = seed
        self._made = 0

    def random(self, row: str) -> random.Random:
        """Return the row's own numbers."""
        return random.Random(f"{self.seed} {row}")

    def fresh(self) -> Path:
        """Return a new folder; the one before is removed, it would fill the disk."""
        shutil.rmtree(self.folder / f"run-{self._made}", ignore_errors=True)
        self._made += 1
        return self.folder / f"run-{self._made}"

    def cut_at(self, *steps: int) -> Path:
        """Return a new run directory as it was when the last of the steps had been saved."""
        folder = self.fresh()
        folder.mkdir()
        for name in [*(f"ba{step:08d}" for step in steps if step), "metrics.jsonl"]:
            source = self.whole / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
        return folder

    def ends_equal(self, folder: Path, *, metrics: bool = True) -> bool:
        """Return whether the run in ``folder`` has ended as the uncut one did, to the bit."""
        try:
            found = outcome(folder)
        except OSError:
            return False
        return all(found[key] == value for key, value in self.expected.items() if metrics or key != "metrics")

    def goes_on(self, folder: Path, **arguments: Any) -> bool:
        """Return whether the run in ``folder``, resumed, ends as the uncut one did, to the bit."""
        run(folder, lambda: fit(folder, every=f"{STEPS}ba", **arguments))
        return self.ends_equal(folder)


def striking(when: Callable[[Event, State], bool], act: Callable[[], None]) -> None:
    """Let the run in this process ``act``, once."""

    def strike(event: Event, state: State) -> None:
        if when(event, state):
            Witness.strike = None
            act()

    Witness.strike = strike


def at(event: Event, step: int) -> Callable[[Event, State], bool]:
    """Return what is true at an event from a step on."""
    return lambda seen, state: seen is event and state.clock.batch >= step


def kill_me() -> None:
    """End this process as the power of the system does."""
    os.kill(os.getpid(), signal.SIGKILL)


def newest(folder: Path) -> int:
    """Return the step of the newest checkpoint, 0 where there is none."""
    return max((int(path.name[2:]) for path in folder.glob("ba*")), default=0)


# -- cuts and kills ------------------------------------------------------------------------------------------------------


def resumes(injector: Injector) -> list[Count]:
    """Go on from the checkpoint of every step; and cut a run five times in succession."""
    found = []
    for workers in (0, 2):
        row = Count(f"resume at every step, {workers} workers")
        for step in range(1, STEPS):
            # What is equal at the next ten goes on equal from there: that is one of the cuts.
            last = step - step % 10 + 10 if injector.quick else STEPS
            folder, cut = injector.fresh(), injector.whole / f"ba{step:08d}"

            def work(folder: Path = folder, cut: Path = cut, workers: int = workers, last: int = last) -> None:
                striking(at(Event.BATCH_START, last), kill_me)
                fit(folder, resume=cut, workers=workers, every=f"{10 if last < STEPS else STEPS}ba")

            run(folder.with_name("log"), work)
            wanted = outcome(injector.whole, last)
            equal = newest(folder) == last and all(
                outcome(folder, last)[key] == wanted[key] for key in ("tensors", "state")
            )
            row.check(f"step {step}", bit_equal=equal)
        found.append(row)
    row, rng = Count("cut five times in succession"), injector.random("chains")
    for first in (1, 30) if injector.quick else range(1, STEPS - 4):
        folder, workers = injector.fresh(), rng.choice((0, 2))
        for step in [first, *sorted(rng.sample(range(first + 1, STEPS), 4))]:

            def cut_short(folder: Path = folder, workers: int = workers, step: int = step) -> None:
                striking(at(Event.AFTER_STEP, step), kill_me)
                fit(folder, workers=workers)

            run(folder, cut_short)
        row.check(f"first at {first}", bit_equal=injector.goes_on(folder, workers=workers))
    return [*found, row]


def kills(injector: Injector) -> list[Count]:
    """Kill a run that saves each step at random moments; it goes on from where it was."""
    row, rng = Count("SIGKILL at random moments"), injector.random("kills")
    total, runs = (25 if injector.quick else 500), 0
    folder = injector.fresh()
    while row.injected < total or newest(folder):
        if row.injected == total:
            row.note = f"in {runs + 1} runs"
            if not injector.goes_on(folder):
                row.failed.append(f"the last run does not end equal: {outcome(folder)}")
            break

        def work(folder: Path = folder) -> None:
            trail(folder)
            fit(folder)

        child = fork(folder, work)
        if ended(child.pid, rng.uniform(0, 0.8)):
            child.wait()
            runs += 1
            if not injector.ends_equal(folder):
                row.failed.append(f"run {runs} does not end equal: {outcome(folder)}")
            folder = injector.fresh()
            continue
        child.kill()
        child.wait()
        done, saved = completed(folder), newest(folder)
        row.check(f"kill {row.injected}", at_most_one_interval_lost=saved >= done - 1)
    return [row]


def ended(pid: int, seconds: float) -> bool:
    """Wait for the end of a child, and return whether it came."""
    watched = os.pidfd_open(pid)
    try:
        return bool(select.select([watched], [], [], seconds)[0])
    finally:
        os.close(watched)


def system_calls(injector: Injector) -> list[Count]:
    """Let strace kill a save at, or fail, each of its system calls."""
    row = Count("kill, EIO, ENOSPC at each system call of a save")
    if shutil.which("strace") is None or not permitted():
        row.note = "skipped: strace is not here, or not permitted"
        return [row]
    tree = read_checkpoint(injector.whole / "ba00000031")
    faults = ("signal=SIGKILL", "error=EIO", "error=ENOSPC")
    calls = CALLS[1:3] if injector.quick else CALLS
    for call, fault in product(calls, faults[:1] if injector.quick else faults):
        if call == "close" and fault != faults[0]:
            continue  # an error of close comes after the descriptor is gone
        when, reached = 1, True
        while reached:
            folder = injector.cut_at(29, 30)
            reached = save_under_strace(folder, tree, f"{call}:{fault}:when={when}")
            if reached:
                with CheckpointStore(folder) as store:
                    loaded = store.load_newest()
                whole = loaded is not None and loaded[0].name in ("ba00000030", "ba00000031")
                equal = injector.goes_on(folder)
                row.check(f"{call} {when}, {fault}", old_or_new=whole, bit_equal_after=equal)
            when += 1
    return [row]


def save_under_strace(folder: Path, tree: Any, inject: str) -> bool:
    """Save ``tree`` as step 31 in a child; return whether strace found the system call to spoil."""
    go, begin = os.pipe()

    def work() -> str | None:
        with CheckpointStore(folder) as store:
            os.read(go, 1)
            try:
                store.save(tree, step=31)
            except CheckpointError as error:
                # A failed save is a typed error, and the next one works.
                return None if isinstance(error.__cause__, OSError) else repr(error)
        return None

    child = fork(folder, work)
    traced = folder.with_name("strace")
    watched = f"trace={inject.partition(':')[0]}"
    with attached(child.pid, "-e", watched, "-e", f"inject={inject}", "-o", str(traced)) as strace:
        assert strace.stderr is not None
        strace.stderr.readline()  # "Process … attached"
        os.write(begin, b".")
        child.wait()
    os.close(go)
    os.close(begin)
    text = traced.read_text()
    return "(INJECTED)" in text or "+++ killed by SIGKILL +++" in text


def permitted() -> bool:
    """Return whether strace may attach to a child."""
    go, begin = os.pipe()
    if not (pid := os.fork()):
        os.read(go, 1)
        os._exit(0)
    with attached(pid) as strace:
        assert strace.stderr is not None
        allowed = "attached" in strace.stderr.readline()
        os.write(begin, b".")
        os.waitpid(pid, 0)
    os.close(go)
    os.close(begin)
    return allowed


def attached(pid: int, *arguments: str) -> subprocess.Popen[str]:
    """Attach strace to a process; its first line of errors says whether that worked."""
    strace = shutil.which("strace")
    assert strace is not None
    return subprocess.Popen([strace, "-p", str(pid), *arguments], stderr=subprocess.PIPE, text=True)


# -- the disk, and two writers ---------------------------------------------------------------------------------------------


def full_disk(injector: Injector) -> list[Count]:
    """Let no file grow past ever more bytes for some steps; the run goes on, and the last checkpoint is whole."""
    row, ballast = Count("disk full, each 64 KiB"), 120_000
    whole = injector.folder / "heavy"
    run(injector.folder / "log", lambda: fit(whole, model(ballast), keep=99))
    expected = outcome(whole)
    size = (whole / f"ba{STEPS:08d}" / "tensors.safetensors").stat().st_size
    cuts = range(0, size + 64 * KIB, 64 * KIB)
    for cut in cuts[:10] if injector.quick else cuts:
        folder = injector.fresh()

        def work(folder: Path = folder, cut: int = cut) -> dict[str, Any]:
            seen: dict[str, Any] = {}
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

            def strike(event: Event, state: State) -> None:
                if event is Event.AFTER_STEP and state.clock.batch == 50:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (cut, hard))
                if event is Event.AFTER_STEP and state.clock.batch == 54:
                    saved = newest(folder)
                    verify_checkpoint(folder / f"ba{saved:08d}")
                    seen["saved"] = saved
                    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

            Witness.strike = strike
            fit(folder, model(ballast), resume=whole / "ba00000048")
            return seen

        code, report = run(folder.with_name("log"), work)
        found = outcome(folder) if newest(folder) == STEPS else {}
        equal = all(found.get(key) == expected[key] for key in ("tensors", "state"))
        kept = code == 0 and (report or {}).get("saved") == (50 if cut < size else 54)
        row.check(f"{cut // KIB} KiB", run_goes_on=code == 0, old_intact=kept, bit_equal=equal)
    return [row]


def two_writers(injector: Injector) -> list[Count]:
    """Let a second fit begin in a directory where one runs: it is refused, and harms nothing."""
    row, rng = Count("two writers"), injector.random("writers")
    for number in range(5 if injector.quick else 50):
        step = rng.randrange(2, STEPS)
        folder = injector.cut_at(step - 1, step)
        inside, arrived = os.pipe()
        go, leave = os.pipe()

        def first(folder: Path = folder, step: int = step, arrived: int = arrived, go: int = go) -> None:
            def wait() -> None:
                os.write(arrived, b".")
                os.read(go, 1)

            striking(at(rng.choice((Event.BATCH_START, Event.AFTER_LOSS)), step), wait)
            fit(folder)

        writer = fork(folder, first)
        os.read(inside, 1)
        resume: Any = (True, False, folder)[number % 3]
        _, report = run(injector.folder / "log", partial(fit, folder, resume=resume))
        os.write(leave, b".")
        writer.wait()
        for each in (inside, arrived, go, leave):
            os.close(each)
        refused = bool(report) and report["error"] == "RunDirError" and str(writer.pid) in report["text"]
        row.check(f"at {step}, resume={resume}", refused_and_named=refused, bit_equal=injector.ends_equal(folder))
    return [row]


# -- signals, numbers, exceptions ------------------------------------------------------------------------------------------


def signals(injector: Injector) -> list[Count]:
    """Send a signal in the middle of a step: the fit returns with a checkpoint, and goes on from it."""
    row, rng = Count("SIGTERM, SIGINT, SIGUSR1"), injector.random("signals")
    events = (Event.BATCH_START, Event.BEFORE_FORWARD, Event.AFTER_LOSS, Event.BEFORE_STEP, Event.BATCH_END)
    for number in range(6 if injector.quick else 100):
        sent, step, event = SIGNALS[number % 3], rng.randrange(1, STEPS - 1), rng.choice(events)
        folder = injector.cut_at(step - 1)

        def work(
            folder: Path = folder, sent: signal.Signals = sent, step: int = step, event: Event = event
        ) -> dict[str, Any]:
            handlers = [signal.getsignal(each) for each in SIGNALS]
            striking(at(event, step), lambda: os.kill(os.getpid(), sent))
            result = fit(folder, every=f"{STEPS}ba")
            back = [signal.getsignal(each) for each in SIGNALS] == handlers
            return {"reason": result.stop_reason, "batch": result.clock.batch, "back": back}

        code, report = run(folder, work)
        told = code == 0 and bool(report) and report.get("reason") == "signal"
        # What is in hand is finished; a signal at the very end of a step is seen before the next.
        saved = told and step <= report["batch"] <= step + 1 and newest(folder) == report["batch"]
        case = f"{sent.name} at {event.name}, step {step}"
        back = told and report["back"]
        row.check(case, stopped=told, saved=saved, handlers_put_back=back, bit_equal=injector.goes_on(folder))
    return [row]


def spoil_once(step: int, act: Callable[[Tensor], Tensor]) -> None:
    """Let the first loss of a step be spoiled, the first time that it comes."""

    def arm(event: Event, state: State) -> None:
        if event is Event.BATCH_START and state.clock.batch == step:
            Witness.strike = None
            Loss.spoil = spoil

    def spoil(loss: Tensor) -> Tensor:
        Loss.spoil = None
        return act(loss)

    Witness.strike = arm


def not_a_number(injector: Injector) -> list[Count]:
    """Let the loss of a step be NaN, under each policy."""
    steps = (2, 17, 44) if injector.quick else range(1, STEPS)
    found = []
    for policy in ("raise", "skip", "rollback"):
        row = Count(f"NaN at step k, on_nonfinite={policy!r}")
        for step in steps:
            folder = injector.cut_at(step)

            def work(folder: Path = folder, step: int = step, policy: str = policy) -> None:
                spoil_once(step, lambda loss: loss * float("nan"))
                fit(folder, on_nonfinite=policy, keep=99)

            code, report = run(folder, work)
            error = (report or {}).get("error")
            if policy == "raise":
                as_told = error == "NonFiniteError" and newest(folder) == step
                row.check(f"step {step}", raised=as_told, bit_equal_after=injector.goes_on(folder))
            elif policy == "rollback":
                row.check(f"step {step}", went_on=not error, bit_equal=injector.ends_equal(folder, metrics=False))
            else:
                row.check(f"step {step}", went_on=not error, **skipped_alike(injector, folder, step))
            row.note = f"exit code {code}" if code else row.note
        found.append(row)
    return found


def skipped_alike(injector: Injector, folder: Path, step: int) -> dict[str, bool]:
    """Return whether a run that has skipped a step resumes to its own end, after the skip."""
    if step >= STEPS - 1:
        return {"bit_equal": newest(folder) == STEPS}
    again, ended = folder.with_name("again"), outcome(folder)
    cut = folder / f"ba{step + 1:08d}"
    run(folder.with_name("log"), lambda: fit(again, resume=cut, every=f"{STEPS}ba", on_nonfinite="skip"))
    found = outcome(again)
    shutil.rmtree(again)
    moved = ended["tensors"] != injector.expected["tensors"]
    return {"skipped": moved, "bit_equal": all(found[key] == ended[key] for key in ("tensors", "state"))}


def out_of_memory(injector: Injector) -> list[Count]:
    """Let memory run out in the forward pass of a step, once."""
    row = Count("out of memory at step k")

    def fail(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. (injected)")

    for step in (2, 17, 44) if injector.quick else range(1, STEPS):
        folder = injector.cut_at(step)

        def work(folder: Path = folder, step: int = step) -> dict[str, Any]:
            spoil_once(step, fail)
            result = fit(folder)
            return {"batch": result.clock.batch, "rows": len(result.history)}

        _, report = run(folder, work)
        row.check(f"step {step}", went_on=report == {"batch": STEPS, "rows": 4}, saved=newest(folder) == STEPS)
    return [row]


def exceptions(injector: Injector) -> list[Count]:
    """Let an algorithm raise at each event of a step: the error comes out, and what was saved is of a whole step."""
    row = Count("exception in each hook")
    events = [each for each in Event if each in Witness.events]
    for event in events:
        for step in steps_of(event, quick=injector.quick):
            folder = injector.cut_at(step)

            def work(folder: Path = folder, event: Event = event, step: int = step) -> None:
                def fail() -> None:
                    raise ZeroDivisionError("struck")

                striking(at(event, step), fail)
                fit(folder, every="1ba")

            _, report = run(folder, work)
            raised = (report or {}).get("error") == "ZeroDivisionError"
            told = raised and event.name in "".join(report["notes"])
            row.check(
                f"{event.name} at {step}", raised=raised, told_where=told, bit_equal_after=injector.goes_on(folder)
            )
    return [row]


def steps_of(event: Event, *, quick: bool) -> Iterable[int]:
    """Return the steps from which on to fail; a fit starts once, and then there is no checkpoint yet."""
    if event is Event.FIT_START:
        return (0,)
    last = STEPS - _EPOCH if event is Event.EPOCH_START else STEPS - 2
    return (10 + len(event.name),) if quick else range(1, last + 1)


INJECTIONS: dict[str, Callable[[Injector], list[Count]]] = {
    "resume": resumes,
    "kill": kills,
    "calls": system_calls,
    "full": full_disk,
    "writers": two_writers,
    "signals": signals,
    "nan": not_a_number,
    "memory": out_of_memory,
    "exceptions": exceptions,
}
