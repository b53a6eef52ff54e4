"""LayerFreeze against Composer's law, what it frees, in a loop of one's own, resumed, and with wrong arguments."""

from __future__ import annotations

import io
import warnings
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from helpers import MODELS, Bare, Shared, Tied, cnn, encoder, loader, mlp, pseudo_gradients, same_weights, weights
from thawline.algorithms import EMA, GradClip, LayerFreeze, LayerwiseLR, freeze_layers, freeze_share
from thawline.algorithms.layer_freeze import freeze_units
from thawline.engine import (
    Algorithm,
    ArgumentError,
    Checkpointing,
    Event,
    LayerMap,
    OptimizerError,
    ParameterLedger,
    ThawlineWarning,
    Trainer,
)
from timelines import Loop, stack

pytestmark = pytest.mark.filterwarnings("ignore:LayerFreeze.*freezes nothing:thawline.engine.errors.ThawlineWarning")


def frozen_layers(ledger: ParameterLedger) -> list[str]:
    """Return the layers that are wholly frozen, in depth order."""
    return [layer.name for layer in ledger.layers if not ledger.trainable.intersection(layer.parameters)]


# -- the law -----------------------------------------------------------------------------------------------------------


@given(
    progress=st.fractions(0, 1, max_denominator=200),
    start=st.sampled_from(["0", "1/10", "1/4", "3/10", "1/2", "7/10", "9/10"]).map(Fraction),
    level=st.sampled_from(["0", "1/5", "1/2", "4/5", "1"]).map(Fraction),
    layers=st.integers(1, 200),
)
def test_the_share_is_composers(progress: Fraction, start: Fraction, level: Fraction, layers: int) -> None:
    """Against exact rational arithmetic; the number of layers is equal wherever rounding cannot decide it."""
    exact = Fraction(0) if progress <= start else (progress - start) / (1 - start) * level
    share = freeze_share(float(progress), start=float(start), level=float(level))
    assert share == pytest.approx(float(exact), abs=1e-12)
    if (exact * layers).denominator > 1 or not exact or exact == 1:
        assert int(share * layers) == int(exact * layers)


@given(
    blocks=st.integers(1, 8),
    epochs=st.integers(1, 12),
    start=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75]),
    level=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)
def test_after_each_epoch_the_laws_layers_are_frozen(blocks: int, epochs: int, start: float, level: float) -> None:
    """After epoch e of E the first floor(share * n) layers of the n besides the head are frozen, from the input."""
    names = ["stem", *(f"blocks[{index}]" for index in range(blocks)), "head"]
    loop = Loop([LayerFreeze(start, level)], stack(blocks), duration=epochs)
    for epoch in range(1, epochs + 1):
        loop.epoch()
        done = epoch / epochs
        share = level * ((done - start) / (1 - start)) if done > start else 0.0
        assert frozen_layers(loop.ledger) == names[: int(share * (blocks + 1))]
        assert loop.state.metrics["layer_freeze/share"] == share
        assert loop.state.metrics["layer_freeze/layers"] == int(share * (blocks + 1))


