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

    Example:
        >>> import torch
        >>> from thawline.engine import ParameterLedger
        >>> model = torch.nn.Linear(2, 1)
        >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters(), lr=0.1)))
        >>> phase, watch = Phase(thaw="head", until=Plateau("eval/loss", patience=2), restore="best"), PhaseWatch()
        >>> for loss in (0.5, 0.4, 0.6, 0.4, 0.3):
        ...     state.metrics["eval/loss"] = loss
        ...     watch.look(Event.EVAL_END, state, phase, phase.until)
        ...     print(watch.best, watch.bad, watch.over, watch.weights.value)
        0.5 0 False 0.5
        0.4 0 False 0.4
        0.4 1 False 0.4
        0.4 2 True 0.4
        0.4 2 True 0.4
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

        Example:
            >>> import torch
            >>> from thawline.engine import ParameterLedger
            >>> model = torch.nn.Linear(2, 1)
            >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters(), lr=0.1)))
            >>> watch, phase = PhaseWatch(), Phase(thaw="head", until=lambda state: torch.tensor(True))
            >>> for event in (Event.EVAL_END, Event.BATCH_END):
            ...     watch.look(event, state, phase, phase.until)
            ...     print(watch.over)
            False
            True
            >>> PhaseWatch().look(Event.BATCH_END, state, phase, lambda state: torch.ones(2))
            Traceback (most recent call last):
            thawline.engine.errors.ArgumentError: Phase(until=) takes a function that returns True or False, got tensor([1., 1.]). ...
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
        """Count an evaluation; the phase is over where too many in a row were no better.

        Example:
            >>> watch = PhaseWatch()
            >>> for loss in (0.5, 0.4, 0.2, 0.2):
            ...     watch._judge(loss, Plateau("eval/loss", patience=1, min_delta=0.1))
            ...     print(watch.best, watch.bad, watch.over)
            0.5 0 False
            0.5 1 True
            0.2 0 True
            0.2 1 True
        """
        if improved(value, self.best, mode=direction_of(plateau.monitor, plateau.mode), min_delta=plateau.min_delta):
            self.best, self.bad = value, 0
            return
        self.bad += 1
        self.over = self.bad >= plateau.patience

    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors and JSON.

        Example:
            >>> PhaseWatch(over=True, best=0.5, bad=2).state_dict()
            {'over': True, 'best': 0.5, 'bad': 2, 'weights': {'value': None, 'tensors': {}}}
        """
        return {"over": self.over, "best": self.best, "bad": self.bad, "weights": self.weights.state_dict()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Example:
            >>> watch = PhaseWatch()
            >>> watch.load_state_dict(PhaseWatch(over=True, best=0.5, bad=2, weights=BestWeights(0.4)).state_dict())
            >>> watch
            PhaseWatch(over=True, best=0.5, bad=2, weights=BestWeights(value=0.4, tensors={}))
        """
        self.over, self.best, self.bad = saved["over"], saved["best"], saved["bad"]
        self.weights.load_state_dict(saved["weights"])


def is_seen(monitor: str, event: Event) -> bool:
    """Return whether a metric is new at ``event``: one of training at EPOCH_END, another at EVAL_END.

    Example:
        >>> [is_seen("train/loss", event) for event in (Event.EPOCH_END, Event.EVAL_END)]
        [True, False]
        >>> [is_seen("eval/loss", event) for event in (Event.EPOCH_END, Event.EVAL_END)]
        [False, True]
    """
    return event is (Event.EPOCH_END if monitor.startswith("train/") else Event.EVAL_END)


def restores_by(phase: Phase) -> str:
    """Return the metric that says which weights are best.

    Example:
        >>> restores_by(Phase(thaw="head", restore="best"))
        'eval/loss'
        >>> restores_by(Phase(thaw="head", until=Plateau("eval/accuracy"), restore="best"))
        'eval/accuracy'
        >>> restores_by(Phase(thaw="head", until=Plateau("eval/accuracy"), restore="best", restore_monitor="eval/f1"))
        'eval/f1'
    """
    return phase.restore_monitor or (phase.until.monitor if isinstance(phase.until, Plateau) else "eval/loss")


def monitors(phase: Phase) -> list[str]:
    """Return the metrics that a phase looks at.

    Example:
        >>> monitors(Phase(thaw="head")), monitors(Phase(thaw="head", until="2ep", restore="best"))
        ([], ['eval/loss'])
        >>> monitors(Phase(thaw="head", until=Plateau("eval/accuracy"), restore="best", restore_monitor="eval/f1"))
        ['eval/accuracy', 'eval/f1']
    """
    watched = [phase.until.monitor] if isinstance(phase.until, Plateau) else []
    return [*watched, restores_by(phase)] if phase.restore else watched


def metric(name: str, event: Event, state: State) -> float | None:
    """Return a metric; None where nothing at all was measured, as in a plan or a loop of one's own.

    Raises:
        ArgumentError: Others were measured, and not this one.

    Example:
        >>> import torch
        >>> from thawline.engine import ParameterLedger
        >>> model = torch.nn.Linear(2, 1)
        >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters(), lr=0.1)))
        >>> metric("eval/loss", Event.EVAL_END, state)  # nothing was measured yet
        >>> state.metrics["eval/loss"] = 0.5
        >>> metric("eval/loss", Event.EVAL_END, state)
        0.5
        >>> metric("train/loss", Event.EPOCH_END, state)  # none of training
        >>> metric("eval/los", Event.EVAL_END, state)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Plateau(monitor=) takes metrics that are logged by then: 'eval/loss', got 'eval/los'. ...
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
    """Return which way a metric improves: the plateau's own mode counts for the plateau's metric alone.

    Example:
        >>> phase = Phase(thaw="head", until=Plateau("eval/loss", mode="max"), restore="best")
        >>> _direction(phase, "eval/loss"), _direction(phase, "eval/perplexity"), _direction(phase, "eval/accuracy")
        ('max', 'min', 'max')
    """
    plateau = phase.until
    mode = plateau.mode if isinstance(plateau, Plateau) and plateau.monitor == monitor else "auto"
    return direction_of(monitor, mode)
