"""What no state dict lists is in the checkpoint: generators of modules, a loss with state, buffers that are not persistent."""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from helpers import loader, mlp, same_weights, weights
from thawline.algorithms import LayerThaw, LoRAInject
from thawline.algorithms.best_weights import BestWeights
from thawline.engine import (
    CheckpointError,
    Checkpointing,
    NonFiniteError,
    ParameterLedger,
    State,
    ThawlineWarning,
    Trainer,
    export,
    load_weights,
)
from thawline.engine.checkpoint import plain_rng, restore_rng, rng_of, rng_state
from thawline.engine.doubles import CLASSES, FEATURES
from thawline.engine.expanded import can_hold, is_expanded, put
from thawline.engine.snapshot import read_checkpoint, write_checkpoint

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
Trainer_ = partial(Trainer, loss_fn=cross_entropy, optimizer=SGD, progress=False)
EACH = Checkpointing(every="1ba", keep=100)


class Noisy(nn.Module):
    """A classifier with noise from generators of its own, of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.torch_rng = torch.Generator().manual_seed(7)
        vars(self.inner[0])["rng"] = np.random.default_rng(7)
        vars(self.inner[2])["rng"] = np.random.RandomState(7)
        self.coin = random.Random(7)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=self.torch_rng)
        numpy: Any = (self.inner[0].rng, self.inner[2].rng)
        scale = numpy[0].random() + numpy[1].rand() + self.coin.random()
        return self.inner(x + 0.1 * scale * noise)


class Centers(nn.Module):
    """A loss that pulls logits to running centers: a persistent buffer, a passing counter and a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centers", torch.zeros(CLASSES, CLASSES))
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.rng = torch.Generator().manual_seed(1)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        centers, calls = self.get_buffer("centers"), self.get_buffer("calls")
        with torch.no_grad():
            calls += 1
            centers[targets] += 0.5 * (outputs.detach() - centers[targets])
        pull = (outputs - centers[targets]).square().mean()
        return (
            cross_entropy(outputs, targets) + pull / calls + 0.1 * torch.rand((), generator=self.rng) * outputs.mean()
        )


class Expanded(nn.Module):
    """A classifier with an expanded buffer, one that is not persistent, and a frozen expanded parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.register_buffer("scale", torch.ones(1).expand(FEATURES))
        self.register_buffer("shift", torch.full((1, 1), 0.5).expand(3, FEATURES), persistent=False)
        self.gain = nn.Parameter(torch.ones(1).expand(FEATURES), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.get_buffer("scale") * self.gain + self.get_buffer("shift")[0])


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """Return the same model each time."""
    torch.manual_seed(0)
    return make()


# -- generators and losses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_generators_of_modules_go_on_where_they_were(tmp_path: Path, microbatch_size: int | None) -> None:
    """Torch's, NumPy's two and Python's: from every step, the resumed run draws what the uncut one drew."""
    run = partial(Trainer_, microbatch_size=microbatch_size)
    whole = seeded(Noisy)
    run(run_dir=tmp_path / "run", checkpoint=EACH).fit(whole, loader(), duration="2ep")
    for step in range(1, 8):
        model = seeded(Noisy)
        run().fit(model, loader(), duration="2ep", resume=tmp_path / "run" / f"ba{step:08d}")
        assert same_weights(weights(model), weights(whole))


def test_generators_of_modules_go_to_other_processes_and_back() -> None:
    """As JSON, which is how ranks tell each other theirs; each goes on as it would have."""
    model, loss, other = seeded(Noisy), Centers(), seeded(Noisy)
    x = torch.zeros(2, FEATURES)
    model(x)
    plain = json.loads(json.dumps(plain_rng(rng_state(model, loss))))
    with torch.random.fork_rng():
        restore_rng(rng_of(plain), other, Centers())
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("bound", [False, True], ids=["module", "method"])
def test_a_loss_with_state_goes_on_where_it_was(tmp_path: Path, bound: bool) -> None:
    """Buffers persistent and not, and its generator; the resumed loss ends with the bits of the uncut one."""

    def given_loss(loss: Centers) -> Any:
        return partial(loss.forward) if bound else loss

    whole, loss = seeded(mlp), Centers()
    Trainer_(run_dir=tmp_path, checkpoint=EACH, loss_fn=given_loss(loss)).fit(whole, loader(), duration="2ep")
    for step in (1, 4, 7):
        model, fresh = seeded(mlp), Centers()
        resumed = Trainer_(loss_fn=given_loss(fresh))
        resumed.fit(model, loader(), duration="2ep", resume=tmp_path / f"ba{step:08d}")
        assert same_weights(weights(model), weights(whole))
        assert torch.equal(fresh.get_buffer("centers"), loss.get_buffer("centers"))
        assert torch.equal(fresh.get_buffer("calls"), loss.get_buffer("calls"))


