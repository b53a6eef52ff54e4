"""A tree comes back from named tensors and JSON bit for bit, and nothing else comes back from hostile ones."""

from __future__ import annotations

import contextlib
import json
import math
import random
import struct
from collections import OrderedDict, defaultdict
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thawline.engine.codec import _TAGS, MAX_DEPTH, flatten, unflatten
from thawline.engine.errors import CheckpointError
from thawline.engine.jsontext import dump_json, load_json
from thawline.engine.tensorfile import DTYPES, bytes_of, pieces_of, read_tensors

BYTES_ONLY = [
    getattr(torch, name)
    for name in ("complex128", "float8_e8m0fnu", "float4_e2m1fn_x2")  # complex32 warns wherever it is made
    if hasattr(torch, name)
]
TENSOR_DTYPES = [*DTYPES.values(), *BYTES_ONLY]
ARRAY_DTYPES = [np.dtype(each) for each in ("?", "i1", "u1", "<i8", ">i2", "<u4", "<f2", "<f4", ">f8", "<c8", "<c16")]
KEYS = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=4),  # lone surrogates as well
    st.sampled_from(["$tensor", "$dict", "$", "__metadata__", "dtype", "shape", "a/b", "a", "b", "~1", "a~1", ""]),
)


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...], raw: bytes) -> torch.Tensor:
    """A tensor of these very bytes, so that every NaN and every denormal occurs."""
    count = math.prod(shape) * dtype.itemsize
    data = torch.tensor(list((raw * (count + 1))[:count]), dtype=torch.uint8)
    if dtype is torch.bool:
        data %= 2
    return data.view(dtype).reshape(shape)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors of every dtype: empty, of no dimension, transposed, strided, expanded."""
    dtype = draw(st.sampled_from(TENSOR_DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    tensor = tensor_of(dtype, shape, draw(st.binary(min_size=1, max_size=9)))
    form = draw(st.sampled_from(["as it is", "transposed", "strided", "expanded"]))
    if form == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1)
    if form == "strided" and tensor.dim():
        return tensor[::2]
    if form == "expanded":
        return tensor.unsqueeze(0).expand(2, *tensor.shape)
    return tensor


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    """NumPy arrays of either byte order and memory order, and NumPy numbers."""
    dtype = draw(st.sampled_from(ARRAY_DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    raw = draw(st.binary(min_size=1, max_size=9))
    count = math.prod(shape) * dtype.itemsize
    data = np.frombuffer((raw * (count + 1))[:count], np.uint8)
    array = (data % 2 if dtype.kind == "b" else data).view(dtype).reshape(shape)
    if draw(st.booleans()):
        return np.asfortranarray(array) if shape else array
    return array.reshape(-1)[0] if array.size else array


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(1 << 200), 1 << 200),
    st.floats(),
    st.integers(0, (1 << 64) - 1).map(lambda bits: float(struct.unpack(">d", bits.to_bytes(8, "big"))[0])),
    KEYS,
    st.binary(max_size=4),
    tensors(),
    arrays(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.device("cpu"), torch.device("cuda:3")]),
)
ODD_KEYS = st.one_of(KEYS, st.none(), st.booleans(), st.integers(), st.integers(1 << 62, 1 << 70), st.floats())
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(ODD_KEYS | st.lists(ODD_KEYS, max_size=2).map(tuple), inner, max_size=4),
    ),
    max_leaves=12,
)


def same(left: Any, right: Any) -> bool:
    """Whether two trees are of the same types and bits throughout."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return same(list(left), list(right)) and same(list(left.values()), list(right.values()))
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, torch.Tensor):
        bits = [
            bytes_of((each.view(torch.uint8) if each.itemsize == 1 else each).contiguous()) for each in (left, right)
        ]
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*bits)
    if isinstance(left, np.ndarray | np.generic):
        return bool(
            left.dtype.str == right.dtype.str and left.shape == right.shape and left.tobytes() == right.tobytes()
        )
    if isinstance(left, float):
        return struct.pack(">d", left) == struct.pack(">d", right)
    return bool(left == right)


def round_trip(tree: object) -> Any:
    """``tree`` after it was two files."""
    tensors, state = flatten(tree)
    raw = b"".join(pieces_of(tensors))
    return unflatten(read_tensors(BytesIO(raw), len(raw)), load_json(dump_json(state)))


