"""The checkpoints of a run: the right ones kept, the newest whole one found, whatever happened before."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from helpers import loader, mlp
from thawline.engine import Trainer, load_weights
from thawline.engine.checkpointing import Checkpointing
from thawline.engine.clock import Time
from thawline.engine.errors import ArgumentError, CheckpointError, RunDirError
from thawline.engine.snapshot import (
    MANIFEST,
    SCHEMA,
    STATE,
    TENSORS,
    _signed,
    read_checkpoint,
    read_manifest,
    write_checkpoint,
)
from thawline.engine.store import CheckpointStore

if TYPE_CHECKING:
    from collections.abc import Sequence

FAULTS = Path(__file__).with_name("store_faults.py")


def fill(store: CheckpointStore, *steps: int) -> list[Path]:
    """Save a state that says its step at each of ``steps``."""
    return [store.save({"step": step, "weight": torch.full((4,), float(step))}, step=step) for step in steps]


def names(store: CheckpointStore) -> list[str]:
    """What the store holds, oldest first."""
    return [path.name for path in store.checkpoints]


def inside(folder: Path) -> list[str]:
    """Every name in ``folder`` but the lock's."""
    return sorted(each.name for each in folder.iterdir() if each.name != ".lock")


def break_(path: Path, name: str = TENSORS) -> None:
    """Flip the last bit of one of the checkpoint's files."""
    raw = bytearray((path / name).read_bytes())
    raw[-1] ^= 1
    (path / name).write_bytes(raw)


def test_an_empty_store_has_nothing(tmp_path: Path) -> None:
    """It is made where it is missing, parents included, and says that there is nothing yet."""
    with CheckpointStore(tmp_path / "runs" / "one") as store:
        assert (store.latest(), store.best, store.load_newest()) == (None, None, None)
        assert not store.holds_run
        assert store.checkpoints == ()


def test_the_newest_checkpoint_is_loaded(tmp_path: Path) -> None:
    """By number, also where names are of different length."""
    with CheckpointStore(tmp_path, keep=9) as store:
        fill(store, 0, 7, 99_999_999, 100_000_000)
        found = store.load_newest()
        assert names(store) == ["ba00000000", "ba00000007", "ba99999999", "ba100000000"]
        assert found is not None
        assert found[0] == store.latest() == tmp_path / "ba100000000"
        assert found[1]["step"] == 100_000_000
        assert store.holds_run


def test_each_checkpoint_names_the_one_before(tmp_path: Path) -> None:
    """So that the history of a run can be followed through its manifests."""
    with CheckpointStore(tmp_path) as store:
        assert [read_manifest(path).parent for path in fill(store, 1, 2)] == [None, "ba00000001"]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    """Older ones are deleted when enough newer ones are there."""
    with CheckpointStore(tmp_path, keep=2) as store:
        fill(store, 1, 2, 3, 4, 5)
        assert inside(tmp_path) == ["ba00000004", "ba00000005"]


@settings(max_examples=30)  # each is up to six saves, each of them several fsyncs
@given(
    metrics=st.lists(
        st.one_of(st.none(), st.floats(), st.sampled_from([0.5, 0.25, -math.inf])), min_size=1, max_size=6
    ),
    keep=st.integers(1, 3),
    mode=st.sampled_from(["min", "max"]),
)
def test_newest_and_best_are_kept(
    tmp_path_factory: pytest.TempPathFactory, metrics: Sequence[float | None], keep: int, mode: Any
) -> None:
    """After every save: exactly the newest ``keep`` and the earliest of the best, NaN and None never being best."""
    with CheckpointStore(tmp_path_factory.mktemp("run"), keep=keep, monitor="eval/loss", mode=mode) as store:
        scored: list[tuple[float, int]] = []
        for step, metric in enumerate(metrics):
            store.save({}, step=step, metric=metric)
            if metric is not None and not math.isnan(metric):
                scored.append((metric if mode == "min" else -metric, step))
            best = min(scored)[1] if scored else None
            expected = {*range(max(0, step + 1 - keep), step + 1), *([] if best is None else [best])}
            assert [int(name[2:]) for name in names(store)] == sorted(expected)
            assert (store.best and int(store.best.name[2:])) == best


