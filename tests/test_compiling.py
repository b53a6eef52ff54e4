"""Blocks compiled each by itself: few graphs whatever trains when, the same numbers and names, and the model given back."""

import copy
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import encoder
from thawline.algorithms import EMA, LISA, BlockCycle, FreezeOut, LayerFreeze, LayerThaw, LoRAInject, PrefixCache
from thawline.engine import Algorithm, ArgumentError, Event, FitResult, RecompileError, State, Trainer, compiling
from thawline.engine.compiling import GRAPHS, CompiledBlocks
from thawline.engine.doubles import Residual
from thawline.engine.layers import LayerMap

# What torch's compiler imports, and what it looks at.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:The .grad attribute of a Tensor that is not a leaf"
)


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[CompiledBlocks]]:
    """Trace without compiling, begin without graphs, and list the contexts that a fit opens."""
    opened: list[CompiledBlocks] = []

    class Listed(CompiledBlocks):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            opened.append(self)

    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    monkeypatch.setattr("thawline.engine.compiling.CompiledBlocks", Listed)
    torch._dynamo.reset()
    yield opened
    torch._dynamo.reset()


def fitted(
    algorithms: list[Algorithm],
    *,
    compiled: bool,
    model: nn.Module | None = None,
    duration: str = "6ep",
    samples: int = 37,
    **more: Any,
) -> tuple[nn.Module, FitResult]:
    """Train on so many samples, 8 a batch, the last one shorter; evaluate on 16 a batch."""
    if model is None:
        torch.manual_seed(0)
        model = Residual(depth=4, width=8, dropout=0.0)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(samples, 4, generator=generator), torch.randint(2, (samples,), generator=generator)
    data = TensorDataset(x, y)
    trainer = Trainer(
        algorithms=algorithms, optimizer=partial(torch.optim.AdamW, lr=1e-2), loss_fn=nn.functional.cross_entropy,
        compile="blocks" if compiled else False, progress=False, **more,
    )  # fmt: skip
    resume = more.get("run_dir") is not None
    return model, trainer.fit(
        model, DataLoader(data, 8, shuffle=True), DataLoader(data, 16), duration=duration, resume=resume
    )


SCHEDULES: dict[str, Callable[[], list[Algorithm]]] = {
    "full": list,
    "from the top": lambda: [LayerThaw(every=1)],
    "adapters from the top": lambda: [LoRAInject(rank=2), LayerThaw(every=1)],
    "one at a time": lambda: [BlockCycle(every="2ba")],
    "at random": lambda: [LISA(every="2ba")],
    "from the bottom": lambda: [LayerFreeze(start=0.1), EMA()],
    "by rate": lambda: [FreezeOut()],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_block_structure_has_five_graphs_at_most_and_the_numbers_stay(
    schedule: str, graphs: list[CompiledBlocks]
) -> None:
    """Whatever trains when, batches of three sizes, one as large as the model is wide, and evaluation included."""
    plain, expected = fitted(SCHEDULES[schedule](), compiled=False)
    model, result = fitted(SCHEDULES[schedule](), compiled=True)
    assert 0 < sum(map(len, graphs[-1].graphs.values())) <= GRAPHS
    assert list(model.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)
    assert result.metrics["eval/loss"] == pytest.approx(expected.metrics["eval/loss"], rel=1e-4)


@pytest.mark.parametrize("samples", [37, 33])
@pytest.mark.parametrize("more", [{}, {"accumulate": 2, "microbatch_size": 3}])
def test_a_cached_prefix_beside_it(more: dict[str, int], samples: int, graphs: list[CompiledBlocks]) -> None:
    """Compiled blocks are skipped as others are, the weights are the same, and a last batch of one sample is no error."""
    caches = PrefixCache(), PrefixCache()
    plain, _ = fitted([LayerThaw(every=2), caches[0]], compiled=False, samples=samples, **more)
    model, _ = fitted([LayerThaw(every=2), caches[1]], compiled=True, samples=samples, **more)
    assert caches[1].hits == caches[0].hits > 0
    assert caches[1].off is None
    assert all(len(each) <= GRAPHS for each in graphs[-1].graphs.values())
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


class Convolutional(nn.Module):
    """Three convolutions with BatchNorm, their input a view; a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 24)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU()) for _ in range(3)]
        )
        self.head = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).view(-1, 4, 6)
        for block in self.blocks:
            x = x + block(x)
        y: Tensor = self.head(x.flatten(1))
        return y


CONVOLUTIONAL: dict[str, Callable[[], list[Algorithm]]] = {
    "thawed": lambda: [LayerThaw(every=1)],
    "with adapters": lambda: [LoRAInject(rank=2, target=["blocks.*.0"]), LayerThaw(every=1)],
}


@pytest.mark.parametrize("schedule", CONVOLUTIONAL)
def test_convolutions_and_their_adapters(schedule: str, graphs: list[CompiledBlocks]) -> None:
    """Batches on both sides of the 16 samples at which torch changes its kernel."""
    plain, _ = fitted(CONVOLUTIONAL[schedule](), compiled=False, model=Convolutional())
    model, _ = fitted(CONVOLUTIONAL[schedule](), compiled=True, model=Convolutional())
    assert all(len(each) <= GRAPHS for each in graphs[-1].graphs.values())
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


class Late(Algorithm):
    """Attaches adapters in the middle of a fit."""

    events = frozenset({Event.EPOCH_START})

    def match(self, event: Event, state: State) -> bool:
        return state.clock.epoch == 3

    def apply(self, event: Event, state: State) -> None:
        for each in ("blocks.0.linear", "blocks.2.linear"):
            state.ledger.attach(each, "lora", owner=self.owner, rank=2, alpha=2.0)


def test_another_structure_has_graphs_of_its_own(graphs: list[CompiledBlocks]) -> None:
    """Adapters in half of the blocks from the middle of the fit on: more than torch's own limit, and no error."""
    plain, _ = fitted([Late(), BlockCycle(every="2ba")], compiled=False)
    model, _ = fitted([Late(), BlockCycle(every="2ba")], compiled=True)
    assert GRAPHS < sum(map(len, graphs[-1].graphs.values())) <= 2 * GRAPHS
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_transformer_trains_to_the_same_numbers() -> None:
    """Torch's encoder, whose evaluation takes another path where it is not compiled."""
    ids, labels = torch.randint(7, (12, 5)), torch.randint(2, (12,))
    outcomes: list[dict[str, Tensor]] = []
    for compile_ in (False, "blocks"):
        torch.manual_seed(0)
        model = encoder()
        trainer = Trainer(
            algorithms=[LayerThaw(every=1)], optimizer=partial(torch.optim.SGD, lr=0.1), compile=compile_,
            loss_fn=nn.functional.cross_entropy, progress=False,
        )  # fmt: skip
        batches = DataLoader(TensorDataset(ids, labels), 4)
        trainer.fit(model, batches, batches, duration="3ep")
        outcomes.append(model.state_dict())
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-4, atol=1e-5)


