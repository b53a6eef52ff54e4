"""Validation of the Trainer's arguments: each wrong one is an ArgumentError that says what to write."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import Attribute
from torch import nn

from .clock import LONGEST, Clock, Time
from .errors import ArgumentError, warn
from .schedule import Schedule, Share, inside

Validator = Callable[[Any, "Attribute[Any]", Any], None]


def one_of(*values: object) -> Validator:
    """Return a validator for an argument that takes one of ``values``."""

    def check(_: object, attribute: Attribute[Any], value: object) -> None:
        if not any(value is each or (type(value) is type(each) and value == each) for each in values):
            listed = [repr(each) for each in values]
            takes = f"one of {', '.join(listed)}" if len(listed) > 2 else " or ".join(listed)
            takes = takes if len(listed) > 1 else f"only {takes} in this version"
            raise _wrong(attribute.name, value, takes, f"{attribute.name}={values[0]!r}")

    return check


_PRECISIONS = {
    "fp32": ("float32", "float", "full", "32", "32-true"),
    "bf16": ("bfloat16", "bf16-mixed", "bf16-true", "amp_bf16"),
    "fp16": ("float16", "half", "16", "16-mixed", "16-true", "amp_fp16", "mixed"),
}


def precision_name(_: object, attribute: Attribute[Any], value: object) -> None:
    """Validate the name of a precision; another name of one, or torch's dtype, says which to write."""
    if isinstance(value, str) and value in _PRECISIONS:
        return
    text = str(value).lower().removeprefix("torch.")
    meant = next((name for name, others in _PRECISIONS.items() if text == name or text in others), "bf16")
    raise _wrong(attribute.name, value, f"one of {', '.join(map(repr, _PRECISIONS))}", f"{attribute.name}={meant!r}")


def whole(minimum: int, *, maximum: int = sys.maxsize, optional: bool = False) -> Validator:
    """Return a validator for a whole number from ``minimum`` to ``maximum``."""

    def check(_: object, attribute: Attribute[Any], value: object) -> None:
        if optional and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            takes = f"a whole number from {minimum} to {maximum}{', or None' if optional else ''}"
            raise _wrong(attribute.name, value, takes, f"{attribute.name}={max(minimum, 8)}")

    return check


def not_negative(_: object, attribute: Attribute[Any], value: object) -> None:
    """Validate a number from 0 on that is finite as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= sys.float_info.max:
        raise _wrong(attribute.name, value, "a finite number, 0 or above", f"{attribute.name}=0.0")


def function_of(*arguments: str, example: str) -> Validator:
    """Return a validator for None or a function that can be called with ``arguments``, which are named for the message."""
    takes = f"a function ({', '.join(arguments)}), or None"

    def check(_: object, attribute: Attribute[Any], value: object) -> None:
        if value is None:
            return
        if isinstance(value, type) or not callable(value) or not can_call(value, len(arguments)):
            raise _wrong(attribute.name, value, takes, f"{attribute.name}={example}")

    return check


def loss_function(owner: object, attribute: Attribute[Any], value: object) -> None:
    """Validate None or a function of outputs and targets; a class of torch's losses, or a name, says what to write."""
    example = "torch.nn.functional.cross_entropy"
    if isinstance(value, type):
        example = f"torch.nn.{value.__name__}()" if hasattr(nn, value.__name__) else example
    elif isinstance(value, str) and callable(getattr(nn.functional, value, None)):
        example = f"torch.nn.functional.{value}"
    function_of("outputs", "targets", example=example)(owner, attribute, value)


def can_call(function: Callable[..., object], count: int) -> bool:
    """Return whether ``function`` takes ``count`` positional arguments, as far as its signature tells.

    Example:
        >>> can_call(lambda outputs, targets: 0.0, 2), can_call(lambda outputs: 0.0, 2)
        (True, False)
    """
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        # What a decorator wraps may have another signature than what it returns.
        signature = inspect.signature(called, follow_wrapped=False)
    except (TypeError, ValueError):  # built in
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def path_of(argument: str, value: str | Path, example: str) -> Path:
    """Return a path that the system can be asked for.

    Raises:
        ArgumentError: It is no path, is empty, holds a NUL, or cannot be encoded.
    """
    try:
        sound = bool(str(value)) and b"\0" not in os.fsencode(value)
    except (UnicodeEncodeError, TypeError):
        sound = False
    if not sound:
        raise ArgumentError(argument, got=value, takes="a path the file system can have", example=example)
    return Path(value)


def require_weights(call: str, model: nn.Module, *, lazy: bool = False) -> None:
    """Raise an ArgumentError where the model has parameters or buffers without data.

    Args:
        call: ``"fit"`` or ``"evaluate"``, for the message.
        model: The model.
        lazy: Whether those of lazy modules may wait for the first batch.
    """
    for name, each in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(each):
            if lazy:
                continue
            takes = f"a model that has had a batch, which gives {name!r} of a lazy module its shape"
            example = f"model(inputs) once, and then trainer.{call}(model, …)"
        elif each.is_meta:
            takes = f"a model with weights: {name!r} is on the device 'meta', which holds none"
            example = "model.to_empty(device='cpu'), load its weights, and then trainer." + f"{call}(model, …)"
        else:
            continue
        raise ArgumentError(f"Trainer.{call}(model=)", got=type(model).__name__, takes=takes, example=example)


