"""LayerwiseLR against the closed form, beside other factors and schedules, and with wrong arguments."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
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


# -- against the published rules ---------------------------------------------------------------------------------------

Groups = set[tuple[frozenset[str], float, float]]


def timm_layer_ids(model: nn.Module) -> dict[str, int]:
    """Number the layers as timm does: groups in the order of the matcher; 99999 joins the one before; the rest is last."""
    rules: list[tuple[re.Pattern[str], tuple[int, ...], tuple[int, ...]]] = []
    for place, spec in enumerate(model.group_matcher(coarse=False).values()):
        for expression, suffix in [(spec, None)] if isinstance(spec, str) else spec:
            rules.append((re.compile(expression), (place,), suffix or ()))

    def key(name: str) -> tuple[float, ...]:
        for expression, prefix, suffix in rules:
            if found := expression.match(name):
                captured = [each for each in found.groups() if each is not None]
                return tuple(map(float, chain(prefix, captured, suffix)))
        return (float("inf"),)

    members: dict[tuple[float, ...], list[str]] = defaultdict(list)
    for name, _ in model.named_parameters():
        members[key(name)].append(name)
    ids: dict[str, int] = {}
    number = -1
    for group in sorted(members):
        number += group[-1] != 99999 or number < 0
        ids.update(dict.fromkeys(members[group], number))
    return ids


def timm_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> Iterator[dict[str, Any]]:
    """Make the groups of timm's ``param_groups_layer_decay``, from its published algorithm."""
    ids = timm_layer_ids(model)
    last = max(ids.values())
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        decays = parameter.ndim > 1
        group = groups.setdefault(
            (ids[name], decays),
            {"names": [], "lr_scale": layer_decay ** (last - ids[name]), "weight_decay": weight_decay * decays},
        )
        group["names"].append(name)
    yield from groups.values()


class ViTLike(nn.Module):
    """Names and shapes of timm's vision transformer, and its matcher."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
        self.patch_embed = nn.Sequential(nn.Conv2d(3, 4, 2))
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(depth)])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def group_matcher(self, *, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


class ResNetLike(nn.Module):
    """Names of timm's residual network, two stages of two blocks, and its matcher."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)) for _ in range(2)))
        self.layer2 = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)) for _ in range(2)))
        self.fc = nn.Linear(4, 2)

    def group_matcher(self, *, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^conv1|bn1|maxpool", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}


class Trunk(ViTLike):
    """The transformer without a head: the last block is the last layer."""

    def __init__(self) -> None:
        super().__init__()
        del self.head


BY_HAND: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (ViTLike, {"stem": ["cls_token", "pos_embed", "patch_embed"],
               "blocks": [["blocks.0"], ["blocks.1"], ["blocks.2", "norm"]], "head": "head"}),
    (ResNetLike, {"stem": ["conv1", "bn1"], "blocks": ["layer1.0", "layer1.1", "layer2.0", "layer2.1"], "head": "fc"}),
    (Trunk, {"stem": ["cls_token", "pos_embed", "patch_embed"],
             "blocks": [["blocks.0"], ["blocks.1"], ["blocks.2", "norm"]]}),
]  # fmt: skip


def our_groups(model: nn.Module, algorithm: LayerwiseLR, layers: Any = None) -> Groups:
    """Return names, rate and weight decay of each group, of a base rate of 1."""
    flat = [each for each in model.parameters() if each.ndim <= 1]
    deep = [each for each in model.parameters() if each.ndim > 1]
    options = [{"params": deep, "weight_decay": 0.05}, {"params": flat, "weight_decay": 0.0}]
    ledger = ParameterLedger(model, torch.optim.AdamW(options, lr=1.0), layers)
    Engine([algorithm], State(model, ledger), debug=True).emit(Event.FIT_START)
    assert ledger.version <= 1, "all factors in one regrouping"
    return {(frozenset(each.parameters), float(each.lr or 0), each.options["weight_decay"]) for each in ledger.groups}


