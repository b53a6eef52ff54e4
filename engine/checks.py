"""The checks of the conformance kit: each a promise that every algorithm keeps, and what to do where it does not."""

from __future__ import annotations

import inspect
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import override

from .algorithm import Algorithm, as_json
from .engine import Engine
from .errors import LedgerError, ThawlineError, shorten
from .events import Event
from .ledger import ParameterLedger
from .randomness import Randomness, derive_seed
from .rehearsal import LIVE_EVENTS, Outcome, Probe, Rehearsal, copied, cut, difference, quiet, weights_of
from .state import State

Check: TypeAlias = Callable[[Rehearsal], None]
CHECKS: dict[str, Check] = {}


class ConformanceError(ThawlineError, AssertionError):
    """A promise that an algorithm does not keep: what broke, when, and how to mend it.

    Args:
        failures: The message of each check that failed, by the check's name.

    Example:
        >>> print(ConformanceError({"match_is_pure": "match() changed 'seen'"}))
        match_is_pure: match() changed 'seen'
    """

    def __init__(self, failures: Mapping[str, str]) -> None:
        super().__init__(dict(failures))
        self.failures = dict(failures)

    @override
    def __str__(self) -> str:
        return "\n".join(f"{name}: {message}" for name, message in self.failures.items())


def check(function: Check) -> Check:
    """Enter a check under its name; whatever it ends with is a ConformanceError."""

    def run(rehearsal: Rehearsal) -> None:
        try:
            function(rehearsal)
        except ConformanceError:
            raise
        except Exception as error:
            notes = "; ".join(getattr(error, "__notes__", ()))
            said = f"{rehearsal.name}: {type(error).__name__}: {error}" + f" [{notes}]" * bool(notes)
            raise ConformanceError({function.__name__: said}) from error

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    CHECKS[function.__name__] = run
    return run


def _fail(message: str) -> NoReturn:
    """Fail the check that calls."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name not in CHECKS:
        frame = frame.f_back
    raise ConformanceError({frame.f_code.co_name if frame is not None else "check": message})


def _same(first: Any, second: Any, place: str, message: str, *, tolerance: float = 0.0) -> None:
    if found := difference(first, second, place, tolerance=tolerance):
        _fail(f"{message} First difference: {found}.")


# -- arguments ---------------------------------------------------------------------------------------------------------


@check
def comes_back_from_its_description(rehearsal: Rehearsal) -> None:
    """describe() is JSON that names every argument; from_description() builds an equal algorithm."""
    for algorithm in rehearsal.make():
        name, description = type(algorithm).__name__, algorithm.describe()
        arguments, bound = description.get("arguments"), algorithm._bound()  # noqa: SLF001 - the contract's own
        if json.loads(json.dumps(description)) != description:
            _fail(f"{name}.describe() is no plain JSON: {shorten(description)}. Return str, numbers, lists and dicts only.")
        if description.get("name") != name or not isinstance(arguments, dict):
            _fail(f"{name}.describe() gives {shorten(description)}; it needs 'name': {name!r} and 'arguments'.")
        if lost := sorted(bound.keys() - arguments.keys()):
            _fail(
                f"{name}.describe() leaves out {', '.join(lost)}: two recipes that differ there look alike, and a resumed run "
                "cannot tell them apart. Leave describe() to Algorithm, or add them to 'arguments'."
            )
        if any(isinstance(each, dict) and "callable" in each for each in arguments.values()):
            continue  # named, not rebuilt: see Algorithm.describe
        again = Algorithm.from_description(description)
        if type(again) is not type(algorithm) or as_json(again._bound()) != as_json(_bound_as_json(bound, again)):  # noqa: SLF001
            _fail(
                f"{name} came back from its description as {shorten(again.describe())}, from {shorten(description)}. Take the "
                "arguments in the form that describe() gives them: converters accept text for a Time, a list for a tuple."
            )
        _same(again.describe(), description, "description", f"{name} describes itself otherwise when it is built again.")
        _same(again.state_dict(), algorithm.state_dict(), "state", f"{name} starts with another state when it is built again.")


def _bound_as_json(bound: Mapping[str, Any], again: Algorithm) -> dict[str, Any]:
    """Return arguments in the order of another's, to compare them."""
    return {key: bound[key] for key in again._bound()}  # noqa: SLF001 - as above


class _Nothing:
    """What no argument takes."""

    @override
    def __repr__(self) -> str:
        return "object()"


