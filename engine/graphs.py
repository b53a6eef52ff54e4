"""The check of the conformance kit that trains in compiled blocks."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from .compiling import CompiledBlocks, compiled_modules
from .endings import end_in_float64
from .errors import ArgumentError, RecompileError
from .events import Event
from .neighbor import Before
from .promises import check, same, unless_alone
from .rehearsal import Rehearsal
from .state import State
from .unaided import is_hooked

# It follows blocks as every backend of torch's compiler does, and computes as without.
_BACKEND = "eager"


@check
def computes_the_same_compiled(rehearsal: Rehearsal) -> None:
    """What is attached or hooked to blocks does in compiled ones what it does in others (float64, up to rounding), or the fit is refused."""
    unless_alone(rehearsal, _compile)


def _compile(rehearsal: Rehearsal) -> None:
    """Hold a fit in compiled blocks against one without, where somebody takes part in what blocks compute."""
    batches = rehearsal.batches_in_float64()
    taking_part: set[str] = set()

    def look(event: Event, state: State) -> None:
        if event is Event.BEFORE_FORWARD:
            taking_part.update(entry.module for entry in state.ledger.journal)
            blocks = compiled_modules(state.model, state.layers)
            inside = [module for block in blocks for module in block.modules()]
            taking_part.update(type(each).__name__ for each in inside if is_hooked(each) or "forward" in vars(each))

    plain = end_in_float64(rehearsal, batches, probe=look)
    if not taking_part and not rehearsal.thorough:  # the compiler is slow to load
        return
    try:
        compiled = _in_graphs(rehearsal, batches)
    except (ArgumentError, RecompileError):  # a model without blocks, or what no graph can hold: the user is told
        if rehearsal.own_task:
            _in_graphs(rehearsal.alone(), batches)
        return
    known = ("weights after the fit", "history", "stop reason")
    same(
        {key: plain[key] for key in known}, {key: compiled[key] for key in known}, "the fit",
        f"{rehearsal.name}: under Trainer(compile='blocks') the fit is another one. A graph is captured at the first batches, and knows no "
        "hook that comes later: set hooks in attach() and let them ask what is due, and attach by the ledger what computes.",
        tolerance=1e-7,
    )  # fmt: skip


def _in_graphs(rehearsal: Rehearsal, batches: list[Any]) -> dict[str, Any]:
    """Return what a fit comes to whose blocks are compiled."""
    stack = ExitStack()

    def set_up(state: State) -> None:
        stack.enter_context(CompiledBlocks(state.model, state.layers, backend=_BACKEND))

    with stack:
        return end_in_float64(rehearsal, batches, algorithms=[Before(lambda *_: None, set_up), *rehearsal.make()])
