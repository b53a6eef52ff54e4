"""Tensors that lie in shards over several ranks, each of which holds some rows: what is asked of them without a word to others.

``torch.distributed.fsdp.fully_shard`` makes them ``DTensor`` objects. They are known here by what they can do, so that
nothing of ``torch.distributed`` is loaded where one process trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: object) -> bool:
    """Return whether a tensor lies in shards over several ranks.

    Example:
        >>> is_sharded(torch.ones(2))
        False
    """
    return isinstance(tensor, Tensor) and hasattr(tensor, "full_tensor")


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor laid out as another one of its shape is: in shards where that is.

    Nothing is sent: every rank has the whole tensor and takes its rows of it.

    Args:
        tensor: The whole tensor, on any device; one that lies in shards already is returned as it is.
        like: What it is to be laid out as.

    Returns:
        The tensor itself, or a copy of this rank's rows on the device of ``like``.

    Example:
        >>> weight = torch.ones(2)
        >>> shard_like(weight, torch.zeros(2)) is weight
        True
    """
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    made: Any = torch.empty_like(like, dtype=tensor.dtype, requires_grad=False)
    with torch.no_grad():
        made.to_local().copy_(_rows(tensor, like))
    sharded: Tensor = made
    return sharded


def unsharded(tensor: Tensor) -> Tensor:
    """Return all of a tensor, gathered from the ranks where it lies in shards: all of them call this.

    Example:
        >>> unsharded(torch.ones(2))
        tensor([1., 1.])
    """
    lying: Any = tensor
    gathered: Tensor = lying.full_tensor() if is_sharded(tensor) else tensor
    return gathered


def computes_on(tensor: Tensor) -> str:
    """Return the kind of device that a parameter is computed with, which is not where it lies if it is offloaded."""
    mesh = getattr(tensor, "device_mesh", None)
    return tensor.device.type if mesh is None else str(mesh.device_type)


def sharded_in(tree: object, place: str = "") -> dict[str, Tensor]:
    """Return the tensors in a nested tree that lie in shards, by where they stand, in order.

    Example:
        >>> sharded_in({"a": [torch.ones(1)]})
        {}
    """
    if is_sharded(tree):
        return {place: tree}  # type: ignore[dict-item]
    found: dict[str, Tensor] = {}
    for key, value in _entries(tree):
        found |= sharded_in(value, f"{place}/{key}")
    return found


def replaced(tree: Any, by: Mapping[int, Tensor]) -> Any:
    """Return a nested tree with other tensors in place of some.

    Args:
        tree: Dicts, lists and tuples.
        by: What takes the place of a tensor, by the tensor's ``id``.

    Example:
        >>> one = torch.ones(1)
        >>> replaced({"a": (one, 2)}, {id(one): torch.zeros(1)})
        {'a': (tensor([0.]), 2)}
    """
    if isinstance(tree, Tensor):
        return by.get(id(tree), tree)
    if isinstance(tree, Mapping):
        return {key: replaced(value, by) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(replaced(value, by) for value in tree)
    return tree


def _entries(tree: object) -> list[tuple[object, object]]:
    if isinstance(tree, Mapping):
        return list(tree.items())
    return list(enumerate(tree)) if isinstance(tree, (list, tuple)) else []


def _rows(tensor: Tensor, like: Any) -> Tensor:
    """Return the rows of a whole tensor that this rank holds: rows are dealt out in equal chunks, the last ones may lack some."""
    mesh = like.device_mesh
    chunks = tensor.chunk(mesh.size(), dim=0)
    rank = mesh.get_local_rank()
    return chunks[rank] if rank < len(chunks) else tensor[:0]
