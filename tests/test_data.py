"""Deterministic, resumable order over loaders: against loading everything, in one process and in workers."""

# ruff: noqa: NPY002 - users' code draws from NumPy's global generator, and that is what is tested

import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    StackDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)
from typing_extensions import override

from thawline.engine import ArgumentError, DataError
from thawline.engine.data import Fetched, ResumableLoader
from thawline.engine.keyed import Key, KeyedDataset, Keys, keyed_loader
from thawline.engine.order import epoch_order

SIZE = 11


class Augmented(Dataset[Any]):
    """Samples with noise from every generator, that count how often they are loaded."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self.own = np.random.default_rng(3)
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return self.size

    @override
    def __getitem__(self, index: int) -> tuple[int, float, float, Tensor, float]:
        self.loaded.append(index)
        return index, random.random(), float(np.random.random()), torch.rand(2), float(self.own.random())


class Batched(Augmented):
    """A dataset that loads whole batches by itself."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        noise = torch.rand(len(indices))
        return [(index, each) for index, each in zip(indices, noise, strict=True)]


class Stream(IterableDataset[Any]):
    """Noise, without an end that is known."""

    @override
    def __iter__(self) -> Iterator[Tensor]:
        return (torch.rand(2) + random.random() for _ in range(6))


class OwnIteration(DataLoader[Any]):
    """A loader that goes its own way."""

    @override
    def __iter__(self) -> Any:
        return (batch for batch in super().__iter__())


class Batches(BatchSampler):
    """A batch sampler of the user's: pairs, in random order."""

    def __init__(self) -> None:
        super().__init__(SequentialSampler(range(SIZE)), 2, drop_last=False)

    @override
    def __iter__(self) -> Iterator[list[int]]:
        batches = list(super().__iter__())
        random.shuffle(batches)
        return iter(batches)


class Reversed:
    """A sampler that is no Sampler, and yields NumPy's numbers."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Any]:
        return iter(np.arange(self.size)[::-1])

    def __len__(self) -> int:
        return self.size


def noisy(samples: list[Any]) -> Any:
    """Collate, with noise: as a collator that masks tokens does."""
    return default_collate(samples), torch.rand(2), random.random()


def see_dataset(worker: int) -> None:
    """Check, in a worker, that a user's worker_init_fn finds the user's own dataset."""
    info = get_worker_info()
    assert info is not None
    assert type(info.dataset) is Augmented
    assert info.id == worker


LOADERS: dict[str, Callable[..., DataLoader[Any]]] = {
    "shuffle": lambda data, **options: DataLoader(data, 3, shuffle=True, **options),
    "generator": lambda data, **options: DataLoader(data, 3, shuffle=True, generator=torch.Generator(), **options),
    "sequential": lambda data, **options: DataLoader(data, 3, **options),
    "drop_last": lambda data, **options: DataLoader(data, 3, shuffle=True, drop_last=True, **options),
    "weighted": lambda data, **options: DataLoader(data, 3, sampler=WeightedRandomSampler([1.0] * SIZE, 9), **options),
    "custom": lambda data, **options: DataLoader(data, 3, sampler=Reversed(), **options),
    "batch_sampler": lambda data, **options: DataLoader(data, batch_sampler=Batches(), **options),
    "single": lambda data, **options: DataLoader(data, batch_size=None, shuffle=True, **options),
    "collate": lambda data, **options: DataLoader(data, 3, shuffle=True, collate_fn=noisy, **options),
    "subset": lambda data, **options: DataLoader(Subset(data, list(range(1, 9))), 3, shuffle=True, **options),
}


def text(fetched: Iterable[Fetched]) -> list[str]:
    """Return batches so that they compare by every bit."""
    return [repr(plain(tuple(each))) for each in fetched]


def plain(value: Any) -> Any:
    """Return a batch with lists of Python's numbers in place of tensors."""
    if isinstance(value, Tensor):
        return value.tolist()
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def read(loader: Iterable[Any], epoch: int = 0, start: int = 0, seed: int = 0) -> list[str]:
    """Return the batches of an epoch as a fresh :class:`ResumableLoader` gives them."""
    return text(ResumableLoader(loader, seed=seed).batches(epoch, start))


def global_state() -> str:
    """Return where the global generators stand."""
    return repr((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()))  # type: ignore[index]


