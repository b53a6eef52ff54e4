"""What a step computes, counted on a model without numbers."""

from __future__ import annotations

from typing import Any

import torch
from attrs import define, field
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from .data import to_device
from .forward import Forward

# Sets of trainable parameters that are counted: forward and backward of a large model take a good part of a second.
MAX_COUNTED = 64


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
        whole: The operations that train everything, as :func:`count_flops` gives them.
    """

    model: nn.Module
    batch: Any
    forward: Forward
    whole: int | None
    _known: dict[frozenset[str], float | None] = field(init=False, factory=dict)

    def share(self, trainable: frozenset[str]) -> float | None:
        """Return the share of what the model costs as it is now; ``trainable`` are the names of what trains."""
        if self.whole and trainable not in self._known and len(self._known) < MAX_COUNTED:
            count = count_flops(self.model, self.batch, self.forward)
            self._known[trainable] = None if count is None else count / self.whole
        return self._known.get(trainable)


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
