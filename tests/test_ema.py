"""EMA against a float64 recursion; the swap to the bit; what joins and leaves; resume."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typing_extensions import override

from helpers import MODELS, cnn, loader, mlp, pseudo_gradients, same_weights, weights
from thawline.algorithms.ema import EMA, ema_decay, ema_update
from thawline.engine import (
    Algorithm,
    ArgumentError,
    Checkpointing,
    Clock,
    Engine,
    Event,
    ParameterLedger,
    Stage,
    State,
    ThawlineError,
    Time,
    Trainer,
)

Array = np.ndarray[Any, np.dtype[np.float64]]


class Do(Algorithm):
    """Calls a function at an event of one batch, or of all."""

    def __init__(self, event: Event, what: Callable[[State], object], batch: int | None = None) -> None:
        self.events, self.what, self.batch = frozenset({event}), what, batch

    @override
    def match(self, event: Event, state: State) -> bool:
        """Match the one batch."""
        return self.batch is None or state.clock.batch == self.batch

    @override
    def apply(self, event: Event, state: State) -> None:
        """Call it."""
        self.what(state)


class Watcher(Do):
    """The same after everybody else."""

    stage = Stage.OBSERVE


class Loop:
    """A loop of one's own around the engine, with gradients made up: 4 batches of 8 samples an epoch."""

    def __init__(self, model: nn.Module, *algorithms: Algorithm, duration: str = "40ba", length: int = 4) -> None:
        ledger = ParameterLedger(model, partial(torch.optim.SGD, lr=0.1, momentum=0.5))
        self.state = State(model, ledger, duration, clock=Clock(batches_per_epoch=length))
        self.engine = Engine(algorithms, self.state, debug=True)
        self.length, self.lives = length, [self.live()]

    def live(self) -> dict[str, Array]:
        """Return all parameters and buffers in float64."""
        return {name: each.double().numpy().copy() for name, each in self.state.model.state_dict().items()}

    def batch(self, *, samples: int = 8, skip: bool = False, data: Tensor | None = None) -> None:
        """Do one batch, and write down the live weights after it."""
        state, emit = self.state, self.engine.emit
        state.model.train()
        emit(Event.BATCH_START)
        emit(Event.BEFORE_FORWARD)
        if data is not None:
            state.model(data)
        pseudo_gradients(state.ledger.trainable_parameters, seed=state.clock.batch)
        emit(Event.BEFORE_STEP)
        if not skip:
            for each in state.optimizers:
                each.step()
        state.step_skipped = skip
        emit(Event.AFTER_STEP)
        state.ledger.clear_gradients()
        state.tick(samples)
        emit(Event.BATCH_END)
        self.lives.append(self.live())
        if state.clock.batch_in_epoch == self.length:
            state.tick_epoch()
            emit(Event.EPOCH_END)

    def batches(self, count: int) -> None:
        """Do several."""
        for _ in range(count):
            self.batch()


def recursion(lives: list[dict[str, Array]], name: str, decays: list[float]) -> Array:
    """Return the average of one tensor after one update a decay, in float64; a decay of 1 is no update."""
    average = lives[0][name]
    for decay, live in zip(decays, lives[1:], strict=True):
        average = decay * average + (1 - decay) * live[name]
    return average


def assert_average(
    ema: EMA, loop: Loop, decays: list[float], names: Iterator[str] | None = None, rtol: float = 1e-12
) -> None:
    """Compare what the EMA holds with the recursion."""
    for name in ema.average if names is None else names:
        expected = recursion(loop.lives, name, decays)
        np.testing.assert_allclose(ema.average[name].double().numpy(), expected, rtol=rtol, atol=rtol, err_msg=name)


def bits(model: nn.Module) -> list[bytes]:
    """Return every parameter and buffer as bytes: NaN payloads and the sign of zero count."""
    return [
        each.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for each in model.state_dict().values()
        if each.ndim
    ]


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_average_equals_a_float64_recursion(name: str) -> None:
    """After 12 steps, for every kind of model, tied and shared weights averaged once."""
    ema = EMA(decay=0.9)
    loop = Loop(MODELS[name]().double(), ema)
    loop.batches(12)
    assert list(loop.state.ledger.parameters) == [
        each for each in ema.average if "running" not in each and "num" not in each
    ]
    assert_average(ema, loop, [0.9] * 12)


