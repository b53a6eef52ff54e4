"""Adapters in folders, in the format of peft: either library loads what the other saved."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..engine import CheckpointError, Json, ParameterLedger, SurgeryError, get_logger, nearest
from .adapter_config import CONFIG, TENSORS, read_adapter
from .adapter_tensors import PREFIX, Saved, belongs_above, sorted_out, tensors_of, warn_of_convolutions, written
from .lora_merge import adapted, check_adapted, ledger_of
from .lora_modules import Adapted, is_adapted
from .lora_op import CONVOLUTIONS, is_conv1d, scaling_of


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
        >>> from thawline.algorithms import inject_lora
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> adapters = inject_lora(ParameterLedger(model, torch.optim.SGD), rank=2)
        >>> folder = save_adapter(model, "adapters/mine")
        >>> folder == Path("adapters/mine"), sorted(each.name for each in folder.iterdir())
        (True, ['adapter_config.json', 'adapter_model.safetensors'])
        >>> config, tensors = read_adapter(save_adapter(model, folder))  # over the one that is there
        >>> [config[key] for key in ("r", "lora_alpha", "target_modules", "modules_to_save")]  # the head trained as a whole
        [2, 16, ['0'], ['2']]
        >>> sorted(name.removeprefix("base_model.model.") for name in tensors)
        ['0.lora_A.weight', '0.lora_B.weight', '2.bias', '2.weight']
        >>> save_adapter(nn.Linear(4, 2), "adapters/none")
        Traceback (most recent call last):
        thawline.engine.errors.SurgeryError: save_adapter: the model has no adapters. Write ..., or inject_lora(ledger).
    """
    check_adapted(model, "save_adapter")
    modules = dict(adapted(model))
    warn_of_convolutions(cast("dict[str, nn.Module]", modules))
    saved = {name: written(name, cast("nn.Module", module)) for name, module in modules.items()}
    tensors = tensors_of(model, saved)
    whole = _with_tied(model, [name for name, each in model.named_modules() if getattr(each, "lora_saved", False)])
    for name in whole:
        state: Mapping[str, Tensor] = model.get_submodule(name).state_dict()
        tensors |= {f"{PREFIX}{name}.{key}": value for key, value in state.items()}
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

    Example:
        >>> from thawline.algorithms import inject_lora, merge_lora
        >>> def build(*sizes):
        ...     inputs, hidden, classes = sizes or (4, 8, 2)
        ...     with torch.random.fork_rng():
        ...         torch.manual_seed(0)
        ...         return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))
        >>> trained, x = build(), torch.ones(1, 4)
        >>> adapters = inject_lora(ParameterLedger(trained, torch.optim.SGD), rank=2, alpha=4)
        >>> values = nn.init.ones_(trained[0].lora_B), nn.init.ones_(trained[2].weight), save_adapter(trained, "mine")
        >>> model = build()
        >>> load_adapter(model, "mine"), torch.equal(model(x), trained(x))
        (('0',), True)
        >>> values = nn.init.zeros_(model[0].lora_A), nn.init.zeros_(model[0].lora_B)
        >>> load_adapter(model, "mine"), torch.equal(model(x), trained(x))  # into the adapter that is there
        (('0',), True)
        >>> config, tensors = read_adapter(save_adapter(model, "again"))
        >>> all(torch.equal(each, tensors[name]) for name, each in read_adapter(Path("mine"))[1].items()), config["modules_to_save"]
        (True, ['2'])
        >>> ledger = ParameterLedger(build(), torch.optim.SGD)
        >>> loaded = load_adapter(ledger, "mine", owner="me")
        >>> [(entry.op, entry.module, entry.owner) for entry in ledger.journal]
        [('lora', '0', 'me'), ('lora_saved', '2', 'me')]
        >>> ledgers = [ParameterLedger(build(), torch.optim.SGD) for _ in range(2)]
        >>> adapters = inject_lora(ledgers[0], rank=4), inject_lora(ledgers[1], rank=2, alpha=8)
        >>> merged = merge_lora(model)
        >>> for other, folder in (
        ...     (build(4, 8, 3), "mine"), (build(5, 8, 2), "mine"), (nn.Linear(4, 8), "mine"), (ledgers[0], "mine"), (ledgers[1], "mine"),
        ...     (model, "mine"), (build(), "other"),
        ... ):
        ...     try:
        ...         load_adapter(other, folder)
        ...     except CheckpointError as error:
        ...         print(str(error).partition(" Write")[0])
        '2.bias' has shape (3,) and (2,) in the adapter's file.
        lora_A of '0' has shape (2, 5) and (2, 4) in the adapter's file.
        the adapter is for a module '0', which the model lacks. Nearest: ''.
        lora_A of '0' has shape (4, 4) and (2, 4) in the adapter's file.
        '0' carries an adapter with alpha / rank 4 already; in the file it is 2.
        the adapter of '0' is merged, and what is loaded would not act.
        other holds no adapter: adapter_config.json is missing.
        >>> wrong = build(5, 8, 2)
        >>> load_adapter(wrong, "mine")
        Traceback (most recent call last):
        thawline.engine.errors.CheckpointError: lora_A of '0' has shape (2, 5) and (2, 4) in the adapter's file.
        >>> type(wrong[0]), torch.equal(wrong[2].weight, build(5, 8, 2)[2].weight)  # as it was
        (<class 'torch.nn.modules.linear.Linear'>, True)
    """
    ledger, path = ledger_of(model, "load_adapter(model=)"), Path(folder)
    config, tensors = read_adapter(path)
    saved, rest = sorted_out(ledger.model, config, tensors)
    targets = _targets(ledger.model, rest)
    warn_of_convolutions({name: ledger.model.get_submodule(name) for name in saved})
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


def _with_tied(model: nn.Module, whole: list[str]) -> list[str]:
    """Return the modules that trained as a whole, and those that share a weight with them: peft trains copies, which part.

    Raises:
        SurgeryError: One of these has an adapter.

    Example:
        >>> from thawline.algorithms import inject_lora
        >>> model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "top": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5))})
        >>> _with_tied(model, ["top"]), _with_tied(model, [])
        (['top'], [])
        >>> model["top"][1].weight = model["embed"].weight
        >>> _with_tied(model, ["top"]), _with_tied(model, ["embed"])
        (['top', 'embed'], ['embed', 'top.1'])
        >>> adapters = inject_lora(ParameterLedger(model, torch.optim.SGD), "embed", rank=2, train_head=False)
        >>> _with_tied(model, ["top"])
        Traceback (most recent call last):
        thawline.engine.errors.SurgeryError: 'embed' has an adapter, and shares its weight with a module that trained as a ...
    """
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


def _config(model: nn.Module, saved: Mapping[str, Saved], whole: list[str]) -> dict[str, Json]:
    """Return what peft is to know: what most adapters have in common, and by pattern what others have.

    Example:
        >>> from thawline.algorithms import inject_lora
        >>> model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
        >>> ranks, alphas = {"1": 4, "*": 2}, {"2": 2.5, "*": 8}
        >>> adapters = inject_lora(ParameterLedger(model, torch.optim.SGD), ["0", "1", "2"], rank=ranks, alpha=alphas, dropout=0.1)
        >>> for key, value in _config(model, {name: written(name, each) for name, each in adapted(model)}, ["3"]).items():
        ...     print(key, value)
        peft_type LORA
        task_type None
        base_model_name_or_path None
        r 2
        lora_alpha 8
        lora_dropout 0.1
        rank_pattern {'^1': 4}
        alpha_pattern {'^2': 2.5}
        target_modules ['0', '1', '2']
        modules_to_save ['3']
        fan_in_fan_out False
        bias none
        use_rslora False
        use_dora False
        init_lora_weights True
        inference_mode True
        >>> from types import SimpleNamespace
        >>> attention = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 2))
        >>> attention.config = SimpleNamespace(_name_or_path="bert-base-cased")
        >>> adapters = inject_lora(ParameterLedger(attention, torch.optim.SGD), rank=2)
        >>> config = _config(attention, {name: written(name, each) for name, each in adapted(attention)}, [])
        >>> config["target_modules"], config["modules_to_save"], config["base_model_name_or_path"]  # out_proj is part of 0
        (['0'], None, 'bert-base-cased')
        >>> attention.config = SimpleNamespace(_name_or_path="")  # as transformers has it for a model that was not loaded
        >>> _config(attention, {name: written(name, each) for name, each in adapted(attention)}, [])["base_model_name_or_path"]
    """
    names = [name for name in saved if not belongs_above(model, name)]
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
    r"""Return a pattern that peft finds in this module's name alone.

    Example:
        >>> _only("encoder.0")
        '^encoder\\.0'
    """
    return f"^{re.escape(name)}"


def _exactly(model: nn.Module, names: list[str]) -> list[Json] | str:
    """Return what peft is to look for: names, or a regular expression where names would match others' ends as well.

    Example:
        >>> model = nn.ModuleDict({"query": nn.Linear(2, 2), "block": nn.ModuleDict({"query": nn.Linear(2, 2)})})
        >>> _exactly(model, ["query", "block.query"]), _exactly(model, ["block.query"])
        (['query', 'block.query'], ['block.query'])
        >>> _exactly(model, ["query"]), _exactly(model, ["query", "block"])
        ('query', 'query|block')
    """
    found = [name for name, _ in model.named_modules() if any(f".{name}".endswith(f".{each}") for each in names)]
    return [*names] if set(found) == set(names) else "|".join(map(re.escape, names))


# -- loading ---------------------------------------------------------------------------------------------------------


def _targets(model: nn.Module, rest: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return what of the model the other tensors are for, each with its tensor.

    Raises:
        CheckpointError: Tensors of another name or shape, or one value for a weight and another for what is tied to it.

    Example:
        >>> model = nn.ModuleDict({"embed": nn.Embedding(3, 1), "norm": nn.BatchNorm1d(1), "head": nn.Linear(1, 3, bias=False)})
        >>> ((own, value),) = _targets(model, {"norm.running_mean": torch.ones(1)})
        >>> own is model["norm"].running_mean, value
        (True, tensor([1.]))
        >>> model["head"].weight, one = model["embed"].weight, torch.ones(3, 1)
        >>> len(_targets(model, {"embed.weight": one, "head.weight": one}))
        2
        >>> for wrong in (
        ...     {"heads.weight": one}, {"norm.weight": torch.ones(2)}, {"head.weight": one}, {"embed.weight": one, "head.weight": one + 1},
        ... ):
        ...     try:
        ...         _targets(model, wrong)
        ...     except CheckpointError as error:
        ...         print(str(error).partition(" Untie them")[0])
        the adapter's file holds 'heads.weight', which the model lacks. Nearest: 'head.weight', ...
        'norm.weight' has shape (1,) and (2,) in the adapter's file.
        the adapter's file holds other values for 'head.weight' than for 'embed.weight', which ...: peft trained a copy of the one.
        the adapter's file holds other values for 'embed.weight' than for 'head.weight', which ...: peft trained a copy of the one.
    """
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
    model: nn.Module, saved: Mapping[str, Saved], config: Mapping[str, Any]
) -> list[tuple[dict[str, Json], list[str]]]:
    """Return what to attach where no adapter stands yet: the op's arguments, and the modules with these.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.Conv1d(4, 2, 3), nn.Conv1d(4, 2, 3, groups=2), nn.MultiheadAttention(2, 1))
        >>> linear = Saved(torch.ones(2, 4), torch.ones(2, 2), 2, 8.0)
        >>> convolution = Saved(torch.ones(2, 4, 3), torch.ones(2, 2, 1), 2, 8.0)
        >>> for each in _missing(model, {"0": linear, "1": convolution, "2": convolution}, {"lora_dropout": 0, "use_rslora": False}):
        ...     print(each)
        ({'rank': 2, 'alpha': 8.0, 'dropout': 0.0}, ['0', '1'])
        ({'rank': 2, 'alpha': 8.0, 'dropout': 0.0, 'dense': True}, ['2'])
        >>> _missing(model, {"0": linear, "3.out_proj": linear}, {"lora_dropout": 0.5, "use_rslora": True})  # that comes with "3"
        [({'rank': 2, 'alpha': 8.0, 'dropout': 0.5, 'rslora': True}, ['0'])]
    """
    groups: dict[str, tuple[dict[str, Json], list[str]]] = {}
    for name, each in saved.items():
        module = model.get_submodule(name)
        if is_adapted(module) or belongs_above(model, name):
            continue
        arguments: dict[str, Json] = {"rank": each.rank, "alpha": each.alpha, "dropout": float(config["lora_dropout"])}
        if config["use_rslora"]:
            arguments["rslora"] = True
        if isinstance(module, CONVOLUTIONS) and each.down.shape[1] != module.weight.shape[1]:
            arguments["dense"] = True
        groups.setdefault(repr(arguments), (arguments, []))[1].append(name)
    return list(groups.values())


