"""The order in which a model uses its parameters, recorded from one forward pass that leaves no trace."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from .log import get_logger

log = get_logger(__name__)


def forward_order(model: nn.Module, forward: Callable[[], object]) -> tuple[str, ...] | None:
    """Return the names of all parameters in the order in which one forward pass first uses them.

    A tied weight has a place for each of its names: its first use since the module of that name was called. What the
    pass does not use keeps its place behind the parameter registered before it. The pass runs in eval mode without
    gradients and without forward hooks; weights, buffers, modes, attributes of modules, hooks and random number generators are afterwards as
    they were. A pass that fails is logged, and nothing is recorded.

    Args:
        model: The model.
        forward: Runs the model once: ``lambda: model(inputs)``.

    Returns:
        All names, those of tied parameters too; None where the pass failed or used no parameter.

    Example:
        >>> class HeadFirst(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.head, self.body = nn.Linear(4, 2), nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return self.head(self.body(x))
        >>> model = HeadFirst()
        >>> forward_order(model, lambda: model(torch.randn(1, 4)))
        ('body.weight', 'body.bias', 'head.weight', 'head.bias')
    """
    uses = _Uses(model)
    try:
        with untouched(model, evaluate=True), torch.no_grad(), uses:
            forward()
    except Exception as error:  # noqa: BLE001 - whatever the user's model raises: the order of registration is left
        log.warning("forward order not recorded", model=type(model).__name__, error=repr(error))
        return None
    return uses.order() if uses else None


class _Uses(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate its modes
    """Numbers the calls of modules and the operations that read a parameter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tick = count()
        self._read: dict[int, list[int]] = {}
        self._called: dict[nn.Module, int] = {}
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._owner = {name: model.get_submodule(name.rpartition(".")[0]) for name in self._parameters}
        self._known = {id(each) for each in self._parameters.values()}

    def __bool__(self) -> bool:
        return bool(self._read)

    @override
    def __enter__(self) -> Self:
        self._hook = register_module_forward_pre_hook(self._call)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    @override
    def __exit__(self, *exception: object) -> None:
        self._hook.remove()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for each in tree_leaves((args, kwargs)):
            if isinstance(each, Tensor) and id(each) in self._known:
                self._read.setdefault(id(each), []).append(next(self._tick))
        return func(*args, **(kwargs or {}))

    def _call(self, module: nn.Module, inputs: Any) -> None:  # noqa: ARG002 - a hook's signature
        self._called.setdefault(module, next(self._tick))

    def order(self) -> tuple[str, ...]:
        """Return all names by first use."""
        places: dict[str, float] = {}
        before = -1.0
        for name in self._parameters:
            use = self._first_use(name)
            before = places[name] = before if use is None else use
        return tuple(sorted(places, key=lambda name: places[name]))

    def _first_use(self, name: str) -> int | None:
        called = self._called.get(self._owner[name])
        read = self._read.get(id(self._parameters[name]), [])
        if called is None:  # its module is never called: another one reads its weights
            return read[0] if read else None
        since = bisect_left(read, called)
        # A kernel outside torch's dispatcher reads unseen; then the call of the module tells.
        return read[since] if since < len(read) else called


@contextmanager
def untouched(model: nn.Module, *, evaluate: bool = False) -> Generator[None, None, None]:
    """Put modes, attributes, buffers and random number generators back, whatever happens inside.

    Args:
        model: The model.
        evaluate: Put all of it in eval mode meanwhile, and call no forward hooks.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
        >>> with untouched(model):
        ...     _ = model(torch.randn(4, 2))
        >>> model[0].num_batches_tracked
        tensor(0)
    """
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    # The dictionaries are among others the registries of submodules, buffers and hooks.
    tables = [(table, dict(table)) for _, each in attributes for table in each.values() if isinstance(table, dict)]
    lists = [(kept, list(kept)) for _, each in attributes for kept in each.values() if isinstance(kept, list)]
    tensors = [each for _, own in attributes for each in _tensors(own)]
    copies = [each.detach().clone() for each in tensors]
    devices = sorted({each.device.index for each in model.parameters() if each.device.type == "cuda"})
    drawn = random.getstate(), np.random.get_state()  # noqa: NPY002 - models draw from the legacy generator
    try:
        with torch.random.fork_rng(devices):
            for module, _ in attributes if evaluate else ():
                module.training = False
                module._forward_hooks.clear()  # the caller's own recorders see nothing; pre-hooks may make weights
            yield
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])  # noqa: NPY002
        for module, own in attributes:
            vars(module).clear()
            vars(module).update(own)
        for table, entries in tables:
            table.clear()
            table.update(entries)
        for kept, items in lists:
            kept[:] = items
        with torch.no_grad():
            for tensor, copy in zip(tensors, copies, strict=True):
                if not _same_bits(tensor, copy):
                    tensor.copy_(copy)


def _tensors(attributes: Mapping[str, Any]) -> list[Tensor]:
    """Return the buffers of a module, and the tensors that it keeps beside them."""
    kept = [each for each in attributes.values() if isinstance(each, Tensor)]
    return kept + [each for each in attributes["_buffers"].values() if each is not None]


def _same_bits(first: Tensor, second: Tensor) -> bool:
    """Compare so that NaN equals NaN, and 0.0 does not equal -0.0: a buffer that was not written is not rewritten."""
    try:
        return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
    except RuntimeError:  # a shape or layout that has no view of bytes
        return False
