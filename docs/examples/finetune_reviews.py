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
from rich.console import Console
from torch import Tensor, nn

import reviews
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
    recipe: str, split: reviews.Split, seed: int, run_dir: Path, *, resume: bool = False, quiet: bool = False
) -> tuple[nn.Module, FitResult]:
    """Train MiniLM under a new head for two epochs by a recipe, or go on where the run in ``run_dir`` stopped."""
    torch.set_num_threads(2)
    if not resume:
        shutil.rmtree(run_dir, ignore_errors=True)  # what an earlier demo left
    lr, algorithms = RECIPES[recipe]
    trainer = Trainer(
        algorithms=algorithms,
        optimizer=partial(torch.optim.AdamW, lr=lr),
        schedule=linear(),
        loss_fn=nn.functional.cross_entropy,
        metrics={"accuracy": accuracy},
        seed=seed,
        run_dir=run_dir,
        checkpoint=Checkpointing(every="0.5dur", keep=1),
        progress=False if quiet else "auto",
    )
    model = reviews.load_classifier(seed)
    train_loader, eval_loader = reviews.make_loaders(*split)
    return model, trainer.fit(model, train_loader, eval_loader, duration="2ep", resume=resume)


def compare(split: reviews.Split, seed: int, out: Path) -> None:
    """Run the three recipes on the same sentences; print and draw their figures side by side."""
    figures: dict[str, dict[str, float]] = {}
    for recipe in RECIPES:
        console.rule(recipe)
        run_dir = out / recipe.replace(", ", "-").replace(" ", "-")
        reviews.reset_peak_memory()
        start = time.perf_counter()
        _, result = fit(recipe, split, seed, run_dir)
        figures[recipe] = {
            "accuracy": result.metrics["eval/accuracy"],
            "seconds": time.perf_counter() - start,
            "trainable at the end (%)": 100 * result.timeline.spans[-1].share,
            "peak memory (MiB)": reviews.peak_memory(),
        }
        print(result.timeline)
        print(f"picture: {result.timeline.save(run_dir / 'timeline.png', title=recipe)}")
        print(f"to go on from: {result.last}")
    title = f"{len(split[0]):,} training sentences, {len(split[1]):,} test sentences"
    console.print(reviews.side_by_side(figures, title=title, picture=out / "comparison.png"))
    print(f"picture: {out / 'comparison.png'}")


def kill_and_resume(split: reviews.Split, seed: int, out: Path) -> None:
    """Kill a run half-way, resume it, and compare its weights with those of a run that nobody stopped."""
    console.rule(f"a run on {len(split[0])} sentences, killed half-way")
    whole, expected = fit("blocks, thawed", split, seed, out / "whole", quiet=True)
    run = partial(fit, "blocks, thawed", split, seed, out / "killed", quiet=True)
    shutil.rmtree(out / "killed", ignore_errors=True)
    process = get_context("spawn").Process(target=run)
    process.start()
    while process.is_alive() and not any((out / "killed").glob("ba*")):  # its first checkpoint, half-way
        time.sleep(0.05)
    process.kill()
    process.join()
    print(
        f"killed by signal {-(process.exitcode or 0)}; it left {[path.name for path in (out / 'killed').glob('ba*')]}"
    )
    model, result = run(resume=True)
    pairs = zip(whole.state_dict().values(), model.state_dict().values(), strict=True)
    equal = all(torch.equal(first, second) for first, second in pairs) and result.history == expected.history
    print(f"resumed; weights and history equal those of an uninterrupted run, bit for bit: {equal}")
    if not equal:
        raise SystemExit("The resumed run differs.")


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="Fine-tune MiniLM on movie reviews.")
    parser.add_argument("--train", type=int, default=1000, help="number of training sentences, at most 8000")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the head, and the training")
    parser.add_argument("--out", type=Path, default=Path(".demo/runs"), help="where checkpoints and pictures go")
    args = parser.parse_args()
    train, test = reviews.load_reviews(ARCHIVE, train=args.train, test=1000, seed=args.seed)
    compare((train, test), args.seed, args.out)
    kill_and_resume((train[:200], test[:100]), args.seed, args.out)


if __name__ == "__main__":
    main()