def interval(name: str, value: object) -> Time:
    """Return how often something happens, or raise an ArgumentError."""
    try:
        time = Time(value)  # type: ignore[arg-type]  # anything may come; Time refuses it
    except ArgumentError as error:
        raise _wrong(name, value, error.takes, f"{name}='1ep'") from None
    if not time.value:
        raise _wrong(name, value, "a time above zero", f"{name}='1ep'")
    return time


def duration_of(value: object, call: str = "fit") -> Time:
    """Return the duration of a fit.

    Raises:
        ArgumentError: It is no time, zero, or a share of itself.
    """
    example = f"trainer.{call}(model, train_loader, duration='3ep')"
    takes = f"a time above zero, at most {LONGEST:.0e}, in epochs ('3ep' or 3), batches ('200ba') or samples ('5000sp')"
    try:
        time = Time(value)  # type: ignore[arg-type]
    except ArgumentError:
        raise ArgumentError(f"Trainer.{call}(duration=)", got=value, takes=takes, example=example) from None
    if time.unit == "dur" or not time.value:
        raise ArgumentError(f"Trainer.{call}(duration=)", got=value, takes=takes, example=example)
    return time


def device_of(name: object) -> torch.device:
    """Return the device that ``Trainer(device=)`` means; ``"auto"`` is CUDA where there is one.

    Raises:
        ArgumentError: There is no such device, or it is ``"meta"``, which holds no numbers.
    """
    if isinstance(name, str) and name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device: torch.device = torch.device(name)  # type: ignore[call-overload]  # any object may come; torch refuses it
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        known = "'auto', 'cpu'" + (", 'cuda'" if torch.cuda.is_available() else "")
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _wrong("device", name, f"a device that is here ({known}); torch says: {first}", "device='auto'") from None
    if device.type == "meta":
        raise _wrong("device", name, "a device that holds numbers, which 'meta' does not", "device='auto'")
    return device


def share_of(duration: Time, batches_per_epoch: int) -> Callable[[Time], float]:
    """Return what share of the duration a time is, as far as the loader's length tells.

    Raises:
        ArgumentError: The time cannot be related to the duration, one counting batches, the other samples.
    """

    def share(time: Time) -> float:
        if time.unit == "dur":
            return float(time.value)
        if time.unit == duration.unit:
            return time.value / duration.value
        batches = {"ba": time.value, "ep": time.value * batches_per_epoch}
        totals = {"ba": duration.value, "ep": duration.value * batches_per_epoch}
        if time.unit in batches and duration.unit in totals and batches_per_epoch:
            return batches[time.unit] / totals[duration.unit]
        raise _wrong("schedule", str(time), f"times that can be related to the duration {duration}", "warmup('0.1dur')")

    return share


def bound_schedule(schedule: Schedule, duration: Time, batches_per_epoch: int) -> Schedule:
    """Return the schedule with its times turned into shares of the duration.

    Raises:
        ArgumentError: A time of it cannot be related to the duration.

    Warns:
        ThawlineWarning: A warmup in it is not over when the fit ends, or the part of the fit that it has in another one.
    """
    share = share_of(duration, batches_per_epoch)
    bound = schedule.bind(share)
    for length, around in _endless_warmups(schedule, share):
        ends = f"its part of {around}(…) ends" if around else f"the fit ends after {duration}"
        warn(
            f"warmup({length!r}) is not over when {ends}, so the full rate is never reached. An int is epochs: write "
            "warmup('100ba') for batches, or warmup('0.1dur') for a share of the fit."
        )
    return bound


def _endless_warmups(schedule: Schedule, share: Share, around: str = "") -> Iterator[tuple[str, str]]:
    """Yield the length of each warmup that is not over in the time it has, with the name of what it is a part of."""

    def at(span: Any) -> float:
        return share(Time(span)) if isinstance(span, str) else span

    arguments: Mapping[str, Any] = schedule.arguments
    if schedule.name == "warmup":
        if (rise := at(arguments["length"])) >= 1:
            yield arguments["length"], around
        yield from _endless_warmups(arguments["then"], inside(share, 1 - rise), schedule.name) if rise < 1 else ()
    elif schedule.name == "join":
        begins = [0.0, *map(at, arguments["boundaries"])]
        for each, begin, end in zip(arguments["schedules"], begins, [*begins[1:], 1.0], strict=True):
            if begin < 1:
                yield from _endless_warmups(each, inside(share, end - begin), schedule.name)
    elif schedule.name == "repeat":
        yield from _endless_warmups(arguments["schedule"], inside(share, at(arguments["every"])), schedule.name)


def total_batches(duration: Time, clock: Clock) -> int | None:
    """Return how many batches a fit has, None where the loader's length does not say."""
    if duration.unit == "ba":
        return int(duration.value)
    if duration.unit == "ep" and clock.batches_per_epoch:
        return int(duration.value) * clock.batches_per_epoch
    return None


def _wrong(name: str, got: object, takes: str, example: str) -> ArgumentError:
    return ArgumentError(f"Trainer({name}=)", got=got, takes=takes, example=f"Trainer({example})")
