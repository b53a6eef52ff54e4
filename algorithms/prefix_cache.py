"""The output of the frozen part of a model, computed once a sample."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs
import torch
from torch import Tensor
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
from .prefix_pass import Pass, is_batched
from .prefix_replay import Replay, UnskippableError, close, find_replay, gives_the_same, replaced, unpadded
from .prefix_store import RowStore

log = get_logger(__name__)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_EXAMPLE = "PrefixCache(budget='4GB')"
# A row computed alone differs in its last bits from the same row computed in a batch.
_TOLERANCE, _ROUGH_TOLERANCE = 1e-3, 3e-2


def _budget(value: object) -> int:
    found = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(i?)b\s*", value.lower()) if isinstance(value, str) else None
    if found is not None and found[1].count(".") < 2 and found[1] != ".":
        factor = 1024 ** "kmgt".find(found[2]) * 1024 if found[3] and found[2] else _UNITS[found[2]]
        value = int(float(found[1]) * factor)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    takes = "a number of bytes above 0: a whole number, '500MB' or '4GB'"
    raise ArgumentError("PrefixCache(budget=)", got=value, takes=takes, example=_EXAMPLE)


def _folder(value: object) -> Path | None:
    if value is None or (isinstance(value, (str, Path)) and str(value)):
        return None if value is None else Path(value)
    example = "PrefixCache(folder='cache')"
    raise ArgumentError("PrefixCache(folder=)", got=value, takes="a directory, or None for memory", example=example)


@attrs.define(eq=False)
class Frontier:
    """What is kept of the part of the model before its first layer that trains.

    Args:
        depth: How many layers lie before it.
        store: Rows by sample: what crosses the frontier, the targets where there is a ``label``, prints of the inputs.
        replay: How to skip what lies before it; None until the first batch.
        label: The name of the targets in a batch that is a mapping, ``""`` in a tuple; None where no batch can be made
            of what is kept.
        crossing: How many tensors cross it.
        padded: The signatures for which trimmed and padded rows were tried.
    """

    depth: int
    store: RowStore
    replay: Replay | None = None
    label: str | None = None
    crossing: int = 0
    padded: set[Hashable] = attrs.field(factory=set)

    def rows(self, one: Pass, *, alike: bool = False) -> list[Tensor] | None:
        """Return what is kept of a batch; None where something is missing.

        Args:
            one: The forward pass of the batch.
            alike: Neither trim nor pad.
        """
        store, ids, signature = self.store, one.ids, one.signature
        if not store.has(ids):
            return None
        if store.alike(ids, signature) or (not alike and store.fits(ids, signature) and one.right):
            return store.rows(ids, signature)
        return None

    def keep(self, one: Pass, value: Sequence[Tensor]) -> bool:
        """Keep what crosses the frontier; return whether there was room.

        Raises:
            UnskippableError: It has a gradient, or not one row a sample.
        """
        if any(each.requires_grad for each in value):
            raise UnskippableError("its output has a gradient")
        if not all(is_batched(each, len(one.ids)) for each in value):
            raise UnskippableError("its output does not have one row a sample")
        self.crossing = len(value)
        facts = [one.prints] if self.label is None else [one.targets, one.prints]
        return self.store.add(one.ids, one.signature, [*value, *facts], right=one.right, exact=len(facts))

    def changed(self, one: Pass, kept: Sequence[Tensor]) -> str | None:
        """Return what is not as it was when it was kept; None where all is."""
        if not torch.allclose(kept[-1], one.prints, rtol=1e-9, atol=1e-6, equal_nan=True):
            return "inputs"
        if self.label is not None and not torch.equal(kept[self.crossing], one.targets):
            return "targets"
        return None


@register
@attrs.define(slots=False, eq=False)
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
        >>> PrefixCache(budget="500MB", dtype="bf16").describe()["arguments"]["budget"]
        500000000
    """

    stage: ClassVar[Stage] = Stage.DATA  # after those that freeze and thaw, before those that read gradients
    events = frozenset(
        {Event.EPOCH_START, Event.BATCH_START, Event.BEFORE_FORWARD, Event.AFTER_FORWARD, Event.FIT_ABORT}
    )

    budget: int = attrs.field(default=4 * 10**9, converter=_budget)
    folder: Path | None = attrs.field(default=None, converter=_folder)
    dtype: Literal["fp32", "bf16"] = attrs.field(default="fp32", validator=one_of(("fp32", "bf16")))

    off: str | None = attrs.field(init=False, default=None)
    """Why nothing is cached any more; None while it is on."""
    barred: dict[int, str] = attrs.field(init=False, factory=dict, repr=False)
    """Why nothing is cached where that many layers are frozen: the model's structure."""
    hits: int = attrs.field(init=False, default=0, repr=False)
    """Microbatches for which the frozen part was skipped."""
    misses: int = attrs.field(init=False, default=0, repr=False)
    """Microbatches for which it ran."""
    _at: Frontier | None = attrs.field(init=False, default=None, repr=False)
    _older: Frontier | None = attrs.field(init=False, default=None, repr=False)
    _replays: dict[int, Replay] = attrs.field(init=False, factory=dict, repr=False)
    _version: int | None = attrs.field(init=False, default=None, repr=False)
    _due: bool = attrs.field(init=False, default=True, repr=False)
    _lacks: bool = attrs.field(init=False, default=True, repr=False)
    _fed: bool = attrs.field(init=False, default=False, repr=False)
    _told: bool = attrs.field(init=False, default=False, repr=False)
    _called: bool = attrs.field(init=False, default=False, repr=False)
    _standing: AbstractContextManager[None] | None = attrs.field(init=False, default=None, repr=False)

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
        """Follow the frontier between steps; stand in for the model's forward in between."""
        if event is Event.BEFORE_FORWARD:
            if self._at is not None and self.off is None and self._version == state.ledger.version:
                self._begin(state)
        elif event is Event.AFTER_FORWARD or event is Event.FIT_ABORT:
            self._end()
        else:
            if self._version != state.ledger.version:
                self._move(state)
            if event is Event.EPOCH_START:
                self._begin_epoch(state)
            else:
                self._fed = state.unloaded and self._feed(state)

    @override
    def attach(self, state: State) -> None:
        """Start empty: a resumed fit fills it again."""
        self.close()

    @override
    def close(self) -> None:
        """Give the model its forward back, and drop what is kept."""
        self._end()
        self._drop(self._at, self._older)
        self._at = self._older = self._version = None
        self._replays, self._due, self._lacks = {}, True, True

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return why it is off, or barred where: what is kept is computed again."""
        return {"off": self.off, "barred": [list(each) for each in self.barred.items()]}

    @override
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back why; the weights are other ones now, so nothing that is kept holds."""
        self.close()
        self.off, self.barred = saved["off"], dict(saved["barred"])

    # -- following the frontier ----------------------------------------------------------------------------------

    def _move(self, state: State) -> None:
        """Find the frontier again; keep what still holds."""
        ledger = state.ledger
        self._version = ledger.version
        layers = list(state.layers)
        trains = (place for place, layer in enumerate(layers) if not ledger.trainable.isdisjoint(layer.parameters))
        depth = next(trains, 0)
        depth = 0 if self.off is not None or depth in self.barred else depth
        if depth == (0 if self._at is None else self._at.depth):
            return
        kept = [each for each in (self._at, self._older) if each is not None]
        # What lies before an older frontier may have trained unless the new one lies beyond it.
        self._drop(*(each for each in kept if each.depth > depth))
        kept = sorted((each for each in kept if each.depth <= depth), key=lambda each: each.depth)
        self._at = kept.pop() if kept and kept[-1].depth == depth else None
        self._drop(*kept[:-1])
        self._older = kept[-1] if kept and len(kept[-1].store) else None
        if depth and self._at is None:
            store = RowStore(self.budget - self.nbytes, self.folder, narrow=self.dtype == "bf16")
            self._at = Frontier(depth, store, self._replays.get(depth))
        self._lacks = self._due = True
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
        self._at = self._older = None
        self._version = -1
        log.warning("prefix cache off", why=why)

    # -- batches that need no loading ----------------------------------------------------------------------------

    def _begin_epoch(self, state: State) -> None:
        """Ask for batches that are not loaded, once a whole epoch has been kept."""
        at = self._at
        state.unloaded = self.off is None and at is not None and at.label is not None and not self._lacks
        self._due, self._lacks = True, False

    def _feed(self, state: State) -> bool:
        """Put what the head is given in the place of batches that are not loaded; return whether that was done."""
        at, many = self._at, type(state.batch) is list
        batches = state.batch if many else [state.batch]
        if at is None or self.off is not None or self._due or at.label is None:
            return False
        made = []
        for each in batches:
            kept = at.store.take(each.sample_ids, 2) if isinstance(each, Unloaded) else None
            if kept is None:
                return False
            features, targets = kept
            made.append((features, targets) if not at.label else {"inputs": features, at.label: targets})
        state.batch = made if many else made[0]
        return True

    # -- one microbatch ------------------------------------------------------------------------------------------

    def _begin(self, state: State) -> None:
        """Stand in for the model's forward, until the microbatch has gone through it."""
        if state.microbatch_ids is None:
            self._turn_off("the loader does not say which samples a batch holds: pass a DataLoader over a dataset")
            return
        forward, ids, targets = state.model.forward, state.microbatch_ids, targets_of(state.microbatch)

        def instead(*args: Any, **kwargs: Any) -> Any:
            if self._fed:
                return self._feed_head(*args, *kwargs.values())
            return self._forward(state, Pass(forward, args, kwargs, ids, targets))

        self._called = False
        self._standing = replaced({state.model: instead})
        self._standing.__enter__()

    def _end(self) -> None:
        """Leave nothing on the model."""
        if self._standing is not None:
            self._standing.__exit__(None, None, None)
            self._standing = None

    def _feed_head(self, *inputs: Any) -> Any:
        assert self._at is not None, "fed from what is kept there"
        assert self._at.replay is not None, "it was filled"
        self.hits += 1
        return self._at.replay.run_head(inputs[0])

    def _forward(self, state: State, one: Pass) -> Any:
        """Run the model: with what is kept where all of it is there, else as it is, and keep what crosses the frontier."""
        at = self._at
        if self._called and self.off is None:
            self._turn_off("the model is called several times a batch")
        self._called = True
        if at is None or self.off is not None:
            return one()
        try:
            if at.replay is None:
                at.replay = self._replays[at.depth] = _found(state, at.depth, one)
            kept = at.rows(one)
            if kept is None:
                return self._fill(state, at, at.replay, one)
            if why := self._check(state, at, at.replay, one, kept):
                self._turn_off(why)
                return one()
            self.hits += 1
            return at.replay.run(one, kept[: at.crossing])
        except UnskippableError as error:
            self.barred[at.depth], self._version = str(error), -1
            log.warning("prefix not cached", layers=at.depth, why=str(error))
            return one()

    def _fill(self, state: State, at: Frontier, replay: Replay, one: Pass) -> Any:
        """Run the model, from the older frontier on where all is there, and keep what crosses the newer one."""
        self.misses += 1
        if replay.chain and not len(at.store):
            at.label = _label(state.microbatch, one.targets, len(one.ids))

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

    # -- checks --------------------------------------------------------------------------------------------------

    def _check(self, state: State, at: Frontier, replay: Replay, one: Pass, kept: Sequence[Tensor]) -> str | None:
        """At the first cached batch of an epoch compare inputs, and compute a row again; at a new length compare outputs.

        Returns:
            What differs; None where nothing does.
        """
        features = kept[: at.crossing]
        rough = self.dtype == "bf16" or any(each.dtype.itemsize < 4 for each in features)
        tolerance = _ROUGH_TOLERANCE if rough else _TOLERANCE
        alike = at.store.alike(one.ids, one.signature)
        if self._due:
            self._due = False
            if alike and (changed := at.changed(one, kept)):
                return f"the {changed} change between epochs: what is augmented gives something else each time"
            row = derive_seed(state.seed, "prefix", state.clock.epoch) % len(one.ids)
            pairs = zip([each[row : row + 1] for each in features], replay.value(one.row(row)), strict=True)
            masks = [each[row : row + 1] for each in one.masks]
            if not all(close(unpadded(mine, masks), unpadded(again, masks), tolerance) for mine, again in pairs):
                return "the frozen part gives something else for a sample that is computed again"
        if not alike and one.signature not in at.padded:
            at.padded.add(one.signature)
            if not gives_the_same(state.model, replay, one, features, tolerance=tolerance):
                return "what the model gives for a sample depends on how far its batch is padded"
        return None


def _found(state: State, depth: int, one: Pass) -> Replay:
    """Find out how to skip the first ``depth`` layers."""
    layers, modules = list(state.layers), dict(state.model.named_modules())
    suffix = [name for layer in layers[depth:] for name in layer.modules]
    prefix = [modules[name] for layer in layers[:depth] for name in layer.modules if name in modules]
    head = depth == len(layers) - 1 and all(name in modules for name in suffix)
    beyond = [modules[name] for name in suffix if name in modules]
    return find_replay(state.model, beyond, prefix, head=head, one=one)


def _label(microbatch: Any, targets: Any, samples: int) -> str | None:
    """Return how a batch is made of inputs and targets; None where it cannot be."""
    if not is_batched(targets, samples):
        return None
    if not isinstance(microbatch, Mapping):
        return ""
    return next((name for name, each in microbatch.items() if each is targets), None)
