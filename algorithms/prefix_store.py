"""Rows of tensors by sample id, in memory or in memory-mapped files, under a budget."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import numpy as np
import torch
from torch import Tensor

from .prefix_table import Column, Leaf, Table

Ids: TypeAlias = Sequence[int]


@attrs.define
class Kind:
    """What is known of all rows from batches of one signature: their table, and whether all padding stands at the end."""

    table: int
    right: bool = True


@attrs.define(eq=False)
class RowStore:
    """Rows of tensors by sample id.

    Rows are kept with the *signature* of the batch they come from. A batch of another signature is made of them where one
    like it was seen before: each row is trimmed, or padded with zeros, at the end of each dimension.

    Args:
        budget: The most bytes it takes, reserved ones included.
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
        >>> store.add([5], "short", [torch.tensor([[9.0]])], right=True)
        True
        >>> store.rows([5, 7], "long"), store.rows([7], "short")
        ([tensor([[9., 0.],
                [1., 2.]])], [tensor([[1.]])])
        >>> len(store), store.nbytes, store.reserved  # there is room for 64 rows of each shape
        (3, 20, 768)
    """

    budget: int
    folder: Path | None = None
    narrow: bool = False
    full: bool = attrs.field(default=False, init=False)
    _tables: list[Table] = attrs.field(factory=list, init=False)
    _kinds: dict[Hashable, Kind] = attrs.field(factory=dict, init=False)
    _numbers: dict[int, int] = attrs.field(factory=dict, init=False)
    # By number: the place among the signatures, and the row in the table.
    _kind_of: array[int] = attrs.field(factory=lambda: array("l"), init=False)
    _row_of: array[int] = attrs.field(factory=lambda: array("l"), init=False)
    # By sample: its number, or -1; empty where their ids lie far apart, None where samples have come since.
    _lookup: np.ndarray[Any, Any] | None = attrs.field(default=None, init=False)
    _directory: tempfile.TemporaryDirectory[str] | None = attrs.field(default=None, init=False)

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def nbytes(self) -> int:
        """Bytes that the rows take."""
        return sum(each.used * each.row_bytes for each in self._tables)

    @property
    def reserved(self) -> int:
        """Bytes of memory or disk that are taken."""
        return sum(each.capacity * each.row_bytes for each in self._tables)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the first tensor, where all have one shape.

        Example:
            >>> store = RowStore(budget=1000)
            >>> store.add([1], "a", [torch.ones(1, 3), torch.ones(1)]), store.row_bytes, store.nbytes
            (True, 12, 16)
        """
        return self._tables[0].columns[0].row_bytes

    @property
    def is_uniform(self) -> bool:
        """Whether all rows have one shape, and none depends on how far its batch was padded.

        Example:
            >>> store = RowStore(budget=1000)
            >>> store.add([1], "a", [torch.ones(1, 2)]), store.is_uniform
            (True, True)
            >>> store.add([2], "b", [torch.ones(1, 2)], right=True), store.is_uniform  # rows of "a" may be padded at the start
            (True, False)
        """
        return len(self._tables) == 1 and (len(self._kinds) == 1 or all(each.right for each in self._kinds.values()))

    def has(self, ids: Ids) -> bool:
        """Return whether all of the samples are there."""
        return all(map(self._numbers.__contains__, ids))

    def alike(self, ids: Ids, signature: Hashable) -> bool:
        """Return whether all of the samples, which are there, come from batches of that signature.

        Example:
            >>> store = RowStore(budget=1000)
            >>> store.add([1, 2], "a", [torch.ones(2, 2)]), store.alike([1], "a"), store.alike([1], "b")
            (True, True, False)
            >>> store.add([3], "b", [torch.ones(1, 3)])
            True
            >>> store.alike([1, 2], "a"), store.alike([3], "b"), store.alike([1, 3], "a"), store.alike([3], "c")
            (True, True, False, False)
        """
        if len(self._kinds) == 1:
            return signature in self._kinds
        kind = next((place for place, each in enumerate(self._kinds) if each == signature), -1)
        return all(self._kind_of[self._numbers[each]] == kind for each in ids)

    def fits(self, ids: Ids, signature: Hashable) -> bool:
        """Return whether the samples, which are there, can be trimmed and padded into a batch of that signature.

        Example:
            >>> store = RowStore(budget=1000)
            >>> store.add([1], "a", [torch.ones(1, 2)], right=True), store.add([2], "b", [torch.ones(1, 3)])
            (True, True)
            >>> store.fits([1], "b"), store.fits([2], "a"), store.fits([1], "never seen")  # of "b" padding may stand anywhere
            (True, False, False)
        """
        if signature not in self._kinds:
            return False
        kinds, own = list(self._kinds.values()), self._tables[self._kinds[signature].table]
        theirs = (kinds[place] for place in {self._kind_of[self._numbers[each]] for each in ids})
        return all(kind.right and _like(self._tables[kind.table].leaves, own.leaves) for kind in theirs)

    def take(self, ids: Iterable[int], samples: int, count: int) -> list[Tensor] | None:
        """Return the first ``count`` tensors, with one row a sample, in as little time as can be.

        Args:
            ids: The samples.
            samples: How many they are.
            count: How many tensors.

        Returns:
            None where a sample is missing, or the rows differ in shape.

        Example:
            >>> store = RowStore(budget=1000)
            >>> store.add([4, 0, 2], "a", [torch.tensor([40.0, 0.0, 20.0]), torch.tensor([4, 0, 2])])
            True
            >>> store.take([2, 4, 2], 3, 1), store.take([0], 1, 2)
            ([tensor([20., 40., 20.])], [tensor([0.]), tensor([0])])
            >>> store.take([4, 5], 2, 1), store.add([5], "b", [torch.ones(1, 2), torch.ones(1)]), store.take([4], 1, 1)
            (None, True, None)
        """
        if len(self._tables) != 1:
            return None
        rows = self._found(np.fromiter(ids, np.int64, samples))
        if rows is None:
            return None
        (table,), index = self._tables, torch.from_numpy(rows)
        pairs = zip(table.leaves[:count], table.columns, strict=False)
        return [leaf.made_of(column.rows.index_select(0, index)) for leaf, column in pairs]

    def _found(self, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        """Return the samples' numbers, which with one table are their rows; None where one is missing.

        Example:
            >>> store = RowStore(budget=1000)
            >>> store.add([4, 0, 2], "a", [torch.ones(3)])
            True
            >>> store._found(np.array([2, 4])), store._found(np.array([1])), store._found(np.array([5])), len(store._lookup)
            (array([2, 0]), None, None, 5)
            >>> store.add([16], "a", [torch.ones(1)]), store._found(np.array([16, 0])), len(store._lookup)  # too far apart
            (True, array([3, 1]), 0)
        """
        numbers, lookup = self._numbers, self._lookup
        if lookup is None:
            dense = bool(numbers) and min(numbers) >= 0 and max(numbers) < 4 * len(numbers)
            self._lookup = lookup = np.full(max(numbers) + 1 if dense else 0, -1, np.int64)
            if dense:
                lookup[list(numbers)] = list(numbers.values())
        if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= len(lookup):
            rows = np.array([numbers.get(each, -1) for each in ids.tolist()], np.int64)
        else:
            rows = lookup[ids]
        return rows if (rows >= 0).all() else None

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

        Raises:
            ValueError: Samples of that signature had other shapes before.

        Example:
            >>> store = RowStore(budget=16)
            >>> store.add([7, 3], "a", [torch.ones(2, 2)]), store.add([3, 7], "a", [torch.zeros(2, 2)])
            (True, True)
            >>> store.rows([3], "a")  # the first time counts
            [tensor([[1., 1.]])]
            >>> store.add([3, 4], "a", [torch.ones(2, 2)]), store.full, store.has([4]), store.add([3], "a", [torch.ones(1, 2)])
            (False, True, False, True)
            >>> store = RowStore(budget=24)  # for all shapes together
            >>> store.add([1], "a", [torch.ones(1, 2)]), store.reserved, store.add([2], "b", [torch.ones(1, 1)]), store.full
            (True, 24, False, True)
            >>> store = RowStore(budget=2**60)  # more than there is
            >>> store.add([1], "a", [torch.ones(1).expand(1, 2**42)]), store.full, store.has([1])
            (False, True, False)
        """
        new = {each: place for place, each in enumerate(ids) if each not in self._numbers}
        if not new or self.full:
            return not new
        kind = self._kind(signature, tuple(map(Leaf.of, batch)), exact)
        kind.right &= right
        table = self._tables[kind.table]
        others = self.reserved - table.capacity * table.row_bytes
        at_most = (self.budget - others) // max(table.row_bytes, 1)
        if table.used + len(new) > at_most:
            self.full = True
            return False
        places = list(new.values())
        rows = [each.detach() if len(new) == len(each) else each.detach()[places] for each in batch]
        try:
            table.append(rows, at_most=at_most)
        except (OSError, MemoryError):
            self.full = True
            return False
        self._lookup = None
        place = list(self._kinds).index(signature)
        for row, each in enumerate(new, start=table.used - len(new)):
            self._numbers[each] = len(self._row_of)
            self._kind_of.append(place)
            self._row_of.append(row)
        return True

    def rows(self, ids: Ids, signature: Hashable) -> list[Tensor]:
        """Return tensors with one row a sample, as in a batch of that signature."""
        numbers = [self._numbers[each] for each in ids]
        kinds, own = list(self._kinds.values()), self._kinds[signature].table
        leaves = self._tables[own].leaves
        rows = torch.tensor([self._row_of[each] for each in numbers])
        places: dict[int, list[int]] = {}  # by table
        for place, each in enumerate(numbers):
            places.setdefault(kinds[self._kind_of[each]].table, []).append(place)
        if list(places) == [own]:
            parts = [column.rows.index_select(0, rows) for column in self._tables[own].columns]
        else:
            parts = [torch.zeros((len(ids), *leaf.shape), dtype=leaf.dtype) for leaf in leaves]
            for table, targets in places.items():
                index = torch.tensor(targets)
                for part, column in zip(parts, self._tables[table].columns, strict=True):
                    _put(part, index, column.rows.index_select(0, rows[index]))
        return [leaf.made_of(part) for leaf, part in zip(leaves, parts, strict=True)]

    def close(self) -> None:
        """Forget everything, and remove the files.

        Example:
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     store = RowStore(1000, Path(folder, "cache"))
            ...     before = store.add([5, 8], "a", [torch.tensor([1.0, 2.0])]), store.rows([8], "a"), len([*Path(folder).rglob("0-0")])
            ...     store.close()
            ...     before, len([*Path(folder).rglob("*-*")]), len(store), store.nbytes
            ((True, [tensor([2.])], 1), 0, 0, 0)
        """
        self._tables, self._kinds, self._numbers = [], {}, {}
        self._lookup = None
        self._kind_of, self._row_of = array("l"), array("l")
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def _kind(self, signature: Hashable, leaves: tuple[Leaf, ...], exact: int) -> Kind:
        """Return what is known of a signature; for a new one, find its table or make one.

        Example:
            >>> store = RowStore(budget=1000)
            >>> kinds = [store._kind(name, (Leaf.of(torch.ones(1, size)),), 0) for name, size in (("a", 2), ("b", 2), ("c", 3))]
            >>> [kind.table for kind in kinds]  # two signatures of one shape share a table
            [0, 0, 1]
            >>> store._kind("a", (Leaf.of(torch.ones(1, 3)),), 0)
            Traceback (most recent call last):
            ValueError: samples of one shape had (Leaf(shape=(2,), ...
        """
        kind = self._kinds.get(signature)
        if kind is None:
            found = (place for place, each in enumerate(self._tables) if each.leaves == leaves)
            number = next(found, len(self._tables))
            if number == len(self._tables):
                self._tables.append(self._table(leaves, exact))
            kind = self._kinds[signature] = Kind(number)
        elif [each.shape for each in self._tables[kind.table].leaves] != [each.shape for each in leaves]:
            raise ValueError(f"samples of one shape had {self._tables[kind.table].leaves} and have {leaves}")
        return kind

    def _table(self, leaves: tuple[Leaf, ...], exact: int) -> Table:
        """Return a table for rows of another shape; files and bfloat16 where they are asked for.

        Example:
            >>> leaves = [Leaf.of(torch.ones(1, dtype=each)) for each in (torch.float32, torch.float16, torch.int64, torch.float32)]
            >>> [column.rows.dtype for column in RowStore(1000, narrow=True)._table(tuple(leaves), exact=1).columns]
            [torch.bfloat16, torch.float16, torch.int64, torch.float32]
        """
        if self.folder is not None and self._directory is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._directory = tempfile.TemporaryDirectory(prefix="prefix-cache-", dir=self.folder)
        columns = []
        for number, leaf in enumerate(leaves):
            wide = leaf.dtype.is_floating_point and leaf.dtype.itemsize > 2
            narrow = self.narrow and number < len(leaves) - exact and wide
            path = None if self._directory is None else Path(self._directory.name, f"{len(self._tables)}-{number}")
            columns.append(Column(leaf.shape, torch.bfloat16 if narrow else leaf.dtype, path))
        return Table(leaves, columns)


def _put(part: Tensor, index: Tensor, rows: Tensor) -> None:
    """Write rows at places of the first dimension, trimmed or padded with zeros at the end of each other one.

    Example:
        >>> part = torch.ones(3, 2, 2)
        >>> _put(part, torch.tensor([2]), torch.full((1, 1, 3), 5.0))
        >>> part[1:].tolist()
        [[[1.0, 1.0], [1.0, 1.0]], [[5.0, 5.0], [0.0, 0.0]]]
    """
    sizes = list(map(min, part.shape[1:], rows.shape[1:]))
    whole = torch.zeros((len(index), *part.shape[1:]), dtype=part.dtype)
    _cut(whole, sizes).copy_(_cut(rows, sizes))
    part[index] = whole


def _cut(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return so many of each dimension but the first, as a view."""
    for dimension, size in enumerate(sizes, start=1):
        rows = rows.narrow(dimension, 0, size)
    return rows


def _like(some: Sequence[Leaf], others: Sequence[Leaf]) -> bool:
    """Return whether rows of one can be trimmed and padded into rows of the other.

    Example:
        >>> one, longer, whole, flat = (Leaf.of(torch.ones(1, 2)), Leaf.of(torch.ones(1, 5)), Leaf.of(torch.ones(1, 2).int()), Leaf.of(torch.ones(1)))
        >>> _like([one], [longer]), _like([one], [whole]), _like([one], [flat])
        (True, False, False)
    """
    return all(
        one.dtype == other.dtype and len(one.shape) == len(other.shape) for one, other in zip(some, others, strict=True)
    )
