"""Fits that real processes under torchrun run together; ``python ranks.py FOLDER SCENARIO...`` is one of them.

A scenario is a function of a folder that returns what test_distributed.py compares, as tensors, text and numbers. Each
rank writes its own to ``FOLDER/SCENARIO-RANK.pt``; a process alone calls the function and has the reference.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from thawline.algorithms import EMA, LISA, EarlyStop, GradClip, LayerFreeze, LayerThaw, LoRAInject, PrefixCache
from thawline.engine import (
    Algorithm,
    Checkpointing,
    DistributedError,
    Event,
    FullyShard,
    Replicate,
    Stage,
    State,
    ThawlineError,
    Trainer,
    linear,
    load_weights,
    on,
    unsharded,
)

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
TIMEOUT = float(os.environ.get("RANKS_TIMEOUT", "60"))
MODES = {"replicated": Replicate(timeout=TIMEOUT), "sharded": FullyShard(timeout=TIMEOUT)}
SHARDED = os.environ.get("RANKS_MODE") == "sharded"
TOGETHER = MODES[os.environ.get("RANKS_MODE", "replicated")]
SCENARIOS: dict[str, Callable[[Path], dict[str, Any]]] = {}


def scenario(function: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
    """Enter a function among the scenarios."""
    SCENARIOS[function.__name__] = function
    return function


# -- models and data ---------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Stem, three blocks and a head; with dropout, and a pooler that nothing uses, where asked."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 3)
        self.pooler = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = self.dropout(block(x))
        return self.head(x)


class Routed(nn.Module):
    """A network of which a part is used only where the data ask for it: on some ranks, in some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.odd = nn.Linear(8, 8)
        self.never = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem(x)
        chosen = x[:, :1] > 1.2
        if bool(chosen.any()):
            hidden = torch.where(chosen, self.odd(hidden), hidden)
        return self.head(torch.tanh(hidden))


