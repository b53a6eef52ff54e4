"""A trace of a fit: what changed at which event, as lines that read well in a failing assertion."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, overload

from typing_extensions import override

from .algorithm import Algorithm, Stage, register
from .errors import ArgumentError
from .events import Event
from .layers import LayerMap
from .state import State


@register
class Trace(Algorithm, Sequence[str]):
    """Records what changed at each event: what began or ceased to train, rates, what was attached, why the fit stops.

    Stands beside the others in ``algorithms=``, acts after all of them, and is a sequence of lines, such as
    ``"EPOCH_START 4: thaw blocks[1]"``: event, batches done, changes. The learning rate is that of each layer without the
    schedule: what algorithms set. A fit starts it afresh.

    Args:
        events: Events that are listed also where nothing changed.

    Example:
        >>> import torch
        >>> from thawline.engine import Trainer, on
        >>> @on(Event.BATCH_END, every="2ba")
        ... def freeze_the_first_layer(state, owner):
        ...     state.ledger.freeze("blocks[0]", owner=owner)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> batches = [(torch.ones(2, 4), torch.ones(2, 2))] * 3
        >>> trace = Trace()
        >>> trainer = Trainer(algorithms=[freeze_the_first_layer(), trace], loss_fn=torch.nn.functional.mse_loss, progress=False)
        >>> result = trainer.fit(model, batches, duration=1)
        >>> trace == ["FIT_START 0: lr 0.0001 blocks[0], head", "BATCH_END 2: freeze blocks[0]"]
        True
    """

    stage: ClassVar[Stage] = Stage.OBSERVE

    def __init__(self, events: Collection[Event] = ()) -> None:
        self.events = frozenset(Event)
        self.listed = _as_events(events)
        self.lines: list[str] = []
        self._trainable: frozenset[str] | None = None
        self._rates: dict[str, float] = {}
        self._attached = 0
        self._stopped = False

    @override
    def apply(self, event: Event, state: State) -> None:
        """Note what is other than at the last event."""
        changes = [*self._trained(state), *self._rated(state), *self._grafted(state)]
        if state.stop_reason is not None and not self._stopped:
            self._stopped = True
            changes.append(f"stop ({state.stop_reason})")
        if changes or event in self.listed:
            line = f"{event.name} {state.clock.batch}"
            self.lines.append(f"{line}: {'; '.join(changes)}" if changes else line)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the lines, and what the next one is compared with."""
        trainable = None if self._trainable is None else sorted(self._trainable)
        seen = {"trainable": trainable, "rates": self._rates, "attached": self._attached, "stopped": self._stopped}
        return {"lines": list(self.lines), "seen": seen}

    @override
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        seen = saved["seen"]
        self.lines = list(saved["lines"])
        self._trainable = None if seen["trainable"] is None else frozenset(seen["trainable"])
        self._rates, self._attached, self._stopped = dict(seen["rates"]), seen["attached"], seen["stopped"]

    def _trained(self, state: State) -> Iterator[str]:
        now = state.ledger.trainable
        before = frozenset(state.ledger.parameters) if self._trainable is None else self._trainable
        self._trainable = now
        new = now - before
        there = frozenset(state.ledger.parameters)
        if left := (before - now) & there:
            yield f"freeze {_layers(state.layers, left)}"
        if new:
            yield f"thaw {_layers(state.layers, new)}"

    def _rated(self, state: State) -> Iterator[str]:
        rates = {
            name: slot.base_lr * slot.scale
            for slot, group in zip(state.ledger.slots, state.ledger.groups, strict=True)
            if slot.base_lr is not None
            for name in group.parameters
        }
        changed = {name: rate for name, rate in rates.items() if self._rates.get(name) != rate}
        self._rates |= rates
        for rate in dict.fromkeys(changed.values()):
            yield f"lr {rate:g} {_layers(state.layers, {name for name, each in changed.items() if each == rate})}"

    def _grafted(self, state: State) -> Iterator[str]:
        journal = state.ledger.journal
        for entry in journal[self._attached :]:
            yield f"attach {entry.op} to {entry.module}"
        self._attached = len(journal)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    @override
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self.lines[index]

    @override
    def __len__(self) -> int:
        return len(self.lines)

    @override
    def __eq__(self, other: object) -> bool:
        if isinstance(other, (list, tuple)):
            return self.lines == list(other)
        return self is other

    __hash__ = Algorithm.__hash__

    @override
    def __repr__(self) -> str:
        return "[\n" + "".join(f"    {line!r},\n" for line in self.lines) + "]"


def _as_events(given: object) -> frozenset[Event]:
    """Return a collection of events, or of their values as a description has them."""
    known = {str(each) for each in Event}
    if isinstance(given, str) or not isinstance(given, Collection) or not known.issuperset(map(str, given)):
        example = "Trace([Event.EPOCH_END])"
        raise ArgumentError("Trace(events=)", got=given, takes="a list of Events", example=example)
    return frozenset(Event(str(each)) for each in given)


def _layers(layers: LayerMap, names: Collection[str]) -> str:
    """Name layers where all of their parameters are meant, else the parameters."""
    found: list[str] = []
    for layer in layers:
        mine = [name for name in layer.parameters if name in names]
        found += [layer.name] if mine and len(mine) == len(layer.parameters) else mine
    return ", ".join(found)