# -- map-style datasets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOADERS)
def test_an_epoch_is_a_function_of_seed_and_epoch(kind: str) -> None:
    """Order and augmentation are the same in a fresh loader, whatever was drawn before; other for another epoch."""
    loader = LOADERS[kind](Augmented())
    resumable = ResumableLoader(loader, seed=4)
    epochs = [text(resumable.batches(epoch)) for epoch in (0, 1)]
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    again = ResumableLoader(LOADERS[kind](Augmented()), seed=4)
    assert [text(again.batches(epoch)) for epoch in (1, 0)] == epochs[::-1]
    assert epochs[0] != epochs[1]
    assert read(loader, seed=5) != epochs[0]
    assert again.exact
    assert again.length == len(loader) == len(epochs[0])


@pytest.mark.parametrize("kind", LOADERS)
def test_an_epoch_goes_on_at_any_batch(kind: str) -> None:
    """From each batch on, the rest of the epoch is what it would have been."""
    loader = LOADERS[kind](Augmented())
    whole = read(loader, epoch=2)
    assert [read(loader, epoch=2, start=start) for start in range(len(whole) + 1)] == [
        whole[start:] for start in range(len(whole) + 1)
    ]


@pytest.mark.parametrize("kind", LOADERS)
def test_the_global_generators_are_the_models_alone(kind: str) -> None:
    """No batch, and no start of an epoch, moves torch's, NumPy's or Python's generator."""
    resumable = ResumableLoader(LOADERS[kind](Augmented()), seed=0)
    before = global_state()
    for epoch in range(2):
        for _ in resumable.batches(epoch):
            assert global_state() == before
    assert global_state() == before


@pytest.mark.parametrize("kind", ["shuffle", "batch_sampler", "single", "collate"])
def test_workers_change_nothing(kind: str) -> None:
    """Two workers, persistent or not, give the batches of none, also from the middle on."""
    expected = [read(LOADERS[kind](Augmented()), epoch) for epoch in range(2)]
    before = global_state()
    for persistent in (False, True):
        loader = LOADERS[kind](Augmented(), num_workers=2, persistent_workers=persistent, prefetch_factor=3)
        resumable = ResumableLoader(loader, seed=0)
        assert [text(resumable.batches(epoch)) for epoch in range(2)] == expected
        abandoned = resumable.batches(0)
        next(abandoned)
        del abandoned
        assert text(resumable.batches(1, 2)) == expected[1][2:]
        resumable.close()
    assert global_state() == before


def test_the_loader_made_has_the_settings_of_the_users() -> None:
    """How far workers load ahead and whether they stay among them."""
    loader = DataLoader(Augmented(), 3, num_workers=2, persistent_workers=True, prefetch_factor=5, timeout=60)
    made = keyed_loader(loader, KeyedDataset(loader, seed=0), Keys(), torch.Generator())
    for name in ("num_workers", "persistent_workers", "prefetch_factor", "timeout", "multiprocessing_context"):
        assert getattr(made, name) == getattr(loader, name), name


def test_what_workers_are_sent_can_be_sent() -> None:
    """Where processes are spawned, and not forked, the dataset and a key go through a pipe."""
    dataset = KeyedDataset(DataLoader(TensorDataset(torch.arange(SIZE)), 3, collate_fn=noisy), seed=0)
    key = Key(2, [4, 5])
    sent_dataset, sent_key = pickle.loads(pickle.dumps((dataset, key)))
    assert plain(sent_dataset[sent_key]) == plain(dataset[key])


def test_workers_see_the_users_dataset() -> None:
    """A worker_init_fn that looks at its dataset finds the one it knows."""
    loader = DataLoader(Augmented(), 3, num_workers=1, worker_init_fn=see_dataset)
    assert read(loader) == read(DataLoader(Augmented(), 3))


def test_what_was_seen_is_not_loaded() -> None:
    """Going on at the last batch loads the last batch alone."""
    dataset = Augmented()
    list(ResumableLoader(DataLoader(dataset, 3), seed=0).batches(0, start=3))
    assert dataset.loaded == [9, 10]


def test_a_samples_noise_is_its_own() -> None:
    """Augmentation depends on (seed, epoch, sample), not on the batch it is in; epochs and samples differ."""

    def noise(size: int, epoch: int) -> dict[int, str]:
        fetched = ResumableLoader(DataLoader(Augmented(), size, shuffle=True), seed=1).batches(epoch)
        return {
            int(sample[0]): repr(sample[1:])
            for each in fetched
            for sample in zip(*(part.tolist() for part in each.batch), strict=True)
        }

    assert noise(1, 0) == noise(4, 0)
    assert len({*noise(1, 0).values(), *noise(1, 1).values()}) == 2 * SIZE


