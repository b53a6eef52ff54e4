"""Where adapters go: the modules that a target means, the slices of fused projections, and values by pattern."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, TypeVar

from torch import nn

from ..engine import ArgumentError, LayerMap, SelectorError, SurgeryError, get_logger, nearest
from .lora_forward import Rows
from .lora_op import check_site, is_conv1d, kind_of, output_width

Parts: TypeAlias = str | Sequence[Sequence[int]] | None
Target: TypeAlias = str | Sequence[str] | Mapping[str, Parts]
Value = TypeVar("Value", int, float)

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
_WORDS = ("attention", "all-linear", "auto")
# Fused projections whose rows are not those of the query, then the key's, then the value's.
_MIXED = ("bloom", "codegen", "falcon", "gpt_bigcode", "gpt_neox", "gpt_neox_japanese")


def lora_targets(model: nn.Module, layers: LayerMap, target: Target = "auto") -> tuple[str, ...]:
    """Return the names of the modules that are to get adapters, in the model's order.

    Args:
        model: The model.
        layers: Its layers; only globs reach into the head.
        target: ``"attention"``: its projections, by their usual names, and every ``nn.MultiheadAttention``.
            ``"all-linear"``: every linear layer and ``nn.MultiheadAttention``. A glob over module names or their ends, or
            a list of them: ``"query"`` and ``"encoder.*.query"`` mean the same layers; a module's exact name means that
            one only. A mapping says for each glob which slices of a fused projection are meant: ``{"c_attn": "q,v"}``,
            or rows such as ``[[0, 64], [128, 192]]``; None is the whole. ``"auto"``: the model's own ``default_peft_targets``; else what is usual for its
            ``config.model_type``; else ``"attention"``; else, for a model without attention, ``"all-linear"``.

    Raises:
        SelectorError: Nothing matches; lists the nearest names.
        ArgumentError: A target of the wrong form.
        SurgeryError: What matches takes no adapter.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> lora_targets(model, LayerMap(model)), lora_targets(model, LayerMap(model), ["2"])
        (('0',), ('2',))
        >>> encoder = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8), nn.Linear(4, 2))
        >>> layers = LayerMap(encoder)
        >>> lora_targets(encoder, layers), lora_targets(encoder, layers, "all-linear"), lora_targets(encoder, layers, "linear?")
        (('0.self_attn',), ('0.self_attn', '0.linear1', '0.linear2'), ('0.linear1', '0.linear2'))
        >>> lora_targets(model, LayerMap(model), "attention")
        Traceback (most recent call last):
        thawline.engine.errors.SelectorError: Sequential has no nn.MultiheadAttention and no linear layer with a usual name ...
        >>> bert = nn.ModuleDict({"query": nn.Linear(4, 4), "other": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
        >>> bert.config = type("Config", (), {"model_type": "bert"})
        >>> lora_targets(bert, LayerMap(bert))  # what is usual for its type
        ('query',)
        >>> pixels = nn.Sequential(nn.Conv1d(1, 1, 1))
        >>> lora_targets(pixels, LayerMap(pixels))
        Traceback (most recent call last):
        thawline.engine.errors.SelectorError: Sequential has no linear layer outside its head. Name ...: LoRAInject(target=['0']). ...
        >>> lora_targets(norm := nn.LayerNorm(2), LayerMap(norm))
        Traceback (most recent call last):
        thawline.engine.errors.SelectorError: LayerNorm has no linear layer outside its head. Leave LoRAInject out: ...
    """
    return tuple(lora_sites(model, layers, target))


def lora_sites(model: nn.Module, layers: LayerMap, target: Target = "auto") -> dict[str, Rows | None]:
    """Return for each target of :func:`lora_targets` the rows of its slices; None is the whole.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 2))
        >>> lora_sites(model, LayerMap(model), {"0": "q,v"})
        {'0': [[0, 4], [8, 12]]}
        >>> lora_sites(model, LayerMap(model), {"1": None, "*": [[0, 2]]}), lora_sites(model, LayerMap(model), "0")
        ({'0': [[0, 2]], '1': None}, {'0': None})
    """
    if not isinstance(target, Mapping):
        return dict.fromkeys(_modules(model, layers, target))
    found: dict[str, Rows | None] = {}
    for pattern, parts in target.items():
        for name in _matched(model, (pattern,), "LoRAInject(target=)"):
            found.setdefault(name, _rows(model, name, parts))
    return {name: found[name] for name in _able(model) if name in found}


def check_target(argument: str, value: object, example: str) -> None:
    """Raise an ArgumentError that names ``argument`` where ``value`` is no target.

    Example:
        >>> for right in ("auto", ["query", "0"], {"c_attn": "q, v"}, {"c_attn": [[0, 4]], "*": None}):
        ...     check_target("target=", right, "'auto'")
        >>> for wrong in ("", [""], {}, {"c_attn": "q,q"}, {"c_attn": 3}):
        ...     try:
        ...         check_target("target=", wrong, "'auto'")
        ...     except ArgumentError as error:
        ...         print(str(error).partition(", got ")[2].partition(". Write")[0])
        ''
        ['']
        {}
        {'c_attn': 'q,q'}
        {'c_attn': 3}
    """
    mapped = isinstance(value, Mapping)
    parts = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple, Mapping)) else []
    right = bool(parts) and all(isinstance(each, str) and each for each in parts)
    if not right or (mapped and not all(_is_parts(each) for each in value.values())):  # type: ignore[attr-defined]
        takes = "'auto', 'attention', 'all-linear', a glob over module names, a list of globs, or {glob: 'q,v'}"
        raise ArgumentError(argument, got=value, takes=takes, example=example)


def by_pattern(
    argument: str, values: Value | Mapping[str, Value], names: Iterable[str], example: str
) -> dict[str, Value]:
    """Return the value for each module: the one there is, or that of the first glob that matches.

    Raises:
        ArgumentError: No glob matches a module, or a glob matches none.

    Example:
        >>> by_pattern("rank", {"*.query": 16, "*": 8}, ["0.query", "0.key"], "…")
        {'0.query': 16, '0.key': 8}
        >>> by_pattern("rank", 4, ["0.query", "0.key"], "…")
        {'0.query': 4, '0.key': 4}
        >>> by_pattern("rank=", {"*.query": 16}, ["0.query", "0.key"], "…")
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: rank= takes a value, or globs for all targets, ..., got no glob for '0.key'. ...
        >>> by_pattern("rank=", {"*": 16, "valve": 8}, ["0.value"], "…")
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: rank= takes ... such as '0.value', got a glob 'valve' that matches no target. ...
    """
    names = list(names)
    if not isinstance(values, Mapping):
        return dict.fromkeys(names, values)
    found = {name: next((each for each in values if _matching(each, [name])), None) for name in names}
    idle = [pattern for pattern in values if not _matching(pattern, names)]
    bare = [name for name, pattern in found.items() if pattern is None]
    if idle or bare:
        got = f"no glob for {bare[0]!r}" if bare else f"a glob {idle[0]!r} that matches no target"
        takes = f"a value, or globs for all targets, such as {nearest(idle[0] if idle else '', names)}"
        raise ArgumentError(argument, got=_Words(got), takes=takes, example=example)
    return {name: values[pattern] for name, pattern in found.items() if pattern is not None}


def modules_matching(model: nn.Module, patterns: Sequence[str], argument: str) -> tuple[str, ...]:
    """Return the names of the modules with parameters that globs over names or their ends mean, the outermost ones.

    Raises:
        SelectorError: A glob matches nothing.

    Example:
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))
        >>> modules_matching(model, ["0.0", "0", "1"], "…"), modules_matching(model, ["0.*"], "…")
        (('0', '1'), ('0.0',))
        >>> modules_matching(model, ["0.1"], "modules_to_save=")
        Traceback (most recent call last):
        thawline.engine.errors.SelectorError: modules_to_save=: '0.1' matches no module with parameters. Nearest: ...
    """
    able = [name for name, each in model.named_modules() if name and any(True for _ in each.parameters())]
    found = set[str]()
    for pattern in patterns:
        names = _matching(pattern, able)
        if not names:
            raise SelectorError(
                f"{argument}: {pattern!r} matches no module with parameters. Nearest: {nearest(pattern, able)}."
            )
        found.update(names)
    inside = {name for name in found if any(name.startswith(f"{other}.") for other in found)}
    return tuple(name for name in able if name in found and name not in inside)


class _Words(str):
    """Text that an error shows without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def _is_parts(value: object) -> bool:
    if value is None:
        return True
    if isinstance(value, str):
        given = [each.strip() for each in value.split(",")]
        return set(given) <= set("qkv") and len(set(given)) == len(given)
    return isinstance(value, (list, tuple)) and all(isinstance(each, (list, tuple)) for each in value)


