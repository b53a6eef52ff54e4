"""A fit that is held, at every event, against what torch alone makes of the same weights, batches and calls on the ledger."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import torch
from attrs import define, field
from torch import nn
from torch.nn.functional import cross_entropy

from .account import Account
from .algorithm import Algorithm
from .batches import batch_size_of
from .clock import Clock
from .events import Event
from .forward import predictions, targets_of
from .log import jsonable
from .logbook import Logbook
from .neighbor import Before, Guest
from .promises import REFUSALS
from .randomness import Randomness
from .rehearsal import Outcome, Rehearsal, copied, written_in
from .state import State
from .store import checkpoints_in, step_of
from .tasks import KEPT, Task, layer_of, uneven, unsized
from .unaided import buffers_of, gradients_of, is_hooked, outputs_with, tensors_of, twin_of

CLOCK = "the clock does not tell the samples that were trained on. It is the loop's: read state.clock, and never tick."
STATE = "Return from state_dict() whatever changes during a fit, and take it back in load_state_dict()."


@define(eq=False, slots=False)
class Audit(Logbook):
    """Watches a fit from before and from behind all algorithms, and notes what is not as it must be."""

    account: Account = field(init=False)
    guest: Guest = field(init=False)
    _seen: dict[str, Any] = field(factory=dict, init=False)

    # -- the fit -----------------------------------------------------------------------------------------------

    def run(self, folder: Path) -> None:
        """Fit, look at what is on the disk, and go on from the middle and from the end."""
        run, model = folder / "run", self.task.model()
        whole = self._fit([Before(self._first, self._set_up), *self.task.make()], model, probe=self._last, run_dir=run)
        self.check_history(whole)
        if self.task.own:
            trainer = self.rehearsal.trainer(self.task.make(), metrics=self.task.given(model)["metrics"])
            now = trainer.evaluate(model, self.task.loader)
            what = "Trainer.evaluate of the model after the fit does not come to what its weights give in eval mode."
            self.hold("keeps_true_records", now, self.evaluate(model), "metrics", what, tolerance=1e-5)
        paths = list(checkpoints_in(run))
        self.check_files(paths, whole, model)
        if "follows_from_its_calls" in self.faults:  # what the guest may set was told wrongly
            return
        for path in [path for path in paths if step_of(path) >= KEPT][:1]:
            cut = Path(copytree(run, folder / "cut"))
            for each in checkpoints_in(cut):
                if each.name > path.name:
                    rmtree(each)
            self._go_on(whole, step_of(path), run_dir=cut, resume=True)
            names, must = ([each.name for each in checkpoints_in(each)] for each in (cut, run))
            what = "cut in the middle and resumed in its run_dir, a fit has other"
            self.hold(
                "keeps_true_records", names, must, "checkpoints", f"{what} checkpoints than the uninterrupted one."
            )
            lines, known = (jsonable(written_in(each)) for each in (cut, run))
            self.hold(
                "keeps_true_records", lines, known, "metrics.jsonl", f"{what} metrics than the uninterrupted one."
            )
        for path in paths[-1:]:
            self._go_on(whole, step_of(path), run_dir=folder / "end", resume=path)
        idle = Before(lambda *_: None)
        resumed = self._fit([idle, *self.task.make()], self.task.model(), run_dir=run, resume=True)
        now, must = (each.result["weights after the fit"] for each in (resumed, whole))
        self.hold(
            "keeps_true_records", now, must, "weights", "resume=True after the end gives other weights than that end."
        )

    def _go_on(self, whole: Outcome, batch: int, **where: Any) -> None:
        """Resume from the checkpoint of a batch, with the guest, and compare with the uninterrupted fit."""
        coming = [Before(self.guest.come), *self.task.make()]
        resumed = self._fit(coming, self.task.model(), probe=partial(self.guest.go, taken={}), **where)
        what = f"resumed at batch {batch}, the fit does not go on as the uninterrupted one, which another changes too."
        must = whole.after(batch, resumed)
        self.hold("keeps_true_records", resumed.after(batch, resumed), must, "the fit", f"{what} {STATE}")

    def _fit(self, algorithms: list[Algorithm], model: nn.Module, **settings: Any) -> Outcome:
        return self.rehearsal.fit(algorithms, model=model, **(self.task.given(model) | settings))

    # -- at events ---------------------------------------------------------------------------------------------

    def _set_up(self, state: State) -> None:
        task = self.task
        self.account = Account(state, home_of=task.home_of, factor=task.factor, min_lr=task.min_lr)
        self.account.listen()
        self.guest = Guest("audit.guest")

    def _first(self, event: Event, state: State) -> None:
        if event is Event.AFTER_FORWARD:
            self._seen["outputs"] = state.outputs
        elif event is Event.AFTER_LOSS:
            self._check_loss(state)
        elif event is Event.AFTER_BACKWARD:
            self._check_gradients(state)
        elif event is Event.BEFORE_STEP:
            now = gradients_of(state.ledger)
            what = (
                f"in batch {state.clock.batch} gradients changed between the last AFTER_BACKWARD and BEFORE_STEP. Change them at "
                "BEFORE_STEP, in the stage GRADIENTS."
            )
            self.hold("learns_from_its_loss", now, self._seen["gradients"], "gradients", what)
        elif event is Event.AFTER_STEP:
            self._check_step(state)
        elif event is Event.BATCH_START:
            self._seen["loss"] = 0.0
        self.guest.come(event, state)

    def _last(self, event: Event, state: State) -> None:
        self.guest.go(event, state, self.account.own)
        self._check_trainable(event, state)
        if event is Event.BATCH_START:
            self._check_layers(state)
            self._seen["statistics"] = buffers_of(state.model)
        elif event is Event.BEFORE_FORWARD:
            self._check_modes(state)
            self._seen.update(states=Randomness().states(), buffers=buffers_of(state.model))
        elif event is Event.AFTER_FORWARD:
            self._check_outputs(state)
        elif event is Event.AFTER_LOSS:
            self._check_closed(state)
            self._differentiate(state)
        elif event is Event.AFTER_BACKWARD:
            self._seen["gradients"] = gradients_of(state.ledger)
        elif event is Event.BEFORE_STEP:
            self._foresee(state)
        elif event is Event.BATCH_END:
            self._end_batch(state)
        elif event is Event.EVAL_START:
            self._seen["evaluated"] = self.evaluate(state.model)
        elif event is Event.EVAL_END:
            self.check_evaluation(state, self._seen["evaluated"])

    # -- what trains, at which rates, in which modes -----------------------------------------------------------

    def _check_trainable(self, event: Event, state: State) -> None:
        if event is Event.FIT_ABORT:
            return
        must = self.account.trainable()
        flagged = {name for name, each in state.ledger.parameters.items() if each.requires_grad}
        where = f"at {event.name}, batch {state.clock.batch},"
        for what, now in (("ledger.trainable", set(state.ledger.trainable)), ("requires_grad", flagged)):
            if wrong := sorted(now ^ must):
                self.note(
                    "follows_from_its_calls",
                    f"{where} {what} {'has' if wrong[0] in now else 'lacks'} {wrong[0]!r}, and by the calls on the ledger it must "
                    "be otherwise. Freeze and thaw through the ledger alone: what nobody holds trains.",
                )

    def _check_closed(self, state: State) -> None:
        if state.clock.batch == 0 and (taken := self.guest.knock(state.ledger)):
            self.note(
                "follows_from_its_calls",
                f"ledger.{taken[0]} is taken at AFTER_LOSS, in the middle of a step. ledger.phase is the engine's: leave it alone.",
            )

    def _check_layers(self, state: State) -> None:
        for name in state.ledger.parameters if self.task.own else ():
            if (now := state.layers.of(name).name) != (must := layer_of(name)):
                self.note(
                    "follows_from_its_calls",
                    f"{name!r} lies in the layer {now!r}, and by its place in the model it must be {must!r}. Modules that surgery puts "
                    "in keep the place, and what is attached lies inside of the module.",
                )

    def _check_modes(self, state: State) -> None:
        if "follows_from_its_calls" in self.faults:
            return
        for name, module in state.model.named_modules():
            must = self.account.mode_of(module)
            if must is not None and module.training is not must:
                self.note(
                    "follows_from_its_calls",
                    f"in the forward pass of batch {state.clock.batch}, {name or 'the model'!r} ({type(module).__name__}) stands in "
                    f"{'train' if module.training else 'eval'} mode. Modes follow from what trains: ask for "
                    "ledger.freeze(select, owner=self.owner, mode='eval') and leave .train() and .eval() alone.",
                )

    # -- losses and gradients ----------------------------------------------------------------------------------

    def _check_outputs(self, state: State) -> None:
        """Hold the outputs, and the buffers that the forward pass left, against those of a second pass."""
        model, batch = state.model, state.microbatch
        given, kept = self._seen["outputs"], copied(self._seen["buffers"])
        if any(map(is_hooked, model.modules())):
            return
        now = Randomness()
        with now.kept(), torch.no_grad():
            now.restore(self._seen["states"])
            again = outputs_with(model, kept, batch, has_loss=self.rehearsal.loss_fn is not None)
        where = f"in the forward pass of batch {state.clock.batch}"
        self.hold(
            "learns_from_its_loss", tensors_of(given), tensors_of(again), "outputs",
            f"{where} the model gives other outputs than for the same inputs, weights and random numbers a second time.", tolerance=1e-5,
        )  # fmt: skip
        self.hold(
            "learns_from_its_loss", buffers_of(model), kept, "buffers",
            f"{where} the model's buffers became others than in a second pass. What is frozen keeps its statistics.", tolerance=1e-5,
        )  # fmt: skip

    def _check_loss(self, state: State) -> None:
        loss_fn, targets = self.rehearsal.loss_fn, targets_of(state.microbatch)
        if loss_fn is None:
            return
        with torch.no_grad():
            must = loss_fn(predictions(state.outputs), targets)
        self.hold(
            "learns_from_its_loss", None if state.loss is None else state.loss.detach(), must, "loss",
            f"in batch {state.clock.batch} the loss is not that of the outputs and targets at AFTER_FORWARD.", tolerance=1e-6,
        )  # fmt: skip

    def _differentiate(self, state: State) -> None:
        """Compute what the backward pass must add to each gradient."""
        loss, trained = state.loss, list(state.ledger.trainable)
        if loss is None or not loss.requires_grad:
            return
        share = self._share(state)
        wanted = [state.ledger.parameters[name] for name in trained]
        found = torch.autograd.grad(loss * share, wanted, retain_graph=True, allow_unused=True)
        must = gradients_of(state.ledger)
        for name, each in zip(trained, found, strict=True):
            if each is not None:
                before = must[name]
                must[name] = each if before is None else before + each
        self._seen["must"] = must
        self._seen["loss"] += loss.item() * share

    def _share(self, state: State) -> float:
        """Return how much of its batch a microbatch is: of the labels that are not ignored, else of the samples."""
        if not self.task.own:
            return 1.0
        part, whole = state.microbatch, _batches(state)
        if self.rehearsal.loss_fn is cross_entropy and not targets_of(part).is_floating_point():
            labels, *others = (int((targets_of(each) != -100).sum()) for each in (part, *whole))
            return labels / sum(others)
        return batch_size_of(part) / sum(map(batch_size_of, whole))

    def _check_gradients(self, state: State) -> None:
        now, must = gradients_of(state.ledger), self._seen["must"]
        self.hold(
            "learns_from_its_loss", now, must, "gradients",
            f"in batch {state.clock.batch} the backward pass leaves other gradients than those of state.loss, weighted by the "
            "microbatch's share of its batch. Change gradients at BEFORE_STEP, where they are whole, in the stage GRADIENTS.", tolerance=1e-5,
        )  # fmt: skip

    # -- steps -------------------------------------------------------------------------------------------------

    def _foresee(self, state: State) -> None:
        """Compute what torch's own optimizers make of the weights, gradients, options and states at hand."""
        ledger, account, clock = state.ledger, self.account, state.clock
        self._seen["rates"] = account.told(
            clock, layer_of if self.task.own else lambda name: state.layers.of(name).name
        )
        if wrong := sorted(self.account.trainable() ^ {name for each in ledger.groups for name in each.parameters}):
            self.note(
                "follows_from_its_calls",
                f"in batch {clock.batch} {wrong[0]!r} trains and is in no group of the optimizer, or the other way round. Groups are "
                "the ledger's: freeze and thaw through it alone.",
            )
        steps: list[Any] = []
        for number, optimizer in enumerate(ledger.optimizers):
            groups = [each for each in ledger.groups if each.optimizer == number]
            saved = copied(optimizer.state_dict())
            names = [name for group in groups for name in group.parameters]
            for group, entry in zip(groups, saved["param_groups"], strict=True):
                self._check_group(group, entry, clock)
                entry["lr"] = account.rate(group.parameters[0], clock)
            moments = {name: saved["state"].get(place, {}) for place, name in enumerate(names)}
            known = {name: account.moments.get(name, {}) for name in names}
            self.hold(
                "steps_as_torch_does", moments, known, "moments",
                f"before the step of batch {clock.batch} the optimizer's state is not what the step before left of what has trained "
                "since. It is the ledger's: freeze(moments='keep') keeps it, drop_moments() forgets it.",
            )  # fmt: skip
            if not names:
                continue
            clones = {name: twin_of(ledger.parameters[name]) for name in names}
            kind: Any = type(optimizer)
            fresh = kind([{"params": [clones[name] for name in each.parameters]} for each in groups])
            fresh.load_state_dict(saved)
            fresh.step()
            left = fresh.state_dict()["state"]
            steps.append((clones, {name: left.get(place, {}) for place, name in enumerate(names)}))
        norm, gradients = state.grad_norm, gradients_of(ledger).values()
        numbers = [each for each in (norm, self._seen["loss"], *gradients) if each is not None]
        self._seen["finite"] = all(bool(torch.as_tensor(each).isfinite().all()) for each in numbers)
        self._seen["steps"] = steps
        self._seen["stood"] = {name: ledger.parameters[name].detach().clone() for name in ledger.trainable}

    def _check_group(self, group: Any, entry: Mapping[str, Any], clock: Clock) -> None:
        for name in group.parameters:
            options = {"lr": self.account.rate(name, clock)}
            options |= {key: self.account.option(name, key) for key in self.account.given[name]}
            self.hold(
                "follows_from_its_calls", {key: float(entry[key]) for key in options}, options, f"options of {name!r}",
                f"in batch {clock.batch} the optimizer's group has other options than follow from the factory, the schedule, min_lr and "
                "the calls on the ledger. Set them with ledger.scale, set_lr and set_options.", tolerance=1e-12,
            )  # fmt: skip

    def _check_step(self, state: State) -> None:
        parameters = state.ledger.parameters
        what = f"the step of batch {state.clock.batch} is not that of"
        mend = "Leave optimizers and weights alone between BEFORE_STEP and AFTER_STEP, and put no hook on an optimizer."
        if state.step_skipped:
            self.hold(
                "steps_as_torch_does", buffers_of(state.model), self._seen["statistics"], "buffers",
                f"the step of batch {state.clock.batch} was skipped, and the model's buffers are not as before it. {mend}",
            )  # fmt: skip
        for clones, moments in self._seen["steps"]:
            stood = self._seen["stood"]
            must = {name: stood[name] if state.step_skipped else each.detach() for name, each in clones.items()}
            now = {name: parameters[name].detach() for name in clones}
            self.hold("steps_as_torch_does", now, must, "weights", f"{what} torch's own optimizer. {mend}")
            if not state.step_skipped:
                self.account.moments.update(copied(moments))
        for number, optimizer in enumerate(state.ledger.optimizers):
            names = [name for each in state.ledger.groups if each.optimizer == number for name in each.parameters]
            left = optimizer.state_dict()["state"]
            now = {name: left.get(place, {}) for place, name in enumerate(names)}
            known = {name: self.account.moments.get(name, {}) for name in names}
            self.hold("steps_as_torch_does", now, known, "moments", f"{what} torch's own optimizer. {mend}")

    def _end_batch(self, state: State) -> None:
        if left := [name for name, each in state.ledger.parameters.items() if each.grad is not None]:
            what = f"{left[0]!r} has a gradient at BATCH_END, batch {state.clock.batch}, which the next batch would add to."
            self.note("steps_as_torch_does", f"{what} Keep what is needed of gradients in the algorithm, not in .grad.")
        if state.step_skipped is self._seen["finite"]:
            said = "skipped, and all gradients were" if state.step_skipped else "made, and not all gradients were"
            mend = "state.step_skipped is the loop's, and only read."
            self.note(
                "steps_as_torch_does",
                f"at BATCH_END, batch {state.clock.batch}, the step is said to be {said} finite. {mend}",
            )
        self.samples += sum(map(batch_size_of, _batches(state)))
        self.losses.setdefault(state.clock.epoch - (state.clock.batch_in_epoch == 0), []).append(self._seen["loss"])
        duration, clock = self.task.duration, state.clock
        self.batches += 1
        self.trained |= self.account.trainable()
        self.steps[self.batches] = {"train/loss": self._seen["loss"]} | self._seen["rates"]
        if done := {"sp": self.samples, "ba": self.batches}.get(duration.unit):
            must = min(1.0, done / duration.value)
            self.hold("keeps_true_records", clock.progress, must, "progress", CLOCK, tolerance=1e-12)
        self.hold("keeps_true_records", clock.sample, self.samples, "samples", CLOCK)


def _batches(state: State) -> list[Any]:
    """Return the loader batches of a step."""
    return [state.batch] if state.accumulate == 1 else list(state.batch)


def faults_of(rehearsal: Rehearsal) -> dict[str, str]:
    """Return what the audits of an algorithm's fits found, by the name of the check; they are run once for all checks."""
    if rehearsal.audited is None:
        rehearsal.audited = _audited(rehearsal, [uneven(rehearsal)]) or _audited(rehearsal, unsized(rehearsal))
    return rehearsal.audited


def _audited(rehearsal: Rehearsal, tasks: Iterable[Task]) -> dict[str, str]:
    """Audit the first of some tasks that the algorithm does not refuse."""
    for task in tasks:
        audit = Audit(rehearsal, task)
        with tempfile.TemporaryDirectory() as folder:
            try:
                audit.run(Path(folder))
            except REFUSALS as error:
                if task.refusable and not str(getattr(error, "argument", "")).startswith("Trainer"):
                    continue
                raise
            except Exception as error:
                error.add_note(task.name)
                raise
        return audit.faults
    return {}
