"""Running a model without its leading part: what that part hands on is put in its place."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from ..engine import untouched
from .prefix_pass import Forward, Pass
from .prefix_trace import PLAIN, Call, Placeholder, Trace, UnskippableError

_COMPILED = "_compiled_call_impl"
_MISSING = object()


class Reached(BaseException):
    """Ends a forward pass at the frontier. Not an Exception, which the model's own code might catch."""

    def __init__(self, value: list[Tensor]) -> None:
        self.value = value


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

    Example:
        >>> model, x = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)), torch.ones(2, 1)
        >>> one, spec, dummy = Pass(model.forward, (x,), {}, ids=(0, 1)), tree_flatten(x)[1], Placeholder((), tree_flatten(())[1])
        >>> replay = Replay(model[1], spec, {}, {model[0]: dummy})
        >>> torch.equal(replay.value(one, model)[0], model[1](model[0](x))), torch.equal(replay.run(one, [4 * x]), model[2](4 * x))
        (True, True)
        >>> head = Replay(model[2], spec, {}, {}, (model[2],))
        >>> torch.equal(head.value(one, model)[0], model[:2](x)), torch.equal(head.run(one, [4 * x]), model[2](4 * x))
        (True, True)
        >>> Replay(nn.ReLU(), spec, {}, {}).value(one, model)
        Traceback (most recent call last):
        thawline.algorithms.prefix_trace.UnskippableError: the model no longer calls the modules before the frontier
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
        """Return what to call in place of the modules that are skipped.

        Example:
            >>> pair = Replay(nn.ReLU(), tree_flatten((1, 2))[1], {1: "kept"}, {})
            >>> pair.instead([torch.ones(1)])[pair.boundary]("whatever")
            (tensor([1.]), 'kept')
        """
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
    """Call other functions in place of modules' ``forward``, or of what was compiled of it; nothing of it stays.

    Example:
        >>> relu = nn.ReLU()
        >>> with replaced({relu: torch.neg}):
        ...     relu(torch.ones(1))
        tensor([-1.])
        >>> relu(torch.ones(1)), "forward" in vars(relu)
        (tensor([1.]), False)
    """
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
    """Set attributes of modules, and set or remove them again afterwards.

    Example:
        >>> relu = nn.ReLU()
        >>> relu.own = 1
        >>> with _attributes([(relu, "own", 2), (relu, "new", 3)]):
        ...     relu.own, relu.new
        (2, 3)
        >>> relu.own, hasattr(relu, "new")
        (1, False)
    """
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

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Linear(2, 1))
        >>> one = Pass(model.forward, (torch.ones(1, 2),), {}, ids=(0,))
        >>> replay = find_replay(model, model[2:], [model[0]], head=False, one=one)
        >>> replay.boundary is model[1], [*replay.skipped] == [model[0]], replay.chain
        (True, True, ())
        >>> find_replay(model, model[2:], [model[0]], head=True, one=one).chain == (model[2], model[3])
        True
        >>> def error(model, suffix, prefix):
        ...     try:
        ...         find_replay(model, suffix, prefix, head=False, one=attrs.evolve(one, forward=model.forward))
        ...     except UnskippableError as error:
        ...         return str(error)
        >>> error(model, [nn.ReLU()], [model[0]])
        'the model calls none of the modules beyond the frontier as a whole'
        >>> random = nn.Sequential(nn.Dropout(), model)
        >>> error(random, [model], [random[0]])
        'it draws random numbers, or is called several times'
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
    """Yield ways to skip, the one that skips most first; or why there is none.

    Example:
        >>> class Skip(nn.Sequential):
        ...     def forward(self, x):
        ...         first = self[0](x)
        ...         return self[2](self[1](first)) + first
        >>> skip = Skip(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> one = Pass(skip.forward, (torch.ones(1, 2),), {}, ids=(0,))
        >>> find_replay(skip, [skip[2]], [skip[0], skip[1]], head=True, one=one)
        Traceback (most recent call last):
        thawline.algorithms.prefix_trace.UnskippableError: what it computes is used beyond the frontier in other ways than through its last output
        >>> find_replay(skip, [skip[1]], [skip[0]], head=False, one=one).boundary is skip[0]
        True
        >>> handle = skip[0].register_forward_hook(lambda module, given, gave: None)
        >>> find_replay(skip, [skip[1]], [skip[0]], head=False, one=one)
        Traceback (most recent call last):
        thawline.algorithms.prefix_trace.UnskippableError: a Linear of it has forward hooks
    """
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
        if not all(isinstance(each, PLAIN) for each in constants.values()) or len(constants) == len(leaves):
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
    """Return the one thing a module was called with, where that is a tensor.

    Example:
        >>> relu, x = nn.ReLU(), torch.ones(1)
        >>> _recorded_input(Call(relu, None, 0, False, given=((x,), {}))) is x
        True
        >>> [_recorded_input(Call(relu, None, 0, False, given=each)) for each in (((x, x), {}), ((x,), {"scale": 2}), ((1,), {}), ((), {}))]
        [None, None, None, None]
    """
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


