"""Tables of samples whose tensors have equal shapes: columns in memory or in memory-mapped files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import attrs
import numpy as np
import torch
from torch import Tensor

_FIRST_CAPACITY = 64


@attrs.frozen
class Leaf:
    """What a tensor of a batch was like, apart from its number of samples.

    Args:
        shape: Shape of one sample.
        dtype: Type of its numbers.
        device: Where it lay.
        order: Its dimensions from the widest stride to the narrowest: kernels may round differently by layout.

    Example:
        >>> leaf = Leaf.of(torch.arange(6.0).view(2, 3).t())
        >>> leaf.shape, leaf.order, leaf.straight
        ((2,), (1, 0), False)
        >>> rows = leaf.made_of(torch.ones(4, 2, dtype=torch.bfloat16))
        >>> rows.dtype, rows.stride(), Leaf.of(rows) == leaf
        (torch.float32, (1, 4), True)
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    order: tuple[int, ...]
    straight: bool = attrs.field(init=False, eq=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "straight", self.order == tuple(range(len(self.order))))

    @classmethod
    def of(cls, batch: Tensor) -> Leaf:
        """Describe a tensor."""
        order = tuple(sorted(range(batch.ndim), key=batch.stride, reverse=True))
        return cls(tuple(batch.shape[1:]), batch.dtype, batch.device, order)

    def made_of(self, rows: Tensor) -> Tensor:
        """Return the rows as such a tensor."""
        batch = rows if rows.dtype == self.dtype and rows.device == self.device else rows.to(self.device, self.dtype)
        if self.straight:
            return batch
        inverse = sorted(range(batch.ndim), key=self.order.__getitem__)
        return batch.permute(self.order).contiguous().permute(inverse)


class Column:
    r"""One tensor of every sample, one below the other, in memory or in a file of its own.

    Example:
        >>> column = Column((2,), torch.float32, None)
        >>> column.grow(3)
        >>> column.rows[:] = torch.ones(3, 2)
        >>> column.grow(5)
        >>> column.row_bytes, column.rows.shape, column.rows[:3].sum()
        (8, torch.Size([5, 2]), tensor(6.))
        >>> mapped = Column((), torch.int16, Path("column"))
        >>> mapped.grow(2)
        >>> mapped.rows[:] = torch.tensor([3, 5])
        >>> mapped.grow(3)
        >>> Path("column").read_bytes(), mapped.rows  # what is written lies in the file
        (b'\x03\x00\x05\x00\x00\x00', tensor([3, 5, 0], dtype=torch.int16))
        >>> empty = Column((0,), torch.float32, None)
        >>> empty.grow(3)
        >>> empty.row_bytes, empty.rows.shape
        (0, torch.Size([3, 0]))
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, path: Path | None) -> None:
        self._shape, self._dtype, self._path = shape, dtype, path
        self._bytes = np.empty(0, dtype=np.uint8)
        self.rows = torch.empty((0, *shape), dtype=dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample."""
        return self._dtype.itemsize * torch.Size(self._shape).numel()

    def grow(self, capacity: int) -> None:
        """Make room for ``capacity`` samples, without a second copy of those that are there.

        Raises:
            OSError: The disk is full.
            MemoryError: Memory is.
        """
        size = capacity * self.row_bytes
        if not size:
            self.rows = torch.empty((capacity, *self._shape), dtype=self._dtype)
            return
        if self._path is None:
            self.rows = self.rows[:0].clone()  # nothing else looks at the bytes, which may move
            self._bytes.resize(size, refcheck=False)
            flat = torch.from_numpy(self._bytes).view(self._dtype)
        else:
            # Reserved first: writing to a mapped page for which the disk has no room kills the process.
            with self._path.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, size)
            numel = capacity * torch.Size(self._shape).numel()
            flat = torch.from_file(str(self._path), shared=True, size=numel, dtype=self._dtype)
        self.rows = flat.view(capacity, *self._shape)


@attrs.define(eq=False)
class Table:
    """The samples whose tensors have equal shapes.

    Args:
        leaves: What the tensors of a batch of them were like.
        columns: One for each.
    """

    leaves: tuple[Leaf, ...]
    columns: list[Column]
    used: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample."""
        return sum(each.row_bytes for each in self.columns)

    @property
    def capacity(self) -> int:
        """For how many samples there is room."""
        return len(self.columns[0].rows)

    def append(self, rows: Sequence[Tensor], *, at_most: int) -> None:
        """Add samples below the others; never make room for more than ``at_most`` in all.

        Example:
            >>> rows = torch.zeros(64, 2)
            >>> table = Table((Leaf.of(rows),), [Column((2,), torch.float32, None)])
            >>> table.append([rows[:1]], at_most=150)
            >>> table.append([rows[1:]], at_most=150)
            >>> table.used, table.capacity
            (64, 64)
            >>> table.append([rows[:1]], at_most=150)
            >>> table.used, table.capacity, table.row_bytes
            (65, 128, 8)
            >>> table.append([rows], at_most=150)
            >>> table.used, table.capacity
            (129, 150)
            >>> table = Table((Leaf.of(rows),), [Column((2,), torch.float32, None)])
            >>> table.append([torch.zeros(100, 2)], at_most=150)
            >>> table.used, table.capacity
            (100, 100)
        """
        count = len(rows[0])
        if self.used + count > self.capacity:
            capacity = min(max(2 * self.capacity, self.used + count, _FIRST_CAPACITY), at_most)
            for column in self.columns:
                column.grow(capacity)
        for column, row in zip(self.columns, rows, strict=True):
            column.rows[self.used : self.used + count] = row
        self.used += count


__all__ = ["Column", "Leaf", "Table"]
