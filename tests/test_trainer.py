"""The Trainer: the order of events, numbers against a loop by hand, resume, and every wrong argument."""

from __future__ import annotations

import copy
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from helpers import MODELS, Encoder, cnn, loader, mlp, same_weights, weights
from thawline.engine import (
    Algorithm,
    ArgumentError,
    CheckpointError,
    Checkpointing,
    Clock,
    DataError,
    DistributedError,
    Event,
    LayerError,
    LedgerError,
    LossError,
    MemoryTracker,
    NonFiniteError,
    OptimizerError,
    RunDirError,
    SelectorError,
    State,
    ThawlineWarning,
    Time,
    Trainer,
    constant,
    cosine,
    join,
    linear,
    on,
    warmup,
)

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=0.02)
Trainer_ = partial(Trainer, loss_fn=cross_entropy, optimizer=SGD, progress=False)


class Watch(Algorithm):
    """Writes down every event, or what a function makes of the state there."""

    def __init__(self, seen: list[Any], what: Any = None, events: Any = None) -> None:
        self.seen, self.what = seen, what
        self.events = frozenset(Event if events is None else events)

    def apply(self, event: Event, state: State) -> None:
        """Write it down."""
        self.seen.append(event.name if self.what is None else self.what(state))


class Raise(Algorithm):
    """Raises once at an event of a batch."""

    def __init__(self, event: Event, batch: int, error: type[BaseException] = RuntimeError) -> None:
        self.events, self.batch, self.error = frozenset({event}), batch, error

    def match(self, event: Event, state: State) -> bool:
        """Match the one batch."""
        return state.clock.batch == self.batch

    def apply(self, event: Event, state: State) -> None:
        """Raise."""
        raise self.error("on purpose")


def test_events_come_in_the_order_of_the_loop() -> None:
    """One epoch of two batches of two microbatches, one evaluation of two batches."""
    seen: list[str] = []
    trainer = Trainer_(algorithms=[Watch(seen)], microbatch_size=4)
    trainer.fit(mlp(), loader(16, 8), loader(16, 8), duration="1ep")
    micro = ["BEFORE_FORWARD", "AFTER_FORWARD", "AFTER_LOSS", "AFTER_BACKWARD"]
    batch = ["BATCH_START", *micro, *micro, "BEFORE_STEP", "AFTER_STEP", "BATCH_END"]
    evaluation = ["EVAL_START", *["EVAL_BATCH_START", "EVAL_BATCH_END"] * 2, "EVAL_END"]
    assert seen == ["FIT_START", "EPOCH_START", *batch, *batch, *evaluation, "EPOCH_END", "FIT_END"]


@pytest.mark.parametrize(
    ("duration", "epoch_ends", "evaluations", "batches"),
    [("2ep", 2, 2, 8), ("6ba", 2, 2, 6), ("3ba", 1, 1, 3), ("33sp", 2, 2, 5), (1, 1, 1, 4), ("4ba", 1, 1, 4)],
)
def test_a_duration_that_ends_inside_an_epoch_still_ends_it(
    duration: Any, epoch_ends: int, evaluations: int, batches: int
) -> None:
    """EPOCH_END also comes when the duration ends inside an epoch, and the last evaluation before FIT_END."""
    seen: list[str] = []
    result = Trainer_(algorithms=[Watch(seen)]).fit(mlp(), loader(), loader(), duration=duration)
    assert seen.count("EPOCH_END") == seen.count("EPOCH_START") == epoch_ends
    assert seen.count("EVAL_END") == evaluations
    assert result.clock.batch == batches
    assert seen[-1] == "FIT_END"


def test_an_iterable_of_unknown_length_trains_evaluates_and_saves_each_epoch(tmp_path: Path) -> None:
    """A generator-like loader has no length; epochs still end, evaluations still come, and checkpoints."""

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([(torch.ones(4), torch.tensor(1))] * 16)

    seen: list[str] = []
    trainer = Trainer_(algorithms=[Watch(seen)], run_dir=tmp_path, checkpoint=Checkpointing(every="1ep", keep=9))
    with pytest.warns(ThawlineWarning, match="train_loader is a DataLoader over Stream, which can only be read"):
        result = trainer.fit(mlp(), DataLoader(Stream(), batch_size=8), loader(), duration="3ep")
    assert (seen.count("EVAL_END"), seen.count("EPOCH_END"), result.clock.batch, result.clock.epoch) == (3, 3, 6, 3)
    assert sorted(path.name for path in tmp_path.glob("ba*")) == ["ba00000002", "ba00000004", "ba00000006"]


def test_a_fit_equals_the_loop_by_hand_bit_for_bit() -> None:
    """Forward, backward, step and the schedule are those of twelve lines of PyTorch."""
    torch.manual_seed(5)
    net = mlp()
    plain = copy.deepcopy(net)
    batches = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(5)]
    Trainer_(schedule=linear()).fit(net, batches, duration="3ep")
    optimizer = SGD(plain.parameters())
    for step, (x, y) in enumerate(batches * 3):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 15)
        optimizer.zero_grad()
        cross_entropy(plain(x), y).backward()
        optimizer.step()
    assert same_weights(weights(net), weights(plain))


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        (constant(), lambda p: 1.0),
        (linear(end=0.2), lambda p: 1 - 0.8 * p),
        (cosine(), lambda p: 0.5 * (1 + torch.cos(torch.tensor(torch.pi * p, dtype=torch.float64)).item())),
        (warmup("2ba", linear()), lambda p: p * 5 if p < 0.2 else 1 - (p - 0.2) / 0.8),
        (warmup(0.5), lambda p: min(1.0, p * 2)),
        (join([constant(), constant(0.1)], [0.5]), lambda p: 1.0 if p < 0.5 else 0.1),
        (lambda p: 1 - p * p, lambda p: 1 - p * p),
    ],
)
@pytest.mark.parametrize("duration", ["2ep", "10ba", "80sp"])
def test_the_learning_rate_at_step_k_is_the_function_at_k(schedule: Any, formula: Any, duration: str) -> None:
    """LR(k) = base x f(k / n) at every step, whatever the duration's unit, with no off-by-one."""
    if duration.endswith("sp") and "2ba" in str(schedule):
        with pytest.raises(ArgumentError, match="80sp, got .2ba"):
            Trainer_(schedule=schedule).fit(mlp(), loader(40, 8), duration=duration)
        return
    rates: list[float] = []
    watch = Watch(rates, lambda state: state.optimizers[0].param_groups[0]["lr"], [Event.BEFORE_STEP])
    Trainer_(algorithms=[watch], schedule=schedule).fit(mlp(), loader(40, 8), duration=duration)
    assert rates == pytest.approx([0.1 * formula(k / 10) for k in range(10)], rel=1e-9, abs=1e-12)