def test_half_of_a_fit_written_out() -> None:
    """Four layers besides the head, eight epochs, from the middle on: one more layer an epoch."""
    loop = Loop([LayerFreeze(start=0.5)], stack(3), duration="8ep")
    counts = [(loop.epoch(), len(frozen_layers(loop.ledger)))[1] for _ in range(8)]
    assert counts == [0, 0, 0, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("duration", ["8ba", "64sp", "2ep"])
def test_at_batch_a_short_fit_freezes_in_time(duration: str) -> None:
    """Whatever the duration's unit, at="batch" follows the law after each batch."""
    loop = Loop([LayerFreeze(start=0.5, at="batch")], stack(3), duration=duration, batches=4)
    counts = [4 + 1 - len(row) for row in loop.run()]
    assert counts == [0, 0, 0, 0, 0, 1, 2, 3]
    assert frozen_layers(loop.ledger) == ["stem", "blocks[0]", "blocks[1]", "blocks[2]"]


def test_a_fit_that_ends_inside_an_epoch_reaches_the_end() -> None:
    """The last EPOCH_END comes also then: with "3ba" Composer's never runs."""
    loop = Loop([LayerFreeze(start=0.0)], stack(2), duration="3ba", batches=5)
    loop.run()
    assert frozen_layers(loop.ledger) == ["stem", "blocks[0]", "blocks[1]"]


@pytest.mark.parametrize("granularity", ["block", "leaf"])
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_the_last_layer_never_freezes(kind: str, granularity: Literal["block", "leaf"]) -> None:
    """Whatever the model, something still trains when all is frozen that may, and every parameter has its unit."""
    model = MODELS[kind]()
    units = freeze_units(model, LayerMap(model), granularity)
    assert sorted(name for unit in units for name in unit) == sorted(name for name, _ in model.named_parameters())
    loop = Loop([LayerFreeze(start=0.0, granularity=granularity)], model, duration="1ba")
    loop.state.tick(8)
    loop.engine.emit(Event.EPOCH_END)
    assert loop.ledger.trainable == set(units[-1])


# -- leaves ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [mlp(), cnn(), encoder(2), Tied(), Bare()])
def test_leaves_are_the_modules_without_children_depth_first(model: nn.Module) -> None:
    """Against torch's own traversal; modules that own parameters and have children add none."""
    leaves = [m for m in model.modules() if not list(m.children()) and list(m.parameters())]
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        first.setdefault(id(parameter), name)
    units = freeze_units(model, LayerMap(model), "leaf")
    assert len(units) == len(leaves)
    seen: set[str] = set()
    for unit, leaf in zip(units, leaves, strict=True):
        own = {first[id(each)] for each in leaf.parameters()} - seen
        assert own <= set(unit)
        seen |= own


def test_a_shared_leaf_counts_as_often_as_composer_meets_it() -> None:
    """Composer's list has a module that two others share twice, so that a share means as many layers here."""
    layer = nn.Linear(4, 4)
    model = nn.Sequential(nn.Sequential(layer), nn.Sequential(layer), nn.Linear(4, 2))
    units = freeze_units(model, LayerMap(model), "leaf")
    assert units == [("0.0.weight", "0.0.bias"), (), ("2.weight", "2.bias")]
    assert len(freeze_units(Shared(), LayerMap(Shared()), "leaf")) == 3  # twice in one module: met once


def test_parameters_of_modules_with_children_freeze_with_the_leaf_below_them() -> None:
    """Attention's in_proj_weight, which Composer never freezes, goes with out_proj; a bare scale with what follows it."""
    units = freeze_units(encoder(1), LayerMap(encoder(1)), "leaf")
    attention = "encoder.layers.0.self_attn"
    assert units[:2] == [
        ("embed.weight",),
        tuple(f"{attention}.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")),
    ]
    assert freeze_units(Bare(), LayerMap(Bare()), "leaf")[0] == ("scale", "body.0.weight", "body.0.bias")


def test_parameters_behind_the_last_leaf_freeze_with_it() -> None:
    """A scale beside a ReLU, which has no parameters and so is no leaf."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.act = nn.ReLU()

    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), Scaled())
    units = freeze_units(net, LayerMap(net), "leaf")
    assert units == [("0.weight", "0.bias"), ("1.weight", "1.bias", "2.scale")]


# -- what it frees -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["block", "leaf"])
@pytest.mark.parametrize("factory", [partial(torch.optim.SGD, lr=0.1), partial(torch.optim.AdamW, lr=0.1)])
def test_frozen_tensors_lose_gradient_state_and_group_and_the_optimizer_saves_and_loads(
    granularity: Literal["block", "leaf"], factory: Any
) -> None:
    """Composer's leaves optimizer.state, whose next checkpoint is a KeyError or cannot be loaded."""
    model = mlp(depth=5)
    optimizer = factory(model.parameters())
    for progress in (0.6, 0.8, 1.0):
        pseudo_gradients([each for each in model.parameters() if each.requires_grad], seed=1)
        optimizer.step()
        depth, share = freeze_layers(model, optimizer, progress=progress, granularity=granularity)
        assert depth == int(share * 4)
        frozen = [each for each in model.parameters() if not each.requires_grad]
        assert len(frozen) == 2 * depth
        assert all(each.grad is None and each not in optimizer.state for each in frozen)
        grouped = {id(each) for group in optimizer.param_groups for each in group["params"]}
        assert grouped == {id(each) for each in model.parameters()} - {id(each) for each in frozen}
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        again = factory([each for each in model.parameters() if each.requires_grad])
        again.load_state_dict(torch.load(file, weights_only=True))
        optimizer.zero_grad()


@given(st.integers(1, 5), st.integers(0, 5))
def test_frozen_weights_do_not_move(depth: int, seed: int) -> None:
    """What the law has frozen is bit-unchanged to the end, under AdamW with weight decay and momentum behind it."""
    torch.manual_seed(seed)
    loop = Loop([LayerFreeze(start=0.0)], stack(depth), duration=5)
    known: dict[str, torch.Tensor] = {}
    for _ in range(5):
        loop.epoch()
        for name, value in known.items():
            assert torch.equal(loop.ledger.parameters[name], value)
        known |= {name: loop.ledger.parameters[name].detach().clone() for name in loop.ledger.frozen}
    assert known


