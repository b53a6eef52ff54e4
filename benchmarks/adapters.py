"""LoRA: a whole training step and its memory, against full fine-tuning and against peft where it is installed."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from thawline.algorithms import inject_lora
from thawline.engine import ParameterLedger

from .measure import Row, race, told

WAYS = ("full", "ours", "ours, dropout", "peft", "peft, dropout")
_DROPOUT = 0.05


def stepper(way: str, device: torch.device) -> Callable[[], None]:
    """Return a function that trains one step: 4-block Llama of width 256, 8 x 128 tokens, rank 8 on all linear layers, AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM  # slow to import: only here

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, use_cache=False,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).to(device).train()  # type: ignore[arg-type]  # transformers annotates .to loosely
    dropout = _DROPOUT if way.endswith("dropout") else 0.0
    make = partial(torch.optim.AdamW, lr=1e-3)
    if way.startswith("ours"):
        ledger = ParameterLedger(model, make)
        inject_lora(ledger, "all-linear", rank=8, alpha=16, dropout=dropout)
        optimizer: Any = ledger.optimizers[0]
    elif way.startswith("peft"):
        peft: Any = import_module("peft")

        settings = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules="all-linear")
        model = peft.get_peft_model(model, settings)
        optimizer = make([each for each in model.parameters() if each.requires_grad])
    else:
        optimizer = make(model.parameters())
    ids = torch.randint(512, (8, 128), device=device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ways() -> list[str]:
    """Return the contestants that can run here."""
    return [way for way in WAYS if not way.startswith("peft") or find_spec("peft") is not None]


def adapting(rounds: int, device: torch.device) -> list[Row]:
    """Whole steps, and the growth of peak memory over three of them in a process of its own."""
    steppers = {way: stepper(way, device) for way in ways()}
    timings = race(steppers, rounds)
    note = told(timings, "ms")
    bars = {
        ("ours", "full"): 0.86,
        ("ours", "peft"): 0.92,
        ("ours, dropout", "peft, dropout"): 0.70,
        ("peft", "full"): None,
    }
    rows = [
        Row(f"LoRA step, {mine} / {other}", timings[mine].median / timings[other].median, "x", bar, note)
        for (mine, other), bar in bars.items()
        if mine in timings and other in timings
    ]
    grown = (
        {way: growth(way, max(1, rounds // 5)) for way in ways()}
        if device.type == "cpu" and sys.platform == "linux"
        else {}
    )
    note = "; ".join(f"{way} {value:.0f} MB" for way, value in grown.items())
    for mine, other in (("ours", "peft"), ("ours, dropout", "peft, dropout"), ("ours", "full")):
        if mine in grown and other in grown:
            bar = 0.72 if other == "peft" else None
            rows.append(Row(f"LoRA peak memory, {mine} / {other}", grown[mine] / grown[other], "x", bar, note))
    return rows


SCRIPT = """
import re, torch
from pathlib import Path
from benchmarks.adapters import stepper
torch.set_num_threads(1)
step = stepper({way!r}, torch.device("cpu"))
Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
kib = lambda what: int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = kib("VmRSS")
for _ in range(3):
    step()
print((kib("VmHWM") - before) / 1024)
"""


def growth(way: str, rounds: int) -> float:
    """Return by how many megabytes the peak of a fresh process grows over three steps; the median of several processes."""
    found: list[float] = []
    for _ in range(rounds):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(way=way)], check=True, capture_output=True, text=True
        )
        found.append(float(done.stdout))
    return statistics.median(found)


__all__ = ["adapting", "growth", "stepper", "ways"]
