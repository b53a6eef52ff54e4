"""Fine-tune MiniLM on movie reviews by three recipes, side by side; then kill a run and resume it.

make demo                          1,000 sentences, about two and a half minutes on two cores
make demo ARGS="--train 8000"      8,000 sentences
"""

import argparse
import os
import shutil
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: threads that wait leave the core to others

import torch
from reviews import Collate, load_classifier, load_reviews, load_tokenizer, peak_memory, reset_peak_memory, side_by_side
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from thawline.algorithms import EMA, GradClip, LayerThaw, LoRAInject, head_only
from thawline.engine import Checkpointing, FitResult, Trainer, linear

ARCHIVE = Path(__file__).parents[2] / ".demo" / "vaderSentiment-3.3.2.tar.gz"

# A recipe is a learning rate and a list of algorithms. In all three the head trains from the start. LayerThaw adds a
# block of the encoder each tenth of the fit, from the top down, each one slower than the one above it. Where LoRAInject
# stands beside it, the weights of the blocks stay held, and only the adapters thaw.
RECIPES = {
    "head only": (3e-3, head_only()),
    "LoRA, thawed": (3e-3, [LoRAInject(rank=8), LayerThaw(every="0.1dur", lr_scale=0.8)]),
    "blocks, thawed": (3e-4, [LayerThaw(every="0.1dur", lr_scale=0.9), GradClip(1.0), EMA(half_life="0.1dur")]),
}


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of sentences whose label is right."""
    return (logits.argmax(-1) == labels).float().mean()


class Demo:
    """Three recipes on the same sentences, then one of them killed and resumed."""

    def __init__(self, *, train: int, seed: int, out: Path) -> None:
        self.seed, self.out, self.console = seed, out, Console()
        self.train, self.test = load_reviews(ARCHIVE, train=train, test=1000, seed=seed)


def fit(recipe: str, train: Sequence[Review], test, *, run_dir: Path, seed, **)
