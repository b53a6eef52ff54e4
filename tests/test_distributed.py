"""Several ranks: real processes under torchrun, over gloo on the loopback, compared with one process and each other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import ranks
from thawline.engine import ArgumentError, DistributedError, Replicate, ThawlineWarning, Trainer
from thawline.engine.batches import part_of_batch
from thawline.engine.data import ResumableLoader
from thawline.engine.distributed import Launch
from thawline.engine.log import get_logger, only_errors
from thawline.engine.shares import Share

RANKS = Path(ranks.__file__)
Outcome = dict[str, Any]
Launched = Callable[..., list[Outcome]]


def launch(
    world: int, folder: Path, *scenarios: str, restarts: int = 0, check: bool = True, limit: float = 240.0, **settings: Any
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run scenarios under torchrun; settings become ``RANKS_…`` in the environment."""
    folder.mkdir(exist_ok=True)
    given = {f"RANKS_{name.upper()}": str(value) for name, value in settings.items()}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | given
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command = [*run, f"--max-restarts={restarts}", str(RANKS), str(folder), *scenarios]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, errors = process.communicate()
        pytest.fail(f"{scenarios} under {world} ranks hung:\n{errors[-4000:]}")
    if check and process.returncode:
        pytest.fail(f"{scenarios} under {world} ranks failed:\n{errors[:6000]}")
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def outcomes(folder: Path, scenario: str, world: int) -> list[Outcome]:
    """Return what each rank wrote down."""
    return [torch.load(folder / f"{scenario}-{rank}.pt", weights_only=False) for rank in range(world)]


def alone(scenario: str, folder: Path) -> Outcome:
    """Return what one process comes to: the reference."""
    return ranks.SCENARIOS[scenario](folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the ranks of this module write."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder: Path) -> Launched:
    """Return what two ranks come to, by scenario."""
    launch(
        2, folder / "two", "training", "portions", "sources", "statistics", "without_following", "evaluation", "stopping",
        "signals", "memory", "nonfinite", "disagreement", "resuming", "relay", "elastic", until=3, kill=-1,
    )  # fmt: skip
    return lambda scenario: outcomes(folder / "two", scenario, 2)


@pytest.fixture(scope="module")
def three(folder: Path) -> Launched:
    """Return what three ranks come to, by scenario."""
    launch(3, folder / "three", "training", "portions", "statistics", "evaluation", "resuming")
    return lambda scenario: outcomes(folder / "three", scenario, 3)


@pytest.fixture(scope="module", params=["two", "three"])
def several(request: pytest.FixtureRequest) -> Launched:
    """Return what two, and then three, ranks come to."""
    launched: Launched = request.getfixturevalue(request.param)
    return launched


@pytest.fixture(scope="module")
def reference(folder: Path) -> Iterator[Callable[[str], Outcome]]:
    """Return what one process comes to, by scenario; computed once."""
    known: dict[str, Outcome] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def compute(scenario: str) -> Outcome:
        if scenario not in known:
            (folder / "one").mkdir(exist_ok=True)
            known[scenario] = alone(scenario, folder / "one")
        return known[scenario]

    yield compute
    torch.set_num_threads(threads)


def same_everywhere(found: list[Outcome]) -> None:
    """Check that after every batch all ranks held the same bits, and told the same in the end."""
    for key in ("digests", "trainable", "losses", "history", "metrics", "stop", "clock", "best", "last", "spans"):
        assert all(repr(each[key]) == repr(found[0][key]) for each in found), key  # a NaN is no equal of itself


def close(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float) -> None:
    """Check that two models hold the same weights, up to rounding."""
    assert list(first) == list(second)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=tolerance, msg=name)


def samples_of(found: list[Outcome]) -> list[tuple[int, ...]]:
    """Return the samples of each batch, those of the ranks put together in order."""
    return [sum(each, ()) for each in zip(*(outcome["samples"] for outcome in found), strict=True)]


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["plain", "thaw", "freeze", "lora", "lisa"])
def test_ranks_stay_equal_and_equal_one_process(several: Launched, reference: Any, recipe: str) -> None:
    """After each thaw, freeze and injection weights, moments and EMA are bit-equal, and those of one process to 1e-12."""
    found, one = [each[recipe] for each in several("training")], reference("training")[recipe]
    same_everywhere(found)
    close(found[0]["weights"], one["weights"], 1e-12)
    assert found[0]["trainable"] == one["trainable"]
    assert found[0]["losses"] == pytest.approx(one["losses"], abs=1e-12)
    assert found[0]["metrics"] == pytest.approx(one["metrics"], abs=1e-12)
    assert (found[0]["stop"], found[0]["clock"], found[0]["spans"]) == (one["stop"], one["clock"], one["spans"])


