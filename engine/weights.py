"""The weights of a checkpoint, without the run: into a model, or into a file that anybody reads."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from .checkpoint import SCHEMA, check_weights, put_buffers, put_weights, well_formed
from .errors import ArgumentError, CheckpointError
from .pristine import Pristine
from .replay import replayed
from .rundir import load_checkpoint
from .settings import path_of
from .snapshot import sync_directory
from .tensorfile import pieces_of
from .unlisted import replace_buffers

Which = Literal["evaluated", "live"]


def load_weights(path: str | Path, model: nn.Module, weights: Which = "evaluated") -> None:
    """Put the weights of a checkpoint into a model, in place.

    Args:
        path: A checkpoint such as ``result.best``, or a run's directory, which means its newest one.
        model: The model as it was before the fit; what the fit attached to it, such as adapters, is attached again.
        weights: ``"evaluated"``: those that evaluations ran with and the metrics of the checkpoint belong to, which are the
            averages where an :class:`~thawline.algorithms.EMA` was there. ``"live"``: those that training would go on with.

    Raises:
        CheckpointError: No checkpoint, a damaged one, or one of another model, which is left as it was.
        ArgumentError: A wrong argument.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> from thawline.engine import Trainer
        >>> batches = [(torch.randn(4, 3), torch.zeros(4, 1))] * 5
        >>> model, fresh = nn.Linear(3, 1), nn.Linear(3, 1)
        >>> with TemporaryDirectory() as folder:
        ...     trainer = Trainer(loss_fn=nn.functional.mse_loss, run_dir=folder, progress=False)
        ...     result = trainer.fit(model, batches, duration="1ep")
        ...     load_weights(result.last, fresh)
        >>> torch.equal(model.weight, fresh.weight)
        True
    """
    tree = _tree(path, weights, f"load_weights({{!r}}, model, weights={weights!r})")
    if not isinstance(model, nn.Module):
        example = "load_weights(result.best, model)"
        raise ArgumentError("load_weights(model=)", got=model, takes="a torch.nn.Module", example=example)
    with well_formed():
        if tree["fingerprints"]:
            Pristine(model).check(tree["fingerprints"])
        chosen = _chosen(tree, weights)
        with replayed(model, tree["ledger"]["journal"]):
            check_weights(model, chosen, tree["fingerprints"], tree["reshaped"])
        replace_buffers(model, tree["reshaped"], chosen | tree["buffers"])
        put_weights(model, chosen, tree["fingerprints"])
        put_buffers(model, tree["buffers"])


def export(path: str | Path, file: str | Path, *, weights: Which = "evaluated", model: nn.Module | None = None) -> Path:
    """Write the weights of a checkpoint as a plain state dict in one safetensors file.

    It holds the names of the fitted model's state dict: where adapters were attached, the weights they stand beside
    as they are without them, and the adapters' own.

    Args:
        path: A checkpoint such as ``result.best``, or a run's directory, which means its newest one.
        file: The new file, which ends in ``.safetensors``; its folders are made, and an existing one is not overwritten.
        weights: As for :func:`load_weights`.
        model: The model that the run began with, for a checkpoint that holds fingerprints of what did not train.

    Returns:
        The file.

    Raises:
        CheckpointError: No checkpoint, a damaged one, one with fingerprints and no ``model``; or the file exists already or
            cannot be written.
        ArgumentError: A wrong argument.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> from safetensors.torch import load_file
        >>> from thawline.engine import Trainer
        >>> batches = [(torch.randn(4, 3), torch.zeros(4, 1))] * 5
        >>> with TemporaryDirectory() as folder:
        ...     trainer = Trainer(loss_fn=nn.functional.mse_loss, run_dir=folder, progress=False)
        ...     result = trainer.fit(nn.Linear(3, 1), batches, duration="1ep")
        ...     sorted(load_file(export(folder, f"{folder}/model.safetensors")))
        ['bias', 'weight']
    """
    tree = _tree(path, weights, f"export({{!r}}, {str(file)!r}, weights={weights!r})")
    target = _target(file)
    with well_formed():
        chosen = _chosen(tree, weights)
        if tree["fingerprints"]:
            chosen |= _brought(tree["fingerprints"], model, call=f"export({str(path)!r}, {str(file)!r}, model=model)")
    _write_new(target, {name: each.contiguous() for name, each in chosen.items()})
    return target


def _target(file: str | Path) -> Path:
    target = path_of("export(file=)", file, "export(result.best, 'model.safetensors')")
    if target.suffix.lower() != ".safetensors":
        example = (
            f"export(result.best, {str(target.with_suffix('.safetensors') if target.name else 'model.safetensors')!r})"
        )
        takes = "a file that ends in '.safetensors', the format it writes"
        raise ArgumentError("export(file=)", got=str(file), takes=takes, example=example)
    return target


def _tree(path: str | Path, weights: Which, call: str) -> dict[str, Any]:
    name = call.partition("(")[0]
    if weights not in ("evaluated", "live"):
        example = call.replace(repr(weights), "'live'").format("runs/first")
        raise ArgumentError(f"{name}(weights=)", got=weights, takes="'evaluated' or 'live'", example=example)
    if not isinstance(path, (str, Path)):
        takes = "the path of a checkpoint or of a run's directory"
        raise ArgumentError(f"{name}(path=)", got=path, takes=takes, example=call.format("runs/first"))
    found, tree = load_checkpoint(Path(path), call=call)
    if not isinstance(tree, dict) or tree.get("schema") != SCHEMA:
        raise CheckpointError(f"{found} is not a checkpoint of a fit.")
    return tree


def _chosen(tree: Mapping[str, Any], weights: Which) -> dict[str, Tensor]:
    """Return the state dict by name; an average goes under every name of a tied weight, in the weight's own dtype."""
    live: dict[str, Tensor] = dict(tree["model"])
    if weights == "live":
        return live
    averages = {id(live[name]): each.to(live[name].dtype) for name, each in tree["evaluated"].items() if name in live}
    return {name: averages.get(id(each), each) for name, each in live.items()}


def _brought(fingerprints: Mapping[str, str], model: nn.Module | None, *, call: str) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint holds fingerprints of, from the model that the run began with."""
    if model is None:
        raise CheckpointError(
            f"the checkpoint holds only fingerprints of {len(fingerprints)} tensors that had not trained. Give the model that "
            f"the run began with: {call}"
        )
    Pristine(model).check(fingerprints)
    return {name: each.detach().cpu() for name, each in model.state_dict().items() if name in fingerprints}


def _write_new(target: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file that is there whole or not at all; link, unlike rename, never replaces one."""
    temporary = target.with_name(f".tmp-{target.name}-{secrets.token_hex(6)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"Cannot make {target.parent}: {error}. Give another file.") from error
    try:
        with temporary.open("xb") as opened:
            for piece in pieces_of(tensors):
                opened.write(piece)
            opened.flush()
            os.fsync(opened.fileno())
        os.link(temporary, target)
        sync_directory(target.parent)
    except FileExistsError as error:
        raise CheckpointError(f"There is a {target} already. Give another file, or delete it.") from error
    except OSError as error:
        raise CheckpointError(f"Cannot write {target}: {error}. Make room, or give another file.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
