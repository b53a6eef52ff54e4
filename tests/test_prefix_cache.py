"""A fit with the cache is the fit without it, and skips what is frozen."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from helpers import Bare, Shared, cnn, encoder, loader, mlp, same_weights, weights
from thawline.algorithms import EMA, LISA, FreezeAt, LayerFreeze, LayerThaw, LoRAInject, PrefixCache, head_only, lp_ft
from thawline.engine import (
    Algorithm,
    ArgumentError,
    Checkpointing,
    Event,
    ParameterLedger,
    Stage,
    State,
    Trainer,
    Unloaded,
)
from thawline.engine.data import ResumableLoader

Batches = Iterable[Any]


class EvalFrozen(Algorithm):
    """Puts the frozen leading part in eval mode, as the cache does, and computes it each time."""

    events = frozenset({Event.EPOCH_START, Event.BATCH_START})
    stage = Stage.DATA

    def apply(self, event: Event, state: State) -> None:
        layers = list(state.layers)
        trains = [not state.ledger.trainable.isdisjoint(layer.parameters) for layer in layers]
        names = [name for layer in layers[: trains.index(True)] for name in layer.parameters]
        state.ledger.evaluate_frozen(names or None, owner=self.owner)


class Watch(Algorithm):
    """Notes what each batch is, and the loss."""

    events = frozenset({Event.BEFORE_FORWARD, Event.BATCH_END})
    stage = Stage.OBSERVE

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.losses: list[float] = []

    def apply(self, event: Event, state: State) -> None:
        if event is Event.BATCH_END:
            self.losses.append(state.loss.item())
        else:
            self.batches.append(state.microbatch)


def fit(
    model: nn.Module,
    algorithms: list[Algorithm],
    data: Batches | None = None,
    *,
    duration: str = "4ep",
    eval_data: Batches | None = None,
    resume: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """Fit and return the weights."""
    options = {"loss_fn": nn.functional.cross_entropy, "device": "cpu", "progress": False} | options
    trainer = Trainer(algorithms=algorithms, optimizer=partial(torch.optim.AdamW, lr=1e-2), **options)
    trainer.fit(model, loader() if data is None else data, eval_data, duration=duration, resume=resume)
    return weights(model)


def both(
    make: Callable[[], nn.Module], recipe: Callable[[], list[Algorithm]], data: Callable[[], Batches] = loader,
    cache: PrefixCache | None = None, **options: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor], PrefixCache]:  # fmt: skip
    """Return the weights without and with a cache, and the cache."""
    cache = PrefixCache() if cache is None else cache
    found = []
    for last in (EvalFrozen(), cache):
        torch.manual_seed(0)
        model = make()
        found.append(fit(model, [*recipe(), last], data(), **options))
        assert not any("forward" in vars(module) for module in model.modules()), "nothing stays on the model"
        assert last is not cache or make is hooked or not any(module._forward_hooks for module in model.modules())
    return found[0], found[1], cache


def images() -> DataLoader[Any]:
    """Return random images."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 1, 8, 8, generator=generator), torch.randint(10, (32,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)


def tokens() -> DataLoader[Any]:
    """Return random token ids."""
    generator = torch.Generator().manual_seed(0)
    ids, y = torch.randint(11, (32, 5), generator=generator), torch.randint(2, (32,), generator=generator)
    return DataLoader(TensorDataset(ids, y), batch_size=8, shuffle=True)


