"""Buffers that a forward pass moves, such as running statistics: averaged over the ranks."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from .distributed import Team


class Buffers:
    """What a model's forward pass writes into its buffers, made the same on all ranks.

    Each rank sees its share of a batch, so running statistics differ between them after it. Of floating-point buffers that
    the batch moved on any rank the mean over the ranks is taken, weighted as their losses are; of counters the largest.
    The mean of running means is that of the whole batch; batch normalization itself goes on normalizing each share alone.
    A cache that has another shape on another rank is left alone.

    Args:
        team: The ranks.
        model: The model.
    """

    def __init__(self, team: Team, model: nn.Module) -> None:
        self._team, self._model = team, model
        self._places: list[tuple[nn.Module, str]] = []
        self._before: list[tuple[Tensor | None, int]] = []
        self._moved: list[int] = []

    def find(self) -> None:
        """List the buffers, each once; surgery may have brought some."""
        seen: dict[int, tuple[nn.Module, str]] = {}
        for module in self._model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    seen.setdefault(id(buffer), (module, name))
        self._places = list(seen.values())

    def mark(self) -> None:
        """Remember the present as the beginning of a batch."""
        if self._places:
            now = (module._buffers.get(name) for module, name in self._places)
            self._before = [(each, -1 if each is None else each._version) for each in now]

    def look(self) -> float:
        """Find out what moved since :meth:`mark`; return a number that is equal on ranks where the same did."""
        if not self._places:
            return 0.0
        self._moved = []
        for place, (before, version) in enumerate(self._before):
            module, name = self._places[place]
            now = module._buffers.get(name)
            # Kernels of normalization write running statistics without a trace in the tensor's version.
            silent = name.startswith("running_") and module.training
            if now is not None and (silent or now is not before or now._version != version):
                self._moved.append(place)
        shapes = [(place, tuple(self._at(place).shape)) for place in self._moved]
        return float(zlib.crc32(repr(shapes).encode()) & 0xFFFFFF) if shapes else 0.0

    @torch.no_grad()
    def average(self, weight: float, *, alike: bool) -> None:
        """Average what moved.

        Args:
            weight: This rank's share of the batch's loss; those of all ranks add up to 1.
            alike: Whether every rank found the same.
        """
        places = self._moved if alike else self._agreed()
        kinds: dict[object, list[Tensor]] = {}
        for place in places:
            buffer = self._at(place)
            kinds.setdefault((buffer.device, buffer.dtype), []).append(buffer)
        for buffers in kinds.values():
            exact = not buffers[0].is_floating_point()
            flat = torch.cat([each.reshape(-1) for each in buffers])
            flat = flat.to(torch.int64) if exact else flat.mul_(weight)
            self._team.finish([self._team.start_sum(flat, largest=exact)], "averaging buffers")
            for buffer, part in zip(buffers, torch.split(flat, [each.numel() for each in buffers]), strict=True):
                buffer.copy_(part.view(buffer.shape))

    def _agreed(self) -> list[int]:
        """Return what moved on any rank and has one shape on all of them."""
        shapes = [list(self._at(place).shape) for place in range(len(self._places))]
        everybody = self._team.exchange([self._moved, shapes])
        moved = set().union(*(each[0] for each in everybody))
        return sorted(place for place in moved if all(each[1][place] == shapes[place] for each in everybody))

    def _at(self, place: int) -> Tensor:
        module, name = self._places[place]
        buffer = module._buffers.get(name)
        return torch.empty(0) if buffer is None else buffer
