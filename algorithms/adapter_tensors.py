"""The tensors of an adapter in peft's file: under which name each lies there, and in which form."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from attrs import frozen
from torch import Tensor, nn

from ..engine import CheckpointError, SurgeryError, ThawlineWarning, nearest
from .adapter_config import by_pattern
from .lora_forward import spread
from .lora_op import CONVOLUTIONS, output_width

PREFIX = "base_model.model."
_KEY = re.compile(r"(?:(?P<module>.+)\.)?lora_(?P<embedding>embedding_)?(?P<part>[AB])(?:\.weight)?")
# peft (0.21) adds what the adapter of an nn.MultiheadAttention's output projection adds twice, in its forward as in its
# merge: both the attention's `merge` and that of `out_proj` do. So in its files lora_B is half of what acts. (Its
# gradients count one of the two.)
_TWICE = 2.0


@frozen
class Saved:
    """One adapter as it lies in a file.

    Args:
        down: Its lora_A.
        up: Its lora_B, as it acts.
        rank: How many rows ``down`` has.
        alpha: What is multiplied by ``up @ down`` is alpha / rank.
        embedding: Whether it is that of an embedding, which peft names otherwise.
    """

    down: Tensor
    up: Tensor
    rank: int
    alpha: float
    embedding: bool = False


def written(name: str, layer: nn.Module) -> Saved:
    """Return an adapter as peft would have it.

    Raises:
        SurgeryError: The adapters of an ``nn.MultiheadAttention`` with separate projections.

    Example:
        >>> from thawline.algorithms import inject_lora
        >>> from thawline.engine import ParameterLedger
        >>> model = nn.Sequential(nn.Linear(4, 6), nn.Conv1d(4, 2, 3, groups=2), nn.Embedding(5, 4))
        >>> adapters = inject_lora(ParameterLedger(model, torch.optim.SGD), {"0": [[4, 6]], "1": None, "2": None}, rank=2, alpha=3)
        >>> trained, slice_ = nn.init.ones_(model[0].lora_B), written("0", model[0])
        >>> slice_.rank, slice_.alpha, slice_.up[:, 0], torch.equal(slice_.down, model[0].lora_A)  # of the whole projection
        (2, 3.0, tensor([0., 0., 0., 0., 1., 1.], grad_fn=<SelectBackward0>), True)
        >>> grouped, embedding = written("1", model[1]), written("2", model[2])
        >>> tuple(model[1].lora_A.shape), tuple(grouped.down.shape), tuple(grouped.up.shape)  # in peft it reads all channels
        ((2, 2, 3), (2, 4, 3), (2, 1, 1))
        >>> slice_.embedding, grouped.embedding, embedding.embedding
        (False, False, True)
        >>> apart = nn.MultiheadAttention(4, 2, kdim=3)
        >>> adapters = inject_lora(ParameterLedger(apart, torch.optim.SGD), "*", rank=2)
        >>> written("attention", apart)
        Traceback (most recent call last):
        thawline.engine.errors.SurgeryError: 'attention' has separate projections (kdim, vdim), for whose adapters peft's ...
    """
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
    return Saved(down, up, rank, module.lora_scaling * rank, isinstance(layer, nn.Embedding))


def tensors_of(model: nn.Module, saved: Mapping[str, Saved]) -> dict[str, Tensor]:
    """Return the tensors of adapters, given by their modules' names, under their own names in peft's file.

    Example:
        >>> model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Embedding(5, 4))
        >>> adapter = Saved(torch.ones(2, 4), torch.ones(4, 2), 2, 4.0)
        >>> for name, each in tensors_of(model, {"0": adapter, "0.out_proj": adapter}).items():
        ...     print(name, each.max().item())
        base_model.model.0.lora_A.weight 1.0
        base_model.model.0.lora_B.weight 1.0
        base_model.model.0.base_layer.out_proj.lora_A.weight 1.0
        base_model.model.0.base_layer.out_proj.lora_B.weight 0.5
        >>> list(tensors_of(model, {"1": Saved(torch.ones(2, 5), torch.ones(4, 2), 2, 4.0, embedding=True)}))
        ['base_model.model.1.lora_embedding_A', 'base_model.model.1.lora_embedding_B']
    """
    tensors: dict[str, Tensor] = {}
    for name, each in saved.items():
        path = _path_in_peft(model, name)
        kind = "embedding_{}" if each.embedding else "{}.weight"
        tensors[f"{PREFIX}{path}lora_{kind.format('A')}"] = each.down
        tensors[f"{PREFIX}{path}lora_{kind.format('B')}"] = each.up / _TWICE if belongs_above(model, name) else each.up
    return tensors


def _dense(down: Tensor, groups: int) -> Tensor:
    """Return the first convolution of an adapter with groups as one that reads all channels: zeros elsewhere.

    Example:
        >>> _dense(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]), 2)  # two ranks and two channels a group
        tensor([[1., 2., 0., 0.],
                [3., 4., 0., 0.],
                [0., 0., 5., 6.],
                [0., 0., 7., 8.]])
        >>> _dense(torch.ones(4, 1, 3, 5), 2).shape, _dense(torch.ones(1, 2, dtype=torch.float64), 1).dtype
        (torch.Size([4, 2, 3, 5]), torch.float64)
    """
    rank, channels = down.shape[0] // groups, down.shape[1]
    whole = down.new_zeros(down.shape[0], channels * groups, *down.shape[2:])
    for group in range(groups):
        ranks = slice(group * rank, (group + 1) * rank)
        whole[ranks, group * channels : (group + 1) * channels] = down[ranks]
    return whole


def _path_in_peft(model: nn.Module, name: str) -> str:
    """Return a module's name in peft's model, with a dot behind it.

    Example:
        >>> model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
        >>> _path_in_peft(model, "attention"), _path_in_peft(model, "attention.out_proj")
        ('attention.', 'attention.base_layer.out_proj.')
        >>> _path_in_peft(model["attention"], ""), _path_in_peft(model["attention"], "out_proj")
        ('', 'base_layer.out_proj.')
    """
    above = name.rpartition(".")[0]
    if belongs_above(model, name):
        return f"{above}.base_layer.out_proj." if above else "base_layer.out_proj."
    return f"{name}." if name else ""


def belongs_above(model: nn.Module, name: str) -> bool:
    """Return whether a module is the output projection of an ``nn.MultiheadAttention``, which brings its adapter.

    Example:
        >>> model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 4))
        >>> belongs_above(model, "0.out_proj"), belongs_above(model, "0"), belongs_above(model, "1")
        (True, False, False)
        >>> belongs_above(model[0], "out_proj"), belongs_above(model[0], "")
        (True, False)
    """
    parent = model.get_submodule(name.rpartition(".")[0])
    return bool(name) and isinstance(parent, nn.MultiheadAttention) and model.get_submodule(name) is parent.out_proj


def sorted_out(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Saved], dict[str, Tensor]]:
    """Return the adapters by module, in the model's order, and the other tensors by their names in the model.

    Raises:
        CheckpointError: Tensors of another library or another model, half an adapter, or none.

    Example:
        >>> model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 2), nn.Linear(2, 2))
        >>> config = {"lora_alpha": 16, "alpha_pattern": {"1": 3}}
        >>> pair = {"lora_A.weight": torch.ones(2, 4), "lora_B.weight": torch.ones(4, 2)}
        >>> def file(**modules):
        ...     return {f"base_model.model.{name}.{part}": each for name, made in modules.items() for part, each in made.items()}
        >>> found, rest = sorted_out(model, config, file(**{"1": pair, "0.base_layer.out_proj": pair, "2": {"bias": torch.ones(2)}}))
        >>> [(name, each.rank, each.alpha, each.up.max().item()) for name, each in found.items()], rest
        ([('0.out_proj', 2, 16, 2.0), ('1', 2, 3.0, 1.0)], {'2.bias': tensor([1., 1.])})
        >>> copies = {"base_model.model.2.original_module.bias": torch.ones(2)}  # peft saves such with bias="all"
        >>> sorted_out(model, config, file(**{"1": pair}) | copies)[1]
        {}
        >>> for wrong in (
        ...     {"1.lora_A.weight": torch.ones(2, 4)}, file(head=pair), file(**{"1": {"lora_A.weight": torch.ones(2, 4)}}),
        ...     file(**{"1": {"bias": torch.ones(2)}}),
        ... ):
        ...     try:
        ...         sorted_out(model, config, wrong)
        ...     except CheckpointError as error:
        ...         print(error)
        the adapter's tensor '1.lora_A.weight' does not begin with 'base_model.model.', as peft's do.
        the adapter is for a module 'head', which the model lacks. Nearest: ...
        the adapter of '1' lacks one of lora_A and lora_B.
        the file holds no adapters.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    known = {name for name, _ in model.named_modules()}
    for key, value in tensors.items():
        if not key.startswith(PREFIX):
            raise CheckpointError(f"the adapter's tensor {key!r} does not begin with {PREFIX!r}, as peft's do.")
        name = _in_model(key.removeprefix(PREFIX), known)
        if name is None:
            continue
        if (match := _KEY.fullmatch(name)) is None:
            rest[name] = value
        else:
            pairs.setdefault(match["module"] or "", {})[match["part"]] = value
    found: dict[str, Saved] = {}
    for name, pair in pairs.items():
        if name not in known:
            raise CheckpointError(
                f"the adapter is for a module {name!r}, which the model lacks. Nearest: {nearest(name, known)}."
            )
        if pair.keys() != {"A", "B"}:
            raise CheckpointError(f"the adapter of {name!r} lacks one of lora_A and lora_B.")
        alpha = by_pattern(config["alpha_pattern"], name, config["lora_alpha"])
        down = _by_groups(model.get_submodule(name), pair["A"])
        up = pair["B"] * _TWICE if belongs_above(model, name) else pair["B"]
        found[name] = Saved(down, up, len(down), alpha)
    if not found:
        raise CheckpointError("the file holds no adapters.")
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return {name: found[name] for name in sorted(found, key=order.__getitem__)}, rest