def residual_cnn() -> nn.Module:
    """Return stages with BatchNorm and ReLU in place, as image models have them."""
    stages = [
        nn.Sequential(nn.Conv2d(4 if i else 1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        for i in range(3)
    ]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(4, 10))


class Carrying(nn.Module):
    """A block that hands a tensor and, in a tuple, running sums of two shapes and a number on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, carried: tuple[Tensor, Tensor, int]) -> tuple[Tensor, tuple[Tensor, Tensor, int]]:
        total, means, count = carried
        x = torch.tanh(self.linear(x))
        return x, (total + x, means + x.mean(1), count + 1)


class Tuples(nn.Module):
    """Blocks that give tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Carrying() for _ in range(4)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        carried = (x, x.mean(1), 0)
        for block in self.blocks:
            x, carried = block(x, carried)
        total, means, count = carried
        return self.head(x + total / count) + means[:, None]


TASKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batches]]] = {
    "mlp": (partial(mlp, depth=4), loader),
    "tuples": (Tuples, loader),
    "bare": (Bare, loader),
    "cnn": (cnn, images),
    "stages": (residual_cnn, images),
    "encoder": (partial(encoder, 3), tokens),
    "dropout": (partial(encoder, 3, 0.1), tokens),
}
RECIPES: dict[str, Callable[[], list[Algorithm]]] = {
    "head_only": head_only,
    "thaw": lambda: [LayerThaw(every=2)],
    "freeze": lambda: [LayerFreeze(start=0.0, level=0.7)],
    "lp_ft": lambda: lp_ft("2ep"),
    "lisa": lambda: [LISA(every="3ba", layers=1)],
    "average": lambda: [*head_only(), EMA(half_life="2ba")],
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("task", TASKS)
def test_weights_are_those_of_the_uncached_fit(task: str, recipe: str) -> None:
    """Over whole fits, bit for bit, whichever way the frontier moves; BatchNorm's statistics included."""
    make, data = TASKS[task]
    plain, cached, cache = both(make, RECIPES[recipe], data, eval_data=data(), duration="7ep")
    assert same_weights(plain, cached)
    assert cache.off is None
    if recipe != "lisa" and (task, recipe) != ("bare", "freeze"):
        assert cache.hits


@pytest.mark.parametrize(
    "options", [{"accumulate": 2}, {"microbatch_size": 4}, {"accumulate": 3, "microbatch_size": 3}]
)
@pytest.mark.parametrize("recipe", ["head_only", "thaw"])
@pytest.mark.parametrize("task", ["mlp", "encoder"])
def test_it_composes_with_accumulation_and_microbatches(task: str, recipe: str, options: dict[str, int]) -> None:
    """Each microbatch is looked up by its own samples."""
    make, data = TASKS[task]
    plain, cached, cache = both(make, RECIPES[recipe], data, **options)
    assert cache.off is None
    assert cache.hits
    # A row's last bits depend on the size of its microbatch, and with 8 cut into 3 that differs between epochs.
    for name, each in plain.items():
        if options.get("microbatch_size") == 3:
            torch.testing.assert_close(cached[name], each, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(cached[name], each)


class Counting(Dataset[Any]):
    """Counts what is loaded."""

    def __init__(self) -> None:
        self.data: Any = loader().dataset
        self.loaded = 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        self.loaded += 1
        return self.data[index]


def test_nothing_is_loaded_where_only_the_head_trains() -> None:
    """From the second epoch on one batch an epoch is loaded, which is checked; trunk and collation are skipped."""
    dataset = Counting()
    watch, cache = Watch(), PrefixCache()
    torch.manual_seed(0)
    fit(mlp(), [*head_only(), cache, watch], DataLoader(dataset, batch_size=8, shuffle=True), duration="5ep")
    assert dataset.loaded == 32 + 4 * 8
    assert (cache.misses, cache.hits) == (4, 16)
    assert watch.batches[-1][0].shape == (8, 4)


def test_a_thaw_at_a_batch_loads_what_was_not() -> None:
    """The frontier moves in the middle of an epoch whose batches are not loaded."""
    recipe = lambda: [LayerThaw(every="10ba")]  # noqa: E731
    plain, cached, cache = both(partial(mlp, depth=4), recipe, loader, duration="6ep")
    assert same_weights(plain, cached)
    assert cache.hits > 8


class LateThaw(Algorithm):
    """Releases the trunk at a batch in the middle of an epoch; its turn comes after the cache's."""

    events = frozenset({Event.FIT_START, Event.BATCH_START})

    def apply(self, event: Event, state: State) -> None:
        if event is Event.FIT_START:
            state.ledger.freeze(["0.*", "2.*"], owner=self.owner)
        elif state.clock.batch == 10:
            state.ledger.thaw("*", owner=self.owner)


@pytest.mark.parametrize("options", [{}, {"microbatch_size": 3}, {"accumulate": 2, "microbatch_size": 3}])
def test_a_thaw_after_its_turn_trains_from_that_batch_on(options: dict[str, int]) -> None:
    """A batch that was to be fed to the head alone is loaded after all."""
    plain, cached, cache = both(mlp, lambda: [LateThaw()], lambda: loader(64), duration="4ep", **options)
    assert same_weights(plain, cached)
    assert cache.hits > 0


@pytest.mark.parametrize("moves", ["head_only", "thaw"])
def test_a_resumed_fit_is_the_whole_fit(moves: str, tmp_path: Path) -> None:
    """The cache is filled again; weights and the losses are the same."""
    torch.manual_seed(0)
    whole = fit(mlp(depth=4), [*RECIPES[moves](), PrefixCache()], duration="22ba")
    options: dict[str, Any] = {"run_dir": tmp_path, "checkpoint": Checkpointing(every="1ba"), "resume": True}
    torch.manual_seed(0)
    model = mlp(depth=4)
    fit(model, [*RECIPES[moves](), PrefixCache()], duration="10ba", **options)
    torch.manual_seed(1)
    resumed = fit(mlp(depth=4), [*RECIPES[moves](), PrefixCache()], duration="22ba", **options)
    assert same_weights(whole, resumed)


class Calls(nn.Linear):
    """Counts what goes through it."""

    samples = 0

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name it has in nn.Linear
        self.samples += len(input)
        return super().forward(input)


def counting() -> nn.Sequential:
    """Return an MLP that counts."""
    return nn.Sequential(*[each for _ in range(4) for each in (Calls(4, 4), nn.Tanh())], nn.Linear(4, 2))


class Counts(Algorithm):
    """Notes how much went through each layer, epoch by epoch."""

    events = frozenset({Event.EPOCH_START, Event.EPOCH_END})
    stage = Stage.OBSERVE

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def apply(self, event: Event, state: State) -> None:
        layers = [each for each in state.model.modules() if isinstance(each, Calls)]
        if event is Event.EPOCH_END:
            self.seen.append([each.samples for each in layers])
        for each in layers:
            each.samples = 0


def test_it_goes_on_from_the_old_frontier_when_more_freezes() -> None:
    """What was kept is fed to the layers between the two; where it moves back, everything runs once again."""
    counts = Counts()
    fit(counting(), [FreezeAt({"blocks[0]": "1ep", "blocks[1:3]": "3ep"}), PrefixCache(), counts], duration="5ep")
    # One row is computed again in each epoch but those that fill; the passes that find out how to skip leave no trace.
    assert counts.seen == [[32, 32, 32, 32], [32, 32, 32, 32], [1, 32, 32, 32], [0, 32, 32, 32], [1, 1, 1, 32]]


def test_a_prefix_that_is_changed_behind_it_turns_it_off(caplog: pytest.LogCaptureFixture) -> None:
    """One row is computed again in each epoch, and shows it."""

    class Spoil(Algorithm):
        events = frozenset({Event.EPOCH_END})

        def apply(self, event: Event, state: State) -> None:
            if state.clock.epoch == 3:
                with torch.no_grad():
                    next(state.model.parameters()).add_(1)

    cache = PrefixCache()
    fit(mlp(), [*head_only(), Spoil(), cache], duration="5ep")
    assert cache.off is not None
    assert "computed again" in cache.off
    assert cache.misses == 4
    assert cache.hits == 2 * 4


class NoRoom(Algorithm):
    """Runs out of memory in the first forward of a batch."""

    events = frozenset({Event.BEFORE_FORWARD})
    stage = Stage.OBSERVE

    def __init__(self, batch: int) -> None:
        self.batch: int | None = batch

    def apply(self, event: Event, state: State) -> None:
        if state.clock.batch == self.batch:
            self.batch = None
            raise torch.OutOfMemoryError


@pytest.mark.filterwarnings("ignore:out of memory")
@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("recipe", ["head_only", "thaw"])
def test_a_batch_that_is_repeated_in_parts(batch: int, recipe: str) -> None:
    """Out of memory leaves nothing on the model, and the parts are looked up by their own samples."""
    plain, cached, cache = both(partial(mlp, depth=4), lambda: [*RECIPES[recipe](), NoRoom(batch)])
    assert cache.off is None
    assert cache.hits
    for name, each in plain.items():
        torch.testing.assert_close(cached[name], each, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"drop_last": True, "batch_size": 5}, {"sampler": "replacement", "batch_size": 8}])