@given(TREES)
def test_a_tree_comes_back_bit_for_bit(tree: object) -> None:
    """Every value of every supported type comes back with the same type and bits, through both files."""
    assert same(round_trip(tree), tree)


@given(TREES)
def test_what_is_written_is_strict_json_and_plain_tensors(tree: object) -> None:
    """The JSON parses under a parser without NaN, and the tensors are dense, on the CPU and without gradient."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    tensors, state = flatten(tree)
    json.loads(dump_json(state), parse_constant=refuse)
    for tensor in tensors.values():
        assert tensor.is_contiguous()
        assert tensor.device.type == "cpu"
        assert not tensor.requires_grad
        assert tensor.dtype in DTYPES.values()


@pytest.mark.parametrize("dtype", TENSOR_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4)], ids=str)
def test_every_dtype_and_shape_comes_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Each dtype that a model or optimizer may have comes back in each kind of shape."""
    tensor = tensor_of(dtype, shape, bytes(range(1, 60)))
    assert same(round_trip([tensor, tensor.T if tensor.dim() == 2 else tensor]), [tensor, tensor])


@pytest.mark.parametrize("dtype", TENSOR_DTYPES, ids=str)
def test_strides_that_no_element_uses_do_no_harm(dtype: torch.dtype) -> None:
    """A tensor of one element or none counts as contiguous whatever its strides; its bytes are found all the same."""
    pair = tensor_of(dtype, (2,), bytes(range(1, 60)))
    tree = [pair[::2], pair[1::2], pair[:0:2], pair[:1].expand(1, 1).T]
    assert same(round_trip(tree), [each.clone() for each in (pair[:1], pair[1:], pair[:0], pair[:1].reshape(1, 1))])


def test_the_betas_of_an_optimizer_are_still_a_tuple() -> None:
    """An optimizer's own state dict, tuples and integer-like floats included, comes back equal."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    restored = round_trip(saved)
    assert same(restored, saved)
    assert type(restored["param_groups"][0]["betas"]) is tuple


def test_the_states_of_random_generators_come_back() -> None:
    """Python's, NumPy's (old and new) and torch's generators go on from a restored state as from the original."""
    ours, numpys, torchs = random.Random(1), np.random.default_rng(2), torch.Generator().manual_seed(3)
    old = np.random.RandomState(4)  # its global twin is what a user's code may draw from
    states = (ours.getstate(), numpys.bit_generator.state, torchs.get_state(), old.get_state())
    restored = round_trip(states)
    expected = (ours.random(), numpys.random(), torch.rand(1, generator=torchs), old.rand())
    ours.setstate(restored[0])
    numpys.bit_generator.state = restored[1]
    torchs.set_state(restored[2])
    old.set_state(restored[3])
    assert (ours.random(), numpys.random(), torch.rand(1, generator=torchs), old.rand()) == expected


def test_ordered_dicts_sizes_and_parameters_come_back_simpler_but_equal() -> None:
    """A model's own state dict can be saved as it is; what comes back compares equal."""
    tree = {"model": OrderedDict(weight=torch.nn.Parameter(torch.ones(2))), "shape": torch.Size([2, 3])}
    restored = round_trip(tree)
    assert type(restored["model"]) is dict
    assert type(restored["model"]["weight"]) is torch.Tensor
    assert type(restored["shape"]) is tuple
    assert restored["shape"] == torch.Size([2, 3])


