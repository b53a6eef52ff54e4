"""The check of the conformance kit that goes back: from steps that are not finite, and from checkpoints that are damaged."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attrs import define, field, frozen
from safetensors.torch import load_file
from torch import Tensor, nn

from .bearer import Bearer
from .checkpointing import Checkpointing
from .errors import NonFiniteError
from .events import Event
from .log import jsonable
from .neighbor import Before
from .nonfinite import MAX_ROLLBACKS, MAX_SKIPPED
from .other_models import is_its_own
from .promises import REFUSALS, check, fail, same, unless_alone
from .randomness import derive_seed
from .rehearsal import Outcome, Rehearsal, written_in
from .snapshot import TEMPORARY
from .state import State
from .store import BAD, DISCARDED, checkpoints_in, read_checkpoint, step_of
from .tasks import vectors_and_matrices
from .weights import export, load_weights

_EVERY = 5
_ONCE = frozenset(
    {0, 1, 2, 3, 4, 5}
)  # the fit goes back to its first checkpoint as often as it may, and then to another
_ALWAYS = 7


@check
def recovers_from_faults(rehearsal: Rehearsal) -> None:
    """Gone back to a checkpoint from steps that are not finite, or to the one before a damaged one, the fit ends bit for bit as without."""
    unless_alone(rehearsal, _recover)


def _recover(rehearsal: Rehearsal) -> None:
    told = [each.describe() for each in rehearsal.make()]
    seed = derive_seed(rehearsal.seed, str(told))
    for number, form in enumerate(rehearsal.some(_OPTIMIZERS, 1, seed)):
        with tempfile.TemporaryDirectory() as folder:
            try:
                recovery = _Recovery(rehearsal, _OPTIMIZERS[form], Path(folder))
                goes_back = recovery.goes_back()
            except REFUSALS:  # of such an optimizer
                recovery = _Recovery(rehearsal, _OPTIMIZERS["AdamW"], Path(folder) / "plain")
                goes_back = recovery.goes_back()
            for harm in rehearsal.some(_HARMS.values(), 1, seed + 1) if goes_back and not number else ():
                recovery.survives(harm)
    for policy in ("rollback", "skip") if rehearsal.thorough else (("rollback",), ("skip",), (), ())[seed % 4]:
        _gives_up(rehearsal, policy)


# -- optimizers ---------------------------------------------------------------------------------------------------------


def _in_groups(model: nn.Module) -> Any:
    """Return one with a rate that is a tensor, and options of its own in each group."""
    options: list[dict[str, Any]] = [{"weight_decay": 0.0}, {"betas": (0.8, 0.99), "amsgrad": True}]
    kinds = vectors_and_matrices(model.parameters())
    groups = [{"params": kind, **more} for kind, more in zip(kinds, options, strict=True) if kind]
    return torch.optim.AdamW(groups, lr=torch.tensor(0.01), foreach=False)


def _in_two(model: nn.Module) -> Any:
    """Return two optimizers, or one where there is nothing for the other."""
    first, *rest = [kind for kind in vectors_and_matrices(model.parameters()) if kind]
    others = [torch.optim.AdamW(each, lr=0.01, foreach=True) for each in rest]
    return [torch.optim.SGD(first, lr=0.05, momentum=0.9), *others]


_OPTIMIZERS: Mapping[str, Callable[[nn.Module], Any]] = {
    "AdamW": lambda _: partial(torch.optim.AdamW, lr=0.01),
    "Adagrad": lambda _: partial(torch.optim.Adagrad, lr=0.05),  # makes its state when it is made
    "groups": _in_groups,
    "two": _in_two,
}


# -- faults -------------------------------------------------------------------------------------------------------------


@define(eq=False)
class _Faults:
    """Makes losses and gradients of some batches what no optimizer may step with.

    Args:
        once: Batches to do so with the first time that they come.
        always: Batches to do so with each time.
        batches: Those that were spoiled.
        repaired: Whether an algorithm has made finite again what was not.
    """

    once: set[int]
    always: set[int]
    batches: set[int] = field(factory=set, init=False)
    repaired: bool = field(default=False, init=False)
    _now: bool = field(default=False, init=False)

    def algorithm(self) -> Before:
        """Return what does so, before everybody else."""
        return Before(self._act)

    def _act(self, event: Event, state: State) -> None:
        batch = state.clock.batch
        if event is Event.BATCH_START:
            self._now = False
        elif event is (Event.AFTER_BACKWARD if batch % 2 else Event.AFTER_LOSS) and batch in self.once | self.always:
            self._spoil(state)
        elif event is Event.AFTER_STEP and self._now:
            self._look(state)

    def _spoil(self, state: State) -> None:
        batch = state.clock.batch
        if batch % 2 == 0 and state.loss is not None:
            state.loss = state.loss * torch.nan
        for grad in _gradients(state)[:1] if batch % 2 else ():
            grad.fill_(torch.inf)
        self._now = True
        self.once.discard(batch)
        self.batches.add(batch)

    def _look(self, state: State) -> None:
        """See whether the optimizers have moved, and whether they might."""
        finite = all(bool(each.isfinite().all()) for each in _gradients(state))
        self.repaired |= finite
        if not finite and not state.step_skipped:
            fail(f"the optimizers have moved by gradients that are not finite, in batch {state.clock.batch}.")


def _gradients(state: State) -> list[Tensor]:
    return [each.grad for each in state.ledger.trainable_parameters if each.grad is not None]


# -- what must not be left of them --------------------------------------------------------------------------------------

_UNDONE = (
    "Going back, the algorithm is closed, constructed, attached and given its saved state, over the same model: put back in close() "
    "what was changed besides the ledger, and keep nothing elsewhere than in the instance."
)
_RESUMED = "Return from state_dict() whatever changes during a fit, and take it back in load_state_dict()."
_PUT = "Attach by ledger.attach(), and change no weight at FIT_END."


@define(eq=False)
class _Recovery:
    """Fits with the same faults: one that leaves these steps out, and one that goes back.

    Args:
        rehearsal: Whose algorithm it is.
        optimizer: Builds what the Trainer is given, for a model.
        folder: For their run directories.
    """

    rehearsal: Rehearsal
    optimizer: Callable[[nn.Module], Any]
    folder: Path
    rolled: Outcome = field(init=False)

    @property
    def run(self) -> Path:
        """The directory of the fit that goes back."""
        return self.folder / "rolled"

    def fit(self, faults: _Faults, **settings: Any) -> Outcome:
        """Fit with faults, beside one that bears state of every type."""
        model = settings.pop("model", None) or self.rehearsal.model()
        algorithms = [faults.algorithm(), Bearer([]), *self.rehearsal.make()]
        return self.rehearsal.fit(algorithms, model=model, optimizer=self.optimizer(model), **settings)

    def go_back(self, faults: _Faults, *, resume: Path | bool = False) -> Outcome:
        """Fit, and go back from steps that are not finite."""
        policy = Checkpointing(every=f"{_EVERY}ba", keep=9)
        return self.fit(faults, on_nonfinite="rollback", run_dir=self.run, checkpoint=policy, resume=resume)

    def goes_back(self) -> bool:
        """Hold a fit that goes back against one that does not; return whether it can be: an algorithm may repair what is not finite."""
        model, faults = self.rehearsal.model(), _Faults(set(_ONCE), {_ALWAYS})
        left_out, policy = _Faults(set(), {_ALWAYS}), Checkpointing(every="1000ba", frozen="fingerprint")
        run = self.folder / "skipped"
        try:
            skipped = self.fit(left_out, model=model, on_nonfinite="skip", run_dir=run, checkpoint=policy)
            self.rolled = rolled = self.go_back(faults)
        except (FloatingPointError, NonFiniteError) as error:
            if is_its_own(error, self.rehearsal.make()):  # an algorithm may end such a fit
                return False
            raise
        if faults.repaired or left_out.repaired:
            return False
        where = f"{self.rehearsal.name}: a fit that goes back to a checkpoint from steps that are not finite"
        same(skipped.result, rolled.result, "the fit", f"{where} does not end as one without these steps. {_UNDONE}")
        same(
            [str(each) for each in skipped.events], [str(each) for each in _not_abandoned(rolled.events)], "the events",
            f"{where} has other events than one without these steps. emit() and the clock are the loop's.",
        )  # fmt: skip
        same(
            jsonable(skipped.told), jsonable(written_in(self.run)), "metrics.jsonl",
            f"{where} has other metrics on disk than one without these steps. {_UNDONE}",
        )  # fmt: skip
        if new := [each for each in rolled.said if each not in skipped.said]:
            fail(
                f"{where} warns of what one without these steps does not: {new[0]} Warn at FIT_START of what concerns the whole fit."
            )
        self._check_exported(skipped, model)
        return True

    def _check_exported(self, outcome: Outcome, model: nn.Module) -> None:
        """Hold the weights that a checkpoint gives without the run against those of the model that was fitted."""
        assert outcome.last is not None
        given, again = self.rehearsal.model(), self.rehearsal.model()
        what = f"{self.rehearsal.name}: export() writes other weights of the newest checkpoint than"
        live = load_file(export(outcome.last, self.folder / "new" / "live.safetensors", weights="live", model=given))
        same(live, dict(model.state_dict()), "weights", f"{what} the model has. {_PUT}")
        load_weights(outcome.last, again)
        evaluated = load_file(export(outcome.last, self.folder / "new" / "evaluated.safetensors", model=given))
        same(evaluated, dict(again.state_dict()), "weights", f"{what} load_weights() gives a model. {_PUT}")

    def survives(self, harm: _Harm) -> None:
        """Harm the newest checkpoint, go on in the run_dir, and hold the end against the one that was."""
        paths = checkpoints_in(self.run)
        if len(paths) < 2:
            return
        before, written = read_checkpoint(paths[-1]), written_in(self.run)
        there = _folders(self.run)
        harm.do(paths)
        start = paths[-2 if harm.aside else -1]
        resumed = self.go_back(_Faults(set(), {_ALWAYS}), resume=paths[-2] if harm.aside == DISCARDED else True)
        where = f"{self.rehearsal.name}, resumed where the newest checkpoint {harm.because},"
        if (first := resumed.events[0][2]) != step_of(start):
            fail(
                f"{where} goes on from batch {first}, and the newest whole checkpoint is that of batch {step_of(start)}."
            )
        known = {key: each for key, each in self.rolled.result.items() if key in resumed.result}
        same(known, resumed.result, "the fit", f"{where} does not end as before. {_RESUMED}")
        same(
            jsonable(written),
            jsonable(written_in(self.run)),
            "metrics.jsonl",
            f"{where} has other metrics on disk. {_RESUMED}",
        )
        after = read_checkpoint(paths[-1])
        same(
            _but_algorithms(before), _but_algorithms(after), "it",
            f"{where} has written another checkpoint of batch {step_of(paths[-1])} than before. {_RESUMED}",
        )  # fmt: skip
        aside = sorted(each.name for each in _folders(self.run) - there)
        name = f"{harm.aside}{paths[-1].name}"
        count = 1 + sum(each.name.startswith(name) for each in there)
        if aside != [name if count == 1 else f"{name}-{count}"] * bool(harm.aside):
            fail(f"{where} leaves {aside} beside what there was. Leave the run_dir to the engine.")
        told = any(paths[-1].name in each and start.name in each for each in resumed.said)
        if told is not (harm.aside == BAD):
            fail(f"{where} is {'' if told else 'not '}told of it: {resumed.said}.")


def _not_abandoned(events: Sequence[tuple[Event, int, int, int]]) -> list[tuple[Event, int, int, int]]:
    """Leave out the events of the batches from which a fit went back; a checkpoint is cut just before an epoch or a batch starts."""
    kept: list[tuple[Event, int, int, int]] = []
    for each in events:
        event, _, batch, _ = each
        if event in _STARTS and kept and kept[-1][0] in _INSIDE:
            del kept[next(place for place, (kind, _, at, _) in enumerate(kept) if kind in _STARTS and at == batch) :]
        kept.append(each)
    return kept


_STARTS = frozenset({Event.EPOCH_START, Event.BATCH_START})
_INSIDE = frozenset({Event.AFTER_BACKWARD, Event.BEFORE_STEP})  # a step that ends has another event


def _but_algorithms(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rest of a checkpoint: of algorithms it is known already."""
    return {key: each for key, each in tree.items() if key != "algorithms"}


