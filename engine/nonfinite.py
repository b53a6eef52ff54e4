"""A loss or gradient that is not finite: raise, skip the step, or roll back; fp16 overflows are the scaler's."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from attrs import define, field
from torch import nn

from .errors import NonFiniteError, warn
from .forward import GradientCheck, is_finite
from .log import get_logger
from .pristine import Pristine
from .state import State

log = get_logger(__name__)

MAX_SKIPPED = 5
"""Steps skipped in a row before the fit gives up."""
MAX_ROLLBACKS = 5
"""How often one checkpoint is gone back to."""
# A scale of 2^16 is halved to below 1 in 17 steps.
MAX_OVERFLOWS = 25


class Setback(Exception):  # noqa: N818 - it is no error but a way out of the loop
    """A batch to roll back from; never leaves the loop.

    Args:
        batch: Its number.
        what: What was not finite, and where.
    """

    def __init__(self, batch: int, what: str) -> None:
        super().__init__(batch, what)
        self.batch, self.what = batch, what


@define(eq=False)
class StepGuard:
    """Decides before each step whether the optimizers may move.

    Args:
        policy: ``Trainer(on_nonfinite=)``.
        scaled: Whether a gradient scaler decides instead (fp16).
    """

    policy: Literal["raise", "skip", "rollback"]
    scaled: bool = False
    skipped: int = field(default=0, init=False)
    _told: bool = field(default=False, init=False)
    _rolled_back_from: set[int] = field(factory=set, init=False)
    _rolled_back_to: int | None = field(default=None, init=False)
    _rollbacks: int = field(default=0, init=False)
    _gradients: GradientCheck = field(factory=GradientCheck, init=False)

    def may_step(self, state: State, loss: float) -> bool:
        """Return whether to step.

        Raises:
            NonFiniteError: The policy says so, or too many steps in a row were skipped.
            Setback: The fit is to go back to its last checkpoint.
        """
        if self.scaled:
            return True
        norm = state.grad_norm
        finite = self._gradients.finite(state.ledger.trainable_parameters) if norm is None else is_finite(norm)
        if finite and isfinite(loss):
            self.skipped = 0
            return True
        if not isfinite(loss):
            what = f"the loss is {loss}"
        else:
            what = "the gradients are not finite" if norm is None else f"the gradient norm is {float(norm)}"
        self._refuse(state, f"{what} at epoch {state.clock.epoch}, batch {state.clock.batch}")
        return False

    def _refuse(self, state: State, what: str) -> None:
        self.skipped += 1
        if self.policy == "raise" or self.skipped >= MAX_SKIPPED:
            often = f", the {self.skipped}th time in a row" if self.skipped > 1 else ""
            skip = ", or write Trainer(on_nonfinite='skip')" if self.policy == "raise" else ""
            raise NonFiniteError(
                f"{what}{often}. The weights are as before this batch. Lower the learning rate, add "
                f"GradClip(max_norm=1.0) and a warmup, look at this batch's data{skip}."
            )
        if self.policy == "rollback" and state.clock.batch not in self._rolled_back_from:
            raise Setback(state.clock.batch, what)
        log.warning("step skipped", why=what)
        if not self._told:
            self._told = True
            warn(
                f"step skipped: {what}. This is said once; each step that is skipped is a line of the log: write "
                "configure_logging('console', level='warning') to see them."
            )

    def count_rollback(self, setback: Setback, path: Path, tree: Mapping[str, Any], model: nn.Module) -> None:
        """Note that the fit goes back to a checkpoint; the batch that led to it is skipped from now on.

        Raises:
            NonFiniteError: It has gone back there too often, or the checkpoint holds fingerprints of what has trained since.
        """
        step, fingerprints = tree["clock"]["batch"], tree["fingerprints"]
        if wrong := Pristine(model).differing(fingerprints) if fingerprints else "":
            raise NonFiniteError(
                f"{setback.what}, and the fit cannot go back to {path}, which holds only fingerprints of what had not trained by "
                f"then: {wrong}. Write Checkpointing(frozen='store'), or an every= at which a checkpoint is cut after each thaw."
            ) from None
        self._rolled_back_from.add(setback.batch)
        self._rollbacks = self._rollbacks + 1 if step == self._rolled_back_to else 1
        self._rolled_back_to = step
        if self._rollbacks > MAX_ROLLBACKS:
            raise NonFiniteError(
                f"{setback.what}, after {MAX_ROLLBACKS} rollbacks to the checkpoint of batch {step}. Resume from an older "
                "checkpoint with a lower learning rate, or look at the data."
            ) from None

    def count_overflow(self, state: State, loss: float) -> None:
        """Let the scaler skip as often as it takes to find its scale.

        Raises:
            NonFiniteError: No scale helps.
        """
        self.skipped = self.skipped + 1 if state.step_skipped else 0
        if self.skipped >= MAX_OVERFLOWS:
            raise NonFiniteError(
                f"fp16 gradients overflowed {self.skipped} times in a row, the loss being {loss}: no scale helps. Look at "
                "the data and the loss, or write Trainer(precision='bf16')."
            )
