"""Resuming with other settings is refused or said; optimizers of every kind of state resume to the bit."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from helpers import is_matrix, loader, mlp, same_weights, weights
from thawline.algorithms import EMA, EarlyStop, LayerThaw, LoRAInject
from thawline.engine import (
    Algorithm,
    CheckpointError,
    Checkpointing,
    Event,
    OptimizerError,
    ParameterLedger,
    State,
    ThawlineWarning,
    Time,
    Trainer,
    cosine,
    warmup,
)
from thawline.engine.snapshot import read_checkpoint, write_checkpoint
from thawline.engine.store import checkpoints_in

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
Trainer_ = partial(Trainer, loss_fn=cross_entropy, optimizer=SGD, progress=False)
EXPLICIT = {"blocks": ["0.*", "2.*"], "head": "4.*"}


def other_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return twice the loss."""
    return 2 * cross_entropy(outputs, targets)


def saved_run(folder: Path, **arguments: Any) -> nn.Module:
    """Fit two epochs into ``folder``."""
    torch.manual_seed(0)
    model = mlp()
    Trainer_(run_dir=folder, **arguments).fit(model, loader(), duration="2ep")
    return model


@pytest.mark.parametrize("every", ["1ba", "1ep"])
def test_the_rates_at_every_event_are_those_of_the_uninterrupted_fit(tmp_path: Path, every: str) -> None:
    """Before a batch begins they are those of the last one, resumed or not; an algorithm may go on from them."""

    class Follows(Algorithm):
        """Notes the rates at events at which the ledger is open, and sets one by another."""

        events = frozenset(event for event in Event if event.opens_ledger)

        def __init__(self) -> None:
            self.seen: list[tuple[int, Event, dict[str, float]]] = []

        def apply(self, event: Event, state: State) -> None:
            self.seen.append((state.clock.batch, event, state.ledger.rates))
            if event in {Event.EPOCH_START, Event.BATCH_START}:
                state.ledger.set_lr("head", 0.9 * state.ledger.rates["blocks[0]"], owner=self.owner)
                state.ledger.set_schedule("blocks[1]", cosine(), span="3ba", owner=self.owner)

    def run(resume: Path | bool = False) -> tuple[Follows, dict[str, Tensor]]:
        torch.manual_seed(0)
        follows, model = Follows(), mlp()
        trainer = Trainer_(
            algorithms=[follows], schedule=warmup("2ba", cosine()), run_dir=tmp_path, log_every="1ba",
            checkpoint=Checkpointing(every=every, keep=100),
        )  # fmt: skip
        trainer.fit(model, loader(), duration="2ep", resume=resume)
        return follows, weights(model)

    whole, last = run()
    for path in checkpoints_in(tmp_path)[:-1]:
        follows, ended = run(path)
        assert follows.seen == whole.seen[-len(follows.seen) :]
        assert same_weights(ended, last)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "fit", "message"),
    [
        ({"optimizer": partial(torch.optim.Adam, lr=0.1)}, {}, "optimizer: saved 'SGD', given 'Adam'"),
        ({}, {"optimizer": partial(torch.optim.Adam, lr=0.1)}, "optimizer: saved 'SGD', given 'Adam'"),
        ({"optimizer": [(is_matrix, SGD), ("*", SGD)]}, {}, "optimizer: saved 'SGD', given 'SGD, SGD 2'"),
        ({"schedule": cosine()}, {}, "schedule: saved .*constant.* given .*cosine"),
        ({"seed": 1}, {}, "seed: saved 0, given 1"),
        ({"accumulate": 2}, {}, "accumulate: saved 1, given 2"),
        ({"min_lr": 0.1}, {}, "min_lr: saved 0.0, given 0.1"),
        ({"algorithms": [EMA()]}, {}, "EMA is new"),
        ({}, {"layers": {"blocks": ["2.*", "0.*"], "head": "4.*"}}, "layers: '2.weight' was saved in 'blocks\\[1\\]'"),
    ],
)
def test_what_defines_the_run_is_refused(
    tmp_path: Path, trainer: dict[str, Any], fit: dict[str, Any], message: str
) -> None:
    """With the setting, what was saved, what is given, and what to write; the model is left as it is."""
    saved_run(tmp_path)
    model = mlp()
    before = weights(model)
    with pytest.raises(CheckpointError, match=f"{message}.*Give the same.*fit\\(resume=False\\).*another directory"):
        Trainer_(run_dir=tmp_path, **trainer).fit(model, loader(), duration="2ep", resume=True, **fit)
    assert same_weights(weights(model), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "bf16"}, "precision: saved fp32, given bf16. The given one is used"),
        ({"microbatch_size": 4}, "microbatch_size: saved None, given 4. The given one is used"),
        ({"eval_every": "2ba"}, "eval_every: saved 1ep, given 2ba. The given one is used"),
        ({"log_every": "2ba"}, "log_every: saved 10ba, given 2ba. The given one is used"),
        ({"loss_fn": other_loss}, f"loss_fn: saved torch.nn.functional.cross_entropy, given {__name__}.other_loss"),
        ({"metrics": {"n": lambda outputs, targets: 1.0}}, "metrics: saved {}, given {'n'"),
        ({"optimizer": partial(SGD, lr=0.01)}, "lr of SGD: saved 0.1, given 0.01. The saved one is kept"),
        ({"optimizer": partial(SGD, weight_decay=0.5)}, "weight_decay of SGD: saved 0, given 0.5. The saved one is kept"),
    ],
)  # fmt: skip
def test_what_may_differ_is_said_once(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    """With the old and the new value and which is used; the warning points to the call of fit."""
    saved_run(tmp_path)
    with pytest.warns(ThawlineWarning) as caught:
        Trainer_(run_dir=tmp_path, **arguments).fit(mlp(), loader(), loader(), duration="2ep", resume=True)
    (warning,) = caught
    assert f"resumed with another {message}" in str(warning.message)
    assert warning.filename == __file__


def test_another_environment_is_said_line_by_line(tmp_path: Path) -> None:
    """Torch, threads, processes, processor, rounding and determinism: what it was, what it is, what that means."""
    saved_run(tmp_path)
    tree = read_checkpoint(tmp_path / "ba00000008")
    assert set(tree["environment"]) == {"torch", "threads", "world", "processor", "matmul", "deterministic"}
    assert (tree["environment"]["world"], tree["environment"]["threads"]) == (1, 1)
    other = {"torch": "1.0", "threads": 64, "world": 8, "processor": "Z80", "matmul": "low", "deterministic": 3}
    path = write_checkpoint(tmp_path, "other", {**tree, "environment": other})
    with pytest.warns(ThawlineWarning) as caught:
        Trainer_().fit(mlp(), loader(), duration="2ep", resume=path)
    said = [str(each.message) for each in caught]
    assert [text.split()[4:6] for text in said] == [[key, "was"] for key in other]
    assert "threads was 64, is 1: sums are split over another number of threads, so what follows is not bit" in said[1]
    assert {each.filename for each in caught} == {__file__}


def test_a_longer_duration_is_said(tmp_path: Path) -> None:
    """It is used, and the schedule follows it."""
    saved_run(tmp_path)
    with pytest.warns(
        ThawlineWarning, match="resumed with another duration: saved 2ep, given 3ep. The given one is used"
    ):
        result = Trainer_(run_dir=tmp_path).fit(mlp(), loader(), duration="3ep", resume=True)
    assert result.clock.batch == 12


def test_the_saved_options_of_the_optimizer_are_the_ones_that_act(tmp_path: Path) -> None:
    """As after `Optimizer.load_state_dict`: to the bits of the run that went on with its own; and so they are saved."""
    whole = saved_run(tmp_path / "whole", checkpoint=Checkpointing(every="1ba", keep=9))
    resume = tmp_path / "whole" / "ba00000003"
    model, again = mlp(), mlp()
    changed = Trainer_(optimizer=partial(SGD, lr=0.01, weight_decay=0.5), run_dir=tmp_path / "changed")
    with pytest.warns(ThawlineWarning) as caught:
        changed.fit(model, loader(), duration="2ep", resume=resume)
    assert [str(each.message).split(":")[0] for each in caught] == [
        "resumed with another lr of SGD", "resumed with another weight_decay of SGD",
    ]  # fmt: skip
    assert same_weights(weights(model), weights(whole))
    Trainer_(run_dir=tmp_path / "changed").fit(again, loader(), duration="2ep", resume=True)  # says nothing
    assert same_weights(weights(again), weights(whole))


def test_other_groups_are_said(tmp_path: Path) -> None:
    """Each parameter keeps the options of the group it was saved in."""

    def split(at: int) -> Callable[[Any], Optimizer]:
        def make(parameters: Any) -> Optimizer:
            every = list(parameters)
            return torch.optim.SGD([{"params": every[:at]}, {"params": every[at:], "lr": 0.2}], lr=0.1)

        return make

    saved_run(tmp_path, optimizer=split(2))
    with pytest.warns(ThawlineWarning, match="another optimizer group of '2.weight': saved 1, given 0"):
        Trainer_(run_dir=tmp_path, optimizer=split(3)).fit(mlp(), loader(), duration="2ep", resume=True)


@pytest.mark.parametrize(("saved", "given"), [(True, False), (False, True)])
def test_what_the_user_froze_since_is_said(tmp_path: Path, *, saved: bool, given: bool) -> None:
    """With the first parameter that differs; the saved one is kept, and algorithms that attach change nothing of it."""

    def fit(trains: bool, **arguments: Any) -> nn.Module:
        model = mlp()
        model[2].requires_grad_(trains)
        trainer = Trainer_(run_dir=tmp_path, algorithms=[LoRAInject(rank=2, target="0")])
        trainer.fit(model, loader(), duration="2ep", **arguments)
        return model

    fit(saved)
    fit(saved, resume=True)  # says nothing
    words = {True: "training", False: "frozen"}
    message = f"another requires_grad of '2.weight': saved {words[saved]}, given {words[given]}. The saved one is kept"
    with pytest.warns(ThawlineWarning, match=message):
        fit(given, resume=True)


def test_adapters_that_the_model_cannot_take_are_another_models(tmp_path: Path) -> None:
    """A CheckpointError with the module that it lacks, and the model is as it was."""
    algorithms = [LoRAInject(rank=2, target="0")]
    saved_run(tmp_path, algorithms=algorithms)
    model = nn.Sequential(OrderedDict(zip("abc", mlp(), strict=False)))
    before, kinds = weights(model), list(map(type, model))
    with pytest.raises(CheckpointError, match="attached to '0' does not fit this model: the model has no module '0'"):
        Trainer_(run_dir=tmp_path, algorithms=algorithms).fit(model, loader(), duration="2ep", resume=True)
    assert list(map(type, model)) == kinds
    assert same_weights(weights(model), before)


def test_the_same_layers_in_other_words_are_the_same(tmp_path: Path) -> None:
    """Found, given as globs, or with adapters attached meanwhile: compared is where each parameter lies."""
    for number, algorithms in enumerate(([], [LoRAInject(rank=2)])):
        saved_run(tmp_path / str(number), algorithms=algorithms)
        trainer = Trainer_(run_dir=tmp_path / str(number), algorithms=algorithms)
        trainer.fit(mlp(), loader(), duration="2ep", resume=True, layers=EXPLICIT)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (LayerThaw(2), LayerThaw("2ep")),
        (LayerThaw(every=Time("2ep"), warmup=1), LayerThaw("2ep", warmup="1ep")),
        (LayerThaw("0.50dur", lr_scale=1), LayerThaw(Time("0.5dur"), lr_scale=1.0)),
        (EarlyStop(patience="2ep"), EarlyStop("eval/loss", Time(2))),
        (EMA(half_life="0.10dur"), EMA(half_life=Time("0.1dur"))),
    ],
    ids=lambda algorithm: type(algorithm).__name__,
)
def test_equal_recipes_are_described_alike(one: Any, other: Any) -> None:
    """Times in any form, numbers of either type, arguments by place or name."""
    assert one.describe() == other.describe()