def test_single_precision_agrees_to_a_millionth(several: Launched, reference: Any) -> None:
    """In float32 the sums of the ranks are those of one process up to rounding."""
    found, one = [each["float32"] for each in several("training")], reference("training")["float32"]
    same_everywhere(found)
    close(found[0]["weights"], one["weights"], 1e-6)
    assert found[0]["losses"] == pytest.approx(one["losses"], abs=1e-6)


@pytest.mark.parametrize("case", ["ignored", "microbatches", "accumulated", "routed", "few"])
def test_a_batch_may_be_cut_anyhow(several: Launched, reference: Any, case: str) -> None:
    """Ignored labels, microbatches, accumulation, branches only some ranks take, fewer samples than ranks: all as in one."""
    found, one = [each[case] for each in several("portions")], reference("portions")[case]
    same_everywhere(found)
    close(found[0]["weights"], one["weights"], 1e-12)
    assert found[0]["losses"] == pytest.approx(one["losses"], abs=1e-12)


def test_what_got_no_gradient_anywhere_is_not_stepped(two: Launched) -> None:
    """A part that no rank used keeps its weights, without weight decay; one that some rank used is trained by all."""
    before, after = ranks.model(ranks.Routed).state_dict(), two("portions")[0]["routed"]["weights"]
    assert torch.equal(before["never.weight"], after["never.weight"])
    assert not torch.equal(before["odd.weight"], after["odd.weight"])


def test_each_sample_is_trained_on_once_an_epoch(several: Launched, reference: Any) -> None:
    """The ranks' shares put together are the batches of one process."""
    found, one = [each["plain"] for each in several("training")], reference("training")["plain"]
    assert [sorted(each) for each in samples_of(found)] == [sorted(each) for each in one["samples"]]
    assert sorted(sum(one["samples"][:4], ())) == list(range(44))


@pytest.mark.parametrize("case", ["workers", "iterable", "ready"])
def test_every_kind_of_loader_is_shared_out(two: Launched, reference: Any, case: str) -> None:
    """Workers, iterable datasets and ready batches give what one process is given."""
    found, one = [each[case] for each in two("sources")], reference("sources")[case]
    same_everywhere(found)
    close(found[0]["weights"], one["weights"], 1e-12)
    assert found[0]["clock"] == one["clock"]


def test_running_statistics_are_averaged_and_dropout_differs(several: Launched) -> None:
    """Batch normalization's buffers are bit-equal after each batch, while every rank draws numbers of its own."""
    found = several("statistics")
    same_everywhere(found)
    assert len({tuple(each["noise"]) for each in found}) == len(found)


def test_without_following_the_ledger_the_ranks_drift(two: Launched) -> None:
    """The negative control: where the buckets stay those of the first batch, what thaws later is not reduced."""
    first, second = two("without_following")
    assert first["digests"][:2] == second["digests"][:2]
    assert all(one != other for one, other in zip(first["digests"][2:], second["digests"][2:], strict=True))
    assert not torch.equal(first["weights"]["blocks.2.0.weight"], second["weights"]["blocks.2.0.weight"])


def test_evaluation_neither_repeats_nor_loses_a_sample(several: Launched, reference: Any) -> None:
    """Losses, functions, accumulators with a sync of their own and without give the values of one process."""
    found, one = several("evaluation"), reference("evaluation")
    for each in found:
        assert each["values"] == pytest.approx(one["values"], abs=1e-7)
        assert each["values"]["eval/loss"] == pytest.approx(one["values"]["eval/loss"], abs=1e-14)
        assert each["sizes"] == one["sizes"] == [4, 4, 4, 4, 4, 1]


# -- decisions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "batches"),
    [("FIT_START", 0), ("EPOCH_START", 0), ("BATCH_START", 2), ("AFTER_STEP", 3), ("BATCH_END", 2), ("EVAL_END", 2)],
)
def test_one_rank_stops_all_of_them(two: Launched, event: str, batches: int) -> None:
    """A stop that one rank asks for ends the fit on all, at the same batch, for the same reason."""
    found = [each[event] for each in two("stopping")]
    same_everywhere(found)
    assert (found[0]["stop"], found[0]["clock"][1]) == ("rank 1", batches)


def test_early_stop_is_one_decision(two: Launched) -> None:
    """What depends on reduced metrics is decided alike."""
    found = [each["early"] for each in two("stopping")]
    same_everywhere(found)
    assert found[0]["stop"].startswith("early stop")


