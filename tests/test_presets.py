"""Presets as golden timelines, joined with others, in fits, and with wrong arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial as bind
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from helpers import encoder, loader, mlp
from thawline.algorithms import (
    EMA,
    GradClip,
    LayerThaw,
    LayerwiseLR,
    LoRAInject,
    ThawSchedule,
    TrainOnly,
    chain_thaw,
    fine_tune,
    full,
    head_only,
    lora,
    lp_ft,
    partial,
    progressive,
    ulmfit,
)
from thawline.engine import (
    Algorithm,
    ArgumentError,
    LayerMap,
    SelectorError,
    Trainer,
    cosine,
    join,
    linear,
    warmup,
)
from timelines import Loop, Rates, rates, stack, timeline

EVERYTHING: Rates = dict.fromkeys(("stem", "blocks[0]", "blocks[1]", "blocks[2]", "head"), 1.0)
DECAYED: Rates = {"stem": 0.0625, "blocks[0]": 0.125, "blocks[1]": 0.25, "blocks[2]": 0.5, "head": 1.0}


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        (head_only(), [{"head": 1.0}] * 4),
        (head_only(lr=3.0), [{"head": 3.0}] * 4),
        (partial(last=1), [{"blocks[2]": 1.0, "head": 1.0}] * 4),
        (partial(last=2, lr_trunk=0.1, lr_head=3.0), [{"blocks[1]": 0.1, "blocks[2]": 0.1, "head": 3.0}] * 4),
        (partial(last=1, also=["stem"], lr_trunk=0.1), [{"stem": 0.1, "blocks[2]": 0.1, "head": 1.0}] * 4),
        (partial(last=3), [{name: 1.0 for name in EVERYTHING if name != "stem"}] * 4),
        (full(layer_decay=None), [EVERYTHING] * 4),
        (full(layer_decay=None, lr_head=3.0), [{**EVERYTHING, "head": 3.0}] * 4),
        (full(layer_decay=0.5), [DECAYED] * 4),
        (full(layer_decay=0.5, lr_head=3.0), [{**DECAYED, "head": 3.0}] * 4),
        (
            progressive(every=2, lr_scale=0.1, limit=1),
            [{"head": 1.0}] * 2 + [{"blocks[2]": 0.1, "head": 1.0}] * 2,
        ),
        (
            progressive(every="2ba", order="bottom", limit=1),
            [{"head": 1.0}] * 2 + [{"blocks[0]": 0.5, "head": 1.0}] * 2,
        ),
    ],
)
def test_what_trains_in_each_epoch(preset: list[Algorithm], expected: list[Rates]) -> None:
    """Trainable layers and rates of four epochs, written out."""
    assert timeline(preset, duration="4ep") == expected


def test_chain_thaw_trains_each_layer_by_itself_and_then_all() -> None:
    """The head, the layers from the input on, everything; two batches each but the last."""
    names = ["head", "stem", "blocks[0]", "blocks[1]", "blocks[2]"]
    rows = timeline(chain_thaw(stack(), "2ba"), duration="12ba")
    assert rows == [{name: 1.0} for name in names for _ in range(2)] + [EVERYTHING] * 2


def test_chain_thaw_of_a_single_layer_trains_it() -> None:
    """There is nothing to chain."""
    [schedule] = chain_thaw(nn.Linear(2, 2))
    assert isinstance(schedule, ThawSchedule)
    assert [phase.thaw for phase in schedule.phases] == [("head",)]


def test_partial_takes_a_named_part() -> None:
    """A part such as a structure module, in depth order between blocks and head."""
    layers = LayerMap(stack(2), {"stem": "0", "blocks": ["1"], "structure_module": "2", "head": "3"})
    rows = timeline(partial(last=1, also=["structure_module"], lr_trunk=0.1), stack(2), layers=layers, duration=1)
    assert rows == [{"blocks[0]": 0.1, "structure_module": 0.1, "head": 1.0}]


def test_lora_trains_adapters_and_head_at_their_rates() -> None:
    """Nothing else; the base weights are held."""
    loop = Loop(lora(rank=2, lr_head=3.0, lr_lora=0.2), encoder(2))
    assert all("lora_" in name or name.startswith("classifier.") for name in loop.ledger.trainable)
    assert rates(loop.ledger) == {"blocks[0]": 0.2, "blocks[1]": 0.2, "head": 3.0}


class TinyForCausalLM(torch.nn.Module):
    """By its name a language model with a pre-trained head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.layers = torch.nn.ModuleList(
            [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()) for _ in range(2)]
        )
        self.lm_head = torch.nn.Linear(4, 7)


def test_lora_trains_a_language_models_head_only_where_it_is_given_a_rate() -> None:
    """LoRAInject's default leaves a pre-trained head alone; a rate for it asks for its training."""
    assert "head" not in rates(Loop(lora(rank=2), TinyForCausalLM()).ledger)
    assert rates(Loop(lora(rank=2, lr_head=3.0), TinyForCausalLM()).ledger)["head"] == 3.0


