"""Schedules: pure functions of progress, from 0 to 1, that give a factor on the learning rate."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TypeAlias, cast

from attrs import field, frozen

from .clock import Time
from .errors import ArgumentError
from .typing import Json

Share: TypeAlias = Callable[[Time], float]
"""Maps a time to its share of the fit's duration."""
Length: TypeAlias = float | str | Time
Argument: TypeAlias = "float | str | Schedule | tuple[Schedule, ...] | tuple[float | str, ...]"

_LENGTHS = "a share of the duration above 0 and below 1, or a time: '0.1dur', '100ba', '1ep', '5000sp'"
_DEEPEST = 32  # descriptions come out of files, and a file must not exhaust the stack


@frozen
class Schedule:
    """A factor on the learning rate as a function of progress; equal to another by name and arguments.

    Args:
        name: Name of the factory that made it, or the qualified name of a function of the user's.
        arguments: The factory's arguments: numbers, times as text, and further schedules.
        function: Maps progress (0 to 1) to the factor.
        binder: Makes the same schedule with its times turned into shares; None where there are none.

    Example:
        >>> decay = cosine(end=0.1)
        >>> decay(0.0), round(decay(0.5), 2), decay == cosine(end=0.1)
        (1.0, 0.55, True)
        >>> decay.describe()
        {'name': 'cosine', 'arguments': {'end': 0.1, 'start': 1.0}}
    """

    name: str
    arguments: Mapping[str, Argument] = field(hash=False)
    function: Callable[[float], float] = field(eq=False, repr=False)
    binder: Callable[[Share], Schedule] | None = field(default=None, eq=False, repr=False)

    def __call__(self, progress: float) -> float:
        """Return the factor at ``progress``.

        Raises:
            ArgumentError: The function fails there, or gives no finite number.
        """
        try:
            factor = self.function(progress)
        except ArgumentError:
            raise
        except Exception as error:
            raise self._refused(progress, error) from error
        try:
            if math.isfinite(factor):
                return factor
        except (TypeError, ValueError, OverflowError):  # text, a vector, a whole number beyond floats
            pass
        raise self._refused(progress, factor)

    def _refused(self, progress: float, got: object) -> ArgumentError:
        takes = f"a finite factor at every progress; {self.name} gave another at {progress:g}"
        return ArgumentError("schedule", got=got, takes=takes, example="Trainer(schedule=cosine(end=0.1))")

    @property
    def bound(self) -> bool:
        """Whether it can be called: every time in it is known as a share of the duration."""
        return self.binder is None

    def bind(self, share: Share) -> Schedule:
        """Return the schedule with its epochs, batches and samples turned into shares of the duration.

        Args:
            share: Maps a :class:`Time` to its share of the duration; asked only for times in "ep", "ba" and "sp".

        Returns:
            A schedule that can be called, equal to this one; itself where it needs no binding.

        Example:
            >>> warmup("100ba").bind(lambda time: time.value / 1000)(0.05)
            0.5
        """
        return self if self.binder is None else self.binder(share)

    def describe(self) -> dict[str, Json]:
        """Return name and arguments as JSON; :func:`schedule_from_description` inverts it."""
        return {"name": self.name, "arguments": {key: _describe(value) for key, value in self.arguments.items()}}


def _describe(value: Argument) -> Json:
    if isinstance(value, Schedule):
        return value.describe()
    return [_describe(each) for each in value] if isinstance(value, tuple) else value


def constant(factor: float = 1.0) -> Schedule:
    """Return the schedule that stays at ``factor``.

    Args:
        factor: The factor, at least 0.

    Raises:
        ArgumentError: The factor is not a finite number of at least 0.

    Example:
        >>> constant()(0.7)
        1.0
    """
    value = _factor("constant(factor=)", factor, "constant(factor=1.0)")
    return Schedule("constant", {"factor": value}, lambda _: value)


