"""Two ranks over gloo: a step against torch's DistributedDataParallel, bytes by share frozen, agreement, checkpoints.

``python -m benchmarks --only distributed`` starts torchrun, which starts this module on each rank.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from thawline.engine import Algorithm, Checkpointing, Event, Stage, State, Trainer
from thawline.engine.buckets import GradientBuckets
from thawline.engine.distributed import Team
from thawline.engine.ranks import Ranks
from thawline.engine.rundir import RunDir

from .measure import Row

_WORLDS = (2, 3, 4)
_WIDTH, _DEPTH, _BATCH = 512, 10, 128
_STEPS = 12


def distributed(rounds: int, device: torch.device) -> list[Row]:
    """Figures of several ranks on this machine; they share its cores, so only ratios tell anything."""
    found = {world: _launched(world, rounds, device) for world in (_WORLDS if rounds > 2 else _WORLDS[:1])}
    two = found[2]
    rows = [
        Row("step, 2 ranks, over bare DDP", two["ratio"], "x", 1.03, two["note"]),
        Row("its time of the processor, over bare DDP's", two["cpu"], "x", None, "all threads of rank 0"),
        Row("reduced bytes over share that trains, worst", two["proportion"], "x", 1.05, two["bytes"]),
        Row("a thaw, in steps", two["thaw"], "steps", 2.0, "comparison and new buckets"),
        Row("looking whether the ledger moved, of a step", two["look"] * 100, "%", 0.1, "nothing moved"),
    ]
    for world, each in found.items():
        note = f"rank 0 of {world}: comparing weights and gathering generators; writing is extra"
        rows.append(
            Row(f"agreement a step, {world} ranks", each["agree"] * 1e3, "ms", None, "two exchanges of 64 bytes a rank")
        )
        rows.append(
            Row(f"comparing the ledger, {world} ranks", each["compare"] * 1e3, "ms", None, "when its version moves")
        )
        rows.append(Row(f"before a checkpoint, {world} ranks", each["checkpoint"] * 1e3, "ms", None, note))
        rows.append(
            Row(f"writing a checkpoint, {world} ranks", each["write"] * 1e3, "ms", None, "rank 0 writes, others wait")
        )
    return rows


def _launched(world: int, rounds: int, device: torch.device) -> dict[str, Any]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [*run, "-m", "benchmarks.distributed", str(out), str(rounds), device.type]
        subprocess.run(command, check=True, env=environment)
        found: dict[str, Any] = json.loads(out.read_text())
        return found


class _Net(nn.Module):
    """A stem, equal blocks and a head: 2.6 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.ReLU()) for _ in range(_DEPTH))
        self.head = nn.Linear(_WIDTH, 10)

    @override
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(x)
        return found


class _Stopwatch(Algorithm):
    """Takes the time between the ends of batches."""

    events = frozenset({Event.BATCH_END})
    stage = Stage.OBSERVE

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    @override
    def reset(self) -> None:
        """Keep the times."""

    @override
    def apply(self, event: Event, state: State) -> None:
        self.ends.append(_now())


class _Moving(Algorithm):
    """Freezes a block and thaws all, by turns."""

    events = frozenset({Event.BATCH_START})

    @override
    def apply(self, event: Event, state: State) -> None:
        ledger, number = state.ledger, state.clock.batch
        if number % 2:
            ledger.freeze(f"blocks.{number % _DEPTH}.*", owner=self.owner)
        elif number:
            ledger.thaw("*", owner=self.owner)


def _now() -> tuple[float, float]:
    """Return the time on the wall, and that which all threads of this process have had."""
    return time.perf_counter(), time.process_time()


