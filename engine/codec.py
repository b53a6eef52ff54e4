"""A nested tree of tensors and plain values, as named tensors plus JSON and back; nothing is pickled.

JSON has no tuple, bytes, NaN, infinity, tensor or array, nor keys that are not text. Each is written as an object with one key that begins
with ``$``, such as ``{"$tuple": [0.9, 0.999]}``; a user's own key that begins so is escaped. What is read is taken
for hostile: only these objects are known, every tensor must be used, and depth and memory are bounded.
"""

from __future__ import annotations

import math
import re
import struct
from collections import OrderedDict
from reprlib import repr as brief  # bounded also for what is huge or deep
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import numpy as np
import torch
from attrs import Factory, define

from .errors import CheckpointError, shorten, with_article
from .tensorfile import DTYPES, MAX_RANK, bytes_of, shape_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

    from .typing import Json

MAX_DEPTH = 64
"""How deep a tree may nest."""

_KINDS = (
    "dict (its keys None, bool, int, float, str or tuples of them), list, tuple, None, bool, int, float, str, bytes, dense tensors, "
    "NumPy arrays and numbers, torch.dtype and torch.device"
)
_HEX = re.compile(r"(?:[0-9a-f]{2})*")
_HEX_INT = re.compile(r"-?0x[0-9a-f]+")
_PLAIN_INT = 1 << 63  # larger ones are written in hexadecimal, which Python reads in linear time and at any length
_TORCH_DTYPES: dict[str, torch.dtype] = {
    str(each).removeprefix("torch."): each for each in vars(torch).values() if isinstance(each, torch.dtype)
}
# The dtypes that the safetensors format has no name for: their bytes are written, what they mean goes into the JSON.
_BYTES_ONLY: dict[str, torch.dtype] = {
    name: _TORCH_DTYPES[name]
    for name in ("complex128", "complex32", "float8_e8m0fnu", "float4_e2m1fn_x2")
    if name in _TORCH_DTYPES
}
_ARRAY_DTYPES = {"|b1", "|i1", "|u1"} | {
    order + kind for order in "<>" for kind in ("i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
}

Place: TypeAlias = tuple[str, ...]


def flatten(tree: object) -> tuple[dict[str, Tensor], Json]:
    """Split ``tree`` into named tensors and JSON, from which :func:`unflatten` makes an equal tree.

    Values come back bit for bit, NaNs included, and of the same type: tuples as tuples, NumPy numbers as NumPy
    numbers. Three come back simpler, though equal: ``OrderedDict`` as dict, ``torch.Size`` as tuple, ``nn.Parameter``
    as Tensor. A tensor that stands in several places is written once and comes back as one tensor in all of them;
    other views of one storage come back apart.

    Args:
        tree: Any nesting of dict, list, tuple, None, bool, int (of any size), float, str, bytes, dense tensors of any
            dtype and device, NumPy arrays and numbers, torch.dtype and torch.device. The keys of a dict are None,
            bool, int, float, str, or tuples of them.

    Returns:
        The tensors by name, contiguous and on the CPU, and the JSON that refers to them. They share memory with the
        tree where they can: write them before training goes on.

    Raises:
        CheckpointError: Something else is in the tree; the message says where. Or it nests deeper than MAX_DEPTH.

    Example:
        >>> tensors, state = flatten({"weight": torch.ones(2), "betas": (0.9, 0.999)})
        >>> tensors
        {'weight': tensor([1., 1.])}
        >>> state
        {'weight': {'$tensor': 'weight'}, 'betas': {'$tuple': [0.9, 0.999]}}
    """
    encoder = _Encoder()
    state = encoder.encode(tree, ())
    return encoder.tensors, state


def unflatten(tensors: Mapping[str, Tensor], state: Json) -> Any:  # a checkpoint's reader knows what it put in
    """Return the tree that :func:`flatten` split into ``tensors`` and ``state``.

    Args:
        tensors: The tensors by name. The tree holds them as they are, not copies.
        state: What refers to them.

    Returns:
        The tree.

    Raises:
        CheckpointError: The two do not fit each other, or were not written by :func:`flatten`.

    Example:
        >>> unflatten({"weight": torch.ones(2)}, {"weight": {"$tensor": "weight"}, "betas": {"$tuple": [0.9, 0.999]}})
        {'weight': tensor([1., 1.]), 'betas': (0.9, 0.999)}
    """
    decoder = _Decoder(tensors)
    tree = decoder.decode(state, ())
    if unused := tensors.keys() - decoder.used:
        raise CheckpointError(f"{len(unused)} tensors are used nowhere in the state, such as {brief(min(unused))}.")
    return tree


def _is_scalar(value: object) -> TypeGuard[np.generic]:
    return isinstance(value, np.generic) and value.dtype.str in _ARRAY_DTYPES


def _is_key(value: object) -> bool:
    """Whether ``value`` comes back from JSON as the same key of a dict."""
    parts = value if type(value) is tuple else (value,)
    return all(each is None or type(each) in (bool, int, float, str) for each in parts)


def _is_text(value: str) -> bool:
    """Whether ``value`` survives JSON: a lone surrogate does, but a pair of them is read as one character."""
    return value.isascii() or not any("\ud800" <= each <= "\udfff" for each in value)


@define
class _Encoder:
    tensors: dict[str, Tensor] = Factory(dict[str, "Tensor"])
    _seen: dict[object, str] = Factory(dict[object, str])

    def encode(self, value: object, place: Place) -> Json:
        if len(place) > MAX_DEPTH:
            raise CheckpointError(f"{_where(place)} nests deeper than {MAX_DEPTH}; does it contain itself?")
        kind = type(value)
        if value is None or kind is bool:
            return value  # type: ignore[return-value]  # one of the two that JSON has
        if kind in (int, float, str):
            return self._plain(value)
        if isinstance(value, list) and kind is list:
            return [self.encode(each, (*place, str(index))) for index, each in enumerate(value)]
        if isinstance(value, tuple) and kind in (tuple, torch.Size):
            return {"$tuple": [self.encode(each, (*place, str(index))) for index, each in enumerate(value)]}
        if isinstance(value, dict) and kind in (dict, OrderedDict):
            return self._mapping(value, place)
        return self._leaf(value, place)

    def _plain(self, value: object) -> Json:
        if isinstance(value, int):
            return value if -_PLAIN_INT <= value < _PLAIN_INT else {"$int": hex(value)}
        if isinstance(value, float):
            return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
        assert isinstance(value, str)
        return value if _is_text(value) else {"$str": value.encode("utf-8", "surrogatepass").hex()}

    def _mapping(self, value: dict[Any, object], place: Place) -> Json:
        for key in value:
            if not _is_key(key):
                raise CheckpointError(
                    f"{_where(place)} cannot be saved: the key {shorten(key)} is {with_article(_name(key))}, keys are None, bool, int, "
                    "float, str or tuples of them. Write: {str(key): value for key, value in …}"
                )
        if all(type(key) is str and not key.startswith("$") and _is_text(key) for key in value):
            return {key: self.encode(each, (*place, key)) for key, each in value.items()}
        return {
            "$dict": [[self.encode(key, place), self.encode(each, (*place, str(key)))] for key, each in value.items()]
        }

    def _leaf(self, value: object, place: Place) -> Json:
        if isinstance(value, torch.Tensor):
            return self._tensor(value, place)
        if type(value) is bytes:
            return {"$bytes": self._store(_tensor_of(value), place)}
        if type(value) is np.ndarray and value.dtype.str in _ARRAY_DTYPES:
            return {
                "$array": self._store(_tensor_of(value.tobytes()), place),
                "dtype": value.dtype.str,
                "shape": list(value.shape),
            }
        if _is_scalar(value):
            return {"$scalar": value.tobytes().hex(), "dtype": value.dtype.str}
        if isinstance(value, torch.dtype):
            return {"$dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"$device": str(value)}
        raise CheckpointError(
            f"{_where(place)} cannot be saved: it is {with_article(_name(value))}. A checkpoint takes {_KINDS}."
        )

    def _tensor(self, value: Tensor, place: Place) -> Json:
        if reason := _refuse(value):
            raise CheckpointError(f"{_where(place)} cannot be saved: it is {reason}. A checkpoint takes dense tensors.")
        memory = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        same = (*memory, value.is_conj(), value.is_neg())
        if value.numel() and same in self._seen:
            return self._refer(self._seen[same], value)
        dense = value.detach().cpu().resolve_conj().resolve_neg()
        if value.dtype in _BYTES_ONLY.values():
            # torch copies few of these types, but their bytes always.
            dense = bytes_of((dense.view(torch.uint8) if dense.itemsize == 1 else dense).contiguous())
        self._seen[same] = name = self._store(dense.contiguous(), place)
        return self._refer(name, value)

    def _refer(self, name: str, value: Tensor) -> Json:
        if value.dtype not in _BYTES_ONLY.values():
            return {"$tensor": name}
        return {"$tensor": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}

    def _store(self, tensor: Tensor, place: Place) -> str:
        """Name ``tensor`` after its path, so that any safetensors viewer shows what it is."""
        base = "/".join(place).encode("utf-8", "backslashreplace").decode()[:200] or "value"
        name, count = base, len(self.tensors)
        while name in self.tensors or name == "__metadata__":  # which means something else in a safetensors file
            name, count = f"{base}~{count}", count + 1
        self.tensors[name] = tensor
        return name


def _refuse(tensor: Tensor) -> str | None:
    """Say why ``tensor`` cannot be stored as the bytes of one dense block, None if it can."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return with_article(_name(tensor))
    if tensor.is_nested or tensor.layout is not torch.strided:
        return "sparse or nested"
    if tensor.is_meta:
        return "on the meta device, without data"
    if tensor.dtype not in (*DTYPES.values(), *_BYTES_ONLY.values()):
        return f"of {tensor.dtype}"
    if tensor.dim() > MAX_RANK:
        return f"of {tensor.dim()} dimensions, more than {MAX_RANK}"
    return None


@define
class _Decoder:
    tensors: Mapping[str, Tensor]
    used: set[str] = Factory(set[str])

    def decode(self, node: Json, place: Place) -> Any:
        if len(place) > MAX_DEPTH:
            raise CheckpointError(f"{_where(place)} nests deeper than {MAX_DEPTH}.")
        if isinstance(node, list):
            return [self.decode(each, (*place, str(index))) for index, each in enumerate(node)]
        if isinstance(node, dict):
            if not any(key.startswith("$") for key in node):
                return {key: self.decode(each, (*place, key)) for key, each in node.items()}
            decoder = _TAGS.get(frozenset(node))
            if decoder is None:
                raise self._malformed(node, place)
            return decoder(self, node, place)
        if isinstance(node, float) and not math.isfinite(node):
            raise self._malformed(node, place)
        return node

    def _tuple(self, node: dict[str, Json], place: Place) -> tuple[object, ...]:
        if not isinstance(items := node["$tuple"], list):
            raise self._malformed(node, place)
        return tuple(self.decode(each, (*place, str(index))) for index, each in enumerate(items))

    def _dict(self, node: dict[str, Json], place: Place) -> dict[Any, object]:
        found: dict[Any, object] = {}
        for pair in _items(node["$dict"]):
            if not isinstance(pair, list) or len(pair) != 2:
                raise self._malformed(node, place)
            key = self.decode(pair[0], place)
            if not _is_key(key) or key in found:
                raise self._malformed(node, place)
            found[key] = self.decode(pair[1], (*place, str(key)))
        if not found:  # flatten escapes only what needs it
            raise self._malformed(node, place)
        return found

    def _int(self, node: dict[str, Json], place: Place) -> int:
        if not isinstance(text := node["$int"], str) or not _HEX_INT.fullmatch(text):
            raise self._malformed(node, place)
        return int(text, 16)

    def _float(self, node: dict[str, Json], place: Place) -> float:
        raw = self._hex(node, "$float", place)
        if len(raw) != 8:
            raise self._malformed(node, place)
        return float(struct.unpack(">d", raw)[0])

    def _str(self, node: dict[str, Json], place: Place) -> str:
        try:
            return self._hex(node, "$str", place).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise self._malformed(node, place) from None

    def _bytes(self, node: dict[str, Json], place: Place) -> bytes:
        return self._own(node, "$bytes", place)

    def _array(self, node: dict[str, Json], place: Place) -> np.ndarray[Any, np.dtype[Any]]:
        shape, name = shape_of(node["shape"]), node["dtype"]
        raw = self._own(node, "$array", place)
        if shape is None or not isinstance(name, str) or name not in _ARRAY_DTYPES:
            raise self._malformed(node, place)
        return self._shaped(raw, name, shape, node, place)

    def _scalar(self, node: dict[str, Json], place: Place) -> Any:
        name = node["dtype"]
        if not isinstance(name, str) or name not in _ARRAY_DTYPES:
            raise self._malformed(node, place)
        return self._shaped(self._hex(node, "$scalar", place), name, (), node, place)[()]

    def _shaped(
        self, raw: bytes, name: str, shape: tuple[int, ...], node: Json, place: Place
    ) -> np.ndarray[Any, np.dtype[Any]]:
        dtype = np.dtype(name)
        if math.prod(shape) * dtype.itemsize != len(raw) or (name == "|b1" and raw.strip(b"\x00\x01")):
            raise self._malformed(node, place)
        return np.frombuffer(bytearray(raw), dtype).reshape(shape)

    def _tensor(self, node: dict[str, Json], place: Place) -> Tensor:
        return self._named(node, "$tensor", place)

    def _bytes_only(self, node: dict[str, Json], place: Place) -> Tensor:
        shape, name = shape_of(node["shape"]), node["dtype"]
        raw = self._raw(node, "$tensor", place)
        dtype = _BYTES_ONLY.get(name) if isinstance(name, str) else None
        if shape is None or dtype is None or math.prod(shape) * dtype.itemsize != len(raw):
            raise self._malformed(node, place)
        return raw.view(dtype).reshape(shape)

    def _dtype(self, node: dict[str, Json], place: Place) -> torch.dtype:
        name = node["$dtype"]
        if not isinstance(name, str) or name not in _TORCH_DTYPES:
            raise self._malformed(node, place)
        return _TORCH_DTYPES[name]

    def _device(self, node: dict[str, Json], place: Place) -> torch.device:
        name = node["$device"]
        if not isinstance(name, str) or not re.fullmatch(r"[a-z]{1,20}(:\d{1,3})?", name):
            raise self._malformed(node, place)
        try:
            return torch.device(name)
        except RuntimeError:
            raise self._malformed(node, place) from None

    def _hex(self, node: dict[str, Json], tag: str, place: Place) -> bytes:
        if not isinstance(text := node[tag], str) or not _HEX.fullmatch(text):
            raise self._malformed(node, place)
        return bytes.fromhex(text)

    def _raw(self, node: dict[str, Json], tag: str, place: Place) -> Tensor:
        raw = self._named(node, tag, place)
        if raw.dtype is not torch.uint8 or raw.dim() != 1:
            raise self._malformed(node, place)
        return raw

    def _own(self, node: dict[str, Json], tag: str, place: Place) -> bytes:
        """Return a copy of bytes that nothing else refers to: many copies of a large tensor would take all memory."""
        name = node[tag]
        if isinstance(name, str) and name in self.used:
            raise self._malformed(node, place)
        return self._raw(node, tag, place).numpy().tobytes()

    def _named(self, node: dict[str, Json], tag: str, place: Place) -> Tensor:
        name = node[tag]
        if not isinstance(name, str) or name not in self.tensors:
            raise CheckpointError(f"{_where(place)} refers to the tensor {brief(name)}, which is not there.")
        self.used.add(name)
        return self.tensors[name]

    def _malformed(self, node: Json, place: Place) -> CheckpointError:
        return CheckpointError(f"{_where(place)} is nothing that thawline writes: {brief(node)}.")


# The keys of an object say which it is, so that one with a key too many or too few is none.
_TAGS: dict[frozenset[str], Callable[[_Decoder, dict[str, Json], Place], object]] = {
    frozenset({"$tuple"}): _Decoder._tuple,
    frozenset({"$dict"}): _Decoder._dict,
    frozenset({"$int"}): _Decoder._int,
    frozenset({"$float"}): _Decoder._float,
    frozenset({"$str"}): _Decoder._str,
    frozenset({"$bytes"}): _Decoder._bytes,
    frozenset({"$array", "dtype", "shape"}): _Decoder._array,
    frozenset({"$scalar", "dtype"}): _Decoder._scalar,
    frozenset({"$tensor"}): _Decoder._tensor,
    frozenset({"$tensor", "dtype", "shape"}): _Decoder._bytes_only,
    frozenset({"$dtype"}): _Decoder._dtype,
    frozenset({"$device"}): _Decoder._device,
}


def _items(node: Json) -> Iterable[Json]:
    return node if isinstance(node, list) else [None]


def _tensor_of(raw: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(raw, np.uint8).copy())


def _where(place: Place) -> str:
    if not place:
        return "The state"
    return f"state[{'/'.join(each[:40] for each in place[:8]) + ('/…' if len(place) > 8 else '')!r}]"


def _name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