def test_samples_that_an_epoch_leaves_out(options: dict[str, Any]) -> None:
    """They are loaded and computed when they come."""
    dataset: Any = loader().dataset

    def data() -> Batches:
        given = dict(options)
        if given.pop("sampler", None):
            return DataLoader(dataset, sampler=RandomSampler(dataset, replacement=True), **given)
        return DataLoader(dataset, shuffle=True, **given)

    plain, cached, cache = both(mlp, head_only, data, duration="6ep")
    assert same_weights(plain, cached)
    assert cache.misses < 6 * 4
    assert cache.hits


class Noisy(Dataset[Any]):
    """Draws noise on inputs, or flips labels, anew in each epoch."""

    def __init__(self, *, inputs: bool) -> None:
        self.data: Any = loader().dataset
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.data[index]
        noise = torch.rand(())
        return (x + 0.01 * noise, y) if self.inputs else (x, y if noise < 0.5 else 1 - y)


@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize("recipe", ["head_only", "thaw"])
def test_augmentation_turns_it_off(inputs: bool, recipe: str) -> None:
    """Before a stale row is used, with the reason; the fit is the uncached one."""
    data = lambda: DataLoader(Noisy(inputs=inputs), batch_size=8, shuffle=True)  # noqa: E731
    plain, cached, cache = both(partial(mlp, depth=4), RECIPES[recipe], data)
    assert same_weights(plain, cached)
    assert cache.off is not None
    assert f"the {'inputs' if inputs else 'targets'} change between epochs" in cache.off
    assert not cache.hits


