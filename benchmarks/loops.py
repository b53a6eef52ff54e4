"""What a step, an event and a Trainer cost beside the peers'."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from typing_extensions import override

from thawline.algorithms import EMA, EarlyStop, GradClip, LayerFreeze, LayerThaw, LoRAInject
from thawline.engine import Algorithm, Engine, Event, ParameterLedger, State, Trainer

from .batches import Batches
from .measure import Row, above, race, told
from .peers import CONSTRUCTIONS, EVENTS, FITS, IMPORTS, present

_STEPS = 2000


class Idle(Algorithm):
    """Listens to what another algorithm listens to, and has nothing to do."""

    def __init__(self, other: Algorithm) -> None:
        self.events = other.events

    @override
    def match(self, event: Event, state: State) -> bool:
        """Return False."""
        return False

    @override
    def apply(self, event: Event, state: State) -> None:
        """Never asked for."""


def idle() -> list[Algorithm]:
    """Return the six algorithms of the first release, subscribed and idle."""
    return [Idle(each) for each in (LoRAInject(), LayerThaw(), LayerFreeze(), GradClip(1.0), EMA(), EarlyStop())]


def by_hand(model: nn.Module, batches: Batches) -> None:
    """Train one epoch by a loop that adds up its losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    parameters = list(model.parameters())
    total = 0.0
    for inputs, targets in batches:
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        for each in parameters:
            each.grad = None
        total += loss.item()


def by_trainer(
    model: nn.Module, batches: Batches, *, device: torch.device, algorithms: list[Algorithm], log_every: str = "1ep"
) -> None:
    """Train one epoch by the Trainer; as the peers' do here, it logs no losses before the end."""
    trainer = Trainer(
        algorithms=algorithms, optimizer=partial(torch.optim.SGD, lr=0.01), loss_fn=nn.functional.cross_entropy,
        progress=False, device=str(device), log_every=log_every,
    )  # fmt: skip
    trainer.fit(model, batches, duration="1ep")


def step(rounds: int, device: torch.device) -> list[Row]:
    """Overhead of a step above a hand-written loop that adds up its losses: tiny MLP, SGD, ready batches, logs off."""
    x, y = torch.randn(8, 4, device=device), torch.randint(2, (8,), device=device)
    fits: dict[str, Callable[[nn.Module, Batches], None]] = {
        "by hand": by_hand,
        "thawline": partial(by_trainer, device=device, algorithms=[]),
        "thawline, six idle": partial(by_trainer, device=device, algorithms=idle()),
        "thawline, a log line every ten": partial(by_trainer, device=device, algorithms=[], log_every="10ba"),
        **(present(FITS) if device.type == "cpu" else {}),
    }

    def contestant(fit: Callable[[nn.Module, Batches], None]) -> Callable[[], float]:
        def run() -> float:
            batches = Batches([(x, y)] * _STEPS, device)
            fit(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to(device), batches)
            return batches.seconds

        return run

    timings = race({name: contestant(fit) for name, fit in fits.items()}, rounds, _STEPS - 1)
    bars = {"thawline": 20.0, "thawline, six idle": 40.0}
    return [
        above(f"step overhead, {name}", timings, name, "by hand", bars.get(name), note=told({name: each, "by hand": timings["by hand"]}))
        for name, each in timings.items()
        if name != "by hand"
    ]  # fmt: skip


class Listen(Algorithm):
    """Listens and does nothing."""

    events = frozenset({Event.BATCH_END})

    @override
    def apply(self, event: Event, state: State) -> None:
        """Do nothing."""


def our_event(listeners: int) -> Callable[[], None]:
    """Return a function that emits one event."""
    model = nn.Linear(2, 1)
    state = State(model, ParameterLedger(model, partial(torch.optim.SGD, lr=0.1)))
    engine = Engine([Listen() for _ in range(listeners)], state)
    return partial(engine.emit, Event.BATCH_END)


def event(rounds: int, _: torch.device) -> list[Row]:
    """One event with 0, 5 and 20 listeners."""
    calls, rows = 5_000, list[Row]()
    for listeners, bar in ((0, 0.3), (5, 0.9), (20, 3.0)):
        contestants: dict[str, Callable[[], None]] = {}
        for name, make in {"thawline": our_event, **present(EVENTS)}.items():
            contestants[name] = partial(_repeat, make(listeners), calls)
        timings = race(contestants, rounds, calls)
        for name, each in timings.items():
            figure, limit = f"one event, {listeners} listeners, {name}", bar if name == "thawline" else None
            rows.append(Row(figure, each.median, "us", limit, each.told("us"), min(each.times), max(each.times)))
    return rows


def _repeat(work: Callable[[], object], times: int) -> None:
    for _ in range(times):
        work()


def construction(rounds: int, _: torch.device) -> list[Row]:
    """Making a Trainer."""
    calls = 10
    contestants = {"thawline": Trainer, **present(CONSTRUCTIONS)}
    timings = race({name: partial(_repeat, make, calls) for name, make in contestants.items()}, rounds, calls)
    return [
        Row(
            f"Trainer construction, {name}", each.median / 1e3, "ms", 0.5 if name == "thawline" else None,
            each.told("ms"), min(each.times) / 1e3, max(each.times) / 1e3,
        )
        for name, each in timings.items()
    ]  # fmt: skip


STEP = """
import torch
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
"""
FIT = """
import torch
from thawline.engine import Trainer
trainer = Trainer(optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1), forward_fn=lambda m, x: m(x).sum(), progress=False)
trainer.fit(torch.nn.Linear(2, 1), [torch.ones(1, 2)], duration="1ba")
"""


def importing(rounds: int, _: torch.device) -> list[Row]:
    """Fresh interpreters: the import above torch's, and the import with one step, by CPU time."""
    ours = {"torch": "import torch", "thawline": "import thawline.engine", "torch, step": STEP, "thawline, step": FIT}
    scripts = ours | present(IMPORTS)
    timings = race({name: partial(interpreted, script) for name, script in scripts.items()}, max(2, rounds // 2))
    rows: list[Row] = []
    for name in timings:
        if name not in ("torch", "torch, step"):
            base = "torch, step" if name.endswith("step") else "torch"
            bar = {"thawline": 0.15, "thawline, step": 0.2}.get(name)
            figure = f"import{' and one step' if base != 'torch' else ''}, {name.partition(',')[0]}, above {base.partition(',')[0]}"
            row = above(
                figure, timings, name, base, bar, note=told({each: timings[each] for each in (name, base)}, "s")
            )
            rows.append(_in_seconds(row))
    return rows


def interpreted(script: str) -> float:
    """Return the seconds of CPU that a fresh interpreter takes for a script."""
    code = f"{script}\nimport resource; print(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))"
    # As installed packages are: compiled in the round that does not count, wherever else bytecode is not to be written.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    return float(done.stdout.splitlines()[-1])


def _in_seconds(row: Row) -> Row:
    assert row.least is not None
    assert row.most is not None
    return Row(row.figure, row.value / 1e6, "s", row.bar, row.note, row.least / 1e6, row.most / 1e6)
