"""The test kit itself: each fault is found by the check meant for it, and strategies, machine and trace work."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import attrs
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test
from torch import nn
from torch.nn.functional import cross_entropy

from broken_algorithms import BROKEN, Clinging, Forgetful, Sneaky
from helpers import same_weights
from thawline.algorithms import EMA, GradClip, LayerThaw, LoRAInject, TrainOnly
from thawline.engine import Algorithm, ArgumentError, Event, ParameterLedger, State, Time, Trainer, linear, on
from thawline.engine.doubles import mlp
from thawline.engine.drawn_fits import checked, drawn
from thawline.engine.rehearsal import Rehearsal
from thawline.engine.schedules import FACTORIES, Schedule
from thawline.engine.testing import (
    CHECKS,
    AlgorithmContract,
    ConformanceError,
    EngineMachine,
    Fit,
    MemoryTracker,
    Specimen,
    Trace,
    algorithms,
    check_algorithm,
    durations,
    fits,
    installed,
    models,
    schedules,
    specimen,
    times,
    tiny_loader,
    tiny_model,
    tiny_models,
)

PARTNERS = [specimen(each) for each in (LayerThaw, LoRAInject, EMA)]
SGD = partial(torch.optim.SGD, lr=0.1)


# -- checks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BROKEN)
def test_each_fault_is_found_by_the_check_meant_for_it(kind: type[Algorithm]) -> None:
    """The message names the algorithm and says how to mend it."""
    name = BROKEN[kind]
    with pytest.raises(ConformanceError) as caught:
        check_algorithm(kind, partners=PARTNERS, checks=[name])
    assert list(caught.value.failures) == [name]
    assert kind.__name__ in str(caught.value)
    assert len(caught.value.failures[name].split()) > 12


def test_drawn_schedules_are_their_closed_forms() -> None:
    """Of every kind, in every unit, also nested."""
    fits = [drawn(seed, number, samples=8, own=True) for seed in range(60) for number in range(3)]
    assert all(map(checked, fits))
    assert {fit.duration.unit for fit in fits} == {"ep", "ba", "sp"}
    assert {kind for kind in FACTORIES if kind not in str([fit.written for fit in fits])} == set()


def test_nearly_every_check_has_a_fault() -> None:
    """Names of checks, not of anything else; the one left is tried where numbers are."""
    assert set(CHECKS) - set(BROKEN.values()) == {"trains_in_bf16"}


def test_a_fault_is_found_in_the_middle_of_all_checks() -> None:
    """All checks run, also after one that failed; failures are told by name."""
    with pytest.raises(ConformanceError) as caught:
        check_algorithm(Clinging, partners=[])
    assert {"leaves_nothing_behind", "survives_an_exception"} <= set(caught.value.failures)
    assert "hooks of the model" in str(caught.value)
    assert [str(each.path) for each in caught.traceback.filter(caught)] == [__file__]  # what pytest shows


def test_the_fault_by_hand_is_named_with_parameter_and_call() -> None:
    """An edit of requires_grad is told as what to write instead."""
    with pytest.raises(ConformanceError, match=r"'head\.weight'.*ledger\.freeze\('head\.weight'.*EPOCH_END"):
        check_algorithm(Sneaky, partners=[], checks=["keeps_the_ledger_whole"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda group, _: group.update(weight_decay=0.5),
            r"weight_decay of the group of '0\.weight'.*ledger\.set_options\('0\.weight', weight_decay=0\.5",
        ),
        (lambda group, _: group.update(nesterov=True), r"nesterov of the group of '0\.weight'.*Trainer\(optimizer="),
        (lambda group, _: group.update(lr=0.5), r"learning rate of the group of '0\.weight'.*ledger\.set_lr"),
        (lambda group, _: group["params"].pop(), r"'4\.bias' trains but is in no.*ledger\.freeze\('4\.bias'"),
        (
            lambda group, optimizer: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
            r"optimizer 0 \(SGD\) was given a parameter that the model does not have.*ledger\.attach",
        ),
        (lambda group, optimizer: optimizer.param_groups.clear(), r"that of '0\.weight'.*ledger\.freeze"),
    ],
)
def test_an_edit_of_the_optimizers_groups_is_named(edit: Callable[[Any, Any], object], message: str) -> None:
    """Under debug=True the next event says which parameter's group was edited, and what to write instead."""

    class Editor(Algorithm):
        events = frozenset({Event.BATCH_END})

        def apply(self, event: Event, state: Any) -> None:
            edit(state.optimizers[0].param_groups[0], state.optimizers[0])

    trainer = Trainer(
        algorithms=[Editor()], optimizer=SGD, loss_fn=nn.functional.cross_entropy, progress=False, debug=True
    )
    with pytest.raises(Exception, match=message) as caught:
        trainer.fit(tiny_models()["mlp"](), tiny_loader(), duration=1)
    assert "in Editor.apply at BATCH_END" in caught.value.__notes__[0]


