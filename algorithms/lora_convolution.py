"""The arithmetic of a low-rank adapter beside a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor
from typing_extensions import override

from .lora_forward import LowRank, Plan, new_seed, working_dtype


def lora_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    scaling: float = 1.0,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Return a convolution of ``x``, and added to it that with ``lora_A`` followed by the 1 x 1 one with ``lora_B``.

    For the backward pass ``x`` and the first convolution's output are kept and nothing else.

    Args:
        x: Input, shape (batch, in, …) with one to three spatial dimensions.
        weight: Base weight, shape (out, in / groups, …).
        bias: Base bias, shape (out,), or None.
        lora_A: Down projection, shape (rank, in / groups, …) with the base's kernel; or (rank, in, …), as in peft, which
            reads all groups' channels.
        lora_B: Up projection, shape (out, rank / groups, 1, …).
        stride: Of the base, for each spatial dimension.
        padding: Zeros on either side.
        dilation: Of the base.
        groups: Of the base.
        scaling: Factor on the low-rank term: alpha / rank.
        dropout: Probability with which an element of the adapter's input is dropped.
        training: Whether dropout acts.

    Example:
        >>> x, weight = torch.ones(1, 2, 3), torch.ones(1, 2, 3)
        >>> down, up = torch.ones(1, 2, 3), torch.ones(1, 1, 1)
        >>> lora_convolution(x, weight, None, down, up, stride=[1], padding=[0], dilation=[1], scaling=0.5)
        tensor([[[9.]]])
        >>> lora_convolution(x, weight, torch.ones(1), down, up, stride=[2], padding=[1], dilation=[1])
        tensor([[[9., 9.]]])
        >>> grouped = {"stride": [1], "padding": [0], "dilation": [1], "groups": 2}
        >>> weight, up = torch.ones(2, 1, 3), torch.ones(2, 1, 1)
        >>> lora_convolution(x, weight, None, torch.ones(2, 1, 3), up, **grouped)  # each group has its half of the rank
        tensor([[[6.],
                 [6.]]])
        >>> lora_convolution(x, weight, None, torch.ones(2, 2, 3), up, **grouped)  # each reads all channels, as in peft
        tensor([[[9.],
                 [9.]]])
    """
    p = dropout if training else 0.0
    down_groups = x.shape[1] // lora_A.shape[1]
    if torch.compiler.is_compiling():  # which follows no class of attrs
        dropped = F.dropout(x, p) if p > 0 else x
        ones, none = [1] * len(stride), [0] * len(stride)
        own = {"stride": stride, "padding": padding, "dilation": dilation}
        pointwise = {"stride": ones, "padding": none, "dilation": ones}
        hidden = _convolve(dropped, lora_A.to(x.dtype), None, **own, groups=down_groups)
        up = (lora_B * scaling).to(x.dtype)
        return _convolve(x, weight, bias, **own, groups=groups) + _convolve(
            hidden, up, None, **pointwise, groups=groups
        )
    base = _Convolution(tuple(stride), tuple(padding), tuple(dilation), groups)
    dtype = working_dtype(x)
    if dtype != x.dtype or dtype != weight.dtype:  # autocast: cast here, once, where autograd sees it
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    plan = _Plan(scaling, p, new_seed() if p > 0 else 0, base, down_groups)
    return _LowRank.apply(x, weight, bias, lora_A.to(dtype), lora_B.to(dtype), plan)[0]  # type: ignore[no-any-return]  # torch's are untyped


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    none = [0] * len(stride)
    return torch.convolution(
        x, weight, bias, stride, padding, dilation, False, none, groups  # pyright: ignore[reportArgumentType]  # torch takes tuples
    )  # fmt: skip


