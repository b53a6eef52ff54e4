"""ThawSchedule as golden timelines, as a law, in fits with plateaus and restored weights, resumed, and refused."""

from __future__ import annotations

import copy
import itertools
import json
import math
import warnings
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from helpers import cnn, encoder, loader, mlp, same_weights, weights
from thawline.algorithms import EMA, EarlyStop, LayerFreeze, LoRAInject, Phase, Plateau, ThawSchedule
from thawline.algorithms.schedule_check import never_begin
from thawline.algorithms.standing import Standing, standing_after
from thawline.engine import (
    Algorithm,
    ArgumentError,
    Checkpointing,
    Event,
    FitResult,
    LedgerError,
    ScheduleError,
    Stage,
    State,
    ThawlineWarning,
    Trainer,
)
from thawline.engine.snapshot import read_checkpoint
from timelines import Loop, Rates, rates, stack, timeline

LAYERS = ("stem", "blocks[0]", "blocks[1]", "blocks[2]", "head")
HEAD: Rates = {"head": 1.0}


def schedule(*phases: Phase, **options: Any) -> ThawSchedule:
    """Return a schedule of phases."""
    return ThawSchedule(phases, **options)


def silently(*phases: Phase, **options: Any) -> ThawSchedule:
    """Return a schedule whose last phase freezes by name what no phase thaws, so that it warns of nothing."""
    named = {selector for phase in phases for selector in (*phase.thaw, *phase.freeze)}
    if rest := tuple(layer for layer in LAYERS if layer not in named):
        first = phases[0]
        keep = {
            key: getattr(first, key) for key in ("name", "thaw", "lr", "warmup", "schedule", "weight_decay", "until")
        }
        phases = (Phase(**keep, freeze=rest, restore=first.restore), *phases[1:])
    return ThawSchedule(phases, **options)


# -- golden timelines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("thaw", "expected"),
    [
        (silently(Phase(thaw="head")), [HEAD] * 6),
        (silently(Phase(thaw="head", lr=0.2)), [{"head": 0.2}] * 6),
        (
            silently(
                Phase(thaw="head", until=1),
                Phase(thaw="blocks[2]", lr=0.3, lr_scale=0.5, until="2ep"),
                Phase(thaw=("blocks[1]", "blocks[0]"), lr_scale=0.5),
            ),
            [HEAD]
            + [{"blocks[2]": 0.3, "head": 0.5}] * 2
            + [{"blocks[0]": 1.0, "blocks[1]": 1.0, "blocks[2]": 0.15, "head": 0.25}] * 3,
        ),
        (
            silently(Phase(thaw=("head", "stem"), lr={"head": 0.1}, until=3), Phase(freeze="head")),
            [{"stem": 1.0, "head": 0.1}] * 3 + [{"stem": 1.0}] * 3,
        ),
        (
            silently(Phase(thaw="head", until=2), Phase(thaw="blocks[2]", until=2), Phase(thaw="stem", lr=0.4), base_max_lr=0.1),
            [HEAD] * 2 + [{"blocks[2]": 0.1, "head": 1.0}] * 2 + [{"stem": 0.4, "blocks[2]": 0.1, "head": 1.0}] * 2,
        ),
        (
            silently(Phase(thaw="head", until=1), Phase(thaw="stem", freeze="head", until=1), Phase(thaw="head"), max_depth=2),
            [HEAD, *[{"stem": 1.0}] * 5],
        ),
        (
            silently(Phase(thaw="head", until=1), Phase(thaw="stem", freeze="head", until=1), max_depth=2),
            [HEAD, *[{"stem": 1.0}] * 5],
        ),
        (
            silently(Phase(thaw="head", until=1), Phase(thaw="stem", freeze="head", until=1), max_depth=2, repeat=2),
            [HEAD, *[{"stem": 1.0}] * 5],
        ),
        (
            silently(Phase(thaw="head", lr=0.5, until=2), Phase(thaw="blocks[2]", lr_scale=0.1, until=1), repeat=2),
            [{"head": 0.5}] * 2 + [{"blocks[2]": 1.0, "head": 0.05}] + [{"head": 0.5}] * 2
            + [{"blocks[2]": 1.0, "head": 0.05}],
        ),
        (
            silently(Phase(thaw="head", until=2), Phase(thaw="stem", until=1), end_with_last_phase=False),
            [HEAD] * 2 + [{"stem": 1.0, "head": 1.0}] * 4,
        ),
        (
            silently(Phase(thaw="head", schedule="linear", until=4), Phase(thaw="stem")),
            [{"head": 1 - epoch / 4} for epoch in range(4)] + [{"stem": 1.0, "head": 1.0}] * 2,
        ),
        (
            silently(Phase(thaw="head", until=2), Phase(thaw="stem", warmup="2ep", schedule="linear")),
            [HEAD] * 2 + [{"stem": (1 - k / 4) * min(1, k / 2), "head": 1 - k / 4} for k in range(4)],
        ),
        (
            silently(Phase(thaw="head", warmup="4ep", until=2), Phase(thaw="stem")),
            [{"head": 0.0}, {"head": 0.25}] + [{"stem": 1.0, "head": min(1, k / 4)} for k in range(2, 6)],
        ),
    ],
)  # fmt: skip
def test_what_trains_in_each_epoch(thaw: ThawSchedule, expected: list[Rates]) -> None:
    """Trainable layers and rates of six epochs, written out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if thaw.max_depth else "error", ThawlineWarning)
        rows = timeline(thaw)
    assert [pytest.approx(row, rel=1e-14) for row in rows] == expected


@pytest.mark.parametrize(
    ("until", "epochs", "first"),
    [
        ("3ba", "2ep", 3),
        ("24sp", "2ep", 3),
        ("20sp", "2ep", 3),
        ("0.25dur", "2ep", 2),
        ("1ep", "2ep", 4),
        ("1ba", "1ep", 1),
    ],
)
def test_a_phase_ends_at_the_first_batch_after_its_time(until: str, epochs: str, first: int) -> None:
    """Batches, samples and shares of the duration end inside an epoch of four batches, epochs do not."""
    rows = timeline(silently(Phase(thaw="head", until=until), Phase(thaw="stem")), duration=epochs, batches=4)
    assert rows == [HEAD] * first + [{"stem": 1.0, "head": 1.0}] * (len(rows) - first)


def test_times_count_from_the_begin_of_the_phase_and_epochs_end_between_epochs() -> None:
    """After 3 of 4 batches a phase of one epoch ends at the second epoch's end, not in the middle of it."""
    thaw = silently(Phase(thaw="head", until="3ba"), Phase(thaw="stem", until="1ep"), Phase(thaw="blocks[0]"))
    rows = timeline(thaw, duration="3ep", batches=4)
    assert [len(row) for row in rows] == [1] * 3 + [2] * 5 + [3] * 4


