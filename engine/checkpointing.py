"""When a fit saves, what each checkpoint holds, and which are kept."""

from __future__ import annotations

from typing import Any, Literal

from attrs import Attribute, field, frozen

from .clock import Time
from .errors import ArgumentError


def _interval(argument: str, value: Any) -> Time:
    name, example = f"Checkpointing({argument}=)", f"Checkpointing({argument}='1ep')"
    try:
        time = Time(value)
    except ArgumentError as error:
        raise ArgumentError(name, got=value, takes=error.takes, example=example) from None
    if not time.value:
        raise ArgumentError(name, got=value, takes="a time above zero", example=example)
    return time


def _every(value: str | int | Time) -> Time:
    return _interval("every", value)


def _keep_every(value: str | int | Time | None) -> Time | None:
    return None if value is None else _interval("keep_every", value)


def check_keep(instance: object, _: Attribute[Any], value: Any) -> None:
    """Validate how many of the newest checkpoints are kept."""
    owner = type(instance).__name__
    if type(value) is not int or value < 1:
        takes = "a whole number of checkpoints, at least 1"
        raise ArgumentError(f"{owner}(keep=)", got=value, takes=takes, example=f"{owner}(keep=2)")


def check_monitor(instance: object, _: Attribute[Any], value: Any) -> None:
    """Validate the name of the metric that the best checkpoint is chosen by."""
    owner = type(instance).__name__
    if value is not None and not (isinstance(value, str) and value):
        takes = "the name of a metric, or None"
        raise ArgumentError(f"{owner}(monitor=)", got=value, takes=takes, example=f"{owner}(monitor='eval/loss')")


def check_mode(instance: object, _: Attribute[Any], value: Any) -> None:
    """Validate which metric is better."""
    owner = type(instance).__name__
    if value not in ("auto", "min", "max"):
        example = f"{owner}(monitor='eval/accuracy', mode='max')"
        raise ArgumentError(f"{owner}(mode=)", got=value, takes="'auto', 'min' or 'max'", example=example)


def _check_frozen(_: object, __: Attribute[Any], value: Any) -> None:
    if value not in ("store", "fingerprint"):
        example = "Checkpointing(frozen='fingerprint')"
        raise ArgumentError("Checkpointing(frozen=)", got=value, takes="'store' or 'fingerprint'", example=example)


@frozen
class Checkpointing:
    """When to save, what to keep, and what a checkpoint holds.

    Args:
        every: The time between checkpoints: ``"1ep"``, ``"200ba"``, ``"0.1dur"``.
        keep: How many of the newest checkpoints to keep.
        monitor: The metric that the best checkpoint, kept besides, is chosen by, such as ``"eval/loss"``; None for none.
        mode: Whether the smallest (``"min"``) or largest (``"max"``) metric is the best; ``"auto"`` goes by the metric's
            name, as :func:`direction_of` does: ``"max"`` for an accuracy, ``"min"`` for a loss.
        frozen: ``"store"`` writes every weight. ``"fingerprint"`` writes the SHA-256 alone of those that are as the fit
            found them: such a checkpoint costs what trains and its optimizer state, and whoever resumes from it brings
            the same model; another one is refused.
        keep_every: The time between checkpoints that are kept for good; None for none.

    Raises:
        ArgumentError: A wrong argument.

    Warns:
        ThawlineWarning: During the fit, once, where an evaluation has passed and nobody has logged ``monitor``.

    Example:
        >>> Checkpointing(every="200ba", monitor="eval/accuracy").every
        Time('200ba')
        >>> Checkpointing(keep_every="5ep", frozen="fingerprint").times
        (Time('1ep'), Time('5ep'))
    """

    every: Time = field(default=Time("1ep"), converter=_every)
    keep: int = field(default=2, validator=check_keep)
    monitor: str | None = field(default=None, validator=check_monitor)
    mode: Literal["auto", "min", "max"] = field(default="auto", validator=check_mode)
    frozen: Literal["store", "fingerprint"] = field(default="store", validator=_check_frozen)
    keep_every: Time | None = field(default=None, converter=_keep_every)

    @property
    def times(self) -> tuple[Time, ...]:
        """The intervals at whose ends a checkpoint is due."""
        return (self.every,) if self.keep_every is None else (self.every, self.keep_every)
