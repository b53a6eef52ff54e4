"""A batch of other types than the model and the loss take: which part of it, and what to write."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import shorten, with_article
from .shards import is_sharded

# What torch's kernels say, each in words of its own.
_TYPES = re.compile(r"dtype|data ?type|scalar type|result type|Input type \(", re.IGNORECASE)
_NO_TENSOR = re.compile(r"must be Tensor, not")
_WANTS_WHOLE = re.compile(r"to be Long|scalar types: Long")
_GOT_WHOLE = re.compile(r"\b(?:Long|Int|Short|Char|Byte|Bool)\b|\b(?:long|int)\b")


def mistyped(error: Exception, batch: Any, model: nn.Module | None = None) -> str | None:
    """Say which part of a batch has a type that torch refused, and what to write; None where the batch is not why.

    Args:
        error: What the model or the loss raised.
        batch: What they were given.
        model: The model, where it is known.

    Example:
        >>> error = RuntimeError("mat1 and mat2 must have the same dtype, but got Double and Float")
        >>> mistyped(error, (torch.ones(2).double(), torch.ones(2)), nn.Linear(2, 2)).partition(". Write: ")[2]
        'batch[0].to(torch.float32) in the dataset or in DataLoader(collate_fn=…)'
    """
    text = str(error)
    if isinstance(error, TypeError) and _NO_TENSOR.search(text):
        found = next(((name, part) for name, part in _parts(batch) if not isinstance(part, Tensor)), None)
        if found is None:
            return None
        name, part = found
        what = (
            f"{name} is {with_article(type(part).__name__)}, {shorten(part, 60)}, and the model takes tensors: {text}"
        )
        return f"{what}. Write: {name} as a tensor in the dataset, in DataLoader(collate_fn=…), or in Trainer(forward_fn=…)"
    if not isinstance(error, RuntimeError) or not _TYPES.search(text):
        return None
    parts = [(name, part) for name, part in _parts(batch) if isinstance(part, Tensor)]
    weights = None if model is None else _dtype_of(model)
    found_write = _what_to_write(text, parts, weights)
    if found_write is None:
        return None
    shown = ", ".join(f"{name} {part.dtype}" for name, part in parts)
    of_model = f" and the model's weights {weights}" if weights is not None else ""
    first = text.strip().partition("\n")[0].rstrip(".")
    return (
        f"the batch has {shown}{of_model}: {first}. Write: {found_write} in the dataset or in DataLoader(collate_fn=…)"
    )


def _dtype_of(model: nn.Module) -> torch.dtype | None:
    """Return the dtype of a model's weights; in shards that of one at rest, since the block that computes may stand in another."""
    weights = [each for each in model.parameters() if each.is_floating_point()]
    return next((each.dtype for each in [*filter(is_sharded, weights), *weights]), None)


def _what_to_write(text: str, parts: list[tuple[str, Tensor]], weights: torch.dtype | None) -> str | None:
    floats = [(name, part.dtype) for name, part in parts if part.is_floating_point()]
    if _WANTS_WHOLE.search(text):
        at = -1 if "target" in text else 0
        return f"{floats[at][0]}.long()" if floats else None
    other = next((name for name, dtype in floats if weights is not None and dtype != weights), None)
    if other is not None:
        return f"{other}.to({weights})"
    whole = [name for name, part in parts if not part.is_floating_point() and not part.is_complex()]
    return f"{whole[0]}.float()" if whole and _GOT_WHOLE.search(text) else None


def _parts(batch: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a batch consists of, by what it is called in it."""
    if isinstance(batch, Mapping):
        yield from ((f"batch[{name!r}]", part) for name, part in batch.items())
    elif isinstance(batch, (tuple, list)):
        yield from ((f"batch[{place}]", part) for place, part in enumerate(batch))
    else:
        yield "batch", batch


__all__ = ["mistyped"]
