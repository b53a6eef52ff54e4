"""Schedules against closed forms and against torch's own schedulers, at every step."""

import json
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
)

from helpers import loader, mlp
from thawline.engine import (
    Algorithm,
    ArgumentError,
    Event,
    Schedule,
    State,
    ThawlineWarning,
    Time,
    Trainer,
    constant,
    cosine,
    inverse_sqrt,
    join,
    linear,
    one_cycle,
    polynomial,
    repeat,
    warmup,
    wsd,
)
from thawline.engine.schedules import FACTORIES, as_schedule, schedule_from_description
from thawline.engine.settings import bound_schedule

STEPS = 40

factors = st.floats(0, 10, allow_nan=False)
shares = st.floats(0.01, 0.99)
lengths = st.one_of(shares, st.sampled_from(["0.3dur", "7ba", "2ep", "500sp"]))
parts = st.floats(0.01, 0.5)  # of a warmup and a decay, which have to fit together
plain = st.one_of(
    st.builds(constant, factors), st.builds(linear, factors, factors), st.builds(cosine, factors, factors),
    st.builds(polynomial, st.floats(0.1, 5), factors, factors), st.builds(inverse_sqrt, lengths),
    st.builds(one_cycle, st.floats(0.01, 0.49), factors, factors, st.sampled_from(["cosine", "linear"]), st.booleans()),
    st.builds(wsd, parts, parts, factors, factors, st.sampled_from(["linear", "cosine", "1-sqrt"])),
)  # fmt: skip
schedules = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.builds(warmup, lengths, inner, factors),
        st.builds(lambda a, b, at: join([a, b], [at]), inner, inner, lengths),
        st.builds(repeat, inner, lengths, st.integers(1, 3)),
    ),
    max_leaves=4,
)


