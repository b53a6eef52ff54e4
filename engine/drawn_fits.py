"""The check of the conformance kit that draws fits: durations, schedules, optimizers, and how many batches make a step."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from attrs import define, evolve, field, frozen
from torch import nn

from .account import Account, Home
from .batches import batch_size_of
from .clock import Time
from .closed_forms import Stretch, factor_of, power_of_rest
from .doubles import tiny_loader
from .events import Event
from .homes import OptimizerLike
from .neighbor import Before
from .promises import REFUSALS, check, same, unless_alone
from .randomness import derive_seed
from .records import keeps
from .rehearsal import Outcome, Rehearsal, copied
from .resuming import goes_on
from .schedule import Schedule, as_schedule
from .schedules import FACTORIES, schedule_from_description
from .state import State
from .tasks import DECAYED, LEVEL, PLAIN, by_hand, vectors_and_matrices

_SAMPLES, _BATCH = 22, 8
_STEPS = 3
"""Of an epoch of the kit's own data, which is as many samples in steps of so many."""
_SHARES = (0.1, 0.25, 0.4)
_FACTORS = (0.0, 0.1, 0.5, 1.0)
_FUNCTION = f"{power_of_rest.__module__}.{power_of_rest.__qualname__}"


@check
def holds_in_drawn_fits(rehearsal: Rehearsal) -> None:
    """With other durations, schedules and optimizers, rates are the base rate, the schedule and the calls multiplied, and fits resume and go as planned."""
    for number in range(12 if rehearsal.thorough else 3):
        unless_alone(rehearsal, partial(_holds, number=number))