def test_a_dataset_that_loads_batches_is_seeded_by_the_batch() -> None:
    """Its own ``__getitems__`` is used, and resumes exactly, with workers and without."""
    whole = read(DataLoader(Batched(), 3, shuffle=True))
    assert read(DataLoader(Batched(), 3, shuffle=True), start=2) == whole[2:]
    assert read(DataLoader(Batched(), 3, shuffle=True, num_workers=1)) == whole
    assert read(DataLoader(Subset(Batched(), [5, 1, 2, 7]), 2)) == read(DataLoader(Subset(Batched(), [5, 1, 2, 7]), 2))
    noise = [
        float(each)
        for fetched in ResumableLoader(DataLoader(Batched(), 3), seed=0).batches(0)
        for each in fetched.batch[1]
    ]
    assert len(set(noise)) == SIZE


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.arange(SIZE)),
        Subset(TensorDataset(torch.arange(20)), list(range(SIZE))),
        ConcatDataset([TensorDataset(torch.arange(5)), TensorDataset(torch.arange(6))]),
        StackDataset(TensorDataset(torch.arange(SIZE)), TensorDataset(torch.arange(SIZE))),
        [(index, float(index)) for index in range(SIZE)],
        torch.arange(SIZE),
    ],
)
def test_batches_are_those_of_the_loader(dataset: Any) -> None:
    """The same samples, collated the same way, as the user's own loader gives them."""
    ours = [fetched.batch for fetched in ResumableLoader(DataLoader(dataset, 4), seed=0).batches(0)]
    assert repr(ours) == repr(list(DataLoader(dataset, 4)))


def test_sample_ids_say_what_is_in_the_batch() -> None:
    """They are the sampler's numbers, as ints, and there are as many as samples."""
    data = TensorDataset(torch.arange(SIZE))
    for loader in (DataLoader(data, 3, shuffle=True), DataLoader(data, 4, sampler=Reversed())):
        for fetched in ResumableLoader(loader, seed=0).batches(0):
            assert fetched.sample_ids == tuple(fetched.batch[0].tolist())
            assert {type(each) for each in fetched.sample_ids or ()} == {int}
            assert fetched.samples == len(fetched.batch[0])


def test_sample_ids_of_ready_batches() -> None:
    """Without automatic batching they are known where the sampler yields lists of them, and not where it yields a number."""
    data = TensorDataset(torch.arange(SIZE))
    lists = DataLoader(data, batch_size=None, sampler=BatchSampler(RandomSampler(data), 4, drop_last=False))
    for fetched in ResumableLoader(lists, seed=0).batches(0):
        assert fetched.sample_ids == tuple(fetched.batch[0].tolist())
    pairs = [torch.zeros(3, 2), torch.zeros(5, 2)]
    ready = ResumableLoader(DataLoader(cast("Dataset[Any]", pairs), batch_size=None), seed=0).batches(0)
    assert [(each.sample_ids, each.samples) for each in ready] == [(None, 3), (None, 5)]


def test_samples_with_names_have_no_ids() -> None:
    """Keys that are no numbers load, and are seeded, all the same."""
    data = {"a": 1, "b": 2, "c": 3}
    loader = DataLoader(cast("Dataset[Any]", data), 2, sampler=list(data))
    (first, _) = ResumableLoader(loader, seed=0).batches(0)
    assert first.batch.tolist() == [1, 2]
    assert (first.sample_ids, first.samples) == (None, 2)


def test_the_callers_loader_is_left_alone() -> None:
    """Its generator, sampler and dataset are as before, and it goes on as it would have."""
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(torch.arange(SIZE)), 3, shuffle=True, generator=generator)
    before = generator.get_state()
    list(ResumableLoader(loader, seed=0).batches(0))
    assert loader.generator is generator
    assert torch.equal(generator.get_state(), before)


def test_a_dead_sample_is_the_users_own_error() -> None:
    """An exception in a dataset passes through, with the generators put back."""

    class Broken(Augmented):
        @override
        def __getitem__(self, index: int) -> Any:
            random.random()
            raise ZeroDivisionError(index)

    before = global_state()
    with pytest.raises(ZeroDivisionError):
        read(DataLoader(Broken(), 3))
    assert global_state() == before


def test_a_sampler_with_hidden_state_is_told() -> None:
    """At the start, before anything has been read."""

    class Counting(Reversed):
        @override
        def __iter__(self) -> Iterator[Any]:
            self.size -= 1
            return super().__iter__()

    resumable = ResumableLoader(DataLoader(Augmented(), 3, sampler=Counting()), seed=0)
    assert not resumable.exact
    assert "the sampler Counting keeps state of its own" in resumable.limits[0]


