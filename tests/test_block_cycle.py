"""BlockCycle as golden timelines, as a law, in its moments, and with wrong arguments."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import Tied
from thawline.algorithms import BlockCycle, cycle_order
from thawline.engine import Algorithm, ArgumentError, Event, LayerError, SelectorError, ThawlineWarning
from timelines import Loop, stack, timeline


def trained(rows: list[dict[str, float]]) -> list[str]:
    """Return the one layer beside the head that trains in each batch."""
    assert all("head" in row and len(row) == 2 for row in rows)
    return [next(name for name in row if name != "head") for row in rows]


def names(blocks: int, *, stem: bool = True) -> list[str]:
    """Return the layers of a stack below its head."""
    return ["stem"] * stem + [f"blocks[{index}]" for index in range(blocks)]


# -- golden timelines --------------------------------------------------------------------------------------------------


def test_ascending_and_descending_written_out() -> None:
    """Twelve blocks and the embeddings, two batches each, and the first again; the head throughout."""
    up = timeline(BlockCycle("2ba", order="ascending"), stack(12), duration="28ba", batches=28)
    expected = [name for name in [*names(12), "stem"] for _ in range(2)]
    assert trained(up) == expected
    down = timeline(BlockCycle("2ba", order="descending", stem=False), stack(12), duration="26ba", batches=26)
    assert trained(down) == [name for name in [*names(12, stem=False)[::-1], "blocks[11]"] for _ in range(2)]


def test_random_written_out() -> None:
    """Two cycles of twelve blocks, each in an order of its own."""
    rows = timeline(BlockCycle("1ba", stem=False), stack(12), duration="24ba", batches=24)
    assert [int(name[7:-1]) for name in trained(rows)] == [
        2, 11, 4, 1, 3, 10, 6, 7, 8, 9, 5, 0,
        11, 0, 6, 1, 8, 2, 7, 3, 5, 9, 10, 4,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        (BlockCycle("1ba", order="ascending", always=()), ["stem", "blocks[0]", "blocks[1]", "head"]),
        (BlockCycle("1ba", order="ascending", always=(), stem=False), ["blocks[0]", "blocks[1]", "head"]),
        (BlockCycle("1ba", order="descending", always=("stem",)), ["head", "blocks[1]", "blocks[0]"]),
        (BlockCycle("1ba", order="ascending", always=("head", "blocks[0]")), ["stem", "blocks[1]"]),
    ],
)
def test_what_always_trains_is_no_block_of_the_cycle(algorithm: BlockCycle, expected: list[str]) -> None:
    """What does not always train has its turn, the head too; embeddings where they are asked for."""
    rows = timeline(algorithm, stack(2), duration="8ba", batches=8)
    always = set(algorithm.always)
    cycle = [expected[batch % len(expected)] for batch in range(8)]
    assert [set(row) for row in rows] == [{*always, name} for name in cycle]


def test_parts_of_layers_may_always_train() -> None:
    """Biases that always train keep their moments while their layers come and go."""
    loop = Loop([BlockCycle("1ep", always=["*.bias"])], batches=1, duration="8ep")
    (optimizer,) = loop.state.optimizers
    biases = {name for name in loop.ledger.parameters if name.endswith(".bias")}
    loop.epoch()
    buffers = {name: optimizer.state[loop.ledger.parameters[name]]["momentum_buffer"] for name in biases}
    for _ in range(6):
        loop.epoch()
        assert biases < loop.ledger.trainable
        assert len(loop.ledger.trainable - biases) == 1
        for name in biases:
            assert optimizer.state[loop.ledger.parameters[name]]["momentum_buffer"] is buffers[name]


def test_a_tied_head_has_its_turn_with_the_embeddings() -> None:
    """The tied weight lies in the stem."""
    loop = Loop([BlockCycle("1ba", order="ascending")], Tied(), batches=1, duration="9ba")
    found = [(loop.epoch(), "embed.weight" in loop.ledger.trainable)[1] for _ in range(6)]
    assert found == [True, False, False, True, False, False]


# -- as a law ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    blocks=st.integers(1, 6),
    order=st.sampled_from(["random", "ascending", "descending"]),
    every=st.integers(1, 4),
    unit=st.sampled_from(["ba", "ep", "sp"]),
    length=st.integers(1, 4),
    stem=st.booleans(),
)
def test_the_trainable_set_is_a_function_of_the_clock(
    blocks: int, order: Any, every: int, unit: str, length: int, stem: bool
) -> None:
    """In batch k the block of turn floor(k / every) trains; each cycle has every block once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThawlineWarning)  # more blocks than turns
        algorithm = BlockCycle(f"{every}{unit}", order=order, stem=stem)
        rows = timeline(algorithm, stack(blocks), duration="5ep", batches=length)
    layers = names(blocks, stem=stem)
    for batch, name in enumerate(trained(rows)):
        passed = {"ba": batch, "ep": batch // length, "sp": 8 * batch}[unit]
        cycle, place = divmod(passed // every, len(layers))
        assert name == layers[cycle_order(len(layers), order, seed=0, owner="BlockCycle", cycle=cycle)[place]]


@given(st.integers(1, 40), st.integers(0, 2**63), st.integers(0, 1000))
def test_a_cycle_has_every_block_once(count: int, seed: int, cycle: int) -> None:
    """In every order."""
    for order in ("random", "ascending", "descending"):
        assert sorted(cycle_order(count, order, seed=seed, owner="me", cycle=cycle)) == list(range(count))


def test_the_order_is_shuffled_anew_in_each_cycle() -> None:
    """And differs by seed and owner; each block is first equally often (chi-square, three degrees of freedom)."""
    orders = [tuple(cycle_order(4, seed=0, owner="BlockCycle", cycle=each)) for each in range(4000)]
    assert len(set(orders)) == 24
    counts = [sum(order[0] == block for order in orders) for block in range(4)]
    assert sum((each - 1000) ** 2 / 1000 for each in counts) < 16.3
    other = [tuple(cycle_order(4, seed=0, owner="BlockCycle#2", cycle=each)) for each in range(40)]
    third = [tuple(cycle_order(4, seed=1, owner="BlockCycle", cycle=each)) for each in range(40)]
    assert other != orders[:40] != third != other


def test_a_block_begins_its_turn_without_state() -> None:
    """State of the optimizer is there for the block in its turn and for the head, and the head's runs on."""
    algorithm = BlockCycle("1ep")
    loop = Loop([algorithm], stack(3), duration="12ep", batches=2)
    (optimizer,) = loop.state.optimizers
    head = loop.ledger.parameters["4.weight"]
    loop.epoch()
    running = optimizer.state[head]["momentum_buffer"]
    for _ in range(11):
        with_state = {name for name, each in loop.ledger.parameters.items() if each in optimizer.state}
        assert with_state == loop.ledger.trainable
        loop.engine.emit(Event.EPOCH_START)  # the next block's turn, before its first step
        assert {name for name, each in loop.ledger.parameters.items() if each in optimizer.state} == {
            "4.weight", "4.bias",
        }  # fmt: skip
        assert optimizer.state[head]["momentum_buffer"] is running
        loop.epoch()


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"every": 0}, {"every": "2"}, {"every": 1.5}, {"every": None}, {"every": True}, {"every": "0ba"},
        {"order": "up"}, {"order": None}, {"order": ["blocks[0]"]}, {"order": 1},
        {"always": ""}, {"always": [1]}, {"always": None}, {"always": 1}, {"always": [""]},
        {"stem": 1}, {"stem": None}, {"stem": "yes"},
    ],
)  # fmt: skip
def test_a_bad_argument_is_an_error_that_names_it(arguments: dict[str, Any]) -> None:
    """The message names the argument and what it got, and ends with a call that works."""
    ((name, value),) = arguments.items()
    with pytest.raises(ArgumentError) as caught:
        BlockCycle(**arguments)
    assert caught.value.argument == f"BlockCycle({name}=)"
    assert caught.value.got is value
    assert isinstance(eval(caught.value.example), BlockCycle)


