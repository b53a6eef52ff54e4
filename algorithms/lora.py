"""LoRAInject: low-rank adapters train in place of the weights they stand beside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, TypeAlias

import attrs
from torch import nn
from typing_extensions import override

from ..engine import (
    Algorithm,
    ArgumentError,
    Event,
    LayerMap,
    ParameterLedger,
    SelectorError,
    Stage,
    State,
    SurgeryError,
    get_logger,
    nearest,
    register,
    warn,
)
from .arguments import check_in_range, check_one_of, check_whole, in_range, one_of, positive, whole
from .lora_modules import MAX_RANK, check_site, is_adapted

Target: TypeAlias = str | Sequence[str]
TrainHead: TypeAlias = bool | Literal["auto"]

_Q_V = ("query", "value")
_QP_VP = ("q_proj", "v_proj")
# By `model.config.model_type` of Hugging Face transformers: the projections that the LoRA paper adapts, query and value,
# or the fused one that holds both.
MODEL_TARGETS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("albert", "beit", "bert", "camembert", "data2vec-text", "deit", "dinov2", "electra", "ernie", "esm"), _Q_V
    ),
    **dict.fromkeys(
        ("layoutlm", "roberta", "roberta-prelayernorm", "swin", "vit", "vit_mae", "xlm-roberta", "xmod"), _Q_V
    ),
    **dict.fromkeys(
        ("bart", "biogpt", "blenderbot", "clip", "codegen", "cohere", "gemma", "gemma2", "gemma3_text"), _QP_VP
    ),
    **dict.fromkeys(("granite", "hubert", "llama", "m2m_100", "marian", "mbart", "mistral", "mixtral", "olmo"), _QP_VP),
    **dict.fromkeys(("olmo2", "opt", "pegasus", "phi", "qwen2", "qwen2_moe", "qwen3", "siglip", "smollm3"), _QP_VP),
    **dict.fromkeys(("stablelm", "starcoder2", "wav2vec2", "whisper"), _QP_VP),
    **dict.fromkeys(("bloom", "falcon", "gpt_neox"), ("query_key_value",)),
    **dict.fromkeys(("longt5", "mpnet", "mt5", "t5", "umt5"), ("q", "v")),
    **dict.fromkeys(("modernbert", "mpt"), ("Wqkv",)),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    "deberta-v2": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
    "phi3": ("qkv_proj",),
}
ATTENTION_NAMES = frozenset(
    {"q", "k", "v", "query", "key", "value", "q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin", "wq", "wk", "wv"}
    | {"query_proj", "key_proj", "value_proj", "to_q", "to_k", "to_v", "in_proj", "out_proj", "o_proj"}
    | {"qkv", "qkv_proj", "query_key_value", "Wqkv", "to_qkv", "c_attn"}
)
DEFAULT_RANK = 8
_WORDS = ("attention", "all-linear", "auto")
_PRETRAINED_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")


def inject_lora(
    ledger: ParameterLedger,
    target: Target = "auto",
    *,
    rank: int = DEFAULT_RANK,
    alpha: float = 16,
    dropout: float = 0.0,
    lr: float | None = None,
    train_head: TrainHead = "auto",
    owner: str = "inject_lora",
) -> tuple[str, ...]:
    """Attach adapters to every target and hold the base weights.

    A target that carries an adapter of the same settings already, from an earlier fit, goes on training it.

    Args:
        ledger: The ledger of the model.
        target: What :func:`lora_targets` takes.
        rank: Rank of the adapters.
        alpha: The adapter's output is multiplied by alpha / rank.
        dropout: Probability with which an element of an adapter's input is dropped in training.
        lr: Base learning rate of the adapters; None is that of the weights they stand beside.
        train_head: See :class:`LoRAInject`.
        owner: Who holds the base weights.

    Returns:
        Names of the adapters' parameters.

    Raises:
        SelectorError: ``target`` matches nothing.
        SurgeryError: A target that takes no adapter. Nothing was attached then.
        ArgumentError: An argument of the wrong type or out of range.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> ledger = ParameterLedger(model, torch.optim.AdamW(model.parameters()))
        >>> inject_lora(ledger, rank=2, owner="me")
        ('0.lora_A', '0.lora_B')
        >>> sorted(ledger.trainable)
        ['0.lora_A', '0.lora_B', '2.bias', '2.weight']
    """
    check_whole("inject_lora(rank=)", rank, at_least=1, at_most=MAX_RANK, example="inject_lora(ledger, rank=8)")
    check_in_range("inject_lora(alpha=)", alpha, above=0, example="inject_lora(ledger, alpha=16)")
    check_in_range("inject_lora(dropout=)", dropout, at_least=0, below=1, example="inject_lora(ledger, dropout=0.05)")
    check_one_of(
        "inject_lora(train_head=)", train_head, ("auto", True, False), example="inject_lora(ledger, train_head=True)"
    )
    _check_target("inject_lora(target=)", target, "inject_lora(ledger, 'all-linear')")
    model = ledger.model
    names = lora_targets(model, ledger.layers, target)
    fresh = [name for name in names if not _goes_on(model, name, rank, alpha, dropout)]
    adapted = _adapters(model)
    base = [name for name in ledger.parameters if name not in adapted]
    if fresh:
        _warn_of_rank(model, fresh, rank)
        ledger.attach(fresh, "lora", owner=owner, rank=rank, alpha=alpha, dropout=dropout)
    if (not _has_pretrained_head(model)) if train_head == "auto" else train_head:
        head = frozenset(ledger.layers.head.parameters)
        base = [name for name in base if name not in head]
    if base:
        ledger.freeze(base, owner=owner)
    mine = _adapters(model, names)
    adapters = tuple(name for name in ledger.parameters if name in mine)
    if lr is not None:
        ledger.set_lr(adapters, lr, owner=owner)
    get_logger(__name__).info("injected", targets=len(names), fresh=len(fresh), rank=rank, held=len(base))
    return adapters


def lora_targets(model: nn.Module, layers: LayerMap, target: Target = "auto") -> tuple[str, ...]:
    """Return the names of the modules that are to get adapters, in the model's order.

    Args:
        model: The model.
        layers: Its layers; only globs reach into the head.
        target: ``"attention"``: its projections, by their usual names, and every ``nn.MultiheadAttention``.
            ``"all-linear"``: every linear layer and ``nn.MultiheadAttention``. A glob over module names or their ends, or
            a list of them: ``"query"`` and ``"encoder.*.query"`` mean the same layers; a module's exact name means that
            one only. ``"auto"``: the model's own ``default_peft_targets``; else what is usual for its
            ``config.model_type``; else ``"attention"``; else, for a model without attention, ``"all-linear"``.

    Raises:
        SelectorError: Nothing matches; lists the nearest names.
        SurgeryError: What matches takes no adapter.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> lora_targets(model, LayerMap(model)), lora_targets(model, LayerMap(model), ["2"])
        (('0',), ('2',))
    """
    body = _outside_head(model, layers, _able(model))
    attention = [name for name in body if _is_attention(name, model)]
    if target == "attention":
        if not attention:
            raise SelectorError(
                f"{type(model).__name__} has no nn.MultiheadAttention and no linear layer with a usual name of a projection "
                f"(query, q_proj, …). Nearest: {_nearest(model, 'attention')}. Write LoRAInject(target='all-linear') or a glob."
            )
        return tuple(attention)
    if target == "all-linear" or (target == "auto" and not attention and not _known(model)):
        if target == "auto" and body:
            get_logger(__name__).info("no attention found: every linear layer outside the head", targets=body)
        if not body:
            raise SelectorError(
                f"{type(model).__name__} has no linear layer outside its head ({_nearest(model, '')}). "
                "Name one to adapt it all the same: LoRAInject(target='classifier')."
            )
        return tuple(body)
    if target != "auto":
        return _matched(model, (target,) if isinstance(target, str) else target, "LoRAInject(target=)")
    own = _own_targets(model)
    if own:
        return _matched(model, own, f"{type(model).__name__}.default_peft_targets")
    usual = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in _known(model)]
    usual = _outside_head(model, layers, usual)
    for name in usual:
        check_site(model, name, model.get_submodule(name))
    # A version of transformers that names its projections otherwise.
    return tuple(usual or attention or body) or _matched(model, _known(model), "LoRAInject(target='auto')")


def _warn_of_rank(model: nn.Module, names: Sequence[str], rank: int) -> None:
    """Warn where a rank that somebody chose is above what a change of the weight can have."""
    for name in names if rank != DEFAULT_RANK else ():
        weight = getattr(model.get_submodule(name), "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 2 and rank > min(weight.shape):
            shape = " x ".join(map(str, weight.shape))
            warn(
                f"an adapter of rank {rank} at {name!r}, which is {shape}, is larger than the weight itself: no change of "
                f"it has a rank above {min(weight.shape)}. Write LoRAInject(rank={max(1, min(weight.shape) // 4)})."
            )
            return


def _check_target(argument: str, value: object, example: str) -> None:
    parts = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else []
    if not parts or not all(isinstance(each, str) and each for each in parts):
        takes = "'auto', 'attention', 'all-linear', a glob over module names, or a list of globs"
        raise ArgumentError(argument, got=value, takes=takes, example=example)


def _check_field(_instance: object, _attribute: attrs.Attribute[Any], value: object) -> None:
    _check_target("LoRAInject(target=)", value, "LoRAInject(target='all-linear')")


@register
@attrs.define(slots=False, eq=False)
class LoRAInject(Algorithm):
    """Train low-rank adapters in place of the weights.

    At the start of a fit, adapters are attached to the targets, the model's output unchanged, and all base weights are
    held. What LayerThaw and others release or hold adds to this: what trains in a thawed block is its adapters.

    Args:
        rank: Rank of the adapters.
        alpha: The adapter's output is multiplied by alpha / rank.
        target: ``"auto"``, ``"attention"``, ``"all-linear"``, a glob over module names or their ends, or a list of
            globs; see :func:`lora_targets`.
        dropout: Probability with which an element of an adapter's input is dropped in training.
        lr: Base learning rate of the adapters; None is that of the weights they stand beside.
        train_head: Whether the model's head (``layers.head``) trains as a whole. ``"auto"``: yes, as a new classifier
            must, except in language models, whose head is pre-trained: the class is called …ForCausalLM, …LMHeadModel,
            …ForConditionalGeneration or …ForMaskedLM.

    Raises:
        ArgumentError: An argument of the wrong type or out of range.

    Warns:
        ThawlineWarning: At the start of a fit, a rank above the smaller side of a target's weight.

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.

    Example:
        >>> LoRAInject(rank=4, target=["query", "value"]).describe()["arguments"]["rank"]
        4
        >>> LoRAInject(rank=0)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: LoRAInject(rank=) takes a whole number, 1 or above and 65536 or below, got 0. Write: LoRAInject(rank=8)
    """

    events = frozenset({Event.FIT_START})
    stage: ClassVar[Stage] = Stage.SURGERY

    rank: int = attrs.field(default=DEFAULT_RANK, validator=whole(at_least=1, at_most=MAX_RANK))
    alpha: float = attrs.field(default=16, validator=positive())
    target: Target = attrs.field(default="auto", validator=_check_field)
    dropout: float = attrs.field(default=0.0, validator=in_range(at_least=0, below=1))
    lr: float | None = attrs.field(default=None, validator=positive(or_none=True, example=1e-3))
    train_head: TrainHead = attrs.field(default="auto", validator=one_of(("auto", True, False)))

    @override
    def apply(self, event: Event, state: State) -> None:
        """Attach, hold and set the rate."""
        inject_lora(
            state.ledger, self.target, rank=self.rank, alpha=self.alpha, dropout=self.dropout, lr=self.lr,
            train_head=self.train_head, owner=self.owner,
        )  # fmt: skip


def _able(model: nn.Module) -> list[str]:
    """Return the names of the modules of a kind that takes an adapter."""
    inside = {id(each.out_proj) for each in model.modules() if isinstance(each, nn.MultiheadAttention)}
    kinds = (nn.Linear, nn.MultiheadAttention)
    return [name for name, each in model.named_modules() if isinstance(each, kinds) and id(each) not in inside]


def _outside_head(model: nn.Module, layers: LayerMap, names: Iterable[str]) -> list[str]:
    """Leave out what lies in the head, and output layers tied to an embedding, which lie in the stem."""
    head = {id(model.get_parameter(name)) for name in layers.head.parameters}
    head |= {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    return [name for name in names if head.isdisjoint(id(each) for each in model.get_submodule(name).parameters())]


def _is_attention(name: str, model: nn.Module) -> bool:
    return name.rpartition(".")[2] in ATTENTION_NAMES or isinstance(model.get_submodule(name), nn.MultiheadAttention)


def _outermost(model: nn.Module, attribute: str) -> Any:
    """Return the attribute of the outermost module that has it: the user's model may wrap a known one."""
    values = (getattr(each, attribute, None) for each in model.modules())
    return next((value for value in values if value is not None), None)


