"""The output of the frozen part of a model, computed once a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs
from torch import Tensor, nn
from typing_extensions import override

from ..engine import (
    Algorithm,
    ArgumentError,
    Event,
    Stage,
    State,
    Unloaded,
    derive_seed,
    get_logger,
    register,
    targets_of,
)
from .arguments import one_of
from .prefix_feed import Feed, fed_or_loaded, loaded_part
from .prefix_frontier import Frontier, frozen_depth, label_of, replay_at
from .prefix_pass import Forward, Pass
from .prefix_replay import Replay, replaced
from .prefix_room import bytes_of, folder_of
from .prefix_store import RowStore
from .prefix_trace import UnskippableError

log = get_logger(__name__)
# A name of the module is found in a fraction of the time that a member of an enum takes.
EPOCH_START, BEFORE_FORWARD, AFTER_FORWARD = Event.EPOCH_START, Event.BEFORE_FORWARD, Event.AFTER_FORWARD


@register
@attrs.define(slots=False, eq=False, on_setattr=attrs.setters.NO_OP)  # it sets some each batch
class PrefixCache(Algorithm):
    """Computes the output of the frozen leading part of the model once a sample, and skips that part afterwards.

    The part goes up to the first layer in which anything trains. What crosses this frontier is kept by
    ``state.sample_ids``; when the frontier moves forward it is computed on from there, when it moves back it is
    filled again. Gradients equal those of the uncached run bit for bit where the shapes of batches repeat, else within
    1e-6 relative.

    While it is on, the frozen part stands in eval mode, so its dropout is off: with dropout nothing would repeat.
    It goes off, and logs why, where inputs or targets change between epochs (augmentation), where the part draws
    random numbers, or where its output is used in other ways than through the frontier. At the first cached batch of
    each epoch all inputs are compared, and one row is computed again.

    Where the whole trunk is frozen and the model's output is the head's, the trunk does not run at all, and from the
    second epoch on nothing is loaded: ``state.batch`` then holds what the head is given, and the targets.

    Args:
        budget: The most it may keep, in bytes: ``"4GB"``. What does not fit is computed each time.
        folder: A directory for memory-mapped files, removed at the end; None keeps everything in memory.
        dtype: ``"fp32"`` keeps numbers as they are computed, ``"bf16"`` rounds them and takes half the room.

    Raises:
        ArgumentError: An argument of the wrong type or out of range.

    Source: Liu, Agarwal, Venkataraman, AutoFreeze, arXiv:2102.01386.

    Example:
        >>> from thawline.algorithms import TrainOnly
        >>> from thawline.engine import Trainer
        >>> from thawline.engine.testing import tiny_loader, tiny_models
        >>> cache = PrefixCache(budget="500MB")
        >>> trainer = Trainer(loss_fn=nn.functional.cross_entropy, algorithms=[TrainOnly("head"), cache])
        >>> result = trainer.fit(tiny_models()["residual"](), tiny_loader(32), duration="3ep")
        >>> cache.hits  # batches of the second and third epoch, in which the trunk was not computed
        8
        >>> cache.misses, cache.computed, cache.samples  # nothing is kept after the fit
        (4, 32, 0)
        >>> small = PrefixCache(budget=500)  # room for the first batch of four; so every batch is loaded
        >>> trainer = Trainer(loss_fn=nn.functional.cross_entropy, algorithms=[TrainOnly("head"), small])
        >>> again = trainer.fit(tiny_models()["residual"](), tiny_loader(32), duration="3ep")
        >>> small.hits + small.misses, small.misses > 4, small.off
        (12, True, None)
    """

    stage: ClassVar[Stage] = Stage.DATA  # after those that freeze and thaw, before those that read gradients
    events = frozenset(
        {Event.EPOCH_START, Event.BATCH_START, Event.BEFORE_FORWARD, Event.AFTER_FORWARD, Event.FIT_ABORT}
    )

    budget: int = attrs.field(default=4 * 10**9, converter=bytes_of)
    folder: Path | None = attrs.field(default=None, converter=folder_of)
    dtype: Literal["fp32", "bf16"] = attrs.field(default="fp32", validator=one_of(("fp32", "bf16")))

    off: str | None = attrs.field(init=False, default=None)
    """Why nothing is cached any more; None while it is on."""
    barred: dict[int, str] = attrs.field(init=False, factory=dict, repr=False)
    """Why nothing is cached where that many layers are frozen: the model's structure."""
    misses: int = attrs.field(init=False, default=0, repr=False)
    """Microbatches for which the frozen part ran, for all samples or for those that were not kept."""
    computed: int = attrs.field(init=False, default=0, repr=False)
    """Samples for which the frozen part ran."""
    _hits: int = attrs.field(init=False, default=0, repr=False)
    _at: Frontier | None = attrs.field(init=False, default=None, repr=False)
    _older: Frontier | None = attrs.field(init=False, default=None, repr=False)
    _replays: dict[int, Replay] = attrs.field(init=False, factory=dict, repr=False)
    _feed: Feed | None = attrs.field(init=False, default=None, repr=False)
    _version: int | None = attrs.field(init=False, default=None, repr=False)
    _due: bool = attrs.field(init=False, default=True, repr=False)  # whether the checks of the epoch are to come
    _lacks: bool = attrs.field(init=False, default=True, repr=False)  # whether samples of the epoch were not kept
    _mixed: int = attrs.field(init=False, default=0, repr=False)  # batches of the epoch of which only a part was there
    _lazy: bool = attrs.field(init=False, default=False, repr=False)  # whether batches come unloaded
    _fed: bool = attrs.field(init=False, default=False, repr=False)  # whether the batch is one for the head
    _unloaded: list[Unloaded] = attrs.field(init=False, factory=list, repr=False)  # what was not loaded of it
    _told: bool = attrs.field(init=False, default=False, repr=False)
    _called: bool = attrs.field(init=False, default=False, repr=False)
    _model: nn.Module | None = attrs.field(init=False, default=None, repr=False)
    _own: Forward | None = attrs.field(init=False, default=None, repr=False)

    @property
    def hits(self) -> int:
        """Microbatches for which the frozen part was skipped."""
        return self._hits + (0 if self._feed is None else self._feed.hits)

    @property
    def samples(self) -> int:
        """How many samples are kept at the frontier."""
        return 0 if self._at is None else len(self._at.store)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(each.store.nbytes for each in (self._at, self._older) if each is not None)

    @override
    def apply(self, event: Event, state: State) -> None:
        """Follow the frontier between steps; stand in for the model's forward in between.

        Example:
            >>> from torch import ones, optim
            >>> from thawline.engine import ParameterLedger
            >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
            >>> state, cache = State(model, ParameterLedger(model, optim.SGD)), PrefixCache()
            >>> def step(x, *ids):
            ...     cache.apply(Event.BATCH_START, state)
            ...     state.microbatch, state.microbatch_ids = (x, ones(len(ids))), ids
            ...     cache.apply(Event.BEFORE_FORWARD, state)
            ...     gives = model(x)
            ...     cache.apply(Event.AFTER_FORWARD, state)
            ...     return cache.hits, cache.misses, cache.computed, cache.samples
            >>> step(ones(2, 1), 5, 9)  # all trains
            (0, 0, 0, 0)
            >>> state.ledger.freeze("blocks[0]", owner="me")
            >>> step(ones(2, 1), 5, 9), cache.nbytes, model[0].training  # two numbers a sample, and a print of its input
            ((0, 1, 2, 2), 32, False)
            >>> step(ones(2, 1), 5, 9), step(ones(2, 1), 5, 7), "forward" in vars(model)
            ((1, 1, 2, 2), (1, 2, 4, 3), False)
            >>> state.ledger.freeze("blocks[1]", owner="me")
            >>> step(ones(2, 1), 5, 9), cache.nbytes  # computed on from the older frontier, which is kept until an epoch begins
            ((1, 3, 6, 2), 104)
            >>> state.ledger.thaw("blocks[0]", owner="me")
            >>> step(ones(2, 1), 5, 9), cache.nbytes, model[0].training
            ((1, 3, 6, 0), 0, True)
        """
        if event is BEFORE_FORWARD:
            if self._fed and self._version != state.ledger.version and self._thawed(state):
                self._end()
                state.microbatch = loaded_part(self._unloaded, state.microbatch_ids or ())
            elif self._fed:
                assert self._feed is not None, "what feeds the head knows how to run it"
                self._stand_in(state.model, self._feed.head)
            elif self._at is not None and self._version == state.ledger.version:
                self._begin(state)
        elif event is AFTER_FORWARD or event is Event.FIT_ABORT:
            self._end()
        else:
            if self._version != state.ledger.version:
                self._move(state)
            if event is EPOCH_START:
                self._begin_epoch(state)
            elif self._lazy:
                state.batch, self._unloaded = fed_or_loaded(state.batch, None if self._due else self._feed)
                self._fed = bool(self._unloaded)

    @override
    def attach(self, state: State) -> None:
        """Start empty: a resumed fit fills it again.

        Raises:
            ArgumentError: The weights lie in shards: each block is then gathered by all ranks together, also by one whose
                samples are kept.

        Example:
            >>> from torch import optim
            >>> from thawline.engine import ParameterLedger
            >>> model = nn.Linear(1, 1)
            >>> state = State(model, ParameterLedger(model, optim.SGD), unloaded=True)
            >>> PrefixCache().attach(state), state.unloaded
            (None, False)
        """
        if state.sharded:
            raise ArgumentError(
                "Trainer(algorithms=)", got="PrefixCache beside FullyShard",
                takes="algorithms that leave out no block of the forward pass, or weights that are whole on each rank",
                example="Trainer(algorithms=[PrefixCache()], distributed=Replicate())",
            )  # fmt: skip
        self.close()
        state.unloaded = False

    @override
    def close(self) -> None:
        """Give the model its forward back, and drop what is kept."""
        self._end()
        self._drop(self._at, self._older)
        self._stop_feeding()
        self._at = self._older = self._version = None
        self._replays, self._due, self._lacks, self._lazy = {}, True, True, False

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return why it is off, or barred where: what is kept is computed again."""
        return {"off": self.off, "barred": [list(each) for each in self.barred.items()]}

    @override
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back why; the weights are other ones now, so nothing that is kept holds.

        Example:
            >>> cache = PrefixCache()
            >>> cache.load_state_dict({"off": "the inputs change", "barred": [[2, "a Linear of it has forward hooks"]]})
            >>> cache.off, cache.barred, cache.state_dict()["barred"]
            ('the inputs change', {2: 'a Linear of it has forward hooks'}, [[2, 'a Linear of it has forward hooks']])
        """
        self.close()
        self.off, self.barred = saved["off"], dict(saved["barred"])

    # -- following the frontier ----------------------------------------------------------------------------------

    def _move(self, state: State) -> None:
        """Find the frontier again; keep what still holds."""
        ledger, layers, began = state.ledger, list(state.layers), self._version is None
        self._version = ledger.version
        depth = frozen_depth(state.layers, ledger.trainable)
        depth = 0 if self.off is not None or depth in self.barred else depth
        if depth == (0 if self._at is None else self._at.depth) and not began:
            return
        kept = [each for each in (self._at, self._older) if each is not None]
        # What lies before an older frontier may have trained unless the new one lies beyond it.
        self._drop(*(each for each in kept if each.depth > depth))
        kept = sorted((each for each in kept if each.depth <= depth), key=lambda each: each.depth)
        self._at = kept.pop() if kept and kept[-1].depth == depth else None
        self._drop(*kept[:-1])
        self._older = kept[-1] if kept and len(kept[-1].store) else None
        if depth and self._at is None:
            room = self.budget - (0 if self._older is None else self._older.store.reserved)
            self._at = Frontier(
                depth, RowStore(room, self.folder, narrow=self.dtype == "bf16"), self._replays.get(depth)
            )
        self._lacks = self._due = True
        self._stop_feeding()
        state.unloaded = False
        names = [name for layer in layers[:depth] for name in layer.parameters]
        ledger.evaluate_frozen(names or None, owner=self.owner)
        if depth:
            log.info("the frozen part stands in eval mode", layers=depth, first_that_trains=layers[depth].name)

    def _drop(self, *frontiers: Frontier | None) -> None:
        for each in frontiers:
            if each is not None:
                each.store.close()

    def _turn_off(self, why: str) -> None:
        """Cache nothing any more; the frozen part leaves eval mode at the next batch."""
        self.off = why
        self._drop(self._at, self._older)
        self._stop_feeding()
        self._at = self._older = None
        self._version = -1
        log.warning("prefix cache off", why=why)

    # -- batches that need no loading ----------------------------------------------------------------------------

    def _begin_epoch(self, state: State) -> None:
        """Ask for batches that are not loaded, once a whole epoch has been kept."""
        at = self._at
        # A sampler that draws with replacement: who loads many batches here would do without the loader's workers.
        lacks = self._lacks or self._mixed * 4 > state.clock.batches_per_epoch
        self._stop_feeding()
        if at is not None and at.replay is not None and not lacks and len(at.store):
            self._drop(self._older)
            self._older, at.store.budget = None, self.budget
            if at.label is not None and at.store.is_uniform:
                self._feed = Feed(at.store, at.replay, at.label)
        state.unloaded = self._lazy = self._feed is not None
        self._due, self._lacks, self._mixed = True, False, 0

    def _stop_feeding(self) -> None:
        self._hits, self._feed, self._fed = self.hits, None, False

    def _thawed(self, state: State) -> bool:
        """Return whether what is skipped trains: somebody whose turn at BATCH_START came later has let it.

        Example:
            >>> import torch
            >>> from thawline.algorithms import TrainOnly
            >>> from thawline.engine import Trainer, on
            >>> from thawline.engine.testing import tiny_loader, tiny_models
            >>> @on(Event.BATCH_START)
            ... def thaw_late(state):
            ...     if (state.clock.epoch, state.clock.batch_in_epoch) == (2, 1):
            ...         state.ledger.thaw("*", owner="TrainOnly")
            >>> def trained(*algorithms, **options):
            ...     torch.manual_seed(0)
            ...     model, each = tiny_models()["mlp"](), [TrainOnly("head"), thaw_late(), *algorithms]
            ...     trainer = Trainer(algorithms=each, loss_fn=nn.functional.cross_entropy, progress=False, **options)
            ...     trainer.fit(model, tiny_loader(32), duration="3ep")
            ...     return [*model.parameters()]
            >>> for options in ({}, {"accumulate": 2}, {"microbatch_size": 4}):
            ...     result, cache = trained(**options), PrefixCache()
            ...     all(map(torch.equal, result, trained(cache, **options))), cache.hits, cache.misses
            (True, 5, 4)
            (True, 6, 4)
            (True, 10, 8)
        """
        assert self._at is not None, "what is fed is kept at a frontier"
        return frozen_depth(state.layers, state.ledger.trainable) < self._at.depth

    # -- one microbatch ------------------------------------------------------------------------------------------

    def _begin(self, state: State) -> None:
        """Stand in for the model's forward, until the microbatch has gone through it.

        Example:
            >>> from torch import optim
            >>> from thawline.engine import ParameterLedger
            >>> model, cache = nn.Linear(1, 1), PrefixCache()
            >>> cache._begin(State(model, ParameterLedger(model, optim.SGD)))
            >>> cache.off, "forward" in vars(model)
            ('the loader does not say which samples a batch holds: pass a DataLoader over a dataset', False)
        """
        self._end()
        if state.microbatch_ids is None:
            self._turn_off("the loader does not say which samples a batch holds: pass a DataLoader over a dataset")
            return
        forward, ids, targets = state.model.forward, state.microbatch_ids, targets_of(state.microbatch)

        def instead(*args: Any, **kwargs: Any) -> Any:
            return self._forward(state, Pass(forward, args, kwargs, ids, targets))

        self._called = False
        self._stand_in(state.model, instead)

    def _stand_in(self, model: nn.Module, forward: Forward) -> None:
        self._end()  # a batch that is repeated has not come to AFTER_FORWARD
        own = vars(model)
        self._model, self._own = model, own.get("forward")
        own["forward"] = forward

    def _end(self) -> None:
        """Leave nothing on the model.

        Example:
            >>> model, cache = nn.Linear(1, 1), PrefixCache()
            >>> cache._stand_in(model, lambda: "kept")
            >>> model(), cache._end(), "forward" in vars(model)
            ('kept', None, False)
            >>> model.forward = own = lambda: "own"
            >>> cache._stand_in(model, lambda: "kept")
            >>> model(), cache._end(), model.forward is own
            ('kept', None, True)
        """
        if self._model is None:
            return
        own = vars(self._model)
        if self._own is None:
            own.pop("forward", None)
        else:
            own["forward"] = self._own
        self._model = self._own = None

    def _forward(self, state: State, one: Pass) -> Any:
        """Run the model: with what is kept where all of it is there, else as it is, and keep what crosses the frontier.

        Example:
            >>> from torch import ones, optim
            >>> from thawline.engine import ParameterLedger
            >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 4))
            >>> def caches(calls):
            ...     state, cache = State(model, ParameterLedger(model, optim.SGD), microbatch_ids=(5, 9)), PrefixCache()
            ...     state.ledger.freeze("blocks[0]", owner="me")
            ...     cache.apply(Event.EPOCH_START, state)
            ...     cache.apply(Event.BEFORE_FORWARD, state)
            ...     gave = [model(ones(2, 1)) for _ in range(calls)]
            ...     cache.apply(Event.AFTER_FORWARD, state)
            ...     return cache.off, cache.barred
            >>> caches(1), caches(2)
            ((None, {}), ('the model is called several times a batch', {}))
            >>> handle = model[0].register_forward_hook(lambda module, given, gave: None)
            >>> caches(1)[1]
            {1: 'a Linear of it has forward hooks'}
        """
        at = self._at
        if self._called and self.off is None:
            self._turn_off("the model is called several times a batch")
        self._called = True
        if at is None or self.off is not None:
            return one()
        try:
            if at.replay is None:
                at.replay = self._replays[at.depth] = replay_at(state, at.depth, one)
            kept, places = at.rows(one), []
            # On ranks some samples of every batch are away from home. Alone all shapes repeat, and with them all bits.
            if kept is None and state.world > 1 and len(places := at.missing(one)) < len(one.ids):
                kept = self._complete(state, at, one, places=places)
            if kept is None:
                return self._fill(state, at, at.replay, one)
            row = derive_seed(state.seed, "prefix", state.clock.epoch) % len(one.ids) if self._due else None
            self._due = False
            if why := at.fault(state, at.replay, one, kept, row=row):
                self._turn_off(why)
                return one()
            self._hits += not places
            return at.replay.run(one, kept[: at.crossing])
        except UnskippableError as error:
            self.barred[at.depth], self._version = str(error), -1
            log.warning("prefix not cached", layers=at.depth, why=str(error))
            return one()

    def _complete(self, state: State, at: Frontier, one: Pass, *, places: Sequence[int]) -> list[Tensor] | None:
        """Compute those samples of a batch that are not kept, alone; return None where there is no room for them.

        Example:
            >>> import torch
            >>> from thawline.engine import ParameterLedger
            >>> model, cache = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)), PrefixCache()
            >>> x, state = torch.tensor([[1.0], [2.0]]), State(model, ParameterLedger(model, torch.optim.SGD))
            >>> one, at = Pass(model.forward, (x,), {}, ids=(5, 9)), Frontier(1, RowStore(budget=10_000))
            >>> at.replay = replay_at(state, 1, one)
            >>> at.keep(one.part([0]), [model[:2](x[:1]).detach()]), at.rows(one)
            (True, None)
            >>> kept = cache._complete(state, at, one, places=[1])
            >>> torch.allclose(kept[0], model[:2](x)), cache.misses, cache.computed, cache._mixed, cache._lacks
            (True, 1, 1, 1, True)
            >>> at.store.full, cache._lacks, other = True, False, Pass(model.forward, (x,), {}, ids=(5, 7))
            >>> cache._complete(state, at, other, places=[1]), cache.computed, cache._lacks
            (None, 2, True)
        """
        assert at.replay is not None, "what is kept was computed somehow"
        part = one.part(places)
        self.misses += 1
        self.computed += len(places)
        self._mixed += 1
        if not at.keep(part, at.replay.value(part, state.model)):
            self._lacks = True
            self._tell_full(at)
        return at.rows(one)

    def _fill(self, state: State, at: Frontier, replay: Replay, one: Pass) -> Any:
        """Run the model, from the older frontier on where all is there, and keep what crosses the newer one."""
        self.misses += 1
        self.computed += len(one.ids)
        self._mixed += any(at.store.has((each,)) for each in one.ids)
        if replay.chain and not len(at.store):
            at.label = label_of(state.microbatch, one.targets, len(one.ids))

        def keep(value: list[Tensor]) -> None:
            if not at.keep(one, value):
                self._lacks = True
                self._tell_full(at)

        instead = replay.watched(keep)
        older = self._older
        if older is not None and older.replay is not None and (kept := older.rows(one, alike=True)) is not None:
            instead = {**older.replay.instead(kept[: older.crossing]), **instead}
        with replaced(instead):
            return one()

    def _tell_full(self, at: Frontier) -> None:
        if not self._told:
            self._told = True
            log.warning(
                "prefix cache full", samples=len(at.store), budget=self.budget,
                write="a larger budget, dtype='bf16', or folder='cache' for memory-mapped files",
            )  # fmt: skip