# -- in a loop of one's own --------------------------------------------------------------------------------------------


def test_a_loop_with_torchs_scheduler_goes_on() -> None:
    """One group keeps its dictionary and its rate while layers leave it."""
    model = mlp(depth=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    group = optimizer.param_groups[0]
    found = []
    for epoch in range(4):
        pseudo_gradients([each for each in model.parameters() if each.requires_grad], seed=epoch)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        found.append((*freeze_layers(model, optimizer, progress=(epoch + 1) / 4, start=0.25), group["lr"]))
    assert optimizer.param_groups[0] is group
    assert found == [(0, 0.0, 1 / 2), (1, 1 / 3, 1 / 3), (2, pytest.approx(2 / 3), 1 / 4), (3, 1.0, 1 / 5)]


def test_frozen_batchnorm_keeps_its_statistics() -> None:
    """After freeze_layers a frozen BatchNorm stands in eval mode, also where model.train() came before."""
    model = cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freeze_layers(model, optimizer, progress=1.0)
    model.train()
    freeze_layers(model, optimizer, progress=1.0)
    before = weights(model)
    model(torch.randn(4, 1, 8, 8))
    assert same_weights(weights(model), before)


def test_several_optimizers_and_a_ledger_are_taken() -> None:
    """Two optimizers side by side; a ledger, whose other owners go on holding theirs."""
    model = mlp(depth=3)
    first = torch.optim.SGD(list(model[0].parameters()), lr=0.1)
    second = torch.optim.AdamW([*model[2].parameters(), *model[4].parameters()])
    assert freeze_layers(model, [first, second], progress=0.75) == (1, 0.5)
    assert not first.param_groups
    assert len(second.param_groups[0]["params"]) == 4
    ledger = ParameterLedger(model, second)
    ledger.freeze("2.bias", owner="me")
    assert freeze_layers(model, ledger, progress=1.0) == (2, 1.0)
    assert ledger.owners("2.bias") == ("freeze_layers", "me")
    ledger.verify()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"progress": -0.1}, "progress"), ({"progress": 1.1}, "progress"), ({"progress": "half"}, "progress"),
        ({"start": 1.0}, "start"), ({"start": -1}, "start"), ({"level": 1.5}, "level"), ({"level": None}, "level"),
        ({"granularity": "tensor"}, "granularity"),
    ],
)  # fmt: skip
def test_bad_arguments_of_the_function(arguments: dict[str, Any], name: str) -> None:
    """Each is named, and nothing has changed."""
    model = mlp()
    with pytest.raises(ArgumentError, match=rf"^freeze_layers\({name}=\) takes"):
        freeze_layers(model, torch.optim.SGD(model.parameters()), **{"progress": 1.0, **arguments})
    assert all(each.requires_grad for each in model.parameters())


def test_the_function_refuses_what_belongs_to_another_model() -> None:
    """An optimizer over other parameters, and another model's ledger."""
    model, other = mlp(), mlp()
    with pytest.raises(OptimizerError, match="not in the model"):
        freeze_layers(model, torch.optim.SGD(other.parameters()), progress=1.0)
    with pytest.raises(ArgumentError, match=r"freeze_layers\(model=\) takes the model of the ledger"):
        freeze_layers(model, ParameterLedger(other, partial(torch.optim.SGD, lr=0.1)), progress=1.0)


# -- a fit, and its resume ---------------------------------------------------------------------------------------------


def _fit(folder: Path, freeze: LayerFreeze, resume: Path | bool = False) -> tuple[nn.Module, Any]:
    torch.manual_seed(3)
    model = mlp(depth=4)
    trainer = Trainer(
        algorithms=[GradClip(1.0), freeze, EMA(half_life="0.1dur")], loss_fn=cross_entropy, run_dir=folder,
        checkpoint=Checkpointing(every="1ba", keep=30), optimizer=partial(torch.optim.AdamW, lr=0.01), progress=False,
        debug=True,
    )  # fmt: skip
    return model, trainer.fit(model, loader(), duration="6ep", resume=resume)


