"""The checks of the conformance kit that hold an audited fit against torch alone: calls, losses, steps and records."""

from __future__ import annotations

from .audit import faults_of
from .promises import check, fail
from .rehearsal import Rehearsal


@check
def follows_from_its_calls(rehearsal: Rehearsal) -> None:
    """What trains, at which rates and options, and in which modes, follows from the calls on the ledger and the schedule alone."""
    _says(rehearsal, "follows_from_its_calls")


@check
def learns_from_its_loss(rehearsal: Rehearsal) -> None:
    """Outputs, losses and gradients are those of torch at the same weights, also of uneven microbatches with ignored labels."""
    _says(rehearsal, "learns_from_its_loss")


@check
def steps_as_torch_does(rehearsal: Rehearsal) -> None:
    """Each step is bit for bit that of torch's own optimizers, and their state is what the step before left."""
    _says(rehearsal, "steps_as_torch_does")


@check
def keeps_true_records(rehearsal: Rehearsal) -> None:
    """History, evaluations, clock and checkpoints say what the fit did, and a fit that has ended resumes as it ended."""
    _says(rehearsal, "keeps_true_records")


def _says(rehearsal: Rehearsal, name: str) -> None:
    if fault := faults_of(rehearsal).get(name):
        fail(fault)
