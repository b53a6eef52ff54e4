"""The check of the conformance kit that gives the same samples in other forms: batches, loaders, and models with a loss of their own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
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
from .other_loaders import KINDS, Kind, Read, all_samples, batches_in, plain
from .other_models import is_its_own
from .promises import check, fail, same
from .randomness import derive_seed
from .rehearsal import Outcome, Rehearsal, some
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
    fits: dict[tuple[bool, bool], Outcome | None] = {}

    def reference(*, tells: bool = True, measured: bool = True) -> Outcome | None:
        if (tells, measured) not in fits:
            build = plain if tells else Read
            fits[tells, measured] = _fit(rehearsal, evolve(_PAIRS, measured=measured), build, tells=tells)
        return fits[tells, measured]

    for form in (*_drawn(BATCHES, rehearsal, 2), *_drawn(LOSSES, rehearsal, 2)):
        if (whole := reference(measured=form.measured)) is not None:
            _compare(rehearsal, form.name, whole, _fit(rehearsal, form, plain))
    for kind in _drawn(KINDS, rehearsal, 1):
        if (whole := reference(tells=kind.tells)) is not None:
            _try_kind(rehearsal, kind, whole)


def _drawn(items: Sequence[_Each], rehearsal: Rehearsal, count: int) -> list[_Each]:
    """Return all of them in a thorough check, else a few, drawn by the seed and by what the algorithm is."""
    seed = derive_seed(rehearsal.seed, "the same in other forms", str([each.describe() for each in rehearsal.make()]))
    return list(items) if rehearsal.thorough else some(list(items), count, seed)


def _try_kind(rehearsal: Rehearsal, kind: Kind, whole: Outcome) -> None:
    """Hold a fit from a kind of loader against one from another, and a resumed one against it."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = _fit(rehearsal, _PAIRS, kind.build, tells=kind.tells, noisy=kind.noisy, folder=Path(folder) / "run")
        if not kind.noisy:
            _compare(rehearsal, kind.name, whole, outcome)


def _compare(rehearsal: Rehearsal, name: str, whole: Outcome, outcome: Outcome | None) -> None:
    if outcome is not None:
        first, second = (
            {"result": each.result, "told to trackers": each.told, "events": each.events} for each in (whole, outcome)
        )
        same(
            first, second, "the fit",
            f"{rehearsal.name}: with {name}, the fit is another one than with lists of inputs and targets from a DataLoader. What is in "
            "state.batch and state.microbatch is what the loader gives, whole or cut: targets_of(batch) finds the targets in any, "
            "state.sample_ids says which samples there are. Raise DataError for what you cannot take.",
        )  # fmt: skip


def _fit(
    rehearsal: Rehearsal,
    form: Form,
    build: Callable[[Samples, Callable[[Samples], Any]], Iterable[Any]],
    *,
    tells: bool = True,
    noisy: bool = False,
    folder: Path | None = None,
) -> Outcome | None:
    """Return what a fit in a form comes to, and in a folder hold a resumed one against it; None where the algorithm refuses it."""
    samples = all_samples()
    name = form.name if form is not _PAIRS else "a loader of another kind"

    def beside() -> list[Algorithm]:
        return [Before(_Look(other.name, samples, tells, noisy)), *rehearsal.make()]

    def settings() -> dict[str, Any]:
        loader, aside = build(samples, form.given), Read(samples, form.given)
        measured = {"metrics": {"share": share_right, "right": Right()}} if form.measured else {}
        data = {"loader": loader, "eval_loader": loader if tells else aside}
        return {**measured, **data, "microbatch_size": _PART, "accumulate": _TOGETHER, **form.settings}

    other = evolve(rehearsal, factory=beside, build_model=form.model, duration=_duration(rehearsal, tells=tells))
    other.name = f"{rehearsal.name} with {name}"
    try:
        if folder is None:
            return other.fit(**settings())
        outcome, paths = other.saved(folder, every="3ba", **settings())
        for path in paths[:1]:
            goes_on(other, outcome, path, **settings())
    except ThawlineError as error:
        if is_its_own(error, rehearsal.make()):
            return None
        error.add_note(f"with {name}")
        raise
    except Exception as error:
        error.add_note(f"with {name}")
        raise
    return outcome


def _duration(rehearsal: Rehearsal, *, tells: bool) -> str | int:
    """Return how long a fit lasts: of batches that nobody counts, as many as there are."""
    given = Time(rehearsal.duration)
    return rehearsal.duration if tells or given.unit != "ep" else f"{max(1, 2 * int(given.value) - 1)}ba"


class _Look:
    """Holds the samples of each batch and of each microbatch against the order that they must come in."""

    def __init__(self, name: str, samples: Samples, tells: bool, noisy: bool) -> None:
        self.name, self.samples, self.tells, self.noisy = name, samples, tells, noisy
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
