"""The figures: each function measures one and returns its rows."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from typing_extensions import override

from thawline.algorithms import ema_update
from thawline.algorithms.grad_clip import clip_gradients
from thawline.engine import Algorithm, Engine, Event, ParameterLedger, State, Trainer

from .adapters import adapting
from .distributed import distributed
from .measure import Row, race, told
from .prefix import prefix
from .saving import adapters, resuming, saving

Figure = Callable[[int, torch.device], list[Row]]


def step(rounds: int, device: torch.device) -> list[Row]:
    """Overhead of a step above a hand-written loop that adds up its losses: tiny MLP, SGD, ready batches."""
    steps = 2000
    x, y = torch.randn(8, 4, device=device), torch.randint(2, (8,), device=device)
    batches = [(x, y)] * steps
    loss_fn = nn.functional.cross_entropy

    def model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to(device)

    def by_hand() -> None:
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        parameters = list(net.parameters())
        total = 0.0
        for inputs, targets in batches:
            loss = loss_fn(net(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            for each in parameters:
                each.grad = None
            total += loss.item()

    trainer = Trainer(optimizer=partial(torch.optim.SGD, lr=0.01), loss_fn=loss_fn, progress=False, device=str(device))
    contestants = {
        "by hand": by_hand,
        "Trainer": lambda: _fit(trainer, model(), batches),
        "Trainer, one batch": lambda: _fit(trainer, model(), batches[:1]),
    }
    timings = race(contestants, rounds)
    hand, whole, one = (timings[name].median for name in contestants)
    # What a fit costs once, its start and its end, is no part of a step.
    over = (whole - one) / (steps - 1) - hand / steps
    return [Row("step overhead, no algorithms", over, "us", 30.0, told(timings, "ms"))]


def _fit(trainer: Trainer, model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    trainer.fit(model, batches, duration="1ep")


class Listen(Algorithm):
    """Listens and does nothing."""

    events = frozenset({Event.BATCH_END})

    @override
    def apply(self, event: Event, state: State) -> None:
        """Do nothing."""


def event(rounds: int, _: torch.device) -> list[Row]:
    """One event with 0, 5 and 20 listeners."""
    model = nn.Linear(2, 1)
    rows = []
    for listeners, bar in ((0, 0.3), (5, 0.9), (20, 3.0)):
        state = State(model, ParameterLedger(model, partial(torch.optim.SGD, lr=0.1)))
        engine = Engine([Listen() for _ in range(listeners)], state)
        calls = 20_000

        def emit(engine: Engine = engine, calls: int = calls) -> None:
            for _ in range(calls):
                engine.emit(Event.BATCH_END)

        timings = race({"emit": emit}, rounds, calls)
        rows.append(Row(f"one event, {listeners} listeners", timings["emit"].median, "us", bar, told(timings)))
    return rows


def average(rounds: int, device: torch.device) -> list[Row]:
    """EMA update against a bare foreach lerp."""
    rows = []
    for count, size in ((75, 266_667), (1203, 3325)):
        live = [torch.randn(size, device=device) for _ in range(count)]
        shadows = [[each.clone() for each in live] for _ in range(2)]

        def bare(shadow: list[torch.Tensor] = shadows[0], live: list[torch.Tensor] = live) -> None:
            torch._foreach_lerp_(shadow, live, 0.01)

        def ours(shadow: list[torch.Tensor] = shadows[1], live: list[torch.Tensor] = live) -> None:
            ema_update(shadow, live, 0.99)

        timings = race({"lerp": bare, "ema_update": ours}, rounds * 3)
        ratio = timings["ema_update"].median / timings["lerp"].median
        rows.append(Row(f"EMA, {count * size / 1e6:.0f}M in {count} tensors", ratio, "x", 1.25, told(timings, "ms")))
    return rows


def clipping(rounds: int, device: torch.device) -> list[Row]:
    """Clipping when nothing is clipped, against torch's."""
    rows = []
    for count, size in ((75, 266_667), (1203, 3325)):
        parameters = [nn.Parameter(torch.randn(size, device=device)) for _ in range(count)]
        for each in parameters:
            each.grad = torch.randn_like(each)

        def theirs(parameters: list[nn.Parameter] = parameters) -> None:
            torch.nn.utils.clip_grad_norm_(parameters, 1e9)

        def ours(parameters: list[nn.Parameter] = parameters) -> None:
            clip_gradients(parameters, max_norm=1e9)

        timings = race({"torch": theirs, "clip_gradients": ours}, rounds * 3)
        ratio = timings["clip_gradients"].median / timings["torch"].median
        rows.append(
            Row(f"clipping, {count * size / 1e6:.0f}M in {count} tensors", ratio, "x", None, told(timings, "ms"))
        )
    return rows


