"""The surgery op that builds low-rank adapters, and what it refuses."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..engine import ArgumentError, Attachment, Site, SurgeryError, surgery_op
from .arguments import check_in_range, check_whole
from .lora_attention import LoRAMultiheadAttention
from .lora_forward import Rows
from .lora_modules import LoRAConv1d, LoRAConv2d, LoRAConv3d, LoRAEmbedding, LoRALinear, is_adapted

MAX_RANK = 2**16  # above the width of any layer that there is
_HALF = (torch.float16, torch.bfloat16)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What takes an adapter, and what it becomes.
KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: LoRALinear,
    nn.MultiheadAttention: LoRAMultiheadAttention,
    nn.Embedding: LoRAEmbedding,
    nn.Conv1d: LoRAConv1d,
    nn.Conv2d: LoRAConv2d,
    nn.Conv3d: LoRAConv3d,
}


@surgery_op("lora")
def lora(
    site: Site, *, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False, rows: Rows | None = None,
    dense: bool = False,
) -> list[Attachment]:  # fmt: skip
    """Build a low-rank adapter for a layer: linear, embedding, convolution, or an ``nn.MultiheadAttention``.

    ``lora_A`` is drawn uniformly from ±1/sqrt(in), as in loralib and peft, ``lora_B`` is zero, so the output is
    unchanged; for embeddings ``lora_A`` is zero and ``lora_B`` normally distributed. Both lie on the weight's device and
    in its dtype, but in float32 beside a half-precision weight, whose few digits would lose small updates. In a
    ``TransformerEncoderLayer`` and the ``TransformerEncoder`` around it the fast path, which would pass the adapter by, is
    switched off.

    Args:
        site: The module.
        rank: Rank of the adapter, of each slice's where there are ``rows``.
        alpha: The low-rank term is multiplied by alpha / rank.
        dropout: Probability with which an element of the adapter's input is dropped in training.
        rslora: Multiply by alpha / sqrt(rank) instead.
        rows: Slices of a linear layer's output, each from and up to which row: they get adapters of their own, the others none.
        dense: Let the adapter of a convolution with groups read all channels, as peft's does.

    Returns:
        What is to be attached: adapters, and the switches of the fast paths around them.

    Raises:
        SurgeryError: The module takes no adapter; the message says what to write.
        ArgumentError: An argument of the wrong type or out of range.

    Source: arXiv:2106.09685, section 4.1; rslora: Kalajdzievski, arXiv:2312.03732.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> built = lora(Site(model, "", model, torch.Generator().manual_seed(0)), rank=2, alpha=4)
        >>> {name: tuple(each.shape) for name, each in built[0].parameters.items()}
        {'lora_A': (2, 4), 'lora_B': (2, 2)}
        >>> built[0].attributes, built[0].parameters["lora_B"].any().item()
        ({'lora_scaling': 2.0, 'lora_dropout': 0.0}, False)
        >>> attention = Site(model, "", nn.MultiheadAttention(4, 2), torch.Generator())
        >>> [(each.module, [tuple(part.shape) for part in each.parameters.values()]) for each in lora(attention, rank=2, alpha=4)]
        [('', [(2, 4), (12, 2)]), ('out_proj', [(2, 4), (4, 2)])]
        >>> lora(Site(model, "", LoRALinear(4, 2), torch.Generator()), rank=2, alpha=4)
        Traceback (most recent call last):
        thawline.engine.errors.SurgeryError: '' carries an adapter already. Detach it first: ledger.detach(name, 'lora', owner=…).
        >>> for wrong in ({"rank": 0, "alpha": 1}, {"rank": 1, "alpha": 0}, {"rank": 1, "alpha": 1, "dropout": 1}):
        ...     try:
        ...         lora(attention, **wrong)
        ...     except ArgumentError as error:
        ...         print(str(error).partition(" Write")[0])
        lora(rank=) takes a whole number, 1 or above and 65536 or below, got 0.
        lora(alpha=) takes a number above 0, got 0.
        lora(dropout=) takes a number, 0 or above and below 1, got 1.
    """
    example = "ledger.attach(name, 'lora', owner='me', rank=8, alpha=16)"
    check_whole("lora(rank=)", rank, at_least=1, at_most=MAX_RANK, example=example)
    check_in_range("lora(alpha=)", alpha, above=0, example=example)
    check_in_range("lora(dropout=)", dropout, at_least=0, below=1, example="dropout=0.05")
    if is_adapted(site.module):
        raise SurgeryError(
            f"{site.name!r} carries an adapter already. Detach it first: ledger.detach(name, 'lora', owner=…)."
        )
    kind = check_site(site.model, site.name, site.module, rank=rank, rows=rows)
    attributes: dict[str, object] = {
        "lora_scaling": scaling_of(rank, alpha, rslora=rslora),
        "lora_dropout": float(dropout),
    }
    made: list[Attachment] = []
    inner, name = site.module, site.name
    if isinstance(site.module, nn.MultiheadAttention):
        packed = site.module._qkv_same_embed_dim
        weights = {"": "in_proj_weight"} if packed else {f"_{part}": f"{part}_proj_weight" for part in "qkv"}
        parameters: dict[str, nn.Parameter] = {}
        for suffix, weight in weights.items():
            matrix = getattr(site.module, weight)
            parameters |= _pair(matrix, (rank, matrix.shape[1]), (len(matrix), rank), site.generator, suffix)
        made.append(Attachment(site.name, parameters, {}, attributes, kind, next(iter(weights.values()))))
        inner = site.module.out_proj
        name = f"{site.name}.out_proj" if site.name else "out_proj"
        kind = check_class(name, inner, LoRALinear, nn.Linear)
    if rows is not None:
        attributes |= {"lora_rows": [list(each) for each in rows]}
    made.append(Attachment(name, _adapter(inner, rank, site.generator, rows, dense), {}, attributes, kind))
    return made + _switches(site)


@surgery_op("lora_saved")
def lora_saved(site: Site) -> list[Attachment]:
    """Mark a module that trains as a whole beside the adapters: it is saved with them."""
    return [Attachment(site.name, attributes={"lora_saved": True})]


def scaling_of(rank: int, alpha: float, *, rslora: bool) -> float:
    """Return the factor on the low-rank term.

    Example:
        >>> scaling_of(4, 16, rslora=False), scaling_of(4, 16, rslora=True)
        (4.0, 8.0)
    """
    return float(alpha) / (math.sqrt(rank) if rslora else rank)


def kind_of(module: nn.Module) -> tuple[type[nn.Module], type[nn.Module]] | None:
    """Return the layer class that ``module`` is of and its adapted class; None where it takes no adapter.

    Example:
        >>> [each.__name__ for each in kind_of(nn.Embedding(2, 2))], kind_of(nn.ReLU())
        (['Embedding', 'LoRAEmbedding'], None)
    """
    if is_conv1d(module):
        from .lora_conv1d import LoRAConv1D  # transformers is loaded already: the model is made of it

        return next(each for each in LoRAConv1D.__mro__ if each.__name__ == "Conv1D"), LoRAConv1D
    return next(((base, kind) for base, kind in KINDS.items() if isinstance(module, base)), None)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is the Conv1D of transformers, a linear layer with its weight transposed."""
    known: Any = sys.modules.get("transformers.pytorch_utils")
    return known is not None and isinstance(module, known.Conv1D)