def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(two: Launched, reference: Any) -> None:
    """All ranks stop after the same batch, and the resumed run comes to what an uninterrupted one does."""
    found = two("signals")
    for part in ("stopped", "resumed"):
        same_everywhere([each[part] for each in found])
    stopped, resumed = found[0]["stopped"], found[0]["resumed"]
    assert (stopped["stop"], stopped["clock"][1], resumed["clock"]) == ("signal", 6, [3, 12, 132])
    close(resumed["weights"], reference("training")["plain"]["weights"], 1e-12)


def test_memory_that_runs_out_on_one_rank_is_made_by_all(two: Launched, reference: Any) -> None:
    """The batch is repeated in smaller parts, and the fit comes to the same."""
    found = two("memory")
    same_everywhere(found)
    close(found[0]["weights"], reference("training")["plain"]["weights"], 1e-12)


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_loss_that_is_no_number_on_one_rank(two: Launched, reference: Any, policy: str) -> None:
    """All ranks skip the same step, or go back to the same checkpoint."""
    found, one = [each[policy] for each in two("nonfinite")], reference("nonfinite")[policy]
    same_everywhere(found)
    assert found[0]["clock"] == one["clock"]
    close(found[0]["weights"], one["weights"], 1e-12)


def test_nonfinite_raises_on_all_ranks(two: Launched) -> None:
    """With the default policy every rank ends with the same words."""
    first, second = (each["raise"] for each in two("nonfinite"))
    assert first == second
    assert first.startswith("NonFiniteError: the loss is nan at epoch 0, batch 2.")


# -- disagreement ------------------------------------------------------------------------------------------------------

