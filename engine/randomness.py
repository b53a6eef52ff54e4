"""Random numbers of the data's own: functions of a seed, with the global generators left to the model."""

from __future__ import annotations

import hashlib
import random
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import BuiltinMethodType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import torch
from attrs import define, field
from torch import Tensor, nn

AnyGenerator: TypeAlias = torch.Generator | np.random.Generator | np.random.RandomState | random.Random

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_GLOBAL: tuple[Any, ...] = (random.random.__self__, np.random.rand.__self__)  # type: ignore[attr-defined]
# What holds no generator of the data's, and may be large.
_CLOSED = (Tensor, np.ndarray, ModuleType, CodeType, str, bytes, int, float)
# Functions and classes of these draw from the global generators, or from those they are given.
_LIBRARIES = {*sys.stdlib_module_names, "numpy", "torch"}
_DEEPEST = 8  # the attributes of a loader's dataset's transform's list's augmentation
_LONGEST = 64  # a list that is longer holds data
_MOST = 2000  # objects looked into


def derive_seed(seed: int, *parts: object) -> int:
    """Return a seed of 63 bits that is a pure function of ``seed`` and ``parts``, the same in every process.

    Args:
        seed: Seed of the run.
        parts: What the result is for: words and numbers, told apart by their ``repr``.

    Example:
        >>> derive_seed(0, "sample", 3, 17) == derive_seed(0, "sample", 3, 17) != derive_seed(0, "sample", 17, 3)
        True
    """
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@define(eq=False, init=False)
class Randomness:
    """The generators that loading may draw from: the three global ones, and those kept by the given objects.

    The global ones are torch's for the CPU, NumPy's and Python's. Those kept are found in the attributes of the
    objects, of their classes, and of what they hold, such as a dataset's ``rng`` or the ``generator`` of a sampler; and
    among what their methods and functions refer to, such as an ``rng`` of the user's module.

    Args:
        holders: Loaders, samplers, datasets, collate functions.

    Example:
        >>> randomness = Randomness()
        >>> with randomness.kept():
        ...     randomness.seed(7)
        ...     first = random.random()
        >>> with randomness.kept():
        ...     randomness.seed(7)
        ...     first == random.random()
        True
    """

    _generators: Sequence[AnyGenerator]

    def __init__(self, *holders: object) -> None:
        self._generators = tuple(_collect(holders))

    def __len__(self) -> int:
        """How many generators there are besides the global ones."""
        return len(self._generators)

    def states(self) -> list[Any]:
        """Return the state of every generator, the global ones first."""
        return [
            torch.default_generator.get_state(),
            np.random.get_state(),  # noqa: NPY002 - the legacy generator is the one that users' datasets draw from
            random.getstate(),
            *(state_of(each) for each in self._generators),
        ]

    def restore(self, states: Sequence[Any]) -> None:
        """Put every generator back into a state that :meth:`states` returned."""
        torch.default_generator.set_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
        for generator, state in zip(self._generators, states[3:], strict=True):
            restore_generator(generator, state)

    def seed(self, seed: int) -> None:
        """Seed every generator."""
        # Not torch.manual_seed: it visits every backend, which takes a hundred times as long.
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
        random.seed(seed)
        for generator in self._generators:
            _seed(generator, seed)

    @contextmanager
    def kept(self) -> Generator[None, None, None]:
        """Put every generator back at the end, whatever was drawn and raised inside."""
        states = self.states()
        try:
            yield
        finally:
            self.restore(states)


@define(eq=False)
class Stream:
    """Random numbers that run on from one ``with`` to the next, apart from everybody else's.

    Args:
        randomness: The generators to use.
        seed: Where they start.

    Attributes:
        inside: Where they go on from; None before the first ``with``.

    Example:
        >>> def draw(stream):
        ...     with stream:
        ...         return random.random()
        >>> ours, other = Stream(Randomness(), 1), Stream(Randomness(), 1)
        >>> first = draw(ours)
        >>> draw(other) == first, draw(ours) == first
        (True, False)
    """

    _randomness: Randomness
    _seed: int
    inside: list[Any] | None = field(default=None, init=False)
    _outside: list[Any] = field(factory=list, init=False)

    def __enter__(self) -> None:
        self._outside = self._randomness.states()
        if self.inside is None:
            self._randomness.seed(self._seed)
        else:
            self._randomness.restore(self.inside)

    def __exit__(self, *exception: object) -> None:
        self.inside = self._randomness.states()
        self._randomness.restore(self._outside)