def test_a_resumed_fit_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    """Bit for bit, compiled in both."""
    algorithms = SCHEDULES["adapters from the top"]
    whole, expected = fitted(algorithms(), compiled=True, run_dir=tmp_path / "whole")
    fitted(algorithms(), compiled=True, run_dir=tmp_path / "cut", duration="3ep")
    with pytest.warns(UserWarning, match="duration"):
        resumed, result = fitted(algorithms(), compiled=True, run_dir=tmp_path / "cut")
    unlike = [name for name, each in whole.state_dict().items() if not torch.equal(each, resumed.state_dict()[name])]
    assert not unlike
    assert result.clock == expected.clock


def test_the_model_is_given_back(tmp_path: Path) -> None:
    """After a fit, and after one that failed, nothing of the compiler is left on the modules."""
    model, _ = fitted([], compiled=True)
    assert all(each._compiled_call_impl is None for each in model.modules())
    copy.deepcopy(model)(torch.zeros(2, 4))

    class BrokenError(Exception):
        """Raised on purpose."""

    def fail(*_: Any) -> Tensor:
        raise BrokenError

    trainer = Trainer(loss_fn=fail, compile="blocks", progress=False)
    with pytest.raises(BrokenError):
        trainer.fit(model, [(torch.zeros(2, 4), torch.zeros(2))], duration=1)
    assert all(each._compiled_call_impl is None for each in model.modules())


class Counting(nn.Module):
    """A block that does something else at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = ["1"]

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append("1")
        return self.linear(x) * len(self.calls)


class Breaking(nn.Module):
    """A block that asks for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum().item() > 0 else x


@pytest.mark.parametrize(
    ("block", "said"), [(Counting, "more than 5 graphs of a Counting"), (Breaking, "as one graph")]
)
def test_what_would_fall_back_to_eager_is_an_error(block: type[nn.Module], said: str) -> None:
    """Ever more graphs, or none of the whole block: it says to write compile=False."""
    model = nn.Sequential(nn.Linear(4, 4), *[block() for _ in range(3)], nn.Linear(4, 2))
    layers = {"stem": "0", "blocks": ["1.*", "2.*", "3.*"], "head": "4"}
    trainer = Trainer(loss_fn=nn.functional.cross_entropy, compile="blocks", progress=False)
    batches = [(torch.ones(2, 4), torch.zeros(2, dtype=torch.long))] * 12
    with pytest.raises(RecompileError, match=rf"(?s){said}.*Trainer\(compile=False\)"):
        trainer.fit(model, batches, duration=1, layers=layers)
    assert all(each._compiled_call_impl is None for each in model.modules())


def test_a_model_without_blocks_is_refused() -> None:
    """It says how to name them."""
    model = nn.Linear(4, 2)
    with pytest.raises(ArgumentError, match=r"takes a model with blocks, which Linear has not.*layers="):
        CompiledBlocks(model, LayerMap(model))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for the CPU with a C++ compiler")
def test_compiled_to_machine_code_the_numbers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's default compiler."""
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    plain, _ = fitted(SCHEDULES["adapters from the top"](), compiled=False)
    model, _ = fitted(SCHEDULES["adapters from the top"](), compiled=True)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


def test_blocks_that_differ_in_a_number_are_structures_of_their_own() -> None:
    """As with a rate of dropout that grows with depth: each has its graphs."""
    model = nn.Sequential(
        *[nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1 * place)) for place in range(7)], nn.Linear(4, 4)
    )
    layers = LayerMap(model)
    with CompiledBlocks(model, layers, backend="aot_eager") as blocks:
        model(torch.ones(2, 4)).sum().backward()
    assert len(blocks.graphs) >= 7
    assert all(len(each) <= GRAPHS for each in blocks.graphs.values())
