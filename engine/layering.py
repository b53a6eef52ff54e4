"""The layers of a fit: where their order is in doubt, a forward pass over the first samples tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .data import ResumableLoader, to_device
from .layers import LayerMap
from .log import get_logger
from .splits import is_unsure

log = get_logger(__name__)


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
    batch = _peek(data) if is_unsure(model) else None
    if batch is None:
        return LayerMap(model)
    return LayerMap(model, forward=lambda: outputs_of(model, to_device(batch, device)))


def _peek(data: ResumableLoader) -> Any:
    try:
        return data.peek()
    except Exception as error:  # noqa: BLE001 - the user's dataset and collate function: training will tell what is wrong
        log.warning("no batch to find the order of layers", error=repr(error))
        return None