def rates(make: Callable[[torch.optim.Optimizer], LRScheduler]) -> list[float]:
    """Return the learning rates of a torch scheduler at steps 0 to STEPS."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    found: list[float] = []
    for step in range(STEPS + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < STEPS:
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
        (polynomial(), lambda it: PolynomialLR(it, STEPS)),
        (polynomial(2.5), lambda it: PolynomialLR(it, STEPS, 2.5)),
        (polynomial(0.5), lambda it: PolynomialLR(it, STEPS, 0.5)),
        # What torch ends before the fit does, and then holds.
        (
            join([polynomial(2), constant(0.0)], ["30ba"]).bind(batches(STEPS)),
            lambda it: PolynomialLR(it, 30, 2),
        ),
        (
            join([constant(1 / 3), constant()], ["7ba"]).bind(batches(STEPS)),
            lambda it: ConstantLR(it, 1 / 3, 7),
        ),
        (
            join([linear(0.9, start=0.3), constant(0.9)], ["13ba"]).bind(batches(STEPS)),
            lambda it: LinearLR(it, 0.3, 0.9, 13),
        ),
        (repeat(cosine(), "10ba").bind(batches(STEPS)), lambda it: CosineAnnealingWarmRestarts(it, 10)),
        (
            repeat(cosine(end=0.1), "7ba").bind(batches(STEPS)),
            lambda it: CosineAnnealingWarmRestarts(it, 7, eta_min=0.1),
        ),
        (
            repeat(cosine(), "3ba", growth=2).bind(batches(STEPS)),
            lambda it: CosineAnnealingWarmRestarts(it, 3, T_mult=2),
        ),
        (
            repeat(cosine(end=0.2), 1 / 40, growth=3),
            lambda it: CosineAnnealingWarmRestarts(it, 1, T_mult=3, eta_min=0.2),
        ),
        # torch's OneCycleLR is at the bottom at step total - 1; a fit of STEPS batches is at progress 1 at step STEPS.
        (
            one_cycle((0.3 * (STEPS + 1) - 1) / STEPS),
            lambda it: OneCycleLR(it, 1.0, total_steps=STEPS + 1, pct_start=0.3),
        ),
        (
            one_cycle((0.4 * (STEPS + 1) - 1) / STEPS, start=0.1, end=0.001, anneal="linear"),
            lambda it: OneCycleLR(
                it,
                1.0,
                total_steps=STEPS + 1,
                pct_start=0.4,
                anneal_strategy="linear",
                div_factor=10,
                final_div_factor=100,
            ),
        ),
        (
            one_cycle((0.3 * (STEPS + 1) - 1) / STEPS, three_phase=True),
            lambda it: OneCycleLR(it, 1.0, total_steps=STEPS + 1, pct_start=0.3, three_phase=True),
        ),
        (
            one_cycle((0.2 * (STEPS + 1) - 1) / STEPS, three_phase=True, anneal="linear"),
            lambda it: OneCycleLR(
                it, 1.0, total_steps=STEPS + 1, pct_start=0.2, three_phase=True, anneal_strategy="linear"
            ),
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


@pytest.mark.parametrize(
    ("total", "share", "three_phase"),
    [
        (total, share, three_phase)
        for total in (3, 7, 40, 41, 1000)
        for share in (0.25, 0.3, 0.4, 0.5)
        for three_phase in (False, True)
        # Elsewhere torch's own phases are empty or reversed.
        if 0 < (share * total - 1) / (total - 1) < (0.5 if three_phase else 1)
    ],
)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_one_cycle_equals_torch_at_each_batch_of_the_fit(total: int, share: float, three_phase: bool) -> None:
    """The recipe of the docstring: torch's total is the fit's batches, and its end points are one step early."""
    peak = (share * total - 1) / (total - 1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = OneCycleLR(optimizer, 1.0, total_steps=total, pct_start=share, three_phase=three_phase)
    schedule = join([one_cycle(peak, three_phase=three_phase), constant(1 / 25e4)], [f"{total - 1}ba"])
    bound = schedule.bind(batches(total))
    for k in range(total):
        assert bound(k / total) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12), k
        if k < total - 1:
            scheduler.step()


HF: list[tuple[Schedule, str, Any]] = [
    (warmup("10ba", then=inverse_sqrt("10ba")), "inverse_sqrt", {"num_warmup_steps": 10}),
    (warmup("10ba", then=inverse_sqrt("25ba")), "inverse_sqrt", {"num_warmup_steps": 10, "timescale": 25}),
    (inverse_sqrt("10000ba"), "inverse_sqrt", {"num_warmup_steps": 0}),
    (wsd("5ba", "12ba", shape="cosine"), "wsd", {"num_warmup_steps": 5, "num_decay_steps": 12}),
    *(
        (
            wsd("5ba", "12ba", end=0.1, start=0.1, shape=shape),
            "wsd",
            {"num_warmup_steps": 5, "num_decay_steps": 12, "decay_type": shape, "min_lr_ratio": 0.1},
        )
        for shape in ("linear", "cosine", "1-sqrt")
    ),
    (warmup("5ba", then=cosine()), "cosine", {"num_warmup_steps": 5}),
    (warmup("5ba", then=linear()), "linear", {"num_warmup_steps": 5}),
    (warmup("5ba", then=repeat(cosine(), 0.2)), "cosine_with_hard_restarts", {"num_warmup_steps": 5, "num_cycles": 5}),
    (warmup("4ba", then=polynomial(2, end=0.1)), "polynomial_decay",
     {"num_warmup_steps": 4, "power": 2.0, "lr_end": 0.1}),
]  # fmt: skip


@pytest.mark.parametrize(("schedule", "name", "arguments"), HF)
def test_every_step_equals_transformers(schedule: Schedule, name: str, arguments: dict[str, Any]) -> None:
    """LR(k) of Hugging Face's schedule of that name, with its step counts as batches."""
    optimization = pytest.importorskip("transformers.optimization")
    full = "with_warmup" if name not in {"inverse_sqrt", "wsd", "cosine_with_hard_restarts"} else ""
    full = {"cosine_with_hard_restarts": "cosine_with_hard_restarts_schedule_with_warmup"}.get(
        name, f"{name}_schedule" + f"_{full}" * bool(full)
    )
    make = getattr(optimization, f"get_{full}")
    if name != "inverse_sqrt":
        arguments = arguments | {"num_training_steps": STEPS}
    bound = schedule.bind(batches(STEPS))
    theirs = rates(lambda optimizer: make(optimizer, **arguments))
    assert [bound(k / STEPS) for k in range(STEPS)] == pytest.approx(theirs[:STEPS], abs=1e-12)