def _holds(rehearsal: Rehearsal, number: int) -> None:
    """Run a drawn fit, resumed as well, and hold its rates against the closed form of its schedule."""
    own, seed = rehearsal.own_task, derive_seed(rehearsal.seed, rehearsal.name)
    fit = drawn(seed, number, samples=_BATCH if own else batch_size_of(rehearsal.batches()[0]), own=own)
    schedule = checked(fit)
    other = evolve(
        rehearsal,
        loader=tiny_loader(_SAMPLES, _BATCH // fit.accumulate) if own else rehearsal.loader,
        duration=str(fit.duration),
        settings={
            "schedule": schedule,
            "accumulate": fit.accumulate,
            "min_lr": fit.min_lr,
            "eval_every": fit.every,
        },
        optimizer=_OPTIMIZERS[fit.optimizer][0],
    )
    other.name = (
        f"{rehearsal.name}, in a fit of {fit.duration} with schedule={schedule!r}, min_lr={fit.min_lr}, "
        f"accumulate={fit.accumulate} and {fit.optimizer} as optimizer"
    )
    with tempfile.TemporaryDirectory() as folder:
        watch = _Watch(other, fit)
        try:
            whole, paths = watch.run(Path(folder) / "run")
        except REFUSALS:
            _Watch(other.alone(), fit).run(Path(folder) / "alone")  # whose refusal it would be else
            return
        watch.check_told(whole)
        for path in paths[-2:-1]:
            goes_on(other, whole, path, [Before(lambda *_: None), *other.make()])
    if number == 0 or rehearsal.thorough:
        keeps(other, other.duration, whole, counts=False)


# -- what is drawn -----------------------------------------------------------------------------------------------------


@frozen
class Drawn:
    """A fit to be held against what is known of it.

    Args:
        duration: How long it lasts.
        written: The schedule of its rates, as it must describe itself.
        accumulate: Batches of the loader to one step.
        optimizer: One of the kinds in this module.
        min_lr: Below which no rate falls.
        every: Between its checkpoints.
    """

    duration: Time
    written: Mapping[str, Any]
    accumulate: int
    optimizer: str
    min_lr: float
    every: str

    def factor(self, progress: float) -> float:
        """Return what the schedule must give at a progress, which is a fraction of few batches or samples."""
        return factor_of(self.written, Stretch(Fraction(progress).limit_denominator(10**7), self.share))

    def share(self, time: Time) -> Fraction:
        """Return what share of the duration a time is."""
        steps = {"ep": _STEPS, "ba": 1} if time.unit != self.duration.unit else {time.unit: 1}
        return Fraction(int(time.value) * steps[time.unit], int(self.duration.value) * steps[self.duration.unit])


def drawn(seed: int, number: int, *, samples: int, own: bool) -> Drawn:
    """Return one of a handful of fits, which have the kinds of schedules, units and optimizers in turn.

    Args:
        seed: Of the handful.
        number: Which of them.
        samples: Of a step.
        own: Whether the data are the kit's own.

    Example:
        >>> sorted(drawn(0, number, samples=8, own=True).duration.unit for number in range(3))
        ['ba', 'ep', 'sp']
    """

    def shuffled(kinds: Iterable[str]) -> list[str]:
        listed = sorted(kinds)
        Random(derive_seed(seed, *listed)).shuffle(listed)  # noqa: S311 - no secret
        return listed

    def in_turn(kinds: Iterable[str]) -> str:
        listed = shuffled(kinds)
        return listed[number % len(listed)]

    random = Random(derive_seed(seed, number))  # noqa: S311 - no secret
    durations = {"ep": ("2ep", "3ep"), "ba": ("6ba", "7ba", "8ba"), "sp": (f"{5 * samples - 3}sp", f"{6 * samples}sp")}
    duration = Time(random.choice(durations[in_turn(durations)]))
    half, step = int(duration.value) // 2, samples if duration.unit == "sp" else 1
    others = {"ep": ("2ba",), "ba": ("1ep",)} if own else {}
    lengths = (*_SHARES, f"{half}{duration.unit}", f"{step}{duration.unit}", *others.get(duration.unit, ()))
    return Drawn(
        duration=duration,
        written=_schedule(
            random,
            lengths,
            islice(cycle(shuffled(_CURVES[1:] + _COMPOSED)), 4 * number, None),
            kind=in_turn(_CURVES if number % 3 == 2 else _COMPOSED),
        ),
        accumulate=random.choice((1, 2)) if own else 1,
        optimizer=in_turn(_OPTIMIZERS),
        min_lr=random.choice((0.0, 0.0, 0.001)),
        every=random.choice(("2ba", "3ba", "4ba")),
    )


def _schedule(
    random: Random, lengths: Sequence[float | str], kinds: Iterator[str], *, kind: str | None = None, depth: int = 0
) -> dict[str, Any]:
    """Draw a schedule, of others in turn, of the kinds that come next, at most three deep."""
    kind = kind or next(each for each in kinds if depth < 2 or each in _CURVES)
    return {"name": kind, "arguments": _arguments(random, lengths, kinds, depth)[kind]()}


_CURVES = ("constant", "linear", "cosine", "polynomial", "inverse_sqrt", "one_cycle", "wsd", _FUNCTION)
_COMPOSED = ("warmup", "join", "repeat")


def _arguments(
    random: Random, lengths: Sequence[float | str], kinds: Iterator[str], depth: int
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return what draws the arguments of each kind of schedule."""
    choose, length = random.choice, partial(random.choice, lengths)
    parts = choose((2, 3))
    part = partial(choose, _SHARES if depth else lengths)  # two of which are at most what they lie in
    inner = partial(_schedule, random, lengths, kinds, depth=depth + 1)

    def ends(most: int = len(_FACTORS)) -> dict[str, Any]:
        return dict(zip(("end", "start"), random.sample(_FACTORS[:most], 2), strict=True))

    return {
        "constant": lambda: {"factor": choose((1.0, 0.5))},
        "linear": ends,
        "cosine": ends,
        "polynomial": lambda: {"power": choose((2.0, 0.5)), **ends()},
        "inverse_sqrt": lambda: {"timescale": length()},
        "one_cycle": lambda: {
            "peak": length(), **ends(3), "anneal": choose(("cosine", "linear")), "three_phase": choose((True, False)),
        },
        "wsd": lambda: {"warmup": part(), "decay": part(), **ends(3), "shape": choose(("linear", "cosine", "1-sqrt"))},
        _FUNCTION: lambda: {"exponent": choose((2.0, 0.5))},
        "warmup": lambda: {"length": length(), "then": inner(), "start": choose(_FACTORS)},
        "join": lambda: {
            "schedules": [inner() for _ in range(parts)], "boundaries": [length()] if parts == 2 else [0.25, 0.7],
        },
        "repeat": lambda: {"schedule": inner(), "every": length(), "growth": choose((1, 2))},
    }  # fmt: skip


def _in_groups(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    vectors, matrices = vectors_and_matrices(parameters)
    groups = [{"params": matrices}, {"params": vectors, **LEVEL}]
    return torch.optim.SGD([each for each in groups if each["params"]], **PLAIN)


def _several(model: nn.Module) -> list[torch.optim.Optimizer]:
    vectors, matrices = vectors_and_matrices(model.parameters())
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(vectors, **DECAYED)] if vectors else []
    return [*found, torch.optim.Adagrad(matrices, **LEVEL)] if matrices else found


def _named(model: nn.Module) -> torch.optim.Optimizer:
    rate = torch.tensor(DECAYED["lr"], dtype=torch.float64)
    options: dict[str, Any] = {**DECAYED, "lr": rate, "foreach": False}
    return torch.optim.AdamW(model.named_parameters(), **options)


def _by_kind(vectors: Home, matrices: Home) -> Callable[[nn.Parameter, nn.Parameter | None], Home]:
    return lambda each, beside: vectors if (each if beside is None else beside).ndim < 2 else matrices


_OPTIMIZERS: Mapping[
    str, tuple[Callable[[nn.Module], OptimizerLike], Callable[[nn.Parameter, nn.Parameter | None], Home]]
] = {
    "a factory": (lambda _: partial(torch.optim.AdamW, **DECAYED), _by_kind(DECAYED, DECAYED)),
    "a factory of two groups": (lambda _: _in_groups, _by_kind(LEVEL, PLAIN)),
    "an instance": (by_hand, _by_kind(LEVEL, DECAYED)),
    "an instance of named parameters": (_named, _by_kind(DECAYED, DECAYED)),
    "two instances": (_several, _by_kind(DECAYED, LEVEL)),
}


# -- what is known of it -----------------------------------------------------------------------------------------------


def _built(written: Mapping[str, Any]) -> Schedule:
    """Call what a description describes, as a user would."""
    if written["name"] == _FUNCTION:
        return as_schedule(partial(power_of_rest, **written["arguments"]))
    arguments: dict[str, Any] = {}
    for key, each in written["arguments"].items():
        if isinstance(each, Mapping):
            arguments[key] = _built(each)
        elif key == "schedules":
            arguments[key] = [_built(one) for one in each]
        else:
            arguments[key] = "0.25dur" if each == 0.25 and key in ("length", "every", "peak") else each
    return FACTORIES[written["name"]](**arguments)


def checked(fit: Drawn) -> Schedule:
    """Return the schedule, read back from its description; a fault in it is no algorithm's."""
    made = _built(fit.written)
    text = repr(made)
    assert made.describe() == fit.written, f"{text} is described as {made.describe()}"
    saved = json.dumps(made.describe())
    assert made.bound is not any(f'{unit}"' in saved for unit in ("ep", "ba", "sp")), f"{text}: bound is {made.bound}"
    if _FUNCTION not in saved:
        again = schedule_from_description(json.loads(saved))
        assert (again, hash(again)) == (made, hash(made)), f"{text} comes back from its description as {again}"
        made = again
    bound = made.bind(lambda time: float(fit.share(time)))
    for step in range(24):
        now, must = bound(step / 24), fit.factor(step / 24)
        assert abs(now - must) < 1e-7, f"{text} gives {now} at {step}/24, and by its formula {must}"
    return made


@define(eq=False)
class _Watch:
    """Holds the rates in a drawn fit against those that follow from its schedule and the calls on the ledger."""

    rehearsal: Rehearsal
    drawn: Drawn
    account: Account = field(init=False)
    rates: dict[int, dict[str, float]] = field(factory=dict, init=False)

    def run(self, folder: Path) -> tuple[Outcome, list[Path]]:
        """Run the fit; its optimizers are given back with the rates they came with."""
        model = self.rehearsal.model()
        given = self.rehearsal.optimizer(model)
        before = copied(_options(given))
        algorithms = [Before(lambda *_: None, self._set_up), *self.rehearsal.make()]
        found = self.rehearsal.saved(
            folder, every=self.drawn.every, algorithms=algorithms, model=model, optimizer=given, probe=self._look
        )
        same(
            _options(given), before, "options",
            f"{self.rehearsal.name}: the optimizer is given back with other rates or options than it came with. They are the "
            "ledger's during a fit: scale, set_lr and set_options.",
        )  # fmt: skip
        return found

    def _set_up(self, state: State) -> None:
        home_of = _OPTIMIZERS[self.drawn.optimizer][1]
        self.account = Account(state, home_of=home_of, factor=self.drawn.factor, min_lr=self.drawn.min_lr)
        self.account.listen()

    def _look(self, event: Event, state: State) -> None:
        if event is not Event.BEFORE_STEP:
            return
        clock, account = state.clock, self.account
        now: dict[str, float] = {}
        for number, optimizer in enumerate(state.optimizers):
            groups = [each for each in state.ledger.groups if each.optimizer == number]
            for group, options in zip(groups, optimizer.state_dict()["param_groups"], strict=True):
                now |= dict.fromkeys(group.parameters, float(options["lr"]))
                same(
                    list(options.get("param_names", group.parameters)), list(group.parameters), "param_names",
                    f"{self.rehearsal.name}: in batch {clock.batch} a group has other param_names than parameters. Groups are the ledger's: "
                    "freeze and thaw through it alone.",
                )  # fmt: skip
        must = {name: account.rate(name, clock) for name in account.trainable()}
        same(
            now, must, "what is and what must be: rates",
            f"{self.rehearsal.name}: batch {clock.batch} trains at other rates than follow from the optimizer, the schedule and the calls on "
            "the ledger. Set them with ledger.scale, set_lr and set_schedule.", tolerance=1e-9,
        )  # fmt: skip
        self.rates[clock.batch + 1] = account.told(clock, lambda name: state.layers.of(name).name)

    def check_told(self, outcome: Outcome) -> None:
        """Hold what trackers and the history were told against the rates of the batches."""
        told = [(batch, metrics) for batch, metrics in outcome.told if "train/loss" in metrics]
        must = [(batch, {name: metrics.get(name) for name in self.rates[batch]}) for batch, metrics in told]
        same(
            must, [(batch, self.rates[batch]) for batch, _ in told], "what is and what must be",
            f"{self.rehearsal.name}: trackers are told of other rates than those of the steps. lr is the engine's: log under another name.",
            tolerance=1e-9,
        )  # fmt: skip
        rows = outcome.result["history"]
        same(
            [row.get("lr") for row in rows], [self.rates[int(row["batch"])]["lr"] for row in rows], "what is and what must be: lr",
            f"{self.rehearsal.name}: the history has other rates than those of the epochs' last steps. lr is the engine's: log under another name.",
            tolerance=1e-9,
        )  # fmt: skip


def _options(given: Any) -> list[dict[str, Any]]:
    """Return the options of optimizers that were made before the fit."""
    made = given if isinstance(given, list) else [given]
    groups = [
        group for each in made if isinstance(each, torch.optim.Optimizer) for group in each.state_dict()["param_groups"]
    ]
    return [{key: value for key, value in group.items() if key not in ("params", "param_names")} for group in groups]
