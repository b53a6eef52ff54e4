"""Validators of the algorithms' arguments: each raises an ArgumentError that names the argument and a correct call.

As attrs validators they know by themselves whose argument they check::

    rank: int = attrs.field(default=8, validator=whole(at_least=1))

says ``LoRAInject(rank=) takes a whole number, 1 or above, got 0. Write: LoRAInject(rank=8)``: the example is the
field's default, or what ``example=`` says. Where a call needs another argument as well, the field of that one has it
written out as ``metadata={"call": "thaw='head'"}``. The ``check_…`` functions are the same for arguments of plain functions
and for converters; they are told the argument's name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias, cast

import attrs

from ..engine import ArgumentError, Time

Validator: TypeAlias = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def in_range(
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    example: object = None,
    or_none: bool = False,
) -> Validator:
    """Check a finite number within bounds.

    Args:
        above: Exclusive lower bound.
        at_least: Inclusive lower bound.
        below: Exclusive upper bound.
        at_most: Inclusive upper bound.
        example: The value in the corrected call; the default of the field where it has one.
        or_none: Whether None passes as well.

    Example:
        >>> rate = attrs.make_class("Rate", {"lr": attrs.field(default=0.1, validator=in_range(above=0, at_most=1, or_none=True))})
        >>> rate(1).lr, rate(None).lr
        (1, None)
        >>> rate(0)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Rate(lr=) takes a number above 0 and 1 or below, or None, got 0. Write: Rate(lr=0.1)
    """

    def validate(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if value is None and or_none:
            return
        argument, call = _named(instance, attribute, example)
        check_in_range(
            argument, value, above=above, at_least=at_least, below=below, at_most=at_most, example=call, or_none=or_none
        )

    return validate


def positive(*, example: object = None, or_none: bool = False) -> Validator:
    """Check a finite number above 0.

    Example:
        >>> share = attrs.make_class("Share", {"of": attrs.field(validator=positive(example=0.5))})
        >>> share(-1)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Share(of=) takes a number above 0, got -1. Write: Share(of=0.5)
    """
    return in_range(above=0, example=example, or_none=or_none)


def whole(
    *, at_least: int | None = None, at_most: int | None = None, example: object = None, or_none: bool = False
) -> Validator:
    """Check a whole number within bounds; True and False are none.

    Example:
        >>> rank = attrs.make_class("Rank", {"rank": attrs.field(default=8, validator=whole(at_least=1, at_most=64, or_none=True))})
        >>> rank(1).rank, rank(64).rank, rank(None).rank
        (1, 64, None)
        >>> rank(True)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Rank(rank=) takes a whole number, 1 or above and 64 or below, or None, got True. Write: Rank(rank=8)
    """

    def validate(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if value is None and or_none:
            return
        argument, call = _named(instance, attribute, example)
        check_whole(argument, value, at_least=at_least, at_most=at_most, example=call, or_none=or_none)

    return validate


def one_of(choices: Collection[object], *, example: object = None) -> Validator:
    """Check that the value is one of a few.

    Example:
        >>> mode = attrs.make_class("Watch", {"mode": attrs.field(validator=one_of(("min", "max")))})
        >>> mode("max").mode
        'max'
        >>> mode("mean")
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Watch(mode=) takes 'min' or 'max', got 'mean'. Write: Watch(mode='min')
    """

    def validate(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        argument, call = _named(instance, attribute, next(iter(choices)) if example is None else example)
        check_one_of(argument, value, choices, example=call)

    return validate


def flag() -> Validator:
    """Check for True or False.

    Example:
        >>> restore = attrs.make_class("Stop", {"restore": attrs.field(validator=flag())})
        >>> restore(False).restore
        False
        >>> restore(1)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Stop(restore=) takes True or False, got 1. Write: Stop(restore=True)
    """

    def validate(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, bool):
            argument, call = _named(instance, attribute, True)
            raise ArgumentError(argument, got=value, takes="True or False", example=call)

    return validate


def text(*, example: str, or_none: bool = False) -> Validator:
    """Check for a string that is not empty.

    Example:
        >>> metric = attrs.make_class("Stop", {"metric": attrs.field(validator=text(example="eval/loss", or_none=True))})
        >>> metric("loss").metric, metric(None).metric
        ('loss', None)
        >>> metric("")
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Stop(metric=) takes a string or None, got ''. Write: Stop(metric='eval/loss')
    """

    def validate(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if (value is None and or_none) or (isinstance(value, str) and value):
            return
        argument, call = _named(instance, attribute, example)
        raise ArgumentError(argument, got=value, takes="a string" + " or None" * or_none, example=call)

    return validate


def check_time(argument: str, value: object, *, example: str, zero: bool = False, or_none: bool = False) -> Time:
    """Return ``value`` as a Time, or raise an ArgumentError that names ``argument``.

    Example:
        >>> check_time("Thaw(every=)", "3ep", example="Thaw(every=2)"), check_time("Thaw(at=)", 0, example="Thaw(at=1)", zero=True)
        (Time('3ep'), Time('0ep'))
        >>> check_time("Thaw(every=)", 0, example="Thaw(every=2)")
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Thaw(every=) takes a time above zero: an int (epochs), '3ep', '200ba', '5000sp' or '0.5dur', got 0. Write: Thaw(every=2)
        >>> check_time("Thaw(at=)", "soon", example="Thaw(at=1)", zero=True, or_none=True)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Thaw(at=) takes a time: an int (epochs), '3ep', '200ba', '5000sp' or '0.5dur', or None, got 'soon'. Write: Thaw(at=1)
        >>> check_time("Thaw(at=)", "2.5ba", example="Thaw(at=1)")
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Thaw(at=) takes whole batches; a fraction of the fit is '0.5dur', got '2.5ba'. Write: Thaw(at=1)
    """
    takes = "a time above zero: " if not zero else "a time: "
    takes += "an int (epochs), '3ep', '200ba', '5000sp' or '0.5dur'" + ", or None" * or_none
    try:
        time = Time(value)  # type: ignore[arg-type]  # checked by Time
    except ArgumentError as error:
        takes = takes if error.takes.startswith("a time") else error.takes
        raise ArgumentError(argument, got=value, takes=takes, example=example) from None
    if not zero and not time.value:
        raise ArgumentError(argument, got=value, takes=takes, example=example)
    return time


def check_selectors(argument: str, value: object, *, example: str, empty: bool = False) -> tuple[str, ...]:
    """Return ``value``, a selector or a list of them, as a tuple, or raise an ArgumentError that names ``argument``.

    Example:
        >>> check_selectors("Freeze(keep=)", "head", example="…"), check_selectors("Freeze(keep=)", [], example="…", empty=True)
        (('head',), ())
        >>> check_selectors("Freeze(keep=)", [], example="Freeze(keep='head')")
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Freeze(keep=) takes a selector or a list, got []. Write: Freeze(keep='head')
        >>> check_selectors("Freeze(keep=)", ["head", ""], example="Freeze(keep='head')", empty=True)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Freeze(keep=) takes a selector or a list, which may be empty, got ['head', '']. Write: Freeze(keep='head')
    """
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else None
    if names is None or not (names or empty) or not all(isinstance(each, str) and each for each in names):
        takes = "a selector or a list" + ", which may be empty" * empty
        raise ArgumentError(argument, got=value, takes=takes, example=example)
    return names


def check_in_range(
    argument: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    example: str,
    or_none: bool = False,
) -> float:
    """Return ``value``, a finite number within bounds, or raise an ArgumentError that names ``argument``.

    Example:
        >>> check_in_range("freeze_layers(start=)", 1.5, at_least=0, below=1, example="freeze_layers(…, start=0.5)")
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: freeze_layers(start=) takes a number, 0 or above and below 1, got 1.5. Write: freeze_layers(…, start=0.5)
        >>> check_in_range("f(x=)", True, at_most=1, example="f(x=0.5)", or_none=True)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: f(x=) takes a number, 1 or below, or None, got True. Write: f(x=0.5)
        >>> check_in_range("f(x=)", float("inf"), example="f(x=1)")
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: f(x=) takes a number, got inf. Write: f(x=1)
    """
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if fits and _within(value, above, at_least, below, at_most):  # type: ignore[arg-type]  # a number, as just checked
        return value  # type: ignore[return-value]
    takes = "a number" + _bounds(above, at_least, below, at_most) + ", or None" * or_none
    raise ArgumentError(argument, got=value, takes=takes, example=example)


def check_whole(
    argument: str,
    value: object,
    *,
    at_least: int | None = None,
    at_most: int | None = None,
    example: str,
    or_none: bool = False,
) -> int:
    """Return ``value``, a whole number within bounds, or raise an ArgumentError that names ``argument``.

    Example:
        >>> check_whole("f(n=)", 3, at_least=3, example="f(n=3)")
        3
        >>> check_whole("f(n=)", 2.0, at_least=1, example="f(n=2)", or_none=True)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: f(n=) takes a whole number, 1 or above, or None, got 2.0. Write: f(n=2)
    """
    if isinstance(value, int) and not isinstance(value, bool) and _within(value, None, at_least, None, at_most):
        return value
    takes = "a whole number" + _bounds(None, at_least, None, at_most) + ", or None" * or_none
    raise ArgumentError(argument, got=value, takes=takes, example=example)


def check_one_of(argument: str, value: object, choices: Collection[object], *, example: str) -> None:
    """Raise an ArgumentError that names ``argument`` where ``value`` is none of ``choices``.

    Example:
        >>> check_one_of("f(bias=)", "all", ("none", "all", "lora"), example="…")
        >>> check_one_of("f(bias=)", 1, (True, False, "auto"), example="f(bias=True)")
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: f(bias=) takes one of True, False, 'auto', got 1. Write: f(bias=True)
    """
    # By type as well: 1 == True.
    if not any(type(value) is type(each) and value == each for each in choices):
        takes = f"one of {', '.join(map(repr, choices))}" if len(choices) > 2 else " or ".join(map(repr, choices))
        raise ArgumentError(argument, got=value, takes=takes, example=example)


def _named(instance: object, attribute: attrs.Attribute[Any], example: object) -> tuple[str, str]:
    """Return the argument with its owner, and a corrected call.

    Example:
        >>> thaw = attrs.make_class("Thaw", {"what": attrs.field(metadata={"call": "what='head'"}), "every": attrs.field(default=2)})
        >>> _named(thaw("stem"), attrs.fields(thaw).every, None), _named(thaw("stem"), attrs.fields(thaw).what, "head")[1]
        (('Thaw(every=)', "Thaw(what='head', every=2)"), "Thaw(what='head')")
    """
    owner, name = type(instance).__name__, attribute.alias
    if example is None and attribute.default is not attrs.NOTHING:
        example = attribute.default
    fields = attrs.fields(cast("type[attrs.AttrsInstance]", type(instance)))
    needed = [each.metadata["call"] for each in fields if "call" in each.metadata and each.name != attribute.name]
    return f"{owner}({name}=)", f"{owner}({', '.join([*needed, f'{name}={example!r}'])})"


def _within(
    value: float, above: float | None, at_least: float | None, below: float | None, at_most: float | None
) -> bool:
    """Return whether a number lies within those of the bounds that there are.

    Example:
        >>> _within(1, None, 1, None, 1), _within(1, None, None, None, None)
        (True, True)
        >>> _within(1, 1, None, None, None), _within(1, None, 2, None, None), _within(1, None, None, 1, None), _within(1, None, None, None, 0)
        (False, False, False, False)
    """
    return (
        (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (below is None or value < below)
        and (at_most is None or value <= at_most)
    )


def _bounds(above: float | None, at_least: float | None, below: float | None, at_most: float | None) -> str:
    """Return the bounds in words; nothing where there are none.

    Example:
        >>> _bounds(0, None, None, None), _bounds(None, 1, None, None), _bounds(None, None, None, None)
        (' above 0', ', 1 or above', '')
        >>> _bounds(None, None, 1, None), _bounds(None, None, None, 1), _bounds(0, None, None, 1)
        (' below 1', ', 1 or below', ' above 0 and 1 or below')
    """
    lower = f" above {above}" if above is not None else f", {at_least} or above" if at_least is not None else ""
    if at_most is not None:
        upper = f"{at_most} or below"
    elif below is not None:
        upper = f"below {below}"
    else:
        return lower
    return f"{lower} and {upper}" if lower else f" {upper}" if below is not None else f", {upper}"
