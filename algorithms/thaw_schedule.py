"""Training in phases: what thaws, at which rate, until when; written as a list or a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeAlias

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
    warn,
)
from .arguments import flag, one_of, positive, whole
from .phase_watch import PhaseWatch, monitors
from .phases import SCHEDULES, Phase, Plateau, Written, number_phases
from .schedule_check import check_phases, generate_phases, never_begin, never_warm
from .schedule_fts import Callback, phases_from_fts
from .schedule_text import as_data, read_phases, write_phases
from .standing import Standing, standing_after
from .train_only import all_but

Source: TypeAlias = "str | Path | Mapping[str, Any] | Sequence[Phase] | Sequence[Mapping[str, Any]]"
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
        >>> from thawline.engine import Trainer
        >>> from thawline.engine.testing import tiny_loader, tiny_models
        >>> schedule = ThawSchedule([Phase(thaw="head", until="1ep"), Phase(thaw="blocks", lr=1e-4, lr_scale=0.5)])
        >>> plan = Trainer(algorithms=[schedule]).plan(tiny_models()["mlp"](), tiny_loader(), duration="4ep")
        >>> [(span.start.epoch, *span.layers) for span in plan.spans]
        [(0, 'head'), (1, 'blocks[0]', 'blocks[1]', 'head')]
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
        options, phases = _read(self.source)
        for name in options.keys() - self._arguments[1].keys():
            setattr(self, name, options[name])
        self.phases = number_phases(phases, repeat=self.repeat)
        for phase in self.phases:
            _check_length(phase)
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
        """The first metric of an evaluation that a phase waits for or goes back by."""
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
        words = []
        for phase in self.phases:
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

    # -- events --------------------------------------------------------------------------------------------------

    @override
    def match(self, event: Event, state: State) -> bool:
        """Return whether the fit begins or ends, a phase is to end, or there is something to look at."""
        if event in (Event.EPOCH_START, Event.BATCH_START):
            return self._is_due(event, state.clock)
        return event is Event.FIT_START or self.phase is not None

    @override
    def apply(self, event: Event, state: State) -> None:
        """Begin, watch the running phase, or let the next one begin."""
        if event is Event.FIT_START:
            self._check(state)
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
        self._place, self._begun, self._late = saved["place"], Clock(**saved["begun"]), saved["late"]
        self._watch.load_state_dict(saved["watch"])

    # -- from phase to phase ---------------------------------------------------------------------------------------

    @property
    def _total(self) -> int:
        """How many phases run, in all rounds."""
        return self.max_depth if self._is_capped else len(self.phases) * self.repeat  # type: ignore[return-value]

    @property
    def _is_capped(self) -> bool:
        return self.max_depth is not None and self.max_depth <= len(self.phases)

    @property
    def _is_last(self) -> bool:
        return self._place == self._total - 1

    @property
    def _until(self) -> Time | Plateau | Callable[[State], bool] | None:
        """What ends the running phase; nothing ends one that is kept."""
        phase = self.phase
        return None if phase is None or (self._is_last and self._is_capped) else phase.until

    def _is_due(self, event: Event, clock: Clock) -> bool:
        """Return whether to leave the running phase now; the end of the last one is the fit's, or nothing follows."""
        if self.phase is None or (self._is_last and self.end_with_last_phase):
            return False
        return self._watch.over or self._has_passed(event, clock)

    def _has_passed(self, event: Event, clock: Clock) -> bool:
        """Return whether the running phase's time is up; one in epochs only between two of them."""
        until = self._until
        time = until.at_most if isinstance(until, Plateau) else until
        if not isinstance(time, Time) or (time.unit == "ep" and event not in (Event.EPOCH_START, Event.EPOCH_END)):
            return False
        return clock.batch > self._begun.batch and self._overdue(time, clock) >= -_TOLERANCE

    def _overdue(self, time: Time, clock: Clock) -> float:
        """Return how much later than the named end of the running phase the clock stands."""
        return time.elapsed(clock) - time.elapsed(self._begun) + self._late - time.value

    def _lateness(self, clock: Clock) -> float:
        """Return how much later than the running phase named the next begins, where both end by times of one unit."""
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
            for lr, names in _by(standing, "lr"):
                ledger.set_lr(names, lr, owner=owner)
        if any(each.weight_decay is not None for each in self.phases):
            for decay, names in _by(standing, "weight_decay"):
                ledger.set_options(names, weight_decay=decay, owner=owner)
        if any(each.lr_scale is not None for each in self.phases):
            for factor, names in _by(standing, "factor"):
                ledger.scale(names, factor, owner=owner)
        if any(each.schedule is not None for each in self.phases):
            schedule = None if phase.schedule is None else _SCHEDULES[phase.schedule]()
            span = _length(phase) or Time(f"{max(1e-9, 1 - ledger.clock.progress)!r}dur")
            ledger.set_schedule("*", None, owner=owner)
            ledger.set_schedule(free, schedule, span=span, owner=owner)

    @property
    def _mode(self) -> Literal["train"] | None:
        return "train" if self.batchnorm == "train" else None

    # -- the end of the last ----------------------------------------------------------------------------------------------

    def _end(self, event: Event, state: State) -> None:
        """End the fit with its last phase; at the fit's last EPOCH_END the best weights come back."""
        if self._is_last and self.end_with_last_phase and self._until is not None:
            if event is not Event.EVAL_END and self._has_passed(event, state.clock):
                self._watch.over = True
            if self._watch.over:
                state.stop(COMPLETED)
        ends = state.stop_reason is not None or state.duration.reached(state.clock)
        if ends and event is Event.EPOCH_END:
            state.restored = self._leave(state)

    # -- before the first --------------------------------------------------------------------------------------------

    def _check(self, state: State) -> None:
        """Check the phases beside the model, and warn of what is allowed and probably not meant."""
        left = check_phases(self.phases, state.ledger)
        left = tuple(name for name in left if "user" not in state.ledger.owners(name))
        if left:
            shown = ", ".join(left[:3]) + f" and {len(left) - 3} more" * (len(left) > 3)
            _warn(f"no phase names {len(left)} parameters, which stay frozen: {shown}. Name them in thaw= or freeze=.")
        if late := never_begin(self.phases, self._total, state):
            shown = ", ".join(map(repr, late[:3])) + f" and {len(late) - 3} more" * (len(late) > 3)
            never, them = ("phase never begins", "it") if len(late) == 1 else ("phases never begin", "them")
            _warn(
                f"{len(late)} {never}: {shown}. The fit ends after {state.duration}, before {them}. Write shorter phases."
            )
        if cold := never_warm(self.phases, self._total, state):
            shown = ", ".join(map(repr, cold))
            _warn(
                f"the warmup of {shown} is not over when the fit ends after {state.duration}, so its full rate is never "
                "reached. An int is epochs: write warmup='100ba' for batches, or warmup='0.1dur' for a share of the fit."
            )


