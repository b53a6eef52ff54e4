"""Ranks forked from the test itself: a launch without the seconds that a new Python takes, and they may be killed."""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import time
from collections.abc import Callable, Collection
from importlib import import_module
from typing import Any

import torch

import_module("torch._dynamo")  # what a fit imports otherwise: seconds, in each rank anew


class Forked:
    """Ranks that call a function each.

    Args:
        function: Called with the number of the rank, in a process of its own; returns what can be pickled.
        world: How many there are.
    """

    def __init__(self, function: Callable[[int], Any], world: int = 2) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.processes: dict[int, int] = {}
        self._pipes: dict[int, int] = {}
        for rank in range(world):
            read, write = os.pipe()
            process = os.fork()
            if not process:
                _be(function, rank, world, port, write)
            os.close(write)
            self.processes[rank], self._pipes[rank] = process, read

    def results(self, *, silent: Collection[int] = (), limit: float = 60.0) -> dict[int, Any]:
        """Return what the ranks came to; those that died without a word are left out.

        Args:
            silent: Ranks that are not waited for, and killed in the end.
            limit: Seconds after which all are killed, and the test fails.
        """
        said: dict[int, bytes] = {}
        deadline = time.monotonic() + limit
        waiting = {pipe: rank for rank, pipe in self._pipes.items() if rank not in silent}
        texts = dict.fromkeys(waiting, b"")
        try:
            while waiting:
                ready, _, _ = select.select(list(waiting), [], [], max(0.0, deadline - time.monotonic()))
                assert ready, f"ranks {sorted(waiting.values())} hang"
                for pipe in ready:
                    chunk = os.read(pipe, 1 << 16)
                    texts[pipe] += chunk
                    if not chunk:
                        said[waiting.pop(pipe)] = texts[pipe]
        finally:
            for rank, process in self.processes.items():
                if rank in silent or waiting:
                    os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                os.close(self._pipes[rank])
        return {rank: pickle.loads(text) for rank, text in said.items() if text}


def _be(function: Callable[[int], Any], rank: int, world: int, port: int, write: int) -> None:
    """Be a rank: never returns."""
    try:
        torch.set_num_threads(1)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        found = function(rank)
        text = pickle.dumps(found)
        while text:
            text = text[os.write(write, text) :]
    except BaseException as error:  # noqa: BLE001 - it is said in the parent
        os.write(write, pickle.dumps(f"{type(error).__name__}: {error}"))
    finally:
        os._exit(0)


def together(function: Callable[[int], Any], world: int = 2, **options: Any) -> dict[int, Any]:
    """Return what ranks come to: see :meth:`Forked.results`."""
    return Forked(function, world).results(**options)
