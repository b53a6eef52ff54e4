"""The check of the conformance kit that trains on two ranks: processes forked from this one, over gloo."""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import socket
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .distributed import FullyShard, Replicate, Team, can_fork, join
from .endings import end_in_float64, if_parts_add_up
from .errors import DistributedError, ThawlineError
from .promises import check, fail, unless_alone
from .rehearsal import Rehearsal, difference
from .shards import unsharded

_RANKS = 2
_TOGETHER = Replicate(timeout=120)
_IN_SHARDS = FullyShard(timeout=120)
_PATIENCE = 600  # seconds


@check
def stays_equal_on_two_ranks(rehearsal: Rehearsal) -> None:
    """On two ranks weights, optimizer, algorithm and history are the same, and up to rounding those of one; where processes can fork.

    Where ``thorough``, with weights in shards as well, unless the fit is refused by a typed error that names ``Replicate()``.
    """
    if can_fork() and _divides(rehearsal):
        unless_alone(rehearsal, _train_two)


def _train_two(rehearsal: Rehearsal) -> None:
    """Fork two ranks, wait for them, and fail where one says what went wrong."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    until = time.monotonic() + _PATIENCE
    pipes = [_forked(rehearsal, rank, port) for rank in range(_RANKS)]
    said = [_read(*each, until) for each in pipes]
    if any(said):  # an error of a process alone is raised here as what it is
        rehearsal.fit()
        if_parts_add_up(rehearsal, _end_alone)
    for rank, text in enumerate(said):
        if text:
            fail(
                f"{rehearsal.name}: on rank {rank} of {_RANKS}: {text} Every rank sees its share of a batch alone: decide by the clock, "
                "by state.loss after the step and by metrics, which are those of all ranks, and draw random numbers from "
                "derive_seed(state.seed, …)."
            )


def _divides(rehearsal: Rehearsal) -> bool:
    """Return whether the loader's batches can be shared out between two."""
    size = getattr(rehearsal.loader, "batch_size", None)
    if size is None and isinstance(rehearsal.loader, Sequence):
        first = rehearsal.loader[0]
        size = len(first[0] if isinstance(first, (tuple, list)) else next(iter(first.values())))
    return isinstance(size, int) and size % _RANKS == 0


def _forked(rehearsal: Rehearsal, rank: int, port: int) -> tuple[int, int]:
    """Fork a rank; return its process and where it says what went wrong, if anything."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads that are there: the child uses none of them
        process = os.fork()
    if process:
        os.close(write)
        return process, read
    text = "it ended without a word."
    try:
        text = _train(rehearsal, rank, port)
    except BaseException as error:  # noqa: BLE001 - it is said in the parent
        text = f"{type(error).__name__}: {error}"
    finally:
        os.write(write, text.encode()[:4000])
        os._exit(0)


def _read(process: int, pipe: int, until: float) -> str:
    with os.fdopen(pipe, "rb") as file:
        if select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
            text = file.read().decode(errors="replace")
        else:
            text = f"it had not ended after {_PATIENCE} s."
            os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return text


def _train(rehearsal: Rehearsal, rank: int, port: int) -> str:
    """Train as one of two, and compare; return what went wrong: nothing where two processes cannot find each other here."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(_RANKS)}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(_RANKS), **address)
    torch.set_num_threads(1)
    try:
        team = join(_TOGETHER, torch.device("cpu"))
    except DistributedError:
        return ""
    assert team is not None, "WORLD_SIZE is set"
    facts = dict(_facts(rehearsal.fit(distributed=_TOGETHER).result))
    team.compare("what a fit came to", json.dumps(facts), lambda: facts)
    if_parts_add_up(rehearsal, _hold_against_one)
    if rehearsal.thorough:
        _train_in_shards(rehearsal, team)
    return ""


def _train_in_shards(rehearsal: Rehearsal, team: Team) -> None:
    try:
        facts = dict(_facts(rehearsal.fit(distributed=_IN_SHARDS).result))
    except ThawlineError as error:
        if "Replicate()" not in str(error):
            raise
    else:
        team.compare("what a fit with weights in shards came to", json.dumps(facts), lambda: facts)


def _hold_against_one(rehearsal: Rehearsal) -> None:
    """Hold a fit of two ranks against one of a process alone."""
    batches = rehearsal.batches_in_float64()
    one, two = end_in_float64(rehearsal, batches), end_in_float64(rehearsal, batches, distributed=_TOGETHER)
    if found := difference(one, two, "the fit", tolerance=1e-7):
        raise DistributedError(f"the fit is not that of a process alone. First difference, of one and of two: {found}.")


def _end_alone(rehearsal: Rehearsal) -> None:
    end_in_float64(rehearsal, rehearsal.batches_in_float64())


def _facts(value: Any, place: str = "") -> list[tuple[str, str]]:
    """Return leaf by leaf what a result holds, tensors by their hash."""
    if isinstance(value, Mapping):
        return [fact for key, each in value.items() for fact in _facts(each, f"{place}/{key}")]
    if isinstance(value, Tensor):
        value = unsharded(value.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    if isinstance(value, np.ndarray):
        return [(place, hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest())]
    return [(place, repr(value))]