@pytest.mark.parametrize(
    "preset",
    [
        head_only(lr=0.1),
        partial(last=1),
        full(lr_head=0.02),
        progressive(limit=1),
        lora(rank=2, lr_lora=0.02),
        fine_tune(2),
        lp_ft("2ep"),
        ulmfit(),
    ],
)
def test_presets_join_with_others_and_train(preset: list[Algorithm]) -> None:
    """A list is a list: more algorithms go beside it, the whole is described as JSON, and the loss falls."""
    torch.manual_seed(0)
    trainer = Trainer(
        algorithms=[GradClip(1.0), *preset, EMA(half_life="0.1dur")], optimizer=bind(torch.optim.AdamW, lr=0.01),
        loss_fn=cross_entropy, progress=False, debug=True,
    )  # fmt: skip
    result = trainer.fit(mlp(depth=4), loader(), duration="6ep")
    assert result.history[-1]["train/loss"] < result.history[0]["train/loss"]
    again = [Algorithm.from_description(each.describe()).describe() for each in preset]
    assert again == [each.describe() for each in preset]


def test_each_call_makes_its_own_algorithms() -> None:
    """Two fits do not share state."""
    first, second = progressive()[0], progressive()[0]
    assert isinstance(first, LayerThaw)
    assert first is not second


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: head_only(lr=0), "head_only(lr=)"),
        (lambda: head_only(lr="1e-3"), "head_only(lr=)"),  # type: ignore[arg-type]
        (lambda: lora(rank=0), "LoRAInject(rank=)"),
        (lambda: lora(lr_head=-1), "lora(lr_head=)"),
        (lambda: lora(lr_lora=True), "lora(lr_lora=)"),
        (lambda: partial(last=0), "partial(last=)"),
        (lambda: partial(last=1.5), "partial(last=)"),  # type: ignore[arg-type]
        (lambda: partial(last=1, also="structure_module"), "partial(also=)"),
        (lambda: partial(last=1, also=None), "partial(also=)"),  # type: ignore[arg-type]
        (lambda: partial(last=1, also=[1]), "partial(also=)"),  # type: ignore[list-item]
        (lambda: partial(last=1, lr_trunk=-1), "partial(lr_trunk=)"),
        (lambda: partial(last=1, lr_head=float("nan")), "partial(lr_head=)"),
        (lambda: full(lr_head=0), "full(lr_head=)"),
        (lambda: full(layer_decay=0), "full(layer_decay=)"),
        (lambda: full(layer_decay=1.5), "full(layer_decay=)"),
        (lambda: fine_tune(0), "LayerThaw(every=)"),
        (lambda: fine_tune(base_lr=-1), "fine_tune(base_lr=)"),
        (lambda: fine_tune(lr_mult=0.5), "fine_tune(lr_mult=)"),
        (lambda: lp_ft("soon"), "LayerThaw(every=)"),
        (lambda: lp_ft(lr_scale=0), "LayerThaw(lr_scale=)"),
        (lambda: ulmfit(lr_scale=0), "LayerThaw(lr_scale=)"),
        (lambda: progressive(every=0), "LayerThaw(every=)"),
        (lambda: progressive(lr_scale=0), "LayerThaw(lr_scale=)"),
        (lambda: progressive(limit=0), "LayerThaw(limit=)"),
        (lambda: progressive(warmup="soon"), "LayerThaw(warmup=)"),
        (lambda: progressive(order="up"), "LayerThaw(order=)"),  # type: ignore[arg-type]
    ],
)
def test_a_bad_argument_is_an_error_that_names_it(call: Callable[[], Any], argument: str) -> None:
    """By the preset's own argument, or by that of the algorithm it goes to under the same name; the example works."""
    with pytest.raises(ArgumentError) as caught:
        call()
    assert caught.value.argument == argument
    known = (LayerThaw, LayerwiseLR, LoRAInject, TrainOnly, fine_tune, full, head_only, lora, partial, progressive)
    names = {each.__name__: each for each in known}
    assert eval(caught.value.example, dict(names))


def test_a_part_that_the_model_does_not_have_lists_what_it_has() -> None:
    """Known only at the start of the fit."""
    with pytest.raises(SelectorError, match=r"'structure_module' matches nothing(?s:.)*Layers: stem"):
        Loop(partial(last=1, also=["structure_module"]))


def test_the_schedules_that_go_with_presets_are_those_of_their_sources() -> None:
    """fastai's two one-cycle rates with linear rises, the second half as high; ULMFiT's slanted triangle, equation 3."""
    epochs, length = 5, 200
    schedule = join([warmup(0.99, start=1 / 25), warmup(0.3, then=cosine(start=0.5), start=0.1)], [1 / epochs])
    assert [schedule(at / epochs) for at in (0, 0.99, 1, 1 + 0.3 * 4)] == pytest.approx([1 / 25, 1, 0.1, 0.5], rel=1e-3)
    assert schedule(1.0) == pytest.approx(0.0, abs=1e-12)
    cut, ratio, slanted = 0.1 * length, 32, warmup(0.1, then=linear(end=1 / 32), start=1 / 32)
    for step in range(length + 1):
        p = step / cut if step < cut else 1 - (step - cut) / (cut * (1 / 0.1 - 1))
        assert slanted(step / length) == pytest.approx((1 + p * (ratio - 1)) / ratio)
