"""Tensors whose elements share memory, as ``torch.zeros(1).expand(3)`` makes them: torch refuses to write into those."""

from __future__ import annotations

import torch
from torch import Tensor


def is_expanded(tensor: Tensor) -> bool:
    """Return whether several elements lie in one place, so that torch does not write into the tensor."""
    return any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def can_hold(tensor: Tensor, values: Tensor) -> bool:
    """Return whether a tensor can be made equal to values of its shape: where elements share a place, their values agree.

    Example:
        >>> can_hold(torch.zeros(1).expand(2), torch.tensor([1.0, 1.0])), can_hold(torch.zeros(1).expand(2), torch.arange(2.0))
        (True, False)
    """
    return not is_expanded(tensor) or bool((_once(values, tensor) == values).all())


@torch.no_grad()
def put(tensor: Tensor, values: Tensor) -> None:
    """Copy values into a tensor of their shape, in place; of elements that share a place, one is written.

    Example:
        >>> scale = torch.zeros(1).expand(3)
        >>> put(scale, torch.full((3,), 2.0))
        >>> scale.tolist()
        [2.0, 2.0, 2.0]
    """
    if is_expanded(tensor):
        _once(tensor, tensor).copy_(_once(values, tensor))
    else:
        tensor.copy_(values)


def _once(values: Tensor, like: Tensor) -> Tensor:
    """Return the part of ``values`` in which each place of ``like`` occurs once."""
    for dim, (size, stride) in enumerate(zip(like.shape, like.stride(), strict=True)):
        if size > 1 and not stride:
            values = values.narrow(dim, 0, 1)
    return values
