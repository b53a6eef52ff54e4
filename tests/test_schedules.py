"""Schedules against closed forms and against torch's own schedulers, at every step."""

import json
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, SequentialLR

from thawline.engine import ArgumentError, Time
from thawline.engine.schedules import (
    Schedule,
    as_schedule,
    constant,
    cosine,
    join,
    linear,
    schedule_from_description,
    warmup,
)

STEPS = 40

factors = st.floats(0, 10, allow_nan=False)
plain = st.one_of(
    st.builds(constant, factors), st.builds(linear, factors, factors), st.builds(cosine, factors, factors)
)
shares = st.floats(0.01, 0.99)
lengths = st.one_of(shares, st.sampled_from(["0.3dur", "7ba", "2ep", "500sp"]))
schedules = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.builds(warmup, lengths, inner, factors),
        st.builds(lambda a, b, at: join([a, b], [at]), inner, inner, lengths),
    ),
    max_leaves=4,
)


def rates(make: Callable[[torch.optim.Optimizer], LRScheduler]) -> list[float]:
    """Return the learning rates of a torch scheduler at steps 0 to STEPS."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    found: list[float] = []
    for _ in range(STEPS + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def square(progress: float) -> float:
    """Decay as a user would write it."""
    return (1 - progress) ** 2


def scaled(progress: float, *, factor: float) -> float:
    """Decay with a setting."""
    return factor * (1 - progress)


def batches(total: int) -> Callable[[Time], float]:
    """Return what a Trainer binds with for a fit of ``total`` batches, ten an epoch, of four samples."""
    sizes = {"ba": 1, "ep": 10, "sp": 0.25}
    return lambda time: time.value * sizes[time.unit] / total


@pytest.mark.parametrize(
    "schedule, make",
    [
        (linear(), lambda it: LinearLR(it, 1.0, 1e-300, STEPS)),
        (linear(end=1.0, start=0.25), lambda it: LinearLR(it, 0.25, 1.0, STEPS)),
        (cosine(), lambda it: CosineAnnealingLR(it, STEPS)),
        (cosine(end=0.1), lambda it: CosineAnnealingLR(it, STEPS, eta_min=0.1)),
        (constant(0.5), lambda it: LambdaLR(it, lambda _: 0.5)),
        (as_schedule(square), lambda it: LambdaLR(it, lambda k: square(k / STEPS))),
        (
            warmup(0.25, then=linear(), start=0.5),
            lambda it: SequentialLR(it, [LinearLR(it, 0.5, 1.0, 10), LinearLR(it, 1.0, 1e-300, STEPS - 10)], [10]),
        ),
        (
            warmup("10ba", then=cosine(end=0.1), start=0.1).bind(batches(STEPS)),
            lambda it: SequentialLR(it, [LinearLR(it, 0.1, 1.0, 10), CosineAnnealingLR(it, STEPS - 10, 0.1)], [10]),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
def test_every_step_equals_torch(schedule: Schedule, make: Callable[[torch.optim.Optimizer], LRScheduler]) -> None:
    """LR(k) = f(k / N) at each of the steps 0 to N, with no off-by-one."""
    ours = [schedule(k / STEPS) for k in range(STEPS + 1)]
    assert ours == pytest.approx(rates(make), abs=1e-12)


def test_every_step_equals_the_closed_form() -> None:
    """Each factory is the formula of its docstring."""
    for k in range(STEPS + 1):
        p = k / STEPS
        assert constant(0.3)(p) == 0.3
        assert linear(end=0.2, start=0.8)(p) == pytest.approx(0.8 - 0.6 * p, abs=1e-15)
        assert cosine(end=0.2, start=0.8)(p) == pytest.approx(0.5 + 0.3 * math.cos(math.pi * p), abs=1e-15)
        rise = 0.1 + 0.9 * p / 0.2
        assert warmup(0.2, start=0.1)(p) == pytest.approx(min(rise, 1.0), abs=1e-15)


def test_warmup_rises_to_where_the_next_one_begins() -> None:
    """The rise ends at ``then(0)``, and what follows spans all that is left."""
    schedule = warmup(0.2, then=linear(end=0.0, start=0.5))
    assert schedule(0.1) == pytest.approx(0.25)
    assert schedule(0.2) == pytest.approx(0.5)
    assert schedule(1.0) == 0.0


@pytest.mark.parametrize("length", ["10ba", "1ep", "40sp", 1, Time("10ba")])
def test_a_length_in_any_unit_is_the_same_share(length: str | Time) -> None:
    """Ten of a hundred batches are a tenth, whatever they are counted in."""
    bound = warmup(length, then=linear()).bind(batches(100))
    assert [bound(k / 100) for k in range(101)] == [warmup(0.1, then=linear())(k / 100) for k in range(101)]


def test_a_share_of_the_duration_needs_no_binding() -> None:
    """``"0.1dur"`` and 0.1 are one and the same, and can be called at once."""
    assert warmup("0.1dur") == warmup(0.1)
    assert warmup("0.1dur").bound
    assert warmup("0.1dur")(0.05) == pytest.approx(0.5)


def test_a_warmup_longer_than_the_fit_rises_all_along() -> None:
    """It reaches at the end what it would have reached by then."""
    bound = warmup("50ba", then=cosine()).bind(batches(20))
    assert [bound(k / 20) for k in (0, 10, 20)] == pytest.approx([0.0, 0.2, 0.4])


def test_a_nested_length_counts_batches_of_the_fit() -> None:
    """Ten batches inside the second half of a fit are still ten batches."""
    bound = join([constant(), warmup("10ba")], ["50ba"]).bind(batches(100))
    assert [bound(k / 100) for k in (49, 50, 55, 60, 99)] == pytest.approx([1.0, 0.0, 0.5, 1.0, 1.0])


def test_join_past_the_end_of_the_fit_keeps_its_pace() -> None:
    """A boundary that is never reached neither squeezes the stretch before it nor fails."""
    bound = join([linear(), constant()], ["40ba"]).bind(batches(20))
    assert [bound(k / 20) for k in (0, 10, 20)] == pytest.approx([1.0, 0.75, 0.5])


def test_an_unbound_schedule_says_what_to_write() -> None:
    """Calling it names the time that needs the duration, nested ones included."""
    with pytest.raises(ArgumentError, match=r"'7ba' needs.*\.bind\(share\)"):
        join([constant(), warmup("7ba")], [0.5])(0.0)


@given(schedules, st.floats(0, 1))
def test_a_description_rebuilds_the_schedule(schedule: Schedule, progress: float) -> None:
    """Through JSON text and back it is equal, and gives the same numbers."""
    again = schedule_from_description(json.loads(json.dumps(schedule.describe())))
    share = batches(1000)
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert again.bind(share)(progress) == schedule.bind(share)(progress)


@given(schedules)
def test_binding_keeps_a_schedule_equal(schedule: Schedule) -> None:
    """A bound schedule is still the schedule that was asked for; binding it again changes nothing."""
    bound = schedule.bind(batches(1000))
    assert bound == schedule
    assert bound.bound
    assert bound.bind(batches(1)) is bound


@given(schedules, st.floats(0, 1))
def test_a_schedule_stays_between_its_factors(schedule: Schedule, progress: float) -> None:
    """Whatever is combined, a factor is finite and not negative."""
    assert -1e-9 <= schedule.bind(batches(1000))(progress) <= 10 + 1e-9


def test_a_function_is_described_by_its_qualified_name() -> None:
    """A function of the user's is compared by name, and cannot be rebuilt from it."""
    schedule = as_schedule(square)
    assert schedule == as_schedule(square) != as_schedule(math.sqrt)
    assert schedule.describe() == {"name": f"{__name__}.square", "arguments": {}}
    with pytest.raises(ArgumentError, match="described by name only"):
        schedule_from_description(schedule.describe())