def test_rates_of_a_round_are_not_carried_into_the_next() -> None:
    """What the second phase sets of the first one's layers is taken back: rate, factor, decay, schedule."""
    thaw = silently(
        Phase(thaw="head", until=1), Phase(thaw=("blocks[2]",), lr_scale=0.5, schedule="linear", weight_decay=0.3, until=2),
        repeat=2,
    )  # fmt: skip
    loop = Loop([thaw])
    seen = []
    for _ in range(6):
        loop.epoch()
        seen.append([(group.name, group.lr, group.options["weight_decay"]) for group in loop.ledger.groups])
    head, both = [("head", 1.0, 0)], [("blocks[2]", 1.0, 0.3), ("head", 0.5, 0)]
    assert [seen[0], seen[1], seen[3], seen[4]] == [head, both, head, both]


@pytest.mark.filterwarnings("ignore:.*is not over when the fit ends:thawline.engine.errors.ThawlineWarning")
def test_a_warmup_of_one_round_does_not_reach_into_the_next() -> None:
    """Round two begins as round one did: the head at its whole rate, or with the warmup of the first phase."""
    last = Phase(thaw="head", freeze="stem", warmup="4ep", until=1)
    rows = timeline(silently(Phase(thaw=("head", "stem"), until=1), Phase(freeze="head", until=1), last, repeat=2))
    assert rows[:3] == rows[3:]
    rows = timeline(silently(Phase(thaw="head", warmup="4ep", until=2), Phase(thaw="stem", until=1), repeat=2))
    assert rows[:3] == rows[3:]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ThawSchedule.generate("x"),  # type: ignore[arg-type]
        lambda: ThawSchedule.from_fts("0: {params: ['.*']}", "x"),  # type: ignore[arg-type]
        lambda: ThawSchedule.from_fts("0: {params: ['.*']}", mlp(), callback={"patience": 3}),  # type: ignore[arg-type]
        lambda: timeline(schedule(Phase(thaw=LAYERS, until=lambda _: torch.ones(2) > 0))),  # type: ignore[arg-type,return-value]
    ],
)
def test_what_is_no_model_callback_or_answer_is_a_typed_error(wrong: Any) -> None:
    """It says what to write."""
    with pytest.raises(ArgumentError, match="Write: "):
        wrong()


def test_a_folder_is_no_schedule(tmp_path: Path) -> None:
    """Said once."""
    with pytest.raises(ScheduleError) as caught:
        ThawSchedule(tmp_path)
    assert str(caught.value).count("has 1 error") == 1


def test_weight_decay_is_that_of_what_the_phase_thaws() -> None:
    """The group of the layer has it, the others the optimizer's."""
    loop = Loop([silently(Phase(thaw="head", until=1), Phase(thaw="stem", weight_decay=0.2))])
    loop.run()
    assert {group.name: group.options["weight_decay"] for group in loop.ledger.groups} == {"stem": 0.2, "head": 0}


def test_each_transition_derives_the_groups_once() -> None:
    """Whatever a phase thaws, freezes, scales and sets, the ledger's version moves by one."""
    loop = Loop([
        silently(
            Phase(thaw=("head", "blocks[2]"), warmup="2ba", weight_decay=0.1, until=1),
            Phase(thaw="blocks[1]", lr=0.1, lr_scale=0.5, freeze="head", schedule="cosine", until=1),
            Phase(thaw=("blocks[0]", "head"), lr={"head": 0.4}, lr_scale=0.5),
        )
    ])  # fmt: skip
    versions = [loop.ledger.version]
    for _ in range(3):
        loop.epoch()
        versions.append(loop.ledger.version)
    assert versions == [1, 1, 2, 3]


def test_depth_phase_and_remaining_say_where_it_stands() -> None:
    """The number of the phase in its round, the phase, and how many are still to begin."""
    thaw = silently(
        Phase("a", thaw="head", until=1), Phase("b", thaw="stem", until=1), repeat=2, end_with_last_phase=False
    )
    assert (thaw.depth, thaw.phase, thaw.remaining) == (0, None, 4)
    loop = Loop([thaw], duration="5ep")
    seen = []
    for _ in range(5):
        loop.epoch()
        seen.append((thaw.depth, thaw.phase and thaw.phase.name, thaw.remaining))
    assert seen == [(1, "a", 3), (2, "b", 2), (1, "a", 1), (2, "b", 0), (0, None, 0)]


# -- as a law ----------------------------------------------------------------------------------------------------------


