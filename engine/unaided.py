"""What torch alone makes of a model: its evaluation, its gradients and buffers, and twins of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .batches import batch_size_of
from .data import forward_arguments
from .forward import predictions
from .ledger import ParameterLedger
from .randomness import Randomness


def share_right(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the share of a batch that is classified right: a metric that is averaged over the samples."""
    return (outputs.argmax(1) == targets).float().mean()


class Right:
    """The number of samples that are classified right: a metric that accumulates by itself."""

    def __init__(self) -> None:
        self.count = 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in a batch."""
        self.count += int((outputs.argmax(1) == targets).sum())

    def compute(self) -> int:
        """Return how many there were."""
        return self.count

    def reset(self) -> None:
        """Begin anew."""
        self.count = 0


def evaluated_by_hand(
    model: nn.Module, loader: Iterable[Any], loss_fn: Callable[[Any, Any], Tensor] | None
) -> dict[str, float]:
    """Return what an evaluation with :func:`share_right` and :class:`Right` must come to, in eval mode."""
    assert loss_fn is not None, "the kit's own task has one"
    modes = [(each, each.training) for each in model.modules()]
    loss, counted, right, samples = 0.0, 0, 0, 0
    with Randomness().kept(), torch.no_grad():
        for module, _ in modes:
            module.training = False
        for inputs, targets in loader:
            outputs = predictions(model(inputs))
            labels = int((targets != -100).sum())
            loss, counted = loss + float(loss_fn(outputs, targets)) * labels, counted + labels
            right += int((outputs.argmax(1) == targets).sum())
            samples += batch_size_of(targets)
        for module, training in modes:
            module.training = training
    return {"eval/loss": loss / counted, "eval/share": right / samples, "eval/right": float(right)}


def gradients_of(ledger: ParameterLedger) -> dict[str, Tensor | None]:
    """Copy the gradients of what trains."""
    grads = {name: ledger.parameters[name].grad for name in ledger.trainable}
    return {name: None if each is None else each.detach().clone() for name, each in grads.items()}


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy the buffers."""
    return {name: each.detach().clone() for name, each in model.named_buffers()}


def twin_of(parameter: nn.Parameter) -> nn.Parameter:
    """Return a parameter with the same numbers and the same gradient."""
    twin = nn.Parameter(parameter.detach().clone())
    if parameter.grad is not None:
        torch.autograd.backward(twin, parameter.grad.detach().clone())  # a leaf's gradient is what it is given
    return twin


def outputs_with(model: nn.Module, tensors: Mapping[str, Tensor], batch: Any, *, has_loss: bool) -> Any:
    """Return what a model makes of a batch with other parameters or buffers; without a loss function it is given the labels too."""
    arguments, keywords, _ = forward_arguments(batch, has_loss)
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    others = {id(each): tensors[name] for name, each in held.items() if name in tensors}
    given = {
        f"{path}.{name}".removeprefix("."): others[id(each)]
        for path, module in model.named_modules()  # a module with two names once: torch would not put its tensors back
        for name, each in [*module._parameters.items(), *module._buffers.items()]
        if id(each) in others
    }
    return torch.func.functional_call(model, given, arguments, keywords, tie_weights=False)


def tensors_of(outputs: Any) -> dict[str, Tensor]:
    """Return the logits, else all tensors in the outputs of a model, an object that has some as attributes among them.

    Example:
        >>> tensors_of({"hidden": (torch.zeros(1), torch.ones(1)), "cache": object()})
        {'.hidden.0': tensor([0.]), '.hidden.1': tensor([1.])}
    """
    found = predictions(outputs)
    containers = (Tensor, Mapping, list, tuple)
    return dict(_tensors(found if isinstance(found, containers) else getattr(found, "__dict__", {}), ""))


def _tensors(value: Any, place: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, (Mapping, list, tuple)):
        for key, each in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _tensors(each, f"{place}.{key}")


def is_hooked(module: nn.Module) -> bool:
    """Return whether something else takes part in a module's forward pass."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
