"""The checks of the conformance kit: arguments, what happens at events, saving, and other algorithms."""

from __future__ import annotations

import inspect
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from .algorithm import Algorithm, as_json
from .batches import Unloaded
from .doubles import augmented_loader
from .errors import LedgerError, ThawlineError, shorten
from .events import Event
from .neighbor import Before, Neighbor
from .promises import REFUSALS, check, fail, same
from .randomness import Randomness, derive_seed
from .rehearsal import BY_TURNS, LIVE_EVENTS, Outcome, Rehearsal, copied, difference, weights_of
from .resuming import FUNCTION, goes_on
from .specimens import Nothing, Specimen
from .state import State
from .variants import halves, other_calls, together

# -- arguments ---------------------------------------------------------------------------------------------------------


@check
def comes_back_from_its_description(rehearsal: Rehearsal) -> None:
    """describe() is JSON that names every argument; from_description() builds an equal algorithm."""
    for algorithm in rehearsal.make():
        _comes_back(algorithm)


def _comes_back(algorithm: Algorithm) -> None:
    name, description = type(algorithm).__name__, algorithm.describe()
    arguments, bound = description.get("arguments"), algorithm._bound()
    if json.loads(json.dumps(description)) != description:
        fail(f"{name}.describe() is no plain JSON: {shorten(description)}. Return str, numbers, lists and dicts only.")
    if description.get("name") != name or not isinstance(arguments, dict):
        fail(f"{name}.describe() gives {shorten(description)}; it needs 'name': {name!r} and 'arguments'.")
    if lost := sorted(bound.keys() - arguments.keys()):
        fail(
            f"{name}.describe() leaves out {', '.join(lost)}: two recipes that differ there look alike, and a resumed run "
            "cannot tell them apart. Leave describe() to Algorithm, or add them to 'arguments'."
        )
    if any(isinstance(each, dict) and "callable" in each for each in arguments.values()):
        return  # named, not rebuilt: see Algorithm.describe
    again = Algorithm.from_description(description)
    if type(again) is not type(algorithm) or as_json(again._bound()) != as_json(_bound_as_json(bound, again)):
        fail(
            f"{name} came back from its description as {shorten(again.describe())}, from {shorten(description)}. Take the "
            "arguments in the form that describe() gives them: converters accept text for a Time, a list for a tuple."
        )
    same(again.describe(), description, "description", f"{name} describes itself otherwise when it is built again.")
    same(
        again.state_dict(), algorithm.state_dict(), "state", f"{name} starts with another state when it is built again."
    )


def _bound_as_json(bound: Mapping[str, Any], again: Algorithm) -> dict[str, Any]:
    """Return arguments in the order of another's, to compare them."""
    return {key: bound[key] for key in again._bound()}


@check
def refuses_bad_arguments(rehearsal: Rehearsal) -> None:
    """A wrong argument is a ValueError or TypeError at construction that names it."""
    for algorithm in rehearsal.make():
        build, given = type(algorithm), algorithm._bound()
        for name, parameter in inspect.signature(build).parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            for wrong in _wrong_values(given[name]):
                _refuses(build, given | {name: wrong}, name, wrong)
            if given[name] is not None and _forbids_none(parameter):
                _refuses(build, given | {name: None}, name, None)


def _forbids_none(parameter: inspect.Parameter) -> bool:
    """Return whether an argument's annotation, as it is written, leaves no room for None."""
    return parameter.annotation is not parameter.empty and not re.search(
        r"\b(None|NoneType|Optional|Any|object)\b", str(parameter.annotation)
    )


def _wrong_values(value: object) -> Iterator[object]:
    yield Nothing()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield from (float("nan"), "a word", [value])


def _refuses(build: type[Algorithm], arguments: Mapping[str, Any], name: str, wrong: object) -> None:
    call = f"{build.__name__}({name}={shorten(wrong, 40)})"
    mend = (
        "Check it in the constructor, with an attrs validator or: raise ArgumentError"
        f"('{build.__name__}({name}=)', got={name}, takes='what it takes', example='{build.__name__}({name}=…)')."
    )
    try:
        build(**arguments)
    except (ValueError, TypeError) as error:
        if isinstance(error, ThawlineError) or re.search(rf"\b{name}\b", str(error)):
            return
        fail(f"{call} raises {type(error).__name__}: {error}, which does not name the argument. {mend}")
    except Exception as error:  # noqa: BLE001 - reported
        fail(f"{call} raises {type(error).__name__}: {error}, which is no ValueError. {mend}")
    fail(f"{call} is accepted, and would break in the middle of a fit. {mend}")


