"""What a schedule is: a factor on the learning rate, as a function of progress from 0 to 1."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias, cast

from attrs import field, frozen
from typing_extensions import override

from .clock import Time
from .errors import ArgumentError
from .typing import Json

Share: TypeAlias = Callable[[Time], float]
"""Maps a time to its share of the fit's duration."""
Length: TypeAlias = float | str | Time
Argument: TypeAlias = "float | str | Schedule | tuple[Schedule, ...] | tuple[float | str, ...]"

TOLERANCE = 1e-9
"""What differs by rounding alone: a boundary between schedules, a factor below 0."""
_LENGTHS = "a share of the duration above 0 and below 1, or a time: '0.1dur', '100ba', '1ep', '5000sp'"


@frozen
class Schedule:
    """A factor on the learning rate as a function of progress; equal to another by name and arguments.

    Args:
        name: Name of the factory that made it, or the qualified name of a function of the user's.
        arguments: The factory's arguments: numbers, times as text, and further schedules.
        function: Maps progress (0 to 1) to the factor.
        binder: Makes the same schedule with its times turned into shares; None where there are none.

    Example:
        >>> from thawline.engine import cosine
        >>> decay = cosine(end=0.1)
        >>> decay
        cosine(end=0.1, start=1.0)
        >>> decay(0.0), round(decay(0.5), 2), decay == cosine(end=0.1)
        (1.0, 0.55, True)
        >>> decay.describe()
        {'name': 'cosine', 'arguments': {'end': 0.1, 'start': 1.0}}
    """

    name: str
    arguments: Mapping[str, Argument] = field(hash=False)
    function: Callable[[float], float] = field(eq=False)
    binder: Callable[[Share], Schedule] | None = field(default=None, eq=False)

    def __call__(self, progress: float) -> float:
        """Return the factor at ``progress``.

        Raises:
            ArgumentError: The function fails there, or gives no finite number of at least 0.
        """
        try:
            factor = self.function(progress)
        except ArgumentError:
            raise
        except Exception as error:
            raise self._refused(progress, error) from error
        try:
            if math.isfinite(factor) and factor >= -TOLERANCE:
                return factor if factor >= 0 else 0.0
        except (TypeError, ValueError, OverflowError):  # text, a vector, a whole number beyond floats
            pass
        raise self._refused(progress, factor)

    @override
    def __repr__(self) -> str:
        """Return the call that makes it; of a function of the user's the qualified name."""
        arguments = [
            f"{key}={list(value) if isinstance(value, tuple) else value!r}" for key, value in self.arguments.items()
        ]
        if "." not in self.name:
            return f"{self.name}({', '.join(arguments)})"
        return f"partial({', '.join([self.name, *arguments])})" if arguments else self.name

    def _refused(self, progress: float, got: object) -> ArgumentError:
        takes = f"a finite factor of at least 0 at every progress; {self.name} gave another at {progress:g}"
        return ArgumentError("schedule", got=got, takes=takes, example="Trainer(schedule=cosine(end=0.1))")

    @property
    def steady(self) -> float | None:
        """The factor of a schedule that has only one; None where it may vary."""
        factor = self.arguments.get("factor") if self.name == "constant" else None
        return factor if isinstance(factor, float) else None

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
            >>> from thawline.engine import warmup
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


_EXAMPLES = {
    "warmup(then=)": "warmup('0.1dur', then=cosine(end=0.1))",
    "join(schedules=)": "join([linear(), cosine(end=0.1)], ['0.1dur'])",
    "repeat(schedule=)": "repeat(cosine(end=0.1), '10ep')",
}


def as_schedule(given: object, *, argument: str = "Trainer(schedule=)") -> Schedule:
    """Return ``given`` as a schedule: a :class:`Schedule` as it is, a plain function under its qualified name.

    Args:
        given: A schedule or a function ``progress -> factor``.
        argument: The argument it was passed as, for the error.

    Raises:
        ArgumentError: It is not callable, or does not give a finite number of at least 0 at progress 0 and 1.

    Example:
        >>> def square_root(progress):
        ...     return (1 - progress) ** 0.5
        >>> as_schedule(square_root)(0.75)
        0.5
    """
    if isinstance(given, Schedule):
        return given
    takes = "a schedule, or a function from progress (0 to 1) to a finite factor of at least 0"
    example = _EXAMPLES.get(argument, argument.replace("=)", "=cosine(end=0.1))"))
    if not callable(given) or isinstance(given, type):
        raise ArgumentError(argument, got=given, takes=takes, example=example)
    function = cast("Callable[[float], float]", given)
    for progress in (0.0, 1.0):
        try:
            value = function(progress)
            finite = not isinstance(value, bool) and math.isfinite(value) and value >= -TOLERANCE
        except Exception as error:
            raise ArgumentError(argument, got=given, takes=takes, example=example) from error
        if not finite:
            takes += f": it gave {value!r} at progress {progress:g}"
            raise ArgumentError(argument, got=given, takes=takes, example=example)
    settings = given.keywords if isinstance(given, partial) else {}
    arguments = {key: value for key, value in settings.items() if isinstance(value, (int, float, str))}
    return Schedule(_qualified_name(given), arguments, function)


def made(name: str, arguments: Mapping[str, Argument], bound: Callable[[Share], Schedule], free: bool) -> Schedule:
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
            if isinstance(each, str) and each.endswith(("ep", "ba", "sp")):
                found.append(repr(each))
            elif isinstance(each, Schedule):
                found.extend(_times(each.arguments))
    return list(dict.fromkeys(found))


def _no_share(time: Time) -> float:
    raise AssertionError(f"a schedule without times asked for {time}")


def inside(share: Share, part: float) -> Share:
    """Return ``share`` as seen by a schedule that has only ``part`` of the duration for itself."""
    return lambda time: share(time) / part if part > 0 else 1.0


def share_of(span: float | Time, share: Share) -> float:
    """Return a span as a share of the duration."""
    return share(span) if isinstance(span, Time) else span


def span_of(argument: str, length: object, example: str) -> float | Time:
    """Return a share of the duration, or a time that needs binding to become one."""
    if isinstance(length, (int, str, Time)) and not isinstance(length, bool):
        time = Time(length)
        if time.unit != "dur" and time.value > 0:
            return time
        length = float(time.value)
    if isinstance(length, float) and 0 < length < 1:
        return length
    raise ArgumentError(argument, got=length, takes=_LENGTHS, example=example)


def as_written(span: float | Time) -> float | str:
    """Return a span as a description has it."""
    return str(span) if isinstance(span, Time) else span


def factor_of(argument: str, value: object, example: str) -> float:
    """Return a factor, a finite number of at least 0."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max:
        return float(value)
    raise ArgumentError(argument, got=value, takes="a finite number of at least 0", example=example)


def _qualified_name(function: object) -> str:
    while isinstance(function, partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{getattr(named, '__module__', None)}.{getattr(named, '__qualname__', repr(named))}"