class Skip(nn.Module):
    """Hands what its first block gives on to its last one as well."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        return self.head(torch.tanh(self.blocks[1](first).relu() + self.blocks[2](first)) + first)


class RandomStem(nn.Module):
    """Drops inputs whatever its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(x, 0.5)
        for block in self.blocks:
            x = block(x).relu()
        return self.head(x)


class SequenceFirst(nn.Module):
    """Works on (time, samples, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None].expand(-1, 3, -1).transpose(0, 1)
        for block in self.blocks:
            x = block(x).relu()
        return self.head(x.mean(0))


class Telling(nn.Module):
    """Gives what its first block made beside the logits, as models of transformers do with `output_hidden_states`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.blocks[0](x).tanh()
        return {"logits": self.head(self.blocks[2](self.blocks[1](first).tanh())), "first": first}


def hooked() -> nn.Module:
    """Return a model with a hook in its frozen part."""
    model = mlp()
    model[0].register_forward_hook(lambda module, given, gave: None)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [(Skip, "used beyond the frontier"), (RandomStem, "draws random numbers"), (hooked, "has forward hooks")],
)
def test_what_cannot_be_skipped_is_not(make: Callable[[], nn.Module], reason: str) -> None:
    """The reason is told, and the fit is the uncached one."""
    found = []
    cache = PrefixCache()
    recipe = [LayerThaw(every=3, lr_scale=1.0, start=1)] if make is Skip else head_only()
    for last in (EvalFrozen(), cache):
        torch.manual_seed(0)
        found.append(fit(make(), [*[each.fresh() for each in recipe], last]))
    assert same_weights(*found)
    assert any(reason in why for why in cache.barred.values())
    assert not cache.hits