@settings(max_examples=25)
@given(size=st.integers(1, 9), accumulate=st.sampled_from([1, 2, 4]), ignored=st.integers(0, 5), double=st.booleans())
def test_cutting_a_batch_does_not_change_its_gradient(size: int, accumulate: int, ignored: int, double: bool) -> None:
    """k microbatches equal one batch within 1e-6, in float64 within 1e-12, also where labels are ignored unevenly."""
    dtype = torch.float64 if double else torch.float32
    torch.manual_seed(1)
    net = mlp().to(dtype)
    x, y = torch.randn(16, 4, dtype=dtype), torch.randint(2, (16,))
    y[:ignored] = -100
    results = []
    for pieces, micro in ((1, None), (accumulate, size)):
        model = copy.deepcopy(net)
        batches = list(zip(x.chunk(pieces), y.chunk(pieces), strict=True))
        trainer = Trainer_(accumulate=pieces, microbatch_size=micro, optimizer=partial(torch.optim.SGD, lr=1.0))
        trainer.fit(model, batches, duration="1ep")
        results.append(weights(model))
    tolerance = 1e-12 if double else 1e-6
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=tolerance, rtol=0)


@pytest.mark.parametrize("size", [None, 4, 3])
def test_after_the_backward_pass_the_loss_is_the_whole_batchs(size: int | None) -> None:
    """At BEFORE_STEP, however the batch was cut: cross entropy over its eight samples."""
    net, seen = mlp(), []

    @on(Event.BEFORE_STEP)
    def look(state: State) -> None:
        seen.append((state.loss.item(), expected))

    x, y = torch.randn(8, 4), torch.randint(2, (8,))
    expected = cross_entropy(net(x), y).item()
    Trainer_(microbatch_size=size, algorithms=[look()]).fit(net, [(x, y)], duration="1ba")
    assert seen == [(pytest.approx(expected), expected)]


def test_batches_are_mappings_tuples_or_one_tensor() -> None:
    """A mapping is keywords with labels kept for loss_fn, a tuple inputs and targets, a tensor the one input."""

    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, *, x: Tensor, labels: Tensor | None = None) -> Any:
            logits = self.layer(x)
            return {"logits": logits, "loss": None if labels is None else cross_entropy(logits, labels)}

    x, y = torch.randn(8, 4), torch.randint(2, (8,))
    torch.manual_seed(0)
    net = Keywords()
    inside, outside, tuples = copy.deepcopy(net), copy.deepcopy(net), copy.deepcopy(net.layer)
    Trainer(optimizer=SGD, progress=False).fit(inside, [{"x": x, "labels": y}], duration="2ep")
    Trainer_().fit(outside, [{"x": x, "labels": y}], duration="2ep")
    Trainer_().fit(tuples, [(x, y)], duration="2ep")
    assert same_weights(weights(inside), weights(outside))
    assert torch.equal(inside.layer.weight, tuples.weight)
    own = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    trainer = Trainer(
        optimizer=partial(torch.optim.SGD, lr=0.01),
        progress=False,
        forward_fn=lambda model, batch: model(batch).square().mean(),
    )
    history = trainer.fit(own, [x], duration="5ep").history
    assert history[-1]["train/loss"] < history[0]["train/loss"]


def test_evaluation_weighs_batches_by_what_their_loss_is_a_mean_over() -> None:
    """The loss over an uneven last batch equals the loss over all samples at once; metrics likewise."""
    import torchmetrics

    net, data = mlp(), loader(21, 8, shuffle=False)
    x, y = data.dataset.tensors  # type: ignore[attr-defined]
    metrics = {
        "accuracy": torchmetrics.classification.MulticlassAccuracy(2, average="micro"),
        "error": lambda logits, targets: (logits.argmax(-1) != targets).float().mean(),
    }
    trainer = Trainer_(metrics=metrics)
    values = trainer.evaluate(net, data)
    logits = net(x)
    assert values["eval/loss"] == pytest.approx(cross_entropy(logits, y).item(), rel=1e-6)
    right = (logits.argmax(-1) == y).float().mean().item()
    assert values["eval/accuracy"] == pytest.approx(right)
    assert values["eval/error"] == pytest.approx(1 - right)
    assert net.training


def test_evaluation_disturbs_nothing() -> None:
    """Weights, BatchNorm statistics and random numbers are the same with and without evaluations."""
    x, y = torch.randn(24, 1, 8, 8), torch.randint(10, (24,))
    data = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    finals = []
    for every in ("1ba", "1ep", None):
        torch.manual_seed(0)
        net = nn.Sequential(cnn(), nn.Dropout(0.5))
        trainer = Trainer_(eval_every=every or "1ep")
        trainer.fit(net, data, data if every else None, duration="2ep")
        finals.append(weights(net))
    assert same_weights(finals[0], finals[1])
    assert same_weights(finals[0], finals[2])


