"""The Trainer: arguments in, a fitted model out. The loop is in run.py."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from attrs import define, fields, frozen
from torch import nn
from torch.optim import Optimizer

from .clock import Clock, Time
from .compiling import compiled
from .data import ResumableLoader
from .distributed import FullyShard, restarted
from .errors import ArgumentError
from .evaluation import evaluate
from .foresight import foresee
from .homes import OptimizerLike
from .keywords import INSTEAD, elsewhere, explained, explained_constructor
from .layers import LayerMap, LayerSpec
from .log import only_errors
from .plan import Plan
from .precision import Precision
from .ranks import same_data, same_samples
from .recipe import Recipe, check_factory, check_optimizer
from .resume import OnChange
from .run import Run
from .settings import duration_of, path_of, require_weights
from .shard_errors import explaining, refuse_shards
from .shares import Share


@frozen(eq=False)
class FitResult:
    """What a fit leaves behind.

    Args:
        history: One dict an epoch: ``epoch``, ``batch``, ``train/loss``, evaluation metrics, ``lr`` (the highest
            learning rate), ``lr/<layer>`` (the highest in each layer, 0.0 while it is frozen), ``trainable`` (number of
            scalars) and what algorithms logged.
        metrics: The latest value of everything logged; ``train/loss`` is the mean since the log line before, in ``history``
            that of the epoch.
        stop_reason: Why the fit ended: ``"duration"``, ``"signal"``, or what an algorithm gave to ``state.stop``.
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


_START = "trainer.fit(model, train_loader, duration='3ep', "
_AT_FIT = {
    **elsewhere(_START, ("layers", "resume", "on_change")),
    **elsewhere("trainer.fit(model, train_loader, ", ("duration",)),
    "model": _START[:-2] + ")",
    "train_loader": _START[:-2] + ")",
    "eval_loader": "trainer.fit(model, train_loader, eval_loader, duration='3ep')",
}
_AT_CONSTRUCTION = elsewhere("Trainer(", (each.name for each in fields(Recipe)))


