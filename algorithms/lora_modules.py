"""Low-rank adapters on linear layers and on torch's own attention: the function, the classes and the surgery op.

An adapted module keeps its identity, its place and its parameters' names; its class becomes one of the subclasses
below. They are defined statically, so that adapted models can be pickled and copied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypedDict, cast

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from typing_extensions import override

from ..engine import ArgumentError, Attachment, Site, SurgeryError, surgery_op
from .arguments import check_in_range, check_whole

MAX_RANK = 2**16  # above the width of any layer that there is
_HALF = (torch.float16, torch.bfloat16)


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
) -> Tensor:
    """Return ``x @ weight.T + bias + scaling * dropout(x) @ lora_A.T @ lora_B.T``.

    The low-rank result is accumulated into the base result by one ``addmm``, so the adapter makes no elementwise pass
    over the output. With ``lora_B`` zero the result is that of ``F.linear`` bit for bit. The adapter is computed in
    the dtype of the base result (under autocast the lower one), also where its weights are kept in float32.

    Args:
        x: Input, shape (..., in).
        weight: Base weight W, shape (out, in).
        bias: Base bias, shape (out,), or None.
        lora_A: Down projection A, shape (rank, in).
        lora_B: Up projection B, shape (out, rank).
        scaling: Factor on the low-rank term: alpha / rank.
        dropout: Probability with which an element of the adapter's input is dropped.
        training: Whether dropout acts.

    Returns:
        Output, shape (..., out).

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, equation 3, arXiv:2106.09685.

    Example:
        >>> x, weight, down, up = torch.ones(1, 3), torch.eye(2, 3), torch.ones(1, 3), torch.ones(2, 1)
        >>> lora_forward(x, weight, None, down, up, scaling=0.5)
        tensor([[2.5000, 2.5000]])
    """
    if x.is_nested or x.dim() < 2:
        return F.linear(x, weight, bias) + lora_branch(
            x, lora_A, lora_B, scaling=scaling, dropout=dropout, training=training
        )
    # F.linear flattens a contiguous input by itself. Flattened here, its result is no view, so the adapter can be
    # added in place without autograd's copies for views. Other inputs take another kernel: there the shape must stay,
    # or the last bits would differ from those of the layer without its adapter.
    flat = x.is_contiguous()
    rows = x.flatten(0, -2)
    y = F.linear(rows if flat else x, weight, bias)
    dropped = F.dropout(rows, dropout) if training and dropout > 0 else rows
    hidden = F.linear(dropped, lora_A.to(x.dtype)).to(y.dtype)
    up = lora_B.to(y.dtype).t()
    y = y.addmm_(hidden, up, alpha=scaling) if flat else torch.addmm(y.flatten(0, -2), hidden, up, alpha=scaling)
    return y.view(*x.shape[:-1], weight.shape[0])


def lora_branch(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Return the low-rank term alone, ``scaling * dropout(x) @ lora_A.T @ lora_B.T``, shape (..., out).

    Args:
        x: Input, shape (..., in).
        lora_A: Down projection, shape (rank, in).
        lora_B: Up projection, shape (out, rank).
        scaling: Factor: alpha / rank.
        dropout: Probability with which an element of ``x`` is dropped.
        training: Whether dropout acts.

    Example:
        >>> lora_branch(torch.ones(3), torch.ones(1, 3), torch.ones(2, 1), scaling=0.5)
        tensor([1.5000, 1.5000])
    """
    dropped = F.dropout(x, dropout) if training and dropout > 0 else x
    return F.linear(F.linear(dropped, lora_A.to(x.dtype)) * scaling, lora_B.to(x.dtype))