@st.composite
def timed_phases(draw: Any) -> list[Phase]:
    """Draw phases that end by time alone, each of which leaves something to train."""
    phases: list[Phase] = []
    trains: set[str] = set()
    for number in range(draw(st.integers(1, 4))):
        asleep = [layer for layer in LAYERS if layer not in trains]
        thaw = draw(st.lists(st.sampled_from(asleep), min_size=1, unique=True)) if asleep else []
        freeze = draw(st.lists(st.sampled_from(sorted(trains)), unique=True)) if trains else []
        freeze = freeze[: len(trains) - 1] if not thaw else freeze
        if not (thaw or freeze):
            break
        until = draw(st.sampled_from(["1ep", "2ep", "1ba", "3ba", "4ba", "16sp", "20sp", "0.25dur", "0.1dur"]))
        lr = draw(st.sampled_from([None, 0.3])) if thaw else None
        scale = draw(st.sampled_from([None, 0.5]))
        phases.append(Phase(f"p{number}", thaw=thaw, freeze=freeze, lr=lr, lr_scale=scale, until=until))
        trains = trains - set(freeze) | set(thaw)
    return phases


def simulated(phases: Sequence[Phase], repeat: int, batches: int, epochs: int) -> list[Rates]:
    """Return the rates of each batch by counting in fractions, with no ledger, clock or event."""
    rows: list[Rates] = []
    place, begun, named, found = -1, 0, Fraction(0), dict[str, tuple[float, float]]()
    for batch in range(epochs * batches):
        passed = {
            "ba": Fraction(1),
            "sp": Fraction(8),
            "ep": Fraction(1, batches),
            "dur": Fraction(1, epochs * batches),
        }
        if place >= 0:
            until = phases[place % len(phases)].until
            last = place == len(phases) * repeat - 1
            due = batch * passed[until.unit] >= named + Fraction(str(until.value))  # type: ignore[union-attr,index]
            due = due and batch > begun and not last
            due = due and (until.unit != "ep" or batch % batches == 0)  # type: ignore[union-attr]
        if place < 0 or due:
            place, begun = place + 1, batch
            phase = phases[place % len(phases)]
            before, unit = phases[(place - 1) % len(phases)].until, phase.until.unit  # type: ignore[union-attr]
            follows = place > 0 and before.unit == unit  # type: ignore[union-attr]
            named = named + Fraction(str(before.value)) if follows else batch * passed[unit]  # type: ignore[union-attr]
            found = {} if place % len(phases) == 0 else found
            found = {layer: (lr, factor * (phase.lr_scale or 1)) for layer, (lr, factor) in found.items()}
            found = {layer: each for layer, each in found.items() if layer not in phase.freeze}
            found |= dict.fromkeys(phase.thaw, (phase.lr or 1.0, 1.0))  # type: ignore[misc]
        rows.append({layer: lr * factor for layer, (lr, factor) in found.items()})
    return rows


@settings(max_examples=80)
@given(timed_phases(), st.integers(1, 2), st.integers(1, 5), st.integers(1, 5))
def test_the_trainable_set_is_a_function_of_schedule_and_clock(
    phases: list[Phase], repeat: int, batches: int, epochs: int
) -> None:
    """In every batch the rates are those of a simulation in fractions; the ledger is verified after each event."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThawlineWarning)
        rows = timeline(schedule(*phases, repeat=repeat), duration=epochs, batches=batches)
    assert [pytest.approx(row, rel=1e-14) for row in rows] == simulated(phases, repeat, batches, epochs)


def test_boundaries_in_mixed_units_follow_one_another() -> None:
    """Of 60 batches, 12 an epoch: an epoch, ten batches, a tenth of the fit, and 40 samples of 8."""
    times = ["1ep", "10ba", "0.1dur", "40sp", None]
    thaw = schedule(*(Phase(thaw=each, until=time) for each, time in zip(LAYERS, times, strict=True)))
    rows = timeline(thaw, duration=5, batches=12)
    assert [batch for batch in range(1, 60) if len(rows[batch]) > len(rows[batch - 1])] == [12, 12 + 10, 22 + 6, 28 + 5]


@settings(max_examples=80)
@given(timed_phases(), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
def test_the_phases_that_never_begin_are_known_at_the_start(
    phases: list[Phase], repeat: int, batches: int, epochs: int
) -> None:
    """As many begin as are not reported, rounding up to whole batches included; samples are not known before."""
    phases = [attrs.evolve(each, until="1ba") if each.until.unit == "sp" else each for each in phases]  # type: ignore[union-attr]
    thaw = schedule(*phases, repeat=repeat)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThawlineWarning)
        loop = Loop([thaw], duration=epochs, batches=batches)
        late = never_begin(thaw.phases, len(phases) * repeat, loop.state)
        loop.run()
    assert thaw.remaining == len(late)


@pytest.mark.parametrize(("layers", "batches"), [(14, 100), (3, 7), (7, 11), (9, 9)])
def test_rounding_up_to_whole_batches_does_not_add_up(layers: int, batches: int) -> None:
    """Each phase of equal shares begins at the first batch behind its share of the fit, and all of them begin."""
    thaw = ThawSchedule.generate(stack(layers - 2))
    share = Fraction(str(thaw.phases[0].until.value))  # type: ignore[union-attr]
    rows = timeline(thaw, stack(layers - 2), duration="1ep", batches=batches)
    begins = [next(at for at, row in enumerate(rows) if len(row) == count) for count in range(1, layers + 1)]
    assert begins == [math.ceil(place * share * batches) for place in range(layers)]


def test_the_last_of_equal_shares_is_not_lost() -> None:
    """Four quarters of six batches: 0, 1.5, 3, 4.5."""
    quarters = [Phase(thaw=layer, until="0.25dur") for layer in LAYERS[:0:-1]]
    rows = timeline(silently(*quarters), duration="1ep", batches=6)
    assert [len(row) for row in rows] == [1, 1, 2, 3, 3, 4]


def test_behind_a_plateau_a_time_counts_from_the_real_begin() -> None:
    """The plateau ends at batch 8 by patience, and not at its latest end."""
    until = Plateau("eval/score", patience=2, at_most="0.9dur")
    thaw = schedule(
        Phase(thaw="head", until=until), Phase(thaw="blocks[-1]", until="0.25dur"), Phase(thaw="blocks[:-1]")
    )
    _, result = fit(Script(VALUES), thaw, duration="4ep")
    assert spans(result) == [(0, 8, 1), (8, 12, 2), (12, 16, 4)]


def test_what_stands_after_phases_is_a_pure_function() -> None:
    """Scale first, freeze, then thaw: what thaws begins anew."""
    phases = [
        Phase(thaw=("a", "b"), lr=1.0),
        Phase(thaw="a", freeze=("b",), lr_scale=0.5),
        Phase(thaw="b", lr_scale=0.5),
    ]
    found = standing_after(phases, lambda selector: [selector], base_max_lr=0.1)
    assert found == {"a": Standing(0.1, None, 0.5), "b": Standing(0.1, None, 1.0)}


# -- in a fit ----------------------------------------------------------------------------------------------------------


class Script(Algorithm):
    """Logs a metric as a function of the clock, and copies weights and loss at each evaluation."""

    stage: ClassVar[Stage] = Stage.SURGERY
    events = frozenset({Event.BATCH_END, Event.EVAL_END})

    def __init__(self, values: Sequence[float], *, name: str = "eval/score") -> None:
        self.values, self.name = values, name
        self.evaluated: dict[int, dict[str, Tensor]] = {}
        self.losses: dict[int, float] = {}

    def apply(self, event: Event, state: State) -> None:
        """Log at BATCH_END, so that it is there at EVAL_END whatever the order."""
        if event is Event.EVAL_END:
            self.evaluated[state.clock.batch] = weights(state.model)
            self.losses[state.clock.batch] = state.metrics["eval/loss"]
        else:
            state.log({self.name: self.values[min(state.clock.batch, len(self.values)) - 1]})


class Look(Algorithm):
    """Copies the weights and counts the optimizer's states before each batch, after all others."""

    stage: ClassVar[Stage] = Stage.OBSERVE
    events = frozenset({Event.BATCH_START})

    def __init__(self) -> None:
        self.before: dict[int, dict[str, Tensor]] = {}
        self.moments: dict[int, int] = {}

    def apply(self, event: Event, state: State) -> None:
        """Look."""
        self.before[state.clock.batch] = weights(state.model)
        self.moments[state.clock.batch] = sum(len(each.state) for each in state.optimizers)


