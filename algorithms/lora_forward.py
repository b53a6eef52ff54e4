"""The arithmetic of a low-rank adapter beside a matrix: one autograd function that keeps two tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import attrs
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor
from typing_extensions import override

# What is so exact that a small adapter is not lost when it is added to a weight.
_WIDE = (torch.float32, torch.float64)
_ALIGNED = 64
Rows: TypeAlias = Sequence[Sequence[int]]
"""Slices of the output, each from and up to which row of the weight."""


def lora_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
    training: bool = False,
    rows: Rows | None = None,
    transposed: bool = False,
) -> Tensor:
    """Return ``x @ weight.T + bias + scaling * dropout(x) @ lora_A.T @ lora_B.T``.

    The low-rank result is accumulated into the base result by one scaled ``addmm``, so the adapter makes no elementwise
    pass over the output. For the backward pass ``x`` and ``dropout(x) @ lora_A.T`` are kept and nothing else: what was
    dropped is drawn again from a seed of torch's global generator. With ``lora_B`` zero the result is that of
    ``F.linear`` bit for bit. The adapter is computed in the dtype of the base result (under autocast the lower one),
    also where its weights are kept in float32.

    Args:
        x: Input, shape (..., in).
        weight: Base weight W, shape (out, in).
        bias: Base bias, shape (out,), or None.
        lora_A: Down projection A, shape (rank, in).
        lora_B: Up projection B, shape (out, rank).
        scaling: Factor on the low-rank term: alpha / rank.
        dropout: Probability with which an element of the adapter's input is dropped.
        training: Whether dropout acts.
        rows: Slices of the output that have adapters, each its own: ``lora_A`` then has all their A in turn, shape
            (slices * rank, in), and ``lora_B`` all their B, shape (rows of all slices, rank). None is one adapter for all.
        transposed: Whether ``weight`` has shape (in, out).

    Returns:
        Output, shape (..., out).

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, equation 3, arXiv:2106.09685.

    Example:
        >>> x, weight, down, up = torch.ones(1, 3), torch.eye(2, 3), torch.ones(1, 3), torch.ones(2, 1)
        >>> lora_forward(x, weight, None, down, up, scaling=0.5)
        tensor([[2.5000, 2.5000]])
        >>> lora_forward(x, weight.t(), torch.ones(2), down, up, transposed=True)
        tensor([[5., 5.]])
        >>> lora_forward(x, weight, None, down, up[:1], rows=[[1, 2]])  # the adapter is that of the second output alone
        tensor([[1., 4.]])
        >>> lora_forward(x[0], weight.t(), None, down, up[:1], rows=[[1, 2]], transposed=True)
        tensor([1., 4.])
        >>> lora_forward(x, weight, None, down, up, dropout=0.5)  # nothing is dropped outside of training
        tensor([[4., 4.]])
        >>> lora_forward(torch.ones(4, 1), weight[:, :1], None, up[:1], up, dropout=0.5, training=True)[:, 0].unique()
        tensor([1., 3.])
    """
    p = dropout if training else 0.0
    if x.is_nested or x.dim() < 2 or torch.compiler.is_compiling():
        width = weight.shape[1 if transposed else 0]
        base = F.linear(x, weight.t() if transposed else weight, bias)
        return base + lora_branch(x, lora_A, lora_B, scaling=scaling, dropout=p, training=True, rows=rows, width=width)
    dtype = x.dtype
    if _autocasts(x):  # cast here, once, where autograd sees it
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    plan = _Plan(scaling, p, new_seed() if p > 0 else 0, rows, transposed)
    return _LowRank.apply(x, weight, bias, lora_A.to(dtype), lora_B.to(dtype), plan)[0]  # type: ignore[no-any-return]


def lora_branch(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
    training: bool = False,
    rows: Rows | None = None,
    width: int | None = None,
) -> Tensor:
    """Return the low-rank term alone, ``scaling * dropout(x) @ lora_A.T @ lora_B.T``, shape (..., out).

    Args:
        x: Input, shape (..., in).
        lora_A: Down projection, shape (rank, in).
        lora_B: Up projection, shape (out, rank).
        scaling: Factor: alpha / rank.
        dropout: Probability with which an element of ``x`` is dropped.
        training: Whether dropout acts.
        rows: See :func:`lora_forward`.
        width: The number of outputs, for ``rows``.

    Example:
        >>> lora_branch(torch.ones(3), torch.ones(1, 3), torch.ones(2, 1), scaling=0.5)
        tensor([1.5000, 1.5000])
        >>> lora_branch(torch.ones(3), torch.ones(1, 3), torch.ones(1, 1), rows=[[1, 2]], width=2)
        tensor([0., 3.])
        >>> x, one = torch.ones(8, 1), torch.ones(1, 1)
        >>> lora_branch(x, one, one, dropout=0.5).unique(), lora_branch(x, one, one, dropout=0.5, training=True).unique()
        (tensor([1.]), tensor([0., 2.]))
    """
    if rows is not None:
        assert width is not None, "slices do not say how many outputs there are"
        lora_B = spread(lora_B, rows, width)
    dropped = F.dropout(x, dropout) if training and dropout > 0 else x
    return F.linear(F.linear(dropped, lora_A.to(x.dtype)) * scaling, lora_B.to(x.dtype))


def spread(lora_B: Tensor, rows: Rows, width: int) -> Tensor:
    """Return the up projection of slices as one of the whole output: shape (width, slices * rank), zero elsewhere.

    Example:
        >>> spread(torch.ones(2, 1), [[0, 1], [2, 3]], width=3)
        tensor([[1., 0.],
                [0., 0.],
                [0., 1.]])
    """
    rank, at = lora_B.shape[1], 0
    whole = lora_B.new_zeros(width, len(rows) * rank)
    for place, (begin, end) in enumerate(rows):
        whole[begin:end, place * rank : (place + 1) * rank] = lora_B[at : at + end - begin]
        at += end - begin
    return whole


def working_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a layer computes with ``x``: autocast's where it acts; it leaves float64 alone.

    Example:
        >>> working_dtype(torch.ones(1))
        torch.float32
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     working_dtype(torch.ones(1)), working_dtype(torch.ones(1).double()), working_dtype(torch.ones(1).long())
        (torch.bfloat16, torch.float64, torch.int64)
        >>> with torch.autocast("cpu", torch.bfloat16):  # a device of which autocast knows nothing
        ...     working_dtype(torch.ones(1, device="meta"))
        torch.float32
        >>> with torch.autocast("cpu", torch.bfloat16):  # the adapter's weights are cast as the layer's
        ...     lora_forward(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), torch.ones(1, 1), torch.ones(1, 1))
        tensor([[3.]], dtype=torch.bfloat16)
    """
    return torch.get_autocast_dtype(x.device.type) if _autocasts(x) else x.dtype


