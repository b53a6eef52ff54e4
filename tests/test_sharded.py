"""Weights in shards: real processes under torchrun, over gloo, compared with one process, with each other, and across modes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
from test_distributed import Launched, Outcome, close, launch, outcomes, same_end, same_everywhere
from thawline.engine import (
    ArgumentError,
    FullyShard,
    ThawlineWarning,
    Trainer,
    export,
    is_sharded,
    load_weights,
    shard_like,
    unsharded,
)
from thawline.engine.shards import replaced, sharded_in

RECIPES = ("plain", "thaw", "freeze", "lora", "lisa")
KINDS = ("tied", "momentum", "filled", "parted", "inf", "one", "value", "adaptive", "by layer")


def come_to(scenario: str, folder: Path) -> Outcome:
    """Return what one process comes to, in the arithmetic of the ranks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        folder.mkdir(exist_ok=True)
        return ranks.SCENARIOS[scenario](folder)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the ranks of this module write."""
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def two(folder: Path) -> Launched:
    """Return what two ranks come to, by scenario."""
    launch(
        2, folder / "two", "training", "portions", "kinds", "manners", "resuming", "handing", "afterwards", "nonfinite",
        "refusals", mode="sharded",
    )  # fmt: skip
    return lambda scenario: outcomes(folder / "two", scenario, 2)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    """Return what one process comes to, by scenario; computed once."""
    known: dict[str, Outcome] = {}

    def compute(scenario: str) -> Outcome:
        if scenario not in known:
            known[scenario] = come_to(scenario, folder / "one")
        return known[scenario]

    return compute


def same_as_one(found: list[Outcome], one: Outcome, tolerance: float = 1e-12) -> None:
    """Check that the ranks told the same, and came to what one process does."""
    same_everywhere(found)
    close(found[0]["weights"], one["weights"], tolerance)
    assert found[0]["losses"] == pytest.approx(one["losses"], abs=tolerance, nan_ok=True)
    assert found[0]["metrics"] == pytest.approx(one["metrics"], abs=tolerance, nan_ok=True)
    assert (found[0]["trainable"], found[0]["clock"], found[0]["stop"]) == (one["trainable"], one["clock"], one["stop"])


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_shards_train_as_one_process(two: Launched, reference: Any, recipe: str) -> None:
    """With thaws, freezes, adapters, clipping and averages, and an uneven last batch, weights are those of one process."""
    same_as_one([each[recipe] for each in two("training")], reference("training")[recipe])


def test_single_precision_agrees_to_a_millionth(two: Launched, reference: Any) -> None:
    """In float32 the sums of the ranks are those of one process up to rounding."""
    same_as_one([each["float32"] for each in two("training")], reference("training")["float32"], 1e-6)


@pytest.mark.parametrize("case", ["ignored", "microbatches", "accumulated", "few"])
def test_a_batch_may_be_cut_anyhow(two: Launched, reference: Any, case: str) -> None:
    """A rank with fewer microbatches, or none, stands in for the others' gathering and changes nothing."""
    same_as_one([each[case] for each in two("portions")], reference("portions")[case])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_optimizer_and_limit(two: Launched, reference: Any, kind: str) -> None:
    """Tied weights, moments, state from the start, several optimizers, and norms of every kind are those of one process."""
    same_as_one([each[kind] for each in two("kinds")], reference("kinds")[kind])


@pytest.mark.parametrize(("way", "tolerance"), [("plain", 1e-6), ("kept", 1e-6), ("offloaded", 1e-6), ("mixed", 1e-2)])
def test_ways_of_sharding(two: Launched, reference: Any, way: str, tolerance: float) -> None:
    """Kept or let go, offloaded or not, the numbers are the same; in bfloat16 nearly so, and weights stay float32."""
    found, one = [each[way] for each in two("manners")], reference("manners")["plain"]
    same_everywhere(found)
    close(found[0]["weights"], one["weights"], tolerance)
    assert found[0]["weights"]["head.weight"].dtype == torch.float32


