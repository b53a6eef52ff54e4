"""Algorithms on ranks forked from the test: equal to the bit among themselves, and to one process up to rounding."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import ranks
from forked import together
from test_distributed import close, same_everywhere
from thawline.algorithms import (
    EMA,
    LISA,
    BlockCycle,
    FreezeOut,
    GradClip,
    LayerThaw,
    LoRAInject,
    Phase,
    Plateau,
    PrefixCache,
    ThawSchedule,
    head_only,
    merge_lora,
    unmerge_lora,
)
from thawline.engine import Algorithm, Event, State, on

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked")
Recipe = Callable[[], list[Algorithm]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute the reference as the ranks compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def merging() -> list[Algorithm]:
    """Merge the adapters in the middle of an epoch, take that back in the next one, and merge again."""

    @on(Event.BATCH_END)
    def merge(state: State) -> None:
        if state.clock.batch in (3, 9):
            merge_lora(state.ledger)
        elif state.clock.batch == 6:
            unmerge_lora(state.ledger)

    return [LoRAInject(rank=2, target="all-linear"), EMA(half_life="3ba"), GradClip(0.5), merge()]


def plateau() -> list[Algorithm]:
    """Thaw where a metric of all ranks stands still."""
    until = Plateau("eval/loss", patience=1, min_delta=9.0)
    return [
        ThawSchedule(
            [
                Phase(thaw="head", until=until),
                Phase(thaw="blocks[2]", until=until),
                Phase(thaw=["blocks[1]", "blocks[0]", "stem"]),
            ]
        ),
        EMA(),
    ]


RECIPES: dict[str, Recipe] = {
    "merge": merging,
    "cycle": lambda: [BlockCycle(every="2ba"), EMA(half_life="3ba")],
    "sampled": lambda: [LISA(every="1ba", layers=2), GradClip(0.1)],
    "freeze out": lambda: [FreezeOut(), EMA(half_life="3ba")],
    "plateau": plateau,
}


def both(fit: Callable[[], dict[str, Any]], world: int = 2) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return what the ranks come to, and one process."""
    found = together(lambda rank: fit(), world)
    return [found[rank] for rank in range(world)], fit()


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("recipe", RECIPES)
def test_ranks_stay_equal_and_equal_one_process(recipe: str, world: int) -> None:
    """After each merge, each turn of a cycle, each sampled layer: bit-equal on the ranks, 1e-12 from one process."""
    found, one = both(lambda: ranks.fitted(ranks.model(), RECIPES[recipe](), evaluated=ranks.loader(17, 4)), world)
    same_everywhere(found)
    close(found[0]["weights"], one["weights"], 1e-12)
    assert found[0]["losses"] == pytest.approx(one["losses"], abs=1e-12)
    assert (found[0]["trainable"], found[0]["spans"]) == (one["trainable"], one["spans"])
    assert len(set(one["trainable"])) > 1 or recipe in ("cycle", "sampled")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:The .grad attribute of a Tensor")
def test_compiled_blocks_are_trained_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks compiled each by itself, the ranks come to what one process comes to without a compiler."""
    monkeypatch.setattr("thawline.engine.compiling.BACKEND", "aot_eager")
    torch._dynamo.reset()

    def fit(compiled: Any = "blocks") -> dict[str, Any]:
        return ranks.fitted(ranks.model(), [LayerThaw(every="2ba"), EMA(half_life="3ba")], compile=compiled)

    found, one = together(lambda rank: fit(), limit=120), fit(False)
    same_everywhere([found[0], found[1]])
    close(found[0]["weights"], one["weights"], 1e-12)


class Greedy(ranks.Net):
    """Runs out of memory on the last rank where it is given more than so many samples."""

    most = 1
    rank, last = 0, 1

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.training and self.rank == self.last and len(x) > self.most:
            raise torch.OutOfMemoryError("out of memory, on purpose")
        return out


@pytest.mark.filterwarnings("ignore:out of memory")
def test_memory_that_ran_out_elsewhere_is_no_error_of_a_share_of_one() -> None:
    """A rank whose piece is a single sample already repeats it as it is, while the one that ran out cuts its own."""

    def fit(rank: int) -> dict[str, Any]:
        net = ranks.model(Greedy)
        vars(net)["rank"] = rank
        return ranks.fitted(net, batches=DataLoader(ranks.data(27), batch_size=3, shuffle=True), duration="1ep")

    one = ranks.fitted(
        ranks.model(Greedy), batches=DataLoader(ranks.data(27), batch_size=3, shuffle=True), duration="1ep"
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("thawline.engine.data.check_shares", lambda *args, **kwargs: None)  # 3 samples for 2 ranks
        found = together(fit)
    same_everywhere([found[0], found[1]])
    close(found[0]["weights"], one["weights"], 1e-12)


@pytest.mark.filterwarnings("ignore:out of memory")
def test_memory_that_never_suffices_ends_all_ranks() -> None:
    """A single sample at a time is too much for one rank: it says so, and the others say that they lost it."""

    def fit(rank: int) -> str:
        net = ranks.model(Greedy)
        vars(net).update(rank=rank, most=0)
        return ranks.raised(lambda: ranks.fitted(net, duration="1ep"))

    found = together(fit)
    assert found[1].startswith("OutOfMemoryError: out of memory at epoch 0, batch 0 with a single sample at a time.")
    assert found[0].startswith("DistributedError: rank 0 of 2 lost another one while reducing gradients of batch 0")


def skipped(world: int, *, epochs: int = 6, samples: int = 480, batch: int = 48) -> list[list[float]]:
    """Return for each rank, epoch by epoch, the share of its samples for which the frozen part was skipped."""

    def fit(rank: int) -> list[float]:
        cache, seen = PrefixCache(), [0]

        @on(Event.EPOCH_END)
        def count(state: State) -> None:
            seen.append(cache.computed)

        ranks.fitted(
            ranks.model(), [*head_only(), cache, count()], duration=f"{epochs}ep",
            batches=DataLoader(ranks.data(samples), batch_size=batch, shuffle=True),
        )  # fmt: skip
        assert (cache.off, cache.barred) == (None, {})
        return [1 - (after - before) * world / samples for before, after in pairwise(seen)]

    found = together(fit, world)
    return [found[rank] for rank in range(world)]


@pytest.mark.parametrize("world", [2, 3])
def test_the_prefix_of_most_samples_is_on_their_rank(world: int) -> None:
    """From the second epoch on the frozen part runs for few samples, where shares by place would leave nearly all to it."""
    for each in skipped(world):
        assert not isinstance(each, str), each
        assert each[0] == 0.0
        assert each[1] > 0.75
        assert each[-1] > 0.85


@pytest.mark.parametrize("world", [2, 3])
def test_a_prefix_computed_in_parts_changes_nothing(world: int) -> None:
    """Weights are those of ranks and of one process that compute everything, while the frontier moves."""

    def fit(*cached: Algorithm) -> dict[str, Any]:
        algorithms = [LayerThaw(every="6ba"), EMA(half_life="3ba"), *cached]
        return ranks.fitted(ranks.model(), algorithms, duration="5ep", evaluated=ranks.loader(17, 4))

    found, one = together(lambda rank: fit(PrefixCache()), world), fit()
    same_everywhere([found[rank] for rank in range(world)])
    close(found[0]["weights"], one["weights"], 1e-12)
    assert found[0]["losses"] == pytest.approx(one["losses"], abs=1e-12)