def test_single_precision_stays_within_its_rounding() -> None:
    """float32 averages of 100 steps against float64."""
    ema = EMA(decay=0.95)
    loop = Loop(mlp(), ema, duration="100ba")
    loop.batches(100)
    assert_average(ema, loop, [0.95] * 100, rtol=1e-6)


@pytest.mark.parametrize("half_life", ["5ba", "40sp", "2ep", "0.25dur"])
def test_a_half_life_is_a_decay_by_the_clock_in_every_unit(half_life: str) -> None:
    """0.5 ** (elapsed / half_life): one batch is 1 batch, 8 samples, a quarter epoch, a fortieth of the fit."""
    ema = EMA(half_life=half_life)
    loop = Loop(mlp().double(), ema)
    loop.batches(10)
    decay = {"5ba": 0.5 ** (1 / 5), "40sp": 0.5 ** (8 / 40), "2ep": 0.5 ** (1 / 8), "0.25dur": 0.5 ** (1 / 10)}[
        half_life
    ]
    assert_average(ema, loop, [decay] * 10)


def test_a_short_batch_counts_for_its_samples() -> None:
    """A half-life in samples: the last batch of an epoch, half as large, moves the average less."""
    ema = EMA(half_life="16sp")
    loop = Loop(mlp().double(), ema)
    for samples in (8, 4, 8):
        loop.batch(samples=samples)
    assert_average(ema, loop, [0.5**0.5, 0.5**0.25, 0.5**0.5])


@pytest.mark.parametrize(
    ("every", "due"), [("3ba", [3, 6, 9]), ("1ep", [4, 8]), ("20sp", [3, 5, 8, 10]), ("0.1dur", [4, 8])]
)
def test_updates_come_when_their_time_has_passed(every: str, due: list[int]) -> None:
    """Between them nothing moves; a decay is per update, a half-life per time elapsed since the last one."""
    fixed, timed = EMA(decay=0.8, update_every=every), EMA(half_life="4ba", update_every=every)
    loop = Loop(mlp().double(), fixed, timed)
    loop.batches(10)
    lengths = dict(zip(due, np.diff([0, *due]), strict=True))
    assert_average(fixed, loop, [0.8 if each in due else 1.0 for each in range(1, 11)])
    assert_average(timed, loop, [0.5 ** (lengths[each] / 4) if each in due else 1.0 for each in range(1, 11)])
    assert fixed.updates == timed.updates == len(due)


def test_after_a_half_life_the_old_weights_count_half() -> None:
    """Weights that jump from 1 to 0 leave an average of exactly a half after it, a quarter after two."""
    model = nn.Linear(2, 2).double()
    nn.init.ones_(model.weight)
    loop = Loop(model, ema := EMA(half_life="8ba"))
    loop.engine.emit(Event.BATCH_START)
    nn.init.zeros_(model.weight)
    for expected in (0.5, 0.25):
        for _ in range(8):
            loop.state.tick(8)
            loop.engine.emit(Event.BATCH_END)
        np.testing.assert_allclose(ema.average["weight"].numpy(), expected, rtol=1e-14)


def test_warmup_limits_the_decay_of_the_first_updates() -> None:
    """As in tf.train.ExponentialMovingAverage: update t, from 0, has at most (1 + t) / (10 + t)."""
    ema = EMA(decay=0.5, warmup=True)
    loop = Loop(mlp().double(), ema)
    loop.batches(12)
    decays = [min(0.5, (1 + t) / (10 + t)) for t in range(12)]
    assert decays[0] == 0.1
    assert decays[-1] == 0.5
    assert_average(ema, loop, decays)