def test_an_edit_in_a_hook_is_found_at_the_next_event() -> None:
    """What no algorithm did in its turn is found before the next one's."""
    model = tiny_models()["mlp"]()
    freeze = partial(model[0].weight.requires_grad_, False)
    model.register_forward_hook(lambda *_: [freeze(), None][1])
    trainer = Trainer(optimizer=SGD, loss_fn=nn.functional.cross_entropy, progress=False, debug=True)
    with pytest.raises(Exception, match=r"'0\.weight' has requires_grad=False") as caught:
        trainer.fit(model, tiny_loader(), duration=1)
    assert "found at AFTER_FORWARD, before any algorithm's turn" in caught.value.__notes__[0]


def test_checks_are_chosen_by_name() -> None:
    """Another name lists the nearest."""
    check_algorithm(partial(GradClip, 1.0), checks=["match_is_pure"])
    with pytest.raises(ArgumentError, match="'match_is_pure'"):
        check_algorithm(partial(GradClip, 1.0), checks=["match_is_pur"])


@attrs.define(slots=False, eq=False)
class Refusing(Algorithm):
    """Refuses all but a positive integer by a plain ValueError."""

    size: int = 1
    names_it: ClassVar[bool] = True
    ends: int = attrs.field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"{'size' if self.names_it else 'it'} is {self.size}")
        self.events = frozenset({Event.FIT_END})

    def apply(self, event: Event, state: State) -> None:
        self.ends += 1

    def state_dict(self) -> dict[str, Any]:
        return {"ends": self.ends}


class Vague(Refusing):
    """Does not say which argument."""

    names_it = False


class Moody(Algorithm):
    """Fails at the start of every fit but the first."""

    events = frozenset({Event.FIT_START})
    fits: ClassVar[int] = 0

    def apply(self, event: Event, state: State) -> None:
        Moody.fits += 1
        if Moody.fits > 1:
            raise ArithmeticError("in a bad mood")


class Fickle(Algorithm):
    """Stops every fit but the first after its first batch."""

    events = frozenset({Event.FIT_START, Event.BATCH_END})
    fits: ClassVar[int] = 0

    def apply(self, event: Event, state: State) -> None:
        Fickle.fits += event is Event.FIT_START
        if event is Event.BATCH_END and Fickle.fits > 1:
            state.stop("enough")


@pytest.mark.parametrize(
    ("kind", "message"), [(Moody, "in a bad mood"), (Fickle, "comes at other times in a second fit")]
)
def test_a_fit_that_ends_before_the_exception_says_why(kind: type[Algorithm], message: str) -> None:
    """The error of the fit, or that its events come otherwise; not that the check found no ledger."""
    kind.fits = 0  # type: ignore[attr-defined]
    with pytest.raises(ConformanceError) as caught:
        check_algorithm(kind, partners=[], checks=["survives_an_exception"])
    assert message in str(caught.value)
    assert "KeyError" not in str(caught.value)


def test_a_plain_error_that_names_the_argument_will_do() -> None:
    """ValueError is enough, but not one from which nobody learns what was wrong."""
    check_algorithm(Refusing, checks=["refuses_bad_arguments"])
    with pytest.raises(ConformanceError, match="which does not name the argument"):
        check_algorithm(Vague, checks=["refuses_bad_arguments"])


