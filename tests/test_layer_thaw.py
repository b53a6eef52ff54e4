"""LayerThaw as golden timelines, as a law, beside others, resumed, and with wrong arguments."""

from __future__ import annotations

import io
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from helpers import Tied, encoder, loader, mlp, same_weights, weights
from thawline.algorithms import LayerFreeze, LayerThaw, LayerwiseLR, LoRAInject, Phase, ThawSchedule, thaw_order
from thawline.algorithms.layer_thaw import thawed_count
from thawline.engine import (
    Algorithm,
    ArgumentError,
    Checkpointing,
    Clock,
    Event,
    LayerError,
    LayerMap,
    ParameterLedger,
    SelectorError,
    Stage,
    State,
    ThawlineWarning,
    Time,
    Trainer,
    configure_logging,
)
from timelines import Loop, Rates, rates, stack, timeline

HEAD: Rates = {"head": 1.0}
ONE: Rates = {"blocks[2]": 0.5, **HEAD}
TWO: Rates = {"blocks[1]": 0.25, **ONE}
THREE: Rates = {"blocks[0]": 0.125, **TWO}
ALL: Rates = {"stem": 0.0625, **THREE}


# -- golden timelines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("thaw", "expected"),
    [
        (LayerThaw(), [HEAD, ONE, TWO, THREE, ALL, ALL]),
        (LayerThaw(every=2), [HEAD, HEAD, ONE, ONE, TWO, TWO]),
        (LayerThaw(1, limit=2), [HEAD, ONE, TWO, TWO, TWO, TWO]),
        (LayerThaw(1, stem=False), [HEAD, ONE, TWO, THREE, THREE, THREE]),
        (LayerThaw(3, lr_scale=1.0), [HEAD, HEAD, HEAD, *[{"blocks[2]": 1.0, "head": 1.0}] * 3]),
        (
            LayerThaw(2, start=1),
            [{"blocks[2]": 1.0, "head": 1.0}] * 2
            + [{"blocks[1]": 0.5, "blocks[2]": 1.0, "head": 1.0}] * 2
            + [{"blocks[0]": 0.25, "blocks[1]": 0.5, "blocks[2]": 1.0, "head": 1.0}] * 2,
        ),
        (LayerThaw(1, start=0, limit=1), [HEAD, *[ONE] * 5]),
        (
            LayerThaw(2, start=["stem", "head"], limit=1),
            [{"stem": 1.0, "head": 1.0}] * 2 + [{"stem": 1.0, "blocks[2]": 0.5, "head": 1.0}] * 4,
        ),
        (
            LayerThaw(2, order="bottom", limit=2),
            [HEAD] * 2
            + [{"blocks[0]": 0.5, "head": 1.0}] * 2
            + [{"blocks[0]": 0.5, "blocks[1]": 0.25, "head": 1.0}] * 2,
        ),
        (
            LayerThaw(2, order=["stem", "blocks[-1]"]),
            [HEAD] * 2 + [{"stem": 0.5, "head": 1.0}] * 2 + [{"stem": 0.5, "blocks[2]": 0.25, "head": 1.0}] * 2,
        ),
        (
            LayerThaw(3, start="blocks[-1]"),
            [{"blocks[2]": 1.0}] * 3 + [{"blocks[2]": 1.0, "head": 0.5}] * 3,
        ),
    ],
)
def test_what_trains_in_each_epoch(thaw: LayerThaw, expected: list[Rates]) -> None:
    """Trainable layers and rates of six epochs, written out."""
    assert timeline(thaw) == expected


@pytest.mark.parametrize(
    ("every", "batches"),
    [("3ba", [0, 0, 0, 1, 1, 1, 2, 2]), ("24sp", [0, 0, 0, 1, 1, 1, 2, 2]), ("0.25dur", [0, 0, 1, 1, 2, 2, 3, 3])],
)
def test_other_times_act_inside_an_epoch(every: str, batches: list[int]) -> None:
    """Batches, samples and shares of the duration release at the batch in which they have passed."""
    assert timeline(LayerThaw(every), duration="2ep", batches=4) == [
        [HEAD, ONE, TWO, THREE][count] for count in batches
    ]


def test_several_layers_that_are_due_at_once_each_have_their_own_rate() -> None:
    """An interval shorter than a batch releases several layers between two batches."""
    assert timeline(LayerThaw("4sp"), duration="3ba", batches=3) == [HEAD, TWO, ALL]