def test_a_batch_that_is_repeated_draws_and_counts_the_same(tmp_path: Path) -> None:
    """Where memory runs out after the forward pass: generators of model and loss, and the loss's buffers, are put back."""

    class Tight(Centers):
        """Runs out of memory in the third batch, after everything was drawn."""

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            loss = super().forward(outputs, targets)
            if len(targets) == 8 and self.get_buffer("calls") == 3:
                raise MemoryError("out of memory")
            return loss

    plain, tight = Centers(), Tight()
    one = Trainer_(loss_fn=plain, run_dir=tmp_path / "plain", checkpoint=EACH)
    one.fit(seeded(Noisy), loader(batch_size=8), duration="3ba")
    before = read_checkpoint(tmp_path / "plain" / "ba00000002")
    with pytest.warns(ThawlineWarning, match="out of memory"):
        Trainer_(loss_fn=tight).fit(seeded(Noisy), loader(batch_size=8), duration="3ba")
    drawn = torch.Generator()
    drawn.set_state(before["rng"]["modules"]["Trainer(loss_fn=).rng"])
    for _ in range(2):  # two halves, repeated from where the batch began
        torch.rand((), generator=drawn)
    assert torch.equal(drawn.get_state(), tight.rng.get_state())
    assert tight.get_buffer("calls") == 4


def test_parameters_of_a_loss_that_ask_for_gradients_are_said(tmp_path: Path) -> None:
    """They do not train, and a checkpoint keeps them all the same."""

    class Weighed(nn.Module):
        """A loss with a temperature."""

        def __init__(self, value: float) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(value))

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return cross_entropy(outputs / self.temperature, targets)

    loss, fresh = Weighed(2.0), Weighed(3.0)
    with pytest.warns(
        ThawlineWarning, match=r"Weighed with parameters of its own, such as 'temperature'.*do not train"
    ):
        Trainer_(run_dir=tmp_path, loss_fn=loss).fit(mlp(), loader(), duration="2ba")
    assert loss.temperature.item() == 2.0
    fresh.requires_grad_(False)
    with pytest.warns(ThawlineWarning, match="another duration"):
        Trainer_(loss_fn=fresh).fit(mlp(), loader(), duration="3ba", resume=tmp_path)
    assert fresh.temperature.item() == 2.0


def test_another_loss_keeps_its_own_state_and_one_of_another_shape_is_refused(tmp_path: Path) -> None:
    """The first is said to be another loss; the second is the same class with other tensors, and nothing changes."""
    Trainer_(run_dir=tmp_path, loss_fn=Centers()).fit(mlp(), loader(), duration="1ep")
    with pytest.warns(ThawlineWarning, match="resumed with another loss_fn"):
        Trainer_().fit(mlp(), loader(), duration="1ep", resume=tmp_path)
    other, model = Centers(), mlp()
    other.register_buffer("centers", torch.zeros(CLASSES, 11))
    before = weights(model)
    with pytest.raises(CheckpointError, match=r"loss_fn is not this one: 'centers' was saved with shape"):
        Trainer_(loss_fn=other).fit(model, loader(), duration="1ep", resume=tmp_path)
    assert same_weights(weights(model), before)


