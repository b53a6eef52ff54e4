"""A signal stops a fit before its next step, with a checkpoint from which it goes on to the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from helpers import loader, mlp, same_weights, weights
from thawline.algorithms import EMA, LayerThaw
from thawline.engine import Algorithm, Checkpointing, Event, FitResult, State, Trainer, cosine
from thawline.engine.signals import STOPPING, StopSignals

TESTS = Path(__file__).parent
POSIX = ("SIGTERM", "SIGINT", "SIGUSR1")


class Noisy(Dataset[tuple[Tensor, int]]):
    """Draws noise for each sample."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((4,), index / 24) + torch.randn(4), index % 2


class At(Algorithm):
    """Calls a function at one event of one batch, once."""

    def __init__(self, event: Event, batch: int, call: Callable[[], object]) -> None:
        self.events = frozenset({event})
        self.event, self.batch, self.call = event, batch, call

    def match(self, event: Event, state: State) -> bool:
        return state.clock.batch == self.batch

    def apply(self, event: Event, state: State) -> None:
        self.batch = -2
        self.call()

    def describe(self) -> dict[str, Any]:
        return {"name": "At", "arguments": {}}


def fit(run_dir: Path | None, at: At, *, resume: bool = False, workers: int = 0) -> tuple[nn.Module, FitResult]:
    """Fit three epochs of six batches, with everything that has state."""
    torch.manual_seed(7)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 8), nn.Linear(8, 2)
    )
    data = DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=workers)
    trainer = Trainer(
        algorithms=[LayerThaw(every="5ba"), EMA(half_life="0.1dur"), at],
        optimizer=partial(torch.optim.AdamW, lr=0.01), schedule=cosine(), loss_fn=cross_entropy, eval_every="4ba",
        log_every="3ba", run_dir=run_dir, progress=False,
        checkpoint=None if run_dir is None else Checkpointing(every="7ba"),
    )  # fmt: skip
    return model, trainer.fit(model, data, loader(8, 4), duration="3ep", resume=resume)


def nothing() -> At:
    """Return an algorithm that does nothing."""
    return At(Event.FIT_START, -1, int)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], FitResult]:
    """Return what a run comes to that nobody stops."""
    model, result = fit(tmp_path_factory.mktemp("whole"), nothing())
    return weights(model), result


def check_resumed(run_dir: Path, whole: tuple[dict[str, Tensor], FitResult]) -> None:
    """Go on in ``run_dir`` and compare weights, history, metrics and clock."""
    model, result = fit(run_dir, nothing(), resume=True)
    assert same_weights(weights(model), whole[0])
    assert (result.history, result.metrics, result.clock) == (whole[1].history, whole[1].metrics, whole[1].clock)
    assert result.stop_reason == "duration"


# -- in this process ---------------------------------------------------------------------------------------------------

EVENTS = [
    (Event.FIT_START, 0, 0), (Event.EPOCH_START, 0, 0), (Event.EPOCH_START, 6, 6), (Event.BATCH_START, 0, 1),
    (Event.BATCH_START, 9, 10), (Event.BEFORE_FORWARD, 3, 4), (Event.AFTER_LOSS, 3, 4), (Event.BEFORE_STEP, 5, 6),
    (Event.AFTER_STEP, 17, 18), (Event.BATCH_END, 6, 6), (Event.BATCH_END, 7, 7), (Event.BATCH_END, 18, 18),
    (Event.EVAL_START, 4, 4), (Event.EVAL_BATCH_END, 8, 8), (Event.EVAL_END, 12, 12), (Event.EPOCH_END, 6, 6),
    (Event.EPOCH_END, 12, 12),
]  # fmt: skip


@pytest.mark.parametrize(("event", "batch", "steps"), EVENTS, ids=lambda each: str(getattr(each, "name", each)))
def test_a_signal_at_any_event_stops_before_the_next_step(
    event: Event, batch: int, steps: int, tmp_path: Path, whole: tuple[dict[str, Tensor], FitResult]
) -> None:
    """The checkpoint is of the step; what goes on from it has weights, history and metrics of the run nobody stopped."""
    before = [signal.getsignal(each) for each in STOPPING]
    _, result = fit(tmp_path, At(event, batch, partial(signal.raise_signal, signal.SIGTERM)))
    assert (result.stop_reason, result.clock.batch) == ("signal", steps)
    assert result.last is not None
    assert result.last.name == f"ba{steps:08d}"
    assert [signal.getsignal(each) for each in STOPPING] == before
    check_resumed(tmp_path, whole)


def test_a_run_stopped_again_and_again_comes_to_the_same_bits(
    tmp_path: Path, whole: tuple[dict[str, Tensor], FitResult]
) -> None:
    """A signal at each of its steps."""
    for batch in range(1, 18):
        stop = At(Event.BATCH_END, batch, partial(signal.raise_signal, signal.SIGINT))
        _, result = fit(tmp_path, stop, resume=batch > 1)
        assert (result.stop_reason, result.clock.batch) == ("signal", batch)
    check_resumed(tmp_path, whole)


def test_a_signal_ends_a_fit_without_a_run_dir_too() -> None:
    """At the step, with the model as it is then."""
    _, result = fit(None, At(Event.BATCH_END, 4, partial(signal.raise_signal, signal.SIGINT)))
    assert (result.stop_reason, result.clock.batch, result.last) == ("signal", 4, None)


