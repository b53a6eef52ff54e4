"""Golden timelines: what trains, in which groups, at which rates, at every boundary of a transformer and of a CNN."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
from torch import nn

from helpers import encoder
from thawline.algorithms import (
    FreezeAt,
    FreezeOut,
    LayerFreeze,
    LayerThaw,
    LayerwiseLR,
    LoRAInject,
    TrainOnly,
    fine_tune,
    full,
    head_only,
    lora,
    lp_ft,
    partial,
    progressive,
    ulmfit,
)
from thawline.engine import Algorithm
from timelines import Boundary, Rates, boundaries, norm_cnn

# Tensors: a transformer of 12 blocks has an embedding, 12 in each block, and 2 in the head; a CNN 4 in each of 4 stages.
STEM, BLOCK, HEAD, STAGE = 1, 12, 2, 4
Case = tuple[Callable[[], Sequence[Algorithm]], list[Boundary]]


def blocks(first: int, last: int, scale: Callable[[int], float]) -> Rates:
    """Return the rates of some blocks, each a group, and the head at 1."""
    return {**{f"blocks[{index}]": scale(index) for index in range(first, last + 1)}, "head": 1.0}


TRANSFORMER: dict[str, Case] = {
    "LayerThaw": (
        lambda: [LayerThaw(2, lr_scale=0.5, limit=2)],
        [
            (0, HEAD, {"head": 1.0}),
            (2, BLOCK + HEAD, {"blocks[11]": 0.5, "head": 1.0}),
            (4, 2 * BLOCK + HEAD, {"blocks[10]": 0.25, "blocks[11]": 0.5, "head": 1.0}),
        ],
    ),
    "LayerThaw together": (
        lambda: [LayerThaw(3, order="together", lr_scale=0.1, stem=False)],
        [(0, HEAD, {"head": 1.0}), (3, 12 * BLOCK + HEAD, {"blocks[0]..blocks[11]": 0.1, "head": 1.0})],
    ),
    "LoRAInject and LayerThaw": (
        lambda: [LayerThaw(2, limit=2), LoRAInject(rank=2, target="all-linear", lr=0.2)],
        [
            (0, HEAD, {"head": 1.0}),
            (2, 8 + HEAD, {"blocks[11]": 0.1, "head": 1.0}),
            (4, 16 + HEAD, {"blocks[10]": 0.05, "blocks[11]": 0.1, "head": 1.0}),
        ],
    ),
    "LoRAInject without the head, and LayerThaw": (
        lambda: [LayerThaw(2), LoRAInject(rank=2, target="all-linear", train_head=False)],
        [
            (0, 8, {"blocks[11]": 1.0}),
            (2, 16, {"blocks[10]": 0.5, "blocks[11]": 1.0}),
            (4, 24, {"blocks[9]": 0.25, "blocks[10]": 0.5, "blocks[11]": 1.0}),
        ],
    ),
    "LayerFreeze": (
        lambda: [LayerFreeze(0.5)],
        [
            (0, STEM + 12 * BLOCK + HEAD, {"stem..head": 1.0}),
            (4, 9 * BLOCK + HEAD, {"blocks[3]..head": 1.0}),
            (5, 5 * BLOCK + HEAD, {"blocks[7]..head": 1.0}),
        ],
    ),
    "FreezeAt": (
        lambda: [FreezeAt({"stem": 1, "blocks[0:2]": "0.5dur", "blocks[5]": "5ba"})],
        [
            (0, STEM + 12 * BLOCK + HEAD, {"stem..head": 1.0}),
            (1, 12 * BLOCK + HEAD, {"blocks[0]..head": 1.0}),
            (3, 10 * BLOCK + HEAD, {"blocks[2]..head": 1.0}),
            (5, 9 * BLOCK + HEAD, {"blocks[2]..blocks[4]+blocks[6]..head": 1.0}),
        ],
    ),
    "LayerwiseLR": (
        lambda: [LayerwiseLR(0.5)],
        [(0, STEM + 12 * BLOCK + HEAD, {"stem": 0.5**13, **blocks(0, 11, lambda index: 0.5 ** (12 - index))})],
    ),
    "TrainOnly": (
        lambda: [TrainOnly(["blocks[1:3]", "head"], lr={"blocks[1]": 0.1})],
        [(0, 2 * BLOCK + HEAD, {"blocks[1]": 0.1, "blocks[2]+head": 1.0})],
    ),
    "head_only": (lambda: head_only(lr=0.5), [(0, HEAD, {"head": 0.5})]),
    "partial": (
        lambda: partial(last=2, lr_trunk=0.1),
        [(0, 2 * BLOCK + HEAD, {"blocks[10]..blocks[11]": 0.1, "head": 1.0})],
    ),
    "full": (
        lambda: full(lr_head=2.0, layer_decay=None),
        [(0, STEM + 12 * BLOCK + HEAD, {"stem..blocks[11]": 1.0, "head": 2.0})],
    ),
    "lora": (
        lambda: lora(rank=2, lr_lora=0.2, lr_head=0.5),
        [(0, 12 * 4 + HEAD, {"blocks[0]..blocks[11]": 0.2, "head": 0.5})],
    ),
    "progressive": (
        lambda: progressive(every=4, lr_scale=0.25, order="bottom"),
        [(0, HEAD, {"head": 1.0}), (4, BLOCK + HEAD, {"blocks[0]": 0.25, "head": 1.0})],
    ),
    "ulmfit": (
        lambda: ulmfit(every=2),
        [
            (0, HEAD, {"head": 1.0}),
            (2, BLOCK + HEAD, {"blocks[11]": 1 / 2.6, "head": 1.0}),
            (4, 2 * BLOCK + HEAD, {"blocks[10]": 1 / 2.6**2, "blocks[11]": 1 / 2.6, "head": 1.0}),
        ],
    ),
    "fine_tune": (
        lambda: fine_tune(2, base_lr=0.5, lr_mult=100),
        [
            (0, HEAD, {"head": 0.5}),
            (
                2, STEM + 12 * BLOCK + HEAD,
                {"stem": 0.005, **blocks(0, 11, lambda index: 0.5 * 100 ** ((index - 12) / 13)), "head": 0.5},
            ),
        ],
    ),
    "lp_ft": (
        lambda: lp_ft(lr_scale=0.1),
        [(0, HEAD, {"head": 1.0}), (3, STEM + 12 * BLOCK + HEAD, {"stem..blocks[11]": 0.1, "head": 1.0})],
    ),
}  # fmt: skip

CNN: dict[str, Case] = {
    "LayerThaw": (
        lambda: [LayerThaw(2, lr_scale=0.5)],
        [
            (0, HEAD, {"head": 1.0}),
            (2, STAGE + HEAD, {"blocks[3]": 0.5, "head": 1.0}),
            (4, 2 * STAGE + HEAD, {"blocks[2]": 0.25, "blocks[3]": 0.5, "head": 1.0}),
        ],
    ),
    "LayerFreeze": (
        lambda: [LayerFreeze(0.25)],
        [
            (0, 4 * STAGE + HEAD, {"blocks[0]..head": 1.0}),
            (3, 3 * STAGE + HEAD, {"blocks[1]..head": 1.0}),
            (4, 2 * STAGE + HEAD, {"blocks[2]..head": 1.0}),
            (5, 1 * STAGE + HEAD, {"blocks[3]..head": 1.0}),
        ],
    ),
    "FreezeAt": (
        lambda: [FreezeAt({"blocks[3]": 4, "*.1.*": 2})],
        [
            (0, 4 * STAGE + HEAD, {"blocks[0]..head": 1.0}),
            (2, 4 * 2 + HEAD, {"blocks[0]..head": 1.0}),
            (4, 3 * 2 + HEAD, {"blocks[0]..blocks[2]+head": 1.0}),
        ],
    ),
    "LayerwiseLR": (
        lambda: [LayerwiseLR(lowest=0.0625)],
        [(0, 4 * STAGE + HEAD, blocks(0, 3, lambda index: 0.5 ** (4 - index)))],
    ),
    "partial": (
        lambda: partial(last=1, lr_head=3.0),
        [(0, STAGE + HEAD, {"blocks[3]": 1.0, "head": 3.0})],
    ),
    "ulmfit": (
        lambda: ulmfit(every=3),
        [(0, HEAD, {"head": 1.0}), (3, STAGE + HEAD, {"blocks[3]": 1 / 2.6, "head": 1.0})],
    ),
    "fine_tune": (
        lambda: fine_tune("0.5dur", lr_mult=16),
        [(0, HEAD, {"head": 1.0}), (3, 4 * STAGE + HEAD, blocks(0, 3, lambda index: 0.5 ** (4 - index)))],
    ),
    "lp_ft": (
        lambda: lp_ft(4),
        [(0, HEAD, {"head": 1.0}), (4, 4 * STAGE + HEAD, {"blocks[0]..blocks[3]": 0.1, "head": 1.0})],
    ),
}


@pytest.mark.parametrize(
    ("model", "case"),
    [
        *(pytest.param(lambda: encoder(12), case, id=f"transformer-{name}") for name, case in TRANSFORMER.items()),
        *(pytest.param(norm_cnn, case, id=f"cnn-{name}") for name, case in CNN.items()),
    ],
)
def test_what_trains_in_which_groups_at_which_rates(model: Callable[[], nn.Module], case: Case) -> None:
    """Six epochs of one batch, every change written out."""
    algorithms, expected = case
    found = boundaries(algorithms(), model())
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    for (*_, rates), (*_, wanted) in zip(found, expected, strict=True):
        assert list(rates) == list(wanted)
        assert rates == pytest.approx(wanted, rel=1e-14)


@pytest.mark.parametrize("cubed", [False, True])
@pytest.mark.parametrize("scale_lr", [False, True])
@pytest.mark.parametrize(("model", "tensors"), [(lambda: encoder(12), [1, *[12] * 12, 2]), (norm_cnn, [*[4] * 4, 2])])
def test_freeze_out_is_its_closed_form_at_every_step(
    model: Callable[[], nn.Module], tensors: list[int], *, cubed: bool, scale_lr: bool
) -> None:
    """Layer i at ``0.5 * lr * (1 + cos(pi * t / t_i))`` until t reaches t_i, in its own group, and frozen from there on."""
    steps, t_0, last = 40, 0.5, len(tensors) - 1
    times = [(t_0 + (1 - t_0) * index / last) ** (3 if cubed else 1) for index in range(last + 1)]
    found = boundaries(FreezeOut(t_0=t_0, cubed=cubed, scale_lr=scale_lr), model(), duration=f"{steps}ba")
    assert [row[0] for row in found] == list(range(steps))
    for step, trains, rates in found:
        left = [(index, time) for index, time in enumerate(times) if step / steps < time - 1e-12]
        wanted = [
            0.5 * (1 / time if scale_lr else 1.0) * (1 + math.cos(math.pi * step / steps / time)) for _, time in left
        ]
        assert trains == sum(tensors[index] for index, _ in left)
        assert list(rates.values()) == pytest.approx(wanted, rel=1e-12, abs=1e-15)