@pytest.mark.parametrize("arguments", [{"half_life": "6ba"}, {"decay": 0.5 ** (1 / 6)}], ids=str)
def test_a_warmup_time_lets_the_half_life_grow_linearly_to_its_value(arguments: dict[str, Any]) -> None:
    """At a share r of the time the half-life is r times its value."""
    ema = EMA(**arguments, warmup="8ba")
    loop = Loop(mlp().double(), ema)
    loop.batches(12)
    assert_average(ema, loop, [0.5 ** (1 / (6 * min(1, batch / 8))) for batch in range(1, 13)])


def test_a_skipped_step_moves_no_average_and_an_update_that_was_due_waits() -> None:
    """The step at batch 4 was skipped: the update that was due there comes at 5, the next one at 6 as ever."""
    each, second = EMA(decay=0.7), EMA(decay=0.7, update_every="2ba")
    loop = Loop(mlp().double(), each, second)
    for batch in range(1, 7):
        loop.batch(skip=batch == 4)
    assert_average(each, loop, [0.7, 0.7, 0.7, 1.0, 0.7, 0.7])
    assert_average(second, loop, [1.0, 0.7, 1.0, 1.0, 0.7, 0.7])


@given(
    value=st.floats(width=32, allow_nan=False, allow_infinity=False),
    decay=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_average_of_a_constant_is_the_constant_to_the_bit(value: float, decay: float, dtype: torch.dtype) -> None:
    """So what does not train needs no average, and what froze does not drift."""
    shadow, live = torch.full((3,), value, dtype=dtype), torch.full((3,), value, dtype=dtype)
    ema_update([shadow], [live], decay)
    assert torch.equal(shadow, live)


@given(decay=st.floats(0, 1), seed=st.integers(0, 99))
def test_an_update_lies_between_average_and_weight(decay: float, seed: int) -> None:
    """decay * shadow + (1 - decay) * live, element by element, for every dtype at once."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = [torch.float64, torch.float32, torch.float64, torch.complex128]
    shadow = [torch.randn(3, generator=generator).to(each) for each in dtypes]
    live = [torch.randn(3, generator=generator).to(each) for each in dtypes]
    before = [each.clone() for each in shadow]
    ema_update(shadow, live, decay)
    for old, new, now in zip(before, live, shadow, strict=True):
        expected = decay * old.to(torch.complex128) + (1 - decay) * new.to(torch.complex128)
        tolerance = 1e-6 if old.dtype == torch.float32 else 1e-12
        torch.testing.assert_close(now.to(torch.complex128), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_averaged_in_float32(dtype: torch.dtype) -> None:
    """In bfloat16 an average with a decay of 0.999 would not move at all."""
    ema = EMA(decay=0.999)
    loop = Loop(mlp().to(dtype), ema)
    loop.batches(20)
    assert {each.dtype for each in ema.average.values()} == {torch.float32}
    assert_average(ema, loop, [0.999] * 20, rtol=1e-6)
    assert any(not torch.equal(each, each.to(dtype).float()) for each in ema.average.values())


def test_ema_decay_halves_for_each_half_life() -> None:
    """Decays of consecutive spans multiply to that of the whole span."""
    assert ema_decay(3.0, half_life=3.0) == 0.5
    assert ema_decay(0.4, 3.0) * ema_decay(0.6, 3.0) == pytest.approx(ema_decay(1.0, 3.0), rel=1e-15)


def test_epochs_of_unknown_length_stand_still_until_they_end() -> None:
    """With a half-life of 1 epoch the average moves once, by half, at the first batch after the first epoch."""
    ema = EMA(half_life="1ep")
    loop = Loop(mlp().double(), ema, length=0)
    loop.batches(3)
    assert_average(ema, loop, [1.0] * 3)
    loop.state.clock = Clock(epoch=1, batch=3, sample=24)
    loop.batch()
    assert_average(ema, loop, [1.0, 1.0, 1.0, 0.5])


# -- who is averaged ---------------------------------------------------------------------------------------------------


def test_what_never_trains_takes_no_memory() -> None:
    """Only the head trains: only the head has an average."""
    loop = Loop(mlp(), ema := EMA(decay=0.9))
    loop.state.ledger.freeze("blocks[:]", owner="test")
    loop.batches(2)
    assert list(ema.average) == ["4.weight", "4.bias"]


@pytest.mark.parametrize("event", [Event.EPOCH_START, Event.BATCH_START, Event.BATCH_END, Event.EPOCH_END])
@pytest.mark.parametrize("kind", [Do, Watcher])
def test_what_thaws_later_is_averaged_as_if_from_the_start(event: Event, kind: type[Do]) -> None:
    """It joins with its value from before its first step, whichever event and stage thaws it."""
    ema = EMA(decay=0.8)
    thaw = kind(event, lambda state: state.ledger.thaw("blocks[0]", owner="test"), batch=4)
    loop = Loop(mlp().double(), ema, thaw)
    loop.state.ledger.freeze("blocks[0]", owner="test")
    for _ in range(8):
        if not loop.state.clock.batch_in_epoch:
            loop.engine.emit(Event.EPOCH_START)
        loop.batch()
    assert not np.array_equal(loop.lives[0]["0.weight"], loop.lives[-1]["0.weight"])
    assert set(ema.average) == set(loop.state.ledger.parameters)
    assert_average(ema, loop, [0.8] * 8)


def test_what_freezes_again_goes_on_toward_its_frozen_value() -> None:
    """Leaving it out would keep an average of weights from long ago."""
    ema = EMA(decay=0.8)
    loop = Loop(mlp().double(), ema)
    loop.batches(3)
    loop.state.ledger.freeze("blocks[0]", owner="test")
    loop.batches(5)
    assert np.array_equal(loop.lives[3]["0.weight"], loop.lives[-1]["0.weight"])
    assert "0.weight" in ema.average
    assert_average(ema, loop, [0.8] * 8)


def test_what_is_attached_later_joins_and_what_is_detached_leaves() -> None:
    """By name: the averages of the others are not touched."""
    ema = EMA(decay=0.8)
    attach = Do(Event.BATCH_START, lambda state: state.ledger.attach("0", "gain", owner="test"), batch=2)
    loop = Loop(mlp().double(), ema, attach)
    loop.batches(2)
    loop.batch()
    start = loop.live()["0.gain"]
    del loop.lives[:-1]
    average = {name: each.clone() for name, each in ema.average.items()}
    loop.batches(3)
    assert not np.array_equal(loop.live()["0.gain"], start)
    for name, each in average.items():
        expected = each.double().numpy()
        for live in loop.lives[1:]:
            expected = 0.8 * expected + 0.2 * live[name]
        np.testing.assert_allclose(ema.average[name].double().numpy(), expected, rtol=1e-6, atol=1e-7)
    loop.state.ledger.detach("0", "gain", owner="test")
    loop.batch()
    assert set(ema.average) == set(loop.state.ledger.parameters)


def test_an_attached_parameter_starts_at_its_first_value() -> None:
    """Its first average is that of its initial value and of its value after the first step."""
    ema = EMA(decay=0.8)
    values: list[Tensor] = []
    keep = Watcher(Event.BEFORE_STEP, lambda state: values.append(state.ledger.parameters["0.gain"].detach().clone()))
    attach = Do(Event.BATCH_START, lambda state: state.ledger.attach("0", "gain", owner="test"), batch=0)
    loop = Loop(mlp(), attach, keep, ema)
    loop.batch()
    live = loop.state.ledger.parameters["0.gain"].detach()
    assert not torch.equal(live, values[0])
    torch.testing.assert_close(ema.average["0.gain"], 0.8 * values[0] + 0.2 * live)


def test_running_statistics_are_averaged_and_their_counter_is_copied() -> None:
    """Mean and variance of BatchNorm belong to the weights that they were measured with; a count has no mean."""
    ema = EMA(decay=0.75)
    loop = Loop(cnn().double(), ema)
    for step in range(5):
        loop.batch(data=torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(step)).double())
    floats = [name for name in ema.average if not name.endswith("num_batches_tracked")]
    assert {"1.running_mean", "4.running_var"} <= set(floats)
    assert_average(ema, loop, [0.75] * 5, iter(floats))
    assert ema.average["1.num_batches_tracked"].dtype == torch.int64
    assert int(ema.average["1.num_batches_tracked"]) == 5


def test_statistics_of_a_frozen_norm_have_no_average() -> None:
    """They do not move; once it thaws they are averaged from their value before its first batch on."""
    ema = EMA(decay=0.75)
    loop = Loop(cnn().double(), ema)
    loop.state.ledger.freeze(["1.weight", "1.bias"], owner="test")
    data = torch.randn(4, 1, 8, 8).double()
    for _ in range(2):
        loop.batch(data=data)
    assert "1.running_mean" not in ema.average
    loop.state.ledger.thaw("1.*", owner="test")
    for _ in range(3):
        loop.batch(data=data)
    assert_average(ema, loop, [0.75] * 5, iter(["1.running_mean", "1.running_var", "1.weight"]))
    loop.state.ledger.freeze(["1.weight", "1.bias"], owner="test")
    loop.batch(data=data)
    assert_average(ema, loop, [0.75] * 6, iter(["1.running_mean", "1.running_var", "1.weight"]))


# -- the swap ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_evaluation_sees_the_average_and_training_its_own_bits_again(dtype: torch.dtype) -> None:
    """Also NaN and -0.0 come back as they were; parameters keep identity and storage, others see live weights at EVAL_END."""
    seen: dict[str, list[bytes]] = {}
    ema = EMA(decay=0.9)
    model = cnn().to(dtype)

    def look(state: State) -> None:
        seen[str(state.ledger.phase)] = bits(state.model)

    watch = [Watcher(event, look) for event in (Event.EVAL_START, Event.EVAL_BATCH_END, Event.EVAL_END)]
    loop = Loop(model, ema, *watch)
    loop.batches(3)
    with torch.no_grad():
        model.get_parameter("0.weight")[0] = float("nan")
        model.get_parameter("0.bias")[0] = -0.0
    live, average = bits(model), copy.deepcopy(model)
    ema.apply(average)
    places = [(id(each), each.data_ptr()) for each in [*model.parameters(), *model.buffers()]]
    for event in (Event.EVAL_START, Event.EVAL_BATCH_START, Event.EVAL_BATCH_END, Event.EVAL_END):
        loop.engine.emit(event)
    assert seen["eval_start"] == seen["eval_batch_end"] == bits(average) != live
    assert seen["eval_end"] == bits(model) == live
    assert [(id(each), each.data_ptr()) for each in [*model.parameters(), *model.buffers()]] == places


@pytest.mark.parametrize("end", ["FIT_ABORT", "close", "BATCH_START", "EVAL_START twice"])
def test_an_evaluation_that_is_broken_off_leaves_the_live_weights(end: str) -> None:
    """By FIT_ABORT, by close(), at the next batch of a loop that emits neither, or by an evaluation that starts again."""
    loop = Loop(mlp(), ema := EMA(decay=0.9))
    loop.batches(3)
    live = bits(loop.state.model)
    loop.engine.emit(Event.EVAL_START)
    assert bits(loop.state.model) != live
    if end == "close":
        loop.engine.close()
    elif end == "EVAL_START twice":
        loop.engine.emit(Event.EVAL_START)
        loop.engine.emit(Event.EVAL_END)
    else:
        loop.engine.emit(Event[end])
    assert bits(loop.state.model) == live
    assert ema.average


def test_a_fit_whose_evaluation_fails_gives_the_live_weights_back() -> None:
    """The metric raises; the weights are those of the same fit without evaluation."""

    def broken(outputs: Tensor, targets: Tensor) -> float:
        raise RuntimeError("on purpose")

    torch.manual_seed(0)
    model = mlp()
    plain = copy.deepcopy(model)
    fit = partial(Trainer, loss_fn=cross_entropy, progress=False, algorithms=[EMA(decay=0.5)])
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(metrics={"broken": broken}).fit(model, loader(), loader(), duration="1ep")
    fit(algorithms=[]).fit(plain, loader(), duration="1ep")
    assert same_weights(weights(model), weights(plain))


def test_an_ema_does_not_change_training() -> None:
    """With an evaluation each batch, the weights are bit-equal to those without EMA; only the metrics differ."""
    torch.manual_seed(0)
    model = mlp()
    plain = copy.deepcopy(model)
    fit = partial(
        Trainer, optimizer=partial(torch.optim.AdamW, lr=0.05), loss_fn=cross_entropy, eval_every="1ba", progress=False
    )
    averaged = fit(algorithms=[EMA(half_life="4ba")]).fit(model, loader(), loader(), duration="3ep")
    bare = fit().fit(plain, loader(), loader(), duration="3ep")
    assert same_weights(weights(model), weights(plain))
    assert averaged.metrics["eval/loss"] != bare.metrics["eval/loss"]


def test_the_evaluation_of_a_fit_is_that_of_the_baked_model() -> None:
    """The last evaluation's numbers are those of the model after ema.apply(model)."""
    model, ema = cnn(), EMA(half_life="3ba")
    generator = torch.Generator().manual_seed(1)
    data = [
        (torch.randn(8, 1, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator)) for _ in range(4)
    ]
    trainer = Trainer(
        algorithms=[ema], optimizer=partial(torch.optim.SGD, lr=0.3), loss_fn=cross_entropy, progress=False
    )
    result = trainer.fit(model, data, data, duration="2ep")
    live = trainer.evaluate(model, data)
    ema.apply(model)
    assert trainer.evaluate(model, data)["eval/loss"] == result.metrics["eval/loss"] != live["eval/loss"]


def test_of_two_the_first_is_evaluated_and_the_second_says_that_it_only_tracks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Both average; it is said once."""
    first, second = EMA(decay=0.5), EMA(decay=0.9)
    seen: list[Tensor] = []
    loop = Loop(
        mlp(),
        first,
        second,
        Watcher(Event.EVAL_START, lambda state: seen.append(state.model.get_parameter("0.weight").clone())),
    )
    loop.batches(4)
    live = bits(loop.state.model)
    with caplog.at_level(logging.INFO, logger="thawline"):
        for _ in range(2):
            loop.engine.emit(Event.EVAL_START)
            loop.engine.emit(Event.EVAL_END)
            assert bits(loop.state.model) == live
    assert torch.equal(seen[0], first.average["0.weight"])
    assert_average(first, loop, [0.5] * 4, rtol=1e-6)
    assert_average(second, loop, [0.9] * 4, rtol=1e-6)
    assert [str(each.msg) for each in caplog.records] == [
        "tracks only: the first EMA in the list is evaluated owner='EMA#2'"
    ]


def test_two_fits_side_by_side_each_evaluate_their_own_model() -> None:
    """An evaluation of one model does not keep another model's EMA out."""
    loops = [Loop(mlp(), EMA(decay=0.5)) for _ in range(2)]
    live: list[list[bytes]] = []
    for loop in loops:
        loop.batches(2)
        live.append(bits(loop.state.model))
    for loop in loops:
        loop.engine.emit(Event.EVAL_START)
    assert all(bits(loop.state.model) != old for loop, old in zip(loops, live, strict=True))
    for loop in loops:
        loop.engine.emit(Event.EVAL_END)
    assert [bits(loop.state.model) for loop in loops] == live


# -- baking in ---------------------------------------------------------------------------------------------------------


def test_apply_bakes_the_averages_into_the_model_or_a_copy_by_name() -> None:
    """What has no average keeps its live value."""
    loop = Loop(mlp(), ema := EMA(decay=0.9))
    loop.state.ledger.freeze("blocks[0]", owner="test")
    loop.batches(3)
    model = loop.state.model
    twin = mlp()
    twin.load_state_dict(model.state_dict())
    live = weights(model)
    ema.apply(twin)
    assert same_weights(weights(model), live)
    ema.apply(model)
    assert same_weights(weights(model), weights(twin))
    assert torch.equal(weights(model)["0.weight"], live["0.weight"])
    assert torch.equal(weights(model)["4.weight"], ema.average["4.weight"])


def test_apply_refuses_another_model_and_writes_nothing() -> None:
    """Other names, other shapes, or nothing averaged yet: a typed error each."""
    loop = Loop(mlp(), ema := EMA(decay=0.9))
    with pytest.raises(ThawlineError, match="nothing was averaged yet"):
        ema.apply(loop.state.model)
    loop.batch()
    for other, says in ((nn.Linear(4, 2), "without '0.weight'"), (mlp(width=5), r"shape \(5, 5\) instead of \(4, 4\)")):
        before = weights(other)
        with pytest.raises(ArgumentError, match=says):
            ema.apply(other)
        assert same_weights(weights(other), before)
    wrapped = nn.ModuleDict({"module": mlp()})
    with pytest.raises(ArgumentError, match=r"nearest: 'module\."):
        ema.apply(wrapped)
    with pytest.raises(ArgumentError, match=r"Write: ema\.apply\(model\)"):
        ema.apply("model")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]


