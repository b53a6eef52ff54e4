"""Engine, Algorithm and State in a loop of one's own: order, ownership, errors, closing, description."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, ClassVar

import attrs
import pytest
import torch
from torch import nn

from helpers import mlp, same_weights, weights
from thawline.algorithms import GradClip
from thawline.engine import (
    Algorithm,
    ArgumentError,
    CheckpointError,
    Engine,
    Event,
    LedgerClosedError,
    LedgerError,
    ParameterLedger,
    Stage,
    State,
    Time,
    Trainer,
    UnknownArgumentError,
    linear,
    on,
    register,
    registered,
    registered_names,
)
from thawline.engine.testing import tiny_loader, tiny_models


def state_of(model: nn.Module | None = None, **more: Any) -> State:
    """Return a state over a small model."""
    model = mlp() if model is None else model
    return State(model, ParameterLedger(model, partial(torch.optim.SGD, lr=0.1), **more), duration="2ep")  # type: ignore[arg-type]


class Note(Algorithm):
    """Writes its name down."""

    def __init__(self, name: str, seen: list[Any], events: frozenset[Event] = frozenset({Event.BATCH_END})) -> None:
        self.name, self.seen, self.events = name, seen, events

    def apply(self, event: Event, state: State) -> None:
        """Write."""
        self.seen.append(self.name)

    def close(self) -> None:
        """Write that, too."""
        self.seen.append(f"close {self.name}")


class Surgeon(Note):
    """Acts first."""

    stage: ClassVar[Stage] = Stage.SURGERY


class Observer(Note):
    """Acts last."""

    stage: ClassVar[Stage] = Stage.OBSERVE


def test_order_is_by_stage_then_by_place_in_the_list() -> None:
    """SURGERY before CONTROL before OBSERVE; equal stages in list order."""
    seen: list[str] = []
    algorithms = [Observer("last", seen), Note("one", seen), Surgeon("first", seen), Note("two", seen)]
    with Engine(algorithms, state_of()) as engine:
        engine.emit(Event.BATCH_END)
        engine.emit(Event.BATCH_START)
    assert seen == ["first", "one", "two", "last", "close two", "close first", "close one", "close last"]


def test_what_fails_while_closing_is_raised_or_noted() -> None:
    """Alone it is the error; beside one of the block it is a note on that."""

    class Stuck(Note):
        def close(self) -> None:
            raise OSError("stuck")

    with pytest.raises(OSError, match="stuck"), Engine([Stuck("one", [])], state_of()):
        pass
    with pytest.raises(ValueError, match="first") as caught, Engine([Stuck("one", [])], state_of()):
        raise ValueError("first")
    assert caught.value.__notes__ == ["closing failed as well: OSError('stuck')"]


def test_averaged_weights_are_in_place_for_everybody_during_an_evaluation_only() -> None:
    """At EVAL_START and EVAL_END the stage WEIGHTS acts before all others, SURGERY included."""

    class Swap(Note):
        stage: ClassVar[Stage] = Stage.WEIGHTS

    seen: list[str] = []
    events = frozenset({Event.EVAL_START, Event.EVAL_END, Event.BATCH_END})
    engine = Engine([Surgeon("first", seen, events), Swap("swap", seen, events)], state_of())
    for event in (Event.EVAL_START, Event.EVAL_END, Event.BATCH_END):
        engine.emit(event)
    assert seen == ["swap", "first", "swap", "first", "first", "swap"]


def test_owners_are_unique_and_numbered() -> None:
    """Two of a kind keep their holds and their saved state apart."""
    algorithms = [Note("a", []), Note("b", []), Surgeon("c", [])]
    engine = Engine(algorithms, state_of())
    assert [each.owner for each in algorithms] == ["Note", "Note#2", "Surgeon"]
    assert list(engine.state_dict()) == ["Note", "Note#2", "Surgeon"]


def test_match_decides_whether_apply_is_called() -> None:
    """An algorithm that overrides match acts only where it says so."""

    class Third(Note):
        def match(self, event: Event, state: State) -> bool:
            return state.clock.batch % 3 == 0

    seen: list[str] = []
    state = state_of()
    with Engine([Third("x", seen)], state) as engine:
        for _ in range(7):
            state.tick(samples=1)
            engine.emit(Event.BATCH_END)
    assert seen == ["x", "x", "close x"]


def test_the_trace_lists_who_acted_when() -> None:
    """trace=True: event, batch and owner of each call."""
    state = state_of()
    engine = Engine([Note("a", []), Surgeon("b", [])], state, trace=True)
    engine.emit(Event.BATCH_END)
    state.tick(samples=1)
    engine.emit(Event.BATCH_END)
    assert engine.trace is not None
    assert [(each.event, each.batch, each.owner) for each in engine.trace] == [
        (Event.BATCH_END, 0, "Surgeon"),
        (Event.BATCH_END, 0, "Note"),
        (Event.BATCH_END, 1, "Surgeon"),
        (Event.BATCH_END, 1, "Note"),
    ]


def test_debug_finds_what_goes_on_behind_the_ledger() -> None:
    """An algorithm that sets requires_grad itself is named at once, with the call to use."""

    class Sneaky(Algorithm):
        events = frozenset({Event.BATCH_END})

        def apply(self, event: Event, state: State) -> None:
            next(iter(state.model.parameters())).requires_grad_(False)

    engine = Engine([Sneaky()], state_of(), debug=True)
    with pytest.raises(LedgerError, match=r"'0\.weight' has requires_grad=False.*ledger\.freeze") as caught:
        engine.emit(Event.BATCH_END)
    assert "Sneaky.apply at BATCH_END" in caught.value.__notes__[0]


def test_debug_finds_what_the_loop_does_to_options_but_not_what_a_step_does() -> None:
    """An edit in nobody's turn is found at the next event; a step may keep numbers of its own in the groups."""
    state = state_of()
    (group,) = state.optimizers[0].param_groups
    engine = Engine([], state, debug=True)
    engine.emit(Event.BATCH_START)
    engine.emit(Event.BEFORE_STEP)
    group["weight_decay"] = 0.25  # as a step that adapts it would
    engine.emit(Event.BATCH_END)
    group["weight_decay"] = 5.0
    with pytest.raises(LedgerError, match=r"from 0\.25 to 5\.0 .*ledger\.set_options\(") as caught:
        engine.emit(Event.BATCH_START)
    assert "found at BATCH_START, before any algorithm's turn" in caught.value.__notes__[0]


