"""What a batch is made of: counting, cutting, moving and passing it on."""

from collections import OrderedDict, UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from thawline.engine import ArgumentError, DataError
from thawline.engine.batches import batch_size_of, count_weight, forward_arguments, samples_in, split_batch, to_device

CPU, META = torch.device("cpu"), torch.device("meta")


class Pair(NamedTuple):
    """A batch as a named tuple."""

    x: Tensor
    y: Tensor


class Graphs:
    """A batch of a kind that only the user knows, which moves itself in place."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    @property
    def device(self) -> torch.device:
        return self.x.device

    def to(self, device: torch.device) -> "Graphs":
        self.x = self.x.to(device)
        return self


def equal(left: Any, right: Any) -> bool:
    """Return whether two batches are the same, types of containers included."""
    if type(left) is not type(right):
        return False
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, np.ndarray):
        return bool(np.array_equal(left, right))
    if isinstance(left, Mapping):
        return list(left) == list(right) and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def joined(parts: list[Any], whole: Any, size: int) -> Any:
    """Put microbatches together again: an independent inverse, guided by what was cut."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts) if whole.ndim and whole.shape[0] == size else first
    if isinstance(first, np.ndarray):
        return np.concatenate(parts) if whole.ndim and whole.shape[0] == size else first
    if isinstance(first, Mapping):
        return type(whole)({key: joined([each[key] for each in parts], whole[key], size) for key in whole})
    if isinstance(first, Pair):
        return Pair(*(joined([each[i] for each in parts], whole[i], size) for i in range(2)))
    if isinstance(first, (list, tuple)):
        if all(isinstance(each, str) for each in first):
            return type(whole)(item for each in parts for item in each)
        return type(whole)(joined([each[i] for each in parts], whole[i], size) for i in range(len(whole)))
    return first


def contents(size: int) -> st.SearchStrategy[Any]:
    """Return batches of ``size`` samples, nested, with things in them that are no samples."""
    shapes = st.sampled_from([(size,), (size, 2), (size, 1, 3)])
    tensors = shapes.map(lambda shape: torch.arange(int(np.prod(shape))).reshape(shape))
    arrays = shapes.map(lambda shape: np.arange(int(np.prod(shape))).reshape(shape))
    names = st.just([f"sample {index}" for index in range(size)])
    shared = st.one_of(st.none(), st.floats(0, 1), st.just(torch.tensor(3.0)), st.just(torch.zeros(size + 1, 2)))
    leaves = st.one_of(tensors, arrays, names, shared)
    nested = st.one_of(leaves, st.dictionaries(st.sampled_from("abc"), leaves, min_size=1))
    return st.one_of(
        tensors,
        st.tuples(tensors, nested, nested),
        st.lists(tensors, min_size=1, max_size=3),
        st.builds(Pair, tensors, tensors),
        st.fixed_dictionaries({"first": tensors, "second": nested, "third": st.tuples(tensors, tensors)}),
        tensors.map(lambda each: OrderedDict(z=each, a=each)),
    )


@given(st.integers(1, 12).flatmap(lambda size: st.tuples(st.just(size), contents(size))), st.integers(1, 13))
def test_microbatches_put_together_are_the_batch(drawn: tuple[int, Any], size: int) -> None:
    """Nothing is lost, doubled or reordered; all but the last have the size asked for; containers keep their types."""
    whole, batch = drawn
    parts = split_batch(batch, size)
    assert [batch_size_of(part) for part in parts] == [min(size, whole - start) for start in range(0, whole, size)]
    assert equal(joined(parts, batch, whole), batch)


def test_a_batch_that_fits_is_not_touched() -> None:
    """The one microbatch is the batch itself."""
    batch = {"x": torch.zeros(4)}
    assert split_batch(batch, 4)[0] is batch


def test_microbatches_are_views() -> None:
    """Cutting copies no data."""
    x = torch.zeros(4, 2)
    assert [part.data_ptr() for part in split_batch(x, 2)] == [x.data_ptr(), x[2:].data_ptr()]