class LoRALinear(nn.Linear):
    """An ``nn.Linear`` with a low-rank adapter: it gained ``lora_A`` (rank, in) and ``lora_B`` (out, rank).

    For a linear class of your own write ``class LoRAMyLinear(LoRALinear, MyLinear)`` at module level; surgery finds
    it. Where ``MyLinear`` has its own ``forward``, give it one as well, usually
    ``return super(LoRALinear, self).forward(x) + self.lora_branch(x)``.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scaling: float
    lora_dropout: float

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output with the adapter's added, shape (..., out)."""
        return lora_forward(input, self.weight, self.bias, self.lora_A, self.lora_B, **_settings(self))

    def lora_branch(self, x: Tensor) -> Tensor:
        """Return what the adapter adds, shape (..., out)."""
        return lora_branch(x, self.lora_A, self.lora_B, **_settings(self))

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lora_rank={self.lora_A.shape[0]}, lora_scaling={self.lora_scaling:g}"


class LoRANonDynamicallyQuantizableLinear(LoRALinear, NonDynamicallyQuantizableLinear):
    """The output projection of an ``nn.MultiheadAttention`` with an adapter."""


class LoRAMultiheadAttention(nn.MultiheadAttention):
    """An ``nn.MultiheadAttention`` with adapters on its input projections; that of ``out_proj`` lies in ``out_proj``.

    The packed projection has one adapter, as in peft: ``lora_A`` (rank, E) and ``lora_B`` (3 E, rank). Separate
    projections (``kdim``, ``vdim``) have one each: ``lora_A_q``, ``lora_B_q``, and so for k and v.

    torch's fused kernels take the weights as they lie and would pass the adapters by. So the projections are made
    here, by :func:`lora_forward`, and only the attention itself is torch's. What is computed follows
    ``F.multi_head_attention_forward`` step by step: before the adapter has learned, outputs equal it bit for bit.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scaling: float
    lora_dropout: float

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
        """Return outputs and attention weights; arguments and shapes are those of ``nn.MultiheadAttention``."""
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
        width, bias, settings = self.embed_dim, self.in_proj_bias, _settings(self)
        if not self._qkv_same_embed_dim:
            own: Any = self
            biases = (None, None, None) if bias is None else bias.chunk(3)
            q, k, v = (
                lora_forward(x, getattr(own, f"{part}_proj_weight"), b, *_pair(own, f"_{part}"), **settings)
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
            y = lora_forward(x, self.in_proj_weight[rows], share, self.lora_A, self.lora_B[rows], **settings)
            made += y.view(*y.shape[:-1], count, width).movedim(-2, 0).contiguous().unbind(0)
        q, k, v = made
        return q, k, v

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
        """Merge both masks into what is added to the scores: (1 or batch * heads, 1 or L, S), or None."""
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


@surgery_op("lora")
def lora(site: Site, *, rank: int, alpha: float, dropout: float = 0.0) -> list[Attachment]:
    """Build a low-rank adapter for a linear layer or for an ``nn.MultiheadAttention``.

    ``lora_A`` is drawn uniformly from ±1/sqrt(in), as in loralib and peft, ``lora_B`` is zero, so the output is
    unchanged. Both lie on the weight's device and in its dtype, but in float32 beside a half-precision weight, whose
    few digits would lose small updates. In a ``TransformerEncoderLayer`` and the ``TransformerEncoder`` around it the
    fast path, which would pass the adapter by, is switched off.

    Args:
        site: The module.
        rank: Rank of the adapter.
        alpha: The low-rank term is multiplied by alpha / rank.
        dropout: Probability with which an element of the adapter's input is dropped in training.

    Returns:
        What is to be attached: adapters, and the switches of the fast paths around them.

    Raises:
        SurgeryError: The module takes no adapter; the message says what to write.
        ArgumentError: An argument of the wrong type or out of range.

    Source: arXiv:2106.09685, section 4.1.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> built = lora(Site(model, "", model, torch.Generator().manual_seed(0)), rank=2, alpha=4)
        >>> {name: tuple(each.shape) for name, each in built[0].parameters.items()}
        {'lora_A': (2, 4), 'lora_B': (2, 2)}
    """
    example = "ledger.attach(name, 'lora', owner='me', rank=8, alpha=16)"
    check_whole("lora(rank=)", rank, at_least=1, at_most=MAX_RANK, example=example)
    check_in_range("lora(alpha=)", alpha, above=0, example=example)
    check_in_range("lora(dropout=)", dropout, at_least=0, below=1, example="dropout=0.05")
    if is_adapted(site.module):
        raise SurgeryError(
            f"{site.name!r} carries an adapter already. Detach it first: ledger.detach(name, 'lora', owner=…)."
        )
    kind = check_site(site.model, site.name, site.module)
    attributes = {"lora_scaling": float(alpha) / rank, "lora_dropout": float(dropout)}
    made: list[Attachment] = []
    if isinstance(site.module, nn.MultiheadAttention):
        packed = site.module._qkv_same_embed_dim
        weights = {"": "in_proj_weight"} if packed else {f"_{part}": f"{part}_proj_weight" for part in "qkv"}
        parameters: dict[str, nn.Parameter] = {}
        for suffix, weight in weights.items():
            parameters |= _adapter(getattr(site.module, weight), rank, site.generator, suffix)
        made.append(Attachment(site.name, parameters, {}, attributes, kind, next(iter(weights.values()))))
        inner: nn.Linear = site.module.out_proj
        name = f"{site.name}.out_proj" if site.name else "out_proj"
        kind = check_class(name, inner, LoRALinear, nn.Linear)
    else:
        inner, name = cast("nn.Linear", site.module), site.name
    made.append(Attachment(name, _adapter(inner.weight, rank, site.generator), {}, attributes, kind))
    return made + _switches(site.model, site.module)


def is_adapted(module: nn.Module) -> bool:
    """Return whether a module carries an adapter of this kind."""
    return isinstance(module, (LoRALinear, LoRAMultiheadAttention))


def check_site(model: nn.Module, name: str, module: nn.Module) -> type[nn.Module]:
    """Return the class that an adapted ``module`` becomes.

    Args:
        model: The whole model.
        name: The module's name in it.
        module: The module.

    Raises:
        SurgeryError: It takes no adapter, or would never be called; the message says what to write.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> check_site(model, "0", model[0]).__name__
        'LoRALinear'
    """
    above = name.rpartition(".")[0]
    # torch's own output projection is of a class of its own, and may be known under another name as well.
    everywhere = isinstance(module, NonDynamicallyQuantizableLinear)
    for parent_name, parent in model.named_modules() if everywhere else [(above, model.get_submodule(above))]:
        if isinstance(parent, nn.MultiheadAttention) and parent.out_proj is module:
            raise SurgeryError(
                f"{name!r} belongs to the nn.MultiheadAttention {parent_name!r}, which reads its weight and never calls it. "
                f"Target the attention itself, {parent_name!r}: its output projection gets an adapter as well."
            )
    if isinstance(module, nn.MultiheadAttention):
        kind = check_class(name, module, LoRAMultiheadAttention, nn.MultiheadAttention)
        check_class(f"{name}.out_proj", module.out_proj, LoRALinear, nn.Linear)
        return kind
    if isinstance(module, nn.Linear):
        if "weight" not in module._parameters:
            raise SurgeryError(
                f"{name!r} computes its weight from other parameters (torch.nn.utils.parametrize, weight_norm), beside which "
                "no adapter can stand. Choose other targets, or remove the parametrization first."
            )
        return check_class(name, module, LoRALinear, nn.Linear)
    advice = "Choose others: LoRAInject(target=['*.query', '*.value']), or LoRAInject(target='all-linear')."
    if type(module).__name__ == "Conv1D":
        advice = (
            "GPT-2's Conv1D stores its weight transposed and is not supported yet. Train its last blocks instead: "
            "Trainer(algorithms=partial(last=2)), with partial from thawline.algorithms."
        )
    raise SurgeryError(
        f"'lora' takes nn.Linear and nn.MultiheadAttention; {name!r} is a {type(module).__name__}. {advice}"
    )


def check_class(name: str, module: nn.Module, adapter: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """Return the statically defined adapter class for ``module``, or raise a SurgeryError that says how to write one."""
    own, title = type(module), type(module).__name__
    if "forward" in vars(module):
        raise SurgeryError(
            f"{name!r} had its forward replaced on the instance, which would pass the adapter by. Inject first and wrap "
            "forward afterwards, or register a forward hook instead."
        )
    found = next((each for each in _with_subclasses(adapter) if own in each.__bases__), None)
    overrides = own.forward is not base.forward
    if found is None or (overrides and "forward" not in vars(found)):
        forward = "def forward(self, x): return super(LoRALinear, self).forward(x) + self.lora_branch(x)"
        if adapter is not LoRALinear:
            forward = "def forward(self, ...): with the adapters on its projections, see LoRAMultiheadAttention"
        body = forward if overrides else "pass"
        raise SurgeryError(
            f"{name!r} is a {title}, a subclass of {base.__name__} that 'lora' does not know"
            f"{' and that has its own forward' * overrides}. Write at module level (so that the model can be pickled): "
            f"class LoRA{title}({adapter.__name__}, {title}): {body}"
        )
    wrong = [
        each.dtype
        for each in module.parameters(recurse=False)
        if each.dtype not in (*_HALF, torch.float32, torch.float64)
    ]
    if wrong:
        raise SurgeryError(
            f"the weight of {name!r} has dtype {wrong[0]}; 'lora' takes float64, float32, bfloat16 and float16. "
            "Choose other targets, or load the model in one of these."
        )
    return found


def _with_subclasses(kind: type[nn.Module]) -> Iterator[type[nn.Module]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _with_subclasses(each)


def _adapter(weight: Tensor, rank: int, generator: torch.Generator, suffix: str = "") -> dict[str, nn.Parameter]:
    rows, columns = weight.shape
    dtype = torch.float32 if weight.dtype in _HALF else weight.dtype
    bound = 1 / math.sqrt(max(columns, 1))  # Kaiming-uniform with a = sqrt(5)
    # Drawn on the generator's device, so that every device gets the same numbers.
    down = torch.empty(rank, columns, dtype=dtype, device=generator.device).uniform_(-bound, bound, generator=generator)
    up = torch.zeros(rows, rank, dtype=dtype, device=weight.device)
    return {f"lora_A{suffix}": nn.Parameter(down.to(weight.device)), f"lora_B{suffix}": nn.Parameter(up)}


def _switches(model: nn.Module, module: nn.Module) -> list[Attachment]:
    """Switch off the fast paths, in eval without gradients, of the torch encoders around ``module``.

    ``TransformerEncoderLayer`` hands all its weights to one kernel where ``activation_relu_or_gelu`` is set, and
    ``TransformerEncoder`` makes padded batches nested tensors, which only that kernel takes. Neither attribute is read
    anywhere else.
    """
    off: dict[type[nn.Module], dict[str, object]] = {
        nn.TransformerEncoderLayer: {"activation_relu_or_gelu": 0},
        nn.TransformerEncoder: {"use_nested_tensor": False},
    }
    made: list[Attachment] = []
    for name, parent in model.named_modules():
        for kind, attributes in off.items():
            if isinstance(parent, kind) and any(each is module for each in parent.modules()):
                made.append(Attachment(name, attributes=attributes))
    return made


class _Settings(TypedDict):
    scaling: float
    dropout: float
    training: bool


def _settings(module: LoRALinear | LoRAMultiheadAttention) -> _Settings:
    return {"scaling": module.lora_scaling, "dropout": module.lora_dropout, "training": module.training}


def _pair(module: Any, suffix: str) -> tuple[Tensor, Tensor]:
    return getattr(module, f"lora_A{suffix}"), getattr(module, f"lora_B{suffix}")


def _additive(name: str, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a mask as what is added to the scores: minus infinity where a boolean one says True."""
    if mask is None or mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        takes = "a boolean or floating-point mask"
        raise ArgumentError(
            f"LoRAMultiheadAttention({name}=)", got=mask.dtype, takes=takes, example=f"{name}=mask.bool()"
        )
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


__all__ = [
    "MAX_RANK",
    "LoRALinear",
    "LoRAMultiheadAttention",
    "LoRANonDynamicallyQuantizableLinear",
    "check_class",
    "check_site",
    "is_adapted",
    "lora",
    "lora_branch",
    "lora_forward",
]
