"""Progressive freezing from the input side, by Composer's linear law."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import attrs
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from ..engine import (
    Algorithm,
    ArgumentError,
    Clock,
    Event,
    LayerMap,
    ParameterLedger,
    Stage,
    State,
    Time,
    get_logger,
    register,
    warn,
)
from .arguments import check_in_range, check_one_of, in_range, one_of
from .train_only import warn_of_frozen_trunk

Granularity: TypeAlias = Literal["block", "leaf"]
log = get_logger(__name__)


def freeze_share(progress: float, *, start: float = 0.5, level: float = 1.0) -> float:
    """Return the share of layers that is frozen at ``progress``: 0 until ``start``, then linear to ``level`` at 1.

    Args:
        progress: Share of the fit completed, 0 to 1.
        start: Share of the fit before freezing begins, below 1.
        level: Share of layers frozen at the end.

    Source: MosaicML Composer, ``layer_freezing``.

    Example:
        >>> freeze_share(0.5, start=0.5), freeze_share(0.75, start=0.5, level=0.8), freeze_share(1.0, level=0.8)
        (0.0, 0.4, 0.8)
    """
    # Composer's own order of operations: rounding down turns a last bit into a layer.
    return 0.0 if progress <= start else level * ((progress - start) / (1.0 - start))


def freeze_units(model: nn.Module, layers: LayerMap, granularity: Granularity = "block") -> list[tuple[str, ...]]:
    """Return the parameter names of each unit that freezing counts, from the input side, the last one included.

    Args:
        model: The model.
        layers: Its layers.
        granularity: ``"block"`` counts layers; ``"leaf"`` counts modules without children that have
            parameters, depth first, as Composer does. Parameters of a module with children, which Composer
            never freezes (attention's ``in_proj_weight``), belong to the first leaf below it.

    Example:
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nn.ReLU(), nn.Linear(4, 2))
        >>> [len(unit) for unit in freeze_units(model, LayerMap(model, {"blocks": ["0"], "head": "2"}))]
        [4, 2]
        >>> freeze_units(model, LayerMap(model, {"blocks": ["0"], "head": "2"}), "leaf")
        [('0.0.weight', '0.0.bias'), ('0.1.weight', '0.1.bias'), ('2.weight', '2.bias')]
        >>> attention = nn.MultiheadAttention(4, 1)
        >>> freeze_units(attention, LayerMap(attention), "leaf")
        [('in_proj_weight', 'in_proj_bias', 'out_proj.weight', 'out_proj.bias')]
    """
    if granularity == "block":
        return [layer.parameters for layer in layers]
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        first.setdefault(id(parameter), name)
    units: list[list[str]] = []
    seen: set[str] = set()

    def walk(module: nn.Module, above: list[str]) -> list[str]:
        own = [first[id(each)] for each in module.parameters(recurse=False)]
        waiting = [*above, *own]
        children = list(module.children())
        if not children and own:
            units.append([name for name in dict.fromkeys(waiting) if name not in seen])
            seen.update(waiting)
            return []
        for child in children:
            waiting = walk(child, waiting)
        return waiting

    left = walk(model, [])
    if left and units:
        units[-1] += [name for name in left if name not in seen]
    return [tuple(unit) for unit in units]


def freeze_layers(
    model: nn.Module,
    optimizers: Optimizer | Sequence[Optimizer] | ParameterLedger,
    *,
    progress: float,
    start: float = 0.5,
    level: float = 1.0,
    granularity: Granularity = "block",
) -> tuple[int, float]:
    """Freeze the layers that Composer's law freezes at ``progress``, in a loop of one's own.

    Call it after ``model.train()``, which puts the BatchNorm of frozen layers back into train mode. A group that is
    wholly frozen leaves the optimizer, and torch's schedulers count groups: beside one, keep the parameters in one
    group, or let a ledger with a ``schedule`` set the rates.

    Args:
        model: The model; frozen parameters lose ``requires_grad`` and ``.grad``.
        optimizers: One or several; frozen parameters leave their groups and their state. Or the model's ledger, where
            a loop has one.
        progress: Share of the training completed, 0 to 1.
        start: Share before freezing begins.
        level: Share of layers frozen at the end; the last layer never freezes.
        granularity: ``"block"`` or ``"leaf"``.

    Returns:
        The number of layers frozen, and the share that the law asks for.

    Raises:
        ArgumentError: A share outside of its range, or the ledger of another model.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> freeze_layers(model, optimizer, progress=0.75)
        (1, 0.5)
        >>> [name for name, each in model.named_parameters() if not each.requires_grad]
        ['0.weight', '0.bias']
        >>> ledger = ParameterLedger(model, optimizer)
        >>> freeze_layers(model, ledger, progress=1.0)  # all but the last
        (2, 1.0)
        >>> len(ledger.trainable)
        2
        >>> freeze_layers(model, ledger, progress=1.0, start=1.0)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: freeze_layers(start=) takes a number, 0 or above and below 1, got 1.0. Write: freeze_layers(…, start=0.5)
        >>> freeze_layers(nn.Linear(4, 2), ledger, progress=1.0)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: freeze_layers(model=) takes the model of the ledger, got 'Linear'. Write: freeze_layers(ledger.model, ledger, progress=0.5)
    """
    check_in_range(
        "freeze_layers(progress=)", progress, at_least=0, at_most=1, example="freeze_layers(…, progress=0.5)"
    )
    check_in_range("freeze_layers(start=)", start, at_least=0, below=1, example="freeze_layers(…, start=0.5)")
    check_in_range("freeze_layers(level=)", level, at_least=0, at_most=1, example="freeze_layers(…, level=1.0)")
    check_one_of("freeze_layers(granularity=)", granularity, ("block", "leaf"), example="granularity='block'")
    ledger = optimizers if isinstance(optimizers, ParameterLedger) else ParameterLedger(model, optimizers)
    if ledger.model is not model:
        takes, example = "the model of the ledger", "freeze_layers(ledger.model, ledger, progress=0.5)"
        raise ArgumentError("freeze_layers(model=)", got=type(model).__name__, takes=takes, example=example)
    units = freeze_units(model, ledger.layers, granularity)
    share = freeze_share(progress, start=start, level=level)
    depth = int(share * (len(units) - 1))
    names = [name for unit in units[:depth] for name in unit]
    if names:
        ledger.freeze(names, owner="freeze_layers")
    return depth, share


def last_progress(at: Literal["epoch", "batch"], duration: Time, clock: Clock) -> float | None:
    """Return the progress at the last occasion to freeze that a step follows; None where that depends on the data.

    Example:
        >>> known, unknown = Clock(batches_per_epoch=5), Clock()
        >>> last_progress("epoch", Time("4ep"), unknown), last_progress("batch", Time("4ep"), known)
        (0.75, 0.95)
        >>> last_progress("epoch", Time("8ba"), known), last_progress("batch", Time("8ba"), unknown)
        (0.625, 0.875)
        >>> last_progress("batch", Time("4ep"), unknown), last_progress("epoch", Time("8ba"), unknown)
        (None, None)
        >>> last_progress("batch", Time("100sp"), known)
    """
    length = clock.batches_per_epoch
    if duration.unit == "ep" and at == "epoch":
        return (duration.value - 1) / duration.value
    if duration.unit == "ep" and length:
        return (duration.value * length - 1) / (duration.value * length)
    if duration.unit == "ba" and (at == "batch" or length):
        steps = int(duration.value) - 1
        return (steps if at == "batch" else steps // length * length) / duration.value
    return None


@register
@attrs.define(slots=False, eq=False)
class LayerFreeze(Algorithm):
    """Freeze more and more layers from the input side.

    At progress p above ``start``, ``int(level * (p - start) / (1 - start) * (n - 1))`` of n layers are frozen; the
    last one never is. Logs ``layer_freeze/layers`` and ``layer_freeze/share``. Optimizer state and gradients are freed; unlike Composer's, a run resumes.

    Args:
        start: Share of the fit before freezing begins, 0 or above and below 1.
        level: Share of layers frozen at the end, 0 to 1.
        granularity: ``"block"`` counts the model's layers, ``"leaf"`` its leaf modules as Composer does.
        at: ``"epoch"``: at each EPOCH_END, as Composer does; ``"batch"``: at each BATCH_END, for a fit of few epochs.

    Raises:
        ArgumentError: An argument of the wrong type or out of range.

    Warns:
        ThawlineWarning: At the start of a fit in which nothing can freeze before the last step.

    Source: MosaicML Composer, ``layer_freezing``; Brock et al., FreezeOut, arXiv:1706.04983.

    Example:
        >>> from thawline.engine import Trainer
        >>> from thawline.engine.testing import tiny_loader, tiny_models
        >>> trainer = Trainer(algorithms=[LayerFreeze(start=0.25, level=0.5)])
        >>> plan = trainer.plan(tiny_models()["residual"](), tiny_loader(), duration="4ep")
        >>> [(span.start.epoch, *span.layers) for span in plan.spans]
        [(0, 'stem', 'blocks[0]', 'blocks[1]', 'blocks[2]', 'head'), (3, 'blocks[0]', 'blocks[1]', 'blocks[2]', 'head')]
        >>> LayerFreeze(at="batch")
        LayerFreeze(start=0.5, level=1.0, granularity='block', at='batch', depth=0)
        >>> trainer = Trainer(algorithms=[LayerFreeze(at="batch", granularity="leaf")])
        >>> plan = trainer.plan(tiny_models()["cnn"](), tiny_loader(), duration="8ba")
        >>> [(span.start.batch, span.trainable) for span in plan.spans]
        [(0, 214), (5, 174), (6, 166), (7, 18)]
    """

    stage: ClassVar[Stage] = Stage.TRAINABILITY

    start: float = attrs.field(default=0.5, validator=in_range(at_least=0, below=1))
    level: float = attrs.field(default=1.0, validator=in_range(at_least=0, at_most=1))
    granularity: Granularity = attrs.field(default="block", validator=one_of(("block", "leaf")))
    at: Literal["epoch", "batch"] = attrs.field(default="epoch", validator=one_of(("epoch", "batch")))
    depth: int = attrs.field(default=0, init=False)
    _units: list[tuple[str, ...]] = attrs.field(factory=list, init=False, repr=False)
    _version: int | None = attrs.field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.events = frozenset({Event.FIT_START, Event.EPOCH_END if self.at == "epoch" else Event.BATCH_END})

    @override
    def apply(self, event: Event, state: State) -> None:
        """Freeze what the law adds."""
        if event is Event.FIT_START:
            self._warn_of_no_effect(state)
            warn_of_frozen_trunk(state, "LayerFreeze")
            return
        units = self._counted(state)
        share = freeze_share(state.clock.progress, start=self.start, level=self.level)
        depth = int(share * (len(units) - 1))
        if depth > self.depth:
            names = [name for unit in units[:depth] for name in unit]
            blocks = [layer.name for layer in state.layers][:depth]
            state.ledger.freeze(names if self.granularity == "leaf" else blocks, owner=self.owner)
            self.depth = depth
            log.info("frozen", layers=depth, share=share, epoch=state.clock.epoch, batch=state.clock.batch)
        state.log({"layer_freeze/layers": self.depth, "layer_freeze/share": share})

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return how many layers are frozen."""
        return {"depth": self.depth}

    @override
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back how many layers are frozen."""
        self.depth = int(saved["depth"])

    def _counted(self, state: State) -> list[tuple[str, ...]]:
        """Return the units; found again where the ledger has moved, since surgery may have added to them.

        Example:
            >>> import torch
            >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters())))
            >>> freezing = LayerFreeze(granularity="leaf")
            >>> units = freezing._counted(state)
            >>> freezing._counted(state) is units
            True
            >>> state.ledger.freeze("0.bias", owner="me")
            >>> freezing._counted(state) is units
            False
        """
        if state.ledger.version != self._version:
            self._units, self._version = freeze_units(state.model, state.layers, self.granularity), state.ledger.version
        return self._units

    def _warn_of_no_effect(self, state: State) -> None:
        """Warn where nothing can freeze before the last step.

        Example:
            >>> import torch, warnings
            >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters())), duration="3ep")
            >>> with warnings.catch_warnings(record=True) as said:
            ...     warnings.simplefilter("always")
            ...     for start, level in ((0.0, 1.0), (0.5, 1.0), (0.5, 0.0)):
            ...         LayerFreeze(start=start, level=level)._warn_of_no_effect(state)
            >>> [str(each.message) for each in said]
            ["LayerFreeze(start=0.5, level=1.0, at='epoch') freezes nothing before the last step of 3ep. Write ..."]
        """
        progress = last_progress(self.at, state.duration, state.clock)
        if progress is None or not self.level:
            return
        share = freeze_share(progress, start=self.start, level=self.level)
        if not int(share * (len(self._counted(state)) - 1)):
            warn(
                f"LayerFreeze(start={self.start}, level={self.level}, at={self.at!r}) freezes nothing before the last step "
                f"of {state.duration}. Write a smaller start, or LayerFreeze(at='batch').",
            )
