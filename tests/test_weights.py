"""The weights of a checkpoint without its run: those that were evaluated or the live ones, into a model or a file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from helpers import Tied, cnn, loader, mlp, same_weights, weights
from thawline.algorithms import EMA, LayerThaw, LoRAInject, TrainOnly
from thawline.engine import (
    ArgumentError,
    CheckpointError,
    Checkpointing,
    SurgeryError,
    Trainer,
    export,
    load_weights,
)
from thawline.engine.snapshot import write_checkpoint

Trainer_ = partial(Trainer, loss_fn=cross_entropy, optimizer=partial(torch.optim.AdamW, lr=0.05), progress=False)


def seeded(make: Any = mlp, seed: int = 3) -> nn.Module:
    """Return the same model each time."""
    torch.manual_seed(seed)
    model: nn.Module = make()
    return model


@pytest.mark.parametrize("frozen", ["store", "fingerprint"])
def test_the_evaluated_weights_are_those_that_the_metric_was_measured_on(tmp_path: Path, frozen: Any) -> None:
    """With an EMA, adapters and a thaw: evaluating the best checkpoint's gives its metric, the live ones another."""
    policy = Checkpointing(every="3ba", keep=9, monitor="eval/loss", frozen=frozen)
    algorithms = [LoRAInject(rank=2), LayerThaw(every="3ba"), EMA(half_life="2ba")]
    trainer = Trainer_(algorithms=algorithms, run_dir=tmp_path, checkpoint=policy)
    live = seeded()
    result = trainer.fit(live, loader(), loader(seed=1), duration="3ep")
    best, fresh = result.best, seeded()
    assert best is not None
    assert best == result.last  # the loss falls all the time
    load_weights(best, fresh)
    assert trainer.evaluate(fresh, loader(seed=1))["eval/loss"] == result.metrics["eval/loss"]
    other = seeded()
    load_weights(best, other, weights="live")
    assert same_weights(weights(other), weights(live))
    assert trainer.evaluate(other, loader(seed=1))["eval/loss"] != result.metrics["eval/loss"]
    load_weights(tmp_path, other)  # attached already, and a run's directory means its newest
    assert same_weights(weights(other), weights(fresh))


def test_the_evaluated_weights_are_the_averages(tmp_path: Path) -> None:
    """Equal to what the EMA holds, buffers of BatchNorm included, and to `ema.apply`; of two the first counts."""
    ema, second = EMA(decay=0.5), EMA(decay=0.9)
    model, fresh, baked = seeded(cnn), seeded(cnn), seeded(cnn)
    batches = [(torch.randn(4, 1, 8, 8), torch.arange(4)) for _ in range(3)]
    result = Trainer_(algorithms=[ema, second], run_dir=tmp_path).fit(model, batches, duration="1ep")
    assert result.last is not None
    load_weights(result.last, fresh)
    assert all(torch.equal(fresh.state_dict()[name], average) for name, average in ema.average.items())
    assert "1.running_mean" in ema.average
    load_weights(result.last, baked, weights="live")
    ema.apply(baked)
    assert same_weights(weights(fresh), weights(baked))


def test_averages_go_under_every_name_of_a_tied_weight(tmp_path: Path) -> None:
    """The later name does not bring the live weight back; a plain file has both names."""
    ema = EMA(decay=0.5)
    ids = torch.arange(6).reshape(2, 3)
    trainer = Trainer(
        algorithms=[ema], loss_fn=lambda out, y: cross_entropy(out.flatten(0, 1), y.flatten()), run_dir=tmp_path,
        optimizer=partial(torch.optim.SGD, lr=1.0), progress=False,
    )  # fmt: skip
    trainer.fit(seeded(Tied), [(ids, ids)] * 3, duration="1ep")
    fresh = Tied()
    load_weights(tmp_path, fresh)
    assert fresh.lm_head.weight is fresh.embed.weight
    assert torch.equal(fresh.lm_head.weight, ema.average["embed.weight"])
    written = safetensors.torch.load_file(export(tmp_path, tmp_path / "model.safetensors"))
    assert torch.equal(written["lm_head.weight"], written["embed.weight"])
    fresh.load_state_dict(written)


def test_averages_of_bfloat16_come_back_as_bfloat16(tmp_path: Path) -> None:
    """They are kept in float32, and the weight's dtype is the model's."""
    model = seeded().bfloat16()
    batches = [(x.bfloat16(), y) for x, y in loader()]
    Trainer_(algorithms=[EMA(decay=0.5)], run_dir=tmp_path).fit(model, batches, duration="1ep")
    written = safetensors.torch.load_file(export(tmp_path, tmp_path / "model.safetensors"))
    assert {each.dtype for each in written.values()} == {torch.bfloat16}
    load_weights(tmp_path, model)
    assert same_weights(weights(model), {name: written[name] for name in model.state_dict()})