def test_a_loss_that_is_no_number_on_one_rank(two: Launched, reference: Any) -> None:
    """All ranks skip the same step, or go back to the same checkpoint, or raise the same words."""
    for policy in ("skip", "rollback"):
        same_as_one([each[policy] for each in two("nonfinite")], reference("nonfinite")[policy])
    first, second = (each["raise"] for each in two("nonfinite"))
    assert first == second
    assert first.startswith("NonFiniteError: the loss is nan at epoch 0, batch 2.")


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_resume_is_exact(two: Launched) -> None:
    """With dropout, thaws, clipping and averages a resumed run goes on to the same bits."""
    for each in two("resuming"):
        assert len(each["resumed"]) == 2
        for part in each["resumed"].values():
            same_end(each["whole"], part)


def resumed_alone(checkpoint: Path, folder: Path) -> Outcome:
    """Return what one process comes to from a checkpoint."""
    os.environ["RANKS_FROM"] = str(checkpoint)
    try:
        with pytest.warns(ThawlineWarning, match="world was"):
            return come_to("handing", folder)["rest"]  # type: ignore[no-any-return]
    finally:
        del os.environ["RANKS_FROM"]


def test_a_checkpoint_goes_from_hand_to_hand(folder: Path, two: Launched, tmp_path: Path) -> None:
    """A run begun in shards goes on in one process, and one begun there in shards, to the same weights."""
    whole = two("handing")[0]["whole"]
    rest = resumed_alone(folder / "two" / "handing" / "ba00000004", tmp_path / "one")
    close(rest["weights"], whole["weights"], 1e-12)
    launch(2, tmp_path / "two", "handing", mode="sharded", **{"from": tmp_path / "one" / "handing" / "ba00000003"})
    found = [each["rest"] for each in outcomes(tmp_path / "two", "handing", 2)]
    same_everywhere(found)
    close(found[0]["weights"], whole["weights"], 1e-12)


def test_a_checkpoint_of_shards_is_one_of_a_process(
    folder: Path, two: Launched, reference: Any, tmp_path: Path
) -> None:
    """Its files hold the same names and shapes, and are exported and loaded without torch.distributed."""
    from safetensors.torch import load_file

    reference("handing")
    mine, others = (
        load_file(folder / name / "handing" / "ba00000005" / "tensors.safetensors") for name in ("two", "one")
    )
    theirs = {name: each for name, each in others.items() if not name.startswith("extra/ranks")}
    assert {name: each.shape for name, each in theirs.items()}.items() <= {n: e.shape for n, e in mine.items()}.items()
    for name, each in theirs.items():
        if each.is_floating_point():
            torch.testing.assert_close(mine[name], each, rtol=0, atol=1e-12)
    last = folder / "two" / "handing" / "ba00000008"
    exported = load_file(export(last, tmp_path / "weights.safetensors", weights="live"))
    close(exported, {name: two("handing")[0]["whole"]["weights"][name] for name in exported}, 0.0)
    load_weights(last, fresh := ranks.model())
    assert set(fresh.state_dict()) == set(exported)


# -- afterwards --------------------------------------------------------------------------------------------------------


def test_the_model_is_whole_and_the_users_own_again(two: Launched, reference: Any) -> None:
    """Parameters keep their identity, modules their classes and attributes; no hook is left; fits, evaluations and EMA go on."""
    one = reference("afterwards")
    for each in two("afterwards"):
        assert (each["same"], each["bare"], each["hooks"]) == (True, True, [])
        assert each["evaluated"] == pytest.approx(one["evaluated"], abs=1e-12)
        for part in ("averaged", "loaded"):
            close(each[part], one[part], 1e-12)
    for part in ("first", "second"):
        same_everywhere([each[part] for each in two("afterwards")])
        close(two("afterwards")[0][part]["weights"], one[part]["weights"], 1e-12)


# -- refusals ----------------------------------------------------------------------------------------------------------

