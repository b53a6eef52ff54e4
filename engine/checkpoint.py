"""What a checkpoint holds: a fit as a tree of tensors and JSON, and back into a fresh one."""

from __future__ import annotations

import os
import random
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .algorithm import Algorithm
from .clock import Clock
from .engine import Engine
from .errors import CheckpointError, ThawlineError, warn, with_article
from .precision import Precision
from .pristine import Pristine
from .resume import OnChange, changes_of, check_same_run, differences
from .typing import Json

SCHEMA = 1


@contextmanager
def well_formed() -> Generator[None]:
    """Raise a CheckpointError for whatever fails inside, where a tree that was read is taken for what :func:`capture` made."""
    try:
        yield
    except ThawlineError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint does not hold what this version of thawline and these algorithms write: {error!r}"
        ) from error


def capture(
    engine: Engine,
    precision: Precision,
    *,
    settings: Mapping[str, Any],
    extra: Mapping[str, Any],
    pristine: Pristine | None = None,
) -> dict[str, Any]:
    """Return everything that the next batch depends on.

    Args:
        engine: The engine, with state, ledger and algorithms.
        precision: Its gradient scaler is part of the fit.
        settings: The Trainer's description; compared on resume.
        extra: What the loop itself needs: history, running sums, timeline.
        pristine: The tensors as the fit found them, of which fingerprints are enough; None to hold every tensor.
    """
    state = engine.state
    known = {} if pristine is None else pristine.fingerprints(state.ledger)
    return {
        "schema": SCHEMA,
        "clock": state.clock.to_json(),
        "duration": str(state.duration),
        "settings": dict(settings),
        "environment": environment(state.model),
        "ledger": state.ledger.state_dict(),
        "model": {name: each for name, each in weights_of(state.model).items() if name not in known},
        "buffers": {name: each for name, each in _passing_buffers(state.model).items() if name not in known},
        "fingerprints": known,
        "evaluated": dict(engine.evaluated_weights()),
        "algorithms": engine.state_dict(),
        "precision": precision.state_dict(),
        "metrics": dict(state.metrics),
        "logged": dict(state.logged),
        "stop_reason": state.stop_reason,
        "extra": dict(extra),
        "rng": rng_state(state.model),
    }


def restore(
    tree: Mapping[str, Any],
    engine: Engine,
    precision: Precision,
    *,
    settings: Mapping[str, Any],
    pristine: Pristine | None = None,
    on_change: OnChange = "refuse",
) -> dict[str, Any]:
    """Make a fresh fit what :func:`capture` saw, random number generators last; return its ``extra``.

    Args:
        tree: What :func:`capture` returned.
        engine: The fresh fit's engine.
        precision: Its precision.
        settings: The Trainer's description.
        pristine: The fresh model's tensors, if they were looked at before.
        on_change: ``"migrate"`` lets algorithms, schedule and ``min_lr`` be others. Algorithms that are the same keep
            their state. Holds, factors, schedules and rates of those that are gone or changed are released. Those that
            are new or changed are given FIT_START at the clock of the checkpoint.

    Raises:
        CheckpointError: The checkpoint belongs to another kind of run, or another model; the message says what differs.
            Nothing has been changed then.

    Warns:
        ThawlineWarning: For each setting that differs and may, and for each change of the environment.
    """
    state, migrate = engine.state, on_change == "migrate"
    with well_formed():
        _check_fits(tree, engine, settings=settings, pristine=pristine, migrate=migrate)
        changed = list(differences(tree["settings"], settings, tree["ledger"], state.ledger.state_dict()))
        if difference := engine.difference(tree["algorithms"]):
            changed.append(
                f"resumed with other algorithms: {difference}. What is new starts here, what is gone lets go."
            )
        changed += changes_of(tree["environment"], environment(state.model))
    for each in changed:
        warn(each)
    with well_formed():
        new = _load(tree, engine, precision, migrate=migrate)
    if new:
        engine.begin(new)
    state.ledger.apply_lr(state.clock)
    with well_formed():
        restore_rng(tree["rng"])
        return dict(tree["extra"])