def test_named_parts_thaw_in_depth_order() -> None:
    """A part between blocks and head is the first to be released."""
    layers = LayerMap(stack(2), {"stem": "0", "blocks": ["1"], "structure_module": "2", "head": "3"})
    assert thaw_order(layers) == ("structure_module", "blocks[0]", "stem")
    rows = timeline(LayerThaw(limit=1), stack(2), layers=layers, duration="2ep")
    assert rows == [HEAD, {"structure_module": 0.5, "head": 1.0}]


def test_a_head_tied_to_the_embedding_thaws_with_the_stem() -> None:
    """The tied weight is held until the stem is released, the last of all."""
    loop = Loop([LayerThaw()], Tied(), duration="5ep")
    trains = [(loop.epoch(), "embed.weight" in loop.ledger.trainable)[1] for _ in range(4)]
    assert trains == [False, False, False, True]


def test_a_start_in_parts_of_layers_keeps_its_rate() -> None:
    """Biases that train from the start are not scaled when the rest of their layer is released."""
    loop = Loop([LayerThaw(start=["head", "*.bias"])], duration="6ep")
    loop.epoch()
    with pytest.raises(AssertionError, match="one rate a layer"):
        loop.epoch()
    by_name = {name: group.lr for group in loop.ledger.groups for name in group.parameters}
    assert by_name == {"1.bias": 1.0, "2.bias": 1.0, "3.bias": 1.0, "4.weight": 1.0, "4.bias": 1.0, "3.weight": 0.5}


def test_the_rate_of_what_is_released_warms_up() -> None:
    """The released layer begins at zero and reaches its rate after the warmup; what trains already goes on."""
    rows = timeline(LayerThaw("1ep", warmup="4ba", limit=1), duration="2ep", batches=4)
    assert [row["head"] for row in rows] == [1.0] * 8
    assert [row.get("blocks[2]") for row in rows] == [None] * 4 + [0.0, 0.125, 0.25, 0.375]


def test_moments_are_kept_where_asked() -> None:
    """moments="keep" gives what an optimizer knew of a layer back with its release."""
    for moments, kept in (("keep", True), ("drop", False)):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        state = State(model, ParameterLedger(model, optimizer), Time("3ep"))
        thaw = LayerThaw(moments=moments)
        thaw.apply(Event.FIT_START, state)
        assert model[2].weight not in optimizer.state
        assert model[4].weight in optimizer.state
        state.clock = Clock(epoch=1)
        thaw.apply(Event.EPOCH_START, state)
        assert (model[2].weight in optimizer.state) is kept


def test_integer_parameters_stay_frozen_in_a_thawed_layer() -> None:
    """A quantized tensor cannot train; the layer that it lies in is released all the same."""
    model = mlp(depth=4)
    codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    model[2].register_parameter("codes", codes)
    loop = Loop([LayerThaw()], model)
    loop.run()
    assert loop.ledger.frozen == {"2.codes"}