def test_other_class_weights_are_said_and_the_saved_ones_kept(tmp_path: Path) -> None:
    """As for the optimizer's options."""
    saved, given_ = torch.ones(CLASSES), torch.full((CLASSES,), 2.0)
    Trainer_(run_dir=tmp_path, loss_fn=nn.CrossEntropyLoss(saved)).fit(mlp(), loader(), duration="1ep")
    with pytest.warns(
        ThawlineWarning, match=r"another weight of loss_fn: saved .*1\.0.*given .*2\.0.*saved one is kept"
    ):
        Trainer_(loss_fn=nn.CrossEntropyLoss(given_)).fit(mlp(), loader(), duration="1ep", resume=tmp_path)
    assert torch.equal(given_, saved)


def test_a_generator_that_is_not_there_is_said(tmp_path: Path) -> None:
    """By name, with where to make it."""
    Trainer_(run_dir=tmp_path).fit(seeded(Noisy), loader(), duration="1ep")
    model: Any = seeded(Noisy)
    del model.coin
    with pytest.warns(ThawlineWarning, match="without the random generator 'coin'"):
        Trainer_().fit(model, loader(), duration="1ep", resume=tmp_path)


# -- expanded tensors, and what is refused before anything changes -----------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 3), st.booleans()), max_size=4))
def test_expanded_tensors_are_written_as_dense_ones(dims: list[tuple[int, bool]]) -> None:
    """Against a dense copy, whichever dimensions are expanded; what they cannot hold is known."""
    base = torch.zeros([1 if expanded else size for size, expanded in dims])
    tensor = base.expand([size for size, _ in dims])
    values = torch.arange(float(base.numel())).reshape(base.shape).expand(tensor.shape).clone()
    assert can_hold(tensor, values)
    put(tensor, values)
    assert torch.equal(tensor, values)
    if is_expanded(tensor):
        assert not can_hold(tensor, torch.arange(float(tensor.numel())).reshape(tensor.shape))


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_model_with_expanded_tensors_resumes(tmp_path: Path, policy: Any) -> None:
    """Buffers persistent and not, and a frozen parameter; also where a step is skipped."""
    poisoned = [(x.clone(), y) for x, y in loader()]
    poisoned[1][0][0] = float("nan") if policy == "skip" else 0.0
    make = partial(Trainer_, on_nonfinite=policy)
    whole = seeded(Expanded)
    make(run_dir=tmp_path, checkpoint=EACH).fit(whole, poisoned, loader(), duration="2ep")
    for step in range(1, 8):
        model: Any = seeded(Expanded)
        with torch.no_grad():
            model.scale[:1] = 3.0  # what the checkpoint holds comes back
        make().fit(model, poisoned, loader(), duration="2ep", resume=tmp_path / f"ba{step:08d}")
        assert same_weights(weights(model), weights(whole))
        assert is_expanded(model.scale)
    fresh: Any = seeded(Expanded)
    with torch.no_grad():
        fresh.shift[:1, :1] = 3.0
    load_weights(tmp_path, fresh)
    assert torch.equal(fresh.shift, torch.full((3, FEATURES), 0.5))


def test_the_best_weights_come_back_beside_expanded_buffers() -> None:
    """What trained is put back, and what torch does not write into is left as it is."""
    model = seeded(Expanded)
    state, best = State(model, ParameterLedger(model, SGD)), BestWeights()
    best.watch(1.0, state, mode="min")
    before = weights(model)
    with torch.no_grad():
        model.get_parameter("inner.0.weight").add_(1)
    best.put_back(state)
    assert same_weights(weights(model), before)