def test_the_model_is_given_back_as_it_was() -> None:
    """After a fit: the same object, its mode and requires_grad as before, no hook, no gradient."""
    net = cnn()
    net[0].weight.requires_grad_(False)
    net.eval()
    identities = {name: (id(each), each.data_ptr()) for name, each in net.named_parameters()}
    Trainer_().fit(net, [(torch.randn(4, 1, 8, 8), torch.randint(10, (4,)))], duration="2ep")
    assert not any(module.training for module in net.modules())
    assert [name for name, each in net.named_parameters() if not each.requires_grad] == ["0.weight"]
    assert {name: (id(each), each.data_ptr()) for name, each in net.named_parameters()} == identities
    assert all(each.grad is None for each in net.parameters())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks for module in net.modules()
    )


def test_a_second_fit_starts_every_algorithm_afresh() -> None:
    """Two fits of one Trainer on equal models give equal weights: no state is carried over."""

    class Count(Algorithm):
        events = frozenset({Event.BATCH_END})

        def __init__(self, limit: int = 3) -> None:
            self.limit, self.count = limit, 0

        def apply(self, event: Event, state: State) -> None:
            self.count += 1
            if self.count == self.limit:
                state.stop("counted")

    trainer = Trainer_(algorithms=[Count()])
    torch.manual_seed(0)
    first = mlp()
    second = copy.deepcopy(first)
    one = trainer.fit(first, loader(), duration="2ep")
    two = trainer.fit(second, loader(), duration="2ep")
    assert (one.clock.batch, one.stop_reason) == (two.clock.batch, two.stop_reason) == (3, "counted")
    assert same_weights(weights(first), weights(second))


# -- resume ------------------------------------------------------------------------------------------------------------


def data_with_dropout() -> tuple[nn.Module, DataLoader[Any]]:
    """Return a model that draws random numbers and a shuffled loader of 5 batches."""
    torch.manual_seed(2)
    ids = torch.randint(11, (37, 6))
    return Encoder(2, dropout=0.2), DataLoader(TensorDataset(ids, ids[:, 0] % 2), batch_size=8, shuffle=True)


def test_resume_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    """Stopped after each batch by turns: final weights, history and clock are those of one uninterrupted run."""
    net, data = data_with_dropout()

    class StopEvery(Algorithm):
        """Raises each time it has seen some batches in this process."""

        events = frozenset({Event.BATCH_START})

        def __init__(self, batches: int = 2) -> None:
            self.batches = batches

        def apply(self, event: Event, state: State) -> None:
            """Count outside of the instance: a resumed fit resets it."""
            counter["left"] -= 1
            if counter["left"] < 0:
                raise KeyboardInterrupt

    counter = {"left": 10**6}

    def trainer(folder: Path) -> Trainer:
        every = Checkpointing(every="1ba", keep=3)
        return Trainer_(
            optimizer=ADAMW,
            schedule=cosine(),
            run_dir=folder,
            checkpoint=every,
            algorithms=[StopEvery()],
            log_every="3ba",
        )

    whole = trainer(tmp_path / "whole").fit(net, data, data, duration="2ep")
    expected, generator = weights(net), torch.get_rng_state()
    attempt, result = 0, whole
    for attempt in range(20):
        net, data = data_with_dropout()
        torch.manual_seed(attempt + 100)
        counter["left"] = 2
        try:
            result = trainer(tmp_path / "cut").fit(net, data, data, duration="2ep", resume=True)
        except KeyboardInterrupt:
            continue
        break
    assert attempt > 3
    assert same_weights(weights(net), expected)
    assert torch.equal(torch.get_rng_state(), generator)
    assert result.history == whole.history
    assert result.clock == whole.clock
    assert result.timeline.spans == whole.timeline.spans
    lines = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "cut")
    ]
    for line in itertools.chain(*lines):
        line.pop("time")
    assert lines[0] == lines[1]


def test_a_run_dir_that_holds_a_run_is_refused_and_resumes_only_when_asked(tmp_path: Path) -> None:
    """resume=False refuses, resume=True continues, a path continues from that checkpoint."""
    trainer = Trainer_(run_dir=tmp_path / "run", checkpoint=Checkpointing(every="1ep", keep=5))
    first = trainer.fit(mlp(), loader(), duration="2ep")
    with pytest.raises(RunDirError, match="resume=True"):
        trainer.fit(mlp(), loader(), duration="2ep")
    assert first.last is not None
    assert first.last.name == "ba00000008"
    longer = trainer.fit(mlp(), loader(), duration="3ep", resume=True)
    assert longer.clock.batch == 12
    from_path = Trainer_().fit(mlp(), loader(), duration="3ep", resume=first.last.parent / "ba00000004")
    assert len(from_path.history) == 3
    with pytest.raises(CheckpointError):
        Trainer_().fit(mlp(), loader(), duration="3ep", resume=tmp_path / "nowhere")


def test_resume_with_other_settings_says_what_differs(tmp_path: Path) -> None:
    """Another schedule or another model is an error that names the difference."""
    Trainer_(run_dir=tmp_path).fit(mlp(), loader(), duration="1ep")
    with pytest.raises(CheckpointError, match="schedule: saved .*constant.*given .*cosine"):
        Trainer_(run_dir=tmp_path, schedule=cosine()).fit(mlp(), loader(), duration="2ep", resume=True)
    with pytest.raises(CheckpointError, match="'6.weight' is not in the checkpoint"):
        Trainer_(run_dir=tmp_path).fit(mlp(depth=4), loader(), duration="2ep", resume=True)


def test_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    """monitor= keeps the checkpoint with the best metric besides the newest: of a score the highest."""
    values = iter([0.5, 0.9, 0.7, 0.1])
    current = {"value": 0.0}
    trainer = Trainer_(
        run_dir=tmp_path, checkpoint=Checkpointing(keep=1, monitor="eval/score"),
        metrics={"score": lambda outputs, targets: current["value"]},
        algorithms=[Watch([], lambda state: current.update(value=next(values)), [Event.EVAL_START])],
    )  # fmt: skip
    result = trainer.fit(mlp(), loader(8, 8), loader(8, 8), duration="4ep")
    assert result.best is not None
    assert (result.best.name, sorted(path.name for path in tmp_path.glob("ba*"))) == (
        "ba00000002",
        ["ba00000002", "ba00000004"],
    )


