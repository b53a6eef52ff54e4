"""A real data set: scikit-learn's handwritten digits, a CNN with BatchNorm, and the algorithms together."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from thawline.algorithms import EMA, EarlyStop, GradClip, LayerFreeze, LayerThaw
from thawline.engine import Algorithm, Checkpointing, Event, State, Trainer, cosine, warmup


def block(width: int, wider: int) -> nn.Sequential:
    """Return convolution, BatchNorm, ReLU and pooling."""
    return nn.Sequential(
        nn.Conv2d(width, wider, 3, padding=1, bias=False), nn.BatchNorm2d(wider), nn.ReLU(), nn.MaxPool2d(2)
    )


def network() -> nn.Sequential:
    """Return three blocks and a linear head, for 1 x 8 x 8 images."""
    torch.manual_seed(0)
    return nn.Sequential(block(1, 16), block(16, 32), block(32, 64), nn.Flatten(), nn.Linear(64, 10))


@pytest.fixture(scope="module")
def digits() -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Return loaders of 1,347 training and 450 test images."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=450, random_state=0, stratify=labels)
    x, x_test, y, y_test = (torch.as_tensor(each) for each in split)
    sets = [TensorDataset(a.float().reshape(-1, 1, 8, 8) / 16, b) for a, b in ((x, y), (x_test, y_test))]
    return DataLoader(sets[0], batch_size=64, shuffle=True), DataLoader(sets[1], batch_size=150)


def trainer(*algorithms: Algorithm, **more: object) -> Trainer:
    """Return a trainer that measures accuracy, the ledger verified after each algorithm's turn."""
    return Trainer(
        algorithms=algorithms, optimizer=partial(torch.optim.AdamW, lr=5e-3), schedule=warmup(0.1, cosine()), debug=True,
        loss_fn=nn.functional.cross_entropy, metrics={"accuracy": lambda z, y: (z.argmax(1) == y).float().mean()},
        progress=False, **more,  # type: ignore[arg-type]
    )  # fmt: skip


def test_all_layers_learn_the_digits(digits: tuple[DataLoader[tuple[Tensor, ...]], ...]) -> None:
    """Five epochs with clipping and averaging reach 96% of unseen digits."""
    result = trainer(GradClip(1.0), EMA(half_life="0.05dur")).fit(network(), *digits, duration="5ep")
    assert result.metrics["eval/accuracy"] > 0.96


def test_gradual_thawing_learns_more_than_the_head_alone(digits: tuple[DataLoader[tuple[Tensor, ...]], ...]) -> None:
    """A head on random features is far behind, thawing block by block catches up, frozen statistics stand still."""
    model = network()
    statistics: list[Tensor] = []

    class Watch(Algorithm):
        """Keeps the first block's running mean at each epoch's end."""

        events = frozenset({Event.EPOCH_END})

        def apply(self, event: Event, state: State) -> None:
            """Keep it."""
            statistics.append(model[0][1].running_mean.clone())  # type: ignore[index,union-attr]

    thawed = trainer(LayerThaw(every=1, lr_scale=0.8), Watch()).fit(model, *digits, duration="6ep")
    accuracy = [row["eval/accuracy"] for row in thawed.history]
    assert accuracy[0] < 0.8
    assert accuracy[-1] > 0.93
    assert [span.layers[0] for span in thawed.timeline.spans] == ["head", "blocks[2]", "blocks[1]", "blocks[0]"]
    assert all(torch.equal(each, torch.zeros(16)) for each in statistics[:3])
    assert not torch.equal(statistics[3], statistics[2])


def test_freezing_on_the_way_keeps_the_accuracy_and_resumes(
    digits: tuple[DataLoader[tuple[Tensor, ...]], ...], tmp_path: Path
) -> None:
    """Half of the layers frozen towards the end cost little, and a run cut in the middle ends bit for bit the same."""
    algorithms = (
        LayerFreeze(start=0.3, level=1.0),
        EMA(half_life="0.05dur"),
        EarlyStop("eval/accuracy", patience=9, mode="max"),
    )
    whole, model = network(), network()
    result = trainer(*algorithms).fit(whole, *digits, duration="5ep")
    assert result.metrics["eval/accuracy"] > 0.95
    assert result.history[-2]["trainable"] < result.history[0]["trainable"]

    class Stop(Algorithm):
        """Ends the process's part of the run."""

        events = frozenset({Event.BATCH_START})

        def apply(self, event: Event, state: State) -> None:
            """Stop in the fourth epoch, where layers are frozen already."""
            if state.clock.batch == 70 and cut:
                raise KeyboardInterrupt

    cut = True
    saving = {"run_dir": tmp_path, "checkpoint": Checkpointing(every="10ba")}
    with pytest.raises(KeyboardInterrupt):
        trainer(*algorithms, Stop(), **saving).fit(model, *digits, duration="5ep")
    cut, model = False, network()
    again = trainer(*algorithms, Stop(), **saving).fit(model, *digits, duration="5ep", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), model.state_dict().values(), strict=True))
    assert again.history == result.history