def freezing(rounds: int, device: torch.device) -> list[Row]:
    """Freezing and thawing 2,500 of 5,000 tensors through the ledger, against a hand-written pass."""
    net = nn.Sequential(*[nn.Linear(2, 2, device=device) for _ in range(2500)])
    names = [name for name, _ in net.named_parameters()][:2500]
    kept: dict[str, ParameterLedger] = {}

    def fresh() -> torch.optim.Optimizer:
        net.requires_grad_(True)
        return torch.optim.SGD(net.parameters(), lr=0.1)

    def freeze_by_hand() -> float:
        optimizer, wanted = fresh(), set(names)
        began = time.process_time()
        for name, each in net.named_parameters():
            if name in wanted:
                each.requires_grad_(False)
                each.grad = None
                optimizer.state.pop(each, None)
        for group in optimizer.param_groups:
            group["params"] = [each for each in group["params"] if each.requires_grad]
        return time.process_time() - began

    def freeze_by_ledger() -> float:
        kept["ledger"] = ledger = ParameterLedger(net, fresh())
        began = time.process_time()
        ledger.freeze(names, owner="benchmark")
        return time.process_time() - began

    def thaw_by_hand() -> float:
        optimizer, wanted = fresh(), set(names)
        optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][2500:]
        began = time.process_time()
        thawed = []
        for name, each in net.named_parameters():
            if name in wanted:
                each.requires_grad_(True)
            if each.requires_grad:
                thawed.append(each)
        optimizer.param_groups[0]["params"] = thawed
        return time.process_time() - began

    def thaw_by_ledger() -> float:
        began = time.process_time()
        kept["ledger"].thaw(names, owner="benchmark")
        return time.process_time() - began

    contestants = {
        "freeze by hand": freeze_by_hand, "freeze": freeze_by_ledger, "thaw": thaw_by_ledger, "thaw by hand": thaw_by_hand,
    }  # fmt: skip
    timings = race(contestants, rounds)
    return [
        Row(
            f"{what} 2,500 of 5,000 tensors",
            timings[what].median / timings[f"{what} by hand"].median,
            "x",
            1.5,
            told(timings, "ms"),
        )
        for what in ("freeze", "thaw")
    ]


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
    """Fresh interpreters: the import above torch's, and the import with one step."""
    scripts = {"torch": "import torch", "thawline": "import thawline.engine", "torch step": STEP, "thawline fit": FIT}
    seconds: dict[str, list[float]] = {name: [] for name in scripts}
    for turn in range(max(3, rounds // 2) + 1):
        for name, script in scripts.items():
            code = f"{script}\nimport resource; print(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))"
            done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
            if turn:
                seconds[name].append(float(done.stdout))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    note = "; ".join(f"{name} {value:.2f} s CPU" for name, value in medians.items())
    return [
        Row("import above torch", medians["thawline"] - medians["torch"], "s", 0.2, note),
        Row("import and one step above torch", medians["thawline fit"] - medians["torch step"], "s", None, note),
    ]


def construction(rounds: int, _: torch.device) -> list[Row]:
    """Making a Trainer."""

    def make() -> None:
        for _ in range(100):
            Trainer()

    timings = race({"Trainer()": make}, rounds, 100)
    return [Row("Trainer construction", timings["Trainer()"].median / 1e3, "ms", None, told(timings))]


FIGURES: dict[str, Figure] = {
    "step": step,
    "event": event,
    "ema": average,
    "clipping": clipping,
    "lora": adapting,
    "freezing": freezing,
    "prefix": prefix,
    "import": importing,
    "construction": construction,
    "saving": saving,
    "adapters": adapters,
    "resuming": resuming,
    "distributed": distributed,
}
