"""torch's own attention with low-rank adapters on its projections."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor, nn
from typing_extensions import override

from ..engine import ArgumentError
from .lora_forward import lora_forward
from .lora_modules import Adapted, wide


class LoRAMultiheadAttention(Adapted, nn.MultiheadAttention):
    """An ``nn.MultiheadAttention`` with adapters on its input projections; that of ``out_proj`` lies in ``out_proj``.

    The packed projection has one adapter, as in peft: ``lora_A`` (rank, E) and ``lora_B`` (3 E, rank). Separate
    projections (``kdim``, ``vdim``) have one each: ``lora_A_q``, ``lora_B_q``, and so for k and v.

    torch's fused kernels take the weights as they lie and would pass the adapters by. So the projections are made
    here, by :func:`lora_forward`, and only the attention itself is torch's. What is computed follows
    ``F.multi_head_attention_forward`` step by step: before the adapter has learned, outputs equal it bit for bit.

    Example:
        >>> from thawline.algorithms import inject_lora, merge_lora, remove_lora
        >>> from thawline.engine import ParameterLedger
        >>> x, other = torch.rand(2, 3, 4), torch.rand(2, 5, 4)
        >>> padding, causal = torch.tensor([[False, True, False]] * 2), nn.Transformer.generate_square_subsequent_mask(3).isinf()
        >>> for options in ({}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}):
        ...     layer = nn.MultiheadAttention(4, 2, **{"batch_first": True} | options)
        ...     adapters = inject_lora(ParameterLedger(layer, torch.optim.SGD), "*", rank=2)
        ...     for name in adapters:
        ...         _ = nn.init.uniform_(layer.get_parameter(name))
        ...     def outputs():
        ...         yield from layer(x, x, x, key_padding_mask=padding, attn_mask=causal)
        ...         yield from layer(x, other, other, average_attn_weights=False)
        ...         yield layer(x[0], other[0], other[0].flip(0), need_weights=False)[0]
        ...         yield layer(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)[0]
        ...         yield layer(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        ...     learned, merged, standing = list(outputs()), merge_lora(layer), list(outputs())
        ...     removed = remove_lora(layer)  # now it is torch's own class
        ...     all(torch.allclose(each, own, atol=1e-5) for gave in (learned, standing) for each, own in zip(gave, outputs(), strict=True))
        True
        True
        True
        >>> layer, keys, values = nn.MultiheadAttention(4, 2, kdim=3, vdim=2), torch.rand(5, 3), torch.rand(5, 2)
        >>> adapters = inject_lora(ParameterLedger(layer, torch.optim.SGD), "*", rank=2)
        >>> for name in adapters:
        ...     _ = nn.init.uniform_(layer.get_parameter(name))
        >>> learned, merged, removed = layer(x[0], keys, values)[0], merge_lora(layer), remove_lora(layer)
        >>> torch.allclose(learned, layer(x[0], keys, values)[0], atol=1e-5)
        True
    """

    adapts = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

    @override
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return outputs and attention weights; arguments and shapes are those of ``nn.MultiheadAttention``.

        Example:
            >>> x = torch.ones(2, 1, 4)
            >>> LoRAMultiheadAttention(4, 2)(x, x, x, is_causal=True)
            Traceback (most recent call last):
            thawline.engine.errors.ArgumentError: LoRAMultiheadAttention(attn_mask=) takes a mask with is_causal, got None. ...
            >>> nested = torch.nested.nested_tensor([torch.ones(1, 4)], layout=torch.jagged)
            >>> LoRAMultiheadAttention(4, 2)(nested, nested, nested)
            Traceback (most recent call last):
            thawline.engine.errors.ArgumentError: LoRAMultiheadAttention(query=) takes padded ones, got 'a nested tensor'. ...
        """
        if query.is_nested or key.is_nested or value.is_nested:
            example = "torch.nested.to_padded_tensor(query, 0.0) and a key_padding_mask"
            raise ArgumentError(
                "LoRAMultiheadAttention(query=)", got="a nested tensor", takes="padded ones", example=example
            )
        if is_causal and attn_mask is None:
            example = "attn_mask=nn.Transformer.generate_square_subsequent_mask(length)"
            raise ArgumentError(
                "LoRAMultiheadAttention(attn_mask=)", got=None, takes="a mask with is_causal", example=example
            )
        batched = query.dim() == 3
        padding = _additive("key_padding_mask", key_padding_mask, query.dtype)
        mask = _additive("attn_mask", attn_mask, query.dtype)
        if not batched:
            query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
            padding = None if padding is None else padding.unsqueeze(0)
        elif self.batch_first:
            # One transpose for each distinct tensor: that query *is* key says that they share one projection.
            turned = {id(each): each.transpose(1, 0) for each in (query, key, value)}
            query, key, value = turned[id(query)], turned[id(key)], turned[id(value)]
        fused_causal = is_causal and padding is None and not need_weights
        bias = None if fused_causal else self._bias(mask, padding, query, key)
        q, k, v = self._heads(*self._projected(query, key, value))
        output, weights = self._attend(q, k, v, bias, need_weights=need_weights, is_causal=fused_causal)
        output = self.out_proj(output).view(*query.shape[:2], self.embed_dim)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return output.squeeze(1), None if weights is None else weights.squeeze(0)
        return output.transpose(1, 0) if self.batch_first else output, weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project to q, k, v, each (length, batch, E), in as few products as torch makes."""
        width, bias = self.embed_dim, self.in_proj_bias
        if not self._qkv_same_embed_dim:
            own: Any = self
            biases = (None, None, None) if bias is None else bias.chunk(3)
            q, k, v = (
                self._layer(x, getattr(own, f"{part}_proj_weight"), b, *_pair(own, f"_{part}"))
                for part, x, b in zip("qkv", (query, key, value), biases, strict=True)
            )
            return q, k, v
        if key is not value:
            shares = [(query, 1), (key, 1), (value, 1)]
        else:
            shares = [(query, 3)] if query is key else [(query, 1), (key, 2)]
        made: list[Tensor] = []
        for x, count in shares:
            rows = slice(len(made) * width, (len(made) + count) * width)
            share = None if bias is None else bias[rows]
            y = self._layer(x, self.in_proj_weight[rows], share, self.lora_A, self.lora_B[rows])
            made += y.view(*y.shape[:-1], count, width).movedim(-2, 0).contiguous().unbind(0)
        q, k, v = made
        return q, k, v

    def _layer(self, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
        if self.lora_merged:
            return F.linear(x, weight, bias)
        return lora_forward(x, weight, bias, down, up, **self.lora_settings())

    @override
    def lora_deltas(self) -> dict[str, Tensor]:
        pairs = (
            {"in_proj_weight": ""}
            if self._qkv_same_embed_dim
            else {f"{part}_proj_weight": f"_{part}" for part in "qkv"}
        )
        deltas = dict[str, Tensor]()
        for weight, suffix in pairs.items():
            down, up = _pair(self, suffix)
            deltas[weight] = self.lora_scaling * (up.to(wide(up)) @ down.to(wide(up)))
        return deltas

    def _heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split into heads, (batch * heads, length, E / heads), with the extra keys and values of the options."""
        batch = q.shape[1]
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).repeat(1, batch, 1)])
            v = torch.cat([v, self.bias_v.to(v.dtype).repeat(1, batch, 1)])
        q, k, v = (x.reshape(x.shape[0], batch * self.num_heads, self.head_dim).transpose(0, 1) for x in (q, k, v))
        if self.add_zero_attn:
            zeros = k.new_zeros(k.shape[0], 1, self.head_dim)
            k, v = torch.cat([k, zeros], dim=1), torch.cat([v, zeros], dim=1)
        return q, k, v

    def _bias(self, mask: Tensor | None, padding: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
        """Merge both masks into what is added to the scores: (1 or batch * heads, 1 or L, S), or None.

        Example:
            >>> layer, query, key = LoRAMultiheadAttention(4, 2), torch.ones(2, 1, 4), torch.ones(3, 1, 4)
            >>> layer._bias(torch.ones(2, 3), torch.tensor([[0.0, 1.0, 0.0]]), query, key)[0]
            tensor([[1., 2., 1.],
                    [1., 2., 1.]])
            >>> layer._bias(None, None, query, key), layer._bias(torch.ones(2, 2, 3), None, query, key).shape
            (None, torch.Size([2, 2, 3]))
            >>> layer._bias(torch.ones(3, 2), None, query, key)
            Traceback (most recent call last):
            thawline.engine.errors.ArgumentError: LoRAMultiheadAttention(attn_mask=) takes shape (2, 3) or (2, 2, 3), got (3, 2). ...
            >>> layer._bias(None, torch.ones(3, 1), query, key)
            Traceback (most recent call last):
            thawline.engine.errors.ArgumentError: LoRAMultiheadAttention(key_padding_mask=) takes shape (1, 3), batch first, got (3, 1). ...
        """
        (length, batch), keys, heads = query.shape[:2], key.shape[0], self.num_heads
        if mask is not None:
            if tuple(mask.shape) not in ((length, keys), (batch * heads, length, keys)):
                raise ArgumentError(
                    "LoRAMultiheadAttention(attn_mask=)",
                    got=tuple(mask.shape),
                    takes=f"shape {(length, keys)} or {(batch * heads, length, keys)}",
                    example=f"attn_mask=torch.zeros({length}, {keys})",
                )
            mask = mask.unsqueeze(0) if mask.dim() == 2 else mask
        if padding is not None:
            if tuple(padding.shape) != (batch, keys):
                raise ArgumentError(
                    "LoRAMultiheadAttention(key_padding_mask=)",
                    got=tuple(padding.shape),
                    takes=f"shape {(batch, keys)}, batch first",
                    example=f"key_padding_mask=torch.zeros({batch}, {keys}, dtype=torch.bool)",
                )
            padding = padding.view(batch, 1, 1, keys).expand(-1, heads, -1, -1).reshape(batch * heads, 1, keys)
            mask = padding if mask is None else mask + padding
        extra = int(self.bias_k is not None) + int(self.add_zero_attn)
        return mask if mask is None or not extra else F.pad(mask, (0, extra))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, need_weights: bool, is_causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return outputs (L * batch, E) and, where asked for, weights (batch, heads, L, S)."""
        heads, length, keys = self.num_heads, q.shape[1], k.shape[1]
        batch, dropout = q.shape[0] // heads, self.dropout if self.training else 0.0
        if need_weights:
            scaled = q * math.sqrt(1.0 / self.head_dim)
            scores = torch.bmm(scaled, k.mT) if bias is None else torch.baddbmm(bias, scaled, k.mT)
            weights = F.dropout(scores.softmax(dim=-1), dropout) if dropout > 0 else scores.softmax(dim=-1)
            output = torch.bmm(weights, v).transpose(0, 1).reshape(length * batch, self.embed_dim)
            return output, weights.view(batch, heads, length, keys)
        if bias is not None:
            bias = bias.unsqueeze(0) if bias.shape[0] == 1 else bias.view(batch, heads, -1, keys)
        q, k, v = (x.view(batch, heads, x.shape[1], self.head_dim) for x in (q, k, v))
        output = F.scaled_dot_product_attention(q, k, v, bias, dropout, is_causal)
        return output.permute(2, 0, 1, 3).reshape(length * batch, self.embed_dim), None


def _pair(module: Any, suffix: str) -> tuple[Tensor, Tensor]:
    return getattr(module, f"lora_A{suffix}"), getattr(module, f"lora_B{suffix}")


def _additive(name: str, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a mask as what is added to the scores: minus infinity where a boolean one says True.

    Example:
        >>> _additive("attn_mask", torch.tensor([True, False]), torch.float32), _additive("attn_mask", None, torch.float32)
        (tensor([-inf, 0.]), None)
        >>> _additive("attn_mask", torch.tensor([2.5]), torch.float32)
        tensor([2.5000])
        >>> _additive("attn_mask", torch.tensor([1]), torch.float32)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: LoRAMultiheadAttention(attn_mask=) takes a boolean or floating-point mask, got torch.int64. ...
    """
    if mask is None or mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        takes = "a boolean or floating-point mask"
        raise ArgumentError(
            f"LoRAMultiheadAttention({name}=)", got=mask.dtype, takes=takes, example=f"{name}=mask.bool()"
        )
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


__all__ = ["LoRAMultiheadAttention"]