REFUSALS = {
    "late": ("SurgeryError: attach by 'late' at BATCH_END", "Event.FIT_START"),
    "adafactor": ("OptimizerError: Adafactor does not know weights that lie in shards", "AdamW"),
    "keeping": ("OptimizerError: Keeping does not know", "it keeps parameters in 'kept'"),
    "scalar": ("DistributedError: 'scale' is a single number", "torch.ones(1)"),
    "cache": ("ArgumentError: Trainer(algorithms=)", "PrefixCache beside FullyShard"),
    "left": ("ArgumentError: Trainer.fit(model=) takes a whole model", "'stem.weight' lies in shards"),
    "memory": ("OutOfMemoryError: out of memory on rank", "microbatch_size=1"),
    "borrowing": ("DistributedError: rank", "whole only while the module is called", "shard_like(tensor, parameter)", "Replicate()"),
    "forked": ("DistributedError: the ranks ran different parts of the model: rank 1 ran ['blocks.1'], rank 0 ['blocks.0']",),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_shards_cannot_do_is_refused(two: Launched, case: str) -> None:
    """Every rank ends with a typed error that says what to write instead."""
    for each in two("refusals"):
        assert each[case].startswith(REFUSALS[case][0])
        for words in REFUSALS[case]:
            assert words in each[case]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"reshard": 2}, r"FullyShard\(reshard=\) takes True or False, got 2"),
        ({"offload": "cpu"}, r"FullyShard\(offload=\) takes True or False, got 'cpu'"),
        ({"mixed_precision": "fp16"}, r"FullyShard\(mixed_precision=\) takes None or 'bf16'.*got 'fp16'"),
        ({"mixed_precision": torch.bfloat16}, r"FullyShard\(mixed_precision=\) takes None or 'bf16'"),
        ({"timeout": 0}, r"FullyShard\(timeout=\) takes a number of seconds above 0"),
    ],
)
def test_bad_arguments_are_refused(given: dict[str, Any], words: str) -> None:
    """Each names itself, what it takes and a corrected call."""
    with pytest.raises(ArgumentError, match=words):
        FullyShard(**given)


@pytest.mark.parametrize("given", [{"precision": "fp16"}, {"compile": "blocks"}])
def test_settings_that_do_not_go_together_are_refused(given: dict[str, Any]) -> None:
    """What shards cannot be combined with is refused when the Trainer is made."""
    with pytest.raises(ArgumentError, match="beside FullyShard"):
        Trainer(distributed=FullyShard(), **given)


def test_an_optimizer_instance_is_refused() -> None:
    """Sharding replaces the parameters that an instance holds; a factory is called for."""
    net = nn.Linear(6, 3)
    made = torch.optim.SGD(net.parameters(), lr=0.1)
    trainer = Trainer(distributed=FullyShard(), loss_fn=nn.functional.cross_entropy, progress=False)
    for optimizer in (made, [made]):
        with pytest.raises(ArgumentError, match=r"a factory beside FullyShard.*optimizer=partial\(SGD, lr=1e-4\)"):
            trainer.fit(net, ranks.loader(dtype=torch.float32), duration="1ep", optimizer=optimizer)


# -- alone -------------------------------------------------------------------------------------------------------------


def test_one_process_alone_trains_as_if_nothing_was_said() -> None:
    """Without a launcher nothing is sharded, and the weights are to the bit those of a fit without it."""
    one, other = ranks.model(), ranks.model()
    for net, together in ((one, "auto"), (other, FullyShard(mixed_precision="bf16", offload=True))):
        ranks.fitted(net, duration="1ep", distributed=together)
    assert not any(map(is_sharded, other.parameters()))
    assert all(torch.equal(first, second) for first, second in zip(one.parameters(), other.parameters(), strict=True))


def test_whole_tensors_pass_through() -> None:
    """Where nothing lies in shards, what lays out and gathers returns what it was given."""
    tensor = torch.ones(2)
    assert shard_like(tensor, torch.zeros(2)) is tensor
    assert unsharded(tensor) is tensor
    assert sharded_in({"a": [tensor, 1]}) == {}
    other: Tensor = torch.zeros(2)
    assert replaced({"a": [tensor, (1, tensor)]}, {id(tensor): other}) == {"a": [other, (1, other)]}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU for each rank")