@pytest.mark.parametrize(("monitor", "best"), [("eval/accuracy", 2), ("eval/loss", 0), ("val-F1", 2), (None, 0)])
def test_the_direction_follows_from_the_name_of_the_metric(tmp_path: Path, monitor: str | None, best: int) -> None:
    """Unless the mode says it: an accuracy is better when larger, a loss when smaller."""
    for mode, expected in (("auto", best), ("min", 0), ("max", 2)):
        folder = tmp_path / mode
        with CheckpointStore(folder, keep=1, monitor=monitor, mode=mode) as store:
            for step, metric in enumerate([0.1, 0.5, 0.9, 0.3]):
                store.save({}, step=step, metric=metric)
            assert store.best == folder / f"ba{expected:08d}"


def test_the_best_is_known_after_reopening(tmp_path: Path) -> None:
    """The metric lies in the manifest; one that was saved under another name is not compared."""
    with CheckpointStore(tmp_path, keep=1, monitor="eval/loss") as store:
        for step, loss in enumerate([0.5, 0.1, 0.3]):
            store.save({}, step=step, metric=loss)
    with CheckpointStore(tmp_path, keep=1, monitor="eval/loss") as store:
        assert store.best == tmp_path / "ba00000001"
    with CheckpointStore(tmp_path, keep=1, monitor="eval/accuracy", mode="max") as store:
        assert store.best is None


def test_permanent_checkpoints_are_kept_for_good(tmp_path: Path) -> None:
    """Also where their manifest can no longer be read and might say so."""
    with CheckpointStore(tmp_path, keep=1) as store:
        for step in range(5):
            store.save({}, step=step, permanent=step in (1, 3))
        assert names(store) == ["ba00000001", "ba00000003", "ba00000004"]
        break_(tmp_path / "ba00000001", MANIFEST)
        fill(store, 5)
        assert names(store) == ["ba00000001", "ba00000003", "ba00000005"]


@pytest.mark.parametrize("name", [TENSORS, STATE, MANIFEST])
def test_a_damaged_checkpoint_is_set_aside_and_the_next_one_taken(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With a warning that says what was wrong and where it went; a second one under the same name gets a number."""
    with CheckpointStore(tmp_path, keep=3) as store:
        for _ in range(2):
            *_, last = fill(store, *(range(3) if not store.checkpoints else [2]))
            break_(last, name)
            caplog.clear()
            with caplog.at_level(logging.WARNING, "thawline"):
                found = store.load_newest()
            assert found is not None
            assert found[1]["step"] == 1
            (record,) = caplog.records
            assert "checkpoint set aside" in record.getMessage()
            assert "ba00000002" in record.getMessage()
        assert inside(tmp_path) == [".bad-ba00000002", ".bad-ba00000002-2", "ba00000000", "ba00000001"]


def test_a_missing_file_or_a_link_counts_as_damage(tmp_path: Path) -> None:
    """What stands under a checkpoint's name and is none does not stop a resume, nor is it followed."""
    with CheckpointStore(tmp_path, keep=9) as store:
        fill(store, 1, 2)
        (tmp_path / "ba00000002" / STATE).unlink()
        (tmp_path / "ba00000003").symlink_to(tmp_path / "ba00000001")
        (tmp_path / "ba00000004").write_text("a file")
        found = store.load_newest()
        assert found is not None
        assert found[0].name == "ba00000001"
        assert names(store) == ["ba00000001"]
        assert (tmp_path / ".bad-ba00000003").is_symlink()


def test_an_old_checkpoint_under_a_new_name_is_set_aside(tmp_path: Path) -> None:
    """Whole in itself, but not of the step that it claims."""
    with CheckpointStore(tmp_path) as store:
        fill(store, 1, 2)
        shutil.copytree(tmp_path / "ba00000001", tmp_path / "ba00000009")
        found = store.load_newest()
        assert found is not None
        assert found[0].name == "ba00000002"


def test_a_run_of_damaged_checkpoints_never_starts_again_at_zero(tmp_path: Path) -> None:
    """All damaged: an error that says so, each time, with every reason; nothing is renamed."""
    with CheckpointStore(tmp_path) as store:
        for path in fill(store, 1, 2):
            break_(path)
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"(?s)No checkpoint .* is whole.*ba00000002.*ba00000001"):
                store.load_newest()
        assert inside(tmp_path) == ["ba00000001", "ba00000002"]