@pytest.mark.parametrize("at", ["epoch", "batch"])
@pytest.mark.parametrize("granularity", ["block", "leaf"])
def test_a_fit_resumed_at_any_batch_goes_on_as_if_never_stopped(
    tmp_path: Path, at: Literal["epoch", "batch"], granularity: Literal["block", "leaf"]
) -> None:
    """Composer warns that it cannot; here weights, history and timeline are equal."""
    arguments: Any = {"start": 0.3, "at": at, "granularity": granularity}
    model, whole = _fit(tmp_path / "whole", LayerFreeze(**arguments))
    assert len(whole.timeline.spans) > 2
    for batch in (3, 12, 16, 17, 20):
        again, result = _fit(tmp_path / f"from{batch}", LayerFreeze(**arguments), tmp_path / "whole" / f"ba{batch:08d}")
        assert same_weights(weights(again), weights(model)), batch
        assert result.timeline.spans == whole.timeline.spans
        assert result.history == whole.history


def test_a_group_that_freezes_at_the_cut_does_not_disturb_the_resume(tmp_path: Path) -> None:
    """A checkpoint cut after an EPOCH_END that took a whole group away: the timeline has a new span from there."""

    def fit(folder: Path, resume: Path | bool = False) -> Any:
        torch.manual_seed(0)
        trainer = Trainer(
            algorithms=[LayerFreeze(0.3), LayerwiseLR()], loss_fn=cross_entropy, run_dir=tmp_path / folder, progress=False,
            checkpoint=Checkpointing(every="1ba", keep=30),
        )  # fmt: skip
        return trainer.fit(mlp(depth=4), loader(), duration="6ep", resume=resume)

    whole = fit(Path("whole"))
    assert [len(span.groups) for span in whole.timeline.spans] == [4, 3, 2]
    assert fit(Path("again"), tmp_path / "whole" / "ba00000016").timeline.spans == whole.timeline.spans


def test_a_fit_logs_layers_and_share() -> None:
    """History has both, for each epoch."""
    trainer = Trainer(algorithms=[LayerFreeze(start=0.0)], loss_fn=cross_entropy, progress=False)
    rows = trainer.fit(mlp(depth=5), loader(), duration="4ep").history
    assert [(row["layer_freeze/layers"], row["layer_freeze/share"]) for row in rows] == [
        (1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0),
    ]  # fmt: skip


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"start": 1.0}, {"start": -0.1}, {"start": "0.5dur"}, {"start": None}, {"start": True}, {"start": float("nan")},
        {"level": 1.01}, {"level": -1}, {"level": "all"}, {"level": False},
        {"granularity": "tensor"}, {"granularity": None}, {"granularity": 1}, {"at": "step"}, {"at": True},
    ],
)  # fmt: skip
def test_a_bad_argument_is_an_error_that_names_it(arguments: dict[str, Any]) -> None:
    """The message names the argument and what it got, and ends with a call that works."""
    ((name, value),) = arguments.items()
    with pytest.raises(ArgumentError) as caught:
        LayerFreeze(**arguments)
    assert caught.value.argument == f"LayerFreeze({name}=)"
    assert caught.value.got is value
    assert isinstance(eval(caught.value.example), LayerFreeze)


def test_a_description_builds_it_again() -> None:
    """describe() and from_description() are inverse."""
    freeze = LayerFreeze(0.25, 0.5, granularity="leaf", at="batch")
    assert Algorithm.from_description(freeze.describe()).describe() == freeze.describe()


@pytest.mark.filterwarnings("default::thawline.engine.errors.ThawlineWarning")
@pytest.mark.parametrize(
    ("freeze", "duration", "warns"),
    [
        (LayerFreeze(), "1ep", True),
        (LayerFreeze(), "2ep", True),
        (LayerFreeze(at="batch"), "1ep", False),
        (LayerFreeze(), "8ep", False),
        (LayerFreeze(0.0), "4ep", False),
        (LayerFreeze(0.0, 0.2), "4ep", True),
        (LayerFreeze(0.0), "20ba", False),
        (LayerFreeze(0.0), "10ba", True),
        (LayerFreeze(0.0, at="batch"), "10ba", False),
        (LayerFreeze(0.0, at="batch"), "1ba", True),
        (LayerFreeze(level=0.0), "1ep", False),
    ],
)
def test_what_freezes_nothing_before_the_last_step_warns(freeze: LayerFreeze, duration: str, *, warns: bool) -> None:
    """Exactly the schedules under which every batch trains everything say so at the start; level=0 asks for it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = Loop([freeze], stack(3), duration=duration, batches=10).run()
    assert [each.category for each in caught] == [ThawlineWarning] * warns
    assert (len(rows[-1]) == 5) is (warns or not freeze.level)
