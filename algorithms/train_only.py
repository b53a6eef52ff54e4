"""Train a fixed part of a model."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import ClassVar

import attrs
from typing_extensions import override

from ..engine import (
    Algorithm,
    ArgumentError,
    Event,
    Layer,
    LayerMap,
    ParameterLedger,
    Stage,
    State,
    register,
    warn,
)
from .arguments import check_selectors

_LAST_BLOCKS = re.compile(r"blocks\[-(\d+):\]")


def all_but(layers: LayerMap, names: Collection[str]) -> list[str]:
    """Return selectors of everything but ``names``.

    A layer that lies wholly outside is named as a layer, so that a hold on it covers what is attached to it later.

    Args:
        layers: The model's layers.
        names: Names of parameters.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> all_but(LayerMap(model), {"2.bias", "4.weight", "4.bias"})
        ['blocks[0]', '2.weight']
        >>> all_but(LayerMap(model), [])
        ['blocks[0]', 'blocks[1]', 'head']
    """
    chosen = frozenset(names)
    return [select for layer in layers for select in rest_of(layer, chosen)]


def rest_of(layer: Layer, names: Collection[str]) -> list[str]:
    """Return selectors of a layer's parameters but ``names``: the layer, where it has none of them.

    Example:
        >>> head = Layer("head", ("out.weight", "out.bias"))
        >>> rest_of(head, ["out.bias"]), rest_of(head, ["in.bias"]), rest_of(head, ["out.weight", "out.bias"])
        (['out.weight'], ['head'], [])
    """
    rest = [name for name in layer.parameters if name not in names]
    return [layer.name] if len(rest) == len(layer.parameters) else rest


LEFT_OUT = (
    "no group of the optimizer instance holds them. Pass a factory, which sees every parameter: "
    "optimizer=partial(torch.optim.AdamW, lr=1e-4)"
)


def warn_of_left_out(ledger: ParameterLedger, names: Collection[str], who: str) -> None:
    """Warn where ``who`` is to train some of what the optimizer instance of the fit does not hold, but not all of it.

    Example:
        >>> import torch, warnings
        >>> model = torch.nn.Linear(2, 1)
        >>> ledger = ParameterLedger(model, torch.optim.SGD([model.weight], lr=0.1))
        >>> with warnings.catch_warnings(record=True, action="always") as caught:
        ...     warn_of_left_out(ledger, ["weight"], "TrainOnly")
        ...     warn_of_left_out(ledger, ["weight", "bias"], "TrainOnly")
        ...     warn_of_left_out(ledger, ["bias"], "TrainOnly")
        >>> [str(each.message).partition(" cannot")[0] for each in caught]
        ["TrainOnly is to train 2 parameters, and 1 (first 'bias')"]
    """
    missing = [name for name in names if name in ledger.left_out]
    if missing and len(missing) < len(names):
        warn(
            f"{who} is to train {len(names)} parameters, and {len(missing)} (first {missing[0]!r}) cannot: {LEFT_OUT}.",
        )


def warn_of_frozen_trunk(state: State, who: str) -> None:
    """Warn where everything below the head was frozen before the fit, so that ``who`` has nothing to act on.

    Example:
        >>> import torch, warnings
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> with warnings.catch_warnings(record=True, action="always") as caught:
        ...     for each in model[0].parameters():
        ...         _ = each.requires_grad_(False)
        ...         state = State(model, ParameterLedger(model, lambda every: torch.optim.SGD(every, lr=0.1)))
        ...         warn_of_frozen_trunk(state, "LayerThaw")
        ...         print(len(caught))  # the weight is frozen, then both
        0
        1
        >>> str(caught[0].message).partition(" were")[0]
        'LayerThaw has nothing to act on: all 2 parameters below the head'
    """
    below = [name for layer in state.layers if layer.name != "head" for name in layer.parameters]
    if below and all("user" in state.ledger.owners(name) for name in below):
        warn(
            f"{who} has nothing to act on: all {len(below)} parameters below the head were frozen before the fit, and stay "
            "so. Write model.requires_grad_(True) before the fit."
        )


def _selectors(value: object) -> tuple[str, ...]:
    return check_selectors("TrainOnly(select=)", value, example="TrainOnly('head')")


def _rates(value: object) -> dict[str, float]:
    """Take the rates, and refuse what are none.

    Example:
        >>> _rates(None), _rates({"head": 1})
        ({}, {'head': 1.0})
        >>> _rates({"head": 0})
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: TrainOnly(lr=) takes a mapping of selectors to rates above 0, or None, got {'head': 0}. ...
    """
    if value is None:
        return {}
    if isinstance(value, Mapping) and all(
        isinstance(name, str)
        and isinstance(lr, (int, float))
        and not isinstance(lr, bool)
        and 0 < lr <= sys.float_info.max
        for name, lr in value.items()
    ):
        return {str(name): float(lr) for name, lr in value.items()}
    raise ArgumentError(
        "TrainOnly(lr=)",
        got=value,
        takes="a mapping of selectors to rates above 0, or None",
        example="TrainOnly('head', lr={'head': 1e-3})",
    )


@register
@attrs.define(slots=False, eq=False)
class TrainOnly(Algorithm):
    """Hold everything but what is selected, from the start to the end.

    Args:
        select: What trains: a selector or a list of them.
        lr: Selector to absolute base learning rate; what is not named keeps the optimizer's; None names nothing.

    Raises:
        ArgumentError: An argument of the wrong type.

    Warns:
        ThawlineWarning: A rate for what does not train, more blocks than there are, or parameters that the optimizer
            instance does not hold.

    Example:
        >>> import torch
        >>> from thawline.engine import Trainer
        >>> from thawline.engine.testing import tiny_loader, tiny_models
        >>> trainer = Trainer(optimizer=lambda each: torch.optim.AdamW(each, lr=1.0), algorithms=[TrainOnly(["blocks[-2:]", "head"], lr={"head": 3.0})])
        >>> plan = trainer.plan(tiny_models()["residual"](), tiny_loader(), duration="1ep")
        >>> plan.samples[0].rates
        {'blocks[1]': 1.0, 'blocks[2]': 1.0, 'head': 3.0}
    """

    events = frozenset({Event.FIT_START})
    stage: ClassVar[Stage] = Stage.TRAINABILITY

    select: tuple[str, ...] = attrs.field(metadata={"call": "'head'"}, converter=_selectors)
    lr: Mapping[str, float] = attrs.field(default=None, converter=_rates)

    @override
    def apply(self, event: Event, state: State) -> None:
        """Hold the rest, and set the rates.

        Example:
            >>> import torch
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
            >>> state = State(model, ParameterLedger(model, lambda every: torch.optim.SGD(every, lr=0.1)))
            >>> TrainOnly("1.*", lr={"1.bias": 0.5}).apply(Event.FIT_START, state)
            >>> [(group.parameters, group.lr) for group in state.ledger.groups]
            [(('1.weight',), 0.1), (('1.bias',), 0.5)]
        """
        ledger, layers = state.ledger, state.layers
        chosen = ledger.select(self.select)
        with ledger.at_once():
            if rest := all_but(layers, chosen):
                ledger.freeze(rest, owner=self.owner)
            for select, lr in self.lr.items():
                ledger.set_lr(select, lr, owner=self.owner)
        warn_of_left_out(ledger, chosen, "TrainOnly")
        for doubt in self._doubts(ledger, frozenset(chosen)):
            warn(doubt)

    def _doubts(self, ledger: ParameterLedger, chosen: frozenset[str]) -> Iterator[str]:
        """Yield what was asked for and cannot have been meant.

        Example:
            >>> import torch
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
            >>> _ = model[2].bias.requires_grad_(False)
            >>> ledger = ParameterLedger(model, lambda every: torch.optim.SGD(every, lr=0.1))
            >>> only = TrainOnly(["blocks[-1:]", "blocks[-2:]", "2.bias"], lr={"0.bias": 0.1, "2.bias": 0.2})
            >>> [doubt.partition(", so")[0] for doubt in only._doubts(ledger, frozenset(ledger.select(only.select)))]
            ["TrainOnly(['blocks[-1:]', 'blocks[-2:]', '2.bias']) selects 1 parameters (first '2.bias') that were frozen before the fit, and stay so. Write model.requires_grad_(True) before the fit.", "nothing of '2.bias' trains", "TrainOnly('blocks[-2:]') asks for 2 blocks of 1: all train. Write partial(last=1)."]
        """
        frozen = [name for name in chosen if "user" in ledger.owners(name) and name not in ledger.left_out]
        if frozen:
            yield (
                f"TrainOnly({list(self.select)}) selects {len(frozen)} parameters (first {min(frozen)!r}) that were frozen "
                "before the fit, and stay so. Write model.requires_grad_(True) before the fit."
            )
        trains = {name for name in chosen if "user" not in ledger.owners(name)}
        for select, lr in self.lr.items():
            if trains.isdisjoint(ledger.select(select)):
                both = [*self.select, select]
                yield f"nothing of {select!r} trains, so TrainOnly(lr=) for it has no effect ({lr:g}). Write TrainOnly({both}, …)."
        blocks = len(ledger.layers.blocks)
        for select in self.select:
            found = _LAST_BLOCKS.fullmatch(select)
            if found and int(found[1]) > blocks:
                yield f"TrainOnly({select!r}) asks for {found[1]} blocks of {blocks}: all train. Write partial(last={blocks})."