def test_a_run_of_which_only_set_aside_checkpoints_are_left_never_starts_again_at_zero(tmp_path: Path) -> None:
    """There was a run here, and it is for the user to say that it may be forgotten."""
    with CheckpointStore(tmp_path) as store:
        fill(store, 1)[0].rename(tmp_path / ".bad-ba00000001")
        with pytest.raises(CheckpointError, match="starting again at step 0 is for you to decide"):
            store.load_newest()
        assert store.holds_run


def test_a_checkpoint_of_a_newer_thawline_is_not_set_aside(tmp_path: Path) -> None:
    """It is whole, only not for us: taking an older one instead would lose what was trained."""
    with CheckpointStore(tmp_path) as store:
        _, newest = fill(store, 1, 2)
        body = json.loads((newest / MANIFEST).read_bytes())["manifest"]
        (newest / MANIFEST).write_bytes(_signed({**body, "schema": SCHEMA + 1}))
        with pytest.raises(CheckpointError, match="Update thawline"):
            store.load_newest()
        with pytest.raises(CheckpointError, match="Update thawline"):
            fill(store, 2)
        assert names(store) == ["ba00000001", "ba00000002"]


def test_a_step_that_is_saved_already_keeps_its_checkpoint_where_it_is_equal(tmp_path: Path) -> None:
    """Equal ones are not written again, another replaces it with its parent and permanence, a damaged one is set aside."""
    with CheckpointStore(tmp_path, keep=1) as store:
        first, second = (
            store.save({"w": torch.ones(2)}, step=4),
            store.save({"w": torch.ones(2)}, step=5, permanent=True),
        )
        inode = second.stat().st_ino
        assert store.save({"w": torch.ones(2)}, step=5) == second
        assert second.stat().st_ino == inode
        assert store.save({"w": torch.zeros(2)}, step=5, metric=0.5) == second
        assert read_checkpoint(second)["w"].tolist() == [0.0, 0.0]
        manifest = read_manifest(second)
        assert (manifest.parent, manifest.info["metric"], manifest.info["permanent"]) == (first.name, 0.5, True)
        break_(second)
        assert store.save({"step": "again"}, step=5) == second
        assert read_checkpoint(second)["step"] == "again"
        assert inside(tmp_path) == [".bad-ba00000005", "ba00000005"]


@pytest.mark.parametrize("gone", [False, True])
def test_a_replacement_that_was_cut_short_is_finished(tmp_path: Path, gone: bool) -> None:
    """Killed between the two renames, the run has its new checkpoint; killed before the first, its old one."""
    with CheckpointStore(tmp_path, keep=1) as store:
        old = store.save({"step": "old"}, step=5)
    write_checkpoint(tmp_path, "ba00000005.next", {"step": "new"}, info=dict(read_manifest(old).info))
    if gone:
        shutil.rmtree(old)
    with CheckpointStore(tmp_path, keep=1) as store:
        found = store.load_newest()
        assert found is not None
        assert found[1] == {"step": "new" if gone else "old"}
        assert inside(tmp_path) == ["ba00000005"]


def test_going_on_from_an_older_checkpoint_discards_the_newer(tmp_path: Path) -> None:
    """Saving below the newest is refused; after a rewind the discarded future is neither deleted nor ever loaded."""
    with CheckpointStore(tmp_path, keep=3) as store:
        fill(store, 10, 20, 30)
        with pytest.raises(ArgumentError, match=r"save\(step=\).*newest checkpoint, ba00000030, got 15.*rewind\(15\)"):
            fill(store, 15)
        store.rewind(10)
        fill(store, 15)
        assert inside(tmp_path) == [".discarded-ba00000020", ".discarded-ba00000030", "ba00000010", "ba00000015"]
        found = store.load_newest()
        assert found is not None
        assert found[1]["step"] == 15


def test_leftovers_are_swept_and_the_users_own_files_are_not(tmp_path: Path) -> None:
    """Only names that a save or a deletion makes are swept."""
    leftover = tmp_path / ".tmp-ba00000003-0123456789ab"
    leftover.mkdir()
    (leftover / TENSORS).write_bytes(b"half")
    link = tmp_path / ".tmp-ba00000004-0123456789ab"
    mine = tmp_path / ".tmp-mine"
    mine.mkdir()
    link.symlink_to(mine)
    with CheckpointStore(tmp_path):
        assert inside(tmp_path) == [".tmp-mine"]