def _load(tree: Mapping[str, Any], engine: Engine, precision: Precision, *, migrate: bool) -> tuple[Algorithm, ...]:
    """Put back everything but the random generators; return the algorithms that are new."""
    state = engine.state
    state.ledger.load_state_dict(tree["ledger"])
    put_weights(state.model, tree["model"], tree["fingerprints"])
    for name, buffer in _passing_buffers(state.model).items():
        if name in tree["buffers"] and tree["buffers"][name].shape == buffer.shape:
            buffer.copy_(tree["buffers"][name])
    new = engine.load_state_dict(tree["algorithms"], migrate=migrate)
    precision.load_state_dict(tree["precision"])
    state.clock = state.ledger.clock = Clock.from_json(tree["clock"])
    state.metrics, state.logged = dict(tree["metrics"]), dict(tree["logged"])
    for owner in engine.gone(tree["algorithms"]):
        state.ledger.dismiss(owner)
    return new


def _check_fits(
    tree: Mapping[str, Any],
    engine: Engine,
    *,
    settings: Mapping[str, Any],
    pristine: Pristine | None,
    migrate: bool,
) -> None:
    """Raise a CheckpointError where the fresh fit cannot go on from the checkpoint."""
    state = engine.state
    if tree.get("schema") != SCHEMA:
        raise CheckpointError(f"the checkpoint has schema {tree.get('schema')!r}, this version reads {SCHEMA}.")
    if not migrate:
        engine.check_same(tree["algorithms"])
    check_same_run(tree["settings"], settings, tree["ledger"], state.ledger.state_dict(), migrate=migrate)
    length, saved_length = state.clock.batches_per_epoch, tree["clock"]["batches_per_epoch"]
    if length != saved_length:
        raise CheckpointError(
            f"the run was saved with {saved_length} batches an epoch, and the loader gives {length} now: where to go on is "
            "not defined. Give the same data and batch size, or start anew in another run_dir."
        )
    if tree["fingerprints"]:
        (Pristine(state.model) if pristine is None else pristine).check(tree["fingerprints"])


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


def put_weights(model: nn.Module, weights: Mapping[str, Tensor], present: Collection[str] = ()) -> None:
    """Copy weights into a model, in place.

    Args:
        model: The model.
        weights: By name.
        present: Names that the model has already as they shall be.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    try:
        found = model.load_state_dict(dict(weights), strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint's weights are not this model's: {error}") from error
    missing = [name for name in found.missing_keys if name not in present]
    if missing or found.unexpected_keys:
        raise CheckpointError(
            f"the checkpoint's weights are not this model's: it lacks {missing[:3]}, and the model has no "
            f"{found.unexpected_keys[:3]}. Build the model as in the run that was saved."
        )


def environment(model: nn.Module) -> dict[str, Any]:
    """Return what bit-exactness depends on besides checkpoint and settings."""
    cuda = next(model.parameters()).device.type == "cuda"
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "world": int(os.environ.get("WORLD_SIZE") or 1),
        "processor": torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


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


def plain_rng(state: Mapping[str, Any]) -> dict[str, Json]:
    """Return what :func:`rng_state` returned as JSON, to be sent to another process."""
    version, words, gauss = state["python"]
    kind, keys, *rest = state["numpy"]
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": state["torch"].tolist(),
        **({"cuda": [each.tolist() for each in state["cuda"]]} if "cuda" in state else {}),
    }


def rng_of(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Invert :func:`plain_rng`."""
    version, words, gauss = plain["python"]
    kind, keys, *rest = plain["numpy"]
    state: dict[str, Any] = {
        "python": (version, tuple(words), gauss),
        "numpy": (kind, np.array(keys, dtype=np.uint32), *rest),
        "torch": torch.tensor(plain["torch"], dtype=torch.uint8),
    }
    if "cuda" in plain:
        state["cuda"] = [torch.tensor(each, dtype=torch.uint8) for each in plain["cuda"]]
    return state


def restore_rng(state: Mapping[str, Any]) -> None:
    """Set the generators that :func:`rng_state` read; of an empty state none."""
    if not state:
        return
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