def model(kind: Callable[[], nn.Module] = Net, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Build a model, the same on every rank and in every process."""
    torch.manual_seed(3)
    return kind().to(dtype)


def data(count: int = 44, dtype: torch.dtype = torch.float64) -> TensorDataset:
    """Return samples of six numbers with labels of three kinds, some of them ignored."""
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(count, 6, generator=generator), torch.randint(3, (count,), generator=generator)
    return TensorDataset(x.to(dtype), y)


def loader(count: int = 44, batch: int = 12, dtype: torch.dtype = torch.float64, **options: Any) -> DataLoader[Any]:
    """Return a shuffled loader whose last batch is short."""
    return DataLoader(data(count, dtype), batch_size=batch, shuffle=True, **options)


def trainer(algorithms: Sequence[Algorithm] = (), **settings: Any) -> Trainer:
    """Return a Trainer that trains with all ranks there are."""
    given: dict[str, Any] = {
        "optimizer": partial(torch.optim.AdamW, lr=0.02),
        "schedule": linear(end=0.2),
        "loss_fn": nn.functional.cross_entropy,
        "log_every": "1ba",
        "device": os.environ.get("RANKS_DEVICE", "cpu"),
        "distributed": TOGETHER,
        "progress": False,
        "seed": 11,
    }
    return Trainer(algorithms=algorithms, **(given | settings))


def digest(state: State, algorithms: Iterable[Algorithm]) -> str:
    """Return a hash of weights, buffers, optimizer state and averages, bit for bit."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(unsharded(value.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                found.update(str(key).encode())
                add(value[key])

    add(state.model.state_dict())
    for entry in state.ledger.state_dict()["optimizers"].values():
        add(entry["state"])
    for each in algorithms:
        add(each.state_dict())
    return found.hexdigest()


class Watch(Algorithm):
    """Writes down a hash of everything after each batch, what trains, and the samples."""

    events = frozenset({Event.BATCH_END, Event.AFTER_STEP})
    stage = Stage.OBSERVE

    def __init__(self, others: Sequence[Algorithm] = ()) -> None:
        self.others = others
        self.digests: list[str] = []
        self.trainable: list[int] = []
        self.losses: list[float] = []
        self.samples: list[tuple[int, ...]] = []

    def reset(self) -> None:
        """Keep what was seen: a fit may be resumed with the same instance."""

    def apply(self, event: Event, state: State) -> None:
        if event is Event.AFTER_STEP:
            assert state.loss is not None
            self.losses.append(state.loss.item())
            return
        self.digests.append(digest(state, self.others))
        self.trainable.append(sum(each.numel() for each in state.ledger.trainable_parameters))
        self.samples.append(state.sample_ids or ())

    def describe(self) -> dict[str, Any]:
        return {"name": "Watch", "arguments": {}}


def fitted(
    net: nn.Module, algorithms: Sequence[Algorithm] = (), *, batches: Any = None, evaluated: Any = None,
    duration: str = "3ep", resume: Any = False, **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """Fit and return everything worth comparing."""
    watch = Watch(algorithms)
    made = trainer([*algorithms, watch], **settings)
    result = made.fit(net, loader() if batches is None else batches, evaluated, duration=duration, resume=resume)
    return {
        "weights": {name: each.detach().cpu().clone() for name, each in net.state_dict().items()},
        "digests": watch.digests, "trainable": watch.trainable, "losses": watch.losses, "samples": watch.samples,
        "history": result.history, "metrics": result.metrics, "stop": result.stop_reason,
        "clock": [result.clock.epoch, result.clock.batch, result.clock.sample],
        "best": str(result.best), "last": str(result.last), "spans": len(result.timeline.spans),
    }  # fmt: skip


def raised(function: Callable[[], Any]) -> str:
    """Return the words of the typed error that a call ends with."""
    try:
        function()
    except ThawlineError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


# -- training ----------------------------------------------------------------------------------------------------------


def _recipes() -> dict[str, Callable[[], list[Algorithm]]]:
    return {
        "plain": list,
        "thaw": lambda: [LayerThaw(every="2ba"), EMA(half_life="3ba"), GradClip(0.1)],
        "freeze": lambda: [LayerFreeze(start=0.2, level=0.8), EMA(half_life="3ba")],
        "lora": lambda: [LoRAInject(rank=2), LayerThaw(every="3ba"), EMA(half_life="3ba"), GradClip(0.5)],
        "lisa": lambda: [LISA(every="2ba", layers=1), EMA(half_life="3ba", bias_correction=True)],
    }


@scenario
def training(folder: Path) -> dict[str, Any]:
    """Every recipe, whose trainable set moves in the middle of epochs."""
    found = {name: fitted(model(), make(), evaluated=loader(17, 4)) for name, make in _recipes().items()}
    found["float32"] = fitted(
        model(dtype=torch.float32), [LayerThaw(every="2ba")], batches=loader(dtype=torch.float32), duration="2ep"
    )
    return found


@scenario
def portions(folder: Path) -> dict[str, Any]:
    """Microbatches, accumulated batches, ignored labels, and shares that are wholly ignored."""
    x, y = data(48).tensors
    y = y.clone()
    y[::3] = -100
    y[12:24] = -100
    y[12] = 1  # of the whole second batch one label counts: all other ranks have none
    batches = [(x[i : i + 12], y[i : i + 12]) for i in range(0, 48, 12)]
    routed = {} if SHARDED else {"routed": fitted(model(Routed), batches=loader(), duration="3ep")}
    return routed | {
        "ignored": fitted(model(), batches=batches, duration="2ep"),
        "microbatches": fitted(model(), [GradClip(0.1)], batches=batches, duration="2ep", microbatch_size=2),
        "accumulated": fitted(model(), batches=loader(), duration="2ep", accumulate=2),
        "few": fitted(model(), batches=DataLoader(data(13), batch_size=12, shuffle=True), duration="2ep"),
    }


class Stream(IterableDataset[Any]):
    """Samples one after the other."""

    def __iter__(self) -> Iterator[Any]:
        return iter(data(22))


@scenario
def sources(folder: Path) -> dict[str, Any]:
    """Loaders of every kind: workers, an iterable dataset, ready batches in dictionaries."""
    x, y = data(20).tensors
    ready = [{"x": x[i : i + 12], "labels": y[i : i + 12]} for i in range(0, 20, 12)]
    forward = {"forward_fn": lambda net, batch: net(batch["x"])}
    return {
        "workers": fitted(model(), batches=loader(22, num_workers=1), duration="1ep"),
        "iterable": fitted(model(), batches=DataLoader(Stream(), batch_size=12), duration="2ep"),
        "ready": fitted(model(), batches=ready, duration="2ep", **forward),
    }


def _norm_net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(8, 8),
        nn.BatchNorm1d(8),
        nn.Linear(8, 3),
    )


@scenario
def statistics(folder: Path) -> dict[str, Any]:
    """Batch normalization and dropout: what one rank computes is not what another does."""
    batches = loader(36)
    noise: list[float] = []

    @on(Event.AFTER_FORWARD)
    def remember(state: State) -> None:
        noise.append(float(torch.rand(())))

    found = fitted(model(_norm_net), [LayerThaw(every="2ba"), EMA(half_life="2ba"), remember()], batches=batches)
    return {**found, "noise": noise}


@scenario
def without_following(folder: Path) -> dict[str, Any]:
    """The negative control: buckets that stay those of the first batch."""
    from thawline.engine.buckets import GradientBuckets

    follow, done = GradientBuckets.follow, []

    def once(self: GradientBuckets) -> None:
        if not done:
            follow(self)
            done.append(1)

    GradientBuckets.follow = once  # type: ignore[method-assign]
    try:
        return fitted(model(), [LayerThaw(every="2ba")])
    finally:
        GradientBuckets.follow = follow  # type: ignore[method-assign]


# -- evaluation --------------------------------------------------------------------------------------------------------


class Mean:
    """An accumulating metric without a way to synchronize."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.total, self.count, self.sizes = 0.0, 0, []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in a batch."""
        self.total += float((outputs.argmax(-1) == targets).sum())
        self.count += len(targets)
        self.sizes.append(len(targets))

    def compute(self) -> float:
        """Return the accuracy."""
        return self.total / self.count


@scenario
def evaluation(folder: Path) -> dict[str, Any]:
    """Evaluations whose last batch has fewer samples than there are ranks."""
    from torchmetrics.classification import MulticlassAccuracy

    def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(-1) == targets).double().mean()

    mean = Mean()
    made = trainer(metrics={"accuracy": accuracy, "mean": mean, "micro": MulticlassAccuracy(3, average="micro")})
    values = made.evaluate(model(), DataLoader(data(21), batch_size=4))
    return {"values": values, "sizes": mean.sizes}


