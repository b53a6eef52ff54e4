"""One fit: the loop, read top-down; around it what starts, saves, and ends it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import nn

from .checkpoint import capture, restore, seed_everything
from .clock import Clock, Time
from .data import Fetched, ResumableLoader, loaded, split_batch, to_device
from .engine import Engine
from .errors import DataError, LedgerError, NonFiniteError, ThawlineWarning
from .evaluation import evaluate
from .events import Event
from .forward import GradientCheck, is_finite, require_gradient
from .homes import OptimizerLike
from .layering import find_layers
from .layers import LayerMap, LayerSpec
from .ledger import ParameterLedger
from .log import get_logger
from .meters import RunningLoss
from .monitor import of_evaluation
from .plan import Plan, Recorder
from .precision import Precision
from .progress import progress_for
from .recipe import Recipe
from .rundir import RunDir
from .settings import share_of, total_batches
from .state import State
from .store import Checkpointing

MAX_SKIPPED = 5
# Once a batch: a name of the module is found in a fraction of the time that a member of an enum takes.
BATCH_START, BATCH_END = Event.BATCH_START, Event.BATCH_END
BEFORE_FORWARD, AFTER_FORWARD = Event.BEFORE_FORWARD, Event.AFTER_FORWARD
AFTER_LOSS, AFTER_BACKWARD = Event.AFTER_LOSS, Event.AFTER_BACKWARD
BEFORE_STEP, AFTER_STEP = Event.BEFORE_STEP, Event.AFTER_STEP
# A scale of 2^16 is halved to below 1 in 17 steps.
MAX_OVERFLOWS = 25
log = get_logger(__name__)


class Run:
    """One call of :meth:`Trainer.fit`: a context that opens what the fit needs and closes it whatever happens.

    Args:
        trainer: The recipe.
        model: The caller's model.
        train_loader: Training data.
        eval_loader: Evaluation data or None.
        duration: How long.
        optimizer: An optimizer, a factory, or pairs of them.
        layers: The model's layers, if given.
        resume: As for :meth:`Trainer.fit`.
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
    ) -> None:
        self.trainer = trainer
        self.history: list[dict[str, float]] = []
        self.progress = progress_for(trainer.progress)
        self.forward = trainer.forward()
        self.precision = Precision(trainer.precision, trainer.device)
        self.functions = self.precision.autocasted(self.forward.outputs), self.precision.autocasted(self.forward.loss)
        self.data = ResumableLoader(train_loader, seed=trainer.seed)
        self.eval_data = (
            None
            if eval_loader is None
            else ResumableLoader(eval_loader, seed=trainer.seed, argument="Trainer.fit(eval_loader=)")
        )
        length = self.data.length
        clock = Clock(batches_per_epoch=0 if length is None else -(-length // trainer.accumulate))
        self.settings = {**trainer.describe(), "duration": str(duration)}
        self._modes = [(module, module.training) for module in model.modules()]
        policy = trainer.checkpoint or Checkpointing()
        self.folder = RunDir(trainer.run_dir, policy, trainer.trackers, resume=resume)
        try:
            model.to(trainer.device)
            schedule = trainer.schedule.bind(share_of(duration, clock.batches_per_epoch))
            if layers is None:
                layers = find_layers(model, self.data, self.functions[0], trainer.device)
            ledger = ParameterLedger(
                model, optimizer, layers, schedule=schedule, min_lr=trainer.min_lr, seed=trainer.seed
            )
            for each in trainer.algorithms:
                each.reset()
            self.state = State(model, ledger, duration, trainer.seed, clock)
            self.engine = Engine(trainer.algorithms, self.state, debug=trainer.debug)
            self.recorder = Recorder(ledger, total_batches(duration, clock))
        except BaseException:
            self.folder.close()
            raise
        self._losses = RunningLoss()
        self._shown: dict[str, float] = {}
        self._evaluated_at: int | None = None
        self._exhausted = False
        self._skipped = 0
        self._next_due = 0
        self._whole = trainer.accumulate == 1 and trainer.microbatch_size is None
        self._unloaded = False
        self._gradients_finite = GradientCheck()

    # -- the loop ----------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Run the fit to its end."""
        emit, state = self.engine.emit, self.state
        self._start()
        while not self._finished():
            if not state.clock.batch_in_epoch:
                if self.folder.due:
                    self._save()
                emit(Event.EPOCH_START)
            for fetched in self._epoch() if state.stop_reason is None else ():
                if self.folder.due:
                    self._save()
                before = state.clock
                self._batch(fetched)
                due = state.clock.batch >= self._next_due
                if due:
                    self._do_what_is_due(before)
                self.progress.update(state.clock.batch, self._shown)
                if (due or state.stop_reason is not None) and self._finished():
                    break
            else:
                self._exhausted = state.stop_reason is None
            self._end_epoch()
        if self._evaluated_at != state.clock.batch:
            self._evaluate()
        self._log_loss()
        self._save()
        emit(Event.FIT_END)
        self._tell_end()

    def _batch(self, fetched: Sequence[Fetched]) -> None:
        """Do one batch: one optimizer step over all of its microbatches."""
        emit, state, precision, outputs_of, loss_of = self.engine.emit, self.state, self.precision, *self.functions
        ledger = state.ledger
        state.batch, state.sample_ids, samples = self._gathered(fetched)
        state.step_skipped, state.grad_norm = False, None
        emit(BATCH_START)
        if self._unloaded:
            state.batch = loaded(state.batch, self.trainer.device)
        if not ledger.trainable_parameters:
            stop_frozen(state)
        if state.stop_reason is not None:
            return
        self.recorder.observe(state.clock)
        parts = [(state.batch, 1.0, state.sample_ids)] if self._whole else self._microbatches(fetched)
        total = 0.0
        for part, share, ids in parts:
            state.microbatch, state.microbatch_ids = part, ids
            emit(BEFORE_FORWARD)
            state.outputs = outputs_of(state.model, state.microbatch)
            emit(AFTER_FORWARD)
            state.loss = loss_of(state.outputs, state.microbatch)
            emit(AFTER_LOSS)
            require_gradient(state.loss)
            precision.backward(state.loss if len(parts) == 1 else state.loss * share)
            emit(AFTER_BACKWARD)
            total += state.loss.item() * share
        if state.loss is not None and len(parts) > 1:
            state.loss = state.loss.new_tensor(total)
        precision.unscale(ledger.optimizers)
        emit(BEFORE_STEP)
        state.step_skipped = not (self._is_finite(total) and precision.step(ledger.optimizers))
        if precision.kind == "fp16":
            self._count_overflow(total)
        emit(AFTER_STEP)
        ledger.clear_gradients()
        state.outputs = state.microbatch = state.microbatch_ids = None
        if isfinite(total):
            self._losses.add(total)
        state.tick(samples)
        emit(BATCH_END)

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
            device=self.trainer.device, emit=emit,
        )  # fmt: skip
        state.microbatch = state.outputs = state.loss = None
        state.log(values)
        self.engine.emit(Event.EVAL_END)
        self.folder.trackers.log_metrics(state.take_logged(), step=state.clock.batch)

    def _do_what_is_due(self, before: Clock) -> None:
        """Evaluate, log, and ask for a checkpoint, each where its interval has passed; find out when to look again."""
        trainer, clock = self.trainer, self.state.clock
        if trainer.eval_every.crossed(before, clock):
            self._evaluate()
        if trainer.log_every.crossed(before, clock):
            self._log_loss()
        self.folder.note(before, clock)
        times = (trainer.eval_every, trainer.log_every, self.folder.policy.every, self.state.duration)
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
            state.metrics["train/loss"] = self._losses.of_epoch()
        self.engine.emit(Event.EPOCH_END)
        if trained:
            self._write_history()
        self._log({})

    # -- parts of a batch --------------------------------------------------------------------------------------

    def _epoch(self) -> Iterator[list[Fetched]]:
        """Yield the loader batches of each step of the running epoch, from where the clock stands."""
        size, clock = self.trainer.accumulate, self.state.clock
        # A function of the user's reads the batch itself.
        self._unloaded = self.state.unloaded and self.forward.reads_targets_only
        batches = self.data.batches(clock.epoch, clock.batch_in_epoch * size, unloaded=self._unloaded)
        empty = True
        for first in batches:
            empty = False
            yield [first] if size == 1 else [first, *islice(batches, size - 1)]
        if empty and not clock.batch_in_epoch:
            raise DataError(
                f"train_loader yields no batch in epoch {clock.epoch}. Give a loader with data; drop_last=True drops a "
                "single short batch, and a generator is used up after one epoch."
            )

    def _gathered(self, fetched: Sequence[Fetched]) -> tuple[Any, tuple[int, ...] | None, int]:
        """Return the step's batch on the device, or a list of them, its sample ids and its number of samples."""
        device = self.trainer.device
        if self.trainer.accumulate == 1:
            (one,) = fetched
            return to_device(one.batch, device), one.sample_ids, one.samples
        batches = [to_device(each.batch, device) for each in fetched]
        ids = [each.sample_ids for each in fetched]
        known = None if None in ids else tuple(chain.from_iterable(each for each in ids if each is not None))
        return batches, known, sum(each.samples for each in fetched)

    def _microbatches(self, fetched: Sequence[Fetched]) -> list[tuple[Any, float, tuple[int, ...] | None]]:
        """Cut the batch as it is now into microbatches, each with its share of what the loss is a mean over, and its ids."""
        size, batch = self.trainer.microbatch_size, self.state.batch
        batches = [batch] if self.trainer.accumulate == 1 else list(batch)
        parts: list[tuple[Any, float, tuple[int, ...] | None]] = []
        for number, each in enumerate(batches):
            # As many as were loaded, unless an algorithm has put something else in the place of the batch.
            ids = fetched[number].sample_ids if len(batches) == len(fetched) else None
            for index, part in enumerate([each] if size is None else split_batch(each, size)):
                own = ids if size is None or ids is None else ids[index * size : (index + 1) * size]
                parts.append((part, self.forward.weight(self.state.model, part), own))
        # A microbatch whose labels are all ignored has no say, and its mean over nothing would be NaN.
        whole = sum(weight for _, weight, _ in parts)
        said = [(part, weight / whole, ids) for part, weight, ids in parts if weight]
        return said or [(parts[0][0], 1.0, parts[0][2])]

    def _is_finite(self, loss: float) -> bool:
        """Return whether to step; raise where the policy says so. An fp16 overflow is the scaler's own business."""
        state = self.state
        if self.trainer.precision == "fp16":
            return True
        norm = state.grad_norm
        finite = self._gradients_finite(state.ledger.trainable_parameters) if norm is None else is_finite(norm)
        if isfinite(loss) and finite:
            self._skipped = 0
            return True
        self._skipped += 1
        if not isfinite(loss):
            what = f"the loss is {loss}"
        else:
            what = "the gradients are not finite" if norm is None else f"the gradient norm is {float(norm)}"
        place = f"at epoch {state.clock.epoch}, batch {state.clock.batch}"
        if self.trainer.on_nonfinite == "raise" or self._skipped >= MAX_SKIPPED:
            often = f", the {self._skipped}th time in a row" if self._skipped > 1 else ""
            raise NonFiniteError(
                f"{what} {place}{often}. The weights are as before this batch. Lower the learning rate, add "
                "GradClip(max_norm=1.0) and a warmup, look at this batch's data, or write Trainer(on_nonfinite='skip')."
            )
        log.warning("step skipped", why=what, where=place)
        return False

    def _count_overflow(self, loss: float) -> None:
        """Let the scaler skip as often as it takes to find its scale, and raise where no scale helps."""
        self._skipped = self._skipped + 1 if self.state.step_skipped else 0
        if self._skipped >= MAX_OVERFLOWS:
            raise NonFiniteError(
                f"fp16 gradients overflowed {self._skipped} times in a row, the loss being {loss}: no scale helps. Look at "
                "the data and the loss, or write Trainer(precision='bf16')."
            )

    def _finished(self) -> bool:
        return self.state.stop_reason is not None or self.state.duration.reached(self.state.clock)

    # -- start, save, end --------------------------------------------------------------------------------------

    @property
    def stop_reason(self) -> str:
        """Why the fit ended."""
        return self.state.stop_reason or "duration"

    @property
    def timeline(self) -> Plan:
        """What happened, once the fit has ended."""
        reason = self.stop_reason
        return self.recorder.timeline(self.state.clock, reason if reason == "duration" else f"stopped: {reason}")

    def _start(self) -> None:
        """Begin afresh with FIT_START, or where the checkpoint was cut."""
        state, model = self.state, self.state.model
        for limit in self.data.limits:
            log.warning("data order", limit=limit)
        self._warn_unmonitored()
        seed_everything(self.trainer.seed)
        model.train()
        self.engine.attach()
        self.folder.trackers.log_config({"trainer": self.settings, "model": type(model).__name__})
        self.progress.start(self.recorder.total_batches, "training", done=0)
        if self.folder.loaded is None:
            self.engine.emit(Event.FIT_START)
        else:
            self._restore(*self.folder.loaded)
            self.folder.loaded = None
        self.progress.update(state.clock.batch, {})

    def _warn_unmonitored(self) -> None:
        """Say at once that what waits for an evaluation will wait in vain."""
        watched = [each.owner for each in self.engine.algorithms if of_evaluation(getattr(each, "monitor", None))]
        watched += ["Checkpointing"] if of_evaluation(self.folder.policy.monitor) else []
        if watched and self.eval_data is None:
            warnings.warn(
                f"{', '.join(watched)} monitors an evaluation, and there is no eval_loader: it will never act. "
                "Write: trainer.fit(model, train_loader, eval_loader, duration=…)",
                ThawlineWarning,
                stacklevel=4,
            )

    def _restore(self, path: Path, tree: dict[str, Any]) -> None:
        """Put everything back as the checkpoint says; random number generators last."""
        state = self.state
        extra = restore(tree, self.engine, self.precision, settings=self.settings)
        self.history = list(extra["history"])
        self._losses = RunningLoss(*extra["losses"])
        self._skipped = extra["skipped"]
        self._evaluated_at = extra["evaluated_at"]
        state.stop_reason = tree["stop_reason"]
        self.recorder.load_state_dict(extra["timeline"])
        self.folder.forget_after(state.clock.batch)
        self.progress.message(f"resumed from {path} at epoch {state.clock.epoch}, batch {state.clock.batch}")
        log.info("resumed", checkpoint=str(path), epoch=state.clock.epoch, batch=state.clock.batch)

    def _save(self) -> None:
        evaluated = self._evaluated_at is not None
        self.folder.save(self._capture, step=self.state.clock.batch, metrics=self.state.metrics, evaluated=evaluated)

    def _capture(self) -> dict[str, Any]:
        extra = {
            "history": self.history,
            "losses": self._losses.parts(),
            "skipped": self._skipped,
            "evaluated_at": self._evaluated_at,
            "timeline": self.recorder.state_dict(self.state.clock),
        }
        return capture(self.engine, self.precision, settings=self.settings, extra=extra)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
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
            state.ledger.phase = None
            state.ledger.release()
            for module, training in self._modes:
                module.training = training
            self.progress.close()
            self.folder.close()
        if error is None and failed is not None:
            raise failed

    # -- telling -----------------------------------------------------------------------------------------------

    def _log_loss(self) -> None:
        """Log the mean loss since the last time, and the rates."""
        if self._losses.count:
            self._log({"train/loss": self._losses.since_log(), **self._rates()})

    def _log(self, values: dict[str, float]) -> None:
        self.state.log(values)
        shown = {name: value for name, value in self.state.metrics.items() if name.startswith(("train/", "eval/"))}
        self._shown = shown | {"lr": self.state.metrics.get("lr", 0.0)}
        if self.state.logged:
            self.folder.trackers.log_metrics(self.state.take_logged(), step=self.state.clock.batch)

    def _rates(self) -> dict[str, float]:
        """Return ``lr``, the highest, and ``lr/<layer>`` of each layer: the same names throughout the fit."""
        rates = self.state.ledger.rates
        return {"lr": max(rates.values())} | {f"lr/{layer}": lr for layer, lr in rates.items()} if rates else {}

    def _write_history(self) -> None:
        state = self.state
        state.metrics.update(self._rates())
        row = dict(state.metrics)
        numel = sum(each.numel() for each in state.ledger.trainable_parameters)
        row |= {"epoch": state.clock.epoch, "batch": state.clock.batch, "trainable": numel}
        self.history.append(row)
        self._losses.begin_epoch()
        shown = {name: value for name, value in row.items() if name.startswith(("train/", "eval/"))}
        text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        self.progress.message(f"epoch {len(self.history)}: {text}  {numel:,} parameters train")

    def _tell_end(self) -> None:
        log.info("fit ended", reason=self.stop_reason, batches=self.state.clock.batch)
        if self.stop_reason != "duration":
            self.progress.message(f"stopped: {self.stop_reason}")


def stop_frozen(state: State) -> None:
    """Nothing trains: an error at the start of the fit, its end later.

    Raises:
        LedgerError: At the start.
    """
    ledger = state.ledger
    if state.clock.batch:
        state.stop("nothing trains any more")
        return
    name = next(iter(ledger.parameters))
    holders = ", ".join(sorted({owner for each in ledger.parameters for owner in ledger.owners(each)}))
    advice = "Thaw some: model.requires_grad_(True) before the fit where the user holds them."
    if ledger.left_out:
        advice = (
            f"The optimizer instance holds {len(ledger.parameters) - len(ledger.left_out)} of them. Pass a factory, "
            "which sees every parameter: optimizer=partial(torch.optim.AdamW, lr=1e-4)."
        )
    raise LedgerError(
        f"nothing trains: all {len(ledger.parameters)} parameters are held, by {holders} (first {name!r}). {advice}"
    )
