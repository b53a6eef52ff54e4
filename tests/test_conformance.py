"""Every registered algorithm and every preset keeps every promise; no exceptions, and none named here."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import attrs
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import thawline.algorithms
from thawline.algorithms import presets
from thawline.engine import Algorithm, Event, LedgerError, Stage, State, ThawlineError, on, registered, registered_names
from thawline.engine.audit import Audit
from thawline.engine.rehearsal import Rehearsal
from thawline.engine.tasks import uneven, unsized
from thawline.engine.testing import (
    CHECKS,
    ConformanceError,
    Fit,
    Specimen,
    algorithms,
    check_algorithm,
    fits,
    models,
    specimen,
    tiny_loader,
    tiny_models,
)

KINDS = [kind for kind in map(registered, registered_names()) if kind.__module__.startswith("thawline.algorithms")]
PRESETS = [
    preset
    for name, preset in inspect.getmembers(presets, inspect.isfunction)
    if preset.__module__ == presets.__name__ and not name.startswith("_")
]
PARTNERS = [specimen(kind) for kind in KINDS]


def all_for(model: str) -> list[Specimen]:
    """Return every algorithm and preset; a preset that is made for a model is given that one."""
    given = {"model": tiny_models()[model]()}
    return [
        *PARTNERS,
        *(
            specimen(each, **{name: given[name] for name in given.keys() & inspect.signature(each).parameters})
            for each in PRESETS
        ),
    ]


ALL = all_for("residual")
NAMES = [each.build.__name__ for each in ALL]


def test_the_registry_is_not_empty() -> None:
    """What is run below is what is exported, so nobody is forgotten."""
    exported = {name for name in thawline.algorithms.__all__ if isinstance(getattr(thawline.algorithms, name), type)}
    registered = {kind.__name__ for kind in KINDS}
    assert {name for name in exported if issubclass(getattr(thawline.algorithms, name), Algorithm)} == registered
    assert len(PRESETS) >= 5


@pytest.mark.parametrize("factory", ALL, ids=NAMES)
def test_every_algorithm_and_preset_keeps_every_promise(factory: Callable[[], Any]) -> None:
    """All checks but that of two ranks, which is slow, beside a few others drawn by seed, resumed at a few steps."""
    check_algorithm(factory, partners=PARTNERS, checks=[each for each in CHECKS if each != "stays_equal_on_two_ranks"])


@pytest.mark.slow
@pytest.mark.parametrize("factory", ALL, ids=NAMES)
def test_every_pair_and_every_step(factory: Callable[[], Any]) -> None:
    """Beside every other algorithm in both orders, and resumed at every step."""
    check_algorithm(factory, partners=PARTNERS, thorough=True)


@pytest.mark.slow
@pytest.mark.parametrize("factory", ALL, ids=NAMES)
def test_every_algorithm_on_two_ranks(factory: Callable[[], Any]) -> None:
    """Two processes that train together come to the same, bit for bit, with weights in shards too."""
    check_algorithm(factory, thorough=True, checks=["stays_equal_on_two_ranks"])


@pytest.mark.slow
def test_an_algorithm_that_does_as_its_rank_likes_is_found() -> None:
    """What differs between the ranks is named, with what to do about it."""

    @on(Event.AFTER_STEP)
    def scale_by_rank(state: State) -> None:
        with torch.no_grad():
            next(iter(state.ledger.trainable_parameters)).mul_(1 + int(os.environ.get("RANK", "0")))

    with pytest.raises(ConformanceError, match="the ranks disagree on what a fit came to: /weights") as caught:
        check_algorithm(scale_by_rank, checks=["stays_equal_on_two_ranks"])
    assert "derive_seed" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(tiny_models()))
@pytest.mark.parametrize("name", NAMES)
def test_on_every_kind_of_model(name: str, model: str) -> None:
    """All checks on each tiny model that the algorithm takes; one that it refuses, it refuses by a typed error."""
    build: Callable[[], nn.Module] = tiny_models()[model]
    (factory,) = [each for each in all_for(model) if each.build.__name__ == name]
    try:
        check_algorithm(factory, model=build, partners=[], checks=["takes_short_fits"])
    except ThawlineError as error:
        if "LayerError" not in str(error) and "SelectorError" not in str(error):
            raise
    else:
        check_algorithm(factory, model=build, partners=[])


@settings(max_examples=6)
@given(algorithms(KINDS))
def test_any_arguments_resume_and_come_back(algorithm: Algorithm) -> None:
    """Arguments drawn by type: described, rebuilt, pure, resumed."""
    description = algorithm.describe()
    checks = ["comes_back_from_its_description", "match_is_pure", "resumes", "survives_an_exception"]
    try:
        check_algorithm(lambda: Algorithm.from_description(description), checks=checks[:1])
        check_algorithm(lambda: Algorithm.from_description(description), checks=checks, partners=[])
    except ThawlineError as error:
        # What no model of this size takes is refused when the fit begins.
        if "SelectorError" not in str(error) and "ArgumentError" not in str(error):
            raise


@settings(max_examples=40)
@given(fits(algorithms(KINDS), models()))
def test_any_fit_works_or_is_refused_by_a_typed_error(fit: Fit) -> None:
    """Random models, algorithms, schedules and durations under debug: finite weights, or a typed refusal of ours."""
    try:
        fit.run()
    except ThawlineError as error:
        if isinstance(error, LedgerError) and "behind the ledger" in str(error):
            raise
        return
    assert all(bool(torch.isfinite(each).all()) for each in fit.model.parameters())


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_says_what_it_promises(name: str) -> None:
    """A check is documented by the promise that it tests."""
    assert (CHECKS[name].__doc__ or "").rstrip().endswith(".")


@pytest.mark.slow
@pytest.mark.parametrize("factory", ALL, ids=NAMES)
def test_no_audit_is_passed_over(factory: Callable[[], Any]) -> None:
    """Each audit runs to its end with the arguments that it tries first: a refusal would hide what it looks for."""
    rehearsal = Rehearsal(
        factory=factory, build_model=tiny_models()["residual"], loader=tiny_loader(24), loss_fn=cross_entropy, duration="3ep",
        seed=0, thorough=False, partners=[], accumulates=True, own_task=True,
    )  # fmt: skip
    for task, batches in ((uneven(rehearsal), 8), (next(unsized(rehearsal)), 8)):
        audit = Audit(rehearsal, task)
        with TemporaryDirectory() as folder:
            audit.run(Path(folder))
        assert (audit.faults, audit.batches) == ({}, batches)


class Refuses(Algorithm):
    """Ends a fit in which something else has frozen the head before it."""

    events = frozenset({Event.FIT_START})

    def apply(self, event: Event, state: State) -> None:
        if not any(name in state.ledger.trainable for name in state.layers.head.parameters):
            raise ThawlineError("the head is frozen already")


class FreezesHead(Algorithm):
    """Freezes the head."""

    events = frozenset({Event.FIT_START})

    def apply(self, event: Event, state: State) -> None:
        state.ledger.freeze("head", owner=self.owner)


def test_an_error_in_one_order_is_quoted() -> None:
    """Where the other order gives a result."""
    with pytest.raises(ConformanceError, match="One of the two raises ThawlineError: the head is frozen already"):
        check_algorithm(Refuses, partners=[FreezesHead], checks=["does_not_depend_on_order"])


@attrs.define(slots=False, eq=False)
class TrainsBeside(Algorithm):
    """Trains a little beside the weights that it steps from, along the last gradients, as sharpness-aware minimization does."""

    events = frozenset({Event.BATCH_START, Event.BEFORE_STEP, Event.FIT_ABORT})
    stage: ClassVar[Stage] = Stage.WEIGHTS
    last: dict[str, Tensor] = attrs.field(factory=dict, init=False)
    live: dict[str, Tensor] = attrs.field(factory=dict, init=False)

    @torch.no_grad()
    def apply(self, event: Event, state: State) -> None:
        parameters = state.ledger.parameters
        if event is Event.BATCH_START:
            for name in self.last.keys() & state.ledger.trainable:
                self.live[name] = parameters[name].clone()
                parameters[name].add_(self.last[name], alpha=0.05)
            return
        for name, live in self.live.items():
            parameters[name].copy_(live)
        self.live = {}
        if event is Event.BEFORE_STEP:
            self.last = {name: each.grad.clone() for name, each in parameters.items() if each.grad is not None}

    def state_dict(self) -> dict[str, Any]:
        return {"last": self.last}


def test_weights_that_a_batch_trains_at_may_be_put_back() -> None:
    """After an exception within the batch the model holds what the step would have begun from."""
    check_algorithm(
        TrainsBeside, partners=PARTNERS, checks=["survives_an_exception", "resumes", "puts_live_weights_back"]
    )


@attrs.define(slots=False, eq=False)
class Average(Algorithm):
    """Evaluates with the mean of the weights at some event."""

    moves: Event = Event.BATCH_END
    stage: ClassVar[Stage] = Stage.WEIGHTS
    count: int = attrs.field(default=0, init=False)
    average: dict[str, Tensor] = attrs.field(factory=dict, init=False)
    live: dict[str, Tensor] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self.events = frozenset({self.moves, Event.EVAL_START, Event.EVAL_END, Event.FIT_ABORT})

    @torch.no_grad()
    def apply(self, event: Event, state: State) -> None:
        parameters = state.ledger.parameters
        if event is self.moves:
            self.count += 1
            for name, each in parameters.items():
                mean = self.average.setdefault(name, each.detach().clone())
                mean += (each - mean) / self.count
        elif event is Event.EVAL_START:
            for name in self.average.keys() & parameters.keys():
                self.live[name] = parameters[name].detach().clone()
                parameters[name].copy_(self.average[name])
        else:
            for name, live in self.live.items():
                parameters[name].copy_(live)
            self.live = {}

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "average": self.average}

    def evaluated_weights(self) -> Mapping[str, Tensor]:
        return self.average


def test_an_average_that_moves_between_evaluation_and_checkpoint_is_told_where_to_move() -> None:
    """At EPOCH_END it comes after the evaluation, so the checkpoint names other weights than were measured."""
    checks = ["keeps_true_records", "puts_live_weights_back"]
    check_algorithm(Average, partners=PARTNERS, checks=checks)
    with pytest.raises(ConformanceError, match="move an average at BATCH_END: an evaluation comes before EPOCH_END"):
        check_algorithm(lambda: Average(Event.EPOCH_END), partners=PARTNERS, checks=checks)


@on(Event.BEFORE_FORWARD)
def mix_neighbors(state: State) -> None:
    """Mix each sample with another of its microbatch."""
    x, y = state.microbatch
    state.microbatch = [0.9 * x + 0.1 * x.flip(0), y]


def test_what_mixes_samples_may_say_that_the_parts_of_a_batch_count() -> None:
    """The kit says how, and asks no more of it then."""
    checks = ["does_not_count_microbatches", "repeats_what_does_not_fit"]
    with pytest.raises(ConformanceError, match=r"as mixup does: check_algorithm\(accumulates=False\)"):
        check_algorithm(mix_neighbors, checks=checks)
    check_algorithm(mix_neighbors, checks=checks, accumulates=False)
