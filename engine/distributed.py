"""Several processes as one: who takes part, what they tell each other, and how long one waits for the others.

The launch is torchrun's: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in the environment. Gradients go over
NCCL where they lie on a GPU and over gloo elsewhere; what ranks tell each other always goes over gloo, so that a
process that ended or hangs is noticed on the CPU, as an error with words, and not inside a kernel.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from attrs import Attribute, field, frozen
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # public, and not in its __all__
from torch.distributed.rendezvous import rendezvous

from .differences import differing
from .errors import ArgumentError, DistributedError, shorten
from .events import Event
from .expanded import put
from .log import get_logger
from .typing import Json

log = get_logger(__name__)
# What a rank can be doing when it tells something; both sides of a disagreement are named by it.
_PLACES = (*(event.name for event in Event), "exchange")
_WIDTH = 8
_SHOWN = 8
_MORE = ", and telling each other more"
# How gloo and NCCL say that another process is gone, or silent.
_LOST = re.compile(
    r"gloo|NCCL|Connection (closed|reset|refused)|Socket Timeout|Broken pipe|process group watchdog", re.IGNORECASE
)
Rows = Sequence[Sequence[float]]


def _positive(instance: object, attribute: Attribute[Any], value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
        owner = type(instance).__name__
        unit = "seconds" if attribute.name == "timeout" else "MiB"
        raise ArgumentError(
            f"{owner}({attribute.name}=)", got=value, takes=f"a number of {unit} above 0",
            example=f"Trainer(distributed={owner}({attribute.name}=60))",
        )  # fmt: skip


@frozen
class Replicate:
    """Data-parallel training with a whole model on each rank: what ``Trainer(distributed="auto")`` means under torchrun.

    Args:
        timeout: Seconds after which a rank that waits for the others gives up with a :class:`DistributedError`.
        bucket_mib: The most MiB of gradients that are reduced at once.

    Raises:
        ArgumentError: A number that is not above 0.

    Example:
        >>> Replicate(timeout=120).bucket_mib
        25.0
    """

    timeout: float = field(default=600.0, validator=_positive)
    bucket_mib: float = field(default=25.0, validator=_positive)


def _is_flag(_: object, attribute: Attribute[Any], value: object) -> None:
    if not isinstance(value, bool):
        example = f"Trainer(distributed=FullyShard({attribute.name}=True))"
        raise ArgumentError(f"FullyShard({attribute.name}=)", got=value, takes="True or False", example=example)


def _is_mixed(_: object, __: object, value: object) -> None:
    if value not in (None, "bf16"):
        takes = "None or 'bf16'; float16 would need its gradients scaled"
        example = "Trainer(distributed=FullyShard(mixed_precision='bf16'))"
        raise ArgumentError("FullyShard(mixed_precision=)", got=value, takes=takes, example=example)


@frozen
class FullyShard:
    """Data-parallel training in which each rank holds a share of the weights, gradients and optimizer state: FSDP2.

    Each block of the model, and the rest together, are gathered while they compute, by torch's ``fully_shard``. The model
    is whole before the fit and after it. Alone, a process trains as if nothing was said.

    Args:
        reshard: Let go of a block's gathered weights after its forward pass and gather them again for the backward pass;
            False keeps them until then: faster, and as much memory for weights as on one process.
        mixed_precision: ``"bf16"`` gathers and computes in bfloat16, and adds gradients up and steps in the weights' dtype.
        offload: Keep shards, gradients and optimizer state in the memory of the CPU, where a GPU computes.
        timeout: Seconds after which a rank that waits for the others gives up with a :class:`DistributedError`.

    Raises:
        ArgumentError: A value of the wrong kind.

    Source:
        Zhao et al., arXiv:2304.11277; ``torch.distributed.fsdp.fully_shard``.

    Example:
        >>> FullyShard(mixed_precision="bf16").reshard
        True
    """

    reshard: bool = field(default=True, validator=_is_flag)
    mixed_precision: Literal["bf16"] | None = field(default=None, validator=_is_mixed)
    offload: bool = field(default=False, validator=_is_flag)
    timeout: float = field(default=600.0, validator=_positive)


Together: TypeAlias = Replicate | FullyShard
"""How ranks train together."""


class Pending(Protocol):
    """A reduction under way."""

    def wait(self) -> Any:
        """Wait for its end."""


@frozen
class Launch:
    """What the launcher says of this process.

    Args:
        rank: Its number, from 0.
        world: How many there are.
        local_rank: Its number on this machine.
    """

    rank: int
    world: int
    local_rank: int

    @classmethod
    def found(cls, environment: Mapping[str, str]) -> Launch | None:
        """Return what the environment says; None for a process alone.

        Raises:
            DistributedError: The launch is incomplete.

        Example:
            >>> Launch.found({})
            >>> Launch.found({"WORLD_SIZE": "2"})
            Traceback (most recent call last):
            thawline.engine.errors.DistributedError: this process is one of 2 (WORLD_SIZE=2), and RANK, MASTER_ADDR, ...
        """
        world = _whole(environment, "WORLD_SIZE", 1)
        if world <= 1:
            return None
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
        if missing:
            raise DistributedError(
                f"this process is one of {world} (WORLD_SIZE={world}), and {', '.join(missing)} is not set. Start all of them "
                f"with: torchrun --nproc-per-node {world} script.py, or write Trainer(distributed=False) to train a model of "
                "its own in each."
            )
        rank = _whole(environment, "RANK", 0)
        if not 0 <= rank < world:
            raise DistributedError(
                f"RANK is {rank}, and takes 0 to {world - 1} where WORLD_SIZE={world}. Use torchrun."
            )
        return cls(rank, world, _whole(environment, "LOCAL_RANK", rank))


def _whole(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    try:
        return int(text)
    except ValueError:
        raise DistributedError(f"{name} takes a whole number, got {shorten(text)}. Start with torchrun.") from None


def can_fork() -> bool:
    """Return whether ranks can be made here by forking: there is gloo, and this process is not one of several."""
    return hasattr(os, "fork") and dist.is_available() and dist.is_gloo_available() and not dist.is_initialized()


def restarts(environment: Mapping[str, str]) -> int:
    """Return how often ``torchrun --max-restarts`` has started this process anew."""
    return _whole(environment, "TORCHELASTIC_RESTART_COUNT", 0)


def restarted(team: Team | None) -> bool:
    """Return whether torchrun has started any of the ranks anew."""
    count = restarts(os.environ)
    return bool(count if team is None else max(team.exchange(count)))


def join(chosen: Together, device: torch.device) -> Team | None:
    """Return the team that this process is one of, connected to the others; None for a process alone.

    Args:
        chosen: How to train together.
        device: Where the gradients will lie; a GPU without a number becomes that of the rank.

    Raises:
        DistributedError: The launch is incomplete, the others do not come within the timeout, or there is no GPU for it.
    """
    launch = Launch.found(os.environ)
    if launch is None:
        return None
    if device.type == "cuda":
        _take_gpu(launch, device)
    try:
        data, control = _groups(chosen.timeout, device.type)
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"rank {launch.rank} of {launch.world} did not find the others within {chosen.timeout:g} s at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {_first_line(error)}. Start all ranks with the same "
            "torchrun command; over several machines, with the same --rdzv-endpoint=<first machine>:29500."
        ) from error
    return Team(launch.rank, launch.world, chosen, data, control)


@cache  # once a process: groups are made by all ranks together, and stay
def _groups(timeout: float, kind: str) -> tuple[Any, Any]:
    """Return the group that reduces gradients and the one that ranks talk over."""
    span = timedelta(seconds=timeout)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"  # what shards are offloaded to is gathered as well
    if not dist.is_initialized():
        store, rank, world = next(iter(rendezvous("env://", timeout=span)))
        # torchrun's store outlives a restart, and would lead to the addresses of those that were killed. Machines count
        # restarts each for itself, so only where there is one can the count tell attempts apart.
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
            store = PrefixStore(f"attempt {restarts(os.environ)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=span)
        atexit.register(_leave)
    return dist.new_group(backend=backend, timeout=span), dist.new_group(backend="gloo", timeout=span)


def _leave() -> None:
    """End the groups and their threads while Python still runs: one that wants Python afterwards aborts the process."""
    if dist.is_initialized():
        dist.destroy_process_group()
    _groups.cache_clear()
    gc.collect()  # whoever holds a group in a cycle, such as the frames of an error


def _take_gpu(launch: Launch, device: torch.device) -> None:
    if device.index is not None:
        torch.cuda.set_device(device)  # where torch puts shards
        return
    count = torch.cuda.device_count()
    if launch.local_rank >= count:
        raise DistributedError(
            f"rank {launch.rank} is number {launch.local_rank} on its machine, which has {count} GPUs. Write: torchrun "
            f"--nproc-per-node {count} script.py, or Trainer(device='cpu')."
        )
    torch.cuda.set_device(launch.local_rank)


class Team:
    """This process among the others.

    Every method but the constructor is called by all ranks, in the same order.

    Args:
        rank: The number of this one, from 0.
        world: How many there are.
        chosen: How they train together.
        data: The process group that reduces tensors.
        control: The process group, on the CPU, that everything else goes over.
    """

    def __init__(self, rank: int, world: int, chosen: Together, data: Any, control: Any) -> None:
        self.rank, self.world, self.chosen = rank, world, chosen
        self._data, self._control = data, control
        self._row = torch.zeros(_WIDTH, dtype=torch.float64)
        self._table = torch.zeros(world, _WIDTH, dtype=torch.float64)
        self._rows = list(self._table)
        self._doing = "starting"

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes, logs and shows."""
        return self.rank == 0

    @property
    def shards(self) -> bool:
        """Whether each rank holds a share of the weights."""
        return isinstance(self.chosen, FullyShard)

    # -- numbers and words -------------------------------------------------------------------------------------

    def tell(self, place: str, batch: int, *values: float) -> Rows:
        """Return what every rank tells, in order of rank.

        Args:
            place: What this rank is doing: the name of an event.
            batch: At which batch.
            values: Up to six numbers.

        Raises:
            DistributedError: Another rank is somewhere else, has ended, or does not answer within the timeout.
        """
        if place != "exchange":
            self._doing = f"at {place} of batch {batch}"
        elif not self._doing.endswith(_MORE):
            self._doing += _MORE
        row = (float(_PLACES.index(place)), float(batch), *values)
        self._row[: len(row)] = torch.tensor(row, dtype=torch.float64)
        with self._waiting():
            dist.all_gather(self._rows, self._row, group=self._control)
        rows: Rows = self._table.tolist()
        for rank, other in enumerate(rows):
            if (other[0], other[1]) != (row[0], row[1]):
                raise DistributedError(
                    f"the ranks are not at the same point: rank {rank} is at {_PLACES[int(other[0])]} of batch "
                    f"{int(other[1])}, rank {self.rank} is at {place} of batch {batch}. Loaders of other lengths lead there, and algorithms "
                    "that act on what only one rank sees."
                )
        return [other[2:] for other in rows]

    def exchange(self, value: object, *, batch: int = 0) -> list[Any]:
        """Return what every rank gives, in order of rank: anything that JSON can hold; at which batch, where that may differ."""
        text = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
        return [json.loads(each.tobytes()) for each in self._exchange_bytes(text, batch)]

    def share(self, value: object) -> Any:
        """Return what the first rank gives; the others' values are passed over."""
        return self.exchange(value if self.first else None)[0]

    def exchange_tensor(self, tensor: Tensor, *, batch: int = 0) -> list[Tensor]:
        """Return every rank's tensor, of whatever shapes, on the device of this one's."""
        shapes = self.exchange([list(tensor.shape), str(tensor.dtype)], batch=batch)
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        parts = []
        for (shape, kind), data in zip(shapes, self._exchange_bytes(raw, batch), strict=True):
            dtype: torch.dtype = getattr(torch, str(kind).removeprefix("torch."))
            flat = torch.from_numpy(data).view(dtype) if data.size else torch.empty(0, dtype=dtype)
            parts.append(flat.reshape(shape).to(tensor.device))
        return parts

    def _exchange_bytes(self, data: Any, batch: int) -> list[Any]:
        sizes = [int(row[0]) for row in self.tell("exchange", batch, data.size)]
        mine = torch.zeros(max(sizes), dtype=torch.uint8)
        mine[: data.size] = torch.from_numpy(data.copy())
        everybody = [torch.empty_like(mine) for _ in sizes]
        with self._waiting():
            dist.all_gather(everybody, mine, group=self._control)
        return [each[:size].numpy() for each, size in zip(everybody, sizes, strict=True)]

    # -- agreement ---------------------------------------------------------------------------------------------

    def compare(self, what: str, digest: str, facts: Callable[[], Mapping[str, Json]]) -> None:
        """Check that every rank holds the same.

        Args:
            what: What is compared.
            digest: Equal where the facts are.
            facts: Returns it in detail, by name; asked only where digests differ.

        Raises:
            DistributedError: On all ranks, where one differs from the first: names the rank, what it has and what the first has.
        """
        digests = self.exchange(digest)
        if len(set(digests)) == 1:
            return
        everybody = self.exchange(dict(facts()))
        rank = next(rank for rank, each in enumerate(digests) if each != digests[0])
        got, wanted = everybody[rank], everybody[0]
        found = [*differing("", got, wanted)]
        shown = [
            f"{name.removeprefix(', ')}: rank {rank} has {mine}, rank 0 has {first}"
            for name, mine, first in found[:_SHOWN]
        ]
        more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        raise DistributedError(f"the ranks disagree on {what}: {'; '.join([*shown, *more])}.")

    def all_or_none(self, doing: str, function: Callable[[], Any]) -> Any:
        """Call a function on every rank; where it fails on one, end on all.

        Args:
            doing: What is done, for the error of those where it did not fail.
            function: What to call; it exchanges nothing.

        Raises:
            Exception: What the function raised here.
            DistributedError: It failed on another rank, whose words are repeated.
        """
        failed: Exception | None = None
        result = None
        try:
            result = function()
        except Exception as error:  # noqa: BLE001 - raised below, once the others know
            failed = error
        words = self.exchange(None if failed is None else f"{type(failed).__name__}: {failed}")
        if failed is not None:
            raise failed
        for rank, each in enumerate(words):
            if each is not None:
                raise DistributedError(f"rank {rank} of {self.world} failed {doing}: {each}")
        return result

    # -- tensors -----------------------------------------------------------------------------------------------

    def mesh(self, device: torch.device) -> Any:
        """Return what torch lays out shards over: the ranks, who wait for each other no longer than was said."""
        from torch.distributed.device_mesh import DeviceMesh  # a process that trains alone does not load it

        return DeviceMesh.from_group(self._data, device.type)

    def start_sum(self, tensor: Tensor, *, largest: bool = False) -> Pending:
        """Begin to add up a tensor over all ranks, in place; or to take the largest of each element."""
        kind = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
        with self._waiting():
            work: Any = dist.all_reduce(tensor, kind, group=self._data, async_op=True)
        pending: Pending = work  # None where this process is not one of the group
        return pending

    def finish(self, works: Iterable[Pending], doing: str) -> None:
        """Wait for what was begun."""
        self._doing = doing
        with self._waiting():
            for work in works:
                work.wait()

    @torch.no_grad()
    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Make tensors what they are on the first rank, in place."""
        self._doing = "taking over the first rank's weights"
        for tensor in tensors:
            if not tensor.numel():
                continue
            sent = tensor.detach().contiguous()
            with self._waiting():
                dist.broadcast(sent.reshape(-1).view(torch.uint8), 0, group=self._data)
            if not self.first and sent.data_ptr() != tensor.data_ptr():
                put(tensor, sent)

    @contextmanager
    def _waiting(self) -> Generator[None]:
        """Say what happened where a collective fails: torch's words name neither rank nor place."""
        try:
            yield
        except RuntimeError as error:
            raise self.lost(error, self._doing) from error

    def lost(self, error: BaseException, doing: str) -> DistributedError:
        """Return what to raise where a collective failed because another rank is gone."""
        return DistributedError(
            f"rank {self.rank} of {self.world} lost another one while {doing}: {_first_line(error)}. A rank that ended "
            f"has said why in its own output; one that does not answer is given up after {self.chosen.timeout:g} s. "
            "Start again with the same command and fit(resume=True), or let torchrun do it: --max-restarts=3."
        )


def refuse_sparse(gradient: Tensor | None) -> None:
    """Raise a DistributedError for a gradient that holds some rows alone."""
    if gradient is not None and gradient.layout is not torch.strided:
        raise DistributedError(
            "a gradient is sparse, and ranks add up dense ones. Write: nn.Embedding(…, sparse=False)."
        )


def is_lost(error: BaseException) -> bool:
    """Return whether an error of torch says that another rank is gone, or does not answer."""
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


def _first_line(error: BaseException) -> str:
    """Return what torch says, without the place in its sources and without its advice."""
    line = str(error).strip().partition("\n")[0]
    return re.sub(r"^\[[^\]]*\.cc:\d+\] ", "", line).partition(". This is")[0][:200]