def test_a_second_store_is_refused_until_the_first_is_closed(tmp_path: Path) -> None:
    """In one process as between two; a closed store saves no more."""
    store = CheckpointStore(tmp_path)
    with pytest.raises(RunDirError, match="in use by process"):
        CheckpointStore(tmp_path)
    store.close()
    with CheckpointStore(tmp_path) as again:
        fill(again, 1)
    with pytest.raises(CheckpointError, match="is closed"):
        fill(store, 2)


def test_a_store_over_a_file_is_a_typed_error(tmp_path: Path) -> None:
    """The error says to give another run_dir."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Give another run_dir"):
        CheckpointStore(tmp_path / "file")


@pytest.mark.parametrize("cls", [Checkpointing, lambda **given: CheckpointStore("never made", **given)])
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("keep", 0),
        ("keep", -1),
        ("keep", 2.0),
        ("keep", True),
        ("keep", "2"),
        ("monitor", ""),
        ("monitor", 3),
        ("mode", "lowest"),
        ("mode", None),
        ("mode", ["min"]),
    ],
)
def test_a_wrong_argument_is_named(cls: Any, argument: str, value: object) -> None:
    """With what it got, what it takes and a corrected call, before anything is made on disk."""
    with pytest.raises(ArgumentError, match=rf"Checkpoint\w+\({argument}=\) takes .*, got .*Write: Checkpoint"):
        cls(**{argument: value})
    assert not Path("never made").exists()


@pytest.mark.parametrize("keep_every", ["0ba", "often", 0, 1.5, True])
def test_a_wrong_interval_of_snapshots_is_named(keep_every: Any) -> None:
    """None alone means none."""
    with pytest.raises(
        ArgumentError, match=r"Checkpointing\(keep_every=\) takes .*Write: Checkpointing\(keep_every='1ep'\)"
    ):
        Checkpointing(keep_every=keep_every)


@pytest.mark.parametrize("every", ["0ba", "-1ep", "often", 0, 1.5, None, True])
def test_a_wrong_interval_is_named(every: Any) -> None:
    """The error names Checkpointing's argument, not the type behind it."""
    with pytest.raises(ArgumentError, match=r"Checkpointing\(every=\) takes .*Write: Checkpointing\(every='1ep'\)"):
        Checkpointing(every=every)


def test_the_defaults_are_those_of_the_design() -> None:
    """Every epoch, the two newest, no metric; an int is epochs."""
    assert Checkpointing() == Checkpointing(every=Time("1ep"), keep=2, monitor=None, mode="auto")
    assert Checkpointing(every=3).every == Time("3ep")


@pytest.mark.parametrize(("argument", "value"), [("step", -1), ("step", 1.0), ("step", True), ("metric", "low")])
def test_a_wrong_step_or_metric_is_named(tmp_path: Path, argument: str, value: object) -> None:
    """A metric that is no number would be found when it is too late."""
    arguments: dict[str, Any] = {"step": 1, argument: value}
    with CheckpointStore(tmp_path) as store, pytest.raises(ArgumentError, match=rf"save\({argument}=\)"):
        store.save({}, **arguments)


def test_a_metric_may_be_a_tensor(tmp_path: Path) -> None:
    """What a metric's compute() returns is taken as it is."""
    with CheckpointStore(tmp_path) as store:
        assert read_manifest(store.save({}, step=1, metric=torch.tensor(0.5))).info["metric"] == 0.5  # type: ignore[arg-type]


def damage(path: Path, kind: str, rng: random.Random) -> None:
    """Do to a checkpoint what disks, crashes and people do."""
    file = path / rng.choice((TENSORS, STATE, MANIFEST))
    raw = bytearray(file.read_bytes())
    at = rng.randrange(len(raw))
    if kind == "flipped bit":
        raw[at] ^= 1 << rng.randrange(8)
    elif kind == "truncated":
        del raw[at:]
    elif kind == "zeroed page":
        begin = at // 4096 * 4096
        raw[begin : begin + 4096] = bytes(len(raw[begin : begin + 4096]))
    elif kind == "swapped":
        raw = bytearray((path.with_name("ba00000020") / file.name).read_bytes())
    file.write_bytes(raw)
    if kind == "missing":
        file.unlink()
    elif kind == "swapped whole":
        shutil.rmtree(path)
        shutil.copytree(path.with_name("ba00000020"), path)
    elif kind == "link":
        path.rename(path.with_name("elsewhere"))
        path.symlink_to(path.with_name("elsewhere"))


