"""Every error that thawline raises on purpose.

Each message says where it was, what it got, what it takes, and what to write instead.
"""

from __future__ import annotations

import sys
import warnings
from difflib import get_close_matches
from typing import TYPE_CHECKING

from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Iterable

_MOST_FAULTS = 40
"""How many faults of a schedule are shown."""


class ThawlineError(Exception):
    """Base of every error that thawline raises on purpose."""


class ThawlineWarning(UserWarning):
    """Something that is allowed and probably not meant, such as a schedule that cannot fire within the fit."""


def warn(text: str) -> None:
    """Warn with a :class:`ThawlineWarning` that points at the line of the user's that led here.

    Frames of thawline, of torch, which may stand between two of thawline, and of generated code are passed over.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__")):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, ThawlineWarning, stacklevel=level)


def _is_ours(module: object) -> bool:
    return not isinstance(module, str) or module.partition(".")[0] in ("thawline", "torch", "contextlib")


class ArgumentError(ThawlineError, ValueError):
    """An argument of the wrong type or out of range.

    Args:
        argument: The argument with its owner, such as ``"GradClip(max_norm=)"``.
        got: The value that was passed.
        takes: What the argument takes, as a noun phrase.
        example: A corrected call.

    Example:
        >>> raise ArgumentError("GradClip(max_norm=)", got=-1, takes="a number above 0", example="GradClip(max_norm=1.0)")
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: GradClip(max_norm=) takes a number above 0, got -1. Write: GradClip(max_norm=1.0)
    """

    def __init__(self, argument: str, *, got: object, takes: str, example: str) -> None:
        super().__init__(argument, got, takes, example)
        self.argument = argument
        self.got = got
        self.takes = takes
        self.example = example

    @override
    def __str__(self) -> str:
        return f"{self.argument} takes {self.takes}, got {shorten(self.got)}. Write: {self.example}"

    @override
    def __reduce__(self) -> tuple[object, ...]:
        return _argument_error, (self.argument, self.got, self.takes, self.example)


def _argument_error(argument: str, got: object, takes: str, example: str) -> ArgumentError:
    return ArgumentError(argument, got=got, takes=takes, example=example)


class UnknownArgumentError(ArgumentError, TypeError):
    """A keyword argument that a call does not take: Python's TypeError, which says what to write instead.

    Args:
        call: The call, such as ``"Trainer"``.
        name: The keyword.
        got: The value that was passed.
        takes: The names of what the call takes; none where what to write says enough.
        example: What to write instead.

    Example:
        >>> raise UnknownArgumentError("GradClip", "norm", got=1, takes=["max_norm"], example="GradClip(max_norm=1)")
        Traceback (most recent call last):
        thawline.engine.errors.UnknownArgumentError: GradClip takes no 'norm', only max_norm; got 1. Write: GradClip(max_norm=1)
    """

    def __init__(self, call: str, name: str, *, got: object, takes: Iterable[str], example: str) -> None:
        self.call, self.name, self.names = call, name, tuple(takes)
        listed = f", only {', '.join(self.names)}" if self.names else ""
        super().__init__(f"{call}({name}=)", got=got, takes=f"no {name!r}{listed}", example=example)

    @override
    def __str__(self) -> str:
        return f"{self.call} takes {self.takes}; got {shorten(self.got)}. Write: {self.example}"

    @override
    def __reduce__(self) -> tuple[object, ...]:
        return _unknown_argument_error, (self.call, self.name, self.got, self.names, self.example)


def _unknown_argument_error(call: str, name: str, got: object, takes: Iterable[str], example: str) -> ArgumentError:
    return UnknownArgumentError(call, name, got=got, takes=takes, example=example)


class CallError(ArgumentError, TypeError):
    """An argument that is missing, or stands where only a keyword can: Python's TypeError, which says what to write instead.

    Args:
        argument: The argument with its call, such as ``"trainer.fit(duration=)"``.
        problem: What is wrong with it, as a verb phrase.
        example: What to write instead.

    Example:
        >>> raise CallError("trainer.fit(duration=)", "is missing", example="trainer.fit(model, train_loader, duration='3ep')")
        Traceback (most recent call last):
        thawline.engine.errors.CallError: trainer.fit(duration=) is missing. Write: trainer.fit(model, train_loader, duration='3ep')
    """

    def __init__(self, argument: str, problem: str, *, example: str) -> None:
        super().__init__(argument, got=None, takes=problem, example=example)

    @override
    def __str__(self) -> str:
        return f"{self.argument} {self.takes}. Write: {self.example}"

    @override
    def __reduce__(self) -> tuple[object, ...]:
        return _call_error, (self.argument, self.takes, self.example)


def _call_error(argument: str, problem: str, example: str) -> CallError:
    return CallError(argument, problem, example=example)


class SelectorError(ThawlineError, LookupError):
    """A selector that matches nothing, or names what the model does not have."""


class ScheduleError(ThawlineError, ValueError):
    """Everything that is wrong with a schedule of phases.

    Args:
        source: The file, or what else was read.
        faults: For each fault where it stands (``"line 4"``), what is wrong, and what to write there.

    Example:
        >>> raise ScheduleError("thaw.yaml", [("line 4", "unknown key 'unitl'", "until: 2ep")])
        Traceback (most recent call last):
        thawline.engine.errors.ScheduleError: thaw.yaml has 1 error:
          line 4: unknown key 'unitl'. Write: until: 2ep
    """

    def __init__(self, source: str, faults: Iterable[tuple[str, str, str]]) -> None:
        self.source = source
        self.faults = tuple(faults)
        super().__init__(source, self.faults)

    @override
    def __str__(self) -> str:
        shown = [f"  {place}: {problem}. Write: {write}" for place, problem, write in self.faults[:_MOST_FAULTS]]
        if len(self.faults) > _MOST_FAULTS:
            shown.append(f"  and {len(self.faults) - _MOST_FAULTS} more")
        return "\n".join([f"{self.source} has {len(self.faults)} error{'s' * (len(self.faults) > 1)}:", *shown])


class LayerError(ThawlineError):
    """A model that cannot be split into stem, blocks and head as asked."""


class LedgerError(ThawlineError):
    """A broken invariant of the ledger, or a call that would break one."""


class LedgerClosedError(LedgerError):
    """A change asked for during forward, backward, the optimizer's step or evaluation."""


