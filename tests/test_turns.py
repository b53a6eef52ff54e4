"""LISA and BlockCycle against plain torch, beside BatchNorm and LoRA, resumed, and apart from the global generators."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from helpers import cnn, encoder, loader, mlp, same_weights, weights
from thawline.algorithms import LISA, BlockCycle, LoRAInject, cycle_order, sampled_layers
from thawline.algorithms.turns import Turns, shuffled
from thawline.engine import Algorithm, Checkpointing, Event, State, Trainer
from timelines import Loop, stack

Optimizers = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
ADAMW = partial(torch.optim.AdamW, lr=0.01)
BLOCKS = [f"blocks[{index}]" for index in range(5)]


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Return batches of a small task."""
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(8, 4, generator=generator), torch.randint(2, (8,), generator=generator)) for _ in range(count)]


def network() -> nn.Sequential:
    """Return five blocks and a head."""
    torch.manual_seed(1)
    return mlp(depth=6)


def by_hand(make: Optimizers, turns: list[list[int]], length: int, steps: int, *, forget: bool) -> dict[str, Tensor]:
    """Train the head always, and in each turn the listed blocks, with an optimizer of its own for each of them.

    An optimizer is made when its block's turn begins and thrown away when it ends: the papers' algorithms, written
    down without freezing inside one optimizer. With ``forget`` a block that goes on begins anew as well.
    """
    model = network()
    blocks = [model[2 * index] for index in range(5)]
    head = make(model[10].parameters())
    running: dict[int, torch.optim.Optimizer] = {}
    for step, (x, y) in enumerate(batches(steps)):
        if step % length == 0:
            drawn = turns[step // length]
            before = {} if forget else running
            running = {index: before.get(index) or make(blocks[index].parameters()) for index in drawn}
            for index, block in enumerate(blocks):
                block.requires_grad_(index in drawn)
        cross_entropy(model(x), y).backward()
        for optimizer in (head, *running.values()):
            optimizer.step()
            optimizer.zero_grad()
    return weights(model)


def fitted(algorithm: Algorithm, make: Optimizers, steps: int, seed: int = 0) -> dict[str, Tensor]:
    """Train the same network by a Trainer."""
    model = network()
    trainer = Trainer(
        algorithms=[algorithm], optimizer=make, loss_fn=cross_entropy, progress=False, debug=True, seed=seed
    )
    trainer.fit(model, batches(steps), duration=f"{steps}ba")
    return weights(model)


@pytest.mark.parametrize("make", [SGD, ADAMW])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_lisa_equals_the_papers_algorithm_in_plain_torch(make: Optimizers, count: int) -> None:
    """Bit for bit: freeze all but the ends, draw some layers, K steps, again."""
    sets = [sampled_layers(BLOCKS, count, seed=3, owner="LISA", interval=each) for each in range(8)]
    turns = [[BLOCKS.index(name) for name in each] for each in sets]
    assert any(set(a) & set(b) for a, b in pairwise(turns)), "some layer goes on with its moments"
    expected = by_hand(make, turns, 3, 24, forget=False)
    assert same_weights(fitted(LISA("3ba", layers=count), make, 24, seed=3), expected)


@pytest.mark.parametrize("make", [SGD, ADAMW])
@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
def test_block_cycle_equals_the_papers_algorithm_in_plain_torch(make: Optimizers, order: Any) -> None:
    """Bit for bit: K steps on each block in turn, each time with a new optimizer, through two cycles and a half."""
    if order == "random":
        cycles = [cycle_order(5, "random", seed=6, owner="BlockCycle", cycle=each) for each in range(3)]
        turns = [[index] for cycle in cycles for index in cycle]
    else:
        turns = [[index] for index in (range(5) if order == "ascending" else range(4, -1, -1))] * 3
    expected = by_hand(make, turns, 3, 37, forget=True)
    assert same_weights(fitted(BlockCycle("3ba", order=order), make, 37, seed=6), expected)


def test_a_block_that_follows_itself_begins_without_state() -> None:
    """The last of one cycle and the first of the next may be the same: its moments are reset all the same."""
    pairs = [cycle_order(5, seed=seed, owner="BlockCycle", cycle=0)[-1:]
             + cycle_order(5, seed=seed, owner="BlockCycle", cycle=1)[:1] for seed in range(60)]  # fmt: skip
    seed = next(seed for seed, (last, first) in enumerate(pairs) if last == first)
    cycles = [cycle_order(5, seed=seed, owner="BlockCycle", cycle=each) for each in range(2)]
    turns = [[index] for cycle in cycles for index in cycle]
    found = fitted(BlockCycle("3ba"), ADAMW, 24, seed=seed)
    assert same_weights(found, by_hand(ADAMW, turns, 3, 24, forget=True))
    assert not same_weights(found, by_hand(ADAMW, turns, 3, 24, forget=False))


MAKERS: list[Callable[[], Turns]] = [
    lambda: LISA("3ba", layers=2), lambda: LISA(1, layers=1), lambda: LISA("20sp", layers=3, always="head"),
    lambda: BlockCycle("3ba"), lambda: BlockCycle(1, order="descending"), lambda: BlockCycle("2ba", always=()),
    lambda: BlockCycle("0.15dur", always=["head", "*.bias"]),
]  # fmt: skip


@pytest.mark.parametrize("make", MAKERS)
def test_a_fit_resumed_at_any_batch_goes_on_as_if_never_stopped(tmp_path: Path, make: Callable[[], Turns]) -> None:
    """Weights and timeline of a run resumed from each of its checkpoints equal those of the whole run."""

    def fit(folder: str, *, resume: bool | Path = False) -> tuple[nn.Module, Any]:
        model = network()
        trainer = Trainer(
            algorithms=[make()], loss_fn=cross_entropy, run_dir=tmp_path / folder, optimizer=ADAMW, seed=2,
            checkpoint=Checkpointing(every="1ba", keep=30), progress=False, debug=True,
        )  # fmt: skip
        return model, trainer.fit(model, loader(), duration="6ep", resume=resume)

    model, whole = fit("whole")
    assert len(whole.timeline.spans) > 3
    for batch in (1, 3, 4, 7, 12):
        checkpoint = next((tmp_path / "whole").rglob(f"ba{batch:08d}"))
        again, result = fit(f"from{batch}", resume=checkpoint)
        assert same_weights(weights(again), weights(model)), batch
        assert result.timeline.spans == whole.timeline.spans


@pytest.mark.parametrize("make", MAKERS)
def test_the_global_generators_are_left_alone(make: Callable[[], Turns]) -> None:
    """What is drawn comes from a generator of its own, whatever the global one says."""
    found = []
    for seed in (0, 1):
        model = stack(5)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        loop = Loop([make()], model, batches=4)
        found.append([(loop.epoch(), loop.ledger.trainable)[1] for _ in range(5)])
        torch.manual_seed(seed)
        assert torch.equal(before, torch.get_rng_state())
    assert found[0] == found[1]


def test_draws_do_not_come_from_the_global_generator() -> None:
    """Drawing moves no generator but its own."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = [shuffled(12, 0, "LISA", turn) for turn in range(5)]
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert first == [shuffled(12, 0, "LISA", turn) for turn in range(5)]


@pytest.mark.parametrize("algorithm", [LISA("2ba", layers=1, always=()), BlockCycle("2ba", always=())])
def test_frozen_batch_norm_keeps_its_statistics(algorithm: Turns) -> None:
    """Of a convolutional network, what is not in its turn keeps weights and running statistics bit for bit."""
    model = cnn()
    seen: list[tuple[frozenset[str], dict[str, Tensor]]] = []

    class Watch(Algorithm):
        """Keeps what trains and what the model held before each batch."""

        events = frozenset({Event.BEFORE_FORWARD})

        def apply(self, event: Event, state: State) -> None:
            """Keep it."""
            seen.append((state.ledger.trainable, weights(state.model)))

    generator = torch.Generator().manual_seed(0)
    data = [
        (torch.randn(8, 1, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator)) for _ in range(12)
    ]
    trainer = Trainer(
        algorithms=[algorithm, Watch()], optimizer=ADAMW, loss_fn=cross_entropy, progress=False, debug=True
    )
    trainer.fit(model, data, duration="12ba")
    seen.append((frozenset(), weights(model)))
    assert len({trains for trains, _ in seen[:-1]}) > 1
    for (trains, before), (_, after) in pairwise(seen):
        assert trains
        for name, value in before.items():
            moves = name in trains or f"{name.rpartition('.')[0]}.weight" in trains
            assert moves or torch.equal(value, after[name]), name


@pytest.mark.parametrize("first", [True, False])
def test_beside_lora_turns_are_taken_by_adapters(first: bool) -> None:
    """LoRAInject holds the base weights: what trains of a layer in its turn are its adapters, in any order of the list."""
    algorithms: list[Algorithm] = [LoRAInject(rank=2), LISA("1ba", layers=1)]
    loop = Loop(algorithms if first else algorithms[::-1], encoder(4), batches=6)
    adapted = []
    for _ in range(6):
        loop.epoch()
        body = {name for name in loop.ledger.trainable if name.startswith("encoder.")}
        assert all("lora_" in name for name in body)
        adapted.append({name.split(".")[2] for name in body})
    assert all(len(each) == 1 for each in adapted)
    assert len(set.union(*adapted)) > 1


@pytest.mark.parametrize("make", MAKERS)
def test_a_description_builds_it_again(make: Callable[[], Turns]) -> None:
    """describe() and from_description() are inverse, and the state goes through JSON's types."""
    algorithm = make()
    assert Algorithm.from_description(algorithm.describe()).describe() == algorithm.describe()
    algorithm.turn, algorithm.active = 3, ("blocks[1]",)
    again = make()
    again.load_state_dict(algorithm.state_dict())
    assert (again.turn, again.active) == (3, ("blocks[1]",))
    assert algorithm.state_dict() == {"turn": 3, "active": ["blocks[1]"]}


def test_a_second_fit_starts_afresh() -> None:
    """The same instance gives the same fit again."""
    for algorithm in (LISA("3ba"), BlockCycle("3ba")):
        first = fitted(algorithm, ADAMW, 20)
        assert same_weights(first, fitted(algorithm, ADAMW, 20))
