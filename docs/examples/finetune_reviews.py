"""Fine-tune MiniLM to tell praise from panning in movie reviews: three recipes, then a run that is killed and resumed.

make demo                          1,000 sentences, about two and a half minutes on two cores
make demo ARGS="--train 8000"      8,000 sentences
"""

import argparse
import multiprocessing
import os
import shutil
import time
from functools import partial
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # before torch is imported: waiting threads leave the core to others

import torch
from matplotlib.figure import Figure
from reviews import Collate, Review, load_classifier, load_reviews, load_tokenizer, peak_memory, reset_peak_memory
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from thawline.algorithms import EMA, GradClip, LayerThaw, LoRAInject, head_only
from thawline.engine import Algorithm, Checkpointing, FitResult, Trainer, linear

ARCHIVE = Path(__file__).parents[2] / ".demo" / "vaderSentiment-3.3.2.tar.gz"

# A recipe is a learning rate and a list of algorithms. The head trains from the start in all three;
# LayerThaw adds one block of the encoder each tenth of the fit, from the top down, each slower than the one above.
# Where LoRAInject stands beside it, the blocks' own weights stay held and only their adapters thaw.
RECIPES: dict[str, tuple[float, list[Algorithm]]] = {
    "head only": (3e-3, head_only()),
    "LoRA, thawed": (3e-3, [LoRAInject(rank=8), LayerThaw(every="0.1dur", lr_scale=0.8)]),
    "all blocks, thawed": (
        3e-4,
        [LayerThaw(every="0.1dur", lr_scale=0.9), GradClip(1.0), EMA(half_life="0.1dur")],
    ),
}


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of sentences told right."""
    return (logits.argmax(-1) == labels).float().mean()


def fit(
    recipe: str, train: list[Review], test: list[Review], *, run_dir: Path, seed: int,
    save: str = "1ep", progress: bool | str = "auto", resume: bool = False,
) -> tuple[nn.Module, FitResult]:  # fmt: skip
    """Fine-tune a fresh MiniLM by one of the recipes for two epochs, or go on with the run in ``run_dir``."""
    torch.set_num_threads(2)
    lr, algorithms = RECIPES[recipe]
    collate = Collate(load_tokenizer())
    trainer = Trainer(
        algorithms=algorithms,
        optimizer=partial(torch.optim.AdamW, lr=lr),
        schedule=linear(),
        loss_fn=nn.functional.cross_entropy,
        metrics={"accuracy": accuracy},
        seed=seed,
        run_dir=run_dir,
        checkpoint=Checkpointing(every=save, keep=1),
        progress=progress,
    )
    model = load_classifier(seed)
    train_loader = DataLoader(train, batch_size=16, shuffle=True, collate_fn=collate)
    eval_loader = DataLoader(test, batch_size=64, collate_fn=collate)
    return model, trainer.fit(model, train_loader, eval_loader, duration="2ep", resume=resume)


def compare(train: list[Review], test: list[Review], *, out: Path, seed: int, console: Console) -> None:
    """Run the recipes one after the other on the same split; print and draw their figures side by side."""
    columns = ("accuracy", "seconds", "trainable %", "peak MiB")
    table = Table("recipe", *columns, "checkpoint", title=f"{len(train):,} training and {len(test):,} test sentences")
    figures = []
    for recipe in RECIPES:
        console.rule(recipe)
        run_dir = fresh(out / recipe.replace(",", "").replace(" ", "-"))
        reset_peak_memory()
        start = time.perf_counter()
        _, result = fit(recipe, train, test, run_dir=run_dir, seed=seed)
        seconds = time.perf_counter() - start
        share = 100 * result.timeline.spans[-1].share
        figures.append((result.metrics["eval/accuracy"], seconds, share, peak_memory()))
        table.add_row(
            recipe, *(f"{value:.{places}f}" for value, places in zip(figures[-1], (3, 0, 2, 0))), str(result.last)
        )
        result.timeline.save(run_dir / "timeline.png", title=recipe)
        print(result.timeline)
    picture = Figure(figsize=(11, 3), layout="constrained")
    for axes, name, values in zip(picture.subplots(1, len(columns)), columns, zip(*figures)):
        axes.bar_label(axes.bar(list(RECIPES), values), fmt="%.3g")
        axes.set_title(name)
        axes.tick_params("x", rotation=20)
    picture.savefig(out / "comparison.png", dpi=150)
    console.print(table)
    print(f"pictures: {out / 'comparison.png'} and timeline.png beside each checkpoint")


def kill_and_resume(train: list[Review], test: list[Review], *, out: Path, seed: int, console: Console) -> None:
    """Kill a run half-way, go on with it, and compare its weights to those of a run that nobody stopped."""
    console.rule(f"a run on {len(train)} sentences, killed half-way")
    rehearse = partial(fit, "all blocks, thawed", train, test, seed=seed, save="0.5dur", progress=False)
    whole, _ = rehearse(run_dir=fresh(out / "whole"))
    killed = fresh(out / "killed")
    process = multiprocessing.get_context("spawn").Process(target=rehearse, kwargs={"run_dir": killed})
    process.start()
    while process.is_alive() and not any(killed.glob("ba*")):  # its first checkpoint is cut half-way
        time.sleep(0.05)
    process.kill()
    process.join()
    print(f"killed by signal {-(process.exitcode or 0)}; left: {', '.join(path.name for path in killed.glob('ba*'))}")
    resumed, result = rehearse(run_dir=killed, resume=True)
    mine, other = resumed.state_dict(), whole.state_dict()
    equal = mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
    print(f"resumed to batch {result.clock.batch}; all {len(mine)} tensors equal, bit for bit: {equal}")
    if not equal:
        raise SystemExit("The resumed run differs from the uninterrupted one.")


def fresh(run_dir: Path) -> Path:
    """Return ``run_dir`` without what an earlier demo left there."""
    shutil.rmtree(run_dir, ignore_errors=True)
    return run_dir


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="Fine-tune MiniLM on movie reviews, three ways side by side.")
    parser.add_argument("--train", type=int, default=1000, help="number of training sentences (even, up to 8000)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the head, the order and the dropout")
    parser.add_argument("--out", type=Path, default=Path(".demo/runs"), help="where checkpoints and pictures go")
    options = parser.parse_args()
    train, test = load_reviews(ARCHIVE, train=options.train, test=1000, seed=options.seed)
    console = Console()
    compare(train, test, out=options.out, seed=options.seed, console=console)
    kill_and_resume(train[:200], test[:100], out=options.out, seed=options.seed, console=console)


if __name__ == "__main__":
    main()
