"""What a checkpoint holds: a fit as a tree of tensors and JSON, and back into a fresh one."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from .clock import Clock
from .engine import Engine
from .errors import CheckpointError, warn, with_article
from .log import get_logger
from .precision import Precision
from .resume import check_same_run, differences

SCHEMA = 1
log = get_logger(__name__)

# What a difference in each means for a resumed run.
_MEANING = {
    "torch": "another version's kernels may round differently",
    "threads": "sums are split differently over another number of threads",
}


def capture(
    engine: Engine, precision: Precision, *, settings: Mapping[str, Any], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Return everything that the next batch depends on.

    Args:
        engine: The engine, with state, ledger and algorithms.
        precision: Its gradient scaler is part of the fit.
        settings: The Trainer's description; compared on resume.
        extra: What the loop itself needs: history, running sums, timeline.
    """
    state = engine.state
    return {
        "schema": SCHEMA,
        "clock": attrs.asdict(state.clock),
        "duration": str(state.duration),
        "settings": dict(settings),
        "environment": environment(),
        "ledger": state.ledger.state_dict(),
        "model": weights_of(state.model),
        "buffers": _passing_buffers(state.model),
        "algorithms": engine.state_dict(),
        "precision": precision.state_dict(),
        "metrics": dict(state.metrics),
        "logged": dict(state.logged),
        "stop_reason": state.stop_reason,
        "extra": dict(extra),
        "rng": rng_state(state.model),
    }


def restore(
    tree: Mapping[str, Any], engine: Engine, precision: Precision, *, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Make a fresh fit what :func:`capture` saw, random number generators last; return its ``extra``.

    Raises:
        CheckpointError: The checkpoint belongs to another kind of run; the message says what differs. Nothing has
            been changed then.

    Warns:
        ThawlineWarning: For each setting that differs and may.
    """
    state = engine.state
    if tree.get("schema") != SCHEMA:
        raise CheckpointError(f"the checkpoint has schema {tree.get('schema')!r}, this version reads {SCHEMA}.")
    compared = tree["settings"], settings, tree["ledger"], state.ledger.state_dict()
    engine.check_same(tree["algorithms"])
    check_same_run(*compared)
    _compare_environment(tree["environment"], environment())
    length, saved_length = state.clock.batches_per_epoch, tree["clock"]["batches_per_epoch"]
    if length != saved_length:
        raise CheckpointError(
            f"the run was saved with {saved_length} batches an epoch, and the loader gives {length} now: where to go on is "
            "not defined. Give the same data and batch size, or start anew in another run_dir."
        )
    for difference in differences(*compared):
        warn(difference)
    state.ledger.load_state_dict(tree["ledger"])
    load_weights(state.model, tree["model"])
    for name, buffer in _passing_buffers(state.model).items():
        if name in tree["buffers"] and tree["buffers"][name].shape == buffer.shape:
            buffer.copy_(tree["buffers"][name])
    engine.load_state_dict(tree["algorithms"])
    precision.load_state_dict(tree["precision"])
    state.clock = state.ledger.clock = Clock(**tree["clock"])
    state.metrics, state.logged = dict(tree["metrics"]), dict(tree["logged"])
    state.ledger.apply_lr(state.clock)
    restore_rng(tree["rng"])
    return dict(tree["extra"])


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name.

    Raises:
        CheckpointError: The model keeps something else than tensors in its state dict.
    """
    weights = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name!r} in the model's state dict is {with_article(type(value).__name__)}, and checkpoints hold tensors. "
                "Keep it in a buffer, or derive it from the model's arguments."
            )
        weights[name] = value.detach()
    return weights


def _passing_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that are no part of the state dict, on which the next batch may depend all the same."""
    persistent = model.state_dict()
    return {name: each for name, each in model.named_buffers() if name not in persistent}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a model, in place.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    try:
        model.load_state_dict(dict(weights), strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint's weights are not this model's: {error}") from error


def environment() -> dict[str, Any]:
    """Return what bit-exactness depends on besides checkpoint and settings."""
    return {"torch": str(torch.__version__), "threads": torch.get_num_threads()}


def rng_state(model: nn.Module) -> dict[str, Any]:
    """Return the state of every generator that a model may draw from: Python's, NumPy's, torch's, the device's."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - the global generator is what a model would draw from
        "torch": torch.get_rng_state(),
    }
    if next(model.parameters()).device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_rng(state: Mapping[str, Any]) -> None:
    """Set the generators that :func:`rng_state` read."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002 - as above
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_everything(seed: int) -> None:
    """Seed the global generators, which are the model's alone during a fit."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - as above
    torch.manual_seed(seed)


def _compare_environment(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key, value in now.items():
        if saved.get(key) != value:
            log.warning(
                "resumed in another environment: not bit-exact",
                what=key,
                saved=saved.get(key),
                now=value,
                meaning=_MEANING[key],
            )