def fit(
    *algorithms: Algorithm,
    model: nn.Module | None = None,
    folder: Path | None = None,
    resume: bool | Path = False,
    duration: str = "8ep",
    eval_every: str = "2ba",
) -> tuple[nn.Module, FitResult]:
    """Fit a small model: four batches an epoch, an evaluation every other batch, every batch a checkpoint."""
    torch.manual_seed(3)
    net = mlp(depth=4) if model is None else model
    trainer = Trainer(
        algorithms=list(algorithms), loss_fn=cross_entropy, optimizer=partial(torch.optim.AdamW, lr=0.01),
        run_dir=folder, checkpoint=None if folder is None else Checkpointing(every="1ba", keep=99), progress=False,
        debug=True, eval_every=eval_every,
    )  # fmt: skip
    result = trainer.fit(net, loader(), loader(seed=1), duration=duration, resume=resume)
    return net, result


def spans(result: FitResult) -> list[tuple[int, int, int]]:
    """Return begin, end and number of layers of each span of the timeline."""
    return [(span.start.batch, span.end.batch, len(span.layers)) for span in result.timeline.spans]


# Evaluations at 2, 4, 6, 8: best at 4; then 10, 12, …: best at 12.
VALUES = [0, 1, 1, 5, 5, 3, 3, 4, 4, 2, 2, 9, 9, 9, 9, 8, 8, 8, 8, 7]


def test_a_plateau_ends_a_phase_between_two_steps() -> None:
    """Two evaluations without improvement, at 6 and 8; the next batch trains one layer more; the last phase ends the fit."""
    head = Phase(thaw="head", until=Plateau("eval/score", patience=2))
    thaw = schedule(head, Phase(thaw="blocks", until=Plateau("eval/score", patience=2)))
    _, result = fit(Script(VALUES), thaw)
    assert spans(result) == [(0, 8, 1), (8, 16, 4)]
    assert (result.stop_reason, result.clock.batch) == ("ThawSchedule: last phase completed", 16)


@pytest.mark.parametrize(
    ("plateau", "batch"),
    [
        (Plateau("eval/score", patience=1, at_most="3ba"), 3),
        (Plateau("eval/score", patience=9, at_most="1ep"), 4),
        (Plateau("eval/score", patience=9, at_most="5ba"), 5),
        (Plateau("eval/score", patience=1, min_delta=3.9), 6),
        (Plateau("eval/score", patience=1, min_delta=4.0), 4),
        (Plateau("eval/score", patience=1, mode="min"), 4),
        (Plateau("eval/points", patience=2), 8),
        (Plateau("train/loss", patience=1, mode="max"), 8),
    ],
)
def test_when_a_plateau_ends_a_phase(plateau: Plateau, batch: int) -> None:
    """Patience, min_delta, the mode by name or as given, and at_most as the latest end; train/ is seen at epoch ends."""
    script = (
        Script(VALUES, name="eval/score")
        if plateau.monitor != "eval/points"
        else Script([-each for each in VALUES], name="eval/points")
    )
    _, result = fit(script, schedule(Phase(thaw="head", until=plateau), Phase(thaw="blocks")), duration="3ep")
    assert spans(result) == [(0, batch, 1), (batch, 12, 4)]


def test_a_function_ends_a_phase() -> None:
    """Asked at each batch's and epoch's end; described by qualified name."""
    thaw = schedule(Phase(thaw="head", until=third), Phase(thaw="blocks", until=third))
    _, result = fit(thaw)
    assert spans(result) == [(0, 3, 1), (3, 4, 4)]
    assert result.stop_reason == "ThawSchedule: last phase completed"
    assert "test_thaw_schedule.third" in json.dumps(thaw.describe())


