"""Adapters in folders, in the format of peft: either library loads what the other saved."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from attrs import frozen
from safetensors.torch import save_file
from torch import Tensor, nn

from ..engine import CheckpointError, Json, ParameterLedger, SurgeryError, ThawlineWarning, get_logger, nearest
from .adapter_config import CONFIG, TENSORS, by_pattern, read_adapter
from .lora_forward import spread
from .lora_merge import adapted, check_adapted, ledger_of
from .lora_modules import Adapted, is_adapted
from .lora_op import CONVOLUTIONS, is_conv1d, output_width, scaling_of

_PREFIX = "base_model.model."
_KEY = re.compile(r"(?:(?P<module>.+)\.)?lora_(?P<embedding>embedding_)?(?P<part>[AB])(?:\.weight)?")
# peft (0.21) adds what the adapter of an nn.MultiheadAttention's output projection adds twice, in its forward as in its
# merge: both the attention's `merge` and that of `out_proj` do. So in its files lora_B is half of what acts. (Its
# gradients count one of the two.)
_TWICE = 2.0


@frozen
class _Saved:
    """One adapter as it lies in a file."""

    down: Tensor
    up: Tensor
    rank: int
    alpha: float
    embedding: bool = False


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Write a model's adapters, and the modules that trained as a whole beside them, as peft does.

    ``adapter_config.json`` and ``adapter_model.safetensors`` appear in the folder, each replaced at once. Slices of a
    fused projection become an adapter of the whole, zero elsewhere; ``rslora`` is written as the alpha that it amounts to.

    Args:
        model: With adapters, merged or not.
        folder: Is made where it does not exist.

    Returns:
        The folder.

    Warns:
        ThawlineWarning: For a convolution with dilation or another padding than zeros: peft computes it otherwise.

    Raises:
        SurgeryError: The model has no adapters, or some that the format has no place for (separate projections of an
            ``nn.MultiheadAttention``).

    Example:
        >>> import tempfile
        >>> from thawline.algorithms import inject_lora
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> adapters = inject_lora(ParameterLedger(model, torch.optim.SGD(model.parameters())), rank=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(each.name for each in save_adapter(model, folder).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    check_adapted(model, "save_adapter")
    modules = dict(adapted(model))
    _warn_of_convolutions(cast("dict[str, nn.Module]", modules))
    saved = {name: _written(name, cast("nn.Module", module)) for name, module in modules.items()}
    tensors: dict[str, Tensor] = {}
    for name, each in saved.items():
        path = _path_in_peft(model, name)
        for part, tensor in (("A", each.down), ("B", each.up)):
            key = f"lora_embedding_{part}" if each.embedding else f"lora_{part}.weight"
            tensors[f"{_PREFIX}{path}{key}"] = (
                tensor / _TWICE if part == "B" and _belongs_above(model, name) else tensor
            )
    whole = _with_tied(model, [name for name, each in model.named_modules() if getattr(each, "lora_saved", False)])
    for name in whole:
        state: Mapping[str, Tensor] = model.get_submodule(name).state_dict()
        tensors |= {f"{_PREFIX}{name}.{key}": value for key, value in state.items()}
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    config = json.dumps(_config(model, saved, whole), indent=2, sort_keys=True) + "\n"
    ready = {key: each.detach().cpu().contiguous().clone() for key, each in tensors.items()}
    save_file(ready, target / f"{TENSORS}.new", metadata={"format": "pt"})
    (target / f"{CONFIG}.new").write_text(config, encoding="utf-8")
    for name in (TENSORS, CONFIG):
        (target / f"{name}.new").replace(target / name)
    return target


def load_adapter(
    model: nn.Module | ParameterLedger, folder: str | Path, *, owner: str = "load_adapter"
) -> tuple[str, ...]:
    """Attach the adapters that a folder holds, from :func:`save_adapter` or from peft, and load the modules saved beside them.

    Where a module carries an adapter of the same rank already, its values are replaced. ``LoRAInject`` with the same
    settings goes on training what was loaded.

    Args:
        model: Built as the one that was saved; within a fit its ledger, at an event where that is open.
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors``.
        owner: Who attaches them.

    Returns:
        Names of the modules that have adapters now.

    Raises:
        CheckpointError: Files that are missing or damaged, that do not fit the model, or that need what ours cannot do
            (DoRA, PiSSA and the like). Nothing was attached or written then.
        SurgeryError: A module that takes no adapter.
    """
    ledger, path = ledger_of(model, "load_adapter(model=)"), Path(folder)
    config, tensors = read_adapter(path)
    saved, rest = _sorted_out(ledger.model, config, tensors)
    targets = _targets(ledger.model, rest)
    _warn_of_convolutions({name: ledger.model.get_submodule(name) for name in saved})
    made: list[str] = []
    try:
        for arguments, names in _missing(ledger.model, saved, config):
            ledger.attach(names, "lora", owner=owner, **arguments)
            made += names
        _check_shapes(ledger.model, saved, config)
    except BaseException:
        for name in reversed(made):
            ledger.detach(name, "lora", owner=owner)
        raise
    with torch.no_grad():
        for name, each in saved.items():
            module = cast("Any", ledger.model.get_submodule(name))
            module.lora_A.copy_(each.down)
            module.lora_B.copy_(each.up)
        for target, value in targets:
            target.copy_(value)
    for name in _whole(ledger.model, config):
        if not getattr(ledger.model.get_submodule(name), "lora_saved", False):
            ledger.attach(name, "lora_saved", owner=owner)
    get_logger(__name__).info("loaded", adapters=len(saved), tensors=len(targets))
    return tuple(saved)


# -- saving ----------------------------------------------------------------------------------------------------------


def _written(name: str, layer: nn.Module) -> _Saved:
    """Return an adapter as peft would have it."""
    module = cast("Any", layer)
    if isinstance(layer, nn.MultiheadAttention) and not layer._qkv_same_embed_dim:
        raise SurgeryError(
            f"{name!r} has separate projections (kdim, vdim), for whose adapters peft's format has no place. Merge them "
            "instead: merge_lora(model)."
        )
    down, up = module.lora_A, module.lora_B
    rank = down.shape[0]
    if (rows := getattr(module, "lora_rows", None)) is not None:
        up = spread(up, rows, output_width(module))
    if isinstance(layer, CONVOLUTIONS) and down.shape[1] != layer.in_channels:
        down = _dense(down, layer.groups)
    return _Saved(down, up, rank, module.lora_scaling * rank, isinstance(layer, nn.Embedding))


def _dense(down: Tensor, groups: int) -> Tensor:
    """Return the first convolution of an adapter with groups as one that reads all channels: zeros elsewhere."""
    rank, channels = down.shape[0] // groups, down.shape[1]
    whole = down.new_zeros(down.shape[0], channels * groups, *down.shape[2:])
    for group in range(groups):
        ranks = slice(group * rank, (group + 1) * rank)
        whole[ranks, group * channels : (group + 1) * channels] = down[ranks]
    return whole


def _path_in_peft(model: nn.Module, name: str) -> str:
    """Return a module's name in peft's model, with a dot behind it."""
    above = name.rpartition(".")[0]
    if _belongs_above(model, name):
        return f"{above}.base_layer.out_proj." if above else "base_layer.out_proj."
    return f"{name}." if name else ""


def _belongs_above(model: nn.Module, name: str) -> bool:
    """Return whether a module is the output projection of an ``nn.MultiheadAttention``, which brings its adapter."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return bool(name) and isinstance(parent, nn.MultiheadAttention) and model.get_submodule(name) is parent.out_proj


