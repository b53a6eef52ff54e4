"""Rows of tensors by sample id, in memory or in memory-mapped files, under a budget."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TypeAlias

import attrs
import torch
from torch import Tensor

Ids: TypeAlias = Sequence[int]
_FIRST_CAPACITY = 64


@attrs.frozen
class Leaf:
    """What a tensor of a batch was like, apart from its number of samples.

    Args:
        shape: Shape of one sample.
        dtype: Type of its numbers.
        device: Where it lay.
        order: Its dimensions from the widest stride to the narrowest: kernels may round differently by layout.
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
    """One tensor of every sample, one below the other, in memory or in a file of its own."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, path: Path | None) -> None:
        self._shape, self._dtype, self._path = shape, dtype, path
        self.rows = torch.empty((0, *shape), dtype=dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample."""
        return self._dtype.itemsize * torch.Size(self._shape).numel()

    def grow(self, capacity: int) -> None:
        """Make room for ``capacity`` samples.

        Raises:
            OSError: The disk is full.
        """
        if self._path is None or not self.row_bytes:
            rows = torch.empty((capacity, *self._shape), dtype=self._dtype)
            rows[: len(self.rows)] = self.rows
            self.rows = rows
            return
        # Reserved first: writing to a mapped page for which the disk has no room kills the process.
        with self._path.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, capacity * self.row_bytes)
        numel = capacity * torch.Size(self._shape).numel()
        mapped = torch.from_file(str(self._path), shared=True, size=numel, dtype=self._dtype)
        self.rows = mapped.view(capacity, *self._shape)


