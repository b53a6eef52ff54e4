"""What a checkpoint holds: a fit as a tree of tensors and JSON, and back into a fresh one."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .algorithm import Algorithm
from .clock import Clock
from .codec import flatten, unflatten
from .engine import Engine
from .errors import CheckpointError, ThawlineError, warn, with_article
from .expanded import can_hold, is_expanded, put
from .precision import Precision
from .pristine import Pristine
from .replay import journal_of, replayed
from .resume import OnChange, changes_of, check_same_run, differences
from .shards import computes_on, is_sharded, shard_like
from .typing import Json
from .unlisted import (
    LOSS,
    Shapes,
    changed_constants,
    check_loss,
    generator_states,
    generators_of,
    loss_tensors,
    passing_buffers,
    replace_buffers,
    reshaped,
    restore_generators,
)

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
    found: Shapes,
    pristine: Pristine | None = None,
    loss: nn.Module | None = None,
) -> dict[str, Any]:
    """Return everything that the next batch depends on.

    Args:
        engine: The engine, with state, ledger and algorithms.
        precision: Its gradient scaler is part of the fit.
        settings: The Trainer's description; compared on resume.
        extra: What the loop itself needs: history, running sums, timeline.
        found: What :func:`buffer_shapes` returned when the fit began.
        pristine: The tensors as the fit found them, of which fingerprints are enough; None to hold every tensor.
        loss: The loss, where it is a module.
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
        "buffers": {name: each for name, each in passing_buffers(state.model).items() if name not in known},
        "reshaped": reshaped(state.model, found),
        "loss": loss_tensors(loss),
        "fingerprints": known,
        "evaluated": dict(engine.evaluated_weights()),
        "algorithms": engine.state_dict(),
        "precision": precision.state_dict(),
        "metrics": dict(state.metrics),
        "logged": dict(state.logged),
        "stop_reason": state.stop_reason,
        "extra": dict(extra),
        "rng": rng_state(state.model, loss),
    }


