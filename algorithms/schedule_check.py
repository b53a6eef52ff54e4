"""Schedules beside a model: the default one for its layers, and whether a given one fits it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from ..engine import LayerMap, ParameterLedger, ScheduleError, SelectorError, State, Time, warn
from .layer_thaw import share_of_fit
from .phases import Phase, Written


def generate_phases(layers: LayerMap) -> tuple[Phase, ...]:
    """Return the default schedule: the head first, then a layer more in each phase, for equal shares of the fit.

    Args:
        layers: The model's layers. A layer thaws as a whole, its biases and normalization included.

    Example:
        >>> from torch import nn
        >>> layers = LayerMap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
        >>> [(phase.name, str(phase.until)) for phase in generate_phases(layers)]
        [('head', '0.3333dur'), ('blocks[1]', '0.3333dur'), ('blocks[0]', 'None')]
        >>> [(phase.thaw, phase.until) for phase in generate_phases(LayerMap(nn.Linear(4, 2)))]
        [(('head',), None)]
    """
    *upper, lowest = [layer.name for layer in layers][::-1]
    share = max(1, math.floor(1e4 / (len(upper) + 1))) / 1e4
    return (
        *(Phase(name=name, thaw=name, until=Time(f"{share}dur")) for name in upper),
        Phase(name=lowest, thaw=lowest),
    )


def check_phases(phases: Sequence[Phase], ledger: ParameterLedger) -> tuple[str, ...]:
    """Check that phases fit a model, and return the parameters that none of them names: those never train.

    Args:
        phases: In the order in which they run.
        ledger: The ledger of the model; it is read only.

    Raises:
        ScheduleError: A selector matches nothing, a parameter thaws in two phases and freezes in none between, or gets
            a rate in a phase that does not thaw it. All of it is said at once, phase by phase.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> ledger = ParameterLedger(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> check_phases([Phase(thaw="1.weight")], ledger)
        ('0.weight', '0.bias', '1.bias')
        >>> check_phases([Phase(thaw="1"), Phase(freeze="*.bias"), Phase(thaw="1.bias")], ledger)
        ('0.weight',)
        >>> check_phases([Phase(thaw="1"), Phase(thaw=("0.bias", "1.bias"), lr={"0": 0.1}), Phase(freeze="2")], ledger)
        Traceback (most recent call last):
        thawline.engine.errors.ScheduleError: the schedule has 3 errors:
          phase 2: '1.bias' thaws '1.bias', which 'phase 1' thawed already. Write: ...
          phase 2: lr sets the rate of '0.weight', which this phase does not thaw. Write: thaw: '0', or lr without it
          phase 3: ...
    """
    faults: list[tuple[str, str, str]] = []
    written = Written.like(phases, phases)
    thawed: dict[str, str] = {}
    named: set[str] = set()
    for number, (phase, lines) in enumerate(zip(phases, written.lines, strict=True), 1):
        place = phase.name or f"phase {number}"
        frozen = [
            name for selector in phase.freeze for name in _names(selector, ledger, lines.get(selector, place), faults)
        ]
        for name in frozen:
            thawed.pop(name, None)
        fresh: dict[str, None] = {}
        for selector in phase.thaw:
            names = _names(selector, ledger, lines.get(selector, place), faults)
            if twice := [name for name in names if name in thawed]:
                problem = f"{selector!r} thaws {_few(twice)}, which {thawed[twice[0]]!r} thawed already"
                faults.append(
                    (
                        lines.get(selector, place),
                        problem,
                        f"freeze: {selector!r} in a phase between, or thaw without it",
                    )
                )
            fresh.update(dict.fromkeys(names))
        for selector in phase.lr if isinstance(phase.lr, Mapping) else ():
            names = _names(selector, ledger, lines.get(selector, place), faults)
            if strange := [name for name in names if name not in fresh]:
                problem = f"lr sets the rate of {_few(strange)}, which this phase does not thaw"
                faults.append((lines.get(selector, place), problem, f"thaw: {selector!r}, or lr without it"))
        thawed.update(dict.fromkeys(fresh, place))
        named.update(fresh, frozen)
    if faults:
        raise ScheduleError(written.source, faults)
    return tuple(name for name in ledger.parameters if name not in named)


def check_fit(phases: Sequence[Phase], count: int, state: State) -> None:
    """Check the phases beside the model, and warn of what is allowed and probably not meant.

    Args:
        phases: Those of one round, all with a name.
        count: How many begin, in all rounds.
        state: The state at FIT_START.

    Raises:
        ScheduleError: As :func:`check_phases`.

    Example:
        >>> import torch, warnings
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters(), lr=0.1)), duration="1ep")
        >>> with warnings.catch_warnings(record=True, action="always") as caught:
        ...     check_fit([Phase(name="bias", thaw="1.bias", until="1ep", warmup="2ep"), Phase(name="rest", thaw="1.weight")], 2, state)
        >>> for each in caught:
        ...     print(each.message)
        ThawSchedule: no phase names 2 parameters, which stay frozen: 0.weight, 0.bias. Name them in thaw= or freeze=.
        ThawSchedule: 1 phase never begins: 'rest'. The fit ends after 1ep, before it. Write shorter phases.
        ThawSchedule: the warmup of 'bias' is not over when the fit ends after 1ep, so its full rate is never reached. An int is epochs: write warmup='100ba' for batches, or warmup='0.1dur' for a share of the fit.
    """
    left = check_phases(phases, state.ledger)
    left = tuple(name for name in left if "user" not in state.ledger.owners(name))
    if left:
        shown = ", ".join(left[:3]) + f" and {len(left) - 3} more" * (len(left) > 3)
        _warn(f"no phase names {len(left)} parameters, which stay frozen: {shown}. Name them in thaw= or freeze=.")
    if late := never_begin(phases, count, state):
        shown = ", ".join(map(repr, late[:3])) + f" and {len(late) - 3} more" * (len(late) > 3)
        never, them = ("phase never begins", "it") if len(late) == 1 else ("phases never begin", "them")
        _warn(
            f"{len(late)} {never}: {shown}. The fit ends after {state.duration}, before {them}. Write shorter phases."
        )
    if cold := never_warm(phases, count, state):
        shown = ", ".join(map(repr, cold))
        _warn(
            f"the warmup of {shown} is not over when the fit ends after {state.duration}, so its full rate is never "
            "reached. An int is epochs: write warmup='100ba' for batches, or warmup='0.1dur' for a share of the fit."
        )


def _warn(text: str) -> None:
    warn(f"ThawSchedule: {text}")


def never_begin(phases: Sequence[Phase], count: int, state: State) -> list[str]:
    """Return the names of the phases whose begin is known to lie at the end of the fit or after it.

    Args:
        phases: Those of one round.
        count: How many begin, in all rounds.
        state: The state at FIT_START: of the fit, or where a migrated run goes on.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters(), lr=0.1)), duration="3ep")
        >>> phases = [Phase(name="head", thaw="1", until="1ep"), Phase(name="body", thaw="0", until="1ep")]
        >>> never_begin(phases, 3, state), never_begin(phases, 4, state)
        ([], ['body of round 2'])
    """
    # Shares are floats: ten times 0.1 is a little less than 1.
    return [name for name, _, begin in _begins(phases, count, state) if begin >= 1 - 1e-9]


def never_warm(phases: Sequence[Phase], count: int, state: State) -> list[str]:
    """Return the names of the phases that begin, and whose warmup is known to outlast the fit; arguments as above.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters(), lr=0.1)), duration="3ep")
        >>> phases = [Phase(name="head", thaw="1", warmup="2ep", until="1ep"), Phase(name="body", thaw="0", until="1ep")]
        >>> never_warm(phases, 2, state), never_warm([*phases[::-1], phases[1]], 3, state)
        ([], ['head'])
        >>> never_warm([*phases[1:] * 3, phases[0]], 4, state)  # it never begins
        []
    """
    return [
        name
        for name, phase, begin in _begins(phases, count, state)
        if phase.warmup is not None and begin < 1 - 1e-9 <= begin + (share_of_fit(phase.warmup, state) or 0.0)
    ]


def _begins(phases: Sequence[Phase], count: int, state: State) -> Iterator[tuple[str, Phase, float]]:
    """Yield each phase with its name, and the earliest share of the fit at which it may begin.

    Example:
        >>> import torch
        >>> from thawline.engine import Clock
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> ledger = ParameterLedger(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> state = State(model, ledger, duration="2ep", clock=Clock(batches_per_epoch=10))
        >>> phases = [Phase(name="head", thaw="1", until="0.12dur"), Phase(name="body", thaw="0", until="0.12dur")]
        >>> [(name, round(begin, 2)) for name, _, begin in _begins(phases, 4, state)]  # in whole batches
        [('head', 0.0), ('body', 0.15), ('head of round 2', 0.25), ('body of round 2', 0.4)]
        >>> mixed = [Phase(name="head", thaw="1", until="3ba"), Phase(name="body", thaw="0", until="1ep")]
        >>> [(name, round(begin, 2)) for name, _, begin in _begins(mixed, 3, state)]  # after 3 batches, in whole epochs
        [('head', 0.0), ('body', 0.15), ('head of round 2', 1.0)]
    """
    batch, epoch = (share_of_fit(Time(one), state) for one in ("1ba", "1ep"))
    begin, named, unit = state.clock.progress, 0.0, None  # a migrated run starts the schedule where it goes on
    for place in range(count):
        phase = phases[place % len(phases)]
        yield f"{phase.name}" + f" of round {place // len(phases) + 1}" * (place >= len(phases)), phase, begin
        end, until = begin + (batch or 0.0), phase.until
        if isinstance(until, Time):
            # Behind a time in the same unit from the end that it named, not from where that was rounded up to.
            named = (named if until.unit == unit else begin) + (share_of_fit(until, state) or 0.0)
            end = max(end, named)
        unit = until.unit if isinstance(until, Time) else None
        whole = epoch if unit == "ep" else batch
        begin = math.ceil(end / whole - 1e-6) * whole if whole else end


def _names(selector: str, ledger: ParameterLedger, place: str, faults: list[tuple[str, str, str]]) -> tuple[str, ...]:
    """Return what a selector means; where it matches nothing, that is a fault.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> ledger, faults = ParameterLedger(model, torch.optim.SGD(model.parameters(), lr=0.1)), []
        >>> _names("head", ledger, "line 2", faults), _names("haed", ledger, "line 3", faults)
        (('weight', 'bias'), ())
        >>> faults[0][:2]
        ('line 3', "the selector 'haed' matches nothing. Nearest names: 'head'. Layers: head")
    """
    try:
        return ledger.select(selector)
    except SelectorError as error:
        problem, _, write = str(error).partition(" Write ")
        faults.append((place, problem.rstrip("."), write.rstrip(".") or "'head' or 'blocks[-1]'"))
        return ()


def _few(names: Sequence[str]) -> str:
    """Return the first three names, and how many more there are.

    Example:
        >>> _few(["a", "b", "c"]), _few(["a", "b", "c", "d"])
        ("'a', 'b', 'c'", "'a', 'b', 'c' and 1 more")
    """
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
