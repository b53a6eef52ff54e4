"""Gradients of what trains, added up over the ranks while the backward pass still runs.

The parameters that train lie in buckets, in the ledger's canonical order from the last to the first, about the order in which
their gradients come. Nothing but that order and their sizes decides the layout, so it is the same on every rank, in every
batch, and in a resumed run: the same numbers are added in the same order. A bucket is reduced when its last gradient has
come and all buckets before it are under way. With the last one goes a row of numbers from each rank.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn

from .distributed import Pending, Replicate, Rows, Team, refuse_sparse
from .errors import DistributedError
from .ledger import ParameterLedger

_MIB = 2**20
_ROW = 6
# Of the last bucket's element type, in which whole numbers up to 2^24 are exact.
_EXACT = (torch.float32, torch.float64)


@define(eq=False)
class _Bucket:
    flat: Tensor
    parameters: list[nn.Parameter] = field(factory=list)
    views: list[Tensor] = field(factory=list)
    awaited: int = 0
    work: Pending | None = None


class GradientBuckets:
    """The gradients of what trains, and their way to the other ranks.

    Args:
        team: The ranks.
        ledger: What trains.
    """

    def __init__(self, team: Team, ledger: ParameterLedger) -> None:
        self._team, self._ledger = team, ledger
        self._version = -1
        self._buckets: list[_Bucket] = []
        self._parameters: list[nn.Parameter] = []
        self._hooks: list[Any] = []
        self._arrived = bytearray()
        self._armed = False
        self._next = 0

    @property
    def bytes_per_step(self) -> int:
        """What each rank hands to the reduction in a step."""
        return sum(each.flat.numel() * each.flat.element_size() for each in self._buckets)

    def follow(self) -> None:
        """Lay the buckets out for what trains now, where the ledger has moved."""
        if self._version == self._ledger.version:
            return
        self.close()
        trainable = self._ledger.trainable
        named = reversed(list(self._ledger.parameters.items()))
        self._parameters = [each for name, each in named if name in trainable]
        self._buckets = _laid_out(self._parameters, self._team)
        self._arrived = bytearray(len(self._parameters))
        place = 0
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                hook = parameter.register_post_accumulate_grad_hook(self._hook(place, bucket))  # type: ignore[no-untyped-call]
                self._hooks.append(hook)
                place += 1
        self._parameters = [each for bucket in self._buckets for each in bucket.parameters]
        self._version = self._ledger.version
        self._rest()

    def arm(self) -> None:
        """Reduce what comes from now on: the last microbatch has begun."""
        self._armed = True

    def settle(self, row: Sequence[float]) -> Rows:
        """Reduce what is left, wait for everything, and make the sums the gradients.

        A parameter that got no gradient on any rank has none; one that got some is given zeros by the others.

        Args:
            row: Up to five numbers; fewer than 24 bits of each are sure to arrive.

        Returns:
            The rows of all ranks, in order.
        """
        absent = [place for place, each in enumerate(self._parameters) if each.grad is None]
        mask = zlib.crc32(repr(absent).encode()) & 0xFFFFFF if absent else 0
        own = torch.tensor([float(mask), *row])
        last = self._buckets[-1]
        table = last.flat[last.flat.numel() - _ROW * self._team.world :].view(self._team.world, _ROW)
        table.zero_()
        table[self._team.rank, : len(own)] = own
        while self._next < len(self._buckets):
            self._launch(self._buckets[self._next])
        works = [each.work for each in self._buckets if each.work is not None]
        self._team.finish(works, f"reducing gradients of batch {self._ledger.clock.batch}")
        rows: Rows = table.tolist()
        if any(each[0] != mask for each in rows):
            everybody = self._team.exchange(absent)
            absent = sorted(set(absent).intersection(*everybody))
        self._hand_over(set(absent))
        self._rest()
        return [each[1:] for each in rows]

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._buckets, self._version, self._armed = [], [], -1, False

    def _hand_over(self, absent: set[int]) -> None:
        views = [view for bucket in self._buckets for view in bucket.views]
        places = [place for place in range(len(views)) if place not in absent] if absent else range(len(views))
        self._ledger.put_gradients([self._parameters[place] for place in places], [views[place] for place in places])

    def _rest(self) -> None:
        """Wait for the next batch."""
        self._armed, self._next = False, 0
        self._arrived[:] = bytes(len(self._arrived))
        for bucket in self._buckets:
            bucket.awaited, bucket.work = len(bucket.parameters), None

    def _hook(self, place: int, bucket: _Bucket) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            if not self._armed:
                return
            refuse_sparse(parameter.grad)
            if self._arrived[place]:
                if bucket.work is not None:
                    raise DistributedError(
                        "a parameter got its gradient twice in one backward pass, as with reentrant activation checkpointing, "
                        "and the first was under way. Write: torch.utils.checkpoint.checkpoint(…, use_reentrant=False)."
                    )
                return
            self._arrived[place] = 1
            bucket.awaited -= 1
            # The last bucket waits for the end of the pass, and takes the row along.
            while self._next < len(self._buckets) - 1 and not self._buckets[self._next].awaited:
                self._launch(self._buckets[self._next])

        return arrived

    @torch.no_grad()
    def _launch(self, bucket: _Bucket) -> None:
        """Copy the gradients of a bucket together, and begin to reduce it."""
        gradients = [each.grad for each in bucket.parameters]
        found = [each for each in gradients if each is not None]
        if len(found) == len(gradients):
            views = bucket.views
        else:
            views = [view for view, each in zip(bucket.views, gradients, strict=True) if each is not None]
            for view, each in zip(bucket.views, gradients, strict=True):
                if each is None:
                    view.zero_()
        if found:
            torch._foreach_copy_(views, found)  # pyright: ignore[reportPrivateImportUsage]
        flat = bucket.flat
        bucket.work = self._team.start_sum(torch.view_as_real(flat) if flat.is_complex() else flat)
        self._next += 1


def _laid_out(parameters: Sequence[nn.Parameter], team: Team) -> list[_Bucket]:
    """Return buckets over parameters of one dtype and device each, filled in the order in which they are given.

    They are a quarter of all gradients each, so that most of them travel during the backward pass, but not above the
    team's limit, nor below 1 MiB.
    """
    total = sum(each.numel() * each.element_size() for each in parameters)
    assert isinstance(team.chosen, Replicate), "what lies in shards has no buckets"
    most = min(team.chosen.bucket_mib * _MIB, max(total / 4, _MIB))
    closed: list[list[nn.Parameter]] = []
    filling: dict[object, tuple[list[nn.Parameter], int]] = {}
    for each in parameters:
        kind = (each.device, each.dtype)
        members, size = filling.pop(kind, ([], 0))
        members.append(each)
        size += each.numel() * each.element_size()
        if size >= most:
            closed.append(members)
        else:
            filling[kind] = members, size
    closed += [members for members, _ in filling.values()]
    if not closed or closed[-1][0].dtype not in _EXACT:
        closed.append([])
    return [_bucket(members, _ROW * team.world if members is closed[-1] else 0, parameters) for members in closed]


def _bucket(members: list[nn.Parameter], extra: int, parameters: Sequence[nn.Parameter]) -> _Bucket:
    like = members[0] if members else torch.empty(0, device=parameters[0].device if parameters else None)
    flat = torch.zeros(sum(each.numel() for each in members) + extra, dtype=like.dtype, device=like.device)
    bucket, start = _Bucket(flat, members), 0
    for each in members:
        part = flat[start : start + each.numel()]
        # With the strides of the parameter, as gradients have them: copying is then one pass over memory.
        dense = _is_dense(each)
        bucket.views.append(part.as_strided(each.shape, each.stride()) if dense else part.view(each.shape))
        start += each.numel()
    return bucket


def _is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor's elements fill its memory, in whatever order of dimensions."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda each: each[1]):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