KINDS = ("flipped bit", "truncated", "zeroed page", "swapped", "missing", "swapped whole", "link")


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_damage_of_any_kind_is_found_and_the_next_one_is_used(tmp_path: Path, count: int) -> None:
    """Seeded: one of seven kinds, at a random place of a random file; the rest of the run is as it was."""
    rng = random.Random(2024)
    whole = tmp_path / "whole"
    with CheckpointStore(whole, keep=3) as store:
        for step in (10, 20, 30):
            weight = torch.full((4096,), float(step))
            store.save({"step": step, "weight": weight, "log": list(range(step, 2000))}, step=step)
    for number in range(count):
        folder = Path(shutil.copytree(whole, tmp_path / str(number), symlinks=True))
        kind = KINDS[number % len(KINDS)]
        damage(folder / "ba00000030", kind, rng)
        with CheckpointStore(folder, keep=3) as store:
            found = store.load_newest()
            assert found is not None, kind
            assert (found[0].name, found[1]["step"], names(store)) == (
                "ba00000020",
                20,
                ["ba00000010", "ba00000020"],
            ), kind
            assert os.path.lexists(folder / ".bad-ba00000030")
            # and on: the run saves the same step again
            store.save({"step": 30}, step=30)
            assert names(store) == ["ba00000010", "ba00000020", "ba00000030"]
        shutil.rmtree(folder)


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_at_step_0(tmp_path: Path) -> None:
    """`fit(resume=True)` is an error that says why each cannot be used, also at the second try; nothing is deleted."""
    trainer = Trainer(loss_fn=cross_entropy, run_dir=tmp_path, checkpoint=Checkpointing(every="2ba"), progress=False)
    trainer.fit(mlp(), loader(), duration="1ep")
    for path in tmp_path.glob("ba*"):
        break_(path)
    before = inside(tmp_path)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"No checkpoint in .* is whole(.|\n)*ba00000004(.|\n)*ba00000002"):
            trainer.fit(mlp(), loader(), duration="1ep", resume=True)
    assert [name for name in inside(tmp_path) if name.startswith("ba")] == [n for n in before if n.startswith("ba")]


def test_snapshots_are_kept_for_good_besides_the_newest(tmp_path: Path) -> None:
    """At each end of `keep_every`, also between two of `every`; a resumed run goes on with them."""
    policy = Checkpointing(every="2ba", keep=1, keep_every="3ba")
    for duration, resume, warned in (("2ep", False, nullcontext()), ("3ep", True, pytest.warns(match="duration"))):
        trainer = Trainer(loss_fn=cross_entropy, run_dir=tmp_path, checkpoint=policy, progress=False)
        with warned:
            trainer.fit(mlp(), loader(), duration=duration, resume=resume)
    kept = {path.name: read_manifest(path).info["permanent"] for path in tmp_path.glob("ba*")}
    assert kept == {"ba00000003": True, "ba00000006": True, "ba00000009": True, "ba00000012": True}


def test_the_best_is_scored_on_weights_that_were_evaluated(tmp_path: Path) -> None:
    """Saving seldom and at other batches than evaluating: each better evaluation is saved, and no other is scored."""
    policy = Checkpointing(every="5ba", keep=9, monitor="eval/loss")
    trainer = Trainer(
        loss_fn=cross_entropy, run_dir=tmp_path, checkpoint=policy, progress=False, eval_every="3ba",
        optimizer=partial(torch.optim.SGD, lr=0.5),
    )  # fmt: skip
    result = trainer.fit(mlp(), loader(), loader(seed=1), duration="16ba")
    scores = {path.name: read_manifest(path).info["metric"] for path in sorted(tmp_path.glob("ba*"))}
    assert {name for name, score in scores.items() if score is None} == {"ba00000005", "ba00000010"}
    scored = {name: score for name, score in scores.items() if score is not None}
    assert {"ba00000003", "ba00000016"} <= set(scored) <= {f"ba{step:08d}" for step in (3, 6, 9, 12, 15, 16)}
    assert result.best is not None
    assert result.best.name == min(scored, key=scored.__getitem__)
    fresh = mlp()
    load_weights(result.best, fresh)
    assert trainer.evaluate(fresh, loader(seed=1))["eval/loss"] == scores[result.best.name]


