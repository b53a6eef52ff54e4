"""Running a model without its leading part: what that part hands on is put in its place."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Self

import attrs
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from ..engine import untouched
from .prefix_pass import Forward, Pass

_COMPILED = "_compiled_call_impl"
_MISSING = object()
_PLAIN = (type(None), bool, int, float, str)


class UnskippableError(Exception):
    """Why the leading part of a model cannot be skipped."""


class Reached(BaseException):
    """Ends a forward pass at the frontier. Not an Exception, which the model's own code might catch."""

    def __init__(self, value: list[Tensor]) -> None:
        self.value = value


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
    """Records the calls of a model's modules in one forward pass."""

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
    """Stands in for a module that is skipped: gives its input on, or zeros in the shape of its output."""

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
        if first is None or not all(isinstance(each, (Tensor, *_PLAIN)) for each in leaves):
            raise UnskippableError(f"what a {type(call.module).__name__} gives cannot be made up")
        return cls(tuple(_shape(each, first) if isinstance(each, Tensor) else each for each in leaves), spec)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what has the structure and the shapes of the module's output."""
        first = _first_tensor((args, kwargs))
        assert first is not None, "the module was given a tensor when it was recorded"
        leaves = [each.like(first) if isinstance(each, _Shape) else each for each in self.leaves]
        return tree_unflatten(leaves, self.spec)


@attrs.frozen(eq=False)
class Replay:
    """How to run a model without its leading part.

    Args:
        boundary: The module whose output (where ``chain`` is empty) is put in place.
        spec: Structure of that output.
        constants: Its leaves that are no tensors, by place.
        skipped: What stands in for the modules before it.
        chain: The modules of the head, where the model's output is theirs: then their input is put in place, and
            nothing else runs.
    """

    boundary: nn.Module
    spec: TreeSpec
    constants: Mapping[int, Any]
    skipped: Mapping[nn.Module, Placeholder]
    chain: tuple[nn.Module, ...] = ()

    def run(self, one: Pass, value: Sequence[Tensor]) -> Any:
        """Return what the model gives, ``value`` standing at the frontier."""
        if self.chain:
            return self.run_head(value[0])
        with replaced(self.instead(value)):
            return one()

    def run_head(self, output: Any) -> Any:
        """Return what the head gives, called with what it would be called with."""
        for module in self.chain:
            output = module(output)
        return output

    def instead(self, value: Sequence[Tensor]) -> dict[nn.Module, Forward]:
        """Return what to call in place of the modules that are skipped."""
        tensors = iter(value)
        leaves = [self.constants[i] if i in self.constants else next(tensors) for i in range(self.spec.num_leaves)]
        output = tree_unflatten(leaves, self.spec)
        return {**self.skipped, self.boundary: lambda *_, **__: output}

    def watched(self, sink: Callable[[list[Tensor]], None]) -> dict[nn.Module, Forward]:
        """Return what to call in place of the boundary, so that ``sink`` is given what crosses it."""
        forward: Forward = getattr(self.boundary, _slot(self.boundary))

        def tell(*args: Any, **kwargs: Any) -> Any:
            if self.chain:
                sink([args[0]])
                return forward(*args, **kwargs)
            output = forward(*args, **kwargs)
            sink([each for each in tree_leaves(output) if isinstance(each, Tensor)])
            return output

        return {self.boundary: tell}

    def value(self, one: Pass, model: nn.Module) -> list[Tensor]:
        """Return what crosses the frontier; what comes after it does not run, and blocks run as they were before compiling.

        Raises:
            UnskippableError: Nothing does.
        """

        def stop(value: list[Tensor]) -> None:
            raise Reached(value)

        try:
            with torch.no_grad(), uncompiled(model), replaced(self.watched(stop)):
                one()
        except Reached as reached:
            return reached.value
        raise UnskippableError("the model no longer calls the modules before the frontier")


@contextmanager
def replaced(forwards: Mapping[nn.Module, Forward]) -> Generator[None, None, None]:
    """Call other functions in place of modules' ``forward``, or of what was compiled of it; nothing of it stays."""
    with _attributes([(module, _slot(module), forward) for module, forward in forwards.items()]):
        yield