# -- other loaders -----------------------------------------------------------------------------------------------------


def test_a_list_of_batches_is_exact() -> None:
    """Read from any place, the very objects, every epoch."""
    batches = [torch.zeros(2, 1), torch.zeros(3, 1)]
    resumable = ResumableLoader(batches, seed=0)
    assert [each.batch for each in resumable.batches(1, 1)] == [batches[1]]
    assert [each.samples for each in resumable.batches(0)] == [2, 3]
    assert (resumable.exact, resumable.length, len(resumable)) == (True, 2, 2)
    assert list(resumable.batches(0, 2)) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Stream(), batch_size=2),
        lambda: DataLoader(Stream(), batch_size=2, num_workers=1),
        lambda: OwnIteration(TensorDataset(torch.arange(SIZE)), 3, shuffle=True),
        lambda: OwnIteration(TensorDataset(torch.arange(SIZE)), 3, shuffle=True, generator=torch.Generator()),
        Stream,
    ],
)
def test_an_iterable_is_read_from_its_beginning(make: Callable[[], Iterable[Any]]) -> None:
    """It is a function of (seed, epoch), leaves the global generators alone, and says what going on costs."""
    before = global_state()
    whole = read(make(), epoch=1)
    assert read(make(), epoch=1, start=2) == whole[2:]
    assert read(make(), epoch=2) != whole
    assert global_state() == before
    resumable = ResumableLoader(make(), seed=0)
    assert not resumable.exact
    assert "can only be read from its beginning" in resumable.limits[0]


def test_an_iterable_dataset_is_named() -> None:
    """The sentence names the loader and its dataset."""
    (sentence,) = ResumableLoader(DataLoader(Stream()), seed=0).limits
    assert sentence.startswith("train_loader is a DataLoader over Stream")


def test_an_iterable_is_told_the_epoch() -> None:
    """Loader, dataset and samplers that have a ``set_epoch`` hear of it."""

    class Telling(Stream):
        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        @override
        def __iter__(self) -> Iterator[Any]:
            return iter([torch.tensor([self.epoch])])

    for loader in (DataLoader(Telling()), Telling()):
        (fetched,) = ResumableLoader(loader, seed=0).batches(6)
        assert fetched.batch.flatten().tolist() == [6]


def test_a_generator_is_read_once() -> None:
    """A second epoch is an error that says what to write, not an empty one; so is a later epoch of a fresh one."""

    def ones() -> Iterator[Tensor]:
        return (torch.ones(2) for _ in range(3))

    resumable = ResumableLoader(ones(), seed=0)
    assert len(list(resumable.batches(0))) == 3
    assert (resumable.length, resumable.exact) == (None, False)
    with pytest.raises(DataError, match=r"can be read once, and epoch 1 reads it again\. Write: a list"):
        next(resumable.batches(1))
    with pytest.raises(DataError, match="can be read once"):
        next(ResumableLoader(ones(), seed=0).batches(1))
    assert len(list(ResumableLoader(ones(), seed=0).batches(0, 2))) == 1


def test_a_length_that_is_unknown_is_none() -> None:
    """``len`` raises as Python's own does."""
    resumable = ResumableLoader(DataLoader(Stream()), seed=0)
    assert resumable.length is None
    with pytest.raises(TypeError, match="does not say how many"):
        len(resumable)


def test_a_batch_of_an_unknown_kind_counts_as_one() -> None:
    """What only the user's forward_fn understands does not stop the fit."""
    (fetched,) = ResumableLoader([object()], seed=0).batches(0)
    assert fetched.samples == 1


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loader", [None, 3, "text", b"x", {"x": 1}, torch.zeros(3), np.zeros(3), TensorDataset(torch.zeros(3)), Augmented()]
)
def test_what_is_no_loader_is_refused(loader: Any) -> None:
    """The error names the argument it was passed as, and shows a loader."""
    with pytest.raises(ArgumentError, match=r"Trainer.fit\(eval_loader=\) takes a DataLoader.*Write: .*DataLoader\("):
        ResumableLoader(loader, seed=0, argument="Trainer.fit(eval_loader=)")


