"""What is seen while a phase runs: whether it is over, and at which weights it was best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs

from ..engine import ArgumentError, Event, State, direction_of, nearest
from .best_weights import BestWeights
from .early_stop import improved
from .phases import Phase, Plateau, Until


@attrs.define(eq=False)
class PhaseWatch:
    """Looks at metrics and functions that end a phase, and keeps its best weights.

    Args:
        over: Whether the phase is to end; it ends between two steps.
        best: The best value of the plateau's metric so far.
        bad: Evaluations since then without improvement.
        weights: The weights at the best value of the metric that the phase restores by.
    """

    over: bool = False
    best: float | None = None
    bad: int = 0
    weights: BestWeights = attrs.field(factory=BestWeights)

    def look(self, event: Event, state: State, phase: Phase, until: Until) -> None:
        """Look at what the event shows.

        Args:
            event: BATCH_END, EVAL_END or EPOCH_END.
            state: The state.
            phase: The running phase.
            until: What ends it; None where nothing does.

        Raises:
            ArgumentError: A metric that nobody logged.
        """
        if self.over:
            return
        if phase.restore and is_seen(name := restores_by(phase), event):
            value = metric(name, event, state)
            if value is not None:
                self.weights.watch(value, state, mode=_direction(phase, name))
        if isinstance(until, Plateau) and is_seen(until.monitor, event):
            value = metric(until.monitor, event, state)
            if value is not None:
                self._judge(value, until)
        if callable(until) and event is not Event.EVAL_END:
            said = until(state)
            try:
                self.over = bool(said)
            except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor of several
                takes = "a function that returns True or False"
                example = "Phase(thaw='head', until=lambda state: state.metrics.get('eval/loss', 1.0) < 0.1)"
                raise ArgumentError("Phase(until=)", got=said, takes=takes, example=example) from error

    def _judge(self, value: float, plateau: Plateau) -> None:
        if improved(value, self.best, mode=direction_of(plateau.monitor, plateau.mode), min_delta=plateau.min_delta):
            self.best, self.bad = value, 0
            return
        self.bad += 1
        self.over = self.bad >= plateau.patience

    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors and JSON."""
        return {"over": self.over, "best": self.best, "bad": self.bad, "weights": self.weights.state_dict()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.over, self.best, self.bad = saved["over"], saved["best"], saved["bad"]
        self.weights.load_state_dict(saved["weights"])


def is_seen(monitor: str, event: Event) -> bool:
    """Return whether a metric is new at ``event``: one of training at EPOCH_END, another at EVAL_END."""
    return event is (Event.EPOCH_END if monitor.startswith("train/") else Event.EVAL_END)


def restores_by(phase: Phase) -> str:
    """Return the metric that says which weights are best."""
    return phase.restore_monitor or (phase.until.monitor if isinstance(phase.until, Plateau) else "eval/loss")


def monitors(phase: Phase) -> list[str]:
    """Return the metrics that a phase looks at."""
    watched = [phase.until.monitor] if isinstance(phase.until, Plateau) else []
    return [*watched, restores_by(phase)] if phase.restore else watched


def metric(name: str, event: Event, state: State) -> float | None:
    """Return a metric; None where nothing at all was measured, as in a plan or a loop of one's own.

    Raises:
        ArgumentError: Others were measured, and not this one.
    """
    if name in state.metrics:
        return state.metrics[name]
    logged = sorted(state.metrics)
    if event is Event.EPOCH_END:
        logged = [each for each in logged if each.startswith("train/")]
    if not logged:
        return None
    raise ArgumentError(
        "Plateau(monitor=)",
        got=name,
        takes=f"metrics that are logged by then: {', '.join(map(repr, sorted(state.metrics)))}",
        example=f"Plateau({nearest(name, logged, count=1)})",
    )


def _direction(phase: Phase, monitor: str) -> Literal["min", "max"]:
    plateau = phase.until
    mode = plateau.mode if isinstance(plateau, Plateau) and plateau.monitor == monitor else "auto"
    return direction_of(monitor, mode)