def test_the_ledger_is_closed_to_a_loss_function_as_well() -> None:
    """Whoever calls during the forward pass, algorithm or not, gets the typed error."""
    held: dict[str, State] = {}

    class Keep(Algorithm):
        events = frozenset({Event.FIT_START})

        def apply(self, event: Event, state: State) -> None:
            held["state"] = state

    def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        held["state"].ledger.freeze("head", owner="loss")
        return outputs.sum()

    trainer = Trainer(algorithms=[Keep()], loss_fn=loss_fn, progress=False)
    with pytest.raises(LedgerClosedError, match="at BEFORE_FORWARD"):
        trainer.fit(mlp(), [(torch.ones(2, 4), torch.zeros(2))], duration=1)


def test_every_close_runs_and_the_first_error_is_raised() -> None:
    """A close that raises does not keep the others from closing."""

    class Bad(Note):
        def close(self) -> None:
            super().close()
            raise ValueError(self.name)

    seen: list[str] = []
    engine = Engine([Note("a", seen), Bad("b", seen), Bad("c", seen)], state_of())
    with pytest.raises(ValueError, match="c"):
        engine.close()
    assert seen == ["close c", "close b", "close a"]
    engine.close()
    assert len(seen) == 3


def test_an_engine_in_a_loop_by_hand_equals_the_trainer() -> None:
    """Events in somebody's own loop: learning rates, modes and algorithms as in the Trainer, bit for bit."""

    class Thaw(Algorithm):
        events = frozenset({Event.FIT_START, Event.EPOCH_START})

        def apply(self, event: Event, state: State) -> None:
            if event is Event.FIT_START:
                state.ledger.freeze("blocks", owner=self.owner)
            elif state.clock.epoch == 1:
                state.ledger.thaw("blocks[-1]", owner=self.owner, warmup="2ba")

    torch.manual_seed(0)
    net = mlp()
    twin = copy.deepcopy(net)
    batches = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(4)]
    loss_fn = nn.functional.cross_entropy
    trainer = Trainer(
        algorithms=[Thaw()],
        optimizer=partial(torch.optim.SGD, lr=0.1),
        schedule=linear(),
        loss_fn=loss_fn,
        progress=False,
    )
    trainer.fit(net, batches, duration="2ep")
    ledger = ParameterLedger(twin, partial(torch.optim.SGD, lr=0.1), schedule=linear())
    state = State(twin, ledger, duration="2ep")  # type: ignore[arg-type]
    state.clock = state.clock._replace(batches_per_epoch=len(batches))
    with Engine([Thaw()], state) as engine:
        engine.emit(Event.FIT_START)
        for _ in range(2):
            engine.emit(Event.EPOCH_START)
            for x, y in batches:
                engine.emit(Event.BATCH_START)
                loss_fn(twin(x), y).backward()
                ledger.optimizers[0].step()
                ledger.clear_gradients()
                state.tick(samples=len(x))
                engine.emit(Event.BATCH_END)
            state.tick_epoch()
            engine.emit(Event.EPOCH_END)
    assert same_weights(weights(net), weights(twin))