def test_another_order_of_the_function_is_refused() -> None:
    """It is named as the function's argument."""
    with pytest.raises(ArgumentError, match=r"cycle_order\(order=\) takes one of 'random', 'ascending', 'descending'"):
        cycle_order(3, "up")


def test_what_does_not_fit_the_model_is_an_error_at_the_start() -> None:
    """A model in which all always trains, or a part that it does not have."""
    with pytest.raises(LayerError, match=r"(?s)BlockCycle needs layers to take turns.*layers=\{"):
        Loop([BlockCycle("1ba")], nn.Linear(4, 2))
    with pytest.raises(LayerError, match="leaves none"):
        Loop([BlockCycle("1ba", always="*")])
    with pytest.raises(SelectorError, match="'heed' matches nothing"):
        Loop([BlockCycle("1ba", always=["heed"])])


@pytest.mark.parametrize(
    ("algorithm", "duration", "warns"),
    [
        (BlockCycle("2ba"), "6ba", True), (BlockCycle("2ba"), "7ba", False), (BlockCycle("2ba", stem=False), "6ba", False),
        (BlockCycle(1), "9ba", True), (BlockCycle(1), "10ba", False), (BlockCycle("0.25dur"), "6ba", False),
        (BlockCycle("0.4dur"), "6ba", True), (BlockCycle("9ba", always="*.weight"), "6ba", True),
        (BlockCycle("9ba", always=["stem", "blocks[:2]"], stem=False), "6ba", True),
        (BlockCycle("9ba", always=["stem", "head", "blocks[:2]"]), "6ba", False),
    ],
)  # fmt: skip
def test_a_fit_that_does_not_come_to_each_block_warns(algorithm: Algorithm, duration: str, *, warns: bool) -> None:
    """Four blocks with the embeddings: the last turn has to begin within the fit."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Loop([algorithm], duration=duration, batches=3)
    assert [each.category for each in caught] == [ThawlineWarning] * warns
    assert not warns or "does not come to each" in str(caught[0].message)