# ---------------------------------------------------------------------------------------------------------------------
# Faults in processes of their own: see store_faults.py


def faults(kind: str, folder: Path, *numbers: int, before: Sequence[str] = ()) -> dict[str, Any]:
    """Run store_faults.py and return its report."""
    command = [*before, sys.executable, str(FAULTS), kind, str(folder), *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and before:
        pytest.skip(f"not permitted here: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_save_killed_at_any_line_leaves_the_old_or_the_new_checkpoint(tmp_path: Path, stride: int) -> None:
    """SIGKILL before each ``stride``-th line: what is then loaded is whole, the lock is free, nothing unfinished stays."""
    report = faults("kills", tmp_path, stride)
    assert report["faults"] == []
    assert report["exit"] == 0
    assert report["killed"] > 350 // stride


@pytest.mark.parametrize("count", [15, pytest.param(300, marks=pytest.mark.slow)])
def test_a_process_killed_from_outside_at_random_loses_one_save_at_most(tmp_path: Path, count: int) -> None:
    """SIGKILL while it saves in a loop, each process going on from the one before."""
    report = faults("strikes", tmp_path, count, 7)
    assert report["faults"] == []
    assert report["killed"] == count
    assert report["steps"] >= 10 * count


@pytest.mark.parametrize("count", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_a_full_disk_leaves_what_was_there_and_the_store_goes_on(tmp_path: Path, count: int) -> None:
    """Full after ever more bytes: a CheckpointError from the OSError, no leftover, and the next save succeeds."""
    report = faults("full", tmp_path, count)
    assert report["faults"] == []
    assert count * 9 // 10 <= report["refused"] < count  # the last cuts lie behind the last byte


def test_a_small_file_system_is_a_full_disk_too(tmp_path: Path) -> None:
    """ENOSPC at each page of the tensors, the state and the manifest, on real file systems of a few pages."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("unshare mounts them without being root, and is not installed")
    report = faults("tiny", tmp_path, 8, before=[unshare, "-rm"])
    assert report["faults"] == []
    assert report["outcomes"] == sorted(report["outcomes"])  # ENOSPC, …, saved, …
    assert {"ENOSPC", "saved"} == set(report["outcomes"])


SAVE_ONCE = """
import sys, torch
from thawline.engine.errors import CheckpointError
from thawline.engine.store import CheckpointStore
with CheckpointStore(sys.argv[1]) as store:
    try:
        store.save({"weight": torch.ones(9), "step": 2}, step=2)
        print("saved")
    except CheckpointError as error:
        print("refused", error.__cause__.errno)
"""
# strace counts by thread: the files are fsynced by threads of their own, the two directories by the main one, the second
# after the rename. The first mkdir is the store's own and finds its folder there.
CALLS = [("fsync", 1), ("fsync", 2), ("write", 1), ("write", 2), ("write", 3), ("mkdir", 2), ("rename", 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("call", "when"), CALLS)
@pytest.mark.parametrize("fault", ["error=EIO", "signal=SIGKILL"])
def test_each_system_call_of_a_save_may_fail(tmp_path: Path, call: str, when: int, fault: str) -> None:
    """The call fails or the process dies in it: a CheckpointError or death, and then an old or new whole checkpoint."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace makes system calls fail, and is not installed")
    with CheckpointStore(tmp_path) as store:
        fill(store, 1)
    inject = [strace, "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={when}"]
    command = [*inject, sys.executable, "-B", "-c", SAVE_ONCE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "ptrace" in done.stderr:
        pytest.skip("strace is not permitted here")
    expected = (0, f"refused {errno.EIO}\n") if fault == "error=EIO" else (-signal.SIGKILL, "")
    assert (done.returncode, done.stdout) == expected, done.stderr
    with CheckpointStore(tmp_path) as store:
        found = store.load_newest()
        assert found is not None
        # The last fsync comes after the rename: the checkpoint is there, only not yet safe from a power cut.
        assert found[1]["step"] in ((1, 2) if (call, when) == ("fsync", 2) else (1,))
        assert [name for name in inside(tmp_path) if not name.startswith("ba")] == []
