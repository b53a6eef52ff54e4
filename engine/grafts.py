"""Grafts: an attachment on the model, and the way back. Only the ledger calls this."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Final

import torch
from attrs import Factory, define, frozen
from torch import nn

from .errors import SurgeryError, nearest
from .surgery import Attachment, JournalEntry, Parents, Site, op_named
from .typing import Json


class _Missing(Enum):
    """Stands for an attribute that was not there; a member of an Enum, since its identity survives copy and pickle."""

    MISSING = 0


_MISSING: Final = _Missing.MISSING
_RECORD: Final = "_thawline_surgery"
# Attribute overrides by (module, attribute): the original value, and how many grafts set it. The original returns
# with the last of them, in whichever order they are undone.
Overrides = dict[tuple[str, str], tuple[object, int]]


@frozen(eq=False)
class Graft:
    """What was attached to one module.

    Args:
        module: The module's name.
        parameters: Full names of the new parameters.
        buffers: Names of the new buffers in the module.
        attributes: Names of the attributes that were set.
        beside: Full name of the parameter whose layer and options the new ones take.
        old_class: The class to restore, and the one that was given; None where it stayed.
        new_class: See ``old_class``.
    """

    module: str
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    attributes: tuple[str, ...]
    beside: str
    old_class: type[nn.Module] | None
    new_class: type[nn.Module] | None


@define(eq=False)
class Record:
    """What is attached to a model, in order, and how to undo it.

    It lies on the model and so goes where the model goes: the next ledger over it, or over a copy of it, knows what is
    attached, can undo it, and writes it into its own checkpoints.
    """

    entries: list[tuple[JournalEntry, tuple[Graft, ...]]] = Factory(list[tuple[JournalEntry, tuple[Graft, ...]]])
    overrides: Overrides = Factory(Overrides)


def record_of(model: nn.Module) -> Record:
    """Return the record of a model; an empty one, not yet kept, where nothing is attached."""
    record = vars(model).get(_RECORD)
    return record if isinstance(record, Record) else Record()


def keep_record(model: nn.Module, record: Record) -> None:
    """Keep a record on its model; a model without attachments is as it was."""
    if record.entries:
        vars(model)[_RECORD] = record
    else:
        vars(model).pop(_RECORD, None)


def build_grafts(
    model: nn.Module,
    name: str,
    op: str,
    arguments: Mapping[str, Json],
    *,
    overrides: Overrides,
    seed: int,
    parents: Parents,
) -> tuple[Graft, ...]:
    """Build what a surgery op attaches to the module called ``name``, and put it on.

    Args:
        model: The model.
        name: The module's name.
        op: Name of a registered op.
        arguments: The op's.
        overrides: The model's record of attributes that were set.
        seed: Of the run: what is drawn depends on it, the module and the op alone.
        parents: What holds each module of the model.

    Raises:
        SurgeryError: No such module or op, or the op refuses the module. The model is as before.
    """
    try:
        module = model.get_submodule(name)
    except (AttributeError, TypeError):
        known = nearest(str(name), [each for each, _ in model.named_modules() if each])
        raise SurgeryError(f"the model has no module {name!r}. Nearest: {known}.") from None
    drawn = int.from_bytes(hashlib.sha256(f"{seed}/{name}/{op}".encode()).digest()[:8]) >> 1
    attachments = tuple(
        op_named(op)(Site(model, name, module, torch.Generator().manual_seed(drawn), parents), **arguments)
    )
    check_grafts(model, attachments, op)
    return tuple(apply_graft(model, each, overrides) for each in attachments)


def check_grafts(model: nn.Module, attachments: Sequence[Attachment], op: str) -> None:
    """Raise a SurgeryError for what cannot be attached, before anything is."""
    for each in attachments:
        module = model.get_submodule(each.module)
        for name in (*each.parameters, *each.buffers):
            if hasattr(module, name):
                raise SurgeryError(
                    f"{op!r} wants to attach {name!r} to {each.module!r}, which has one already. Detach the first: "
                    f"ledger.detach({each.module!r}, {op!r}, owner=...), or leave out what has it, as in a second fit: "
                    f"[… for … if not hasattr(module, {name!r})]."
                )
        if each.parameters and each.beside not in module._parameters:
            raise SurgeryError(f"{op!r} attaches beside {each.beside!r}, which {each.module!r} does not have.")
        if each.new_class is not None and not issubclass(each.new_class, type(module)):
            raise SurgeryError(
                f"{op!r} makes {each.module!r} a {each.new_class.__name__}, which is no subclass of its class "
                f"{type(module).__name__}. Leave this module out, or write class {each.new_class.__name__}({type(module).__name__})."
            )


def apply_graft(model: nn.Module, attachment: Attachment, overrides: Overrides) -> Graft:
    """Attach; the caller has checked that it can be."""
    module = model.get_submodule(attachment.module)
    path = f"{attachment.module}." if attachment.module else ""
    old_class = type(module) if attachment.new_class is not None else None
    if attachment.new_class is not None:
        module.__class__ = attachment.new_class
    for name, parameter in attachment.parameters.items():
        module.register_parameter(name, parameter)
    for name, buffer in attachment.buffers.items():
        module.register_buffer(name, buffer)
    for name, value in attachment.attributes.items():
        key = (attachment.module, name)
        original, count = overrides.get(key, (module.__dict__.get(name, _MISSING), 0))
        overrides[key] = (original, count + 1)
        setattr(module, name, value)
    return Graft(
        attachment.module,
        tuple(f"{path}{name}" for name in attachment.parameters),
        tuple(attachment.buffers),
        tuple(attachment.attributes),
        f"{path}{attachment.beside}",
        old_class,
        attachment.new_class,
    )


def undo_graft(model: nn.Module, graft: Graft, overrides: Overrides) -> None:
    """Take off what :func:`apply_graft` put on."""
    module: Any = model.get_submodule(graft.module)
    if graft.new_class is not None and type(module) is not graft.new_class:
        raise SurgeryError(f"something was attached to {graft.module!r} on top of this. Detach that first.")
    for name in (*(each.rpartition(".")[2] for each in graft.parameters), *graft.buffers):
        delattr(module, name)
    for name in graft.attributes:
        original, count = overrides[graft.module, name]
        if count > 1:
            overrides[graft.module, name] = (original, count - 1)
            continue
        del overrides[graft.module, name]
        if original is _MISSING:
            delattr(module, name)
        else:
            setattr(module, name, original)
    if graft.old_class is not None:
        module.__class__ = graft.old_class
