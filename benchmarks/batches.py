"""Batches that tell how long the steps between them took."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

CPU = torch.device("cpu")


class Batches:
    """Ready batches that note when the first and the last of them are asked for: steps are timed without start and end."""

    batch_size: int = 8

    def __init__(self, batches: Iterable[Any] = (), device: torch.device = CPU) -> None:
        self.ready = list(batches)
        self.device = device
        self.marks: list[Any] = []

    def __len__(self) -> int:
        return len(self.ready)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches."""
        self.marks = []
        for each in self.ready:
            self.marks = [*self.marks[:1], self._mark()]
            yield each

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.process_time()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's
        event.record()
        return event

    @property
    def seconds(self) -> float:
        """What the steps but the last one took: seconds of the CPU, or of the GPU's stream."""
        first, last = self.marks
        if self.device.type != "cuda":
            return float(last - first)
        torch.cuda.synchronize(self.device)
        return float(first.elapsed_time(last)) / 1e3
