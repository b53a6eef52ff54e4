"""Surgery ops build what is attached to a model; the ledger attaches it, records it and can undo it.

An op is a function from a :class:`Site` to :class:`Attachment` objects, registered under a name. It
changes nothing itself, so a failing op leaves the model as it was. What was attached is written in a
journal of plain JSON, from which a checkpoint rebuilds the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from attrs import Factory, field, frozen
from torch import Tensor, nn

from .errors import SurgeryError, nearest
from .typing import Json


@frozen(eq=False)
class Site:
    """Where an op is asked to work.

    Args:
        model: The whole model; read only.
        name: The module's name in it, such as ``"encoder.layer.0.attention.self.query"``.
        module: The module itself; read only.
        generator: Source of all randomness of the op: seeded by run seed, module name and op, so
            that what is built does not depend on when or in which order it is attached.
        parents: What holds each module, as :func:`parents_of` gives it for the model.
    """

    model: nn.Module
    name: str
    module: nn.Module
    generator: torch.Generator
    parents: Parents = Factory(lambda self: parents_of(self.model), takes_self=True)

    @property
    def around(self) -> dict[str, nn.Module]:
        """The modules that hold this one, directly or not, by name: outer ones first."""
        found: dict[str, nn.Module] = {}
        held = [self.module]
        while held:
            for name, parent in self.parents.get(id(held.pop()), ()):
                if name not in found:
                    found[name] = parent
                    held.append(parent)
        return dict(reversed(found.items()))


Parents = Mapping[int, Sequence[tuple[str, nn.Module]]]


def parents_of(model: nn.Module) -> Parents:
    """Return the modules that hold each module directly, with their names, by the identity of what they hold.

    Example:
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(1, 1)))
        >>> [name for name, _ in parents_of(model)[id(model[0][0])]]
        ['0']
    """
    parents: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for child in module.children():
            parents.setdefault(id(child), []).append((name, module))
    return parents


@frozen(eq=False)
class Attachment:
    """What is to be attached to one module, built but not yet attached.

    Args:
        module: Name of the module that receives it.
        parameters: New parameters by their name in the module.
        buffers: New persistent buffers by their name in the module.
        attributes: Plain attributes to set, such as a scaling factor.
        new_class: A statically defined subclass of the module's class that the instance becomes.
        beside: The module's own parameter whose layer and optimizer options the new ones take.
    """

    module: str
    parameters: Mapping[str, nn.Parameter] = field(factory=dict)
    buffers: Mapping[str, Tensor] = field(factory=dict)
    attributes: Mapping[str, object] = field(factory=dict)
    new_class: type[nn.Module] | None = None
    beside: str = "weight"


@frozen
class JournalEntry:
    """One line of the surgery journal: plain JSON, replayable."""

    module: str
    op: str
    owner: str
    arguments: dict[str, Json]


SurgeryOp = Callable[..., Sequence[Attachment]]
Op = TypeVar("Op", bound=SurgeryOp)
_OPS: dict[str, SurgeryOp] = {}


def surgery_op(name: str) -> Callable[[Op], Op]:
    """Register a surgery op under ``name``, by which journals and checkpoints refer to it.

    Args:
        name: A unique name, such as ``"lora"``.

    Raises:
        SurgeryError: Another op has this name.

    Example:
        >>> @surgery_op("doctest_gain")
        ... def gain(site, *, value=1.0):
        ...     return [Attachment(site.name, parameters={"gain": nn.Parameter(torch.tensor(value))})]
        >>> op_named("doctest_gain") is gain
        True
    """

    def register(op: Op) -> Op:
        known = _OPS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (op.__module__, op.__qualname__):
            raise SurgeryError(f"a surgery op named {name!r} exists already ({known.__module__}.{known.__qualname__}).")
        _OPS[name] = op
        return op

    return register


def op_named(name: str) -> SurgeryOp:
    """Return the op registered under ``name``; a SurgeryError lists the known ones."""
    try:
        return _OPS[name]
    except KeyError:
        known = nearest(name, sorted(_OPS)) if _OPS else "none"
        raise SurgeryError(
            f"no surgery op is registered under {name!r}; registered: {known}. "
            f"Import the module that defines it, or write @surgery_op({name!r}) above the function."
        ) from None
