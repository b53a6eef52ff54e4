"""What a fit survives: numbers that are not finite, no memory, dead workers, a full disk; and what it does not."""

from __future__ import annotations

import os
import random
import resource
import signal
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from helpers import mlp, same_weights, weights
from thawline.algorithms import EMA, LayerThaw, LoRAInject
from thawline.engine import (
    Algorithm,
    ArgumentError,
    Checkpointing,
    Event,
    NonFiniteError,
    OutOfMemoryError,
    State,
    ThawlineWarning,
    Trainer,
)
from thawline.engine.memory import is_out_of_memory
from thawline.engine.store import checkpoints_in
from thawline.engine.workers import _is_death

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
Trainer_ = partial(Trainer, loss_fn=cross_entropy, optimizer=SGD, progress=False)
Batches = list[tuple[Tensor, Tensor]]


def batches(count: int = 8, *, bad: tuple[int, ...] = (), size: int = 8) -> Batches:
    """Return batches of which some hold a NaN."""
    generator = torch.Generator().manual_seed(1)
    made = [(torch.randn(size, 4, generator=generator), torch.arange(size) % 2) for _ in range(count)]
    for number in bad:
        made[number][0][0, 0] = torch.nan
    return made


def seeded(make: Any = mlp) -> Any:
    """Return a model that is the same each time."""
    torch.manual_seed(3)
    return make()


def normed() -> nn.Sequential:
    """Return a model with running statistics and dropout."""
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))


# -- not finite --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [(0,), (1,), (3,), (7,), (2, 3), (2, 6)], ids=str)
@pytest.mark.parametrize("every", ["1ba", "3ba", "1ep"])
def test_a_rollback_comes_to_the_run_that_skips(bad: tuple[int, ...], every: str, tmp_path: Path) -> None:
    """From whichever checkpoint: the replay is exact, and the batch is left out the second time; history included."""
    results = []
    for policy in ("skip", "rollback"):
        model, data = seeded(), batches(bad=bad)
        trainer = Trainer_(
            algorithms=[LoRAInject(rank=2), LayerThaw(every="2ba"), EMA(half_life="0.1dur")], on_nonfinite=policy,
            run_dir=tmp_path / policy, checkpoint=Checkpointing(every=every),
        )  # fmt: skip
        result = trainer.fit(model, data, [data[5]], duration="2ep")
        results.append((weights(model), result.history, result.clock, result.metrics))
    (skipped, *rest), (rolled, *rest2) = results
    assert same_weights(skipped, rolled)
    assert rest == rest2
    assert not any(each.isnan().any() for each in rolled.values())


def test_a_batch_that_is_finite_the_second_time_is_trained(tmp_path: Path) -> None:
    """A fault of the machine and not of the data leaves no trace."""
    faults = [True]

    def forward(model: nn.Module, batch: Any) -> Any:
        outputs = model(batch[0])
        if (batch[0] == data[5][0]).all() and faults:
            faults.clear()
            return outputs * torch.nan
        return outputs

    data, policy = batches(), Checkpointing(every="2ba")
    models = [seeded(normed), seeded(normed)]
    Trainer_().fit(models[0], data, duration=1)
    result = Trainer_(forward_fn=forward, on_nonfinite="rollback", run_dir=tmp_path, checkpoint=policy).fit(
        models[1], data, duration=1
    )
    assert not faults
    assert same_weights(weights(models[0]), weights(models[1]))
    assert result.clock.batch == 8


class Grow(Algorithm):
    """Attaches adapters and freezes the head at batch 3."""

    events = frozenset({Event.BATCH_START})

    def apply(self, event: Event, state: State) -> None:
        if state.clock.batch == 3:
            state.ledger.attach("0", "gain", owner=self.owner, size=4)
            state.ledger.freeze("head", owner=self.owner)


def test_a_rollback_undoes_what_happened_to_the_model(tmp_path: Path) -> None:
    """Surgery and holds newer than the checkpoint come again, once, at their time."""
    models = [seeded(), seeded()]
    for policy, model in zip(("skip", "rollback"), models, strict=True):
        trainer = Trainer_(algorithms=[Grow()], on_nonfinite=policy, run_dir=tmp_path / policy, debug=True)
        trainer.fit(model, batches(bad=(5,)), duration=1)
    assert "0.gain" in dict(models[1].named_parameters())
    assert same_weights(weights(models[0]), weights(models[1]))


