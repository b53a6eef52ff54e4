"""The conformance kit: one call, or one class of tests, that says whether an algorithm keeps the engine's promises."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .algorithm import Algorithm
from .audits import follows_from_its_calls, keeps_true_records, learns_from_its_loss, steps_as_torch_does
from .checks import (
    comes_back_from_its_description,
    does_not_depend_on_order,
    keeps_instances_apart,
    keeps_the_ledger_whole,
    leaves_the_global_generators_alone,
    leaves_the_loop_alone,
    match_is_pure,
    refuses_bad_arguments,
    starts_afresh,
    works_with_other_arguments,
)
from .derivatives import has_true_gradients
from .doubles import tiny_loader, tiny_models
from .drawn_fits import holds_in_drawn_fits
from .endings import (
    does_not_count_microbatches,
    leaves_nothing_behind,
    repeats_what_does_not_fit,
    survives_an_exception,
    takes_short_fits,
    trains_in_bf16,
)
from .errors import ArgumentError, ThawlineError, nearest, shorten
from .examples import does_as_its_examples_say
from .graphs import computes_the_same_compiled
from .other_forms import takes_batches_in_other_forms
from .other_models import takes_other_models
from .promises import Check, ConformanceError
from .ranked import stays_equal_on_two_ranks
from .records import is_recorded_as_it_happened, keeps_to_its_plan, puts_live_weights_back
from .recovering import recovers_from_faults
from .rehearsal import Rehearsal
from .resuming import is_not_resumed_as_another, resumes
from .settings import can_call
from .shown import is_shown_as_it_happens
from .specimens import installed, specimen

CHECKS: dict[str, Check] = {
    each.__name__: each
    for each in (
        comes_back_from_its_description,
        refuses_bad_arguments,
        does_as_its_examples_say,
        works_with_other_arguments,
        takes_other_models,
        takes_batches_in_other_forms,
        match_is_pure,
        keeps_the_ledger_whole,
        leaves_the_loop_alone,
        leaves_the_global_generators_alone,
        is_recorded_as_it_happened,
        is_shown_as_it_happens,
        keeps_to_its_plan,
        puts_live_weights_back,
        follows_from_its_calls,
        learns_from_its_loss,
        has_true_gradients,
        steps_as_torch_does,
        keeps_true_records,
        holds_in_drawn_fits,
        resumes,
        recovers_from_faults,
        is_not_resumed_as_another,
        starts_afresh,
        keeps_instances_apart,
        does_not_depend_on_order,
        leaves_nothing_behind,
        survives_an_exception,
        takes_short_fits,
        trains_in_bf16,
        does_not_count_microbatches,
        repeats_what_does_not_fit,
        computes_the_same_compiled,
        stays_equal_on_two_ranks,
    )
}
"""Every check by name, in the order in which they run; a check's docstring is the promise."""

_ALGORITHMS = (
    "what builds algorithms anew at each call: a class, a function without arguments, or what @on makes of one of state"
)
_BUILDERS = {
    "factory": (_ALGORITHMS, "check_algorithm({})", "MyAlgorithm(rank=2)"),
    "model=": (
        "what builds a model anew at each call: a class, or a function without arguments",
        "check_algorithm(MyAlgorithm, model={})",
        "MyModel()",
    ),
    "partners=": (f"a list of {_ALGORITHMS}", "check_algorithm(MyAlgorithm, partners=[{}])", "EMA()"),
}
"""By arguments that build something: what they take, how they are written, and a call that builds."""

_INSTEAD = {
    "state": "@on(Event.BATCH_END) above def {}(state): …",
    "self": "@staticmethod above def {}(): …",
}
"""By the name of the first argument of a function that is to have none: what to write."""


def _is_listed(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str)


_VALUES: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "seed=": (lambda value: type(value) is int and 0 <= value < 2**64, "a whole number from 0 to 2**64 - 1", "seed=1"),
    "thorough=": (lambda value: isinstance(value, bool), "True or False", "thorough=True"),
    "accumulates=": (lambda value: isinstance(value, bool), "True or False", "accumulates=False"),
    "partners=": (lambda value: value is None or _is_listed(value), _BUILDERS["partners="][0], "partners=[EMA]"),
}
"""By other arguments: what is right, in a function and in words, and an example."""