def third(state: State) -> bool:
    """Return whether three batches have passed."""
    return state.clock.batch >= 3


@pytest.mark.parametrize(("until", "batches"), [("2ep", 12), ("5ba", 9), ("0.25dur", 12), ("40sp", 9)])
def test_the_fit_ends_with_the_time_of_the_last_phase(until: str, batches: int) -> None:
    """No batch more; the reason is said."""
    _, result = fit(schedule(Phase(thaw="head", until=1), Phase(thaw="blocks", until=until)))
    assert (result.clock.batch, result.stop_reason) == (batches, "ThawSchedule: last phase completed")


def test_restored_weights_are_those_of_the_best_evaluation() -> None:
    """Before the first batch of the next phase: bit-equal to those at the evaluation with the best value, no moments."""
    script, look = Script(VALUES), Look()
    best = Phase(thaw=("head", "blocks[-1]"), until=Plateau("eval/score", patience=2), restore="best")
    model, result = fit(
        script, look, schedule(best, Phase(thaw="blocks[:-1]", until=Plateau("eval/score", patience=2), restore="best"))
    )
    assert spans(result) == [(0, 8, 2), (8, 16, 4)]
    assert same_weights(look.before[8], script.evaluated[4])
    assert not same_weights(script.evaluated[8], script.evaluated[4])
    assert (look.moments[7], look.moments[8], look.moments[9]) == (4, 0, 8)
    assert same_weights(weights(model), script.evaluated[12])


def test_a_timed_phase_restores_by_another_metric() -> None:
    """restore_monitor says which; without one eval/loss, smaller being better."""
    for monitor in ("eval/score", None):
        script, look = Script(VALUES), Look()
        fit(
            script,
            look,
            schedule(Phase(thaw="head", until="8ba", restore="best", restore_monitor=monitor), Phase(thaw="blocks")),
            duration="3ep",
        )
        equal = [batch for batch in (2, 4, 6, 8) if same_weights(look.before[8], script.evaluated[batch])]
        assert equal == [4 if monitor else min(list(script.losses)[:4], key=script.losses.__getitem__)]


@pytest.mark.parametrize(
    ("until", "duration", "batch"), [(None, "2ep", 8), (None, "7ba", 7), ("2ep", "3ep", 8), ("7ba", "3ep", 7)]
)
def test_at_the_fits_end_model_metrics_and_checkpoint_agree(
    until: str | None, duration: str, batch: int, tmp_path: Path
) -> None:
    """Whether the phase or the fit ends: the best weights are in all of them, and what was logged last is theirs."""
    script = Script(VALUES)
    thaw = schedule(Phase(thaw=("head", "blocks"), until=until, restore="best", restore_monitor="eval/score"))
    losses: dict[int, list[float]] = {}
    model, result = fit(Evaluations(losses), script, thaw, duration=duration, folder=tmp_path)
    assert result.clock.batch == batch
    inputs, targets = (torch.cat(each) for each in zip(*loader(seed=1), strict=True))
    with torch.no_grad():
        loss = cross_entropy(model(inputs), targets).item()
    assert result.metrics["eval/loss"] == result.history[-1]["eval/loss"] == pytest.approx(loss, rel=1e-5)
    assert losses[4] == pytest.approx([loss], rel=1e-5)
    assert losses[8 if batch == 8 else 7][-1] == pytest.approx(loss, rel=1e-5)
    assert result.last is not None
    assert same_weights(read_checkpoint(result.last)["model"], weights(model))


class StopAt(Algorithm):
    """Stops the fit at the end of an epoch."""

    events = frozenset({Event.EPOCH_END})

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def apply(self, event: Event, state: State) -> None:
        if state.clock.epoch == self.epoch:
            state.stop("enough")


@pytest.mark.parametrize("stop", [EarlyStop("train/loss", patience=1, min_delta=99.0), StopAt(2)])
@pytest.mark.parametrize("first", [False, True])
def test_what_another_algorithm_stops_at_an_epochs_end_is_in_the_last_checkpoint(
    stop: Algorithm, first: bool, tmp_path: Path
) -> None:
    """In either order of the list: model, metrics and the last checkpoint are those of the best evaluation."""
    script = Script(VALUES)
    thaw = schedule(Phase(thaw=("head", "blocks"), restore="best", restore_monitor="eval/score"))
    model, result = fit(script, *((stop, thaw) if first else (thaw, stop)), folder=tmp_path)
    assert result.clock.batch == 8
    assert same_weights(weights(model), script.evaluated[4])
    assert result.last is not None
    assert same_weights(read_checkpoint(result.last)["model"], weights(model))
    inputs, targets = (torch.cat(each) for each in zip(*loader(seed=1), strict=True))
    with torch.no_grad():
        assert result.metrics["eval/loss"] == pytest.approx(cross_entropy(model(inputs), targets).item(), rel=1e-5)


class Evaluations(Algorithm):
    """Notes the loss of each evaluation by batch."""

    stage: ClassVar[Stage] = Stage.OBSERVE
    events = frozenset({Event.EVAL_END})

    def __init__(self, losses: dict[int, list[float]]) -> None:
        self.losses = losses

    def apply(self, event: Event, state: State) -> None:
        """Note."""
        self.losses.setdefault(state.clock.batch, []).append(state.metrics["eval/loss"])


def test_a_longer_fit_goes_on_in_the_phase_that_was_cut(tmp_path: Path) -> None:
    """From the best weights, and with the best value: what is worse afterwards is not kept."""
    script = Script([0, 0, 0, 9, 9, 3])
    phase = Phase(thaw=("head", "blocks"), restore="best", restore_monitor="eval/score")
    first, _ = fit(Script([0, 0, 0, 9, 9, 3]), schedule(phase), duration="2ep", folder=tmp_path)
    best = weights(first)
    second, result = fit(script, schedule(phase), duration="4ep", folder=tmp_path, resume=True)
    assert result.clock.batch == 16
    assert same_weights(weights(second), best)


