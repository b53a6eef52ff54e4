"""FreezeAt: layers freeze at times of the user's choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import attrs
from typing_extensions import override

from ..engine import Algorithm, ArgumentError, Event, Stage, State, Time, get_logger, register, warn
from .arguments import check_time
from .layer_thaw import cannot_fire
from .train_only import warn_of_frozen_trunk

log = get_logger(__name__)
_EXAMPLE = "FreezeAt({'stem': '1ep', 'blocks[0]': '0.3dur'})"


def _times(value: object) -> dict[str, Time]:
    """Return the times by selector.

    Example:
        >>> _times({"stem": 0, "blocks": "0.5dur"})
        {'stem': Time('0ep'), 'blocks': Time('0.5dur')}
        >>> _times({"": 1})
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: FreezeAt(times=) takes a mapping of selectors to times, got {'': 1}. Write: FreezeAt({'stem': '1ep', 'blocks[0]': '0.3dur'})
        >>> _times({})
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: FreezeAt(times=) takes a mapping of selectors to times, got {}. Write: FreezeAt({'stem': '1ep', 'blocks[0]': '0.3dur'})
    """
    if not isinstance(value, Mapping) or not value or not all(isinstance(each, str) and each for each in value):
        takes = "a mapping of selectors to times"
        raise ArgumentError("FreezeAt(times=)", got=value, takes=takes, example=_EXAMPLE)
    return {select: check_time("FreezeAt(times=)", time, example=_EXAMPLE, zero=True) for select, time in value.items()}


@register
@attrs.define(slots=False, eq=False)
class FreezeAt(Algorithm):
    """Freeze each selection from its time on.

    At the first batch that begins at or after the time, what is selected leaves its group and loses gradient and
    optimizer state.

    Args:
        times: Selector to the time from which it is frozen; zero is the start.

    Raises:
        ArgumentError: No mapping of selectors to times.
        SelectorError: At the start of a fit: a selector that matches nothing.

    Warns:
        ThawlineWarning: At the start of a fit that ends before one of the times.

    Example:
        >>> from thawline.engine import Trainer
        >>> from thawline.engine.testing import tiny_loader, tiny_models
        >>> FreezeAt({"stem": 1})
        FreezeAt(times={'stem': Time('1ep')})
        >>> trainer = Trainer(algorithms=[FreezeAt({"stem": "1ep", "blocks": "0.5dur"})])
        >>> plan = trainer.plan(tiny_models()["residual"](), tiny_loader(), duration="4ep")
        >>> [(span.start.epoch, *span.layers) for span in plan.spans]
        [(0, 'stem', 'blocks[0]', 'blocks[1]', 'blocks[2]', 'head'), (1, 'blocks[0]', 'blocks[1]', 'blocks[2]', 'head'), (2, 'head')]
    """

    stage: ClassVar[Stage] = Stage.TRAINABILITY
    events = frozenset({Event.FIT_START, Event.BATCH_START})

    times: Mapping[str, Time] = attrs.field(converter=_times, metadata={"call": "{'stem': '0.5dur'}"})
    frozen: frozenset[str] = attrs.field(default=frozenset(), init=False, repr=False)
    """The selectors whose time has come."""

    @override
    def match(self, event: Event, state: State) -> bool:
        """Return whether the fit begins, or a time has come.

        Example:
            >>> import torch
            >>> from thawline.engine import Clock, ParameterLedger
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
            >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters())))
            >>> freezing = FreezeAt({"blocks": 1, "head": 2})
            >>> freezing.match(Event.FIT_START, state), freezing.match(Event.BATCH_START, state)
            (True, False)
            >>> state.clock = Clock(epoch=1)
            >>> freezing.match(Event.BATCH_START, state)
            True
            >>> freezing.apply(Event.BATCH_START, state)
            >>> sorted(state.ledger.trainable), freezing.frozen, freezing.match(Event.BATCH_START, state)
            (['2.bias', '2.weight'], frozenset({'blocks'}), False)
        """
        return event is Event.FIT_START or any(
            select not in self.frozen and time.reached(state.clock) for select, time in self.times.items()
        )

    @override
    def apply(self, event: Event, state: State) -> None:
        """Check the selectors, or freeze what is due.

        Example:
            >>> import torch, warnings
            >>> from thawline.engine import ParameterLedger
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
            >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters())), duration="3ep")
            >>> with warnings.catch_warnings(record=True) as said:
            ...     warnings.simplefilter("always")
            ...     FreezeAt({"head": 0, "blocks": "2ep", "0.bias": "3ep"}).apply(Event.FIT_START, state)
            >>> [str(each.message) for each in said]
            ["FreezeAt({'0.bias': '3ep'}) freezes nothing: the fit ends after 3ep. Write shorter times."]
            >>> FreezeAt({"block": 1}).apply(Event.FIT_START, state)
            Traceback (most recent call last):
            thawline.engine.errors.SelectorError: ...
        """
        if event is Event.FIT_START:
            state.ledger.select(list(self.times))
            warn_of_frozen_trunk(state, "FreezeAt")
            never = {
                select: str(time) for select, time in self.times.items() if time.value and cannot_fire(time, state)
            }
            if never:
                text = f"FreezeAt({never}) freezes nothing: the fit ends after {state.duration}. Write shorter times."
                warn(text)
            return
        due = [each for each, time in self.times.items() if each not in self.frozen and time.reached(state.clock)]
        state.ledger.freeze(due, owner=self.owner)
        self.frozen |= frozenset(due)
        log.info("frozen", selected=due, epoch=state.clock.epoch, batch=state.clock.batch)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the selectors whose time has come."""
        return {"frozen": sorted(self.frozen)}

    @override
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.frozen = frozenset(saved["frozen"])
