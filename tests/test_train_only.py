"""TrainOnly: what is selected trains, at its rate; everything else is held, also what comes later."""

from __future__ import annotations

from typing import Any

import pytest

from helpers import Tied, mlp  # registers the op "gain" as well
from thawline.algorithms import TrainOnly
from thawline.algorithms.train_only import all_but
from thawline.engine import Algorithm, ArgumentError, LayerMap, SelectorError
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
        ({"select": "head", "lr": {"head": float("nan")}}, "lr"),
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
