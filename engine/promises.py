"""A promise of the conformance kit, and the error that says which one is broken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NoReturn, TypeAlias

from typing_extensions import override

from .errors import ArgumentError, LayerError, ScheduleError, SelectorError, SurgeryError, ThawlineError
from .rehearsal import Rehearsal, difference

Check: TypeAlias = Callable[[Rehearsal], None]


REFUSALS = (ArgumentError, LayerError, ScheduleError, SelectorError, SurgeryError)
"""By which an algorithm says that a model or other arguments are not for it."""


class ConformanceError(ThawlineError, AssertionError):
    """A promise that an algorithm does not keep: what broke, when, and how to mend it.

    Args:
        failures: The message of each check that failed, by the check's name.

    Example:
        >>> print(ConformanceError({"match_is_pure": "match() changed 'seen'"}))
        match_is_pure: match() changed 'seen'
        >>> print(ConformanceError({"resumes": "KeyError: 'x'", "trains_in_bf16": "KeyError: 'x'"}))
        resumes, trains_in_bf16: KeyError: 'x'
    """

    def __init__(self, failures: Mapping[str, str]) -> None:
        super().__init__(dict(failures))
        self.failures = dict(failures)

    @override
    def __str__(self) -> str:
        alike: dict[str, list[str]] = {}
        for name, message in self.failures.items():
            alike.setdefault(message, []).append(name)
        return "\n".join(f"{', '.join(names)}: {message}" for message, names in alike.items())


class _BrokenPromiseError(AssertionError):
    """On its way out of a fit, to the check."""


def check(function: Check) -> Check:
    """Make a check of a function: whatever it ends with is a ConformanceError under its name."""

    @wraps(function)
    def run(rehearsal: Rehearsal) -> None:
        try:
            function(rehearsal)
        except _BrokenPromiseError as error:
            raise ConformanceError({function.__name__: str(error)}) from None
        except Exception as error:
            notes = "; ".join(getattr(error, "__notes__", ()))
            said = f"{rehearsal.name}: {type(error).__name__}: {error}" + f" [{notes}]" * bool(notes)
            raise ConformanceError({function.__name__: said}) from error

    return run


def unless_alone(rehearsal: Rehearsal, function: Check) -> None:
    """Run a part of a check; what a user's model, batches and loss do not keep without the algorithm says nothing of it."""
    try:
        function(rehearsal)
    except Exception:
        if not rehearsal.own_task:
            try:
                function(rehearsal.alone())
            except Exception:  # noqa: BLE001 - whatever it is, it is not the algorithm's
                return
        raise


def fail(message: str) -> NoReturn:
    """Fail the check that calls, from inside a fit as well."""
    raise _BrokenPromiseError(message)


def same(first: Any, second: Any, place: str, message: str, *, tolerance: float = 0.0) -> None:
    """Fail the check that calls where two trees differ, and say where; see :func:`difference`."""
    if found := difference(first, second, place, tolerance=tolerance):
        fail(f"{message} First difference: {found}.")