@attrs.frozen
class _Convolution:
    """A convolution's settings."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _convolve(
            x, weight, bias, stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups
        )

    def backward(self, push: Tensor, x: Tensor, weight: Tensor, wants: tuple[bool, bool, bool]) -> list[Any]:
        """Return the gradients of input, weight and bias, None for what is not wanted.

        Example:
            >>> sum_of_two = _Convolution(stride=(1,), padding=(0,), dilation=(1,), groups=1)
            >>> x, weight = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[4.0, 5.0]]])
            >>> sum_of_two(x, weight, None)
            tensor([[[14., 23.]]])
            >>> sum_of_two.backward(torch.ones(1, 1, 2), x, weight, (True, True, False))
            [tensor([[[4., 9., 5.]]]), tensor([[[3., 5.]]]), None]
        """
        none, bias_sizes = [0] * len(self.stride), [weight.shape[0]]
        return list(
            torch.ops.aten.convolution_backward(
                push, x, weight, bias_sizes, self.stride, self.padding, self.dilation, False, none, self.groups, wants
            )
        )

    def with_groups(self, groups: int) -> _Convolution:
        return attrs.evolve(self, groups=groups)

    def pointwise(self) -> _Convolution:
        """Return a convolution of one element that meets each of ours once.

        Example:
            >>> _Convolution(stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=4).pointwise()
            _Convolution(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=4)
        """
        ones, none = (1,) * len(self.stride), (0,) * len(self.stride)
        return _Convolution(ones, none, ones, self.groups)


@attrs.frozen
class _Plan(Plan):
    base: _Convolution
    down_groups: int


class _LowRank(LowRank):
    """The convolution with its adapter.

    Example:
        >>> from functools import partial
        >>> from torch.autograd import gradcheck, gradgradcheck
        >>> shapes = ((2, 2, 4), (2, 1, 2), 2, (2, 1, 2), (2, 1, 1))
        >>> tensors = [torch.rand(each).double().requires_grad_() for each in shapes]
        >>> own = partial(lora_convolution, stride=[2], padding=[1], dilation=[1], scaling=3.0, groups=2)
        >>> gradcheck(own, tensors, fast_mode=True), gradgradcheck(own, tensors, fast_mode=True)  # against differences
        (True, True)
        >>> def dropping(*tensors):
        ...     torch.manual_seed(0)
        ...     return own(*tensors, dropout=0.3, training=True)
        >>> gradcheck(dropping, tensors, fast_mode=True)  # the same is dropped in the backward pass
        True
        >>> x, weight, bias, down, up = tensors
        >>> gradcheck(lambda up: own(x.detach(), weight.detach(), None, down.detach(), up), up)  # of B alone
        True
        >>> once, again = dropping(*tensors), own(*tensors, dropout=0.3)  # nothing is dropped outside of training
        >>> torch.allclose(again, own(*tensors)), torch.allclose(once, again)
        (True, False)
    """

    @staticmethod
    @override
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        y = plan.base(x, weight, bias)
        hidden = plan.base.with_groups(plan.down_groups)(plan.dropped(x), down, None)
        if plan.base.groups == 1 and y.is_contiguous() and hidden.is_contiguous():
            matrix = up.flatten(1).expand(len(y), -1, -1)
            y.flatten(2).baddbmm_(matrix, hidden.flatten(2), alpha=plan.alpha)
        else:
            y.add_(plan.base.pointwise()(hidden, up, None), alpha=plan.alpha)
        return y, hidden

    @staticmethod
    @override
    def backward(ctx: Any, push: Tensor | None, _: None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # as torch documents it
        if push is None:
            return (None,) * 6
        plan: _Plan = ctx.plan
        x, weight, down, up, hidden = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, wants_down, wants_up, _ = ctx.needs_input_grad
        narrow = plan.base.with_groups(plan.down_groups)
        dropped, hidden = plan.again(x, hidden, lambda each: narrow(each, down, None), wanted=wants_down)
        into_x = into_weight = into_bias = branch = into_down = None
        back, into_up, _ = plan.base.pointwise().backward(
            push, hidden, up * plan.alpha, (wants_x or wants_down, wants_up, False)
        )
        if wants_x or wants_down:
            branch, into_down, _ = narrow.backward(back, dropped, down, (wants_x, wants_down, False))
        if wants_x or wants_weight or wants_bias:
            into_x, into_weight, into_bias = plan.base.backward(push, x, weight, (wants_x, wants_weight, wants_bias))
        if into_x is not None and branch is not None:
            into_x = into_x + plan.dropped(branch)
        return into_x, into_weight, into_bias, into_down, None if into_up is None else into_up * plan.alpha, None


__all__ = ["lora_convolution"]
