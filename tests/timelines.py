"""What trains at which rate in each batch: a loop of one's own around the engine, without data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from helpers import group_rates, pseudo_gradients
from thawline.engine import Algorithm, Clock, Engine, Event, LayerMap, ParameterLedger, State, Time

SGD = partial(torch.optim.SGD, lr=1.0, momentum=0.9)
Rates = dict[str, float]
Boundary = tuple[int, int, Rates]


def stack(blocks: int = 3) -> nn.Sequential:
    """Return an embedding, some linear blocks, and a head: stem, blocks[0], …, head."""
    return nn.Sequential(nn.Embedding(9, 4), *(nn.Linear(4, 4) for _ in range(blocks)), nn.Linear(4, 2))


def rates(ledger: ParameterLedger) -> Rates:
    """Return the learning rate of each layer that trains, in depth order."""
    found: dict[str, set[float]] = {layer.name: set() for layer in ledger.layers}
    for group in ledger.groups:
        for name in group.parameters:
            assert group.lr is not None
            found[ledger.layers.of(name).name].add(group.lr)
    assert all(len(each) < 2 for each in found.values()), f"one rate a layer: {found}"
    return {layer: each.pop() for layer, each in found.items() if each}


class Loop:
    """A loop of one's own: steps of pseudo-gradients, the ledger verified after each algorithm's turn.

    Args:
        algorithms: What acts.
        model: The model; None is :func:`stack`.
        duration: How long.
        batches: Batches of an epoch, of 8 samples each.
        layers: The model's layers, if they are not to be found.
        begin: Whether to emit FIT_START; a resumed loop does not.
    """

    def __init__(
        self,
        algorithms: Sequence[Algorithm],
        model: nn.Module | None = None,
        *,
        duration: str | int = "6ep",
        batches: int = 1,
        layers: LayerMap | None = None,
        begin: bool = True,
    ) -> None:
        self.model = stack() if model is None else model
        self.ledger = ParameterLedger(self.model, SGD, layers)
        self.state = State(self.model, self.ledger, Time(duration))
        self.batches = batches
        self.boundaries: list[Boundary] = []
        self.state.clock = Clock(batches_per_epoch=batches)
        self.engine = Engine(algorithms, self.state, debug=True)
        self.engine.attach()
        if begin:
            self.engine.emit(Event.FIT_START)

    def epoch(self) -> list[Rates]:
        """Run an epoch; return the rates of each batch."""
        emit, state, rows = self.engine.emit, self.state, []
        emit(Event.EPOCH_START)
        for _ in range(self.batches):
            emit(Event.BATCH_START)
            rows.append(rates(self.ledger))
            found = (len(self.ledger.trainable), group_rates(self.ledger))
            if not self.boundaries or self.boundaries[-1][1:] != found:
                self.boundaries.append((state.clock.batch, *found))
            pseudo_gradients(self.ledger.trainable_parameters, seed=state.clock.batch)
            for optimizer in state.optimizers:
                optimizer.step()
            self.ledger.clear_gradients()
            state.tick(samples=8)
            emit(Event.BATCH_END)
            if state.duration.reached(state.clock):
                break
        if state.clock.batch_in_epoch == self.batches:
            state.tick_epoch()
        emit(Event.EPOCH_END)
        return rows

    def run(self) -> list[Rates]:
        """Run to the end; return the rates of each batch."""
        rows: list[Rates] = []
        while not self.state.duration.reached(self.state.clock):
            rows += self.epoch()
        return rows


def timeline(
    algorithms: Sequence[Algorithm] | Algorithm,
    model: nn.Module | None = None,
    *,
    duration: str | int = "6ep",
    batches: int = 1,
    layers: LayerMap | None = None,
) -> list[Rates]:
    """Return the rates of each batch of a whole loop."""
    listed = [algorithms] if isinstance(algorithms, Algorithm) else algorithms
    return Loop(listed, model, duration=duration, batches=batches, layers=layers).run()


def boundaries(
    algorithms: Sequence[Algorithm] | Algorithm,
    model: nn.Module,
    *,
    duration: str | int = "6ep",
    batches: int = 1,
) -> list[Boundary]:
    """Return each batch from which on something trains otherwise: its number, how many tensors train, each group's rate.

    A group's name says which layers it spans, from the first to the last.
    """
    listed = [algorithms] if isinstance(algorithms, Algorithm) else algorithms
    loop = Loop(listed, model, duration=duration, batches=batches)
    loop.run()
    return loop.boundaries


def norm_cnn(stages: int = 4) -> nn.Sequential:
    """Return convolutions, each with BatchNorm, and a head: a block a stage."""
    body: list[nn.Module] = []
    for index in range(stages):
        body += [nn.Sequential(nn.Conv2d(1 if not index else 4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
