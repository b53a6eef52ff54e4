"""What an optimizer will keep for a parameter, in bytes, without a step on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .homes import known_options

# Sizes that tell the dimensions of a parameter apart in the shape of a state tensor.
_SIZES = (3, 5, 7, 11, 13, 17, 19)
Template: TypeAlias = tuple[tuple[tuple[int, ...], int], ...]
"""For each tensor of the state: which dimensions of the parameter it has, and the bytes of an element."""


def state_template(optimizer: Optimizer, options: Mapping[str, Any], dtype: torch.dtype, ndim: int) -> Template | None:
    """Return how the state of a parameter with ``ndim`` dimensions follows from its shape.

    An optimizer of the same class and options takes one step on a tiny parameter, and the shapes of its state are read
    off: the parameter's own (Adam), some of its dimensions (the factors of Adafactor), or one number (a step counter).

    Args:
        optimizer: The optimizer; left as it is.
        options: The options of the parameter's group.
        dtype: The parameter's dtype.
        ndim: The number of its dimensions.

    Returns:
        The template, or None where the optimizer cannot be built anew or its state has another shape.

    Example:
        >>> adam = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=0.1)
        >>> state_template(adam, adam.defaults, torch.float32, 2)
        (((), 4), ((0, 1), 4), ((0, 1), 4))
    """
    if ndim > len(_SIZES):
        return None
    sizes = _SIZES[:ndim]
    probe = nn.Parameter(torch.zeros(sizes, dtype=dtype, device="cpu"))
    random = torch.get_rng_state()
    try:
        # Capturable steps need an accelerator, and keep the same state.
        known = known_options(optimizer, options)
        kind: Any = type(optimizer)
        twin = kind([probe], **{**known, **({"capturable": False} if "capturable" in known else {})})
        torch.autograd.backward((0 * probe).abs().sum())  # a real number, also of complex ones
        twin.step()
        state = list(twin.state.get(probe, {}).values())
    except Exception:  # noqa: BLE001 - an optimizer of the user's may raise anything, and then its state is not known
        return None
    finally:
        torch.set_rng_state(random)
    made = [(_dimensions(each.shape, sizes), each.element_size()) for each in state if isinstance(each, Tensor)]
    return None if any(dims is None for dims, _ in made) else tuple((dims or (), size) for dims, size in made)


def template_bytes(template: Template, shape: Sequence[int]) -> int:
    """Return the bytes of the state of a parameter of ``shape``.

    Example:
        >>> template_bytes((((), 4), ((0, 1), 4), ((0, 1), 4)), (100, 10))
        8004
    """
    return sum(size * prod(shape[index] for index in dims) for dims, size in template)


def _dimensions(shape: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...] | None:
    if any(size != 1 and size not in sizes for size in shape):
        return None
    return tuple(sizes.index(size) for size in shape if size != 1)
