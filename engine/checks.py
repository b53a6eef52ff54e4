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

import torch
from torch import Tensor
from typing_extensions import override

from .algorithm import Algorithm, as_json
from .errors import LedgerError, ThawlineError, shorten
from .events import Event
from .promises import check, fail, same
from .randomness import Randomness, derive_seed
from .rehearsal import BY_TURNS, LIVE_EVENTS, Outcome, Rehearsal, copied, difference, weights_of
from .state import State

# -- arguments ---------------------------------------------------------------------------------------------------------


@check
def comes_back_from_its_description(rehearsal: Rehearsal) -> None:
    """describe() is JSON that names every argument; from_description() builds an equal algorithm."""
    for algorithm in rehearsal.make():
        name, description = type(algorithm).__name__, algorithm.describe()
        arguments, bound = description.get("arguments"), algorithm._bound()
        if json.loads(json.dumps(description)) != description:
            fail(
                f"{name}.describe() is no plain JSON: {shorten(description)}. Return str, numbers, lists and dicts only."
            )
        if description.get("name") != name or not isinstance(arguments, dict):
            fail(f"{name}.describe() gives {shorten(description)}; it needs 'name': {name!r} and 'arguments'.")
        if lost := sorted(bound.keys() - arguments.keys()):
            fail(
                f"{name}.describe() leaves out {', '.join(lost)}: two recipes that differ there look alike, and a resumed run "
                "cannot tell them apart. Leave describe() to Algorithm, or add them to 'arguments'."
            )
        if any(isinstance(each, dict) and "callable" in each for each in arguments.values()):
            continue  # named, not rebuilt: see Algorithm.describe
        again = Algorithm.from_description(description)
        if type(again) is not type(algorithm) or as_json(again._bound()) != as_json(_bound_as_json(bound, again)):
            fail(
                f"{name} came back from its description as {shorten(again.describe())}, from {shorten(description)}. Take the "
                "arguments in the form that describe() gives them: converters accept text for a Time, a list for a tuple."
            )
        same(again.describe(), description, "description", f"{name} describes itself otherwise when it is built again.")
        same(
            again.state_dict(),
            algorithm.state_dict(),
            "state",
            f"{name} starts with another state when it is built again.",
        )


def _bound_as_json(bound: Mapping[str, Any], again: Algorithm) -> dict[str, Any]:
    """Return arguments in the order of another's, to compare them."""
    return {key: bound[key] for key in again._bound()}


class _Nothing:
    """What no argument takes."""

    @override
    def __repr__(self) -> str:
        return "object()"


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
    yield _Nothing()
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


# -- at events ---------------------------------------------------------------------------------------------------------


@check
def match_is_pure(rehearsal: Rehearsal) -> None:
    """match() gives the same answer twice and changes neither the algorithm nor the fit."""
    algorithms = rehearsal.make()

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
    same(rehearsal.whole.result, rehearsal.fit(algorithms).result, "the fit", "Asking match() twice changes the fit.")


def _everything(algorithm: Algorithm, state: State) -> dict[str, Any]:
    """Copy what match() could change."""
    own = {name: copied(value) for name, value in vars(algorithm).items() if not callable(value)}
    fit = [state.ledger.digest(), str(state.clock), state.stop_reason, dict(state.metrics)]
    return {"algorithm": own, "fit": fit, "weights": weights_of(state.model), "generators": Randomness().states()}


@check
def keeps_the_ledger_whole(rehearsal: Rehearsal) -> None:
    """The ledger's invariants hold at every event, it moves at open events only, and frozen weights stand still."""
    frozen: dict[str, Tensor] = {}

    def look(event: Event, state: State) -> None:
        state.ledger.verify()
        if event not in LIVE_EVENTS:  # evaluated may be other weights than the live ones
            return
        now = {name: state.ledger.parameters[name] for name in state.ledger.frozen}
        for name in sorted(now.keys() & frozen.keys()):
            if not torch.equal(now[name], frozen[name]):
                fail(
                    f"{rehearsal.name}: the frozen {name!r} changed by {event.name}, batch {state.clock.batch}. Write to "
                    "parameters that train (state.ledger.trainable), or thaw it first."
                )
        frozen.clear()
        frozen.update((name, each.detach().clone()) for name, each in now.items())

    rehearsal.fit(probe=look, debug=True)


_GRAMMAR = re.compile(
    r"(FIT_START )?(EPOCH_START (BATCH_START ((BEFORE_FORWARD AFTER_FORWARD AFTER_LOSS AFTER_BACKWARD )+"
    r"BEFORE_STEP AFTER_STEP BATCH_END )?(EVAL )?)*(EVAL )?EPOCH_END )*(EVAL )?FIT_END "
)
_EVALUATION = re.compile(r"EVAL_START (EVAL_BATCH_START EVAL_BATCH_END )*EVAL_END ")


