"""A model's twin on the meta device: everything about it but its numbers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .errors import ArgumentError

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def meta_twin(model: nn.Module, *, full: bool = False) -> tuple[nn.Module, dict[int, nn.Parameter]]:
    """Return a copy of a model whose parameters and buffers have shapes and no storage.

    Nothing of the model is read but shapes, nothing of it is changed, and no second copy of its weights exists at any
    time. Tied parameters stay tied, adapters attached. The user's hooks on its modules are left out.

    Args:
        model: Any module that ``copy.deepcopy`` copies.
        full: Let every floating-point parameter require a gradient, instead of those that do in the model.

    Returns:
        The twin, and its parameters by the ``id`` of the model's.

    Raises:
        ArgumentError: The model cannot be copied.

    Example:
        >>> twin, _ = meta_twin(nn.Linear(10**6, 10**6, device="meta"))
        >>> twin.weight.shape, twin.weight.device.type
        (torch.Size([1000000, 1000000]), 'meta')
    """
    twins: dict[int, nn.Parameter] = {}
    for each in model.parameters():
        trains = each.is_floating_point() or each.is_complex() if full else each.requires_grad
        twin = nn.Parameter(torch.empty_like(each, device="meta"), requires_grad=trains)
        vars(twin).update(vars(each))  # marks such as "no weight decay"
        twins[id(each)] = twin
    memo: dict[int, object] = dict(twins)
    for module in model.modules():
        for value in (*module._buffers.values(), *vars(module).values()):
            if isinstance(value, Tensor):
                memo.setdefault(id(value), torch.empty_like(value.detach(), device="meta"))
    try:
        copied = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, NotImplementedError, AttributeError) as error:
        raise ArgumentError(
            "Trainer.plan(model=)", got=type(model).__name__, takes=f"a model that can be copied; copying says: {error}",
            example="copy.deepcopy(model) must work: build what cannot be copied in forward()",
        ) from error  # fmt: skip
    for module in copied.modules():
        for name in _HOOKS:
            vars(module)[name].clear()
    return copied, twins