def check_algorithm(
    factory: Callable[[], Algorithm | list[Algorithm]],
    *,
    model: Callable[[], nn.Module] | None = None,
    loader: Iterable[Any] | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = cross_entropy,
    duration: str | int = "3ep",
    thorough: bool = False,
    seed: int = 0,
    partners: Sequence[Callable[[], Any]] | None = None,
    accumulates: bool = True,
    checks: Iterable[str] | None = None,
) -> None:
    """Run an algorithm through every check of the kit; return where it passes all.

    Args:
        factory: Builds the algorithm anew at each call: its class, ``lambda: Mine(rank=2)``, or a function that returns a
            list of algorithms.
        model: Builds the model to train; None is a small residual network of stem, three blocks and head.
        loader: Batches that fit the model, fewer than about ten; None is :func:`tiny_loader`.
        loss_fn: As the Trainer's: None for a model that returns its own loss, as causal language models do.
        duration: Of the fits: long enough for the algorithm to act.
        thorough: Resume at every step and run beside every other algorithm, not at and beside a few drawn by ``seed``; and
            train on two ranks with weights in shards as well.
        seed: Of models, fits, and what is drawn.
        partners: Builders of what it is run beside; None is every installed algorithm.
        accumulates: False for an algorithm that claims no equal updates where batches are cut into microbatches.
        checks: Names of the checks to run; None runs all: see :data:`CHECKS`.

    Raises:
        ConformanceError: What broke, when, and how to mend it, for each check that failed; ``failures`` by name.
        ArgumentError: Before any check: an argument is wrong, such as a factory that builds no algorithm, or not anew.

    Example:
        >>> from thawline.engine import Event, on
        >>> @on(Event.BATCH_END, every="2ba")
        ... def note_loss(state):
        ...     state.log({"loss": state.loss})
        >>> check_algorithm(note_loss, checks=["resumes", "match_is_pure"])
    """
    __tracebackhide__ = True
    names = _names_of(checks)
    values = {"seed=": seed, "thorough=": thorough, "accumulates=": accumulates, "partners=": partners}
    for argument, (is_right, takes, example) in _VALUES.items():
        if not is_right(values[argument]):
            raise _wrong(argument, values[argument], takes, f"check_algorithm(MyAlgorithm, {example})")
    beside = [specimen(each) for each in installed()] if partners is None else list(partners)
    build_model = tiny_models()["residual"] if model is None else model
    for argument, build in [("factory", factory), ("model=", build_model), *(("partners=", each) for each in beside)]:
        _refuse_unbuilding(argument, build)
    rehearsal = Rehearsal(
        factory=factory,
        build_model=build_model,
        loader=tiny_loader(24) if loader is None else loader,
        loss_fn=loss_fn,
        duration=duration,
        seed=seed,
        thorough=thorough,
        partners=beside,
        accumulates=accumulates,
        own_task=model is None and loader is None and loss_fn is cross_entropy,
    )
    rehearsal.trainer([])  # which refuses a wrong loss_fn
    _refuse_kept(rehearsal)
    failures: dict[str, str] = {}
    for name in names:
        try:
            CHECKS[name](rehearsal)
        except ConformanceError as error:
            failures |= error.failures
    if failures:
        raise ConformanceError(failures)


def _wrong(argument: str, got: object, takes: str, example: str) -> ArgumentError:
    return ArgumentError(f"check_algorithm({argument})", got=got, takes=takes, example=example)


def _names_of(checks: Any) -> list[str]:
    """Return the names of the checks to run; ArgumentError where they are no list of names, or one names no check."""
    __tracebackhide__ = True
    if checks is None:
        return list(CHECKS)
    names = list(checks) if _is_listed(checks) else []
    unknown = [each for each in names if not isinstance(each, str) or each not in CHECKS]
    if unknown or not names:
        got = unknown[0] if unknown else checks
        known = nearest(getattr(got, "__name__", str(got)), CHECKS)
        takes = f"a list of names of checks, such as {known}"
        raise _wrong("checks=", got, takes, f"check_algorithm(MyAlgorithm, checks=[{known.partition(', ')[0]}])")
    return names


