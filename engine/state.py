"""The state of a fit, shared by the loop and all algorithms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import define, field, setters
from torch import Tensor, nn
from torch.optim import Optimizer

from .clock import Clock, Time
from .errors import ArgumentError
from .layers import LayerMap
from .ledger import ParameterLedger


@define(eq=False, slots=True, on_setattr=setters.NO_OP)  # converting at each assignment costs 10 us a batch
class State:
    """What algorithms see and may change.

    Args:
        model: The caller's own module, never wrapped.
        ledger: What trains, in which group, at which rate.
        duration: How long the fit lasts.
        seed: The run's seed, for generators of an algorithm's own.
        clock: Where training stands; replaced at each tick.
        batch: The loader's batch on the device; a list of them where ``accumulate`` is above 1.
        microbatch: The part that goes through the model now.
        outputs: What the model returned for the microbatch.
        loss: The microbatch's loss; from BEFORE_STEP to BATCH_END the whole batch's, whose graph backward has freed. None after an evaluation.
        metrics: The latest value of everything logged, such as ``"eval/loss"``.
        grad_norm: Norm of all gradients before clipping, where an algorithm measured it.
        sample_ids: Index in the dataset of each sample of the batch, where the loader has them.
        microbatch_ids: The same of each sample of the microbatch.
        sharded: Whether the weights lie in shards over the ranks from the end of FIT_START to that of FIT_END: a parameter is
            then a ``DTensor``, whole only while its module is called, and nothing can be attached or detached.
        unloaded: Set by an algorithm that may not need what the loader gives: from the next epoch on ``batch`` may be an
            :class:`~thawline.engine.Unloaded` (a list of them where ``accumulate`` is above 1) at BATCH_START, and that
            algorithm puts what ``load()`` gives, or something else, in its place.
        step_skipped: Whether the last step left the weights alone.
        exception: What ended the fit, at FIT_ABORT.
        restored: Whether earlier weights were put back at the fit's last EPOCH_END: the loop then evaluates them anew.
        stop_reason: Why the fit is to stop, once somebody asked.
        world: How many ranks train together, each with its share of every batch.
        accumulate: How many batches of the loader are one step; a loader's own batch may be a list as well.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> state = State(model, ParameterLedger(model, lambda ps: __import__("torch").optim.SGD(ps, lr=0.1)))
        >>> state.log({"share": 0.5})
        >>> state.stop("enough")
        >>> state.metrics, state.stop_reason
        ({'share': 0.5}, 'enough')
    """

    model: nn.Module
    ledger: ParameterLedger
    duration: Time = field(default=Time("1ep"), converter=Time)
    seed: int = 0
    clock: Clock = field(factory=Clock)
    batch: Any = None
    microbatch: Any = None
    outputs: Any = None
    loss: Tensor | None = None
    metrics: dict[str, float] = field(factory=dict)
    grad_norm: Tensor | float | None = None
    sample_ids: tuple[int, ...] | None = None
    microbatch_ids: tuple[int, ...] | None = None
    sharded: bool = False
    unloaded: bool = False
    step_skipped: bool = False
    exception: BaseException | None = None
    restored: bool = False
    stop_reason: str | None = None
    world: int = 1
    accumulate: int = 1
    logged: dict[str, float] = field(factory=dict)

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """The optimizers, in the order of the ``optimizer=`` argument."""
        return self.ledger.optimizers

    @property
    def layers(self) -> LayerMap:
        """The model's layers in depth order."""
        return self.ledger.layers

    def log(self, values: Mapping[str, float | Tensor]) -> None:
        """Record values under their names: for trackers, history and whoever monitors them.

        Raises:
            ArgumentError: A value is not one number.
        """
        for name, value in values.items():
            number = value.detach() if isinstance(value, Tensor) else value  # a loss has a graph
            try:
                self.metrics[name] = self.logged[name] = float(number)
            except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # RuntimeError: a tensor of several
                takes, example = "one number under each name", "state.log({'norm': 0.5})"
                raise ArgumentError("state.log", got={name: value}, takes=takes, example=example) from error

    def take_logged(self) -> dict[str, float]:
        """Return what was logged since the last call, and forget it."""
        taken, self.logged = self.logged, {}
        return taken

    def stop(self, reason: str) -> None:
        """Ask the loop to end; the first reason stays.

        No further batch is trained: at EPOCH_START or BATCH_START not this one either, later the running one is finished.
        """
        if self.stop_reason is None:
            self.stop_reason = reason

    def tick(self, samples: int) -> None:
        """Count one batch of ``samples`` samples; a loop of your own calls it before emitting BATCH_END."""
        self.clock = self.ledger.clock = self.clock.after_batch(samples=samples, duration=self.duration)

    def tick_epoch(self) -> None:
        """Count the running epoch as completed; a loop of your own calls it before emitting EPOCH_END."""
        self.clock = self.ledger.clock = self.clock.after_epoch(duration=self.duration)