# -- resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{"decay": 0.9, "warmup": True}, {"half_life": "7ba", "update_every": "3ba"}, {"half_life": "0.3dur", "warmup": "5ba"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("cut", [1, 4, 5, 9])
def test_a_resumed_run_has_the_same_averages_to_the_bit(tmp_path: Path, arguments: dict[str, Any], cut: int) -> None:
    """Continued from a checkpoint at any batch, with a block that thaws before or after it."""

    def fit(**more: Any) -> tuple[EMA, nn.Module, Any]:
        torch.manual_seed(4)
        model, ema = mlp(), EMA(**arguments)
        for each in model[0].parameters():
            each.requires_grad_(False)
        thaw = Do(Event.BATCH_START, thaw_first, batch=6)
        trainer = Trainer(
            algorithms=[thaw, ema], loss_fn=cross_entropy, run_dir=more.pop("run_dir"), progress=False,
            optimizer=partial(torch.optim.AdamW, lr=0.05), checkpoint=Checkpointing(every="1ba", keep=20),
        )  # fmt: skip
        return ema, model, trainer.fit(model, loader(), loader(), duration="3ep", **more)

    whole, model, result = fit(run_dir=tmp_path / "whole")
    again, other, continued = fit(run_dir=tmp_path / "again", resume=tmp_path / "whole" / f"ba{cut:08d}")
    assert "0.weight" in whole.average
    assert same_weights(whole.average, again.average)
    assert same_weights(weights(model), weights(other))
    assert continued.history == result.history