@check
def refuses_bad_arguments(rehearsal: Rehearsal) -> None:
    """A wrong argument is a ValueError or TypeError at construction that names it."""
    for algorithm in rehearsal.make():
        build, given = type(algorithm), algorithm._bound()  # noqa: SLF001 - the contract's own
        for name, parameter in inspect.signature(build).parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            for wrong in _wrong_values(given[name]):
                _refuses(build, given | {name: wrong}, name, wrong)


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
        _fail(f"{call} raises {type(error).__name__}: {error}, which does not name the argument. {mend}")
    except Exception as error:  # noqa: BLE001 - reported
        _fail(f"{call} raises {type(error).__name__}: {error}, which is no ValueError. {mend}")
    _fail(f"{call} is accepted, and would break in the middle of a fit. {mend}")


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
            _same(before, _everything(algorithm, state), "it", f"{where} changes something: {mend}")
            if bool(answers[0]) != bool(answers[1]):
                _fail(f"{where} says {answers[0]} and, asked again, {answers[1]}. {mend}")
            return answers[0]

        return spy

    for each in algorithms:
        object.__setattr__(each, "match", spied(each))
    _same(rehearsal.whole.result, rehearsal.fit(algorithms).result, "the fit", "Asking match() twice changes the fit.")


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
                _fail(
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
        _fail(f"{rehearsal.name}: the events are not those of the loop: {text}. {mend}")
    done = 0
    for event, _, batch, _ in events:
        done += event is Event.BATCH_END
        if batch != done:
            _fail(f"{rehearsal.name}: at {event.name} the clock stands at batch {batch} after {done} batches. {mend}")


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
                _fail(
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
        _same(rehearsal.whole.result, whole.result, "the fit", f"{rehearsal.name}: saving checkpoints changes the fit.")
        for path in paths if rehearsal.thorough else _some(paths, 3, rehearsal.seed):
            resumed = rehearsal.fit(resume=path)
            _same(
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
    _same(
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
        _same(rehearsal.whole.result, outcome.result, place, f"{rehearsal.name}: two instances mix in nested fits. {mend}")
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
        _same(
            first, second, "the fit",
            f"{rehearsal.name} before and after {partner} gives two results. Hold, scale and log under names of your own, set "
            "the stage that says when in an event it acts, and do not undo what others hold.",
        )  # fmt: skip


def _or_refusal(fit: Callable[[], Outcome]) -> dict[str, Any]:
    """Return what a fit comes to, or the typed error by which two algorithms refuse each other."""
    try:
        return fit().result
    except ThawlineError as error:
        if isinstance(error, (ConformanceError, LedgerError)) and "behind the ledger" in str(error):
            raise
        return {"refused": type(error).__name__}


# -- ending ------------------------------------------------------------------------------------------------------------


def _marks(model: nn.Module, leave_out: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Return what could be left on a model: hooks, attributes, classes, modes, gradients, flags."""
    marks: dict[str, Any] = {}
    for name, module in model.named_modules():
        inside = vars(module)
        marks[f"hooks of {name or 'the model'}"] = {
            key: len(value) for key, value in inside.items() if "hooks" in key and isinstance(value, dict)
        }
        marks[f"mode of {name or 'the model'}"] = module.training
        if not any(name == each or name.startswith(f"{each}.") for each in leave_out):
            marks[f"attributes of {name or 'the model'}"] = sorted(inside)
            marks[f"class of {name or 'the model'}"] = type(module).__qualname__
            for own, parameter in module.named_parameters(recurse=False):
                hooks = [len(getattr(parameter, key, None) or ()) for key in _PARAMETER_HOOKS]
                state = {"hooks": hooks, "requires_grad": parameter.requires_grad, "grad": parameter.grad is not None}
                marks[f"parameter {name}.{own}".replace(" .", " ")] = state
    return marks


_PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_REMOVE = "Remove in close() what attach() set up; it is called after errors too. What is to stay, ledger.attach() attaches."


@check
def leaves_nothing_behind(rehearsal: Rehearsal) -> None:
    """After the fit the model has no hook, attribute, mode or flag that it had not before, but for recorded surgery."""
    model, before = rehearsal.model(), _marks(rehearsal.model())
    algorithms = rehearsal.make()
    outcome = rehearsal.fit(algorithms, model=model)
    after = _marks(model, outcome.journal)
    _same(
        {key: before[key] for key in after if key in before}, {key: after[key] for key in after if key in before}, "the model",
        f"{rehearsal.name} leaves something on the model after the fit. {_REMOVE}",
    )  # fmt: skip
    for each in algorithms:
        each.close()


@check
def survives_an_exception(rehearsal: Rehearsal) -> None:
    """An exception at any event leaves ledger and live weights as they were then, and nothing on the model."""
    before = _marks(rehearsal.model())
    kinds = dict.fromkeys(event for event, *_ in rehearsal.whole.events)
    for event in kinds:
        _explode(rehearsal, event, 1 + (sum(each is event for each, *_ in rehearsal.whole.events) > 1), before)


class _Boom(Exception):  # noqa: N818 - no error of anybody's
    """Raised on purpose."""


def _explode(rehearsal: Rehearsal, at: Event, times: int, before: Mapping[str, Any]) -> None:
    """Let a fit end with an exception at the ``times``-th event of a kind, and look at what it leaves."""
    model, left = rehearsal.model(), times
    live: dict[str, Tensor] = {}
    then: dict[str, Any] = {}
    journal: set[str] = set()

    def explode(event: Event, state: State) -> None:
        nonlocal left
        if event in LIVE_EVENTS and event is not Event.FIT_ABORT:
            live.clear()
            live.update(weights_of(state.model))
        left -= event is at
        if event is at and not left:
            journal.update(entry.module for entry in state.ledger.journal)
            then.update(ledger=state.ledger, digest=state.ledger.digest())
            raise _Boom

    def closing() -> None:
        try:
            then["ledger"].verify()
            then["moved"] = then["ledger"].digest() != then["digest"]
        except LedgerError as error:
            then["broken"] = error

    where = f"{rehearsal.name}: after an exception at {at.name}"
    try:
        rehearsal.fit(model=model, probe=explode, closing=closing)
    except _Boom as error:
        if failed := [note for note in getattr(error, "__notes__", ()) if "failed as well" in note]:
            then["failed"] = failed[0]
    else:
        _fail(f"{where}, the fit goes on. Do not catch what is not yours.")
    if "broken" in then:
        _fail(f"{where} the ledger is not valid: {then['broken']} Change it through the ledger, at open events; not at FIT_ABORT.")
    if then["moved"]:
        _fail(f"{where} the ledger was changed. At FIT_ABORT it is closed: only put back what is the model's.")
    if "failed" in then:
        _fail(f"{where} the end fails too: {then['failed']}. At FIT_ABORT and in close(), count on nothing that was set up.")
    mend = "Put live weights back at FIT_ABORT and in close()."
    _same(live, weights_of(model), "weights", f"{where} the model does not hold the live weights. {mend}")
    after = _marks(model, frozenset(journal))
    known = {key: after[key] for key in after if key in before}
    _same({key: before[key] for key in known}, known, "the model", f"{where} something is left on the model. {_REMOVE}")


# -- lengths and numbers -----------------------------------------------------------------------------------------------


@check
def takes_short_fits(rehearsal: Rehearsal) -> None:
    """A fit that ends before its first batch, and one of a single batch, work."""
    model, algorithms = rehearsal.model(), rehearsal.make()
    ledger = ParameterLedger(model, partial(torch.optim.SGD, lr=0.1))
    state = State(model, ledger, duration="1ba", seed=rehearsal.seed)  # type: ignore[arg-type]  # a converter's input
    with Randomness().kept(), quiet(), Engine(algorithms, state, debug=True) as engine:
        engine.emit(Event.FIT_START)
        saved = copied(engine.state_dict())
        engine.emit(Event.FIT_END)
    again = Engine(rehearsal.make(), state)
    again.load_state_dict(saved)
    _same(saved, again.state_dict(), "state", f"{rehearsal.name}: state_dict() after load_state_dict() is another one.")
    rehearsal.fit(duration="1ba", debug=True)


@check
def trains_in_bf16(rehearsal: Rehearsal) -> None:
    """Under bf16 autocast the fit works, resumes, and keeps finite weights of their own dtypes."""
    kinds = {name: each.dtype for name, each in rehearsal.model().named_parameters()}
    model = rehearsal.model()
    with tempfile.TemporaryDirectory() as folder:
        whole, paths = rehearsal.saved(Path(folder) / "run", model=model, precision="bf16", debug=True)
        resumed = rehearsal.fit(resume=paths[len(paths) // 2], precision="bf16")
    _same(whole.result, resumed.result, "the fit", f"{rehearsal.name}: resumed under bf16, the fit does not go on as it was.")
    for name, each in model.named_parameters():
        if not bool(torch.isfinite(each).all()):
            _fail(f"{rehearsal.name}: {name!r} is not finite after a fit in bf16. Compute norms and averages in float32.")
        if each.dtype is not kinds.get(name, each.dtype):
            _fail(f"{rehearsal.name}: {name!r} became {each.dtype} in a bf16 fit. Write values with copy_(), not new tensors.")


@check
def does_not_count_microbatches(rehearsal: Rehearsal) -> None:
    """One batch, and the same in four parts with accumulate=4, give the same updates (float64, up to rounding)."""
    if not rehearsal.accumulates or any(hasattr(each, "running_mean") for each in rehearsal.model().modules()):
        return  # statistics of a batch are not those of its parts
    with Randomness().kept():  # a loader draws its order from the global generator
        batches = list(rehearsal.loader)
    parts = [part for batch in batches for part in cut(batch, 4)]
    wholes = [part for batch in batches for part in cut(batch, 1) if cut(batch, 4)]
    if not parts:
        _fail("no batch of the loader can be cut into four. Give check_algorithm(loader=) batches of 4, 8 or 16 samples.")
    ends: list[dict[str, Any]] = []
    for loader, accumulate in ((wholes, 1), (parts, 4)):
        model = _without_dropout(rehearsal.model().double())
        optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
        outcome = rehearsal.fit(model=model, loader=loader, accumulate=accumulate, optimizer=optimizer, eval_every="1ep")
        ends.append(outcome.result)
    _same(
        *ends, "the fit",
        f"{rehearsal.name}: a batch in four parts gives other updates than the batch at once. Microbatch events come several "
        "times a step: count steps at BATCH_END or with state.clock, and read gradients at BEFORE_STEP, where they are whole.",
        tolerance=1e-7,
    )  # fmt: skip


def _without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name in ("p", "dropout"):
            if isinstance(getattr(module, name, None), float):
                object.__setattr__(module, name, 0.0)
    return model


__all__ = ["CHECKS", "Check", "ConformanceError", "Probe", *CHECKS]