@pytest.mark.parametrize(
    "loader, message",
    [
        ([], "a list with nothing in it"),
        (DataLoader(TensorDataset(torch.zeros(0))), "over TensorDataset with 0 samples. Write: a dataset with samples"),
        (
            DataLoader(TensorDataset(torch.zeros(3)), 8, drop_last=True),
            "with 3 samples, batch_size=8 and drop_last=True",
        ),
        (DataLoader(TensorDataset(torch.zeros(3)), sampler=cast("Any", Reversed(0))), "whose sampler yields no index"),
    ],
)
def test_a_loader_without_batches_is_refused_at_once(loader: Any, message: str) -> None:
    """The error names it, what it is, and what to write."""
    with pytest.raises(DataError, match=f"train_loader yields no batch: got .*{message}"):
        ResumableLoader(loader, seed=0)


@pytest.mark.parametrize("loader", [iter([]), DataLoader(TensorDataset(torch.zeros(3)), sampler=iter([]))])
def test_a_loader_that_turns_out_empty_is_an_error(loader: Any) -> None:
    """Where it could not be known before, the epoch says so."""
    with pytest.raises(DataError, match="train_loader yields no batch"):
        list(ResumableLoader(loader, seed=0).batches(0))


def test_a_partial_collate_function_is_seeded() -> None:
    """Also the generator among its arguments."""

    def collate(samples: list[Any], *, dice: np.random.Generator) -> float:
        return float(dice.random())

    make = partial(DataLoader, TensorDataset(torch.arange(SIZE)), 3)
    first = read(make(collate_fn=partial(collate, dice=np.random.default_rng())))
    assert read(make(collate_fn=partial(collate, dice=np.random.default_rng())), start=1) == first[1:]


# -- generators that are hard to find ----------------------------------------------------------------------------------

MODULE_DICE = np.random.default_rng()


def roll() -> float:
    """Draw from a generator of the module."""
    return float(MODULE_DICE.random())


class Slotted:
    """An augmentation without a ``__dict__``."""

    __slots__ = ("dice",)

    def __init__(self) -> None:
        self.dice = random.Random()

    def __call__(self) -> float:
        return self.dice.random()


class Jitter(nn.Module):
    """An augmentation that is a module, as torchvision's are."""

    def __init__(self) -> None:
        super().__init__()
        self.dice = torch.Generator()
        self.dice.seed()

    @override
    def forward(self) -> float:
        return float(torch.rand((), generator=self.dice).item())


class Rolling(Augmented):
    """Noise from whatever it is given; a generator of its class; one that is made at the first sample."""

    dice = np.random.default_rng()
    late: np.random.Generator | None = None

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw

    @override
    def __getitem__(self, index: int) -> Any:
        if self.late is None:
            self.late = np.random.default_rng()
        return index, self.draw(), float(self.dice.random()), float(self.late.random())


def closing(dice: np.random.Generator) -> Callable[[], float]:
    """Return a function that closes over a generator, and has another as a default."""

    def draw(*, other: np.random.Generator = dice.spawn(1)[0]) -> float:  # noqa: B008 - that is what is tested
        return float(dice.random() + other.random())

    return draw


@pytest.mark.parametrize(
    "draw",
    [
        lambda: roll,
        Slotted,
        lambda: nn.Sequential(Jitter())[0],
        lambda: closing(np.random.default_rng()),
        lambda: partial(np.random.Generator.random, np.random.default_rng()),
    ],
    ids=["global", "slots", "module", "closure", "partial"],
)
def test_generators_are_found_wherever_they_are_kept(draw: Callable[[], Callable[[], float]]) -> None:
    """What they draw is a function of (seed, epoch, sample), with workers, without, and from the middle on."""
    whole = read(DataLoader(Rolling(draw()), 3, shuffle=True))
    assert read(DataLoader(Rolling(draw()), 3, shuffle=True), start=2) == whole[2:]
    assert read(DataLoader(Rolling(draw()), 3, shuffle=True, num_workers=1), start=1) == whole[1:]


def test_the_systems_own_numbers_are_left_alone() -> None:
    """They have neither a seed nor a state."""
    assert len(read(DataLoader(Rolling(random.SystemRandom().random), 3))) == 4


@pytest.mark.parametrize("drop_last", [False, True])
def test_torchs_batch_sampler_is_entered_at_any_batch(drop_last: bool) -> None:
    """Without making the batches before: the same as it makes."""
    for sampler in (RandomSampler(range(SIZE)), SequentialSampler(range(SIZE)), Reversed()):
        batches = BatchSampler(cast("Any", sampler), 3, drop_last)
        whole = list(epoch_order(batches, 1, 2))
        assert [len(each) for each in whole] == [len(each) for each in batches]
        for start in range(len(whole) + 2):
            assert list(epoch_order(batches, 1, 2, start)) == whole[start:]