def thaw_first(state: State) -> None:
    """Thaw what the user froze."""
    state.ledger.thaw("blocks[0]", owner="user")


def test_a_loaded_average_is_a_copy() -> None:
    """Training on moves neither what was saved nor the EMA that it came from."""
    first, second = Loop(mlp(), EMA(decay=0.9)), Loop(mlp(), ema := EMA(decay=0.9))
    first.batches(2)
    saved = first.engine.algorithms[0].state_dict()
    before = {name: each.clone() for name, each in saved["shadow"].items()}
    ema.load_state_dict(saved)
    second.batches(2)
    assert same_weights(saved["shadow"], before)
    assert not torch.equal(ema.average["0.weight"], before["0.weight"])


def test_a_longer_duration_on_resume_goes_on_from_there() -> None:
    """Progress jumps back; the next update starts a new measure of it and no average stands still for long."""
    ema = EMA(half_life="0.25dur", update_every="0.1dur")
    loop = Loop(mlp().double(), ema, duration="10ba")
    loop.batches(5)
    loop.state.duration = Time("20ba")
    loop.batch()
    before = ema.updates
    loop.batches(6)
    assert ema.updates - before >= 2


def test_a_second_fit_starts_afresh() -> None:
    """The averages of the first fit are forgotten: the second equals that of a new EMA."""
    averages: list[dict[str, Tensor]] = []
    old = EMA(decay=0.9)
    Trainer(algorithms=[old], loss_fn=cross_entropy, progress=False).fit(mlp(depth=4), loader(), duration="1ep")
    for ema in (old, EMA(decay=0.9)):
        torch.manual_seed(1)
        Trainer(algorithms=[ema], loss_fn=cross_entropy, progress=False).fit(mlp(), loader(), duration="1ep")
        averages.append(ema.average)
    assert same_weights(*averages)


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"half_life": "1ep", "decay": 0.9}, "only one of the two, got {'half_life': '1ep', 'decay': 0.9}"),
        ({"half_life": "0ba"}, "EMA(half_life=) takes a time above zero"),
        ({"half_life": "long"}, "got 'long'"),
        ({"half_life": 0.5}, "got 0.5. Write: EMA(decay=0.5)"),
        ({"half_life": True}, "got True"),
        ({"decay": 0}, "above 0 and below 1"),
        ({"decay": 1.0}, "above 0 and below 1"),
        ({"decay": float("nan")}, "EMA(decay=)"),
        ({"decay": "0.9"}, "got '0.9'"),
        ({"update_every": "0ba"}, "EMA(update_every=)"),
        ({"update_every": None}, "got None"),
        ({"warmup": "0ba"}, "EMA(warmup=) takes True, False or a time above zero"),
        ({"warmup": 0.5}, "got 0.5"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused(arguments: dict[str, Any], says: str) -> None:
    """A ValueError that says what was got, what is taken, and a corrected call."""
    with pytest.raises(ArgumentError, match="Write: EMA") as refused:
        EMA(**arguments)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("shadow", "live", "decay"),
    [([torch.zeros(2)], [], 0.9), ([torch.zeros(2)], [torch.zeros(3)], 0.9), ([], [], 1.1), ([], [], float("nan"))],
)
def test_ema_update_refuses_what_does_not_match(shadow: list[Tensor], live: list[Tensor], decay: float) -> None:
    """Other lengths, other shapes, a decay outside 0 to 1."""
    with pytest.raises(ArgumentError, match="Write: ema_update"):
        ema_update(shadow, live, decay)


