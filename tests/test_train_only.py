"""TrainOnly: what is selected trains, at its rate; everything else is held, also what comes later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from helpers import Tied, loader, mlp  # registers the op "gain" as well
from thawline.algorithms import LISA, BlockCycle, FreezeAt, FreezeOut, LayerFreeze, TrainOnly, full, partial
from thawline.algorithms.train_only import all_but
from thawline.engine import (
    Algorithm,
    ArgumentError,
    Event,
    LayerMap,
    LedgerError,
    ParameterLedger,
    SelectorError,
    State,
    ThawlineWarning,
    Trainer,
)
from timelines import Loop, stack, timeline


def test_what_is_selected_trains_and_nothing_else() -> None:
    """Layers, from the first batch to the last."""
    rows = timeline(TrainOnly(["head", "blocks[-1:]"], lr={"head": 3.0}), duration="3ep")
    assert rows == [{"blocks[2]": 1.0, "head": 3.0}] * 3


def test_globs_and_names_select_within_layers() -> None:
    """Biases and one matrix."""
    loop = Loop([TrainOnly(["*.bias", "2.weight"])])
    assert loop.ledger.trainable == {"1.bias", "2.bias", "3.bias", "4.bias", "2.weight"}


def test_a_head_tied_to_the_embedding_does_not_train_it() -> None:
    """The head alone is its normalization: the tied weight lies in the stem."""
    assert Loop([TrainOnly("head")], Tied()).ledger.trainable == {"norm.weight", "norm.bias"}


def test_what_is_attached_later_to_a_held_layer_is_held() -> None:
    """The hold is on the layer, not on a list of its parameters."""
    loop = Loop([TrainOnly("head")], mlp())
    loop.ledger.attach("0", "gain", owner="somebody", size=3)
    loop.ledger.attach("4", "gain", owner="somebody", size=3)
    assert "0.gain" not in loop.ledger.trainable
    assert "4.gain" in loop.ledger.trainable


def test_all_but_names_whole_layers_where_it_can() -> None:
    """Together with what it leaves out, it is every parameter once."""
    model = stack(2)
    layers = LayerMap(model)
    assert all_but(layers, ()) == ["stem", "blocks[0]", "blocks[1]", "head"]
    assert all_but(layers, [name for name, _ in model.named_parameters()]) == []
    assert all_but(layers, ["1.bias"]) == ["stem", "1.weight", "blocks[1]", "head"]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"select": ""}, "select"), ({"select": []}, "select"), ({"select": None}, "select"), ({"select": [1]}, "select"),
        ({"select": "head", "lr": 1e-3}, "lr"), ({"select": "head", "lr": {"head": 0}}, "lr"),
        ({"select": "head", "lr": {"head": True}}, "lr"), ({"select": "head", "lr": {1: 1.0}}, "lr"),
        ({"select": "head", "lr": {"head": float("nan")}}, "lr"), ({"select": "head", "lr": {"head": 10**400}}, "lr"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_an_error_that_names_it(arguments: dict[str, Any], name: str) -> None:
    """The message names the argument and what it got, and ends with a call that works."""
    with pytest.raises(ArgumentError) as caught:
        TrainOnly(**arguments)
    assert caught.value.argument == f"TrainOnly({name}=)"
    assert caught.value.got is arguments[name]
    assert isinstance(eval(caught.value.example), TrainOnly)


def test_a_selector_that_matches_nothing_lists_the_nearest_names() -> None:
    """At the start of the fit, where the model is known; in lr= as well."""
    with pytest.raises(SelectorError, match="'hed' matches nothing"):
        Loop([TrainOnly("hed")])
    with pytest.raises(SelectorError, match="'hed' matches nothing"):
        Loop([TrainOnly("head", lr={"hed": 1.0})])


@pytest.mark.parametrize("only", [TrainOnly("head"), TrainOnly(["head", "*.bias"], lr={"head": 1e-3})])
def test_a_description_builds_it_again(only: TrainOnly) -> None:
    """describe() and from_description() are inverse."""
    assert Algorithm.from_description(only.describe()).describe() == only.describe()


@pytest.mark.parametrize(
    ("only", "message"),
    [
        (
            TrainOnly("head", lr={"blocks[0:2]": 1e-3}),
            r"nothing of 'blocks\[0:2\]' trains.*Write TrainOnly\(\['head', 'blocks\[0:2",
        ),
        (partial(last=9)[0], r"asks for 9 blocks of 3: all train\. Write partial\(last=3\)"),
    ],
)
def test_what_cannot_have_been_meant_warns(only: Algorithm, message: str) -> None:
    """A rate for what is held, and more blocks than there are."""
    with pytest.warns(ThawlineWarning, match=message):
        Loop([only])


def test_a_rate_for_what_the_user_froze_warns() -> None:
    """It is selected, and does not train all the same."""
    model = stack()
    model[1].requires_grad_(False)
    with (
        pytest.warns(ThawlineWarning, match="frozen before the fit"),
        pytest.warns(ThawlineWarning, match=r"nothing of 'blocks\[0\]' trains"),
    ):
        Loop([TrainOnly(["head", "blocks[0]"], lr={"blocks[0]": 0.1})], model)


def test_what_the_optimizer_instance_does_not_hold_is_said_to_be_so() -> None:
    """A warning where some of it trains, an error where nothing does; both say that a factory is to be passed."""
    model = mlp()
    ledger = ParameterLedger(model, torch.optim.SGD(model[4].parameters(), lr=0.1))
    with pytest.warns(ThawlineWarning, match=r"4 parameters, and 2 \(first '2.weight'\) cannot: .*Pass a factory"):
        TrainOnly(["blocks[-1]", "head"]).apply(Event.FIT_START, State(model, ledger))
    model = mlp()
    trainer = Trainer(algorithms=[TrainOnly("blocks[-1]")], loss_fn=cross_entropy, progress=False)
    with pytest.raises(LedgerError, match=r"The optimizer instance holds 2 of them\. Pass a factory"):
        trainer.fit(model, loader(), duration=1, optimizer=torch.optim.SGD(model[4].parameters(), lr=0.1))


@pytest.mark.parametrize(
    "algorithms",
    [
        [TrainOnly(["head", "blocks[1]"])], [LISA(every=1)], [BlockCycle(every="1ba")], [LayerFreeze(start=0)],
        [FreezeOut()], [FreezeAt({"blocks[0]": 1})], full(),
    ],
)  # fmt: skip
def test_what_the_user_froze_is_said_to_stay_so(algorithms: list[Algorithm]) -> None:
    """A backbone frozen before the fit, out of habit, leaves them nothing to do."""
    net = stack()
    net[:-1].requires_grad_(False)
    with pytest.warns(ThawlineWarning, match="frozen before the fit, and stay so"):
        timeline(algorithms, net, duration=6)