@check
def works_with_other_arguments(rehearsal: Rehearsal) -> None:
    """With other arguments, of its types and of its errors' corrected calls, it fits, describes itself and resumes as well."""
    calls = [(place, each) for place, algorithm in enumerate(rehearsal.make()) for each in _calls(rehearsal, algorithm)]
    for place, call in rehearsal.some(calls, 3, rehearsal.seed):
        _try_call(rehearsal, place, call)


def _calls(rehearsal: Rehearsal, algorithm: Algorithm) -> list[Specimen]:
    calls = other_calls(algorithm)
    return calls if rehearsal.thorough else together(calls, algorithm)


def _try_call(rehearsal: Rehearsal, place: int, call: Specimen) -> None:
    """Fit with another call in the place of an algorithm; where this model refuses it, with half of the other arguments."""

    def build() -> list[Algorithm]:
        made = rehearsal.make()
        made[place] = call()
        return made

    other = attrs.evolve(rehearsal, factory=build)
    other.name = repr(call)
    _comes_back(call())
    with tempfile.TemporaryDirectory() as folder:
        try:
            whole, paths = other.saved(Path(folder) / "run", every="4ba", probe=_verify)
        except REFUSALS:
            for half in halves(call, rehearsal.make()[place]):
                _try_call(rehearsal, place, half)
            return
        except Exception as error:
            error.add_note(f"with the arguments {call!r}, which its constructor takes")
            raise
        for path in paths[:1]:
            goes_on(other, whole, path)


def _verify(event: Event, state: State) -> None:
    if event.opens_ledger:
        state.ledger.verify()


# -- at events ---------------------------------------------------------------------------------------------------------


@check
def match_is_pure(rehearsal: Rehearsal) -> None:
    """match() gives the same answer twice and changes neither the algorithm nor the fit."""
    algorithms = rehearsal.make()
    if all(type(each).match is Algorithm.match for each in algorithms):
        return

    def spied(algorithm: Algorithm) -> Callable[[Event, State], bool]:
        match = algorithm.match

        def spy(event: Event, state: State) -> bool:
            before = _everything(algorithm, state)
            answers = [match(event, state), match(event, state)]
            where = f"{type(algorithm).__name__}.match at {event.name}, batch {state.clock.batch},"
            mend = "match() only looks; change what is kept in apply()."
            same(before, _everything(algorithm, state), "it", f"{where} changes something: {mend}")
            if bool(answers[0]) != bool(answers[1]):
                fail(f"{where} says {answers[0]} and, asked again, {answers[1]}. {mend}")
            return answers[0]

        return spy

    for each in algorithms:
        object.__setattr__(each, "match", spied(each))
    same(
        rehearsal.whole.result, rehearsal.fit(algorithms).result, "the fit",
        f"{rehearsal.name}: a fit in which match() is asked twice is another one. match() only looks, and keeps nothing anywhere.",
    )  # fmt: skip


def _everything(algorithm: Algorithm, state: State) -> dict[str, Any]:
    """Copy what match() could change."""
    own = {name: copied(value) for name, value in vars(algorithm).items() if not callable(value)}
    fit = [state.ledger.digest(), str(state.clock), state.stop_reason, dict(state.metrics)]
    return {"algorithm": own, "fit": fit, "weights": weights_of(state.model), "generators": Randomness().states()}


@check
def keeps_the_ledger_whole(rehearsal: Rehearsal) -> None:
    """While another freezes and attaches, the ledger stays whole and moves at open events only, and frozen weights stand still."""
    frozen: dict[str, Tensor] = {}

    def look(event: Event, state: State) -> None:
        state.ledger.verify()
        if event not in LIVE_EVENTS:  # evaluated may be other weights than the live ones
            return
        now = {name: state.ledger.parameters[name] for name in state.ledger.frozen}
        for name in sorted(now.keys() & frozen.keys()):
            if not torch.equal(now[name], frozen[name]):
                fail(
                    f"{rehearsal.name}: the frozen {name!r} changed by {event.name}, batch {state.clock.batch}. What trains changes "
                    "during a fit, by others too: keep no list of parameters, and write to state.ledger.trainable of the moment, "
                    "or thaw it first."
                )
        frozen.clear()
        frozen.update((name, each.detach().clone()) for name, each in now.items())

    def beside() -> list[Algorithm]:
        return [*rehearsal.make(), Neighbor()]

    other = attrs.evolve(
        rehearsal, factory=beside, loader=augmented_loader() if rehearsal.own_task else rehearsal.loader
    )
    other.name = f"{rehearsal.name} beside another that freezes and attaches"
    with tempfile.TemporaryDirectory() as folder:
        whole, paths = other.saved(Path(folder) / "run", every="4ba", probe=look, debug=True)
        for path in paths[:1]:
            goes_on(other, whole, path)