@pytest.mark.parametrize(
    "ema", [EMA(), EMA("200ba", warmup=True), EMA(decay=0.99, update_every=2, warmup="1ep")], ids=str
)
def test_it_is_described_and_rebuilt(ema: EMA) -> None:
    """The description is JSON and makes an equal algorithm; the default half-life is a tenth of the fit."""
    again = Algorithm.from_description(ema.describe())
    assert isinstance(again, EMA)
    assert again.describe() == ema.describe()
    assert again.half_life == ema.half_life
    assert EMA().half_life == Time("0.1dur")


@pytest.mark.parametrize("warmup", [False, True])
def test_with_bias_correction_the_first_weights_do_not_count(warmup: bool) -> None:
    """The average is the weighted mean of the weights after each update, in closed form."""
    model = nn.Linear(1, 1, bias=False)
    state = State(model, ParameterLedger(model, partial(torch.optim.SGD, lr=0.1)))
    ema = EMA(decay=0.75, bias_correction=True, warmup=warmup)
    values, decays = [3.0, -1.0, 4.0, 1.5], list[float]()
    ema.apply(Event.BATCH_START, state)
    for step, value in enumerate(values):
        with torch.no_grad():
            model.weight.fill_(value)
        decays.append(ema.decay_at())
        state.clock = Clock(batch=step + 1)
        ema.apply(Event.BATCH_END, state)
        if step == 1:  # resumed here
            saved, ema = ema.state_dict(), EMA(decay=0.75, bias_correction=True, warmup=warmup)
            ema.load_state_dict(saved)
            ema.apply(Event.BATCH_START, state)
    counts = [(1 - decay) * float(np.prod(decays[place + 1 :])) for place, decay in enumerate(decays)]
    want = sum(count * value for count, value in zip(counts, values, strict=True)) / sum(counts)
    assert ema.average["weight"].item() == pytest.approx(want, rel=1e-6)
