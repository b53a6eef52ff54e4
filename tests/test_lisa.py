"""LISA as golden timelines, as a law, in its draws and moments, and with wrong arguments."""

from __future__ import annotations

import warnings
from collections import Counter
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from helpers import Tied, loader, mlp
from thawline.algorithms import LISA, BlockCycle, sampled_layers
from thawline.engine import (
    Algorithm,
    ArgumentError,
    Event,
    LayerError,
    LayerMap,
    SelectorError,
    ThawlineWarning,
    Trainer,
)
from timelines import Loop, rates, stack, timeline


def blocks(count: int) -> list[str]:
    """Return the names of ``count`` blocks."""
    return [f"blocks[{index}]" for index in range(count)]


def drawn(rows: list[dict[str, float]]) -> list[list[int]]:
    """Return the numbers of the blocks that train in each batch."""
    return [[int(name[7:-1]) for name in row if name.startswith("blocks")] for row in rows]


# -- golden timelines --------------------------------------------------------------------------------------------------


def test_what_trains_of_twelve_blocks() -> None:
    """Three of twelve at a time, two batches long, embeddings and head throughout, each at the optimizer's rate."""
    rows = timeline(LISA("2ba", layers=3), stack(12), duration="12ba", batches=6)
    expected = [[0, 6, 11], [3, 5, 10], [0, 8, 11], [1, 7, 9], [4, 5, 10], [1, 5, 8]]
    assert drawn(rows) == [each for each in expected for _ in range(2)]
    assert all({"stem", "head"} < set(row) and set(row.values()) == {1.0} for row in rows)


@pytest.mark.parametrize(
    ("always", "ends"),
    [("head", {"head"}), ("stem", {"stem"}), ((), set()), (["head", "blocks[0]"], {"head", "blocks[0]"})],
)
def test_what_always_trains(always: Any, ends: set[str]) -> None:
    """What is neither listed nor between stem and head never trains; what is listed is not drawn."""
    rows = timeline(LISA("1ba", layers=1, always=always), stack(3), duration="20ba", batches=20)
    seen = set().union(*rows)
    assert seen == ends | set(blocks(3))
    assert all(ends < set(row) and len(row) == len(ends) + 1 for row in rows)


def test_parts_of_layers_may_always_train() -> None:
    """Biases that always train are not frozen when the turn of their layer is over."""
    loop = Loop([LISA("1ba", layers=1, always=["*.bias"])], batches=8, duration="8ba")
    biases = {name for name in loop.ledger.parameters if name.endswith(".bias")}
    for _ in range(3):
        loop.epoch()
        assert biases < loop.ledger.trainable
        assert len(loop.ledger.trainable - biases) == 1


def test_named_parts_are_layers_between() -> None:
    """A part of the user's own stands between stem and head, and is drawn as blocks are."""
    layers = LayerMap(stack(2), {"stem": "0", "blocks": ["1"], "structure_module": "2", "head": "3"})
    rows = timeline(LISA("1ba", layers=1), stack(2), layers=layers, duration="20ba", batches=20)
    assert set().union(*rows) == {"stem", "blocks[0]", "structure_module", "head"}


def test_a_tied_head_trains_with_the_embeddings() -> None:
    """The tied weight lies in the stem, which trains unless it is left out."""
    loop = Loop([LISA("1ba", layers=1)], Tied())
    assert "embed.weight" in loop.ledger.trainable
    assert "embed.weight" in Loop([LISA("1ba", layers=1, always="head")], Tied()).ledger.frozen