def _check_shapes(model: nn.Module, saved: Mapping[str, Saved], config: Mapping[str, Any]) -> None:
    """Raise a CheckpointError where an adapter of the model is not one that the file's values fit.

    Example:
        >>> from thawline.algorithms import inject_lora
        >>> model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
        >>> adapters = inject_lora(ParameterLedger(model, torch.optim.SGD), rank=4, alpha=8, rslora=True)
        >>> _check_shapes(model, {"0": Saved(torch.ones(4, 4), torch.ones(6, 4), 4, 8.0)}, {"use_rslora": True})
        >>> _check_shapes(model, {"0": Saved(torch.ones(4, 4), torch.ones(6, 4), 4, 8.0)}, {"use_rslora": False})
        Traceback (most recent call last):
        thawline.engine.errors.CheckpointError: '0' carries an adapter with alpha / rank 4 already; in the file it is 2.
        >>> _check_shapes(model, {"0": Saved(torch.ones(4, 4), torch.ones(5, 4), 4, 8.0)}, {"use_rslora": True})
        Traceback (most recent call last):
        thawline.engine.errors.CheckpointError: lora_B of '0' has shape (6, 4) and (5, 4) in the adapter's file.
        >>> _check_shapes(model, {"1": Saved(torch.ones(4, 6), torch.ones(2, 4), 4, 8.0)}, {"use_rslora": True})
        Traceback (most recent call last):
        thawline.engine.errors.CheckpointError: '1' has an adapter in the file and got none.
    """
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
    """Return the modules that the configuration names as trained as a whole, as peft finds them: by their ends.

    Example:
        >>> from thawline.algorithms import inject_lora
        >>> model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2), "other": nn.ModuleDict({"head": nn.Linear(2, 2)})})
        >>> _whole(model, {"modules_to_save": ["head"]}), _whole(model, {"modules_to_save": []})
        (['head', 'other.head'], [])
        >>> adapters = inject_lora(ParameterLedger(model, torch.optim.SGD), "head", rank=2, train_head=False)
        >>> _whole(model, {"modules_to_save": ["head", "other"]})  # its adapter trained
        ['other', 'other.head']
    """
    ends = tuple(config["modules_to_save"])
    names = [name for name, _ in model.named_modules() if name.endswith(ends)]
    return [name for name in names if not any(is_adapted(each) for each in model.get_submodule(name).modules())]


__all__ = ["load_adapter", "save_adapter"]
