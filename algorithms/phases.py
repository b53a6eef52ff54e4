"""What a schedule of phases says: which parameters thaw when, how they train, and until when."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, cast

import attrs

from ..engine import ArgumentError, Time
from .arguments import check_in_range, check_time, in_range, one_of, positive, text, whole

if TYPE_CHECKING:
    from ..engine import State

Until: TypeAlias = "Time | Plateau | Callable[[State], bool] | None"

SCHEDULES = ("constant", "linear", "cosine")
"""The engine's schedules that need no argument, by the names under which a phase asks for one."""


_NEEDS = {"Phase": "thaw='head'", "Plateau": "'eval/loss'"}


def _span(value: Any, argument: str, example: str = "2ep") -> Time | None:
    """Return a time of an argument, None where there is none.

    Example:
        >>> _span(3, "Phase(until=)"), _span(None, "Phase(until=)")
        (Time('3ep'), None)
        >>> _span("soon", "Plateau(at_most=)", "5ep")
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Plateau(at_most=) takes a time above zero: ... got 'soon'. ...
    """
    owner, name = argument.removesuffix(")").split("(")
    call = f"{owner}({_NEEDS[owner]}, {name}{example!r})"
    return None if value is None else check_time(argument, value, example=call, or_none=True)


def _at_most(value: Any) -> Time | None:
    return _span(value, "Plateau(at_most=)", "5ep")


def _warmup(value: Any) -> Time | None:
    return _span(value, "Phase(warmup=)", "100ba")


@attrs.frozen
class Plateau:
    """The end of a phase once a metric no longer improves.

    Args:
        monitor: A key of ``state.metrics``, such as ``"eval/loss"``.
        patience: Evaluations without an improvement before the phase ends.
        min_delta: A change this small is no improvement.
        mode: ``"min"`` or ``"max"``; ``"auto"`` goes by the metric's name.
        at_most: The phase ends after this time whatever the metric does, counted from its begin.

    Raises:
        ArgumentError: An argument of the wrong type or out of range.

    Example:
        >>> Plateau("eval/accuracy", at_most="5ep")
        Plateau(monitor='eval/accuracy', patience=3, min_delta=0.0, mode='auto', at_most=Time('5ep'))
        >>> Plateau("eval/loss", patience=0)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Plateau(patience=) takes a whole number, 1 or above, got 0. ...
        >>> Plateau("eval/loss", min_delta=-0.1)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Plateau(min_delta=) takes a number, 0 or above, got -0.1. ...
    """

    monitor: str = attrs.field(validator=text(example="eval/loss"), metadata={"call": _NEEDS["Plateau"]})
    patience: int = attrs.field(default=3, validator=whole(at_least=1))
    min_delta: float = attrs.field(default=0.0, validator=in_range(at_least=0))
    mode: Literal["auto", "min", "max"] = attrs.field(default="auto", validator=one_of(("auto", "min", "max")))
    at_most: Time | None = attrs.field(default=None, converter=_at_most)


def _selectors(value: Any) -> tuple[str, ...]:
    """Take one selector for a tuple of it; what is no sequence goes on to the validator.

    Example:
        >>> _selectors("head"), _selectors(["head", "*.bias"]), _selectors(3)
        (('head',), ('head', '*.bias'), 3)
    """
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, Sequence) else value


