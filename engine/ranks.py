"""What the ranks of a fit decide together: when to stop, what a batch's loss is, what a checkpoint holds.

Every decision that depends on what one rank alone may know is taken once and shared. The ranks speak to each other at fixed
points: after the algorithms of each event at which the ledger is open or the fit can be stopped, and once between
backward and step. So no rank is ever ahead of another by more than one event, and none speaks while it handles an error.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .buckets import GradientBuckets
from .buffers import Buffers
from .checkpoint import plain_rng, rng_of, rng_state, seed_everything
from .data import Fetched, ResumableLoader
from .distributed import Rows, Team
from .engine import Engine
from .errors import DistributedError, OutOfMemoryError, warn
from .events import Event
from .lock import holder
from .memory import Microbatches
from .randomness import derive_seed
from .rundir import RunDir, load_checkpoint
from .sharding import Shards
from .shards import is_sharded, replaced, sharded_in, unsharded
from .signals import StopSignals
from .state import State
from .typing import Json

# How long a file that another machine has written may take to appear.
_PATIENCE = 10.0
_AGREEING = (Event.FIT_START, Event.EPOCH_START, Event.BATCH_END, Event.EVAL_END, Event.EPOCH_END)


class Ranks:
    """The team in a fit: it listens to the engine's events after all algorithms.

    Args:
        team: The ranks.
        engine: Of the fit.
        microbatches: Of the fit; weighed over all ranks from now on.
        signals: Of the fit; heeded by all ranks after the same batch.
        make_room: Undoes a batch and halves the microbatches, as where memory runs out here.
        functions: ``(model, batch) -> outputs`` and ``(outputs, batch) -> loss``.
        device: What computes.
    """

    def __init__(
        self,
        team: Team,
        engine: Engine,
        microbatches: Microbatches,
        signals: StopSignals,
        make_room: Callable[[MemoryError], None],
        *,
        functions: tuple[Callable[[nn.Module, Any], Any], Callable[[Any, Any], torch.Tensor]],
        device: torch.device,
    ) -> None:
        self.team, self._engine, self._functions = team, engine, functions
        engine.state.world = team.world
        self._state, self._signals, self._make_room = engine.state, signals, make_room
        self._microbatches = microbatches
        ledger = engine.state.ledger
        self.shards = Shards(team, ledger, device) if team.shards else None
        self._reduction = GradientBuckets(team, ledger) if self.shards is None else self.shards
        self._buffers = Buffers(team, engine.state.model)
        self._own: Sequence[int] = ()
        self._weight = 0.0
        self._forwarded = self._missing = 0
        self._versions: tuple[float, ...] = ()
        self._read = False
        self._generators: list[dict[str, Any]] = []
        handlers: dict[Event, Callable[[Event, State], None]] = dict.fromkeys(_AGREEING, self._agree)
        engine.listen(
            {
                **handlers,
                Event.BATCH_START: self._begin,
                Event.BEFORE_FORWARD: self._count,
                Event.FIT_END: self._give_back,
            }
        )

    # -- events ------------------------------------------------------------------------------------------------

    def _agree(self, event: Event, state: State) -> None:
        """Stop on all ranks where one stops, and heed a signal that one of them got."""
        stopped, signaled = state.stop_reason is not None, self._signals.noticed is not None
        order = 0.0 if self.shards is None else self.shards.order()
        rows = self.team.tell(event.name, state.clock.batch, stopped, signaled, order)
        self._stop(rows)
        if event is Event.FIT_START:
            self.shard()
        elif self.shards is not None:
            self.shards.check_order([row[2] for row in rows])
            self.shards.rest()
        if any(row[1] for row in rows):
            names = self.team.exchange(self._signals.noticed)
            if self._signals.received is None:
                self._signals.heed(next(name for name in names if name is not None))

    def _begin(self, event: Event, state: State) -> None:
        """Agree on what is trained in the batch, and on how much each rank's share of it counts."""
        version = state.ledger.version
        weight = self._microbatches.weigh(state, self._own)
        said = self._microbatches.weighed
        rows = self.team.tell(event.name, state.clock.batch, state.stop_reason is not None, version, weight, said)
        self._stop(rows)
        versions = tuple(row[1] for row in rows)
        if versions != self._versions:
            self.compare()
            self._versions = versions
            self._buffers.find()
            self._reduction.follow()
        total = math.fsum(row[2] for row in rows)
        self._weight = weight / total if total else 1 / self.team.world
        self._microbatches.total, self._microbatches.world = total, self.team.world
        self._forwarded, self._missing = 0, int(max(row[3] for row in rows)) - said if total else 0
        self._buffers.mark()

    def _count(self, event: Event, state: State) -> None:  # noqa: ARG002 - what a handler is called with
        """Reduce what the last microbatch brings."""
        self._forwarded += 1
        if self._forwarded == self._microbatches.count:
            self._reduction.arm()

    def _stop(self, rows: Rows) -> None:
        if any(row[0] for row in rows):
            reasons = self.team.exchange(self._state.stop_reason)
            self._state.stop_reason = next(reason for reason in reasons if reason is not None)

    # -- a batch -----------------------------------------------------------------------------------------------

    def noting(
        self, steps: Iterable[Sequence[Fetched]], **loaders: ResumableLoader | None
    ) -> Iterator[Sequence[Fetched]]:
        """Yield the steps of an epoch, and know how many samples of each are this rank's; once, compare what the ranks read."""
        for fetched in steps:
            if not self._read:
                self._read = True
                same_samples(self.team, **loaders)
            self._own = [each.samples for each in fetched]
            yield fetched

    def settle(self, total: float | None) -> float | None:
        """Add up gradients and loss over the ranks.

        Args:
            total: This rank's part of the loss; None where its memory ran out.

        Returns:
            The loss of the whole batch; None where memory ran out on any rank: then nothing was done.
        """
        if self.shards is not None:
            self._stand_in(self.shards)
        loss = 0.0 if total is None else total
        high = float(torch.tensor(loss))
        low = loss - high if math.isfinite(high) else 0.0
        rows = self._reduction.settle((total is None, high, low, self._buffers.look()))
        self._forwarded = 0
        if any(row[0] for row in rows):
            if total is not None:
                rank = next(rank for rank, row in enumerate(rows) if row[0])
                # A share that cannot be cut is repeated as it is: it is not this rank that ran out.
                with suppress(OutOfMemoryError):
                    self._make_room(MemoryError(f"out of memory on rank {rank}"))
            self._state.ledger.clear_gradients()
            return None
        if any(row[3] for row in rows):
            self._buffers.average(self._weight, alike=len({row[3] for row in rows}) == 1)
        loss = _sum(row[1] + row[2] for row in rows)
        state = self._state
        state.loss = torch.tensor(loss) if state.loss is None else state.loss.new_tensor(loss)
        return loss

    def _stand_in(self, shards: Shards) -> None:
        """Go through the model as often as the rank with the most microbatches, with samples that count nothing.

        Normalization and dropout rest meanwhile: buffers and generators are those of a rank that does nothing.
        """
        model, (outputs_of, loss_of) = self._state.model, self._functions
        modes = [(module, module.training) for module in model.modules()] if self._missing else []
        try:
            for _ in range(self._missing):
                model.eval()
                batch = self._microbatches.stand_in(self._state)
                outputs = outputs_of(model, batch)
                shards.stand_in(outputs, partial(loss_of, outputs, batch))
        finally:
            for module, training in modes:
                module.training = training
        self._missing = 0

    # -- shards ------------------------------------------------------------------------------------------------

    def shard(self) -> None:
        """Shard the model, where that was asked for and surgery is done."""
        if self.shards is not None and not self._state.ledger.sharded:
            self.compare()
            self.shards.deal()

    def _give_back(self, event: Event, state: State) -> None:  # noqa: ARG002 - what a handler is called with
        """Make the model whole again at the end of a fit, and what algorithms hold of it."""
        if self.shards is None:
            return
        self.shards.gather()
        for each in self._engine.algorithms:
            saved = each.state_dict()
            found = {id(tensor): tensor for tensor in sharded_in(saved).values()}
            if found:
                each.load_state_dict(replaced(saved, {key: unsharded(tensor) for key, tensor in found.items()}))

    def compare(self) -> None:
        """Check that all ranks train the same, at the same point, from the same seed.

        Raises:
            DistributedError: Names what differs, on all ranks.
        """
        state = self._state
        where = f"{state.clock} {state.seed}"

        def facts() -> dict[str, Json]:
            return {**state.ledger.facts(), "clock": str(state.clock), "seed": state.seed}

        digest = hashlib.sha256(f"{state.ledger.digest()} {where}".encode()).hexdigest()
        self.team.compare("what trains", digest, facts)

    def close(self) -> None:
        """Take the hooks off the model."""
        self._reduction.close()

    # -- checkpoints -------------------------------------------------------------------------------------------

    def before_save(self, capture: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        """Check that the ranks hold the same, and gather what is each one's own.

        Args:
            capture: Returns what this rank would save.

        Returns:
            What returns it with all that lies in shards made whole; on the first rank.

        Raises:
            DistributedError: They do not.
        """
        self.compare()
        parameters = self._state.ledger.parameters
        bits = {name: _bits(each) for name, each in parameters.items() if not is_sharded(each)}
        digest = hashlib.sha256(repr(bits).encode()).hexdigest()
        self.team.compare("the weights (sums of their bits)", digest, lambda: bits)
        plain = self.team.exchange(plain_rng(rng_state(self._state.model, self._microbatches.forward.module)))
        self._generators = [rng_of(each) for each in plain]
        if self.shards is None:
            return capture
        tree = capture()
        lying = sharded_in(tree)
        gathered = self.shards.gathered(tree)
        made = replaced(tree, {id(lying[place]): each for place, each in gathered.items()})
        return lambda: made

    def saved(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the ranks besides the first."""
        return {"ranks": self._generators}

    def after_save(self, folder: RunDir) -> None:
        """Know the checkpoints that the first rank keeps."""
        know_checkpoints(self.team, folder)

    def own(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """Return a checkpoint as this rank's: with its own generators.

        Where it was written by another number of ranks, all but the first draw other numbers than they would have.
        """
        team, ranks = self.team, tree["extra"].get("ranks", ())
        if len(ranks) == team.world:
            return {**tree, "rng": ranks[team.rank]}
        if team.first:
            return dict(tree)
        seed_everything(derive_seed(self._state.seed, "rank", team.rank, tree["clock"]["batch"]))
        return {**tree, "rng": {}}

    def newest(self, folder: RunDir) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest whole checkpoint, found by the first rank."""
        found = self.team.all_or_none("loading the newest checkpoint", folder.newest)
        path = self.team.share(None if found is None else str(found[0]))
        if path is None or self.team.first:
            return found  # type: ignore[no-any-return]  # what newest returned
        return load_checkpoint(Path(path))


def seed_of(team: Team | None, seed: int) -> int:
    """Return what a rank's global generators start from: another number on each, so that dropout differs."""
    return seed if team is None or team.first else derive_seed(seed, "rank", team.rank)


def open_run_dir(team: Team, opened: Callable[..., RunDir], resume: bool | str | Path) -> RunDir:
    """Open the run's directory on the first rank, and let the others know what they resume from.

    Args:
        team: The ranks.
        opened: The class :class:`RunDir` with its arguments but the last two.
        resume: As of :meth:`Trainer.fit`.

    Raises:
        DistributedError: It failed on another rank; or the directory is not the same for this one.
    """
    first: RunDir | None = team.all_or_none(
        "opening the run directory", lambda: opened(resume=resume) if team.first else None
    )
    try:
        found = None if first is None or first.loaded is None else str(first.loaded[0])
        owner = None if first is None or first.folder is None else holder(first.folder)
        known = team.share([found, None if first is None else first.best_metric, owner])

        def follow() -> RunDir:
            if first is not None:
                return first
            follower = opened(resume=False, writes=False)
            _await_folder(follower.folder, known[2], team)
            if known[0] is not None:
                follower.loaded = load_checkpoint(Path(known[0]))
            follower.best_metric = known[1]
            return follower

        folder: RunDir = team.all_or_none("reading the run directory", follow)
        know_checkpoints(team, folder)
    except BaseException:
        if first is not None:
            first.close()
        raise
    return folder


def know_checkpoints(team: Team, folder: RunDir) -> None:
    """Let all ranks know which checkpoints the first one keeps."""
    paths = [str(each) if each is not None else None for each in (folder.best, folder.last)]
    best, last = (None if each is None else Path(each) for each in team.share(paths))
    folder.know(best, last)


def start_alike(team: Team, model: nn.Module, settings: Mapping[str, Json], **loaders: ResumableLoader | None) -> None:
    """Check that all ranks were given the same, and give the others the first rank's weights.

    Args:
        team: The ranks.
        model: The model; on its device.
        settings: Of the fit, algorithms among them.
        loaders: The data, which has to be of one length.

    Raises:
        DistributedError: Names what differs, on all ranks.
    """
    everything: dict[str, Json] = {
        f"parameter {name}": {**_shape(each), "requires_grad": each.requires_grad}
        for name, each in model.named_parameters()
    }
    everything |= {f"buffer {name}": _shape(each) for name, each in model.named_buffers()}
    everything |= {f"setting {name}": value for name, value in settings.items()}
    everything |= {name: None if each is None else each.facts for name, each in loaders.items()}
    _compare(team, "what is trained, and with what", everything)
    team.spread([*model.parameters(), *model.buffers()])


def same_data(team: Team, **loaders: ResumableLoader) -> None:
    """Check that all ranks were given data of the same size.

    Raises:
        DistributedError: Names what differs, on all ranks.
    """
    _compare(team, "the data", {name: each.facts for name, each in loaders.items()})


def same_samples(team: Team, **loaders: ResumableLoader | None) -> None:
    """Warn where the ranks read other data: each would train on its part of what is a part already.

    Warns:
        ThawlineWarning: Names the rank and the loader.
    """
    for name, loader in loaders.items():
        digests = team.exchange(None if loader is None else loader.digest())
        other = next((rank for rank, each in enumerate(digests) if each != digests[0]), None)
        if other is not None:
            warn(
                f"rank {other} reads other samples from {name} than rank 0 does, and each takes its part of every batch: of data that were split by rank "
                f"before, 1/{team.world} is left. Give all ranks the whole: no Subset, dataset.shard or split_dataset_by_node by rank. "
                "Where a dataset draws from a generator of its own that differs, this is as it should be."
            )


def _compare(team: Team, what: str, facts: Mapping[str, Json]) -> None:
    team.compare(what, hashlib.sha256(repr(facts).encode()).hexdigest(), lambda: facts)


def _shape(tensor: torch.Tensor) -> dict[str, Json]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype)}