# -- decisions ---------------------------------------------------------------------------------------------------------


def _stopping_at(event: Event, batch: int) -> Algorithm:
    @on(event)
    def stop(state: State) -> None:
        if RANK == WORLD - 1 and state.clock.batch >= batch:
            state.stop(f"rank {WORLD - 1}")

    return stop()


@scenario
def stopping(folder: Path) -> dict[str, Any]:
    """One rank alone asks to stop, at every event where it may."""
    found: dict[str, Any] = {}
    for event in (
        Event.FIT_START,
        Event.EPOCH_START,
        Event.BATCH_START,
        Event.AFTER_STEP,
        Event.BATCH_END,
        Event.EVAL_END,
    ):
        first = 0 if event in (Event.FIT_START, Event.EPOCH_START) else 2
        found[event.name] = fitted(model(), [_stopping_at(event, first)], evaluated=loader(8, 4), eval_every="1ba")
    found["early"] = fitted(model(), [EarlyStop("eval/loss", patience=1, min_delta=9.0)], evaluated=loader(8, 4))
    return found


@scenario
def signals(folder: Path) -> dict[str, Any]:
    """One rank alone gets SIGTERM; the run goes on where all of them stopped."""
    run = folder / f"signals-{WORLD}"

    @on(Event.AFTER_FORWARD)
    def kill(state: State) -> None:
        if RANK == WORLD - 1 and state.clock.batch == 5 and not (folder / "killed").exists():
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGTERM)

    net, given = model(), {"run_dir": run, "duration": "3ep"}
    stopped = fitted(net, [kill()], **given)
    return {"stopped": stopped, "resumed": fitted(model(), [kill()], resume=True, **given)}


class Hungry(Net):
    """A model that runs out of memory on one rank with more than two samples at a time."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.training and RANK == WORLD - 1 and len(x) > 2:
            raise torch.OutOfMemoryError("out of memory, on purpose")
        return out


@scenario
def memory(folder: Path) -> dict[str, Any]:
    """One rank runs out of memory: the batch is repeated by all."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fitted(model(Hungry), [EMA(half_life="2ba")])


