"""FreezeOut and FreezeAt: times, what they free, resumed, and with wrong arguments. Rates: see test_golden.py."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from helpers import loader, mlp, same_weights, weights
from thawline.algorithms import FreezeAt, FreezeOut, LayerThaw, LayerwiseLR, LoRAInject, freeze_out_times
from thawline.engine import (
    Algorithm,
    ArgumentError,
    Checkpointing,
    SelectorError,
    ThawlineWarning,
    Trainer,
    cosine,
)
from timelines import Loop, norm_cnn, stack, timeline


@given(st.integers(2, 60), st.floats(0.01, 1.0), st.booleans())
def test_times_run_from_t_0_to_the_end(layers: int, t_0: float, cubed: bool) -> None:
    """In equal steps, or their cubes, exactly 1 for the last; the next layer never freezes before the one below."""
    times = freeze_out_times(layers, t_0=t_0, cubed=cubed)
    power = 3 if cubed else 1
    assert times == pytest.approx([(t_0 + (1 - t_0) * index / (layers - 1)) ** power for index in range(layers)])
    assert times[-1] == 1.0
    assert list(times) == sorted(times)


def test_one_layer_trains_to_the_end() -> None:
    """There is none before it."""
    assert freeze_out_times(1) == (1.0,)


def test_freezing_frees_optimizer_state_and_gradient() -> None:
    """After its time a layer is in no group, without momentum or gradient, its weights and statistics untouched."""
    for algorithm in (FreezeOut(t_0=0.5, cubed=False), FreezeAt({"blocks[0]": "0.5dur"})):
        loop = Loop([algorithm], norm_cnn(), duration="4ep", batches=1)
        for _ in range(2):
            loop.epoch()
        assert any(loop.ledger.optimizers[0].state.values())
        before = weights(loop.model)
        loop.run()
        first = list(loop.model[0].parameters())
        assert all(each.grad is None and not each.requires_grad for each in first)
        assert not any(each in loop.ledger.optimizers[0].state for each in first)
        assert all(torch.equal(value, before[name]) for name, value in weights(loop.model).items() if name[0] == "0")
        assert not loop.model[0][1].training


def test_freeze_out_multiplies_with_others() -> None:
    """With the factors of LayerwiseLR, whichever stands first."""
    alone = timeline(FreezeOut(), duration="8ba")
    rows = timeline([FreezeOut(), LayerwiseLR(0.5)], duration="8ba")
    assert rows == timeline([LayerwiseLR(0.5), FreezeOut()], duration="8ba")
    factor = {"stem": 0.0625, "blocks[0]": 0.125, "blocks[1]": 0.25, "blocks[2]": 0.5, "head": 1.0}
    for row, plain in zip(rows, alone, strict=True):
        assert row == pytest.approx({name: rate * factor[name] for name, rate in plain.items()})


@pytest.mark.parametrize("times", [{"stem": 0, "blocks[0]": 1}, {"stem": "0ba", "blocks[0]": "2ba"}])
def test_times_in_other_units(times: dict[str, Any]) -> None:
    """Zero is the start; batches act inside an epoch."""
    rows = timeline(FreezeAt(times), duration="2ep", batches=2)
    rest = dict.fromkeys(("blocks[1]", "blocks[2]", "head"), 1.0)
    assert rows == [{"blocks[0]": 1.0, **rest}] * 2 + [rest] * 2


def test_a_time_beyond_the_fit_warns() -> None:
    """The same as for other schedules that cannot fire."""
    with pytest.warns(ThawlineWarning, match=r"'blocks\[0\]': '9ep'.*the fit ends after 2ep"):
        Loop([FreezeAt({"stem": 1, "blocks[0]": 9})], duration="2ep")


def test_selectors_are_checked_at_the_start() -> None:
    """Not when their time comes."""
    with pytest.raises(SelectorError, match="'blokcs' matches nothing"):
        Loop([FreezeAt({"blokcs": 1})])


@pytest.mark.parametrize(
    "make",
    [
        lambda: [FreezeOut(t_0=0.4)],
        lambda: [FreezeOut(), LoRAInject(rank=2)],
        lambda: [FreezeAt({"blocks[0]": "3ba", "blocks[1]": "0.5dur"}), LayerThaw("2ba")],
    ],
)
def test_a_fit_resumed_at_any_batch_goes_on_as_if_never_stopped(tmp_path: Path, make: Any) -> None:
    """Weights of a run resumed from each of its checkpoints equal those of the whole run."""

    def fit(folder: str, resume: bool | Path = False) -> Any:
        torch.manual_seed(3)
        model = mlp(depth=4)
        trainer = Trainer(
            algorithms=make(), loss_fn=cross_entropy, run_dir=tmp_path / folder, progress=False, debug=True,
            checkpoint=Checkpointing(every="1ba", keep=30), schedule=cosine(end=0.1),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        )  # fmt: skip
        trainer.fit(model, loader(), duration="3ep", resume=resume)
        return model

    whole = weights(fit("whole"))
    for batch in (1, 4, 6, 9, 11):
        again = fit(f"from{batch}", next((tmp_path / "whole").rglob(f"ba{batch:08d}")))
        assert same_weights(weights(again), whole), batch


@pytest.mark.parametrize("algorithm", [FreezeOut(t_0=0.5, scale_lr=False), FreezeAt({"stem": "1ep", "head": "0.3dur"})])
def test_a_description_builds_it_again(algorithm: Algorithm) -> None:
    """describe() and from_description() are inverse; its text is its arguments."""
    again = Algorithm.from_description(algorithm.describe())
    assert again.describe() == algorithm.describe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThawlineWarning)
        timeline(algorithm, stack(1))
    assert repr(algorithm) == repr(again)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (FreezeOut, {"t_0": 0}), (FreezeOut, {"t_0": 1.5}), (FreezeOut, {"t_0": "0.5"}), (FreezeOut, {"cubed": 1}),
        (FreezeOut, {"scale_lr": None}), (FreezeOut, {"t_0": 10**400}),
        (FreezeAt, {"times": {}}), (FreezeAt, {"times": "1ep"}), (FreezeAt, {"times": None}), (FreezeAt, {"times": {"": 1}}),
        (FreezeAt, {"times": {1: 1}}), (FreezeAt, {"times": {"stem": "soon"}}), (FreezeAt, {"times": {"stem": -1}}),
    ],
)  # fmt: skip
def test_a_bad_argument_is_an_error_that_names_it(kind: Any, arguments: dict[str, Any]) -> None:
    """The message names the argument, and ends with a call that works."""
    with pytest.raises(ArgumentError) as caught:
        kind(**arguments)
    assert caught.value.argument == f"{kind.__name__}({next(iter(arguments))}=)"
    assert isinstance(eval(caught.value.example), kind)
