"""What peft says of an adapter in its ``adapter_config.json``, and what of that cannot be loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..engine import CheckpointError, warn

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
# What peft's LoRA can do beside that ours cannot, by the configuration's key.
_UNKNOWN = (
    "use_dora", "lora_bias", "layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens",
    "use_qalora", "use_bdlora", "velora_config", "kasa_config", "monteclora_config", "arrow_config",
)  # fmt: skip
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What does not change what a saved adapter computes, or is read: peft 0.21.
_KNOWN = frozenset(
    {"peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"}
    | {"r", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias"}
    | {"lora_alpha", "lora_dropout", "use_rslora", "alpha_pattern", "modules_to_save", "ensure_weight_tying"}
    | {"init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "fan_in_fan_out"}
    | {"megatron_config", "megatron_core", "qalora_group_size", "runtime_config", *_UNKNOWN}
)
_DEFAULTS: dict[str, Any] = {
    "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "alpha_pattern": {}, "modules_to_save": [],
}  # fmt: skip


def _is_factor(value: object) -> bool:
    return type(value) in (int, float) and 0 < cast("float", value) < 1e30


def _is_share(value: object) -> bool:
    return type(value) in (int, float) and 0 <= cast("float", value) < 1


_TAKES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lora_alpha": (_is_factor, "a number above 0"),
    "lora_dropout": (_is_share, "a number from 0 to below 1"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "alpha_pattern": (
        lambda value: isinstance(value, dict) and all(map(_is_factor, value.values())),
        "an object of patterns and numbers above 0",
    ),
    "modules_to_save": (
        lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
        "a list of names",
    ),
}


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return an adapter's configuration, defaults filled in, and its tensors.

    Raises:
        CheckpointError: Files that are missing or damaged, or that need what ours cannot do.

    Example:
        >>> import torch
        >>> from safetensors.torch import save_file
        >>> def reads(config):
        ...     save_file({"lora_A": torch.ones(1)}, TENSORS)
        ...     _ = Path(CONFIG).write_text(json.dumps(config))
        ...     try:
        ...         return read_adapter(Path())
        ...     except CheckpointError as error:
        ...         return str(error)
        >>> reads({"peft_type": "LORA", "lora_alpha": 4, "lora_dropout": None, "r": 2})
        ({'lora_alpha': 4, 'lora_dropout': 0.0, 'use_rslora': False, 'alpha_pattern': {}, 'modules_to_save': [], 'peft_type': 'LORA', 'r': 2}, {'lora_A': tensor([1.])})
        >>> for wrong in (
        ...     {"lora_alpha": 0}, {"lora_dropout": 1}, {"alpha_pattern": {"query": -1}}, {"modules_to_save": [3]},
        ...     {"use_dora": True}, {"init_lora_weights": "pissa_niter_4"}, {"peft_type": "IA3"},
        ... ):
        ...     print(reads({"peft_type": "LORA"} | wrong))
        adapter_config.json has lora_alpha=0; it takes a number above 0.
        adapter_config.json has lora_dropout=1; it takes a number from 0 to below 1.
        adapter_config.json has alpha_pattern={'query': -1}; it takes an object of patterns and numbers above 0.
        adapter_config.json has modules_to_save=[3]; it takes a list of names.
        the adapter in . was made with use_dora, which 'lora' does not do.
        the adapter in . was begun with 'pissa_niter_4', which changes the base weights. Convert it in peft: model.save_pretrained(folder, path_initial_model_for_weight_conversion=…).
        the adapter in . is of type 'IA3'; 'LORA' is what can be loaded.
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     config, tensors = reads({"peft_type": "LORA", "r": 2, "lora_alpha": 0.5, "new": None, "newer": 3})
        >>> config["lora_alpha"], [str(each.message) for each in caught]
        (0.5, ['adapter_config.json has newer=3, which is not known here and is passed over. ... model.merge_and_unload().'])
        >>> reads({"peft_type": "LORA"})[0]["lora_alpha"]  # peft's own
        8
        >>> print(reads([]))
        the adapter in . is of type []; 'LORA' is what can be loaded.
        >>> for path, text in ((CONFIG, "{"), (TENSORS, "…")):
        ...     whole, _ = reads({"peft_type": "LORA"}), Path(path).write_text(text)
        ...     try:
        ...         read_adapter(Path())
        ...     except CheckpointError as error:
        ...         print(str(error).partition(": ")[0])
        the adapter in . cannot be read
        the adapter in . cannot be read
        >>> read_adapter(Path("runs/mine"))
        Traceback (most recent call last):
        thawline.engine.errors.CheckpointError: runs/mine holds no adapter: adapter_config.json is missing. Write the folder ...
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} holds no adapter: {Path(str(error.filename or TENSORS)).name} is missing. Write the folder that "
            "save_adapter or peft's save_pretrained wrote."
        ) from None
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"the adapter in {folder} cannot be read: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise CheckpointError(f"the adapter in {folder} is of type {kind!r}; 'LORA' is what can be loaded.")
    for key in _UNKNOWN:
        if config.get(key):
            raise CheckpointError(f"the adapter in {folder} was made with {key}, which 'lora' does not do.")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise CheckpointError(
            f"the adapter in {folder} was begun with {start!r}, which changes the base weights. Convert it in peft: "
            "model.save_pretrained(folder, path_initial_model_for_weight_conversion=…)."
        )
    if other := next((key for key, value in config.items() if value and key not in _KNOWN), None):
        warn(
            f"{folder / CONFIG} has {other}={config[other]!r:.80}, which is not known here and is passed over. Where it changes "
            "what the adapter computes, merge it in peft instead: model.merge_and_unload()."
        )
    config = _DEFAULTS | {key: value for key, value in config.items() if value is not None}
    for key, (right, takes) in _TAKES.items():
        if not right(config[key]):
            raise CheckpointError(f"{folder / CONFIG} has {key}={config[key]!r:.120}; it takes {takes}.")
    return config, tensors


def by_pattern(patterns: Mapping[str, Any], name: str, default: float) -> float:
    """Return the first pattern's value as peft finds it.

    Example:
        >>> by_pattern({"^a": 3, "query": 5}, "b.query", 8), by_pattern({"^a": 3}, "b.a", 8)
        (5.0, 8)
        >>> by_pattern({"query": 5}, "query.dense", 8), by_pattern({"query": 5}, "subquery", 8)
        (8, 8)
        >>> by_pattern({"(": 5}, "query", 8)
        Traceback (most recent call last):
        thawline.engine.errors.CheckpointError: the adapter's pattern '(' is no regular expression.
    """
    for pattern, value in patterns.items():
        try:
            match = re.match(rf"(.*\.)?({pattern})$", name)
        except re.error:
            raise CheckpointError(f"the adapter's pattern {pattern!r} is no regular expression.") from None
        if match:
            return float(value)
    return default


__all__ = ["CONFIG", "TENSORS", "by_pattern", "read_adapter"]
