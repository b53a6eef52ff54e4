"""What a batch is made of: its size, its parts, its device, and what of it the model is given."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from attrs import define
from torch import Tensor

from .errors import ArgumentError, DataError, shorten, with_article

IGNORED_LABEL = -100
"""The label that torch's losses leave out."""
_TARGETS = ("labels", "targets")
_CPU = torch.device("cpu")


class Fetched(NamedTuple):
    """One batch of a loader.

    Args:
        batch: What the loader yields.
        sample_ids: What the sampler called its samples, where it is known and they are whole numbers.
        samples: How many samples it was made of.
        whole: How many samples the batch has over all ranks.
    """

    batch: Any
    sample_ids: tuple[int, ...] | None
    samples: int
    whole: int


@define(eq=False, slots=True)
class Unloaded:
    """A batch that is not loaded yet.

    Args:
        ahead: The sample ids of this batch and of others that were drawn with it, batch by batch: one list for all of them.
        place: Which of them this one is.
        loads: Loads the batch at a place in this process, onto the device: equal, bit for bit, to what a worker would have
            given.
    """

    ahead: Sequence[tuple[int, ...]]
    place: int
    loads: Callable[[int], Any]

    @property
    def sample_ids(self) -> tuple[int, ...]:
        """Index in the dataset of each of its samples."""
        return self.ahead[self.place]

    def load(self) -> Any:
        """Load it."""
        return self.loads(self.place)


def batch_size_of(batch: Any) -> int:
    """Return the number of samples in a batch: the first dimension of the first tensor found in it.

    Args:
        batch: A tensor or array, or a mapping, tuple, list or dataclass that holds some, nested as deep as you like; or a list
            of anything else, one a sample.

    Raises:
        DataError: There is nothing in it that has a first dimension, or it is nested without end.

    Example:
        >>> batch_size_of({"x": torch.zeros(4, 3), "y": torch.zeros(4)})
        4
    """
    first = batch[0] if type(batch) in (tuple, list) and batch else batch
    if isinstance(first, Tensor) and (shape := first.shape):  # the commonest batches, in a fraction of the time
        return shape[0]
    try:
        for array in _arrays(batch):
            return int(array.shape[0])
        if listed := _first_list(batch):
            return len(listed)
    except RecursionError:
        raise _too_deep(batch) from None
    raise DataError(
        f"cannot tell how many samples are in a batch of type {type(batch).__name__}: no tensor in it has a first "
        f"dimension, got {shorten(batch)}. Write: a collate_fn that returns a tensor, or a tuple, list or mapping of "
        "tensors with the samples along dimension 0."
    )


def samples_in(batch: Any) -> int:
    """Return the samples in a batch; one that only the user's ``forward_fn`` understands counts as one."""
    try:
        return batch_size_of(batch)
    except DataError:
        return 1


def split_batch(batch: Any, size: int) -> list[Any]:
    """Cut a batch into microbatches along dimension 0; what has another length is shared by all of them.

    Args:
        batch: As for :func:`batch_size_of`. Tensors become views; types of containers are kept.
        size: Samples of a microbatch, at least 1; the last one has what is left.

    Raises:
        ArgumentError: The size is not a whole number of at least 1.
        DataError: The batch has no size.

    Example:
        >>> [part["x"].tolist() for part in split_batch({"x": torch.arange(5), "scale": 2.0}, 2)]
        [[0, 1], [2, 3], [4]]
    """
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        takes = "a whole number of at least 1"
        raise ArgumentError("Trainer(microbatch_size=)", got=size, takes=takes, example="Trainer(microbatch_size=8)")
    whole = batch_size_of(batch)
    if whole <= size:
        return [batch]
    return _parts(batch, whole, [slice(start, min(start + size, whole)) for start in range(0, whole, size)])


def part_of_batch(batch: Any, start: int, end: int) -> Any:
    """Return the samples from ``start`` up to ``end`` of a batch, as :func:`split_batch` cuts it.

    Raises:
        DataError: The batch has no size.

    Example:
        >>> part_of_batch((torch.arange(5), "a name"), 1, 3)
        (tensor([1, 2]), 'a name')
    """
    whole = batch_size_of(batch)
    return batch if (start, end) == (0, whole) else _parts(batch, whole, [slice(start, end)])[0]


