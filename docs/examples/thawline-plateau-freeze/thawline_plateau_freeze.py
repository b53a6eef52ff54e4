"""Freeze the next layer from the input each time a metric no longer improves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import attrs

from thawline.engine import Algorithm, ArgumentError, Event, Stage, State, register


def _patience(_instance: object, _attribute: object, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        takes, example = "a whole number, 1 or above", "PlateauFreeze(patience=2)"
        raise ArgumentError("PlateauFreeze(patience=)", got=value, takes=takes, example=example)


def _monitor(_instance: object, _attribute: object, value: object) -> None:
    if not isinstance(value, str) or not value:
        example = "PlateauFreeze(monitor='eval/loss')"
        raise ArgumentError("PlateauFreeze(monitor=)", got=value, takes="the name of a metric", example=example)


@register
@attrs.define(slots=False, eq=False)
class PlateauFreeze(Algorithm):
    """Freezes the next layer from the input when a metric has not become smaller for some evaluations; the head never.

    Args:
        monitor: The metric, smaller being better.
        patience: Evaluations without improvement.

    Raises:
        ArgumentError: An argument of the wrong type or out of range.
    """

    events = frozenset({Event.EVAL_END, Event.BATCH_START})
    stage: ClassVar[Stage] = Stage.TRAINABILITY

    monitor: str = attrs.field(default="eval/loss", validator=_monitor)
    patience: int = attrs.field(default=2, validator=_patience)
    best: float | None = attrs.field(default=None, init=False)
    bad: int = attrs.field(default=0, init=False)
    due: int = attrs.field(default=0, init=False)
    frozen: int = attrs.field(default=0, init=False)

    def match(self, event: Event, state: State) -> bool:
        """Return whether there is a metric to look at, or a layer to freeze."""
        return self.monitor in state.metrics if event is Event.EVAL_END else self.due > self.frozen

    def apply(self, event: Event, state: State) -> None:
        """Decide at EVAL_END, where the ledger is closed; freeze at the next BATCH_START."""
        layers = [layer.name for layer in state.layers if layer.name != "head"]
        if event is Event.EVAL_END:
            value = state.metrics[self.monitor]
            if self.best is None or value < self.best:
                self.best, self.bad = value, 0
                return
            self.bad += 1
            if self.bad >= self.patience:
                self.bad, self.due = 0, min(self.due + 1, len(layers))
        else:
            state.ledger.freeze(layers[: self.due], owner=self.owner)
            self.frozen = self.due

    def state_dict(self) -> dict[str, Any]:
        """Return what changes during a fit."""
        return {"best": self.best, "bad": self.bad, "due": self.due, "frozen": self.frozen}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take it back."""
        self.best, self.bad, self.due, self.frozen = (saved[name] for name in ("best", "bad", "due", "frozen"))