def _rows(model: nn.Module, name: str, parts: Parts) -> Rows | None:
    """Return the rows of a fused projection that ``parts`` means.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8))
        >>> _rows(model, "0", None), _rows(model, "0", [(0, 3)])
        (None, [[0, 3]])
        >>> _rows(model, "0", "q,v")  # no third of 8 rows, and no configuration that says more
        Traceback (most recent call last):
        thawline.engine.errors.SurgeryError: which of the 8 rows of '0' are the query's, the key's and the value's is not known. ...
        >>> from types import SimpleNamespace
        >>> model.config = SimpleNamespace(num_attention_heads=2, hidden_size=4, num_key_value_heads=1)
        >>> _rows(model, "0", "q,v"), _rows(model, "0", "k")
        ([[0, 4], [6, 8]], [[4, 6]])
        >>> model.config.model_type = "falcon"  # whose rows are mixed
        >>> _rows(model, "0", "q")
        Traceback (most recent call last):
        thawline.engine.errors.SurgeryError: which of the 8 rows of '0' ...
    """
    if parts is None:
        return None
    module = model.get_submodule(name)
    if not isinstance(parts, str):
        rows = [list(each) for each in parts]
        check_site(model, name, module, rows=rows)
        return rows
    check_site(model, name, module, rows=[[0, 1]])
    config = _outermost(model, "config")
    width, sizes = output_width(module), _sizes(config)
    if sum(sizes) != width:
        sizes = (width // 3,) * 3
    if getattr(config, "model_type", None) in _MIXED or sum(sizes) != width:
        raise SurgeryError(
            f"which of the {width} rows of {name!r} are the query's, the key's and the value's is not known. Write them: "
            f"LoRAInject(target={{{name!r}: [[0, {width // 3}]]}}), or adapt the whole: LoRAInject(target={name!r})."
        )
    begins = {"q": 0, "k": sizes[0], "v": sizes[0] + sizes[1]}
    wanted = [each.strip() for each in parts.split(",")]
    return [[begin, begin + size] for (part, begin), size in zip(begins.items(), sizes, strict=True) if part in wanted]


def _sizes(config: object) -> tuple[int, int, int]:
    """Return how many rows query, key and value have by a configuration of transformers; zeros where it does not say.

    Example:
        >>> from types import SimpleNamespace
        >>> _sizes(SimpleNamespace(num_attention_heads=4, hidden_size=8)), _sizes(None)
        ((8, 8, 8), (0, 0, 0))
        >>> _sizes(SimpleNamespace(num_attention_heads=4, hidden_size=8, head_dim=3, num_key_value_heads=2))
        (12, 6, 6)
        >>> _sizes(SimpleNamespace(num_attention_heads=0, hidden_size=8)), _sizes(SimpleNamespace(num_attention_heads=4))
        ((0, 0, 0), (0, 0, 0))
    """
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(width, int) or not heads:
        return (0, 0, 0)
    size = getattr(config, "head_dim", None) or width // heads
    shared = (getattr(config, "num_key_value_heads", None) or heads) * size
    return (heads * size, shared, shared)


def _modules(model: nn.Module, layers: LayerMap, target: str | Sequence[str]) -> tuple[str, ...]:
    """Find the modules that a word or globs mean; ``"auto"`` asks the model, then its type, then its names.

    Example:
        >>> from types import SimpleNamespace
        >>> model = nn.Sequential(nn.ModuleDict({"q": nn.Linear(2, 2), "key": nn.Linear(2, 2), "dense": nn.Linear(2, 2)}), nn.Linear(2, 1))
        >>> layers = LayerMap(model)
        >>> _modules(model, layers, "auto"), _modules(model, layers, "all-linear"), _modules(model, layers, "1")
        (('0.q', '0.key'), ('0.q', '0.key', '0.dense'), ('1',))
        >>> model.config = SimpleNamespace(model_type="bert")  # query and value, of which there is no such
        >>> _modules(model, layers, "auto")
        ('0.q', '0.key')
        >>> model.default_peft_targets = ["dense", "key"]
        >>> _modules(model, layers, "auto"), _modules(model, layers, "attention")
        (('0.key', '0.dense'), ('0.q', '0.key'))
    """
    body = _outside_head(model, layers, _linear(model))
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
            able = _able(model)
            write = (
                f"Name what to adapt all the same, a convolution or the head: LoRAInject(target=[{able[0]!r}]). "
                f"The model has {_nearest(model, '')}."
                if able
                else "Leave LoRAInject out: the model has no module that takes an adapter."
            )
            raise SelectorError(f"{type(model).__name__} has no linear layer outside its head. {write}")
        return tuple(body)
    if target != "auto":
        return _matched(model, (target,) if isinstance(target, str) else target, "LoRAInject(target=)")
    own = _own_targets(model)
    if own:
        return _matched(model, own, f"{type(model).__name__}.default_peft_targets")
    usual = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in _known(model)]
    usual = _outside_head(model, layers, usual)
    for name in usual:
        module = model.get_submodule(name)
        known = kind_of(module)
        if known is None or not isinstance(module, known[1]):  # one that is adapted already is gone on with
            check_site(model, name, module)
    # A version of transformers that names its projections otherwise.
    return tuple(usual or attention or body) or _matched(model, _known(model), "LoRAInject(target='auto')")


