"""Measuring: contestants take turns, medians are compared, CPU time stands beside wall time."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping

from attrs import frozen


@frozen
class Timing:
    """Microseconds of one contestant over all rounds: CPU median, least and most, and wall median."""

    median: float
    least: float
    most: float
    wall: float


@frozen
class Row:
    """One line of the table.

    Args:
        figure: What is measured.
        value: The figure.
        unit: Its unit.
        bar: What it must not exceed; None where it is only reported.
        note: The timings behind it.
    """

    figure: str
    value: float
    unit: str
    bar: float | None
    note: str

    @property
    def verdict(self) -> str:
        """Whether the bar is met."""
        return "" if self.bar is None else "bar met" if self.value <= self.bar else "missed"


def race(contestants: Mapping[str, Callable[[], float | None]], rounds: int, per: int = 1) -> dict[str, Timing]:
    """Run the contestants in turn, ``rounds`` times each, after one round that does not count.

    Args:
        contestants: Name to a function that does the work ``per`` times; it may return seconds of its own
            measurement instead of being timed from outside.
        rounds: How often each runs.
        per: How many units of work a call does.
    """
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, work in contestants.items():
            gc.collect()
            gc.disable()
            began, ticked = time.process_time(), time.perf_counter()
            own = work()
            spent, passed = time.process_time() - began, time.perf_counter() - ticked
            gc.enable()
            if turn:
                cpu[name].append((spent if own is None else own) / per * 1e6)
                wall[name].append((passed if own is None else own) / per * 1e6)
    return {
        name: Timing(statistics.median(times), min(times), max(times), statistics.median(wall[name]))
        for name, times in cpu.items()
    }


def told(timings: Mapping[str, Timing], unit: str = "us") -> str:
    """Return the timings as text: median (least to most; wall)."""
    scale = {"us": 1.0, "ms": 1e-3, "s": 1e-6}[unit]
    return "; ".join(
        f"{name} {each.median * scale:.3g} {unit} ({each.least * scale:.3g} to {each.most * scale:.3g}; wall {each.wall * scale:.3g})"
        for name, each in timings.items()
    )
