"""Rows by sample id: what comes back is what went in, and the budget holds."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from thawline.algorithms.prefix_store import RowStore


def test_rows_come_back_in_any_order_and_layout() -> None:
    """By id, trimmed and padded with zeros to a signature that was seen, with the strides they had."""
    store = RowStore(budget=10**6)
    short = torch.arange(12.0).view(2, 3, 2).transpose(1, 2)  # samples x 2 x 3, the last dimension the widest
    long = torch.arange(20.0).view(2, 2, 5)
    assert store.add([4, 9], "short", [short], right=True)
    assert store.add([1, 2], "long", [long], right=True)
    (same,) = store.rows([9, 4], "short")
    assert torch.equal(same, short.flip(0))
    assert same.stride() == short.stride()
    (mixed,) = store.rows([2, 9], "long")
    assert torch.equal(mixed[0], long[1])
    assert torch.equal(mixed[1], nn.functional.pad(short[1], (0, 2)))
    (cut,) = store.rows([1], "short")
    assert torch.equal(cut[0], long[0, :, :3])
    assert store.nbytes == 4 * (12 + 20)
    assert store.take([4, 5], 2, 1) is None
    assert store.take([4, 1], 2, 1) is None


@given(
    st.lists(st.lists(st.integers(0, 40) | st.integers(-5, 10**6), min_size=1, max_size=9, unique=True), max_size=12),
    st.integers(0, 4000), st.integers(0, 3),
)  # fmt: skip
def test_any_order_of_samples_within_any_budget(batches: list[list[int]], budget: int, width: int) -> None:
    """Against a dictionary; reserved bytes never exceed the budget, and what did not fit is missing as a whole batch."""
    store, kept = RowStore(budget), dict[int, Tensor]()
    for ids in batches:
        values = torch.randn(len(ids), width), torch.randint(9, (len(ids),))
        if store.add(ids, width, values):
            for place, each in enumerate(ids):
                kept.setdefault(each, torch.cat([values[0][place], values[1][place : place + 1].float()]))
        assert store.nbytes <= store.reserved <= budget
    assert len(store) == len(kept)
    for ids in [*batches, sorted(kept)]:
        assert store.has(ids) == all(each in kept for each in ids)
        taken = store.take(ids, len(ids), 2) if kept and ids else None
        if not kept or not ids or not store.has(ids):
            assert taken is None
            continue
        for found in (store.rows(ids, width), taken):
            assert found is not None
            features, targets = found
            assert torch.equal(torch.cat([features, targets[:, None].float()], 1), torch.stack([kept[i] for i in ids]))


def test_a_full_disk_is_a_full_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was kept stays; no page is mapped that the disk has no room for."""
    store = RowStore(budget=10**9, folder=tmp_path)
    assert store.add(range(64), "rows", [torch.ones(64, 8)])

    def refuse(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    assert not store.add(range(64, 99), "rows", [torch.ones(35, 8)])
    assert store.full
    assert torch.equal(store.rows([3], "rows")[0], torch.ones(1, 8))
    store.close()
    assert not any(tmp_path.iterdir())


def test_other_shapes_for_one_signature_are_refused() -> None:
    """An output whose shape depends on numbers, not on shapes, cannot be put together from rows."""
    store = RowStore(budget=1000)
    assert store.add([0], "same", [torch.ones(1, 3)])
    with pytest.raises(ValueError, match="had"):
        store.add([1], "same", [torch.ones(1, 4)])