DISAGREEMENTS = {
    "ledger": (
        "the ranks disagree on what trains: blocks.0.0.weight, requires_grad: rank 1 has False, rank 0 has True",
        "blocks.0.0.weight, trains: rank 1 has False, rank 0 has True",
        "held by one of us",
    ),
    "weights": ("the ranks disagree on the weights", "stem.weight: rank 1 has"),
    "model": ("parameter weight, shape: rank 1 has [4, 6], rank 0 has [3, 6]",),
    "algorithms": ("setting algorithms[0], arguments, max_norm: rank 1 has 2.0, rank 0 has 1.0",),
    "lengths": ("train_loader, batches: rank 1 has 3, rank 0 has 4", "train_loader, samples: rank 1 has 36, rank 0 has 48",),
    "batches": ("train_loader has batches of 7 samples", "got 7, wanted a multiple of 2", "DataLoader(dataset, batch_size=8)"),
    "sampler": ("train_loader has a DistributedSampler",),
    "not shared": ("rank 1 does not see /proc/nowhere", "wanted one that all machines share"),
    "uneven": ("rank 1 is at EPOCH_END of batch 3", "BATCH_START of batch 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_ranks_that_differ_end_together(two: Launched, case: str) -> None:
    """Every rank ends with a typed error that names the rank, what it has and what was wanted."""
    for each in two("disagreement"):
        assert each[case].startswith("DistributedError: ")
        for words in DISAGREEMENTS[case]:
            assert words in each[case]


def test_what_fails_on_the_first_rank_is_said_by_all(two: Launched) -> None:
    """A directory that holds a run is refused by the rank that opens it, and the others repeat why."""
    first, second = (each["taken"] for each in two("disagreement"))
    assert first.startswith("RunDirError: ")
    assert second.startswith("DistributedError: rank 0 of 2 failed opening the run directory: RunDirError: ")
    assert "holds a run already" in second


# -- checkpoints -------------------------------------------------------------------------------------------------------


def same_end(whole: Outcome, part: Outcome) -> None:
    """Check that a resumed run ended as the uninterrupted one, to the bit."""
    begun = len(whole["digests"]) - len(part["digests"])
    assert (part["digests"], part["losses"]) == (whole["digests"][begun:], whole["losses"][begun:])
    assert (part["history"], part["metrics"], part["clock"]) == (whole["history"], whole["metrics"], whole["clock"])
    assert all(torch.equal(part["weights"][name], whole["weights"][name]) for name in whole["weights"])


def test_resume_is_exact(several: Launched) -> None:
    """With dropout, thaws and averages: each rank goes on with its own generators, to the bit."""
    for each in several("resuming"):
        assert len(each["resumed"]) == 2
        for part in each["resumed"].values():
            same_end(each["whole"], part)


def test_one_rank_writes(two: Launched) -> None:
    """A run's directory holds one run, and every rank knows its checkpoints."""
    found = two("resuming")
    same_everywhere([each["whole"] for each in found])
    assert found[0]["written"] == [
        ".lock", *(f"ba{step:08d}" for step in range(1, 9)), "metrics.jsonl", "run.json",
    ]  # fmt: skip
    assert found[1]["whole"]["last"].endswith("ba00000008")


def test_another_number_of_ranks_goes_on(folder: Path, two: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks begin, one goes on, four end: each sample once an epoch, all ranks equal."""
    begun = two("relay")
    monkeypatch.setenv("RANKS_UNTIL", "5")
    with pytest.warns(ThawlineWarning, match="world was 2, is 1"):
        middle = alone("relay", folder / "two")
    launch(4, folder / "two", "relay")
    ended = outcomes(folder / "two", "relay", 4)
    same_everywhere(begun)
    same_everywhere(ended)
    seen = [*samples_of(begun), *middle["samples"], *samples_of(ended)]
    assert [sorted(sum(seen[part : part + 4], ())) for part in (0, 4)] == [list(range(44))] * 2


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_rank_that_ends_is_missed_at_once(folder: Path) -> None:
    """The others end with an error that says where, and its own words are in the output."""
    ended = launch(3, folder / "lost", "lost", check=False, how="raise", timeout=120)
    assert ended.returncode
    assert "ZeroDivisionError: the reason" in ended.stderr
    for each in outcomes(folder / "lost", "lost", 2):
        assert "lost another one while reducing gradients of batch 3" in each["error"]
        assert "--max-restarts" in each["error"]
        assert each["seconds"] < 60


def test_a_killed_rank_is_started_anew_and_the_run_goes_on(folder: Path, two: Launched) -> None:
    """Under ``torchrun --max-restarts`` the newest checkpoint is gone on from, without a word in the script."""
    launch(2, folder / "elastic", "elastic", restarts=1)
    found = outcomes(folder / "elastic", "elastic", 2)
    same_everywhere(found)
    assert (folder / "elastic" / "died").exists()
    assert (
        len(found[0]["digests"]) == 4
    )  # from batch 4, the newest checkpoint before batch 5, where the rank was killed
    for part, whole in zip(found, two("elastic"), strict=True):
        same_end(whole, part)


# -- alone -------------------------------------------------------------------------------------------------------------


def test_shares_are_a_partition() -> None:
    """Every sample of a batch is exactly one rank's, with homes or without; sizes differ by one at most."""
    for world, size, seed in product(range(1, 9), range(20), (None, 0, -1)):
        parts = [Share(rank, world, seed).of(range(size)) for rank in range(world)]
        together = [each for part in parts for each in part]
        assert (together if seed is None else sorted(together)) == list(range(size))
        assert all(list(part) == sorted(part) for part in parts)  # in the order of the batch
        assert [len(part) for part in parts] == [len(Share(rank, world).of(range(size))) for rank in range(world)]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_samples_come_home() -> None:
    """In every epoch most samples are the same rank's, as many as the sizes of the pieces allow; names have no home."""
    random = torch.Generator().manual_seed(0)
    shares, size = [Share(rank, 4, seed=1) for rank in range(4)], 64
    homes: dict[int, list[int]] = {}
    for _ in range(8):
        for batch in torch.randperm(640, generator=random).split(size):
            for share in shares:
                for each in share.of(batch.tolist()):
                    homes.setdefault(each, []).append(share.rank)
    often = [max(map(ranks_seen.count, ranks_seen)) for ranks_seen in homes.values()]
    # Of Binomial(64, 1/4) samples with one home, 1.4 more or fewer than 16 on the average: 9 in 100 go elsewhere.
    assert sum(often) / (8 * len(homes)) > 0.9
    assert [Share(1, 2, seed=0).of(["a", "b", -1, 2**70]), Share(1, 2, seed=0).of([-1, 2**70])] == [[-1, 2**70], [-1]]


def test_a_rank_without_a_sample_looks_at_the_first() -> None:
    """Where a batch has fewer samples than there are ranks, each has something to look at, and counts none of it."""
    dataset = TensorDataset(torch.arange(9))
    for rank in range(4):
        data = ResumableLoader(DataLoader(dataset, batch_size=8), seed=0, share=Share(rank, 4))
        last = list(data.batches(0))[-1]
        assert (last.batch[0].tolist(), last.samples, last.whole) == ([8], int(rank == 3), 1)


def test_a_batch_is_cut_like_microbatches() -> None:
    """What has an entry a sample is cut, the rest is shared."""
    part = part_of_batch({"x": torch.arange(4), "scale": 2.0, "names": list("abcd")}, 1, 3)
    assert (part["x"].tolist(), part["scale"], part["names"]) == ([1, 2], 2.0, ["b", "c"])


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}, "RANK is 2, and takes 0 to 1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE takes a whole number, got 'two'"),
    ],
)
def test_an_incomplete_launch_is_refused(environment: dict[str, str], words: str) -> None:
    """What the launcher left out is named."""
    with pytest.raises(DistributedError) as caught:
        Launch.found(environment)
    assert words in str(caught.value)