def restore(
    tree: Mapping[str, Any],
    engine: Engine,
    precision: Precision,
    *,
    settings: Mapping[str, Any],
    found: Shapes,
    pristine: Pristine | None = None,
    loss: nn.Module | None = None,
    on_change: OnChange = "refuse",
    built: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Make a fresh fit what :func:`capture` saw, random number generators last; return its ``extra``.

    Args:
        tree: What :func:`capture` returned.
        engine: The fresh fit's engine.
        precision: Its precision.
        settings: The Trainer's description.
        found: As for :func:`capture`.
        pristine: The fresh model's tensors, if they were looked at before.
        loss: The loss, where it is a module. What another loss kept is left out.
        on_change: ``"migrate"`` lets algorithms, schedule and ``min_lr`` be others. Algorithms that are the same keep
            their state. Holds, factors, schedules and rates of those that are gone or changed are released. Those that
            are new or changed are given FIT_START at the clock of the checkpoint.
        built: Called once what was attached is attached again, before values are loaded.

    Raises:
        CheckpointError: The checkpoint belongs to another kind of run, or another model; the message says what differs.
            Nothing has been changed then.

    Warns:
        ThawlineWarning: For each setting that differs and may, and for each change of the environment.
    """
    state, migrate = engine.state, on_change == "migrate"
    same_loss = tree["settings"].get("loss_fn") == settings.get("loss_fn")
    with well_formed():
        _check_fits(tree, engine, settings=settings, pristine=pristine, migrate=migrate)
        moved = {*tree["reshaped"], *reshaped(state.model, found)}
        _check_model(tree, state.model, moved)
        if same_loss:
            check_loss(tree["loss"], loss)
        changed = list(differences(tree["settings"], settings, tree["ledger"], state.ledger.state_dict()))
        if difference := engine.difference(tree["algorithms"]):
            changed.append(
                f"resumed with other algorithms: {difference}. What is new starts here, what is gone lets go."
            )
        changed += changes_of(tree["environment"], environment(state.model))
        changed += changed_constants(tree["loss"], loss) if same_loss else ()
        changed += _lost_generators(tree["rng"], state.model, loss if same_loss else None)
    for each in changed:
        warn(each)
    if built is not None:
        with well_formed():
            state.ledger.replay(tree["ledger"]["journal"])
        built()
    with well_formed():
        replace_buffers(state.model, moved, tree["model"] | tree["buffers"])
        new = _load(tree, engine, precision, migrate=migrate)
        for name, own in loss_tensors(loss).items() if same_loss else ():
            put(own, tree["loss"][name])
    if new:
        engine.begin(new)
    with well_formed():
        restore_rng(tree["rng"], state.model, loss if same_loss else None)
        return dict(tree["extra"])


def _load(tree: Mapping[str, Any], engine: Engine, precision: Precision, *, migrate: bool) -> tuple[Algorithm, ...]:
    """Put back everything but the random generators; return the algorithms that are new."""
    state = engine.state
    state.ledger.load_state_dict(tree["ledger"])
    put_weights(state.model, tree["model"], tree["fingerprints"])
    put_buffers(state.model, tree["buffers"])
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


def _check_model(tree: Mapping[str, Any], model: nn.Module, moved: Collection[str]) -> None:
    """Raise where the model cannot take what was saved, with what the fit attached put on for the check and taken off again."""
    attached = journal_of(model)
    if attached and attached != tree["ledger"]["journal"]:  # the ledger takes it off first, as where a fit rolls back
        return
    with replayed(model, tree["ledger"]["journal"], keep=False):
        saved, now = list(tree["ledger"]["parameters"]), [name for name, _ in model.named_parameters()]
        if saved != now:
            wrong = [f"{name!r} is missing" for name in saved if name not in now]
            wrong += [f"{name!r} is not in the checkpoint" for name in now if name not in saved]
            raise _other_model(wrong or ["its parameters come in another order"])
        check_weights(model, tree["model"], tree["fingerprints"], moved, exact=True)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name.

    Raises:
        CheckpointError: The model keeps something else than tensors in its state dict.
    """
    weights = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name!r} in the model's state dict is {with_article(type(value).__name__)}, and checkpoints hold tensors. "
                "Keep it in a buffer, or derive it from the model's arguments."
            )
        weights[name] = value if is_sharded(value) else value.detach()
    return weights


def check_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    present: Collection[str] = (),
    moved: Collection[str] = (),
    *,
    exact: bool = False,
) -> None:
    """Raise a CheckpointError where :func:`put_weights` could not put them all, before any is.

    Args:
        model: The model.
        weights: By name.
        present: Names that the model has already as they shall be.
        moved: Names of buffers that :func:`replace_buffers` makes fit before.
        exact: Whether their dtypes have to be the model's, too.
    """
    here = model.state_dict()
    wrong = [f"{name!r} is missing" for name in weights if name not in here and name not in moved]
    wrong += [
        f"{name!r} is not in the checkpoint"
        for name in here
        if not any(name in each for each in (weights, present, moved))
    ]
    plain = _loaded_plainly(model)
    for name, each in weights.items():
        if name in moved or name not in here or name.rpartition(".")[0] not in plain:
            continue
        now = here[name]
        if now.shape != each.shape:
            wrong.append(f"{name!r} has shape {tuple(now.shape)} instead of {tuple(each.shape)}")
        elif exact and now.dtype != each.dtype:
            wrong.append(f"{name!r} is of {now.dtype} instead of {each.dtype}")
        elif not can_hold(now, each):
            wrong.append(f"{name!r} is an expanded tensor, whose elements share memory, and the saved ones differ")
    if wrong:
        raise _other_model(wrong)


def _loaded_plainly(model: nn.Module) -> frozenset[str]:
    """Return the names of the modules that load tensors as torch does, and do not reshape or rename them on the way."""
    if model._load_state_dict_pre_hooks:
        return frozenset()
    return frozenset(
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module)._load_from_state_dict.__module__.startswith("torch.nn.")
        and not module._load_state_dict_pre_hooks
    )


def _other_model(wrong: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint's weights are not this model's: {'; '.join(wrong[:3])}. Build the model as it was before the fit."
    )


