"""What is kept at the frontier: the place before the first layer of a model in which anything trains."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from ..engine import LayerMap, State
from .prefix_pass import Pass, is_batched
from .prefix_replay import Replay, close, find_replay, gives_the_same, unpadded
from .prefix_store import RowStore
from .prefix_trace import UnskippableError

# A row computed alone differs in its last bits from the same row computed in a batch.
_TOLERANCE, _ROUGH_TOLERANCE = 1e-3, 3e-2


@attrs.define(eq=False)
class Frontier:
    """What is kept of the part of the model before its first layer that trains.

    Args:
        depth: How many layers lie before it.
        store: Rows by sample: what crosses the frontier, the targets where there is a ``label``, prints of the inputs.
        replay: How to skip what lies before it; None until the first batch.
        label: The name of the targets in a batch that is a mapping, ``""`` in a tuple; None where no batch can be made
            of what is kept.
        crossing: How many tensors cross it.
        padded: The signatures for which trimmed and padded rows were tried.

    Example:
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1])
        >>> one, frontier = Pass(torch.sin, (x,), {}, ids=(5, 9), targets=y), Frontier(1, RowStore(budget=1000), label="")
        >>> frontier.rows(one), frontier.keep(one, [10 * x])
        (None, True)
        >>> frontier.rows(one.part([1, 0]))[:2]  # what crosses it, and the targets
        [tensor([[20.],
                [10.]]), tensor([1, 0])]
    """

    depth: int
    store: RowStore
    replay: Replay | None = None
    label: str | None = None
    crossing: int = 0
    padded: set[Hashable] = attrs.field(factory=set)

    def rows(self, one: Pass, *, alike: bool = False) -> list[Tensor] | None:
        """Return what is kept of a batch; None where something is missing.

        Args:
            one: The forward pass of the batch.
            alike: Neither trim nor pad.
        """
        usable = self.store.has(one.ids) and self._serve(one.ids, one, alike=alike)
        return self.store.rows(one.ids, one.signature) if usable else None

    def missing(self, one: Pass) -> list[int]:
        """Return the places in a batch of the samples that are not kept; of all where the others do not serve, or are fewer.

        Example:
            >>> frontier, ones = Frontier(1, RowStore(budget=1000)), torch.ones(3, 1)
            >>> frontier.keep(Pass(torch.sin, (ones,), {}, ids=(5, 9, 4)), [ones])
            True
            >>> frontier.missing(Pass(torch.sin, (ones,), {}, ids=(5, 7, 9))), frontier.missing(Pass(torch.sin, (ones,), {}, ids=(5, 7, 8)))
            ([1], [0, 1, 2])
            >>> frontier.missing(Pass(torch.sin, (ones[:2],), {}, ids=(5, 7))), frontier.missing(Pass(torch.sin, (ones[:, 0],), {}, ids=(5, 7, 9)))
            ([0, 1], [0, 1, 2])
        """
        lacking = [place for place, each in enumerate(one.ids) if not self.store.has((each,))]
        kept = [each for each in one.ids if self.store.has((each,))]
        serve = len(lacking) < len(kept) and self._serve(kept, one)
        return lacking if serve else [*range(len(one.ids))]

    def _serve(self, ids: Sequence[int], one: Pass, *, alike: bool = False) -> bool:
        """Return whether what is kept of the samples can be put into the batch: rows alike, or trimmed and padded ones.

        Example:
            >>> long, short = (Pass(torch.sin, (torch.tensor([mask]),), {}, ids=(5,)) for mask in ([1, 1, 0], [1, 1]))
            >>> frontier = Frontier(1, RowStore(budget=10_000))
            >>> frontier.keep(long, [torch.tensor([[1.0, 2.0, 3.0]])]), frontier._serve([5], long), frontier._serve([5], short)
            (True, True, False)
            >>> frontier.keep(attrs.evolve(short, ids=(9,)), [torch.tensor([[4.0, 5.0]])]), frontier._serve([5], short)
            (True, True)
            >>> frontier.rows(short)[0], frontier.rows(short, alike=True)
            (tensor([[1., 2.]]), None)
        """
        store, signature = self.store, one.signature
        return store.alike(ids, signature) or (not alike and store.fits(ids, signature) and one.right)

    def keep(self, one: Pass, value: Sequence[Tensor]) -> bool:
        """Keep what crosses the frontier; return whether there was room.

        Raises:
            UnskippableError: It has a gradient, not one row a sample, or another shape than before.

        Example:
            >>> frontier, one = Frontier(1, RowStore(budget=1000)), Pass(torch.sin, (torch.ones(2, 1),), {}, ids=(5, 9))
            >>> def error(value, one=one):
            ...     try:
            ...         return frontier.keep(one, [value])
            ...     except UnskippableError as error:
            ...         return str(error)[:62]
            >>> error(torch.ones(2, 1, requires_grad=True)), error(torch.ones(3, 1)), error(torch.ones(2, 1)), frontier.crossing
            ('its output has a gradient', 'its output does not have one row a sample', True, 1)
            >>> error(torch.ones(2, 4), attrs.evolve(one, ids=(1, 2)))
            'its output has several shapes for inputs of one shape: samples'
        """
        if any(each.requires_grad for each in value):
            raise UnskippableError("its output has a gradient")
        if not all(is_batched(each, len(one.ids)) for each in value):
            raise UnskippableError("its output does not have one row a sample")
        self.crossing = len(value)
        facts = [one.prints] if self.label is None else [one.targets, one.prints]
        try:
            return self.store.add(one.ids, one.signature, [*value, *facts], right=one.right, exact=len(facts))
        except ValueError as error:
            raise UnskippableError(f"its output has several shapes for inputs of one shape: {error}") from error

    def changed(self, one: Pass, kept: Sequence[Tensor]) -> str | None:
        """Return what is not as it was when it was kept; None where all is.

        Example:
            >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1])
            >>> one, frontier = Pass(torch.sin, (x,), {}, (5, 9), y), Frontier(1, RowStore(budget=1000), label="")
            >>> frontier.keep(one, [x]), frontier.changed(one, kept := frontier.rows(one))
            (True, None)
            >>> frontier.changed(Pass(torch.sin, (2 * x,), {}, (5, 9), y), kept), frontier.changed(Pass(torch.sin, (x,), {}, (5, 9), 1 - y), kept)
            ('inputs', 'targets')
        """
        if not torch.equal(kept[-1], one.prints):
            return "inputs"
        if self.label is not None and not torch.equal(kept[self.crossing], one.targets):
            return "targets"
        return None

    def fault(self, state: State, replay: Replay, one: Pass, kept: Sequence[Tensor], *, row: int | None) -> str | None:
        """Return why what is kept must not be used for a batch; None where it may.

        Args:
            state: The fit.
            replay: How to skip what lies before the frontier.
            one: The forward pass of the batch.
            kept: What is kept of it.
            row: The sample to compute again, all inputs being compared as well; None: neither.

        Example:
            >>> from thawline.engine import ParameterLedger
            >>> model, x = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2)), torch.ones(2, 1)
            >>> state, one = State(model, ParameterLedger(model, torch.optim.SGD)), Pass(model.forward, (x,), {}, ids=(5, 9))
            >>> frontier, replay = Frontier(1, RowStore(budget=1000)), replay_at(state, 1, one)
            >>> frontier.keep(one, [features := model[:2](x).detach()]), frontier.fault(state, replay, one, frontier.rows(one), row=0)
            (True, None)
            >>> frontier.fault(state, replay, one, [features + 1, one.prints], row=1)
            'the frozen part gives something else for a sample that is computed again'
            >>> other = Pass(model.forward, (2 * x,), {}, ids=(5, 9))
            >>> frontier.fault(state, replay, other, frontier.rows(one), row=0)
            'the inputs change between epochs: what is augmented gives something else each time'
            >>> frontier.fault(state, replay, other, frontier.rows(one), row=None)
        """
        features = kept[: self.crossing]
        rough = self.store.narrow or any(each.dtype.itemsize < 4 for each in features)
        tolerance = _ROUGH_TOLERANCE if rough else _TOLERANCE
        alike = self.store.alike(one.ids, one.signature)
        if row is not None:
            if alike and (changed := self.changed(one, kept)):
                return f"the {changed} change between epochs: what is augmented gives something else each time"
            try:
                again = replay.value(one.row(row), state.model)
            except UnskippableError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever the model says to a batch of one
                return f"a sample alone cannot be computed again: {error!r}"
            masks = [each[row : row + 1] for each in one.masks]
            pairs = [
                (unpadded(mine[row : row + 1], masks), unpadded(new, masks))
                for mine, new in zip(features, again, strict=True)
            ]
            if not all(close(mine, new, tolerance) for mine, new in pairs):
                return "the frozen part gives something else for a sample that is computed again"
        if not alike and one.signature not in self.padded:
            self.padded.add(one.signature)
            if not gives_the_same(state.model, replay, one, features, tolerance=tolerance):
                return "what the model gives for a sample depends on how far its batch is padded"
        return None


def frozen_depth(layers: LayerMap, trainable: frozenset[str]) -> int:
    """Return how many layers lie before the first one in which anything trains; 0 where nothing trains.

    Example:
        >>> from torch import nn
        >>> layers = LayerMap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
        >>> [layer.name for layer in layers], frozen_depth(layers, frozenset({"4.weight", "2.bias"}))
        (['blocks[0]', 'blocks[1]', 'head'], 1)
        >>> frozen_depth(layers, frozenset({"4.bias"})), frozen_depth(layers, frozenset({"0.bias"})), frozen_depth(layers, frozenset())
        (2, 0, 0)
    """
    trains = (place for place, layer in enumerate(layers) if not trainable.isdisjoint(layer.parameters))
    return next(trains, 0)


def replay_at(state: State, depth: int, one: Pass) -> Replay:
    """Find out how to skip the first ``depth`` layers.

    Raises:
        UnskippableError: They cannot be skipped.

    Example:
        >>> from torch import nn
        >>> from thawline.engine import ParameterLedger
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> state, one = State(model, ParameterLedger(model, torch.optim.SGD)), Pass(model.forward, (torch.ones(2, 2),), {}, ids=(5, 9))
        >>> [layer.name for layer in state.layers]
        ['blocks[0]', 'blocks[1]', 'head']
        >>> replay_at(state, 2, one)
        Traceback (most recent call last):
        thawline.algorithms.prefix_trace.UnskippableError: the statistics of a BatchNorm1d in it go on
        >>> model = model.eval()
        >>> replay_at(state, 2, one).chain == (model[4],), replay_at(state, 1, one).chain, replay_at(state, 1, one).boundary is model[1]
        (True, (), True)
    """
    layers, modules = list(state.layers), dict(state.model.named_modules())
    suffix = [name for layer in layers[depth:] for name in layer.modules]
    prefix = [modules[name] for layer in layers[:depth] for name in layer.modules if name in modules]
    norms = (each for module in prefix for each in module.modules() if getattr(each, "running_mean", None) is not None)
    if moving := next((each for each in norms if each.training), None):
        raise UnskippableError(f"the statistics of a {type(moving).__name__} in it go on")
    head = depth == len(layers) - 1 and all(name in modules for name in suffix)
    beyond = [modules[name] for name in suffix if name in modules]
    return find_replay(state.model, beyond, prefix, head=head, one=one)


def label_of(microbatch: Any, targets: Any, samples: int) -> str | None:
    """Return how a batch is made of inputs and targets; None where it cannot be.

    Example:
        >>> x, y = torch.ones(2, 3), torch.tensor([0, 1])
        >>> label_of((x, y), y, 2), label_of({"x": x, "labels": y}, y, 2)
        ('', 'labels')
        >>> label_of({"x": x}, y, 2), label_of((x, y), y, 3), label_of((x, None), None, 2)
        (None, None, None)
    """
    if not is_batched(targets, samples):
        return None
    if not isinstance(microbatch, Mapping):
        return ""
    return next((name for name, each in microbatch.items() if each is targets), None)