def test_restoring_puts_buffers_back_as_well() -> None:
    """Running statistics of a BatchNorm are those of the best evaluation, counters included."""
    torch.manual_seed(0)
    script, look = Script(VALUES), Look()
    model = nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
    )
    fit(
        script,
        look,
        schedule(
            Phase(thaw=("head", "blocks"), until="8ba", restore="best", restore_monitor="eval/score"),
            Phase(freeze="blocks"),
        ),
        model=model,
        duration="3ep",
    )
    assert same_weights(look.before[8], script.evaluated[4])
    assert look.before[8]["2.num_batches_tracked"] == 4


def test_beside_ema_live_weights_are_restored() -> None:
    """The copy is of live weights: the averages stand in the model at evaluations only."""
    script, look = Script(VALUES), Look()
    until = Plateau("eval/score", patience=2)
    for algorithms in itertools.permutations(
        [EMA(decay=0.5), schedule(Phase(thaw="head", until=until, restore="best"), Phase(thaw="blocks"))]
    ):
        fit(script, look, *algorithms, duration="3ep")
        assert same_weights(look.before[8], look.before[4])


# -- resume ------------------------------------------------------------------------------------------------------------


def full() -> list[Algorithm]:
    """Return a schedule with everything: plateau, restore, warmup, schedule, decay, refreeze, rounds, beside others."""
    until = Plateau("eval/score", patience=2)
    return [
        Script([*VALUES, *VALUES]),
        EarlyStop("eval/loss", patience=30),
        EMA(decay=0.8),
        schedule(
            Phase(thaw="head", lr=0.02, warmup="3ba", until=until, restore="best"),
            Phase(thaw="blocks[-1]", lr_scale=0.5, weight_decay=0.3, schedule="cosine", until="3ba"),
            Phase(thaw="blocks[:-1]", freeze="head", lr_scale=0.5, warmup="2ba", until=third_of_round, restore="best"),
            repeat=2,
        ),
    ]


def third_of_round(state: State) -> bool:
    """Return whether the batch is a multiple of five."""
    return state.clock.batch % 5 == 0


def test_a_fit_resumed_at_any_batch_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    """From every checkpoint: in each phase, in a plateau's patience, between decision and change, and the last one."""
    model, whole = fit(*full(), folder=tmp_path / "whole", duration="7ep")
    assert whole.stop_reason == "ThawSchedule: last phase completed"
    ends = [0, 8, 11, 15, 20, 23, 25]
    assert [each[:2] for each in spans(whole)] == list(itertools.pairwise(ends))
    checkpoints = sorted((tmp_path / "whole").rglob("ba*"))
    assert len(checkpoints) >= whole.clock.batch
    for checkpoint in checkpoints:
        again, result = fit(*full(), folder=tmp_path / f"from-{checkpoint.name}", duration="7ep", resume=checkpoint)
        assert same_weights(weights(again), weights(model)), checkpoint.name
        assert result.timeline.spans == whole.timeline.spans
        assert result.history == whole.history


def test_a_second_fit_starts_afresh() -> None:
    """The same instance begins with its first phase."""
    thaw = schedule(Phase(thaw="head", until=1), Phase(thaw="blocks", until=1))
    assert spans(fit(thaw)[1]) == spans(fit(thaw)[1]) == [(0, 4, 1), (4, 8, 4)]


# -- beside others -----------------------------------------------------------------------------------------------------


def test_the_order_of_the_list_does_not_matter() -> None:
    """Every order of four algorithms gives the same trainable set and rates in each batch."""
    found = []
    for order in itertools.permutations(range(3)):
        algorithms: list[Algorithm] = [
            schedule(Phase(thaw="head", until=1), Phase(thaw="blocks", lr_scale=0.5, lr=0.1, until=2), Phase(thaw="stem", freeze="blocks[0]")),
            LayerFreeze(start=0.5), LoRAInject(rank=2, target="all-linear"),
        ]  # fmt: skip
        torch.manual_seed(0)
        loop = Loop([algorithms[index] for index in order], encoder(3), duration="6ep")
        found.append([(loop.epoch(), loop.ledger.trainable, rates(loop.ledger))[1:] for _ in range(6)])
    assert all(each == found[0] for each in found)
    assert len({trainable for trainable, _ in found[0]}) > 2


def test_beside_lora_a_thawed_layer_trains_its_adapters() -> None:
    """LoRAInject holds the base weights, the schedule the layers."""
    loop = Loop(
        [schedule(Phase(thaw="head", until=1), Phase(thaw=("blocks", "stem"))), LoRAInject(rank=2)],
        encoder(2),
        duration="2ep",
    )
    loop.epoch()
    assert not any("lora_" in name for name in loop.ledger.trainable)
    loop.epoch()
    assert all("lora_" in name or name.startswith("classifier") for name in loop.ledger.trainable)
    assert any("lora_" in name for name in loop.ledger.trainable)


@pytest.mark.parametrize(("batchnorm", "moves"), [("eval", False), ("train", True)])
def test_statistics_of_frozen_layers(batchnorm: str, *, moves: bool) -> None:
    """They stand still, or go on, until the layer thaws."""
    model = cnn()
    loop = Loop(
        [ThawSchedule([Phase(thaw="head", until=1), Phase(thaw="blocks")], batchnorm=batchnorm)], model, duration="2ep"
    )  # type: ignore[arg-type]
    loop.epoch()
    assert model[1].training is moves
    loop.epoch()
    assert model[1].training


