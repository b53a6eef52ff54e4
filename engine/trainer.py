"""The Trainer: the only loop, read top-down."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import define, field, frozen
from torch import Tensor, nn
from torch.optim import Optimizer

from .algorithm import Algorithm, as_json
from .clock import Clock, Time
from .engine import check_algorithms
from .errors import ArgumentError
from .evaluation import evaluate
from .forward import Forward
from .homes import OptimizerLike
from .layers import LayerMap, LayerSpec
from .meters import Metric, check_metrics
from .plan import Plan
from .run import Run
from .schedules import Schedule, as_schedule, constant
from .settings import (
    device_of,
    duration_of,
    function_or_none,
    interval,
    not_negative,
    one_of,
    refuse_ranks,
    whole,
)
from .store import Checkpointing
from .tracking import Tracker
from .typing import Json

DEFAULT_OPTIMIZER = partial(torch.optim.AdamW, lr=1e-4)


@frozen(eq=False)
class FitResult:
    """What a fit leaves behind.

    Args:
        history: One dict an epoch: ``epoch``, ``batch``, ``train/loss``, evaluation metrics, ``lr/<group>``,
            ``trainable`` (number of scalars) and what algorithms logged.
        metrics: The latest value of everything logged.
        stop_reason: Why the fit ended: ``"duration"``, or what an algorithm gave to ``state.stop``.
        clock: Where it ended.
        timeline: What trained when, at which learning rate.
        best: The checkpoint with the best monitored metric, if any.
        last: The newest checkpoint, if any.
    """

    history: list[dict[str, float]]
    metrics: dict[str, float]
    stop_reason: str
    clock: Clock
    timeline: Plan
    best: Path | None
    last: Path | None


def _optimizer(value: object) -> OptimizerLike:
    if isinstance(value, Optimizer) or callable(value) or (isinstance(value, Sequence) and value and not isinstance(value, str)):
        return value  # type: ignore[return-value]
    raise ArgumentError(
        "Trainer(optimizer=)", got=value, takes="a factory over parameters, an optimizer or a list of (select, factory)",
        example="Trainer(optimizer=partial(torch.optim.AdamW, lr=1e-4))",
    )  # fmt: skip


def _run_dir(value: object) -> Path | None:
    if value is None:
        return None
    if isinstance(value, (str, Path)) and str(value):
        return Path(value)
    raise ArgumentError("Trainer(run_dir=)", got=value, takes="a directory or None", example="Trainer(run_dir='runs/first')")


def _checkpointing(value: object) -> Checkpointing | None:
    if value is None or isinstance(value, Checkpointing):
        return value
    raise ArgumentError(
        "Trainer(checkpoint=)", got=value, takes="a Checkpointing or None", example="Trainer(checkpoint=Checkpointing(every='1ep'))"
    )


@define(kw_only=True, eq=False)
class Trainer:
    """Fine-tunes models by a list of algorithms.

    Args:
        algorithms: What happens besides forward, backward and step.
        optimizer: A factory over parameters, or ``[(select, factory), …]``, the first match taking a parameter.
        schedule: Progress (0 to 1) to the factor on every learning rate.
        min_lr: Floor of every learning rate.
        loss_fn: ``(outputs, targets) -> scalar``, a mean; None: the model returns its loss.
        forward_fn: ``(model, batch) -> outputs``; None: mappings are keywords, tuples ``(*inputs, targets)``.
        loss_weight: ``batch -> number`` of what the loss is a mean over; None: labels that are not ignored, else samples.
        metrics: Name to torchmetrics-like object or function ``(outputs, targets) -> number``.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (with a gradient scaler).
        microbatch_size: Samples that go through the model at once; None: the whole batch.
        accumulate: Loader batches to one optimizer step.
        eval_every: The time between evaluations.
        log_every: The time between lines to trackers.
        seed: Of data order, augmentation, what is attached, and the global generators at the start.
        run_dir: Directory of checkpoints, ``metrics.jsonl`` and ``run.json``.
        checkpoint: When to save and what to keep; with ``run_dir`` the default saves every epoch.
        trackers: Where metrics go besides ``run_dir``.
        device: ``"auto"``, or a torch device.
        distributed: ``"auto"`` or False; several processes are refused for now.
        compile: False.
        on_nonfinite: ``"raise"``, or ``"skip"``: no step, and raise after five in a row.
        progress: ``"auto"``, True or False.
        debug: Verify the ledger after each algorithm's turn; slow.

    Raises:
        ArgumentError: An argument of the wrong type or out of range.

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> x, y = torch.randn(32, 4), torch.randint(2, (32,))
        >>> loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> trainer = Trainer(loss_fn=nn.functional.cross_entropy, progress=False)
        >>> result = trainer.fit(model, loader, duration="2ep")
        >>> result.clock.batch, result.stop_reason
        (8, 'duration')
    """

    algorithms: tuple[Algorithm, ...] = field(default=(), converter=check_algorithms)
    optimizer: OptimizerLike = field(default=DEFAULT_OPTIMIZER, converter=_optimizer)
    schedule: Schedule = field(factory=constant, converter=as_schedule)
    min_lr: float = field(default=0.0, validator=not_negative)
    loss_fn: Callable[[Any, Any], Tensor] | None = field(default=None, validator=function_or_none)
    forward_fn: Callable[[nn.Module, Any], Any] | None = field(default=None, validator=function_or_none)
    loss_weight: Callable[[Any], float] | None = field(default=None, validator=function_or_none)
    metrics: Mapping[str, Metric] = field(factory=dict, converter=check_metrics)
    precision: Literal["fp32", "bf16", "fp16"] = field(default="fp32", validator=one_of("fp32", "bf16", "fp16"))
    microbatch_size: int | None = field(default=None, validator=whole(1, optional=True))
    accumulate: int = field(default=1, validator=whole(1))
    eval_every: Time = field(default="1ep", converter=interval("eval_every"))
    log_every: Time = field(default="10ba", converter=interval("log_every"))
    seed: int = field(default=0, validator=whole(0))
    run_dir: Path | None = field(default=None, converter=_run_dir)
    checkpoint: Checkpointing | None = field(default=None, converter=_checkpointing)
    trackers: Sequence[Tracker] = field(default=())
    device: torch.device = field(default="auto", converter=device_of)
    distributed: Literal["auto", False] = field(default="auto", validator=one_of("auto", False))
    compile: Literal[False] = field(default=False, validator=one_of(False))
    on_nonfinite: Literal["raise", "skip"] = field(default="raise", validator=one_of("raise", "skip"))
    progress: Literal["auto"] | bool = field(default="auto", validator=one_of("auto", True, False))
    debug: bool = field(default=False, validator=one_of(False, True))

    @checkpoint.validator
    def _needs_run_dir(self, _: object, value: Checkpointing | None) -> None:
        if value is not None and self.run_dir is None:
            raise ArgumentError(
                "Trainer(checkpoint=)", got=value, takes="a run_dir beside it, to lie in",
                example="Trainer(run_dir='runs/first', checkpoint=Checkpointing(every='1ep'))",
            )  # fmt: skip

    @trackers.validator
    def _are_trackers(self, _: object, value: object) -> None:
        example = "Trainer(trackers=[CometTracker('my-project')])"
        if isinstance(value, Tracker) or not isinstance(value, Sequence):
            raise ArgumentError("Trainer(trackers=)", got=value, takes="a list of trackers", example=example)
        for each in value:
            if not isinstance(each, Tracker):
                takes = "objects with log_config, log_metrics, log_artifact and close"
                raise ArgumentError("Trainer(trackers=)", got=each, takes=takes, example=example)

    def fit(
        self,
        model: nn.Module,
        train_loader: Iterable[Any],
        eval_loader: Iterable[Any] | None = None,
        *,
        duration: Time | str | int,
        optimizer: OptimizerLike | None = None,
        layers: LayerMap | LayerSpec | None = None,
        resume: bool | str | Path = False,
    ) -> FitResult:
        """Train ``model`` in place.

        Args:
            model: The caller's own module; afterwards it holds the live weights and no hook of ours.
            train_loader: A DataLoader, or any iterable of batches.
            eval_loader: Data of the evaluations; None for none.
            duration: How long: ``"3ep"`` or ``3``, ``"200ba"``, ``"5000sp"``.
            optimizer: Instead of the Trainer's: an instance, whose groups' options are kept, or a factory.
            layers: Instead of the layers that are found: what :class:`LayerMap` takes.
            resume: True goes on from ``run_dir`` where it holds a checkpoint and starts otherwise; a path goes
                on from that checkpoint; False starts, and refuses a ``run_dir`` that holds a run.

        Raises:
            ArgumentError: A wrong argument.
            RunDirError: ``run_dir`` holds a run, or another process writes there.
            DataError, LossError, LedgerError, NonFiniteError: As their docstrings say.
        """
        if self.distributed == "auto":
            refuse_ranks()
        _check_module("fit", model)
        span = duration_of(duration)
        if not isinstance(resume, (bool, str, Path)):
            example = "trainer.fit(model, train_loader, duration='3ep', resume=True)"
            raise ArgumentError("Trainer.fit(resume=)", got=resume, takes="True, False or a path", example=example)
        if resume is True and self.run_dir is None:
            raise ArgumentError(
                "Trainer.fit(resume=)", got=True, takes="a run_dir to resume from, or a checkpoint's path",
                example="Trainer(run_dir='runs/first').fit(…, resume=True)",
            )  # fmt: skip
        chosen = self.optimizer if optimizer is None else _optimizer(optimizer)
        if isinstance(self.optimizer, Optimizer) and optimizer is None:
            raise ArgumentError(
                "Trainer(optimizer=)", got=type(self.optimizer).__name__, takes="a factory: an instance belongs to one model",
                example="trainer.fit(model, train_loader, duration='3ep', optimizer=instance)",
            )  # fmt: skip
        with Run(self, model, train_loader, eval_loader, duration=span, optimizer=chosen, layers=layers, resume=resume) as run:
            run.train()
            return FitResult(
                run.history, dict(run.state.metrics), run.stop_reason, run.state.clock, run.recorder.timeline(run.state.clock),
                run.best, run.last,
            )  # fmt: skip

    def evaluate(self, model: nn.Module, loader: Iterable[Any]) -> dict[str, float]:
        """Return ``"eval/loss"`` and ``"eval/<metric>"`` over a loader; the model's mode is put back.

        Raises:
            DataError: The loader yields nothing.
        """
        from .data import ResumableLoader
        from .precision import Precision

        _check_module("evaluate", model)
        return evaluate(
            model.to(self.device),
            ResumableLoader(loader, seed=self.seed),
            forward=self.forward(),
            metrics=self.metrics,
            precision=Precision(self.precision, self.device),
            device=self.device,
        )

    def forward(self) -> Forward:
        """Return how a batch goes through a model."""
        return Forward(self.forward_fn, self.loss_fn, self.loss_weight)

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
            "distributed": self.distributed,
            "compile": self.compile,
            "on_nonfinite": self.on_nonfinite,
        }


def _check_module(call: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"Trainer.{call}(model=)", got=model, takes="a torch.nn.Module", example=f"trainer.{call}(model, loader)"
        )