def _parts(batch: Any, whole: int, slices: Sequence[slice]) -> list[Any]:
    try:
        listed = isinstance(batch, (list, tuple)) and len(batch) == whole and not any(_holds(each) for each in batch)
        return [batch[part] if listed else _part(batch, whole, part, outermost=True) for part in slices]
    except RecursionError:
        raise _too_deep(batch) from None


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on ``device``: the very object where all of them lie there already.

    Args:
        batch: Tensors in mappings, tuples, lists and dataclasses, nested; or an object with a ``to`` method of its own. NumPy arrays
            of numbers become tensors, as in torch's default collate function.
        device: Where to.

    Raises:
        DataError: It is nested deeper than Python can follow, or holds itself.

    Example:
        >>> batch = [torch.zeros(2), "a name"]
        >>> to_device(batch, torch.device("cpu")) is batch
        True
    """
    if device == _CPU and (type(batch) is tuple or type(batch) is list):
        for each in batch:
            if type(each) is not Tensor or not each.is_cpu:
                break
        else:  # the commonest batches, in a fraction of the time
            return batch
    try:
        return _moved(batch, device)
    except RecursionError:
        raise _too_deep(batch) from None


def _moved(batch: Any, device: torch.device) -> Any:
    if type(batch) is Unloaded:
        return batch
    if isinstance(batch, Tensor):
        return batch if batch.device == device else batch.to(device, non_blocking=device.type == "cuda")
    if isinstance(batch, np.ndarray):
        return _moved(_tensor(batch), device) if batch.dtype.kind in "biufc" else batch
    if isinstance(batch, (list, tuple, Mapping)):
        if callable(getattr(batch, "to", None)) and not isinstance(batch, Mapping):
            return batch.to(device)  # type: ignore[union-attr]  # PackedSequence is a tuple and moves as one
        return _mapped(batch, lambda each: _moved(each, device))
    if callable(getattr(batch, "to", None)) and not isinstance(batch, type):
        # Some move in place, and the caller's loader may hold this very batch.
        return batch if getattr(batch, "device", None) == device else copy.copy(batch).to(device)
    return _mapped(batch, lambda each: _moved(each, device)) if _is_record(batch) else batch


def _is_record(batch: Any) -> bool:
    """Return whether it is an instance of a dataclass, which is a container like a mapping."""
    return dataclasses.is_dataclass(batch) and not isinstance(batch, type)


def _fields(record: Any) -> dict[str, Any]:
    return {each.name: getattr(record, each.name) for each in dataclasses.fields(record)}


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """Return a tensor over the array's memory where torch can take it, else over a copy."""
    fits = array.flags.writeable and array.dtype.isnative and all(stride >= 0 for stride in array.strides)
    return torch.as_tensor(array if fits else array.astype(array.dtype.newbyteorder("=")))


def _too_deep(batch: Any) -> DataError:
    return DataError(
        f"a batch, {with_article(type(batch).__name__)}, is nested deeper than Python can follow, or holds itself. "
        "Write: a collate_fn that returns a tensor, or a tuple, list or mapping of tensors."
    )


