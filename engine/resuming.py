"""The checks of the conformance kit that save and resume."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from .algorithm import Algorithm
from .errors import CheckpointError
from .events import Event
from .log import jsonable
from .promises import check, fail, same
from .rehearsal import Outcome, Rehearsal, written_in
from .schedules import constant
from .store import step_of
from .variants import other_calls


@check
def resumes(rehearsal: Rehearsal) -> None:
    """Resumed from a checkpoint of any batch, the fit ends bit for bit as the uninterrupted one."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        whole, paths = rehearsal.saved(run)
        plain = rehearsal.whole.all | {
            "warnings": whole.said
        }  # checkpoints warn of a loader that cannot tell where it stands
        same(
            plain,
            whole.all,
            "the fit",
            f"{rehearsal.name}: saving checkpoints changes the fit. state_dict() only looks.",
        )
        _is_saved_at_each_batch(rehearsal, whole, run, paths)
        for path in rehearsal.some(paths, 3, rehearsal.seed):
            goes_on(rehearsal, whole, path)


_STATE = (
    "Return from state_dict() whatever changes during a fit, take it back in load_state_dict(), and build caches in attach(): "
    "FIT_START does not come again."
)
FUNCTION = (
    "A function of @on remembers nothing from call to call: let it follow from the state it is given, or write a class, whose "
    "state_dict() returns what changes during a fit."
)


def goes_on(
    rehearsal: Rehearsal, whole: Outcome, path: Path, algorithms: Sequence[Algorithm] | None = None, **settings: Any
) -> None:
    """Resume from a checkpoint, and compare with the uninterrupted fit."""
    batch = step_of(path)
    resumed = rehearsal.fit(algorithms, resume=path, **settings)
    where = f"{rehearsal.name}, resumed at batch {batch},"
    same(
        whole.after(batch, resumed), resumed.after(batch, resumed), "the fit",
        f"{where} does not go on as the uninterrupted fit. {FUNCTION if rehearsal.has_no_memory else _STATE}",
    )  # fmt: skip
    if new := [each for each in resumed.said if each not in whole.said]:
        fail(
            f"{where} warns of what the uninterrupted fit does not: {new[0]} Warn at FIT_START of what concerns the whole fit; "
            "attach() and load_state_dict() run on every resumed one."
        )


def _is_saved_at_each_batch(rehearsal: Rehearsal, whole: Outcome, run: Path, paths: list[Path]) -> None:
    """Hold the checkpoints against the batches, and the metrics that were written against those that were told."""
    batches = {batch for event, _, batch, _ in whole.events if event is Event.BATCH_END}
    if missing := sorted(batches - {step_of(path) for path in paths}):
        fail(
            f"{rehearsal.name}: no checkpoint was written after batch {missing[0]}. state_dict() returns tensors, numbers, "
            "text, None, and lists and dicts of these, at every batch."
        )
    same(
        jsonable(whole.told), jsonable(written_in(run)), "metrics.jsonl",
        f"{rehearsal.name}: the metrics on disk are not those that were logged. Log numbers, by state.log().",
    )  # fmt: skip


_OTHERS: Mapping[str, Mapping[str, Any]] = {
    "seed": {"seed": 10_000},
    "accumulate": {"accumulate": 2},
    "schedule": {"schedule": constant()},
    "min_lr": {"min_lr": 1e-3},
    "optimizer": {"optimizer": partial(torch.optim.SGD, lr=0.01)},
}


@check
def is_not_resumed_as_another(rehearsal: Rehearsal) -> None:
    """Resumed with another seed, schedule, optimizer, model or other arguments, the fit is refused; with other intervals of logging it says so."""
    with tempfile.TemporaryDirectory() as folder:
        _, paths = rehearsal.saved(Path(folder) / "run", every="4ba")
        for path in paths[:1]:
            for name, settings in _OTHERS.items():
                _is_refused(rehearsal, path, f"another {name}", name, **settings)
            _is_refused(rehearsal, path, "another model", "model", model=_Wrapped(rehearsal.model()))
            first, *rest = rehearsal.make()
            for call in other_calls(first)[:2]:
                _is_refused(rehearsal, path, repr(call), type(first).__name__, algorithms=[call(), *rest])
            said = rehearsal.fit(resume=path, log_every="2ba").said
            if not any("log_every" in each for each in said):
                fail(f"{rehearsal.name}: resumed with another log_every, the fit does not say so. It says {said}.")


def _is_refused(rehearsal: Rehearsal, path: Path, what: str, named: str, **settings: Any) -> None:
    mend = "describe() names all that makes it another run: leave it to Algorithm, and load_state_dict() to what changes during a fit."
    try:
        rehearsal.fit(resume=path, **settings)
    except CheckpointError as error:
        if named in str(error):
            return
        fail(f"{rehearsal.name}: resumed with {what}, the fit is refused in words that do not name it: {error} {mend}")
    fail(f"{rehearsal.name}: resumed with {what}, the fit goes on as if nothing had changed. {mend}")


class _Wrapped(nn.Module):
    """A model in which every parameter has another name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @override
    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        return self.inner(*inputs, **keywords)
