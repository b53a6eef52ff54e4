"""A fit's timeline before the fit: the same algorithms over the same clock, without a step."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from itertools import islice, repeat
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from .algorithm import Algorithm, Stage
from .clock import Clock, Time
from .data import ResumableLoader
from .engine import Engine, Handler
from .errors import ArgumentError, DataError, with_article
from .events import Event
from .flops import FlopCounter
from .forward import stop_frozen
from .homes import OptimizerLike, over_twins
from .layering import find_layers
from .layers import LayerMap, LayerSpec
from .ledger import ParameterLedger
from .plan import Plan, Recorder
from .randomness import Randomness
from .recipe import Recipe
from .settings import bound_schedule, total_batches
from .state import State
from .twin import meta_twin

# The stages that decide what trains and when the fit ends. The others work on data, gradients and weights, and watch.
_ACTING = frozenset({Stage.SURGERY, Stage.TRAINABILITY, Stage.CONTROL})
_SHOWN = frozenset({Event.FIT_START, Event.EPOCH_START, Event.BATCH_START, Event.BATCH_END, Event.EPOCH_END})
_ENDS = frozenset({Event.FIT_END, Event.FIT_ABORT})
_EPOCHS = "train_loader does not say how many batches it has: no epoch ends here, and what waits for one is not shown."
_SAMPLES = "train_loader does not say how many samples its batches have: none are counted, and what waits for some is not shown."


class UnplannedError(Exception):
    """An algorithm asked for what exists in a fit only."""


class Foresight:
    """One call of :meth:`Trainer.plan`: a fit on a twin of the model that has no numbers.

    Args:
        trainer: The recipe; its algorithms are built anew.
        model: The caller's model; left as it is.
        train_loader: Training data; not iterated.
        duration: How long.
        optimizer: An optimizer, a factory, or pairs of them; left as it is.
        layers: The model's layers, if given; left as they are.

    Raises:
        ArgumentError: The loader does not say what the duration needs, or the model cannot be copied.
    """

    def __init__(
        self,
        trainer: Recipe,
        model: nn.Module,
        train_loader: Iterable[Any],
        *,
        duration: Time,
        optimizer: OptimizerLike,
        layers: LayerMap | LayerSpec | None,
    ) -> None:
        self.accumulate = trainer.accumulate
        self.data = ResumableLoader(train_loader, seed=trainer.seed, argument="Trainer.plan(train_loader=)")
        length = self.data.length
        self.sizes_known = self.data.sizes(0) is not None
        _check_length(duration, length, sizes_known=self.sizes_known, got=train_loader)
        clock = Clock(batches_per_epoch=0 if length is None else -(-length // trainer.accumulate))
        if layers is None:
            device = next((each.device for each in model.parameters()), torch.device("cpu"))
            layers = find_layers(model, self.data, trainer.forward().outputs, device)
        twin, twins = meta_twin(model)
        twin.train()
        schedule = bound_schedule(trainer.schedule, duration, clock.batches_per_epoch)
        ledger = ParameterLedger(
            twin, over_twins(optimizer, twins), copy.deepcopy(layers) if isinstance(layers, LayerMap) else layers,
            schedule=schedule, min_lr=trainer.min_lr, seed=trainer.seed,
        )  # fmt: skip
        self.state = _PlannedState(
            twin, ledger, duration, trainer.seed, clock, metrics=_Metrics(), accumulate=trainer.accumulate
        )
        self.algorithms = [each.fresh() for each in trainer.algorithms]
        self.engine = _Engine([each for each in self.algorithms if each.stage in _ACTING], self.state)
        counter = FlopCounter(twin, self.data.peek(), trainer.forward())
        self.recorder = Recorder(ledger, total_batches(duration, clock), counter.share)

    def plan(self) -> Plan:
        """Run the clock to the end of the fit; the events and their order are those of :class:`Run`."""
        emit, state = self.engine.emit, self.state
        with self.engine:
            emit(Event.FIT_START)
            while not self._finished():
                emit(Event.EPOCH_START)
                if state.stop_reason is None and self._epoch():
                    state.tick_epoch()
                emit(Event.EPOCH_END)
        reason = state.stop_reason
        plan = self.recorder.timeline(state.clock, "duration" if reason is None else f"stopped: {reason}")
        return Plan(plan.spans, plan.samples, plan.layers, tuple(self._notes()))

    def _epoch(self) -> bool:
        """Run the clock to the end of the epoch or of the fit; return whether the epoch is complete."""
        emit, state, observe = self.engine.emit, self.state, self.recorder.observe
        for samples in self._steps():
            emit(Event.BATCH_START)
            if not state.ledger.trainable_parameters:
                stop_frozen(state)
            if state.stop_reason is not None:
                break
            observe(state.clock)
            state.tick(samples)
            emit(Event.BATCH_END)
            if self._finished():
                break
        else:
            return True
        return 0 < state.clock.batch_in_epoch == state.clock.batches_per_epoch

    def _steps(self) -> Iterator[int]:
        """Yield the samples of each step of the running epoch."""
        epoch, empty = self.state.clock.epoch, True
        sizes = islice(self.data.sizes(epoch) or repeat(0), self.data.length)
        for first in sizes:
            empty = False
            yield first + sum(islice(sizes, self.accumulate - 1))
        if empty:
            raise DataError(f"train_loader yields no batch in epoch {epoch}. Give a loader with data.")

    def _finished(self) -> bool:
        return self.state.stop_reason is not None or self.state.duration.reached(self.state.clock)

    def _notes(self) -> Iterator[str]:
        if self.data.length is None:
            yield _EPOCHS
        if not self.sizes_known:
            yield _SAMPLES
        for each in self.algorithms:
            words = each.unplanned()
            if words is not None:
                yield f"{each.owner} {words}."
            elif each.owner in self.engine.left_out:
                yield f"{each.owner} {self.engine.left_out[each.owner]}, which only a fit has: what it does is not shown."
            elif _leaves_it_open(each) and (unseen := each.events - _SHOWN - _ENDS):
                names = " and ".join(event.name for event in Event if event in unseen)
                yield f"{each.owner} acts at {names}, which only a fit has: what it does there is not shown."


class _Engine(Engine):
    """An engine that goes on without an algorithm that asks for what exists in a fit only."""

    def __init__(self, algorithms: Iterable[Algorithm], state: State) -> None:
        self.left_out: dict[str, str] = {}
        super().__init__(algorithms, state)

    @override
    def _handler(self, algorithm: Algorithm) -> Handler:
        handler = super()._handler(algorithm)

        def careful(event: Event, state: State) -> None:
            if algorithm.owner in self.left_out:
                return
            try:
                handler(event, state)
            except UnplannedError as error:
                self.left_out[algorithm.owner] = f"asks for {error}"
            except (RuntimeError, NotImplementedError) as error:
                if "meta tensor" not in str(error):
                    raise
                self.left_out[algorithm.owner] = "looks at weights"

        self._authors[careful] = algorithm
        return careful


def _leaves_it_open(algorithm: Algorithm) -> bool:
    """Return whether it may change what trains or end the fit, and does not say itself what a plan cannot know."""
    return algorithm.stage in _ACTING and type(algorithm).unplanned is Algorithm.unplanned


class _OnlyInAFit:
    """A field of the state that a plan cannot fill."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, state: State | None, owner: type | None = None) -> Any:
        if state is None:
            return self
        raise UnplannedError(f"state.{self.name}")

    def __set__(self, state: State, value: object) -> None:
        """Take what the constructor gives."""