def put_weights(model: nn.Module, weights: Mapping[str, Tensor], present: Collection[str] = ()) -> None:
    """Copy weights into a model, in place.

    Args:
        model: The model.
        weights: By name.
        present: Names that the model has already as they shall be.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    shared = {name: each for name, each in model.state_dict().items() if name in weights and is_expanded(each)}
    for name, each in shared.items():
        put(each, weights[name])
    here = model.state_dict()
    given = {name: _laid_out(each, here.get(name)) for name, each in weights.items() if name not in shared}
    try:
        found = model.load_state_dict(given, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint's weights are not this model's: {error}") from error
    missing = [name for name in found.missing_keys if name not in present and name not in shared]
    if missing or found.unexpected_keys:
        raise _other_model(
            [f"{name!r} is not in the checkpoint" for name in missing]
            + [f"{name!r} is missing" for name in found.unexpected_keys]
        )


def _laid_out(tensor: Tensor, like: Tensor | None) -> Tensor:
    return tensor if like is None or like.shape != tensor.shape else shard_like(tensor, like)


def put_buffers(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Copy the buffers that are no part of the state dict into a model, where it has them in the same shape."""
    for name, buffer in passing_buffers(model).items():
        if name in saved and saved[name].shape == buffer.shape and can_hold(buffer, saved[name]):
            put(buffer, saved[name])


def _lost_generators(rng: Mapping[str, Any], model: nn.Module, loss: nn.Module | None) -> list[str]:
    """Return what to say of generators that were saved and are not there."""
    missing = rng.get("modules", {}).keys() - generators_of(model, loss).keys()
    lost = sorted(name for name in missing if loss is not None or not name.startswith(LOSS))
    said = (
        f"resumed without the random generator {', '.join(map(repr, lost[:1]))}, of which the checkpoint holds the state: what it "
        "draws is not what would have been. Make it where the module is made, in __init__."
    )
    return [said] if lost else []


def environment(model: nn.Module) -> dict[str, Any]:
    """Return what bit-exactness depends on besides checkpoint and settings."""
    cuda = computes_on(next(model.parameters())) == "cuda"
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "world": int(os.environ.get("WORLD_SIZE") or 1),
        "processor": torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def rng_state(model: nn.Module, loss: nn.Module | None = None) -> dict[str, Any]:
    """Return the state of every generator that a fit may draw from: Python's, NumPy's, torch's, the device's, the modules' own."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - the global generator is what a model would draw from
        "torch": torch.get_rng_state(),
        "modules": generator_states(model, loss),
    }
    if computes_on(next(model.parameters())) == "cuda":
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def plain_rng(state: Mapping[str, Any]) -> dict[str, Json]:
    """Return what :func:`rng_state` returned as JSON, to be sent to another process."""
    version, words, gauss = state["python"]
    kind, keys, *rest = state["numpy"]
    own, tree = flatten(state["modules"])
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": state["torch"].tolist(),
        "modules": [tree, {name: each.tolist() for name, each in own.items()}],
        **({"cuda": [each.tolist() for each in state["cuda"]]} if "cuda" in state else {}),
    }


def rng_of(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Invert :func:`plain_rng`."""
    version, words, gauss = plain["python"]
    kind, keys, *rest = plain["numpy"]
    tree, own = plain["modules"]
    state: dict[str, Any] = {
        "python": (version, tuple(words), gauss),
        "numpy": (kind, np.array(keys, dtype=np.uint32), *rest),
        "torch": torch.tensor(plain["torch"], dtype=torch.uint8),
        "modules": unflatten({name: torch.tensor(each, dtype=torch.uint8) for name, each in own.items()}, tree),
    }
    if "cuda" in plain:
        state["cuda"] = [torch.tensor(each, dtype=torch.uint8) for each in plain["cuda"]]
    return state


def restore_rng(state: Mapping[str, Any], model: nn.Module, loss: nn.Module | None = None) -> None:
    """Set the generators that :func:`rng_state` read; of an empty state none."""
    if not state:
        return
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002 - as above
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    restore_generators(state["modules"], model, loss)


def seed_everything(seed: int) -> None:
    """Seed the global generators, which are the model's alone during a fit."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - as above
    torch.manual_seed(seed)
