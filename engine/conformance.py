"""The conformance kit: one call, or one class of tests, that says whether an algorithm keeps the engine's promises."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
from .errors import ArgumentError, nearest
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
        ArgumentError: A factory that builds no algorithm, or a check that there is not.

    Example:
        >>> from thawline.engine import Event, on
        >>> @on(Event.BATCH_END, every="2ba")
        ... def note_loss(state):
        ...     state.log({"loss": state.loss})
        >>> check_algorithm(note_loss, checks=["resumes", "match_is_pure"])
    """
    if not callable(factory) or isinstance(factory, Algorithm):
        example = "check_algorithm(lambda: MyAlgorithm(rank=2))"
        raise ArgumentError("check_algorithm(factory)", got=factory, takes="a function or class", example=example)
    rehearsal = Rehearsal(
        factory=factory,
        build_model=model or tiny_models()["residual"],
        loader=tiny_loader(24) if loader is None else loader,
        loss_fn=loss_fn,
        duration=duration,
        seed=seed,
        thorough=thorough,
        partners=[specimen(each) for each in installed()] if partners is None else partners,
        accumulates=accumulates,
        own_task=model is None and loader is None and loss_fn is cross_entropy,
    )
    failures: dict[str, str] = {}
    for name in CHECKS if checks is None else checks:
        if name not in CHECKS:
            known = nearest(name, CHECKS)
            raise ArgumentError(
                "check_algorithm(checks=)", got=name, takes=f"names of checks: {known}", example="checks=['resumes']"
            )
        try:
            CHECKS[name](rehearsal)
        except ConformanceError as error:
            failures |= error.failures
    if failures:
        raise ConformanceError(failures)


def _as_test(name: str) -> Callable[[Any], None]:
    def test(self: Any) -> None:
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
