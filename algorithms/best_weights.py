"""The best weights of a stretch of training: kept at each improvement of a metric, and put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from ..engine import State
from .early_stop import improved


@attrs.define(eq=False)
class BestWeights:
    """A copy of what trained, and of all buffers, at the best value of a metric so far.

    Args:
        value: That value; None before the first.
        tensors: The copies by name.
    """

    value: float | None = None
    tensors: dict[str, Tensor] = attrs.field(factory=dict)

    @torch.no_grad()
    def watch(self, value: float, state: State, *, mode: Literal["min", "max"]) -> bool:
        """Copy the weights where ``value`` is better than all before; return whether it is."""
        if not improved(value, self.value, mode=mode):
            return False
        trainable = state.ledger.trainable
        self.value = value
        self.tensors = {name: each.detach().clone() for name, each in _live(state).items() if name in trainable}
        self.tensors |= {name: each.detach().clone() for name, each in state.model.named_buffers()}
        return True

    @torch.no_grad()
    def put_back(self, state: State) -> list[str]:
        """Copy them into the model; return the names of the parameters among them.

        Parameters keep identity and storage. What was detached or got another shape since is left out.
        """
        live: dict[str, Tensor] = {**_live(state), **dict(state.model.named_buffers())}
        found = [name for name, each in self.tensors.items() if name in live and live[name].shape == each.shape]
        for name in found:
            if not torch.equal(
                live[name], self.tensors[name]
            ):  # torch does not write into expanded buffers, which stay as they are
                live[name].copy_(self.tensors[name])
        return [name for name in found if name in state.ledger.parameters]

    def state_dict(self) -> dict[str, Any]:
        """Return value and copies."""
        return {"value": self.value, "tensors": dict(self.tensors)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.value = saved["value"]
        self.tensors = {name: each.detach().clone() for name, each in saved["tensors"].items()}


def _live(state: State) -> Mapping[str, Tensor]:
    return state.ledger.parameters