def _in_model(key: str, known: set[str]) -> str | None:
    """Return a tensor's name in the model; None for a second copy, which peft saves with ``bias="all"``.

    peft puts the modules that it wraps under ``base_layer``; a model may have modules of that name as well.

    Example:
        >>> _in_model("0.base_layer.out_proj.lora_A.weight", {"", "0", "0.out_proj"})
        '0.out_proj.lora_A.weight'
        >>> _in_model("base_layer.0.bias", {"", "base_layer", "base_layer.0"}), _in_model("lora_embedding_A", {""})
        ('base_layer.0.bias', 'lora_embedding_A')
        >>> _in_model("2.modules_to_save.bias", {"", "2"}), _in_model("2.original_module.bias", {"", "2"})
        (None, None)
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


def _by_groups(module: nn.Module, down: Tensor) -> Tensor:
    """Return the first convolution of a grouped one's adapter by groups, where it reads no other group's channels.

    Example:
        >>> grouped, by_groups = nn.Conv1d(4, 2, 1, groups=2), torch.arange(1.0, 5.0).view(2, 2, 1)
        >>> dense = _dense(by_groups, 2)
        >>> torch.equal(_by_groups(grouped, dense), by_groups), tuple(_by_groups(grouped, dense + 1).shape)
        (True, (2, 4, 1))
        >>> tuple(_by_groups(grouped, torch.ones(3, 4, 1)).shape), tuple(_by_groups(grouped, by_groups).shape)  # left as they are
        ((3, 4, 1), (2, 2, 1))
        >>> _by_groups(nn.Conv1d(4, 2, 1), dense) is dense, _by_groups(nn.Linear(4, 2), by_groups) is by_groups
        (True, True)
    """
    if not isinstance(module, CONVOLUTIONS) or module.groups == 1 or down.dim() != module.weight.dim():
        return down
    groups, rank = module.groups, len(down)
    if down.shape[1] != module.in_channels or rank % groups:
        return down
    blocks = torch.cat([part.chunk(groups, 1)[place] for place, part in enumerate(down.chunk(groups))])
    return blocks if torch.equal(_dense(blocks, groups), down) else down


def warn_of_convolutions(modules: Mapping[str, nn.Module]) -> None:
    """Warn of convolutions whose adapters peft computes otherwise.

    Example:
        >>> layers = {"plain": nn.Conv1d(2, 2, 3), "wide": nn.Conv1d(2, 2, 3, dilation=2), "round": nn.Conv1d(2, 2, 3, padding_mode="circular")}
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn_of_convolutions({"linear": nn.Linear(2, 2), **layers})
        >>> [str(each.message).partition(", and ")[2] for each in caught]
        ["'wide' has dilation=(2,) and padding_mode='zeros': there ...", "'round' has dilation=(1,) and padding_mode='circular': there ..."]
    """
    for name, module in modules.items():
        if isinstance(module, CONVOLUTIONS) and (module.padding_mode != "zeros" or set(module.dilation) != {1}):
            warnings.warn(
                f"peft leaves dilation and padding_mode out of the adapter of a convolution, and {name!r} has "
                f"dilation={module.dilation} and padding_mode={module.padding_mode!r}: there the two compute other things.",
                ThawlineWarning,
                stacklevel=3,
            )


__all__ = ["PREFIX", "Saved", "belongs_above", "sorted_out", "tensors_of", "warn_of_convolutions", "written"]