def check_site(
    model: nn.Module, name: str, module: nn.Module, *, rank: int = 0, rows: Rows | None = None
) -> type[nn.Module]:
    """Return the class that an adapted ``module`` becomes.

    Args:
        model: The whole model.
        name: The module's name in it.
        module: The module.
        rank: Of the adapter, where it is known.
        rows: Slices of the output.

    Raises:
        SurgeryError: It takes no adapter, or would never be called; the message says what to write.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> check_site(model, "0", model[0]).__name__
        'LoRALinear'
        >>> grouped, parametrized = nn.Conv1d(4, 4, 1, groups=2), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        >>> check_site(model, "0", grouped, rank=4).__name__
        'LoRAConv1d'
        >>> for module in (model, parametrized, nn.Embedding(2, 2, max_norm=1.0), grouped):
        ...     try:
        ...         check_site(model, "0", module, rank=3)
        ...     except SurgeryError as error:
        ...         print(error)
        'lora' takes linear layers, embeddings, convolutions and nn.MultiheadAttention; '0' is a Sequential. ...
        '0' computes its weight from other parameters ...
        the embedding '0' has max_norm=1: its forward rewrites the weight that an adapter is to leave alone. ...
        '0' has 2 groups, of which 3 is no multiple. Write a rank that is, such as rank={'0': 2, '*': 3}, or ...
    """
    _check_called(model, name, module)
    known = kind_of(module)
    if known is None:
        raise SurgeryError(
            "'lora' takes linear layers, embeddings, convolutions and nn.MultiheadAttention; "
            f"{name!r} is a {type(module).__name__}. Choose others: LoRAInject(target=['*.query', '*.value']), or "
            "LoRAInject(target='all-linear')."
        )
    base, adapter = known
    if isinstance(module, nn.MultiheadAttention):
        check_class(f"{name}.out_proj", module.out_proj, LoRALinear, nn.Linear)
    elif "weight" not in module._parameters:
        raise SurgeryError(
            f"{name!r} computes its weight from other parameters (torch.nn.utils.parametrize, weight_norm), beside which "
            "no adapter can stand. Choose other targets, or remove the parametrization first."
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise SurgeryError(
            f"the embedding {name!r} has max_norm={module.max_norm:g}: its forward rewrites the weight that an adapter is to "
            "leave alone. Choose other targets."
        )
    if isinstance(module, CONVOLUTIONS) and rank % module.groups:
        raise SurgeryError(
            f"{name!r} has {module.groups} groups, of which {rank} is no multiple. Write a rank that is, such as "
            f"rank={{{name!r}: {module.groups}, '*': {rank}}}, or choose other targets."
        )
    if rows is not None:
        _check_rows(name, module, rows)
    return check_class(name, module, adapter, base)


def _check_called(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raise a SurgeryError for the output projection of an attention, whose weight is read by the attention itself.

    Example:
        >>> encoder = nn.TransformerEncoderLayer(4, 2)
        >>> _check_called(encoder, "linear1", encoder.linear1)
        >>> _check_called(encoder, "self_attn.out_proj", encoder.self_attn.out_proj)
        Traceback (most recent call last):
        thawline.engine.errors.SurgeryError: 'self_attn.out_proj' belongs to the nn.MultiheadAttention 'self_attn', ...
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


def _check_rows(name: str, module: nn.Module, rows: Rows) -> None:
    """Check slices: of a linear layer's output, in order, without overlap.

    Example:
        >>> _check_rows("qkv", nn.Linear(4, 12), [[0, 4], [4, 12]])
        >>> for wrong in ([[0, 13]], [[4, 8], [0, 4]], [[0, 4], [3, 8]], [[4, 4]], [[0, 1, 2]], [[0.0, 4]], []):
        ...     try:
        ...         _check_rows("qkv", nn.Linear(4, 12), wrong)
        ...     except ArgumentError as error:
        ...         print(str(error).partition(" Write")[0])
        lora(rows=) takes pairs of rows from 0 to 12, in order and without overlap, got [[0, 13]].
        lora(rows=) takes pairs of rows from 0 to 12, in order and without overlap, got [[4, 8], [0, 4]].
        lora(rows=) takes pairs of rows from 0 to 12, in order and without overlap, got [[0, 4], [3, 8]].
        lora(rows=) takes pairs of rows from 0 to 12, in order and without overlap, got [[4, 4]].
        lora(rows=) takes pairs of rows from 0 to 12, in order and without overlap, got [[0, 1, 2]].
        lora(rows=) takes pairs of rows from 0 to 12, in order and without overlap, got [[0.0, 4]].
        lora(rows=) takes at least one pair, got [].
        >>> _check_rows("0", nn.Embedding(2, 2), [[0, 1]])
        Traceback (most recent call last):
        thawline.engine.errors.SurgeryError: '0' is a Embedding, and slices are for linear layers. Write LoRAInject(target='0').
    """
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        raise SurgeryError(
            f"{name!r} is a {type(module).__name__}, and slices are for linear layers. Write LoRAInject(target={name!r})."
        )
    width, last = output_width(module), 0
    for each in rows:
        begin, end = each if len(each) == 2 else (-1, -1)
        if not (isinstance(begin, int) and isinstance(end, int) and last <= begin < end <= width):
            takes = f"pairs of rows from 0 to {width}, in order and without overlap"
            raise ArgumentError("lora(rows=)", got=rows, takes=takes, example=f"rows=[[0, {width // 3}]]")
        last = end
    if not last:
        raise ArgumentError("lora(rows=)", got=rows, takes="at least one pair", example=f"rows=[[0, {width}]]")


def output_width(module: Any) -> int:
    """Return the number of outputs of a linear layer."""
    width: int = module.weight.shape[1] if is_conv1d(module) else module.weight.shape[0]
    return width


def check_class(name: str, module: nn.Module, adapter: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """Return the statically defined adapter class for ``module``, or raise a SurgeryError that says how to write one.

    Example:
        >>> class Plain(nn.Linear):
        ...     pass
        >>> class Own(nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x)
        >>> wrapped, quantized = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> wrapped.forward = wrapped.forward
        >>> quantized.weight = nn.Parameter(torch.ones(1, 1, dtype=torch.int8), requires_grad=False)
        >>> for module in (Plain(1, 1), Own(1, 1), wrapped, quantized):
        ...     try:
        ...         check_class("0", module, LoRALinear, nn.Linear)
        ...     except SurgeryError as error:
        ...         print(error)
        '0' is a Plain, a subclass of Linear that 'lora' does not know. Write ...: class LoRAPlain(LoRALinear, Plain): pass
        '0' is a Own, a subclass of Linear that 'lora' does not know and that has its own forward. Write ...
        '0' had its forward replaced on the instance, which would pass the adapter by. ...
        the weight of '0' has dtype torch.int8; 'lora' takes float64, float32, bfloat16 and float16. ...
        >>> check_class("0", nn.Linear(1, 1).half(), LoRALinear, nn.Linear).__name__
        'LoRALinear'
    """
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
            forward = f"def forward(self, ...): with the adapter, see {adapter.__name__}"
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


def _adapter(
    module: nn.Module, rank: int, generator: torch.Generator, rows: Rows | None, dense: bool
) -> dict[str, nn.Parameter]:
    """Build the adapter of a layer, whatever its kind.

    Example:
        >>> def shapes(module, rank, rows=None, dense=False):
        ...     return [tuple(each.shape) for each in _adapter(module, rank, torch.Generator(), rows, dense).values()]
        >>> shapes(nn.Linear(4, 12), 2), shapes(nn.Linear(4, 12), 2, [[0, 4], [8, 11]])
        ([(2, 4), (12, 2)], [(4, 4), (7, 2)])
        >>> grouped = nn.Conv1d(4, 6, 3, groups=2)
        >>> shapes(grouped, 2), shapes(grouped, 2, dense=True), shapes(nn.Embedding(5, 3), 2)
        ([(2, 2, 3), (6, 1, 1)], [(2, 4, 3), (6, 1, 1)], [(2, 5), (3, 2)])
        >>> [each.any().item() for each in _adapter(nn.Embedding(5, 3), 2, torch.Generator(), None, False).values()]
        [False, True]
    """
    weight: Tensor = module.weight  # type: ignore[assignment]  # checked: it has one
    if isinstance(module, CONVOLUTIONS):
        channels = weight.shape[1] * (module.groups if dense else 1)
        up = (len(weight), rank // module.groups, *(1 for _ in module.kernel_size))
        return _pair(weight, (rank, channels, *module.kernel_size), up, generator)
    if isinstance(module, nn.Embedding):
        pair = _pair(weight, (rank, len(weight)), (weight.shape[1], rank), generator)
        with torch.no_grad():
            pair["lora_A"].zero_()
            drawn = torch.empty(pair["lora_B"].shape, device=generator.device).normal_(generator=generator)
            pair["lora_B"].copy_(drawn)
        return pair
    height, width = weight.shape[::-1] if is_conv1d(module) else weight.shape
    if rows is None:
        return _pair(weight, (rank, width), (height, rank), generator)
    count = sum(end - begin for begin, end in rows)
    return _pair(weight, (rank * len(rows), width), (count, rank), generator)


def _pair(
    weight: Tensor, down_shape: Sequence[int], up_shape: Sequence[int], generator: torch.Generator, suffix: str = ""
) -> dict[str, nn.Parameter]:
    """Draw a down projection, and make an up projection of zeros.

    Example:
        >>> pair = _pair(torch.ones(2, 2).half(), (100, 4), (2, 100), torch.Generator().manual_seed(0), "_q")
        >>> {name: each.dtype for name, each in pair.items()}
        {'lora_A_q': torch.float32, 'lora_B_q': torch.float32}
        >>> [round(each.item(), 2) for each in (pair["lora_A_q"].min(), pair["lora_A_q"].max(), pair["lora_B_q"].abs().max())]
        [-0.5, 0.5, 0.0]
    """
    dtype = torch.float32 if weight.dtype in _HALF else weight.dtype
    bound = 1 / math.sqrt(max(math.prod(down_shape[1:]), 1))  # Kaiming-uniform with a = sqrt(5)
    # Drawn on the generator's device, so that every device gets the same numbers.
    down = torch.empty(tuple(down_shape), dtype=dtype, device=generator.device)
    down.uniform_(-bound, bound, generator=generator)
    up = torch.zeros(tuple(up_shape), dtype=dtype, device=weight.device)
    return {f"lora_A{suffix}": nn.Parameter(down.to(weight.device)), f"lora_B{suffix}": nn.Parameter(up)}


def _switches(site: Site) -> list[Attachment]:
    """Switch off the fast paths, in eval without gradients, of the torch encoders around the module.

    ``TransformerEncoderLayer`` hands all its weights to one kernel where ``activation_relu_or_gelu`` is set, and
    ``TransformerEncoder`` makes padded batches nested tensors, which only that kernel takes. Neither attribute is read
    anywhere else.

    Example:
        >>> layer = nn.TransformerEncoderLayer(4, 2, batch_first=True)
        >>> site = Site(layer, "linear1", layer.linear1, torch.Generator())
        >>> [(each.module, each.attributes) for each in _switches(site)]
        [('', {'activation_relu_or_gelu': 0})]
    """
    off: dict[type[nn.Module], dict[str, object]] = {
        nn.TransformerEncoderLayer: {"activation_relu_or_gelu": 0},
        nn.TransformerEncoder: {"use_nested_tensor": False},
    }
    return [
        Attachment(name, attributes=attributes)
        for name, each in site.around.items()
        for kind, attributes in off.items()
        if isinstance(each, kind)
    ]


__all__ = [
    "CONVOLUTIONS",
    "KINDS",
    "MAX_RANK",
    "check_class",
    "check_site",
    "is_conv1d",
    "kind_of",
    "lora",
    "lora_saved",
    "output_width",
    "scaling_of",
]
