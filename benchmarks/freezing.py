"""What freezing costs, and what it saves."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from typing_extensions import override

from thawline.engine import Algorithm, Event, ParameterLedger, Stage, State, Trainer

from .measure import Row, race, ratio, told

BLOCKS = 8
_STEPS = 4


def ledger(rounds: int, device: torch.device) -> list[Row]:
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
        ratio(
            f"{what} 2,500 of 5,000 tensors / by hand", timings, what, f"{what} by hand", 1.5, note=told(timings, "ms")
        )
        for what in ("freeze", "thaw")
    ]


class Stack(nn.Module):
    """An embedding, transformer blocks of width 256, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, 256)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(BLOCKS)
        )
        self.head = nn.Linear(256, 2)

    @override
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x.mean(1))
        return out


def frozen(share: float, device: torch.device) -> Stack:
    """Return the model with the embedding and that share of its blocks, from the bottom, frozen by hand; 0 freezes nothing."""
    torch.manual_seed(0)
    model = Stack().to(device)
    model.embed.requires_grad_(share == 0)
    for block in model.blocks[: round(share * BLOCKS)]:
        block.requires_grad_(False)
    return model


def by_hand(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Train on the batches."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    total = 0.0
    for ids, labels in batches:
        loss = nn.functional.cross_entropy(model(ids), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.item()


def steps(rounds: int, device: torch.device) -> list[Row]:
    """Steps with a share of the blocks frozen: against a hand-written loop over the same, and against nothing frozen.

    What a fit costs once before it begins, a forward pass that finds the order of the layers, is no part of a step.
    """
    batches = [(torch.randint(512, (8, 64), device=device), torch.randint(2, (8,), device=device))] * _STEPS
    recipe = partial(
        Trainer, optimizer=partial(torch.optim.AdamW, lr=1e-4), loss_fn=nn.functional.cross_entropy, progress=False,
        device=str(device),
    )  # fmt: skip
    contestants: dict[str, Callable[[], float | None]] = {}
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    for share in shares:
        models = frozen(share, device), frozen(share, device)
        contestants[f"by hand {share:.0%}"] = partial(by_hand, models[0], batches)
        contestants[f"Trainer {share:.0%}"] = partial(_fit, recipe, models[1], batches)
    timings = race(contestants, rounds, _STEPS, device=device)
    rows: list[Row] = []
    for share in shares:
        hand, ours = f"by hand {share:.0%}", f"Trainer {share:.0%}"
        note = told({each: timings[each] for each in (hand, ours)}, "ms")
        rows.append(
            ratio(f"step with {share:.0%} of the blocks frozen / by hand", timings, ours, hand, 1.02, note=note)
        )
        if share:
            rows.append(
                ratio(f"step with {share:.0%} of the blocks frozen / none", timings, ours, "Trainer 0%", note=note)
            )
    return rows


class Stopwatch(Algorithm):
    """Measures CPU time from FIT_START to FIT_END."""

    events = frozenset({Event.FIT_START, Event.FIT_END})
    stage = Stage.OBSERVE

    def __init__(self) -> None:
        self.seconds = 0.0

    @override
    def apply(self, event: Event, state: State) -> None:
        now = time.process_time()
        self.seconds = now if event is Event.FIT_START else now - self.seconds


def _fit(recipe: Callable[..., Trainer], model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float | None:
    """Train on the batches; return how long, on a GPU None: the whole is then timed from outside."""
    watch = Stopwatch()
    recipe(algorithms=[watch]).fit(model, batches, duration="1ep")
    return watch.seconds if batches[0][0].device.type == "cpu" else None
