"""Layers with low-rank adapters: the classes that adapted modules become.

An adapted module keeps its identity, its place and its parameters' names; its class becomes one of the subclasses
below. They are defined statically, so that adapted models can be pickled and copied.
"""

from __future__ import annotations

from typing import ClassVar, TypedDict

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from typing_extensions import override

from .lora_convolution import lora_convolution
from .lora_forward import Rows, lora_branch, lora_forward, spread


class Settings(TypedDict):
    """What an adapter's arithmetic takes beside tensors."""

    scaling: float
    dropout: float
    training: bool


class Adapted:
    """What all adapted modules have in common, beside their own class.

    Example:
        >>> from thawline.algorithms import inject_lora, merge_lora
        >>> from thawline.engine import ParameterLedger
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> adapters = inject_lora(ParameterLedger(model, torch.optim.SGD), rank=2, alpha=6, dropout=0.1)
        >>> model[0].lora_settings()
        {'scaling': 3.0, 'dropout': 0.1, 'training': True}
        >>> model[0]
        LoRALinear(in_features=4, out_features=8, bias=True, lora_rank=2, lora_scaling=3)
        >>> merge_lora(model), model[0].lora_repr()
        (('0',), 'lora_rank=2, lora_scaling=3, lora_merged')
    """

    adapts: ClassVar[tuple[str, ...]] = ("weight",)
    """Names of the weights beside which an adapter may stand."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scaling: float
    lora_dropout: float
    lora_merged: bool = False
    """Whether the weights hold what the adapter adds, and the adapter itself stands still."""
    training: bool

    def lora_deltas(self) -> dict[str, Tensor]:
        """Return what the adapter adds to each weight, by the weight's name."""
        raise NotImplementedError

    def lora_settings(self) -> Settings:
        """Return what the adapter's arithmetic takes beside tensors."""
        return {"scaling": self.lora_scaling, "dropout": self.lora_dropout, "training": self.training}

    def lora_repr(self) -> str:
        """Return what the repr adds."""
        merged = ", lora_merged" * self.lora_merged
        return f"lora_rank={self.lora_B.shape[1]}, lora_scaling={self.lora_scaling:g}{merged}"


class LoRALinear(Adapted, nn.Linear):
    """An ``nn.Linear`` with a low-rank adapter: it gained ``lora_A`` (rank, in) and ``lora_B`` (out, rank).

    With slices, such as the query's and the value's rows of a fused projection, each has an adapter of its own;
    ``lora_A`` (slices * rank, in) and ``lora_B`` (rows of all slices, rank) hold them in turn.

    For a linear class of your own write ``class LoRAMyLinear(LoRALinear, MyLinear)`` at module level; surgery finds
    it. Where ``MyLinear`` has its own ``forward``, give it one as well, usually
    ``return super(LoRALinear, self).forward(x) + self.lora_branch(x)``.

    Example:
        >>> from thawline.algorithms import inject_lora, merge_lora
        >>> from thawline.engine import ParameterLedger
        >>> model, x = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2)), torch.ones(1, 1)
        >>> adapters = inject_lora(ParameterLedger(model, torch.optim.SGD), {"0": "q,v"}, rank=1, alpha=2)
        >>> layer, before = model[0], model[0](x)
        >>> _, _ = nn.init.ones_(layer.lora_A), nn.init.ones_(layer.lora_B)
        >>> (layer(x) - before).detach().round(decimals=4)  # the query's row and the value's have an adapter each
        tensor([[2., 0., 2.]])
        >>> layer.lora_branch(x).detach()
        tensor([[2., 0., 2.]])
        >>> merge_lora(model), torch.allclose(layer(x) - before, torch.tensor([2.0, 0.0, 2.0])), layer.lora_branch(x)
        (('0',), True, tensor(0.))
    """

    lora_rows: Rows | None = None

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output with the adapter's added, shape (..., out)."""
        if self.lora_merged:
            return F.linear(input, self.weight, self.bias)
        return lora_forward(
            input, self.weight, self.bias, self.lora_A, self.lora_B, rows=self.lora_rows, **self.lora_settings()
        )

    def lora_branch(self, x: Tensor) -> Tensor:
        """Return what the adapter adds, shape (..., out); zero where it is merged."""
        if self.lora_merged:
            return x.new_zeros(())
        width = self.weight.shape[0]
        return lora_branch(x, self.lora_A, self.lora_B, rows=self.lora_rows, width=width, **self.lora_settings())

    @override
    def lora_deltas(self) -> dict[str, Tensor]:
        return {"weight": matrix_delta(self, self.weight.shape[0], self.lora_rows)}

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.lora_repr()}"


