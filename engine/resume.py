"""What a resumed fit is given and what was saved: what differs is refused, or said.

What defines the run cannot change on the way, and is refused. The rest may: what the Trainer is given is used, and what
the optimizer is given is not, as ``torch.optim.Optimizer.load_state_dict`` has it. Either way a warning names both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

from .algorithm import as_json
from .errors import CheckpointError, shorten
from .typing import Json

# Settings of the Trainer that a resumed fit takes as given, and what another value means.
_MAY_CHANGE = {
    "duration": "schedules and times in 'dur' follow it",
    "precision": "the arithmetic is another one",
    "microbatch_size": "the gradient is summed in other portions",
    "device": "another device's kernels round differently",
    "eval_every": "",
    "log_every": "",
    "loss_fn": "the run goes on towards another minimum",
    "forward_fn": "the run goes on with other outputs",
    "loss_weight": "microbatches are weighed otherwise",
    "metrics": "",
    "on_nonfinite": "",
}
# Settings that it takes as given only with on_change="migrate".
_MAY_MIGRATE = ("schedule", "min_lr")
# What another environment means.
_ENVIRONMENT = {
    "torch": "another version's kernels may round differently",
    "threads": "sums are split over another number of threads",
    "world": "gradients are summed over another number of processes",
    "processor": "another processor's kernels may round differently",
    "matmul": "products of matrices are rounded otherwise",
    "deterministic": "kernels that add up in any order may be used or not",
}
OnChange: TypeAlias = Literal["refuse", "migrate"]
_ANEW = "or start anew with fit(resume=False) and Trainer(run_dir=<another directory>)"


def check_same_run(
    settings: Mapping[str, Any],
    now: Mapping[str, Any],
    ledger: Mapping[str, Any],
    ledger_now: Mapping[str, Any],
    *,
    migrate: bool = False,
) -> None:
    """Raise a CheckpointError where what defines the run differs.

    Args:
        settings: The Trainer's description that was saved.
        now: The Trainer's description.
        ledger: The ledger's state that was saved.
        ledger_now: The fresh ledger's state.
        migrate: Whether the schedule and its floor may change.

    Raises:
        CheckpointError: Names each setting with the saved and the given value, and what to write.
    """
    keys = (*(() if migrate else _MAY_MIGRATE), "seed", "accumulate")
    pairs = {key: (settings.get(key), now.get(key)) for key in keys}
    pairs["optimizer"] = (_optimizers(ledger), _optimizers(ledger_now))
    changed = [f"{key}: saved {before!r}, given {after!r}" for key, (before, after) in pairs.items() if before != after]
    moved = _moved(ledger, ledger_now)
    if moved is not None:
        name, before, after = moved
        changed.append(f"layers: {name!r} was saved in {before!r}, given in {after!r}")
    if changed:
        soft = all(each.startswith(_MAY_MIGRATE) for each in changed)
        migrating = "let them change with fit(on_change='migrate'), " if soft else ""
        raise CheckpointError(
            f"the run cannot be continued with other settings: {'; '.join(changed)}. Give the same as before, "
            f"{migrating}{_ANEW}."
        )


def differences(
    settings: Mapping[str, Any], now: Mapping[str, Any], ledger: Mapping[str, Any], ledger_now: Mapping[str, Any]
) -> Iterator[str]:
    """Yield what to say of each setting that differs and may: the name, the saved and the given value, which is used.

    Args:
        settings: The Trainer's description that was saved.
        now: The Trainer's description.
        ledger: The ledger's state that was saved.
        ledger_now: The fresh ledger's state.
    """
    for key, meaning in {**dict.fromkeys(_MAY_MIGRATE, "rates follow it from here on"), **_MAY_CHANGE}.items():
        if settings.get(key) != now.get(key):
            used = "The given one is used" + (f": {meaning}." if meaning else ".")
            yield f"resumed with another {key}: saved {_show(settings.get(key))}, given {_show(now.get(key))}. {used}"
    kept = (
        "The saved one is kept, as Optimizer.load_state_dict keeps it. To use the given one, begin another run from the weights: "
        "load_weights(<checkpoint>, model), and Trainer(run_dir=<another directory>). A rate alone an algorithm can change: "
        "state.ledger.set_lr('*', <rate>, owner=self.owner), with fit(on_change='migrate')."
    )
    for number, (saved, given) in enumerate(zip(ledger["homes"], ledger_now["homes"], strict=False)):
        before, after = _options(saved), _options(given)
        group = f" of group {number}" if len(ledger["homes"]) > 1 else ""
        for key in [key for key in {**before, **after} if before.get(key) != after.get(key)]:
            yield (
                f"resumed with another {key}{group} of {_optimizers(ledger)}: saved {_show(before.get(key))}, given "
                f"{_show(after.get(key))}. {kept}"
            )
    there, here = ledger["home_of"], ledger_now["home_of"]
    for name in [name for name in here if there.get(name, here[name]) != here[name]][:1]:
        yield f"resumed with another optimizer group of {name!r}: saved {there[name]}, given {here[name]}. {kept}"
    frozen, frozen_now = ledger["given_frozen"], ledger_now["given_frozen"]
    for name in [name for name in ledger_now["parameters"] if (name in frozen) != (name in frozen_now)][:1]:
        saved_so, given_so = ("frozen" if name in each else "training" for each in (frozen, frozen_now))
        yield f"resumed with another requires_grad of {name!r}: saved {saved_so}, given {given_so}. The saved one is kept, {_ANEW}."


def changes_of(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield what to say of each part of the environment that differs: the saved and the present value, what it means.

    Args:
        saved: The environment that was saved.
        now: The present one.
    """
    for key, meaning in _ENVIRONMENT.items():
        if saved.get(key) != now[key]:
            yield (
                f"resumed in another environment: {key} was {_show(saved.get(key))}, is {_show(now[key])}: {meaning}, so what "
                "follows is not bit for bit what would have been."
            )


def _optimizers(ledger: Mapping[str, Any]) -> str:
    return ", ".join(ledger["optimizers"])


def _options(home: Mapping[str, Any]) -> dict[str, Json]:
    return {"lr": home["lr"], **{str(key): as_json(value) for key, value in home["given"].items()}}


def _moved(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Return the first parameter that lies in another layer, with the two; None for another model, which is refused later."""
    there, here = ({name: layer for layer, names in each["layers"].items() for name in names} for each in (saved, now))
    attached = tuple(f"{module}." if module else "" for module, *_ in saved["journal"])
    if here.keys() - there.keys() or any(not name.startswith(attached) for name in there.keys() - here.keys()):
        return None
    return next(((name, there[name], here[name]) for name in here if there[name] != here[name]), None)


def _show(value: object) -> str:
    """Show a setting; a callable by its name."""
    if isinstance(value, dict) and value.keys() == {"callable"}:
        value = value["callable"]
    return value if isinstance(value, str) else shorten(value)