def _folders(run: Path) -> set[Path]:
    return {each for each in run.iterdir() if each.is_dir()}


# -- harm ---------------------------------------------------------------------------------------------------------------


def _flip(file: str, paths: Sequence[Path]) -> None:
    """Flip a bit in the middle of a file of the newest checkpoint."""
    raw = bytearray((paths[-1] / file).read_bytes())
    raw[len(raw) // 2] ^= 1
    (paths[-1] / file).write_bytes(raw)


def _cut(paths: Sequence[Path]) -> None:
    path = paths[-1] / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _copy(paths: Sequence[Path]) -> None:
    """Put the one before under the name of the newest."""
    for each in paths[-2].iterdir():
        (paths[-1] / each.name).write_bytes(each.read_bytes())


def _interrupt(paths: Sequence[Path]) -> None:
    """Leave the directory as a process does that is killed while it puts another checkpoint in the place of one."""
    (paths[-1].parent / f"{TEMPORARY}{paths[-1].name}-0123456789ab").mkdir()
    paths[-1].rename(paths[-1].with_suffix(".next"))


@frozen
class _Harm:
    """What happens to the newest checkpoint.

    Args:
        because: In words.
        do: Does it, given all of them.
        aside: What the name then begins with under which it is set aside; empty where the fit goes on from it.
    """

    because: str
    do: Callable[[Sequence[Path]], None]
    aside: str = BAD


_HARMS: Mapping[str, _Harm] = {
    "tensors": _Harm("has a bit flipped in its tensors", partial(_flip, "tensors.safetensors")),
    "state": _Harm("has a bit flipped in its state", partial(_flip, "state.json")),
    "manifest": _Harm("has a bit flipped in its manifest", partial(_flip, "manifest.json")),
    "cut": _Harm("is a byte short", _cut),
    "gone": _Harm("has lost its state", lambda paths: (paths[-1] / "state.json").unlink()),
    "copied": _Harm("is a copy of the one before", _copy),
    "interrupted": _Harm("was about to be put in the place of another", _interrupt, ""),
    "given": _Harm("is not the one that is given", lambda _: None, DISCARDED),
}


# -- giving up ----------------------------------------------------------------------------------------------------------


def _gives_up(rehearsal: Rehearsal, policy: str) -> None:
    """Spoil so many steps that the fit must give up: all from one checkpoint, or one after another."""
    faults = (
        _Faults(set(range(MAX_ROLLBACKS + 1)), set())
        if policy == "rollback"
        else _Faults(set(), {0, *range(2, 2 + MAX_SKIPPED)})
    )
    most = len(faults.once | faults.always)
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"run_dir": Path(folder), "checkpoint": Checkpointing(every="1000ba")}
        try:
            rehearsal.fit([faults.algorithm(), *rehearsal.make()], on_nonfinite=policy, **settings)
        except (FloatingPointError, NonFiniteError) as error:
            if len(faults.batches) == most or is_its_own(error, rehearsal.make()):
                return
            what = f"gives up too soon: {error}"
        else:
            if len(faults.batches) < most or faults.repaired:
                return
            what = "does not give up"
    fail(
        f"{rehearsal.name}: with on_nonfinite={policy!r}, steps that are not finite in the batches {sorted(faults.batches)}, the fit {what}."
    )