def test_equal_schedules_are_described_alike() -> None:
    """The same for the times in them."""
    assert warmup(2).describe() == warmup("2ep").describe() == warmup(Time("2ep")).describe()


def test_a_partial_over_a_function_is_described_without_its_address(tmp_path: Path) -> None:
    """Which differs from process to process."""

    class Criterion:
        def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return cross_entropy(outputs, targets)

    def scaled(inner: Any, outputs: Tensor, targets: Tensor) -> Tensor:
        return inner(outputs, targets)

    for resume in (False, True):
        trainer = Trainer_(loss_fn=partial(scaled, Criterion()), run_dir=tmp_path)
        trainer.fit(mlp(), loader(), duration="2ep", resume=resume)


# -- the optimizer's state ---------------------------------------------------------------------------------------------


class Blink(Algorithm):
    """Freezes the first block at every other batch, and keeps what the optimizer knows of it."""

    events = frozenset({Event.BATCH_START})

    def apply(self, event: Event, state: State) -> None:
        if state.clock.batch % 2:
            state.ledger.freeze("blocks[0]", owner=self.owner, moments="keep")
        else:
            state.ledger.thaw("blocks[0]", owner=self.owner)


class Odd(Optimizer):
    """Keeps what optimizers keep: text and other keys, None, numbers, nested lists; shared, and counted in its groups.

    Every step depends on all of it.
    """

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "seen": 0, "trace": ()})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        shared = self.state["shared"]
        shared["calls"] = shared.get("calls", 0) + 1
        shared[3] = [shared.get(3, [0.5])[0] * 0.9, None]
        for group in self.param_groups:
            group["seen"] += 1
            group["trace"] = (*group["trace"], group["seen"])[-3:]
            for p in [each for each in group["params"] if each.grad is not None]:
                state = self.state[p]
                if not state:
                    state |= {
                        "n": 0, "last": None, "flag": False, 0: torch.zeros_like(p), ("a", 1): {"deep": [(p.clone(), [2])]},
                        None: 1.5, True: [[], {}], "history": [],
                    }  # fmt: skip
                state["n"] += 1
                state["flag"] = not state["flag"]
                state[0].mul_(0.5).add_(p.grad)
                state["history"] = [*state["history"], float(p.grad.abs().mean())][-2:]
                start, (count,) = state["a", 1]["deep"][0]
                factor = (1 + state["flag"]) * state[None] / (state["n"] + count + sum(group["trace"]))
                factor *= 1 + sum(state["history"]) + shared[3][0] / shared["calls"] + (state["last"] or 0.0)
                state["last"] = factor
                p.sub_(group["lr"] * factor * (state[0] + 0.1 * (p - start)))


