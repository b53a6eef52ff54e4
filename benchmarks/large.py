"""A model of 100 million parameters in bf16 on a GPU: steps between CUDA events, and peak memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from thawline.algorithms import LoRAInject, TrainOnly
from thawline.engine import Algorithm, Trainer

from .adapters import llama
from .batches import Batches
from .measure import Row, race, ratio, told

_STEPS = 8


def large(rounds: int, device: torch.device) -> list[Row]:
    """Whole steps of the Trainer against a hand-written loop: full, LoRA, the upper half of the blocks; nothing on a CPU."""
    if device.type != "cuda":
        return []
    contestants: dict[str, Callable[[], float]] = {name: partial(fit, device) for name, fit in FITS.items()}
    peaks = {name: peak(work, device) for name, work in contestants.items()}
    timings = race(contestants, rounds, _STEPS - 1, device=device)
    note, sizes = told(timings, "ms"), "; ".join(f"{name} {each:.0f} MB" for name, each in peaks.items())
    rows: list[Row] = []
    for name in timings:
        if name != HAND:
            figure, bar = f"100M in bf16, {{}}, {name} / {HAND}", 1.02 if name == "full" else None
            rows.append(ratio(figure.format("step"), timings, name, HAND, bar, note=note))
            rows.append(Row(figure.format("peak memory"), peaks[name] / peaks[HAND], "x", bar, sizes))
    return rows


def model(device: torch.device) -> Any:
    """Return a Llama of 12 blocks of width 768, 32,000 tokens tied: 110 million parameters."""
    return llama(device, vocab=32000, width=768, inner=2048, blocks=12, heads=12, length=512, tied=True)


def batches(device: torch.device) -> Batches:
    """Return 8 x 512 tokens a step."""
    ids = torch.randint(32000, (8, 512), device=device)
    return Batches([{"input_ids": ids, "labels": ids}] * _STEPS, device)


def by_hand(device: torch.device) -> float:
    """Train a fresh model by a loop; return the seconds of its steps."""
    net, data = model(device), batches(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    total = 0.0
    for batch in data:
        with torch.autocast(device.type, torch.bfloat16):
            loss = net(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.item()
    return data.seconds


def by_trainer(device: torch.device, algorithms: Callable[[], list[Algorithm]]) -> float:
    """Train a fresh model by the Trainer; return the seconds of its steps."""
    data = batches(device)
    trainer = Trainer(
        algorithms=algorithms(), optimizer=partial(torch.optim.AdamW, lr=1e-4), precision="bf16", progress=False,
        device=str(device),
    )  # fmt: skip
    trainer.fit(model(device), data, duration="1ep")
    return data.seconds


HAND = "by hand, full"
FITS: dict[str, Callable[[torch.device], float]] = {
    HAND: by_hand,
    "full": partial(by_trainer, algorithms=list),
    "LoRA": partial(by_trainer, algorithms=lambda: [LoRAInject(rank=8, target="all-linear")]),
    "upper half": partial(by_trainer, algorithms=lambda: [TrainOnly(["blocks[-6:]", "head"])]),
}


def peak(work: Callable[[], float], device: torch.device) -> float:
    """Return by how many megabytes the memory of the GPU grows at most while ``work`` makes a model and trains it."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6
