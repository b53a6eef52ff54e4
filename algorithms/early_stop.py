"""Early stopping: end the fit when a metric no longer improves."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import attrs
from typing_extensions import override

from ..engine import (
    Algorithm,
    ArgumentError,
    Event,
    Stage,
    State,
    Time,
    direction_of,
    get_logger,
    nearest,
    register,
)
from .arguments import check_time, check_whole, flag, in_range, one_of, text

log = get_logger(__name__)
_EXAMPLE = "EarlyStop('eval/loss', patience=3)"
# Elapsed times are floats: 0.3 - 0.2 is a little less than 0.1.
_TOLERANCE = 1e-9


def improved(value: float, best: float | None, *, mode: Literal["min", "max"], min_delta: float = 0.0) -> bool:
    """Return whether ``value`` is better than ``best`` by more than ``min_delta``.

    Args:
        value: The new value. NaN, and infinity on the wrong side, are never better.
        best: The best so far; None for none yet, which any other number beats.
        mode: ``"min"`` where smaller is better, ``"max"`` where larger is.
        min_delta: A change this small does not count.

    Example:
        >>> improved(0.9, 1.0, mode="min"), improved(0.9, 1.0, mode="min", min_delta=0.2)
        (True, False)
        >>> improved(0.75, 1.0, mode="min", min_delta=0.25), improved(0.5, 0.25, mode="max", min_delta=0.25)
        (False, False)
        >>> improved(0.5, 0.25, mode="max", min_delta=0.2), improved(-9.0, None, mode="max")
        (True, True)
        >>> improved(float("nan"), None, mode="min"), improved(math.inf, None, mode="min")
        (False, False)
    """
    if mode == "min":
        return value < (math.inf if best is None else best) - min_delta
    return value > (-math.inf if best is None else best) + min_delta


def _patience(value: object) -> int | Time:
    """Return so many evaluations, or a time.

    Example:
        >>> _patience(1), _patience("2ep"), _patience(Time("5ba"))
        (1, Time('2ep'), Time('5ba'))
        >>> _patience(0)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: EarlyStop(patience=) takes a whole number, 1 or above, got 0. Write: EarlyStop('eval/loss', patience=3)
    """
    if isinstance(value, (str, Time)):
        return check_time("EarlyStop(patience=)", value, example="EarlyStop('eval/loss', patience='2ep')")
    return check_whole("EarlyStop(patience=)", value, at_least=1, example=_EXAMPLE)


@register
@attrs.define(slots=False, eq=False)
class EarlyStop(Algorithm):
    """Stops the fit once a metric has not improved for ``patience``.

    Looks at ``state.metrics[monitor]`` after each evaluation, for a name that begins with ``"train/"`` after each epoch.
    The first value, if it is a number, is the first best. NaN is never an improvement, so a run whose metric is NaN
    stops as well. The best value and the patience that is used up are saved: a resumed run stops where the
    uninterrupted one does.

    Args:
        monitor: The metric, such as ``"eval/loss"``.
        patience: An int: so many evaluations in a row without improvement. A time, such as ``"2ep"`` or ``"500ba"``: so
            long since the last one, seen at an evaluation.
        min_delta: An improvement is better than the best so far by more than this.
        mode: ``"min"`` where smaller is better, ``"max"`` where larger is; ``"auto"`` is ``"max"`` for names with a word
            such as accuracy, f1, auc, precision, recall, iou, bleu or score, else ``"min"``.
        reset_on_change: Start anew, without a best, at the first evaluation after what trains changed: a thawed block
            gets the whole patience, and a loss that a thaw has raised is not held against it.

    Raises:
        ArgumentError: An argument of the wrong type or out of range; at the first evaluation, a monitor that nobody logged.

    Example:
        >>> import torch
        >>> from thawline.engine import Trainer
        >>> from thawline.engine.testing import tiny_loader, tiny_models
        >>> trainer = Trainer(loss_fn=torch.nn.functional.cross_entropy, algorithms=[EarlyStop(patience=2, min_delta=9.0)])
        >>> result = trainer.fit(tiny_models()["residual"](), tiny_loader(), tiny_loader(), duration="9ep")
        >>> result.stop_reason, len(result.history)
        ('early stop: eval/loss has not improved on ... for 2 evaluations', 3)
        >>> EarlyStop()
        EarlyStop(monitor='eval/loss', patience=3, min_delta=0.0, mode='auto', reset_on_change=True)
        >>> EarlyStop("eval/loss").events == {Event.EVAL_END}, EarlyStop("train/loss").events == {Event.EPOCH_END}
        (True, True)
    """

    stage: ClassVar[Stage] = Stage.CONTROL

    monitor: str = attrs.field(default="eval/loss", validator=text(example="eval/loss"))
    patience: int | Time = attrs.field(default=3, converter=_patience)
    min_delta: float = attrs.field(default=0.0, validator=in_range(at_least=0))
    mode: Literal["auto", "min", "max"] = attrs.field(default="auto", validator=one_of(("auto", "min", "max")))
    reset_on_change: bool = attrs.field(default=True, validator=flag())

    events: frozenset[Event] = attrs.field(init=False, repr=False)
    best: float | None = attrs.field(init=False, default=None, repr=False)
    """The best value since the start, or since what trains changed."""
    bad: int = attrs.field(init=False, default=0, repr=False)
    """Evaluations since then without improvement."""
    _since: float | None = attrs.field(init=False, default=None, repr=False)
    _trainable: str | None = attrs.field(init=False, default=None, repr=False)
    _version: int | None = attrs.field(init=False, default=None, repr=False)

    def __attrs_post_init__(self) -> None:
        of_training = self.monitor.startswith("train/")
        self.events = frozenset({Event.EPOCH_END if of_training else Event.EVAL_END})

    @property
    def direction(self) -> Literal["min", "max"]:
        """``"min"`` or ``"max"``: the mode, ``"auto"`` resolved.

        Example:
            >>> EarlyStop().direction, EarlyStop("eval/accuracy").direction, EarlyStop("eval/accuracy", mode="min").direction
            ('min', 'max', 'min')
        """
        return direction_of(self.monitor, self.mode)

    @override
    def apply(self, event: Event, state: State) -> None:
        """Look at the metric, and stop the fit where it has not improved for long enough.

        Example:
            >>> import torch
            >>> from thawline.engine import Clock, ParameterLedger
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
            >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters())))
            >>> def bad_after(algorithm, *losses):
            ...     state.stop_reason = None
            ...     for epoch, loss in enumerate(losses):
            ...         state.clock, state.metrics["eval/loss"] = Clock(epoch=epoch), loss
            ...         algorithm.apply(Event.EVAL_END, state)
            ...     return algorithm.bad, state.stop_reason
            >>> stopping = EarlyStop(patience=2)
            >>> bad_after(stopping, 1.0, 1.5, 0.5, 0.5)
            (1, None)
            >>> state.ledger.freeze("0.*", owner="me")
            >>> bad_after(stopping, 9.0, 9.5)  # what trains changed: 9.0 is the first best
            (1, None)
            >>> bad_after(stopping, 9.0)
            (2, 'early stop: eval/loss has not improved on 9 for 2 evaluations')
            >>> bad_after(EarlyStop(patience="2ep"), 1.0, 0.5, 0.7)
            (1, None)
            >>> bad_after(EarlyStop(patience="2ep"), 1.0, 0.5, 0.7, 0.5)
            (2, 'early stop: eval/loss has not improved on 0.5 for 2ep')
            >>> bad_after(EarlyStop(patience=1), math.nan)
            (1, 'early stop: eval/loss is no number for 1 evaluation')
        """
        value = self._value(state)
        if self._changed(state):
            self.best, self.bad, self._since = None, 0, None
        elapsed = self.patience.elapsed(state.clock) if isinstance(self.patience, Time) else 0.0
        if improved(value, self.best, mode=self.direction, min_delta=self.min_delta):
            self.best, self.bad, self._since = value, 0, elapsed
            return
        self.bad += 1
        self._since = elapsed if self._since is None else self._since
        if self._exhausted(elapsed - self._since):
            best = "is no number" if self.best is None else f"has not improved on {self.best:.6g}"
            spent = self._occasions(self.bad) if isinstance(self.patience, int) else str(self.patience)
            state.stop(f"early stop: {self.monitor} {best} for {spent}")
            log.info("early stop", owner=self.owner, monitor=self.monitor, best=self.best, bad=self.bad)

    @override
    def unplanned(self) -> str:
        """Return when it may stop the fit.

        Example:
            >>> EarlyStop("train/loss", patience=3).unplanned(), EarlyStop(patience="2ep").unplanned()
            ('may stop the fit when train/loss has not improved for 3 epochs', 'may stop the fit when eval/loss has not improved for 2ep')
        """
        spent = self._occasions(self.patience) if isinstance(self.patience, int) else str(self.patience)
        return f"may stop the fit when {self.monitor} has not improved for {spent}"

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "bad": self.bad, "since": self._since, "trainable": self._trainable}

    @override
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.best, self.bad = saved["best"], saved["bad"]
        self._since, self._trainable, self._version = saved["since"], saved["trainable"], None

    def _occasions(self, count: int) -> str:
        """Return so many of what the metric is looked at after.

        Example:
            >>> EarlyStop()._occasions(1), EarlyStop("train/loss")._occasions(3)
            ('1 evaluation', '3 epochs')
        """
        return f"{count} {'epoch' if self.monitor.startswith('train/') else 'evaluation'}{'s' * (count != 1)}"

    def _value(self, state: State) -> float:
        """Return the metric's latest value.

        Example:
            >>> import torch
            >>> from thawline.engine import ParameterLedger
            >>> model = torch.nn.Linear(2, 1)
            >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters())))
            >>> state.metrics["eval/loss"] = 0.5
            >>> EarlyStop()._value(state)
            0.5
            >>> EarlyStop("eval/los", patience="2ep")._value(state)
            Traceback (most recent call last):
            thawline.engine.errors.ArgumentError: EarlyStop(monitor=) takes a metric that is logged by then: 'eval/loss', got 'eval/los'. Write: EarlyStop('eval/loss', patience='2ep')
        """
        value = state.metrics.get(self.monitor)
        if value is None:
            logged = sorted(state.metrics)
            patience = self.patience if isinstance(self.patience, int) else str(self.patience)
            raise ArgumentError(
                "EarlyStop(monitor=)",
                got=self.monitor,
                takes=f"a metric that is logged by then: {', '.join(map(repr, logged)) or 'none was'}",
                example=f"EarlyStop({nearest(self.monitor, logged or ['eval/loss'], count=1)}, patience={patience!r})",
            )
        return value

    def _changed(self, state: State) -> bool:
        """Return whether what trains is not what trained at the last evaluation.

        Example:
            >>> import torch
            >>> from thawline.engine import ParameterLedger
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
            >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters())))
            >>> stopping, never = EarlyStop(), EarlyStop(reset_on_change=False)
            >>> stopping._changed(state), never._changed(state)
            (False, False)
            >>> state.ledger.freeze("0.*", owner="me")
            >>> stopping._changed(state), stopping._changed(state), never._changed(state)
            (True, False, False)
            >>> state.ledger.scale("2.*", 0.5, owner="me")  # another rate for the same
            >>> stopping._changed(state)
            False
        """
        if not self.reset_on_change or state.ledger.version == self._version:
            return False
        before, self._version = self._trainable, state.ledger.version
        names = "\n".join(sorted(state.ledger.trainable))
        self._trainable = hashlib.sha256(names.encode()).hexdigest()
        return before is not None and before != self._trainable

    def _exhausted(self, elapsed: float) -> bool:
        """Return whether the patience is used up, so long after the last improvement.

        Example:
            >>> waiting = EarlyStop(patience="0.1dur")
            >>> waiting._exhausted(0.09), waiting._exhausted(0.3 - 0.2)
            (False, True)
        """
        if isinstance(self.patience, Time):
            return elapsed >= self.patience.value - _TOLERANCE
        return self.bad >= self.patience
