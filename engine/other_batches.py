"""One task in many forms: batches of other types, and models that answer otherwise or compute their loss themselves."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from attrs import field, frozen
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typing_extensions import override

from .batches import IGNORED_LABEL
from .doubles import CLASSES, Residual

# -- containers --------------------------------------------------------------------------------------------------------


class Samples(NamedTuple):
    """Some samples of the kit's task.

    Args:
        x: Inputs.
        y: Targets, of which some are to be ignored.
        number: Which samples they are.
    """

    x: Tensor
    y: Tensor
    number: Tensor


class Pair(NamedTuple):
    """Inputs and targets by name."""

    x: Tensor
    y: Tensor


@dataclass
class Record:
    """Samples as a dataclass."""

    x: Tensor
    number: Tensor


@dataclass(frozen=True)
class FrozenRecord:
    """Samples as a dataclass that cannot be changed, with another inside."""

    x: Tensor
    y: Tensor
    inner: Record
    source: str = "the kit"


class ReadOnly(Mapping[str, Any]):
    """A mapping that is no dict and cannot be changed."""

    def __init__(self, **items: Any) -> None:
        self._items = items

    @override
    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    @override
    def __len__(self) -> int:
        return len(self._items)


class Moving:
    """An object that moves to a device by itself, in place."""

    def __init__(self) -> None:
        self.moved = False

    def to(self, _: torch.device) -> Moving:
        """Move it."""
        self.moved = True
        return self


class Output(OrderedDict[str, Any]):
    """A mapping whose items are attributes too, as the outputs of transformers."""

    def __getattr__(self, name: str) -> Any:
        """Return an item."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


# -- models ------------------------------------------------------------------------------------------------------------


class Beside(Residual):
    """A model that is given more than its inputs, looks whether that is of the same samples, and makes nothing of it."""

    @override
    def forward(self, x: Tensor, number: Tensor, beside: Any = None) -> Tensor:  # type: ignore[override]  # it is given more
        for what, told in told_by(beside):
            if told != number.tolist():
                raise ValueError(f"{what} of the batch is {told}, beside inputs of the samples {number.tolist()}")
        return super().forward(x)


def told_by(value: Any, what: str = "beside") -> Iterator[tuple[str, Any]]:
    """Yield the numbers of the samples of which each part of a value is.

    Example:
        >>> list(told_by({"ids": torch.arange(2), "names": ["0", "1"], "source": "the kit"}))
        [("beside['ids']", [0, 1]), ("beside['names']", [0, 1])]
    """
    if isinstance(value, Record):
        yield from told_by(value.number, f"{what}.number")
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from told_by(each, f"{what}[{key!r}]")
    elif isinstance(value, Tensor):
        yield what, value.tolist()
    elif isinstance(value, (list, tuple)) and isinstance(value[0], Tensor) and value[0].ndim:
        for place, each in enumerate(value):
            yield from told_by(each, f"{what}[{place}]")
    elif isinstance(value, (list, tuple, np.ndarray)):
        yield what, [int(each) for each in value]  # numbers, text, or tensors of no dimension
    elif isinstance(value, Moving) and not value.moved:
        yield what, "not moved to the device"


