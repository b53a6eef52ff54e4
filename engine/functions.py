"""An algorithm made of a function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, TypeAlias

from typing_extensions import override

from .algorithm import Algorithm, Stage, register
from .clock import Time
from .errors import ArgumentError
from .events import Event, nearest_event
from .keywords import explained
from .state import State

Function: TypeAlias = Callable[..., object]
_EXAMPLE = "@on(Event.EPOCH_END, every='2ep')"


class FunctionAlgorithm(Algorithm):
    """What :func:`on` makes of a function: calls it at its events, where ``every`` has passed since the last call."""

    function: ClassVar[Function]
    every: ClassVar[Time | None] = None
    __signature__: ClassVar[inspect.Signature] = inspect.Signature()  # that of __new__ takes what is to be refused
    done: int

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Say that there are no arguments, where some are given."""
        if args:
            name = cls.__name__
            takes = "no arguments: the engine calls the function, and what needs some is a class"
            raise ArgumentError(f"{name}()", got=args[0], takes=takes, example=f"Trainer(algorithms=[{name}()])")
        return super().__new__(cls, **kwargs)

    def __init__(self) -> None:
        self.done = 0

    @override
    def match(self, event: Event, state: State) -> bool:
        """Return whether the interval has passed once more than the function was called."""
        return self.every is None or self.every.count(state.clock) > self.done

    @override
    def apply(self, event: Event, state: State) -> None:
        """Call the function."""
        if self.every is not None:
            self.done = self.every.count(state.clock)
        self.function(state, self.owner)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return how many intervals have passed."""
        return {"done": self.done}

    @override
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back how many intervals have passed."""
        self.done = int(saved["done"])


@explained("on", _EXAMPLE, {}, method=False)
def on(
    *events: Event, every: Time | str | int | None = None, stage: Stage = Stage.CONTROL
) -> Callable[[Function], type[FunctionAlgorithm]]:
    """Make an algorithm of a function: a class, registered under the function's name, that takes no arguments.

    The function is called with the state, and with the owner's name where it has a second parameter. It obeys the rules
    of every algorithm: it changes the ledger at open events only, and since it has no place for state of its own, what
    it does follows from the :class:`State`. What needs arguments or a memory is a class.

    Args:
        *events: When it is called.
        every: The time from one call to the next, at the first of the events after it; None calls it at every event.
        stage: Its place among the other algorithms.

    Raises:
        ArgumentError: No event, one that is none or twice there, an interval that is none, or a function of other
            parameters, that is asynchronous, or that yields.

    Example:
        >>> @on(Event.EPOCH_END, every="2ep")
        ... def note_trainable(state):
        ...     state.log({"tensors": len(state.ledger.trainable)})
        >>> note_trainable().describe(), sorted(note_trainable.events)
        ({'name': 'note_trainable', 'arguments': {}}, [<Event.EPOCH_END: 'epoch_end'>])
    """
    _check_events(events)
    if not isinstance(stage, Stage):
        raise ArgumentError(
            "on(stage=)", got=stage, takes="a Stage", example="@on(Event.BATCH_END, stage=Stage.OBSERVE)"
        )
    span = None if every is None else _span(every)

    def make(function: Function) -> type[FunctionAlgorithm]:
        call = _with_owner(function)
        body = {
            "__doc__": function.__doc__ or f"Calls {function.__name__}.",
            "__module__": function.__module__,
            "__qualname__": function.__qualname__,
            "events": frozenset(events),
            "stage": stage,
            "every": span,
            "function": staticmethod(call),
        }
        return register(type(function.__name__, (FunctionAlgorithm,), body))

    return make


def _check_events(events: tuple[object, ...]) -> None:
    """Raise an ArgumentError that shows the first which is no event, or is there twice."""
    wrong = next((each for each in events if not isinstance(each, Event)), None)
    if wrong is not None or not events:
        example = f"@on(Event.{nearest_event(wrong)})" if isinstance(wrong, str) else _EXAMPLE
        raise ArgumentError(
            "on()", got=wrong if events else "none", takes="one or more members of Event", example=example
        )
    if len(set(events)) < len(events):
        twice = next(each for each in events if events.count(each) > 1)
        raise ArgumentError("on()", got=twice, takes="each Event once", example=f"@on(Event.{twice.name})")  # type: ignore[attr-defined]  # an Event, as just checked


def _span(every: Time | str | int) -> Time:
    try:
        span = Time(every)
    except ArgumentError as error:
        raise ArgumentError("on(every=)", got=every, takes=error.takes, example=_EXAMPLE) from None
    if not span.value:
        raise ArgumentError("on(every=)", got=every, takes="a time above zero, or None", example=_EXAMPLE)
    return span


def _with_owner(function: Function) -> Function:
    """Return a function of state and owner; ArgumentError where it takes neither one argument nor these two."""
    example = f"{_EXAMPLE} above def log_norm(state): …"
    if not inspect.isfunction(function):
        raise ArgumentError("on()", got=function, takes="a function of state, or of state and owner", example=example)
    if (
        inspect.iscoroutinefunction(function)
        or inspect.isgeneratorfunction(function)
        or inspect.isasyncgenfunction(function)
    ):
        kind = "a generator" if inspect.isgeneratorfunction(function) else "an async function"
        takes = "a plain function: nobody would await it or take what it yields, so nothing in it would run"
        raise ArgumentError("on()", got=f"{kind}, {function.__name__}", takes=takes, example=example)
    parameters = list(inspect.signature(function).parameters.values())
    plain = all(each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) for each in parameters)
    if not plain or len(parameters) not in (1, 2):
        got = f"{function.__name__}{inspect.signature(function)}"
        raise ArgumentError("on()", got=got, takes="a function of state, or of state and owner", example=example)
    if len(parameters) == 2:
        return function
    return lambda state, owner: function(state)  # noqa: ARG005 - the owner is not asked for
