"""What a run goes on from: a checkpoint, or the directory of a run; anything else says what there is."""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from helpers import loader, mlp, same_weights, weights
from thawline.engine import CheckpointError, Checkpointing, RunDirError, ThawlineWarning, Trainer

Trainer_ = partial(Trainer, loss_fn=cross_entropy, optimizer=partial(torch.optim.SGD, lr=0.1), progress=False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the directory of a run of one epoch, with checkpoints at batches 2 and 4."""
    folder = tmp_path / "run"
    Trainer_(run_dir=folder, checkpoint=Checkpointing(every="2ba", keep=3)).fit(mlp(), loader(), duration=1)
    return folder


def resumed(resume: Any, **more: Any) -> dict[str, torch.Tensor]:
    """Return the weights after the second epoch."""
    net = mlp()
    assert Trainer_(**more).fit(net, loader(), duration=2, resume=resume).clock.batch == 8
    return weights(net)


def test_a_runs_directory_means_its_newest_checkpoint(run: Path) -> None:
    """For another run, as text too, and for the run itself."""
    expected = resumed(run / "ba00000004")
    assert same_weights(resumed(run), expected)
    assert same_weights(resumed(str(run)), expected)
    assert same_weights(resumed(run, run_dir=run), expected)


def test_the_run_itself_falls_back_from_a_damaged_checkpoint_and_another_one_says_which_there_are(run: Path) -> None:
    """Only its own directory may be changed, by setting the damaged one aside."""
    (run / "ba00000004" / "state.json").write_text("")
    with pytest.raises(
        CheckpointError, match=r"ba00000004 cannot be used.*There are .*ba00000002. Write: .*ba00000002'"
    ):
        resumed(run)
    with pytest.warns(
        ThawlineWarning, match=r"ba00000004 is damaged and was set aside as \.bad-ba00000004: .* ba00000002\."
    ):
        resumed(run, run_dir=run)
    assert (run / ".bad-ba00000004").is_dir()


def test_a_missing_checkpoint_says_which_there_are(run: Path) -> None:
    """A wrong number is the likeliest mistake."""
    with pytest.raises(CheckpointError, match=r"ba00000099.*There are .*ba00000002, .*ba00000004. Write: "):
        resumed(run / "ba00000099")


@pytest.mark.parametrize("kind", ["file", "empty", "nowhere", "long"])
def test_a_path_without_a_checkpoint_says_what_one_looks_like(tmp_path: Path, kind: str) -> None:
    """A file, an empty directory, a missing one, a name that cannot be; also as the run's own directory."""
    path = tmp_path / (kind if kind != "long" else "a" * 5000)
    if kind == "file":
        path.write_text("x")
    elif kind == "empty":
        path.mkdir()
    with pytest.raises(
        CheckpointError, match=r"Cannot read the checkpoint .* Write: trainer.fit\(…, resume='runs/first/ba"
    ):
        resumed(path)
    if kind == "empty":
        with pytest.raises(CheckpointError, match="Cannot read the checkpoint"):
            resumed(path, run_dir=path)


@pytest.mark.parametrize("inside", [False, True])
def test_a_run_directory_that_is_a_file_is_refused(tmp_path: Path, inside: bool) -> None:
    """Or lies in one."""
    (tmp_path / "file").write_text("x")
    folder = tmp_path / "file" / "run" if inside else tmp_path / "file"
    with pytest.raises(RunDirError, match=r"is a file, or lies in one.*Write: Trainer\(run_dir="):
        Trainer_(run_dir=folder).fit(mlp(), loader(), duration=1)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc")
def test_a_run_directory_that_cannot_be_made_is_refused() -> None:
    """With the same error, the system's words, and what to write."""
    with pytest.raises(RunDirError, match=r"Cannot make /proc/nowhere.*Write: Trainer\(run_dir="):
        Trainer_(run_dir="/proc/nowhere/run").fit(mlp(), loader(), duration=1)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "tensors.safetensors"])
@pytest.mark.parametrize("length", [0, 10, -1])
def test_loading_a_truncated_checkpoint_leaves_no_file_open(
    run: Path, tmp_path: Path, name: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file left open would warn when it is collected, and warnings are errors here."""
    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    for number, resume in enumerate((Path("ba00000002"), Path())):
        folder = Path(shutil.copytree(run, tmp_path / str(number)))
        for each in folder.glob("ba*"):
            path = each / name
            path.write_bytes(path.read_bytes()[:length])
        for own in ({}, {"run_dir": folder}):
            with pytest.raises(CheckpointError):
                resumed(folder / resume, **own)
    gc.collect()
    assert not unraisable


def test_a_run_that_was_cut_before_its_first_checkpoint_starts_its_metrics_anew(tmp_path: Path) -> None:
    """With the lines of the first attempt dropped."""
    calls = itertools.count(1)

    def fail(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if next(calls) == 4:
            raise ZeroDivisionError
        return cross_entropy(outputs, targets)

    with pytest.raises(ZeroDivisionError):
        Trainer_(run_dir=tmp_path, log_every="1ba", loss_fn=fail).fit(mlp(), loader(), duration=1)
    Trainer_(run_dir=tmp_path, log_every="1ba").fit(mlp(), loader(), duration=1, resume=True)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "epoch" not in json.loads(line)]
    assert steps == [1, 2, 3, 4]
