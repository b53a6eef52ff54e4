"""The layers of a fit, in the order of use where a forward pass over the first samples tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .batches import split_batch
from .data import ResumableLoader, to_device
from .errors import DataError
from .layers import LayerMap
from .splits import depends_on_order

_SAMPLES = 2  # so that little time and memory are wanted; a normalization over a batch may refuse a single one


def find_layers(
    model: nn.Module, data: ResumableLoader, outputs_of: Callable[[nn.Module, Any], Any], device: torch.device
) -> LayerMap:
    """Return the layers of a model, in the order of use where a batch is at hand.

    One forward pass over two samples tells; it leaves no trace. A model that says itself where each of its parameters
    lies is not asked. Where the pass fails, the layers follow the order of registration.

    Args:
        model: The model.
        data: The training data; an iterable that can only be read from its beginning is left alone.
        outputs_of: ``(model, batch) -> outputs``.
        device: Where the model is.

    Example:
        >>> model = nn.ModuleDict({"late": nn.Linear(4, 2), "early": nn.Linear(4, 4)})
        >>> data = ResumableLoader([torch.randn(2, 4)], seed=0)
        >>> find_layers(model, data, lambda model, x: model["late"](model["early"](x)), torch.device("cpu")).head.modules
        ('late',)
    """
    batch = data.peek(_SAMPLES) if depends_on_order(model) else None
    if batch is None:
        return LayerMap(model)
    # A model may write into its inputs, and these may be the caller's own.
    inputs = tree_map_only(Tensor, torch.clone, to_device(_first_samples(batch), device))
    return LayerMap(model, forward=lambda: outputs_of(model, inputs))


def _first_samples(batch: Any) -> Any:
    try:
        return split_batch(batch, _SAMPLES)[0]
    except DataError:  # only the user's forward_fn understands it
        return batch
