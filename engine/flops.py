"""What a step computes, counted on a model without numbers."""

from __future__ import annotations

from typing import Any

import torch
from attrs import define, field
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from .backward_cost import BackwardCost
from .data import to_device
from .forward import Forward
from .twin import meta_twin

# Where the costs of the graph do not tell, sets of trainable parameters that are counted one by one: forward and
# backward of a large model take a good part of a second.
MAX_COUNTED = 16
# Sets for which the graph's answer is compared with a count: another one comes of recomputed activations, say.
_COMPARED = 2


@define(eq=False)
class FlopCounter:
    """Counts the floating-point operations of forward and backward, as a share of those that train everything.

    A multiplication of matrices costs as much again for the gradient of each operand that needs one. So a layer below all
    that trains costs its forward only, a frozen one above costs two thirds (the gradient of its input, but not of its
    weight), one that trains all. Elementwise operations are not counted. A share above 1 means that what was
    attached costs more than what is frozen saves. Where the model cannot run without numbers, nothing is known.

    Args:
        model: A model on the meta device, in train mode.
        batch: A batch of the loader, or None.
        forward: How a batch goes through a model.
        whole: The operations that are the whole of a share; None: those that train everything of the model as it is now.
    """

    model: nn.Module
    batch: Any
    forward: Forward
    whole: int | None = None
    _known: dict[frozenset[str], float | None] = field(init=False, factory=dict)
    _names: frozenset[str] = field(init=False, default=frozenset())
    _graph: _Graph | None = field(init=False, default=None)
    _counted: int = field(init=False, default=0)
    _compared: int = field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        if self.whole is None:
            self._look()
            self.whole = None if self._graph is None else self._graph.whole

    def share(self, trainable: frozenset[str]) -> float | None:
        """Return the share of what the model costs as it is now; ``trainable`` are the names of what trains."""
        if self.whole and trainable not in self._known:
            count = self._count(trainable)
            self._known[trainable] = None if count is None else count / self.whole
        return self._known.get(trainable)

    def _count(self, trainable: frozenset[str]) -> int | None:
        self._look()
        if self._graph is not None:
            count = self._graph.count(trainable)
            if self._compared >= _COMPARED:
                return count
            self._compared += 1
            if count != (real := count_flops(self.model, self.batch, self.forward)):
                self._graph = None
            return real
        self._counted += 1
        return count_flops(self.model, self.batch, self.forward) if self._counted <= MAX_COUNTED else None

    def _look(self) -> None:
        """Run the model at first, and where something was attached since."""
        names = frozenset(name for name, _ in self.model.named_parameters())
        if names != self._names:
            self._names, self._compared = names, 0
            self._graph = _Graph.of(self.model, self.batch, self.forward)


@define(eq=False)
class _Graph:
    """One forward in which everything trains: its operations, and those of any backward from it."""

    forward: int
    backward: BackwardCost

    @classmethod
    def of(cls, model: nn.Module, batch: Any, forward: Forward) -> _Graph | None:
        """Run a copy of the model; return None where that fails, or where nothing depends on its parameters."""
        from torch.utils.flop_counter import FlopCounterMode

        if batch is None:
            return None
        try:
            twin = meta_twin(model, full=True)[0].train()
            counter, inputs = FlopCounterMode(display=False), to_device(batch, torch.device("meta"))
            with counter, _Affirms():  # type: ignore[no-untyped-call]  # torch does not annotate it
                loss = forward.loss(forward.outputs(twin, inputs), inputs)
            trains = {name: each for name, each in twin.named_parameters() if each.requires_grad}
            return cls(int(counter.get_total_flops()), BackwardCost(loss, trains)) if loss.requires_grad else None
        except Exception:  # noqa: BLE001 - as in count_flops
            return None

    @property
    def whole(self) -> int:
        """The operations of a step that trains everything."""
        return self.forward + self.backward.whole

    def count(self, trainable: frozenset[str]) -> int | None:
        """Return the operations of a step that trains these; None where they cannot be counted."""
        try:
            with _Affirms():  # type: ignore[no-untyped-call]  # torch does not annotate it
                return self.forward + self.backward.of(trainable)
        except Exception:  # noqa: BLE001 - as in count_flops
            return None


def count_flops(model: nn.Module, batch: Any, forward: Forward) -> int | None:
    """Return the operations of one forward and backward, or None where they cannot be counted.

    Where the model asks whether something holds of its numbers, such as that nothing is padded, it is taken to hold.

    Args:
        model: A model on the meta device.
        batch: A batch; None where there is none.
        forward: How it goes through the model.

    Example:
        >>> model = nn.Linear(3, 2, device="meta")
        >>> count_flops(model, torch.zeros(5, 3), Forward(lambda model, x: model(x).sum()))
        120
    """
    # It looks at every operator that torch has when it is imported.
    from torch.utils.flop_counter import FlopCounterMode

    if batch is None:
        return None
    counter = FlopCounterMode(display=False)
    try:
        inputs = to_device(batch, torch.device("meta"))
        with counter, _Affirms():  # type: ignore[no-untyped-call]  # torch does not annotate it
            loss = forward.loss(forward.outputs(model, inputs), inputs)
            trains = [each for each in model.parameters() if each.requires_grad]
            torch.autograd.grad(loss, trains, allow_unused=True)
    except Exception:  # noqa: BLE001 - a model may do anything that needs numbers, and then nothing is known
        return None
    return int(counter.get_total_flops())


class _Affirms(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Answers yes to ``bool(tensor)`` of a boolean tensor without numbers: transformers ask it of each attention mask."""

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype is torch.bool
        return True if asked else func(*args, **(kwargs or {}))
