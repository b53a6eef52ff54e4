"""The adapted Conv1D of transformers; imported only where a model has one."""

from __future__ import annotations

from torch import Tensor
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from .lora_forward import Rows, lora_forward
from .lora_modules import Adapted, matrix_delta


class LoRAConv1D(Adapted, Conv1D):
    """GPT-2's ``Conv1D``, a linear layer with its weight transposed, (in, out), with a low-rank adapter.

    It gained ``lora_A`` (rank, in) and ``lora_B`` (out, rank), as :class:`~.lora_modules.LoRALinear`.

    Example:
        >>> import torch
        >>> from thawline.algorithms import inject_lora, merge_lora
        >>> from thawline.engine import ParameterLedger
        >>> layer, x = Conv1D(3, 2), torch.ones(1, 2)
        >>> adapters = inject_lora(ParameterLedger(layer, torch.optim.SGD), {"*": "q,v"}, rank=1, alpha=2)
        >>> before, down, up = layer(x), torch.nn.init.ones_(layer.lora_A), torch.nn.init.ones_(layer.lora_B)
        >>> (layer(x) - before).detach().round(decimals=4), merge_lora(layer)  # the key's row has no adapter
        (tensor([[4., 0., 4.]]), ('',))
        >>> (layer(x) - before).detach().round(decimals=4)
        tensor([[4., 0., 4.]])
    """

    lora_rows: Rows | None = None

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with the adapter's added, shape (..., out)."""
        if self.lora_merged:
            merged: Tensor = super().forward(x)  # type: ignore[no-untyped-call]  # transformers' is untyped
            return merged
        return lora_forward(
            x, self.weight, self.bias, self.lora_A, self.lora_B, rows=self.lora_rows, transposed=True, **self.lora_settings()
        )  # fmt: skip

    @override
    def lora_deltas(self) -> dict[str, Tensor]:
        return {"weight": matrix_delta(self, self.weight.shape[1], self.lora_rows).t()}


__all__ = ["LoRAConv1D"]