def test_a_rate_that_another_owner_sets_is_an_error_that_names_both() -> None:
    """One owner a parameter, as the ledger has it."""
    loop = Loop([schedule(Phase(thaw=LAYERS, lr=0.1))], begin=False)
    loop.ledger.set_lr("head", 0.5, owner="me")
    with pytest.raises(LedgerError, match="'me', and 'ThawSchedule'"):
        loop.engine.emit(Event.FIT_START)


# -- as a description and as text ----------------------------------------------------------------------------------------


TEXT = """
repeat: 2
base_max_lr: 1.0e-4
phases:
- {name: warm, thaw: head, until: 1ep}
- {thaw: 'blocks[-1]', lr_scale: 0.5, until: {plateau: eval/loss, patience: 2, at_most: 3ep}, restore: best}
"""


def test_a_description_builds_it_again_and_survives_the_file(tmp_path: Path) -> None:
    """describe() and from_description() are inverse; the file may be gone; save() writes what reads back the same."""
    file = tmp_path / "thaw.yaml"
    file.write_text(TEXT)
    thaw = ThawSchedule(file, repeat=3)
    assert (thaw.repeat, thaw.base_max_lr) == (3, 1e-4)
    assert Algorithm.from_description(json.loads(json.dumps(thaw.describe()))).describe() == thaw.describe()
    file.unlink()
    thaw.reset()
    assert ThawSchedule(thaw.save(file)).describe() == thaw.describe()
    assert ThawSchedule(TEXT).describe() != thaw.describe()
    assert thaw.monitor == "eval/loss"


def test_generated_and_foreign_schedules() -> None:
    """The default one thaws all layers in equal shares; one of finetuning-scheduler is read beside the model."""
    rows = timeline(ThawSchedule.generate(stack()), duration="10ep")
    assert [len(row) for row in rows] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    thaw = ThawSchedule.from_fts(
        "0: {params: ['1.*'], max_transition_epoch: 3}\n1: {params: ['0.*']}", model, max_depth=1
    )
    assert [phase.thaw for phase in thaw.phases] == [("1",), ("0",)]
    assert thaw.max_depth == 1


def test_what_a_plan_cannot_know_is_said() -> None:
    """Plateaus and functions by phase; nothing where the clock decides."""
    assert schedule(Phase(thaw="head", until=1), Phase(thaw="blocks")).unplanned() is None
    until = Plateau("eval/loss", at_most="5ep")
    words = schedule(Phase("a", thaw="head", until=until), Phase("b", thaw="blocks", until=third)).unplanned()
    assert words == (
        "may end its phases 'a' when eval/loss has not improved for 3 evaluations, at the latest after 5ep, as shown; "
        "'b' by a function of the state"
    )


def test_without_any_metric_a_plateau_runs_to_its_latest_end() -> None:
    """In a plan, and in a loop of one's own that logs nothing, no evaluation is an error."""
    phases = [Phase(thaw="head", until=Plateau(monitor, at_most="2ep")) for monitor in ("eval/loss", "train/loss")]
    for first in phases:
        loop = Loop([silently(first, Phase(thaw="stem"))], duration="4ep")
        rows = []
        for _ in range(4):
            rows += loop.epoch()
            loop.engine.emit(Event.EVAL_END)
        assert [len(row) for row in rows] == [1, 1, 2, 2]


# -- warnings and bad input ----------------------------------------------------------------------------------------------


def test_parameters_that_no_phase_names_are_reported() -> None:
    """With their number and the first few; what the user froze is his own business."""
    with pytest.warns(ThawlineWarning, match=r"no phase names 7 parameters.*0\.weight, 1\.weight, 1\.bias and 4 more"):
        Loop([schedule(Phase(thaw="head"))])
    model = stack()
    model[:-1].requires_grad_(False)
    Loop([schedule(Phase(thaw="head"))], model)


