"""JSON is strict both ways and never costs more memory than allowed."""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING

import pytest

from thawline.engine.codec import unflatten
from thawline.engine.errors import CheckpointError
from thawline.engine.jsontext import MAX_TEXT, MEMORY, dump_json, json_cost, load_json

if TYPE_CHECKING:
    from thawline.engine.typing import Json


@pytest.mark.parametrize(
    "text",
    [
        b"1e999",
        b'{"lr": -1e999}',
        b"",
        b"{",
        b"[1,]",
        b"NaN",
        b"-Infinity",
        b'{"a": 1, "a": 2}',
        b'"\xff"',
        b"1" * 5000,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\x80\x04\x95K\x01.",  # a pickle
        b"1 2",
    ],
    ids=lambda text: repr(text[:12]),
)
def test_what_is_not_strict_json_is_a_typed_error(text: bytes) -> None:
    """Python's own parser takes NaN and repeated keys and runs out of stack; here each is a CheckpointError."""
    with pytest.raises(CheckpointError):
        load_json(text)


DENSE = [
    *(b"[],", b"[1],", b"{},", b'{"":0},', b'{"ab":[]},', b'{"$tuple":[]},', b'{"$dict":[["a",1]]},', b"1.5,", b"999,"),
    *(b'"ab",', '"\u0100\u0100",'.encode(), '"\U0001f600\U0001f600",'.encode()),
]


@pytest.mark.parametrize("piece", DENSE, ids=bytes.decode)
def test_no_text_costs_more_than_estimated(piece: bytes) -> None:
    """The estimate, taken before anything is parsed, bounds what tracemalloc sees of parsing and decoding."""
    text = b"[" + piece * 20_000 + b"0]"
    tracemalloc.start()
    state = load_json(text)
    tree = unflatten({}, state)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(tree) == 20_001
    assert peak <= json_cost(text)


def test_a_text_above_its_budget_is_refused_before_it_is_parsed() -> None:
    """A megabyte of brackets would become 24 megabytes of lists; nothing near that is allocated."""
    text = b"[" + b"[]," * 350_000 + b"0]"
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="Keep long lists of numbers as tensors"):
        load_json(text, budget=1 << 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_what_may_be_written_may_be_read() -> None:
    """Writing has the same limits as reading: a checkpoint that could not be loaded is never saved."""
    value: Json = [[0] for _ in range(1000)]
    with pytest.raises(CheckpointError, match="so many small values"):
        dump_json(value, budget=100_000)
    assert load_json(dump_json(value)) == value
    with pytest.raises(CheckpointError, match="bytes, at most"):
        dump_json("x" * MAX_TEXT)


def test_the_default_budget_holds_a_long_history() -> None:
    """Fifty thousand epochs of ten metrics are no hostile text."""
    epoch: Json = {f"metric/{index}": 0.123456789 for index in range(10)}
    history: Json = [epoch for _ in range(50_000)]
    text = dump_json(history)
    assert json_cost(text) < MEMORY