# -- as a law ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    blocks=st.integers(1, 6),
    every=st.integers(1, 3),
    start=st.integers(0, 6),
    limit=st.none() | st.integers(1, 8),
    scale=st.sampled_from([0.5, 1.0, 1 / 2.6]),
    stem=st.booleans(),
)
def test_the_trainable_set_is_a_function_of_the_clock(
    blocks: int, every: int, start: int, limit: int | None, scale: float, stem: bool
) -> None:
    """In epoch e the head, the start and the first floor(e / every) others train, the k-th at scale**k."""
    start = min(start, blocks)
    others = [f"blocks[{index}]" for index in reversed(range(blocks - start))] + ["stem"] * stem
    others = others[:limit]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThawlineWarning)  # a start that leaves nothing to release
        thaw = LayerThaw(every, start=start, limit=limit, lr_scale=scale, stem=stem)
        rows = timeline(thaw, stack(blocks), duration="5ep")
    begin = {"head": 1.0, **{f"blocks[{index}]": 1.0 for index in range(blocks - start, blocks)}}
    for epoch, row in enumerate(rows):
        expected = begin | {name: scale**k for k, name in enumerate(others[: epoch // every], 1)}
        assert row == pytest.approx(expected, rel=1e-15)


@given(st.integers(0, 50), st.integers(1, 9), st.integers(1, 12))
def test_thawed_count_is_the_number_of_intervals_passed(epoch: int, every: int, layers: int) -> None:
    """Against division of whole numbers."""
    assert thawed_count(Clock(epoch=epoch), Time(every), layers) == min(epoch // every, layers)


# -- beside others -----------------------------------------------------------------------------------------------------


def test_beside_lora_a_thawed_block_trains_its_adapters() -> None:
    """LoRAInject holds the base weights, LayerThaw the blocks: what nobody holds are the adapters of what is released."""
    loop = Loop([LoRAInject(rank=2), LayerThaw()], encoder(2), duration="4ep")
    trains = []
    for _ in range(4):
        loop.epoch()
        trains.append(sorted({name.rpartition("lora_")[0] for name in loop.ledger.trainable if "lora_" in name}))
        assert all("lora_" in name or name.startswith("classifier") for name in loop.ledger.trainable)
    layer = "encoder.layers.{}.self_attn"
    assert [[any(layer.format(i) in each for each in row) for i in (0, 1)] for row in trains] == [
        [False, False], [False, True], [True, True], [True, True],
    ]  # fmt: skip


def test_the_order_of_the_list_does_not_matter() -> None:
    """Every order of four algorithms gives the same trainable set and rates in each batch."""
    found = []
    for order in itertools.permutations(range(4)):
        algorithms: list[Algorithm] = [
            LayerThaw(1), LayerFreeze(start=0.5), LayerwiseLR(0.9), LoRAInject(rank=2, target="all-linear"),
        ]  # fmt: skip
        torch.manual_seed(0)
        loop = Loop([algorithms[index] for index in order], encoder(3), duration="6ep")
        found.append([(loop.epoch(), loop.ledger.trainable, rates(loop.ledger))[1:] for _ in range(6)])
    assert all(each == found[0] for each in found)
    assert len({trainable for trainable, _ in found[0]}) > 3


def test_two_in_one_list_hold_each_for_itself() -> None:
    """What two hold is released when both have released it, at the product of their factors."""
    rows = timeline([LayerThaw(1, limit=2), LayerThaw(2, limit=1)], duration="4ep")
    assert rows == [HEAD, HEAD, *[{"blocks[2]": 0.25, "head": 1.0}] * 2]


class HoldHead(Algorithm):
    """Holds some layers from the start, as LoRAInject or a user's own algorithm may."""

    events = frozenset({Event.FIT_START})
    stage = Stage.TRAINABILITY

    def __init__(self, *layers: str) -> None:
        self.layers = layers

    def apply(self, event: Event, state: State) -> None:
        state.ledger.freeze(self.layers, owner=self.owner)


@pytest.mark.parametrize(
    ("held", "arguments", "expected"),
    [
        (["head"], {}, [{"blocks[2]": 1.0}, {"blocks[1]": 0.5, "blocks[2]": 1.0},
                        {"blocks[0]": 0.25, "blocks[1]": 0.5, "blocks[2]": 1.0},
                        *[{"stem": 0.125, "blocks[0]": 0.25, "blocks[1]": 0.5, "blocks[2]": 1.0}] * 3]),
        (["head", "blocks[2]"], {"limit": 1}, [{"blocks[1]": 1.0}, *[{"blocks[0]": 0.5, "blocks[1]": 1.0}] * 5]),
        (["blocks[1:3]"], {"every": 2}, [HEAD] * 2 + [{"blocks[0]": 0.5, **HEAD}] * 2
                                        + [{"stem": 0.25, "blocks[0]": 0.5, **HEAD}] * 2),
        (["blocks[1]", "stem"], {"limit": 2}, [HEAD, ONE, *[{"blocks[0]": 0.25, **ONE}] * 4]),
        (["head", "blocks[0]"], {"order": "bottom", "every": 3},
         [{"blocks[1]": 1.0}] * 3 + [{"blocks[1]": 1.0, "blocks[2]": 0.5}] * 3),
        (["head"], {"order": ["blocks[0]", "stem"], "every": 5}, [{"blocks[0]": 1.0}] * 5 + [{"stem": 0.5, "blocks[0]": 1.0}]),
        (["head"], {"start": 1, "every": 5}, [{"blocks[2]": 1.0}] * 5 + [{"blocks[1]": 0.5, "blocks[2]": 1.0}]),
    ],
)  # fmt: skip
def test_layers_that_others_hold_cost_no_interval(
    held: list[str], arguments: dict[str, Any], expected: list[Rates]
) -> None:
    """It begins with the first layer that can train, and goes on with those that can; the list's order is the same."""
    assert timeline([LayerThaw(**arguments), HoldHead(*held)]) == expected
    assert timeline([HoldHead(*held), LayerThaw(**arguments)]) == expected


def test_what_its_holder_lets_go_later_trains_where_its_turn_is_past() -> None:
    """A layer that was passed over is released with the next one, so the other's release is enough."""
    loop = Loop([LayerThaw(1), HoldHead("blocks[1]")])
    for _ in range(4):
        loop.epoch()
    loop.ledger.thaw("blocks[1]", owner="HoldHead")
    assert rates(loop.ledger) == {"stem": 0.125, "blocks[0]": 0.25, "blocks[1]": 0.25, "blocks[2]": 0.5, "head": 1.0}


def test_all_held_by_others_warns_and_names_them() -> None:
    """There is nothing that it could release."""
    loop = Loop([LayerThaw(), HoldHead("stem", "blocks")])
    with pytest.warns(ThawlineWarning, match="releases nothing: all else is held by HoldHead"):
        loop.run()


def test_beside_a_schedule_of_phases_a_layer_trains_once_both_have_released_it() -> None:
    """In whichever order they stand, and a warning says that each holds what the other releases."""
    phases = [
        *(Phase(thaw=each, until="1ep") for each in ("head", "blocks[2]", "blocks[1]")),
        Phase(thaw=("blocks[0]", "stem")),
    ]
    for step in (1, -1):
        with pytest.warns(ThawlineWarning, match="each hold what the other releases"):
            rows = Loop([LayerThaw(every=2), ThawSchedule(phases)][::step], duration="6ep").run()
        assert [set(row) - {"head"} for row in rows] == [
            set(),
            set(),
            *[{"blocks[2]"}] * 2,
            *[{"blocks[1]", "blocks[2]"}] * 2,
        ]


def test_it_says_where_it_begins() -> None:
    """In the log, with the layers passed over."""
    stream = io.StringIO()
    configure_logging(stream=stream)
    try:
        timeline([LayerThaw(limit=1), HoldHead("head", "blocks[1]")])
    finally:
        configure_logging(None)
    assert "begins" in stream.getvalue()
    assert "blocks[2]" in stream.getvalue()


def _language_model(kind: str, head: str, options: dict[str, Any]) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{kind}{head}")(getattr(transformers, f"{kind}Config")(**options))
    return model


_LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
          "num_key_value_heads": 2, "vocab_size": 50}  # fmt: skip
_T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 50,
    "decoder_start_token_id": 0,
}


@pytest.mark.parametrize(
    ("kind", "head", "options", "order"),
    [
        ("Llama", "ForCausalLM", _LLAMA, 0),
        ("Llama", "ForCausalLM", _LLAMA, 1),
        ("T5", "ForConditionalGeneration", _T5, 0),
    ],
)
def test_with_lora_on_a_language_model_as_it_stands(
    tmp_path: Path, kind: str, head: str, options: dict[str, Any], order: int
) -> None:
    """The head is pre-trained and held: the last block's adapters begin, and a resumed run ends in the same weights."""
    batch = {"input_ids": torch.arange(8).reshape(2, 4), "labels": torch.arange(8).reshape(2, 4)}

    def fit(folder: str, resume: bool | Path = False) -> tuple[nn.Module, Any]:
        model = _language_model(kind, head, options)
        algorithms = [LoRAInject(), LayerThaw(every=2)]
        trainer = Trainer(
            algorithms=algorithms[::-1] if order else algorithms, progress=False, run_dir=tmp_path / folder,
            checkpoint=Checkpointing(every="1ba", keep=9),
        )  # fmt: skip
        return model, trainer.fit(model, [batch], duration="6ep", resume=resume)

    model, result = fit("whole")
    layers = [span.layers for span in result.timeline.spans]
    names = [layer.name for layer in LayerMap(_language_model(kind, head, options)).blocks]
    assert layers == [tuple(names[-count:]) for count in (1, 2, 3)]
    for cut in (1, 3):
        again, _ = fit(f"from{cut}", next((tmp_path / "whole").rglob(f"ba{cut:08d}")))
        assert same_weights(weights(again), weights(model))


# -- a fit, and its resume ---------------------------------------------------------------------------------------------


def _fit(folder: Path, thaw: LayerThaw, *, resume: bool | Path = False) -> tuple[nn.Module, Any]:
    torch.manual_seed(3)
    model = mlp(depth=4)
    trainer = Trainer(
        algorithms=[thaw], loss_fn=cross_entropy, run_dir=folder, checkpoint=Checkpointing(every="1ba", keep=30),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01), progress=False, debug=True,
    )  # fmt: skip
    return model, trainer.fit(model, loader(), duration="4ep", resume=resume)


@pytest.mark.parametrize("every", ["1ep", "3ba"])
def test_a_fit_resumed_at_any_batch_goes_on_as_if_never_stopped(tmp_path: Path, every: str) -> None:
    """Weights and timeline of a run resumed from each of its checkpoints equal those of the whole run."""
    model, whole = _fit(tmp_path / "whole", LayerThaw(every, warmup="2ba"))
    assert len(whole.timeline.spans) == 4
    for batch in (1, 3, 4, 5, 9, 12):
        checkpoint = tmp_path / "whole" / "checkpoints" / f"ba{batch:08d}"
        checkpoint = checkpoint if checkpoint.exists() else next((tmp_path / "whole").rglob(f"ba{batch:08d}"))
        again, result = _fit(tmp_path / f"from{batch}", LayerThaw(every, warmup="2ba"), resume=checkpoint)
        assert same_weights(weights(again), weights(model)), batch
        assert result.timeline.spans == whole.timeline.spans


def test_a_second_fit_starts_afresh(tmp_path: Path) -> None:
    """The same instance in a second fit begins with the head alone."""
    thaw = LayerThaw(1, limit=1)
    for run in ("first", "second"):
        _, result = _fit(tmp_path / run, thaw)
        assert [span.layers for span in result.timeline.spans] == [("head",), ("blocks[2]", "head")]


def test_state_goes_through_json() -> None:
    """What is saved is the layers to release and how many were."""
    thaw, again = LayerThaw(1, limit=3), LayerThaw(1, limit=3)
    timeline(thaw, duration="3ep")
    assert thaw.state_dict() == {"steps": [["blocks[2]"], ["blocks[1]"], ["blocks[0]"]], "thawed": 2, "begun": True}
    again.load_state_dict(thaw.state_dict())
    assert again.state_dict() == thaw.state_dict()


@pytest.mark.parametrize(
    "thaw", [LayerThaw(), LayerThaw("3ba", start=["head", "*.bias"], limit=2, order=["stem"], warmup="2ba")]
)
def test_a_description_builds_it_again(thaw: LayerThaw) -> None:
    """describe() and from_description() are inverse."""
    assert Algorithm.from_description(thaw.describe()).describe() == thaw.describe()


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"every": 0}, {"every": -1}, {"every": "2"}, {"every": 1.5}, {"every": None}, {"every": "1.5ep"}, {"every": True},
        {"start": -1}, {"start": True}, {"start": ""}, {"start": []}, {"start": [1]}, {"start": None}, {"start": 1.0},
        {"limit": 0}, {"limit": -1}, {"limit": 1.5}, {"limit": True}, {"limit": "3"},
        {"lr_scale": 0}, {"lr_scale": -0.5}, {"lr_scale": float("nan")}, {"lr_scale": float("inf")}, {"lr_scale": "1"},
        {"order": "up"}, {"order": []}, {"order": [1]}, {"order": None}, {"order": 3},
        {"warmup": 0}, {"warmup": "soon"}, {"warmup": 0.1}, {"moments": "forget"}, {"moments": None},
        {"stem": 1}, {"stem": "yes"}, {"stem": None},
    ],
)  # fmt: skip
def test_a_bad_argument_is_an_error_that_names_it(arguments: dict[str, Any]) -> None:
    """The message names the argument and what it got, and ends with a call that works."""
    ((name, value),) = arguments.items()
    with pytest.raises(ArgumentError) as caught:
        LayerThaw(**arguments)
    assert caught.value.argument == f"LayerThaw({name}=)"
    assert caught.value.got is value
    assert isinstance(eval(caught.value.example), LayerThaw)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"start": 4}, ArgumentError, r"LayerThaw\(start=\) takes at most 3, .* got 4"),
        ({"start": "blocks[7]"}, SelectorError, "names no block"),
        ({"start": "heed"}, SelectorError, "'heed' matches nothing"),
        ({"order": ["blocks[0]", "blocks[-3]"]}, ArgumentError, r"LayerThaw\(order=\) takes each layer once"),
        (
            {"order": ["blockz[0]"]},
            ArgumentError,
            r"LayerThaw\(order=\) takes layers of this model, .* got 'blockz\[0\]'",
        ),
        ({"order": ["blocks[9]"]}, SelectorError, "names no block"),
    ],
)
def test_what_does_not_fit_the_model_is_an_error_at_the_start(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    """A model decides how many blocks there are, and what they are called."""
    with pytest.raises(error, match=message):
        Loop([LayerThaw(**arguments)])


def test_a_model_with_a_head_alone_says_what_to_pass() -> None:
    """One linear layer has nothing below the head."""
    with pytest.raises(LayerError, match=r"(?s)layers below the head.*layers=\{"):
        Loop([LayerThaw()], nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("thaw", "duration", "batches", "warns"),
    [
        (LayerThaw(3), "3ep", 1, True),
        (LayerThaw(3), "4ep", 1, False),
        (LayerThaw("10ba"), "10ba", 5, True),
        (LayerThaw("9ba"), "10ba", 5, False),
        (LayerThaw("10ba"), "2ep", 5, True),
        (LayerThaw("9ba"), "2ep", 5, False),
        (LayerThaw(2), "10ba", 5, True),
        (LayerThaw(1), "10ba", 5, False),
        (LayerThaw("1dur"), "9ep", 1, True),
        (LayerThaw("0.9dur"), "20ep", 1, False),
        (LayerThaw(start=3, stem=False), "9ep", 1, True),
        (LayerThaw(start=["stem", "blocks", "head"]), "9ep", 1, True),
    ],
)
def test_what_releases_nothing_within_the_fit_warns(
    thaw: LayerThaw, duration: str, batches: int, *, warns: bool
) -> None:
    """Exactly the schedules that release nothing say so at the start."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Loop([thaw], duration=duration, batches=batches).run()
    assert (thaw.thawed == 0) is warns
    assert [each.category for each in caught] == [ThawlineWarning] * warns
    assert not warns or "releases nothing" in str(caught[0].message)


def test_a_backbone_frozen_by_hand_warns() -> None:
    """What the user froze before the fit stays frozen, and a schedule that would release only that says so."""
    model = stack()
    model[:-1].requires_grad_(False)
    with pytest.warns(ThawlineWarning, match=r"frozen before the fit.*requires_grad_\(True\)"):
        Loop([LayerThaw()], model).run()


def test_what_the_optimizer_instance_does_not_hold_warns() -> None:
    """Not requires_grad is to blame, but an optimizer over a part of the model."""
    for selected, message in (("4", r"releases nothing: no group of the optimizer instance.*Pass a factory"),
                              ("[34]", r"to train 7 parameters, and 5 \(first '2.weight'\) cannot: no group.*Pass a factory")):  # fmt: skip
        model = stack()
        held = [each for name, each in model.named_parameters() if name[0] in selected]
        state = State(model, ParameterLedger(model, torch.optim.SGD(held, lr=0.1)), Time("6ep"))
        thaw = LayerThaw()
        thaw.apply(Event.FIT_START, state)
        with pytest.warns(ThawlineWarning, match=message):
            thaw.apply(Event.EPOCH_START, state)


def test_a_factor_above_one_warns() -> None:
    """ULMFiT's 2.6 divides."""
    with pytest.warns(ThawlineWarning, match=r"Write LayerThaw\(lr_scale=0.385\)"):
        Loop([LayerThaw(lr_scale=2.6)])


def test_its_text_is_its_arguments() -> None:
    """What it has done so far is no argument."""
    thaw = LayerThaw(2)
    timeline(thaw)
    assert repr(thaw) == repr(LayerThaw(2))


def test_a_warmup_beyond_the_fit_warns() -> None:
    """50 is epochs; the warning points at the call of fit."""
    trainer = Trainer(algorithms=[LayerThaw(warmup=50)], loss_fn=nn.functional.cross_entropy, progress=False)
    with pytest.warns(ThawlineWarning, match=r"LayerThaw\(warmup='50ep'\) is not over .* after 3ep") as said:
        trainer.fit(mlp(), loader(), duration=3)
    assert [each.filename for each in said] == [__file__]


def test_a_misspelled_start_is_answered_with_layers_that_there_are() -> None:
    """A model of two blocks and a head has no stem."""
    trainer = Trainer(algorithms=[LayerThaw(start="haed")], loss_fn=nn.functional.cross_entropy, progress=False)
    with pytest.raises(SelectorError, match=r"Layers: blocks\[0\], blocks\[1\], head\. ") as caught:
        trainer.fit(mlp(), loader(), duration=3)
    assert "stem" not in str(caught.value)
