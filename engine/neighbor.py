"""A neighbor for the conformance kit's fits: it freezes, thaws, attaches and detaches while another algorithm works."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from typing_extensions import override

from .algorithm import Algorithm, Stage
from .events import Event
from .state import State
from .surgery import Attachment, Site, surgery_op

GAIN = "testing_gain"


@surgery_op(GAIN)
def gain(site: Site) -> list[Attachment]:
    """Attach a learned number beside the weight: the least that surgery can do."""
    values = torch.empty(1).uniform_(-1, 1, generator=site.generator)
    return [Attachment(site.name, parameters={"gain": nn.Parameter(values)})]


class Neighbor(Algorithm):
    """Changes what trains, by the clock alone: holds every second parameter, then the others, and attaches a gain for a while.

    Example:
        >>> from thawline.engine import Time, constant
        >>> from thawline.engine.doubles import mlp
        >>> from thawline.engine.strategies import Fit
        >>> for line in Fit(mlp(depth=2), (Neighbor(),), Time("8ba"), constant(), 8, 1).trace()[1:]:
        ...     print(line)
        BATCH_START 0: freeze 0.weight, 2.weight
        BATCH_START 1: thaw 2.gain; lr 0.1 2.gain; attach testing_gain to 2
        BATCH_START 3: freeze 0.bias, 2.bias; thaw 0.weight, 2.weight
        BATCH_START 6: thaw 0.bias, 2.bias
    """

    events = frozenset({Event.BATCH_START})
    stage: ClassVar[Stage] = Stage.TRAINABILITY

    @override
    def apply(self, event: Event, state: State) -> None:
        """Do what is due at this batch."""
        ledger, batch = state.ledger, state.clock.batch
        names = [name for name in ledger.parameters if not name.endswith(".gain")]
        if batch == 0:
            ledger.freeze(names[::2], owner=self.owner)
        elif batch == 1:
            weight = next(name for name in reversed(names) if name.endswith(".weight"))
            ledger.attach(weight.rpartition(".")[0], GAIN, owner=self.owner)
        elif batch == 3:
            ledger.thaw(names[::2], owner=self.owner)
            ledger.freeze(names[1::2], owner=self.owner)
        elif batch == 6:
            ledger.thaw("*", owner=self.owner)
        elif batch == 7:
            for entry in [each for each in ledger.journal if each.op == GAIN]:
                ledger.detach(entry.module, GAIN, owner=self.owner)
