"""How a batch goes through a model: forward, loss, and the weight of a microbatch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any

import torch
from attrs import Factory, define, field, frozen
from torch import Tensor, nn

from .criterion import Criterion
from .data import count_weight, forward_arguments
from .errors import ArgumentError, DataError, LedgerError, LossError, shorten, warn, with_article
from .layers import shorten_list
from .mistyped import mistyped
from .shift import shifts_labels
from .state import State
from .unlisted import loss_module, untrained

# The commonest batches: read here in a fraction of the time that `forward_arguments` takes.
_PAIRS = frozenset({tuple, list})
# Once a batch: torch, a module with a __getattr__, is searched anew each time.
_check_and_unscale = torch._amp_foreach_non_finite_check_and_unscale_
# What others call the labels of a mapping.
_LABELS = ("label", "label_ids", "target", "y")


@frozen(eq=False)
class Forward:
    """Forward, loss and weight, as the Trainer's arguments say.

    Args:
        forward_fn: ``(model, batch) -> outputs``; None: a mapping is passed as keywords, a tuple is
            ``(*inputs, targets)``, a tensor is the one input.
        loss_fn: ``(outputs, targets) -> scalar``, the mean over the samples; None: ``outputs.loss``,
            ``outputs["loss"]``, or the output itself.
        loss_weight: ``batch -> number`` of what the loss is a mean over; None: the labels that are not
            ignored (the loss's ``ignore_index``, else -100), weighted by class where the loss is, else the samples.
    """

    forward_fn: Callable[[nn.Module, Any], Any] | None = None
    loss_fn: Callable[[Any, Any], Tensor] | None = None
    loss_weight: Callable[[Any], float] | None = None
    criterion: Criterion = field(init=False, default=Factory(lambda self: Criterion.of(self.loss_fn), takes_self=True))

    @property
    def reads_targets_only(self) -> bool:
        """Whether nothing but the model reads more of a batch than its targets."""
        return self.forward_fn is None and self.loss_fn is not None and self.loss_weight is None

    @property
    def module(self) -> nn.Module | None:
        """The loss, where it is a module."""
        return loss_module(self.loss_fn)

    def say_untrained(self) -> None:
        """Warn of parameters of the loss that ask for gradients: a fit trains the model's alone."""
        if said := untrained(self.module):
            warn(said)

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        """Return what the model makes of a batch.

        Raises:
            DataError: The batch has other types than the model takes, or labels under another name.
        """
        try:
            if self.forward_fn is not None:
                return self.forward_fn(model, batch)
            if self.loss_fn is not None and type(batch) in _PAIRS and len(batch) > 1:
                return model(*batch[:-1])
            return self._called(model, batch)
        except (RuntimeError, TypeError) as error:
            if said := mistyped(error, batch, model):
                raise DataError(said) from error
            raise

    def _called(self, model: nn.Module, batch: Any) -> Any:
        args, kwargs, _ = forward_arguments(batch, self.loss_fn is not None)
        try:
            return model(*args, **kwargs)
        except Exception as error:
            if self.loss_fn is None:
                error.add_note(
                    "Trainer(loss_fn=None) passes the whole batch to the model, which is to return its loss. "
                    "Where the loss is computed outside, write Trainer(loss_fn=torch.nn.functional.cross_entropy)."
                )
            elif isinstance(error, TypeError) and (advice := _rename(batch)) and targets_of(batch) is None:
                raise DataError(f"the model does not take this batch: {error}. {advice}") from error
            raise

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Return the loss of a batch.

        Raises:
            LossError: There is none, or it is not one number.
            DataError: ``loss_fn`` fails on a batch without targets or on their type, or the model computes no loss from a batch without
                labels.
        """
        loss: Any
        loss_fn = self.loss_fn
        if loss_fn is not None:
            targets = batch[-1] if type(batch) in _PAIRS and len(batch) > 1 else targets_of(batch)
            try:
                loss = loss_fn(outputs if type(outputs) is Tensor else predictions(outputs), targets)
            except Exception as error:
                if targets is not None:
                    if said := mistyped(error, batch):
                        raise DataError(said) from error
                    error.add_note(f"in loss_fn(outputs {_look(predictions(outputs))}, targets {_look(targets)})")
                    raise
                raise DataError(_without_targets(batch, error)) from error
            if type(loss) is Tensor and not loss.ndim:
                return loss
            source = "loss_fn(outputs, targets)"
        elif isinstance(outputs, Tensor):
            loss, source = outputs, "the model (its output is taken as the loss where loss_fn is None)"
        else:
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
            source = "outputs.loss"
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            if loss is None and source == "outputs.loss" and isinstance(batch, Mapping) and "labels" not in batch:
                raise DataError(_without_labels(batch))
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else shorten(loss)
            raise LossError(
                f"the loss takes one number, got {got} from {source}. "
                "Write: Trainer(loss_fn=torch.nn.functional.cross_entropy), or return the mean in a loss of your own."
            )
        return loss if loss.ndim == 0 else loss.reshape(())

    def weight(self, model: nn.Module, batch: Any) -> float:
        """Return how much a microbatch counts in its batch: what its loss is a mean over.

        Raises:
            ArgumentError: ``loss_weight`` gives no finite number of at least 0.
        """
        if self.loss_weight is not None:
            return _weight(self.loss_weight(batch))
        said, shift = self.criterion, self.loss_fn is None and shifts_labels(model)
        return count_weight(batch, targets_of(batch), shift, ignored=said.ignored, weight=said.weight)


def _weight(given: Any) -> float:
    try:
        weight = -1.0 if isinstance(given, (str, bytes)) else float(given)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: a tensor of several numbers
        weight = -1.0
    if 0 <= weight < inf:
        return weight
    takes = "a function of the batch that gives a finite number of at least 0"
    example = "Trainer(loss_weight=lambda batch: len(batch['labels']))"
    raise ArgumentError("Trainer(loss_weight=)", got=given, takes=takes, example=example)


def _without_targets(batch: Any, error: Exception) -> str:
    if isinstance(batch, Mapping):
        what = f"a mapping of {', '.join(map(repr, batch)) or 'nothing'}, without 'labels' or 'targets'"
    elif isinstance(batch, (tuple, list)):
        what = f"{with_article(type(batch).__name__)} of one, the model's input"
    else:
        what = f"{with_article(type(batch).__name__)}, the model's input"
    advice = _rename(batch) or "Write: batches that are (inputs, targets), or mappings with 'labels' or 'targets'."
    return f"loss_fn is given and the batch has no targets: it is {what}. {advice} loss_fn said: {error}"


def _without_labels(batch: Mapping[Any, Any]) -> str:
    advice = _rename(batch) or "Add them to the data set: labels=input_ids for a language model, else one a sample."
    return (
        f"the model returned no loss, and the batch, a mapping of {', '.join(map(repr, batch)) or 'nothing'}, has no 'labels' "
        f"to compute it from. {advice}"
    )


def _look(value: Any) -> str:
    """Say what a loss was given."""
    if isinstance(value, Tensor):
        return f"of shape {tuple(value.shape)}, {value.dtype}"
    return with_article(type(value).__name__)


def _rename(batch: Any) -> str:
    """Say how the labels of a mapping are to be called; nothing where it has none under another name."""
    found = next((name for name in _LABELS if isinstance(batch, Mapping) and name in batch), None)
    return "" if found is None else f"Rename its {found!r} to 'labels': dataset.rename_column({found!r}, 'labels')."


def without_gradient() -> LossError:
    """Return the error where no trainable parameter had a part in the loss."""
    return LossError(
        "the loss has no gradient: no trainable parameter had a part in it. Do not detach it, compute it under "
        "no_grad or turn it into a number, and look with ledger.trainable which parameters train."
    )


def warn_of_late_parameters(state: State) -> None:
    """Warn of parameters that the model has made or replaced since the fit began: nothing trains them."""
    known = {id(each) for each in state.ledger.parameters.values()}
    late = [name for name, each in state.model.named_parameters() if id(each) not in known]
    if late:
        warn(
            f"{shorten_list(late)} of {type(state.model).__name__} came into being after the fit began, and will not train: the "
            "optimizer does not have them. Make them in __init__, or run the model once before: model(inputs); trainer.fit(model, …)"
        )


def stop_frozen(state: State) -> None:
    """Nothing trains: an error at the start of the fit, its end later.

    Raises:
        LedgerError: At the start.
    """
    ledger = state.ledger
    if state.clock.batch:
        state.stop("nothing trains any more")
        return
    name = next(iter(ledger.parameters))
    holders = ", ".join(sorted({owner for each in ledger.parameters for owner in ledger.owners(each)}))
    advice = "Thaw some: model.requires_grad_(True) before the fit where the user holds them."
    if ledger.left_out:
        advice = (
            f"The optimizer instance holds {len(ledger.parameters) - len(ledger.left_out)} of them. Pass a factory, "
            "which sees every parameter: optimizer=partial(torch.optim.AdamW, lr=1e-4)."
        )
    raise LedgerError(
        f"nothing trains: all {len(ledger.parameters)} parameters are held, by {holders} (first {name!r}). {advice}"
    )


def predictions(outputs: Any) -> Any:
    """Return the logits of an output that has some, else the output itself: what losses and metrics compare."""
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return outputs["logits"]
    return getattr(outputs, "logits", outputs)


def targets_of(batch: Any) -> Any:
    """Return a batch's targets: ``labels`` or ``targets`` of a mapping, the last of a tuple, else None."""
    if type(batch) in _PAIRS:
        return batch[-1] if len(batch) > 1 else None
    _, _, targets = forward_arguments(batch, True)
    return targets


@define(eq=False)
class GradientCheck:
    """Tells whether all gradients are finite, with one kernel and one host synchronization for each device and dtype.

    The kernel is that of ``torch.amp.GradScaler``. It multiplies by 1 in place, which leaves every number as it is. On the
    CPU its answer is read through NumPy's view of it, in a tenth of the time.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([1.0, float("inf")])
        >>> GradientCheck().finite((weight,))
        False
    """

    _parameters: Sequence[nn.Parameter] = field(default=(), init=False)
    _alike: list[tuple[list[nn.Parameter], Tensor, Tensor, Callable[[], float]]] = field(factory=list, init=False)

    def finite(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Return whether no gradient holds a NaN or an infinity; parameters without a gradient are passed over."""
        if parameters is not self._parameters:
            self._sort(parameters)
        for alike, found, one, read in self._alike:
            gradients = [grad for each in alike if (grad := each.grad) is not None]
            try:
                _check_and_unscale(gradients, found, one)
            except RuntimeError:  # none at all, sparse or complex ones among them, or a device without the kernel
                found.fill_(not all(torch.isfinite(_numbers(each)).all() for each in gradients))
            if read():
                found.zero_()
                return False
        return True

    def _sort(self, parameters: Sequence[nn.Parameter]) -> None:
        kinds: dict[object, list[nn.Parameter]] = {}
        for each in parameters:
            kinds.setdefault((each.device, each.dtype), []).append(each)
        self._alike = []
        for alike in kinds.values():
            found = torch.zeros((), device=alike[0].device)
            read = found.numpy().item if found.is_cpu else found.item
            self._alike.append((alike, found, found + 1, read))
        self._parameters = parameters


def _numbers(gradient: Tensor) -> Tensor:
    return gradient._values() if gradient.is_sparse else gradient


def is_finite(value: Tensor | float) -> bool:
    """Return whether a number is neither NaN nor infinite; one host synchronization for a tensor."""
    number = value.item() if isinstance(value, Tensor) else value
    return bool(number - number == 0)
