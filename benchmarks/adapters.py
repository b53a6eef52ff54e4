"""LoRA: a whole training step and its memory, against full fine-tuning and against peft where it is installed."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch

from thawline.algorithms import inject_lora
from thawline.engine import ParameterLedger

from .measure import Row, compared, race, ratio, told
from .peers import installed

WAYS = ("full", "ours", "ours, dropout", "peft", "peft, dropout")
_DROPOUT = 0.05


def llama(
    device: torch.device,
    *,
    vocab: int,
    width: int,
    inner: int,
    blocks: int,
    heads: int,
    length: int,
    tied: bool = False,
) -> Any:
    """Return a Llama with random weights, always the same ones."""
    from transformers import LlamaConfig, LlamaForCausalLM  # slow to import: only here

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=heads, max_position_embeddings=length, use_cache=False, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device).train()  # type: ignore[arg-type]  # transformers annotates .to loosely


def stepper(way: str, device: torch.device) -> Callable[[], None]:
    """Return a function that trains one step: 4-block Llama of width 256, 8 x 128 tokens, rank 8 on all linear layers, AdamW."""
    model = llama(device, vocab=512, width=256, inner=688, blocks=4, heads=4, length=128)
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
    return [way for way in WAYS if not way.startswith("peft") or installed("peft")]


# Who is measured in units of whom: the bars of the step, and of the memory's growth.
PAIRS: dict[tuple[str, str], tuple[float | None, float | None]] = {
    ("ours", "full"): (0.86, None),
    ("ours", "peft"): (0.92, 0.72),
    ("ours, dropout", "peft, dropout"): (0.70, 0.72),
    ("peft", "full"): (None, None),
}


def adapting(rounds: int, device: torch.device) -> list[Row]:
    """Whole steps, and the growth of peak memory over three of them in a process of its own."""
    timings = race({way: stepper(way, device) for way in ways()}, rounds, device=device)
    grown: dict[str, list[float]] = {}
    if device.type == "cpu" and sys.platform == "linux":
        for _ in range(max(1, rounds // 3)):
            for way in timings:
                grown.setdefault(way, []).append(growth(way))
    rows: list[Row] = []
    for (mine, other), (bar, _) in PAIRS.items():
        if mine in timings and other in timings:
            rows.append(ratio(f"LoRA step, {mine} / {other}", timings, mine, other, bar, note=told(timings, "ms")))
    note = "; ".join(f"{way} {statistics.median(values):.0f} MB" for way, values in grown.items())
    for (mine, other), (_, bar) in PAIRS.items():
        if mine in grown and other in grown:
            rows.append(compared(f"LoRA peak memory, {mine} / {other}", grown[mine], grown[other], bar, note=note))
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


def growth(way: str) -> float:
    """Return by how many megabytes the peak of a fresh process grows over three steps."""
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT.format(way=way)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


__all__ = ["adapting", "growth", "llama", "stepper", "ways"]
