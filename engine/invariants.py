"""The invariants of the ledger, checked against the live model and optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .clock import Clock
from .errors import LedgerError
from .groups import Slot
from .holds import Holds


def check_groups(
    optimizers: Sequence[Optimizer],
    live: Mapping[Slot, dict[str, Any]],
    parameters: Mapping[str, nn.Parameter],
    trainable: AbstractSet[str],
) -> None:
    """Check that the groups are the ledger's own, none empty, and together the trainable set, each parameter once."""
    names = {id(each): name for name, each in parameters.items()}
    seen: set[str] = set()
    for index, optimizer in enumerate(optimizers):
        mine = [id(group) for slot, group in live.items() if slot.home.optimizer == index]
        if mine != [id(group) for group in optimizer.param_groups]:
            known = set(mine)
            added = [p for group in optimizer.param_groups if id(group) not in known for p in group["params"]]
            moved = added or [
                p for slot, group in live.items() if slot.home.optimizer == index for p in group["params"]
            ]
            first = names.get(id(moved[0])) if moved else "none"
            what = f"optimizer {index} ({type(optimizer).__name__})"
            if first is None:
                raise LedgerError(
                    f"{what} was given a parameter that the model does not have. Write ledger.attach(module, op, owner=...) for one "
                    "that joins the model, and train others with an optimizer of their own."
                )
            raise LedgerError(
                f"the groups of {what} were changed behind the ledger, that of {first!r} among them. Write ledger.freeze, thaw, "
                f"scale or set_lr({first!r}, …, owner=...) instead of editing optimizer.param_groups."
            )
        for group in optimizer.param_groups:
            if not group["params"]:
                raise LedgerError(f"optimizer {index} has an empty group. Write ledger.freeze(select, owner=...).")
            for parameter in group["params"]:
                name = names.get(id(parameter), "a foreign parameter")
                if name not in trainable:
                    raise LedgerError(
                        f"{name!r} is in a group but frozen: it was put there behind the ledger. Write "
                        f"ledger.thaw({name!r}, owner=...)."
                    )
                if name in seen:
                    raise LedgerError(f"{name!r} is in two groups. Put it into a group through the ledger alone.")
                seen.add(name)
    for name in parameters:
        if name in trainable and name not in seen:
            raise LedgerError(
                f"{name!r} trains but is in no optimizer group: it was taken out behind the ledger. Write "
                f"ledger.freeze({name!r}, owner=...)."
            )


def check_parameter(
    name: str, parameter: nn.Parameter, *, trains: bool, holders: Sequence[str], has_state: bool
) -> None:
    """Check that one parameter's flags, gradient and optimizer state agree with who holds it."""
    if parameter.requires_grad != trains:
        call, held = ("thaw", f" (held by {', '.join(holders)})") if parameter.requires_grad else ("freeze", "")
        raise LedgerError(
            f"{name!r} has requires_grad={parameter.requires_grad}, set behind the ledger{held}. "
            f"Write ledger.{call}({name!r}, owner=...)."
        )
    if trains and holders:
        raise LedgerError(f"{name!r} trains though it is held by {', '.join(holders)}.")
    if not trains and not holders:
        raise LedgerError(f"{name!r} is frozen though nobody holds it.")
    if not trains and parameter.grad is not None:
        raise LedgerError(
            f"{name!r} is frozen but has a .grad, which clipping would count. Leave gradients to the ledger."
        )
    if not trains and has_state:
        raise LedgerError(f"{name!r} is frozen but has optimizer state. Write ledger.freeze({name!r}, owner=...).")


def check_options(live: Mapping[Slot, dict[str, Any]], members: Mapping[Slot, list[str]]) -> None:
    """Check that each group says what was set for it, and what the user gave where nothing was."""
    for slot, group in live.items():
        for option, value in slot.set_options.items():
            if group[option] != value:
                raise LedgerError(
                    f"{option} of the group of {members[slot][0]!r} is {group[option]}, and {value} was set. "
                    f"Write ledger.set_options(select, {option}={value}, owner=...)."
                )


def check_slots(members: Mapping[Slot, list[str]], holds: Holds) -> None:
    """Assert that each parameter has the base rate that was set for it, its home's where none was, and its factor."""
    for slot, names in members.items():
        for name in names:
            asked = holds.set_for(name).get("lr", slot.home.lr), holds.factor(name)
            assert (slot.base_lr, slot.scale) == asked, (
                f"{name!r} has base rate and scale {slot.base_lr, slot.scale}, not {asked}"
            )


def check_rates(
    live: Mapping[Slot, dict[str, Any]], members: Mapping[Slot, list[str]], factor: float, clock: Clock, floor: float
) -> None:
    """Check that each group's learning rate is the function of base rate, factors, schedule and warmup."""
    for slot, group in live.items():
        if slot.base_lr is None:
            continue
        rate, expected = group["lr"], slot.lr(factor, clock, floor)
        if isinstance(rate, Tensor):
            expected = torch.tensor(expected, dtype=rate.dtype).item()
        if float(rate) != expected:
            raise LedgerError(
                f"the learning rate of the group of {members[slot][0]!r} is {float(group['lr'])}, which is not base "
                f"{slot.base_lr} x scale {slot.scale} x schedule {factor}. Write ledger.set_lr or ledger.scale."
            )