def test_two_tensors_in_a_pair_of_two_samples_are_not_samples() -> None:
    """A batch (x, y) of two samples is cut inside x and y, never between them."""
    x, y = torch.arange(4).reshape(2, 2), torch.arange(2)
    first, second = split_batch((x, y), 1)
    assert equal(first, (x[:1], y[:1]))
    assert equal(second, (x[1:], y[1:]))


def test_a_list_of_what_differs_in_size_is_one_entry_a_sample() -> None:
    """The boxes of three images, in a list, are cut as the images are."""
    images, boxes = torch.zeros(3, 2), [torch.zeros(5, 4), torch.zeros(1, 4), torch.zeros(2, 4)]
    parts = split_batch({"images": images, "boxes": boxes}, 2)
    assert [len(part["boxes"]) for part in parts] == [2, 1]
    assert parts[1]["boxes"][0] is boxes[2]


def test_a_batch_of_sentences_is_cut() -> None:
    """A list without tensors has one entry a sample, also beside another one."""
    assert split_batch(["a", "b", "c"], 2) == [["a", "b"], ["c"]]
    assert split_batch((["a", "b", "c"], ["x", "y", "z"]), 2) == [(["a", "b"], ["x", "y"]), (["c"], ["z"])]


def test_a_mapping_of_another_type_stays_one() -> None:
    """Tokenizers return a UserDict; the caller's own is not changed."""
    batch: UserDict[str, Tensor] = UserDict(x=torch.arange(3))
    parts = split_batch(batch, 2)
    assert [type(part) for part in parts] == [UserDict, UserDict]
    assert batch["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "8", None])
def test_a_wrong_microbatch_size_is_refused(size: Any) -> None:
    """It is named as the user wrote it."""
    with pytest.raises(ArgumentError, match=r"Trainer\(microbatch_size=\) takes a whole number"):
        split_batch(torch.zeros(4), size)


@pytest.mark.parametrize(
    "batch, size",
    [
        (torch.zeros(4, 2), 4),
        ((torch.tensor(1.0), torch.zeros(3)), 3),
        ({"scale": 2.0, "nested": [{"x": np.zeros((5, 1))}]}, 5),
        (["a", "b"], 2),
        ({"text": ["a", "b", "c"]}, 3),
        ((["a", "b", "c"], [1, 2, 3]), 3),
    ],
)
def test_samples_are_counted(batch: Any, size: int) -> None:
    """Along the first dimension of the first tensor that has one, else the entries of a list."""
    assert batch_size_of(batch) == size


@dataclass
class Labeled:
    """A batch of a kind of its own."""

    name: str
    x: Any


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (Labeled("a", torch.zeros(5, 2)), 5),
        (Pair(torch.zeros(4), torch.zeros(4)), 4),
        (Labeled("a", Labeled("b", None)), 1),
        (3, 1),
    ],
)
def test_samples_of_a_kind_of_ones_own_are_counted(batch: Any, samples: int) -> None:
    """A dataclass counts by its fields, a named tuple as a tuple, anything else as one."""
    assert samples_in(batch) == samples


@pytest.mark.parametrize("batch", [torch.tensor(1.0), {}, [], (), None, "text", {"a": 1}, Graphs(torch.zeros(2))])
def test_what_cannot_be_counted_is_an_error(batch: Any) -> None:
    """It says what was got and what to return from a collate function."""
    with pytest.raises(DataError, match=r"cannot tell how many samples.*Write: a collate_fn"):
        batch_size_of(batch)


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(2),
        (torch.zeros(2), [torch.zeros(2), "a"]),
        {"x": torch.zeros(2), "y": {"z": torch.zeros(1)}},
        UserDict(x=torch.zeros(2)),
        Pair(torch.zeros(2), torch.zeros(2)),
        Graphs(torch.zeros(2)),
        "text",
        None,
    ],
)
def test_what_lies_on_the_device_is_not_copied(batch: Any) -> None:
    """The very object comes back."""
    assert to_device(batch, CPU) is batch


