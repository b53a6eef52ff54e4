"""Tensors as a safetensors file: laid out without a copy, read in one pass, checked before anything is allocated.

The package ``safetensors`` reads and writes the same files, and the tests hold the two against each other. Ours leaves
the files to the caller, who hashes what it writes and follows no name twice; gives each tensor memory of its own, so
that keeping one does not keep the file; and refuses what it cannot read with a typed error.
"""

from __future__ import annotations

import math
from reprlib import repr as brief  # bounded also for what is huge or deep
from typing import TYPE_CHECKING

import torch
from attrs import frozen

from .errors import CheckpointError, shorten
from .jsontext import MEMORY, dump_json, load_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from io import BufferedIOBase

    from torch import Tensor

    from .typing import Json

MAX_HEADER = 32 << 20
"""The longest header that is read or written, in bytes."""

MAX_RANK = 64
"""How many dimensions a tensor may have."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
"""What the format calls each dtype."""
_MAX_SIZE = 1 << 63
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def pieces_of(tensors: Mapping[str, Tensor]) -> list[memoryview]:
    """Return the bytes of a safetensors file that holds ``tensors``, in pieces that are to be written one by one.

    Args:
        tensors: Contiguous tensors on the CPU, by name.

    Returns:
        The header, and then the tensors' own memory, not copies of it.

    Raises:
        CheckpointError: A dtype that the format has no name for, or more tensors than a header may list.

    Example:
        >>> from io import BytesIO
        >>> raw = b"".join(pieces_of({"weight": torch.ones(2)}))
        >>> read_tensors(BytesIO(raw), len(raw))
        {'weight': tensor([1., 1.])}
    """
    # The widest dtypes first, as the package does: every tensor then lies aligned.
    ordered = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Json] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"The tensor {shorten(name)} is of {tensor.dtype}, which the format cannot name.")
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = dump_json(header, budget=MEMORY + end)
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise CheckpointError(f"{len(tensors)} tensors need a header of {len(text)} bytes, more than {MAX_HEADER}.")
    return [
        memoryview(len(text).to_bytes(8, "little") + text),
        *(bytes_of(tensors[name]).numpy().data for name in ordered),
    ]


def read_tensors(file: BufferedIOBase, size: int) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, each into memory of its own.

    Args:
        file: Stands at the beginning.
        size: How long the file is, in bytes.

    Returns:
        The tensors by name, in the order in which they lie in the file.

    Raises:
        CheckpointError: The file is not what the format says: tensors that overlap, leave gaps or exceed the file,
            sizes that do not fit the dtype, unknown dtypes, a header too long, or too many dimensions.
        OSError: The file cannot be read.
    """
    length = int.from_bytes(_exactly(file, 8), "little")
    if length > min(size - 8, MAX_HEADER):
        raise CheckpointError(f"A safetensors header of {length} bytes, in a file of {size} (at most {MAX_HEADER}).")
    header = load_json(_exactly(file, length), budget=MEMORY + size)
    if not isinstance(header, dict):
        raise CheckpointError("A safetensors header that is not an object.")
    entries = [_entry(name, entry) for name, entry in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    at = 0
    for entry in entries:
        if entry.begin != at:
            raise CheckpointError(f"The tensor {brief(entry.name)} begins at byte {entry.begin}, not at {at}.")
        at = entry.end
    if 8 + length + at != size:
        raise CheckpointError(f"The tensors end at byte {8 + length + at} of a file of {size}.")
    return {entry.name: _tensor(file, entry) for entry in entries}


def shape_of(value: object) -> tuple[int, ...] | None:
    """Return ``value`` as the shape of a tensor or array, or None if it cannot be one.

    Example:
        >>> shape_of([2, 3]), shape_of([2, -1]), shape_of([True])
        ((2, 3), None, None)
    """
    if not isinstance(value, list) or len(value) > MAX_RANK:
        return None
    sizes = [each for each in value if type(each) is int and 0 <= each < _MAX_SIZE]
    # Behind a zero, sizes can hide a product that overflows torch's strides.
    return tuple(sizes) if len(sizes) == len(value) and math.prod(filter(None, sizes)) < _MAX_SIZE else None


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the memory of a contiguous ``tensor`` as a flat tensor of uint8 that shares it.

    Example:
        >>> bytes_of(torch.tensor([1.0]))
        tensor([  0,   0, 128,  63], dtype=torch.uint8)
    """
    # Not reshape: a tensor of one element or none counts as contiguous whatever its strides, and view minds them.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


@frozen
class _Entry:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _entry(name: str, entry: Json) -> _Entry:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"The tensor {brief(name)} is described by {brief(entry)}.")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    shape, offsets = shape_of(entry["shape"]), shape_of(entry["data_offsets"])
    if dtype is None or shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError(f"The tensor {brief(name)} is described by {brief(entry)}.")
    begin, end = offsets
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise CheckpointError(f"The tensor {brief(name)} of shape {brief(shape)} has {end - begin} bytes.")
    return _Entry(name, dtype, shape, begin, end)


def _tensor(file: BufferedIOBase, entry: _Entry) -> Tensor:
    raw = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
    if raw.numel():
        _fill(file, raw.numpy().data)
        if entry.dtype is torch.bool and raw.max() > 1:
            raise CheckpointError(f"The tensor {brief(entry.name)} is of bool and holds neither true nor false.")
    return raw.view(entry.dtype).reshape(entry.shape)


def _fill(file: BufferedIOBase, into: memoryview) -> None:
    while len(into):
        count = file.readinto(into)
        if not count:
            raise CheckpointError("The file of the tensors is shorter than its header says.")
        into = into[count:]


def _exactly(file: BufferedIOBase, length: int) -> bytes:
    found = bytearray(length)
    _fill(file, memoryview(found))
    return bytes(found)