def test_a_signal_while_the_loader_is_waited_for_stops_before_the_batch(
    tmp_path: Path, whole: tuple[dict[str, Tensor], FitResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch that was on its way is trained by the run that goes on."""
    load, seen = Noisy.__getitem__, []

    def interrupted(self: Noisy, index: int) -> tuple[Tensor, int]:
        seen.append(index)
        if len(seen) == 11:  # in the third batch, the model's layers being found by a sample loaded on the side
            signal.raise_signal(signal.SIGUSR1)
        return load(self, index)

    with monkeypatch.context() as patched:
        patched.setattr(Noisy, "__getitem__", interrupted)
        _, result = fit(tmp_path, nothing())
    assert result.stop_reason == "signal"
    assert result.clock.batch < 3
    check_resumed(tmp_path, whole)


def test_handlers_are_put_back_when_the_fit_raises() -> None:
    """Those of the caller, whatever they were."""

    def mine(*_: object) -> None: ...

    def fail() -> None:
        raise RuntimeError("mine")

    before = {each: signal.getsignal(each) for each in STOPPING}
    try:
        signal.signal(signal.SIGTERM, mine)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        with pytest.raises(RuntimeError, match="mine"):
            fit(None, At(Event.AFTER_LOSS, 2, fail))
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_the_second_signal_goes_to_the_callers_handler() -> None:
    """The first does not; a signal that is ignored stays ignored."""
    got: list[int] = []
    before = {each: signal.getsignal(each) for each in STOPPING}
    try:
        signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGUSR1)
            assert signals.received is None
            signal.raise_signal(signal.SIGTERM)
            assert (signals.received, got) == ("SIGTERM", [])
            signal.raise_signal(signal.SIGTERM)
        assert got == [signal.SIGTERM]
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_a_fit_in_another_thread_leaves_signals_alone() -> None:
    """Only the main thread can set handlers; the fit runs all the same."""
    results: list[Any] = []

    def run() -> None:
        before = signal.getsignal(signal.SIGTERM)
        same = At(Event.BATCH_END, 3, lambda: results.append(signal.getsignal(signal.SIGTERM) is before))
        results.append(fit(None, same)[1].stop_reason)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert results == [True, "duration"]


def test_a_child_of_the_fit_ends_by_a_signal_as_before() -> None:
    """A process forked inside the fit is not caught by its handler."""
    with StopSignals() as signals:
        child = os.fork()
        if not child:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert signals.received is None


# -- processes ---------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from test_signals import At, Event, fit

def wait():
    print("here", flush=True)
    sys.stdin.readline()

folder, workers, twice = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "twice"
_, result = fit(folder, At(Event.AFTER_LOSS, 8, lambda: (wait(), wait() if twice else None)), workers=workers)
print(result.stop_reason, result.clock.batch, result.last.name, flush=True)
"""


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the script in processes of their own; end what is left of them."""
    started: list[subprocess.Popen[str]] = []

    def start(workers: int = 0, twice: bool = False) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(workers), "twice" if twice else "once"]
        pipe = subprocess.PIPE
        made = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=TESTS.parent, env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )  # fmt: skip
        started.append(made)
        return made

    yield start
    for each in started:
        if each.poll() is None:
            each.kill()
        each.communicate()


def send(child: subprocess.Popen[str], number: int, *, group: bool = False) -> None:
    """Wait until the child waits in its ninth batch, signal it or its whole group, and let it go on."""
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stdout.readline() == "here\n", child.communicate()[1]
    (os.killpg if group else os.kill)(child.pid, number)
    child.stdin.write("\n")
    child.stdin.flush()


@pytest.mark.parametrize(("name", "workers"), [(name, 0) for name in POSIX] + [("SIGINT", 2)])
def test_a_process_stops_at_the_step_and_another_goes_on(
    name: str, workers: int, process: Any, tmp_path: Path, whole: tuple[dict[str, Tensor], FitResult]
) -> None:
    """It ends by itself, with its last words; a terminal's Ctrl-C goes to its workers as well."""
    child = process(workers)
    send(child, getattr(signal, name), group=bool(workers))
    out, err = child.communicate(timeout=120)
    assert (child.returncode, out, err) == (0, "signal 9 ba00000009\n", "")
    check_resumed(tmp_path, whole)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_the_process(
    name: str, process: Any, tmp_path: Path, whole: tuple[dict[str, Tensor], FitResult]
) -> None:
    """As it would have without a fit; the checkpoint of the last interval is there."""
    child = process(twice=True)
    send(child, getattr(signal, name))
    send(child, getattr(signal, name))
    out, err = child.communicate(timeout=120)
    assert out == ""
    if name == "SIGINT":
        assert err.rstrip().splitlines()[-1].startswith("KeyboardInterrupt") or "KeyboardInterrupt" in err
    assert child.returncode == -getattr(signal, name)
    check_resumed(tmp_path, whole)


def test_a_fit_that_is_over_leaves_no_trace(tmp_path: Path) -> None:
    """Ctrl-C after it is a KeyboardInterrupt again."""
    Trainer(loss_fn=cross_entropy, progress=False, run_dir=tmp_path).fit(mlp(), loader(), duration="1ep")
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
