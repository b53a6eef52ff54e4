"""Replay: what a checkpoint says was attached, put on a model that has nothing attached."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from .errors import CheckpointError, SurgeryError
from .grafts import Graft, build_grafts, keep_record, record_of, undo_graft
from .surgery import JournalEntry, parents_of


def journal_of(model: nn.Module) -> list[Any]:
    """Return module, op, owner and arguments of each attachment to a model, as JSON."""
    return [[entry.module, entry.op, entry.owner, entry.arguments] for entry, _ in record_of(model).entries]


@contextmanager
def replayed(model: nn.Module, journal: Sequence[Sequence[Any]], *, keep: bool = True) -> Generator[None]:
    """Attach what a saved journal says to a model that has nothing attached, and take it off again where the block fails.

    Args:
        model: The model; one with the same journal already is left as it is.
        journal: Module, op, owner and arguments of each attachment, as the ledger saves them.
        keep: False to take it off also where the block does not fail.

    Raises:
        SurgeryError: Something else is attached to the model.
        CheckpointError: It is another model, which does not take what is attached.
    """
    record = record_of(model)
    wanted = [JournalEntry(module, op, owner, dict(arguments)) for module, op, owner, arguments in journal]
    here = [entry for entry, _ in record.entries]
    if here and here != wanted:
        raise SurgeryError(
            f"{here[0].op!r} is attached to {here[0].module!r} already. Give the model as it was before the fit."
        )
    made: list[tuple[JournalEntry, tuple[Graft, ...]]] = []
    parents = parents_of(model)
    try:
        for entry in () if here else wanted:
            try:
                grafts = build_grafts(
                    model, entry.module, entry.op, entry.arguments, overrides=record.overrides, seed=0, parents=parents
                )
            except SurgeryError as error:
                raise CheckpointError(
                    f"what the checkpoint has attached to {entry.module!r} does not fit this model: {error} Build the model "
                    "as it was before the fit."
                ) from error
            made.append((entry, grafts))
        yield
    except BaseException:
        keep = False
        raise
    finally:
        if keep:
            record.entries += made
            keep_record(model, record)
        else:
            for graft in reversed([graft for _, grafts in made for graft in grafts]):
                undo_graft(model, graft, record.overrides)
