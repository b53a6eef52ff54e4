"""Gradual unfreezing: the head first, then a layer from the top at each interval."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import attrs
from typing_extensions import override

from ..engine import (
    Algorithm,
    ArgumentError,
    Event,
    LayerError,
    LayerMap,
    Stage,
    State,
    ThawlineWarning,
    Time,
    get_logger,
    nearest,
    register,
)
from .arguments import as_time, as_time_or_none, flag, one_of, positive, whole

Start: TypeAlias = str | int | Sequence[str]
Order: TypeAlias = Literal["top", "bottom"] | Sequence[str]
log = get_logger(__name__)


def thaw_order(layers: LayerMap, *, order: Order = "top", stem: bool = True) -> tuple[str, ...]:
    """Return the layers below the head in the order in which they thaw.

    Args:
        layers: The model's layers.
        order: ``"top"`` begins beside the head, ``"bottom"`` beside the input; a list names the layers.
        stem: Whether the stem (embeddings) thaws as well, always after the blocks.

    Raises:
        ArgumentError: A list names a layer that the model does not have.

    Example:
        >>> from torch import nn
        >>> thaw_order(LayerMap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))))
        ('blocks[1]', 'blocks[0]')
    """
    body = [layer.name for layer in layers if layer.name not in ("stem", "head")]
    if not isinstance(order, str):
        for name in order:
            if name not in layers.names:
                raise ArgumentError(
                    "LayerThaw(order=)", got=name, takes=f"layers of this model, such as {nearest(name, layers.names)}",
                    example=f"LayerThaw(order={body[::-1][:2]})",
                )  # fmt: skip
        return tuple(order)
    below = ["stem"] if stem and layers.stem.parameters else []
    return (*(body[::-1] if order == "top" else body), *below)


def cannot_fire(every: Time, state: State) -> bool:
    """Return whether the fit is known to end before ``every`` has passed once."""
    duration, length = state.duration, state.clock.batches_per_epoch
    if every.unit == "dur":
        return every.value >= 1
    if every.unit == duration.unit:
        return every.value >= duration.value
    batches = {"ba": 1, "ep": length}
    if length and every.unit in batches and duration.unit in batches:
        return every.value * batches[every.unit] >= duration.value * batches[duration.unit]
    return False


def _is_start(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    listed = isinstance(value, Sequence) and bool(value) and all(isinstance(each, str) for each in value)
    if isinstance(value, bool) or not (listed or (isinstance(value, int) and value >= 0)):
        raise ArgumentError(
            "LayerThaw(start=)", got=value, takes="'head', a number of blocks beside it, or selectors",
            example="LayerThaw(start='head')",
        )  # fmt: skip


def _is_order(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    listed = not isinstance(value, str) and isinstance(value, Sequence) and all(isinstance(each, str) for each in value)
    if value not in ("top", "bottom") and not (listed and value):
        raise ArgumentError(
            "LayerThaw(order=)",
            got=value,
            takes="'top', 'bottom' or a list of layers",
            example="LayerThaw(order='top')",
        )


@register
@attrs.define(slots=False, eq=False)
class LayerThaw(Algorithm):
    """Freeze everything but the head, then release one layer at each interval.

    The k-th layer released trains at its learning rate times ``lr_scale ** k``. What other owners hold stays
    frozen: beside LoRAInject, which holds the base weights, a released block trains its adapters.

    Args:
        every: The interval: an int is epochs; in epochs it acts at EPOCH_START, else at BATCH_START.
        start: What trains from the beginning: ``"head"``, a number of blocks beside the head, or selectors.
        limit: How many layers are released at most; None for all.
        lr_scale: Factor from each released layer to the next.
        order: ``"top"`` (the block beside the head first), ``"bottom"``, or a list of layers.
        warmup: The rate of a released layer rises from zero over this time.
        moments: Whether the optimizer's state of what is frozen is dropped or kept.
        stem: Whether embeddings are released, after the last block.

    Raises:
        ArgumentError: An argument of the wrong type or out of range.

    Source: Howard and Ruder, ULMFiT, arXiv:1801.06146, section 3.3; lr_scale=1/2.6 is theirs.

    Example:
        >>> LayerThaw(every=2, lr_scale=1 / 2.6, limit=3).describe()["arguments"]["limit"]
        3
    """

    stage: ClassVar[Stage] = Stage.TRAINABILITY

    every: Time = attrs.field(default=Time(1), converter=as_time("LayerThaw(every=)", example="LayerThaw(every=2)"))
    start: Start = attrs.field(default="head", validator=_is_start)
    limit: int | None = attrs.field(default=None, validator=whole(at_least=0, or_none=True, example=3))
    lr_scale: float = attrs.field(default=0.5, validator=positive())
    order: Order = attrs.field(default="top", validator=_is_order)
    warmup: Time | None = attrs.field(
        default=None, converter=as_time_or_none("LayerThaw(warmup=)", example="LayerThaw(warmup='50ba')")
    )
    moments: Literal["drop", "keep"] = attrs.field(default="drop", validator=one_of(("drop", "keep")))
    stem: bool = attrs.field(default=True, validator=flag())
    thawed: int = attrs.field(default=0, init=False)

    @property
    def events(self) -> frozenset[Event]:  # type: ignore[override]  # depends on the arguments, as the contract allows
        """FIT_START, and where an interval can end."""
        return frozenset({Event.FIT_START, Event.EPOCH_START if self.every.unit == "ep" else Event.BATCH_START})

    @override
    def apply(self, event: Event, state: State) -> None:
        """Hold everything but the start, or release what is due."""
        if event is Event.FIT_START:
            self._begin(state)
        else:
            self._release(state)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return how many layers were released."""
        return {"thawed": self.thawed}

    @override
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back how many layers were released."""
        self.thawed = int(saved["thawed"])

    def _begin(self, state: State) -> None:
        ledger, layers = state.ledger, state.layers
        if len(layers) < 2:
            raise LayerError(
                f"LayerThaw needs layers below the head, and all parameters lie in one:\n{layers}\nPass them: "
                "trainer.fit(…, layers={'stem': 'embeddings', 'blocks': 'encoder.layer.*', 'head': 'classifier'})"
            )
        start = self._started(layers)
        for layer in layers:
            if layer.name not in start:
                ledger.freeze(layer.name, owner=self.owner, moments=self.moments)
        if isinstance(self.start, int) or set(start) == {self.start}:
            pass
        else:
            ledger.thaw(self.start, owner=self.owner)
        if cannot_fire(self.every, state):
            warnings.warn(
                f"LayerThaw(every='{self.every}') releases nothing within {state.duration}: only {self.start!r} will "
                f"train. Write a shorter interval, such as LayerThaw(every='0.2dur').",
                ThawlineWarning,
                stacklevel=2,
            )

    def _release(self, state: State) -> None:
        order = self._waiting(state.layers)
        due = min(self.every.count(state.clock), len(order))
        while self.thawed < due:
            layer = order[self.thawed]
            self.thawed += 1
            if self.lr_scale != 1.0:
                state.ledger.scale(layer, self.lr_scale**self.thawed, owner=self.owner)
            state.ledger.thaw(layer, owner=self.owner, warmup=self.warmup)
            log.info("thawed", layer=layer, epoch=state.clock.epoch, batch=state.clock.batch)

    def _started(self, layers: LayerMap) -> tuple[str, ...]:
        """Return the layers that train from the beginning as a whole."""
        if isinstance(self.start, int):
            beside = [layer.name for layer in layers.blocks][len(layers.blocks) - self.start :] if self.start else []
            return ("head", *beside)
        wanted = [self.start] if isinstance(self.start, str) else self.start
        return tuple(layer.name for part in wanted if layers.names_layer(part) for layer in layers[part])

    def _waiting(self, layers: LayerMap) -> tuple[str, ...]:
        """Return the layers that are released one by one."""
        start = self._started(layers)
        order = [name for name in thaw_order(layers, order=self.order, stem=self.stem) if name not in start]
        return tuple(order if self.limit is None else order[: self.limit])
