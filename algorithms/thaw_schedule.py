"""Training in phases: what thaws, at which rate, until when; written as a list or a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import attrs
from torch import nn
from typing_extensions import override

from ..engine import (
    Algorithm,
    ArgumentError,
    Clock,
    Event,
    LayerMap,
    ParameterLedger,
    Schedule,
    Stage,
    State,
    Time,
    constant,
    cosine,
    get_logger,
    linear,
    register,
)
from .arguments import flag, one_of, positive, whole
from .phase_watch import PhaseWatch, monitors
from .phases import SCHEDULES, Phase, Plateau, Written, check_length, length_of, number_phases, unplanned_ends
from .schedule_check import check_fit, generate_phases
from .schedule_fts import Callback, phases_from_fts
from .schedule_source import Source, read_source
from .schedule_text import as_data, write_phases
from .standing import Standing, group_by, standing_after
from .train_only import all_but

COMPLETED = "ThawSchedule: last phase completed"
OPTIONS = ("repeat", "max_depth", "batchnorm", "base_max_lr", "end_with_last_phase")
log = get_logger(__name__)
_SCHEDULES: Mapping[str, Callable[[], Schedule]] = dict(zip(SCHEDULES, (constant, linear, cosine), strict=True))
_TOLERANCE = 1e-9  # elapsed times are floats: 0.3 - 0.2 is a little less than 0.1


@register
@attrs.define(slots=False, eq=False)
class ThawSchedule(Algorithm):
    """Trains in phases. Each begins with what it thaws and freezes, and ends after a time, on a plateau, or by a function.

    At FIT_START everything is held that the first phase does not thaw. What ends a phase may be seen at any time; the next
    begins at the next EPOCH_START or BATCH_START, at EPOCH_START alone where the end is in epochs. Times count from
    the phase's begin; behind a time in the same unit from the end that it named, so that what is rounded up to whole
    batches does not add up. A phase trains for one batch at least. Another owner's hold stays: beside LoRAInject a
    thawed layer trains its adapters.

    A phase's rates: ``lr`` is the base rate of what it thaws, ``lr_scale`` a factor on all that trained before, so that
    factors of later phases multiply; ``schedule`` replaces the fit's for all that trains, over the phase's length.

    Args:
        source: Phases; or a YAML file, its text, or the same as dicts and lists. Options may stand there as well; an
            argument goes before them.
        repeat: How often the whole sequence runs. Each time it begins as the first did: the rest is frozen again, and
            rates, factors and weight decay are those of the first phase.
        max_depth: The number of the phase, from 1 on, that is kept to the end of the fit; above the
            number of phases nothing is kept.
        batchnorm: ``"eval"``: the statistics of frozen normalization layers stand still. ``"train"``: they go on, where
            nobody else holds the layer.
        base_max_lr: The base rate of what a phase after the first thaws without a rate of its own.
        end_with_last_phase: Whether the fit ends with the last phase, where that has an end; else it goes on as it is.

    Raises:
        ScheduleError: Something is wrong with the source, or at FIT_START with the phases beside the model.
        ArgumentError: An argument of the wrong type or out of range; when it is first looked at, a metric that nobody
            logged.

    Warns:
        ThawlineWarning: At FIT_START, parameters that no phase names, and phases that never begin within the fit.

    Source: the phases of finetuning-scheduler (Dale, 2021, doi:10.5281/zenodo.5595185).

    Example:
        >>> import torch
        >>> from thawline.engine import Trainer
        >>> from thawline.engine.testing import tiny_loader, tiny_models
        >>> schedule = ThawSchedule([Phase(thaw="head", until="1ep"), Phase(thaw="blocks", lr=1e-4, lr_scale=0.5)])
        >>> plan = Trainer(algorithms=[schedule]).plan(tiny_models()["mlp"](), tiny_loader(), duration="4ep")
        >>> [(span.start.epoch, *span.layers) for span in plan.spans]
        [(0, 'head'), (1, 'blocks[0]', 'blocks[1]', 'head')]
        >>> plan.samples[0].rates, plan.samples[-1].rates
        ({'head': 0.0001}, {'blocks[0]': 0.0001, 'blocks[1]': 0.0001, 'head': 5e-05})
        >>> head = Phase(thaw="head", until="3ba", schedule="linear", warmup="2ba")
        >>> schedule = ThawSchedule([head, Phase(thaw="blocks", freeze="head", until="1ep")], repeat=2, base_max_lr=0.01)
        >>> trainer = Trainer(algorithms=[schedule], optimizer=lambda each: torch.optim.SGD(each, lr=1.0))
        >>> plan = trainer.plan(tiny_models()["mlp"](), tiny_loader(), duration="6ep")
        >>> [(span.start.batch, *span.layers) for span in plan.spans]
        [(0, 'head'), (3, 'blocks[0]', 'blocks[1]'), (8, 'head'), (11, 'blocks[0]', 'blocks[1]')]
        >>> [{name: round(rate, 2) for name, rate in sample.rates.items()} for sample in plan.samples[:4]]
        [{'head': 0.0}, {'head': 0.33}, {'head': 0.33}, {'blocks[0]': 0.01, 'blocks[1]': 0.01}]
    """

    stage: ClassVar[Stage] = Stage.TRAINABILITY

    source: Source = attrs.field(metadata={"call": "[Phase(thaw='head', until='2ep')]"})
    repeat: int = attrs.field(default=1, kw_only=True, validator=whole(at_least=1))
    max_depth: int | None = attrs.field(
        default=None, kw_only=True, validator=whole(at_least=1, or_none=True, example=3)
    )
    batchnorm: Literal["eval", "train"] = attrs.field(default="eval", kw_only=True, validator=one_of(("eval", "train")))
    base_max_lr: float | None = attrs.field(default=None, kw_only=True, validator=positive(or_none=True, example=1e-5))
    end_with_last_phase: bool = attrs.field(default=True, kw_only=True, validator=flag())

    phases: Written = attrs.field(init=False, repr=False)
    """The phases of one round, all with a name."""
    events: frozenset[Event] = attrs.field(init=False, repr=False)
    _place: int = attrs.field(init=False, default=-1, repr=False)
    _begun: Clock = attrs.field(init=False, factory=Clock, repr=False)
    _late: float = attrs.field(
        init=False, default=0.0, repr=False
    )  # behind the begin that was named, in the phase's unit
    _watch: PhaseWatch = attrs.field(init=False, factory=PhaseWatch, repr=False)

    def __attrs_post_init__(self) -> None:
        options, phases = read_source(self.source)
        for name in options.keys() - self._arguments[1].keys():
            setattr(self, name, options[name])
        self.phases = number_phases(phases, repeat=self.repeat)
        for phase in self.phases:
            check_length(phase)
        if not self.phases[0].thaw:
            example = "ThawSchedule([Phase(thaw='head')])"
            raise ArgumentError(
                "ThawSchedule(source=)", got=self.phases[0], takes="a first phase that thaws", example=example
            )
        # The file may be gone when a fit begins afresh.
        self._arguments = ((self.phases,), {name: getattr(self, name) for name in OPTIONS})
        events = {Event.FIT_START, Event.EPOCH_START, Event.EPOCH_END, Event.EVAL_END, Event.FIT_END}
        if not all(isinstance(each.until, Time) and each.until.unit == "ep" for each in self.phases if each.until):
            events |= {Event.BATCH_START, Event.BATCH_END}
        self.events = frozenset(events)

    # -- making and writing --------------------------------------------------------------------------------------

    @classmethod
    def generate(cls, model: nn.Module, **options: Any) -> Self:
        """Return the default schedule of a model: the head, then a layer more in each phase, in equal shares of the fit.

        Args:
            model: The model, or its LayerMap.
            **options: As for the constructor.

        Example:
            >>> schedule = ThawSchedule.generate(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), max_depth=1)
            >>> [phase.name for phase in schedule.phases], schedule.max_depth
            (['head', 'blocks[0]'], 1)
        """
        if not isinstance(model, (nn.Module, LayerMap)):
            takes = "a torch.nn.Module or a LayerMap"
            raise ArgumentError("ThawSchedule.generate(model=)", got=model, takes=takes, example="generate(model)")
        layers = model if isinstance(model, LayerMap) else LayerMap(model)
        return cls(generate_phases(layers), **options)

    @classmethod
    def from_fts(cls, path: str | Path, model: nn.Module, *, callback: Callback | None = None, **options: Any) -> Self:
        """Read a schedule of finetuning-scheduler.

        Args:
            path: The file, or its text.
            model: The model whose parameters it names.
            callback: How the callback was configured; None for its defaults.
            **options: As for the constructor.

        Raises:
            ScheduleError: Something is wrong with it, or has no place here.
        """
        return cls(phases_from_fts(path, model, callback=callback), **options)

    def save(self, path: str | Path) -> Path:
        """Write the schedule as YAML, from which the constructor reads the same one.

        Raises:
            ArgumentError: A phase ends by a function, which text cannot hold.

        Example:
            >>> path = ThawSchedule([Phase(thaw="head", until="2ep")], repeat=2).save("thaw.yaml")
            >>> print(path.read_text(), end="")
            repeat: 2
            phases:
            - {name: phase 1, thaw: head, until: 2ep}
            >>> ThawSchedule(path).repeat, ThawSchedule(path, repeat=3).repeat
            (2, 3)
        """
        defaults = {each.name: each.default for each in attrs.fields(type(self))}
        options = {name: getattr(self, name) for name in OPTIONS if getattr(self, name) != defaults[name]}
        target = Path(path)
        target.write_text(write_phases(options, self.phases), encoding="utf-8")
        return target

    # -- reading -------------------------------------------------------------------------------------------------

    @property
    def phase(self) -> Phase | None:
        """The running phase; None before the fit, and after the last phase of a fit that goes on."""
        return self.phases[self._place % len(self.phases)] if 0 <= self._place < self._total else None

    @property
    def depth(self) -> int:
        """The number of the running phase within its round, from 1 on; 0 where none runs."""
        return 0 if self.phase is None else self._place % len(self.phases) + 1

    @property
    def remaining(self) -> int:
        """How many phases are still to begin, those of later rounds included."""
        return max(0, self._total - self._place - 1)

    @property
    def monitor(self) -> str | None:
        """The first metric of an evaluation that a phase waits for or goes back by.

        Example:
            >>> ends = [Plateau("train/loss"), Plateau("eval/f1")]
            >>> ThawSchedule([Phase(thaw=f"{place}", until=end) for place, end in enumerate(ends)]).monitor
            'eval/f1'
        """
        found = (name for phase in self.phases for name in monitors(phase) if not name.startswith("train/"))
        return next(found, None)

    @override
    def _bound(self) -> dict[str, Any]:
        untils = [phase.until for phase in self.phases]
        phases = [
            as_data(phase if _is_text(until) else attrs.evolve(phase, until=None))
            for phase, until in zip(self.phases, untils, strict=True)
        ]
        for phase, until in zip(phases, untils, strict=True):
            if not _is_text(until):
                phase["until"] = until  # type: ignore[assignment]  # a function, which describe() names
        return {**super()._bound(), "source": phases}

    @override
    def unplanned(self) -> str | None:
        """Return which phases end by what only a fit knows."""
        return unplanned_ends(self.phases)

    # -- events --------------------------------------------------------------------------------------------------

    @override
    def match(self, event: Event, state: State) -> bool:
        """Return whether the fit begins or ends, a phase is to end, or there is something to look at."""
        if event in (Event.EPOCH_START, Event.BATCH_START):
            return self._is_due(event, state.clock)
        return event is Event.FIT_START or self.phase is not None

    @override
    def apply(self, event: Event, state: State) -> None:
        """Begin, watch the running phase, or let the next one begin.

        Example:
            >>> import torch
            >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> state = State(model, ParameterLedger(model, lambda every: torch.optim.SGD(every, lr=0.1)))
            >>> body = Phase(thaw="blocks", lr=0.01, lr_scale=0.5, weight_decay=0.1)
            >>> schedule = ThawSchedule([Phase(thaw="head", until="2ba"), body])
            >>> schedule.apply(Event.FIT_START, state)
            >>> for state.clock in (Clock(batch=1), Clock(batch=2)):
            ...     if schedule.match(Event.BATCH_START, state):
            ...         schedule.apply(Event.BATCH_START, state)
            ...     print([(group.name, group.lr, group.options["weight_decay"]) for group in state.ledger.groups])
            [('head', 0.1, 0)]
            [('blocks[0]', 0.01, 0.1), ('head', 0.05, 0)]
        """
        if event is Event.FIT_START:
            check_fit(self.phases, self._total, state)
            self._enter(state)
        elif event in (Event.EPOCH_START, Event.BATCH_START):
            self._leave(state)
            self._enter(state)
        elif event is Event.FIT_END:
            # Where a signal has ended the fit; the last checkpoint could go on.
            if not state.restored:
                self._watch.weights.put_back(state)
            self._watch = PhaseWatch()
        elif not state.restored:
            if self.phase is not None:
                self._watch.look(event, state, self.phase, self._until)
            self._end(event, state)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "place": self._place,
            "begun": self._begun.to_json(),
            "late": self._late,
            "watch": self._watch.state_dict(),
        }

    @override
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Example:
            >>> schedule = ThawSchedule([Phase(name="head", thaw="head", until="2ep"), Phase(thaw="stem", until="2ep")], repeat=2)
            >>> schedule.phase, schedule.depth, schedule.remaining
            (None, 0, 4)
            >>> begun = ThawSchedule(schedule.phases, repeat=2)
            >>> begun._place, begun._begun, begun._late = 2, Clock(epoch=4, batch=40), 0.5
            >>> schedule.load_state_dict(begun.state_dict())
            >>> schedule.phase.name, schedule.depth, schedule.remaining, schedule._begun == begun._begun, schedule._late
            ('head', 1, 1, True, 0.5)
        """
        self._place, self._begun, self._late = saved["place"], Clock(**saved["begun"]), saved["late"]
        self._watch.load_state_dict(saved["watch"])

    # -- from phase to phase ---------------------------------------------------------------------------------------

    @property
    def _total(self) -> int:
        """How many phases run, in all rounds.

        Example:
            >>> phases = [Phase(thaw="head", until="2ep"), Phase(thaw="stem", until="2ep")]
            >>> [ThawSchedule(phases, repeat=2, max_depth=depth)._total for depth in (None, 1, 2, 3)]
            [4, 1, 2, 4]
        """
        return self.max_depth if self._is_capped else len(self.phases) * self.repeat  # type: ignore[return-value]

    @property
    def _is_capped(self) -> bool:
        return self.max_depth is not None and self.max_depth <= len(self.phases)

    @property
    def _is_last(self) -> bool:
        return self._place == self._total - 1

    @property
    def _until(self) -> Time | Plateau | Callable[[State], bool] | None:
        """What ends the running phase; nothing ends one that is kept.

        Example:
            >>> schedule = ThawSchedule([Phase(thaw="head", until="2ep"), Phase(thaw="stem", until="3ep")], max_depth=2)
            >>> schedule._place = 0
            >>> schedule._until, schedule._is_last
            (Time('2ep'), False)
            >>> schedule._place = 1
            >>> schedule._until, schedule._is_last
            (None, True)
        """
        phase = self.phase
        return None if phase is None or (self._is_last and self._is_capped) else phase.until

    def _is_due(self, event: Event, clock: Clock) -> bool:
        """Return whether to leave the running phase now; the end of the last one is the fit's, or nothing follows.

        Example:
            >>> for ends in (True, False):
            ...     schedule = ThawSchedule([Phase(thaw="head", until="3ba")], end_with_last_phase=ends)
            ...     schedule._place = 0
            ...     print([schedule._is_due(Event.BATCH_START, Clock(batch=batch)) for batch in (2, 3)])
            [False, False]
            [False, True]
        """
        if self.phase is None or (self._is_last and self.end_with_last_phase):
            return False
        return self._watch.over or self._has_passed(event, clock)

    def _has_passed(self, event: Event, clock: Clock) -> bool:
        """Return whether the running phase's time is up; one in epochs only between two of them.

        Example:
            >>> schedule, clock = ThawSchedule([Phase(thaw="head", until="1ep")]), Clock(epoch=1, batch=4)
            >>> schedule._place = 0
            >>> schedule._has_passed(Event.BATCH_START, clock), schedule._has_passed(Event.EPOCH_START, clock)
            (False, True)
        """
        until = self._until
        time = until.at_most if isinstance(until, Plateau) else until
        if not isinstance(time, Time) or (time.unit == "ep" and event not in (Event.EPOCH_START, Event.EPOCH_END)):
            return False
        return clock.batch > self._begun.batch and self._overdue(time, clock) >= -_TOLERANCE

    def _overdue(self, time: Time, clock: Clock) -> float:
        """Return how much later than the named end of the running phase the clock stands."""
        return time.elapsed(clock) - time.elapsed(self._begun) + self._late - time.value

    def _lateness(self, clock: Clock) -> float:
        """Return how much later than the running phase named the next begins, where both end by times of one unit.

        Example:
            >>> for until in ("0.25dur", "1ep"):
            ...     schedule = ThawSchedule([Phase(thaw="head", until="0.25dur"), Phase(thaw="stem", until=until)])
            ...     schedule._place, schedule._late = 0, 0.05
            ...     print(round(schedule._lateness(Clock(progress=0.3)), 2))
            0.1
            0.0
        """
        before, after = self._until, self.phases[(self._place + 1) % len(self.phases)].until
        if isinstance(before, Time) and isinstance(after, Time) and before.unit == after.unit:
            return self._overdue(before, clock)
        return 0.0

    def _leave(self, state: State) -> bool:
        """Put the phase's best weights back, and drop the optimizer's moments, which belong to others; return whether."""
        names = self._watch.weights.put_back(state)
        if names:
            state.ledger.drop_moments(names, owner=self.owner)
            log.info("restored the best weights", phase=self.phase and self.phase.name)
        return bool(names)

    def _enter(self, state: State) -> None:
        """Begin the next phase: make the ledger say what the phases of this round have brought about."""
        self._late = self._lateness(state.clock)
        self._place, self._begun, self._watch = self._place + 1, state.clock, PhaseWatch()
        phase = self.phase
        if phase is None:
            return
        ledger, owner = state.ledger, self.owner
        standing = standing_after(self.phases[: self.depth], ledger.select, base_max_lr=self.base_max_lr)
        held = [name for name in ledger.parameters if name not in standing]
        free = all_but(state.layers, held)
        with ledger.at_once():
            if held:
                ledger.freeze(all_but(state.layers, standing), owner=owner, mode=self._mode)
            # What is not held is not released: neither would its warmup begin, nor one of the round before end.
            if (phase.warmup is not None or self._place) and not self._place % len(self.phases):
                ledger.freeze(free, owner=owner, moments="keep", mode=self._mode)
            self._settle(ledger, phase, {**dict.fromkeys(held, Standing()), **standing}, free)
            ledger.thaw(free, owner=owner, warmup=phase.warmup)
        log.info("phase", name=phase.name, epoch=state.clock.epoch, batch=state.clock.batch)

    def _settle(
        self, ledger: ParameterLedger, phase: Phase, standing: Mapping[str, Standing], free: Sequence[str]
    ) -> None:
        """Set rates, options and schedule, and take them back from what is frozen; leave to others what no phase sets."""
        owner = self.owner
        if self.base_max_lr is not None or any(each.lr is not None for each in self.phases):
            for lr, names in group_by(standing, "lr"):
                ledger.set_lr(names, lr, owner=owner)
        if any(each.weight_decay is not None for each in self.phases):
            for decay, names in group_by(standing, "weight_decay"):
                ledger.set_options(names, weight_decay=decay, owner=owner)
        if any(each.lr_scale is not None for each in self.phases):
            for factor, names in group_by(standing, "factor"):
                ledger.scale(names, factor, owner=owner)
        if any(each.schedule is not None for each in self.phases):
            schedule = None if phase.schedule is None else _SCHEDULES[phase.schedule]()
            span = length_of(phase) or Time(f"{max(1e-9, 1 - ledger.clock.progress)!r}dur")
            ledger.set_schedule("*", None, owner=owner)
            ledger.set_schedule(free, schedule, span=span, owner=owner)

    @property
    def _mode(self) -> Literal["train"] | None:
        return "train" if self.batchnorm == "train" else None

    # -- the end of the last ----------------------------------------------------------------------------------------------

    def _end(self, event: Event, state: State) -> None:
        """End the fit with its last phase; at the fit's last EPOCH_END the best weights come back.

        Example:
            >>> import torch
            >>> model = nn.Linear(4, 2)
            >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters(), lr=0.1)), duration="9ep")
            >>> schedule = ThawSchedule([Phase(thaw="head", until="2ba", restore="best")])
            >>> schedule.apply(Event.FIT_START, state)
            >>> state.metrics["eval/loss"], best = 0.5, model.bias.tolist()
            >>> schedule.apply(Event.EVAL_END, state)
            >>> _ = model.bias.data.fill_(7.0)
            >>> for state.clock in (Clock(batch=1), Clock(batch=2)):
            ...     schedule.apply(Event.BATCH_END, state)
            ...     print(state.stop_reason)
            None
            ThawSchedule: last phase completed
            >>> schedule.apply(Event.EPOCH_END, state)
            >>> state.restored, model.bias.tolist() == best
            (True, True)
        """
        if self._is_last and self.end_with_last_phase and self._until is not None:
            if event is not Event.EVAL_END and self._has_passed(event, state.clock):
                self._watch.over = True
            if self._watch.over:
                state.stop(COMPLETED)
        ends = state.stop_reason is not None or state.duration.reached(state.clock)
        if ends and event is Event.EPOCH_END:
            state.restored = self._leave(state)


def _is_text(until: object) -> bool:
    return until is None or isinstance(until, (Time, Plateau))