def _able(model: nn.Module) -> list[str]:
    """Return the names of the modules of a kind that takes an adapter.

    Example:
        >>> model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Embedding(2, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _able(model), _linear(model)  # not the attention's own output projection
        (['0', '1', '3'], ['0', '3'])
    """
    inside = {id(each.out_proj) for each in model.modules() if isinstance(each, nn.MultiheadAttention)}
    return [name for name, each in model.named_modules() if kind_of(each) and id(each) not in inside]


def _linear(model: nn.Module) -> list[str]:
    """Return the names of those that are linear layers, or made of such."""
    kinds = (nn.Linear, nn.MultiheadAttention)
    modules = {name: model.get_submodule(name) for name in _able(model)}
    return [name for name, each in modules.items() if isinstance(each, kinds) or is_conv1d(each)]


def _outside_head(model: nn.Module, layers: LayerMap, names: Iterable[str]) -> list[str]:
    """Leave out what lies in the head, and output layers tied to an embedding, which lie in the stem.

    Example:
        >>> model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2), nn.Linear(2, 3, bias=False), nn.Linear(3, 2))
        >>> model[2].weight = model[0].weight
        >>> _outside_head(model, LayerMap(model), ["1", "2", "3"])
        ['1']
    """
    head = {id(model.get_parameter(name)) for name in layers.head.parameters}
    head |= {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    return [name for name in names if head.isdisjoint(id(each) for each in model.get_submodule(name).parameters())]


def _is_attention(name: str, model: nn.Module) -> bool:
    """Return whether a module is an attention or, by its name, a projection of one.

    Example:
        >>> model = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "mine": nn.MultiheadAttention(2, 1), "up": nn.Linear(2, 2)})
        >>> [_is_attention(name, model) for name in model]
        [True, True, False]
    """
    return name.rpartition(".")[2] in ATTENTION_NAMES or isinstance(model.get_submodule(name), nn.MultiheadAttention)


def _outermost(model: nn.Module, attribute: str) -> Any:
    """Return the attribute of the outermost module that has it: the user's model may wrap a known one."""
    values = (getattr(each, attribute, None) for each in model.modules())
    return next((value for value in values if value is not None), None)


def _own_targets(model: nn.Module) -> tuple[str, ...]:
    """Return the ``default_peft_targets`` of the model or of what it wraps: a glob, several, or a method that returns them.

    Example:
        >>> inner = nn.Linear(2, 2)
        >>> model = nn.Sequential(inner)
        >>> _own_targets(model)
        ()
        >>> inner.default_peft_targets = lambda: ["query", "value"]
        >>> _own_targets(model)
        ('query', 'value')
        >>> model.default_peft_targets = "0"
        >>> _own_targets(model)
        ('0',)
        >>> model.default_peft_targets = [3]
        >>> _own_targets(model)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: default_peft_targets takes ..., got [3]. Write: default_peft_targets = ['query', 'value']
    """
    value = _outermost(model, "default_peft_targets")
    value = value() if callable(value) else value
    if value is None:
        return ()
    check_target("default_peft_targets", value, "default_peft_targets = ['query', 'value']")
    return (value,) if isinstance(value, str) else tuple(value)


def _known(model: nn.Module) -> tuple[str, ...]:
    """Return what is usual for the model's type, its own ``default_peft_targets`` first.

    Example:
        >>> from types import SimpleNamespace
        >>> model = nn.Linear(2, 2)
        >>> model.config = SimpleNamespace(model_type="distilbert")
        >>> _known(model), _known(nn.Linear(2, 2))
        (('q_lin', 'v_lin'), ())
        >>> model.default_peft_targets = ["query"]
        >>> _known(model)
        ('query',)
        >>> [MODEL_TARGETS[each][0] for each in ("bert", "vit", "clip", "llama", "qwen3", "whisper")]
        ['query', 'query', 'q_proj', 'q_proj', 'q_proj', 'q_proj']
        >>> [MODEL_TARGETS[each] for each in ("falcon", "gpt2", "mpt", "t5")]
        [('query_key_value',), ('c_attn',), ('Wqkv',), ('q', 'v')]
    """
    model_type = getattr(_outermost(model, "config"), "model_type", None)
    return _own_targets(model) or (MODEL_TARGETS.get(model_type, ()) if isinstance(model_type, str) else ())


def _matched(model: nn.Module, patterns: Sequence[str], argument: str) -> tuple[str, ...]:
    """Return the modules that globs mean, in the model's order; each glob must mean one that takes an adapter.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> _matched(model, ["2", "0"], "…")
        ('0', '2')
        >>> _matched(model, ["1"], "…")
        Traceback (most recent call last):
        thawline.engine.errors.SurgeryError: 'lora' takes linear layers, ...; '1' is a ReLU. ...
        >>> _matched(model, ["0", "4"], "target=")
        Traceback (most recent call last):
        thawline.engine.errors.SelectorError: target=: '4' matches no module. Nearest: ...
    """
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
    """Return the names that a glob means, or their ends; an exact name means itself alone.

    Example:
        >>> _matching("query", ["0.query", "1.query", "1.key"]), _matching("query", ["query", "1.query"])
        (['0.query', '1.query'], ['query'])
        >>> _matching("1.*", ["0.query", "1.query", "2.1.key"])
        ['1.query', '2.1.key']
    """
    if pattern in names:
        return [pattern]
    return [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")]


def _nearest(model: nn.Module, name: str) -> str:
    """Return what may have been meant by ``name``: words, ends of names and whole names.

    Example:
        >>> model = nn.Sequential(nn.ModuleDict({"query": nn.Linear(2, 2), "act": nn.ReLU()}))
        >>> _nearest(model, "qerry"), _nearest(model, ""), _nearest(model[0].act, "x")
        ("'query', '0.query'", "'query', '0.query'", "'attention', 'all-linear', 'auto'")
    """
    names = _able(model) or [each for each, _ in model.named_modules() if each]
    ends = dict.fromkeys(each.rpartition(".")[2] for each in names)
    return nearest(
        name, dict.fromkeys([*(_WORDS if name else ()), *(each for each in ends if not each.isdigit()), *names])
    )


__all__ = [
    "ATTENTION_NAMES",
    "MODEL_TARGETS",
    "Parts",
    "Target",
    "by_pattern",
    "check_target",
    "lora_sites",
    "lora_targets",
    "modules_matching",
]
