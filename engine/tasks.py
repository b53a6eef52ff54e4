"""What the audited fits of the conformance kit train: models, data, optimizers and settings of which it is known what they come to."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from attrs import evolve, field, frozen
from torch import nn

from .account import Home
from .algorithm import Algorithm
from .checkpointing import Checkpointing
from .clock import Time
from .doubles import Audited, Transformer, uneven_loader
from .rehearsal import Rehearsal
from .schedules import Schedule, constant, cosine, join, linear, warmup
from .specimens import Specimen
from .unaided import Right, share_right
from .variants import other_calls, together

DECAYED: Mapping[str, Any] = {"lr": 0.01, "weight_decay": 0.05}
PLAIN: Mapping[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.02}
LEVEL: Mapping[str, Any] = {"lr": 0.004, "weight_decay": 0.0}
KEPT = 4
"""Batches between checkpoints that are kept for good, where not all are."""
_UNSIZED = ", on batches without a length and with an optimizer instance"


@frozen
class Task:
    """An audited fit, and what is known of it besides.

    Args:
        name: What faults are told of.
        make: Builds the algorithms.
        model: Builds the model.
        loader: What is trained on, and evaluated.
        optimizer: Returns what the Trainer is given, for a model.
        home_of: The rate and the options that a parameter has from there, by itself and, where it was attached, by what it stands beside.
        factor: What the schedule must give, from progress.
        own: Whether model and data are the kit's own.
        duration: Of the fit; the kit's own ends inside an epoch.
        min_lr: Below which no rate may fall.
        policy: When to save, and what to keep.
        kept_every: Batches between the checkpoints that this keeps for good, where it keeps one more; None where it keeps all.
        refusable: Whether an algorithm may refuse it by a typed error.
        settings: What else the Trainer is given.
    """

    name: str
    make: Callable[[], list[Algorithm]]
    model: Callable[[], nn.Module]
    loader: Iterable[Any]
    optimizer: Callable[[nn.Module], Any]
    home_of: Callable[[nn.Parameter, nn.Parameter | None], Home]
    factor: Callable[[float], float]
    own: bool
    duration: Time
    min_lr: float = 0.0
    policy: Checkpointing = field(
        factory=lambda: Checkpointing(every="2ba", keep=10_000, monitor="eval/loss", frozen="fingerprint")
    )
    kept_every: int | None = None
    refusable: bool = False
    settings: Mapping[str, Any] = field(factory=dict)

    def given(self, model: nn.Module) -> dict[str, Any]:
        """Return what the Trainer is given for a model."""
        metrics = {"metrics": {"share": share_right, "right": Right()}} if self.own else {}
        rest: dict[str, Any] = {"loader": self.loader, "duration": self.duration, "checkpoint": self.policy}
        rest |= {"min_lr": self.min_lr, "eval_every": "2ba", "on_nonfinite": "skip", "log_every": "3ba"}
        return {**metrics, **rest, "optimizer": self.optimizer(model), **self.settings}


def uneven(rehearsal: Rehearsal) -> Task:
    """Return a fit of uneven microbatches with two optimizers, ending inside an epoch."""
    own = rehearsal.own_task
    model = evolve(rehearsal, build_model=Audited).model if own else rehearsal.model
    flat = {each.ndim < 2 for each in model().parameters()}

    def home_of(parameter: nn.Parameter, _: nn.Parameter | None) -> Home:
        return PLAIN if (parameter.ndim < 2 if len(flat) > 1 else next(iter(flat))) else DECAYED

    parts = [
        (lambda _, each: each.ndim < 2, partial(torch.optim.SGD, **PLAIN)),
        (lambda _, each: each.ndim >= 2, partial(torch.optim.AdamW, **DECAYED)),
    ]
    optimizer: Any = parts if len(flat) > 1 else parts[not next(iter(flat))][1]
    given = Time(rehearsal.duration)
    samples = max(1, int(given.value * 22) - 9)
    return Task(
        name=rehearsal.name,
        make=rehearsal.make,
        model=model,
        loader=uneven_loader() if own else rehearsal.loader,
        optimizer=lambda _: optimizer,
        home_of=home_of,
        factor=lambda progress: 1.0 if progress < 0.5 else 1.0 - 0.9 * (2 * progress - 1),
        own=own,
        duration=Time(f"{samples}sp") if own and given.unit == "ep" else given,
        min_lr=0.004,
        settings={
            "schedule": join([constant(), linear(end=0.1)], [0.5]),
            "microbatch_size": 3 if own else None,
        },
    )


def unsized(rehearsal: Rehearsal) -> Iterator[Task]:
    """Yield a fit of batches of which nobody says how many there are, two a step, with an optimizer that a user made.

    First with as many other arguments as go together, then, for where these are refused, with the given ones.
    """
    own, given = rehearsal.own_task, Time(rehearsal.duration)
    duration = Time(f"{max(1, 3 * int(given.value) - 1)}ba") if own and given.unit == "ep" else given
    rise, schedule = _in_three_parts(duration)
    others = [_other_call(each) for each in rehearsal.make()]
    task = Task(
        name=f"{rehearsal.name}{_UNSIZED}",
        make=rehearsal.make,
        model=evolve(rehearsal, build_model=partial(Transformer, depth=3, dropout=0.1)).model
        if own
        else rehearsal.model,
        loader=Unsized(uneven_loader() if own else rehearsal.loader),
        optimizer=by_hand,
        home_of=lambda each, beside: LEVEL if (each if beside is None else beside).ndim < 2 else DECAYED,
        factor=partial(_rise_rest_and_fall, rise),
        own=own,
        duration=duration,
        policy=Checkpointing(every="2ba", keep=1, keep_every=f"{KEPT}ba", monitor="eval/loss"),
        kept_every=KEPT,
        refusable=True,
        settings={"schedule": schedule, "accumulate": 2 if own else 1},
    )
    if any(others):
        told = [
            repr(other) if other else type(each).__name__ for each, other in zip(rehearsal.make(), others, strict=True)
        ]
        yield evolve(task, name=f"{', '.join(told)}{_UNSIZED}", make=partial(_made, rehearsal, others))
    yield task


def _in_three_parts(duration: Time) -> tuple[float, Schedule]:
    """Return a schedule that rises, rests as long, and falls along half a cosine; and the share in which it rises."""
    if duration.unit != "ba" or duration.value < 3:
        return 0.25, warmup(0.25, join([constant(), cosine()], [1 / 3]))
    part = max(1, int(duration.value) // 4)
    return part / duration.value, warmup(f"{part}ba", join([constant(), cosine()], [f"{part}ba"]))


def _rise_rest_and_fall(rise: float, progress: float) -> float:
    """Return what its factor must be."""
    if progress < 2 * rise:
        return min(1.0, progress / rise)
    return 0.5 * (1.0 + math.cos(math.pi * (progress - 2 * rise) / (1.0 - 2 * rise)))


def by_hand(model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer over all but the first vector, which is to find its home beside the others of its kind."""
    vectors, matrices = vectors_and_matrices(model.parameters())
    groups = [{"params": vectors[1:] or vectors, **LEVEL}, {"params": matrices}]
    return torch.optim.AdamW([each for each in groups if each["params"]], **DECAYED)