def _warn(text: str) -> None:
    warn(f"ThawSchedule: {text}")


def _read(source: Any) -> tuple[dict[str, Any], tuple[Phase, ...]]:
    if isinstance(source, Sequence) and not isinstance(source, str) and source:
        if all(isinstance(each, Phase) for each in source):
            return {}, Written.like(source, source)
        strange = [each for each in source if not isinstance(each, (Phase, Mapping))]
        if strange or any(isinstance(each, Phase) for each in source):
            _refuse(strange[0] if strange else source)
    elif not isinstance(source, (str, Path, Mapping)) or not source:
        _refuse(source)
    return read_phases(source)


def _refuse(source: object) -> None:
    takes = "phases, or a YAML file, its text, or the same as dicts and lists"
    example = "ThawSchedule([Phase(thaw='head', until='2ep'), Phase(thaw='blocks')])"
    raise ArgumentError("ThawSchedule(source=)", got=source, takes=takes, example=example)


def _is_text(until: object) -> bool:
    return until is None or isinstance(until, (Time, Plateau))


def _length(phase: Phase) -> Time | None:
    """Return how long a phase is at most, as far as it says so."""
    until = phase.until
    return until.at_most if isinstance(until, Plateau) else until if isinstance(until, Time) else None


def _check_length(phase: Phase) -> None:
    if phase.schedule is not None and phase.until is not None and _length(phase) is None:
        takes = f"a phase whose length is known: {phase.name!r} ends by what only the fit knows"
        example = f"Phase(schedule={phase.schedule!r}, until=Plateau('eval/loss', at_most='5ep'))"
        raise ArgumentError("Phase(schedule=)", got=phase.schedule, takes=takes, example=example)


def _by(standing: Mapping[str, Standing], field: str) -> Iterable[tuple[Any, list[str]]]:
    """Yield each value of a field with the parameters that have it."""
    found: dict[Any, list[str]] = {}
    for name, each in standing.items():
        found.setdefault(getattr(each, field), []).append(name)
    return found.items()
