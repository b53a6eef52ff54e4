"""What epochs cost in which only the head trains: uncached, with PrefixCache, and by hand over features that lie ready."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from typing_extensions import override

from thawline.algorithms import PrefixCache, head_only
from thawline.engine import Algorithm, Event, Stage, State, Trainer

from .measure import Row, Timing, told

_BATCH, _INPUTS = 32, 512
_loss_fn = nn.functional.cross_entropy
_optimizer = partial(torch.optim.AdamW, lr=1e-3)


class Blocks(nn.Module):
    """Six transformer blocks of width 384, a mean over the tokens, and a head."""

    def __init__(self) -> None:
        super().__init__()
        block = partial(nn.TransformerEncoderLayer, 384, 6, 1536, dropout=0.0, batch_first=True)
        self.blocks = nn.ModuleList([block() for _ in range(6)])
        self.head = nn.Linear(384, 10)

    def features(self, x: Tensor) -> Tensor:
        """Return what the head is given."""
        for each in self.blocks:
            x = each(x)
        return x.mean(1)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))  # type: ignore[no-any-return]


class Sequences(Dataset[tuple[Tensor, Tensor]]):
    """32 tokens a sample and a label; the tokens come again every 512 samples, so that many samples take little memory."""

    def __init__(self, samples: int) -> None:
        self.inputs, self.targets = torch.randn(_INPUTS, 32, 384), torch.randint(10, (samples,))

    def __len__(self) -> int:
        return len(self.targets)

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index % _INPUTS], self.targets[index]


class Beside(Algorithm):
    """Times each epoch after the first, its first batch by itself, and the loop by hand between two epochs."""

    events = frozenset({Event.EPOCH_START, Event.BATCH_END, Event.EPOCH_END})
    stage = Stage.OBSERVE

    def __init__(self, features: Tensor, targets: Tensor) -> None:
        self.features, self.targets = features, targets
        self.head = nn.Linear(384, 10).to(features.device)
        self.stepper = _optimizer(self.head.parameters())
        self.began = (0.0, 0.0)
        self.epochs: list[tuple[float, float]] = []
        self.checks: list[tuple[float, float]] = []
        self.by_hand: list[tuple[float, float]] = []

    @override
    def apply(self, event: Event, state: State) -> None:
        if event is Event.EPOCH_START:
            self.began = _now()
        elif event is Event.EPOCH_END:
            self.epochs.append(_since(self.began))
            self.train()
        elif state.clock.batch_in_epoch == 1:
            self.checks.append(_since(self.began))

    def train(self) -> None:
        """Train a head for an epoch."""
        began = _now()
        for index in torch.split(torch.randperm(len(self.targets)), _BATCH):
            loss = _loss_fn(self.head(self.features[index]), self.targets[index])
            loss.backward()  # type: ignore[no-untyped-call]
            self.stepper.step()
            self.stepper.zero_grad()
            loss.item()
        self.by_hand.append(_since(began))


def prefix(rounds: int, device: torch.device) -> list[Row]:
    """Head-only epochs after the first, six blocks of width 384 and 32 tokens: uncached, cached, and by hand.

    The check of an epoch costs the same whatever its length, so the loops are compared at two lengths.
    """
    quick = rounds < 3
    net = Blocks().to(device)
    net.blocks.requires_grad_(False)
    net.blocks.eval()
    recipe = partial(
        Trainer, optimizer=_optimizer, loss_fn=_loss_fn, progress=False, device=str(device), log_every="1ep"
    )
    rows: list[Row] = []
    for samples in (_INPUTS,) if quick else (16 * _INPUTS, 64 * _INPUTS):
        dataset = Sequences(samples)
        part = Subset(dataset, range(_INPUTS))
        uncached = [_epoch(recipe(algorithms=head_only()), net, part, samples) for _ in range(2 if quick else 3)]
        with torch.no_grad():
            once = torch.cat([net.features(each.to(device)) for each in torch.split(dataset.inputs, _BATCH)])
        beside = Beside(once.repeat(samples // _INPUTS, 1), dataset.targets.to(device))
        loader = DataLoader(dataset, batch_size=_BATCH, shuffle=True)
        recipe(algorithms=[*head_only(), PrefixCache(), beside]).fit(net, loader, duration=1 + max(2, 2 * rounds))
        rows += _compare(uncached, beside, samples)
    return rows


def _compare(uncached: list[tuple[float, float]], beside: Beside, samples: int) -> list[Row]:
    timings = {
        f"uncached, from {_INPUTS} of {samples:,} samples": _timing(uncached),
        "cached": _timing(beside.epochs[1:]),
        "its first batch, with the check": _timing(beside.checks[1:]),
        "by hand": _timing(beside.by_hand[1:]),
    }
    plain, cached, check, hand = (each.median for each in timings.values())
    steps = samples // _BATCH
    alone = (cached - check) / (hand * (steps - 1) / steps)
    return [
        Row(f"head-only epoch of {samples:,}, cached, of the uncached", cached / plain, "x", 0.01, told(timings, "ms")),
        Row("... of by hand", cached / hand, "x", 1 / 0.85, "85% of its speed"),
        Row("... of by hand, without its first batch", alone, "x", None, "the steps alone"),
    ]


def _epoch(trainer: Trainer, net: nn.Module, part: Dataset[tuple[Tensor, Tensor]], samples: int) -> tuple[float, float]:
    began = _now()
    trainer.fit(net, DataLoader(part, batch_size=_BATCH, shuffle=True), duration="1ep")
    cpu, wall = _since(began)
    return cpu * samples / _INPUTS, wall * samples / _INPUTS


def _now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def _since(began: tuple[float, float]) -> tuple[float, float]:
    cpu, wall = _now()
    return cpu - began[0], wall - began[1]


def _timing(seconds: list[tuple[float, float]]) -> Timing:
    cpu, wall = ([each * 1e6 for each in column] for column in zip(*seconds, strict=True))
    return Timing(cpu, wall)