def test_what_is_compared_is_how_the_fit_ends() -> None:
    """After everybody's last turn, which is FIT_END."""
    rehearsal = Rehearsal(
        Refusing, mlp, tiny_loader(), cross_entropy, "1ep", 0, thorough=False, partners=[], accumulates=True
    )
    (states,) = rehearsal.whole.result["algorithms"].values()
    assert states == {"ends": 1}


@pytest.mark.parametrize("factory", [GradClip(1.0), 3, lambda: 3, list])
def test_what_builds_no_algorithm_is_refused(factory: Any) -> None:
    """An instance says to pass a function."""
    with pytest.raises(ArgumentError, match=r"check_algorithm\(factory\)"):
        check_algorithm(factory)


@pytest.mark.parametrize(
    "checks", ["resumes", 3, [], [None], [["resumes"]], [CHECKS["resumes"]], ["resumes", "resume"]]
)
def test_what_is_no_list_of_checks_is_refused_before_any_runs(checks: Any) -> None:
    """Also where the first name is right."""
    Moody.fits = 0
    with pytest.raises(ArgumentError, match=r"Write: check_algorithm\(MyAlgorithm, checks=\['\w+'\]\)"):
        check_algorithm(Moody, checks=checks)
    assert Moody.fits == 0


@pytest.mark.slow
def test_an_error_of_a_process_alone_is_told_as_what_it_is() -> None:
    """Not with what to do where two ranks differ."""
    Moody.fits = 1
    with pytest.raises(ConformanceError, match="ArithmeticError: in a bad mood") as caught:
        check_algorithm(Moody, checks=["stays_equal_on_two_ranks"])
    assert "Every rank" not in str(caught.value)


def test_a_model_and_data_of_ones_own() -> None:
    """What needs another model is given it, and the batches that fit it."""
    batches = [(torch.randn(8, 3), torch.randint(5, (8,))) for _ in range(3)]
    build = lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))  # noqa: E731
    check_algorithm(LayerThaw, model=build, loader=batches, partners=PARTNERS[2:])


def test_the_global_generators_are_left_alone() -> None:
    """The kit's fits seed and draw; afterwards the caller's generators stand where they stood."""
    before = torch.get_rng_state()
    check_algorithm(EMA, partners=[], checks=["resumes", "does_not_count_microbatches", "keeps_instances_apart"])
    assert torch.equal(torch.get_rng_state(), before)


class TestGradClip(AlgorithmContract):
    """Each check is a test of its own."""

    factory = staticmethod(partial(GradClip, 1.0))
    partners = PARTNERS


def test_the_contract_has_a_test_for_each_check() -> None:
    """They are methods, with the checks' docstrings."""
    tests = {name for name in dir(TestGradClip) if name.startswith("test_")}
    assert tests == {f"test_{name}" for name in CHECKS}
    assert TestGradClip.test_resumes.__doc__ == CHECKS["resumes"].__doc__  # type: ignore[attr-defined]


def test_the_contract_fails_where_the_check_does() -> None:
    """The attributes of the class are the arguments of check_algorithm."""

    class Broken(AlgorithmContract):
        factory = Forgetful
        partners = PARTNERS

    with pytest.raises(ConformanceError, match="resumed at batch"):
        Broken().test_resumes()  # type: ignore[attr-defined]
    Broken().test_match_is_pure()  # type: ignore[attr-defined]


# -- specimens and strategies ------------------------------------------------------------------------------------------


def test_a_specimen_reads_the_example_of_the_error() -> None:
    """Needed arguments come from the ArgumentError's corrected call; long times become short."""
    found = {each.__name__: specimen(each) for each in (*installed(), TrainOnly)}
    assert {"EMA", "GradClip", "LayerThaw"} <= set(found)
    assert repr(found["GradClip"]) == "GradClip(max_norm=1.0)"
    assert repr(found["TrainOnly"]) == "TrainOnly(select='head')"
    assert all(isinstance(each(), Algorithm) for each in found.values())


def test_an_example_that_is_no_call_is_refused() -> None:
    """The text of an error is read, never run."""

    class Odd(Algorithm):
        def __init__(self, size: int) -> None:
            raise ArgumentError("Odd(size=)", got=size, takes="a number", example="Odd(size=print('run'))")

    with pytest.raises(ArgumentError, match=r"ArgumentError\(example=\)"):
        specimen(Odd)
    assert isinstance(specimen(EMA), Specimen)


