"""What a schedule must give, by its formula over exact fractions of a fit: an account of schedules that shares no code with them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from attrs import evolve, frozen

from .clock import Time

Curve = Callable[[float], float]
"""How far a curve has come, from 0 to 1, where so much of its stretch has passed."""


def power_of_rest(progress: float, *, exponent: float) -> float:
    """Fall to 0, as a user would write it."""
    return float((1 - progress) ** exponent)


@frozen
class Stretch:
    """The part of a fit that a schedule has for itself, and where in it training stands.

    Args:
        place: What has passed of it, from 0 to 1.
        share: What share of the fit a time is.
        part: What share of the fit the stretch is.
    """

    place: Fraction
    share: Callable[[Time], Fraction]
    part: Fraction = Fraction(1)

    def span(self, length: float | str) -> Fraction:
        """Return what share of the stretch a length in a schedule's description is."""
        return self.share(Time(length)) / self.part if isinstance(length, str) else Fraction(str(length))

    def within(self, begin: Fraction, length: Fraction) -> Stretch:
        """Return the stretch inside that begins and is as long as these shares of it."""
        return evolve(self, place=(self.place - begin) / length, part=self.part * length)


def factor_of(description: Mapping[str, Any], stretch: Stretch) -> float:
    """Return the factor that a schedule must give.

    Args:
        description: What :meth:`~thawline.engine.Schedule.describe` returns.
        stretch: Where training stands.

    Example:
        >>> from thawline.engine import linear, warmup
        >>> schedule = warmup("2ba", then=linear()).describe()
        >>> [factor_of(schedule, Stretch(Fraction(k, 4), lambda time: Fraction(time.value, 4))) for k in range(4)]
        [0.0, 0.5, 1.0, 0.5]
    """
    return _FORMS[description["name"]](description["arguments"], stretch)


def _line(passed: float) -> float:
    return passed


def _half_cosine(passed: float) -> float:
    return (1 - math.cos(math.pi * passed)) / 2


def _through(points: Sequence[tuple[Fraction, float]], curves: Sequence[Curve], place: Fraction) -> float:
    """Return the height of curves that go from point to point; the last of two points at one place counts."""
    at = min(bisect_right([each for each, _ in points], place), len(curves)) - 1
    (begin, before), (end, after) = points[at], points[at + 1]
    return float(before + (after - before) * curves[at](float((place - begin) / (end - begin))))


def _constant(given: Mapping[str, Any], _: Stretch) -> float:
    return float(given["factor"])


def _linear(given: Mapping[str, Any], stretch: Stretch) -> float:
    return float(given["start"] + (given["end"] - given["start"]) * float(stretch.place))


def _cosine(given: Mapping[str, Any], stretch: Stretch) -> float:
    return float(given["start"] + (given["end"] - given["start"]) * _half_cosine(float(stretch.place)))


def _polynomial(given: Mapping[str, Any], stretch: Stretch) -> float:
    return float(given["end"] + (given["start"] - given["end"]) * float(1 - stretch.place) ** given["power"])


def _inverse_sqrt(given: Mapping[str, Any], stretch: Stretch) -> float:
    return 1 / math.sqrt(1 + stretch.place / stretch.span(given["timescale"]))


def _power_of_rest(given: Mapping[str, Any], stretch: Stretch) -> float:
    return float(float(1 - stretch.place) ** given["exponent"])


def _warmup(given: Mapping[str, Any], stretch: Stretch) -> float:
    rise = stretch.span(given["length"])
    if stretch.place >= rise:
        return factor_of(given["then"], stretch.within(rise, 1 - rise))
    top = factor_of(given["then"], evolve(stretch, place=Fraction(0)))
    return float(given["start"] + (top - given["start"]) * float(stretch.place / rise))


def _join(given: Mapping[str, Any], stretch: Stretch) -> float:
    edges = [Fraction(0), *map(stretch.span, given["boundaries"]), Fraction(1)]
    at = bisect_right(edges[:-1], stretch.place) - 1
    return factor_of(given["schedules"][at], stretch.within(edges[at], edges[at + 1] - edges[at]))


def _repeat(given: Mapping[str, Any], stretch: Stretch) -> float:
    first = period = stretch.span(given["every"])
    begin = Fraction(0)
    while stretch.place >= begin + period:
        begin, period = begin + period, period * given["growth"]
    # What lies inside grows with the period, as if time passed more slowly in a longer one.
    inside = stretch.within(begin, period)
    return factor_of(given["schedule"], evolve(inside, part=stretch.part * first))


def _one_cycle(given: Mapping[str, Any], stretch: Stretch) -> float:
    top, start, end = stretch.span(given["peak"]), given["start"], given["end"]
    points = [(Fraction(0), start), (top, 1.0), *([(2 * top, start)] if given["three_phase"] else [])]
    curve = {"cosine": _half_cosine, "linear": _line}[given["anneal"]]
    return _through([*points, (Fraction(1), end)], [curve] * len(points), stretch.place)


def _wsd(given: Mapping[str, Any], stretch: Stretch) -> float:
    rise, fall = stretch.span(given["warmup"]), stretch.span(given["decay"])
    points = [(Fraction(0), given["start"]), (rise, 1.0), (1 - fall, 1.0), (Fraction(1), given["end"])]
    shape = {"linear": _line, "cosine": _half_cosine, "1-sqrt": math.sqrt}[given["shape"]]
    return _through(points, [_line, _line, shape], stretch.place)


_FORMS: Mapping[str, Callable[[Mapping[str, Any], Stretch], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    f"{__name__}.{power_of_rest.__qualname__}": _power_of_rest,
    "warmup": _warmup,
    "join": _join,
    "repeat": _repeat,
    "one_cycle": _one_cycle,
    "wsd": _wsd,
}
