"""Batches that tell how long the steps between them took."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from typing_extensions import override

CPU = torch.device("cpu")


class Batches(Sequence[Any]):
    """Ready batches that note when the first and the last of them are asked for: steps are timed without start and end."""

    batch_size: int = 8

    def __init__(self, batches: Iterable[Any] = (), device: torch.device = CPU) -> None:
        self.ready = list(batches)
        self.device = device
        self.marks: list[Any] = []

    @override
    def __len__(self) -> int:
        return len(self.ready)

    @override
    def __getitem__(self, number: Any) -> Any:
        """Return a batch: the only way to it, also for who iterates."""
        batch = self.ready[number]
        self.marks = [*self.marks[: min(number, 1)], self._mark()]
        return batch

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