@given(durations(), times())
def test_times_are_above_zero(duration: Time, time: Time) -> None:
    """Durations are no shares of themselves."""
    assert duration.value > 0 < time.value
    assert duration.unit != "dur"


@settings(max_examples=50)
@given(schedules(), st.integers(1, 10))
def test_schedules_are_factors(schedule: Any, batches: int) -> None:
    """Finite and not negative wherever a fit may stand."""
    assert all(0 <= schedule(step / batches) < float("inf") for step in range(batches + 1))


@settings(max_examples=30)
@given(models())
def test_models_take_a_batch_of_the_tiny_loader(model: nn.Module) -> None:
    """Logits of two classes, and layers that a ledger finds."""
    x, _ = next(iter(tiny_loader()))
    assert model(x).shape == (8, 2)
    assert ParameterLedger(model, SGD).trainable


def test_drawing_a_model_leaves_the_global_generator_alone() -> None:
    """Weights are drawn from a seed."""
    torch.manual_seed(7)
    before = torch.get_rng_state()

    @settings(max_examples=3)
    @given(models())
    def draw(_: nn.Module) -> None:
        assert torch.equal(torch.get_rng_state(), before)

    draw()


def test_a_failing_example_shrinks_to_a_plain_one() -> None:
    """The least that fails is shown, as calls that make it."""
    found: list[Fit] = []

    @settings(max_examples=50, database=None, phases=[Phase.generate, Phase.shrink])
    @given(fits(algorithms([LayerThaw])), schedules())
    def fails(fit: Fit, schedule: Schedule) -> None:
        if fit.duration.unit == "ep" and schedule.name == "join":
            found.append(fit)
            raise AssertionError

    with pytest.raises(AssertionError) as caught:
        fails()
    assert found[-1].algorithms[0].describe() == LayerThaw().describe()
    for shown in (
        "model=tiny_model('mlp', 0, depth=2),", " algorithms=LayerThaw(", "duration=Time('1ep'),", " schedule=constant(),",
        "schedule=join((constant(), constant()), (0.5,)),",
    ):  # fmt: skip
        assert shown in caught.value.__notes__[0]


def test_a_shown_model_is_built_again() -> None:
    """The same numbers each time, and the names of all where there is none of that name."""
    first, second = (tiny_model("tied", 3, depth=2).state_dict() for _ in range(2))
    assert same_weights(first, second)
    with pytest.raises(ArgumentError, match=r"tiny_model\(name\).*transformer.*tiny_model\('mlp', 0\)"):
        tiny_model("gpt", 0)


@settings(max_examples=25)
@given(fits())
def test_a_drawn_fit_runs(fit: Fit) -> None:
    """None that its algorithm refuses is drawn."""
    assert fit.run().clock.batch > 0


def test_a_refusal_by_ones_own_algorithm_is_a_failure() -> None:
    """What the user gives is not passed over."""

    @settings(max_examples=1, database=None, phases=[Phase.generate])
    @given(fits(st.builds(LayerThaw, start=st.just(9))))
    def fails(fit: Fit) -> None:
        fit.run()

    with pytest.raises(ArgumentError, match=r"LayerThaw\(start=\) takes at most"):
        fails()


# -- machine -----------------------------------------------------------------------------------------------------------

TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


class BesideAlgorithms(EngineMachine):
    """With built-in algorithms beside the rules, and a rule of one's own."""

    def algorithms(self) -> list[Algorithm]:
        return [EMA(), GradClip(1.0), LayerThaw(every="3ba")]

    @rule(owner=st.sampled_from(["a", "b"]))
    def freeze_the_head(self, owner: str) -> None:
        """A rule that a user adds tells the oracle too."""
        self.ledger.freeze("head", owner=owner)
        self.oracle.freeze("head", self.ledger.select("head"), owner)


TestBesideAlgorithms = BesideAlgorithms.TestCase
TestBesideAlgorithms.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)