def _autocasts(x: Tensor) -> bool:
    if not torch._C._is_any_autocast_enabled():  # of all devices, in a tenth of the time
        return False
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return False
    return x.is_floating_point() and x.dtype != torch.float64


def new_seed() -> int:
    """Draw the seed of one dropout from torch's global generator, the model's own, on the CPU: no device waits.

    Example:
        >>> generator = torch.manual_seed(0)
        >>> first = new_seed()
        >>> generator = torch.manual_seed(0)
        >>> new_seed() == first, new_seed() == first
        (True, False)
    """
    return int(torch.empty((), dtype=torch.int64).random_())


def drop(x: Tensor, p: float, seed: int) -> Tensor:
    """Return a copy of ``x`` in which each element is zero with probability ``p``, always the same ones for a seed.

    What stays is not scaled. On the CPU the distances between dropped elements are drawn, from the geometric
    distribution, and not each element's fate: at p = 0.05 that is a twentieth of the random numbers.

    Args:
        x: Of any shape.
        p: Above 0, below 1.
        seed: What :func:`new_seed` drew.

    Example:
        >>> x = torch.ones(10000)
        >>> torch.equal(drop(x, 0.25, seed=1), drop(x, 0.25, seed=1)), round(drop(x, 0.25, seed=1).mean().item(), 1)
        (True, 0.8)
    """
    if x.device.type != "cpu":
        generator = torch.Generator(x.device).manual_seed(seed)
        return x * torch.empty_like(x).bernoulli_(1 - p, generator=generator)
    return _without(x, _dropped(x.numel(), p, seed))