def test_an_export_is_the_plain_state_dict(tmp_path: Path) -> None:
    """Read by the package safetensors, loaded by torch; with fingerprints the base is taken from the model."""
    files: dict[str, dict[str, Tensor]] = {}
    for frozen in ("store", "fingerprint"):
        model, folder = seeded(), tmp_path / frozen
        policy = Checkpointing(frozen=frozen)  # type: ignore[arg-type]
        Trainer_(algorithms=[TrainOnly("head")], run_dir=folder, checkpoint=policy).fit(model, loader(), duration="1ep")
        file = tmp_path / f"{frozen}.safetensors"
        base = None if frozen == "store" else seeded()
        assert export(folder, file, weights="live", model=base) == file
        files[frozen] = safetensors.torch.load_file(file)
        assert same_weights({name: files[frozen][name] for name in model.state_dict()}, weights(model))
    assert files["store"].keys() == files["fingerprint"].keys()


def test_an_export_without_what_it_needs_says_so(tmp_path: Path) -> None:
    """No model for fingerprints; a file that is there; a folder that is a file; nothing is left behind."""
    policy = Checkpointing(frozen="fingerprint")
    Trainer_(algorithms=[TrainOnly("head")], run_dir=tmp_path / "run", checkpoint=policy).fit(
        seeded(), loader(), duration="1ep"
    )
    with pytest.raises(CheckpointError, match="only fingerprints of 4 tensors.*model=model"):
        export(tmp_path / "run", tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="does not bring the same ones"):
        export(tmp_path / "run", tmp_path / "a.safetensors", model=seeded(seed=4))
    there = tmp_path / "there.safetensors"
    there.write_text("mine")
    with pytest.raises(CheckpointError, match="There is a .*there.safetensors already"):
        export(tmp_path / "run", there, model=seeded())
    with pytest.raises(CheckpointError, match="Cannot make .*there.safetensors: "):
        export(tmp_path / "run", there / "a.safetensors", model=seeded())
    assert there.read_text() == "mine"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run", "there.safetensors"]


@pytest.mark.parametrize("name", ["model.pt", "model", "model.bin", "runs/best.ckpt"])
def test_an_export_writes_one_format_and_makes_folders(tmp_path: Path, name: str) -> None:
    """Another suffix is refused with the name to write; folders that are missing are made."""
    Trainer_(run_dir=tmp_path / "run").fit(seeded(), loader(), duration="1ep")
    meant = (tmp_path / "new" / name).with_suffix(".safetensors")
    with pytest.raises(ArgumentError, match=rf"ends in '.safetensors'.*Write: export\(result.best, '{meant}'\)"):
        export(tmp_path / "run", tmp_path / "new" / name)
    assert not (tmp_path / "new").exists()
    assert export(tmp_path / "run", meant) == meant
    assert meant.is_file()


def test_another_model_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    """A shape, a layer more or less, other surgery: no weight is written and no adapter stays attached."""
    Trainer_(algorithms=[LoRAInject(rank=2, target=["0"])], run_dir=tmp_path).fit(seeded(), loader(), duration="1ep")
    for make, message in (
        (partial(mlp, width=8), "'0.weight' has shape \\(8, 8\\) instead of \\(4, 4\\)"),
        (partial(mlp, depth=4), "'6.weight' is not in the checkpoint"),
        (partial(mlp, depth=2), "has no module '4'"),
    ):
        model = seeded(make)
        before, kind = weights(model), type(model.get_submodule("0"))
        with pytest.raises(CheckpointError, match=message):
            load_weights(tmp_path, model)
        assert same_weights(weights(model), before)
        assert type(model.get_submodule("0")) is kind
    model = seeded()
    Trainer_(algorithms=[LoRAInject(rank=2, target=["2"])]).fit(model, loader(), duration="1ep")
    with pytest.raises(SurgeryError, match="'lora' is attached to '2' already"):
        load_weights(tmp_path, model)


@pytest.mark.parametrize("call", [load_weights, export])
def test_wrong_arguments_are_named(tmp_path: Path, call: Any) -> None:
    """Which weights, which path, what a checkpoint is."""
    Trainer_(run_dir=tmp_path).fit(seeded(), loader(), duration="1ep")
    target = seeded() if call is load_weights else tmp_path / "x.safetensors"
    with pytest.raises(ArgumentError, match=rf"{call.__name__}\(weights=\) takes 'evaluated' or 'live', got 'ema'"):
        call(tmp_path, target, weights="ema")
    with pytest.raises(ArgumentError, match=rf"{call.__name__}\(path=\) takes the path"):
        call(None, target)
    with pytest.raises(CheckpointError, match=rf"Write: {call.__name__}\('.*ba00000004', "):
        call(tmp_path / "ba00000009", target)
    with pytest.raises(CheckpointError, match="is not a checkpoint of a fit"):
        call(write_checkpoint(tmp_path, "other", {"x": 1}), target)
    with pytest.raises(CheckpointError, match="does not hold what this version"):
        call(write_checkpoint(tmp_path, "torn", {"schema": 1}), target)
    with pytest.raises(ArgumentError):
        call(tmp_path, 3)