def test_a_tensor_in_two_places_is_written_once_and_stays_one() -> None:
    """Tied weights take their space once, and are tied again afterwards."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    tree = {"embedding": weight, "head": weight, "again": weight.detach()}
    assert len(flatten(tree)[0]) == 1
    restored = round_trip(tree)
    assert restored["head"] is restored["embedding"] is restored["again"]


def test_views_of_one_storage_come_back_apart() -> None:
    """Views that overlap are each written whole: changing one after loading does not change another."""
    base = torch.arange(4.0)
    restored = round_trip([base, base[:2], base[2:], base.view(2, 2)])
    restored[0].zero_()
    assert [each.flatten().tolist() for each in restored] == [[0] * 4, [0, 1], [2, 3], [0, 1, 2, 3]]


def test_lazily_conjugated_and_negated_tensors_are_resolved() -> None:
    """The values that a conjugated view shows are written, not the ones that lie below."""
    base = torch.tensor([1 + 2j, 3 - 1j])
    restored = round_trip([base, base.conj(), base.conj().imag])
    assert torch.equal(restored[1], torch.tensor([1 - 2j, 3 + 1j]))
    assert torch.equal(restored[2], torch.tensor([-2.0, 1.0]))


def test_tensors_are_named_after_their_place() -> None:
    """A viewer of safetensors shows where each tensor belongs; clashing names are told apart."""
    tensors, _ = flatten({"model": {"0.weight": torch.ones(1)}, "a/b": torch.ones(1), "a": {"b": torch.ones(1)}})
    assert list(tensors) == ["model/0.weight", "a/b", "a/b~2"]
    assert list(flatten(torch.ones(1))[0]) == ["value"]
    assert list(flatten({"__metadata__": torch.ones(1)})[0]) != ["__metadata__"]


class Custom:
    """What no checkpoint holds."""


class Sub(torch.Tensor):
    """A tensor that is more than its values."""


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (Custom, "Custom"),
        (lambda: {1, 2}, "set"),
        (lambda: PurePosixPath("a"), "PurePosixPath"),
        (lambda: 1j, "complex"),
        (lambda: len, "builtin_function_or_method"),
        (lambda: defaultdict(int), "defaultdict"),
        (lambda: bytearray(2), "bytearray"),
        (lambda: np.array([object()]), "ndarray"),
        (lambda: np.array(["text"]), "ndarray"),
        (lambda: np.str_("text"), "str_"),
        (lambda: torch.ones(2).to_sparse(), "sparse"),
        (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "nested"),
        (lambda: torch.ones(2, device="meta"), "meta"),
        (lambda: torch.ones(2).as_subclass(Sub), "Sub"),
        (torch.nn.UninitializedParameter, "UninitializedParameter"),
        (lambda: torch.ones([1] * 65), "65 dimensions"),
        (lambda: torch.empty(2, dtype=torch.bits8), "bits8"),
    ],
)
def test_anything_else_is_refused_with_its_place_and_type(make: Any, kind: str) -> None:
    """The error names the place in the tree, what stands there, and what a checkpoint takes."""
    with pytest.raises(CheckpointError, match=rf"algorithms/0/patience.*cannot be saved.*{kind}"):
        flatten({"algorithms": [{"patience": make()}]})


@pytest.mark.parametrize("key", [b"a", frozenset(), (1, (2, 3)), torch.device("cpu"), np.float32(1)], ids=repr)
def test_keys_are_plain_values(key: Any) -> None:
    """Another key is refused, with its place and type, and the error shows how to write it."""
    with pytest.raises(CheckpointError, match=r"optimizer.*the key .* is a .*str\(key\)"):
        flatten({"optimizer": {key: 1.0}})


def test_a_tree_that_contains_itself_is_refused() -> None:
    """A cycle ends in a typed error, not in a recursion error."""
    tree: dict[str, object] = {}
    tree["again"] = tree
    with pytest.raises(CheckpointError, match="contain itself"):
        flatten(tree)


def test_what_may_be_written_may_be_read() -> None:
    """The deepest tree that is taken comes back, whatever it is nested by, and the next deeper is refused."""
    for wrap in (lambda inner: [inner], lambda inner: (inner,), lambda inner: {"$key": inner}):
        tree: object = 1
        for _ in range(MAX_DEPTH):
            tree = wrap(tree)
        assert same(round_trip(tree), tree)
        with pytest.raises(CheckpointError, match="deeper"):
            flatten(wrap(tree))


def deep(levels: int) -> Any:
    """JSON nested ``levels`` deep."""
    state: Any = 1
    for _ in range(levels):
        state = {"$tuple": [state]}
    return state


BYTES = torch.arange(4, dtype=torch.uint8)


@pytest.mark.parametrize(
    "state",
    [
        {"$eval": "__import__('os')"},
        {"$tensor": "t", "more": 1},
        {"$tensor": 1},
        {"$tensor": "t", "dtype": "float64", "shape": [2]},
        {"$tensor": "t", "dtype": "complex128", "shape": [2]},
        {"$tensor": "t", "dtype": ["complex128"], "shape": [0]},
        {"$tensor": "t", "dtype": "complex128", "shape": [-1]},
        {"$bytes": ["t"]},
        {"$array": "t", "dtype": "O", "shape": [1]},
        {"$array": "t", "dtype": "|O8", "shape": [0]},
        {"$array": "t", "dtype": "<u4", "shape": [2]},
        {"$array": "t", "dtype": "<u4", "shape": "1"},
        {"$array": "t", "dtype": "<u4", "shape": [True]},
        {"$array": "t", "dtype": "|b1", "shape": [4]},
        {"$array": "t", "dtype": "|u1", "shape": [1] * 65 + [4]},
        {"$scalar": "00", "dtype": "<f8"},
        {"$scalar": "0", "dtype": "|u1"},
        {"$scalar": "02", "dtype": "|b1"},
        {"$scalar": "zz", "dtype": "|u1"},
        {"$scalar": "00", "dtype": None},
        {"$tuple": 3},
        {"$tuple": {"a": 1}},
        {"$dict": [["a", 1], ["a", 2]]},
        {"$dict": [["a"]]},
        {"$dict": [[[1], 1]]},
        {"$dict": [[{"$tuple": [{"$tuple": []}]}, 1]]},
        {"$dict": [[{"$bytes": "t"}, 1]]},
        {"$dict": [[1, 1], [True, 2]]},
        {"$dict": []},
        {"$dict": None},
        {"$int": "1_000"},
        {"$int": "__import__"},
        {"$int": 5},
        {"$float": "00"},
        {"$float": 1.0},
        {"$str": "ff"},
        {"$str": None},
        {"$eval": deep(400)},
        {"$eval": "x" * 1_000_000},
        {"$dtype": "load"},
        {"$dtype": 3},
        {"$device": "warp"},
        {"$device": "cpu; rm"},
        {"$device": None},
        float("inf"),
        deep(MAX_DEPTH + 1),
    ],
    ids=lambda state: repr(state)[:40],
)
def test_json_that_flatten_never_writes_is_a_typed_error(state: Any) -> None:
    """Unknown tags, keys too many, wrong types, sizes that do not fit: each is refused, and nothing is guessed."""
    with pytest.raises(CheckpointError):
        unflatten({"t": BYTES}, ["$", {"used": {"$bytes": "t"}}, state])


def test_a_shape_that_hides_an_overflow_behind_a_zero_is_refused() -> None:
    """Sizes may multiply to zero bytes and still be too large for a stride."""
    empty = torch.empty(0, dtype=torch.uint8)
    shape: Any = [0, 1 << 62, 1 << 62]
    for state in (
        {"$array": "t", "dtype": "<u4", "shape": shape},
        {"$tensor": "t", "dtype": "complex128", "shape": shape},
    ):
        with pytest.raises(CheckpointError):
            unflatten({"t": empty}, state)


def test_bytes_are_taken_from_bytes_only() -> None:
    """A tensor of another dtype does not pass for bytes."""
    with pytest.raises(CheckpointError, match="nothing that thawline writes"):
        unflatten({"t": torch.ones(2)}, {"$bytes": "t"})


def test_a_missing_tensor_is_named() -> None:
    """The error says where the reference stands and what it refers to."""
    with pytest.raises(CheckpointError, match=r"model/weight.*'w'.*not there"):
        unflatten({}, {"model": {"weight": {"$tensor": "w"}}})


def test_a_tensor_that_nothing_refers_to_is_an_error() -> None:
    """A state from which a reference was lost is not taken for a whole one."""
    with pytest.raises(CheckpointError, match="used nowhere"):
        unflatten({"t": BYTES}, {"step": 1})


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just("t")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                [*(next(iter(tag)) for tag in _TAGS if len(tag) == 1), "$array", "$scalar", "dtype", "shape"]
            ),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=10,
)


@given(JSON)
def test_hostile_json_is_read_or_refused(state: Any) -> None:
    """Whatever the tags hold, the outcome is a tree or a CheckpointError."""
    with contextlib.suppress(CheckpointError):
        unflatten({"t": BYTES}, state)