class SurgeryError(ThawlineError):
    """A module that a surgery op cannot be attached to."""


class OptimizerError(ThawlineError, ValueError):
    """An optimizer that cannot serve: foreign parameters, a closure, an incomplete partition."""


class DataError(ThawlineError, ValueError):
    """A loader or batch that training cannot use."""


class LossError(ThawlineError, ValueError):
    """A loss that is not one number, or that no trainable parameter had a part in."""


class NonFiniteError(ThawlineError, ArithmeticError):
    """A loss or gradient norm that is NaN or infinite."""


class OutOfMemoryError(ThawlineError, MemoryError):
    """Memory that runs out with a single sample at a time."""


class CheckpointError(ThawlineError):
    """A checkpoint that is damaged, missing, or belongs to another run."""


class RunDirError(CheckpointError, FileExistsError):
    """A run directory that already holds a run, is in use, or cannot be made."""


class MissingExtraError(ThawlineError, ImportError):
    """A package that an optional part needs and that is not installed."""


class DistributedError(ThawlineError, RuntimeError):
    """Ranks that disagree, or a launch that is incomplete."""


class RecompileError(ThawlineError, RuntimeError):
    """A block that cannot be compiled, or of which there would be ever more graphs: it would fall back to eager."""


def shorten(value: object, limit: int = 120) -> str:
    """Return ``repr(value)``, cut to ``limit`` characters."""
    try:
        text = repr(value)
    except RecursionError:  # what a hostile file nested too deep
        text = f"<{type(value).__name__}, nested too deep to show>"
    except Exception:  # noqa: BLE001 - an error about a value must not fail on showing it: an int of 5000 digits cannot
        text = f"<{type(value).__name__} that cannot be shown>"
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def with_article(noun: str) -> str:
    """Return ``noun`` with "a" or "an" before it.

    Example:
        >>> with_article("object"), with_article("Tensor")
        ('an object', 'a Tensor')
    """
    return f"{'an' if noun[:1].lower() in tuple('aeio') else 'a'} {noun}"


def nearest(name: str, names: Iterable[str], count: int = 5) -> str:
    """Return the names most like ``name``, joined by commas, for an error message.

    Example:
        >>> nearest("encoder.layr.0", ["encoder.layer.0", "head"])
        "'encoder.layer.0'"
    """
    pool = list(names)
    close = get_close_matches(name, pool, n=count, cutoff=0.3) or pool[:count]
    return ", ".join(repr(each) for each in close) or "none: the model has no parameters"