@explained_constructor("Trainer", "Trainer(algorithms=[LayerThaw(every=2)])", INSTEAD | _AT_FIT)
@define(kw_only=True, eq=False)
class Trainer(Recipe):
    """Fine-tunes models by a list of algorithms.

    Args:
        algorithms: What happens besides forward, backward and step.
        optimizer: A factory over parameters, or ``[(select, factory), …]``, the first match taking a parameter.
        schedule: Progress (0 to 1) to the factor on every learning rate.
        min_lr: Floor of every learning rate.
        loss_fn: ``(outputs, targets) -> scalar``, a mean; None: the model returns its loss.
        forward_fn: ``(model, batch) -> outputs``; None: mappings are keywords, tuples ``(*inputs, targets)``.
        loss_weight: ``batch -> number`` of what the loss is a mean over; None: labels that are not ignored, else samples;
            the first label of each row is left out where the model computes its loss and shifts them.
        metrics: Name to torchmetrics-like object or function ``(outputs, targets) -> number``.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (with a gradient scaler).
        microbatch_size: Samples that go through the model at once; None: the whole batch.
        accumulate: Loader batches to one optimizer step.
        eval_every: The time between evaluations.
        log_every: The time between lines to trackers; a display of progress shows the loss of the moment.
        seed: Of data order, augmentation, what is attached, and the global generators at the start.
        run_dir: Directory of checkpoints, ``metrics.jsonl`` and ``run.json``.
        checkpoint: When to save and what to keep; with ``run_dir`` the default saves every epoch.
        trackers: Where metrics go besides ``run_dir``.
        device: ``"auto"``, or a torch device.
        distributed: ``"auto"``: under torchrun, data-parallel training with a whole model on each rank, as
            :class:`Replicate` says; batches are those of all ranks together. :class:`FullyShard` shares out weights, gradients
            and optimizer state as well. False: each process trains by itself.
        compile: False, or ``"blocks"``: each block by itself, with at most five graphs a block structure whatever trains when;
            needs torch's compiler (on the CPU, a C++ one).
        on_nonfinite: ``"raise"``, ``"skip"``: no step, and raise after five in a row, or ``"rollback"``: back to the
            last checkpoint, and the batch is skipped the second time; needs ``run_dir``.
        progress: ``"auto"``, True or False.
        debug: Verify the ledger after each algorithm's turn; slow.

    Raises:
        ArgumentError: An argument of the wrong type or out of range.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> x, y = torch.randn(32, 4), torch.randint(2, (32,))
        >>> loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> trainer = Trainer(loss_fn=nn.functional.cross_entropy, progress=False)
        >>> result = trainer.fit(model, loader, duration="2ep")
        >>> result.clock.batch, result.stop_reason
        (8, 'duration')
    """

    @explained("trainer.fit", _START[:-2] + ")", INSTEAD | _AT_CONSTRUCTION)
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
        on_change: OnChange = "refuse",
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
                on from that checkpoint, or from the newest one of that run's directory; False starts, and refuses
                a ``run_dir`` that holds a run.
            on_change: What a resumed fit does where algorithms, ``schedule`` or ``min_lr`` are not those of the checkpoint.
                ``"refuse"``: an error with the difference. ``"migrate"``: algorithms that are the same keep their state, of
                others the holds, factors and rates are released, new ones are given FIT_START where the run goes on, and
                the given schedule and ``min_lr`` are used; a warning says so.

        Raises:
            ArgumentError: A wrong argument.
            RunDirError: ``run_dir`` holds a run, cannot be made, or another process writes there.
            CheckpointError: What is resumed is damaged, or another run: the optimizer's class, algorithms, schedule,
                min_lr, seed, accumulate or layers differ.
            DataError, LossError, LedgerError, NonFiniteError, OutOfMemoryError, RecompileError: As their docstrings say.
            DistributedError: Ranks disagree, one has ended or does not answer, or the launch is incomplete.

        After a restart by ``torchrun --max-restarts``, a fit with a ``run_dir`` goes on from its newest checkpoint.
        SIGTERM, SIGINT or SIGUSR1 end the fit before the next step, with a checkpoint where there is a ``run_dir``; a
        second one acts as it would have.

        Warns:
            ThawlineWarning: Memory ran out and smaller microbatches go on; a checkpoint could not be written. On resume, where
                the newest checkpoint is damaged, and for each other setting that differs: the Trainer's is used as given,
                the optimizer's options are kept as saved.
        """
        _check_module("fit", model)
        require_weights("fit", model)
        span = duration_of(duration)
        example = "trainer.fit(model, train_loader, duration='3ep', resume=True)"
        if isinstance(resume, (str, Path)):
            resume = path_of("Trainer.fit(resume=)", resume, example)
        elif not isinstance(resume, bool):
            raise ArgumentError("Trainer.fit(resume=)", got=resume, takes="True, False or a path", example=example)
        if resume is True and self.run_dir is None:
            raise ArgumentError(
                "Trainer.fit(resume=)", got=True, takes="a run_dir to resume from, or a checkpoint's path",
                example="Trainer(run_dir='runs/first').fit(…, resume=True)",
            )  # fmt: skip
        if on_change not in ("refuse", "migrate"):
            example = "trainer.fit(model, train_loader, duration='3ep', resume=True, on_change='migrate')"
            raise ArgumentError(
                "Trainer.fit(on_change=)", got=on_change, takes="'refuse' or 'migrate'", example=example
            )
        if on_change == "migrate" and resume is False:
            raise ArgumentError(
                "Trainer.fit(on_change=)", got=on_change, takes="'migrate' with a run to resume only",
                example="trainer.fit(model, train_loader, duration='3ep', resume=True, on_change='migrate')",
            )  # fmt: skip
        chosen = self._chosen(optimizer)
        team = self.joined()
        anew = restarted(team)  # asked by all ranks, whatever they were given
        if resume is False and self.run_dir is not None:
            resume = anew
        with only_errors() if team is not None and not team.first else nullcontext(), Run(
            self, model, train_loader, eval_loader, duration=span, optimizer=chosen, layers=layers, resume=resume,
            on_change=on_change, team=team,
        ) as run, compiled(model, run.state.layers, self.compile):  # fmt: skip
            with explaining(team, run.state.ledger):
                run.train()
            return FitResult(
                run.report.history, dict(run.state.metrics), run.stop_reason, run.state.clock, run.timeline,
                run.folder.best, run.folder.last,
            )  # fmt: skip

    @explained(
        "trainer.plan", "trainer.plan(model, train_loader, duration='3ep')", INSTEAD | _AT_CONSTRUCTION | _AT_FIT
    )
    def plan(
        self,
        model: nn.Module,
        train_loader: Iterable[Any],
        eval_loader: Iterable[Any] | None = None,  # noqa: ARG002 - so that a call of fit is one of plan
        *,
        duration: Time | str | int,
        optimizer: OptimizerLike | None = None,
        layers: LayerMap | LayerSpec | None = None,
    ) -> Plan:
        """Return the timeline that :meth:`fit` would have, without training.

        The algorithms run over the clock on a copy of the model on the meta device, which holds no numbers; of the
        loader, the first batch is loaded on the side, to count operations on its shapes. Model, loader, algorithms,
        optimizer and random generators stay as they are. What depends on losses, gradients or weights is not run but
        said in the plan's notes; algorithms of the stages DATA, GRADIENTS, WEIGHTS and OBSERVE are not run.

        Args:
            model: The model.
            train_loader: As for :meth:`fit`; one that says how many batches it has, or a duration in batches.
            eval_loader: Not looked at: a plan evaluates nothing.
            duration: As for :meth:`fit`.
            optimizer: As for :meth:`fit`.
            layers: As for :meth:`fit`.

        Raises:
            ArgumentError: A wrong argument, a model that ``copy.deepcopy`` does not copy, or a loader that does not
                say what the duration needs.
            Exception: What the algorithms raise in the fit.

        Example:
            >>> import torch
            >>> batches = [(torch.zeros(8, 4), torch.zeros(8, 1))] * 10
            >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
            >>> plan = Trainer(loss_fn=nn.functional.mse_loss).plan(model, batches, duration="3ep")
            >>> plan.spans[0].end.batch, plan.spans[0].trainable, plan.spans[0].ends_with
            (30, 49, 'duration')
        """
        _check_module("plan", model)
        span, chosen = duration_of(duration, call="plan"), self._chosen(optimizer)
        return foresee(self, model, train_loader, duration=span, optimizer=chosen, layers=layers)

    def _chosen(self, optimizer: OptimizerLike | None) -> OptimizerLike:
        if isinstance(self.optimizer, Optimizer) and optimizer is None:
            raise ArgumentError(
                "Trainer(optimizer=)", got=type(self.optimizer).__name__, takes="a factory: an instance belongs to one model",
                example="trainer.fit(model, train_loader, duration='3ep', optimizer=instance)",
            )  # fmt: skip
        chosen = self.optimizer if optimizer is None else check_optimizer(optimizer)
        if isinstance(self.distributed, FullyShard):
            check_factory(chosen)
        return chosen

    @explained("trainer.evaluate", "trainer.evaluate(model, loader)", INSTEAD | _AT_CONSTRUCTION)
    def evaluate(self, model: nn.Module, loader: Iterable[Any]) -> dict[str, float]:
        """Return ``"eval/loss"`` and ``"eval/<metric>"`` over a loader; the model's mode is put back.

        Raises:
            DataError: The loader yields nothing.
        """
        _check_module("evaluate", model)
        require_weights("evaluate", model, lazy=True)
        team = self.joined()
        share = None if team is None else Share(team.rank, team.world)
        data = ResumableLoader(loader, seed=self.seed, argument="Trainer.evaluate(loader=)", share=share)
        if team is not None:
            same_data(team, loader=data)
            same_samples(team, loader=data)
        return evaluate(
            model.to(self.device),
            data,
            forward=self.forward(),
            metrics=self.metrics,
            precision=Precision(self.precision, self.device),
            device=self.device,
            team=team,
        )


def _check_module(call: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"Trainer.{call}(model=)", got=model, takes="a torch.nn.Module", example=f"trainer.{call}(model, loader)"
        )
    if call != "evaluate" and hasattr(model, "_orig_mod"):
        raise ArgumentError(
            f"Trainer.{call}(model=)", got=type(model).__name__,
            takes="the plain module: what torch.compile returns has other parameter names, which checkpoints would keep",
            example=f"trainer.{call}(model._orig_mod, …)",
        )  # fmt: skip
    refuse_shards(call, model)
