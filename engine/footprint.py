"""What an optimizer will keep for a parameter, in bytes, without a step on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .homes import known_options
from .shards import is_sharded, shard_like, unsharded

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


def fault_on_shards(
    optimizer: Optimizer,
    options: Mapping[str, Any],
    like: Tensor,
    shape: Sequence[int],
    shard: Callable[[Tensor], Tensor],
) -> str | None:
    """Return what is wrong with an optimizer's steps on a parameter that lies in shards; None if they are those on the whole.

    Two optimizers of the same class and options take three steps on gradients that add up, one on a small tensor and one on its shards. Many step
    functions take a shard for the whole without an error, such as those that work on rows and columns of a matrix.

    Args:
        optimizer: The optimizer; left as it is.
        options: The options of the group.
        like: A parameter, of which dtype and device are taken.
        shape: The shape to try.
        shard: Returns a tensor in shards; all ranks call this together.
    """
    known = known_options(optimizer, options)
    known |= {"lr": 0.1} if "lr" in known else {}
    generator, random = torch.Generator().manual_seed(0), torch.get_rng_state()
    start, *slopes = (torch.randn(shape, generator=generator).to(like.device, like.dtype) for _ in range(4))
    kind: Any = type(optimizer)
    ends: list[Tensor] = []
    try:
        for made in (start.clone(), shard(start)):
            probe = nn.Parameter(made)
            try:
                twin: Any = kind([probe], **known)
            except (TypeError, ValueError):
                return None  # it cannot be built anew: what is wrong with it shows in its own steps
            for slope in slopes:
                torch.autograd.backward((shard_like(slope, probe) * probe).sum())
                twin.step()
            ends.append(unsharded(probe.detach()))
            state = [each for each in twin.state.get(probe, {}).values() if isinstance(each, Tensor)]
            if any(each.shape != probe.shape for each in state if is_sharded(each)):
                return "its state for a parameter has another shape than the parameter"
    except Exception as error:  # noqa: BLE001 - an optimizer of the user's may raise anything
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    finally:
        torch.set_rng_state(random)
    moved, apart = (ends[0] - start).abs().max(), (ends[1] - ends[0]).abs().max()
    near = apart <= torch.finfo(like.dtype).eps ** 0.5 * moved
    return (
        None
        if bool(near)
        else f"its steps on shards are others than on the whole, by {float(apart / moved):.1g} of a step"
    )


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
