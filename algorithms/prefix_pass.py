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
        >>> one(), one.row(1).ids, one.part([1, 0]).args[0].tolist()
        (tensor([[0.0000, 0.0000],
                [0.8415, 0.9093]]), [9], [[1.0, 2.0], [0.0, 0.0]])
        >>> named = Pass(torch.clamp, (torch.ones(2, 3),), {"max": torch.tensor([0.5, 0.6, 0.7])}, ids=(5, 9), targets=torch.tensor([1, 0]))
        >>> named.signature, named.row(0)(), named.row(0).targets  # what has no row a sample stays whole
        ((((3,), torch.float32), (3,)), tensor([[0.5000, 0.6000, 0.7000]]), tensor([1]))
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
        """One whole number for each sample and tensor, which differs where any of their bits do.

        Example:
            >>> before = Pass(torch.add, (torch.ones(2, 3), torch.zeros(2, 1)), {}, ids=(5, 9)).prints
            >>> after = Pass(torch.add, (torch.ones(2, 3), torch.tensor([[0.0], [1e-45]])), {}, ids=(5, 9)).prints
            >>> before.shape, before == after  # one bit of the second sample
            (torch.Size([2, 2]), tensor([[ True,  True],
                    [ True, False]]))
            >>> Pass(torch.sin, (torch.ones(3),), {}, ids=(5, 9)).prints.shape
            torch.Size([2, 0])
        """
        columns = [_print(each) for each in self.tensors if is_batched(each, len(self.ids))]
        return torch.stack(columns, 1).cpu() if columns else torch.zeros(len(self.ids), 0, dtype=torch.int64)

    @property
    def masks(self) -> list[Tensor]:
        """What has a 1 for each token and a 0 for padding."""
        return [each for each in self.tensors if _is_mask(each, len(self.ids))]

    @property
    def right(self) -> bool:
        """Whether there is a mask, and padding stands at the end.

        Example:
            >>> Pass(torch.sin, (torch.tensor([[1, 1, 0], [1, 1, 1]]),), {}, ids=(5, 9)).right
            True
            >>> Pass(torch.sin, (torch.tensor([[1, 0, 1], [1, 1, 1]]),), {}, ids=(5, 9)).right
            False
            >>> Pass(torch.sin, (torch.ones(2, 3),), {}, ids=(5, 9)).right  # no mask
            False
        """
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
    """Return whether it is a tensor with a row for each of the samples.

    Example:
        >>> is_batched(torch.ones(2, 3), 2), is_batched(torch.ones(3, 2), 2), is_batched(torch.tensor(2), 2), is_batched([1, 2], 2)
        (True, False, False, False)
    """
    return isinstance(each, Tensor) and each.ndim > 0 and each.shape[0] == samples


def _is_mask(each: Tensor, samples: int) -> bool:
    """Return whether it has a row of 0 and 1 for each sample, which begins with 1.

    Example:
        >>> tokens = torch.tensor([[1, 1, 0], [1, 0, 0]])
        >>> _is_mask(tokens, 2), _is_mask(tokens == 1, 2), _is_mask(tokens, 3), _is_mask(tokens.float(), 2)
        (True, True, False, False)
        >>> _is_mask(2 * tokens, 2), _is_mask(tokens.flip(1), 2), _is_mask(tokens[:, :1], 2), _is_mask(tokens[..., None], 2)
        (False, False, False, False)
    """
    flat = is_batched(each, samples) and each.ndim == 2 and each.shape[1] > 1 and not each.is_floating_point()
    return flat and bool(((each == 0) | (each == 1)).all()) and bool(each[:, 0].all())


def _print(each: Tensor) -> Tensor:
    """Return one whole number a sample, which differs where any bit of the sample does: a sum of products that wraps.

    Example:
        >>> _print(torch.tensor([[1, 2], [2, 1], [1, 2]])).unique().numel()
        2
        >>> half, short = torch.tensor([[1.0], [2.0]]).half(), torch.tensor([[7], [7]], dtype=torch.uint8)
        >>> _print(half).diff().ne(0), _print(short).diff(), _print(torch.tensor([[1j], [2j]])).diff().ne(0)
        (tensor([True]), tensor([0]), tensor([True]))
    """
    flat = each.detach().reshape(len(each), -1)
    flat = torch.view_as_real(flat).flatten(1) if flat.is_complex() else flat
    bits = flat.contiguous().view(_BITS[flat.dtype.itemsize])
    bits = bits if bits.dtype.itemsize > 2 else bits.int()
    return (bits * _odd_numbers(bits.shape[1], bits.dtype, bits.device)).sum(1, dtype=torch.int64)


@lru_cache(maxsize=32)
def _odd_numbers(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return random odd numbers, the same ones each time.

    Example:
        >>> some = _odd_numbers(3, torch.int64, torch.device("cpu"))
        >>> some % 2, some.unique().numel(), _odd_numbers(1, torch.int32, torch.device("cpu")).dtype
        (tensor([1, 1, 1]), 3, torch.int32)
    """
    generator = torch.Generator().manual_seed(count)
    return torch.randint(1 << 30, (count,), generator=generator).mul_(2).add_(1).to(device, dtype)
