"""What the next batch depends on and a model's state dict does not list: generators, a loss with state, passing buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn

from .errors import CheckpointError, shorten
from .ledger import replace_buffer
from .randomness import AnyGenerator, is_generator, restore_generator, state_of

Shapes: TypeAlias = dict[str, tuple[int, ...] | None]
LOSS = "Trainer(loss_fn=)"
"""What stands before the names of what a loss keeps: no module has such a name."""


def loss_module(loss_fn: object) -> nn.Module | None:
    """Return the module behind a loss function: itself, what a method belongs to, or what a ``functools.partial`` calls.

    Example:
        >>> loss = nn.CrossEntropyLoss()
        >>> loss_module(partial(loss.forward)) is loss, loss_module(nn.functional.cross_entropy)
        (True, None)
    """
    while isinstance(loss_fn, partial):
        loss_fn = loss_fn.func
    loss_fn = getattr(loss_fn, "__self__", loss_fn)
    return loss_fn if isinstance(loss_fn, nn.Module) else None


def generators_of(model: nn.Module, loss: nn.Module | None = None) -> dict[str, AnyGenerator]:
    """Return the random generators that modules keep as attributes, by name.

    Args:
        model: The model.
        loss: The loss, whose names begin with ``"Trainer(loss_fn=)."``.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> model[0].noise = torch.Generator()
        >>> list(generators_of(model))
        ['0.noise']
    """
    found: dict[str, AnyGenerator] = {}
    for prefix, root in (("", model), (LOSS, loss)):
        for path, module in () if root is None else root.named_modules(prefix=prefix):
            for name, value in vars(module).items():
                if is_generator(value):
                    found[f"{path}.{name}" if path else name] = value
    return found


def generator_states(model: nn.Module, loss: nn.Module | None) -> dict[str, Any]:
    """Return the states of :func:`generators_of`."""
    return {name: state_of(each) for name, each in generators_of(model, loss).items()}


def restore_generators(states: dict[str, Any], model: nn.Module, loss: nn.Module | None) -> None:
    """Put back what :func:`generator_states` returned, as far as the modules have such generators."""
    for name, each in generators_of(model, loss).items():
        if name in states:
            restore_generator(each, states[name])


def passing_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that are no part of the state dict, on which the next batch may depend all the same."""
    persistent = model.state_dict()
    return {name: each for name, each in model.named_buffers() if name not in persistent}


def buffer_shapes(model: nn.Module) -> Shapes:
    """Return the shape of every buffer by name; None of one that is registered and not there yet."""
    return {
        f"{path}.{name}" if path else name: None if buffer is None else tuple(buffer.shape)
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
    }


def reshaped(model: nn.Module, found: Shapes) -> Shapes:
    """Return the buffers that the model has replaced by ones of another shape, with the shapes they had when the fit began.

    Args:
        model: The model.
        found: What :func:`buffer_shapes` returned then.
    """
    now = buffer_shapes(model)
    return {name: shape for name, shape in found.items() if name in now and now[name] != shape}


def replace_buffers(model: nn.Module, names: Iterable[str], saved: Mapping[str, Tensor]) -> None:
    """Give the model buffers of the saved shapes, as it has done itself, for the saved values to be copied into."""
    device = next(model.parameters()).device
    places = [
        (model.get_submodule(path), own, saved.get(name)) for name in names for path, _, own in [name.rpartition(".")]
    ]
    for (module, own, value), buffer in [(place, place[0]._buffers[place[1]]) for place in places]:
        if value is None:
            replace_buffer(module, own, None)
        elif buffer is None or buffer.shape != value.shape:
            replace_buffer(module, own, value.to(device if buffer is None else buffer.device, copy=True))


def loss_tensors(loss: nn.Module | None) -> dict[str, Tensor]:
    """Return parameters and buffers of a loss by name, persistent or not."""
    if loss is None:
        return {}
    return {name: each.detach() for name, each in (*loss.named_parameters(), *loss.named_buffers())}


def check_loss(saved: dict[str, Tensor], loss: nn.Module | None) -> None:
    """Compare the names and shapes of a loss's tensors with the saved ones.

    Raises:
        CheckpointError: They differ; the message names the first that does.
    """
    here = loss_tensors(loss)
    for name in (*saved, *here):
        before, now = (tuple(each[name].shape) if name in each else None for each in (saved, here))
        if before != now:
            raise CheckpointError(
                f"the checkpoint's loss_fn is not this one: {name!r} was saved "
                f"{'not at all' if before is None else f'with shape {before}'}, and has "
                f"{'none' if now is None else f'shape {now}'} here. Build the loss as in the run that was saved."
            )


def changed_constants(saved: dict[str, Tensor], loss: nn.Module | None) -> Iterator[str]:
    """Yield what to say of tensors that torch's own losses never change, and that are given as others than were saved."""
    for path, module in () if loss is None else loss.named_modules():
        if type(module).__module__.startswith("torch.nn."):
            for name, value in module.named_buffers(prefix=path, recurse=False):
                if name in saved and not bool((saved[name].to(value.device) == value).all()):
                    yield (
                        f"resumed with another {name} of loss_fn: saved {_show(saved[name])}, given {_show(value)}. The saved one is "
                        "kept. To change it, start anew with fit(resume=False) and Trainer(run_dir=<another directory>)."
                    )


def untrained(loss: nn.Module | None) -> str | None:
    """Return what to say of a loss with parameters that ask for gradients; None where it has none."""
    names = [] if loss is None else [name for name, each in loss.named_parameters() if each.requires_grad]
    if not names:
        return None
    kind = type(loss).__name__
    return (
        f"loss_fn is a {kind} with parameters of its own, such as {names[0]!r}, and they do not train: a fit trains the model's. "
        f"Put it into the model, which then returns its loss, and write Trainer(loss_fn=None); or {kind}.requires_grad_(False)."
    )


def _show(value: Tensor) -> str:
    return shorten(value.tolist())