@pytest.mark.parametrize("algorithms", [[], [Blink()]], ids=["plain", "kept"])
def test_an_optimizer_of_odd_state_resumes_to_the_bit(tmp_path: Path, algorithms: list[Any]) -> None:
    """From every step: keys of any plain type, nested lists, None and numbers come back as they were."""
    policy = Checkpointing(every="1ba", keep=20)
    whole = saved_run(tmp_path, optimizer=Odd, algorithms=algorithms, checkpoint=policy)
    for step in range(1, 8):
        model = mlp()
        Trainer_(optimizer=Odd, algorithms=algorithms).fit(
            model, loader(), duration="2ep", resume=tmp_path / f"ba{step:08d}"
        )
        assert same_weights(weights(model), weights(whole)), step


def test_odd_state_has_the_same_keys_and_types_after_a_restore() -> None:
    """No number has become text, no tuple a list, no Python number a tensor."""
    model = mlp()
    ledger = ParameterLedger(model, Odd)
    model(torch.ones(2, 4)).sum().backward()
    ledger.optimizers[0].step()
    twin = ParameterLedger(mlp(), Odd)
    twin.load_state_dict(ledger.state_dict())
    first, second = ([*each.optimizers[0].state.values()] for each in (ledger, twin))
    assert repr(first) == repr(second)