@scenario
def nonfinite(folder: Path) -> dict[str, Any]:
    """A loss that is not a number on one rank: skipped by all, or rolled back by all."""
    x, y = data(48).tensors
    x = x.clone()
    x[29] = float("nan")
    batches = [(x[i : i + 12], y[i : i + 12]) for i in range(0, 48, 12)]
    return {
        "skip": fitted(model(), batches=batches, on_nonfinite="skip", duration="2ep"),
        "rollback": fitted(
            model(), batches=batches, on_nonfinite="rollback", duration="2ep", run_dir=folder / f"rollback-{WORLD}"
        ),
        "raise": raised(lambda: fitted(model(), batches=batches, duration="2ep")),
    }


@scenario
def disagreement(folder: Path) -> dict[str, Any]:
    """Ranks that do not do the same, and launches that cannot work: typed errors on all of them."""
    last = RANK == WORLD - 1 and WORLD > 1

    @on(Event.BATCH_END)
    def freeze(state: State) -> None:
        if last and state.clock.batch == 2:
            state.ledger.freeze("blocks[0]", owner="one of us")

    @on(Event.AFTER_STEP)
    def nudge(state: State) -> None:
        if last:
            with torch.no_grad():
                next(iter(state.ledger.parameters.values())).add_(1.0)

    wide = nn.Linear(6, 4 if last else 3).double()
    mine = folder / f"rank-{RANK}"
    sampler: Any = DistributedSampler(data(), num_replicas=2, rank=0)
    each_batch = {"checkpoint": Checkpointing(every="1ba"), "duration": "3ba"}
    return {
        "ledger": raised(lambda: fitted(model(), [freeze()])),
        "weights": raised(lambda: fitted(model(), [nudge()], run_dir=folder / f"nudged-{WORLD}", **each_batch)),
        "model": raised(lambda: fitted(wide)),
        "algorithms": raised(lambda: fitted(model(), [GradClip(2.0 if last else 1.0)])),
        "lengths": raised(lambda: fitted(model(), batches=loader(36 if last else 48))),
        "batches": raised(lambda: fitted(model(), batches=loader(batch=7))),
        "sampler": raised(lambda: fitted(model(), batches=DataLoader(data(), batch_size=12, sampler=sampler))),
        "not shared": raised(lambda: fitted(model(), run_dir=mine if RANK == 0 else Path("/proc/nowhere"))),
        "taken": raised(lambda: [fitted(model(), run_dir=folder / "taken") for _ in range(2)]),
        "uneven": raised(lambda: fitted(model(), batches=iter([*loader(36 if last else 48)]), duration="1ep")),
    }  # fmt: skip


# -- checkpoints -------------------------------------------------------------------------------------------------------


def _resumable() -> tuple[nn.Module, list[Algorithm]]:
    return model(partial(Net, dropout=0.2)), [LayerThaw(every="2ba"), EMA(half_life="3ba"), GradClip(0.2)]


def _saving(folder: Path, **settings: Any) -> dict[str, Any]:
    net, algorithms = _resumable()
    given = {"checkpoint": Checkpointing(every="1ba", keep=100, monitor="eval/loss"), "duration": "2ep"} | settings
    return fitted(net, algorithms, evaluated=loader(9, 4), eval_every="2ba", run_dir=folder, **given)


def _resumed(path: Path) -> dict[str, Any]:
    net, algorithms = _resumable()
    return fitted(net, algorithms, evaluated=loader(9, 4), eval_every="2ba", duration="2ep", resume=path)


@scenario
def resuming(folder: Path) -> dict[str, Any]:
    """A run, and the same resumed in the middle; ``RANKS_STEPS`` says where, all of them if it is "all"."""
    run = folder / f"resuming-{WORLD}"
    whole = _saving(run)
    steps = os.environ.get("RANKS_STEPS", "3 6")
    chosen = sorted(run.glob("ba*")) if steps == "all" else [run / f"ba{int(step):08d}" for step in steps.split()]
    found = {path.name: _resumed(path) for path in chosen}
    return {"whole": whole, "resumed": found, "written": sorted(each.name for each in run.iterdir())}


@scenario
def relay(folder: Path) -> dict[str, Any]:
    """A part of a run that other numbers of ranks begin and end; ``RANKS_UNTIL`` says how far this one goes."""
    net, algorithms = _resumable()
    until = int(os.environ.get("RANKS_UNTIL", "0"))

    @on(Event.AFTER_STEP)
    def pause(state: State) -> None:
        if state.clock.batch + 1 == until and RANK == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    return fitted(net, [*algorithms, pause()], run_dir=folder / "relay", duration="2ep", resume=True)