def test_everything_is_moved_and_the_rest_kept() -> None:
    """Nested tensors move, types of containers stay, and the caller's own batch is not changed."""
    batch = {"x": torch.zeros(2), "pair": Pair(torch.zeros(1), torch.zeros(1)), "list": [torch.zeros(3), "a"], "n": 3}
    moved = to_device(batch, META)
    assert [each.device for each in (moved["x"], *moved["pair"], moved["list"][0])] == [META] * 4
    assert (type(moved["pair"]), moved["list"][1], moved["n"]) == (Pair, "a", 3)
    assert [each.device for each in (batch["x"], batch["list"][0])] == [CPU] * 2  # type: ignore[index, union-attr]


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(3, 2),
        np.arange(3, dtype=np.int16),
        np.array([True, False]),
        np.array(2.5, dtype=np.float32),
        np.arange(6)[::-1],
        np.arange(3, dtype=">i4"),
        np.broadcast_to(np.float32(1), (2, 2)),
    ],
)
def test_arrays_of_numbers_become_tensors(array: Any) -> None:
    """As in torch's default collate function, whatever their strides, byte order and flags; the dtype stays."""
    (moved,) = to_device([array], CPU)
    assert isinstance(moved, Tensor)
    np.testing.assert_array_equal(moved.numpy(), array)
    assert moved.numpy().dtype == array.dtype.newbyteorder("=")
    assert to_device({"x": array}, META)["x"].device == META


@pytest.mark.parametrize("array", [np.array(["a", "b"]), np.array([None, 1], dtype=object)])
def test_arrays_of_anything_else_stay(array: Any) -> None:
    """A tensor cannot hold names."""
    batch = (torch.zeros(2), array)
    assert to_device(batch, CPU) is batch


def too_deep(kind: str) -> Any:
    """Return a batch that Python cannot follow."""
    batch: Any = torch.zeros(4, 2)
    if kind == "itself":
        batch = [batch]
        batch.insert(0, batch)
        return batch
    for _ in range(5000):
        batch = [batch] if kind == "list" else {"x": batch}
    return batch


@pytest.mark.parametrize("kind", ["list", "mapping", "itself"])
@pytest.mark.parametrize(
    "call", [batch_size_of, lambda batch: split_batch(batch, 2), lambda batch: to_device(batch, CPU)]
)
def test_a_batch_nested_without_end_is_an_error(kind: str, call: Any) -> None:
    """Counting, cutting and moving end with a typed error."""
    with pytest.raises(DataError, match=r"nested deeper than Python can follow.*Write: a collate_fn"):
        call(too_deep(kind))


def test_an_object_that_moves_in_place_is_moved_as_a_copy() -> None:
    """A list of ready batches stays where the caller put it."""
    batch, tokens = Graphs(torch.zeros(2)), UserDict(x=torch.zeros(2))
    assert to_device(batch, META).x.device == META
    assert to_device(tokens, META)["x"].device == META
    assert batch.x.device == tokens["x"].device == CPU


def test_a_packed_sequence_moves_as_one() -> None:
    """It is a tuple, but not one whose parts may be moved apart."""
    packed = pack_sequence([torch.zeros(2), torch.zeros(1)])
    assert to_device(packed, CPU) is packed
    assert to_device(packed, META).data.device == META


@pytest.mark.parametrize(
    "batch, keep, expected",
    [
        ({"x": 1, "labels": 2}, True, ((), {"x": 1}, 2)),
        ({"x": 1, "targets": 2}, True, ((), {"x": 1}, 2)),
        ({"x": 1, "labels": 2}, False, ((), {"x": 1, "labels": 2}, None)),
        ({"x": 1}, True, ((), {"x": 1}, None)),
        (UserDict(x=1, labels=2), True, ((), {"x": 1}, 2)),
        ((1, 2), True, ((1,), {}, 2)),
        ([1, 2, 3], True, ((1, 2), {}, 3)),
        ((1, 2), False, ((1, 2), {}, None)),
        ([1], True, ((1,), {}, None)),
        (Pair(1, 2), True, ((1,), {}, 2)),  # type: ignore[arg-type]
        (7, True, ((7,), {}, None)),
    ],
)
def test_how_a_model_is_called(batch: Any, keep: bool, expected: tuple[Any, ...]) -> None:
    """A mapping as keywords, a tuple as inputs and targets, anything else as the one input."""
    assert forward_arguments(batch, keep) == expected