def test_rolling_back_gives_up(tmp_path: Path) -> None:
    """Weights that cannot be saved from NaN end the fit with what to do."""
    trainer = Trainer_(on_nonfinite="rollback", run_dir=tmp_path)
    with pytest.raises(NonFiniteError, match="the loss is nan at epoch 0, batch 4, the 5th time in a row"):
        trainer.fit(seeded(), batches(bad=tuple(range(8))), duration=1)
    spread = tuple(number for number in range(12) if number % 2)
    with pytest.raises(NonFiniteError, match="batch 11, after 5 rollbacks to the checkpoint of batch 0. Resume"):
        Trainer_(on_nonfinite="rollback", run_dir=tmp_path / "2").fit(seeded(), batches(12, bad=spread), duration=1)


def test_a_rollback_needs_a_run_dir() -> None:
    """Said when the Trainer is made, with the call to write."""
    with pytest.raises(ArgumentError, match=r"Trainer\(run_dir='runs/first', on_nonfinite='rollback'\)"):
        Trainer_(on_nonfinite="rollback")


def test_a_skipped_batch_leaves_running_statistics_alone() -> None:
    """Where its NaN would stay for good."""
    data = batches(bad=(3,))
    models = [seeded(normed), seeded(normed)]
    Trainer_(on_nonfinite="skip").fit(models[0], data, duration=1)
    assert not any(each.isnan().any() for each in weights(models[0]).values())
    assert models[0][1].num_batches_tracked == 7


# -- out of memory -----------------------------------------------------------------------------------------------------