def _collect(holders: Sequence[object]) -> list[AnyGenerator]:
    """Return the generators in and below ``holders``, the nearest first.

    What was seen is kept alive meanwhile: an attribute may be made when it is asked for, and what takes the place of a
    dead object in memory has its identity.
    """
    found: list[AnyGenerator] = []
    # The global ones under other names: `from random import choice` is a method of Python's.
    seen: dict[int, object] = {id(each): each for each in (torch.default_generator, *_GLOBAL)}
    queue = deque((each, _DEEPEST) for each in holders)
    while queue and len(seen) < _MOST:
        holder, depth = queue.popleft()
        if holder is None or isinstance(holder, _CLOSED) or id(holder) in seen:
            continue
        seen[id(holder)] = holder
        if is_generator(holder):
            found.append(holder)
        elif depth and not isinstance(holder, _GENERATORS):
            queue.extend((each, depth - 1) for each in _inside(holder))
    return found


def _inside(holder: Any) -> Iterator[object]:
    """Yield what ``holder`` holds or refers to, and may draw from."""
    if isinstance(holder, (list, tuple)):
        yield from holder if len(holder) <= _LONGEST else ()
    elif isinstance(holder, dict):
        yield from holder.values() if len(holder) <= _LONGEST else ()
    elif isinstance(holder, partial):
        yield from (holder.func, holder.args, holder.keywords)
    elif isinstance(holder, MethodType):
        yield from (holder.__self__, holder.__func__)
    elif isinstance(holder, BuiltinMethodType):
        yield holder.__self__
    elif isinstance(holder, (staticmethod, classmethod)):
        yield holder.__func__
    elif isinstance(holder, FunctionType):
        yield from _referred(holder)
    elif isinstance(holder, type):
        if _is_users(holder):
            yield from vars(holder).values()
    else:
        kept = ("_parameters", "_buffers") if isinstance(holder, nn.Module) else ()
        yield from (value for name, value in getattr(holder, "__dict__", {}).items() if name not in kept)
        for kind in filter(_is_users, type(holder).__mro__):
            yield kind
            slots = vars(kind).get("__slots__", ())
            yield from (getattr(holder, name, None) for name in ((slots,) if isinstance(slots, str) else slots))


def _referred(function: FunctionType) -> Iterator[object]:
    """Yield the defaults of a function, what it closes over, and the globals it names."""
    if not _is_users(function):
        return
    yield from (function.__defaults__, function.__kwdefaults__)
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    codes = [function.__code__]
    for code in codes:
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
        yield from (function.__globals__[name] for name in code.co_names if name in function.__globals__)


def _is_users(thing: type | FunctionType) -> bool:
    return (thing.__module__ or "").partition(".")[0] not in _LIBRARIES


def is_generator(value: object) -> TypeGuard[AnyGenerator]:
    """Return whether a value is a generator with a state: of torch, NumPy or Python, and not the operating system's."""
    return isinstance(value, _GENERATORS) and not isinstance(value, random.SystemRandom)


def state_of(generator: AnyGenerator) -> Any:
    """Return the state of a generator of any kind."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state()


def restore_generator(generator: AnyGenerator, state: Any) -> None:
    """Put back what :func:`state_of` returned for a generator of the same kind."""
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _seed(generator: AnyGenerator, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    elif isinstance(generator, np.random.RandomState):
        generator.seed(seed & 0xFFFFFFFF)
    else:
        bits = generator.bit_generator
        bits.state = type(bits)(seed).state