class Answering(Residual):
    """A model that answers with more than its logits.

    Args:
        answer: Makes its answer of the logits.
    """

    def __init__(self, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.answer = answer

    @override
    def forward(self, x: Tensor) -> Any:
        return self.answer(logits=super().forward(x))


class OwnLoss(Residual):
    """A model that computes its loss.

    Args:
        answer: Makes its answer of loss and logits.
    """

    def __init__(self, answer: Callable[..., Any] = dict) -> None:
        super().__init__()
        self.answer = answer

    @override
    def forward(self, x: Tensor, labels: Tensor) -> Any:  # type: ignore[override]  # it is given more
        logits = Residual.forward(self, x)
        return self.answer(loss=cross_entropy(logits, labels), logits=logits)


class Shifting(OwnLoss):
    """A model that leaves out the first label of each row, as causal language models do."""

    @override
    def forward(self, x: Tensor, labels: Tensor) -> Any:  # type: ignore[override]  # it is given more
        logits = Residual.forward(self, x)
        return self.answer(loss=cross_entropy(logits, labels[..., 1:].flatten()), logits=logits)


def ForCausalLMLoss(logits: Tensor, labels: Tensor | None, shift_labels: Tensor | None = None) -> Tensor:  # noqa: N802 - its name in transformers
    """Return the loss of all labels but the first of each row, or of those that are shifted already."""
    wanted = labels[..., 1:].flatten() if labels is not None else shift_labels
    assert wanted is not None, "one of the two is given"
    return cross_entropy(logits, wanted)


class Asking(OwnLoss):
    """A model that asks a function for its loss, as those of transformers do."""

    @property
    def loss_function(self) -> Callable[..., Tensor]:
        """What it asks."""
        return ForCausalLMLoss

    @override
    def forward(self, x: Tensor, labels: Tensor) -> Any:  # type: ignore[override]  # it is given more
        logits = Residual.forward(self, x)
        return self.answer(loss=self.loss_function(logits, labels), logits=logits)


class AskingAligned(Asking):
    """A model that tells that function that its labels are shifted already."""

    @override
    def forward(self, x: Tensor, labels: Tensor) -> Any:  # type: ignore[override]  # it is given more
        logits = Residual.forward(self, x)
        return self.answer(loss=self.loss_function(logits, None, shift_labels=labels), logits=logits)


# -- forms -------------------------------------------------------------------------------------------------------------


@frozen
class Form:
    """A form of the task.

    Args:
        name: What faults are told of.
        given: Returns the batch of some samples, as a loader gives it.
        model: Builds a model with the parameters of :class:`Residual` that takes it.
        settings: What of the Trainer's arguments is another.
        measured: Whether metrics are given its outputs and targets.
    """

    name: str
    given: Callable[[Samples], Any]
    model: Callable[[], nn.Module] = Residual
    settings: Mapping[str, Any] = field(factory=dict)
    measured: bool = False


def _labeled(each: Samples) -> dict[str, Tensor]:
    return {"x": each.x, "labels": each.y}


def _with_first_label(each: Samples) -> dict[str, Tensor]:
    """Return labels behind one that is not to count, and would count unevenly."""
    first = torch.where(each.number % 2 == 0, IGNORED_LABEL, 1)
    return {"x": each.x, "labels": torch.stack([first, each.y], 1)}


def _beside(each: Samples, beside: Any) -> dict[str, Any]:
    return {"x": each.x, "number": each.number, "beside": beside, "labels": each.y}


def _in_arrays(each: Samples) -> dict[str, Any]:
    """Return arrays that torch cannot take as they are: backwards in memory, of another byte order, of text, and read-only."""
    backwards = np.ascontiguousarray(each.x.numpy()[::-1])[::-1]
    number = each.number.numpy().copy()
    number.flags.writeable = False
    return {"x": backwards, "number": number, "beside": number.astype(str), "labels": each.y.numpy().astype(">i8")}


def _much(each: Samples) -> dict[str, Any]:
    """Return all that a batch may hold: by sample, and for the batch as a whole."""
    numbers = each.number.tolist()
    return {
        "names": [str(number) for number in numbers],
        "ids": tuple(numbers),
        "inside": OrderedDict(ids=each.number, source="the kit"),
        "record": Record(each.x, each.number),
        "by sample": list(each.number.unbind()),
        "as many as samples": [each.number] * len(numbers),
        "moving": Moving(),
    }


def _written(each: Samples) -> list[str]:
    return [" ".join(map(str, [*x, y])) for x, y in zip(each.x.tolist(), each.y.tolist(), strict=True)]


def _read(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    rows = torch.tensor([[float(number) for number in each.split()] for each in texts])
    return _parted(rows)


def _parted(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs, laid out as they were, and targets."""
    return rows[:, :-1].contiguous(), rows[:, -1].long()


def _counted(labels: Tensor) -> float:
    return float((labels != IGNORED_LABEL).sum())


def _own(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    logits = model(x)
    return {"loss": cross_entropy(logits, y), "logits": logits}


def _by_hand(take: Callable[[Any], tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Return the Trainer's arguments for batches that only the user's functions understand."""
    return {
        "loss_fn": None,
        "forward_fn": lambda model, batch: _own(model, *take(batch)),
        "loss_weight": lambda batch: _counted(take(batch)[1]),
    }


def _loss_alone(*, loss: Tensor, **_: Tensor) -> Tensor:
    return loss


def _loss_in_a_row(*, loss: Tensor, **_: Tensor) -> Tensor:
    return loss[None]


_OWN: Mapping[str, Any] = MappingProxyType({"loss_fn": None})
_ALIKE = torch.ones(CLASSES)

BATCHES: Sequence[Form] = (
    Form("named tuples", lambda each: Pair(each.x, each.y), settings={"forward_fn": lambda model, batch: model(batch.x)}),
    Form("mappings with 'labels'", _labeled),
    Form("mappings with 'targets'", lambda each: {"x": each.x, "targets": each.y}, measured=True),
    Form("mappings that are read-only", lambda each: ReadOnly(**_labeled(each))),
    Form("mappings that are no dict", lambda each: UserDict(_labeled(each))),
    Form("mappings with much beside the inputs", lambda each: _beside(each, _much(each)), Beside),
    Form("mappings of NumPy arrays", _in_arrays, Beside),
    Form("tuples of several inputs", lambda each: (each.x, each.number, {"ids": each.number}, each.y), Beside),
    Form(
        "frozen dataclasses", lambda each: FrozenRecord(each.x, each.y, Record(each.x, each.number)),
        settings=_by_hand(lambda batch: (batch.inner.x, batch.y)),
    ),
    Form("lists of text, one a sample", _written, settings=_by_hand(_read)),
    Form(
        "pairs of lists", lambda each: (_written(each), each.y.tolist()),
        settings=_by_hand(lambda batch: (_read(batch[0])[0], torch.tensor(batch[1]))),
    ),
    Form(
        "tensors that hold both", lambda each: torch.cat([each.x, each.y[:, None].float()], 1),
        settings=_by_hand(_parted),
    ),
)  # fmt: skip
"""Batches of other types."""

LOSSES: Sequence[Form] = (
    Form("a model that returns a mapping with its loss", _labeled, OwnLoss, _OWN),
    Form("a model that returns an object with its loss", _labeled, partial(OwnLoss, SimpleNamespace), _OWN),
    Form("a model that returns an output with its loss", lambda each: (each.x, each.y), partial(OwnLoss, Output), _OWN, measured=True),
    Form("a model that returns its loss", _labeled, partial(OwnLoss, _loss_alone), _OWN),
    Form("a model that returns its loss in a row", _labeled, partial(OwnLoss, _loss_in_a_row), _OWN),
    Form("a model that shifts its labels", _with_first_label, Shifting, _OWN),
    Form("a model that asks for the loss of shifted labels", _with_first_label, Asking, _OWN),
    Form("a model that asks for a loss as it is", _labeled, AskingAligned, _OWN),
    Form("a model that returns a mapping with logits", _labeled, partial(Answering, dict)),
    Form("a model that returns an object with logits", _labeled, partial(Answering, SimpleNamespace), measured=True),
    Form("a forward_fn of the user's", _labeled, settings={"forward_fn": lambda model, batch: model(batch["x"])}),
    Form("a loss_weight of the user's", _labeled, settings={"loss_weight": lambda batch: _counted(batch["labels"])}),
    Form("a loss that gives a row", _labeled, settings={"loss_fn": lambda outputs, targets: cross_entropy(outputs, targets)[None]}),
    Form("a loss with weights of classes", _labeled, settings={"loss_fn": nn.CrossEntropyLoss(weight=_ALIKE)}),
    Form(
        "a loss that ignores another label", lambda each: (each.x, each.y.where(each.y >= 0, 7)),
        settings={"loss_fn": partial(cross_entropy, ignore_index=7)},
    ),
)  # fmt: skip
"""Models and losses that answer otherwise."""