@attrs.define(eq=False)
class Table:
    """The samples whose tensors have equal shapes.

    Args:
        signature: Of the batches they come from.
        leaves: What the tensors of a batch of them were like.
        columns: One for each.
        right: Whether all rows end where their sample ends, or in padding.
    """

    signature: Hashable
    leaves: tuple[Leaf, ...]
    columns: list[Column]
    right: bool = True
    used: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample."""
        return sum(each.row_bytes for each in self.columns)

    def append(self, rows: Sequence[Tensor]) -> None:
        """Add samples below the others."""
        count = len(rows[0])
        if self.used + count > len(self.columns[0].rows):
            capacity = max(2 * len(self.columns[0].rows), self.used + count, _FIRST_CAPACITY)
            for column in self.columns:
                column.grow(capacity)
        for column, row in zip(self.columns, rows, strict=True):
            column.rows[self.used : self.used + count] = row
        self.used += count


@attrs.define(eq=False)
class RowStore:
    """Rows of tensors by sample id.

    Rows are kept by the *signature* of the batch they come from, in which everything has one shape. A batch of another
    signature is made of them where one like it was seen before: each row is trimmed, or padded with zeros, at the end of
    each dimension.

    Args:
        budget: The most bytes it takes.
        folder: Where files go; None keeps rows in memory.
        narrow: Whether wider floating-point numbers are stored as bfloat16.

    Example:
        >>> store = RowStore(budget=1000)
        >>> store.add([7, 3], "long", [torch.tensor([[1.0, 2.0], [3.0, 4.0]])])
        True
        >>> store.rows([3, 7, 3], "long")
        [tensor([[3., 4.],
                [1., 2.],
                [3., 4.]])]
    """

    budget: int
    folder: Path | None = None
    narrow: bool = False
    full: bool = attrs.field(default=False, init=False)
    _tables: dict[Hashable, Table] = attrs.field(factory=dict, init=False)
    _places: dict[int, tuple[Table, int]] = attrs.field(factory=dict, init=False)
    _directory: tempfile.TemporaryDirectory[str] | None = attrs.field(default=None, init=False)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def nbytes(self) -> int:
        """Bytes that the rows take."""
        return sum(each.used * each.row_bytes for each in self._tables.values())

    def has(self, ids: Ids) -> bool:
        """Return whether all of the samples are there."""
        return all(map(self._places.__contains__, ids))

    def alike(self, ids: Ids, signature: Hashable) -> bool:
        """Return whether all of the samples, which are there, come from batches of that signature."""
        table = self._tables.get(signature)
        return all(self._places[each][0] is table for each in ids)

    def fits(self, ids: Ids, signature: Hashable) -> bool:
        """Return whether the samples, which are there, can be trimmed and padded into a batch of that signature."""
        return signature in self._tables and all(self._places[each][0].right for each in ids)

    def take(self, ids: Ids, count: int) -> list[Tensor] | None:
        """Return the first ``count`` tensors, with one row a sample, in as little time as can be.

        Returns:
            None where a sample is missing, or the rows differ in shape and would have to be trimmed and padded.
        """
        known = self._places
        try:
            places = [known[each] for each in ids]
        except KeyError:
            return None
        table = places[0][0]
        if len(self._tables) > 1:
            others = {id(each): each for each, _ in places if each is not table}.values()
            if any(not (each.right and each.leaves[:count] == table.leaves[:count]) for each in others):
                return None
            if others:
                return self.rows(ids, table.signature)[:count] if table.right else None
        index = torch.tensor([row for _, row in places])
        pairs = zip(table.leaves[:count], table.columns, strict=False)
        return [leaf.made_of(column.rows.index_select(0, index)) for leaf, column in pairs]

    def add(
        self, ids: Ids, signature: Hashable, batch: Sequence[Tensor], *, right: bool = False, exact: int = 0
    ) -> bool:
        """Add the samples that are not there yet.

        Args:
            ids: The samples.
            signature: Of the batch.
            batch: Tensors with one row a sample.
            right: Whether padding stands at the end of each row.
            exact: How many of the tensors, the last ones, are not narrowed.

        Returns:
            Whether there was room.
        """
        new = {each: place for place, each in enumerate(ids) if each not in self._places}
        if not new or self.full:
            return not new
        table = self._tables.get(signature)
        if table is None:
            table = self._table(signature, [Leaf.of(each) for each in batch], exact)
            self._tables[signature] = table
        table.right &= right
        if self.nbytes + len(new) * table.row_bytes > self.budget:
            self.full = True
            return False
        places = list(new.values())
        try:
            table.append([each.detach() if len(new) == len(each) else each.detach()[places] for each in batch])
        except OSError:
            self.full = True
            return False
        self._places.update((each, (table, table.used - len(new) + row)) for row, each in enumerate(new))
        return True

    def rows(self, ids: Ids, signature: Hashable) -> list[Tensor]:
        """Return tensors with one row a sample, as in a batch of that signature."""
        table = self._tables[signature]
        places = [self._places[each] for each in ids]
        if all(each is table for each, _ in places):
            index = torch.tensor([row for _, row in places])
            parts = [column.rows.index_select(0, index) for column in table.columns]
        else:
            parts = [torch.zeros((len(ids), *leaf.shape), dtype=leaf.dtype) for leaf in table.leaves]
            for target, (source, row) in enumerate(places):
                for part, column in zip(parts, source.columns, strict=True):
                    common = tuple(map(slice, map(min, part.shape[1:], column.rows.shape[1:])))
                    part[target][common] = column.rows[row][common]
        return [leaf.made_of(part) for leaf, part in zip(table.leaves, parts, strict=True)]

    def close(self) -> None:
        """Forget everything, and remove the files."""
        self._tables, self._places = {}, {}
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def _table(self, signature: Hashable, leaves: list[Leaf], exact: int) -> Table:
        if self.folder is not None and self._directory is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._directory = tempfile.TemporaryDirectory(prefix="prefix-cache-", dir=self.folder)
        columns = []
        for number, leaf in enumerate(leaves):
            narrow = (
                self.narrow
                and number < len(leaves) - exact
                and leaf.dtype.is_floating_point
                and leaf.dtype.itemsize > 2
            )
            path = None if self._directory is None else Path(self._directory.name, f"{len(self._tables)}-{number}")
            columns.append(Column(leaf.shape, torch.bfloat16 if narrow else leaf.dtype, path))
        return Table(signature, tuple(leaves), columns)