def vectors_and_matrices(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters of fewer than two dimensions, and the others; those of no floating point have no rate.

    Example:
        >>> [len(kind) for kind in vectors_and_matrices(nn.Linear(3, 2).parameters())]
        [1, 1]
    """
    floating = [each for each in parameters if each.is_floating_point()]
    return [each for each in floating if each.ndim < 2], [each for each in floating if each.ndim >= 2]


def _made(rehearsal: Rehearsal, others: Sequence[Specimen | None]) -> list[Algorithm]:
    return [each if other is None else other() for each, other in zip(rehearsal.make(), others, strict=True)]


def _other_call(algorithm: Algorithm) -> Specimen | None:
    """Return a call of an algorithm's class with as many other arguments as go together; None where it takes no others."""
    return next(iter(together(other_calls(algorithm), algorithm)), None)


class Unsized:
    """Batches in turn, without a length.

    Args:
        loader: Where they come from.

    Example:
        >>> hasattr(Unsized([1, 2]), "__len__"), list(Unsized([1, 2]))
        (False, [1, 2])
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        """Yield them."""
        yield from self.loader


def layer_of(name: str) -> str:
    """Return the layer in which a parameter of the kit's own models lies.

    Example:
        >>> [layer_of(name) for name in ("embed.bias", "encoder.layers.1.norm1.bias", "head.lora_A")]
        ['stem', 'blocks[1]', 'head']
    """
    number = re.search(r"\.(\d+)\.", name)
    return f"blocks[{number[1]}]" if number else "stem" if name.startswith("embed.") else "head"
