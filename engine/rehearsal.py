"""Small fits that the conformance checks run, and what they leave behind, compared bit for bit."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from attrs import define, evolve, field, frozen
from torch import Tensor, nn
from typing_extensions import override

from .algorithm import Algorithm, Stage
from .batches import batch_size_of
from .checkpointing import Checkpointing
from .clock import Time
from .errors import ArgumentError, ThawlineWarning, shorten
from .events import Event
from .functions import FunctionAlgorithm
from .homes import OptimizerLike
from .plan import Plan
from .randomness import Randomness, derive_seed
from .schedules import linear
from .settings import duration_of
from .state import State
from .store import checkpoints_in
from .surroundings import settings_kept
from .tracking import MemoryTracker, Tracker
from .trainer import Trainer

LIVE_EVENTS = frozenset(Event) - {Event.EVAL_START, Event.EVAL_BATCH_START, Event.EVAL_BATCH_END}

# The one thing that goes by turns: of two who hold the same, the first to release it ends no span of the timeline.
BY_TURNS = "timeline"
LAST_LOSS = "loss of the last batch"

_Each = TypeVar("_Each")


class Probe(Algorithm):
    """Calls a function at events, after everybody else, and another one when the fit closes."""

    stage: ClassVar[Stage] = Stage.OBSERVE

    def __init__(
        self,
        at: Callable[[Event, State], object],
        events: Iterable[Event] = Event,
        closing: Callable[[], object] = lambda: None,
    ) -> None:
        self.at, self.events, self.closing = at, frozenset(events), closing

    @override
    def apply(self, event: Event, state: State) -> None:
        """Call it."""
        self.at(event, state)

    @override
    def close(self) -> None:
        """Call the other one."""
        self.closing()

    @override
    def describe(self) -> dict[str, Any]:
        """Say only that it is one: what it calls differs from fit to fit."""
        return {"name": "Probe", "arguments": {}}


@frozen
class Step:
    """What the optimizers were to change in a step, as their groups said after it.

    Args:
        batch: Batches done before it.
        trainable: Number of scalars.
        rates: The highest rate in each layer.
        state_bytes: What the optimizers keep of what trains.
    """

    batch: int
    trainable: int
    rates: dict[str, float]
    state_bytes: int

    @classmethod
    def of(cls, state: State) -> Step:
        """Read the groups of a state's optimizers."""
        ledger = state.ledger
        rates: dict[str, float] = {}
        trainable = 0
        for group in ledger.groups:
            for name in group.parameters:
                layer = ledger.layers.of(name).name
                rates[layer] = max(rates.get(layer, 0.0), group.lr or 0.0)
                trainable += ledger.parameters[name].numel()
        kept = [each for one in ledger.optimizers for mine in one.state.values() for each in mine.values()]
        return cls(state.clock.batch, trainable, rates, sum(each.nbytes for each in kept if isinstance(each, Tensor)))


@frozen(eq=False)
class Outcome:
    """What a fit came to.

    Args:
        result: Weights, ledger, optimizer and algorithms at FIT_END, history and metrics: what is compared.
        events: The events, each with epoch, batch and samples done.
        journal: Names of the modules to which something was attached.
        steps: What the optimizers were to change at each step.
        timeline: What the fit says that it did.
        told: What trackers were told, by the batches done then.
        said: The warnings of what is allowed and probably not meant.
        best: The checkpoint with the best monitored metric.
        last: The newest checkpoint.
    """

    result: dict[str, Any]
    events: list[tuple[Event, int, int, int]]
    journal: frozenset[str]
    steps: list[Step]
    timeline: Plan
    told: list[tuple[int, dict[str, float]]]
    said: list[str]
    best: Path | None = None
    last: Path | None = None

    @property
    def all(self) -> dict[str, Any]:
        """All that another fit of the same comes to, tells and says."""
        return {"result": self.result, "told to trackers": self.told, "warnings": self.said}

    def after(self, batch: int, resumed: Outcome) -> dict[str, Any]:
        """Return what a fit comes to that was resumed after this many batches, and what it tells."""
        known = {key: value for key, value in self.result.items() if key in resumed.result}
        return {"result": known, "told to trackers": [each for each in self.told if each[0] > batch]}


