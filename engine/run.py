"""One fit: the loop, read top-down; around it what starts, saves, and ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import nn

from .checkpoint import capture, restore, seed_everything, well_formed
from .checkpointing import Checkpointing
from .clock import Clock, Time
from .data import Fetched, ResumableLoader
from .distributed import Team
from .engine import Engine
from .errors import NonFiniteError
from .evaluation import evaluate
from .events import LEDGER_EVENTS, Event
from .forward import warn_of_late_parameters
from .homes import OptimizerLike
from .layering import find_layers
from .layers import LayerMap, LayerSpec
from .ledger import ParameterLedger
from .log import get_logger
from .memory import BatchStart, Microbatches
from .monitor import Monitors
from .nonfinite import Setback, StepGuard
from .plan import Plan, Recorder
from .precision import Precision
from .progress import progress_for
from .ranks import Ranks, open_run_dir, seed_of, start_alike
from .recipe import Recipe
from .report import Report
from .resume import OnChange
from .rundir import RunDir
from .settings import bound_schedule, total_batches
from .shares import Share
from .signals import StopSignals
from .state import State
from .step import Step
from .unlisted import buffer_shapes
from .workers import DeferredDeaths

log = get_logger(__name__)

_EPOCH = Time("1ep")


class Run:
    """One call of :meth:`Trainer.fit`: a context that opens what the fit needs and closes it whatever happens.

    Its arguments are those of :meth:`Trainer.fit`, and the recipe.
    """

    def __init__(
        self,
        trainer: Recipe,
        model: nn.Module,
        train_loader: Iterable[Any],
        eval_loader: Iterable[Any] | None,
        *,
        duration: Time,
        optimizer: OptimizerLike,
        layers: LayerMap | LayerSpec | None,
        resume: bool | str | Path,
        on_change: OnChange = "refuse",
        team: Team | None = None,
    ) -> None:
        self.trainer = trainer
        self.team = team
        self._on_change: OnChange = on_change
        self.progress = progress_for(trainer.progress if team is None or team.first else False)
        share = None if team is None else Share(team.rank, team.world)
        self.forward = trainer.forward()
        self.precision = Precision(trainer.precision, trainer.device)
        self.functions = self.precision.autocasted(self.forward.outputs), self.precision.autocasted(self.forward.loss)
        self.data = ResumableLoader(train_loader, seed=trainer.seed, accumulate=trainer.accumulate, share=share)
        self.eval_data: ResumableLoader | None = None
        if eval_loader is not None:
            self.eval_data = ResumableLoader(
                eval_loader, seed=trainer.seed, argument="Trainer.fit(eval_loader=)", share=share
            )
        length = self.data.length
        clock = Clock(batches_per_epoch=0 if length is None else -(-length // trainer.accumulate))
        self.settings = {**trainer.describe(), "duration": str(duration)}
        self._modes = [(module, module.training) for module in model.modules()]
        policy = trainer.checkpoint or Checkpointing()
        opened = partial(RunDir, trainer.run_dir, policy, trainer.trackers)
        self.folder = opened(resume=resume) if team is None else open_run_dir(team, opened, resume)
        try:
            model.to(trainer.device)
            if team is not None:
                start_alike(team, model, self.settings, train_loader=self.data, eval_loader=self.eval_data)
            schedule = bound_schedule(trainer.schedule, duration, clock.batches_per_epoch)
            if layers is None:
                layers = find_layers(model, self.data, self.functions[0], trainer.device)
            ledger = ParameterLedger(
                model, optimizer, layers, schedule=schedule, min_lr=trainer.min_lr, seed=trainer.seed
            )
            for each in trainer.algorithms:
                each.reset()
            sharded = team is not None and team.shards
            self.state = State(
                model, ledger, duration, trainer.seed, clock, sharded=sharded, accumulate=trainer.accumulate
            )
            self.engine = Engine(trainer.algorithms, self.state, debug=trainer.debug)
            self.recorder = Recorder(ledger, total_batches(duration, clock))
        except BaseException:
            self.folder.close()
            raise
        self._beside: dict[str, Any] = {"found": buffer_shapes(model), "loss": self.forward.module}
        self._beside["pristine"] = self.folder.pristine(model)
        self.report = Report(self.state, self.folder, self.progress)
        self._evaluated_at: int | None = None
        self._exhausted = self._epoch_begun = self._interrupted = False
        self._next_due = 0
        self._microbatches = Microbatches(self.forward, trainer.microbatch_size, trainer.accumulate)
        self._guard = StepGuard(trainer.on_nonfinite, scaled=trainer.precision == "fp16")
        self._step = Step(
            engine=self.engine, functions=self.functions, precision=self.precision, microbatches=self._microbatches,
            guard=self._guard, start=BatchStart(self.state, trainer.device, self.forward.module), recorder=self.recorder, report=self.report,
            accumulate=trainer.accumulate, device=trainer.device,
        )  # fmt: skip
        watched = self.engine.algorithms, self.folder.policy.monitor, trainer.metrics
        self._monitors = Monitors(*watched, evaluated=self.eval_data is not None)
        self._signals = StopSignals(self._look_up, shared=team is not None)
        self._ranks, self._steps = self._with(team)
        self._handlers = ExitStack()
        self._deaths = DeferredDeaths((train_loader, eval_loader))

    def _with(self, team: Team | None) -> tuple[Ranks | None, Callable[[], Iterable[Sequence[Fetched]]]]:
        """Return what the ranks decide together, if there are several, and how a step's batches are read."""
        if team is None:
            return None, self._epoch
        heeded = self._microbatches, self._signals, self._step.make_room
        ranks = Ranks(team, self.engine, *heeded, functions=self.functions, device=self.trainer.device)
        self._step.ranks = ranks
        return ranks, lambda: ranks.noting(self._epoch(), train_loader=self.data, eval_loader=self.eval_data)

    # -- the loop ----------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Run the fit to its end, or to where a signal stops it: there a checkpoint is cut, and nothing else happens."""
        self._start()
        while self._epoch_begun or not self._finished():
            try:
                self._train_epoch()
            except Setback as setback:
                self._roll_back(setback)
                continue
            if self._signals.received is not None:
                break
            self._end_epoch()
        self._interrupted = self._signals.received is not None
        if not self._interrupted:
            if self._evaluated_at != self.state.clock.batch:
                self._evaluate()
            self.report.log_loss()
        self._save()
        self.engine.emit(Event.FIT_END)
        self.report.end(self.stop_reason, self._signals.received)

    def _train_epoch(self) -> None:
        """Train the batches of an epoch, from where the clock stands to its end or the fit's."""
        state, glance = self.state, self.report.glance
        if not self._epoch_begun:
            if self.folder.due:
                self._save()
            if not state.clock.batch_in_epoch:
                self.engine.emit(Event.EPOCH_START)
            self._epoch_begun = True
        open_later = LEDGER_EVENTS - {Event.FIT_START}
        others_set_rates = not all(open_later.isdisjoint(each.events) for each in self.engine.algorithms)
        for fetched in () if self._finished() else self._steps():
            if self.folder.due:
                self._save()
                if self._signals.received is not None:
                    return
            before = state.clock
            self._step.is_told = others_set_rates or before.batch + 1 >= self._next_due
            self._step.take(fetched)
            batch = state.clock.batch
            due = batch >= self._next_due
            if due:
                self._do_what_is_due(before)
            self.progress.update(batch, glance)
            if (due or state.stop_reason is not None) and self._finished():
                return
        self._exhausted = not self._finished()

    def _evaluate(self) -> None:
        """Evaluate, let everybody know, and log."""
        state = self.state
        self._evaluated_at = state.clock.batch
        if self.eval_data is None:
            return
        self.progress.eval_start(self.eval_data.length)
        done = 0

        def emit(event: Event, **seen: Any) -> None:
            nonlocal done
            state.microbatch, state.outputs, state.loss = seen["microbatch"], seen["outputs"], seen["loss"]
            self.engine.emit(event)
            if event is Event.EVAL_BATCH_END:
                done += 1
                self.progress.eval_update(done)

        self.engine.emit(Event.EVAL_START)
        values = evaluate(
            state.model, self.eval_data, forward=self.forward, metrics=self.trainer.metrics, precision=self.precision,
            device=self.trainer.device, emit=emit, team=self.team,
        )  # fmt: skip
        state.microbatch = state.outputs = state.loss = None
        state.log(values)
        self.engine.emit(Event.EVAL_END)
        self.folder.note_evaluation(state.metrics)
        self.report.log({})

    def _do_what_is_due(self, before: Clock) -> None:
        """Evaluate, log, and ask for a checkpoint, each where its interval has passed; find out when to look again."""
        trainer, clock = self.trainer, self.state.clock
        if not self._next_due:  # the first batch: what the model has made by itself is there
            warn_of_late_parameters(self.state)
        if trainer.eval_every.crossed(before, clock):
            self._evaluate()
        if trainer.log_every.crossed(before, clock):
            self.report.log_loss()
        self.folder.note(before, clock)
        epoch = (_EPOCH,) if clock.batches_per_epoch else ()  # where its end is known
        times = (trainer.eval_every, trainer.log_every, *self.folder.policy.times, self.state.duration, *epoch)
        self._step.start.look(closely=False)
        self._next_due = min(time.not_before(clock) for time in times)

    def _end_epoch(self) -> None:
        """Count the epoch if it is complete, evaluate where that is due, let everybody know, write the row of history."""
        state, before = self.state, self.state.clock
        complete = self._exhausted or (before.batch_in_epoch > 0 and before.batch_in_epoch == before.batches_per_epoch)
        self._exhausted = False
        if complete:
            # Crossed only now where the loader's length was not known before.
            if self.trainer.eval_every.crossed(before, before.after_epoch(duration=state.duration)):
                self._evaluate()
            state.tick_epoch()
            self.folder.note(before, state.clock)
        trained = before.batch_in_epoch > 0
        if trained:
            state.metrics["train/loss"] = self.report.losses.of_epoch()
        self.engine.emit(Event.EPOCH_END)
        if state.restored:
            self._evaluate()
        if trained:
            self.report.end_epoch()
        self._monitors.end_epoch(state.metrics)
        self.report.log({})
        self._step.start.look(closely=True)
        self._epoch_begun = False

    # -- parts of the loop --------------------------------------------------------------------------------------

    def _epoch(self) -> Iterator[tuple[Fetched, ...]]:
        """Return the loader batches of each step of the running epoch, from where the clock stands."""
        # A function of the user's reads the batch itself.
        lazy = self.state.unloaded and self.forward.reads_targets_only
        batches = self.data.batches(*self._cursor(), unloaded_for=self.trainer.device if lazy else None)
        size = self.trainer.accumulate
        return zip(batches, strict=False) if size == 1 else iter(lambda: tuple(islice(batches, size)), ())

    def _cursor(self) -> tuple[int, int]:
        """Return the epoch, and the loader batches of it that were consumed."""
        return self.state.clock.epoch, self.state.clock.batch_in_epoch * self.trainer.accumulate

    def _finished(self) -> bool:
        state, signal = self.state, self._signals.received
        return state.stop_reason is not None or signal is not None or state.duration.reached(state.clock)

    def _look_up(self) -> None:
        """Make the loop look up after this batch and before the next one: all that a signal's handler does."""
        self._next_due = 0
        self.folder.due = True

    # -- start, save, end --------------------------------------------------------------------------------------

    @property
    def stop_reason(self) -> str:
        """Why the fit ended."""
        return self.state.stop_reason or ("signal" if self._interrupted else "duration")

    @property
    def timeline(self) -> Plan:
        """What happened, once the fit has ended."""
        reason = self.stop_reason
        return self.recorder.timeline(self.state.clock, reason if reason == "duration" else f"stopped: {reason}")

    def _start(self) -> None:
        """Begin afresh with FIT_START, or where the checkpoint was cut."""
        state, model = self.state, self.state.model
        self.data.say_limits(resumable=self.folder.saves)
        self.forward.say_untrained()
        self.folder.warned = self._monitors.begin()
        seed_everything(seed_of(self.team, self.trainer.seed))
        model.train()
        self.engine.attach()
        self.folder.trackers.log_config({"trainer": self.settings, "model": type(model).__name__})
        if self.folder.loaded is None:
            self.engine.emit(Event.FIT_START)
        else:
            self._restore(*self.folder.loaded)
            self.folder.loaded = None
        if self.trainer.on_nonfinite == "rollback":
            self.folder.due = True  # there is always a checkpoint to go back to
        done, length = state.clock.batch, state.clock.batches_per_epoch
        self.progress.start(self.recorder.total_batches, "training", done=done, epoch=length)

    def _restore(self, path: Path, tree: dict[str, Any]) -> None:
        """Put everything back as the checkpoint says; random number generators last."""
        state = self.state
        if self._ranks is not None:
            tree = self._ranks.own(tree)
        extra = restore(
            tree, self.engine, self.precision, settings=self.settings, on_change=self._on_change, **self._beside,
            built=self._ranks.shard if self._ranks is not None and state.sharded else None,
        )  # fmt: skip
        with well_formed():
            self.report.load_state_dict(extra, batch=tree["clock"]["batch"])
            self._guard.skipped, self._epoch_begun = extra["skipped"], extra["epoch_begun"]
            if tree["settings"]["microbatch_size"] == self.trainer.microbatch_size:
                self._microbatches.shrink_to(extra["microbatch_size"])
            self._evaluated_at = extra["evaluated_at"]
            self._step.start = BatchStart(state, self.trainer.device, self.forward.module)
            state.stop_reason = tree["stop_reason"]
            moved = {"current": False} if self.engine.difference(tree["algorithms"]) else {}
            self.recorder.load_state_dict({**extra["timeline"], **moved})
            self.data.load_state_dict(extra["loader"], *self._cursor())
        self.folder.forget_after(state.clock.batch)
        self.progress.message(f"resumed from {path} at epoch {state.clock.epoch}, batch {state.clock.batch}")
        log.info("resumed", checkpoint=str(path), epoch=state.clock.epoch, batch=state.clock.batch)

    def _roll_back(self, setback: Setback) -> None:
        """Go back to the last checkpoint."""
        state = self.state
        newest = self.folder.newest() if self._ranks is None else self._ranks.newest(self.folder)
        if newest is None:
            text = "and no checkpoint could be written that the fit could go back to"
            raise NonFiniteError(f"{setback.what}, {text}.") from None
        self._guard.count_rollback(setback, *newest, state.model)
        log.warning("rolling back", why=setback.what, checkpoint=str(newest[0]))
        state.ledger.phase = None
        state.ledger.clear_gradients()
        state.outputs = state.loss = state.microbatch = None
        self.engine.restart()
        self._restore(*newest)
        self.folder.due = self._exhausted = False
        self._next_due = 0

    def _save(self) -> None:
        step, metrics, ranks, tree = self.state.clock.batch, self.state.metrics, self._ranks, self._capture
        if ranks is not None and self.folder.saves:
            tree = ranks.before_save(tree)
        self.folder.save(tree, step=step, metrics=metrics, evaluated_at=self._evaluated_at)
        if ranks is not None and self.folder.saves:
            ranks.after_save(self.folder)

    def _capture(self) -> dict[str, Any]:
        extra = {
            **self.report.state_dict(),
            "skipped": self._guard.skipped,
            "epoch_begun": self._epoch_begun,
            "microbatch_size": self._microbatches.size,
            "evaluated_at": self._evaluated_at,
            "timeline": self.recorder.state_dict(self.state.clock),
            "loader": self.data.state_dict(*self._cursor()),
            **({} if self._ranks is None else self._ranks.saved()),
        }
        return capture(self.engine, self.precision, settings=self.settings, extra=extra, **self._beside)

    def __enter__(self) -> Self:
        self._handlers.enter_context(self._deaths)
        self._handlers.enter_context(self._signals)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._handlers:
            self._end(error)

    def _end(self, error: BaseException | None) -> None:
        """Tell algorithms of an error, close everything, and give the model back; the first error is the one raised."""
        state, failed = self.state, error
        if error is not None:
            state.exception = error
            try:
                self.engine.emit(Event.FIT_ABORT)
            except Exception as second:  # noqa: BLE001 - the first error is the one to raise
                error.add_note(f"FIT_ABORT failed as well: {second!r}")
        try:
            self.engine.close()
        except Exception as second:  # noqa: BLE001 - raised below where there was none before
            failed = failed or second
            if error is not None:
                error.add_note(f"closing the algorithms failed as well: {second!r}")
        finally:
            if self._ranks is not None:
                self._ranks.close()
            state.ledger.phase = None
            state.ledger.release()
            for module, training in self._modes:
                module.training = training
            self.progress.close()
            self.folder.close()
        if error is None and failed is not None:
            raise failed