# -- failure -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [event for event in Event if not event.name.startswith(("FIT_END", "FIT_ABORT"))])
def test_an_exception_names_its_author_and_everything_is_closed(event: Event) -> None:
    """FIT_ABORT comes with the exception, every close() runs, the note says who, where and when."""
    seen: list[Any] = []

    class Closing(Algorithm):
        events = frozenset({Event.FIT_ABORT, Event.FIT_END})

        def apply(self, event: Event, state: State) -> None:
            seen.append((event, type(state.exception)))

        def close(self) -> None:
            seen.append("closed")

    net = mlp()
    with pytest.raises(RuntimeError, match="on purpose") as caught:
        Trainer_(
            algorithms=[
                Closing(),
                Raise(
                    event,
                    0 if (event.name.endswith("START") and not event.name.startswith("EVAL")) or event in EARLY else 1,
                ),
            ]
        ).fit(net, loader(8, 8), loader(8, 8), duration="2ep")
    assert seen == [(Event.FIT_ABORT, RuntimeError), "closed"]
    assert f"Raise.apply at {event.name}" in caught.value.__notes__[0]
    assert all(each.requires_grad for each in net.parameters())


EARLY = {
    Event.BEFORE_FORWARD,
    Event.AFTER_FORWARD,
    Event.AFTER_LOSS,
    Event.AFTER_BACKWARD,
    Event.BEFORE_STEP,
    Event.AFTER_STEP,
}


