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

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads leave the core free

import torch
from reviews import load_classifier, load_reviews, loaders, peak_memory, reset_peak_memory, side_by_side
from rich.console import Console
from torch import Tensor, nn

from thawline.algorithms import EMA, GradClip, LayerThaw, LoRAInject, head_only
from thawline.engine import Checkpointing, FitResult, Trainer, linear

ARCHIVE = Path(__file__).parents[2] / ".demo" / "vaderSentiment-3.3.2.tar.gz"

# A recipe is a learning rate and a list of algorithms. In all three the head trains from the start. LayerThaw adds a
# block of the encoder each tenth of the fit, from the top down, each slower than the one above it. Where LoRAInject
# stands beside it, the blocks' own weights stay held, and only the adapters in them thaw.
RECIPES = {
    "head only": (3e-3, head_only()),
    "LoRA, thawed": (3e-3, [LoRAInject(rank=8), LayerThaw(every="0.1dur", lr_scale=0.8)]),
    "blocks, thawed": (3e-4, [LayerThaw(every="0.1dur", lr_scale=0.9), GradClip(1.0), EMA(half_life="0.1dur")]),
}

console = Console()


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of sentences that are told right."""
    return (logits.argmax(-1) == labels).float().mean()


def fit(
    recipe: str, split: tuple[list[Review], list[Review]], *, seed: int, run_dir: Path, save: str, quiet: bool, resume: bool
) -> tuple[nn.Module, FitResult]:
    """Fine-tune MiniLM under a new head for two epochs by one of the recipes, or go on where ``run_dir`` stopped."""
    torch.set_num_threads(2)
    lr, algorithms = RECIPES[recipe]
    trainer = Trainer(
        algorithms=algorithms,
        optimizer=partial(torch.optim.AdamW, lr=lr),
        schedule=linear(),
        loss_fn=nn.functional.cross_entropy,
        metrics={"accuracy": accuracy},
        seed=seed,
        run_dir=run_dir,
        checkpoint=Checkpointing(every=save, keep=1),
        progress=False if quiet else "auto",
    )
    model = load_classifier(seed)
    train_loader, eval_loader = loaders(*split)
    return model, trainer.fit(model, train_loader, eval_loader, duration="2ep", resume=resume)