def test_an_output_beside_the_logits_is_the_models_own() -> None:
    """A `forward_fn` that reads what a frozen block gave is not handed what was made up in its place."""
    found, cache = [], PrefixCache()
    for last in (EvalFrozen(), cache):
        torch.manual_seed(0)
        model = Telling()
        data = TensorDataset(torch.randn(32, 4), torch.randint(2, (32,)))
        trainer = Trainer(
            algorithms=[*head_only(), last], optimizer=partial(torch.optim.SGD, lr=0.1), progress=False,
            forward_fn=lambda model, batch: (made := model(batch[0]))["logits"] * made["first"].mean(),
            loss_fn=nn.functional.cross_entropy,
        )  # fmt: skip
        trainer.fit(model, DataLoader(data, 8), duration="3ep")
        found.append(weights(model))
    assert same_weights(*found)
    assert all("used beyond the frontier" in why for why in cache.barred.values())


def test_statistics_that_go_on_are_not_cached() -> None:
    """Somebody wants the frozen normalization layers to follow the data."""

    class Keep(Algorithm):
        events = frozenset({Event.FIT_START})

        def apply(self, event: Event, state: State) -> None:
            state.ledger.freeze(lambda name: not name.startswith("6."), owner=self.owner, mode="train")

    plain, cached, cache = both(residual_cnn, lambda: [Keep()], images)
    assert same_weights(plain, cached)
    assert "statistics of a BatchNorm2d" in cache.barred[3]


class Squeezing(nn.Module):
    """Takes no batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1:
            raise RuntimeError("a batch of one")
        return self.head(self.blocks[1](self.blocks[0](x).relu()).relu())


def test_a_model_that_takes_no_single_sample_is_not_cached() -> None:
    """No row of it can be checked; the fit goes on."""
    plain, cached, cache = both(Squeezing, head_only)
    assert same_weights(plain, cached)
    assert cache.off is not None
    assert "a sample alone cannot be computed again" in cache.off


def test_a_batch_along_another_dimension_is_not_cut_wrongly() -> None:
    """What lies at the frontier has no row a sample; the head's input has."""
    plain, cached, cache = both(SequenceFirst, lambda: [LayerThaw(every=3, start=1)])
    assert same_weights(plain, cached)
    assert "one row a sample" in cache.barred[1]


def test_batches_without_ids_are_not_cached() -> None:
    """A list of batches does not say which samples they hold."""
    batches = list(loader())
    plain, cached, cache = both(mlp, head_only, lambda: batches)
    assert same_weights(plain, cached)
    assert cache.off is not None
    assert "DataLoader" in cache.off


def test_a_model_called_twice_a_batch_is_not_cached() -> None:
    """Two calls could be given two different inputs."""
    twice = lambda model, batch: model(batch[0]) + model(-batch[0])  # noqa: E731
    plain, cached, cache = both(mlp, head_only, forward_fn=twice)
    assert same_weights(plain, cached)
    assert cache.off == "the model is called several times a batch"


def test_what_does_not_fit_is_computed() -> None:
    """Over the budget the fit goes on, and is the uncached one."""
    plain, cached, cache = both(mlp, head_only, cache=PrefixCache(budget=500))
    assert same_weights(plain, cached)
    assert cache.off is None
    assert cache.misses > 4


@pytest.mark.parametrize("task", ["mlp", "encoder"])
def test_files_serve_as_memory_does(task: str, tmp_path: Path) -> None:
    """Bit for bit; and no file stays."""
    make, data = TASKS[task]
    folder = tmp_path / "cache"
    plain, cached, cache = both(make, RECIPES["thaw"], data, cache=PrefixCache(folder=folder))
    assert same_weights(plain, cached)
    assert cache.hits
    assert list(folder.iterdir()) == []


