"""Metrics: weighted means of numbers, objects that accumulate by themselves, and the running training loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import reduce
from operator import add
from typing import Any, Protocol, TypeAlias, runtime_checkable

from attrs import define, field

from .errors import ArgumentError


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
    example = "Trainer(metrics={'accuracy': lambda logits, y: (logits.argmax(-1) == y).float().mean()})"
    if not isinstance(metrics, Mapping):
        raise ArgumentError("Trainer(metrics=)", got=metrics, takes=takes, example=example)
    for name, metric in metrics.items():
        if not isinstance(name, str) or not (isinstance(metric, Accumulator) or callable(metric)):
            raise ArgumentError("Trainer(metrics=)", got={name: metric}, takes=takes, example=example)
    return dict(metrics)


@define(eq=False)
class Meters:
    """The metrics of one pass over a loader.

    Args:
        metrics: Name to metric. Objects with ``update``, ``compute`` and ``reset`` accumulate by
            themselves; what a function returns is averaged over the samples.
        prefix: Put before each name: ``"eval/"``.

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
    _loss: float = field(init=False, default=0.0)
    _weight: float = field(init=False, default=0.0)
    _samples: int = field(init=False, default=0)
    _sums: dict[str, float] = field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        for metric in self.metrics.values():
            if isinstance(metric, Accumulator):
                metric.reset()

    def update(self, outputs: Any, targets: Any, *, loss: float | None, weight: float, samples: int) -> None:
        """Take in a batch: its predictions and targets, its mean loss over ``weight``, and how many samples it has."""
        if loss is not None:
            self._loss += loss * weight
            self._weight += weight
        self._samples += samples
        for name, metric in self.metrics.items():
            if isinstance(metric, Accumulator):
                metric.update(outputs, targets)
            else:
                self._sums[name] = self._sums.get(name, 0.0) + float(metric(outputs, targets)) * samples

    def compute(self) -> dict[str, float]:
        """Return every metric by its prefixed name."""
        values: dict[str, float] = {}
        if self._weight:
            values[f"{self.prefix}loss"] = self._loss / self._weight
        for name, metric in self.metrics.items():
            value = (
                metric.compute()
                if isinstance(metric, Accumulator)
                else self._sums.get(name, 0.0) / max(1, self._samples)
            )
            values[f"{self.prefix}{name}"] = float(value)
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
        self._fold()
        (total, count), self._log = self._log, (0.0, 0)
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