def test_one_process_is_alone() -> None:
    """Without a launcher, or with a world of one, there is no team."""
    assert Launch.found({}) is None
    assert Launch.found({"WORLD_SIZE": "1", "RANK": "0"}) is None


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose first rank never comes gives up within the timeout, and says where it looked."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    trainer = Trainer(
        loss_fn=torch.nn.functional.mse_loss, distributed=Replicate(timeout=1), device="cpu", progress=False
    )
    with pytest.raises(DistributedError, match=r"rank 1 of 2 did not find the others within 1 s at 127\.0\.0\.1:9"):
        trainer.fit(torch.nn.Linear(2, 1), [(torch.zeros(2, 2), torch.zeros(2, 1))], duration="1ep")


@pytest.mark.parametrize("name", ["timeout", "bucket_mib"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "60", True])
def test_bad_arguments_are_refused(name: str, value: Any) -> None:
    """Each names itself, what it takes and a corrected call."""
    with pytest.raises(ArgumentError, match=rf"Replicate\({name}=\) takes a number of"):
        Replicate(**{name: value})
    with pytest.raises(ArgumentError, match=r"Trainer\(distributed=\) takes 'auto', False"):
        Trainer(distributed="ddp")  # type: ignore[arg-type]


def test_other_ranks_log_errors_alone(caplog: pytest.LogCaptureFixture) -> None:
    """What the first rank says is not said again; an error is."""
    log = get_logger("thawline.engine.run")
    with caplog.at_level("INFO", logger="thawline"), only_errors():
        log.info("resumed")
        log.error("broken")
    assert [str(each.msg) for each in caplog.records] == ["broken"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU for each rank")
def test_gpus(tmp_path: Path, reference: Any) -> None:
    """On two GPUs gradients go over NCCL: ranks stay equal, and equal one process."""
    launch(2, tmp_path, "training", "statistics", "resuming", device="cuda")
    same_everywhere(outcomes(tmp_path, "statistics", 2))
    found = [each["thaw"] for each in outcomes(tmp_path, "training", 2)]
    same_everywhere(found)
    close(found[0]["weights"], reference("training")["thaw"]["weights"], 1e-9)
    for each in outcomes(tmp_path, "resuming", 2):
        for part in each["resumed"].values():
            same_end(each["whole"], part)


# -- slow --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_resume_is_exact_at_every_step(tmp_path: Path, world: int) -> None:
    """Wherever a run is cut, it goes on to the same bits."""
    launch(world, tmp_path, "resuming", "training", "evaluation", steps="all", limit=600)
    for each in outcomes(tmp_path, "resuming", world):
        assert len(each["resumed"]) == 8
        for part in each["resumed"].values():
            same_end(each["whole"], part)
    for recipe in outcomes(tmp_path, "training", world)[0]:
        same_everywhere([each[recipe] for each in outcomes(tmp_path, "training", world)])


@pytest.mark.slow
def test_ranks_killed_at_random(tmp_path: Path) -> None:
    """Twenty times a rank is killed at another batch: torchrun's restart comes to the uninterrupted run."""
    launch(2, tmp_path / "whole", "elastic", kill=-1)
    whole = outcomes(tmp_path / "whole", "elastic", 2)
    for attempt in range(20):
        killed = tmp_path / f"killed-{attempt}"
        launch(2, killed, "elastic", restarts=1, kill=attempt % 8)
        for part, reference in zip(outcomes(killed, "elastic", 2), whole, strict=True):
            same_end(reference, part)


@pytest.mark.slow
def test_ranks_that_hang_are_given_up(tmp_path: Path) -> None:
    """Five times a rank is stopped: the other one ends within the timeout, saying what it waited for."""
    for attempt in range(5):
        began = time.monotonic()
        ended = launch(2, tmp_path / str(attempt), "lost", check=False, how="stop", timeout=5, limit=120)
        assert ended.returncode
        assert time.monotonic() - began < 100
        (found,) = outcomes(tmp_path / str(attempt), "lost", 1)
        assert "is given up after 5 s" in found["error"]