def gives_the_same(model: nn.Module, replay: Replay, one: Pass, value: Sequence[Tensor], *, tolerance: float) -> bool:
    """Return whether the model gives the same with ``value`` at the frontier, but for padding.

    Args:
        model: The model.
        replay: How to skip its leading part.
        one: A forward pass.
        value: What is put at the frontier.
        tolerance: Of the norm of the difference, in norms.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), torch.ones(2, 1)
        >>> one, replay = Pass(model.forward, (x,), {}, ids=(0, 1)), Replay(model[1], tree_flatten(x)[1], {}, {}, (model[1],))
        >>> [gives_the_same(model, replay, one, [value], tolerance=1e-3) for value in (model[0](x), model[0](x) + 1)]
        [True, False]
    """
    outputs: list[list[Tensor]] = []
    ways: tuple[Callable[[], Any], ...] = (one, lambda: replay.run(one, value))
    for run in ways:
        with untouched(model), torch.no_grad():
            outputs.append([unpadded(each, one.masks) for each in _compared(run())])
    _forget_casts()
    return all(close(first, second, tolerance) for first, second in zip(*outputs, strict=True))


def unpadded(each: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Return what is no padding, where there is one mask over samples and positions.

    Example:
        >>> mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        >>> unpadded(torch.tensor([[1, 2, 3], [4, 5, 6]]), [mask])
        tensor([1, 2, 4])
        >>> unpadded(torch.ones(2, 2), [mask]).shape, unpadded(torch.ones(2, 3), [mask, mask]).shape, unpadded(torch.ones(2, 3), []).shape
        (torch.Size([2, 2]), torch.Size([2, 3]), torch.Size([2, 3]))
    """
    return each[masks[0].bool()] if len(masks) == 1 and each.shape[:2] == masks[0].shape else each


def close(first: Tensor, second: Tensor, tolerance: float) -> bool:
    """Return whether two tensors are equal up to ``tolerance`` norms.

    Example:
        >>> one = torch.tensor([3.0, 4.0])
        >>> close(one + torch.tensor([0.0, 0.4]), one, 0.1), close(one + torch.tensor([0.0, 0.6]), one, 0.1), close(one, one[:1], 0.1)
        (True, False, False)
        >>> close(torch.zeros(2), torch.zeros(2), 0.0)
        True
    """
    if first.shape != second.shape:
        return False
    ones, others = first.double(), second.to(first.device).double()
    return bool((ones - others).norm() <= tolerance * others.norm() + 1e-9)


def _equal(first: Any, second: Any) -> bool:
    """Compare all that a loss may be made of.

    Example:
        >>> x = torch.tensor([1.0, float("nan")])
        >>> _equal(x, x + 1e-6), _equal(x, x + 1e-4), _equal((x, x), x), _equal(x, x[None])
        (True, False, False, False)
    """
    ones, others = _compared(first), _compared(second)
    return len(ones) == len(others) and all(
        one.shape == other.shape and bool(torch.allclose(one.double(), other.double(), rtol=1e-5, atol=1e-7, equal_nan=True))
        for one, other in zip(ones, others, strict=True)
    )  # fmt: skip


def _compared(output: Any) -> list[Tensor]:
    """Return the tensors, but for the keys and values that a language model keeps to go on with: training reads none.

    Example:
        >>> x = torch.ones(1)
        >>> _compared({"logits": x, "past_key_values": x}), _compared((x, None, 2))
        ([tensor([1.])], [tensor([1.])])
    """
    if isinstance(output, Mapping):
        output = {name: each for name, each in output.items() if name != "past_key_values"}
    return [each for each in tree_leaves(output) if isinstance(each, Tensor)]
