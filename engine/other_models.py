"""The check of the conformance kit that tries small models of other kinds, of which it is known what their layers are."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from traceback import walk_tb
from typing import Any

import attrs
from torch import nn

from .algorithm import Algorithm
from .doubles import tiny_models
from .events import Event
from .promises import REFUSALS, check, same
from .randomness import derive_seed
from .records import keeps
from .rehearsal import Rehearsal
from .resuming import goes_on
from .state import State

_LAYERS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "bare": {"stem": ["scale"], "blocks[0]": ["body.0"], "blocks[1]": ["body.2"], "head": ["head"]},
    "cnn": {"blocks[0]": ["1", "2"], "blocks[1]": ["4", "5"], "head": ["9"]},
    "mlp": {"blocks[0]": ["0"], "blocks[1]": ["2"], "head": ["4"]},
    "shared": {"blocks[0]": ["first"], "blocks[1]": ["middle"], "head": ["head"]},
    "tied": {"stem": ["embed"], "blocks[0]": ["blocks.0"], "blocks[1]": ["blocks.1"], "head": ["norm"]},
    "transformer": {
        "stem": ["embed"], "blocks[0]": ["encoder.layers.0"], "blocks[1]": ["encoder.layers.1"], "head": ["classifier"],
    },
}  # fmt: skip


@check
def takes_other_models(rehearsal: Rehearsal) -> None:
    """On small models of other kinds it fits as planned and resumes as well, unless it says that they are not for it."""
    seed = derive_seed(rehearsal.seed, "other models", rehearsal.name)
    for name in rehearsal.some(_LAYERS, 3, seed) if rehearsal.own_task else ():
        _try_model(rehearsal, name, tiny_models()[name])


def _try_model(rehearsal: Rehearsal, name: str, build: Callable[[], nn.Module]) -> None:
    """Fit another model; a refusal, and an error in the algorithm's own code, which may look for its model's parts, say nothing."""
    other = attrs.evolve(rehearsal, build_model=build)
    other.name = f"{rehearsal.name} on tiny_models()[{name!r}]"
    with tempfile.TemporaryDirectory() as folder:
        try:
            whole, paths = other.saved(Path(folder) / "run", every="4ba", probe=partial(_look, other, name), debug=True)
        except REFUSALS:
            return
        except Exception as error:
            if is_its_own(error, other.make()):
                return
            error.add_note(f"on tiny_models()[{name!r}]")
            raise
        for path in paths[:1]:
            goes_on(other, whole, path)
    keeps(other, other.duration, whole)


def is_its_own(error: Exception, algorithms: Sequence[Algorithm]) -> bool:
    """Return whether an error comes of an algorithm's own code, not of what it called of the engine."""
    modules = {type(each).__module__ for each in algorithms}
    names = [str(frame.f_globals.get("__name__")) for frame, _ in walk_tb(error.__traceback__)]
    ours = [name for name in names if name in modules or name.startswith(f"{__package__}.")]
    return bool(ours) and ours[-1] in modules


def _look(rehearsal: Rehearsal, name: str, event: Event, state: State) -> None:
    if event is Event.FIT_START:
        own = [each for each, _ in rehearsal.model().named_parameters()]
        must: dict[str, Any] = {
            layer: [each for each in own if any(each == part or each.startswith(f"{part}.") for part in parts)]
            for layer, parts in _LAYERS[name].items()
        }
        now = {each.name: [one for one in each.parameters if one in own] for each in state.layers}
        same(
            now, must, "the layers",
            f"{rehearsal.name}: the layers are others than before surgery. What is put in keeps the place of what it replaces.",
        )  # fmt: skip