def poisoned(at: int, total: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Return batches of which one has a NaN."""
    batches = [(torch.randn(4, 4), torch.randint(2, (4,))) for _ in range(total)]
    batches[at][0][0, 0] = float("nan")
    return batches


def test_a_nan_raises_before_it_reaches_the_weights() -> None:
    """The default: NonFiniteError names the batch, the weights are as before it."""
    net = mlp()
    with pytest.raises(NonFiniteError, match=r"batch 3.*on_nonfinite='skip'"):
        Trainer_().fit(net, poisoned(3), duration="1ep")
    assert all(torch.isfinite(each).all() for each in net.parameters())


def test_skip_leaves_out_the_step_and_goes_on() -> None:
    """on_nonfinite="skip": the clock goes on, the weights are those of a run whose optimizer skipped that batch."""
    skipped: list[bool] = []
    net = mlp()
    plain = copy.deepcopy(net)
    batches = poisoned(3)
    watch = Watch(skipped, lambda state: state.step_skipped, [Event.AFTER_STEP])
    result = Trainer_(on_nonfinite="skip", algorithms=[watch]).fit(net, batches, duration="1ep")
    assert skipped == [False] * 3 + [True] + [False] * 4
    assert result.clock.batch == 8
    optimizer = SGD(plain.parameters())
    for index, (x, y) in enumerate(batches):
        if index != 3:
            optimizer.zero_grad()
            cross_entropy(plain(x), y).backward()
            optimizer.step()
    assert same_weights(weights(net), weights(plain))


def test_the_first_skipped_step_of_a_fit_is_a_warning() -> None:
    """Once a fit; it names the batch, and how to see the others."""
    trainer = Trainer_(on_nonfinite="skip")
    for _ in range(2):
        batches = poisoned(3)
        batches[5] = batches[3]
        with pytest.warns(ThawlineWarning) as caught:
            trainer.fit(mlp(), batches, duration="1ep")
        said = [str(each.message) for each in caught if "step skipped" in str(each.message)]
        assert len(said) == 1
        assert "epoch 0, batch 3" in said[0]
        assert "configure_logging('console', level='warning')" in said[0]


def test_skip_gives_up_after_five_in_a_row() -> None:
    """A run that is lost does not spin to its end."""
    batches = [(torch.full((4, 4), float("inf")), torch.randint(2, (4,)))] * 9
    with pytest.raises(NonFiniteError, match="5th time in a row") as caught:
        Trainer_(on_nonfinite="skip").fit(mlp(), batches, duration="1ep")
    assert "on_nonfinite" not in str(caught.value)  # it is set already


def test_bf16_and_fp16_train_near_fp32() -> None:
    """Autocast changes the numbers a little and trains; fp16 brings its scaler, and both resume the same state."""
    finals = {}
    for precision in ("fp32", "bf16", "fp16"):
        torch.manual_seed(0)
        net = mlp(width=4)
        result = Trainer_(precision=precision).fit(net, loader(), duration="3ep")
        finals[precision] = result.history[-1]["train/loss"]
        assert all(each.dtype == torch.float32 for each in net.parameters())
    assert finals["bf16"] != finals["fp32"]
    assert finals["bf16"] == pytest.approx(finals["fp32"], abs=0.05)
    assert finals["fp16"] == pytest.approx(finals["fp32"], abs=0.05)


def test_nothing_trains_is_an_error_at_the_start_and_an_end_later() -> None:
    """Everything frozen by the user is a typed error; frozen on the way it ends the fit with a reason."""
    net = mlp()
    net.requires_grad_(False)
    with pytest.raises(LedgerError, match="held, by user"):
        Trainer_().fit(net, loader(), duration="1ep")

    class FreezeAll(Algorithm):
        events = frozenset({Event.BATCH_END})

        def apply(self, event: Event, state: State) -> None:
            if state.clock.batch == 2:
                state.ledger.freeze("*", owner=self.owner)

    result = Trainer_(algorithms=[FreezeAll()]).fit(mlp(), loader(), duration="2ep")
    assert (result.stop_reason, result.clock.batch) == ("nothing trains any more", 2)


# -- telling -----------------------------------------------------------------------------------------------------------


def test_trackers_are_given_the_recipe_and_the_metrics(tmp_path: Path) -> None:
    """log_config has the whole recipe as JSON; metrics come every log_every and at each evaluation."""
    tracker = MemoryTracker()
    trainer = Trainer_(trackers=[tracker], log_every="2ba", run_dir=tmp_path)
    trainer.fit(mlp(), loader(), loader(), duration="1ep")
    assert tracker.config["trainer"] == {**trainer.describe(), "duration": "1ep"}
    assert json.loads(json.dumps(trainer.describe())) == trainer.describe()
    assert [step for step, metrics in tracker.metrics if "train/loss" in metrics] == [2, 4]
    assert [step for step, metrics in tracker.metrics if "eval/loss" in metrics] == [4]
    assert tracker.closed
    assert json.loads((tmp_path / "run.json").read_text())["trainer"]["seed"] == 0


@pytest.mark.parametrize("log_every", ["1ba", "3ba", "10ba"])
def test_the_rates_that_are_told_are_those_of_the_last_step(log_every: str) -> None:
    """What BATCH_END sets for the next batch is not told of the one that is done."""

    class Halving(Algorithm):
        events = frozenset({Event.BATCH_END})

        def apply(self, event: Event, state: State) -> None:
            state.ledger.scale("*", 0.5**state.clock.batch, owner=self.owner)

    tracker = MemoryTracker()
    made = partial(torch.optim.SGD, lr=1.0)
    result = Trainer_(
        algorithms=[Halving()], optimizer=made, trackers=[tracker], log_every=log_every, eval_every="9ep"
    ).fit(mlp(), loader(), duration="2ep")
    told = {step: metrics["lr"] for step, metrics in tracker.metrics if "lr" in metrics}
    assert told == {step: 0.5 ** (step - 1) for step in told}
    assert list(told) == {"1ba": [1, 2, 3, 4, 5, 6, 7, 8], "3ba": [3, 6, 8], "10ba": [8]}[log_every]
    assert [row["lr"] for row in result.history] == [0.5**3, 0.5**7]


def test_a_tracker_that_raises_does_not_end_the_run() -> None:
    """A dead tracker has cost whole runs elsewhere."""

    class Dead:
        def log_config(self, config: Any) -> None:
            raise ConnectionError

        def log_metrics(self, metrics: Any, *, step: int) -> None:
            raise ConnectionError

        def log_artifact(self, path: Path, *, name: str | None = None) -> None:
            raise ConnectionError

        def close(self) -> None:
            raise ConnectionError

    with pytest.warns(ThawlineWarning, match="the tracker Dead failed in log_config.*the run goes on") as said:
        assert Trainer_(trackers=[Dead()]).fit(mlp(), loader(), duration="1ep").stop_reason == "duration"
    assert [each.filename for each in said] == [__file__]


def test_history_has_a_row_an_epoch_and_the_timeline_a_row_a_span() -> None:
    """Losses, rates and counts by epoch; spans by what trains."""

    class Thaw(Algorithm):
        events = frozenset({Event.FIT_START, Event.EPOCH_START})

        def apply(self, event: Event, state: State) -> None:
            if event is Event.FIT_START:
                state.ledger.freeze("blocks", owner=self.owner)
            elif state.clock.epoch == 2:
                state.ledger.thaw("blocks[-1]", owner=self.owner)

    result = Trainer_(algorithms=[Thaw()]).fit(mlp(), loader(), loader(), duration="4ep")
    assert [row["epoch"] for row in result.history] == [1, 2, 3, 4]
    assert [row["trainable"] for row in result.history] == [10, 10, 30, 30]
    assert {"train/loss", "eval/loss"} <= set(result.history[-1])
    rates = [{name: value for name, value in row.items() if name.startswith("lr")} for row in result.history]
    before = {"lr": 0.1, "lr/blocks[0]": 0.0, "lr/blocks[1]": 0.0, "lr/head": 0.1}
    assert rates == [before, before, *2 * [before | {"lr/blocks[1]": 0.1}]]
    spans = [(span.start.batch, span.end.batch, span.trainable, span.layers) for span in result.timeline.spans]
    assert spans == [(0, 8, 10, ("head",)), (8, 16, 30, ("blocks[1]", "head"))]


# -- wrong arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"algorithms": 3}, "algorithms="),
        ({"algorithms": ["EMA"]}, "algorithms="),
        ({"optimizer": "adam"}, "optimizer="),
        ({"schedule": 3}, "schedule="),
        ({"schedule": lambda p: float("nan")}, "schedule="),
        ({"min_lr": -1}, "min_lr="),
        ({"loss_fn": 3}, "loss_fn="),
        ({"forward_fn": "f"}, "forward_fn="),
        ({"loss_weight": 1.0}, "loss_weight="),
        ({"metrics": [1]}, "metrics="),
        ({"metrics": {"a": 1}}, "metrics="),
        ({"precision": "fp8"}, "precision="),
        ({"microbatch_size": 0}, "microbatch_size="),
        ({"microbatch_size": 2.5}, "microbatch_size="),
        ({"accumulate": 0}, "accumulate="),
        ({"eval_every": "often"}, "eval_every="),
        ({"eval_every": 0}, "eval_every="),
        ({"log_every": "-1ba"}, "log_every="),
        ({"seed": -1}, "seed="),
        ({"seed": "x"}, "seed="),
        ({"run_dir": 3}, "run_dir="),
        ({"checkpoint": "1ep"}, "checkpoint="),
        ({"checkpoint": Checkpointing()}, "run_dir"),
        ({"trackers": MemoryTracker()}, "trackers="),
        ({"trackers": [3]}, "trackers="),
        ({"device": "gpu"}, "device="),
        ({"device": "cuda:99"}, "device="),
        ({"distributed": "fsdp"}, "distributed="),
        ({"compile": "everything"}, "compile="),
        ({"on_nonfinite": "ignore"}, "on_nonfinite="),
        ({"progress": "loud"}, "progress="),
    ],
)
def test_a_wrong_argument_of_the_trainer_names_itself(arguments: dict[str, Any], named: str) -> None:
    """Each is a ValueError at construction with what it got, what it takes and a corrected call."""
    with pytest.raises(ValueError, match=named) as caught:
        Trainer(**arguments)
    assert isinstance(caught.value, ArgumentError)
    assert "Write: " in str(caught.value)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t.fit("net", loader(), duration=1), ArgumentError, r"fit\(model=\)"),
        (lambda t: t.fit(nn.ReLU(), loader(), duration=1), LayerError, "no parameters"),
        (lambda t: t.fit(mlp(), 3, duration=1), ArgumentError, "train_loader="),
        (lambda t: t.fit(mlp(), [], duration=1), DataError, "no batch"),
        (lambda t: t.fit(mlp(), loader(), [], duration=1), DataError, "no batch"),
        (lambda t: t.fit(mlp(), loader(), duration=0), ArgumentError, r"fit\(duration=\).*above zero"),
        (lambda t: t.fit(mlp(), loader(), duration="0.5dur"), ArgumentError, r"fit\(duration=\)"),
        (lambda t: t.fit(mlp(), loader(), duration="soon"), ArgumentError, r"fit\(duration=\)"),
        (lambda t: t.fit(mlp(), loader(), duration=1, resume=True), ArgumentError, "run_dir"),
        (lambda t: t.fit(mlp(), loader(), duration=1, resume=3), ArgumentError, "resume="),
        (lambda t: t.fit(mlp(), loader(), duration=1, layers=3), LayerError, "layers="),
        (lambda t: t.fit(mlp(), loader(), duration=1, layers={"head": "nope"}), LayerError, "matches nothing"),
        (lambda t: t.fit(mlp(), loader(), duration=1, optimizer=SGD(mlp().parameters())), OptimizerError, "not in the"),
        (lambda t: t.evaluate(mlp(), []), DataError, "no batch"),
    ],
)
def test_a_wrong_argument_of_fit_names_itself(call: Any, error: type[Exception], message: str) -> None:
    """Models, loaders, durations, layers and optimizers: a typed error each."""
    with pytest.raises(error, match=message):
        call(Trainer_())


def test_a_loss_that_is_no_number_or_has_no_gradient_is_refused() -> None:
    """Unreduced losses, missing losses and detached ones say what to write."""
    with pytest.raises(LossError, match=r"shape \(8,\).*loss_fn"):
        Trainer_(loss_fn=partial(cross_entropy, reduction="none")).fit(mlp(), loader(), duration=1)
    with pytest.raises(LossError, match="has no gradient"):
        Trainer_(loss_fn=lambda o, t: cross_entropy(o, t).detach()).fit(mlp(), loader(), duration=1)
    with pytest.raises(LossError, match="one number"):
        Trainer(progress=False).fit(mlp(), [torch.randn(8, 4)], duration=1)
    with pytest.raises(TypeError) as caught:
        Trainer(progress=False).fit(mlp(), loader(), duration=1)
    assert "loss_fn" in caught.value.__notes__[0]


def test_a_selector_that_matches_nothing_names_algorithm_and_event() -> None:
    """The error of a ledger call inside an algorithm carries the note."""

    class Wrong(Algorithm):
        events = frozenset({Event.FIT_START})

        def apply(self, event: Event, state: State) -> None:
            state.ledger.freeze("bert.*", owner=self.owner)

    with pytest.raises(SelectorError, match="matches nothing") as caught:
        Trainer_(algorithms=[Wrong()]).fit(mlp(), loader(), duration=1)
    assert "Wrong.apply at FIT_START" in caught.value.__notes__[0]


def test_several_processes_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that do not exchange gradients would drift apart without a word."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DistributedError, match="WORLD_SIZE=2"):
        Trainer_().fit(mlp(), loader(), duration=1)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_kind_of_model_trains_under_debug(name: str) -> None:
    """Tied, shared, bare, convolutional, attention: a fit with the ledger verified after each event."""
    inputs = {"cnn": torch.randn(4, 1, 8, 8), "tied": torch.randint(7, (4, 3)), "encoder": torch.randint(11, (4, 3))}
    net = MODELS[name]()
    x = inputs.get(name, torch.randn(4, 4))
    before = weights(net)
    trainer = Trainer(
        optimizer=SGD, progress=False, debug=True, algorithms=[Watch([])], forward_fn=lambda m, b: m(b).square().mean()
    )
    result = trainer.fit(net, [x], duration="3ep")
    assert result.clock == Clock(3, 3, 0, 12, 1.0, 1)
    assert not same_weights(before, weights(net))
    assert Time("3ep").reached(result.clock)


# -- what a hostile reader found ---------------------------------------------------------------------------------------


def test_a_resumed_run_has_the_rate_of_its_step_where_the_schedule_returns_to_its_start(tmp_path: Path) -> None:
    """A schedule of two equal halves is at its first value again in the middle: the saved rate must not stand."""

    def rates(folder: Path | None, **more: Any) -> list[float]:
        seen: list[float] = []
        saving: dict[str, Any] = (
            {"run_dir": folder, "checkpoint": Checkpointing(every="1ba", keep=20)} if folder else {}
        )

        class Rates(Algorithm):
            events = frozenset({Event.BEFORE_STEP})

            def apply(self, event: Event, state: State) -> None:
                seen.append(state.ledger.groups[0].lr or 0.0)

        halves = join([linear(), linear()], [0.5])
        Trainer_(algorithms=[Rates()], schedule=halves, **saving).fit(mlp(), loader(64, 8), duration="8ba", **more)
        return seen

    whole = rates(tmp_path)
    assert rates(None, resume=tmp_path / "ba00000004") == whole[4:]


def test_an_optimizer_instance_serves_a_second_fit_as_it_did_the_first() -> None:
    """Frozen parameters return to their groups with the base rate, also after an error."""
    net = mlp()
    optimizer = torch.optim.SGD(net.named_parameters(), lr=0.1)

    class Freeze(Algorithm):
        events = frozenset({Event.FIT_START})

        def apply(self, event: Event, state: State) -> None:
            state.ledger.freeze("blocks", owner=self.owner)

    Trainer_(algorithms=[Freeze()], schedule=linear()).fit(net, loader(), duration=1, optimizer=optimizer)
    with pytest.raises(RuntimeError, match="on purpose"):
        Trainer_(algorithms=[Freeze(), Raise(Event.AFTER_LOSS, 1)]).fit(net, loader(), duration=1, optimizer=optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in net.named_parameters()]
    assert Trainer_().fit(net, loader(), duration=1, optimizer=optimizer).history[-1]["trainable"] == 50


def test_epochs_of_different_unknown_lengths_are_all_trained_whole() -> None:
    """One epoch's length says nothing of the next one's."""

    class Uneven:
        def __init__(self) -> None:
            self.lengths = iter([2, 5, 3, 4])

        def __iter__(self) -> Any:
            return iter([(torch.ones(4, 4), torch.ones(4, dtype=torch.long))] * next(self.lengths))

    at: list[int] = []
    watch = Watch(at, lambda state: state.clock.batch, [Event.EVAL_START])
    result = Trainer_(algorithms=[watch]).fit(mlp(), Uneven(), loader(), duration=4)
    assert (result.clock.batch, at) == (14, [2, 7, 10, 14])


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights() -> None:
    """A finite loss can have a NaN gradient: it is found without GradClip."""

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * 0).abs().sqrt().mean() + cross_entropy(outputs, targets)

    net = mlp()
    before = weights(net)
    with pytest.raises(NonFiniteError, match="the gradients are not finite"):
        Trainer_(loss_fn=loss_fn).fit(net, loader(), duration=1)
    assert same_weights(weights(net), before)


def test_fp16_gives_up_where_no_scale_helps() -> None:
    """The scaler may skip until it finds its scale, not for the whole run."""
    batches = [(torch.full((4, 4), float("nan")), torch.ones(4, dtype=torch.long))] * 40
    with pytest.raises(NonFiniteError, match="25 times in a row"):
        Trainer_(precision="fp16").fit(mlp(), batches, duration=1)


def test_a_skipped_batch_is_left_out_of_the_mean_loss() -> None:
    """One NaN batch must not make the whole epoch's loss NaN."""
    result = Trainer_(on_nonfinite="skip").fit(mlp(), poisoned(3), duration="1ep")
    assert 0 < result.history[0]["train/loss"] < 2


def test_a_norm_without_parameters_stands_still_with_its_block() -> None:
    """BatchNorm(affine=False) follows what stands before it."""
    net: Any = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)
    )

    class Freeze(Algorithm):
        events = frozenset({Event.FIT_START})

        def apply(self, event: Event, state: State) -> None:
            state.ledger.freeze("blocks", owner=self.owner)

    Trainer_(algorithms=[Freeze()]).fit(net, loader(), duration=1)
    assert torch.equal(net[1].running_mean, torch.zeros(4))