def test_bfloat16_takes_half_the_room_and_is_close() -> None:
    """Rounded to 8 bits, so the weights differ a little."""
    full, half = PrefixCache(), PrefixCache(dtype="bf16")
    seen: dict[str, int] = {}

    class Weigh(Algorithm):
        events = frozenset({Event.EPOCH_END})

        def apply(self, event: Event, state: State) -> None:
            seen.update(full=max(full.nbytes, seen.get("full", 0)), half=max(half.nbytes, seen.get("half", 0)))

    plain, cached, _ = both(partial(mlp, 64), lambda: [*head_only(), Weigh()], partial(loader, features=64), full)
    _, rounded, _ = both(partial(mlp, 64), lambda: [*head_only(), Weigh()], partial(loader, features=64), half)
    assert same_weights(plain, cached)
    assert seen["full"] - seen["half"] == 32 * 64 * 2
    assert not same_weights(plain, rounded)
    torch.testing.assert_close(rounded["4.weight"], plain["4.weight"], rtol=0.05, atol=0.01)


def test_adapters_lie_beyond_the_frontier() -> None:
    """LoRA in the last block only: what lies before it is skipped."""
    recipe = lambda: [LoRAInject(rank=2, target="4", train_head=False)]  # noqa: E731
    plain, cached, cache = both(partial(mlp, depth=4), recipe)
    assert same_weights(plain, cached)
    assert cache.hits == 12


def test_a_shared_module_is_not_skipped_once_for_both_its_uses() -> None:
    """It comes again beyond the frontier: the fit is the uncached one, cached or not."""
    plain, cached, _ = both(Shared, head_only)
    assert same_weights(plain, cached)


@pytest.mark.parametrize("precision", ["bf16"])
def test_autocast(precision: str) -> None:
    """What was cast without gradients in a trial does not serve the pass that has some."""
    plain, cached, cache = both(partial(mlp, depth=4), RECIPES["thaw"], precision=precision)
    assert same_weights(plain, cached)
    assert cache.hits


@pytest.mark.parametrize(
    "arguments",
    [{"budget": 0}, {"budget": "4 apples"}, {"budget": True}, {"budget": "1.2.3GB"}, {"folder": 3}, {"folder": ""}, {"dtype": "fp8"}],
)  # fmt: skip
def test_wrong_arguments(arguments: dict[str, Any]) -> None:
    """A typed error that says what to write."""
    with pytest.raises(ArgumentError, match=r"Write: PrefixCache\("):
        PrefixCache(**arguments)


def test_budgets() -> None:
    """Bytes, in decimal and binary units."""
    assert [PrefixCache(budget=each).budget for each in (7, "2kB", "1.5 MB", "1KiB", "4GiB")] == [
        7, 2000, 1_500_000, 1024, 4 * 1024**3,
    ]  # fmt: skip


