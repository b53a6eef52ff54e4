"""Time in training: spans such as "3ep" or "0.5dur", and the clock that they are read against."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from attrs import frozen
from typing_extensions import override

from .errors import ArgumentError

N = TypeVar("N", int, float)
TIME_UNITS = {"ep": "epochs", "ba": "batches", "sp": "samples", "dur": "a share of the duration"}
_TIME = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d+))?\s*(ep|ba|sp|dur)\s*")
_FORMS = "a time: an int (epochs), '3ep', '200ba' (batches), '5000sp' (samples) or '0.5dur' (share of the duration)"
LONGEST = 10**15
"""The largest amount of a :class:`Time`: every whole number up to it is exact as a float, and nobody trains longer."""
# In a fifth of the time of Clock(…), once a batch.
_new = tuple.__new__
# Fractions of a duration are floats: 3/10 divided by 0.1 is 2.9999999999999996 and means 3.
_TOLERANCE = 1e-9


@frozen(init=False, slots=True)
class Time:
    """A span of training: epochs, batches, samples, or a share of the fit's duration.

    Args:
        time: ``"3ep"``, ``"200ba"``, ``"5000sp"``, ``"0.5dur"``, an int (epochs), or another Time.

    Raises:
        ArgumentError: The text is none of these, the amount is negative or above 1e15, or
            it is not whole where it counts epochs, batches or samples.

    Example:
        >>> Time("0.5dur").reached(Clock(epoch=5, batch=50, progress=0.5))
        True
        >>> Time(3) == Time("3ep"), str(Time("200ba"))
        (True, '200ba')
    """

    value: int | float
    unit: str

    def __init__(self, time: str | int | Time) -> None:
        value, unit = _parse(time)
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "unit", unit)

    @override
    def __str__(self) -> str:
        return f"{self.value}{self.unit}"

    @override
    def __repr__(self) -> str:
        return f"Time({str(self)!r})"

    def elapsed(self, clock: Clock) -> float:
        """Return how much has passed at ``clock``, in this time's unit.

        Epochs count fractions of the running epoch where its length is known.
        """
        if self.unit == "ba":
            return clock.batch
        if self.unit == "sp":
            return clock.sample
        if self.unit == "dur":
            return clock.progress
        return clock.epoch + (clock.batch_in_epoch / clock.batches_per_epoch if clock.batches_per_epoch else 0.0)

    def count(self, clock: Clock) -> int:
        """Return how many whole spans of this length have passed at ``clock``."""
        if not self.value:
            raise ArgumentError("every", got=str(self), takes="a time above zero", example="every='1ep'")
        return math.floor(self.elapsed(clock) / self.value + _TOLERANCE)

    def reached(self, clock: Clock) -> bool:
        """Return whether ``clock`` stands at this time or past it."""
        return self.elapsed(clock) >= self.value - _TOLERANCE

    def crossed(self, before: Clock, after: Clock) -> bool:
        """Return whether a multiple of this time lies in the ticks from ``before`` to ``after``."""
        return self.count(after) > self.count(before)

    def not_before(self, clock: Clock) -> int:
        """Return a batch up to which no multiple of this time passes after ``clock``: cheaper to ask than :meth:`crossed`.

        Example:
            >>> Time("10ba").not_before(Clock(batch=13)), Time("1ep").not_before(Clock(batch=13))
            (20, 14)
        """
        if self.unit == "ba":
            return (clock.batch // int(self.value) + 1) * int(self.value)
        if self.unit == "ep" and clock.batches_per_epoch:
            return clock.batch + max(1, clock.batches_per_epoch - clock.batch_in_epoch)
        return clock.batch + 1


def _parse(time: object) -> tuple[int | float, str]:
    if isinstance(time, Time):
        return time.value, time.unit
    if isinstance(time, int) and not isinstance(time, bool):
        if time < 0:
            raise ArgumentError("Time", got=time, takes=_FORMS, example="Time('3ep')")
        return _bounded(time, time), "ep"
    found = _TIME.fullmatch(time) if isinstance(time, str) and len(time) <= 64 else None
    if found is None:
        raise ArgumentError("Time", got=time, takes=_FORMS, example="Time('3ep')")
    number, exponent, unit = found.groups()
    value = _bounded(float(f"{number}e{exponent or 0}"), time)  # float() of text saturates to inf
    if unit == "dur":
        return value, unit
    if value != int(value):
        finer = "; a part of an epoch is a number of batches, such as '50ba'" * (unit == "ep")
        takes = f"whole {TIME_UNITS[unit]}{finer}; a fraction of the fit is '0.5dur'"
        raise ArgumentError("Time", got=time, takes=takes, example=f"Time('{max(1, round(value))}{unit}')")
    return int(value), unit


def _bounded(value: N, time: object) -> N:
    if value > LONGEST:
        raise ArgumentError("Time", got=time, takes=f"a time of at most {LONGEST:.0e}", example="Time('200ba')")
    return value


class Clock(NamedTuple):
    """Where training stands. Immutable: each tick makes a new one, in a quarter of the time that an attrs class takes.

    Args:
        epoch: Epochs completed.
        batch: Batches (optimizer steps) completed.
        batch_in_epoch: Batches completed in the running epoch.
        sample: Samples consumed.
        progress: Share of the duration completed, 0 to 1; moves every batch whatever the duration's unit.
        batches_per_epoch: Batches of one epoch, 0 where the loader does not say.

    Example:
        >>> clock = Clock(batches_per_epoch=2).after_batch(samples=8, duration=Time("2ep"))
        >>> clock.batch, clock.sample, clock.progress
        (1, 8, 0.25)
    """

    epoch: int = 0
    batch: int = 0
    batch_in_epoch: int = 0
    sample: int = 0
    progress: float = 0.0
    batches_per_epoch: int = 0

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Clock:
        """Build from the fields as a checkpoint holds them.

        Raises:
            ArgumentError: They are not those of a clock.
        """
        kinds = {name: type(value) for name, value in cls().to_json().items()}
        found = {name: type(value) for name, value in saved.items()}
        if found != kinds or not all(0 <= value <= LONGEST for value in saved.values()):
            raise ArgumentError("Clock.from_json", got=saved, takes=f"{', '.join(kinds)}", example="Clock(batch=8)")
        return cls(**saved)

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name, for :meth:`from_json`."""
        return self._asdict()

    def after_batch(self, *, samples: int, duration: Time) -> Clock:
        """Return the clock one batch of ``samples`` samples later."""
        epoch, batch, inside, sample, _, length = self
        batch, inside, sample = batch + 1, inside + 1, sample + samples
        progress = self._progress(epoch, batch, inside, sample, duration)
        return _new(Clock, (epoch, batch, inside, sample, progress, length))

    def after_epoch(self, *, duration: Time) -> Clock:
        """Return the clock with the running epoch counted as completed."""
        epoch, batch, _, sample, _, length = self
        return Clock(epoch + 1, batch, 0, sample, self._progress(epoch + 1, batch, 0, sample, duration), length)

    def _progress(self, epoch: int, batch: int, inside: int, sample: int, duration: Time) -> float:
        unit, value, length = duration.unit, duration.value, self.batches_per_epoch
        if unit == "ba":
            done = batch / value
        elif unit == "sp":
            done = sample / value
        elif inside < length:
            # One division of whole numbers, so that step k of n stands at exactly k / n.
            done = (epoch * length + inside) / (value * length)
        else:
            done = (epoch + 1 if length else epoch) / value
        return done if done < 1.0 else 1.0  # noqa: FURB136 - once a batch, where a call of min() takes as long as all above