def forward_arguments(batch: Any, keep_labels: bool) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Return how a model is called with a batch, and the targets that are kept from it for a loss function.

    Args:
        batch: A mapping is passed as keywords, a tuple or list is ``(*inputs, targets)``, anything else is the one
            input.
        keep_labels: Whether ``labels`` or ``targets`` of a mapping, and the last of a tuple, are kept for a loss
            function. Where they are not, the model is given everything, to compute a loss of its own.

    Returns:
        Positional arguments, keyword arguments, and the targets or None.

    Raises:
        DataError: A mapping whose keys are not names, or an empty tuple.

    Example:
        >>> forward_arguments({"input_ids": 1, "labels": 2}, True)
        ((), {'input_ids': 1}, 2)
        >>> forward_arguments((1, 2, 3), True)
        ((1, 2), {}, 3)
    """
    if type(batch) is not tuple and isinstance(batch, Mapping):
        keywords = dict(batch)
        if not all(isinstance(key, str) for key in keywords):
            raise DataError(
                f"a mapping is passed to the model as keywords, so its keys are names, got {shorten(list(keywords))}. "
                "Write: Trainer(forward_fn=lambda model, batch: model(batch)), or name the keys as forward() does."
            )
        kept = next((name for name in _TARGETS if name in keywords), None) if keep_labels else None
        return (), keywords, None if kept is None else keywords.pop(kept)
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise DataError("a batch is an empty tuple. Write: a dataset of (input, target) pairs, or of inputs.")
        # A dataset of inputs alone comes out of the default collate function as a list of one.
        if keep_labels and len(batch) > 1:
            return tuple(batch[:-1]), {}, batch[-1]
        return tuple(batch), {}, None
    return (batch,), {}, None


def count_weight(
    batch: Any, targets: Any, shift: bool = False, *, ignored: int = IGNORED_LABEL, weight: Tensor | None = None
) -> float:
    """Return how much a microbatch counts in its batch, so that cutting a batch does not change its gradient.

    Args:
        batch: The microbatch.
        targets: Its targets. Integer ones count where they are not ``ignored``.
        shift: Leave out the first label of each row: causal language models predict the next token.
        ignored: The label that the loss leaves out.
        weight: The weight of each class, of shape (classes,), where the loss is a mean over weights.

    Returns:
        What the loss is a mean over: the labels that count, or the sum of their classes' weights; else the samples.

    Example:
        >>> count_weight(None, torch.tensor([[5, -100, 7]])), count_weight(torch.zeros(4, 2), None)
        (2.0, 4.0)
    """
    if isinstance(targets, Tensor) and _is_integer(targets):
        counted = targets[..., 1:] if shift and targets.ndim else targets
        kept = counted != ignored
        if weight is not None:
            return float(weight.to(targets.device)[counted[kept].long()].sum().item())
        return float(kept.sum().item())
    return float(batch_size_of(batch))


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)


def _arrays(batch: Any) -> Iterator[Tensor | np.ndarray]:
    """Yield the tensors and arrays in ``batch`` that have a first dimension, depth first."""
    if isinstance(batch, (Tensor, np.ndarray)):
        if batch.ndim:
            yield batch
    elif isinstance(batch, (list, tuple, Mapping)):
        for each in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _arrays(each)
    elif _is_record(batch):
        yield from _arrays(_fields(batch))


def _first_list(batch: Any) -> Sequence[Any]:
    """Return the first innermost list or tuple in ``batch``, which holds no tensors; an empty one where there is none."""
    if _is_record(batch):
        batch = _fields(batch)
    if isinstance(batch, Mapping):
        return next(filter(None, map(_first_list, batch.values())), ())
    if not isinstance(batch, (list, tuple)):
        return ()
    return next(filter(None, map(_first_list, batch)), batch)


def _holds(batch: Any) -> bool:
    """Return whether there is a tensor with a first dimension, or a list, in ``batch``."""
    return isinstance(batch, (list, tuple)) or any(True for _ in _arrays(batch))


def _part(value: Any, whole: int, part: slice, *, outermost: bool = False) -> Any:
    """Return ``part`` of what has one entry a sample, ``whole`` of them, and the rest as it is."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value[part] if value.ndim and value.shape[0] == whole else value
    if not isinstance(value, (list, tuple, Mapping)):
        return _mapped(value, lambda each: _part(each, whole, part)) if _is_record(value) else value
    if not outermost and not isinstance(value, Mapping) and len(value) == whole:
        # As many as samples: one each, unless they are tensors that hold all the samples themselves.
        batched = [isinstance(each, (Tensor, np.ndarray)) and each.shape[:1] == (whole,) for each in value]
        if not all(batched):
            return value[part]
    return _mapped(value, lambda each: _part(each, whole, part))


def _mapped(container: Any, function: Callable[[Any], Any]) -> Any:
    """Return a container of the same type with ``function`` of each item: itself where no item changed."""
    if _is_record(container):
        fields = _fields(container)
        changed = _mapped(fields, function)
        if changed is fields:
            return container
        record = copy.copy(container)
        for name, each in changed.items():
            object.__setattr__(record, name, each)  # also of a frozen one, and without its __post_init__
        return record
    if isinstance(container, Mapping):
        old = list(container.values())
        new = [function(each) for each in old]
        if all(a is b for a, b in zip(old, new, strict=True)):
            return container
        changed = dict(zip(container, new, strict=True))
        if type(container) is dict or not isinstance(container, MutableMapping):
            return changed
        rebuilt = copy.copy(container)
        rebuilt.update(changed)
        return rebuilt
    new = [function(each) for each in container]
    if all(a is b for a, b in zip(container, new, strict=True)):
        return container
    if hasattr(container, "_fields"):
        return type(container)(*new)
    return new if isinstance(container, list) else tuple(new)
