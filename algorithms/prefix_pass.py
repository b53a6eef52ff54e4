"""One forward pass: what the model is called with, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Forward: TypeAlias = Callable[..., Any]


@attrs.frozen(eq=False)
class Pass:
    """One forward pass of a model.

    Args:
        forward: The model's own ``forward``.
        args: Positional arguments.
        kwargs: Keyword arguments.
        ids: The index in the dataset of each sample.
        targets: What the loss compares with.
        signature: All shapes, but for the number of samples.

    Example:
        >>> one = Pass(torch.sin, (torch.tensor([[0.0, 0.0], [1.0, 2.0]]),), {}, ids=(5, 9))
        >>> one.signature, one.row(1)().shape
        ((((2,), torch.float32),), torch.Size([1, 2]))
    """

    forward: Forward
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    ids: Sequence[int]
    targets: Any = None
    signature: Hashable = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        shapes = tuple(
            (tuple(each.shape[1:]), each.dtype) if is_batched(each, len(self.ids)) else tuple(each.shape)
            for each in self.tensors
        )
        object.__setattr__(self, "signature", shapes)

    def __call__(self) -> Any:
        """Run it."""
        return self.forward(*self.args, **self.kwargs)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [each for each in tree_leaves((self.args, self.kwargs)) if isinstance(each, Tensor)]

    @property
    def prints(self) -> Tensor:
        """One whole number for each sample and tensor, which differs where any of their bits do."""
        columns = [_print(each) for each in self.tensors if is_batched(each, len(self.ids))]
        return torch.stack(columns, 1).cpu() if columns else torch.zeros(len(self.ids), 0, dtype=torch.int64)

    @property
    def masks(self) -> list[Tensor]:
        """What has a 1 for each token and a 0 for padding."""
        return [each for each in self.tensors if _is_mask(each, len(self.ids))]

    @property
    def right(self) -> bool:
        """Whether there is a mask, and padding stands at the end."""
        masks = [each.long() for each in self.masks]
        return len(masks) == 1 and bool((masks[0][:, 1:] <= masks[0][:, :-1]).all())

    def row(self, index: int) -> Pass:
        """Return the pass of one sample alone."""
        return self.part([index])

    def part(self, places: Sequence[int]) -> Pass:
        """Return the pass of some of the samples, padded as all of them are."""

        def cut(each: Any) -> Any:
            return each[list(places)] if is_batched(each, len(self.ids)) else each

        args, kwargs = tree_map(cut, self.args), tree_map(cut, dict(self.kwargs))
        return Pass(self.forward, args, kwargs, [self.ids[place] for place in places], cut(self.targets))


def is_batched(each: Any, samples: int) -> bool:
    """Return whether it is a tensor with a row for each of the samples."""
    return isinstance(each, Tensor) and each.ndim > 0 and each.shape[0] == samples


def _is_mask(each: Tensor, samples: int) -> bool:
    flat = is_batched(each, samples) and each.ndim == 2 and each.shape[1] > 1 and not each.is_floating_point()
    return flat and bool(((each == 0) | (each == 1)).all()) and bool(each[:, 0].all())


def _print(each: Tensor) -> Tensor:
    """Return one whole number a sample, which differs where any bit of the sample does: a sum of products that wraps."""
    flat = each.detach().reshape(len(each), -1)
    flat = torch.view_as_real(flat).flatten(1) if flat.is_complex() else flat
    bits = flat.contiguous().view(_BITS[flat.dtype.itemsize])
    bits = bits if bits.dtype.itemsize > 2 else bits.int()
    return (bits * _odd_numbers(bits.shape[1], bits.dtype, bits.device)).sum(1, dtype=torch.int64)


@lru_cache(maxsize=32)
def _odd_numbers(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(1 << 30, (count,), generator=generator).mul_(2).add_(1).to(device, dtype)
