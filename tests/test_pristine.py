"""Checkpoints with fingerprints: what never trained is not written, must come back the same, and nothing else is lost."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from helpers import cnn, loader, mlp, same_weights, weights
from thawline.algorithms import EMA, BlockCycle, LayerFreeze, LayerThaw, LoRAInject
from thawline.engine import (
    Algorithm,
    ArgumentError,
    CheckpointError,
    Checkpointing,
    Event,
    State,
    Trainer,
    load_weights,
)
from thawline.engine.pristine import Pristine, fingerprint
from thawline.engine.snapshot import read_checkpoint

EACH = Checkpointing(every="1ba", keep=99, frozen="fingerprint")
Trainer_ = partial(
    Trainer, loss_fn=cross_entropy, optimizer=partial(torch.optim.AdamW, lr=0.02), progress=False, checkpoint=EACH
)


def seeded(make: Any = mlp) -> nn.Module:
    """Return the same model each time."""
    torch.manual_seed(3)
    model: nn.Module = make()
    return model


def images() -> list[tuple[Tensor, Tensor]]:
    """Return four batches for the small convolutional network."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 1, 8, 8, generator=generator), torch.arange(4)) for _ in range(4)]


class Nudge(Algorithm):
    """Changes a frozen weight and a buffer in place, as a quantizer or a merge may."""

    events = frozenset({Event.BATCH_START})

    def apply(self, event: Event, state: State) -> None:
        if state.clock.batch == 0:
            state.ledger.freeze("blocks", owner=self.owner)
        if state.clock.batch == 3:
            with torch.no_grad():
                state.model.get_parameter("0.bias").add_(1.0)


def test_a_lora_checkpoint_costs_what_adapters_and_optimizer_cost(tmp_path: Path) -> None:
    """At most 1.2 times their bytes, all three files together, however large the base is."""
    data = loader(features=1024)
    model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(4)], nn.Linear(1024, 2))
    result = Trainer_(algorithms=[LoRAInject(rank=8)], run_dir=tmp_path).fit(model, data, duration="2ba")
    assert result.last is not None
    tree = read_checkpoint(result.last)
    moments = [each for state in tree["ledger"]["optimizers"]["AdamW"]["state"].values() for each in state.values()]
    adapters = [model.get_parameter(name) for name in tree["ledger"]["trainable"]]
    trains = sum(each.nbytes for each in [*adapters, *moments])
    assert sum(each.stat().st_size for each in result.last.iterdir()) <= 1.2 * trains
    assert trains < 0.1 * sum(each.nbytes for each in model.parameters())


