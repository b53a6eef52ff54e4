"""A recipe: everything about a fit but the model and its data, validated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from attrs import Attribute, define, field
from torch import Tensor, nn
from torch.optim import Optimizer

from .algorithm import Algorithm, as_json
from .checkpointing import Checkpointing
from .clock import Time
from .distributed import Replicate, Team, join
from .engine import check_algorithms
from .errors import ArgumentError
from .forward import Forward
from .homes import OptimizerLike
from .meters import Metric, check_metrics
from .schedules import Schedule, as_schedule, constant
from .settings import (
    device_of,
    function_of,
    interval,
    loss_function,
    not_negative,
    one_of,
    path_of,
    precision_name,
    whole,
)
from .tracking import Tracker
from .typing import Json

DEFAULT_OPTIMIZER = partial(torch.optim.AdamW, lr=1e-4)


def check_optimizer(value: object) -> OptimizerLike:
    """Return what can serve as ``optimizer=``, or raise an ArgumentError."""
    if (
        isinstance(value, Optimizer)
        or callable(value)
        or (isinstance(value, Sequence) and value and not isinstance(value, str))
    ):
        return cast("OptimizerLike", value)
    raise ArgumentError(
        "Trainer(optimizer=)", got=value, takes="a factory over parameters, an optimizer or a list of (select, factory)",
        example="Trainer(optimizer=partial(torch.optim.AdamW, lr=1e-4))",
    )  # fmt: skip


def _run_dir(value: object) -> Path | None:
    if value is None:
        return None
    example = "Trainer(run_dir='runs/first')"
    if isinstance(value, (str, Path)):
        return path_of("Trainer(run_dir=)", value, example).absolute()  # wherever the fit is called from, or goes to
    raise ArgumentError("Trainer(run_dir=)", got=value, takes="a directory or None", example=example)


def _checkpointing(value: object) -> Checkpointing | None:
    if value is None or isinstance(value, Checkpointing):
        return value
    raise ArgumentError(
        "Trainer(checkpoint=)",
        got=value,
        takes="a Checkpointing or None",
        example="Trainer(run_dir='runs/first', checkpoint=Checkpointing(every='1ep'))",
    )


def _eval_every(value: object) -> Time:
    return interval("eval_every", value)


def _log_every(value: object) -> Time:
    return interval("log_every", value)


def _needs_run_dir(recipe: Recipe, _: object, value: Checkpointing | None) -> None:
    if value is not None and recipe.run_dir is None:
        raise ArgumentError(
            "Trainer(checkpoint=)", got=value, takes="a run_dir beside it, to lie in",
            example="Trainer(run_dir='runs/first', checkpoint=Checkpointing(every='1ep'))",
        )  # fmt: skip


def _can_roll_back(recipe: Recipe, attribute: Attribute[Any], value: object) -> None:
    one_of("raise", "skip", "rollback")(recipe, attribute, value)
    if value == "rollback" and recipe.run_dir is None:
        raise ArgumentError(
            "Trainer(on_nonfinite=)", got=value, takes="a run_dir beside 'rollback', with the checkpoint to go back to",
            example="Trainer(run_dir='runs/first', on_nonfinite='rollback')",
        )  # fmt: skip


def _are_trackers(_: object, __: object, value: object) -> None:
    example = "Trainer(trackers=[CometTracker('my-project')])"
    if isinstance(value, Tracker) or not isinstance(value, Sequence):
        raise ArgumentError("Trainer(trackers=)", got=value, takes="a list of trackers", example=example)
    for each in value:
        if not isinstance(each, Tracker):
            takes = "objects with log_config, log_metrics, log_artifact and close"
            raise ArgumentError("Trainer(trackers=)", got=each, takes=takes, example=example)


def _together(_: object, __: Attribute[Any], value: object) -> None:
    if not isinstance(value, Replicate):
        takes = "'auto', False or Replicate(timeout=, bucket_mib=); sharded weights (FSDP2) are not in this version"
        if value not in ("auto", False):
            example = "Trainer(distributed=Replicate(timeout=120))"
            raise ArgumentError("Trainer(distributed=)", got=value, takes=takes, example=example)


@define(kw_only=True, eq=False)
class Recipe:
    """The arguments of the :class:`~thawline.engine.Trainer`, which documents them; all validated at construction."""

    algorithms: tuple[Algorithm, ...] = field(default=(), converter=check_algorithms)
    optimizer: OptimizerLike = field(default=DEFAULT_OPTIMIZER, converter=check_optimizer)
    schedule: Schedule = field(factory=constant, converter=as_schedule)
    min_lr: float = field(default=0.0, validator=not_negative)
    loss_fn: Callable[[Any, Any], Tensor] | None = field(default=None, validator=loss_function)
    forward_fn: Callable[[nn.Module, Any], Any] | None = field(
        default=None, validator=function_of("model", "batch", example="lambda model, batch: model(**batch)")
    )
    loss_weight: Callable[[Any], float] | None = field(
        default=None, validator=function_of("batch", example="lambda batch: len(batch['labels'])")
    )
    metrics: Mapping[str, Metric] = field(factory=dict, converter=check_metrics)
    precision: Literal["fp32", "bf16", "fp16"] = field(default="fp32", validator=precision_name)
    microbatch_size: int | None = field(default=None, validator=whole(1, optional=True))
    accumulate: int = field(default=1, validator=whole(1))
    eval_every: Time = field(default=Time("1ep"), converter=_eval_every)
    log_every: Time = field(default=Time("10ba"), converter=_log_every)
    seed: int = field(default=0, validator=whole(0, maximum=2**64 - 1))
    run_dir: Path | None = field(default=None, converter=_run_dir)
    checkpoint: Checkpointing | None = field(default=None, converter=_checkpointing, validator=_needs_run_dir)
    trackers: Sequence[Tracker] = field(default=(), validator=_are_trackers)
    device: torch.device = field(factory=lambda: device_of("auto"), converter=device_of)
    distributed: Literal["auto", False] | Replicate = field(default="auto", validator=_together)
    compile: Literal[False, "blocks"] = field(default=False, validator=one_of(False, "blocks"))
    on_nonfinite: Literal["raise", "skip", "rollback"] = field(default="raise", validator=_can_roll_back)
    progress: Literal["auto"] | bool = field(default="auto", validator=one_of("auto", True, False))
    debug: bool = field(default=False, validator=one_of(False, True))

    def __attrs_post_init__(self) -> None:
        """Refuse to cut a batch whose loss is no mean: its parts' losses are not weighed into the whole's."""
        reduction = self.forward().criterion.reduction
        if reduction != "mean" and (self.accumulate > 1 or self.microbatch_size is not None):
            raise ArgumentError(
                "Trainer(loss_fn=)", got=f"a loss with reduction={reduction!r}",
                takes="a mean over the batch, where microbatch_size or accumulate cuts it",
                example="Trainer(loss_fn=torch.nn.CrossEntropyLoss(reduction='mean'), …)",
            )  # fmt: skip

    def forward(self) -> Forward:
        """Return how a batch goes through a model."""
        return Forward(self.forward_fn, self.loss_fn, self.loss_weight)

    def joined(self) -> Team | None:
        """Return the team that this process is one of; None for a process alone."""
        if self.distributed is False:
            return None
        return join(Replicate() if self.distributed == "auto" else self.distributed, self.device)

    def describe(self) -> dict[str, Json]:
        """Return the whole recipe as JSON: what trackers are given as the run's configuration."""
        checkpoint = None if self.checkpoint is None else as_json(self.checkpoint)
        return {
            "algorithms": [each.describe() for each in self.algorithms],
            "optimizer": as_json(self.optimizer),
            "schedule": self.schedule.describe(),
            "min_lr": self.min_lr,
            "loss_fn": as_json(self.loss_fn),
            "forward_fn": as_json(self.forward_fn),
            "loss_weight": as_json(self.loss_weight),
            "metrics": {name: as_json(metric) for name, metric in self.metrics.items()},
            "precision": self.precision,
            "microbatch_size": self.microbatch_size,
            "accumulate": self.accumulate,
            "eval_every": str(self.eval_every),
            "log_every": str(self.log_every),
            "seed": self.seed,
            "checkpoint": checkpoint,
            "device": str(self.device),
            "distributed": as_json(self.distributed),
            "compile": self.compile,
            "on_nonfinite": self.on_nonfinite,
        }
