"""Ranks that were given other things than the first: a typed error on all of them that names rank, got and wanted."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

import ranks
from forked import together
from thawline.algorithms import EMA, GradClip
from thawline.engine import Checkpointing, Replicate, ThawlineWarning, constant, linear

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked")
Call = Callable[[bool, Path], Any]


class Mean(ranks.Mean):
    """An accumulating metric without a way to synchronize."""


def fit(folder: Path, **given: Any) -> Any:
    """Train for an epoch."""
    return ranks.fitted(ranks.model(), given.pop("algorithms", ()), duration=given.pop("duration", "1ep"), **given)


def evaluate(count: int, *, wrapped: bool = False, **settings: Any) -> Any:
    """Evaluate so many samples, four a batch; in an iterable whose length nobody knows where ``wrapped``."""
    loader = DataLoader(ranks.data(count), batch_size=4)
    return ranks.trainer(**settings).evaluate(ranks.model(), iter([*loader]) if wrapped else loader)


# What differs, and what is said of it; the second rank is the other one.
CASES: dict[str, tuple[Call, tuple[str, ...]]] = {
    "a length within the last batch": (
        lambda other, folder: fit(folder, batches=ranks.loader(40 if other else 44)),
        ("train_loader, samples: rank 1 has 40, rank 0 has 44",),
    ),
    "a batch size": (
        lambda other, folder: fit(folder, batches=ranks.loader(24 if other else 48, 6 if other else 12)),
        ("train_loader, samples of the first batch: rank 1 has 6, rank 0 has 12",),
    ),
    "ready batches": (
        lambda other, folder: fit(folder, batches=[(torch.zeros(8 - 2 * other, 6).double(), torch.zeros(8 - 2 * other).long())]),
        ("train_loader, samples of the first batch: rank 1 has 6, rank 0 has 8",),
    ),
    "no evaluation": (
        lambda other, folder: fit(folder, evaluated=None if other else ranks.loader(8, 4)),
        ("eval_loader: rank 1 has None, rank 0 has {'batches': 2",),
    ),
    "a seed": (
        lambda other, folder: fit(folder, seed=12 if other else 11),
        ("setting seed: rank 1 has 12, rank 0 has 11",),
    ),
    "a duration": (
        lambda other, folder: fit(folder, duration="2ep" if other else "1ep"),
        ("setting duration: rank 1 has '2ep', rank 0 has '1ep'",),
    ),
    "a schedule": (
        lambda other, folder: fit(folder, schedule=constant() if other else linear(end=0.2)),
        ("setting schedule",),
    ),
    "an optimizer": (
        lambda other, folder: fit(folder, optimizer=partial(torch.optim.SGD if other else torch.optim.AdamW, lr=0.1)),
        ("setting optimizer", "SGD", "AdamW"),
    ),
    "metrics": (
        lambda other, folder: fit(folder, metrics={"mean": Mean()} if other else {}),
        ("setting metrics, mean: rank 1 has", "rank 0 has nothing"),
    ),
    "buckets": (
        lambda other, folder: fit(folder, distributed=Replicate(timeout=60, bucket_mib=2 if other else 1)),
        ("setting distributed, bucket_mib: rank 1 has 2, rank 0 has 1",),
    ),
    "the third algorithm": (
        lambda other, folder: fit(folder, algorithms=[EMA(), EMA(), GradClip(2.0 if other else 1.0)]),
        ("setting algorithms[2], arguments, max_norm: rank 1 has 2.0, rank 0 has 1.0",),
    ),
    "one more algorithm": (
        lambda other, folder: fit(folder, algorithms=[EMA()] * other),
        ("setting algorithms[", "rank 0 has nothing"),
    ),
    "what is frozen": (
        lambda other, folder: ranks.fitted(_frozen(other)),
        ("parameter stem.weight, requires_grad: rank 1 has False, rank 0 has True",),
    ),
    "a buffer": (
        lambda other, folder: ranks.fitted(nn.BatchNorm1d(6 + other).double()),
        ("buffer running_mean, shape: rank 1 has [7], rank 0 has [6]",),
    ),
    "a checkpoint's interval": (
        lambda other, folder: fit(folder, run_dir=folder / "run", checkpoint=Checkpointing(every=f"{1 + other}ba")),
        ("setting checkpoint, every: rank 1 has", "rank 0 has"),
    ),
    "no run_dir": (
        lambda other, folder: fit(folder, run_dir=None if other else folder / "run"),
        ("rank 1 has no run_dir, and rank 0 has one", "Write the same on all ranks"),
    ),
    "a run_dir": (
        lambda other, folder: fit(folder, run_dir=folder / "run" if other else None),
        ("rank 1 has run_dir='", "and rank 0 has none"),
    ),
    "its own run_dir": (
        lambda other, folder: fit(folder, run_dir=_made(folder / f"run-{int(other)}")),
        ("does not see", "got one that is held by nobody", "wanted one that all machines share, held by process"),
    ),
    "evaluated samples": (
        lambda other, folder: evaluate(20 if other else 21),
        ("the ranks disagree on the data: loader, batches: rank 1 has 5, rank 0 has 6",),
    ),
    "evaluated batches": (
        lambda other, folder: evaluate(20 if other else 21, wrapped=True),
        ("the ranks are not at the same point", "EVAL_END of batch 5", "EVAL_END of batch 6"),
    ),
    "batches of a metric": (
        lambda other, folder: evaluate(20 if other else 21, wrapped=True, metrics={"mean": Mean()}),
        ("the ranks are not at the same point", "EVAL_END of batch 5", "exchange of batch 6"),
    ),
}  # fmt: skip


def _frozen(other: bool) -> nn.Module:
    net = ranks.model()
    net.get_parameter("stem.weight").requires_grad_(not other)
    return net


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_what_differs_is_named_on_all_ranks(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained, nobody hangs, and every rank's error says what is to be the same."""
    monkeypatch.setattr("thawline.engine.ranks._PATIENCE", 0.2)
    call, words = CASES[case]
    found = together(lambda rank: ranks.raised(lambda: call(rank == 1, tmp_path)), limit=60)
    assert sorted(found) == [0, 1]
    for text in found.values():
        assert text.startswith("DistributedError: "), text
        for each in words:
            assert each in text, text


