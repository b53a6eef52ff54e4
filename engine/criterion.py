"""What a loss function says of itself: which label it leaves out, how it weighs classes, whether it is a mean."""

from __future__ import annotations

from functools import partial
from typing import Any

from attrs import frozen
from torch import Tensor, nn
from torch.nn import functional

from .batches import IGNORED_LABEL

# The losses whose mean is over the weights of the classes; the others' weights are factors of a mean over samples.
_WEIGH_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)
_WEIGH_CLASSES_TOO = (functional.cross_entropy, functional.nll_loss)


@frozen(eq=False)
class Criterion:
    """What a loss is a mean over.

    Args:
        ignored: The label that is left out.
        weight: The weight of each class, where the loss is a mean over weights; None: every label counts the same.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
    """

    ignored: int = IGNORED_LABEL
    weight: Tensor | None = None
    reduction: str = "mean"

    @classmethod
    def of(cls, loss_fn: object) -> Criterion:
        """Read a loss function: its attributes, or the keywords of a ``functools.partial``.

        What it does not show, as a function of the user's own, is taken as torch's defaults.

        Example:
            >>> Criterion.of(nn.CrossEntropyLoss(ignore_index=0)).ignored
            0
            >>> Criterion.of(partial(functional.cross_entropy, reduction="sum")).reduction
            'sum'
        """
        keywords: dict[str, Any] = {}
        while isinstance(loss_fn, partial):
            keywords = {**loss_fn.keywords, **keywords}
            loss_fn = loss_fn.func
        ignored, weight, reduction = (
            keywords.get(name, getattr(loss_fn, name, None)) for name in ("ignore_index", "weight", "reduction")
        )
        weighs = isinstance(loss_fn, _WEIGH_CLASSES) or loss_fn in _WEIGH_CLASSES_TOO
        return cls(
            ignored if isinstance(ignored, int) else IGNORED_LABEL,
            weight.detach() if weighs and isinstance(weight, Tensor) else None,
            reduction if isinstance(reduction, str) else "mean",
        )