class Growing(nn.Module):
    """Subtracts the mean of the last twenty samples: a buffer that it replaces, and one that is None at first."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.inner = mlp()
        self.register_buffer("seen", torch.zeros(0, FEATURES), persistent=persistent)
        self.register_buffer("mean", None, persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = torch.cat([self.get_buffer("seen"), x.detach()])[-20:]
        self.mean = self.seen.mean(0) if self.mean is None else 0.5 * self.mean + 0.5 * self.seen.mean(0)
        return self.inner(x - self.mean)


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("policy", ["raise", "skip", "rollback"])
def test_buffers_that_the_model_replaces_resume(tmp_path: Path, persistent: bool, policy: Any) -> None:
    """Whatever their shape is by then; a skipped step and a rollback leave no trace in them."""
    data = [(x.clone(), y) for x, y in loader(batch_size=4)]
    data[3][0][:] = 0.0 if policy == "raise" else float("nan")
    make = partial(Growing, persistent)
    whole = seeded(make)
    trainer = Trainer_(run_dir=tmp_path, checkpoint=EACH, on_nonfinite=policy)
    trainer.fit(whole, data, duration="1ep")
    assert bool(whole.get_buffer("seen").isfinite().all())
    for step in range(1, 8):
        model = seeded(make)
        folder = tmp_path / "resumed" / str(step)
        shutil.copytree(tmp_path / f"ba{step:08d}", folder / f"ba{step:08d}")
        resumed = Trainer_(run_dir=folder, checkpoint=EACH, on_nonfinite=policy)
        resumed.fit(model, data, duration="1ep", resume=True)
        assert same_weights(weights(model), weights(whole))
        assert same_weights(dict(model.named_buffers()), dict(whole.named_buffers()))
    fresh = seeded(make)
    load_weights(tmp_path, fresh)
    assert same_weights(weights(fresh), weights(whole))


def widened() -> nn.Module:
    """Return a model whose last layer is wider than the one of mlp()."""
    model = mlp()
    model[-1] = nn.Linear(model[-1].in_features, 12)
    return model


def halved() -> nn.Module:
    """Return mlp() in bfloat16."""
    return mlp().bfloat16()


def buffered() -> nn.Module:
    """Return mlp() with a buffer."""
    model = mlp()
    model.register_buffer("extra", torch.zeros(3))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (widened, r"'4.weight' has shape \(12, \d+\) instead of"),
        (halved, "'0.weight' is of torch.bfloat16 instead of torch.float32"),
        (buffered, "'extra' is not in the checkpoint"),
    ],
)
@pytest.mark.parametrize("algorithms", [False, True], ids=["plain", "adapted"])
def test_a_model_that_cannot_take_the_checkpoint_is_left_as_it_was(
    tmp_path: Path, make: Callable[[], nn.Module], message: str, algorithms: bool
) -> None:
    """Nothing is attached, frozen, or written; classes and flags are as before."""

    def listed() -> list[Any]:
        return [LoRAInject(rank=2), LayerThaw(every="2ba")] if algorithms else []

    Trainer_(run_dir=tmp_path, algorithms=listed()).fit(mlp(), loader(), duration="1ep")
    model = make()
    before, flags = weights(model), {name: each.requires_grad for name, each in model.named_parameters()}
    kinds, inside = [type(each) for each in model.modules()], [sorted(vars(each)) for each in model.modules()]
    with pytest.raises(CheckpointError, match=message):
        Trainer_(algorithms=listed()).fit(model, loader(), duration="1ep", resume=tmp_path)
    assert same_weights(weights(model), before)
    assert {name: each.requires_grad for name, each in model.named_parameters()} == flags
    assert [type(each) for each in model.modules()] == kinds
    assert [sorted(vars(each)) for each in model.modules()] == inside


def test_weights_in_another_dtype_are_cast_where_only_they_are_loaded(tmp_path: Path) -> None:
    """As torch's load_state_dict does; a resumed run would be another one, and refuses."""
    whole = seeded(mlp)
    Trainer_(run_dir=tmp_path).fit(whole, loader(), duration="1ep")
    model = halved()
    load_weights(tmp_path, model)
    assert same_weights(weights(model), weights(whole.bfloat16()))


# -- what is said at the start -----------------------------------------------------------------------------------------


def batches() -> Iterator[Any]:
    """Yield the batches of the tiny loader."""
    yield from loader()


class Again:
    """An iterable that starts anew each time."""

    def __iter__(self) -> Iterator[Any]:
        return batches()