def _without(x: Tensor, places: Tensor) -> Tensor:
    return x.reshape(-1).index_fill(0, places, 0).view(x.shape)


def _dropped(size: int, p: float, seed: int) -> Tensor:
    """Return which of ``size`` elements are dropped, in order.

    Example:
        >>> _dropped(12, 0.25, seed=1), _dropped(12, 0.25, seed=2)
        (tensor([4, 6, 8]), tensor([3, 5, 9]))
        >>> round(len(_dropped(10000, 0.1, seed=1)) / 10000, 2), round(len(_dropped(10000, 0.9, seed=1)) / 10000, 2)
        (0.1, 0.9)
    """
    generator = torch.Generator().manual_seed(seed)
    expected = size * p
    count = int(expected + 6 * math.sqrt(expected * (1 - p))) + 8
    rate = -1 / max(-math.log1p(-p), 1e-15)  # places must be counted in 64 bits
    found, last = list[Tensor](), -1
    while True:
        # 1 - u lies in (0, 1], so its logarithm is finite.
        gaps = torch.rand(count, generator=generator).neg_().log1p_().mul_(rate).long()
        places = gaps.add_(1).cumsum_(0)
        places = places.add_(last)
        end = int(torch.searchsorted(places, size))
        found.append(places[:end])
        if end < count:
            return torch.cat(found) if len(found) > 1 else found[0]
        last = int(places[-1])


