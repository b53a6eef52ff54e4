"""LayerwiseLR against the closed form, beside other factors and schedules, and with wrong arguments."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from helpers import Tied, decay_groups, encoder, loader, mlp
from thawline.algorithms import LayerThaw, LayerwiseLR, LoRAInject, TrainOnly, layer_factors
from thawline.engine import (
    Algorithm,
    ArgumentError,
    Engine,
    Event,
    LayerMap,
    LedgerError,
    ParameterLedger,
    State,
    Trainer,
    cosine,
)
from timelines import Loop, rates, stack, timeline


@given(blocks=st.integers(0, 12), decay=st.floats(0.05, 1.0))
def test_a_layers_factor_is_the_decay_to_the_power_of_its_distance_from_the_head(blocks: int, decay: float) -> None:
    """timm's convention: decay ** (depth of the head - depth of the layer), the head itself at 1."""
    names = ["stem", *(f"blocks[{index}]" for index in range(blocks)), "head"]
    layers = LayerMap(stack(blocks), {"stem": "0", "blocks": [str(i + 1) for i in range(blocks)], "head": str(blocks + 1)}
                      if blocks else {"stem": "0", "head": "1"})  # fmt: skip
    factors = layer_factors(layers, decay)
    assert list(factors) == names
    for depth, name in enumerate(names):
        assert factors[name] == pytest.approx(decay ** (len(names) - 1 - depth), rel=1e-12)


def test_rates_written_out() -> None:
    """Three blocks, a stem, a head at lr 1: halved from layer to layer, in every batch alike."""
    expected = {"stem": 0.0625, "blocks[0]": 0.125, "blocks[1]": 0.25, "blocks[2]": 0.5, "head": 1.0}
    assert timeline(LayerwiseLR(0.5), duration="3ep", batches=2) == [expected] * 6


def test_the_heads_own_rate_leaves_the_others_alone() -> None:
    """lr_head is absolute; the layers below relate to the optimizer's rate."""
    assert timeline(LayerwiseLR(0.5, lr_head=3.0), stack(1), duration=1) == [
        {"stem": 0.25, "blocks[0]": 0.5, "head": 3.0}
    ]
    assert timeline(LayerwiseLR(1.0, lr_head=3.0), stack(1), duration=1) == [
        {"stem": 1.0, "blocks[0]": 1.0, "head": 3.0}
    ]


@given(st.integers(1, 30), st.floats(1e-4, 1.0))
def test_from_the_lowest_the_factors_rise_on_a_geometric_line(blocks: int, lowest: float) -> None:
    """The layer beside the input has the factor asked for, the head 1, the same ratio between; the groups are derived once."""
    loop = Loop([LayerwiseLR(lowest=lowest)], stack(blocks))
    found = list(rates(loop.ledger).values())
    assert found == pytest.approx([lowest ** (1 - index / (blocks + 1)) for index in range(blocks + 2)])
    assert loop.ledger.version <= 1


def test_factors_multiply_with_those_of_others() -> None:
    """LayerThaw's factor for the k-th layer times LayerwiseLR's for its distance."""
    rows = timeline([LayerThaw(lr_scale=0.5), LayerwiseLR(0.9)], duration="3ep")
    assert rows[-1] == pytest.approx({"blocks[1]": 0.25 * 0.81, "blocks[2]": 0.5 * 0.9, "head": 1.0})