def _per_step(ends: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the median time of a step on the wall, and the mean time of the processor, which is counted coarsely."""
    gaps = [after[0] - before[0] for before, after in pairwise(ends[2:])]
    return statistics.median(gaps), (ends[-1][1] - ends[2][1]) / len(gaps)


def _worker(out: Path, rounds: int, device: torch.device) -> None:
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    x, y = torch.randn(_BATCH * world, _WIDTH), torch.randint(10, (_BATCH * world,))
    optimizer, loss_fn = partial(torch.optim.SGD, lr=0.01), nn.functional.cross_entropy
    settings: dict[str, Any] = {"optimizer": optimizer, "loss_fn": loss_fn, "device": device.type, "progress": False}

    def ours(net: nn.Module, **given: Any) -> tuple[float, float]:
        watch = _Stopwatch()
        Trainer(algorithms=[watch], **settings, **given).fit(net, [(x, y)] * _STEPS, duration=f"{_STEPS}ba")
        return _per_step(watch.ends)

    def bare(net: nn.Module) -> tuple[float, float]:
        wrapped = DistributedDataParallel(net.to(device))
        stepping = optimizer(wrapped.parameters())
        own = slice(rank * _BATCH, (rank + 1) * _BATCH)
        inputs, targets = x[own].to(device), y[own].to(device)
        ends = []
        for _ in range(_STEPS):
            loss = loss_fn(wrapped(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            stepping.step()
            stepping.zero_grad()
            loss.item()
            ends.append(_now())
        return _per_step(ends)

    ours(_Net())  # makes the groups
    pairs = [(ours(_Net()), bare(_Net())) for _ in range(rounds)]
    step, reference = (statistics.median(each[0] for each in side) for side in zip(*pairs, strict=True))
    ratio, cpu = (statistics.median(one[part] / other[part] for one, other in pairs) for part in (0, 1))
    note = f"medians of {rounds}: {step * 1e3:.3g} ms against {reference * 1e3:.3g} ms, 2.6 million parameters"
    found = {"ratio": ratio, "cpu": cpu, "note": note, **_bytes(ours), **_agreement(step, settings, (x, y))}
    if rank == 0:
        out.write_text(json.dumps(found))


def _bytes(ours: Callable[..., Any]) -> dict[str, Any]:
    """Count what each rank hands to the reduction in a step, by how many blocks are frozen."""
    counted: list[int] = []
    start = Team.start_sum

    def counting(self: Team, tensor: Tensor, *, largest: bool = False) -> Any:
        counted.append(tensor.numel() * tensor.element_size())
        return start(self, tensor, largest=largest)

    Team.start_sum = counting  # type: ignore[method-assign]
    shares: list[tuple[float, float]] = []
    try:
        for frozen in (0, 3, 5, 8, 10):
            net = _Net()
            for block in list(net.blocks)[:frozen]:
                block.requires_grad_(False)
            counted.clear()
            ours(net)
            trains = sum(each.numel() for each in net.parameters() if each.requires_grad) * 4
            shares.append((sum(counted) / _STEPS, trains))
    finally:
        Team.start_sum = start  # type: ignore[method-assign]
    whole = shares[0][1]
    told = ", ".join(f"{1 - trains / whole:.0%} frozen: {sent / 1e6:.3g} MB" for sent, trains in shares)
    return {"proportion": max(sent / trains for sent, trains in shares), "bytes": told}


def _agreement(step: float, settings: dict[str, Any], batch: Any) -> dict[str, float]:
    """Time what ranks tell each other, apart from gradients."""
    spent: dict[str, list[float]] = {"tell": [], "compare": [], "checkpoint": [], "follow": [], "write": []}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name].append(time.perf_counter() - began)

        return wrapped

    tell, compare, save, follow = Team.tell, Ranks.compare, Ranks.before_save, GradientBuckets.follow
    Team.tell = timed("tell", tell)  # type: ignore[method-assign]
    Ranks.compare = timed("compare", compare)  # type: ignore[method-assign]
    Ranks.before_save = timed("checkpoint", save)  # type: ignore[method-assign]
    GradientBuckets.follow = timed("follow", follow)  # type: ignore[method-assign]
    write = RunDir.save
    RunDir.save = timed("write", write)  # type: ignore[method-assign]
    try:
        Trainer(**settings).fit(_Net(), [batch] * _STEPS, duration=f"{_STEPS}ba")
        told = statistics.median(spent["tell"])
        spent["compare"].clear()
        spent["follow"].clear()
        Trainer(algorithms=[_Moving()], **settings).fit(_Net(), [batch] * _STEPS, duration=f"{_STEPS}ba")
        shared = [tempfile.mkdtemp() if os.environ["RANK"] == "0" else None]
        dist.broadcast_object_list(shared)
        saving: dict[str, Any] = {"run_dir": Path(str(shared[0])) / "run", "checkpoint": Checkpointing(every="2ba")}
        spent["write"].clear()
        Trainer(**settings, **saving).fit(_Net(), [batch] * _STEPS, duration=f"{_STEPS}ba")
    finally:
        Team.tell, Ranks.compare, Ranks.before_save, GradientBuckets.follow = tell, compare, save, follow  # type: ignore[method-assign]
        RunDir.save = write  # type: ignore[method-assign]
    began = time.perf_counter()
    versions, same = (1.0, 1.0), 0
    for _ in range(1000):
        same += versions == (1.0, 1.0)
    look = (time.perf_counter() - began) / 1000
    return {
        "agree": 2 * told,
        "compare": statistics.median(spent["compare"]),
        "checkpoint": statistics.median(spent["checkpoint"]),
        "write": statistics.median(spent["write"]),
        "thaw": (statistics.median(spent["compare"]) + statistics.median(spent["follow"])) / step,
        "look": look / step,
    }


if __name__ == "__main__":
    _worker(Path(sys.argv[1]), int(sys.argv[2]), torch.device(sys.argv[3]))
