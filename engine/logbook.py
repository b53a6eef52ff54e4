"""What an audited fit must have told and kept: history, metrics and checkpoints, held against what was noted as it ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attrs import define, field
from safetensors import safe_open
from torch import nn

from .rehearsal import Outcome, Rehearsal, difference, weights_of
from .state import State
from .store import step_of
from .tasks import Task
from .unaided import evaluated_by_hand
from .weights import load_weights

_MEASURED = (
    "Say in evaluated_weights() which they are, and move an average at BATCH_END: an evaluation comes before EPOCH_END, and the "
    "checkpoint after it."
)


@define(eq=False, slots=False)
class Logbook:
    """Notes what is done in a fit, and the first thing that is not as it must be.

    Args:
        rehearsal: Whose algorithm it is.
        task: What is trained, and what is known of it.
        faults: The first thing that was wrong, by the name of the check that says so.
        losses: The mean loss of each batch, by epoch.
        evaluated: What evaluations must have come to, by the batches done.
        steps: The loss and the rates of each batch, as they must be told.
        trained: Names of the parameters that a step has changed.
    """

    rehearsal: Rehearsal
    task: Task
    faults: dict[str, str] = field(factory=dict, init=False)
    losses: dict[int, list[float]] = field(factory=dict, init=False)
    evaluated: dict[int, dict[str, float]] = field(factory=dict, init=False)
    steps: dict[int, dict[str, float]] = field(factory=dict, init=False)
    trained: set[str] = field(factory=set, init=False)
    batches: int = field(default=0, init=False)
    samples: int = field(default=0, init=False)

    def note(self, check: str, what: str) -> None:
        """Note the first thing that a check finds."""
        self.faults.setdefault(check, f"{self.task.name}: {what}")

    def hold(self, check: str, now: Any, must: Any, place: str, what: str, *, tolerance: float = 0.0) -> None:
        """Note where two trees differ: what is and what must be."""
        if check not in self.faults and (found := difference(now, must, place, tolerance=tolerance)):
            self.note(check, f"{what} First difference, what is and what must be: {found}.")

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return what an evaluation of a model must come to, where the data are the kit's own."""
        return evaluated_by_hand(model, self.task.loader, self.rehearsal.loss_fn) if self.task.own else {}

    def check_evaluation(self, state: State, must: dict[str, float]) -> None:
        """Hold the metrics at EVAL_END against what they must be."""
        self.evaluated[state.clock.batch] = must
        self.hold(
            "keeps_true_records", {name: state.metrics.get(name) for name in must}, must, "metrics",
            f"the evaluation after batch {state.clock.batch} does not come to what the weights at EVAL_START give in eval mode. "
            "Leave modes, weights and batches of an evaluation alone once it runs.", tolerance=1e-5,
        )  # fmt: skip

    def check_history(self, outcome: Outcome) -> None:
        """Hold history and what trackers were told against the losses and rates of the batches."""
        rows = outcome.result["history"]
        means = [sum(each) / len(each) for each in self.losses.values()]
        now = [row.get("train/loss") for row in rows]
        what = "history's train/loss is not the mean of the losses of the epoch's batches. train/ is the engine's: log under another name."
        self.hold("keeps_true_records", now, means, "train/loss", what, tolerance=1e-5)
        for row in rows if hasattr(self.task.loader, "__len__") else ():
            lr, rate = row.get("lr"), self.steps[int(row["batch"])]["lr"]
            self.hold(
                "keeps_true_records", lr, rate, "lr", "history's lr is not the highest rate of the epoch's last batch."
            )
        before = 0
        for batch, metrics in outcome.told:
            if "train/loss" in metrics:
                since = [self.steps[each]["train/loss"] for each in range(before + 1, batch + 1)]
                must = self.steps[batch] | {"train/loss": sum(since) / len(since)}
                told = {name: metrics.get(name) for name in must}
                what = f"what trackers were told at batch {batch} is not the mean loss since batch {before} and the highest rates."
                mend = "train/ and lr are the engine's: log under another name."
                self.hold("keeps_true_records", told, must, "metrics", f"{what} {mend}", tolerance=1e-5)
                before = batch

    def check_files(self, paths: list[Path], whole: Outcome, model: nn.Module) -> None:
        """Hold the checkpoints in a run_dir against the policy, the model that was fitted, and the evaluations."""
        if not paths or whole.last is None or whole.last.name != paths[-1].name:
            there = [path.name for path in paths]
            self.note(
                "keeps_true_records", f"result.last is {whole.last}, and the checkpoints in the run_dir are {there}."
            )
            return
        if (every := self.task.kept_every) is not None:
            lasting = {*range(every, self.batches + 1, every), self.batches}
            wanted = sorted(lasting if whole.best is None else lasting | {step_of(whole.best)})
            if (now := list(map(step_of, paths))) != wanted:
                what = f"the checkpoints of the batches {now} are there; to be kept were those of {wanted}."
                self.note("keeps_true_records", f"{what} Leave the files of the run_dir to Checkpointing.")
        live = self.task.model()
        load_weights(whole.last, live, "live")
        what = f"the newest checkpoint, {whole.last.name}, does not hold the weights that the fit ended with. Change none at FIT_END."
        self.hold("keeps_true_records", weights_of(live), weights_of(model), "weights", what)
        with safe_open(whole.last / "tensors.safetensors", "pt") as file:
            stored = {name.removeprefix("model/") for name in file.keys() if name.startswith("model/")}  # noqa: SIM118 - no dict
        untouched = [name for name, _ in model.named_parameters() if name not in self.trained]
        if self.task.policy.frozen == "fingerprint" and (kept := stored.intersection(untouched)):
            what = f"{whole.last.name} holds {min(kept)!r}, which never trained, though Checkpointing(frozen='fingerprint') keeps its digest alone."
            self.note("keeps_true_records", f"{what} Write to no weight that the ledger says is frozen.")
        losses = {batch: each["eval/loss"] for batch, each in self.evaluated.items() if each}
        for path in paths:
            batch = step_of(path)
            if batch in losses:
                again = self.task.model()
                load_weights(path, again)
                what = f"the evaluated weights of the checkpoint {path.name} do not give the metrics that were logged there. {_MEASURED}"
                must = self.evaluated[batch]
                self.hold("keeps_true_records", self.evaluate(again), must, "metrics", what, tolerance=1e-5)
        best = None if whole.best is None else losses.get(step_of(whole.best))
        if losses and (best is None or best > min(losses.values()) + 1e-6):
            what = f"result.best is {whole.best}, and the evaluations came to {losses}."
            self.note(
                "keeps_true_records",
                f"{what} Checkpointing(monitor='eval/loss') keeps the checkpoint of the smallest loss.",
            )
