"""Gradual unfreezing: the head first, then a layer from the top at each interval."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import attrs
from typing_extensions import override

from ..engine import (
    Algorithm,
    ArgumentError,
    Clock,
    Event,
    LayerError,
    LayerMap,
    ParameterLedger,
    Stage,
    State,
    Time,
    get_logger,
    nearest,
    register,
    warn,
)
from .arguments import check_time, flag, one_of, positive, whole
from .train_only import LEFT_OUT, all_but, warn_of_left_out

Start: TypeAlias = str | int | Sequence[str]
Order: TypeAlias = Literal["top", "bottom", "together"] | Sequence[str]
log = get_logger(__name__)


def thaw_order(layers: LayerMap, *, order: Order = "top", stem: bool = True) -> tuple[str, ...]:
    """Return the layers below the head in the order in which they thaw.

    Args:
        layers: The model's layers.
        order: ``"top"`` and ``"together"`` begin beside the head, ``"bottom"`` beside the input; a list names the layers,
            slices of blocks included.
        stem: Whether the stem (embeddings) thaws as well, always after the blocks; a list decides itself.

    Raises:
        ArgumentError: A list names a layer twice, or one that the model does not have.
        SelectorError: A list names a block that the model does not have.

    Example:
        >>> from torch import nn
        >>> layers = LayerMap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
        >>> thaw_order(layers), thaw_order(layers, order=["blocks[0]", "blocks[-1]"])
        (('blocks[1]', 'blocks[0]'), ('blocks[0]', 'blocks[1]'))
        >>> layers = LayerMap(nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]), {"stem": "0", "blocks": ["1", "2"], "head": "3"})
        >>> thaw_order(layers), thaw_order(layers, order="bottom"), thaw_order(layers, stem=False)
        (('blocks[1]', 'blocks[0]', 'stem'), ('blocks[0]', 'blocks[1]', 'stem'), ('blocks[1]', 'blocks[0]'))
        >>> thaw_order(layers, order=["blocks[0:2]", "blocks[-1]"])
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: LayerThaw(order=) takes each layer once, got ['blocks[0:2]', 'blocks[-1]']. Write: LayerThaw(order=['blocks[1]', 'blocks[0]'])
        >>> thaw_order(layers, order=["steam"])
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: LayerThaw(order=) takes layers of this model, such as 'stem', ...
    """
    body = [layer.name for layer in layers if layer.name not in ("stem", "head")]
    if isinstance(order, str):
        below = ["stem"] if stem and layers.stem.parameters else []
        return (*(body if order == "bottom" else body[::-1]), *below)
    example = f"LayerThaw(order={body[::-1][:2]})"
    for name in order:
        if not layers.names_layer(name):
            takes = f"layers of this model, such as {nearest(name, [layer.name for layer in layers])}"
            raise ArgumentError("LayerThaw(order=)", got=name, takes=takes, example=example)
    named = [layer.name for text in order for layer in layers[text] if layer.parameters]
    if len(set(named)) < len(named):
        raise ArgumentError("LayerThaw(order=)", got=list(order), takes="each layer once", example=example)
    return tuple(named)


def thawed_count(clock: Clock, every: Time, layers: int) -> int:
    """Return how many of ``layers`` layers are released at ``clock``: one more each ``every``.

    Example:
        >>> [thawed_count(Clock(epoch=epoch), Time("2ep"), 3) for epoch in range(8)]
        [0, 0, 1, 1, 2, 2, 3, 3]
    """
    return min(every.count(clock), layers)


def merged(steps: Iterable[Sequence[str]], idle: Collection[str]) -> tuple[tuple[str, ...], ...]:
    """Return the steps of a thaw, those in which nothing can train joined to the next, at the end to the last.

    Args:
        steps: The layers that thaw together, in order.
        idle: The layers in which nothing can train; a step of nothing else is none.

    Example:
        >>> merged([["head"], ["blocks[1]"], ["blocks[0]"], ["stem"]], idle=["head", "stem"])
        (('head', 'blocks[1]'), ('blocks[0]', 'stem'))
        >>> merged([["head"], ["stem"]], idle=["head", "stem"])
        ()
    """
    found: list[list[str]] = [[]]
    for step in steps:
        found[-1] += step
        if not all(layer in idle for layer in step):
            found.append([])
    *whole, rest = found
    if whole:
        whole[-1] += rest
    return tuple(map(tuple, whole))


def share_of_fit(time: Time, state: State) -> float | None:
    """Return which share of the fit a time is, None where that cannot be known before.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters())), duration="4ep")
        >>> share_of_fit(Time("1ep"), state), share_of_fit(Time("0.3dur"), state), share_of_fit(Time("10ba"), state)
        (0.25, 0.3, None)
        >>> state.clock = Clock(batches_per_epoch=5)
        >>> share_of_fit(Time("10ba"), state), share_of_fit(Time("80sp"), state)
        (0.5, None)
    """
    duration, length = state.duration, state.clock.batches_per_epoch
    if time.unit == "dur":
        return float(time.value)
    if time.unit == duration.unit:
        return time.value / duration.value
    batches = {"ba": 1, "ep": length}
    if length and time.unit in batches and duration.unit in batches:
        return (time.value * batches[time.unit]) / (duration.value * batches[duration.unit])
    return None


def cannot_fire(every: Time, state: State) -> bool:
    """Return whether the fit is known to end before ``every`` has passed once.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters())), duration="4ep")
        >>> cannot_fire(Time("3ep"), state), cannot_fire(Time("4ep"), state), cannot_fire(Time("900ba"), state)
        (False, True, False)
    """
    return (share_of_fit(every, state) or 0.0) >= 1


def _check_start(_instance: object, _attribute: attrs.Attribute[Any], value: object) -> None:
    """Check for a number of blocks, 0 or above, or selectors.

    Example:
        >>> LayerThaw(start=0).start, LayerThaw(start=["head", "stem"]).start
        (0, ['head', 'stem'])
        >>> LayerThaw(start=-1)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: LayerThaw(start=) takes 'head', a number of blocks beside it, or selectors, got -1. Write: LayerThaw(start='head')
    """
    listed = isinstance(value, Sequence) and bool(value) and all(isinstance(each, str) and each for each in value)
    if isinstance(value, bool) or not (listed or (isinstance(value, int) and value >= 0)):
        raise ArgumentError(
            "LayerThaw(start=)", got=value, takes="'head', a number of blocks beside it, or selectors",
            example="LayerThaw(start='head')",
        )  # fmt: skip


def _check_order(_instance: object, _attribute: attrs.Attribute[Any], value: object) -> None:
    """Check for the name of an order, or a list of layers that is not empty.

    Example:
        >>> LayerThaw(order=["blocks[0]"]).order
        ['blocks[0]']
        >>> LayerThaw(order=[])
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: LayerThaw(order=) takes 'top', 'bottom', 'together' or a list of layers, got []. Write: LayerThaw(order='top')
    """
    listed = not isinstance(value, str) and isinstance(value, Sequence) and all(isinstance(each, str) for each in value)
    if value not in ("top", "bottom", "together") and not (listed and value):
        takes = "'top', 'bottom', 'together' or a list of layers"
        raise ArgumentError("LayerThaw(order=)", got=value, takes=takes, example="LayerThaw(order='top')")


def _every(value: str | int | Time) -> Time:
    return check_time("LayerThaw(every=)", value, example="LayerThaw(every=2)")


def _warmup(value: str | int | Time | None) -> Time | None:
    example = "LayerThaw(warmup='50ba')"
    return None if value is None else check_time("LayerThaw(warmup=)", value, example=example, or_none=True)


_RELEASING = ("LayerThaw", "ThawSchedule", "LISA", "BlockCycle")
"""Whose holds end by themselves."""


@register
@attrs.define(slots=False, eq=False)
class LayerThaw(Algorithm):
    """Freeze everything but the head, then release one layer at each interval.

    The k-th layer released trains at its learning rate times ``lr_scale ** k``. What other owners hold stays
    frozen: beside LoRAInject, which holds the base weights, a released block trains its adapters.

    A layer in which nothing can train, since others hold all of it when the fit begins, costs no interval: it is
    released together with the next one. So where the start cannot train, as a language model's head that LoRAInject
    holds, training begins with the first layer after it that can, at its full rate.

    Args:
        every: The interval: an int is epochs; in epochs it acts at EPOCH_START, else at BATCH_START.
        start: What trains from the beginning: ``"head"``, a number of blocks beside the head, or selectors.
        limit: How many layers are released at most; None for all.
        lr_scale: Factor from each released layer to the next.
        order: ``"top"`` (the block beside the head first), ``"bottom"``, ``"together"`` (all at once, after one
            interval), or a list of layers.
        warmup: The rate of a released layer rises from zero over this time.
        moments: Whether the optimizer's state of what is frozen is dropped or kept.
        stem: Whether embeddings are released, after the last block.

    Raises:
        ArgumentError: An argument of the wrong type or out of range.

    Warns:
        ThawlineWarning: At the start of a fit in which nothing can be released, or no warmup ends.

    Source: Howard and Ruder, ULMFiT, arXiv:1801.06146, section 3.3; lr_scale=1/2.6 is theirs.

    Example:
        >>> from thawline.engine import Trainer
        >>> from thawline.engine.testing import tiny_loader, tiny_models
        >>> trainer = Trainer(algorithms=[LayerThaw(every=2, limit=2)])
        >>> plan = trainer.plan(tiny_models()["residual"](), tiny_loader(), duration="8ep")
        >>> [(span.start.epoch, *span.layers) for span in plan.spans]
        [(0, 'head'), (2, 'blocks[2]', 'head'), (4, 'blocks[1]', 'blocks[2]', 'head')]
        >>> LayerThaw("1ba")
        LayerThaw(every=Time('1ba'), start='head', limit=None, lr_scale=0.5, order='top', warmup=None, moments='drop', stem=True)
        >>> trainer.algorithms = [LayerThaw("1ba", start=1, order="bottom", stem=False)]
        >>> plan = trainer.plan(tiny_models()["residual"](), tiny_loader(), duration="4ba")
        >>> [(span.start.batch, *span.layers) for span in plan.spans]
        [(0, 'blocks[2]', 'head'), (1, 'blocks[0]', 'blocks[2]', 'head'), (2, 'blocks[0]', 'blocks[1]', 'blocks[2]', 'head')]
    """

    stage: ClassVar[Stage] = Stage.TRAINABILITY

    every: Time = attrs.field(default=Time(1), converter=_every)
    start: Start = attrs.field(default="head", validator=_check_start)
    limit: int | None = attrs.field(default=None, validator=whole(at_least=1, or_none=True, example=3))
    lr_scale: float = attrs.field(default=0.5, validator=positive())
    order: Order = attrs.field(default="top", validator=_check_order)
    warmup: Time | None = attrs.field(default=None, converter=_warmup)
    moments: Literal["drop", "keep"] = attrs.field(default="drop", validator=one_of(("drop", "keep")))
    stem: bool = attrs.field(default=True, validator=flag())
    steps: tuple[tuple[str, ...], ...] = attrs.field(default=(), init=False, repr=False)
    thawed: int = attrs.field(default=0, init=False, repr=False)
    _begun: bool = attrs.field(default=False, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.events = frozenset({Event.FIT_START, Event.EPOCH_START if self.every.unit == "ep" else Event.BATCH_START})

    @override
    def match(self, event: Event, state: State) -> bool:
        """Return whether the fit begins, or a layer is due."""
        if event is Event.FIT_START or not self._begun:
            return True
        return self.thawed < len(self.steps) and self.every.count(state.clock) > self.thawed

    @override
    def apply(self, event: Event, state: State) -> None:
        """Hold everything but the start; once everybody has taken their holds, find what can train; release what is due.

        Example:
            >>> import torch, warnings
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
            >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters())), duration="2ep")
            >>> state.ledger.freeze("0.*", owner="LISA")
            >>> thawing = LayerThaw(lr_scale=2.0, warmup="2ep")
            >>> with warnings.catch_warnings(record=True) as said:
            ...     warnings.simplefilter("always")
            ...     silent = LayerThaw(lr_scale=1.0)._hold(state), LayerThaw(lr_scale=2.0, order="bottom")._hold(state)
            ...     thawing.apply(Event.FIT_START, state)
            ...     thawing.apply(Event.EPOCH_START, state)
            >>> for each in said:
            ...     print(str(each.message).partition(":")[0])
            LayerThaw(lr_scale=2) trains each released layer faster than the one above it. ULMFiT divides by 2.6. Write LayerThaw(lr_scale=0.5).
            LayerThaw and LISA each hold what the other releases
            LayerThaw(warmup='2ep') is not over when the fit ends after 2ep
            >>> state.clock = Clock(epoch=1)
            >>> thawing.apply(Event.EPOCH_START, state)
            >>> state.ledger.owners("0.weight"), thawing.thawed, thawing.match(Event.EPOCH_START, state)
            (('LISA',), 1, False)
        """
        if event is Event.FIT_START:
            self._hold(state)
            return
        with state.ledger.at_once():
            if not self._begun:
                self._begin(state)
            if self.thawed < thawed_count(state.clock, self.every, len(self.steps)):
                self._release(state)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the layers to release, in order, and how many of them were."""
        return {"steps": [list(step) for step in self.steps], "thawed": self.thawed, "begun": self._begun}

    @override
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.steps = tuple(tuple(step) for step in saved["steps"])
        self.thawed, self._begun = int(saved["thawed"]), bool(saved["begun"])

    def _hold(self, state: State) -> None:
        """Hold what does not train from the beginning, and find the order in which it is released.

        Example:
            >>> import torch
            >>> model = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(4)])
            >>> layers = LayerMap(model, {"stem": "0", "blocks": ["1", "2"], "head": "3"})
            >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters()), layers))
            >>> thawing, together = LayerThaw(), LayerThaw(order="together", start=["head", "2.bias"])
            >>> together._hold(state)
            >>> together.steps, sorted(state.ledger.trainable)
            ((('blocks[1]', 'blocks[0]', 'stem'),), ['2.bias', '3.bias', '3.weight'])
            >>> thawing._hold(state)
            >>> thawing.steps, sorted(state.ledger.trainable)
            ((('blocks[1]',), ('blocks[0]',), ('stem',)), ['3.bias', '3.weight'])
            >>> model = torch.nn.Linear(2, 2)
            >>> thawing._hold(State(model, ParameterLedger(model, torch.optim.SGD(model.parameters()))))
            Traceback (most recent call last):
            thawline.engine.errors.LayerError: LayerThaw needs layers below the head, and all parameters lie in one:...
        """
        layers = state.layers
        if len(layers) < 2:
            raise LayerError(
                f"LayerThaw needs layers below the head, and all parameters lie in one:\n{layers}\nPass them: "
                "trainer.fit(…, layers={'stem': 'embeddings', 'blocks': 'encoder.layer.*', 'head': 'classifier'})"
            )
        started = frozenset(state.ledger.select(self._selector(layers)))
        order = self._order(layers, started)
        self.steps = (order,) if self.order == "together" and order else tuple((layer,) for layer in order)
        self.thawed, self._begun = 0, False
        if held := all_but(layers, started):
            state.ledger.freeze(held, owner=self.owner, moments=self.moments)
        if self.lr_scale > 1.0 and self.order == "top":
            warn(
                f"LayerThaw(lr_scale={self.lr_scale:g}) trains each released layer faster than the one above it. ULMFiT "
                f"divides by 2.6. Write LayerThaw(lr_scale={1 / self.lr_scale:.3g}).",
            )

    def _begin(self, state: State) -> None:
        """Merge the layers in which nothing can train into the next that can, and begin with it where the start cannot.

        Example:
            >>> import torch
            >>> model = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(5)])
            >>> layers = LayerMap(model, {"stem": "0", "blocks": ["1", "2", "3"], "head": "4"})
            >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters(), lr=1.0), layers), duration="9ep")
            >>> state.ledger.freeze(["head", "blocks[1]"], owner="me")
            >>> thawing = LayerThaw(limit=2, lr_scale=0.1)
            >>> thawing._hold(state)
            >>> thawing._begin(state)
            >>> sorted(state.ledger.trainable), thawing.steps
            (['3.bias', '3.weight'], (('blocks[1]', 'blocks[0]'), ('stem',)))
            >>> state.ledger.thaw(["blocks[0]", "stem"], owner="LayerThaw")
            >>> {group.parameters: round(group.scale, 3) for group in state.ledger.groups}
            {('0.weight', '0.bias'): 0.01, ('1.weight', '1.bias'): 0.1, ('3.weight', '3.bias'): 1.0}
        """
        ledger, layers = state.ledger, state.layers
        started = frozenset(ledger.select(self._selector(layers)))
        parts = {
            layer: [name for name in layers.parameters(layer) if name not in started]
            for step in self.steps
            for layer in step
        }
        idle = [layer for layer, names in parts.items() if not any(self._can_train(ledger, name) for name in names)]
        steps = merged(self.steps, idle)
        begins = () if any(self._can_train(ledger, name) for name in started) else steps[:1]
        for step in begins:
            ledger.thaw(step, owner=self.owner)
        if idle or begins:
            first = [layer for step in begins for layer in step if layer not in idle]
            log.info("begins", start=self.start, then=first, nothing_to_train_in=idle)
        self.steps, self._begun = steps[len(begins) :][: self.limit], True
        # Set now, while they are in no group, and not at the release: that then derives the groups once.
        for number, step in enumerate(self.steps if self.lr_scale != 1.0 else (), start=1):
            names = [name for layer in step for name in parts[layer]]
            ledger.scale(names, self.lr_scale**number, owner=self.owner)
        waiting = [name for names in parts.values() for name in names]
        warn_of_left_out(ledger, waiting, "LayerThaw")
        also = {owner for name in waiting for owner in ledger.owners(name) if owner.partition("#")[0] in _RELEASING[1:]}
        if also:
            warn(
                f"{self.owner} and {', '.join(sorted(also))} each hold what the other releases: a layer trains only where "
                "none of them holds it. Leave one out."
            )
        if why := self._why_idle(state, waiting):
            warn(
                f"LayerThaw(every='{self.every}', start={self.start!r}) releases nothing: {why}",
            )
        elif self.warmup is not None and cannot_fire(self.warmup, state):
            warn(
                f"LayerThaw(warmup='{self.warmup}') is not over when the fit ends after {state.duration}: no released layer "
                "reaches its rate. An int is epochs. Write a shorter one, such as LayerThaw(warmup='50ba')."
            )

    def _can_train(self, ledger: ParameterLedger, name: str) -> bool:
        """Return whether nobody holds a parameter who never releases it.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(2, 1)
            >>> ledger = ParameterLedger(model, torch.optim.SGD(model.parameters()))
            >>> ledger.freeze("*", owner="LISA#2")
            >>> ledger.freeze("bias", owner="LoRAInject")
            >>> LayerThaw()._can_train(ledger, "weight"), LayerThaw()._can_train(ledger, "bias")
            (True, False)
        """
        return all(owner.partition("#")[0] in _RELEASING for owner in ledger.owners(name))

    def _release(self, state: State) -> None:
        count = thawed_count(state.clock, self.every, len(self.steps))
        due = [layer for step in self.steps[self.thawed : count] for layer in step]
        state.ledger.thaw(due, owner=self.owner, warmup=self.warmup)
        self.thawed = count
        log.info("thawed", layers=due, epoch=state.clock.epoch, batch=state.clock.batch)

    def _why_idle(self, state: State, waiting: Sequence[str]) -> str | None:
        """Return why nothing can ever be released, and what to write instead; None where something can.

        Example:
            >>> import torch
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
            >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters())), duration="2ep")
            >>> thawing, late = LayerThaw(every=1), LayerThaw(every=2)
            >>> thawing.steps = late.steps = (("blocks[0]",),)
            >>> thawing._why_idle(state, ["0.weight"]), late._why_idle(state, ["0.weight"])
            (None, "the fit ends after 2ep. Write a shorter interval, such as LayerThaw(every='0.2dur').")
            >>> LayerThaw()._why_idle(state, [])
            'there is no other layer. Write a smaller start=, or stem=True.'
            >>> left = State(model, ParameterLedger(model, torch.optim.SGD(model[2].parameters())))
            >>> LayerThaw()._why_idle(left, ["0.weight"])
            'no group of the optimizer instance holds them. Pass a factory, ...'
            >>> state.ledger.freeze("0.*", owner="me")
            >>> LayerThaw()._why_idle(state, ["0.weight"])
            'all else is held by me as well. Write a larger start=, or leave one out.'
            >>> state.ledger.thaw("0.*", owner="me")
            >>> state.ledger.freeze("0.*", owner="user")
            >>> LayerThaw()._why_idle(state, ["0.weight"])
            'all of it was frozen before the fit, and stays so. Write model.requires_grad_(True) before the fit.'
        """
        if not waiting:
            return "there is no other layer. Write a smaller start=, or stem=True."
        if self.steps:
            fires = not cannot_fire(self.every, state)
            shorter = (
                f"the fit ends after {state.duration}. Write a shorter interval, such as LayerThaw(every='0.2dur')."
            )
            return None if fires else shorter
        owners = {owner for name in waiting for owner in state.ledger.owners(name)} - {self.owner}
        if owners == {"user"}:
            if state.ledger.left_out.issuperset(waiting):
                return f"{LEFT_OUT}."
            return "all of it was frozen before the fit, and stays so. Write model.requires_grad_(True) before the fit."
        return f"all else is held by {', '.join(sorted(owners))} as well. Write a larger start=, or leave one out."

    def _selector(self, layers: LayerMap) -> list[str]:
        """Return selectors of what trains from the beginning.

        Example:
            >>> import torch
            >>> layers = LayerMap(torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(3)]))
            >>> [LayerThaw(start=start)._selector(layers) for start in ("head", 0, 2)]
            [['head'], ['head'], ['head', 'blocks[0]', 'blocks[1]']]
            >>> LayerThaw(start=3)._selector(layers)
            Traceback (most recent call last):
            thawline.engine.errors.ArgumentError: LayerThaw(start=) takes at most 2, the blocks of this model, got 3. Write: LayerThaw(start='head')
        """
        if not isinstance(self.start, int):
            return [self.start] if isinstance(self.start, str) else list(self.start)
        body = [layer.name for layer in layers if layer.name not in ("stem", "head")]
        if self.start > len(body):
            raise ArgumentError(
                "LayerThaw(start=)", got=self.start, takes=f"at most {len(body)}, the blocks of this model",
                example="LayerThaw(start='head')",
            )  # fmt: skip
        return ["head", *body[len(body) - self.start :]]

    def _order(self, layers: LayerMap, started: frozenset[str]) -> tuple[str, ...]:
        """Return the layers that are released one by one: what does not train from the beginning, the head included.

        Example:
            >>> import torch
            >>> layers = LayerMap(torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(3)]))
            >>> started = frozenset(["0.weight", "0.bias", "1.bias"])  # all of one block, half of the other
            >>> LayerThaw()._order(layers, started), LayerThaw(order="bottom")._order(layers, started)
            (('head', 'blocks[1]'), ('blocks[1]', 'head'))
        """
        order = thaw_order(layers, order=self.order, stem=self.stem)
        if isinstance(self.order, str):
            order = (*order, "head") if self.order == "bottom" else ("head", *order)
        return tuple(name for name in order if not started.issuperset(layers.parameters(name)))
