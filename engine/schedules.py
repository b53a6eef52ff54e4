"""Schedules made of others: one after another, again and again, and the shapes that have names."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from .clock import Time
from .curves import constant, cosine, inverse_sqrt, linear, polynomial
from .errors import ArgumentError
from .schedule import (
    TOLERANCE,
    Argument,
    Length,
    Schedule,
    Share,
    as_schedule,
    as_written,
    factor_of,
    inside,
    made,
    share_of,
    span_of,
)

__all__ = [
    "Schedule",
    "as_schedule",
    "constant",
    "cosine",
    "inverse_sqrt",
    "join",
    "linear",
    "one_cycle",
    "polynomial",
    "repeat",
    "schedule_from_description",
    "warmup",
    "wsd",
]

_DEEPEST = 32  # descriptions come out of files, and a file must not exhaust the stack


def warmup(length: Length, then: Schedule | Callable[[float], float] | None = None, start: float = 0.0) -> Schedule:
    """Return a straight rise from ``start`` to where ``then`` begins, followed by ``then`` over what is left.

    Args:
        length: Share of the duration, above 0 and below 1, or a time such as "0.1dur", "100ba", "1ep", "5000sp"; an
            int is epochs. One that is longer than the fit rises all along.
        then: The schedule that follows, with the remaining progress rescaled to 0..1; default ``constant()``.
        start: Factor at progress 0, at least 0.

    Raises:
        ArgumentError: A length that is none of these, or a factor that is not a finite number of at least 0.

    Warns:
        ThawlineWarning: At the start of a fit that ends before the rise.

    Example:
        >>> schedule = warmup("0.5dur", then=linear())
        >>> [schedule(k / 4) for k in range(5)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    after = constant() if then is None else as_schedule(then, argument="warmup(then=)")
    first = factor_of("warmup(start=)", start, "warmup(0.1, start=0.0)")
    span = span_of("warmup(length=)", length, "warmup('0.1dur')")
    arguments: dict[str, Argument] = {"length": as_written(span), "then": after, "start": first}

    def bound(share: Share) -> Schedule:
        rise = share_of(span, share)
        following = after.bind(inside(share, 1 - rise))
        top, rest = following(0.0), following.function

        def factor(progress: float) -> float:
            if progress < rise:
                return first + (top - first) * (progress / rise)
            return rest((progress - rise) / (1 - rise) if rise < 1 else 0.0)

        return Schedule("warmup", arguments, factor)

    return made("warmup", arguments, bound, after.bound and not isinstance(span, Time))


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
    spans = [span_of("join(boundaries=)", each, example) for each in boundaries]
    _increasing([each for each in spans if not isinstance(each, Time)], boundaries, example)
    arguments: dict[str, Argument] = {"schedules": parts, "boundaries": tuple(as_written(each) for each in spans)}

    def bound(share: Share) -> Schedule:
        begins = [0.0, *(share_of(each, share) for each in spans)]
        _increasing(begins, boundaries, example)
        ends = [*begins[1:], max(1.0, begins[-1])]
        following = [
            each.bind(inside(share, end - begin)) for each, begin, end in zip(parts, begins, ends, strict=True)
        ]
        return Schedule("join", arguments, _stretches(following, begins[1:]))

    free = all(each.bound for each in parts) and not any(isinstance(each, Time) for each in spans)
    return made("join", arguments, bound, free)


def repeat(schedule: Schedule | Callable[[float], float], every: Length, growth: int = 1) -> Schedule:
    """Return ``schedule`` again and again, each time from its beginning: warm restarts.

    Args:
        schedule: What is repeated, its progress going from 0 to 1 in each period. Lengths in it are parts of the first
            period, and grow with it.
        every: The first period: a share of the duration above 0 and below 1, or a time such as "0.25dur" or "10ep".
        growth: How many times as long each period is as the one before.

    Raises:
        ArgumentError: No schedule, a length that is none of these, or a growth that is no whole number of at least 1.

    Source: Loshchilov and Hutter, SGDR, arXiv:1608.03983; torch's ``CosineAnnealingWarmRestarts``.

    Example:
        >>> [round(repeat(cosine(), 0.5)(k / 8), 3) for k in range(8)]
        [1.0, 0.854, 0.5, 0.146, 1.0, 0.854, 0.5, 0.146]
    """
    part = as_schedule(schedule, argument="repeat(schedule=)")
    span = span_of("repeat(every=)", every, "repeat(cosine(), every='10ep')")
    if isinstance(growth, bool) or not isinstance(growth, int) or growth < 1:
        takes = "a whole number of at least 1"
        raise ArgumentError("repeat(growth=)", got=growth, takes=takes, example="repeat(cosine(), '10ep', growth=2)")
    arguments: dict[str, Argument] = {"schedule": part, "every": as_written(span), "growth": growth}

    def bound(share: Share) -> Schedule:
        period = share_of(span, share)
        inner = part.bind(inside(share, period)).function

        def factor(progress: float) -> float:
            passed, length = progress / period, 1  # in first periods
            if growth == 1:
                passed -= math.floor(passed + TOLERANCE)
            while growth > 1 and passed >= length - TOLERANCE:
                passed, length = passed - length, length * growth
            return inner(max(0.0, passed) / length)

        return Schedule("repeat", arguments, factor)

    return made("repeat", arguments, bound, part.bound and not isinstance(span, Time))


def one_cycle(
    peak: Length = 0.3, start: float = 1 / 25, end: float = 1 / 25e4, anneal: str = "cosine", three_phase: bool = False
) -> Schedule:
    """Return a rise from ``start`` to 1 at ``peak``, and a fall to ``end``: the optimizer's rate is the highest.

    torch's ``OneCycleLR`` counts its phases to the last step and not to the end of the fit: with a total of n steps it is
    at the top at step ``pct_start * n - 1`` and at the bottom at step ``n - 1``. The same rates, at each of n batches::

        join([one_cycle((pct_start * n - 1) / (n - 1)), constant(1 / 25e4)], [f"{n - 1}ba"])

    Args:
        peak: When the factor is 1: a share of the duration above 0 and below 1, or a time such as "500ba".
        start: Factor at progress 0, at least 0; torch's ``1 / div_factor``.
        end: Factor at progress 1, at least 0; torch's ``1 / (div_factor * final_div_factor)``.
        anneal: ``"cosine"`` or ``"linear"``.
        three_phase: Fall back to ``start`` at twice ``peak``, and from there to ``end``.

    Raises:
        ArgumentError: A length, a factor, a kind or a flag that is none of these; three phases with a peak at half or later.

    Source: Smith and Topin, Super-Convergence, arXiv:1708.07120.

    Example:
        >>> [round(one_cycle(0.5, start=0.2, end=0.0, anneal="linear")(k / 4), 3) for k in range(5)]
        [0.2, 0.6, 1.0, 0.5, 0.0]
    """
    example = "one_cycle(0.3, anneal='cosine')"
    span = span_of("one_cycle(peak=)", peak, example)
    first = factor_of("one_cycle(start=)", start, "one_cycle(start=0.04)")
    last = factor_of("one_cycle(end=)", end, "one_cycle(end=0.0)")
    curve = _curve("one_cycle(anneal=)", anneal, {"cosine": cosine, "linear": linear}, example)
    if not isinstance(three_phase, bool):
        raise ArgumentError("one_cycle(three_phase=)", got=three_phase, takes="True or False", example=example)
    if three_phase and not isinstance(span, Time) and span >= 0.5:
        takes = "a share below 0.5, twice of which the second phase ends at"
        raise ArgumentError("one_cycle(peak=)", got=peak, takes=takes, example="one_cycle(0.3, three_phase=True)")
    arguments: dict[str, Argument] = {
        "peak": as_written(span), "start": first, "end": last, "anneal": anneal, "three_phase": three_phase,
    }  # fmt: skip

    def bound(share: Share) -> Schedule:
        top = share_of(span, share)
        parts = [curve(1.0, first), curve(first, 1.0), curve(last, first)] if three_phase else []
        parts = parts or [curve(1.0, first), curve(last, 1.0)]
        return Schedule("one_cycle", arguments, _stretches(parts, [top, 2 * top][: len(parts) - 1]))

    return made("one_cycle", arguments, bound, not isinstance(span, Time))


def wsd(
    warmup: Length = 0.05, decay: Length = 0.2, end: float = 0.0, start: float = 0.0, shape: str = "linear"
) -> Schedule:
    """Return warmup, stable, decay: a straight rise to 1, a plateau, and a fall at the very end.

    What the plateau has trained can be trained on: the length of the fit is decided by where the decay begins.

    Args:
        warmup: Length of the rise: a share of the duration above 0 and below 1, or a time such as "100ba".
        decay: Length of the fall, likewise, up to the end of the fit.
        end: Factor at progress 1, at least 0.
        start: Factor at progress 0, at least 0.
        shape: Of the fall: ``"linear"``, ``"cosine"`` or ``"1-sqrt"``.

    Raises:
        ArgumentError: A length, a factor or a shape that is none of these, or warmup and decay longer than the fit.

    Source: Hu et al., MiniCPM, arXiv:2404.06395, section 4; ``"1-sqrt"``: Hägele et al., arXiv:2405.18392.

    Example:
        >>> [wsd(0.25, 0.5)(k / 8) for k in range(9)]
        [0.0, 0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    example = "wsd(warmup='100ba', decay='0.2dur')"
    rise = span_of("wsd(warmup=)", warmup, example)
    fall = span_of("wsd(decay=)", decay, example)
    last = factor_of("wsd(end=)", end, "wsd(end=0.1)")
    first = factor_of("wsd(start=)", start, "wsd(start=0.0)")
    curve = _curve("wsd(shape=)", shape, {"linear": linear, "cosine": cosine, "1-sqrt": _square_root}, example)
    arguments: dict[str, Argument] = {
        "warmup": as_written(rise), "decay": as_written(fall), "end": last, "start": first, "shape": shape,
    }  # fmt: skip

    def bound(share: Share) -> Schedule:
        up, down = share_of(rise, share), share_of(fall, share)
        if up + down > 1 + TOLERANCE:
            takes = "together with warmup= at most the whole fit"
            raise ArgumentError("wsd(decay=)", got=decay, takes=takes, example="wsd(warmup=0.05, decay=0.2)")
        parts = [linear(1.0, first), constant(), curve(last, 1.0)]
        return Schedule("wsd", arguments, _stretches(parts, [up, max(up, 1 - down)]))

    return made("wsd", arguments, bound, not isinstance(rise, Time) and not isinstance(fall, Time))


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
    for key in ("then", "schedule"):
        if isinstance(rebuilt.get(key), dict):
            rebuilt[key] = _from_description(rebuilt[key], depth + 1)
    if isinstance(rebuilt.get("schedules"), list):
        rebuilt["schedules"] = [_from_description(each, depth + 1) for each in rebuilt["schedules"]]
    return factory(**rebuilt)


FACTORIES: Mapping[str, Callable[..., Schedule]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "warmup": warmup,
    "join": join,
    "polynomial": polynomial,
    "inverse_sqrt": inverse_sqrt,
    "repeat": repeat,
    "one_cycle": one_cycle,
    "wsd": wsd,
}


def _stretches(parts: Sequence[Schedule], boundaries: Sequence[float]) -> Callable[[float], float]:
    """Return the function that gives each schedule its stretch, rescaled to 0..1."""
    functions = [each.function for each in parts]
    # A boundary past the end of the fit is never reached, and squeezes nothing.
    edges = [0.0, *boundaries, max([1.0, *boundaries[-1:]])]

    def factor(progress: float) -> float:
        place = 0
        while place + 1 < len(functions) and progress >= edges[place + 1] - TOLERANCE:
            place += 1
        begin, end = edges[place], edges[place + 1]
        return functions[place](max(0.0, progress - begin) / (end - begin) if end > begin else 0.0)

    return factor


def _curve(
    argument: str, name: object, curves: Mapping[str, Callable[[float, float], Schedule]], example: str
) -> Callable[[float, float], Schedule]:
    if isinstance(name, str) and name in curves:
        return curves[name]
    raise ArgumentError(argument, got=name, takes=f"one of {', '.join(map(repr, curves))}", example=example)


def _square_root(end: float, start: float) -> Schedule:
    return Schedule("1-sqrt", {}, lambda progress: start + (end - start) * math.sqrt(progress))


def _increasing(edges: Sequence[float], got: object, example: str) -> None:
    if any(left >= right for left, right in pairwise(edges)):
        raise ArgumentError("join(boundaries=)", got=got, takes="boundaries that increase", example=example)
