"""The engine: compiles who listens, orders them, emits events."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from types import TracebackType
from typing import Any, Self, TypeAlias, cast

from attrs import frozen
from torch import Tensor

from .algorithm import Algorithm, Stage, evaluated_weights
from .errors import ArgumentError, CheckpointError, LedgerError
from .events import Event, nearest_event
from .ledger import ParameterLedger
from .log import get_logger
from .state import State

Handler: TypeAlias = Callable[[Event, State], object]
log = get_logger(__name__)


@frozen(slots=True)
class TraceEntry:
    """One call that the engine made, with ``trace=True``: the event, the batch, who acted."""

    event: Event
    batch: int
    owner: str


# Averages are in place before, and out again before, all others; whether the fit ends is known to whoever puts weights back.
_FIRST = {Event.EVAL_START: Stage.WEIGHTS, Event.EVAL_END: Stage.WEIGHTS, Event.EPOCH_END: Stage.CONTROL}


class Engine:
    """Emits events over one state to the algorithms that subscribed to them.

    Subscriptions are compiled into one tuple an event, ordered by stage and then by place in the list, so
    an event that nobody listens to costs a lookup.

    Args:
        algorithms: The algorithms. Each is given a unique ``owner`` name: its class name, numbered
            from the second on (``"EMA"``, ``"EMA#2"``).
        state: The state they share.
        debug: Verify the ledger before each event and after each algorithm's turn, and that it stayed as it was where
            it is closed: what was done behind it is an error that names the parameter, and the call to use instead.
        trace: Keep a list of :class:`TraceEntry` in :attr:`trace`.

    Raises:
        ArgumentError: An entry of ``algorithms`` is no Algorithm, the same instance twice, or one that can never act.

    Example:
        >>> import torch
        >>> from thawline.engine import ParameterLedger
        >>> model = torch.nn.Linear(2, 1)
        >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters(), lr=0.1)))
        >>> with Engine([], state) as engine:
        ...     engine.emit(Event.BATCH_START)
    """

    def __init__(
        self, algorithms: Iterable[Algorithm], state: State, *, debug: bool = False, trace: bool = False
    ) -> None:
        self.algorithms = check_algorithms(algorithms)
        self.state = state
        self.debug = debug
        self.trace: list[TraceEntry] | None = [] if trace else None
        self._ledger = state.ledger
        self._closed = False
        counts: dict[str, int] = {}
        for each in self.algorithms:
            name = type(each).__name__
            counts[name] = counts.get(name, 0) + 1
            each.owner = name if counts[name] == 1 else f"{name}#{counts[name]}"
        self._handlers: dict[Event, tuple[Handler, ...]] = {}
        self._listeners: dict[Event, Handler] = {}
        self.heard: frozenset[Event] = frozenset()
        self._authors: dict[Handler, Algorithm] = {}
        self._left: tuple[Event, int, dict[str, Mapping[str, Any]]] | None = None
        self.compile()

    def compile(self) -> None:
        """Read every algorithm's ``events`` again and rebuild the subscriptions."""
        ordered = sorted(self.algorithms, key=lambda each: each.stage)  # stable: the list decides within a stage
        self._authors = {}
        for event in Event:
            listening = [each for each in ordered if event in each.events]
            first = _FIRST.get(event)
            listening.sort(key=lambda each: each.stage is not first)
            handlers = [self._handler(each) for each in listening]
            if event is Event.BATCH_START:
                handlers.append(_begin_batch)
            if event in self._listeners:
                handlers.append(self._listeners[event])
            if self.debug and event is not Event.FIT_ABORT:
                handlers = [self._look, *handlers, self._remember]
            self._handlers[event] = tuple(handlers)
        self.heard = frozenset(event for event, handlers in self._handlers.items() if handlers)

    def listen(self, listeners: Mapping[Event, Handler]) -> None:
        """Call a function of the loop's own at each of these events, after all algorithms."""
        self._listeners = dict(listeners)
        self.compile()

    def emit(self, event: Event) -> None:
        """Tell everybody who subscribed to ``event``, in order.

        Raises:
            Exception: What an algorithm raised, with a note that names it, the event and the clock.
        """
        self._ledger.phase = event
        handler: Handler | None = None
        try:
            for handler in self._handlers[event]:
                handler(event, self.state)
        except BaseException as error:  # Ctrl-C inside an algorithm is noted as well
            self._note(error, event, handler)
            raise

    def begin(self, algorithms: Collection[Algorithm]) -> None:
        """Emit FIT_START to some of the algorithms alone: those that join a run that is under way."""
        everybody = self._handlers[Event.FIT_START]
        self._handlers[Event.FIT_START] = tuple(each for each in everybody if self._authors.get(each) in algorithms)
        try:
            self.emit(Event.FIT_START)
        finally:
            self._handlers[Event.FIT_START] = everybody

    def attach(self) -> None:
        """Let every algorithm set up its hooks and caches."""
        for each in self.algorithms:
            each.attach(self.state)

    def restart(self) -> None:
        """Make every algorithm as constructed and attached, to be given the state of an earlier batch."""
        for each in reversed(self.algorithms):
            each.close()
            each.reset()
        self.attach()

    def close(self) -> None:
        """Close every algorithm, also where another one's close raises; the first error is raised at the end."""
        if self._closed:
            return
        self._closed = True
        self._ledger.phase = None
        first: BaseException | None = None
        for each in reversed(self.algorithms):
            try:
                each.close()
            except BaseException as error:  # noqa: BLE001 - every close runs; the first error is raised below
                error.add_note(f"in {each.owner}.close()")
                if first is not None:
                    log.error("close failed", owner=each.owner, error=repr(error))
                first = first or error
        if first is not None:
            raise first

    def __enter__(self) -> Self:
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as second:
            if error is None:
                raise
            error.add_note(f"closing failed as well: {second!r}")

    def state_dict(self) -> dict[str, Any]:
        """Return every algorithm's description and state by owner."""
        return {each.owner: {"description": each.describe(), "state": each.state_dict()} for each in self.algorithms}

    def load_state_dict(self, saved: Mapping[str, Any], *, migrate: bool = False) -> tuple[Algorithm, ...]:
        """Give every algorithm its state back.

        Args:
            saved: What :meth:`state_dict` returned.
            migrate: Whether other algorithms than those that were saved are let pass.

        Returns:
            The algorithms that are new or changed, which were given nothing.

        Raises:
            CheckpointError: As :meth:`check_same`, unless ``migrate``.
        """
        if not migrate:
            self.check_same(saved)
        new = tuple(each for each in self.algorithms if not _is_same(each, saved))
        for each in self.algorithms:
            if each not in new:
                each.load_state_dict(saved[each.owner]["state"])
        return new

    def gone(self, saved: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the owners in what :meth:`state_dict` returned that are not here, or not as they were."""
        same = {each.owner for each in self.algorithms if _is_same(each, saved)}
        return tuple(owner for owner in saved if owner not in same)

    def difference(self, saved: Mapping[str, Any]) -> str:
        """Return in words how the algorithms differ from those that were saved, in whatever order; empty where not."""
        here = {each.owner: each.describe() for each in self.algorithms}
        return _difference({owner: entry["description"] for owner, entry in saved.items()}, here)

    def check_same(self, saved: Mapping[str, Any]) -> None:
        """Compare the algorithms with those whose :meth:`state_dict` was saved; their order may differ.

        Raises:
            CheckpointError: They are not the same; the message says which differ and how.
        """
        if difference := self.difference(saved):
            raise CheckpointError(
                f"the algorithms are not those of the run that is resumed: {difference}. Give the same list, let it change "
                "with fit(on_change='migrate'), or start anew with fit(resume=False) and Trainer(run_dir=<another directory>)."
            )

    def evaluated_weights(self) -> Mapping[str, Tensor]:
        """Return what evaluations run with instead of the live weights, by name; empty where with the live ones."""
        return evaluated_weights(self.algorithms)

    def _handler(self, algorithm: Algorithm) -> Handler:
        """Return what to call for an algorithm: its bare ``apply`` where nothing else is needed."""
        apply, match = algorithm.apply, algorithm.match
        handler: Handler = apply
        if type(algorithm).match is not Algorithm.match:

            def matched(event: Event, state: State) -> None:
                if match(event, state):
                    apply(event, state)

            handler = matched
        if self.debug or self.trace is not None:
            handler = self._watched(algorithm, handler)
        self._authors[handler] = algorithm
        return handler

    def _watched(self, algorithm: Algorithm, handler: Handler) -> Handler:
        def watched(event: Event, state: State) -> None:
            if self.trace is not None:
                self.trace.append(TraceEntry(event, state.clock.batch, algorithm.owner))
            if not self.debug:
                handler(event, state)
                return
            ledger, before = self._ledger, self._ledger.digest()
            version, options = ledger.version, _options(ledger)
            try:
                handler(event, state)
            except BaseException as error:
                if not event.opens_ledger and ledger.digest() != before:
                    error.add_note(f"the ledger moved at {event.name}, where it is closed, before this was raised")
                raise
            ledger.verify()
            if not event.opens_ledger and ledger.digest() != before:
                raise LedgerError(f"the ledger moved at {event.name}, where it is closed. Change it at BATCH_END.")
            if ledger.version == version:
                _check_options(options, _options(ledger))

        return watched

    def _look(self, event: Event, _: State) -> None:
        """Find what was done behind the ledger since the last event, in nobody's turn."""
        try:
            self._ledger.verify()
            if self._left is not None:
                last, version, options = self._left
                if last is not Event.BEFORE_STEP and self._ledger.version == version:  # a step may write to groups
                    _check_options(options, _options(self._ledger))
        except LedgerError as error:
            error.add_note(f"found at {event.name}, before any algorithm's turn: a hook, the model or the loop did it")
            raise

    def _remember(self, event: Event, _: State) -> None:
        """Keep the options that everybody's turn has left."""
        self._left = event, self._ledger.version, _options(self._ledger)

    def _note(self, error: BaseException, event: Event, handler: Handler | None) -> None:
        algorithm = None if handler is None else self._authors.get(handler)
        if algorithm is not None:
            clock = self.state.clock
            error.add_note(
                f"in {algorithm.owner}.apply at {event.name}, epoch {clock.epoch}, batch {clock.batch} "
                f"({type(algorithm).__module__}.{type(algorithm).__qualname__})"
            )


def check_algorithms(algorithms: Iterable[Algorithm]) -> tuple[Algorithm, ...]:
    """Return the algorithms as a tuple, or raise an ArgumentError that says what is no algorithm."""
    example = "Trainer(algorithms=[LoRAInject(), LayerThaw(every=2)])"
    try:
        found = tuple(algorithms)
    except TypeError as error:
        takes = "a list of algorithms"
        raise ArgumentError("Trainer(algorithms=)", got=algorithms, takes=takes, example=example) from error
    for each in found:
        if not isinstance(each, Algorithm):
            example = "Trainer(algorithms=[*progressive(), EMA()])" if isinstance(each, list) else example
            if isinstance(each, type) and issubclass(each, Algorithm):  # also what @on makes of a function
                example = f"Trainer(algorithms=[{each.__name__}()])"
            raise ArgumentError("Trainer(algorithms=)", got=each, takes="instances of Algorithm", example=example)
        _check_acts(each)
    if len({id(each) for each in found}) != len(found):
        raise ArgumentError("Trainer(algorithms=)", got=found, takes="each instance once", example="[EMA(), EMA()]")
    return found


def _check_acts(algorithm: Algorithm) -> None:
    """Raise an ArgumentError where an algorithm is subscribed to no event, to what is none, or does nothing there."""
    name, given = type(algorithm).__name__, cast("Any", algorithm.events)
    # An Event is text, and text a collection of letters.
    listed = isinstance(given, Collection) and not isinstance(given, str)
    events = tuple(given) if listed else (given,)
    if not listed or not all(isinstance(each, Event) for each in events):
        wrong = next((each for each in events if not isinstance(each, Event)), given)
        example = f"events = frozenset({{Event.{nearest_event(wrong)}}})"
        raise ArgumentError(f"{name}.events", got=wrong, takes="a set of members of Event", example=example)
    acts = getattr(algorithm.apply, "__func__", algorithm.apply) is not Algorithm.apply
    if acts and not events:
        example = "events = frozenset({Event.BATCH_END}) in the class"
        raise ArgumentError(f"{name}.events", got=given, takes="at least one Event to act at", example=example)
    if not acts and (events or type(algorithm).attach is Algorithm.attach):
        methods = [each for each, value in vars(type(algorithm)).items() if callable(value)]
        found = next(iter(get_close_matches("apply", methods, n=1)), None)
        takes, example = "a method that says what to do at its events", "def apply(self, event, state): …"
        raise ArgumentError(f"{name}.apply", got=found, takes=takes, example=example)
    for method in ("match", "apply"):
        signature = inspect.signature(getattr(algorithm, method))
        try:
            signature.bind(None, None)
        except TypeError:
            shown = f"{method}{signature}"
            example = f"def {method}(self, event, state): …"
            raise ArgumentError(
                f"{name}.{method}", got=shown, takes="a method of an event and the state", example=example
            ) from None


def _begin_batch(_: Event, state: State) -> None:
    """What every loop needs before a batch, unless it was just called off: modes that follow the trainable set, and the rates."""
    if state.stop_reason is None:
        state.ledger.begin_batch(state.clock)


def _is_same(algorithm: Algorithm, saved: Mapping[str, Any]) -> bool:
    entry = saved.get(algorithm.owner)
    return entry is not None and entry["description"] == algorithm.describe()


def _options(ledger: ParameterLedger) -> dict[str, Mapping[str, Any]]:
    """Return what each parameter's group says besides members and rate."""
    return {name: group.options for group in ledger.groups for name in group.parameters}


def _check_options(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise where an option was edited in place, naming the parameter."""
    for name, options in after.items():
        for key, value in options.items():
            was = before.get(name, {}).get(key, value)
            if was is not value and not isinstance(value, Tensor) and was != value:
                mend = "Give it where the optimizer is made: Trainer(optimizer=[(select, factory), …])."
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    mend = f"Write ledger.set_options({name!r}, {key}={value}, owner=...)."
                raise LedgerError(
                    f"{key} of the group of {name!r} was changed from {was} to {value} in optimizer.param_groups, behind the "
                    f"ledger. {mend}"
                )


def _difference(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say which algorithms differ: absent, or with which arguments."""
    changed = []
    for owner in sorted({*saved, *now}):
        there, here = saved.get(owner), now.get(owner)
        if there is None or here is None:
            changed.append(f"{owner} is {'new' if there is None else 'missing'}")
        elif there["name"] != here["name"]:
            changed.append(f"{owner}: saved {there['name']}, given {here['name']}")
        elif there != here:
            before, after = there["arguments"], here["arguments"]
            names = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
            changed += [f"{owner}({name}=): saved {before.get(name)!r}, given {after.get(name)!r}" for name in names]
    return "; ".join(changed)
