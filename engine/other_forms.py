"""The check of the conformance kit that gives the same samples in other forms: batches, loaders, and models with a loss of their own."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from attrs import evolve

from .algorithm import Algorithm
from .batches import IGNORED_LABEL
from .clock import Time
from .errors import ThawlineError
from .events import Event
from .neighbor import Before
from .other_batches import BATCHES, LOSSES, Form, Samples
from .other_loaders import KINDS, PLAIN, UNCOUNTED, Kind, Read, all_samples, batches_in
from .other_models import is_its_own
from .promises import check, fail, same
from .randomness import derive_seed
from .rehearsal import Outcome, Rehearsal
from .resuming import goes_on
from .state import State
from .unaided import Right, share_right

_Each = TypeVar("_Each")
_PART, _TOGETHER = 3, 2
_PAIRS = Form("lists of inputs and targets", lambda each: [each.x, each.y])


@check
def takes_batches_in_other_forms(rehearsal: Rehearsal) -> None:
    """The same samples in batches of other types, from other loaders, or for a model that computes its loss itself, give the same fit."""
    if not rehearsal.own_task:
        return
    fits: dict[tuple[str, bool], Outcome | None] = {}

    def compare(form: Form, kind: Kind, to: Kind) -> None:
        """Hold a fit in a form against one of pairs from another kind of loader, where the algorithm takes both."""
        key = to.name, form.measured
        if key not in fits:
            fits[key] = _fit(rehearsal, evolve(_PAIRS, measured=form.measured), to)
        whole, fit = fits[key], _fit(rehearsal, form, kind)
        if whole is not None and fit is not None and not kind.noisy:
            _compare(rehearsal, form.name if kind is to else kind.name, whole, fit)

    for form in (*_drawn(BATCHES, rehearsal, 2), *_drawn(LOSSES, rehearsal, 2)):
        compare(form, PLAIN, PLAIN)
    for kind in _drawn(KINDS, rehearsal, 1):
        compare(_PAIRS, kind, PLAIN if kind.tells else UNCOUNTED)


def _drawn(items: Sequence[_Each], rehearsal: Rehearsal, count: int) -> list[_Each]:
    """Return some, drawn by what the algorithm is as well."""
    seed = derive_seed(rehearsal.seed, "the same in other forms", str([each.describe() for each in rehearsal.make()]))
    return rehearsal.some(items, count, seed)


def _compare(rehearsal: Rehearsal, name: str, whole: Outcome, fit: Outcome) -> None:
    first, second = ({"result": each.result, "told": each.told, "events": each.events} for each in (whole, fit))
    same(
        first, second, "the fit",
        f"{rehearsal.name}: with {name}, the fit is another one than with pairs of inputs and targets. What is in state.batch and "
        "state.microbatch is what the loader gives, whole or cut: targets_of(batch) finds the targets in any, state.sample_ids says "
        "which samples there are. Raise DataError for what you cannot take.",
    )  # fmt: skip


def _fit(rehearsal: Rehearsal, form: Form, kind: Kind) -> Outcome | None:
    """Return what a fit in a form comes to, and hold a resumed one against it; None where the algorithm refuses it."""
    samples = all_samples()
    what = kind.name if form.name == _PAIRS.name else form.name

    def beside() -> list[Algorithm]:
        return [Before(_Look(f"{rehearsal.name} with {what}", samples, kind)), *rehearsal.make()]

    def settings() -> dict[str, Any]:
        loader = kind.build(samples, form.given)
        aside = loader if kind.tells else Read(samples, form.given)  # in one order at every evaluation
        measured = {"metrics": {"share": share_right, "right": Right()}} if form.measured else {}
        cuts = {"microbatch_size": _PART, "accumulate": _TOGETHER}
        return {"loader": loader, "eval_loader": aside, **cuts, **measured, **form.settings}

    other = evolve(rehearsal, factory=beside, build_model=form.model, duration=_duration(rehearsal, kind))
    other.name = f"{rehearsal.name} with {what}"
    try:
        if kind in (PLAIN, UNCOUNTED):
            return other.fit(**settings())
        with tempfile.TemporaryDirectory() as folder:
            fit, paths = other.saved(Path(folder) / "run", every="3ba", **settings())
            for path in paths[:1]:
                goes_on(other, fit, path, **settings())
        return fit
    except Exception as error:
        if isinstance(error, ThawlineError) and is_its_own(error, rehearsal.make()):
            return None
        error.add_note(f"with {what}")
        raise


def _duration(rehearsal: Rehearsal, kind: Kind) -> str | int:
    """Return how long a fit lasts: of batches that nobody counts, as many as there are."""
    given = Time(rehearsal.duration)
    return rehearsal.duration if kind.tells or given.unit != "ep" else f"{max(1, 2 * int(given.value) - 1)}ba"


class _Look:
    """Holds the samples of each batch and of each microbatch against the order that they must come in."""

    def __init__(self, name: str, samples: Samples, kind: Kind) -> None:
        self.name, self.samples, self.tells, self.noisy = name, samples, kind.tells, kind.noisy
        self.parts: list[list[int]] = []

    def __call__(self, event: Event, state: State) -> None:
        """Look at an event."""
        if event is Event.BATCH_START:
            first = _TOGETHER * state.clock.batch_in_epoch
            batches = batches_in(state.clock.epoch, len(self.samples.y))[first : first + _TOGETHER]
            parts = [each[place : place + _PART] for each in batches for place in range(0, len(each), _PART)]
            self.parts = [
                each for each in parts if (self.samples.y[each] != IGNORED_LABEL).any()
            ]  # the others have no say
            self.tell(state, [*chain.from_iterable(batches)], state.sample_ids)
            if not self.tells:
                self.compare(state, batches)
        elif event is Event.BEFORE_FORWARD:
            self.tell(state, self.parts.pop(0), state.microbatch_ids)
        elif event is Event.AFTER_LOSS and (state.loss is None or state.loss.ndim):
            fail(
                f"{self.name}: state.loss is {state.loss}, and takes a tensor without dimensions, whatever the model returns."
            )

    def tell(self, state: State, must: list[int], ids: Sequence[int] | None) -> None:
        """Hold what the state calls the samples against what they are."""
        if self.tells and ids != tuple(must):
            fail(
                f"{self.name}: batch {state.clock.batch} has the samples {must}, and the state says {ids}. Leave sample_ids and microbatch_ids as they are."
            )

    def compare(self, state: State, batches: list[list[int]]) -> None:
        """Hold the batches that the loader gave against the samples."""
        must = [[self.samples.x[each], self.samples.y[each]][self.noisy :] for each in batches]
        same(
            must,
            [each[self.noisy :] for each in state.batch],
            "it",
            f"{self.name}: batch {state.clock.batch} has other samples than the loader gave.",
        )
