"""What a model's modules do in one forward pass, and what stands in for one of them."""

from __future__ import annotations

from itertools import count
from typing import Any, Self

import attrs
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

PLAIN = (type(None), bool, int, float, str)
"""What a placeholder gives as it was given once."""


class UnskippableError(Exception):
    """Why the leading part of a model cannot be skipped."""


@attrs.define(eq=False)
class Call:
    """One call of a module: when it began and ended, whether random numbers were drawn until then, what went in and came out."""

    module: nn.Module
    parent: Call | None
    start: int
    drew_before: bool
    end: int | None = None
    drew: bool = False
    given: tuple[Any, ...] = ()
    gave: Any = None


class Trace:
    """Records the calls of a model's modules in one forward pass.

    Example:
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(1, 1)), nn.Dropout())
        >>> with Trace(model) as trace:
        ...     _ = model(torch.ones(1, 1)), nn.ReLU()(torch.ones(1))
        >>> [type(call.module).__name__ for call in trace.calls], [(call.start, call.end) for call in trace.calls]
        (['Sequential', 'Sequential', 'Linear', 'Dropout'], [(0, 7), (1, 4), (2, 3), (5, 6)])
        >>> trace.calls[2].parent is trace.calls[1], [(call.drew_before, call.drew) for call in trace.calls[2:]]
        (True, [(False, False), (False, True)])
        >>> trace.calls[3].given[0][0] is trace.calls[1].gave, len(model(torch.ones(1, 1))), len(trace.calls)
        (True, 1, 4)
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[Call] = []
        self._known = set(model.modules())
        self._open: list[Call] = []
        self._tick = count()
        self._devices = sorted({each.device.index for each in model.parameters() if each.device.type == "cuda"})

    def __enter__(self) -> Self:
        self._random = self._generators()
        self._hooks = (
            register_module_forward_pre_hook(self._begin),
            register_module_forward_hook(self._end, with_kwargs=True),
        )
        return self

    def __exit__(self, *exception: object) -> None:
        for each in self._hooks:
            each.remove()

    def _generators(self) -> list[Tensor]:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices)]

    def _begin(self, module: nn.Module, args: Any) -> None:  # noqa: ARG002 - a hook's signature
        if module in self._known:
            parent = self._open[-1] if self._open else None
            self._open.append(Call(module, parent, next(self._tick), self._drew()))
            self.calls.append(self._open[-1])

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module in self._known:
            call = self._open.pop()
            call.end, call.given, call.gave = next(self._tick), (args, kwargs), output
            call.drew = self._drew()

    def _drew(self) -> bool:
        return not all(map(torch.equal, self._generators(), self._random))


@attrs.frozen
class _Shape:
    """A tensor of which only the shape matters: ``sizes`` has None where it follows that of the first input."""

    sizes: tuple[int | None, ...]
    dtype: torch.dtype

    def like(self, first: Tensor) -> Tensor:
        """Return such a tensor; it holds one number."""
        sizes = [first.shape[index] if size is None else size for index, size in enumerate(self.sizes)]
        return torch.zeros((), dtype=self.dtype, device=first.device).expand(sizes)


@attrs.frozen(eq=False)
class Placeholder:
    """Stands in for a module that is skipped: gives its input on, or zeros in the shape of its output.

    Example:
        >>> layer = nn.Linear(3, 4)
        >>> call = Call(layer, None, 0, False, given=((torch.ones(2, 3),), {}), gave=(torch.ones(2, 4, dtype=torch.float64), "kept"))
        >>> zeros, name = Placeholder.of(call)(torch.ones(7, 3))
        >>> zeros.shape, zeros.dtype, zeros.count_nonzero(), name
        (torch.Size([7, 4]), torch.float64, tensor(0), 'kept')
        >>> Placeholder.of(attrs.evolve(call, gave=layer))
        Traceback (most recent call last):
        thawline.algorithms.prefix_trace.UnskippableError: what a Linear gives cannot be made up
        >>> Placeholder.of(attrs.evolve(call, given=((), {})))
        Traceback (most recent call last):
        thawline.algorithms.prefix_trace.UnskippableError: what a Linear gives cannot be made up
    """

    leaves: tuple[Any, ...]
    spec: TreeSpec

    @classmethod
    def of(cls, call: Call) -> Placeholder:
        """Make one from what the module did once.

        Raises:
            UnskippableError: It was given no tensor, or gives an object that cannot be made up.
        """
        first = _first_tensor(call.given)
        leaves, spec = tree_flatten(call.gave)
        if first is None or not all(isinstance(each, (Tensor, *PLAIN)) for each in leaves):
            raise UnskippableError(f"what a {type(call.module).__name__} gives cannot be made up")
        return cls(tuple(_shape(each, first) if isinstance(each, Tensor) else each for each in leaves), spec)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what has the structure and the shapes of the module's output."""
        first = _first_tensor((args, kwargs))
        assert first is not None, "the module was given a tensor when it was recorded"
        leaves = [each.like(first) if isinstance(each, _Shape) else each for each in self.leaves]
        return tree_unflatten(leaves, self.spec)


def _first_tensor(given: Any) -> Tensor | None:
    return next((each for each in tree_leaves(given) if isinstance(each, Tensor)), None)


def _shape(output: Tensor, first: Tensor) -> _Shape:
    """Return what a tensor is like, beside the first that its module was given.

    Example:
        >>> _shape(torch.ones(2, 3, 4), torch.ones(2, 3)).sizes, _shape(torch.ones(2, 4), torch.ones(2, 3)).sizes
        ((None, None, 4), (None, 4))
    """
    follows = [index < first.ndim and size == first.shape[index] for index, size in enumerate(output.shape)]
    return _Shape(tuple(None if same else size for same, size in zip(follows, output.shape, strict=True)), output.dtype)