def _with_tied(model: nn.Module, whole: list[str]) -> list[str]:
    """Return the modules that trained as a whole, and those that share a weight with them: peft trains copies, which part."""
    mine = {id(each) for name in whole for each in model.get_submodule(name).parameters()}
    own = [(name, each) for name, each in model.named_modules(remove_duplicate=False) if name and name not in whole]
    inside = tuple(f"{name}." for name in whole)
    tied = [
        (name, each)
        for name, each in own
        if any(id(part) in mine for part in each.parameters(recurse=False)) and not name.startswith(inside)
    ]
    if adapting := next((name for name, each in tied if is_adapted(each)), None):
        raise SurgeryError(
            f"{adapting!r} has an adapter, and shares its weight with a module that trained as a whole: peft's format has no "
            "place for both. Save the weights instead: model.state_dict()."
        )
    return [*whole, *(name for name, _ in tied)] if whole else []


def _config(model: nn.Module, saved: Mapping[str, _Saved], whole: list[str]) -> dict[str, Json]:
    names = [name for name in saved if not _belongs_above(model, name)]
    rank = Counter(saved[name].rank for name in names).most_common(1)[0][0]
    alpha = Counter(saved[name].alpha for name in names).most_common(1)[0][0]
    modules = [cast("Adapted", model.get_submodule(name)) for name in names]
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base if isinstance(base, str) and base else None,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": max(each.lora_dropout for each in modules),
        "rank_pattern": {_only(name): saved[name].rank for name in names if saved[name].rank != rank},
        "alpha_pattern": {_only(name): _plain(saved[name].alpha) for name in names if saved[name].alpha != alpha},
        "target_modules": _exactly(model, names),
        "modules_to_save": [*whole] or None,
        "fan_in_fan_out": any(is_conv1d(cast("nn.Module", each)) for each in modules),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _plain(number: float) -> int | float:
    return int(number) if number == int(number) else number


