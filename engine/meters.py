"""Metrics: weighted means of numbers, objects that accumulate by themselves, and the running training loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from attrs import define, field
from torch import Tensor

from .distributed import Team
from .errors import ArgumentError, DataError
from .settings import can_call


@runtime_checkable
class Accumulator(Protocol):
    """A torchmetrics-like object."""

    def update(self, outputs: Any, targets: Any) -> None:
        """Take in a batch."""

    def compute(self) -> Any:
        """Return the value over all batches."""

    def reset(self) -> None:
        """Forget all batches."""


Metric: TypeAlias = Accumulator | Callable[[Any, Any], Any]


def check_metrics(metrics: object) -> dict[str, Metric]:
    """Return the metrics by name, or raise an ArgumentError that says what is none."""
    takes = "a mapping of names to torchmetrics-like objects or functions (outputs, targets) -> number"
    if not isinstance(metrics, Mapping):
        raise ArgumentError("Trainer(metrics=)", got=metrics, takes=takes, example=_example("accuracy"))
    for name, metric in metrics.items():
        if not isinstance(name, str) or not name:
            raise ArgumentError("Trainer(metrics=)", got={name: metric}, takes=takes, example=_example("accuracy"))
        if name == "loss":
            other = "another name than 'loss', under which the loss itself is reported"
            raise ArgumentError(_owner(name), got=metric, takes=other, example=_example("my_loss"))
        if isinstance(metric, type):
            instance = f"Trainer(metrics={{{name!r}: {metric.__name__}(…)}})"
            raise ArgumentError(_owner(name), got=metric, takes="an instance of the metric", example=instance)
        called = metric.update if isinstance(metric, Accumulator) else metric
        if not callable(called) or not can_call(called, 2):
            kind = "an update(outputs, targets)" if called is not metric else "a function (outputs, targets) -> number"
            raise ArgumentError(_owner(name), got=metric, takes=kind, example=_example(name))
    return dict(metrics)


def _owner(name: str) -> str:
    return f"Trainer(metrics={{{name!r}: …}})"


def _example(name: str) -> str:
    return f"Trainer(metrics={{{name!r}: lambda logits, y: (logits.argmax(-1) == y).float().mean()}})"


@define(eq=False)
class Meters:
    """The metrics of one pass over a loader.

    Args:
        metrics: Name to metric. Objects with ``update``, ``compute`` and ``reset`` accumulate by
            themselves; what a function returns is averaged over the samples.
        prefix: Put before each name: ``"eval/"``.
        team: The ranks over which the pass is shared out. Sums are added up over them. An object that synchronizes by
            itself, as torchmetrics' do, is left to it; any other is given the outputs and targets of all ranks.

    Example:
        >>> import torch
        >>> meters = Meters({"error": lambda outputs, targets: (outputs - targets).abs().mean()})
        >>> meters.update(torch.zeros(3), torch.ones(3), loss=2.0, weight=3.0, samples=3)
        >>> meters.update(torch.zeros(1), torch.zeros(1), loss=0.0, weight=1.0, samples=1)
        >>> meters.compute()
        {'eval/loss': 1.5, 'eval/error': 0.75}
    """

    metrics: Mapping[str, Metric]
    prefix: str = "eval/"
    team: Team | None = None
    _loss: float = field(init=False, default=0.0)
    _weight: float = field(init=False, default=0.0)
    _samples: int = field(init=False, default=0)
    _batches: int = field(init=False, default=0)
    _sums: dict[str, float] = field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        for metric in self.metrics.values():
            if isinstance(metric, Accumulator):
                metric.reset()

    def update(self, outputs: Any, targets: Any, *, loss: float | None, weight: float, samples: int) -> None:
        """Take in a batch: its predictions and targets, its mean loss over ``weight``, and how many samples it has.

        Raises:
            ArgumentError: A metric function returns something else than one number.
            DataError: A metric fails on a batch without targets.
        """
        if loss is not None and weight:  # a mean over nothing, as where every label is ignored, is NaN
            self._loss += loss * weight
            self._weight += weight
        self._samples += samples
        self._batches += 1
        for name, metric in self.metrics.items():
            try:
                if self.team is None:
                    value = (metric.update if isinstance(metric, Accumulator) else metric)(outputs, targets)
                else:
                    value = self._over_ranks(self.team, metric, outputs, targets, samples)
            except Exception as error:
                if targets is None:
                    raise DataError(
                        f"the metric {name!r} failed on a batch without targets: {error}. Write: an eval_loader whose "
                        "batches are (inputs, targets), or mappings with 'labels' or 'targets'."
                    ) from error
                error.add_note(f"in the metric {name!r}, called with (outputs, targets)")
                raise
            if not isinstance(metric, Accumulator):
                self._sums[name] = self._sums.get(name, 0.0) + _number(name, value) * samples

    def _over_ranks(self, team: Team, metric: Metric, outputs: Any, targets: Any, samples: int) -> Any:
        """Give a metric what it takes of this rank's share of a batch; of an empty one nothing."""
        if not isinstance(metric, Accumulator):
            return metric(outputs, targets) if samples else 0.0
        if callable(getattr(metric, "sync", None)):
            return metric.update(outputs, targets) if samples else None
        if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
            raise DataError(
                f"a metric without a sync() of its own is given the outputs and targets of all ranks, which have to be tensors: "
                f"got {type(outputs).__name__} and {type(targets).__name__}. Write: a function (outputs, targets) -> number."
            )
        whole = [_joined(team.exchange_tensor(each[:samples], batch=self._batches)) for each in (outputs, targets)]
        return metric.update(*whole)

    def _add_up(self, team: Team) -> None:
        """Make the sums those over all ranks, added in order of rank."""
        team.tell("EVAL_END", self._batches)  # loaders of other lengths end here, if they have not before
        names = [name for name, metric in self.metrics.items() if not isinstance(metric, Accumulator)]
        own = [self._loss, self._weight, float(self._samples), *(self._sums.get(name, 0.0) for name in names)]
        loss, weight, samples, *sums = (reduce(add, each) for each in zip(*team.exchange(own), strict=True))
        self._loss, self._weight, self._samples = loss, weight, int(samples)
        self._sums = dict(zip(names, sums, strict=True))

    def compute(self) -> dict[str, float]:
        """Return every metric by its prefixed name."""
        if self.team is not None:
            self._add_up(self.team)
        values: dict[str, float] = {}
        if self._weight:
            values[f"{self.prefix}loss"] = self._loss / self._weight
        for name, metric in self.metrics.items():
            value = (
                metric.compute()
                if isinstance(metric, Accumulator)
                else self._sums.get(name, 0.0) / max(1, self._samples)
            )
            values[f"{self.prefix}{name}"] = _number(name, value)
        return values