def _check_selectors(_instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """Refuse what are no selectors, and the same one twice.

    Example:
        >>> Phase(thaw=["head", ""])
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Phase(thaw=) takes selectors: layers such as 'head', globs over parameter names, got ('head', ''). ...
        >>> Phase(thaw="head", freeze=["stem", "stem"])
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Phase(freeze=) takes each selector once, got ('stem', 'stem'). ...
    """
    argument, example = f"Phase({attribute.name}=)", f"Phase({attribute.name}=('head', 'blocks[-1]'))"
    if not isinstance(value, tuple) or not all(isinstance(each, str) and each for each in value):
        takes = "selectors: layers such as 'head', globs over parameter names"
        raise ArgumentError(argument, got=value, takes=takes, example=example)
    if len(set(value)) < len(value):
        raise ArgumentError(argument, got=value, takes="each selector once", example=example)


def _check_restore_monitor(_instance: object, _attribute: attrs.Attribute[Any], value: object) -> None:
    """Refuse what is no name of a metric.

    Example:
        >>> Phase(thaw="head", restore="best", restore_monitor="")
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Phase(restore_monitor=) takes a string or None, got ''. ...
    """
    if value is not None and not (isinstance(value, str) and value):
        example = "Phase(thaw='head', restore='best', restore_monitor='eval/loss')"
        raise ArgumentError("Phase(restore_monitor=)", got=value, takes="a string or None", example=example)


def _rates(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _check_rates(_instance: object, _attribute: attrs.Attribute[Any], value: object) -> None:
    """Refuse rates that are not above 0, and what are no selectors.

    Example:
        >>> Phase(thaw="head", lr={"head": 1, "*.bias": 1e-5}).lr
        {'head': 1, '*.bias': 1e-05}
        >>> Phase(thaw="head", lr=0)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Phase(lr=) takes a number above 0, or None, got 0. ...
        >>> Phase(thaw="head", lr={"head": 0.0})
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Phase(lr={'head': …}) takes a number above 0, got 0.0. ...
        >>> Phase(thaw="head", lr={})
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Phase(lr=) takes a number above 0, or a mapping of selectors to such numbers, got {}. ...
    """
    if value is None:
        return
    if not isinstance(value, Mapping):
        check_in_range("Phase(lr=)", value, above=0, example="Phase(thaw='head', lr=0.001)", or_none=True)
        return
    example = "Phase(thaw='head', lr={'head': 0.001})"
    if not value or not all(isinstance(each, str) and each for each in value):
        takes = "a number above 0, or a mapping of selectors to such numbers"
        raise ArgumentError("Phase(lr=)", got=value, takes=takes, example=example)
    for selector, rate in value.items():
        check_in_range(f"Phase(lr={{{selector!r}: …}})", rate, above=0, example=example)


def _until(value: Any) -> Any:
    """Return what ends a phase, numbers and text as a time.

    Example:
        >>> _until(2), _until("3ba"), _until(None), _until(Plateau("eval/loss", at_most=3)).at_most
        (Time('2ep'), Time('3ba'), None, Time('3ep'))
        >>> _until(print) is print
        True
        >>> _until(True)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Phase(until=) takes a time ('2ep', ...), a Plateau, a function of the state, or None, got True. ...
        >>> _until(Plateau)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Phase(until=) takes ..., got <class 'thawline.algorithms.phases.Plateau'>. ...
    """
    if value is None or isinstance(value, Plateau) or (callable(value) and not isinstance(value, type)):
        return value
    if isinstance(value, (str, int, Time)) and not isinstance(value, bool):
        return _span(value, "Phase(until=)")
    takes = "a time ('2ep', '100ba', '0.3dur', an int for epochs), a Plateau, a function of the state, or None"
    raise ArgumentError("Phase(until=)", got=value, takes=takes, example="Phase(thaw='head', until='2ep')")


@attrs.frozen
class Phase:
    """One phase of a schedule: what changes at its begin, and when it ends.

    Args:
        name: Unique in the schedule; None for ``"phase 1"``, ``"phase 2"`` and so on by its place.
        thaw: Selectors of what begins to train: layers (``"head"``, ``"blocks[2:6]"``), globs over parameter names.
        freeze: Selectors of what is frozen again.
        lr: The base learning rate of what this phase thaws, or selectors to rates; None for the optimizer's.
        lr_scale: Factor on the rate of everything that was trainable already before this phase.
        weight_decay: Of what this phase thaws; None for the optimizer's.
        warmup: The rate of what this phase thaws rises from zero over this time.
        schedule: ``"constant"``, ``"linear"`` or ``"cosine"`` over this phase's length; None for the fit's.
        until: The end: a time counted from the phase's begin (an int is epochs), a :class:`Plateau`, or a
            function of the state that returns True. None, in the last phase only, is the end of the fit.
        restore: ``"best"`` puts the best weights seen in this phase back at its end.
        restore_monitor: The metric that says which were best; None for the plateau's, else ``"eval/loss"``.

    Raises:
        ArgumentError: An argument of the wrong type or out of range, or a phase that changes nothing.

    Example:
        >>> Phase(thaw="head", lr=1e-3, until="2ep")
        Phase(name=None, thaw=('head',), freeze=(), lr=0.001, ..., until=Time('2ep'), ...)
        >>> Phase(freeze=["stem"], lr_scale=0.5, schedule="cosine").freeze
        ('stem',)
        >>> Phase(until="2ep")
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Phase() takes something to change: thaw=, freeze=, lr_scale= or schedule=, got None. ...
        >>> Phase(freeze="head", warmup="2ba")
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Phase(warmup=) takes what it is for in the same phase: thaw=, got Time('2ba'). ...
        >>> Phase(thaw=["head", "stem"], freeze="stem")
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Phase(freeze=) takes what thaw= does not name, got 'stem'. ...
        >>> Phase(thaw="head", restore_monitor="eval/f1")
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Phase(restore_monitor=) takes restore='best' beside it, got 'eval/f1'. ...
    """

    name: str | None = attrs.field(default=None, validator=text(example="head", or_none=True))
    thaw: tuple[str, ...] = attrs.field(
        default=(), converter=_selectors, validator=_check_selectors, metadata={"call": _NEEDS["Phase"]}
    )
    freeze: tuple[str, ...] = attrs.field(default=(), converter=_selectors, validator=_check_selectors)
    lr: float | Mapping[str, float] | None = attrs.field(default=None, converter=_rates, validator=_check_rates)
    lr_scale: float | None = attrs.field(default=None, validator=positive(example=0.5, or_none=True))
    weight_decay: float | None = attrs.field(default=None, validator=in_range(at_least=0, example=0.01, or_none=True))
    warmup: Time | None = attrs.field(default=None, converter=_warmup)
    schedule: str | None = attrs.field(default=None, validator=one_of((None, *SCHEDULES), example="cosine"))
    until: Until = attrs.field(default=None, converter=_until)
    restore: Literal["best"] | None = attrs.field(default=None, validator=one_of((None, "best"), example="best"))
    restore_monitor: str | None = attrs.field(default=None, validator=_check_restore_monitor)

    def __attrs_post_init__(self) -> None:
        if not (self.thaw or self.freeze or self.lr_scale or self.schedule):
            takes = "something to change: thaw=, freeze=, lr_scale= or schedule="
            raise ArgumentError("Phase()", got=self.name, takes=takes, example="Phase(thaw='head', until='2ep')")
        for option in ("lr", "weight_decay", "warmup"):
            value = cast("object", getattr(self, option))
            if value is not None and not self.thaw:
                takes = "what it is for in the same phase: thaw="
                example = f"Phase(thaw='head', {option}={str(value) if isinstance(value, Time) else value!r})"
                raise ArgumentError(f"Phase({option}=)", got=value, takes=takes, example=example)
        if both := sorted({*self.thaw} & {*self.freeze}):
            example = f"Phase(thaw={both[0]!r})"
            raise ArgumentError("Phase(freeze=)", got=both[0], takes="what thaw= does not name", example=example)
        if self.restore_monitor is not None and self.restore is None:
            example = f"Phase(thaw='head', restore='best', restore_monitor={self.restore_monitor!r})"
            takes = "restore='best' beside it"
            raise ArgumentError("Phase(restore_monitor=)", got=self.restore_monitor, takes=takes, example=example)


class Written(tuple[Phase, ...]):  # noqa: SLOT001 - it keeps two attributes beside its items
    """Phases that were read, and where their selectors stand: what is wrong with those shows beside the model only.

    Args:
        phases: The phases.
        source: How what was read is called in errors.
        lines: For each phase its selectors, each with its line, such as ``"line 4"``; none of what is no text.

    Example:
        >>> written = Written([Phase(thaw="head"), Phase(thaw="stem")])
        >>> len(written), written.source, written.lines
        (2, 'the schedule', [{}, {}])
    """

    source: str
    lines: Sequence[Mapping[str, str]]

    def __new__(
        cls, phases: Iterable[Phase], source: str = "the schedule", lines: Sequence[Mapping[str, str]] = ()
    ) -> Self:
        """Make the tuple, and keep the rest on it."""
        self = super().__new__(cls, phases)
        self.source, self.lines = source, lines or [{} for _ in self]
        return self

    @classmethod
    def like(cls, phases: Sequence[Phase], named: Iterable[Phase]) -> Self:
        """Return ``named`` standing where ``phases`` do.

        Example:
            >>> head = Phase(thaw="head")
            >>> Written.like(Written([head], "thaw.yaml", [{"head": "line 2"}]), [head]).lines
            [{'head': 'line 2'}]
            >>> Written.like([head], [head]).source
            'the schedule'
        """
        return cls(named, phases.source, phases.lines) if isinstance(phases, Written) else cls(named)


def number_phases(phases: Sequence[Phase], *, repeat: int = 1) -> Written:
    """Return the phases with a name each; where they stand in what was read is kept.

    Args:
        phases: In the order in which they run.
        repeat: How often the whole sequence runs.

    Raises:
        ArgumentError: There is no phase, a name stands twice, or a phase before the last (with ``repeat`` above 1
            the last as well) has no end.

    Example:
        >>> [phase.name for phase in number_phases([Phase(thaw="head", until=1), Phase(thaw="blocks[-1]")])]
        ['phase 1', 'phase 2']
        >>> number_phases([Phase(thaw="head", until=1), Phase(name="phase 1", thaw="stem")])
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Phase(name=) takes a name that no other phase has, got 'phase 1'. ...
        >>> number_phases([Phase(thaw="head"), Phase(thaw="stem")])
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Phase(until=) takes an end in 'phase 1': only the phase that is the last of all may go on to the end of the fit, got None. ...
        >>> number_phases([Phase(thaw="head")], repeat=2)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Phase(until=) takes an end in 'phase 1': only the phase that is the last of all may go on to the end of the fit, got None. ...
        >>> number_phases([])
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: phases takes at least one phase, got []. ...
    """
    if not phases:
        raise ArgumentError("phases", got=[], takes="at least one phase", example="[Phase(thaw='head')]")
    named = Written.like(
        phases,
        (each if each.name else attrs.evolve(each, name=f"phase {place}") for place, each in enumerate(phases, 1)),
    )
    seen: set[str | None] = set()
    for place, phase in enumerate(named, 1):
        if phase.name in seen:
            example = f"Phase(name={f'{phase.name} again'!r}, thaw='head')"
            raise ArgumentError("Phase(name=)", got=phase.name, takes="a name that no other phase has", example=example)
        seen.add(phase.name)
        if phase.until is None and (place < len(named) or repeat > 1):
            takes = f"an end in {phase.name!r}: only the phase that is the last of all may go on to the end of the fit"
            raise ArgumentError("Phase(until=)", got=None, takes=takes, example="Phase(thaw='head', until='2ep')")
    return named


def length_of(phase: Phase) -> Time | None:
    """Return how long a phase is at most, as far as it says so.

    Example:
        >>> length_of(Phase(thaw="head", until="2ep")), length_of(Phase(thaw="head", until=Plateau("eval/loss", at_most=3)))
        (Time('2ep'), Time('3ep'))
        >>> length_of(Phase(thaw="head", until=print)), length_of(Phase(thaw="head", until=Plateau("eval/loss")))
        (None, None)
    """
    until = phase.until
    return until.at_most if isinstance(until, Plateau) else until if isinstance(until, Time) else None


def check_length(phase: Phase) -> None:
    """Refuse a schedule over a phase whose length nobody knows; where it has no end, that is the fit's.

    Example:
        >>> check_length(Phase(thaw="head", schedule="cosine"))
        >>> check_length(Phase(thaw="head", until=Plateau("eval/loss")))
        >>> check_length(Phase(name="head", thaw="head", schedule="cosine", until=Plateau("eval/loss")))
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Phase(schedule=) takes a phase whose length is known: 'head' ends by what only the fit knows, ...
    """
    if phase.schedule is not None and phase.until is not None and length_of(phase) is None:
        takes = f"a phase whose length is known: {phase.name!r} ends by what only the fit knows"
        example = f"Phase(schedule={phase.schedule!r}, until=Plateau('eval/loss', at_most='5ep'))"
        raise ArgumentError("Phase(schedule=)", got=phase.schedule, takes=takes, example=example)


def unplanned_ends(phases: Iterable[Phase]) -> str | None:
    """Return which phases end by what only a fit knows.

    Example:
        >>> ends = [Plateau("eval/loss", at_most=9), Plateau("eval/f1", patience=1), lambda state: True, "2ep"]
        >>> print(unplanned_ends(Phase(name=f"{place}", thaw="head", until=end) for place, end in enumerate(ends)))
        may end its phases '0' when eval/loss has not improved for 3 evaluations, at the latest after 9ep, as shown; '1' when eval/f1 has not improved for 1 evaluation; '2' by a function of the state
        >>> print(unplanned_ends([Phase(thaw="head", until="2ep")]))
        None
    """
    words = []
    for phase in phases:
        until = phase.until
        if isinstance(until, Plateau):
            latest = "" if until.at_most is None else f", at the latest after {until.at_most}, as shown"
            plural = "s" * (until.patience != 1)
            words.append(
                f"{phase.name!r} when {until.monitor} has not improved for {until.patience} evaluation{plural}{latest}"
            )
        elif callable(until):
            words.append(f"{phase.name!r} by a function of the state")
    return f"may end its phases {'; '.join(words)}" if words else None