def _only(name: str) -> str:
    """Return a pattern that peft finds in this module's name alone."""
    return f"^{re.escape(name)}"


def _exactly(model: nn.Module, names: list[str]) -> list[Json] | str:
    """Return what peft is to look for: names, or a regular expression where names would match others' ends as well."""
    found = [name for name, _ in model.named_modules() if any(f".{name}".endswith(f".{each}") for each in names)]
    return [*names] if set(found) == set(names) else "|".join(map(re.escape, names))


# -- loading ---------------------------------------------------------------------------------------------------------


def _sorted_out(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, _Saved], dict[str, Tensor]]:
    """Return the adapters by module, and the other tensors by their names in the model."""
    pairs: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    known = {name for name, _ in model.named_modules()}
    for key, value in tensors.items():
        if not key.startswith(_PREFIX):
            raise CheckpointError(f"the adapter's tensor {key!r} does not begin with {_PREFIX!r}, as peft's do.")
        name = _in_model(key.removeprefix(_PREFIX), known)
        if name is None:
            continue
        if (match := _KEY.fullmatch(name)) is None:
            rest[name] = value
        else:
            pairs.setdefault(match["module"] or "", {})[match["part"]] = value
    found: dict[str, _Saved] = {}
    for name, pair in pairs.items():
        if name not in known:
            raise CheckpointError(
                f"the adapter is for a module {name!r}, which the model lacks. Nearest: {nearest(name, known)}."
            )
        if pair.keys() != {"A", "B"}:
            raise CheckpointError(f"the adapter of {name!r} lacks one of lora_A and lora_B.")
        alpha = by_pattern(config["alpha_pattern"], name, config["lora_alpha"])
        down = _by_groups(model.get_submodule(name), pair["A"])
        up = pair["B"] * _TWICE if _belongs_above(model, name) else pair["B"]
        found[name] = _Saved(down, up, len(down), alpha)
    if not found:
        raise CheckpointError("the file holds no adapters.")
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return {name: found[name] for name in sorted(found, key=order.__getitem__)}, rest


def _in_model(key: str, known: set[str]) -> str | None:
    """Return a tensor's name in the model; None for a second copy, which peft saves with ``bias="all"``.

    peft puts the modules that it wraps under ``base_layer``; a model may have modules of that name as well.
    """
    name = ""
    for part in key.split("."):
        above = name
        name = f"{name}.{part}".lstrip(".")
        if name not in known and part == "base_layer":
            name = above
        elif name not in known and part in ("modules_to_save", "original_module"):
            return None
    return name