class RunningLoss:
    """The mean training loss since the last log line and since the epoch began; a checkpoint holds both.

    Example:
        >>> losses = RunningLoss()
        >>> losses.add(1.0)
        >>> losses.since_log()
        1.0
        >>> losses.add(2.0)
        >>> losses.since_log(), losses.of_epoch()
        (2.0, 1.5)
    """

    def __init__(self, epoch: tuple[float, int] = (0.0, 0), log: tuple[float, int] = (0.0, 0)) -> None:
        self._epoch: tuple[float, int] = (epoch[0], epoch[1])  # of lists, where a checkpoint gave them
        self._log: tuple[float, int] = (log[0], log[1])
        self._recent: list[float] = []
        self.add = self._recent.append  # once a batch: no more than that

    @property
    def count(self) -> int:
        """How many losses were added since the last log line."""
        return self._log[1] + len(self._recent)

    def since_log(self) -> float:
        """Return the mean since the last call; NaN where nothing was added."""
        mean, self._log = self.so_far(), (0.0, 0)
        return mean

    def so_far(self) -> float:
        """Return the mean since the last :meth:`since_log`; NaN where nothing was added."""
        self._fold()
        total, count = self._log
        return total / count if count else math.nan

    def of_epoch(self) -> float:
        """Return the mean since :meth:`begin_epoch`; NaN where nothing was added."""
        self._fold()
        total, count = self._epoch
        return total / count if count else math.nan

    def begin_epoch(self) -> None:
        """Begin the epoch's mean anew."""
        self._fold()
        self._epoch = (0.0, 0)

    def parts(self) -> tuple[tuple[float, int], tuple[float, int]]:
        """Return what the constructor takes: totals and counts."""
        self._fold()
        return self._epoch, self._log

    def _fold(self) -> None:
        count = len(self._recent)
        # One by one, not by sum(): a resumed run adds in the same order.
        self._epoch = reduce(add, self._recent, self._epoch[0]), self._epoch[1] + count
        self._log = reduce(add, self._recent, self._log[0]), self._log[1] + count
        self._recent.clear()


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the parts of a batch as one; ranks may have padded theirs to other lengths."""
    shape = [max(sizes) for sizes in zip(*(each.shape[1:] for each in parts), strict=True)]
    if any(list(each.shape[1:]) != shape for each in parts):
        raise DataError(
            f"the ranks' outputs or targets have other shapes, {[tuple(each.shape) for each in parts]}, and make no batch. "
            "Write: a metric with a sync() of its own, such as torchmetrics', or a function (outputs, targets) -> number."
        )
    return torch.cat(list(parts))


def _number(name: str, value: Any) -> float:
    """Return what a metric gives as a number, or raise an ArgumentError that names the metric."""
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: a tensor of several numbers
        pass
    raise ArgumentError(_owner(name), got=value, takes="a metric that gives one number", example=_example(name))
