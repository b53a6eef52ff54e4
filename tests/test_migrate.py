"""A resumed run with other algorithms or another schedule: refused, or migrated where that was asked for."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from helpers import loader, mlp, same_weights, weights
from thawline.algorithms import (
    EMA,
    GradClip,
    LayerThaw,
    LayerwiseLR,
    LoRAInject,
    Phase,
    ThawSchedule,
    TrainOnly,
)
from thawline.engine import (
    Algorithm,
    ArgumentError,
    CheckpointError,
    Checkpointing,
    Event,
    State,
    ThawlineWarning,
    Trainer,
    cosine,
    linear,
)
from thawline.engine.snapshot import read_checkpoint

Trainer_ = partial(
    Trainer, loss_fn=cross_entropy, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9), progress=False
)


class Diary(Algorithm):
    """Writes down at which events and batches it acted, and what trained then."""

    events = frozenset({Event.FIT_START, Event.BATCH_START})

    def __init__(self, title: str = "") -> None:
        self.title, self.seen = title, []

    def apply(self, event: Event, state: State) -> None:
        self.seen.append([event.name, state.clock.batch, len(state.ledger.trainable)])

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}


def first(folder: Path, *algorithms: Algorithm, **more: Any) -> nn.Module:
    """Fit an epoch of two into ``folder``, a checkpoint a batch."""
    torch.manual_seed(0)
    model = mlp()
    trainer = Trainer_(
        algorithms=list(algorithms), run_dir=folder, checkpoint=Checkpointing(every="1ba", keep=99), **more
    )
    trainer.fit(model, loader(), duration="2ep")
    return model


def second(folder: Path, *algorithms: Algorithm, step: int = 4, **more: Any) -> nn.Module:
    """Go on from ``step`` with other algorithms, migrating."""
    model = mlp()
    fit = Trainer_(algorithms=list(algorithms), **more).fit
    fit(model, loader(), duration="2ep", resume=folder / f"ba{step:08d}", on_change="migrate")
    return model


def test_the_refusal_names_the_way_to_migrate(tmp_path: Path) -> None:
    """For algorithms and for the schedule; a seed cannot migrate, and is refused in either mode."""
    first(tmp_path, EMA())
    for arguments in ({"algorithms": []}, {"algorithms": [EMA()], "schedule": cosine()}):
        with pytest.raises(CheckpointError, match="on_change='migrate'"):
            Trainer_(run_dir=tmp_path, **arguments).fit(mlp(), loader(), duration="2ep", resume=True)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="seed: saved 0, given 1") as raised:
        second(tmp_path, EMA(), seed=1)
    assert "migrate" not in str(raised.value)


def test_a_run_that_has_not_changed_is_the_same_when_it_may_migrate(tmp_path: Path) -> None:
    """Bit for bit and without a word."""
    recipe = (LoRAInject(rank=2), LayerThaw(every="2ba"), EMA())
    whole = first(tmp_path, *recipe)
    assert same_weights(weights(second(tmp_path, *recipe)), weights(whole))


def test_what_is_the_same_keeps_its_state_and_what_is_new_begins(tmp_path: Path) -> None:
    """The new one is given FIT_START at the clock of the checkpoint, the old one is not given it again."""
    old, new = Diary("old"), Diary("new")
    first(tmp_path, old)
    with pytest.warns(ThawlineWarning, match="other algorithms: Diary#2 is new"):
        second(tmp_path, old, new, step=6)
    assert [each[:2] for each in old.seen] == [["FIT_START", 0], *(["BATCH_START", batch] for batch in range(8))]
    assert [each[:2] for each in new.seen] == [["FIT_START", 6], ["BATCH_START", 6], ["BATCH_START", 7]]


def test_phases_are_counted_from_where_a_new_schedule_starts(tmp_path: Path) -> None:
    """One epoch before the end a phase of one epoch leaves no time for the next, and the warning names that."""
    first(tmp_path)
    thaw = ThawSchedule([Phase(thaw="head", until="1ep"), Phase("rest", thaw=["blocks"])])
    with pytest.warns(ThawlineWarning) as said:
        second(tmp_path, thaw)
    assert any("1 phase never begins: 'rest'" in str(each.message) for each in said)


def test_the_timeline_names_who_began_where_the_run_goes_on(tmp_path: Path) -> None:
    """What ended the row before is the algorithm that took its holds there, or the one that is gone."""
    first(tmp_path, TrainOnly("head"))
    for algorithms, name in (
        ([TrainOnly("blocks[1]")], "TrainOnly"),
        ([LayerThaw(every="1ba")], "LayerThaw"),
        ([], "TrainOnly"),
    ):
        trainer = Trainer_(algorithms=algorithms)
        with pytest.warns(ThawlineWarning, match="TrainOnly"):
            result = trainer.fit(mlp(), loader(), duration="2ep", resume=tmp_path / "ba00000004", on_change="migrate")
        assert name in result.timeline.spans[0].ends_with


def test_what_is_gone_lets_go(tmp_path: Path) -> None:
    """Holds, factors and absolute rates of missing algorithms are released; those of others and the user's stay."""
    diary = Diary()
    first(tmp_path, TrainOnly("head"), LayerwiseLR(decay=0.5), diary)
    with pytest.warns(ThawlineWarning, match="LayerwiseLR is missing; TrainOnly is missing"):
        second(tmp_path, diary)
    assert [each[2] for each in diary.seen if each[0] == "BATCH_START"] == [2] * 4 + [6] * 4


