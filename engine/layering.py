"""The layers of a fit: where their order is in doubt, a forward pass over the first samples tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .data import ResumableLoader, to_device
from .layers import LayerMap
from .splits import is_unsure


def find_layers(
    model: nn.Module, data: ResumableLoader, outputs_of: Callable[[nn.Module, Any], Any], device: torch.device
) -> LayerMap:
    """Return the layers of a model, in the order of use where that of registration is in doubt.

    Args:
        model: The model.
        data: The training data; an iterable that can only be read from its beginning is left alone.
        outputs_of: ``(model, batch) -> outputs``.
        device: Where the model is.

    Example:
        >>> model = nn.ModuleDict({"head": nn.Linear(4, 2), "body": nn.Linear(4, 4)})
        >>> data = ResumableLoader([torch.randn(2, 4)], seed=0)
        >>> find_layers(model, data, lambda model, x: model["head"](model["body"](x)), torch.device("cpu")).head.modules
        ('head',)
    """
    batch = data.peek(2) if is_unsure(model) else None  # two samples, so that no memory is wanted for a whole batch
    if batch is None:
        return LayerMap(model)
    return LayerMap(model, forward=lambda: outputs_of(model, to_device(batch, device)))