def _await_folder(folder: Path | None, owner: str | None, team: Team) -> None:
    """Wait until the directory appears that the first rank has opened: the one whose lock says the same here as there."""
    if (folder is None) != (owner is None):
        mine, other = ("no run_dir", "one") if folder is None else (f"run_dir={str(folder)!r}", "none")
        raise DistributedError(
            f"rank {team.rank} has {mine}, and rank 0 has {other}. Write the same on all ranks: Trainer(run_dir='runs/first'); the "
            "first one alone writes there."
        )
    end = time.monotonic() + _PATIENCE
    while folder is not None and (not folder.is_dir() or holder(folder) != owner):
        if time.monotonic() > end:
            got = "no such directory" if not folder.is_dir() else f"one that is held by {holder(folder) or 'nobody'}"
            raise DistributedError(
                f"rank {team.rank} does not see {folder}, which rank 0 has opened: got {got}, wanted one that all machines "
                f"share, held by {owner}. Write: Trainer(run_dir=<a path on a shared file system>)."
            )
        time.sleep(0.05)


def _bits(tensor: torch.Tensor) -> int:
    """Return a sum over a tensor's memory: another one where a single bit differs."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = raw[: raw.numel() // 4 * 4].view(torch.int32)
    return int(whole.sum(dtype=torch.int64)) + int(raw[whole.numel() * 4 :].sum(dtype=torch.int64))


def _sum(values: Iterable[float]) -> float:
    total = 0.0
    for each in values:
        total += each
    return total
