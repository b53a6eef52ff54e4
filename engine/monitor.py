"""Metrics that something is chosen by: in which direction they are better, and how to say that one is missing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Literal

from .errors import nearest, warn

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


def is_better(value: float, best: float | None, direction: Literal["min", "max"]) -> bool:
    """Return whether a value is better than the best so far, or the first one; NaN never is.

    Example:
        >>> is_better(0.5, None, "min"), is_better(0.5, 0.4, "min"), is_better(0.5, 0.4, "max")
        (True, False, True)
    """
    sign = 1 if direction == "min" else -1
    return not math.isnan(value) and (best is None or sign * value < sign * best)


def of_evaluation(monitor: object) -> bool:
    """Return whether a metric has a value only after an evaluation."""
    return isinstance(monitor, str) and monitor.startswith("eval/")


class Monitors:
    """Warns of metrics that somebody in the fit looks at and that do not come: each once, as soon as it is known.

    Args:
        algorithms: Those of the fit; one that looks at a metric has its name as ``monitor``.
        saving: The metric by which checkpoints are judged.
        metrics: Names of the metrics that an evaluation measures.
        evaluated: Whether there are evaluations.
    """

    def __init__(
        self, algorithms: Iterable[object], saving: str | None, metrics: Iterable[str], *, evaluated: bool
    ) -> None:
        self._ours = all(type(each).__module__.startswith("thawline.") for each in algorithms)
        self._waiting = {getattr(each, "owner", ""): getattr(each, "monitor", None) for each in algorithms}
        self._saving = saving
        self._metrics = list(metrics)
        self._evaluated = evaluated

    def begin(self) -> bool:
        """Warn at the start of the fit of what is known then; return whether the metric of the checkpoints is among it."""
        watched = self._waiting | {"Checkpointing": self._saving}
        if not self._evaluated:
            for doubt in never_measured(watched, self._metrics):
                warn(doubt)
            self._waiting = {owner: name for owner, name in self._waiting.items() if not of_evaluation(name)}
            return False
        # What an algorithm of the user's own logs is not known before.
        doubts = dict(misspelled(watched, self._metrics)) if self._ours else {}
        for owner, doubt in doubts.items():
            warn(doubt)
            self._waiting.pop(owner, None)
        return "Checkpointing" in doubts

    def end_epoch(self, logged: Mapping[str, float]) -> None:
        """Warn of what was not logged in an epoch that had an evaluation, where there are any."""
        if not self._waiting or (self._evaluated and not any(map(of_evaluation, logged))):
            return
        for owner, name in self._waiting.items():
            if isinstance(name, str) and name not in logged:
                missing = missing_metric(name, logged, call=f"{owner}(monitor=)")
                warn(f"{missing}. If an algorithm of your own logs it later, ignore this.")
        self._waiting = {}


def never_measured(monitors: Mapping[str, str | None], metrics: Iterable[str]) -> Iterator[str]:
    """Yield what waits in vain in a fit without evaluations.

    Args:
        monitors: By who looks at it, the metric that is looked at, or None.
        metrics: Names of the metrics that an evaluation would measure.
    """
    write = "Write: trainer.fit(model, train_loader, eval_loader, duration=…)"
    if watching := [owner for owner, monitor in monitors.items() if of_evaluation(monitor)]:
        verb = "monitors" if len(watching) == 1 else "monitor"
        yield f"{', '.join(watching)} {verb} an evaluation, and there is no eval_loader: it will never act. {write}"
    if names := list(metrics):
        yield f"there is no eval_loader to measure {', '.join(map(repr, names))} on, which metrics= asks for. {write}"


def misspelled(monitors: Mapping[str, str | None], metrics: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield who looks at a metric that no fit logs by itself, and what to say of it.

    Args:
        monitors: By who looks at it, the metric that is looked at, or None.
        metrics: Names of the metrics that an evaluation measures.

    Example:
        >>> dict(misspelled({"EarlyStop": "val_loss", "Mine": "grad_norm"}, ["accuracy"]))
        {'EarlyStop': "nothing in this fit logs 'val_loss', which EarlyStop monitors. Write: 'eval/loss'"}
    """
    known = ["eval/loss", "train/loss", *(f"eval/{name}" for name in metrics)]
    for owner, monitor in monitors.items():
        if monitor is None or monitor in known:
            continue
        close = get_close_matches(monitor, known, n=1)
        if close or monitor.startswith(("eval/", "train/")):
            meant = nearest(monitor, known, count=1)
            yield owner, f"nothing in this fit logs {monitor!r}, which {owner} monitors. Write: {meant}"


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