@pytest.mark.parametrize(("data", "message"), [(batches, "read once"), (Again, "only be read from its beginning")])
def test_what_cannot_be_resumed_exactly_is_warned_of_where_there_is_a_run_dir(
    tmp_path: Path, data: Callable[[], Any], message: str
) -> None:
    """Nobody needs to have configured logging; without a run_dir nobody can resume, and no warning comes."""
    with pytest.warns(ThawlineWarning, match=f"train_loader is .*{message}") as caught:
        Trainer_(run_dir=tmp_path).fit(mlp(), data(), duration="1ep")
    assert [each.filename for each in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer_().fit(mlp(), data(), duration="1ep")


def test_a_relative_run_dir_is_where_the_trainer_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the model changes the directory during the fit; resume from elsewhere, by an absolute path, says nothing."""
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    monkeypatch.chdir(home)

    class Walker(nn.Module):
        """Goes away in the first forward pass."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            os.chdir(away)
            return self.inner(x)

    trainer = Trainer_(run_dir="run", checkpoint=EACH)
    result = trainer.fit(Walker(), loader(), duration="1ep")
    assert trainer.run_dir == home / "run"
    assert result.last == home / "run" / "ba00000004"
    assert sorted(each.name for each in (home / "run").iterdir())[-2:] == ["metrics.jsonl", "run.json"]
    assert not list(away.iterdir())
    Trainer_(run_dir=home / "run", checkpoint=EACH).fit(Walker(), loader(), duration="1ep", resume=True)


# -- the weights alone -------------------------------------------------------------------------------------------------


def test_load_weights_brings_buffers_that_are_not_persistent(tmp_path: Path) -> None:
    """The outputs are those of the fitted model; a state dict, which export writes, has no place for them."""

    class Shifted(nn.Module):
        """Adds up a mean of what it sees, in a buffer that is not persistent."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.register_buffer("mean", torch.zeros(FEATURES), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.get_buffer("mean").lerp_(x.detach().mean(0), 0.1)
            return self.inner(x - self.get_buffer("mean"))

    fitted, fresh = seeded(Shifted), seeded(Shifted)
    Trainer_(run_dir=tmp_path).fit(fitted, loader(), duration="1ep")
    load_weights(tmp_path, fresh)
    assert torch.equal(fresh.get_buffer("mean"), fitted.get_buffer("mean"))
    x = next(iter(loader()))[0]
    assert torch.equal(fresh.eval()(x), fitted.eval()(x))
    file = export(tmp_path, tmp_path / "model.safetensors")
    assert b"mean" not in file.read_bytes()[:4096]


# -- going back --------------------------------------------------------------------------------------------------------


def test_a_rollback_to_fingerprints_of_what_has_trained_speaks_of_the_rollback(tmp_path: Path) -> None:
    """It names the checkpoint and what trained since, and what to write; the weights are as before the batch."""
    data = [(x.clone(), y) for x, y in loader()]
    data[3][0][:] = float("nan")
    policy = Checkpointing(every="9ba", frozen="fingerprint")
    trainer = Trainer_(
        algorithms=[LayerThaw(every="1ba")], run_dir=tmp_path, checkpoint=policy, on_nonfinite="rollback"
    )
    with pytest.raises(NonFiniteError, match=r"the loss is nan.*cannot go back to .*ba00000000.*fingerprints.*every="):
        trainer.fit(mlp(), data, duration="1ep")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss", None),
        ("loss", {"weight": "text"}),
        ("reshaped", {"0.weight": None}),
        ("reshaped", {"nowhere.seen": (2,)}),
        ("reshaped", 3),
        ("rng", {"modules": {"torch_rng": "text"}}),
        ("rng", {"modules": {"torch_rng": torch.zeros(3, dtype=torch.uint8)}}),
        ("rng", {"modules": {"coin": (3, (1,), None)}}),
        ("rng", {"modules": {"inner.0.rng": {"bit_generator": "MT19937"}}}),
    ],
)
def test_a_forged_checkpoint_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    """By a typed error, as any that does not hold what this version writes."""
    model = seeded(Noisy)
    Trainer_(run_dir=tmp_path).fit(model, loader(), duration="1ep")
    tree = read_checkpoint(tmp_path / "ba00000004")
    if key == "rng":
        value = {**tree["rng"], "modules": {**tree["rng"]["modules"], **value["modules"]}}
    path = write_checkpoint(tmp_path, "forged", {**tree, key: value})
    fresh = seeded(Noisy)
    before = weights(fresh)
    with pytest.raises(CheckpointError, match="does not hold what this version|loss_fn is not this one"):
        Trainer_().fit(fresh, loader(), duration="1ep", resume=path)
    assert key == "rng" or same_weights(weights(fresh), before)