def test_the_schedule_goes_on_top() -> None:
    """lr(layer, k) = base * decay**distance * cosine(k / n) at every step k of n."""
    rows: list[dict[str, float]] = []

    class Watch(Algorithm):
        """Writes down the rates of each step."""

        events = frozenset({Event.BEFORE_FORWARD})

        def apply(self, event: Event, state: State) -> None:
            """Write them down."""
            of = state.layers.of
            rows.append({of(name).name: group.lr or 0.0 for group in state.ledger.groups for name in group.parameters})

    trainer = Trainer(
        algorithms=[LayerwiseLR(0.7), Watch()], optimizer=partial(torch.optim.SGD, lr=0.2), schedule=cosine(end=0.1),
        loss_fn=cross_entropy, progress=False,
    )  # fmt: skip
    trainer.fit(mlp(depth=3), loader(), duration="2ep")
    factor = cosine(end=0.1)
    assert len(rows) == 8
    for step, row in enumerate(rows):
        at = factor(step / 8)
        assert row == pytest.approx(
            {"blocks[0]": 0.2 * 0.49 * at, "blocks[1]": 0.2 * 0.7 * at, "head": 0.2 * at}, rel=1e-12
        )


def test_weight_decay_and_other_options_stay_with_their_parameters() -> None:
    """Each layer has a group for matrices and one for the rest, as the optimizer had."""
    model = mlp(depth=3)
    state = State(model, ParameterLedger(model, decay_groups(model)))
    Engine([LayerwiseLR(0.5)], state, debug=True).emit(Event.FIT_START)
    found = {
        name: (group.lr, group.options["weight_decay"]) for group in state.ledger.groups for name in group.parameters
    }
    assert found == {
        "0.weight": (0.005, 0.1), "0.bias": (0.005, 0.0), "2.weight": (0.01, 0.1), "2.bias": (0.01, 0.0),
        "4.weight": (0.02, 0.1), "4.bias": (0.02, 0.0),
    }  # fmt: skip


def test_a_tied_head_and_adapters_have_the_rate_of_their_layer() -> None:
    """A weight tied to the embedding lies in the stem; an adapter beside a weight has its layer's factor."""
    model = Tied()
    loop = Loop([LayerwiseLR(0.5)], model)
    assert {name: group.lr for group in loop.ledger.groups for name in group.parameters}["embed.weight"] == 0.125
    for order in (1, -1):
        algorithms: list[Algorithm] = [LoRAInject(rank=2), LayerwiseLR(0.5)]
        loop = Loop(algorithms[::order], encoder(2))
        rates = {name: group.lr for group in loop.ledger.groups for name in group.parameters if "lora_" in name}
        assert {name.split(".")[2]: lr for name, lr in rates.items()} == {"0": 0.25, "1": 0.5}


def test_two_owners_of_the_heads_rate_are_an_error_that_names_both() -> None:
    """One of them must go: absolute rates do not multiply."""
    with pytest.raises(LedgerError, match=r"(?s)LayerwiseLR.*TrainOnly|TrainOnly.*LayerwiseLR"):
        Loop([LayerwiseLR(lr_head=1.0), TrainOnly("head", lr={"head": 2.0})])


@pytest.mark.parametrize(
    "arguments",
    [
        {"decay": 0}, {"decay": 1.1}, {"decay": -0.5}, {"decay": "0.9"}, {"decay": None}, {"decay": True},
        {"decay": float("nan")}, {"lr_head": 0}, {"lr_head": -1}, {"lr_head": "1e-3"}, {"lr_head": float("inf")},
        {"lowest": 0}, {"lowest": 2}, {"lr_head": 10**400},
    ],
)  # fmt: skip
def test_a_bad_argument_is_an_error_that_names_it(arguments: dict[str, Any]) -> None:
    """The message names the argument and what it got, and ends with a call that works."""
    ((name, value),) = arguments.items()
    with pytest.raises(ArgumentError) as caught:
        LayerwiseLR(**arguments)
    assert caught.value.argument == f"LayerwiseLR({name}=)"
    assert caught.value.got is value
    assert isinstance(eval(caught.value.example), LayerwiseLR)
    assert Algorithm.from_description(LayerwiseLR(0.8, lr_head=0.1).describe()).describe() == {
        "name": "LayerwiseLR", "arguments": {"decay": 0.8, "lr_head": 0.1, "lowest": None},
    }  # fmt: skip