@register
@attrs.define(slots=False, eq=False)
class Described(Algorithm):
    """Has arguments of every form."""

    events = frozenset({Event.BATCH_END})
    every: Time = attrs.field(default=Time("1ep"), converter=Time)
    names: tuple[str, ...] = ("a", "b")
    when: Any = None
    seen: int = attrs.field(default=0, init=False)

    def apply(self, event: Event, state: State) -> None:
        """Count."""
        self.seen += 1

    def state_dict(self) -> dict[str, Any]:
        """Return what it saw."""
        return {"seen": self.seen}


def test_a_description_is_json_and_comes_back_equal() -> None:
    """describe and from_description invert each other through the registry."""
    first = Described("0.5dur", names=("x",))  # type: ignore[arg-type]
    description = first.describe()
    assert description == {"name": "Described", "arguments": {"every": "0.5dur", "names": ["x"], "when": None}}
    again = Algorithm.from_description(description)
    assert isinstance(again, Described)
    assert again.describe() == description
    assert again.every == Time("0.5dur")


def test_a_class_without_a_constructor_takes_no_arguments() -> None:
    """It describes itself with none, and one that is given is an error, not lost."""

    class Plain(Algorithm):
        events = frozenset({Event.FIT_END})

        def apply(self, event: Event, state: State) -> None:
            """Do nothing."""

    assert Plain().describe() == {"name": "Plain", "arguments": {}}
    with pytest.raises(TypeError, match="argument"):
        Plain(3)  # type: ignore[call-arg]


def test_a_description_never_names_an_import_path() -> None:
    """Only what is registered can be built: a stranger's recipe cannot run code."""
    for name in ("os.system", "Descrbed", ""):
        with pytest.raises(ArgumentError, match="algorithm name"):
            Algorithm.from_description({"name": name, "arguments": {}})
    with pytest.raises(ArgumentError, match="'Described'"):
        registered("Descrbed")
    callable_description = Described(when=print).describe()
    assert callable_description["arguments"]["when"] == {"callable": "builtins.print"}  # type: ignore[index,call-overload]
    with pytest.raises(ArgumentError, match="callable"):
        Algorithm.from_description(callable_description)
    assert "Described" in registered_names()


def test_a_name_is_registered_once() -> None:
    """A second class of the same name is refused, the same class again is not."""
    assert register(Described) is Described
    other = type("Described", (Algorithm,), {"__module__": "somebody.else"})
    with pytest.raises(ArgumentError, match="name is free"):
        register(other)


def test_reset_returns_to_the_arguments() -> None:
    """State goes, arguments and owner stay, for attrs classes and plain ones."""
    algorithm = Described("2ep")  # type: ignore[arg-type]
    algorithm.seen, algorithm.owner = 5, "Described#2"
    algorithm.reset()
    assert (algorithm.seen, str(algorithm.every), algorithm.owner) == (0, "2ep", "Described#2")
    algorithm.load_state_dict({"seen": 3})
    assert algorithm.seen == 3


@pytest.mark.parametrize("algorithms", [3, ["EMA"], [[Note("a", [])]], Note("a", []), torch.tensor(1.0)])
def test_what_is_no_list_of_algorithms_is_refused(algorithms: Any) -> None:
    """A preset's list inside the list says to unpack it."""
    with pytest.raises(ArgumentError, match="algorithms="):
        Engine(algorithms, state_of())


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ("BATCH_START", r"got 'BATCH_START'. Write: events = frozenset\({Event.BATCH_START}\)"),
        (Event.BATCH_START, r"Write: events = frozenset\({Event.BATCH_START}\)"),
        (["batch_start"], r"got 'batch_start'. Write: events = frozenset\({Event.BATCH_START}\)"),
        ({Event.BATCH_END, "EPOCH_STRT"}, r"got 'EPOCH_STRT'. Write: events = frozenset\({Event.EPOCH_START}\)"),
        (iter([Event.BATCH_END]), "a set of members of Event, got "),
        (None, "a set of members of Event, got "),
        (3, "a set of members of Event, got "),
        (frozenset(), "at least one Event to act at"),
    ],
)
def test_events_that_are_none_are_refused_with_the_nearest(events: Any, message: str) -> None:
    """An algorithm that would never be told of anything says so when the engine is built."""

    class Deaf(Algorithm):
        def __init__(self) -> None:
            self.events = events

        def apply(self, event: Event, state: State) -> None:
            """Act."""

    with pytest.raises(ArgumentError, match=rf"^Deaf.events takes .*{message}"):
        Engine([Deaf()], state_of())