@contextmanager
def uncompiled(model: nn.Module) -> Generator[None, None, None]:
    """Run the blocks of a model as they were before ``Trainer(compile="blocks")``.

    A compiler cannot follow what is noted at each module, and would make a graph of its own for a batch of one.
    """
    with _attributes([(each, _COMPILED, None) for each in model.modules() if _slot(each) == _COMPILED]):
        yield


def _slot(module: nn.Module) -> str:
    """Return the name of the attribute that a call of the module ends in."""
    return "forward" if module._compiled_call_impl is None else _COMPILED


@contextmanager
def _attributes(values: Sequence[tuple[nn.Module, str, Any]]) -> Generator[None, None, None]:
    before = [(module, name, vars(module).get(name, _MISSING)) for module, name, _ in values]
    try:
        for module, name, value in values:
            vars(module)[name] = value
        yield
    finally:
        for module, name, own in before:
            if own is _MISSING:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = own


def find_replay(
    model: nn.Module, suffix: Iterable[nn.Module], prefix: Iterable[nn.Module], *, head: bool, one: Pass
) -> Replay:
    """Find out how to run a model without its leading part, and try it.

    Two passes without gradients that leave no trace, one of them without the leading part, must give the same.

    Args:
        model: The model.
        suffix: The largest modules beyond the frontier.
        prefix: The largest modules before it.
        head: Whether the suffix is the model's last layer.
        one: A forward pass.

    Raises:
        UnskippableError: It cannot; the message says why.
    """
    before, after = set(prefix), set(suffix)
    with untouched(model), uncompiled(model), torch.no_grad(), Trace(model) as trace:
        whole = one()
    _forget_casts()
    first = next((call for call in trace.calls if call.module in after), None)
    if first is None:
        raise UnskippableError("the model calls none of the modules beyond the frontier as a whole")
    why = "nothing of the model runs before the frontier"
    for replay in _candidates(trace.calls, first, before, after if head else set(), whole):
        if isinstance(replay, str):
            why = replay
            continue
        try:
            value = _recorded(replay, trace.calls)
            with untouched(model), uncompiled(model), torch.no_grad():
                again = replay.run(one, value)
        except Exception as error:  # noqa: BLE001 - whatever the model says to inputs that are made up
            why = f"the model does not run without it: {error!r}"
            continue
        finally:
            _forget_casts()
        if _equal(whole, again):
            return replay
        why = "what it computes is used beyond the frontier in other ways than through its last output"
    raise UnskippableError(why)


def _candidates(
    calls: Sequence[Call], first: Call, before: set[nn.Module], head: set[nn.Module], whole: Any
) -> Generator[Replay | str, None, None]:
    """Yield ways to skip, the one that skips most first; or why there is none."""
    if (chain := _chain(calls, head, whole)) and not first.drew_before:
        given = _recorded_input(chain[0])
        yield Replay(chain[0].module, tree_flatten(given)[1], {}, {}, tuple(each.module for each in chain))
    around = {id(None)}
    call = first.parent
    while call is not None:
        around.add(id(call))
        call = call.parent
    done = [each for each in calls if id(each.parent) in around and each.end is not None and each.end < first.start]
    times = _times(calls)
    for everything in (True, False):
        chosen = [each for each in done if everything or any(part in before for part in each.module.modules())]
        edges = [each for each in chosen if times[each.module] == 1 and not each.drew]
        if not edges:
            yield "it draws random numbers, or is called several times" if chosen else "none of it is a module"
            continue
        edge = edges[-1]
        skipped = [each for each in chosen if each is not edge and each.start < edge.start]
        counted = _times(skipped)
        skipped = [each for each in skipped if counted[each.module] == times[each.module]]
        if hooked := next((type(part).__name__ for each in (*skipped, edge) for part in each.module.modules() if _hooks(part)), None):  # fmt: skip
            yield f"a {hooked} of it has forward hooks"
            continue
        leaves, spec = tree_flatten(edge.gave)
        constants = {place: each for place, each in enumerate(leaves) if not isinstance(each, Tensor)}
        if not all(isinstance(each, _PLAIN) for each in constants.values()) or len(constants) == len(leaves):
            yield f"a {type(edge.module).__name__} gives something that is no tensor"
            continue
        try:
            yield Replay(edge.module, spec, constants, {each.module: Placeholder.of(each) for each in skipped})
        except UnskippableError as error:
            yield str(error)


