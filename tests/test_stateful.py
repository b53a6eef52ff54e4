"""Loaders that keep their place themselves: their state goes into the checkpoint, and they go on from it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset
from typing_extensions import override

from helpers import loader as plain_loader
from helpers import mlp, same_weights, weights
from thawline.engine import CheckpointError, Checkpointing, Trainer
from thawline.engine.data import ResumableLoader

SAMPLES, BATCH = 22, 4


class Noisy(Dataset[Any]):
    """Samples with noise from the global generators; it counts what is loaded."""

    def __init__(self) -> None:
        self.loaded = 0

    def __len__(self) -> int:
        return SAMPLES

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.loaded += 1
        return torch.randn(4) + random.random(), index % 2


class Stateful(DataLoader[Any]):
    """What torchdata's StatefulDataLoader does without workers.

    The order of an epoch is drawn from the loader's own generator, or from one seeded by a global one. Asking for the
    state makes an iterator, which the next ``iter`` takes over. A state of an epoch's end begins the next epoch, and
    has made an iterator in vain by then.
    """

    def __init__(
        self, dataset: Dataset[Any], *, generator: torch.Generator | None = None, num_workers: int = 0
    ) -> None:
        super().__init__(dataset, BATCH, num_workers=num_workers)
        self.own = generator
        self.given: dict[str, Any] | None = None
        self.current: _Reading | None = None
        self.ahead = False

    @override
    def __iter__(self) -> Any:
        if self.given is not None:
            self.current = _Reading(self, self.given)
            self.given = None
            if self.current.finished:
                self.current = _Reading(self)
        elif not (self.ahead and self.current is not None):
            self.current = _Reading(self)
        self.ahead = False
        return self.current

    def state_dict(self) -> dict[str, Any]:
        if self.current is None:
            self.current, self.ahead = _Reading(self), True
        return self.current.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.given = state_dict


class _Reading:
    def __init__(self, loader: Stateful, state: dict[str, Any] | None = None) -> None:
        torch.empty((), dtype=torch.int64).random_()  # the seed of workers, also where there are none
        self.loader = loader
        self.finished = False if state is None else bool(state["finished"])
        self.done = 0 if state is None else int(state["done"])
        self.generator = loader.own
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
        if state is not None:
            self.generator.set_state(state["generator"])
        self.before = self.generator.get_state()
        self.order: list[int] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.order is None:
            self.order = torch.randperm(SAMPLES, generator=self.generator).tolist()
        indices = self.order[self.done * BATCH : (self.done + 1) * BATCH]
        if not indices:
            self.finished = True
            raise StopIteration
        self.done += 1
        return self.loader.collate_fn([self.loader.dataset[each] for each in indices])

    def state_dict(self) -> dict[str, Any]:
        assert self.generator is not None
        at = self.generator.get_state() if self.finished else self.before
        return {"done": self.done, "finished": self.finished, "generator": at}


class Counter:
    """The least there is: a loader whose iterator is its own attribute."""

    def __init__(self) -> None:
        self.state = {"done": 0}

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[Tensor]:
        while self.state["done"] < 5:
            self.state["done"] += 1
            yield torch.tensor([self.state["done"] + torch.rand(()).item()])
        self.state["done"] = 0

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


MAKE: dict[str, Callable[[], Any]] = {
    "torchdata": lambda: Stateful(Noisy()),
    "generator": lambda: Stateful(Noisy(), generator=torch.Generator().manual_seed(5)),
    "least": Counter,
}


def text(batches: Any) -> list[str]:
    """Return batches so that they compare by every bit."""
    return [repr(each.batch) for each in batches]


@pytest.mark.parametrize("kind", MAKE)
def test_a_state_of_any_place_goes_on_there(kind: str) -> None:
    """In a fresh loader: the rest of the epoch, and the two epochs after it; the global generators are left alone."""
    before = torch.get_rng_state()
    first = ResumableLoader(MAKE[kind](), seed=1)
    assert first.exact
    states, epochs = [], []
    for epoch in range(4):
        batches, seen = first.batches(epoch), []
        while True:
            states.append((epoch, len(seen), first.state_dict(epoch, len(seen))))
            try:
                seen += text([next(batches)])
            except StopIteration:
                break
        epochs.append(seen)
    assert len({each for seen in epochs for each in seen}) == 4 * len(first)
    for epoch, start, state in states:
        again = ResumableLoader(MAKE[kind](), seed=1)
        if start == len(first):  # the epoch is over, and the clock says so
            epoch, start = epoch + 1, 0  # noqa: PLW2901
        again.load_state_dict(state, epoch, start)
        rest = [text(again.batches(each, start if each == epoch else 0)) for each in range(epoch, 4)]
        assert rest == [epochs[each][start if each == epoch else 0 :] for each in range(epoch, 4)]
    assert torch.equal(torch.get_rng_state(), before)


def test_what_was_seen_is_not_loaded() -> None:
    """Going on at the last batch loads the last batch alone."""
    first = ResumableLoader(Stateful(Noisy()), seed=0)
    list(islice(first.batches(0), 5))
    state = first.state_dict(0, 5)
    dataset = Noisy()
    again = ResumableLoader(Stateful(dataset), seed=0)
    again.load_state_dict(state, 0, 5)
    list(again.batches(0, 5))
    assert dataset.loaded == SAMPLES - 5 * BATCH


def test_the_state_before_a_step_is_known_while_it_is_in_hand() -> None:
    """As many batches back as a step takes, also at the short step that ends an epoch."""
    whole = text(ResumableLoader(Stateful(Noisy()), seed=0).batches(0))
    for start, asked in ((0, 4), (4, 7)):
        first = ResumableLoader(Stateful(Noisy()), seed=0, accumulate=4)
        list(islice(first.batches(0), asked))
        again = ResumableLoader(Stateful(Noisy()), seed=0, accumulate=4)
        again.load_state_dict(first.state_dict(0, start), 0, start)
        assert text(again.batches(0, start)) == whole[start:]


def test_a_fit_resumes_at_every_step(tmp_path: Path) -> None:
    """To the bits of the run that went through, with batches put together, over epochs."""

    def fit(folder: Path, **arguments: Any) -> nn.Module:
        torch.manual_seed(0)
        model = mlp()
        trainer = Trainer(
            optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9), loss_fn=cross_entropy, run_dir=folder,
            checkpoint=Checkpointing(every="1ba", keep=99), accumulate=4, progress=False,
        )  # fmt: skip
        trainer.fit(model, Stateful(Noisy()), duration="3ep", **arguments)
        return model

    whole = weights(fit(tmp_path / "whole"))
    cuts = sorted((tmp_path / "whole").glob("ba*"))
    assert len(cuts) == 6
    for cut in cuts:
        assert same_weights(weights(fit(tmp_path / f"after-{cut.name}", resume=cut)), whole)


@pytest.mark.parametrize("saved", [True, False])
def test_another_kind_of_loader_is_refused(tmp_path: Path, saved: bool) -> None:
    """The order would be another; the error says which has a state."""
    loaders = [plain_loader(SAMPLES, BATCH), Stateful(Noisy())]
    trainer = Trainer(
        optimizer=partial(torch.optim.SGD, lr=0.1), loss_fn=cross_entropy, run_dir=tmp_path, progress=False
    )
    trainer.fit(mlp(), loaders[saved], duration="1ep")
    with pytest.raises(CheckpointError, match=r"the run was saved with (a|no) train_loader that has a state_dict"):
        trainer.fit(mlp(), loaders[not saved], duration="1ep", resume=True)


def test_workers_that_draw_are_said() -> None:
    """At the start: what they draw is no part of the loader's state."""
    (limit,) = ResumableLoader(Stateful(Noisy(), num_workers=2), seed=0).limits
    assert "workers, whose random numbers are no part of its state" in limit
    assert ResumableLoader(Stateful(TensorDataset(torch.zeros(9)), num_workers=2), seed=0).exact