@define(eq=False, slots=False)
class Rehearsal:
    """What a conformance check is given: how to build the algorithm, and small fits to run it in.

    Args:
        factory: Builds the algorithm, or a list of them, anew.
        build_model: Builds the model.
        loader: Training and evaluation data.
        loss_fn: As the Trainer's.
        duration: Of the whole fits.
        seed: Of models, fits and what is drawn.
        thorough: Whether to check every step and every pair.
        partners: Builders of the algorithms to run beside it.
        accumulates: Whether the algorithm claims that cutting batches leaves its updates the same.
        own_task: Whether model and loader are the kit's own.
        settings: Further arguments of the Trainer.
        optimizer: Returns the optimizer for a model; None leaves it to the Trainer.
    """

    factory: Callable[[], Any]
    build_model: Callable[[], nn.Module]
    loader: Iterable[Any]
    loss_fn: Callable[[Any, Any], Tensor] | None
    duration: str | int
    seed: int
    thorough: bool
    partners: Sequence[Callable[[], Any]]
    accumulates: bool
    own_task: bool = False
    settings: Mapping[str, Any] = field(factory=dict)
    optimizer: Callable[[nn.Module], OptimizerLike | None] = lambda _: None
    audited: dict[str, str] | None = field(default=None, init=False)
    changed: list[str] = field(factory=list, init=False)
    name: str = field(init=False)

    def __attrs_post_init__(self) -> None:
        duration_of(self.duration)
        self.name = ", ".join(type(each).__name__ for each in self.make())

    @property
    def has_no_memory(self) -> bool:
        """Whether all of it is functions, which have no place for state of their own."""
        return all(isinstance(each, FunctionAlgorithm) for each in self.make())

    def make(self, factory: Callable[[], Any] | None = None) -> list[Algorithm]:
        """Build the algorithms anew, as a list."""
        build = factory or self.factory
        made = build()
        found = [made] if isinstance(made, Algorithm) else made
        if not isinstance(found, list) or not found or not all(isinstance(each, Algorithm) for each in found):
            takes = "a class of algorithms, or a function that returns one or a list of them"
            argument, example = (
                ("factory", "MyAlgorithm") if build is self.factory else ("partners=", "…, partners=[EMA]")
            )
            raise ArgumentError(
                f"check_algorithm({argument})", got=made, takes=takes, example=f"check_algorithm({example})"
            )
        return found

    def model(self) -> nn.Module:
        """Build the model anew, always the same."""
        with Randomness().kept():
            torch.manual_seed(self.seed)
            return self.build_model()

    def batches(self) -> list[Any]:
        """Return the batches of an epoch; a loader draws their order from the global generator, which is as before."""
        with Randomness().kept():
            return list(self.loader)

    def batches_in_float64(self) -> list[Any]:
        """Return the same, their floating-point tensors in float64."""
        return [part for batch in self.batches() for part in cut(batch, 1)]

    def alone(self) -> Rehearsal:
        """Return the same without the algorithm."""
        return evolve(self, factory=lambda: [Probe(lambda *_: None)])

    def some(self, items: Iterable[_Each], count: int, seed: int) -> list[_Each]:
        """Return all items in a thorough check, else a few, drawn by the seed, in their order."""
        listed = list(items)
        drawn = sorted(range(len(listed)), key=lambda index: derive_seed(seed, "conformance", index))[:count]
        return listed if self.thorough else [listed[index] for index in sorted(drawn)]

    def trainer(self, algorithms: Sequence[Algorithm], **settings: Any) -> Trainer:
        """Return the Trainer of all fits."""
        given: dict[str, Any] = {
            "optimizer": partial(torch.optim.AdamW, lr=0.01),
            "schedule": linear(end=0.1),
            "loss_fn": self.loss_fn,
            "eval_every": "2ba",
            "log_every": "1ba",
            "seed": self.seed,
            "device": "cpu",
            "distributed": False,
            "progress": False,
        }
        return Trainer(algorithms=algorithms, **(given | dict(self.settings) | settings))

    def fit(
        self,
        algorithms: Sequence[Algorithm] | None = None,
        *,
        model: nn.Module | None = None,
        loader: Iterable[Any] | None = None,
        eval_loader: Iterable[Any] | None = None,
        probe: Callable[[Event, State], object] | None = None,
        closing: Callable[[], object] = lambda: None,
        duration: Time | str | int | None = None,
        resume: Path | bool = False,
        optimizer: OptimizerLike | None = None,
        trackers: Sequence[Tracker] = (),
        **settings: Any,
    ) -> Outcome:
        """Fit, and return what it came to; the global generators and settings are as before, and ``changed`` names these."""
        subjects = self.make() if algorithms is None else list(algorithms)
        model = self.model() if model is None else model
        loader = self.loader if loader is None else loader
        events: list[tuple[Event, int, int, int]] = []
        seen: dict[str, Any] = {}
        journal: set[str] = set()
        steps: list[Step] = []
        tracker = MemoryTracker()

        def watch(event: Event, state: State) -> None:
            clock = state.clock
            events.append((event, clock.epoch, clock.batch, clock.sample))
            if probe is not None:
                probe(event, state)
            if event is Event.AFTER_STEP:
                steps.append(Step.of(state))
            if event is Event.BATCH_END:
                seen[LAST_LOSS] = None if state.loss is None else state.loss.item()
            if event is Event.FIT_END:
                seen.update(snapshot(state, subjects))
                journal.update(entry.module for entry in state.ledger.journal)

        optimizer = self.optimizer(model) if optimizer is None else optimizer
        trainer = self.trainer([*subjects, Probe(watch, closing=closing)], trackers=[*trackers, tracker], **settings)
        span = self.duration if duration is None else duration
        with Randomness().kept(), settings_kept() as self.changed, heard() as said:
            result = trainer.fit(
                model, loader, eval_loader or loader, duration=span, optimizer=optimizer, resume=resume
            )
        after = {
            "weights after the fit": weights_of(model),
            "history": result.history,
            "metrics": dict(result.metrics),
            "stop reason": result.stop_reason,
            BY_TURNS: list(result.timeline.spans),
        }
        told, best, last = tracker.metrics, result.best, result.last
        return Outcome(seen | after, events, frozenset(journal), steps, result.timeline, told, said, best, last)

    @cached_property
    def whole(self) -> Outcome:
        """The uninterrupted fit, which others are compared with."""
        return self.fit()

    def saved(self, folder: Path, *, every: str = "1ba", **settings: Any) -> tuple[Outcome, list[Path]]:
        """Fit with checkpoints; return what it came to, and the checkpoints in order."""
        outcome = self.fit(run_dir=folder, checkpoint=Checkpointing(every=every, keep=10_000), **settings)
        return outcome, list(checkpoints_in(folder))