def _targets(model: nn.Module, rest: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return what of the model the other tensors are for."""
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    names_of: dict[int, list[str]] = {}
    for name, each in own.items():
        names_of.setdefault(id(each), []).append(name)
    found: list[tuple[Tensor, Tensor]] = []
    for name, value in rest.items():
        if name not in own:
            raise CheckpointError(
                f"the adapter's file holds {name!r}, which the model lacks. Nearest: {nearest(name, own)}."
            )
        if own[name].shape != value.shape:
            raise CheckpointError(
                f"{name!r} has shape {tuple(own[name].shape)} and {tuple(value.shape)} in the adapter's file."
            )
        for twin in names_of[id(own[name])]:
            if twin != name and not torch.equal(rest.get(twin, own[name]).to(value), value):
                raise CheckpointError(
                    f"the adapter's file holds other values for {name!r} than for {twin!r}, which the model has tied: peft "
                    f"trained a copy of the one. Untie them first: model.get_submodule({twin.rpartition('.')[0]!r}).weight = "
                    f"torch.nn.Parameter(model.get_parameter({twin!r}).detach().clone())."
                )
        found.append((own[name], value))
    return found


def _missing(
    model: nn.Module, saved: Mapping[str, _Saved], config: Mapping[str, Any]
) -> list[tuple[dict[str, Json], list[str]]]:
    """Return what to attach where no adapter stands yet: the op's arguments, and the modules with these."""
    groups: dict[str, tuple[dict[str, Json], list[str]]] = {}
    for name, each in saved.items():
        module = model.get_submodule(name)
        if is_adapted(module) or _belongs_above(model, name):
            continue
        arguments: dict[str, Json] = {"rank": each.rank, "alpha": each.alpha, "dropout": float(config["lora_dropout"])}
        if config["use_rslora"]:
            arguments["rslora"] = True
        if isinstance(module, CONVOLUTIONS) and each.down.shape[1] != module.weight.shape[1]:
            arguments["dense"] = True
        groups.setdefault(repr(arguments), (arguments, []))[1].append(name)
    return list(groups.values())


def _by_groups(module: nn.Module, down: Tensor) -> Tensor:
    """Return the first convolution of a grouped one's adapter by groups, where it reads no other group's channels."""
    if not isinstance(module, CONVOLUTIONS) or module.groups == 1 or down.dim() != module.weight.dim():
        return down
    groups, rank = module.groups, len(down)
    if down.shape[1] != module.in_channels or rank % groups:
        return down
    blocks = torch.cat([part.chunk(groups, 1)[place] for place, part in enumerate(down.chunk(groups))])
    return blocks if torch.equal(_dense(blocks, groups), down) else down


def _warn_of_convolutions(modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        if isinstance(module, CONVOLUTIONS) and (module.padding_mode != "zeros" or set(module.dilation) != {1}):
            warnings.warn(
                f"peft leaves dilation and padding_mode out of the adapter of a convolution, and {name!r} has "
                f"dilation={module.dilation} and padding_mode={module.padding_mode!r}: there the two compute other things.",
                ThawlineWarning,
                stacklevel=3,
            )


def _check_shapes(model: nn.Module, saved: Mapping[str, _Saved], config: Mapping[str, Any]) -> None:
    for name, each in saved.items():
        module = cast("Any", model.get_submodule(name))
        if not is_adapted(module):
            raise CheckpointError(f"{name!r} has an adapter in the file and got none.")
        if module.lora_merged:
            raise CheckpointError(
                f"the adapter of {name!r} is merged, and what is loaded would not act. Write unmerge_lora(model) first."
            )
        for part, value in (("lora_A", each.down), ("lora_B", each.up)):
            own = module.get_parameter(part)
            if own.shape != value.shape:
                raise CheckpointError(
                    f"{part} of {name!r} has shape {tuple(own.shape)} and {tuple(value.shape)} in the adapter's file."
                )
        scaling = scaling_of(each.rank, each.alpha, rslora=bool(config["use_rslora"]))
        if abs(module.lora_scaling - scaling) > 1e-6 * scaling:
            raise CheckpointError(
                f"{name!r} carries an adapter with alpha / rank {module.lora_scaling:g} already; in the file it is {scaling:g}."
            )


def _whole(model: nn.Module, config: Mapping[str, Any]) -> Iterable[str]:
    """Return the modules that the configuration names as trained as a whole, as peft finds them: by their ends."""
    ends = tuple(config["modules_to_save"])
    names = [name for name, _ in model.named_modules() if name.endswith(ends)]
    return [name for name in names if not any(is_adapted(each) for each in model.get_submodule(name).modules())]


__all__ = ["load_adapter", "save_adapter"]