def test_passing_a_batch_on_leaves_it_whole() -> None:
    """Labels are kept for the loss without being taken from the caller's batch."""
    batch = {"x": 1, "labels": 2}
    forward_arguments(batch, True)
    assert batch == {"x": 1, "labels": 2}


@pytest.mark.parametrize("batch, message", [({0: 1}, "keys are names"), ((), "empty tuple")])
def test_what_a_model_cannot_be_called_with_is_an_error(batch: Any, message: str) -> None:
    """The error says what to write."""
    with pytest.raises(DataError, match=f"{message}.*Write: "):
        forward_arguments(batch, True)


@pytest.mark.parametrize(
    "targets, shift, weight",
    [
        (torch.tensor([1, -100, 2, -100]), False, 2.0),
        (torch.tensor([[1, 2, -100], [-100, 3, 4]]), False, 4.0),
        (torch.tensor([[1, 2, -100], [-100, 3, 4]]), True, 3.0),
        (torch.tensor([[1.0], [-100.0]]), False, 2.0),
        (torch.tensor([True, False]), False, 2.0),
        (torch.tensor([-100, -100]), False, 0.0),
        (None, False, 2.0),
        ("text", False, 2.0),
    ],
)
def test_a_microbatch_counts_what_its_loss_is_a_mean_over(targets: Any, shift: bool, weight: float) -> None:
    """Labels that are not ignored; samples where targets are numbers to hit, or none."""
    assert count_weight(torch.zeros(2, 3), targets, shift) == weight


@given(st.lists(st.sampled_from([-100, 0, 1, 2]), min_size=1, max_size=12), st.integers(1, 12))
def test_weighted_microbatches_give_the_mean_of_the_batch(labels: list[int], size: int) -> None:
    """Cutting a batch, ignored labels included, does not change its loss."""
    targets = torch.tensor(labels)
    if (targets == -100).all():
        return
    logits = torch.linspace(-1, 1, len(labels) * 3, dtype=torch.float64).reshape(-1, 3)
    whole = torch.nn.functional.cross_entropy(logits, targets)
    parts = split_batch((logits, targets), size)
    weights = [count_weight(part, part[1]) for part in parts]
    losses = [torch.nn.functional.cross_entropy(x, y, reduction="sum") for x, y in parts]
    assert sum(weights) == count_weight((logits, targets), targets)
    assert float(sum(losses)) / sum(weights) == pytest.approx(float(whole), abs=1e-12)


@dataclass(frozen=True)
class Checked:
    """A batch as a record; what it checks, it checks once."""

    x: Any
    y: Any
    note: str = "kept"

    def __post_init__(self) -> None:
        assert len(self.x) == 5


def test_a_dataclass_moves_and_is_cut_as_a_mapping_is() -> None:
    """Also a frozen one; arrays become tensors, and the original stays as it is."""
    batch = Checked(np.arange(10, dtype=np.float32).reshape(5, 2), torch.arange(5))
    moved = to_device(batch, torch.device("cpu"))
    assert isinstance(batch.x, np.ndarray)
    assert torch.equal(moved.x, torch.arange(10.0).reshape(5, 2))
    assert moved.y is batch.y
    assert to_device(moved, torch.device("cpu")) is moved
    parts = split_batch(moved, 2)
    assert [(type(each), each.y.tolist(), len(each.x), each.note) for each in parts] == [
        (Checked, [0, 1], 2, "kept"),
        (Checked, [2, 3], 2, "kept"),
        (Checked, [4], 1, "kept"),
    ]
    assert batch_size_of(batch) == 5
