"""One optimizer step: forward and backward of a batch, a microbatch at a time, again where memory runs out, and the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn

from .data import Fetched, gathered
from .engine import Engine
from .events import Event
from .forward import stop_frozen, without_gradient
from .ledger import ParameterLedger
from .memory import BatchStart, Microbatches, is_out_of_memory
from .nonfinite import StepGuard
from .plan import Recorder
from .precision import Precision
from .ranks import Ranks
from .report import Report
from .state import State

# Once a batch: a name of the module is found in a fraction of the time that a member of an enum takes.
BATCH_START, BATCH_END = Event.BATCH_START, Event.BATCH_END
BEFORE_FORWARD, AFTER_FORWARD = Event.BEFORE_FORWARD, Event.AFTER_FORWARD
AFTER_LOSS, AFTER_BACKWARD = Event.AFTER_LOSS, Event.AFTER_BACKWARD
BEFORE_STEP, AFTER_STEP = Event.BEFORE_STEP, Event.AFTER_STEP


@define(eq=False, kw_only=True)
class Step:
    """Does the steps of a fit, one batch each; what a step asks for lies in slots, near together.

    Args:
        engine: Tells everybody; its state is the fit's.
        functions: Outputs of a model and a microbatch, and the loss of both.
        precision: Scales and unscales gradients, and steps the optimizers.
        microbatches: Cuts the batch.
        guard: Decides whether the optimizers may move.
        start: What a batch is repeated from.
        recorder: Notes what trains.
        report: Is told the losses.
        accumulate: Loader batches of a step.
        device: Where the model lies.
        ranks: What several processes decide together; None for a process alone.
        is_told: Whether something of the batch is to be told once it is done, or may be after others have set rates.
    """

    engine: Engine
    functions: tuple[Callable[[nn.Module, Any], Any], Callable[[Any, Any], Tensor]]
    precision: Precision
    microbatches: Microbatches
    guard: StepGuard
    start: BatchStart
    recorder: Recorder
    report: Report
    accumulate: int
    device: torch.device
    ranks: Ranks | None = None
    is_told: bool = True
    _emit: Callable[[Event], None] = field(init=False)
    _state: State = field(init=False)
    _ledger: ParameterLedger = field(init=False)
    _scaled: bool = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._emit, self._state, self._ledger = self.engine.emit, self.engine.state, self.engine.state.ledger
        self._scaled = self.precision.kind == "fp16"

    def take(self, fetched: Sequence[Fetched]) -> None:
        """Do one batch: one optimizer step over all of its microbatches."""
        emit, heard, state, ledger = self._emit, self.engine.heard, self._state, self._ledger
        state.batch, state.sample_ids, samples = gathered(fetched, self.accumulate, self.device)
        state.step_skipped, state.grad_norm = False, None
        emit(BATCH_START)
        if not ledger.trainable_parameters:
            stop_frozen(state)
        if state.stop_reason is not None:
            return
        self.recorder.observe(state.clock)
        self.start.keep()
        total = self._try()
        if total is None:
            total = self._repeat()
        if self._scaled:
            self.precision.unscale(ledger.optimizers)
        if BEFORE_STEP in heard:
            emit(BEFORE_STEP)
        if self.guard.may_step(state, total):
            state.step_skipped = not self.precision.step(ledger.optimizers)
        else:
            state.step_skipped = True
            self.start.restore_buffers()
        if self._scaled:
            self.guard.count_overflow(state, total)
        if AFTER_STEP in heard:
            emit(AFTER_STEP)
        ledger.clear_gradients()
        state.outputs = state.microbatch = None
        if isfinite(total):
            self.report.losses.add(total)
        if self.is_told:
            self.report.note_rates()
        state.tick(samples)
        emit(BATCH_END)

    def _try(self) -> float | None:
        """Do forward and backward of the batch; return its loss, None where memory ran out on any rank."""
        total = None
        try:
            total = self._gradients()
        except (RuntimeError, MemoryError) as error:
            self.make_room(error)
        return total if self.ranks is None else self.ranks.settle(total)

    def _gradients(self) -> float:
        """Do forward and backward of the batch, a microbatch at a time; return its loss."""
        emit, heard, state, (outputs_of, loss_of) = self._emit, self.engine.heard, self._state, self.functions
        model = state.model
        whole = ((state.batch, 1.0, state.sample_ids),)
        parts = whole if self.microbatches.whole else self.microbatches.of(state)
        total = 0.0
        for part, share, ids in parts:
            state.microbatch, state.microbatch_ids = part, ids
            emit(BEFORE_FORWARD)
            state.outputs = outputs_of(model, state.microbatch)
            if AFTER_FORWARD in heard:
                emit(AFTER_FORWARD)
            state.loss = loss_of(state.outputs, state.microbatch)
            if AFTER_LOSS in heard:
                emit(AFTER_LOSS)
            loss = state.loss
            if not loss.requires_grad:
                raise without_gradient()
            self.precision.backward(loss if share == 1.0 else loss * share)
            if AFTER_BACKWARD in heard:
                emit(AFTER_BACKWARD)
            total += loss.item() * share
        if state.loss is not None and len(parts) > 1:
            state.loss = state.loss.new_tensor(total)
        return total

    def _repeat(self) -> float:
        """Do forward and backward of the batch again, in microbatches so small that they fit."""
        total = None
        while total is None:
            total = self._try()
        self.microbatches.warn(self._state)
        return total

    def make_room(self, error: RuntimeError | MemoryError) -> None:
        """Undo what was done of the batch, to repeat it in smaller microbatches, once the frames of the error are gone."""
        if not is_out_of_memory(error) or self._state.sharded:
            raise error
        state = self._state
        state.outputs = state.loss = state.microbatch = None
        state.ledger.clear_gradients()
        self.start.restore()
        self.microbatches.halve(state, error)