def test_a_partial_is_described_with_its_numbers() -> None:
    """Two settings of one function are two schedules."""
    half, whole = (as_schedule(partial(scaled, factor=each)) for each in (0.5, 1.0))
    assert half != whole
    assert half(0.5) == 0.25


@pytest.mark.parametrize(
    "given_",
    [
        "cosine",
        0.5,
        None,
        cosine,
        lambda _: math.nan,
        lambda p: 1 / p,
        lambda _: None,
        lambda: 1.0,
        lambda _: True,
        float,
    ],
)
def test_what_is_no_schedule_is_refused(given_: object) -> None:
    """It has to be callable and to give a finite number at both ends."""
    with pytest.raises(ArgumentError, match=r"Trainer\(schedule=\) takes a schedule.*Write: Trainer\(schedule=cosine"):
        as_schedule(given_)


@pytest.mark.parametrize(
    "call, argument",
    [
        (lambda: constant(-1.0), "constant(factor=)"),
        (lambda: constant("1"), "constant(factor=)"),  # type: ignore[arg-type]
        (lambda: linear(end=math.inf), "linear(end=)"),
        (lambda: linear(start=math.nan), "linear(start=)"),
        (lambda: cosine(end=True), "cosine(end=)"),
        (lambda: cosine(start=-0.1), "cosine(start=)"),
        (lambda: warmup(0.0), "warmup(length=)"),
        (lambda: warmup(1.0), "warmup(length=)"),
        (lambda: warmup("0ba"), "warmup(length=)"),
        (lambda: warmup("1.5dur"), "warmup(length=)"),
        (lambda: warmup(True), "warmup(length=)"),
        (lambda: warmup(None), "warmup(length=)"),  # type: ignore[arg-type]
        (lambda: warmup(0.1, start=-1), "warmup(start=)"),
        (lambda: warmup(0.1, then="cosine"), "warmup(then=)"),  # type: ignore[arg-type]
        (lambda: warmup("soon"), "Time"),
        (lambda: join([], []), "join(schedules=)"),
        (lambda: join(constant(), []), "join(schedules=)"),  # type: ignore[arg-type]
        (lambda: join([constant(), "x"], [0.5]), "join(schedules=)"),  # type: ignore[list-item]
        (lambda: join([constant(), linear()], []), "join(boundaries=)"),
        (lambda: join([constant(), linear(), cosine()], [0.5, 0.5]), "join(boundaries=)"),
        (lambda: join([constant(), linear(), cosine()], [0.5, "10ba"]).bind(batches(100)), "join(boundaries=)"),
        (lambda: schedule_from_description("cosine"), "schedule_from_description(description=)"),
        (lambda: schedule_from_description({"name": "os.system", "arguments": {}}), "schedule_from_description("),
        (lambda: schedule_from_description({"name": ["x"], "arguments": {}}), "schedule_from_description("),
        (lambda: schedule_from_description({"name": "linear", "arguments": {"x": 1}}), "schedule_from_description("),
        (lambda: schedule_from_description({"name": "warmup", "arguments": {}}), "schedule_from_description("),
        (lambda: schedule_from_description({"name": "linear", "arguments": {"end": "0"}}), "linear(end=)"),
    ],
)
def test_a_wrong_argument_is_named(call: Callable[[], object], argument: str) -> None:
    """The error names the argument, and what to write."""
    with pytest.raises(ArgumentError) as raised:
        call()
    assert str(raised.value).startswith(argument)
    assert "Write: " in str(raised.value)


def test_a_description_may_not_be_endless() -> None:
    """A file that nests schedules a thousand deep is refused before the stack is full."""
    description: dict[str, object] = {"name": "constant", "arguments": {}}
    for _ in range(1000):
        description = {"name": "warmup", "arguments": {"length": 0.5, "then": description}}
    with pytest.raises(ArgumentError, match="at most 32 deep"):
        schedule_from_description(description)