_GRAMMAR = re.compile(
    r"(FIT_START )?(EPOCH_START (BATCH_START ((BEFORE_FORWARD AFTER_FORWARD AFTER_LOSS AFTER_BACKWARD )+"
    r"BEFORE_STEP AFTER_STEP BATCH_END )?(EVAL )?)*(EVAL )?EPOCH_END )*(EVAL )?FIT_END "
)
_EVALUATION = re.compile(r"EVAL_START (EVAL_BATCH_START EVAL_BATCH_END )*EVAL_END ")


@check
def leaves_the_loop_alone(rehearsal: Rehearsal) -> None:
    """The events come in the order of the loop, the clock ticks at each BATCH_END, and the loader's samples come once an epoch, as they are."""
    _check_events(rehearsal, rehearsal.whole)
    _check_samples(rehearsal)
    batches = rehearsal.batches()[:1]
    before = copied(batches)
    try:
        short = rehearsal.fit(loader=batches, duration="3ep")
    except REFUSALS:
        return
    same(
        before, copied(batches), "the batch",
        f"{rehearsal.name}: a batch that the loader holds was written to, so the next epoch begins with another one. Put a new one into "
        "state.batch at BATCH_START, in the stage DATA.",
    )  # fmt: skip
    _check_events(rehearsal, short)
    done = sum(event is Event.BATCH_END for event, *_ in short.events)
    same(
        list(range(1, done + 1)), [row["epoch"] for row in short.result["history"]], "the epochs",
        f"{rehearsal.name}: over epochs of one batch, not each epoch has a row of history. {_LOOP}",
    )  # fmt: skip


_LOOP = "emit(), tick(), the state's clock and the loader are the loop's; an algorithm only acts and asks: state.stop(reason)."


def _check_events(rehearsal: Rehearsal, outcome: Outcome) -> None:
    events = outcome.events
    text = _EVALUATION.sub("EVAL ", "".join(f"{event.name} " for event, *_ in events))
    if not _GRAMMAR.fullmatch(text):
        fail(f"{rehearsal.name}: the events are not those of the loop: {text}. {_LOOP}")
    done = 0
    for event, _, batch, _ in events:
        done += event is Event.BATCH_END
        if batch != done:
            fail(f"{rehearsal.name}: at {event.name} the clock stands at batch {batch} after {done} batches. {_LOOP}")


def _check_samples(rehearsal: Rehearsal) -> None:
    """Hold the batches of the kit's own data against the ids of their samples."""
    if not rehearsal.own_task:
        return
    loader, seen = augmented_loader(), set[int]()
    data: Any = loader.dataset

    def look(event: Event, state: State) -> None:
        if event is Event.EPOCH_START:
            seen.clear()
        elif event is Event.BATCH_START and not isinstance(state.batch, Unloaded):
            ids, (inputs, targets) = list(state.sample_ids or ()), state.batch
            noise = inputs - data.x[ids]
            alike = torch.equal(targets, data.y[ids]) and noise.min() >= 0 and noise.max() <= data.AMOUNT
            if not alike or seen.intersection(ids) or len(ids) != len(set(ids)):
                fail(
                    f"{rehearsal.name}: batch {state.clock.batch} does not begin with the samples of state.sample_ids, each once an "
                    f"epoch. {_LOOP}"
                )
            seen.update(ids)
        elif event is Event.EPOCH_END and state.clock.batch_in_epoch == 0 and len(seen) != len(data):
            fail(f"{rehearsal.name}: the epoch had {len(seen)} of {len(data)} samples. {_LOOP}")

    rehearsal.fit([Before(look), *rehearsal.make()], loader=loader)