def test_gpus(tmp_path: Path, reference: Any) -> None:
    """On two GPUs shards are gathered over NCCL: ranks agree, and equal one process."""
    launch(2, tmp_path, "training", "resuming", "manners", mode="sharded", device="cuda")
    for recipe in RECIPES:
        found = [each[recipe] for each in outcomes(tmp_path, "training", 2)]
        same_everywhere(found)
        close(found[0]["weights"], reference("training")[recipe]["weights"], 1e-9)
    for each in outcomes(tmp_path, "resuming", 2):
        for part in each["resumed"].values():
            same_end(each["whole"], part)


# -- slow --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 4])
def test_more_ranks_than_rows(tmp_path: Path, reference: Any, world: int) -> None:
    """Where some ranks hold no row of a weight, everything is as in one process."""
    names = ("training", "portions", "kinds")
    launch(world, tmp_path, *names, "evaluation", "statistics", mode="sharded", limit=600)
    for each in outcomes(tmp_path, "evaluation", world):
        assert each["values"] == pytest.approx(reference("evaluation")["values"], abs=1e-7)
    same_everywhere(outcomes(tmp_path, "statistics", world))
    for name in names:
        for case, one in reference(name).items():
            if case != "routed":
                found = [each[case] for each in outcomes(tmp_path, name, world)]
                same_as_one(found, one, 1e-6 if case == "float32" else 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_resume_is_exact_at_every_step(tmp_path: Path, world: int) -> None:
    """Wherever a run in shards is cut, it goes on to the same bits."""
    launch(world, tmp_path, "resuming", mode="sharded", steps="all", limit=600)
    for each in outcomes(tmp_path, "resuming", world):
        assert len(each["resumed"]) == 8
        for part in each["resumed"].values():
            same_end(each["whole"], part)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "world"), [("replicated", 2), ("replicated", 3), ("sharded", 3), ("sharded", 4)])
def test_other_modes_and_numbers_of_ranks_go_on(
    tmp_path: Path, folder: Path, two: Launched, mode: str, world: int
) -> None:
    """A checkpoint of two ranks in shards is gone on from in every mode, by any number."""
    launch(world, tmp_path, "handing", mode=mode, **{"from": folder / "two" / "handing" / "ba00000004"})
    found = [each["rest"] for each in outcomes(tmp_path, "handing", world)]
    same_everywhere(found)
    close(found[0]["weights"], two("handing")[0]["whole"]["weights"], 1e-12)


@pytest.mark.slow
def test_decisions_and_failures(tmp_path: Path) -> None:
    """Stops, signals, restarts and other numbers of ranks are as with whole weights."""
    launch(2, tmp_path / "two", "stopping", "signals", "sources", "elastic", "relay", mode="sharded", until=3, kill=-1)
    for case in outcomes(tmp_path / "two", "stopping", 2)[0]:
        same_everywhere([each[case] for each in outcomes(tmp_path / "two", "stopping", 2)])
    launch(2, tmp_path / "elastic", "elastic", restarts=1, mode="sharded")
    for part, whole in zip(
        outcomes(tmp_path / "elastic", "elastic", 2), outcomes(tmp_path / "two", "elastic", 2), strict=True
    ):
        same_end(whole, part)
    launch(3, tmp_path / "lost", "lost", check=False, how="raise", timeout=60, mode="sharded")
    for each in outcomes(tmp_path / "lost", "lost", 2):
        assert "lost another one while" in each["error"]


@pytest.mark.slow
def test_a_language_model_with_tied_weights(tmp_path: Path, reference: Any) -> None:
    """GPT-2, whose head is its embedding and whose outputs are an object, trains in shards as in one process."""
    launch(2, tmp_path, "language", mode="sharded")
    same_as_one(
        [each["gpt2"] for each in outcomes(tmp_path, "language", 2)], reference("language")["gpt2"], 1e-6
    )  # it computes its loss in float32