def written_in(run: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return what ``metrics.jsonl`` of a run_dir says, by the batches done then."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(each.pop("step"), each) for each in lines if each.pop("time") and "artifact" not in each]


@contextmanager
def quiet() -> Generator[None, None, None]:
    """Leave out the warnings of what is allowed and probably not meant: so small a fit is not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThawlineWarning)
        yield


@contextmanager
def heard() -> Generator[list[str], None, None]:
    """List those warnings instead of showing them; others go their way."""
    said: list[str] = []
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, ThawlineWarning):
                said.append(str(message))
            else:
                show(message, category, *where)

        warnings.simplefilter("always", ThawlineWarning)
        warnings.showwarning = note  # type: ignore[assignment]  # what else it is given goes on as it came
        yield said


def snapshot(state: State, algorithms: Iterable[Algorithm]) -> dict[str, Any]:
    """Copy what the next batch of a fit depends on."""
    ledger = state.ledger.state_dict()
    owned = {each.owner: each.state_dict() for each in algorithms}
    return {
        "weights": weights_of(state.model),
        "ledger": copied(ledger),
        "algorithms": copied(owned),
        "clock": str(state.clock),
    }


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy parameters and buffers by name."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: each.detach().clone() for name, each in tensors.items()}


def copied(value: Any) -> Any:
    """Copy containers and tensors; what else there is is taken as it is."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.detach().clone() if isinstance(value, Tensor) else value.copy()
    if isinstance(value, Mapping):
        return {key: copied(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value)(copied(each) for each in value) if not hasattr(value, "_fields") else value
    return value


def difference(first: Any, second: Any, place: str = "", *, tolerance: float = 0.0) -> str | None:
    """Return in words where two trees of tensors and JSON first differ; None where they are equal bit for bit.

    Args:
        first: One.
        second: The other.
        place: What they are called in the words.
        tolerance: How much floating-point numbers may differ, absolutely and relatively.

    Example:
        >>> difference({"a": [1, 2]}, {"a": [1, 3]}, "state")
        "state['a'][1]: 2 and 3"
    """
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return _tensors(first, second, place, tolerance)
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return None if np.array_equal(first, second) else f"{place}: other numbers"
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        if first.keys() != second.keys():
            missing = [*(first.keys() - second.keys()), *(second.keys() - first.keys())]
            return f"{place}: only one of them has {shorten(min(missing, key=str))}"
        pairs = [(f"{place}[{key!r}]", each, second[key]) for key, each in first.items()]
    elif isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        if len(first) != len(second):
            return f"{place}: {len(first)} and {len(second)} entries"
        pairs = [(f"{place}[{index}]", *both) for index, both in enumerate(zip(first, second, strict=True))]
    elif isinstance(first, float) and isinstance(second, (int, float)):
        same = first == second or (math.isnan(first) and math.isnan(second))
        same = same or (tolerance > 0 and math.isclose(first, second, rel_tol=tolerance, abs_tol=tolerance))
        return None if same else f"{place}: {first!r} and {second!r}"
    else:
        return None if first is second or first == second else f"{place}: {shorten(first)} and {shorten(second)}"
    found = (difference(one, other, where, tolerance=tolerance) for where, one, other in pairs)
    return next((each for each in found if each is not None), None)


def _tensors(first: Tensor, second: Tensor, place: str, tolerance: float) -> str | None:
    if first.shape != second.shape or first.dtype != second.dtype:
        return f"{place}: {tuple(first.shape)} of {first.dtype} and {tuple(second.shape)} of {second.dtype}"
    if bool(((first == second) | ((first != first) & (second != second))).all()):  # NaN equals NaN here
        return None
    if tolerance and first.is_floating_point() and torch.allclose(first, second, rtol=tolerance, atol=tolerance):
        return None
    return f"{place}: they differ by up to {(first.double() - second.double()).abs().max().item():.3g}"


def in_float64(loss_fn: Callable[[Any, Any], Tensor] | None) -> Callable[[Any, Any], Tensor] | None:
    """Return a loss with its own tensors, such as weights of classes, in float64."""
    return copy.deepcopy(loss_fn).double() if isinstance(loss_fn, nn.Module) else loss_fn


def cut(batch: Any, parts: int) -> list[Any]:
    """Cut a batch into equal parts along dimension 0, its floating-point tensors in float64; nothing where it does not divide."""
    size = batch_size_of(batch)
    if size % parts:
        return []
    share = size // parts
    return [_taken(batch, size, slice(start, start + share)) for start in range(0, size, share)]


def _taken(batch: Any, size: int, part: slice) -> Any:
    if isinstance(batch, Tensor):
        wide = batch.double() if batch.is_floating_point() else batch
        return wide[part] if batch.ndim and batch.shape[0] == size else wide
    if isinstance(batch, Mapping):
        return {key: _taken(each, size, part) for key, each in batch.items()}
    if isinstance(batch, (list, tuple)):
        return tuple(_taken(each, size, part) for each in batch)
    return batch