def test_modules_that_stood_in_eval_mode_stand_there_again() -> None:
    """The mode is given back module by module."""
    net = mlp()
    net[0].eval()
    Trainer_().fit(net, loader(), duration=1)
    assert [module.training for module in net] == [False, True, True, True, True]


def test_buffers_outside_of_the_state_dict_resume_as_well(tmp_path: Path) -> None:
    """A counter that the forward pass reads is part of what the next batch depends on."""

    class Counting(nn.Module):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)
            self.register_buffer("count", torch.zeros(()), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return self.layer(x) / self.count

    torch.manual_seed(0)
    whole = Counting()
    again = copy.deepcopy(whole)
    Trainer_(run_dir=tmp_path, checkpoint=Checkpointing(every="1ba", keep=9)).fit(whole, loader(), duration=2)
    Trainer_().fit(again, loader(), duration=2, resume=tmp_path / "ba00000003")
    assert torch.equal(whole.layer.weight, again.layer.weight)


def test_a_monitor_without_evaluation_data_warns() -> None:
    """What waits for an evaluation that never comes says so at the start."""
    from thawline.algorithms import EarlyStop

    with pytest.warns(ThawlineWarning, match="EarlyStop monitors an evaluation"):
        Trainer_(algorithms=[EarlyStop("eval/loss")]).fit(mlp(), loader(), duration=1)


@pytest.mark.parametrize("monitor", ["eval/acuracy", "val_accuracy", "accuracy"])
def test_a_misspelled_monitor_warns_once_at_the_start(monitor: str, tmp_path: Path) -> None:
    """With the nearest of the metrics that the fit logs by itself; it goes on and saves."""
    seen: list[str] = []

    def accuracy(outputs: Tensor, targets: Tensor) -> float:
        seen.append("measured")
        return 0.5

    policy = Checkpointing(every="1ba", monitor=monitor)
    trainer = Trainer_(run_dir=tmp_path, checkpoint=policy, metrics={"accuracy": accuracy})
    with pytest.warns(ThawlineWarning) as caught:
        result = trainer.fit(mlp(), loader(), loader(), duration="3ep")
    (warning,) = caught
    message = f"nothing in this fit logs {monitor!r}, which Checkpointing monitors. Write: 'eval/accuracy'"
    assert str(warning.message) == message
    assert warning.filename == __file__
    assert (result.best, result.last) == (None, tmp_path / "ba00000012")
    with pytest.raises(ThawlineWarning):  # a warning is an error here, so it comes before the first evaluation
        trainer.fit(mlp(), loader(), loader(), duration="4ep", resume=True)
    assert len(seen) == 3 * 4


def test_a_monitor_of_the_users_own_is_missed_at_the_first_save_after_an_evaluation(tmp_path: Path) -> None:
    """What an algorithm of the user's logs cannot be known before."""
    policy = Checkpointing(every="1ba", monitor="eval/acuracy")
    trainer = Trainer_(
        algorithms=[Watch([])],
        run_dir=tmp_path,
        checkpoint=policy,
        metrics={"accuracy": lambda outputs, targets: 0.5},
    )
    with pytest.warns(ThawlineWarning) as caught:
        result = trainer.fit(mlp(), loader(), loader(), duration="3ep")
    (warning,) = caught
    assert "nobody logged 'eval/acuracy'" in str(warning.message)
    assert "Write: Checkpointing(monitor='eval/accuracy')" in str(warning.message)
    assert warning.filename == __file__
    assert (result.best, result.last) == (None, tmp_path / "ba00000012")


class Waits(Algorithm):
    """Waits for a metric, as an algorithm of the user's may."""

    events = frozenset({Event.BATCH_END})

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor

    def apply(self, event: Event, state: State) -> None:
        if state.metrics.get(self.monitor, 0.0) < 0:
            state.stop("below zero")


@pytest.mark.parametrize("evaluated", [True, False])
@pytest.mark.parametrize(
    ("monitor", "nearest"), [("train/los", "train/loss"), ("lr/haed", "lr/head"), ("val_loss", "eval/loss")]
)
def test_what_a_users_algorithm_waits_for_in_vain_is_said_after_the_first_epoch(
    monitor: str, nearest: str, evaluated: bool
) -> None:
    """Once, with the nearest of what was logged, whatever other algorithms there are."""
    with pytest.warns(ThawlineWarning) as caught:
        Trainer_(algorithms=[Waits(monitor), Watch([])]).fit(
            mlp(), loader(), loader() if evaluated else None, duration=3
        )
    (warning,) = caught
    assert f"nobody logged {monitor!r}" in str(warning.message)
    if evaluated or not nearest.startswith("eval/"):
        assert f"Write: Waits(monitor={nearest!r})" in str(warning.message)
    assert warning.filename == __file__


def test_what_comes_with_a_late_first_evaluation_is_waited_for() -> None:
    """Nothing is said of a metric that is there by then."""
    trainer = Trainer_(algorithms=[Waits("eval/accuracy")], eval_every="2ep", metrics={"accuracy": lambda *_: 0.5})
    trainer.fit(mlp(), loader(), loader(), duration=3)


class Late(nn.Module):
    """Makes a parameter, and a module, in its first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "head"):
            self.head = nn.Linear(4, 3)
            self.scale = nn.Parameter(torch.ones(4))
        return self.head(self.body(x) * self.scale)


@pytest.mark.parametrize("ready", [False, True])
def test_parameters_that_the_first_forward_makes_are_named(ready: bool) -> None:
    """They will not train, which is said once; with one forward before the fit they do."""
    model = Late()
    if ready:
        model(torch.zeros(1, 4))
        Trainer_().fit(model, loader(), duration=2)
        assert not torch.equal(model.scale, torch.ones(4))
        return
    with pytest.warns(ThawlineWarning) as caught:
        Trainer_(log_every="1ba").fit(model, loader(), duration=2)
    (warning,) = caught
    assert "scale, head.weight, head.bias of Late" in str(warning.message)
    assert "model(inputs); trainer.fit(model" in str(warning.message)
    assert warning.filename == __file__
    assert torch.equal(model.scale, torch.ones(4))


def test_metrics_without_evaluation_data_warn() -> None:
    """They would never be measured; the warning points at the call of fit."""
    trainer = Trainer_(metrics={"accuracy": lambda outputs, targets: 0.5})
    with pytest.warns(ThawlineWarning, match="there is no eval_loader to measure 'accuracy' on") as said:
        trainer.fit(mlp(), loader(), duration=1)
    assert [each.filename for each in said] == [__file__]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # what torch.compile imports
@pytest.mark.parametrize("call", ["fit", "plan"])
def test_a_compiled_model_is_refused(call: str) -> None:
    """Its parameters have other names than the module's, and a checkpoint would keep them."""
    with pytest.raises(ArgumentError, match=r"takes the plain module.*Write: trainer\.\w+\(model\._orig_mod, "):
        getattr(Trainer_(), call)(torch.compile(mlp()), loader(), duration=1)


def test_a_plan_takes_what_a_fit_takes() -> None:
    """The evaluation data in its place are not looked at."""
    data = loader()
    assert str(Trainer_().plan(mlp(), data, data, duration=2)) == str(Trainer_().plan(mlp(), data, duration=2))


def test_a_monitor_that_comes_with_the_first_evaluation_does_not_warn(tmp_path: Path) -> None:
    """Checkpoints that are cut before it have no metric, and that is as it should be."""
    policy = Checkpointing(every="1ba", monitor="eval/loss")
    result = Trainer_(run_dir=tmp_path, checkpoint=policy).fit(mlp(), loader(), loader(), duration="2ep")
    assert result.best is not None


def test_the_last_losses_of_a_short_fit_are_logged(tmp_path: Path) -> None:
    """A fit shorter than log_every still leaves its loss with the trackers."""
    tracker = MemoryTracker()
    Trainer_(trackers=[tracker], run_dir=tmp_path).fit(mlp(), loader(), duration="1ep")
    assert [step for step, metrics in tracker.metrics if "train/loss" in metrics] == [4]


def test_resume_with_another_loader_length_is_refused(tmp_path: Path) -> None:
    """Where an epoch has another number of batches, the cursor would point to the wrong place."""
    Trainer_(run_dir=tmp_path).fit(mlp(), loader(), duration="1ep")
    with pytest.raises(CheckpointError, match="4 batches an epoch, and the loader gives 8"):
        Trainer_(run_dir=tmp_path).fit(mlp(), loader(batch_size=4), duration="2ep", resume=True)