def _refuse_unbuilding(argument: str, build: Any) -> None:
    """Raise where a builder is none, or needs arguments; a class that says so itself by a typed error has the word."""
    __tracebackhide__ = True
    takes, written, usual = _BUILDERS[argument]
    if isinstance(build, (Algorithm, nn.Module)):
        raise _wrong(argument, build, takes, written.format(f"lambda: {type(build).__name__}(…)"))
    if not callable(build):
        raise _wrong(argument, build, takes, written.format(f"lambda: {usual}"))
    if can_call(build, 0):
        return
    try:
        build()
    except ThawlineError:
        raise
    except TypeError:
        needed = [
            name
            for name, each in inspect.signature(build, follow_wrapped=False).parameters.items()
            if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        ]
        name = getattr(build, "__name__", "<lambda>")
        call = f"{name}({', '.join(f'{each}=…' for each in needed)})" if name.isidentifier() else usual
        example = _INSTEAD.get(needed[0], written.format(f"lambda: {call}"))
        raise _wrong(argument, build, takes, example.format(name if name.isidentifier() else "mine")) from None


def _refuse_kept(rehearsal: Rehearsal) -> None:
    """Raise where what is to be built anew is what was built before, or a model is none, or trains weights of the one before."""
    __tracebackhide__ = True

    def model() -> list[Any]:
        __tracebackhide__ = True
        built: Any = rehearsal.model()
        if not isinstance(built, nn.Module):
            takes, written, usual = _BUILDERS["model="]
            raise _wrong("model=", f"one that returns {shorten(built)}", takes, written.format(f"lambda: {usual}"))
        return [built, *(each for each in built.parameters() if each.requires_grad)]

    builders: list[tuple[str, Callable[[], list[Any]]]] = [("factory", rehearsal.make), ("model=", model)]
    builders += [("partners=", partial(rehearsal.make, each)) for each in rehearsal.partners]
    for argument, build in builders:
        first, second = build(), build()
        again = {id(each) for each in second}
        if kept := [type(each).__name__ for each in first if id(each) in again]:
            takes, written, _ = _BUILDERS[argument]
            call = "copy.deepcopy(model)" if argument == "model=" else f"{kept[0]}(…)"
            raise _wrong(
                argument, f"one that returns the same {kept[0]} again", takes, written.format(f"lambda: {call}")
            )


def _as_test(name: str) -> Callable[[Any], None]:
    def test(self: Any) -> None:
        __tracebackhide__ = True
        kind = type(self)
        check_algorithm(
            kind.factory, model=kind.model, loader=kind.loader, loss_fn=kind.loss_fn, duration=kind.duration,
            thorough=kind.thorough, seed=kind.seed, partners=kind.partners, accumulates=kind.accumulates, checks=[name],
        )  # fmt: skip

    test.__name__ = test.__qualname__ = f"test_{name}"
    test.__doc__ = CHECKS[name].__doc__
    return test


class AlgorithmContract:
    """Every check as a test of its own, for pytest: subclass it under a name that begins with ``Test``.

    ::

        class TestMine(AlgorithmContract):
            factory = staticmethod(lambda: Mine(rank=2))

    The other arguments of :func:`check_algorithm` are attributes as well.

    Example:
        >>> sorted(name for name in dir(AlgorithmContract) if name.startswith("test_"))[:2]
        ['test_comes_back_from_its_description', 'test_computes_the_same_compiled']
    """

    factory: Callable[[], Any]
    model: Callable[[], nn.Module] | None = None
    loader: Iterable[Any] | None = None
    loss_fn: Callable[[Any, Any], Tensor] | None = staticmethod(cross_entropy)
    duration: ClassVar[str | int] = "3ep"
    thorough: ClassVar[bool] = False
    seed: ClassVar[int] = 0
    partners: ClassVar[Sequence[Callable[[], Any]] | None] = None
    accumulates: ClassVar[bool] = True

    vars().update({f"test_{name}": _as_test(name) for name in CHECKS})
