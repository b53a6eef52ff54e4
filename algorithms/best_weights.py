"""The best weights of a stretch of training: kept at each improvement of a metric, and put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from ..engine import State, is_sharded, shard_like
from .early_stop import improved


@attrs.define(eq=False)
class BestWeights:
    """A copy of what trained, and of all buffers, at the best value of a metric so far.

    Args:
        value: That value; None before the first.
        tensors: The copies by name.

    Example:
        >>> from thawline.engine import ParameterLedger
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.BatchNorm1d(1, affine=False))
        >>> state, best = State(model, ParameterLedger(model, torch.optim.SGD)), BestWeights()
        >>> model[0].weight.data[:] = 1.0
        >>> best.watch(0.5, state, mode="min"), best.watch(0.7, state, mode="min"), best.value
        (True, False, 0.5)
        >>> model[0].weight.data[:], model[1].running_mean[:] = 2.0, 2.0
        >>> best.put_back(state), model[0].weight.item(), model[1].running_mean.item()
        (['0.weight'], 1.0, 0.0)
    """

    value: float | None = None
    tensors: dict[str, Tensor] = attrs.field(factory=dict)

    @torch.no_grad()
    def watch(self, value: float, state: State, *, mode: Literal["min", "max"]) -> bool:
        """Copy the weights where ``value`` is better than all before; return whether it is.

        Example:
            >>> from thawline.engine import ParameterLedger
            >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
            >>> state, best = State(model, ParameterLedger(model, torch.optim.SGD)), BestWeights()
            >>> state.ledger.freeze("0.*", owner="me")
            >>> best.watch(0.5, state, mode="max"), sorted(best.tensors), best.tensors["1.bias"].requires_grad
            (True, ['1.bias', '1.weight'], False)
        """
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

        Example:
            >>> from thawline.engine import ParameterLedger
            >>> model = torch.nn.Linear(1, 1)
            >>> state = State(model, ParameterLedger(model, torch.optim.SGD))
            >>> best = BestWeights(0.5, {"weight": torch.ones(1, 2), "bias": torch.ones(1), "gone": torch.ones(1)})
            >>> best.put_back(state), model.bias.item()
            (['bias'], 1.0)
        """
        live: dict[str, Tensor] = {**_live(state), **dict(state.model.named_buffers())}
        found = [name for name, each in self.tensors.items() if name in live and live[name].shape == each.shape]
        for name in found:
            kept = shard_like(self.tensors[name], live[name])
            # torch does not write into expanded buffers, which stay as they are
            if is_sharded(live[name]) or not torch.equal(live[name], kept):
                live[name].copy_(kept)
        return [name for name in found if name in state.ledger.parameters]

    def state_dict(self) -> dict[str, Any]:
        """Return value and copies."""
        return {"value": self.value, "tensors": dict(self.tensors)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Example:
            >>> saved, best = BestWeights(0.5, {"weight": torch.ones(1)}).state_dict(), BestWeights()
            >>> best.load_state_dict(saved)
            >>> saved["tensors"]["weight"][:] = 2.0  # a copy was taken
            >>> best.value, best.tensors
            (0.5, {'weight': tensor([1.])})
        """
        self.value = saved["value"]
        self.tensors = {name: each.detach().clone() for name, each in saved["tensors"].items()}


def _live(state: State) -> Mapping[str, Tensor]:
    return state.ledger.parameters
