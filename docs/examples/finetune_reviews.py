"""Fine-tune MiniLM on movie reviews by three recipes, side by side; then kill a run and resume it.

make demo                          1,000 training sentences, less than four minutes on two cores
make demo ARGS="--train 8000"      8,000 of them
"""

import argparse
import os
import shutil
import signal
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads leave the core free

import torch
from rich.console import Console
from torch import nn

import reviews
from thawline.algorithms import EMA, GradClip, LayerThaw, LoRAInject, head_only
from thawline.engine import Checkpointing, FitResult, Trainer, linear

ARCHIVE, OUT = Path(".demo/vaderSentiment-3.3.2.tar.gz"), Path(".demo/runs")

# A recipe is a learning rate and a list of algorithms. In all three the head trains from the start. LayerThaw adds a
# block of the encoder each tenth of the fit, from the top down, each slower than the one above it. Where LoRAInject
# stands beside it, the blocks' own weights stay held, and only the adapters in them thaw.
RECIPES = {
    "head only": (3e-3, head_only()),
    "LoRA, thawed": (3e-3, [LoRAInject(rank=8), LayerThaw("0.1dur", lr_scale=0.8)]),
    "blocks, thawed": (3e-4, [LayerThaw("0.1dur", lr_scale=0.9, stem=False), GradClip(1.0), EMA("0.1dur")]),
}


def fit(
    recipe: str, split: reviews.Split, seed: int, run_dir: Path, *, resume: bool = False, quiet: bool = False
) -> tuple[nn.Module, FitResult]:
    """Train MiniLM under a new head for two epochs by a recipe, or go on where the run in ``run_dir`` stopped."""
    torch.set_num_threads(2)
    lr, algorithms = RECIPES[recipe]
    trainer = Trainer(
        algorithms=algorithms,
        optimizer=partial(torch.optim.AdamW, lr=lr),
        schedule=linear(),
        loss_fn=nn.functional.cross_entropy,
        metrics={"accuracy": reviews.accuracy},
        seed=seed,
        run_dir=run_dir,
        checkpoint=Checkpointing(every="0.5dur", keep=1),
        progress=False if quiet else "auto",
    )
    model = reviews.load_classifier(seed)
    return model, trainer.fit(model, *reviews.make_loaders(*split), duration="2ep", resume=resume)


def compare(split: reviews.Split, seed: int, out: Path) -> None:
    """Run the three recipes on the same sentences; print and draw their figures side by side."""
    figures: dict[str, dict[str, float]] = {}
    for recipe in RECIPES:
        print(f"\n{recipe}\n")
        run_dir = out / recipe.replace(", ", "-").replace(" ", "-")
        reviews.reset_peak_memory()
        start = time.perf_counter()
        _, result = fit(recipe, split, seed, run_dir)
        figures[recipe] = {
            "accuracy": result.metrics["eval/accuracy"],
            "seconds": time.perf_counter() - start,
            "trainable (%)": 100 * result.timeline.spans[-1].share,
            "peak memory (MiB)": reviews.peak_memory(),
        }
        print(result.timeline)
        print(f"picture: {result.timeline.save(run_dir / 'timeline.png', title=recipe)}")
        print(f"to go on from: {result.last}")
    Console().print(reviews.side_by_side(figures, picture=out / "comparison.png"))
    print(f"picture: {out / 'comparison.png'}")


def kill_and_resume(split: reviews.Split, seed: int, out: Path) -> None:
    """Kill a run half-way, resume it, and compare its weights with those of a run that nobody stopped."""
    print(f"\na run on {len(split[0])} sentences, killed half-way\n")
    whole, expected = fit("blocks, thawed", split, seed, out / "whole", quiet=True)
    run_dir = out / "killed"
    run = partial(fit, "blocks, thawed", split, seed, run_dir, quiet=True)
    process = get_context("spawn").Process(target=run)
    process.start()
    while process.is_alive() and not any(run_dir.glob("ba*")):  # the first checkpoint is cut half-way
        time.sleep(0.05)
    process.kill()
    process.join()
    print(f"ended by signal {-(process.exitcode or 0)}; it left {[path.name for path in run_dir.glob('ba*')]}")
    model, result = run(resume=True)
    weights = zip(model.state_dict().values(), whole.state_dict().values(), strict=True)
    equal = all(torch.equal(one, other) for one, other in weights) and result.history == expected.history
    print(f"resumed; weights and history equal those of the uninterrupted run, bit for bit: {equal}")
    if process.exitcode != -signal.SIGKILL or not equal:
        raise SystemExit("The run was not killed half-way, or not resumed to the same weights.")


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="Fine-tune MiniLM on movie reviews.")
    parser.add_argument("--train", type=int, default=1000, help="number of training sentences, at most 8000")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the head, and the training")
    parser.add_argument("--out", type=Path, default=OUT, help="an empty folder for checkpoints and pictures")
    args = parser.parse_args()
    if args.out == OUT:
        shutil.rmtree(OUT, ignore_errors=True)  # what an earlier demo left
    train, test = reviews.load_reviews(ARCHIVE, train=args.train, test=1000, seed=args.seed)
    compare((train, test), args.seed, args.out)
    kill_and_resume((train[:200], test[:100]), args.seed, args.out)


if __name__ == "__main__":
    main()
