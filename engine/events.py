"""The events of a fit: where algorithms may act."""

from __future__ import annotations

from difflib import get_close_matches
from enum import StrEnum


class Event(StrEnum):
    """What the engine emits, in the order of the loop.

    ::

        FIT_START                       ledger open; fresh runs only
          EPOCH_START                   ledger open; a checkpoint is cut just before
            BATCH_START                 ledger open; a checkpoint is cut just before
              BEFORE_FORWARD            state.microbatch is set           once a microbatch
              AFTER_FORWARD             state.outputs is set              once a microbatch
              AFTER_LOSS                state.loss is set                 once a microbatch
              AFTER_BACKWARD            gradients were added to           once a microbatch
            BEFORE_STEP                 gradients whole, reduced, unscaled: clip here
            AFTER_STEP                  state.step_skipped says whether the optimizer moved
            BATCH_END                   ledger open; the clock has ticked
            [EVAL_START (EVAL_BATCH_START EVAL_BATCH_END)* EVAL_END]
          EPOCH_END                     ledger open; also when the duration ends inside an epoch
        FIT_END                         or FIT_ABORT, with the exception in state.exception

    One *batch* is one optimizer step. The clock ticks every batch, also a skipped one.
    Gradients are None between steps. The last evaluation happens before FIT_END.
    A resumed run does not emit FIT_START: it continues where its checkpoint was cut.

    Example:
        >>> Event.BATCH_START.opens_ledger, Event.AFTER_LOSS.opens_ledger
        (True, False)
    """

    FIT_START = "fit_start"
    EPOCH_START = "epoch_start"
    BATCH_START = "batch_start"
    BEFORE_FORWARD = "before_forward"
    AFTER_FORWARD = "after_forward"
    AFTER_LOSS = "after_loss"
    AFTER_BACKWARD = "after_backward"
    BEFORE_STEP = "before_step"
    AFTER_STEP = "after_step"
    BATCH_END = "batch_end"
    EVAL_START = "eval_start"
    EVAL_BATCH_START = "eval_batch_start"
    EVAL_BATCH_END = "eval_batch_end"
    EVAL_END = "eval_end"
    EPOCH_END = "epoch_end"
    FIT_END = "fit_end"
    FIT_ABORT = "fit_abort"

    @property
    def opens_ledger(self) -> bool:
        """Whether the ledger may be changed at this event."""
        return self in LEDGER_EVENTS


LEDGER_EVENTS = frozenset({Event.FIT_START, Event.EPOCH_START, Event.BATCH_START, Event.BATCH_END, Event.EPOCH_END})


def nearest_event(given: object) -> str:
    """Return the name of the event most like what was given, for an error message.

    Example:
        >>> nearest_event("epoch_ends")
        'EPOCH_END'
    """
    names = [event.name for event in Event]
    return (get_close_matches(str(given).upper(), names, n=1, cutoff=0.5) or ["BATCH_END"])[0]