@pytest.mark.parametrize(("kind", "layers"), BY_HAND)
def test_groups_equal_timms_algorithm(kind: type[nn.Module], layers: dict[str, Any]) -> None:
    """Group for group: the names, the scale and the weight decay, none for vectors."""
    model = kind()
    theirs = {
        (frozenset(each["names"]), each["lr_scale"], each["weight_decay"]) for each in timm_groups(model, 0.05, 0.75)
    }
    assert our_groups(model, LayerwiseLR(0.75), LayerMap(model, layers)) == theirs


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t", "convnext_atto"])
def test_groups_equal_timm(name: str) -> None:
    """Group for group with the library itself, on the layers that are found, where it is installed."""
    timm = pytest.importorskip("timm")
    optim = pytest.importorskip("timm.optim")
    model = timm.create_model(name, pretrained=False, num_classes=3)
    names = {id(each): name for name, each in model.named_parameters()}
    theirs = {
        (frozenset(names[id(each)] for each in group["params"]), group["lr_scale"], group["weight_decay"])
        for group in optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.75)
    }
    assert our_groups(model, LayerwiseLR(0.75)) == theirs


def _by_name(algorithm: LayerwiseLR, model: nn.Module) -> dict[str, float]:
    return {name: rate for names, rate, _ in our_groups(model, algorithm) for name in names}


def test_rates_equal_beits_rule() -> None:
    """Embeddings at id 0, block i at i + 1, everything after at n + 1: decay ** (n + 1 - id)."""
    transformers = pytest.importorskip("transformers")
    for classes in (transformers.BeitForImageClassification, transformers.BeitModel):
        config = transformers.BeitConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, image_size=16,
                                         intermediate_size=8, patch_size=8, num_labels=2)  # fmt: skip
        model = classes(config)
        found = _by_name(LayerwiseLR(0.65, convention="beit"), model)
        for name, _ in model.named_parameters():
            block = re.search(r"layers?\.(\d+)\.", name)
            layer_id = int(block[1]) + 1 if block else 0 if "embeddings" in name else 4
            assert found[name] == 0.65 ** (4 - layer_id), name


def test_rates_equal_electras_rule() -> None:
    """Of ``key_to_depths``: embeddings 0, layer i at i + 1, the task's head at n + 2: decay ** (n + 2 - depth)."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ElectraConfig(
        hidden_size=8, embedding_size=4, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8, vocab_size=20
    )
    model = transformers.ElectraForSequenceClassification(config)
    depths = {".embeddings.": 0, ".embeddings_project.": 0, "classifier.": 3 + 2}
    depths |= {f".encoder.layer.{index}.": index + 1 for index in range(3)}
    found = _by_name(LayerwiseLR(0.8, convention="electra"), model)
    for name, _ in model.named_parameters():
        (depth,) = [depth for key, depth in depths.items() if key in name]
        assert found[name] == 0.8 ** (3 + 2 - depth), name


@pytest.mark.parametrize(
    ("convention", "blocks", "with_head", "without"),
    [
        ("timm", 2, [0.125, 0.25, 0.5, 1.0], [0.25, 0.5, 1.0]),
        ("beit", 2, [0.125, 0.25, 0.5, 1.0], [0.125, 0.25, 0.5]),
        ("electra", 2, [0.0625, 0.125, 0.25, 1.0], [0.0625, 0.125, 0.25]),
    ],
)
def test_a_model_without_a_head(
    convention: Literal["timm", "beit", "electra"], blocks: int, with_head: list[float], without: list[float]
) -> None:
    """timm counts from the last layer there is, the others from where a head would be."""
    model = stack(blocks)
    assert list(layer_factors(LayerMap(model), 0.5, convention).values()) == with_head
    trunk = LayerMap(model[:-1], {"stem": "0", "blocks": ["1", "2"]})
    assert list(layer_factors(trunk, 0.5, convention).values()) == without


@pytest.mark.parametrize("decay, convention", [(0, "timm"), (1.5, "timm"), ("1", "beit"), (0.5, "llrd"), (0.5, None)])
def test_bad_arguments_of_the_function(decay: Any, convention: Any) -> None:
    """They are named as arguments of the function."""
    with pytest.raises(ArgumentError, match=r"layer_factors\((decay|convention)=\)"):
        layer_factors(LayerMap(stack()), decay, convention)


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
        {"convention": "llrd"}, {"convention": None}, {"convention": 1},
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
        "name": "LayerwiseLR",
        "arguments": {"decay": 0.8, "lr_head": 0.1, "convention": "timm", "lowest": None},
    }  # fmt: skip