class LoRANonDynamicallyQuantizableLinear(LoRALinear, NonDynamicallyQuantizableLinear):
    """The output projection of an ``nn.MultiheadAttention`` with an adapter."""


class LoRAEmbedding(Adapted, nn.Embedding):
    """An ``nn.Embedding`` with a low-rank adapter: ``lora_A`` (rank, rows) and ``lora_B`` (width, rank).

    As in loralib and peft, ``lora_A`` begins at zero, ``lora_B`` is normally distributed, and nothing is dropped.

    Example:
        >>> from thawline.algorithms import inject_lora, merge_lora
        >>> from thawline.engine import ParameterLedger
        >>> model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2))
        >>> adapters = inject_lora(ParameterLedger(model, torch.optim.SGD), "0", rank=1, alpha=2)
        >>> layer, asked = model[0], torch.tensor([0, 2])
        >>> before, layer.lora_A.data, layer.lora_B.data = layer(asked), torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(2, 1)
        >>> (layer(asked) - before).detach().round(decimals=4)
        tensor([[2., 2.],
                [6., 6.]])
        >>> learned = layer(asked)
        >>> layer.lora_deltas()["weight"].tolist(), merge_lora(model), torch.allclose(layer(asked), learned, atol=1e-6)
        ([[2.0, 2.0], [4.0, 4.0], [6.0, 6.0]], ('0',), True)
        >>> layer
        LoRAEmbedding(3, 2, lora_rank=1, lora_scaling=2, lora_merged)
    """

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Return the rows that ``input`` names, with the adapter's added, shape (..., width)."""
        y = super().forward(input)
        if self.lora_merged:
            return y
        hidden = F.embedding(input, self.lora_A.t(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        rows, hidden, up = y.reshape(-1, y.shape[-1]), hidden.reshape(-1, hidden.shape[-1]).to(y.dtype), self.lora_B
        with torch.autocast(y.device.type, enabled=False):  # which leaves embeddings alone
            return torch.addmm(rows, hidden, up.to(y.dtype).t(), alpha=self.lora_scaling).view(y.shape)

    @override
    def lora_deltas(self) -> dict[str, Tensor]:
        return {"weight": matrix_delta(self, self.weight.shape[1]).t()}

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.lora_repr()}"


class LoRAConvolution(Adapted, _ConvNd):
    """What the adapted convolutions are: a convolution of torch's behind this class gives the spatial dimensions.

    They gained ``lora_A`` (rank, in / groups, …), a convolution like their own, and ``lora_B`` (out, rank / groups, 1, …).

    Example:
        >>> from thawline.algorithms import inject_lora, merge_lora
        >>> from thawline.engine import ParameterLedger
        >>> layer, x = nn.Conv1d(2, 4, 2, padding="same", groups=2), torch.rand(3, 2, 5)
        >>> adapters = inject_lora(ParameterLedger(layer, torch.optim.SGD), "*", rank=2, alpha=6)
        >>> filled, weight = nn.init.ones_(layer.lora_B), layer.weight + layer.lora_deltas()["weight"]
        >>> torch.allclose(layer(x), F.conv1d(F.pad(x, (0, 1)), weight, layer.bias, groups=2), atol=1e-6)
        True
        >>> layer
        LoRAConv1d(2, 4, kernel_size=(2,), stride=(1,), padding=same, groups=2, lora_rank=1, lora_scaling=3)
        >>> layer, x = nn.Conv2d(1, 2, 3, padding=(1, 0), padding_mode="circular"), torch.rand(1, 4, 5)  # without a batch
        >>> adapters = inject_lora(ParameterLedger(layer, torch.optim.SGD), "*", rank=2, alpha=6)
        >>> before, filled, learned = layer(x), nn.init.ones_(layer.lora_B), layer(x)
        >>> learned.shape, merge_lora(layer), torch.allclose(learned, before), torch.allclose(learned, layer(x), atol=1e-6)
        (torch.Size([2, 4, 3]), ('',), False, True)
    """

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output with the adapter's added."""
        if self.lora_merged:
            merged: Tensor = super().forward(input)
            return merged
        return self.lora_convolved(input)

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.lora_repr()}"  # type: ignore[no-untyped-call]  # torch's is untyped

    def lora_convolved(self, x: Tensor) -> Tensor:
        """Return the layer's output with the adapter's added."""
        spatial = len(self.stride)
        batched = x if x.dim() == spatial + 2 else x.unsqueeze(0)
        sides = self._reversed_padding_repeated_twice
        both = [min(sides[place : place + 2]) for place in range(len(sides) - 2, -1, -2)]
        if self.padding_mode != "zeros":
            batched, both = F.pad(batched, sides, mode=self.padding_mode), [0] * spatial
        else:  # padding="same" beside an even kernel: the larger side's excess first, as torch does
            excess = [side - min(sides[place // 2 * 2 : place // 2 * 2 + 2]) for place, side in enumerate(sides)]
            batched = F.pad(batched, excess) if any(excess) else batched
        y = lora_convolution(
            batched, self.weight, self.bias, self.lora_A, self.lora_B, stride=self.stride, padding=both,
            dilation=self.dilation, groups=self.groups, **self.lora_settings(),
        )  # fmt: skip
        return y if batched.dim() == x.dim() else y.squeeze(0)

    @override
    def lora_deltas(self) -> dict[str, Tensor]:
        groups = self.groups if self.lora_A.shape[1] == self.weight.shape[1] else 1
        down = self.lora_A.reshape(groups, len(self.lora_A) // groups, -1)
        up = self.lora_B.reshape(groups, len(self.lora_B) // groups, -1)
        delta = torch.bmm(up.to(wide(up)), down.to(wide(down))) * self.lora_scaling
        return {"weight": delta.view(-1, *self.lora_A.shape[1:])}


class LoRAConv1d(LoRAConvolution, nn.Conv1d):
    """An ``nn.Conv1d`` with a low-rank adapter."""


class LoRAConv2d(LoRAConvolution, nn.Conv2d):
    """An ``nn.Conv2d`` with a low-rank adapter."""


class LoRAConv3d(LoRAConvolution, nn.Conv3d):
    """An ``nn.Conv3d`` with a low-rank adapter."""


def matrix_delta(module: Adapted, width: int, rows: Rows | None = None) -> Tensor:
    """Return ``scaling * lora_B @ lora_A``, shape (width, in), in float32 or wider.

    Example:
        >>> layer = LoRALinear(2, 2)
        >>> layer.lora_scaling, layer.lora_A, layer.lora_B = 3.0, nn.Parameter(torch.ones(1, 2)), nn.Parameter(torch.ones(2, 1))
        >>> matrix_delta(layer, 2).tolist(), matrix_delta(layer, 3, rows=[[0, 2]]).tolist()
        ([[3.0, 3.0], [3.0, 3.0]], [[3.0, 3.0], [3.0, 3.0], [0.0, 0.0]])
    """
    up = module.lora_B if rows is None else spread(module.lora_B, rows, width)
    return module.lora_scaling * (up.to(wide(up)) @ module.lora_A.to(wide(up)))


def wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which to add up: float32 for what is narrower.

    Example:
        >>> wide(torch.ones(1, dtype=torch.bfloat16)), wide(torch.ones(1)), wide(torch.ones(1).double())
        (torch.float32, torch.float32, torch.float64)
    """
    return torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype


def is_adapted(module: nn.Module) -> bool:
    """Return whether a module carries an adapter of this kind."""
    return isinstance(module, Adapted)


def adapter_names(module: nn.Module) -> list[str]:
    """Return the names of a module's own adapter parameters.

    Example:
        >>> from thawline.algorithms import inject_lora
        >>> from thawline.engine import ParameterLedger
        >>> attention = nn.MultiheadAttention(4, 2, kdim=2)
        >>> adapters = inject_lora(ParameterLedger(attention, torch.optim.SGD), "*", rank=1)
        >>> adapter_names(attention), adapter_names(attention.out_proj), is_adapted(attention), is_adapted(nn.Linear(2, 2))
        (['lora_A_q', 'lora_B_q', 'lora_A_k', 'lora_B_k', 'lora_A_v', 'lora_B_v'], ['lora_A', 'lora_B'], True, False)
    """
    return [name for name, _ in module.named_parameters(recurse=False) if name.startswith(("lora_A", "lora_B"))]


__all__ = [
    "Adapted",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAConv3d",
    "LoRAConvolution",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRANonDynamicallyQuantizableLinear",
    "Settings",
    "adapter_names",
    "is_adapted",
    "matrix_delta",
    "wide",
]