def _own_targets(model: nn.Module) -> tuple[str, ...]:
    value = _outermost(model, "default_peft_targets")
    value = value() if callable(value) else value
    if value is None:
        return ()
    _check_target("default_peft_targets", value, "default_peft_targets = ['query', 'value']")
    return (value,) if isinstance(value, str) else tuple(value)


def _known(model: nn.Module) -> tuple[str, ...]:
    """Return what is usual for the model's type, its own ``default_peft_targets`` first."""
    model_type = getattr(_outermost(model, "config"), "model_type", None)
    return _own_targets(model) or (MODEL_TARGETS.get(model_type, ()) if isinstance(model_type, str) else ())


def _matched(model: nn.Module, patterns: Sequence[str], argument: str) -> tuple[str, ...]:
    able, found = _able(model), set[str]()
    for pattern in patterns:
        names = _matching(pattern, able)
        if not names:  # what takes no adapter says why
            for name in _matching(pattern, [name for name, _ in model.named_modules()]):
                check_site(model, name, model.get_submodule(name))
            raise SelectorError(
                f"{argument}: {pattern!r} matches no module. Nearest: {_nearest(model, pattern)}. Write the end of a "
                "module's name, a glob such as 'encoder.*.query', 'attention' or 'all-linear'."
            )
        found.update(names)
    return tuple(name for name in able if name in found)


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    if pattern in names:
        return [pattern]
    return [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")]


def _nearest(model: nn.Module, name: str) -> str:
    names = _able(model) or [each for each, _ in model.named_modules() if each]
    ends = dict.fromkeys(each.rpartition(".")[2] for each in names)
    return nearest(
        name, dict.fromkeys([*(_WORDS if name else ()), *(each for each in ends if not each.isdigit()), *names])
    )


def _goes_on(model: nn.Module, name: str, rank: int, alpha: float, dropout: float) -> bool:
    """Return whether the module carries this adapter already; raise where it carries or can take no such one."""
    module: Any = model.get_submodule(name)
    if not is_adapted(module):
        check_site(model, name, module)
        return False
    ranks = {each.shape[0] for part, each in module.named_parameters(recurse=False) if part.startswith("lora_A")}
    if ranks == {rank} and module.lora_scaling == float(alpha) / rank and module.lora_dropout == dropout:
        return True
    raise SurgeryError(
        f"{name!r} carries an adapter of rank {min(ranks)} already, alpha / rank {module.lora_scaling:g}, dropout "
        f"{module.lora_dropout:g}. Write the same values to go on training it, or choose other targets."
    )


def _adapters(model: nn.Module, names: Iterable[str] = ("",)) -> frozenset[str]:
    """Return the names of the adapters' parameters in the modules called ``names`` and below."""
    found: set[str] = set()
    for start in names:
        for inner, module in model.get_submodule(start).named_modules(prefix=start):
            if is_adapted(module):
                own = (
                    name for name, _ in module.named_parameters(recurse=False) if name.startswith(("lora_A", "lora_B"))
                )
                found.update(f"{inner}.{name}" if inner else name for name in own)
    return frozenset(found)


def _has_pretrained_head(model: nn.Module) -> bool:
    return any(each.__name__.endswith(_PRETRAINED_HEADS) for each in type(model).__mro__)


__all__ = ["ATTENTION_NAMES", "MODEL_TARGETS", "LoRAInject", "inject_lora", "lora_targets"]