def test_an_algorithm_that_does_not_act_is_refused() -> None:
    """A misspelled method is named; one that only sets up hooks in attach needs no events."""

    class Misspelled(Algorithm):
        events = frozenset({Event.BATCH_END})

        def aply(self, event: Event, state: State) -> None:
            """Act, under another name."""

    class Empty(Algorithm):
        pass

    class Hooks(Algorithm):
        def attach(self, state: State) -> None:
            """Set up hooks."""

    class Short(Algorithm):
        events = frozenset({Event.BATCH_END})

        def apply(self, state: State) -> None:  # type: ignore[override]
            pass

    with pytest.raises(ArgumentError, match=r"Short.apply takes a method of an event and the state, got .apply\(state"):
        Trainer(algorithms=[Short()])
    with pytest.raises(ArgumentError, match=r"Misspelled.apply takes a method .*, got 'aply'. Write: def apply\(self,"):
        Engine([Misspelled()], state_of())
    with pytest.raises(ArgumentError, match=r"Empty.apply takes a method .*, got None"):
        Trainer(algorithms=[Empty()])
    with Engine([Hooks()], state_of()) as engine:
        engine.emit(Event.BATCH_END)


def test_one_instance_twice_is_refused() -> None:
    """State is kept per instance."""
    note = Note("a", [])
    with pytest.raises(ArgumentError, match="each instance once"):
        Engine([note, note], state_of())


def test_changed_algorithms_refuse_to_resume_with_a_diff() -> None:
    """The message says which differ, and how."""
    saved = Engine([Described("2ep")], state_of()).state_dict()  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"Described\(every=\): saved '2ep', given '3ep'"):
        Engine([Described("3ep")], state_of()).load_state_dict(saved)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="Described is missing"):
        Engine([], state_of()).load_state_dict(saved)


def test_logged_values_are_kept_and_taken_once() -> None:
    """metrics keep the latest, take_logged gives what is new."""
    state = state_of()
    state.log({"a": torch.tensor(1.5), "b": 2})
    assert state.take_logged() == {"a": 1.5, "b": 2.0}
    assert state.take_logged() == {}
    state.stop("first")
    state.stop("second")
    assert (state.metrics["a"], state.stop_reason) == (1.5, "first")


@pytest.mark.parametrize("value", ["high", None, torch.zeros(2), 10**400])
def test_what_is_no_number_is_not_logged(value: Any) -> None:
    """The error shows the name."""
    with pytest.raises(ArgumentError, match=r"^state.log takes one number under each name, got {'a': "):
        state_of().log({"a": value})


def test_every_event_is_in_the_loop_of_the_docstring() -> None:
    """The enum's docstring is the loop: no event is missing, and open events say so."""
    lines = {line.split()[0].lstrip("[("): line for line in (Event.__doc__ or "").splitlines() if line.strip()}
    text = Event.__doc__ or ""
    for event in Event:
        assert event.name in text
    for name in ("FIT_START", "EPOCH_START", "BATCH_START", "BATCH_END", "EPOCH_END"):
        assert Event[name].opens_ledger
        assert "ledger open" in lines[name]
    assert sum(event.opens_ledger for event in Event) == 5


def test_an_unknown_argument_of_an_algorithm_is_answered_with_those_there_are() -> None:
    """Also of one that another library calls otherwise."""
    with pytest.raises(
        UnknownArgumentError, match=r"GradClip takes no 'clip', only max_norm, value, norm_type, .*; got 1"
    ):
        GradClip(clip=1.0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("answer", ["average", {"weight": 1.0}, None, [("weight", torch.zeros(2))]])
def test_evaluated_weights_that_are_no_tensors_by_name_are_refused(answer: Any) -> None:
    """The error names the algorithm and what its method returns instead."""

    class Averaging(GradClip):
        def evaluated_weights(self) -> Any:
            return answer

    with pytest.raises(
        ArgumentError, match=r"^Averaging.evaluated_weights\(\) takes a mapping of .* Write: return dict\("
    ):
        Engine([Averaging(1.0)], state_of()).evaluated_weights()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_algorithm_knows_whether_a_batch_is_several_of_the_loader(accumulate: int) -> None:
    """A loader's own batch is a list as well, so its type does not tell."""
    found: list[tuple[int, int]] = []

    @on(Event.BATCH_START)
    def look_at_accumulate(state: State) -> None:
        batches = state.batch if state.accumulate > 1 else [state.batch]
        found.append((state.accumulate, sum(len(x) for x, _ in batches)))

    trainer = Trainer(
        loss_fn=nn.functional.cross_entropy, algorithms=[look_at_accumulate()], accumulate=accumulate, progress=False
    )
    trainer.fit(tiny_models()["mlp"](), tiny_loader(16, 4), duration="1ep")
    assert found == [(accumulate, 4 * accumulate)] * (4 // accumulate)