def test_resuming_on_some_ranks_is_resuming_on_all(tmp_path: Path) -> None:
    """The first rank says what a fit goes on from: another one that says otherwise is not heard."""
    run = tmp_path / "run"
    together(lambda rank: fit(tmp_path, run_dir=run))
    found = together(lambda rank: fit(tmp_path, run_dir=run, duration="2ep", resume=rank == 0)["clock"])
    assert found == {0: [2, 8, 88], 1: [2, 8, 88]}


def test_a_rank_on_its_own_trains_a_model_of_its_own() -> None:
    """With ``distributed=False`` nothing is shared, whatever the launcher says."""
    found: dict[int, dict[str, Tensor]] = together(
        lambda rank: ranks.fitted(ranks.model(), batches=ranks.loader(24 + 12 * rank), distributed=False)["clock"]
    )
    assert found == {0: [3, 6, 72], 1: [3, 9, 108]}


class Split(IterableDataset[Any]):
    """A stream of which each rank yields its own part."""

    def __iter__(self) -> Any:
        return itertools.islice(iter(ranks.data()), int(os.environ["RANK"]), None, 2)


@pytest.mark.parametrize("kind", ["a subset", "a stream", "ready batches", "an evaluation", "the whole"])
def test_data_that_were_split_by_rank_are_warned_of(kind: str) -> None:
    """Each rank would train on its part of a part; the first rank says so, and nothing is said of the same data on all."""

    def train(rank: int) -> list[str]:
        mine = DataLoader(Subset(ranks.data(), range(rank, 44, 2)), batch_size=4, shuffle=True)
        cases: dict[str, dict[str, Any]] = {
            "a subset": {"batches": mine},
            "a stream": {"batches": DataLoader(Split(), batch_size=4)},
            "ready batches": {"batches": [*mine]},
            "an evaluation": {"evaluated": mine},
            "the whole": {},
        }
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", ThawlineWarning)
            ranks.fitted(ranks.model(), duration="1ep", **cases[kind])
        return [str(each.message) for each in said if each.category is ThawlineWarning]

    found = together(train)
    name = "eval_loader" if kind == "an evaluation" else "train_loader"
    expected = [] if kind == "the whole" else [f"rank 1 reads other samples from {name} than rank 0 does"]
    assert [each.partition(", and")[0] for each in found[0]] == expected
    assert found[1] == []
