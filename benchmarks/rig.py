"""The run that faults are injected into: sixty steps in which everything changes that a checkpoint has to hold."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from thawline.algorithms import EMA, EarlyStop, GradClip, LayerFreeze, LayerThaw, LoRAInject
from thawline.engine import Algorithm, Checkpointing, Event, FitResult, Stage, State, Trainer, cosine

STEPS = 60
WIDTH = 96
_EPOCH = 15  # steps; the last of them takes one loader batch where the others take two
_SAMPLES = 230


class Jittered(Dataset[tuple[Tensor, int]]):
    """Samples with noise from torch's, NumPy's and Python's generator and from one of its own."""

    def __init__(self, samples: int) -> None:
        self.x = torch.randn(samples, 24, generator=torch.Generator().manual_seed(0))
        self.dice = np.random.default_rng()

    def __len__(self) -> int:
        return len(self.x)

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = torch.randn(24) * random.random() + float(np.random.rand()) + float(self.dice.random())  # noqa: NPY002
        return self.x[index] + 0.1 * noise, int(self.x[index].sum() > 0)


class Witness(Algorithm):
    """Chains the sample ids and losses of all steps into a digest, and strikes where a test asks for it."""

    events = frozenset(Event) - {Event.FIT_ABORT}
    stage = Stage.OBSERVE
    strike: ClassVar[Callable[[Event, State], None] | None] = None
    """What to do at each event: kill, raise, send a signal. It is no part of the run."""

    def __init__(self) -> None:
        self.seen = ""

    @override
    def apply(self, event: Event, state: State) -> None:
        if event is Event.AFTER_LOSS and state.loss is not None:
            ids = (self.seen, state.sample_ids, float(state.loss.item()).hex())
            self.seen = hashlib.sha256(repr(ids).encode()).hexdigest()
        if Witness.strike is not None:
            Witness.strike(event, state)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    @override
    def load_state_dict(self, saved: Any) -> None:
        self.seen = saved["seen"]


class Loss:
    """Cross-entropy, unless a test spoils it."""

    spoil: Callable[[Tensor], Tensor] | None = None


def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss, as spoiled."""
    loss = nn.functional.cross_entropy(outputs, targets)
    return loss if Loss.spoil is None else Loss.spoil(loss)


def model(ballast: int = 0) -> nn.Sequential:
    """Return four blocks with BatchNorm and dropout, about 160 KiB, from the same seed each time.

    The adapters hold the normalisations with weights, so the other ones are those whose statistics move.

    Args:
        ballast: Numbers in a buffer besides, which nobody uses.
    """
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(24, WIDTH)]
    for number in range(4):
        norm = nn.BatchNorm1d(WIDTH, affine=number % 2 == 0)
        layers.append(nn.Sequential(nn.Linear(WIDTH, WIDTH), norm, nn.ReLU(), nn.Dropout(0.2)))
    layers.append(nn.Linear(WIDTH, 2))
    if ballast:
        layers[0].register_buffer("ballast", torch.zeros(ballast))
    return nn.Sequential(*layers)


def fit(
    folder: Path,
    net: nn.Module | None = None,
    *,
    resume: bool | str | Path = True,
    workers: int = 0,
    every: str = "1ba",
    keep: int = 2,
    on_nonfinite: Any = "raise",
) -> FitResult:
    """Fit, or go on with, the sixty steps in ``folder``.

    Adapters are trained beside what thaws from the top, while the bottom freezes for good; batches are put together
    from two of the loader's, and cut; an average is kept and evaluated.
    """
    trainer = Trainer(
        algorithms=[
            LoRAInject(rank=2), LayerThaw(every="9ba"), LayerFreeze(start=0.4, level=0.6), GradClip(1.0), EMA(half_life="0.1dur"),
            EarlyStop("eval/loss", patience=20), Witness(),
        ],
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
        schedule=cosine(),
        loss_fn=loss_fn,
        metrics={"accuracy": accuracy},
        accumulate=2,
        microbatch_size=4,
        eval_every="10ba",
        log_every="3ba",
        seed=7,
        run_dir=folder,
        checkpoint=Checkpointing(every=every, keep=keep),
        device="cpu",
        on_nonfinite=on_nonfinite,
        progress=False,
    )  # fmt: skip
    train = DataLoader(Jittered(_SAMPLES), 8, shuffle=True, num_workers=workers)
    held_out = DataLoader(Jittered(12), 6)
    return trainer.fit(model() if net is None else net, train, held_out, duration=f"{STEPS}ba", resume=resume)


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Return the share of right answers."""
    return (outputs.argmax(1) == targets).float().mean().item()


def outcome(folder: Path, step: int = STEPS) -> dict[str, str]:
    """Return digests of all that the checkpoint of ``step`` holds, and of the metrics up to there.

    Weights, optimizer, average, random number generators, sample ids, history and clock are in the checkpoint; the
    settings that cases differ in are left out.
    """
    checkpoint = folder / f"ba{step:08d}"
    state = json.loads((checkpoint / "state.json").read_text())
    for name in ("checkpoint", "on_nonfinite"):
        del state["settings"][name]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if key != "time"} for line in lines]
    return {
        "tensors": hashlib.sha256((checkpoint / "tensors.safetensors").read_bytes()).hexdigest(),
        "state": hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest(),
        "metrics": hashlib.sha256(repr(metrics).encode()).hexdigest(),
    }