RECIPES: dict[str, tuple[Any, Any, list[Algorithm]]] = {
    "lora": (mlp, loader(), [LoRAInject(rank=2), LayerThaw(every="2ba"), EMA()]),
    "thaw": (mlp, loader(), [LayerThaw(every="2ba"), EMA()]),
    "cycle": (partial(mlp, depth=5), loader(), [BlockCycle(every="1ba")]),
    "freeze": (cnn, images(), [LayerFreeze(start=0.0, at="batch")]),
    "norm": (cnn, images(), [LayerThaw(every="3ba")]),
    "nudge": (mlp, loader(), [Nudge()]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_resumed_from_fingerprints_at_any_step_is_the_run_that_went_on(tmp_path: Path, name: str) -> None:
    """Weights, buffers and the next checkpoint's fingerprints, bit for bit."""
    make, data, algorithms = RECIPES[name]
    whole = seeded(make)
    Trainer_(algorithms=algorithms, run_dir=tmp_path / "whole").fit(whole, data, duration="2ep")
    last = read_checkpoint(tmp_path / "whole" / "ba00000008")
    for step in range(1, 8):
        model, folder = seeded(make), tmp_path / str(step)
        result = Trainer_(algorithms=algorithms, run_dir=folder).fit(
            model, data, duration="2ep", resume=tmp_path / "whole" / f"ba{step:08d}"
        )
        assert same_weights(weights(model), weights(whole)), step
        assert result.last is not None
        again = read_checkpoint(result.last)
        assert again["fingerprints"] == last["fingerprints"]
        assert list(again["model"]) == list(last["model"])


def test_what_trained_once_is_written_also_when_it_is_frozen_again(tmp_path: Path) -> None:
    """Block by block in turn: a block's values are in the checkpoints from its first step on, before only its hash."""
    model = seeded(partial(mlp, depth=4))
    Trainer_(algorithms=[BlockCycle(every="1ba", order="ascending")], run_dir=tmp_path).fit(
        model, loader(), duration="3ba"
    )
    held = [list(read_checkpoint(path)["fingerprints"]) for path in sorted(tmp_path.glob("ba*"))]
    assert held == [["2.weight", "2.bias", "4.weight", "4.bias"], ["4.weight", "4.bias"], []]


def test_a_write_that_nobody_trained_is_seen(tmp_path: Path) -> None:
    """A frozen weight that an algorithm changed in place is written from then on."""
    Trainer_(algorithms=[Nudge()], run_dir=tmp_path).fit(seeded(), loader(), duration="2ep")
    names = {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert set(read_checkpoint(tmp_path / "ba00000003")["fingerprints"]) == names
    assert set(read_checkpoint(tmp_path / "ba00000004")["fingerprints"]) == names - {"0.bias"}


class KeyEncoder(nn.Module):
    """Moves frozen weights behind torch's count of writes, as momentum contrast does (He et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            for query, key in zip(self.query.parameters(), self.key.parameters(), strict=True):
                key.data = key.data * 0.9 + query.data * 0.1
        return self.head(self.query(x) + self.key(x))


def test_what_a_model_writes_to_itself_uncounted_is_in_the_checkpoint(tmp_path: Path) -> None:
    """The weights come back, and a resumed run is the run that went on."""
    whole, cut = seeded(KeyEncoder), seeded(KeyEncoder)
    result = Trainer_(run_dir=tmp_path / "whole").fit(whole, loader(), duration="4ba")
    assert not torch.equal(whole.key.weight, seeded(KeyEncoder).key.weight)
    assert result.last is not None
    fresh = seeded(KeyEncoder)
    load_weights(result.last, fresh)
    assert torch.equal(fresh.key.weight, whole.key.weight)
    Trainer_(run_dir=tmp_path / "cut").fit(cut, loader(), duration="2ba")
    resumed = seeded(KeyEncoder)
    with pytest.warns(UserWarning, match="another duration"):
        Trainer_(run_dir=tmp_path / "cut").fit(resumed, loader(), duration="4ba", resume=True)
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


@pytest.mark.parametrize("change", ["value", "shape", "dtype", "missing"])
def test_another_model_is_refused_by_the_names_that_differ(tmp_path: Path, change: str) -> None:
    """A bit, a shape, a dtype: refused before anything of the model has changed."""
    Trainer_(algorithms=[LoRAInject(rank=2)], run_dir=tmp_path).fit(seeded(), loader(), duration="2ba")
    model = seeded()
    with torch.no_grad():
        if change == "value":
            model.get_parameter("0.weight").view(torch.int32)[0, 0] ^= 1
        elif change == "shape":
            model = seeded(partial(mlp, width=8))
        elif change == "dtype":
            model.get_submodule("0").double()
        else:
            model.get_submodule("0").register_parameter("bias", None)
    before = weights(model)
    pristine, saved = Pristine(model), read_checkpoint(tmp_path / "ba00000002")["fingerprints"]
    with pytest.raises(CheckpointError, match=r"does not bring the same ones: '0\.(weight|bias)'.*frozen='store'"):
        pristine.check(saved)
    if change == "value":
        with pytest.raises(CheckpointError, match="'0.weight' has other values"):
            Trainer_(algorithms=[LoRAInject(rank=2)], run_dir=tmp_path).fit(
                model, loader(), duration="3ba", resume=True
            )
    assert same_weights(weights(model), before)


def test_a_run_may_go_on_in_the_other_mode(tmp_path: Path) -> None:
    """From fingerprints to whole checkpoints, which then need no base, and back; to the same bits."""
    recipe = partial(Trainer_, algorithms=[LayerThaw(every="3ba")])
    whole, stored, back = seeded(), seeded(), seeded()
    fit = {"duration": "2ep"}
    recipe(run_dir=tmp_path / "whole").fit(whole, loader(), **fit)
    policy = Checkpointing(every="1ba", keep=99)
    recipe(run_dir=tmp_path / "b", checkpoint=policy).fit(stored, loader(), resume=tmp_path / "whole/ba00000002", **fit)
    assert read_checkpoint(tmp_path / "b" / "ba00000003")["fingerprints"] == {}
    recipe(run_dir=tmp_path / "c").fit(back, loader(), resume=tmp_path / "b/ba00000005", **fit)
    assert same_weights(weights(stored), weights(whole))
    assert same_weights(weights(back), weights(whole))


def test_fingerprints_tell_bits_shapes_and_dtypes_apart() -> None:
    """0.0 from -0.0, one NaN from another, a row from a column, equal bytes of two dtypes; a view is what it shows."""
    zero = torch.zeros(2, 3)
    others = [-zero, zero.T, zero.int(), zero.flatten(), torch.full((2, 3), torch.nan), -torch.full((2, 3), torch.nan)]
    assert len({fingerprint(each) for each in [zero, *others]}) == 7
    wide = torch.arange(12.0).reshape(3, 4)
    assert fingerprint(wide[:, 1:3]) == fingerprint(wide[:, 1:3].contiguous())
    assert fingerprint(torch.empty(0)).startswith("float32 0 ")
    assert fingerprint(torch.tensor(1, dtype=torch.bfloat16)).startswith("bfloat16 scalar ")


@pytest.mark.parametrize("frozen", ["hash", None, True])
def test_a_wrong_way_is_named(frozen: Any) -> None:
    """With the two there are."""
    with pytest.raises(ArgumentError, match=r"Checkpointing\(frozen=\) takes 'store' or 'fingerprint'"):
        Checkpointing(frozen=frozen)
