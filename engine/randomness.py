"""Random numbers of the data's own: functions of a seed, with the global generators left to the model."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from attrs import define, field
from torch import Tensor, nn

AnyGenerator: TypeAlias = torch.Generator | np.random.Generator | np.random.RandomState | random.Random

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
# What holds no generator of the data's, and may be large.
_CLOSED = (Tensor, np.ndarray, nn.Module, ModuleType, FunctionType, type, str, bytes, int, float)
_DEEPEST = 8  # the attributes of a loader's dataset's transform's list's augmentation
_LONGEST = 64  # a list that is longer holds data
_MOST = 2000  # containers looked into


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
    objects and of what they hold, such as a dataset's ``rng`` or the ``generator`` of a sampler.

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
        own: dict[int, AnyGenerator] = {}
        _collect(holders, own, {}, _DEEPEST)
        own.pop(id(torch.default_generator), None)
        self._generators = tuple(own.values())

    def states(self) -> list[Any]:
        """Return the state of every generator, the global ones first."""
        return [
            torch.default_generator.get_state(),
            np.random.get_state(),  # noqa: NPY002 - the legacy generator is the one that users' datasets draw from
            random.getstate(),
            *(_state(each) for each in self._generators),
        ]

    def restore(self, states: Sequence[Any]) -> None:
        """Put every generator back into a state that :meth:`states` returned."""
        torch.default_generator.set_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
        for generator, state in zip(self._generators, states[3:], strict=True):
            _restore(generator, state)

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
    _inside: list[Any] | None = field(default=None, init=False)
    _outside: list[Any] = field(factory=list, init=False)

    def __enter__(self) -> None:
        self._outside = self._randomness.states()
        if self._inside is None:
            self._randomness.seed(self._seed)
        else:
            self._randomness.restore(self._inside)

    def __exit__(self, *exception: object) -> None:
        self._inside = self._randomness.states()
        self._randomness.restore(self._outside)


def _collect(holder: object, found: dict[int, AnyGenerator], seen: dict[int, object], depth: int) -> None:
    """Add the generators in the attributes and items of ``holder`` to ``found``, by identity.

    What was seen is kept alive meanwhile: an attribute may be made when it is asked for, and what takes the place of a
    dead object in memory has its identity.
    """
    if isinstance(holder, _GENERATORS):
        found.setdefault(id(holder), holder)
    if isinstance(holder, (*_GENERATORS, *_CLOSED)) or not depth or id(holder) in seen or len(seen) > _MOST:
        return
    seen[id(holder)] = holder
    if isinstance(holder, (list, tuple)):
        inside: list[Any] = list(holder) if len(holder) <= _LONGEST else []
    elif isinstance(holder, dict):
        inside = list(holder.values()) if len(holder) <= _LONGEST else []
    else:
        inside = list(getattr(holder, "__dict__", {}).values())
        # Methods and partial functions, which are given as collate functions and transforms.
        inside += [getattr(holder, name, None) for name in ("__self__", "func", "args", "keywords")]
    for each in inside:
        _collect(each, found, seen, depth - 1)


def _state(generator: AnyGenerator) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state()


def _restore(generator: AnyGenerator, state: Any) -> None:
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