class _PlannedState(State):
    batch: Any = _OnlyInAFit()
    microbatch: Any = _OnlyInAFit()
    outputs: Any = _OnlyInAFit()
    loss: Any = _OnlyInAFit()
    grad_norm: Any = _OnlyInAFit()
    sample_ids: Any = _OnlyInAFit()


class _Metrics(dict[str, float]):
    """What algorithms logged themselves; losses and evaluations are missing."""

    def __missing__(self, name: str) -> float:
        raise UnplannedError(f"state.metrics[{name!r}]")

    @override
    def get(self, name: str, default: Any = None) -> Any:
        return self[name]


def foresee(
    trainer: Recipe,
    model: nn.Module,
    train_loader: Iterable[Any],
    *,
    duration: Time,
    optimizer: OptimizerLike,
    layers: LayerMap | LayerSpec | None,
) -> Plan:
    """Return the timeline of a fit that has not happened; the global random generators stay as they are."""
    with Randomness(train_loader).kept():
        return Foresight(trainer, model, train_loader, duration=duration, optimizer=optimizer, layers=layers).plan()


def _check_length(duration: Time, length: int | None, *, sizes_known: bool, got: object) -> None:
    if (duration.unit == "ep" and length is None) or (duration.unit == "sp" and not sizes_known):
        what = "batches an epoch" if duration.unit == "ep" else "samples a batch"
        raise ArgumentError(
            "Trainer.plan(train_loader=)", got=f"{with_article(type(got).__name__)} that does not say how many {what} has",
            takes=f"one that does, where the duration is {str(duration)!r}",
            example="trainer.plan(model, train_loader, duration='200ba')",
        )  # fmt: skip
