"""Measuring: contestants take turns, medians are compared, CPU time stands beside wall time."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from attrs import define, frozen
from rich.console import Console

from .batches import CPU
from .peers import PEERS

_SCALE = {"us": 1.0, "ms": 1e-3, "s": 1e-6}


@define(eq=False, slots=False)
class Timing:
    """Microseconds of one contestant, round by round: CPU time, on a GPU the device's; and wall time."""

    times: list[float]
    walls: list[float]

    @cached_property
    def median(self) -> float:
        """The middle one of the times."""
        return statistics.median(self.times)

    def told(self, unit: str) -> str:
        """Return ``median unit (least to most; wall median)``."""
        scale = _SCALE[unit]
        low, high, wall = min(self.times), max(self.times), statistics.median(self.walls)
        return f"{self.median * scale:.3g} {unit} ({low * scale:.3g} to {high * scale:.3g}; wall {wall * scale:.3g})"


@frozen
class Row:
    """One line of the table.

    Args:
        figure: What is measured.
        value: The figure: a median.
        unit: Its unit.
        bar: What it must not exceed; None where it is only reported.
        note: The timings behind it.
        least: The least of all rounds.
        most: The most of all rounds.
    """

    figure: str
    value: float
    unit: str
    bar: float | None
    note: str
    least: float | None = None
    most: float | None = None

    @property
    def verdict(self) -> str:
        """Whether the bar is met."""
        return "" if self.bar is None else "bar met" if self.value <= self.bar else "missed"

    @property
    def spread(self) -> str:
        """The least and the most of all rounds, where they are known."""
        return "" if self.least is None or self.most is None else f"{self.least:.3g} to {self.most:.3g}"


Contestants = Mapping[str, Callable[[], float | None]]
"""Name to a function that does the work; it may return seconds of its own measurement instead of being timed."""


def race(contestants: Contestants, rounds: int, per: int = 1, *, device: torch.device = CPU) -> dict[str, Timing]:
    """Run the contestants in turn, ``rounds`` times each, after one round that does not count.

    A peer that fails, being of another version or half installed, is named and left out.

    Args:
        contestants: Who runs.
        rounds: How often each runs.
        per: How many units of work a call does.
        device: Where the work is done: on a GPU, between two events of its stream.
    """
    running = dict(contestants)
    timings = {name: Timing([], []) for name in running}
    for turn in range(rounds + 1):
        for name, work in list(running.items()):
            gc.collect()
            gc.disable()
            try:
                spent, passed = timed(work, device)
            except Exception as error:
                if name.partition(",")[0] not in PEERS:
                    raise
                Console(stderr=True).print(f"left out: {name}: {type(error).__name__}: {error}", markup=False)
                del running[name], timings[name]
                continue
            finally:
                gc.enable()
            if turn:
                timings[name].times.append(spent / per * 1e6)
                timings[name].walls.append(passed / per * 1e6)
    return timings


def timed(work: Callable[[], float | None], device: torch.device = CPU) -> tuple[float, float]:
    """Return the seconds that ``work`` took: of the CPU, or of the GPU where that is the device; and by the wall."""
    if device.type != "cuda":
        began, ticked = time.process_time(), time.perf_counter()
        own = work()
        spent, passed = time.process_time() - began, time.perf_counter() - ticked
        return (spent, passed) if own is None else (own, own)
    start, end = _event(), _event()
    torch.cuda.synchronize(device)
    ticked = time.perf_counter()
    start.record()
    own = work()
    end.record()
    torch.cuda.synchronize(device)
    passed = time.perf_counter() - ticked
    return (start.elapsed_time(end) / 1e3, passed) if own is None else (own, own)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's


def told(timings: Mapping[str, Timing], unit: str = "us") -> str:
    """Return the timings as text."""
    return "; ".join(f"{name} {each.told(unit)}" for name, each in timings.items())


def ratio(
    figure: str, timings: Mapping[str, Timing], mine: str, other: str, bar: float | None = None, *, note: str
) -> Row:
    """Return the row of one contestant's time in units of another's, which ran beside it in each round."""
    return compared(figure, timings[mine].times, timings[other].times, bar, note=note)


def compared(figure: str, mine: list[float], other: list[float], bar: float | None = None, *, note: str) -> Row:
    """Return the row of ``mine`` in units of ``other``: the ratio of the medians, the least and the most of a round."""
    shares = [one / base for one, base in zip(mine, other, strict=True)]
    value = statistics.median(mine) / statistics.median(other)
    return Row(figure, value, "x", bar, note, min(shares), max(shares))


def above(
    figure: str, timings: Mapping[str, Timing], mine: str, other: str, bar: float | None = None, *, note: str
) -> Row:
    """Return the row of the microseconds by which one contestant's time is above another's."""
    more = [one - base for one, base in zip(timings[mine].times, timings[other].times, strict=True)]
    value = timings[mine].median - timings[other].median
    return Row(figure, value, "us", bar, note, min(more), max(more))
