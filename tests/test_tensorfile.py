"""Files of tensors: the same as the safetensors package's own, and refused where they are not what they say."""

from __future__ import annotations

import contextlib
import json
from io import BytesIO
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from thawline.engine.errors import CheckpointError
from thawline.engine.tensorfile import DTYPES, MAX_HEADER, bytes_of, pieces_of, read_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping


def saved(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The file of ``tensors``."""
    return b"".join(pieces_of(tensors))


def loaded(raw: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a file."""
    return read_tensors(BytesIO(raw), len(raw))


def equal(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    """Whether both hold the same names, dtypes, shapes and bits."""
    return left.keys() == right.keys() and all(
        each.dtype == right[name].dtype
        and each.shape == right[name].shape
        and torch.equal(bytes_of(each), bytes_of(right[name]))
        for name, each in left.items()
    )


def every_dtype() -> dict[str, torch.Tensor]:
    """One tensor of each dtype, in shapes that leave the narrow ones unaligned, and tensors of no size."""
    raw = torch.arange(1, 121, dtype=torch.uint8)
    tensors = {
        f"{dtype}-é": raw[: 3 * dtype.itemsize].clone().view(dtype).reshape(1, 3)
        for dtype in DTYPES.values()
        if dtype is not torch.bool
    }
    return {**tensors, "bool": torch.tensor([True, False]), "empty": torch.empty(0, 2), "number": torch.tensor(3.0)}


def test_the_package_reads_what_we_write() -> None:
    """Every dtype that the package knows is read by it, bit for bit."""
    assert equal(safetensors.torch.load(saved(every_dtype())), every_dtype())


def test_we_read_what_the_package_writes() -> None:
    """Every dtype that the package knows is read from its files, bit for bit, whatever metadata they carry."""
    assert equal(loaded(safetensors.torch.save(every_dtype(), {"format": "pt", "by": "another"})), every_dtype())


def test_no_tensors_are_a_file_too() -> None:
    """A checkpoint without tensors is written and read as any other."""
    assert loaded(saved({})) == safetensors.torch.load(saved({})) == {}


def test_each_tensor_has_memory_of_its_own() -> None:
    """Keeping one tensor does not keep the file's other bytes alive."""
    tensors = loaded(saved({"small": torch.ones(1), "large": torch.ones(1000)}))
    assert tensors["small"].untyped_storage().nbytes() == 4


def test_a_dtype_without_a_name_is_refused() -> None:
    """complex128 has none in the format; the codec writes its bytes instead."""
    with pytest.raises(CheckpointError, match="complex128"):
        saved({"z": torch.ones(1, dtype=torch.complex128)})


def build(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file with this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    """One tensor's description."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DATA = b"\x00\x01\x02\x03"
HOSTILE = {
    "nothing": b"",
    "seven bytes": b"\x00" * 7,
    "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02ls\x85R.",
    "a zip, as torch.save writes": b"PK\x03\x04" + b"\x00" * 60,
    "a header longer than the file": build({"t": entry()}, DATA, length=1 << 20),
    "a header of 2**63 bytes": build({"t": entry()}, DATA, length=1 << 63),
    "a header above the limit": build(b"{}" + b" " * MAX_HEADER),
    "no JSON": build(b"{'t': 1}", DATA),
    "a list": build([entry()], DATA),
    "a key twice": build(b'{"t":1,"t":1}'),
    "no description": build({"t": None}, DATA),
    "a field missing": build({"t": {"dtype": "U8", "shape": [4]}}, DATA),
    "a field more": build({"t": {**entry(), "exec": "ls"}}, DATA),
    "an unknown dtype": build({"t": entry("F4")}, DATA),
    "a dtype that is a list": build({"t": entry(["U8"])}, DATA),
    "a shape too large": build({"t": entry(shape=[5])}, DATA),
    "a shape too small": build({"t": entry(shape=[3])}, DATA),
    "a negative size": build({"t": entry(shape=[-2, -2])}, DATA),
    "a size that is true": build({"t": entry(shape=[True, 4])}, DATA),
    "a size of 2**70": build({"t": entry(shape=[1 << 70, 0], offsets=(0, 0))}, b""),
    "sizes that overflow behind a zero": build({"t": entry(shape=[0, 1 << 62, 1 << 62], offsets=(0, 0))}, b""),
    "a thousand dimensions": build({"t": entry(shape=[1] * 1000 + [4])}, DATA),
    "NaN as an offset": build(b'{"t":{"dtype":"U8","shape":[4],"data_offsets":[0,NaN]}}', DATA),
    "offsets backwards": build({"t": entry(offsets=(4, 0))}, DATA),
    "three offsets": build({"t": entry(offsets=(0, 2, 4))}, DATA),
    "an end beyond the file": build({"t": entry(shape=[1 << 40], offsets=(0, 1 << 40))}, DATA),
    "a gap": build({"a": entry(shape=[1], offsets=(0, 1)), "b": entry(shape=[2], offsets=(2, 4))}, DATA),
    "an overlap": build({"a": entry(shape=[3], offsets=(0, 3)), "b": entry(shape=[2], offsets=(2, 4))}, DATA),
    "the same bytes twice": build({"a": entry(), "b": entry()}, DATA),
    "bytes that belong to none": build({"t": entry()}, DATA + b"more"),
    "fewer bytes than described": build({"t": entry()}, DATA[:2]),
    "a bool that is two": build({"t": entry("BOOL")}, DATA),
    "a multitude of tensors of nothing": build(
        b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(200_000)) + b"}"
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_not_what_it_says_is_a_typed_error(name: str) -> None:
    """Nothing is allocated for a description that the file does not bear out."""
    with pytest.raises(CheckpointError):
        loaded(HOSTILE[name])


def test_a_file_shorter_than_promised_is_a_typed_error() -> None:
    """A file that shrinks while it is read ends in an error, not in zeros."""
    raw = saved({"t": torch.ones(4)})
    with pytest.raises(CheckpointError, match="shorter"):
        read_tensors(BytesIO(raw[:-1]), len(raw))


@given(st.integers(0, 10_000), st.integers(0, 7))
def test_a_flipped_bit_never_escapes_as_another_error(at: int, bit: int) -> None:
    """Without the hashes a flipped bit can pass unseen, but what it breaks is a CheckpointError."""
    raw = bytearray(saved({"weight": torch.ones(2, 3), "mask": torch.tensor([True])}))
    raw[at % len(raw)] ^= 1 << bit
    with contextlib.suppress(CheckpointError):
        loaded(bytes(raw))
