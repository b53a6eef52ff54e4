"""Random numbers of the data's own, with the global generators left as they were."""

# ruff: noqa: NPY002 - users' code draws from NumPy's global generator, and that is what is tested

import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from thawline.engine.randomness import Randomness, Stream, derive_seed


def draw() -> tuple[float, float, float]:
    """Draw once from each global generator."""
    return random.random(), float(np.random.random()), float(torch.rand(()))


def seed_globally() -> None:
    """Seed the global generators."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


class Holder:
    """Keeps generators of every kind, some of them deeper."""

    def __init__(self) -> None:
        self.torch = torch.Generator()
        self.numpy = np.random.default_rng(0)
        self.transforms = [Holder.Inner()]
        self.again = self.transforms
        self.me = self

    class Inner:
        """Keeps two more."""

        def __init__(self) -> None:
            self.python = random.Random(0)
            self.settings = {"legacy": np.random.RandomState(0)}

    def draw(self, sample: object = None) -> tuple[float, ...]:
        inner = self.transforms[0]
        return (
            float(torch.rand((), generator=self.torch)),
            float(self.numpy.random()),
            inner.python.random(),
            float(inner.settings["legacy"].random()),
        )


def test_seeding_makes_all_generators_functions_of_the_seed() -> None:
    """The global ones and those that an object keeps, however deep."""
    holder = Holder()
    randomness = Randomness(holder)
    drawn: list[Any] = []
    with randomness.kept():
        for seed in (1, 2, 1):
            randomness.seed(seed)
            drawn.append((draw(), holder.draw()))
    assert drawn[0] == drawn[2]
    first, second = ([number for part in each for number in part] for each in drawn[:2])
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_the_generators_of_a_bound_method_are_found() -> None:
    """A collate function is often a method of the object that keeps the generator."""
    holder = Holder()
    randomness = Randomness(holder.draw)
    drawn: list[tuple[float, ...]] = []
    for _ in range(2):
        with randomness.kept():
            randomness.seed(3)
            drawn.append(holder.draw())
    assert drawn[0] == drawn[1]


def test_generators_in_what_is_made_when_asked_for_are_found() -> None:
    """Each of such objects may take the place in memory, and so the identity, of the one before."""

    class Lazy:
        __slots__ = ("python",)

        def __init__(self, python: random.Random) -> None:
            self.python = python

        @property
        def args(self) -> tuple[Holder.Inner]:
            made = Holder.Inner()
            made.python, made.settings = self.python, {}
            return (made,)

    generators = [random.Random(each) for each in range(20)]
    assert len(Randomness(*map(Lazy, generators)).states()) == 3 + len(generators)


def test_generators_are_put_back() -> None:
    """What is drawn after is what would have been drawn, also when an exception passes."""
    holder = Holder()
    seed_globally()
    expected = draw(), Holder().draw()
    seed_globally()
    randomness = Randomness(holder)

    def fail() -> None:
        with randomness.kept():
            randomness.seed(5)
            raise KeyError(draw(), holder.draw())

    with pytest.raises(KeyError):
        fail()
    with Stream(randomness, 6):
        drawn = draw(), holder.draw()
    assert (draw(), holder.draw()) == expected != drawn


def test_a_stream_runs_on() -> None:
    """Interrupted at any place, by others that draw, it gives the numbers it would have given at once."""
    whole, parts = Stream(Randomness(), 1), Stream(Randomness(), 1)
    with whole:
        expected = [draw() for _ in range(3)]
    found: list[tuple[float, ...]] = []
    for _ in range(3):
        with parts:
            found.append(draw())
        draw()
    assert found == expected


def test_large_and_closed_things_are_not_searched() -> None:
    """Neither a long list nor a module is looked into, and a ring of references ends."""
    long: list[Any] = [torch.Generator() for _ in range(1000)]
    ring: list[Any] = []
    ring.append(ring)
    assert len(Randomness(long, ring, torch.nn.Linear(1, 1), random).states()) == 3


def test_seeds_are_the_same_in_every_process() -> None:
    """Python's own hash differs from process to process; these do not."""
    code = "from thawline.engine.randomness import derive_seed; print(derive_seed(7, 'sample', 3, 'name'))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    assert int(printed) == derive_seed(7, "sample", 3, "name")


def test_seeds_are_spread() -> None:
    """Neighboring samples, epochs and runs do not meet; each seed suits torch, and its lower half NumPy."""
    seeds = {derive_seed(run, "sample", epoch, index) for run in range(5) for epoch in range(5) for index in range(200)}
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == len(seeds) == 5000
    assert all(0 <= seed < 2**63 for seed in seeds)