@pytest.mark.parametrize(
    ("untils", "batches", "names"),
    [
        (("3ep", "1ep"), 1, ["phase 3"]),
        (("4ep", "1ep"), 1, ["phase 2", "phase 3"]),
        (("2ep", "1ep"), 1, []),
        (("10ba", "10ba"), 5, ["phase 3"]),
        (("10ba", "9ba"), 5, []),
        (("0.5dur", "0.4dur"), 5, []),
        (("0.5dur", "2ep"), 5, ["phase 3"]),
        (("999sp", "2ep"), 5, []),
    ],
)
def test_phases_that_never_begin_are_reported(untils: tuple[str, str], batches: int, names: list[str]) -> None:
    """Exactly those whose begin is known to lie at the end of four epochs or later."""
    first, second = untils
    thaw = silently(Phase(thaw="head", until=first), Phase(thaw="stem", until=second), Phase(thaw="blocks[0]"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Loop([thaw], duration="4ep", batches=batches)
    assert [each.category for each in caught] == [ThawlineWarning] * bool(names)
    count = "1 phase never begins" if len(names) == 1 else f"{len(names)} phases never begin"
    assert not names or f"{count}: {', '.join(map(repr, names))}." in str(caught[0].message)


@pytest.mark.parametrize(
    ("warmups", "names"),
    [
        (("4ep", None), ["phase 1"]),
        (("19ba", "10ba"), ["phase 2"]),
        (("19ba", "9ba"), []),
        (("9999ba", "0.5dur"), ["phase 1", "phase 2"]),
        (("0.9dur", "0.4dur"), []),
        (("99sp", None), []),
    ],
)
def test_warmups_that_outlast_the_fit_are_reported(warmups: tuple[str, str | None], names: list[str]) -> None:
    """Phases begin at batches 0 and 10 of 20; what thaws goes on rising in later phases."""
    first, second = warmups
    thaw = silently(Phase(thaw="head", warmup=first, until="10ba"), Phase(thaw="stem", warmup=second))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Loop([thaw], duration="4ep", batches=5)
    assert [each.category for each in caught] == [ThawlineWarning] * bool(names)
    assert not names or f"the warmup of {', '.join(map(repr, names))} is not over" in str(caught[0].message)


@pytest.mark.parametrize("monitor", ["eval/lose", "train/lose"])
def test_a_metric_that_nobody_logs_is_an_error_when_first_looked_at(monitor: str) -> None:
    """It says which are logged, and the nearest."""
    thaw = schedule(Phase(thaw="head", until=Plateau(monitor)), Phase(thaw="blocks"))
    refused = rf"got '{monitor}'.*Plateau\('{monitor[:-1]}|Plateau\('{monitor[:5]}/loss'\)"
    if monitor.startswith("train/"):  # the schedule tells the Trainer of evaluations only
        with pytest.raises(ArgumentError, match=refused):
            fit(thaw)
        return
    said = "nothing in this fit logs 'eval/lose', which ThawSchedule monitors. Write: 'eval/loss'"
    with pytest.warns(ThawlineWarning, match=said), pytest.raises(ArgumentError, match=refused):
        fit(thaw)


def test_without_evaluations_a_plateau_is_said_to_wait_in_vain() -> None:
    """The Trainer asks for ``monitor`` before the fit."""
    with pytest.warns(ThawlineWarning, match="ThawSchedule monitors an evaluation"):
        Trainer(
            algorithms=[schedule(Phase(thaw="head", until=Plateau("eval/loss")), Phase(thaw="blocks"))],
            loss_fn=cross_entropy,
            progress=False,
        ).fit(mlp(), loader(), duration="2ba")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"source": []}, ArgumentError, r"ThawSchedule\(source=\)"),
        ({"source": None}, ArgumentError, r"ThawSchedule\(source=\)"),
        ({"source": 3}, ArgumentError, r"ThawSchedule\(source=\)"),
        ({"source": [Phase(thaw="head"), {"thaw": "stem"}]}, ArgumentError, r"ThawSchedule\(source=\)"),
        ({"source": [Phase(thaw="head"), 3]}, ArgumentError, r"ThawSchedule\(source=\).*got 3"),
        ({"source": [Phase(thaw="head"), Phase(thaw="stem")]}, ArgumentError, r"Phase\(until=\)"),
        ({"source": [Phase(freeze="head")]}, ArgumentError, "a first phase that thaws"),
        ({"source": "- {thow: head}"}, ScheduleError, "nearest is 'thaw'"),
        ({"source": [{"thaw": "head", "until": "soon"}]}, ScheduleError, "until takes"),
        (
            {"source": [Phase(thaw="head", schedule="linear", until=third), Phase(thaw="stem")]},
            ArgumentError,
            r"Phase\(schedule=\).*at_most='5ep'",
        ),
        ({"repeat": 0}, ArgumentError, r"ThawSchedule\(repeat=\)"),
        ({"repeat": 2, "source": [Phase(thaw="head")]}, ArgumentError, r"Phase\(until=\)"),
        ({"max_depth": 0}, ArgumentError, r"ThawSchedule\(max_depth=\)"),
        ({"batchnorm": "off"}, ArgumentError, r"ThawSchedule\(batchnorm=\)"),
        ({"base_max_lr": -1.0}, ArgumentError, r"ThawSchedule\(base_max_lr=\)"),
        ({"end_with_last_phase": 1}, ArgumentError, r"ThawSchedule\(end_with_last_phase=\)"),
    ],
)
def test_a_bad_argument_is_an_error_that_says_what_to_write(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    """At construction, naming the argument."""
    with pytest.raises(error, match=message):
        ThawSchedule(**{"source": [Phase(thaw="head", until=1)], **arguments})


def test_phases_that_do_not_fit_the_model_are_an_error_at_the_start() -> None:
    """All of it at once, phase by phase."""
    with pytest.raises(ScheduleError, match=r"(?s)2 errors.*phase 1.*'heed' matches nothing.*phase 2.*blocks\[7\]"):
        Loop([schedule(Phase(thaw=("head", "heed"), until=1), Phase(thaw="blocks[7]"))])


def test_an_option_that_the_optimizer_does_not_have_is_an_error() -> None:
    """An optimizer without weight decay says so."""
    model = mlp()
    with pytest.raises(ArgumentError, match=r"set_options\(weight_decay=\)"):
        Trainer(
            algorithms=[schedule(Phase(thaw=("head", "blocks"), weight_decay=0.1))], loss_fn=cross_entropy, progress=False,
            optimizer=torch.optim.Rprop,
        ).fit(model, loader(), duration="1ba")  # fmt: skip


def test_a_selector_that_matches_nothing_is_shown_with_its_line_and_the_nearest_name(tmp_path: Path) -> None:
    """Also once the file is gone and the fit has built the schedule anew from what was read."""
    path = tmp_path / "thaw.yaml"
    path.write_text("phases:\n- thaw: haed\n  until: 1ep\n- thaw:\n  - 2.weight\n  - blocs[0]\n  lr: {2.weigth: 0.1}\n")
    schedule = ThawSchedule(path)
    path.unlink()
    for each in (schedule, schedule.fresh(), copy.deepcopy(schedule)):
        with pytest.raises(ScheduleError) as caught:
            Trainer(algorithms=[each], progress=False, loss_fn=cross_entropy).fit(mlp(), loader(), duration="2ep")
        found = [
            (place, problem.split("'")[1], problem.split("Nearest names: ")[1])
            for place, problem, _ in caught.value.faults
        ]
        assert caught.value.source == str(path)
        assert [(place, name) for place, name, _ in found] == [
            ("line 2", "haed"), ("line 6", "blocs[0]"), ("line 7", "2.weigth")
        ]  # fmt: skip
        assert found[0][2].startswith("'head'")
        assert found[1][2].startswith("'blocks[0]'")
        assert found[2][2].startswith("'2.weight'")
