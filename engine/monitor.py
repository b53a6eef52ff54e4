"""Metrics that something is chosen by: in which direction they are better, and how to say that one is missing."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Literal

from .errors import ThawlineWarning, nearest

# What is better when larger: a word of the metric's name, such as "accuracy" in "eval/top1_accuracy".
_LARGER_IS_BETTER = frozenset(
    {"acc", "accuracy", "auc", "auroc", "ap", "map", "bleu", "dice", "f1", "iou", "mcc", "pearson", "precision", "r2"}
    | {"recall", "reward", "rouge", "score", "spearman", "top1", "top5"}
)


def direction_of(monitor: str | None, mode: Literal["auto", "min", "max"] = "auto") -> Literal["min", "max"]:
    """Return whether a metric is better where it is smaller (``"min"``) or larger (``"max"``).

    Args:
        monitor: The metric's name, such as ``"eval/loss"``.
        mode: ``"auto"`` is ``"max"`` for names with a word such as accuracy, f1, auc, precision, recall, iou, bleu or
            score, else ``"min"``; the others are returned as they are.

    Example:
        >>> direction_of("eval/top1_accuracy"), direction_of("eval/loss"), direction_of("eval/error_score", "min")
        ('max', 'min', 'min')
    """
    if mode != "auto":
        return mode
    words = (monitor or "").lower().replace("/", " ").replace("_", " ").replace("-", " ").split()
    return "min" if _LARGER_IS_BETTER.isdisjoint(words) else "max"


def of_evaluation(monitor: object) -> bool:
    """Return whether a metric has a value only after an evaluation."""
    return isinstance(monitor, str) and monitor.startswith("eval/")


def warn_unmonitored(monitors: Mapping[str, object]) -> None:
    """Warn at the start of a fit without evaluations that what waits for one will wait in vain.

    Args:
        monitors: Who watches which metric.
    """
    watching = [owner for owner, monitor in monitors.items() if of_evaluation(monitor)]
    if watching:
        warnings.warn(
            f"{', '.join(watching)} monitors an evaluation, and there is no eval_loader: it will never act. "
            "Write: trainer.fit(model, train_loader, eval_loader, duration=…)",
            ThawlineWarning,
            stacklevel=4,
        )


def missing_metric(monitor: str, logged: Iterable[str], *, call: str) -> str:
    """Return what to say of a metric that nobody logged, with the one to write instead.

    Example:
        >>> missing_metric("eval/acuracy", ["eval/accuracy", "train/loss"], call="Checkpointing(monitor=)")
        "nobody logged 'eval/acuracy'. Logged: 'eval/accuracy', 'train/loss'. Write: Checkpointing(monitor='eval/accuracy')"
    """
    names = sorted(logged)
    listed = ", ".join(map(repr, names)) or "nothing"
    example = call.replace("=", "=" + nearest(monitor, names or ["eval/loss"], count=1), 1)
    return f"nobody logged {monitor!r}. Logged: {listed}. Write: {example}"