def _chain(calls: Sequence[Call], head: set[nn.Module], whole: Any) -> list[Call]:
    """Return the calls of the head's modules where one's output is the next one's input, and the last one's the model's."""
    chain = [call for call in calls if call.module in head]
    if not chain or len({call.module for call in chain}) < len(chain) or len(chain) < len(head):
        return []
    inputs = [_recorded_input(call) for call in chain]
    linked = all(call.gave is given for call, given in zip(chain, inputs[1:], strict=False))
    hooked = any(_hooks(call.module) for call in calls[: calls.index(chain[0])])
    return chain if inputs[0] is not None and linked and chain[-1].gave is whole and not hooked else []


def _recorded_input(call: Call) -> Tensor | None:
    """Return the one thing a module was called with, where that is a tensor."""
    args, kwargs = call.given
    return args[0] if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) else None


def _recorded(replay: Replay, calls: Sequence[Call]) -> list[Tensor]:
    call = next(each for each in calls if each.module is replay.boundary)
    crossed = _recorded_input(call) if replay.chain else call.gave
    return [each.clone() for each in tree_leaves(crossed) if isinstance(each, Tensor)]


def _forget_casts() -> None:
    """Forget what autocast cast without gradients: it must not serve the pass that has some."""
    torch.clear_autocast_cache()


def _times(calls: Sequence[Call]) -> dict[nn.Module, int]:
    times: dict[nn.Module, int] = {}
    for call in calls:
        times[call.module] = times.get(call.module, 0) + 1
    return times


def _hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _first_tensor(given: Any) -> Tensor | None:
    return next((each for each in tree_leaves(given) if isinstance(each, Tensor)), None)


def _shape(output: Tensor, first: Tensor) -> _Shape:
    follows = [index < first.ndim and size == first.shape[index] for index, size in enumerate(output.shape)]
    return _Shape(tuple(None if same else size for same, size in zip(follows, output.shape, strict=True)), output.dtype)


def gives_the_same(model: nn.Module, replay: Replay, one: Pass, value: Sequence[Tensor], *, tolerance: float) -> bool:
    """Return whether the model gives the same with ``value`` at the frontier, but for padding.

    Args:
        model: The model.
        replay: How to skip its leading part.
        one: A forward pass.
        value: What is put at the frontier.
        tolerance: Of the norm of the difference, in norms.
    """
    outputs: list[list[Tensor]] = []
    ways: tuple[Callable[[], Any], ...] = (one, lambda: replay.run(one, value))
    for run in ways:
        with untouched(model), torch.no_grad():
            outputs.append([unpadded(each, one.masks) for each in _compared(run())])
    _forget_casts()
    return all(close(first, second, tolerance) for first, second in zip(*outputs, strict=True))


def unpadded(each: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Return what is no padding, where there is one mask over samples and positions."""
    return each[masks[0].bool()] if len(masks) == 1 and each.shape[:2] == masks[0].shape else each


def close(first: Tensor, second: Tensor, tolerance: float) -> bool:
    """Return whether two tensors are equal up to ``tolerance`` norms."""
    if first.shape != second.shape:
        return False
    ones, others = first.double(), second.to(first.device).double()
    return bool((ones - others).norm() <= tolerance * others.norm() + 1e-9)


def _equal(first: Any, second: Any) -> bool:
    """Compare all that a loss may be made of."""
    ones, others = _compared(first), _compared(second)
    return len(ones) == len(others) and all(
        one.shape == other.shape and bool(torch.allclose(one.double(), other.double(), rtol=1e-5, atol=1e-7, equal_nan=True))
        for one, other in zip(ones, others, strict=True)
    )  # fmt: skip


def _compared(output: Any) -> list[Tensor]:
    """Return the tensors, but for the keys and values that a language model keeps to go on with: training reads none."""
    if isinstance(output, Mapping):
        output = {name: each for name, each in output.items() if name != "past_key_values"}
    return [each for each in tree_leaves(output) if isinstance(each, Tensor)]