def test_the_transformers_own_formula() -> None:
    """Vaswani et al., equation 3, is warmup and inverse square root, up to its constant factor."""
    bound = warmup("100ba", then=inverse_sqrt("100ba")).bind(batches(1000))
    for k in range(1, 1001):
        assert bound(k / 1000) == pytest.approx(100**0.5 * min(k**-0.5, k * 100**-1.5), rel=1e-9)


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (polynomial(2), lambda it: PolynomialLR(it, 24, 2)),
        (repeat(cosine(), "5ba"), lambda it: CosineAnnealingWarmRestarts(it, 5)),
        (join([one_cycle((0.3 * 24 - 1) / 23), constant(1 / 25e4)], ["23ba"]), lambda it: OneCycleLR(it, 0.5, 24)),
    ],
)
def test_a_fit_has_torchs_rate_at_each_batch(
    schedule: Schedule, make: Callable[[torch.optim.Optimizer], LRScheduler]
) -> None:
    """What the optimizer steps with at batch k is f(k), from k = 0 to the last."""
    used: list[float] = []

    class Watch(Algorithm):
        """Writes down the rate of each step."""

        events = frozenset({Event.BEFORE_STEP})

        def apply(self, event: Event, state: State) -> None:
            """Write it down."""
            used.append(state.optimizers[0].param_groups[0]["lr"])

    trainer = Trainer(
        algorithms=[Watch()], optimizer=partial(torch.optim.SGD, lr=0.5), schedule=schedule,
        loss_fn=torch.nn.functional.cross_entropy, progress=False,
    )  # fmt: skip
    trainer.fit(mlp(), loader(), duration="6ep")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler, expected = make(optimizer), []
    for step in range(24):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < 23:
            scheduler.step()
    assert used == pytest.approx(expected, abs=1e-12)


@given(st.integers(2, 400), st.integers(1, 60), st.integers(1, 60))
def test_a_restart_falls_on_its_batch(total: int, first: int, rise: int) -> None:
    """Restarts every n batches, behind a warmup too, whatever rounding says: step k of the period is k / n."""
    rise = min(rise, total - 1)
    bound = warmup(f"{rise}ba", then=repeat(linear(), f"{first}ba")).bind(batches(total))
    for k in range(rise, total):
        assert bound(k / total) == pytest.approx(1 - ((k - rise) % first) / first, abs=1e-7)


@given(st.integers(3, 400), st.data())
def test_a_jump_falls_on_its_batch(total: int, data: st.DataObject) -> None:
    """A boundary inside another schedule is passed at the batch it names, not one later."""
    rise = data.draw(st.integers(1, total - 2))
    at = data.draw(st.integers(1, total - rise - 1))
    bound = warmup(f"{rise}ba", then=join([constant(1.0), constant(2.0)], [f"{at}ba"])).bind(batches(total))
    assert [bound(k / total) for k in range(rise, total)] == [1.0] * at + [2.0] * (total - rise - at)


def test_new_curves_equal_their_closed_forms() -> None:
    """Polynomial with ends, one cycle and warmup-stable-decay, from their docstrings."""
    bends = one_cycle(0.25, start=0.2, end=0.1, anneal="linear", three_phase=True)
    assert [bends(k / 8) for k in range(9)] == pytest.approx([0.2, 0.6, 1.0, 0.6, 0.2, 0.175, 0.15, 0.125, 0.1])
    assert one_cycle("0.5dur", three_phase=False)(0.5) == 1.0
    for k in range(STEPS + 1):
        p = k / STEPS
        assert polynomial(3, end=0.2, start=0.8)(p) == pytest.approx(0.2 + 0.6 * (1 - p) ** 3, abs=1e-15)
        rise, fall = 0.1 + 0.9 * p / 0.2, 0.3 + 0.7 * (1 - math.sqrt(max(0.0, (p - 0.6) / 0.4)))
        expected = rise if p < 0.2 else fall
        assert wsd(0.2, 0.4, end=0.3, start=0.1, shape="1-sqrt")(p) == pytest.approx(expected, abs=1e-9)


def test_warmup_and_decay_have_to_fit() -> None:
    """Together they are at most the fit; what is in batches is known once it is bound."""
    assert wsd(0.5, 0.5)(0.5) == 1.0
    with pytest.raises(ArgumentError, match=r"wsd\(decay=\) takes together with warmup= at most the whole fit"):
        wsd("10ba", "11ba").bind(batches(20))


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
def test_a_schedule_is_shown_as_the_call_that_makes_it(schedule: Schedule) -> None:
    """Its repr, with all that is nested in it, makes it again."""
    assert eval(repr(schedule), dict(FACTORIES)) == schedule