def test_the_machine_finds_a_ledger_that_disagrees() -> None:
    """A rule that forgets to tell the oracle is found, and shrinks to itself."""

    class Forgetful(EngineMachine):
        @rule()
        def freeze_in_secret(self) -> None:
            self.ledger.freeze("*", owner="a")

    with pytest.raises(AssertionError):
        run_state_machine_as_test(Forgetful, settings=settings(max_examples=20, database=None, deadline=None))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (lambda ledger: ledger.set_lr("*", 0.5, owner="a"), "trains at 0.5"),
        (lambda ledger: ledger.set_options("*", weight_decay=0.5, owner="b"), "trains with weight_decay=0.5, not 0"),
        (lambda ledger: ledger.set_schedule("*", linear(end=0.5), span="7ba", owner="c"), r"trains at 0\.046"),
    ],
    ids=["rate", "option", "schedule"],
)
def test_the_machine_compares_what_was_set(setting: Callable[[Any], None], message: str) -> None:
    """A rate, an option or a schedule that the oracle was not told is found by the second step."""
    machine = EngineMachine()
    machine.begin(model="mlp", optimizer="sgd")
    machine.agrees_with_the_oracle()
    setting(machine.ledger)

    def go_on() -> None:
        for _ in range(2):
            machine.agrees_with_the_oracle()
            machine.step()

    with pytest.raises(AssertionError, match=message):
        go_on()
    machine.teardown()


def test_the_machine_finds_an_edit_behind_the_ledger() -> None:
    """The invariant after each rule verifies the ledger."""

    class Sneaky(EngineMachine):
        @rule()
        def edit(self) -> None:
            next(iter(self.ledger.parameters.values())).requires_grad_(False)

    with pytest.raises(Exception, match="behind the ledger"):
        run_state_machine_as_test(Sneaky, settings=settings(max_examples=20, database=None, deadline=None))


# -- doubles -----------------------------------------------------------------------------------------------------------


def test_a_trace_lists_what_changed() -> None:
    """Golden lines of a thaw with surgery; schedules, which change every batch, are not in it."""
    trace = Trace([Event.FIT_END])
    trainer = Trainer(
        algorithms=[LoRAInject(rank=2, target="0"), LayerThaw(), trace], optimizer=SGD,
        loss_fn=nn.functional.cross_entropy, progress=False,
    )  # fmt: skip
    trainer.fit(tiny_models()["mlp"](), tiny_loader(16), duration="4ep")
    assert trace == [
        "FIT_START 0: freeze blocks[0], blocks[1]; lr 0.1 head; attach lora to 0; attach lora_saved to 4",
        "EPOCH_START 2: thaw 0.lora_A, 0.lora_B; lr 0.05 0.lora_A, 0.lora_B",
        "FIT_END 8",
    ]
    assert (len(trace), trace[-1], trace[:1]) == (3, "FIT_END 8", trace.lines[:1])
    assert "\n    'FIT_END 8',\n" in repr(trace)
    assert trace != ["FIT_END 8"]


def test_a_trace_says_who_stops() -> None:
    """The reason of a stop is a change."""

    @on(Event.BATCH_END)
    def stop_at_once(state: Any) -> None:
        state.stop("enough")

    trace = Trace()
    tracker = MemoryTracker()
    trainer = Trainer(
        algorithms=[stop_at_once(), trace], loss_fn=nn.functional.cross_entropy, progress=False, trackers=[tracker]
    )
    trainer.fit(tiny_models()["mlp"](), tiny_loader(), duration=2)
    assert trace[-1] == "BATCH_END 1: stop (enough)"


def test_a_trace_keeps_the_contract() -> None:
    """It is an algorithm like any other: it resumes in the middle of its lines."""
    check_algorithm(partial(Trace, [Event.EPOCH_END]), partners=PARTNERS)
    with pytest.raises(ArgumentError, match=r"Trace\(events=\)"):
        Trace("epoch_end")


def test_without_hypothesis_the_import_says_what_to_install() -> None:
    """A package that is missing is named with its extra."""
    script = """
        import sys
        sys.modules["hypothesis"] = None
        import thawline.engine
        try:
            import thawline.engine.testing
        except thawline.engine.MissingExtraError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, capture_output=True, text=True)
    assert "pip install 'thawline[test]'" in done.stdout, done.stderr
