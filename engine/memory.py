"""Out of memory: what a batch is repeated from, and the smaller microbatches that it is repeated in."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any, TypeAlias

import numpy as np
import torch
from attrs import define, field
from torch import Tensor, nn

from .batches import batch_size_of, samples_in, split_batch
from .errors import DataError, OutOfMemoryError, warn
from .expanded import put
from .forward import Forward
from .ledger import replace_buffer
from .log import get_logger
from .randomness import restore_generator, state_of
from .state import State
from .unlisted import generators_of

log = get_logger(__name__)
# A part of a batch, what it counts, and the ids of its samples where all are known.
Part: TypeAlias = tuple[Any, float, tuple[int, ...] | None]

# torch's allocators say it in these words, cuBLAS and cuDNN in the last.
_WORDS = re.compile(r"out of memory|not enough memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on the device or on the host.

    Example:
        >>> is_out_of_memory(torch.OutOfMemoryError()), is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
        (True, False)
    """
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or (isinstance(error, RuntimeError) and _WORDS.search(str(error)) is not None)


@define(eq=False)
class Microbatches:
    """Cuts batches into microbatches, each with its share of what the batch's loss is a mean over.

    Args:
        forward: Weighs a microbatch.
        size: Samples of a microbatch; None: the whole batch.
        accumulate: Loader batches of a step.

    Attributes:
        total: What the batch's loss is a mean over on all ranks together; None where this process is alone.
        world: How many ranks there are.
        count: Microbatches of the last batch; only with several ranks.
    """

    forward: Forward
    size: int | None
    accumulate: int = 1
    whole: bool = field(init=False)
    total: float | None = field(default=None, init=False)
    world: int = field(default=1, init=False)
    count: int = field(default=0, init=False)
    _own: Sequence[int] = field(default=(), init=False)
    _weighed: list[Part] | None = field(default=None, init=False)
    _warned: bool = field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self.whole = self.accumulate == 1 and self.size is None

    def of(self, state: State) -> list[Part]:
        """Return the microbatches of ``state.batch``, their shares of the loss, and the ids of their samples where all are known.

        Those whose labels are all ignored are left out.
        """
        if self.whole:
            return [(state.batch, 1.0, state.sample_ids)]
        said = self._said(state) if self._weighed is None else self._weighed
        total = sum(weight for _, weight, _ in said) if self.total is None else self.total
        parts: list[Part] = [(part, weight / total, ids) for part, weight, ids in said] if total else []
        if not total:
            parts = [(self._parts(state)[0], 1.0 / self.world, None)]
        self.count = len(parts)
        return parts

    def weigh(self, state: State, own: Sequence[int]) -> float:
        """Return what this rank's share of the batch counts.

        Args:
            state: With the batch.
            own: How many samples of each loader batch are this rank's; of one with none the batch is a stand-in.
        """
        self._own, self.whole = own, False
        self._weighed = self._said(state)
        return sum(weight for _, weight, _ in self._weighed)

    def _parts(self, state: State) -> list[Any]:
        batches = [state.batch] if self.accumulate == 1 else list(state.batch)
        if self._own:
            batches = [batch for batch, samples in zip(batches, self._own, strict=True) if samples] or batches[:1]
        return batches if self.size is None else [part for each in batches for part in split_batch(each, self.size)]

    def _said(self, state: State) -> list[Part]:
        """Return the parts with their weights; one whose labels are all ignored has no say, and its mean would be NaN."""
        if self._own and not any(self._own):
            return []
        parts = self._parts(state)
        weights = [self.forward.weight(state.model, part) for part in parts]
        rows = zip(parts, weights, _shared_out(state.sample_ids, parts), strict=True)
        return [(part, weight, ids) for part, weight, ids in rows if weight]

    def shrink_to(self, size: int | None) -> None:
        """Take a size that the run has come down to; one that is larger changes nothing."""
        if size is not None and (self.size is None or size < self.size):
            self.size = size
            self.whole = False
            self._weighed = None

    def halve(self, state: State, error: BaseException) -> None:
        """Halve the size, for the rest of the fit.

        Raises:
            OutOfMemoryError: It is 1 already, or nobody knows how many samples the batch has.
        """
        place = _place(state)
        batches = [state.batch] if self.accumulate == 1 else list(state.batch)
        try:
            largest = max(map(batch_size_of, batches))
        except DataError as unknown:
            raise OutOfMemoryError(f"out of memory at {place}, and the batch cannot be cut: {unknown}") from error
        size = largest if self.size is None else min(self.size, largest)
        if size == 1:
            raise OutOfMemoryError(
                f"out of memory at {place} with a single sample at a time. Train less of the model (LoRAInject, "
                "head_only), write Trainer(precision='bf16'), or give shorter samples."
            ) from error
        self.shrink_to(size // 2)
        log.warning("out of memory", where=place, microbatch_size=self.size, was=size, error=str(error).split("\n")[0])

    def warn(self, state: State) -> None:
        """Say once a fit which size is used from now on."""
        if not self._warned:
            self._warned = True
            warn(
                f"out of memory at {_place(state)}: this batch and all that follow go through the model {self.size} samples "
                f"at a time. To begin so, write Trainer(microbatch_size={self.size})."
            )


class BatchStart:
    """Random number generators and buffers as they were when a batch began, to repeat it from.

    The buffers of a model that has some are copied each batch, and so is a GPU's generator. The global generators of the
    CPU are copied in the first batch, and after it only where :meth:`look` has seen them move; until then they are as at the
    last look. A copy of torch's costs 3 microseconds among the rest of a step: what trains may decide whether a model draws
    from it, so it is copied again from each change of the ledger to the next look. Copies of NumPy's and Python's
    cost 40 microseconds, and few models draw from them.

    Args:
        state: Model and ledger.
        device: Where the model lies.
        loss: The loss, where it is a module; its buffers and the generators that it and the model keep are copied as well.

    Example:
        >>> from thawline.engine import ParameterLedger
        >>> model = nn.BatchNorm1d(2)
        >>> state = State(model, ParameterLedger(model, lambda ps: torch.optim.SGD(ps, lr=0.1)))
        >>> start = BatchStart(state, torch.device("cpu"))
        >>> start.keep()
        >>> _ = model(torch.randn(4, 2))
        >>> start.restore()
        >>> model.running_mean.tolist()
        [0.0, 0.0]
    """

    def __init__(self, state: State, device: torch.device, loss: nn.Module | None = None) -> None:
        self._model, self._ledger, self._loss = state.model, state.ledger, loss
        self._generator = torch.default_generator
        self._on_device: torch.Generator | None = None
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self._on_device = torch.cuda.default_generators[index]
        self._own_states: list[Any] = []
        self._drawn = self._unsure = True
        self._torch_drawn = self._torch_unsure = True
        self._version = -1
        self.keep()

    def keep(self) -> None:
        """Remember the present as the beginning of a batch."""
        if self._version != self._ledger.version:
            self._find_buffers()
            self._torch_drawn = self._torch_unsure = True
        if self._torch_drawn:
            self._torch = self._generator.get_state()
        if self._on_device is not None:
            self._device_state = self._on_device.get_state()
        if self._drawn:
            self._host = _host_states()
        if self._own:
            self._own_states = [state_of(each) for each in self._own]
        try:
            for places, copies in self._buffers:
                torch._foreach_copy_(copies, [module._buffers[name] for module, name in places])  # type: ignore[misc]  # None raises
        except (RuntimeError, TypeError, KeyError):  # one has another shape now, or is gone
            self._find_buffers()

    def look(self, *, closely: bool) -> None:
        """See whether the model draws from torch's generator, and closely: from NumPy or Python, after the first batch as well."""
        state = self._generator.get_state()
        moved = not torch.equal(state, self._torch)
        self._torch_drawn = moved if self._torch_unsure else self._torch_drawn or moved
        self._torch_unsure, self._torch = False, state
        if closely or self._unsure:
            now = _host_states()
            moved = not _equal(now, self._host)
            self._drawn = moved if self._unsure else self._drawn or moved
            self._unsure, self._host = False, now

    def restore(self) -> None:
        """Put everything back as it was at :meth:`keep`."""
        if self._torch_drawn:
            self._generator.set_state(self._torch)
        elif not torch.equal(self._generator.get_state(), self._torch):
            self._torch_drawn = True
            self._warn("torch")
        if self._on_device is not None:
            self._on_device.set_state(self._device_state)
        if self._drawn:
            python, numpy = self._host
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002 - the global generator is what a model would draw from
        elif not _equal(_host_states(), self._host):
            self._drawn = True
            self._warn("NumPy or Python")
        for generator, kept in zip(self._own, self._own_states, strict=True):
            restore_generator(generator, kept)
        self.restore_buffers()

    def _warn(self, source: str) -> None:
        log.warning("the model has begun to draw: the repeated batch draws other numbers", source=source)

    def restore_buffers(self) -> None:
        """Put the buffers alone back: a step that is skipped leaves no trace in running statistics."""
        with torch.no_grad():
            for places, copies in self._buffers:
                for (module, name), copied in zip(places, copies, strict=True):
                    buffer = module._buffers.get(name)
                    if buffer is not None and buffer.shape == copied.shape:
                        put(buffer, copied)
                    elif name in module._buffers:  # the model has put one of another shape in its place
                        replace_buffer(module, name, copied.clone())

    def _find_buffers(self) -> None:
        """List the modules' generators, and the buffers by device and dtype, each once; surgery may have brought some."""
        self._version = self._ledger.version
        alike: dict[object, tuple[list[tuple[nn.Module, str]], list[Tensor]]] = {}
        seen: set[int] = set()
        self._own = list(generators_of(self._model, self._loss).values())
        for module in chain(self._model.modules(), () if self._loss is None else self._loss.modules()):
            for name, buffer in module._buffers.items():
                if buffer is not None and id(buffer) not in seen:
                    seen.add(id(buffer))
                    places, copies = alike.setdefault((buffer.device, buffer.dtype), ([], []))
                    places.append((module, name))
                    copies.append(buffer.detach().clone())
        self._buffers = list(alike.values())


def _shared_out(ids: tuple[int, ...] | None, parts: Sequence[Any]) -> Sequence[tuple[int, ...] | None]:
    """Return the ids of each part's samples; None where there are not as many of them as samples."""
    sizes = () if ids is None else [samples_in(each) for each in parts]
    if ids is None or sum(sizes) != len(ids):
        return [None] * len(parts)
    ends = list(accumulate(sizes))
    return [ids[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _place(state: State) -> str:
    return f"epoch {state.clock.epoch}, batch {state.clock.batch}"


def _host_states() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()  # noqa: NPY002 - as above


def _equal(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    (python, numpy), (python2, numpy2) = one, other
    return python == python2 and numpy[2:] == numpy2[2:] and bool(np.array_equal(numpy[1], numpy2[1]))