def test_a_function_is_shown_by_its_qualified_name() -> None:
    """As a schedule, and inside another; a partial with its numbers."""
    half = partial(scaled, factor=0.5)
    shown = f"join(schedules=[{__name__}.square, partial({__name__}.scaled, factor=0.5)], boundaries=['3ba'])"
    assert repr(join([square, half], ["3ba"])) == shown


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
        (lambda: polynomial(0), "polynomial(power=)"),
        (lambda: polynomial(math.inf), "polynomial(power=)"),
        (lambda: polynomial(True), "polynomial(power=)"),
        (lambda: polynomial("2"), "polynomial(power=)"),  # type: ignore[arg-type]
        (lambda: polynomial(10**400), "polynomial(power=)"),
        (lambda: polynomial(end=10**400), "polynomial(end=)"),
        (lambda: constant(10**400), "constant(factor=)"),
        (lambda: warmup(0.1, start=10**400), "warmup(start=)"),
        (lambda: polynomial(end=-1), "polynomial(end=)"),
        (lambda: polynomial(start=math.nan), "polynomial(start=)"),
        (lambda: inverse_sqrt(0.0), "inverse_sqrt(timescale=)"),
        (lambda: inverse_sqrt("0ba"), "inverse_sqrt(timescale=)"),
        (lambda: inverse_sqrt(None), "inverse_sqrt(timescale=)"),  # type: ignore[arg-type]
        (lambda: repeat("cosine", 0.5), "repeat(schedule=)"),  # type: ignore[arg-type]
        (lambda: repeat(cosine(), 0), "repeat(every=)"),
        (lambda: repeat(cosine(), 1.5), "repeat(every=)"),
        (lambda: repeat(cosine(), 0.5, growth=0), "repeat(growth=)"),
        (lambda: repeat(cosine(), 0.5, growth=1.5), "repeat(growth=)"),  # type: ignore[arg-type]
        (lambda: repeat(cosine(), 0.5, growth=True), "repeat(growth=)"),
        (lambda: one_cycle(1.0), "one_cycle(peak=)"),
        (lambda: one_cycle(0.5, three_phase=True), "one_cycle(peak=)"),
        (lambda: one_cycle(start=-1), "one_cycle(start=)"),
        (lambda: one_cycle(end=math.inf), "one_cycle(end=)"),
        (lambda: one_cycle(anneal="cos"), "one_cycle(anneal=)"),
        (lambda: one_cycle(anneal=["cosine"]), "one_cycle(anneal=)"),  # type: ignore[arg-type]
        (lambda: one_cycle(three_phase=1), "one_cycle(three_phase=)"),  # type: ignore[arg-type]
        (lambda: wsd(0.0), "wsd(warmup=)"),
        (lambda: wsd(decay=1.0), "wsd(decay=)"),
        (lambda: wsd(0.5, 0.6), "wsd(decay=)"),
        (lambda: wsd(end=-0.1), "wsd(end=)"),
        (lambda: wsd(start="0"), "wsd(start=)"),  # type: ignore[arg-type]
        (lambda: wsd(shape="sqrt"), "wsd(shape=)"),
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


@pytest.mark.parametrize(("length", "unit"), [(100, "100ep"), ("3ep", "3ep"), ("12ba", "12ba")])
def test_a_warmup_that_does_not_end_within_the_fit_warns(length: Any, unit: str) -> None:
    """A plain int is epochs; the warning points at the call of fit."""
    trainer = Trainer(schedule=warmup(length), loss_fn=torch.nn.functional.mse_loss, progress=False)
    batches = [(torch.zeros(2, 4), torch.zeros(2, 1))] * 4
    with pytest.warns(ThawlineWarning, match=rf"warmup\('{unit}'\) is not over .*warmup\('0.1dur'\)") as said:
        trainer.fit(torch.nn.Linear(4, 1), batches, duration="3ep")
    assert [each.filename for each in said] == [__file__]


@pytest.mark.parametrize(
    ("nested", "around"),
    [
        (lambda: join([warmup("2ep"), cosine()], [0.5]), "join"),
        (lambda: join([cosine(), warmup("1ep")], ["3ep"]), "join"),
        (lambda: repeat(warmup("1ep"), "1ep", growth=2), "repeat"),
        (lambda: warmup("3ep", then=warmup("1ep")), "warmup"),
        (lambda: join([repeat(warmup("10ba"), 0.5), linear()], ["2ep"]), "repeat"),
        (lambda: join([warmup("1ep"), cosine()], ["2ep"]), ""),
        (lambda: join([cosine(), warmup("9ba")], ["3ep"]), ""),
        (lambda: repeat(warmup("1ep"), "2ep"), ""),
        (lambda: warmup("2ep", then=warmup("1ep")), ""),
        (lambda: join([cosine(), warmup("9ep")], ["9ep"]), ""),
    ],
)
def test_a_warmup_that_does_not_end_within_its_part_warns(nested: Any, around: str) -> None:
    """Of four epochs of ten batches; exactly where the factor of its part never comes to the top. What never begins is no matter."""
    schedule = nested()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bound_schedule(schedule, Time("4ep"), 10)
    assert len(caught) == bool(around)
    assert not around or f"is not over when its part of {around}(…) ends" in str(caught[0].message)
