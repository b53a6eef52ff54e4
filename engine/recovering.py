"""The check of the conformance kit that goes back: from steps that are not finite, and from checkpoints that are damaged."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attrs import define, field
from safetensors.torch import load_file
from torch import nn

from .bearer import Bearer
from .checkpointing import Checkpointing
from .errors import NonFiniteError
from .events import Event
from .log import jsonable
from .neighbor import Before
from .promises import check, fail, same, unless_alone
from .randomness import derive_seed
from .rehearsal import Outcome, Rehearsal, some, written_in
from .state import State
from .store import BAD, DISCARDED, checkpoints_in, read_manifest, step_of
from .weights import export, load_weights

_EVERY = 5
_ONCE = frozenset(
    {0, 1, 2, 3, 4, 5}
)  # the fit goes back to its first checkpoint as often as it may, and then to another
_ALWAYS = 7


@check
def recovers_from_faults(rehearsal: Rehearsal) -> None:
    """Gone back to a checkpoint from steps that are not finite, or to the one before a damaged one, the fit ends bit for bit as without."""
    unless_alone(rehearsal, _go_back)


def _go_back(rehearsal: Rehearsal) -> None:
    seed = derive_seed(rehearsal.seed, rehearsal.name)
    forms = list(_OPTIMIZERS) if rehearsal.thorough else some(list(_OPTIMIZERS), 1, seed)
    harms = list(_HARMS) if rehearsal.thorough else some(list(_HARMS), 1, seed + 1)
    for number, form in enumerate(forms):
        with tempfile.TemporaryDirectory() as folder:
            ends = _Recovery(rehearsal, _OPTIMIZERS[form], Path(folder))
            ends.roll_back()
            for harm in harms if not number else ():
                ends.harm(harm)
    if rehearsal.thorough or seed % 2:
        _give_up(rehearsal)


# -- optimizers ---------------------------------------------------------------------------------------------------------


def _kinds(model: nn.Module) -> list[list[nn.Parameter]]:
    """Return the vectors and the matrices of a model, each where there are any."""
    floating = [each for each in model.parameters() if each.is_floating_point()]
    kinds = [[each for each in floating if (each.ndim < 2) is flat] for flat in (True, False)]
    return [each for each in kinds if each]


def _in_groups(model: nn.Module) -> Any:
    """Return one with a rate that is a tensor, and options of its own in each group."""
    decays = ({"weight_decay": 0.0}, {"betas": (0.8, 0.99), "amsgrad": True})
    groups = [{"params": part, **more} for part, more in zip(_kinds(model), decays, strict=False)]
    return torch.optim.AdamW(groups, lr=torch.tensor(0.01), foreach=False)


def _in_two(model: nn.Module) -> Any:
    """Return two optimizers, or one where there is nothing for the other."""
    makers = (partial(torch.optim.SGD, lr=0.05, momentum=0.9), partial(torch.optim.AdamW, lr=0.01, foreach=True))
    return [make(part) for make, part in zip(makers, _kinds(model), strict=False)]


_OPTIMIZERS: Mapping[str, Callable[[nn.Module], Any]] = {
    "AdamW": lambda _: partial(torch.optim.AdamW, lr=0.01),
    "Adagrad": lambda _: partial(torch.optim.Adagrad, lr=0.05),  # makes its state when it is made
    "groups": _in_groups,
    "two": _in_two,
}


# -- what must not be left of it ----------------------------------------------------------------------------------------


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
    rolled: Outcome | None = field(default=None, init=False)

    @property
    def run(self) -> Path:
        """The directory of the fit that goes back."""
        return self.folder / "rolled"

    def fit(self, policy: str, name: str, **settings: Any) -> Outcome:
        """Fit with the faults that come each time, and those that come once where the fit goes back."""
        model = self.rehearsal.model()
        once = set(_ONCE if policy == "rollback" and not settings.get("resume") else ())
        rest: dict[str, Any] = {"model": model, "optimizer": self.optimizer(model), "on_nonfinite": policy}
        algorithms = [Before(partial(_spoil, once, {_ALWAYS})), Bearer(), *self.rehearsal.make()]
        return self.rehearsal.fit(algorithms, run_dir=self.folder / name, **(rest | settings))

    def roll_back(self) -> None:
        """Hold a fit that goes back against one that does not: only the batch that is bad each time is left out in both."""
        model, fresh = self.rehearsal.model(), self.rehearsal.model
        policy = Checkpointing(every="1ep", frozen="fingerprint")
        skipped = self.fit("skip", "skipped", checkpoint=policy, model=model, optimizer=self.optimizer(model))
        self.rolled = rolled = self.fit("rollback", "rolled", checkpoint=Checkpointing(every=f"{_EVERY}ba", keep=9))
        name = self.rehearsal.name
        where = f"{name}: a fit that goes back to a checkpoint from steps that are not finite"
        same(skipped.result, rolled.result, "the fit", f"{where} does not end as one without these steps. {_UNDONE}")
        same(
            jsonable(skipped.told), jsonable(written_in(self.run)), "metrics.jsonl",
            f"{where} has other metrics on disk than one without these steps. {_UNDONE}",
        )  # fmt: skip
        if new := [each for each in rolled.said if each not in skipped.said]:
            fail(
                f"{where} warns of what one without these steps does not: {new[0]} Warn at FIT_START: it does not come again."
            )
        self._check_exported(skipped, model, fresh)

    def _check_exported(self, outcome: Outcome, model: nn.Module, fresh: Callable[[], nn.Module]) -> None:
        """Hold the weights that a checkpoint gives without the run against those of the model that was fitted."""
        if outcome.last is None:
            return
        live = load_file(export(outcome.last, self.folder / "live" / "a.safetensors", weights="live", model=fresh()))
        what = f"{self.rehearsal.name}: export() of the newest checkpoint gives other weights than"
        mend = "Attach by ledger.attach(), and change no weight at FIT_END."
        same(live, dict(model.state_dict()), "weights", f"{what} the model has. {mend}")
        load_weights(outcome.last, again := fresh())
        evaluated = load_file(export(outcome.last, self.folder / "b.safetensors", model=fresh()))
        same(evaluated, dict(again.state_dict()), "weights", f"{what} load_weights(). {mend}")

    def harm(self, name: str) -> None:
        """Go on in a run_dir whose newest checkpoint is damaged, and hold the end against the one that was."""
        assert self.rolled is not None
        paths = checkpoints_in(self.run)
        if len(paths) < 2:
            return
        before = read_manifest(paths[-1]).files
        _HARMS[name](paths)
        resume = paths[-2] if name == "given" else True
        resumed = self.fit("rollback", "rolled", checkpoint=Checkpointing(every=f"{_EVERY}ba", keep=9), resume=resume)
        batch = step_of(paths[-2])
        where = f"{self.rehearsal.name}, gone on from batch {batch} because the newest checkpoint {_BECAUSE[name]},"
        same(
            self.rolled.after(batch, resumed), self.rolled.after(batch, resumed) | resumed.after(batch, resumed), "the fit",
            f"{where} does not end as before. {_RESUMED}",
        )  # fmt: skip
        aside, damaged = (DISCARDED, 0) if name == "given" else (BAD, 1)
        names = sorted(each.name for each in self.run.iterdir() if each.name.startswith("."))
        if aside + paths[-1].name not in names:
            fail(f"{where} has not set that one aside as {aside}{paths[-1].name}: there are {names}.")
        if sum(paths[-1].name in each and paths[-2].name in each for each in resumed.said) != damaged:
            fail(f"{where} the fit does not say so. It says {resumed.said}.")
        if read_manifest(paths[-1]).files != before:
            fail(f"{where} it has written another checkpoint of batch {step_of(paths[-1])} than before. {_RESUMED}")


_UNDONE = (
    "Going back, the algorithm is closed, constructed, attached and given its saved state, over the same model: put back in close() "
    "what was changed besides the ledger, and keep nothing elsewhere than in the instance."
)
_RESUMED = "Return from state_dict() whatever changes during a fit, and take it back in load_state_dict()."


def _spoil(once: set[int], always: set[int], event: Event, state: State) -> None:
    """Make a loss or a gradient what no optimizer may step with."""
    batch = state.clock.batch
    by_loss = batch % 2 == 0
    if event is not (Event.AFTER_LOSS if by_loss else Event.AFTER_BACKWARD) or batch not in once | always:
        return
    once.discard(batch)
    if by_loss and state.loss is not None:
        state.loss = state.loss * torch.nan
    grads = [each.grad for each in state.ledger.trainable_parameters if each.grad is not None]
    for grad in grads[:1] if not by_loss else ():
        grad.fill_(torch.inf)


# -- damage -------------------------------------------------------------------------------------------------------------


def _flip(file: str, paths: Sequence[Path]) -> None:
    """Flip a bit in the middle of a file of the newest checkpoint."""
    raw = bytearray((paths[-1] / file).read_bytes())
    raw[len(raw) // 2] ^= 1
    (paths[-1] / file).write_bytes(raw)


def _cut(paths: Sequence[Path]) -> None:
    path = paths[-1] / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _copy(paths: Sequence[Path]) -> None:
    """Put the one before under its name."""
    for each in paths[-2].iterdir():
        (paths[-1] / each.name).write_bytes(each.read_bytes())


_HARMS: Mapping[str, Callable[[Sequence[Path]], None]] = {
    "flipped": partial(_flip, "tensors.safetensors"),
    "text": partial(_flip, "state.json"),
    "manifest": partial(_flip, "manifest.json"),
    "cut": _cut,
    "gone": lambda paths: (paths[-1] / "state.json").unlink(),
    "copied": _copy,
    "given": lambda _: None,
}
_BECAUSE: Mapping[str, str] = {
    "flipped": "has a bit flipped in its tensors",
    "text": "has a bit flipped in its state",
    "manifest": "has a bit flipped in its manifest",
    "cut": "is a byte short",
    "gone": "has no state",
    "copied": "is a copy of that one",
    "given": "is not the one that was given",
}


# -- giving up ----------------------------------------------------------------------------------------------------------


def _give_up(rehearsal: Rehearsal) -> None:
    """Let steps fail until the fit must give up."""
    for policy, once, always in (("rollback", set(range(6)), set[int]()), ("skip", set[int](), set(range(1, 6)))):
        spoiled: set[int] = set()

        def look(event: Event, state: State, seen: set[int] = spoiled) -> None:
            if event is Event.AFTER_BACKWARD and any(
                each.grad is not None and not bool(each.grad.isfinite().all()) for each in state.model.parameters()
            ):
                seen.add(state.clock.batch)

        algorithms = [Before(partial(_spoil, once, always)), Before(look), *rehearsal.make()]
        with tempfile.TemporaryDirectory() as folder:
            try:
                rehearsal.fit(
                    algorithms, run_dir=Path(folder), on_nonfinite=policy, checkpoint=Checkpointing(every="1000ba")
                )
            except NonFiniteError:
                if len(spoiled) < 5 + (policy == "rollback"):
                    fail(
                        f"{rehearsal.name}: a fit with on_nonfinite={policy!r} gave up after the batches {sorted(spoiled)} alone."
                    )
            else:
                if len(spoiled) >= 5 + (policy == "rollback"):
                    fail(
                        f"{rehearsal.name}: a fit with on_nonfinite={policy!r} did not give up after the batches {sorted(spoiled)}."
                    )