# -- weights in shards -------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding that is the head's weight as well, a block that is used twice, and one with a bias alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed((x[:, :4] * 10).long().abs() % 5).mean(1)
        for block in (*self.blocks, self.blocks[0]):
            x = x + block(x)
        return self.head(self.norm(x))


@scenario
def kinds(folder: Path) -> dict[str, Any]:
    """Models, optimizers and limits of gradients of every kind."""
    found = {
        "tied": fitted(model(Tied), [LayerThaw(every="2ba"), EMA(half_life="2ba")], duration="2ep"),
        "momentum": fitted(model(), duration="1ep", optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9)),
        "filled": fitted(
            model(), [LayerThaw(every="1ba")], duration="2ep", optimizer=partial(torch.optim.Adagrad, lr=0.1)
        ),
        "parted": fitted(
            model(), duration="1ep",
            optimizer=[("head", partial(torch.optim.SGD, lr=0.1)), ("*", partial(torch.optim.RMSprop, lr=0.01))],
        ),
    }  # fmt: skip
    limits = {
        "inf": GradClip(0.01, norm_type=float("inf")), "one": GradClip(0.1, norm_type=1.0), "value": GradClip(value=0.01),
        "adaptive": GradClip(adaptive=0.01), "by layer": GradClip(0.05, per_layer=True),
    }  # fmt: skip
    return found | {name: fitted(model(), [limit], duration="1ep") for name, limit in limits.items()}


@scenario
def manners(folder: Path) -> dict[str, Any]:
    """Ways of sharding, and less exact arithmetic."""
    ways = {
        "kept": {"reshard": False},
        "offloaded": {"offload": True},
        "plain": {},
        "mixed": {"mixed_precision": "bf16"},
    }
    return {
        name: fitted(
            model(dtype=torch.float32), [LayerThaw(every="2ba"), EMA(half_life="2ba")], evaluated=loader(9, 4, torch.float32),
            batches=loader(dtype=torch.float32), duration="2ep", eval_every="1ba", distributed=FullyShard(timeout=TIMEOUT, **way),
        )
        for name, way in ways.items()
    }  # fmt: skip


def _handed(folder: Path, resume: Any = False) -> dict[str, Any]:
    algorithms = [LoRAInject(rank=2), LayerThaw(every="3ba"), EMA(half_life="3ba"), GradClip(0.5)]
    given = {} if resume else {"run_dir": folder, "checkpoint": Checkpointing(every="1ba", keep=100)}
    return fitted(model(), algorithms, duration="2ep", resume=resume, **given)


@scenario
def handing(folder: Path) -> dict[str, Any]:
    """A run, and the rest of it from the checkpoint that ``RANKS_FROM`` says, which others have written."""
    found = {"whole": _handed(folder / "handing")}
    if "RANKS_FROM" in os.environ:
        found["rest"] = _handed(folder, Path(os.environ["RANKS_FROM"]))
    return found


@scenario
def afterwards(folder: Path) -> dict[str, Any]:
    """What the model is after a fit: the user's own, whole; fitted and evaluated again, averaged, saved."""
    net, ema = model(), EMA(half_life="3ba")
    before = {name: id(each) for name, each in net.named_parameters()}
    kinds = [type(each) for each in net.modules()]
    attributes = [sorted(vars(each)) for each in net.modules()]
    first = fitted(net, [ema], duration="1ep", run_dir=folder / f"afterwards-{WORLD}")
    same = before == {name: id(each) for name, each in net.named_parameters()}
    bare = (kinds, attributes) == (
        [type(each) for each in net.modules()],
        [sorted(vars(each)) for each in net.modules()],
    )
    hooks = [
        name
        for each in net.modules()
        for name, table in vars(each).items()
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_always_called")) and table
    ]
    fresh = model()
    load_weights(folder / f"afterwards-{WORLD}", fresh)
    evaluated = trainer().evaluate(net, DataLoader(data(21), batch_size=4))
    second = fitted(net, [LoRAInject(rank=2)], duration="1ep")
    ema.apply(averaged := model())
    return {
        "first": first, "second": second, "same": same, "bare": bare, "hooks": hooks, "evaluated": evaluated,
        "averaged": dict(averaged.state_dict()), "loaded": dict(fresh.state_dict()),
    }  # fmt: skip