@check
def leaves_the_loop_alone(rehearsal: Rehearsal) -> None:
    """The events come in the order of the loop, and the clock ticks one batch at each BATCH_END."""
    events = rehearsal.whole.events
    text = _EVALUATION.sub("EVAL ", "".join(f"{event.name} " for event, *_ in events))
    mend = "emit(), tick() and the state's clock are the loop's; an algorithm only acts and asks: state.stop(reason)."
    if not _GRAMMAR.fullmatch(text):
        fail(f"{rehearsal.name}: the events are not those of the loop: {text}. {mend}")
    done = 0
    for event, _, batch, _ in events:
        done += event is Event.BATCH_END
        if batch != done:
            fail(f"{rehearsal.name}: at {event.name} the clock stands at batch {batch} after {done} batches. {mend}")


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
                at = f" at {arguments[0].name}" if arguments and isinstance(arguments[0], Event) else ""
                fail(
                    f"{type(algorithm).__name__}.{method}{at} draws from a global generator, so beside another algorithm, or "
                    "resumed, dropout and the rest of the model see other numbers. Use a generator of your own: "
                    "torch.Generator().manual_seed(derive_seed(state.seed, self.owner, state.clock.batch))."
                )
            return result

        return spy

    for each in algorithms:
        for method in ("attach", "match", "apply", "state_dict", "close"):
            object.__setattr__(each, method, spied(each, method))
    rehearsal.fit(algorithms)


# -- saving ------------------------------------------------------------------------------------------------------------


@check
def resumes(rehearsal: Rehearsal) -> None:
    """Resumed from a checkpoint of any batch, the fit ends bit for bit as the uninterrupted one."""
    with tempfile.TemporaryDirectory() as folder:
        whole, paths = rehearsal.saved(Path(folder) / "run")
        same(rehearsal.whole.result, whole.result, "the fit", f"{rehearsal.name}: saving checkpoints changes the fit.")
        for path in paths if rehearsal.thorough else _some(paths, 3, rehearsal.seed):
            resumed = rehearsal.fit(resume=path)
            same(
                whole.result, resumed.result, "the fit",
                f"{rehearsal.name}, resumed at batch {int(path.name[2:])}, does not go on as the uninterrupted fit. Return from "
                "state_dict() whatever changes during a fit, take it back in load_state_dict(), and build caches in attach(): "
                "FIT_START does not come again.",
            )  # fmt: skip


def _some(items: list[Any], count: int, seed: int) -> list[Any]:
    """Return a few items, drawn by the seed, in their order."""
    chosen = sorted(range(len(items)), key=lambda index: derive_seed(seed, "conformance", index))[:count]
    return [items[index] for index in sorted(chosen)]


@check
def starts_afresh(rehearsal: Rehearsal) -> None:
    """The same instance in a second fit does what it did in the first; a third, of the fitted model, works."""
    algorithms, model = rehearsal.make(), rehearsal.model()
    rehearsal.fit(algorithms)
    second = rehearsal.fit(algorithms, model=model)
    same(
        rehearsal.whole.result, second.result, "the fit",
        f"{rehearsal.name}: a second fit with the same instance is another one. The constructor runs again at its start: set "
        "all that changes there, and keep nothing on the class or in the module.",
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
    for which, outcome in (("the outer", outer), *(("the inner", each) for each in inner)):
        place = f"{which} fit"
        same(
            rehearsal.whole.result, outcome.result, place, f"{rehearsal.name}: two instances mix in nested fits. {mend}"
        )
    _or_refusal(partial(rehearsal.fit, [*rehearsal.make(), *rehearsal.make()], debug=True))


@check
def does_not_depend_on_order(rehearsal: Rehearsal) -> None:
    """Beside each other algorithm, the result is the same whichever comes first in the list."""
    kinds = {type(each) for each in rehearsal.make()}
    others = [each for each in rehearsal.partners if kinds.isdisjoint({type(one) for one in rehearsal.make(each)})]
    for other in others if rehearsal.thorough else _some(others, 3, derive_seed(rehearsal.seed, rehearsal.name)):
        first = _or_refusal(partial(rehearsal.fit, [*rehearsal.make(), *rehearsal.make(other)]))
        second = _or_refusal(partial(rehearsal.fit, [*rehearsal.make(other), *rehearsal.make()]))
        partner = ", ".join(type(each).__name__ for each in rehearsal.make(other))
        same(
            first, second, "the fit",
            f"{rehearsal.name} before and after {partner} gives two results. Hold, scale and log under names of your own, set "
            "the stage that says when in an event it acts, do not undo what others hold, and read what trains at a later event than "
            "those at which it changes, such as BEFORE_STEP.",
        )  # fmt: skip


def _or_refusal(fit: Callable[[], Outcome]) -> dict[str, Any]:
    """Return what a fit comes to, or the typed error by which two algorithms refuse each other."""
    try:
        return {key: value for key, value in fit().result.items() if key != BY_TURNS}
    except ThawlineError as error:
        if isinstance(error, LedgerError) and "behind the ledger" in str(error):
            raise
        return {"refused": type(error).__name__}
