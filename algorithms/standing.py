"""What the phases of a schedule have brought about: which parameters train, at which settings."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Mapping, Sequence
from typing import Any

import attrs

from .phases import Phase


@attrs.frozen
class Standing:
    """How a parameter trains once some phases have begun.

    Args:
        lr: Its base learning rate; None for the optimizer's.
        weight_decay: None for the optimizer's.
        factor: On its learning rate.
    """

    lr: float | None = None
    weight_decay: float | None = None
    factor: float = 1.0


def standing_after(
    phases: Sequence[Phase],
    select: Callable[[str], Sequence[str]],
    *,
    base_max_lr: float | None = None,
) -> dict[str, Standing]:
    """Return how each parameter trains in the last of ``phases``; what is not in the result is frozen.

    A phase first scales what trains, then freezes, then thaws. What it thaws begins anew, with a factor of 1.

    Args:
        phases: Those that have begun, in order.
        select: Returns the parameters that a selector means.
        base_max_lr: The base rate of what a phase after the first thaws without a rate.

    Example:
        >>> weight = lambda selector: [f"{selector}.weight"]
        >>> phases = [Phase(thaw="head", weight_decay=0.1), Phase(thaw="body", lr=1e-4, lr_scale=0.5)]
        >>> standing = standing_after(phases, weight)
        >>> standing["head.weight"], standing["body.weight"].lr
        (Standing(lr=None, weight_decay=0.1, factor=0.5), 0.0001)
        >>> more = [*phases, Phase(freeze="head", lr_scale=0.5), Phase(thaw=("tail", "stem"), lr={"stem": 1e-3})]
        >>> {name: (each.lr, each.factor) for name, each in standing_after(more, weight, base_max_lr=1e-5).items()}
        {'body.weight': (0.0001, 0.5), 'tail.weight': (1e-05, 1.0), 'stem.weight': (0.001, 1.0)}
        >>> standing_after(more[:1], weight, base_max_lr=1e-5)["head.weight"].lr  # not of the first phase
    """
    standing: dict[str, Standing] = {}
    for number, phase in enumerate(phases):
        if phase.lr_scale is not None:
            standing = {
                name: attrs.evolve(each, factor=each.factor * phase.lr_scale) for name, each in standing.items()
            }
        for selector in phase.freeze:
            for name in select(selector):
                standing.pop(name, None)
        rate = None if isinstance(phase.lr, Mapping) else phase.lr
        if rate is None and number:
            rate = base_max_lr
        for selector in phase.thaw:
            fresh = Standing(rate, phase.weight_decay)
            standing.update(dict.fromkeys(select(selector), fresh))
        for selector, lr in phase.lr.items() if isinstance(phase.lr, Mapping) else ():
            standing.update({name: attrs.evolve(standing[name], lr=lr) for name in select(selector)})
    return standing


def group_by(standing: Mapping[str, Standing], field: str) -> ItemsView[Any, list[str]]:
    """Return each value of a field with the parameters that have it.

    Example:
        >>> rates = {"a": Standing(lr=0.1), "b": Standing(), "c": Standing(lr=0.1)}
        >>> list(group_by(rates, "lr"))
        [(0.1, ['a', 'c']), (None, ['b'])]
    """
    found: dict[Any, list[str]] = {}
    for name, each in standing.items():
        found.setdefault(getattr(each, field), []).append(name)
    return found.items()