def test_a_released_factor_no_longer_scales(tmp_path: Path) -> None:
    """The rates are those of the optimizer again, and the last checkpoint knows the old owner no more."""
    first(tmp_path, LayerwiseLR(decay=0.5))
    model = mlp()
    with pytest.warns(ThawlineWarning, match="is missing"):
        result = Trainer_(run_dir=tmp_path).fit(
            model, loader(), duration="2ep", resume=tmp_path / "ba00000004", on_change="migrate"
        )
    assert result.metrics["lr/blocks[0]"] == result.metrics["lr/head"] == 0.1
    assert result.last is not None
    assert "LayerwiseLR" not in str(read_checkpoint(result.last)["ledger"]["holds"])


def test_changed_arguments_begin_anew(tmp_path: Path) -> None:
    """Its holds from before are released, and FIT_START takes new ones."""
    diary = Diary()
    first(tmp_path, TrainOnly("head"), diary)
    with pytest.warns(ThawlineWarning, match=r"TrainOnly\(select=\): saved .*head.* given .*blocks"):
        second(tmp_path, TrainOnly("blocks[1]"), diary)
    assert [each[2] for each in diary.seen if each[0] == "BATCH_START"] == [2] * 8
    first(tmp_path / "ema", EMA(decay=0.9))
    ema = EMA(decay=0.5)
    with pytest.warns(ThawlineWarning, match="decay"):
        second(tmp_path / "ema", ema, step=7)
    assert ema.updates == 1


def test_adapters_can_join_a_run_and_stay_when_their_algorithm_leaves(tmp_path: Path) -> None:
    """Attached at the resumed clock, outside any batch; once attached they are the model's."""
    first(tmp_path / "a", EMA(decay=0.5))
    with pytest.warns(ThawlineWarning, match="LoRAInject is new"):
        joined = second(tmp_path / "a", LoRAInject(rank=2), EMA(decay=0.5))
    assert "0.lora_A" in joined.state_dict()
    first(tmp_path / "b", LoRAInject(rank=2), GradClip(1.0))
    with pytest.warns(ThawlineWarning, match="LoRAInject is missing"):
        left = second(tmp_path / "b", GradClip(1.0))
    assert "0.lora_A" in left.state_dict()
    base = read_checkpoint(tmp_path / "b" / "ba00000004")["model"]["0.weight"]
    assert not torch.equal(left.get_parameter("0.weight"), base)  # no longer held


def test_a_new_schedule_acts_from_here_on(tmp_path: Path) -> None:
    """The rate of the next batch is the new schedule's at that progress."""
    first(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = mlp()
        result = Trainer_(schedule=linear(), min_lr=0.01, log_every="1ba").fit(
            model, loader(), duration="2ep", resume=tmp_path / "ba00000004", on_change="migrate"
        )
    assert [str(each.message).partition(":")[0] for each in caught] == [
        "resumed with another schedule", "resumed with another min_lr", "resumed with another log_every",
    ]  # fmt: skip
    assert result.metrics["lr"] == pytest.approx(0.1 * (1 - 7 / 8))


def test_a_wrong_way_is_named(tmp_path: Path) -> None:
    """With the two there are."""
    with pytest.raises(ArgumentError, match=r"fit\(on_change=\) takes 'refuse' or 'migrate', got True"):
        Trainer_().fit(mlp(), loader(), duration=1, on_change=True)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"with a run to resume only, got 'migrate'. Write: .*resume=True"):
        Trainer_().fit(mlp(), loader(), duration=1, on_change="migrate")