@check
def leaves_the_global_generators_alone(rehearsal: Rehearsal) -> None:
    """No random number is drawn from torch's, NumPy's or Python's global generator: those are the model's."""
    algorithms = rehearsal.make()

    def spied(algorithm: Algorithm, method: str) -> Callable[..., Any]:
        call = getattr(algorithm, method)

        def spy(*arguments: Any) -> Any:
            before = Randomness().states()
            result = call(*arguments)
            if difference(before, Randomness().states()):
                owner = "owner" if rehearsal.has_no_memory else "self.owner"  # a function's second parameter
                at = f" at {arguments[0].name}" if arguments and isinstance(arguments[0], Event) else ""
                fail(
                    f"{type(algorithm).__name__}.{method}{at} draws from a global generator, so beside another algorithm, or "
                    "resumed, dropout and the rest of the model see other numbers. Use a generator of your own: "
                    f"torch.Generator().manual_seed(derive_seed(state.seed, {owner}, state.clock.batch))."
                )
            return result

        return spy

    for each in algorithms:
        for method in ("attach", "match", "apply", "state_dict", "close"):
            object.__setattr__(each, method, spied(each, method))
    rehearsal.fit(algorithms)


# -- other fits and other algorithms ------------------------------------------------------------------------------------


_AFRESH = "The constructor runs again at its start: set all that changes there, and keep nothing on the class or in the module."


@check
def starts_afresh(rehearsal: Rehearsal) -> None:
    """The same instance in a second fit does what it did in the first; a third, of the fitted model, works."""
    algorithms, model = rehearsal.make(), rehearsal.model()
    rehearsal.fit(algorithms)
    second = rehearsal.fit(algorithms, model=model)
    same(
        rehearsal.whole.all, second.all, "the fit",
        f"{rehearsal.name}: a second fit with the same instance is another one. "
        + (FUNCTION if rehearsal.has_no_memory else _AFRESH),
    )  # fmt: skip
    rehearsal.fit(algorithms, model=model)


@check
def keeps_instances_apart(rehearsal: Rehearsal) -> None:
    """A fit inside another one, and two of a kind in one list, do not influence each other."""
    inner: list[Outcome] = []

    def nest(event: Event, state: State) -> None:
        if event is Event.BATCH_END and state.clock.batch == 2 and not inner:
            inner.append(rehearsal.fit())

    outer = rehearsal.fit(probe=nest)
    mend = "State belongs to the instance: set it in the constructor, not on the class or in the module."
    mend = FUNCTION if rehearsal.has_no_memory else mend
    for which, outcome in (("the outer", outer), *(("the inner", each) for each in inner)):
        place = f"{which} fit"
        same(rehearsal.whole.all, outcome.all, place, f"{rehearsal.name}: two instances mix in nested fits. {mend}")
    _or_refusal(partial(rehearsal.fit, [*rehearsal.make(), *rehearsal.make()], debug=True))


@check
def does_not_depend_on_order(rehearsal: Rehearsal) -> None:
    """Beside each other algorithm, the result is the same whichever comes first in the list."""
    kinds = {type(each) for each in rehearsal.make()}
    others = [each for each in rehearsal.partners if kinds.isdisjoint({type(one) for one in rehearsal.make(each)})]
    for other in rehearsal.some(others, 3, derive_seed(rehearsal.seed, rehearsal.name)):
        first = _or_refusal(partial(rehearsal.fit, [*rehearsal.make(), *rehearsal.make(other)]))
        second = _or_refusal(partial(rehearsal.fit, [*rehearsal.make(other), *rehearsal.make()]))
        partner = ", ".join(type(each).__name__ for each in rehearsal.make(other))
        raised = [said for each in (first, second) if (said := each.pop("said", None))]
        said = f" One of the two raises {raised[0]}" if len(raised) == 1 else ""
        same(
            first, second, "the fit",
            f"{rehearsal.name} before and after {partner} gives two results.{said} Hold, scale and log under names of your own, set "
            "the stage that says when in an event it acts, take at FIT_START the holds to begin with, do not undo what others hold, "
            "and read what trains at a later event than those at which it changes, such as BEFORE_STEP.",
        )  # fmt: skip


def _or_refusal(fit: Callable[[], Outcome]) -> dict[str, Any]:
    """Return what a fit comes to, or the typed error by which two algorithms refuse each other."""
    try:
        return {key: value for key, value in fit().result.items() if key != BY_TURNS}
    except ThawlineError as error:
        if isinstance(error, LedgerError) and "behind the ledger" in str(error):
            raise
        return {"refused": type(error).__name__, "said": f"{type(error).__name__}: {error}"}