# -- as a law ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    count=st.integers(1, 7),
    share=st.floats(0, 1),
    every=st.integers(1, 5),
    unit=st.sampled_from(["ba", "ep", "sp"]),
    length=st.integers(1, 4),
    stem=st.booleans(),
)
def test_the_trainable_set_is_a_function_of_the_clock(
    count: int, share: float, every: int, unit: str, length: int, stem: bool
) -> None:
    """In batch k the draw of interval floor(k / every) trains, and the ends; nothing else."""
    layers = 1 + int(share * (count - 1))
    always = ("stem", "head") if stem else ("head",)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThawlineWarning)  # an interval longer than the fit
        algorithm = LISA(f"{every}{unit}", layers=layers, always=always)
        rows = timeline(algorithm, stack(count), duration="4ep", batches=length)
    for batch, row in enumerate(rows):
        passed = {"ba": batch, "ep": batch // length, "sp": 8 * batch}[unit]
        chosen = sampled_layers(blocks(count), layers, seed=0, owner="LISA", interval=passed // every)
        assert set(row) == {*chosen, *always}
        assert len(set(chosen)) == layers


def test_every_set_of_layers_is_equally_likely() -> None:
    """Chi-square of 6,000 draws of two out of four, five degrees of freedom: below the one in a thousand."""
    found = Counter(sampled_layers(blocks(4), 2, seed=0, owner="LISA", interval=each) for each in range(6000))
    assert set(found) == set(combinations(blocks(4), 2))
    assert sum((each - 1000) ** 2 / 1000 for each in found.values()) < 20.5


def test_draws_differ_by_seed_and_by_owner() -> None:
    """Two runs, and two of them in one list, draw apart."""
    draws = {
        (seed, owner): tuple(sampled_layers(blocks(12), 2, seed=seed, owner=owner, interval=each) for each in range(20))
        for seed in (0, 1)
        for owner in ("LISA", "LISA#2")
    }
    assert len(set(draws.values())) == 4


def test_two_in_one_list_hold_each_for_itself() -> None:
    """What trains between the ends is what both have drawn."""
    with pytest.warns(ThawlineWarning, match="LISA#2 and LISA each hold what the other releases"):
        rows = timeline([LISA("1ba", layers=2), LISA("2ba", layers=2)], stack(4), duration="12ba", batches=12)
    for batch, row in enumerate(rows):
        first = sampled_layers(blocks(4), 2, seed=0, owner="LISA", interval=batch)
        second = sampled_layers(blocks(4), 2, seed=0, owner="LISA#2", interval=batch // 2)
        assert set(row) == {"stem", "head", *(set(first) & set(second))}


def test_beside_a_block_cycle_it_warns() -> None:
    """A layer would train only where the turns of both meet."""
    trainer = Trainer(algorithms=[LISA("1ba"), BlockCycle("1ba")], loss_fn=cross_entropy, progress=False)
    with pytest.warns(ThawlineWarning, match="BlockCycle and LISA each hold what the other releases") as said:
        trainer.fit(mlp(depth=4), loader(), duration="3ep")
    assert [each.filename for each in said] == [__file__]


def test_moments_are_dropped_unless_the_layer_goes_on() -> None:
    """State of the optimizer is there for what trains, older than this interval only where it was drawn twice."""
    algorithm = LISA("1ep", layers=2)
    loop = Loop([algorithm], stack(3), duration="12ep", batches=2)
    (optimizer,) = loop.state.optimizers
    kept = 0
    for epoch in range(11):
        loop.epoch()
        with_state = {name for name, each in loop.ledger.parameters.items() if each in optimizer.state}
        assert with_state == loop.ledger.trainable
        before = {name: optimizer.state[loop.ledger.parameters[name]]["momentum_buffer"] for name in with_state}
        was = set(algorithm.active)
        now = set(sampled_layers(blocks(3), 2, seed=0, owner="LISA", interval=epoch + 1))
        loop.engine.emit(Event.EPOCH_START)  # the next draw, before its first step
        assert set(algorithm.active) == now
        for name in loop.ledger.trainable:
            layer = loop.ledger.layers.of(name).name
            state = optimizer.state.get(loop.ledger.parameters[name], {})
            goes_on = layer in ("stem", "head") or layer in was & now
            assert (state.get("momentum_buffer") is before.get(name, torch.empty(0))) is goes_on
            kept += goes_on and layer.startswith("blocks")
    assert kept


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"every": 0}, {"every": "2"}, {"every": 1.5}, {"every": None}, {"every": True}, {"every": "0ba"},
        {"layers": 0}, {"layers": -1}, {"layers": 1.5}, {"layers": True}, {"layers": "2"}, {"layers": None},
        {"always": ""}, {"always": [1]}, {"always": None}, {"always": 1}, {"always": [""]},
    ],
)  # fmt: skip
def test_a_bad_argument_is_an_error_that_names_it(arguments: dict[str, Any]) -> None:
    """The message names the argument and what it got, and ends with a call that works."""
    ((name, value),) = arguments.items()
    with pytest.raises(ArgumentError) as caught:
        LISA(**arguments)
    assert caught.value.argument == f"LISA({name}=)"
    assert caught.value.got is value
    assert isinstance(eval(caught.value.example), LISA)


def test_what_does_not_fit_the_model_is_an_error_at_the_start() -> None:
    """More layers than there are, none at all, or a part that the model does not have."""
    with pytest.raises(ArgumentError, match=r"LISA\(layers=\) takes at most 3, .* got 4. Write: LISA\(layers=1\)"):
        Loop([LISA("1ba", layers=4)])
    with pytest.raises(LayerError, match=r"(?s)LISA needs layers to take turns.*layers=\{"):
        Loop([LISA("1ba", layers=1)], nn.Linear(4, 2))
    with pytest.raises(SelectorError, match="'heed' matches nothing"):
        Loop([LISA("1ba", always=["heed"])])


def test_a_model_without_embeddings_has_no_stem_to_train() -> None:
    """The default names stem and head; a model without one of them does with the other."""
    assert set(rates(Loop([LISA("1ba", layers=1)], mlp()).ledger)) > {"head"}


@pytest.mark.parametrize(
    ("algorithm", "duration", "warns"),
    [
        (LISA("6ba"), "6ba", True), (LISA("5ba"), "6ba", False), (LISA(1), "6ba", False), (LISA(2), "6ba", True),
        (LISA("6ba", layers=3), "6ba", False), (LISA("1dur"), "6ba", True), (LISA("0.5dur"), "6ba", False),
    ],
)  # fmt: skip
def test_an_interval_as_long_as_the_fit_warns(algorithm: Algorithm, duration: str, *, warns: bool) -> None:
    """Where there is something to choose, and it is chosen once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Loop([algorithm], duration=duration, batches=3)
    assert [each.category for each in caught] == [ThawlineWarning] * warns
    assert not warns or "draws only once" in str(caught[0].message)