class NoMemoryBackward(torch.autograd.Function):
    """Runs out of memory in the backward pass where a switch says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, full: bool) -> Tensor:  # type: ignore[override]
        ctx.full = full
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        if ctx.full:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return grad, None


class Hungry(nn.Module):
    """Draws from every generator, keeps running statistics, and runs out of memory above ``most`` samples.

    Args:
        most: The largest batch.
        start: The call of forward from which on memory is short.
        where: ``"forward"``, ``"late"`` (in the last call of a batch's microbatches as well) or ``"backward"``.
        norm: Whether there is BatchNorm.
    """

    def __init__(self, most: int, start: int = 0, where: str = "forward", norm: bool = True) -> None:
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.LayerNorm(8)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(8, 2)
        self.most, self.start, self.where, self.calls = most, start, where, 0

    def forward(self, x: Tensor) -> Tensor:
        full = self.training and len(x) > self.most and self.calls >= self.start
        self.calls += self.training
        x = self.dropout(self.norm(self.body(x))) * (1 + np.random.rand()) * (1 + random.random())  # noqa: NPY002
        if full and self.where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return NoMemoryBackward.apply(self.head(x), full and self.where == "backward")


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("norm", [True, False], ids=["BatchNorm", "LayerNorm"])
@pytest.mark.parametrize("step", range(8))
def test_what_follows_equals_a_run_with_that_microbatch_size(where: str, norm: bool, step: int, tmp_path: Path) -> None:
    """Bit for bit, from the batch at which memory ran out: weights, statistics, losses, random numbers."""
    data, policy = batches(), Checkpointing(every="1ba", keep=20)
    hungry = seeded(partial(Hungry, 3, step, where, norm))
    with pytest.warns(ThawlineWarning, match=rf"batch {step}: this batch .* 2 samples at a time") as caught:
        found = Trainer_(run_dir=tmp_path / "hungry", checkpoint=policy).fit(hungry, data, duration=1)
    assert [each.filename for each in caught] == [__file__]
    # Another fit with memory enough, and one that leaves it at that batch, in microbatches of 2.
    model = seeded(partial(Hungry, 99, 0, where, norm))
    Trainer_(run_dir=tmp_path / "whole", checkpoint=policy).fit(model, data, duration=1)
    expected = seeded(partial(Hungry, 99, 0, where, norm))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThawlineWarning)
        resume = tmp_path / "whole" / f"ba{step:08d}" if step else False
        result = Trainer_(microbatch_size=2).fit(expected, data, duration=1, resume=resume)
    assert same_weights(weights(hungry), weights(expected))
    assert found.metrics == result.metrics


class Sleeper(nn.Module):
    """Draws from torch's generator once its body is awake, and runs out of memory above ``most`` samples.

    Args:
        most: The largest batch.
        start: The call of forward from which on memory is short.
        wakes: The call from which on it draws; None leaves that to the mode its body is in.
    """

    def __init__(self, most: int, start: int = 0, wakes: int | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 2)
        self.most, self.start, self.wakes, self.calls = most, start, wakes, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        y = self.body[0](x) if self.wakes is not None and self.calls <= self.wakes else self.body(x)
        if self.training and len(x) > self.most and self.calls > self.start:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return self.head(y)


class Wake(Algorithm):
    """Holds the body in eval mode, and thaws it at the third batch."""

    events = frozenset({Event.FIT_START, Event.BATCH_START})

    def apply(self, event: Event, state: State) -> None:
        if event is Event.FIT_START:
            state.ledger.freeze("body.*", owner=self.owner, mode="eval")
        elif state.clock.batch == 2:
            state.ledger.thaw("body.*", owner=self.owner)


@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_model_that_begins_to_draw_where_it_thaws_is_repeated_exactly(step: int, tmp_path: Path) -> None:
    """The random state is not copied while nothing draws: from the ledger's change on it is."""
    data, policy = batches(), Checkpointing(every="1ba", keep=20)
    hungry = seeded(partial(Sleeper, 3, step))
    with pytest.warns(ThawlineWarning, match=rf"batch {step}: this batch .* 2 samples at a time"):
        Trainer_(algorithms=[Wake()]).fit(hungry, data, duration=1)
    model = seeded(partial(Sleeper, 99))
    Trainer_(algorithms=[Wake()], run_dir=tmp_path, checkpoint=policy).fit(model, data, duration=1)
    expected = seeded(partial(Sleeper, 99))
    trainer = Trainer_(algorithms=[Wake()], microbatch_size=2)
    with pytest.warns(ThawlineWarning, match="microbatch_size: saved None, given 2"):
        trainer.fit(expected, data, duration=1, resume=tmp_path / f"ba{step:08d}")
    assert same_weights(weights(hungry), weights(expected))


@pytest.mark.parametrize(("wakes", "said"), [(0, False), (3, True), (99, False)])
def test_a_model_that_begins_to_draw_by_itself_is_told_of(
    wakes: int, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Where memory runs out before that was seen, the batch is repeated with other random numbers."""
    with caplog.at_level("WARNING", logger="thawline"), pytest.warns(ThawlineWarning, match="out of memory"):
        Trainer_().fit(seeded(partial(Sleeper, 3, 4, wakes)), batches(), duration=1)
    assert ("the model has begun to draw" in caplog.text) is said


def test_the_microbatch_size_is_kept_by_the_run_that_goes_on(tmp_path: Path) -> None:
    """Resumed at each step, without running out of memory again."""
    data, policy = batches(), Checkpointing(every="1ba", keep=20)
    whole = seeded(partial(Hungry, 3, 2))
    with pytest.warns(ThawlineWarning, match="out of memory"):
        Trainer_(run_dir=tmp_path, checkpoint=policy).fit(whole, data, duration=1)
    for step in range(3, 8):
        model = seeded(partial(Hungry, 3))
        Trainer_().fit(model, data, duration=1, resume=tmp_path / f"ba{step:08d}")
        assert same_weights(weights(model), weights(whole))


@pytest.mark.parametrize(("accumulate", "size", "most", "taken"), [(2, None, 4, 4), (1, 6, 2, 1), (3, 5, 1, 1)])
def test_the_size_is_halved_until_it_fits(accumulate: int, size: int | None, most: int, taken: int) -> None:
    """From the given one, or from the largest batch of the loader."""
    model = seeded(partial(Hungry, most, norm=False))
    with pytest.warns(ThawlineWarning) as caught:
        Trainer_(accumulate=accumulate, microbatch_size=size).fit(model, batches(6), duration=1)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = seeded(partial(Hungry, most, norm=False))
        Trainer_(accumulate=accumulate, microbatch_size=taken).fit(again, batches(6), duration=1)
    assert same_weights(weights(model), weights(again))


def test_a_single_sample_that_does_not_fit_is_an_error() -> None:
    """Typed, with what to do, and torch's own as its cause."""
    with pytest.raises(OutOfMemoryError, match=r"epoch 0, batch 2 with a single sample.*bf16") as caught:
        Trainer_().fit(seeded(partial(Hungry, 0, 2, norm=False)), batches(), duration=1)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_torchs_own_words_are_understood() -> None:
    """What the CPU's allocator says of more memory than there is; another error is none of that kind."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.matmul(torch.ones(2, 3), torch.ones(2, 3))
    assert not is_out_of_memory(caught.value)


def test_no_memory_in_the_optimizers_step_is_not_repeated() -> None:
    """Half of the weights may have moved."""

    class Full(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        Trainer_(optimizer=partial(Full, lr=0.1)).fit(mlp(), batches(), duration=1)


# -- workers -----------------------------------------------------------------------------------------------------------


class Deadly(Dataset[tuple[Tensor, int]]):
    """Kills the worker that loads one of its samples, as often as there are files to remove."""

    def __init__(self, folder: Path, deaths: int, sample: int = 21) -> None:
        self.folder, self.sample = folder, sample
        folder.mkdir()
        for number in range(deaths):
            (folder / str(number)).touch()

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        lives = list(self.folder.iterdir())
        if index == self.sample and lives and torch.utils.data.get_worker_info() is not None:
            lives[0].unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((4,), index / 40) + torch.randn(4), index % 2


class Ids(Algorithm):
    """Writes down which samples were in each batch."""

    events = frozenset({Event.BATCH_END})

    def __init__(self, seen: list[tuple[int, ...]]) -> None:
        self.seen = seen

    def apply(self, event: Event, state: State) -> None:
        assert state.sample_ids is not None
        self.seen.append(state.sample_ids)


def train_over(data: Deadly, **options: Any) -> tuple[dict[str, Tensor], list[tuple[int, ...]]]:
    """Fit two epochs."""
    seen: list[tuple[int, ...]] = []
    model = seeded()
    source = DataLoader(data, batch_size=4, shuffle=True, **options)
    Trainer_(algorithms=[Ids(seen)]).fit(model, source, duration=2)
    return weights(model), seen


@pytest.mark.parametrize("persistent", [False, True])
def test_dead_workers_are_replaced_at_the_cursor(persistent: bool, tmp_path: Path) -> None:
    """Three times: no sample is lost or repeated, none is augmented otherwise."""
    expected, ids = train_over(Deadly(tmp_path / "none", 0))
    found, seen = train_over(Deadly(tmp_path / "three", 3), num_workers=2, persistent_workers=persistent)
    assert seen == ids
    assert sorted(sample for batch in seen[:10] for sample in batch) == list(range(40))
    assert same_weights(found, expected)


# torch's handler of SIGCHLD raises wherever Python stands, also in a hook of somebody else's that the death finds it in.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_fourth_death_is_torchs_own_error(tmp_path: Path) -> None:
    """Named as torch names it, or the broken connection it was found by; the handler of SIGCHLD is as before."""
    train_over(Deadly(tmp_path / "none", 0), num_workers=1)  # torch sets its own at the first loader
    before = signal.getsignal(signal.SIGCHLD)
    four = tmp_path / "four"
    with pytest.raises((RuntimeError, OSError, EOFError)) as caught:
        train_over(Deadly(four, 4), num_workers=2)
    assert _is_death(caught.value)
    assert not list(four.iterdir())
    assert signal.getsignal(signal.SIGCHLD) is before


def test_a_worker_that_dies_during_a_step_does_not_tear_it(tmp_path: Path) -> None:
    """Its death is noticed where its batch is waited for, though torch would raise in the middle of the step."""
    import multiprocessing

    expected, ids = train_over(Deadly(tmp_path / "none", 0))
    killed: list[int] = []

    class Kill(Algorithm):
        events = frozenset({Event.BEFORE_STEP})

        def apply(self, event: Event, state: State) -> None:
            for child in multiprocessing.active_children() if state.clock.batch == 3 else ():
                assert child.pid is not None
                os.kill(child.pid, signal.SIGKILL)
                os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
                killed.append(child.pid)

    seen: list[tuple[int, ...]] = []
    model = seeded()
    source = DataLoader(Deadly(tmp_path / "kill", 0), batch_size=4, shuffle=True, num_workers=1)
    Trainer_(algorithms=[Ids(seen), Kill()]).fit(model, source, duration=2)
    assert killed
    assert seen == ids
    assert same_weights(weights(model), expected)


# -- a full disk -------------------------------------------------------------------------------------------------------


class Disk(Algorithm):
    """Is full from one batch to another."""

    events = frozenset({Event.BATCH_START})

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end

    def apply(self, event: Event, state: State) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        full = self.start <= state.clock.batch < self.end
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if full else hard, hard))

    def close(self) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_full_disk_leaves_the_old_checkpoint_and_the_run_goes_on(tmp_path: Path) -> None:
    """One warning, a try at each interval, and once there is room a checkpoint again; the weights do not know of it."""
    models = [seeded(partial(mlp, 32)), seeded(partial(mlp, 32))]
    data = [(torch.cat([x] * 8, 1), y) for x, y in batches(12)]
    Trainer_().fit(models[0], data, duration=1)
    trainer = Trainer_(algorithms=[Disk(3, 9)], run_dir=tmp_path, checkpoint=Checkpointing(every="2ba", keep=9))
    with pytest.warns(ThawlineWarning, match="a checkpoint was not written, and the run goes on") as caught:
        trainer.fit(models[1], data, duration=1)
    assert len(caught) == 1
    assert [path.name for path in checkpoints_in(tmp_path)] == [f"ba{step:08d}" for step in (2, 10, 12)]
    assert not list(tmp_path.glob(".tmp*"))
    assert same_weights(weights(models[0]), weights(models[1]))


# -- exceptions --------------------------------------------------------------------------------------------------------

HOOKS = [event for event in Event if event not in (Event.FIT_START, Event.FIT_ABORT, Event.FIT_END)]


class Breaks(Algorithm):
    """Fails at one event of one batch, where the ledger is open after a change of it; says what the ledger was then."""

    def __init__(self, event: Event, found: dict[str, str]) -> None:
        self.events = frozenset({event, Event.FIT_ABORT})
        self.event, self.found = event, found

    def apply(self, event: Event, state: State) -> None:
        if event is Event.FIT_ABORT:
            state.ledger.verify()
            self.found["abort"] = state.ledger.digest()
        elif self.found["armed"] and state.clock.batch >= 4:
            self.found["armed"] = ""
            self.found["before"] = state.ledger.digest()
            if event.opens_ledger:
                state.ledger.freeze("blocks[0]", owner=self.owner)
            self.found["after"] = state.ledger.digest()
            raise KeyError(event.name)

    def close(self) -> None:
        self.found["closed"] = "yes"

    def describe(self) -> dict[str, Any]:
        return {"name": "Breaks", "arguments": {}}


@pytest.fixture(scope="module")
def unbroken() -> dict[str, Tensor]:
    """Return the weights of the run in which nothing fails."""
    model = seeded()
    Trainer_(algorithms=[LayerThaw(every="3ba")]).fit(model, batches(), batches(1), duration=2)
    return weights(model)


@pytest.mark.parametrize("event", HOOKS, ids=lambda event: event.name)
def test_an_exception_leaves_a_whole_ledger_and_no_checkpoint_of_it(
    event: Event, tmp_path: Path, unbroken: dict[str, Tensor]
) -> None:
    """The ledger is as after the last operation; what is on disk was cut before, and goes on to the unbroken run."""
    found = {"armed": "yes"}

    def fit(resume: bool) -> nn.Module:
        model = seeded()
        trainer = Trainer_(
            algorithms=[LayerThaw(every="3ba"), Breaks(event, found)], run_dir=tmp_path, eval_every="2ba",
            checkpoint=Checkpointing(every="2ba"),
        )  # fmt: skip
        trainer.fit(model, batches(), batches(1), duration=2, resume=resume)
        return model

    with pytest.raises(KeyError, match=event.name) as caught:
        fit(False)
    assert any(f"in Breaks.apply at {event.name}" in note for note in caught.value.__notes__)
    assert found["closed"] == "yes"
    assert found["abort"] == found["after"]
    assert (found["before"] != found["after"]) == event.opens_ledger
    assert same_weights(weights(fit(True)), unbroken)