class Unnamed(torch.optim.SGD):
    """Puts something into its state that no checkpoint can hold."""

    def __init__(self, params: Any, put: Callable[[Any, nn.Parameter], None]) -> None:
        super().__init__(params, lr=0.1)
        self.put = put

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.put(self.state, self.param_groups[0]["params"][0])


class Central(torch.optim.SGD):
    """Keeps a tensor of its own beside the parameters' state, where the parameters are, and a counter on the CPU."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        device = self.param_groups[0]["params"][0].device
        norm = self.state.setdefault("norm", {"running": torch.zeros(2, device=device), "steps": torch.zeros(())})
        norm["running"] += norm["running"] + 1
        self.state.setdefault("seen", torch.zeros((), device="cpu")).add_(1)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_an_optimizers_own_tensors_come_back_where_they_lay(tmp_path: Path, device: str) -> None:
    """A checkpoint's tensors are read on the CPU; those that lay beside the parameters return to them, copied."""
    recipe = partial(Trainer_, optimizer=partial(Central, lr=0.1), device=device)
    recipe(run_dir=tmp_path, checkpoint=Checkpointing(every="1ba", keep=9)).fit(mlp(), loader(), duration="1ep")
    model = mlp()
    optimizer = Central(model.to(device).parameters(), lr=0.1)
    recipe().fit(model, loader(), duration="1ep", optimizer=optimizer, resume=tmp_path / "ba00000002")
    own = optimizer.state["norm"]
    assert own["running"].tolist() == [15.0, 15.0]  # 2^4 - 1
    assert own["running"].device.type == device
    assert (float(optimizer.state["seen"]), optimizer.state["seen"].device.type) == (4.0, "cpu")


@pytest.mark.parametrize(
    ("put", "error", "message"),
    [
        (lambda state, p: state[p].update(memo={1, 2}), CheckpointError, "Unnamed/state/0.weight/memo.*is a set"),
        (lambda state, p: state[p].update({b"x": 1}), CheckpointError, "Unnamed/state/0.weight.*the key b'x' is a bytes"),
        (lambda state, p: state.update(fn=print), CheckpointError, "Unnamed/shared/fn.*builtin"),
        (lambda state, p: state.update({torch.ones(3): {}}), OptimizerError, r"Unnamed.state has a tensor of shape \(3,\)"),
        (lambda state, p: state.update({p: 3}), OptimizerError, r"Unnamed.state\['0.weight'\] is an int"),
    ],
)  # fmt: skip
def test_state_that_cannot_be_saved_is_refused_at_the_first_save(
    tmp_path: Path, put: Any, error: type[Exception], message: str
) -> None:
    """By the optimizer's name and the key, before anything is lost to a restore."""
    trainer = Trainer_(optimizer=partial(Unnamed, put=put), run_dir=tmp_path, checkpoint=Checkpointing(every="1ba"))
    with pytest.raises(error, match=message):
        trainer.fit(mlp(), loader(), duration="1ep")
    assert not list(itertools.chain(tmp_path.glob("ba*"), tmp_path.glob(".tmp*")))