@attrs.frozen
class Plan:
    """What is no tensor in a layer with its adapter.

    Example:
        >>> plan, x = Plan(scaling=3.0, p=0.5, seed=1), torch.ones(8)
        >>> plan.alpha, plan.places(x)
        (6.0, tensor([2, 3, 4, 6, 7]))
        >>> plan.dropped(x), torch.equal(plan.dropped(x), plan.dropped(x, plan.places(x)))
        (tensor([1., 1., 0., 0., 0., 1., 0., 0.]), True)
        >>> never = Plan(scaling=3.0, p=0.0, seed=0)
        >>> never.alpha, never.places(x), never.dropped(x) is x
        (3.0, None, True)
    """

    scaling: float
    p: float
    seed: int

    @property
    def alpha(self) -> float:
        """The factor on the low-rank term: dropout's own folded in."""
        return self.scaling / (1 - self.p)

    def places(self, x: Tensor) -> Tensor | None:
        """Return which elements of ``x`` are dropped, always the same ones; None where that is not how they are drawn."""
        return _dropped(x.numel(), self.p, self.seed) if self.p > 0 and x.device.type == "cpu" else None

    def dropped(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        """Return ``x`` with the same elements dropped each time, at ``places`` where these are known already."""
        if self.p == 0:
            return x
        return drop(x, self.p, self.seed) if places is None else _without(x, places)

    def again(
        self,
        x: Tensor,
        hidden: Tensor,
        project: Callable[[Tensor], Tensor],
        *,
        wanted: bool,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return for a backward pass what of ``x`` was not dropped, where it is wanted, and the hidden features.

        Example:
            >>> plan, x, hidden = Plan(scaling=1.0, p=0.5, seed=1), torch.ones(8), torch.ones(())
            >>> with torch.no_grad():
            ...     plan.again(x, hidden, torch.sum, wanted=True)[0].sum(), plan.again(x, hidden, torch.sum, wanted=False)
            (tensor(3.), (tensor([1., 1., 1., 1., 1., 1., 1., 1.]), tensor(1.)))
            >>> plan.again(x, hidden, torch.sum, wanted=False)[1]  # recorded: computed anew, for gradients of gradients
            tensor(3.)
        """
        recorded = torch.is_grad_enabled()  # gradients of gradients need to know where these came from
        dropped = self.dropped(x, places) if wanted or recorded else x
        return dropped, project(dropped) if recorded else hidden


@attrs.frozen
class _Plan(Plan):
    rows: Rows | None
    transposed: bool

    def added(self, base: Tensor, back: Tensor, down: Tensor, places: Tensor | None) -> Tensor:
        """Return ``base + dropped(back @ down)``; ``base`` is nobody else's, and written where no graph is recorded.

        Example:
            >>> plan, back, down = _Plan(1.0, 0.5, seed=1, rows=None, transposed=False), torch.ones(4, 1), torch.ones(1, 2)
            >>> recorded = plan.added(torch.ones(4, 2), back, down, places=None)
            >>> recorded.flatten()
            tensor([2., 2., 1., 1., 1., 2., 1., 1.])
            >>> with torch.no_grad():
            ...     base = torch.ones(4, 2)
            ...     written = plan.added(base, back, down, plan.places(base))
            >>> written is base, torch.equal(written, recorded)
            (True, True)
        """
        if torch.is_grad_enabled():
            return base + self.dropped(back @ down, places)
        if places is not None:  # all is added, and what was dropped put back
            flat = base.view(-1)
            before = flat.index_select(0, places)
            base.addmm_(back, down)
            flat.index_copy_(0, places, before)
            return base
        return base.addmm_(back, down) if self.p == 0 else base.add_(self.dropped(back @ down))

    def merges(self, x: Tensor, weight: Tensor) -> bool:
        """Return whether one product of ``x`` and the sum of both weights is exact enough, and less work than adding twice.

        The sum begins on a boundary of memory, and a kernel may round differently where the weight does not.

        Example:
            >>> plan, dropping = _Plan(1.0, 0.0, 0, rows=None, transposed=False), _Plan(1.0, 0.5, 0, rows=None, transposed=False)
            >>> x, weight = torch.ones(6, 3), torch.ones(2, 3)
            >>> plan.merges(x, weight), plan.merges(x[:5], weight), plan.merges(x.half(), weight), dropping.merges(x, weight)
            (True, False, False, False)
            >>> plan.merges(x, weight[1:]), plan.merges(x, torch.ones(3, 2).t())  # not aligned, not contiguous
            (False, False)
        """
        if self.p > 0 or self.rows is not None or x.dtype not in _WIDE or len(x) < 2 * x.shape[1]:
            return False
        try:
            return weight.is_contiguous() and weight.data_ptr() % _ALIGNED == 0
        except RuntimeError:  # a fake tensor, which has no memory
            return False

    def merged(self, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """Return the weight with what the adapter adds to it.

        Example:
            >>> weight, down, up = torch.ones(2, 3), torch.ones(1, 3), torch.tensor([[1.0], [2.0]])
            >>> _Plan(3.0, 0.0, 0, rows=None, transposed=False).merged(weight, down, up)
            tensor([[4., 4., 4.],
                    [7., 7., 7.]])
            >>> _Plan(3.0, 0.0, 0, rows=None, transposed=True).merged(weight.t(), down, up)[0]
            tensor([4., 7.])
        """
        first, second = (down.t(), up.t()) if self.transposed else (up, down)
        return torch.addmm(weight, first, second, alpha=self.alpha)

    def slices(self, rank: int) -> list[tuple[slice, slice, slice]]:
        """Return for each slice: its outputs, its part of the hidden features, its rows of B.

        Example:
            >>> for each in _Plan(1.0, 0.0, 0, rows=[[0, 4], [8, 12]], transposed=False).slices(rank=2):
            ...     print(*each)
            slice(0, 4, None) slice(0, 2, None) slice(0, 4, None)
            slice(8, 12, None) slice(2, 4, None) slice(4, 8, None)
        """
        made, at = list[tuple[slice, slice, slice]](), 0
        for place, (begin, end) in enumerate(self.rows or ()):
            up = slice(at, at + end - begin)
            made.append((slice(begin, end), slice(place * rank, (place + 1) * rank), up))
            at = up.stop
        return made


class LowRank(torch.autograd.Function):
    """A layer with its adapter, of ``(x, weight, bias, down, up, plan)``: the result and the hidden features, which are kept."""

    @classmethod
    @override
    def apply(cls, *args: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # no keywords
        """Apply it, outside torch.func without torch's look at the signature, which takes as long as a small layer.

        Example:
            >>> x, weight, down, up = torch.ones(4, 3), torch.ones(2, 3), torch.ones(1, 3), torch.ones(2, 1)
            >>> torch.func.grad(lambda up: lora_forward(x, weight, None, down, up, scaling=0.5).sum())(up)
            tensor([[6.],
                    [6.]])
        """
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)  # type: ignore[no-untyped-call]  # torch's
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]  # torch's

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, down, up, ctx.plan = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, down, up, output[1])


class _LowRank(LowRank):
    """The layer with its adapter; saved for the backward pass are x, the hidden features, and the weights themselves.

    Example:
        >>> from functools import partial
        >>> from torch.autograd import gradcheck, gradgradcheck
        >>> x, weight, bias, down, up = (torch.rand(each).double().requires_grad_() for each in ((4, 2), (2, 2), 2, (1, 2), (2, 1)))
        >>> scaled = partial(lora_forward, scaling=3.0)
        >>> gradcheck(scaled, (x, weight, bias, down, up), fast_mode=True)  # those of every input, against differences
        True
        >>> gradgradcheck(scaled, (x, weight, bias, down, up), fast_mode=True)
        True
        >>> sliced = partial(lora_forward, rows=[[1, 2]], transposed=True)
        >>> gradcheck(sliced, (x, weight, bias, down, up[:1]), fast_mode=True)
        True
        >>> def dropping(*tensors):
        ...     torch.manual_seed(0)
        ...     return lora_forward(*tensors, dropout=0.3, training=True)
        >>> gradcheck(dropping, (x, weight, bias, down, up), fast_mode=True)  # the same is dropped in the backward pass
        True
    """

    @staticmethod
    @override
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        rows = x.flatten(0, -2)
        merges = x.is_contiguous() and plan.merges(
            rows, weight
        )  # torch folds other layouts where a weight has a gradient
        if merges:
            weight = plan.merged(weight, down, up)
        if plan.transposed:
            y = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
        elif x.is_contiguous():
            y = F.linear(rows, weight, bias)
        else:
            # Other layouts take another kernel: there the shape must stay, or the last bits would differ from those of
            # the layer without its adapter.
            y = F.linear(x, weight, bias).flatten(0, -2)
        hidden = (down @ plan.dropped(rows).t()).t()  # in this order: so few columns are slow to compute
        if plan.rows is None and not merges:
            y.addmm_(hidden, up.t(), alpha=plan.alpha)
        for out, part, place in plan.slices(up.shape[1]):
            y[:, out].addmm_(hidden[:, part], up[place].t(), alpha=plan.alpha)
        # Not a view: what stands next may write into it, as ReLU(inplace=True) does.
        return torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]]), hidden

    @staticmethod
    @override
    def backward(ctx: Any, push: Tensor | None, _: None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # as torch documents it
        if push is None:
            return (None,) * 6
        plan: _Plan = ctx.plan
        x, weight, down, up, hidden = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, wants_down, wants_up, _ = ctx.needs_input_grad
        rows, push = x.flatten(0, -2), push.reshape(-1, push.shape[-1])
        places = plan.places(rows)
        dropped, hidden = plan.again(rows, hidden, lambda each: F.linear(each, down), wanted=wants_down, places=places)
        slices = plan.slices(up.shape[1])
        back = push @ up if not slices else torch.cat([push[:, out] @ up[place] for out, _, place in slices], 1)
        back = back * plan.alpha
        into_x = into_up = None
        if wants_x:
            merges = plan.merges(push, weight)
            full = plan.merged(weight, down, up) if merges else weight
            into_x = push @ (full.t() if plan.transposed else full)
            into_x = (into_x if merges else plan.added(into_x, back, down, places)).view(x.shape)
        if wants_up:
            parts = [(push[:, out], hidden[:, part]) for out, part, _ in slices] or [(push, hidden)]
            products = [(part.t() @ out).t() for out, part in parts]  # so few columns are slow to compute
            into_up = (torch.cat(products) if slices else products[0]) * plan.alpha
        into_weight = None
        if wants_weight:
            into_weight = rows.t() @ push if plan.transposed else push.t() @ rows
        return (
            into_x, into_weight, push.sum(0) if wants_bias else None, back.t() @ dropped if wants_down else None, into_up, None,
        )  # fmt: skip


__all__ = ["LowRank", "Plan", "Rows", "drop", "lora_branch", "lora_forward", "new_seed", "spread", "working_dtype"]