@scenario
def language(folder: Path) -> dict[str, Any]:
    """A small language model of the transformers library, whose batches differ in what counts."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=32, n_positions=8, n_embd=8, n_layer=3, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    net = GPT2LMHeadModel(config).double()
    ids = torch.randint(32, (20, 8), generator=torch.Generator().manual_seed(5))
    labels = ids.masked_fill(ids > 24, -100)
    batches = [{"input_ids": ids[i : i + 6], "labels": labels[i : i + 6]} for i in range(0, 20, 6)]
    algorithms = [LoRAInject(rank=2), LayerThaw(every="1ba"), EMA(half_life="2ba"), GradClip(0.5)]
    return {"gpt2": fitted(net, algorithms, batches=batches, evaluated=batches[:1], duration="2ep", loss_fn=None)}


class Forked(nn.Module):
    """Two branches of one size, of which each rank takes another."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[2](self.blocks[RANK % 2](x)))


class Scaled(nn.Module):
    """A model with a parameter that is a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(6, 3), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


class Borrowing(Net):
    """A model that uses a block's weight where the block is not called."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (self.blocks[0][0].weight ** 2).sum()


class Full(Net):
    """A model that runs out of memory on all ranks."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) > 2:
            raise torch.OutOfMemoryError("out of memory, on purpose")
        return super().forward(x)


@scenario
def refusals(folder: Path) -> dict[str, Any]:
    """What weights in shards cannot be combined with: typed errors."""

    @on(Event.BATCH_END)
    def graft(state: State) -> None:
        state.ledger.attach("head", "lora", owner="late", rank=2, alpha=2)

    @on(Event.AFTER_STEP)
    def fail(state: State) -> None:
        raise ZeroDivisionError

    class Keeping(torch.optim.SGD):
        def __init__(self, params: Any, lr: float = 0.1) -> None:
            super().__init__(params, lr)
            self.kept = list(self.param_groups[0]["params"])

    left = model()
    with contextlib.suppress(ZeroDivisionError):
        fitted(left, [fail()])
    return {
        "late": raised(lambda: fitted(model(), [graft()])),
        "adafactor": raised(lambda: fitted(model(), optimizer=torch.optim.Adafactor)),
        "keeping": raised(lambda: fitted(model(), optimizer=Keeping)),
        "scalar": raised(lambda: fitted(model(Scaled))),
        "cache": raised(lambda: fitted(model(), [PrefixCache()])),
        "left": raised(lambda: fitted(left)),
        "memory": raised(lambda: fitted(model(Full))),
        "borrowing": raised(lambda: fitted(model(Borrowing))),
        "forked": raised(lambda: fitted(model(Forked))),
    }


# -- failures ----------------------------------------------------------------------------------------------------------


@scenario
def lost(folder: Path) -> dict[str, Any]:
    """The last rank ends without a word, or hangs as ``RANKS_HOW`` says; the others say so, and how long it took."""
    how = os.environ.get("RANKS_HOW", "exit")
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # torchrun's, once it knows: what was found is to be written down first

    @on(Event.AFTER_FORWARD)
    def vanish(state: State) -> None:
        if RANK == WORLD - 1 and state.clock.batch == 3:
            if how == "exit":
                os._exit(0)
            if how == "raise":
                raise ZeroDivisionError("the reason")
            os.kill(os.getpid(), signal.SIGSTOP)

    began = time.monotonic()
    try:
        return fitted(model(), [vanish()])
    except DistributedError as error:
        torch.save({"error": str(error), "seconds": time.monotonic() - began}, folder / f"lost-{RANK}.pt")
        raise


@scenario
def elastic(folder: Path) -> dict[str, Any]:
    """A rank is killed once, at the batch that ``RANKS_KILL`` says; torchrun starts all of them anew."""
    fatal = int(os.environ.get("RANKS_KILL", "5"))

    @on(Event.AFTER_FORWARD)
    def die(state: State) -> None:
        if RANK == WORLD - 1 and state.clock.batch == fatal and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    net, algorithms = _resumable()
    given = {"checkpoint": Checkpointing(every="2ba"), "duration": "2ep", "run_dir": folder / "elastic"}
    return fitted(net, [*algorithms, die()], **given)


def main() -> None:
    """Run scenarios, and write down what each comes to."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        torch.save(SCENARIOS[name](folder), folder / f"{name}-{RANK}.pt")


if __name__ == "__main__":
    main()