def linear(end: float = 0.0, start: float = 1.0) -> Schedule:
    """Return the straight line from ``start`` at the beginning to ``end`` at the end of the fit.

    Args:
        end: Factor at progress 1, at least 0.
        start: Factor at progress 0, at least 0.

    Raises:
        ArgumentError: A factor is not a finite number of at least 0.

    Example:
        >>> [linear()(k / 4) for k in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    last = _factor("linear(end=)", end, "linear(end=0.0)")
    first = _factor("linear(start=)", start, "linear(start=1.0)")
    return Schedule("linear", {"end": last, "start": first}, lambda progress: first + (last - first) * progress)


def cosine(end: float = 0.0, start: float = 1.0) -> Schedule:
    """Return the half cosine from ``start`` to ``end``: Loshchilov and Hutter, SGDR (2017), equation 5, without restarts.

    Args:
        end: Factor at progress 1, at least 0.
        start: Factor at progress 0, at least 0.

    Raises:
        ArgumentError: A factor is not a finite number of at least 0.

    Example:
        >>> [round(cosine()(k / 4), 3) for k in range(5)]
        [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    last = _factor("cosine(end=)", end, "cosine(end=0.0)")
    first = _factor("cosine(start=)", start, "cosine(start=1.0)")
    height = (first - last) / 2
    return Schedule(
        "cosine", {"end": last, "start": first}, lambda progress: last + height * (1 + math.cos(math.pi * progress))
    )


def warmup(length: Length, then: Schedule | Callable[[float], float] | None = None, start: float = 0.0) -> Schedule:
    """Return a straight rise from ``start`` to where ``then`` begins, followed by ``then`` over what is left.

    Args:
        length: Share of the duration, above 0 and below 1, or a time such as "0.1dur", "100ba", "1ep", "5000sp".
            One that is longer than the fit is allowed, and rises all along.
        then: The schedule that follows, with the remaining progress rescaled to 0..1; default ``constant()``.
        start: Factor at progress 0, at least 0.

    Raises:
        ArgumentError: A length that is none of these, or a factor that is not a finite number of at least 0.

    Example:
        >>> schedule = warmup("0.5dur", then=linear())
        >>> [schedule(k / 4) for k in range(5)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    after = constant() if then is None else as_schedule(then, argument="warmup(then=)")
    first = _factor("warmup(start=)", start, "warmup(0.1, start=0.0)")
    span = _length("warmup(length=)", length, "warmup('0.1dur')")
    arguments: dict[str, Argument] = {"length": _as_written(span), "then": after, "start": first}

    def bound(share: Share) -> Schedule:
        rise = _share(span, share)
        following = after.bind(_inside(share, 1 - rise))
        top, rest = following(0.0), following.function

        def factor(progress: float) -> float:
            if progress < rise:
                return first + (top - first) * (progress / rise)
            return rest((progress - rise) / (1 - rise) if rise < 1 else 0.0)

        return Schedule("warmup", arguments, factor)

    return _made("warmup", arguments, bound, after.bound and not isinstance(span, Time))


def join(schedules: Sequence[Schedule | Callable[[float], float]], boundaries: Sequence[Length]) -> Schedule:
    """Return schedules one after the other, each over its own stretch, rescaled to 0..1.

    Args:
        schedules: The schedules, at least one.
        boundaries: Where the next one begins, one fewer than schedules, increasing: shares of the duration above 0
            and below 1, or times such as "0.1dur", "100ba", "1ep", "5000sp".

    Raises:
        ArgumentError: No schedules, a wrong number of boundaries, or boundaries that do not increase.

    Example:
        >>> schedule = join([linear(end=1.0, start=0.0), constant(), linear()], [0.25, 0.75])
        >>> [schedule(k / 8) for k in range(9)]
        [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0]
    """
    example = "join([linear(1.0, start=0.1), cosine()], ['0.1dur'])"
    if not isinstance(schedules, (list, tuple)) or not schedules:
        raise ArgumentError("join(schedules=)", got=schedules, takes="a list of at least one schedule", example=example)
    parts = tuple(as_schedule(each, argument="join(schedules=)") for each in schedules)
    if not isinstance(boundaries, (list, tuple)) or len(boundaries) != len(parts) - 1:
        takes = f"a list of {len(parts) - 1} boundaries, one fewer than schedules"
        raise ArgumentError("join(boundaries=)", got=boundaries, takes=takes, example=example)
    spans = [_length("join(boundaries=)", each, example) for each in boundaries]
    _increasing([each for each in spans if not isinstance(each, Time)], boundaries, example)
    arguments: dict[str, Argument] = {"schedules": parts, "boundaries": tuple(_as_written(each) for each in spans)}

    def bound(share: Share) -> Schedule:
        begins = [0.0, *(_share(each, share) for each in spans)]
        _increasing(begins, boundaries, example)
        edges = [*begins, max(1.0, begins[-1])]  # a boundary past the end of the fit is never reached
        following = [
            each.bind(_inside(share, end - begin)).function
            for each, (begin, end) in zip(parts, pairwise(edges), strict=True)
        ]

        def factor(progress: float) -> float:
            place = 0
            while place + 1 < len(following) and progress >= edges[place + 1]:
                place += 1
            begin, end = edges[place], edges[place + 1]
            return following[place]((progress - begin) / (end - begin) if end > begin else 0.0)

        return Schedule("join", arguments, factor)

    free = all(each.bound for each in parts) and not any(isinstance(each, Time) for each in spans)
    return _made("join", arguments, bound, free)


def as_schedule(given: object, *, argument: str = "Trainer(schedule=)") -> Schedule:
    """Return ``given`` as a schedule: a :class:`Schedule` as it is, a plain function under its qualified name.

    Args:
        given: A schedule or a function ``progress -> factor``.
        argument: The argument it was passed as, for the error.

    Raises:
        ArgumentError: It is not callable, or does not give a finite number at progress 0 and 1.

    Example:
        >>> def square_root(progress):
        ...     return (1 - progress) ** 0.5
        >>> as_schedule(square_root)(0.75)
        0.5
    """
    if isinstance(given, Schedule):
        return given
    takes = "a schedule, or a function from progress (0 to 1) to a finite factor"
    example = argument.replace("=)", "=cosine(end=0.1))")
    if not callable(given) or isinstance(given, type):
        raise ArgumentError(argument, got=given, takes=takes, example=example)
    function = cast("Callable[[float], float]", given)
    for progress in (0.0, 1.0):
        try:
            value = function(progress)
            finite = not isinstance(value, bool) and math.isfinite(value)
        except Exception as error:
            raise ArgumentError(argument, got=given, takes=takes, example=example) from error
        if not finite:
            takes += f": it gave {value!r} at progress {progress:g}"
            raise ArgumentError(argument, got=given, takes=takes, example=example)
    settings = given.keywords if isinstance(given, partial) else {}
    arguments = {key: value for key, value in settings.items() if isinstance(value, (int, float, str))}
    return Schedule(_qualified_name(given), arguments, function)


def schedule_from_description(description: object) -> Schedule:
    """Return the schedule that ``description``, made by :meth:`Schedule.describe`, describes.

    Args:
        description: ``{"name": …, "arguments": {…}}``.

    Raises:
        ArgumentError: It describes no schedule of this module; a function of the user's cannot be rebuilt.

    Example:
        >>> schedule_from_description({"name": "linear", "arguments": {"end": 0.5}})(1.0)
        0.5
    """
    return _from_description(description, 0)


def _from_description(description: object, depth: int) -> Schedule:
    owner = "schedule_from_description(description=)"
    example = '{"name": "cosine", "arguments": {"end": 0.1}}'
    known = ", ".join(FACTORIES)
    if depth > _DEEPEST:  # a repr of what was got would itself be too deep
        raise ArgumentError(owner, got="a deeper one", takes=f"schedules at most {_DEEPEST} deep", example=example)
    if not isinstance(description, dict) or set(description) != {"name", "arguments"}:
        raise ArgumentError(owner, got=description, takes="a mapping of 'name' and 'arguments'", example=example)
    name, arguments = description["name"], description["arguments"]
    factory = FACTORIES.get(name) if isinstance(name, str) else None
    if factory is None:
        takes = f"one of {known}; a function of your own is described by name only and has to be passed again"
        raise ArgumentError(owner, got=name, takes=takes, example=example)
    accepted = inspect.signature(factory).parameters
    if not isinstance(arguments, dict) or not set(arguments) <= set(accepted):
        takes = f"the arguments {', '.join(accepted)} of {name}"
        raise ArgumentError(owner, got=arguments, takes=takes, example=example)
    required = {key for key, each in accepted.items() if each.default is inspect.Parameter.empty}
    if not required <= set(arguments):
        takes = f"at least {', '.join(sorted(required))} as arguments of {name}"
        raise ArgumentError(owner, got=arguments, takes=takes, example=example)
    rebuilt = dict(arguments)
    if isinstance(rebuilt.get("then"), dict):
        rebuilt["then"] = _from_description(rebuilt["then"], depth + 1)
    if isinstance(rebuilt.get("schedules"), list):
        rebuilt["schedules"] = [_from_description(each, depth + 1) for each in rebuilt["schedules"]]
    return factory(**rebuilt)


FACTORIES: Mapping[str, Callable[..., Schedule]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "warmup": warmup,
    "join": join,
}


def _made(name: str, arguments: Mapping[str, Argument], bound: Callable[[Share], Schedule], free: bool) -> Schedule:
    """Return a schedule that is bound already where it is ``free`` of times, and else waits for ``bind``."""
    if free:
        return bound(_no_share)
    return Schedule(name, arguments, partial(_unbound, name, arguments), bound)


def _unbound(name: str, arguments: Mapping[str, Argument], progress: float) -> float:
    times = ", ".join(_times(arguments))
    raise ArgumentError(
        f"{name}(progress=)",
        got=progress,
        takes=f"progress only once the duration is known, which {times} needs",
        example=f"{name}(…).bind(share), where share(Time) is a share of the duration, or '0.1dur' instead of {times}",
    )


def _times(arguments: Mapping[str, Argument]) -> list[str]:
    """Return the times of ``arguments``, nested ones included, that need the duration."""
    found: list[str] = []
    for value in arguments.values():
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, str):
                found.append(repr(each))
            elif isinstance(each, Schedule):
                found.extend(_times(each.arguments))
    return list(dict.fromkeys(found))


def _no_share(time: Time) -> float:
    raise AssertionError(f"a schedule without times asked for {time}")


def _inside(share: Share, part: float) -> Share:
    """Return ``share`` as seen by a schedule that has only ``part`` of the duration for itself."""
    return lambda time: share(time) / part if part > 0 else 1.0


def _share(span: float | Time, share: Share) -> float:
    return share(span) if isinstance(span, Time) else span


def _length(argument: str, length: object, example: str) -> float | Time:
    """Return a share of the duration, or a time that needs binding to become one."""
    if isinstance(length, (int, str, Time)) and not isinstance(length, bool):
        time = Time(length)
        if time.unit != "dur" and time.value > 0:
            return time
        length = float(time.value)
    if isinstance(length, float) and 0 < length < 1:
        return length
    raise ArgumentError(argument, got=length, takes=_LENGTHS, example=example)


def _as_written(span: float | Time) -> float | str:
    return str(span) if isinstance(span, Time) else span


def _increasing(edges: Sequence[float], got: object, example: str) -> None:
    if any(left >= right for left, right in pairwise(edges)):
        raise ArgumentError("join(boundaries=)", got=got, takes="boundaries that increase", example=example)


def _factor(argument: str, value: object, example: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf:
        return float(value)
    raise ArgumentError(argument, got=value, takes="a finite number of at least 0", example=example)


def _qualified_name(function: object) -> str:
    while isinstance(function, partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{getattr(named, '__module__', None)}.{getattr(named, '__qualname__', repr(named))}"