def collated(samples: list[Any], *, length: int | None = None) -> dict[str, Tensor]:
    """Pad token ids at the end, to the longest of the batch or to a length."""
    longest = length or max(len(ids) for ids, _ in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    for row, (each, _) in zip(ids, samples, strict=True):
        row[: len(each)] = each
    labels = torch.tensor([label for _, label in samples])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def texts(*, shuffle: bool, length: int | None = None) -> DataLoader[Any]:
    """Return token ids of 3 to 8 tokens, padded batch by batch."""
    generator = torch.Generator().manual_seed(0)
    rows: list[Any] = [(torch.randint(1, 50, (3 + index % 6,), generator=generator), index % 2) for index in range(32)]
    return DataLoader(rows, batch_size=8, shuffle=shuffle, collate_fn=partial(collated, length=length))  # type: ignore[arg-type]


def bert() -> nn.Module:
    """Return a BERT of three small layers, with dropout."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


@pytest.mark.parametrize("recipe", ["head_only", "thaw"])
@pytest.mark.parametrize("batches", ["repeated", "one length", "shuffled"])
def test_a_transformer_on_padded_batches(batches: str, recipe: str) -> None:
    """Bit for bit where shapes repeat; where rows are trimmed and padded, within 1e-6 of the weights' norm."""
    data = {
        "repeated": partial(texts, shuffle=False),
        "one length": partial(texts, shuffle=True, length=8),
        "shuffled": partial(texts, shuffle=True),
    }[batches]
    plain, cached, cache = both(bert, RECIPES[recipe], data, loss_fn=None, microbatch_size=4)
    assert cache.off is None
    assert cache.hits
    if batches != "shuffled":
        assert same_weights(plain, cached)
    for name, each in plain.items():
        if each.is_floating_point():
            assert (cached[name] - each).norm() <= 1e-5 * each.norm(), name


class Gradients(Algorithm):
    """Notes the gradients before each step; leaves the weights alone, so that all batches are compared at one place."""

    events = frozenset({Event.BEFORE_STEP})
    stage = Stage.OBSERVE

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def apply(self, event: Event, state: State) -> None:
        found = {name: each.grad for name, each in state.ledger.parameters.items() if each.grad is not None}
        self.seen.append({name: grad.clone() for name, grad in found.items()})


@pytest.mark.parametrize("shuffle", [False, True])
def test_gradients_of_variable_lengths(shuffle: bool) -> None:
    """Bit for bit where the same batches come again; reshuffled, within 1e-6 of each gradient's norm."""
    seen = []
    for last in (EvalFrozen(), PrefixCache()):
        watch = Gradients()
        torch.manual_seed(0)
        recipe = [FreezeAt({"stem": "0ep", "blocks[:2]": "0ep"}), last, watch]
        trainer = Trainer(algorithms=recipe, optimizer=partial(torch.optim.SGD, lr=0.0), device="cpu", progress=False)
        trainer.fit(bert(), texts(shuffle=shuffle), duration="4ep")
        seen.append(watch.seen)
    assert last.hits == 12
    for plain, cached in zip(*seen, strict=True):
        assert plain.keys() == cached.keys()
        for name, each in plain.items():
            # What is added to all scores leaves a softmax as it is: the gradient of the keys' bias is rounding alone.
            size = plain[name.replace("key.bias", "key.weight")].norm()
            assert (cached[name] - each).norm() <= (1e-6 if shuffle else 0) * size, name


def test_a_model_without_a_mask_is_not_given_padded_rows() -> None:
    """Whether it looks at padding is not known, so only rows of the batch's own length are used."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.block, self.head = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.head(torch.tanh(self.block(self.embed(input_ids))).mean(1))

    def without(samples: list[Any]) -> tuple[Tensor, Tensor]:
        batch = collated(samples)
        return batch["input_ids"], batch["labels"]

    def data() -> Batches:
        rows: Any = texts(shuffle=True).dataset
        return DataLoader(rows, batch_size=4, shuffle=True, collate_fn=without)

    # Each layer of its own: the block's output, of the length of the batch, crosses the frontier.
    plain, cached, cache = both(Mean, lambda: [LayerThaw(every=3, start=1)], data)
    assert cache.off is None
    for name, each in plain.items():
        torch.testing.assert_close(cached[name], each, rtol=1e-5, atol=1e-6)


def test_a_batch_is_loaded_after_its_start_as_a_worker_would_have() -> None:
    """Unloaded batches know their samples, and load what the loader gives."""
    source = ResumableLoader(DataLoader(Noisy(inputs=True), batch_size=8, shuffle=True), seed=3)
    for plain, late in zip(source.batches(1), source.batches(1, unloaded_for=torch.device("cpu")), strict=True):
        assert isinstance(late.batch, Unloaded)
        assert late.sample_ids == late.batch.sample_ids == plain.sample_ids
        assert all(map(torch.equal, late.batch.load(), plain.batch))


def test_frozen_modules_stand_in_eval_mode_while_asked() -> None:
    """As long as none of their parameters trains; nothing is held."""
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Dropout()), nn.Linear(4, 4), nn.Linear(4, 2))
    ledger = ParameterLedger(model.train(), partial(torch.optim.SGD, lr=0.1))
    ledger.freeze("0.*", owner="me")
    ledger.evaluate_frozen(["0.*", "1.*"], owner="cache")
    assert [module.training for module in model] == [False, True, True]
    ledger.thaw("0.*", owner="me")
    assert len(ledger.trainable) == 6
    assert model[0][1].training
    ledger.freeze("0.*", owner="me")
    assert not model[0][1].training
    ledger.evaluate_frozen(None, owner="cache")
    assert model[0][1].training
