"""Merging adapters into the weights and back, and taking them off, between any two steps."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ..engine import ArgumentError, Attachment, ParameterLedger, Site, SurgeryError, get_logger, surgery_op
from .lora_modules import Adapted, adapter_names, wide

OPS = ("lora", "lora_saved", "lora_merged")
_OWNER = "merge_lora"
_ASIDE = "_unmerged"


def merge_lora(model: nn.Module | ParameterLedger) -> tuple[str, ...]:
    """Add what each adapter adds to the weight it stands beside, and let the adapter itself stand still.

    The weights as they were are kept as buffers (``weight_unmerged``), so that :func:`unmerge_lora` is exact. Through a
    ledger the merged adapters are held meanwhile, their optimizer state kept.

    Args:
        model: The model; within a fit its ledger, at an event where that is open.

    Returns:
        Names of the modules whose adapters were merged now.

    Raises:
        SurgeryError: The model has no adapters; a weight is shared with a module that has no such adapter, and would change there as well; or the
            adapter of a convolution with groups reads all channels, as peft's do. Nothing was merged then.

    Example:
        >>> from thawline.algorithms import LoRAInject, inject_lora
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> adapters = inject_lora(ParameterLedger(model, partial(torch.optim.SGD, lr=0.1)), rank=2)
        >>> merge_lora(model), model[0].lora_merged
        (('0',), True)
        >>> unmerge_lora(model), model[0].lora_merged
        (('0',), False)
        >>> ledger = ParameterLedger(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), partial(torch.optim.SGD, lr=0.1))
        >>> adapters = inject_lora(ledger, rank=2, alpha=6)
        >>> layer, before = ledger.model[0], ledger.model[0].weight.detach().clone()
        >>> filled, merged, sum_of_both = nn.init.ones_(layer.lora_B), merge_lora(ledger), before + 3 * layer.lora_B @ layer.lora_A
        >>> torch.allclose(layer.weight, sum_of_both, atol=1e-6), merge_lora(ledger)  # once only
        (True, ())
        >>> ledger.trainable & set(adapters), unmerge_lora(ledger)  # held while they are merged
        (frozenset(), ('0',))
        >>> ledger.trainable >= set(adapters), torch.equal(layer.weight, before)
        (True, True)
        >>> merge_lora(nn.Linear(2, 2))
        Traceback (most recent call last):
        thawline.engine.errors.SurgeryError: merge_lora: the model has no adapters. Write Trainer(algorithms=[LoRAInject()]), ...
    """
    ledger = ledger_of(model, "merge_lora(model=)")
    check_adapted(ledger.model, "merge_lora")
    found = {name: module for name, module in adapted(ledger.model) if not module.lora_merged}
    for name, module in found.items():
        _check(ledger.model, name, module)
    names = [entry.module for entry in ledger.journal if entry.op == "lora" and _any_of(ledger, entry.module, found)]
    with ledger.at_once():
        if names:
            ledger.attach(names, "lora_merged", owner=_OWNER)
        with torch.no_grad():
            for module in found.values():
                for weight, delta in module.lora_deltas().items():
                    target = module.get_parameter(weight)
                    target.copy_(target.to(wide(target)) + delta)
        if isinstance(model, ParameterLedger) and found:
            ledger.freeze(_parameters(found), owner=_OWNER, moments="keep")
    get_logger(__name__).info("merged", modules=len(found))
    return tuple(names)


def unmerge_lora(model: nn.Module | ParameterLedger) -> tuple[str, ...]:
    """Put the weights back as they were before :func:`merge_lora`, bit for bit, and let the adapters act again.

    Args:
        model: The model; within a fit its ledger, at an event where that is open.

    Returns:
        Names of the modules whose adapters were unmerged.

    Raises:
        SurgeryError: The model has no adapters.

    Example:
        >>> from thawline.algorithms import inject_lora
        >>> ledger = ParameterLedger(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.optim.SGD)
        >>> adapters = inject_lora(ledger, ["0", "1"], rank=2)
        >>> layer, before = ledger.model[0], ledger.model[0].weight.detach().clone()
        >>> learned, merged = nn.init.ones_(layer.lora_B), merge_lora(ledger)
        >>> torch.equal(layer.weight, before), ledger.trainable
        (False, frozenset())
        >>> unmerge_lora(ledger), torch.equal(layer.weight, before), ledger.trainable == set(adapters), list(dict(layer.named_buffers()))
        (('0', '1'), True, True, [])
        >>> unmerge_lora(ledger.model), unmerge_lora(ledger)  # nothing is merged
        ((), ())
        >>> unmerge_lora(nn.Linear(2, 2))
        Traceback (most recent call last):
        thawline.engine.errors.SurgeryError: unmerge_lora: the model has no adapters. Write ...
    """
    ledger = ledger_of(model, "unmerge_lora(model=)")
    check_adapted(ledger.model, "unmerge_lora")
    found = {name: module for name, module in adapted(ledger.model) if module.lora_merged}
    names = [entry.module for entry in ledger.journal if entry.op == "lora_merged"]
    with torch.no_grad():
        for module in found.values():
            for weight in _weights(module):
                module.get_parameter(weight).copy_(module.get_buffer(f"{weight}{_ASIDE}"))
    with ledger.at_once():
        for name in reversed(names):
            ledger.detach(name, "lora_merged", owner=_OWNER)
        if isinstance(model, ParameterLedger) and found:
            ledger.thaw(_parameters(found), owner=_OWNER)
    return tuple(names)


def remove_lora(model: nn.Module | ParameterLedger) -> tuple[str, ...]:
    """Take all adapters off: modules have their classes and names back, and weights that were merged stay so.

    Who held the base weights goes on holding them: ``ledger.thaw("*", owner=…)`` releases them.

    Args:
        model: The model; within a fit its ledger, at an event where that is open.

    Returns:
        Names of the modules that had adapters.

    Example:
        >>> from thawline.algorithms import inject_lora
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> adapters = inject_lora(ParameterLedger(model, partial(torch.optim.SGD, lr=0.1)), rank=2)
        >>> remove_lora(model), type(model[0]).__name__
        (('0',), 'Linear')
        >>> adapters, x = inject_lora(ParameterLedger(model, torch.optim.SGD), rank=2), torch.ones(1, 4)
        >>> filled, learned = nn.init.ones_(model[0].lora_B), model(x)
        >>> merge_lora(model), remove_lora(model), torch.allclose(model(x), learned, atol=1e-6), list(model.state_dict())
        (('0',), ('0',), True, ['0.weight', '0.bias', '2.weight', '2.bias'])
    """
    ledger = ledger_of(model, "remove_lora(model=)")
    entries = [entry for entry in ledger.journal if entry.op in OPS]
    with ledger.at_once():
        for entry in reversed(entries):
            ledger.detach(entry.module, entry.op, owner=entry.owner)
    return tuple(entry.module for entry in entries if entry.op == "lora")


@surgery_op("lora_merged")
def lora_merged(site: Site) -> list[Attachment]:
    """Keep the weights of an adapted module aside, and let its adapter stand still; who attaches it writes the weights.

    Example:
        >>> from thawline.algorithms import inject_lora
        >>> attention = nn.MultiheadAttention(4, 2)
        >>> adapters = inject_lora(ParameterLedger(attention, torch.optim.SGD), "*", rank=2)
        >>> for each in lora_merged(Site(attention, "", attention, torch.Generator())):
        ...     print(repr(each.module), list(each.buffers), each.attributes)
        '' ['in_proj_weight_unmerged'] {'lora_merged': True}
        'out_proj' ['weight_unmerged'] {'lora_merged': True}
    """
    made: list[Attachment] = []
    for name, module in adapted(site.model):
        if name == site.name or name == f"{site.name}.out_proj".lstrip("."):
            aside = {f"{weight}{_ASIDE}": module.get_parameter(weight).detach().clone() for weight in _weights(module)}
            made.append(Attachment(name, buffers=aside, attributes={"lora_merged": True}))
    return made


def ledger_of(model: nn.Module | ParameterLedger, argument: str) -> ParameterLedger:
    """Return the ledger that is given, or one over the model for a change outside of a fit.

    Raises:
        ArgumentError: It is neither; the error names the argument.

    Example:
        >>> ledger = ParameterLedger(nn.Linear(2, 2), torch.optim.SGD)
        >>> ledger_of(ledger, "…") is ledger, ledger_of(ledger.model, "…").model is ledger.model
        (True, True)
        >>> ledger_of("model.pt", "merge_lora(model=)")
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: merge_lora(model=) takes a torch.nn.Module, or its ledger, got 'model.pt'. Write: merge_lora(model)
    """
    if isinstance(model, ParameterLedger):
        return model
    _check_module(model, argument, "a torch.nn.Module, or its ledger")
    return ParameterLedger(model, partial(torch.optim.SGD, lr=0.0))


def adapted(model: nn.Module) -> Iterator[tuple[str, _Module]]:
    """Yield the modules with adapters, by their first name."""
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            yield name, cast("_Module", module)


def check_adapted(model: nn.Module, function: str) -> None:
    """Raise a SurgeryError where the model has no adapters, an ArgumentError where it is none.

    Example:
        >>> check_adapted(nn.Linear(2, 2), "save_adapter")
        Traceback (most recent call last):
        thawline.engine.errors.SurgeryError: save_adapter: the model has no adapters. Write ..., or inject_lora(ledger).
        >>> check_adapted("model.pt", "save_adapter")
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: save_adapter(model=) takes a torch.nn.Module, got 'model.pt'. Write: save_adapter(model)
    """
    _check_module(model, f"{function}(model=)", "a torch.nn.Module")
    if next(adapted(model), None) is None:
        raise SurgeryError(
            f"{function}: the model has no adapters. Write Trainer(algorithms=[LoRAInject()]), or inject_lora(ledger)."
        )


def _check_module(model: object, argument: str, takes: str) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(argument, got=model, takes=takes, example=f"{argument.partition('(')[0]}(model)")


class _Module(Adapted, nn.Module):
    """What every adapted module is, for the type checker."""


def _weights(module: _Module) -> list[str]:
    return [name for name in module.adapts if module._parameters.get(name) is not None]


def _any_of(ledger: ParameterLedger, name: str, found: dict[str, _Module]) -> bool:
    return any(each is ledger.model.get_submodule(name) for each in found.values())


def _parameters(modules: dict[str, _Module]) -> list[str]:
    return [f"{name}.{each}".lstrip(".") for name, module in modules.items() for each in adapter_names(module)]


def _check(model: nn.Module, name: str, module: _Module) -> None:
    """Raise a SurgeryError for an adapter that has no place in the weight, and for a weight that others use as well.

    Example:
        >>> from thawline.algorithms import inject_lora
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.Conv1d(2, 2, 1, groups=2))
        >>> model[1].weight = model[0].weight
        >>> ledger = ParameterLedger(model, torch.optim.SGD)
        >>> adapters, dense = inject_lora(ledger, ["0", "2"], rank=2), ledger.attach("3", "lora", owner="me", rank=2, alpha=4, dense=True)
        >>> _check(model, "2", model[2])
        >>> _check(model, "0", model[0])
        Traceback (most recent call last):
        thawline.engine.errors.SurgeryError: the weight of '0' is tied to that of '1', where a merge would change it as well. ...
        >>> _check(model, "3", model[3])
        Traceback (most recent call last):
        thawline.engine.errors.SurgeryError: the adapter of '3' reads the channels of all 2 groups, as peft's does, ...
    """
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.lora_A.shape[1] != module.weight.shape[1]:
        raise SurgeryError(
            f"the adapter of {name!r} reads the channels of all {module.groups} groups, as peft's does, and the weight has "
            "no place for that. Leave it unmerged."
        )
    mine: dict[int, Tensor] = {
        id(module.get_parameter(weight)): module.get_parameter(weight) for weight in _weights(module)
    }
    for other_name, other in model.named_modules():
        if other is not module and any(id(each) in mine for each in other.parameters(recurse=False)):
            raise SurgeryError(
                f"the weight of {name!r} is tied to that of {other_name!r}, where a merge would change it as well. "
                "Leave it unmerged, or untie them first."
            )


__all__ = ["OPS", "adapted", "check_adapted", "ledger_of", "lora_merged", "merge_lora", "remove_lora", "unmerge_lora"]
