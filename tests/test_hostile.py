"""Files that a stranger wrote: a typed error at once, without running code, opening other files or taking all memory."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from forgeries import forge, hostile
from helpers import loader, mlp
from thawline.algorithms import EMA, EarlyStop, LayerThaw, LoRAInject
from thawline.engine import (
    Algorithm,
    CheckpointError,
    Checkpointing,
    SurgeryError,
    ThawlineError,
    Trainer,
    load_weights,
)
from thawline.engine.snapshot import read_checkpoint, write_checkpoint

SECONDS, MEBIBYTES = 1.0, 200


def test_a_forged_checkpoint_is_read_where_nothing_is_wrong_with_it(tmp_path: Path) -> None:
    """The forgeries below are refused for what is wrong with them, not because they are forged."""
    assert read_checkpoint(forge(tmp_path, "good")) == {}


def test_each_is_a_typed_error_in_a_second_and_200_mb(tmp_path: Path) -> None:
    """A hundred of them, each read in a process of its own whose audit hook forbids code that runs and other files.

    Time is that of the processor, memory the peak above what the process had before.
    """
    names = hostile(tmp_path / "run")
    script = Path(__file__).with_name("store_faults.py")
    done = subprocess.run(
        [sys.executable, str(script), "hostile", str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert sorted(report) == names
    assert len(names) > 90
    wrong = {name: each for name, each in report.items() if each["outcome"] != "CheckpointError" or each["forbidden"]}
    assert wrong == {}
    assert {name: each for name, each in report.items() if each["seconds"] >= SECONDS} == {}
    assert {name: each for name, each in report.items() if each["mebibytes"] >= MEBIBYTES} == {}


# -- trees that are checkpoints in form ------------------------------------------------------------------------------

Trainer_ = partial(Trainer, loss_fn=cross_entropy, optimizer=partial(torch.optim.SGD, lr=0.1), progress=False)
JUNK = (None, -1, "x", [1], {"a": 1}, float("nan"), 10**30, torch.ones(3), True, 1.5, ())


def recipe() -> list[Algorithm]:
    """Return algorithms that keep state of many kinds."""
    return [LoRAInject(rank=2), LayerThaw(every="2ba"), EMA(), EarlyStop("train/loss", patience=3)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what a checkpoint in the middle of a fit holds."""
    folder = tmp_path_factory.mktemp("run")
    policy = Checkpointing(every="3ba", keep=9)
    Trainer_(algorithms=recipe(), run_dir=folder, checkpoint=policy).fit(mlp(), loader(), loader(), duration="2ep")
    found: dict[str, Any] = read_checkpoint(folder / "ba00000006")
    return found


def places(tree: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path to each node of a tree but its root."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return [place for key, each in pairs for place in ((*before, key), *places(each, (*before, key)))]


def replaced(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of the tree with another value at one place."""
    if not place:
        return value
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    changed = {key: replaced(each, place[1:], value) if key == place[0] else each for key, each in pairs}
    return changed if isinstance(tree, dict) else type(tree)(changed.values())


@pytest.mark.filterwarnings("ignore::thawline.engine.errors.ThawlineWarning")
@pytest.mark.parametrize("seed", range(10))
def test_a_tree_with_junk_anywhere_is_refused_with_a_typed_error_or_taken(tree: Any, tmp_path: Path, seed: int) -> None:
    """Whatever stands wherever in a whole checkpoint, restoring raises nothing else.

    What an optimizer's own step makes of numbers of the wrong kind is the optimizer's.
    """
    rng = random.Random(seed)
    skipped = {"optimizers", "options"}
    every = [place for place in places(tree) if not skipped & set(place)]
    for number, place in enumerate(rng.sample(every, 12)):
        path = write_checkpoint(tmp_path, f"t{number}", replaced(tree, place, rng.choice(JUNK)))
        for act in (
            lambda: Trainer_(algorithms=recipe()).fit(mlp(), loader(), loader(), duration="2ep", resume=path),  # noqa: B023
            lambda: load_weights(path, mlp()),  # noqa: B023
        ):
            try:
                act()
            except ThawlineError:
                pass
            except Exception as error:
                raise AssertionError(f"{place}: {error!r}") from error


@pytest.mark.parametrize(
    "entry",
    [
        ["0", "os.system", "LoRAInject", {"command": "ls"}],
        ["0", "../lora", "LoRAInject", {}],
        ["0", "lora", "LoRAInject", {"rank": 10**9, "alpha": 1.0}],
        ["0", "lora", "LoRAInject", {"rank": -1, "alpha": 1.0}],
        ["__class__", "lora", "LoRAInject", {"rank": 2, "alpha": 1.0}],
        ["no.such", "lora", "LoRAInject", {"rank": 2, "alpha": 1.0}],
        ["0", "lora", "LoRAInject", {"__reduce__": "x"}],
        "lora",
    ],
)
def test_a_journal_names_what_is_registered_and_nothing_else(tree: Any, tmp_path: Path, entry: Any) -> None:
    """No import path, no attribute that is no module, no rank that takes all memory; the model keeps its classes."""
    path = write_checkpoint(tmp_path, "journal", replaced(tree, ("ledger", "journal"), [entry]))
    model = mlp()
    for act in (
        lambda: load_weights(path, model),
        lambda: Trainer_(algorithms=recipe()).fit(model, loader(), duration="2ep", resume=path),
    ):
        with pytest.raises((CheckpointError, SurgeryError, ThawlineError)):
            act()
        assert [type(each).__name__ for each in model] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]  # type: ignore[attr-defined]


def test_a_state_of_an_algorithm_that_nobody_listed_is_not_looked_up(tree: Any, tmp_path: Path) -> None:
    """Names in a checkpoint are compared with the algorithms that are given; none is imported or built from it."""
    evil = {"description": {"name": "os.system", "arguments": {"command": "ls"}}, "state": {}}
    path = write_checkpoint(tmp_path, "evil", {**tree, "algorithms": {**tree["algorithms"], "os.system": evil}})
    with pytest.raises(CheckpointError, match="os.system is missing"):
        Trainer_(algorithms=recipe()).fit(mlp(), loader(), loader(), duration="2ep", resume=path)
