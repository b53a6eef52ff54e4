"""Small models and data for tests: each model takes four numbers a sample, and gives logits of two classes."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset
from typing_extensions import override

FEATURES, CLASSES = 4, 2


class Block(nn.Module):
    """A residual block with normalization and dropout."""

    def __init__(self, width: int, dropout: float, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm(width)
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    @override
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.dropout(torch.tanh(self.linear(self.norm(x))))
        return out


class Residual(nn.Module):
    """Stem, residual blocks, head: the model that :func:`check_algorithm` uses where none is given."""

    def __init__(
        self, depth: int = 3, width: int = 8, dropout: float = 0.1, norm: Callable[[int], nn.Module] = nn.LayerNorm
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, width)
        self.blocks = nn.ModuleList([Block(width, dropout, norm) for _ in range(depth)])
        self.head = nn.Linear(width, CLASSES)

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


class Audited(Residual):
    """A residual model with batch normalization and dropout, of which the user holds a bias: what an audited fit trains.

    Its noise in training is drawn from Python's and NumPy's generators as well as from torch's.
    """

    def __init__(self) -> None:
        super().__init__(norm=nn.BatchNorm1d)
        self.embed.bias.detach_()  # trains no more, as where a user freezes it before the fit

    @override
    def forward(self, x: Tensor) -> Tensor:
        noise = 0.1 * (random.random() + float(np.random.random())) if self.training else 0.1  # noqa: NPY002, S311 - the global one
        return super().forward(x * (1 + noise))


class Bare(nn.Module):
    """A module that owns a parameter itself and has children: what forgetful freezing leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(FEATURES))
        self.body = nn.Sequential(nn.Linear(FEATURES, 4), nn.ReLU(), nn.Linear(4, 4))
        self.head = nn.Linear(4, CLASSES)

    @override
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x * self.scale))
        return out


class Shared(nn.Module):
    """One module used under two names."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(FEATURES, FEATURES)
        self.first, self.middle, self.second = layer, nn.Linear(FEATURES, FEATURES), layer
        self.head = nn.Linear(FEATURES, CLASSES)

    @override
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.middle(self.first(x))))
        return out


class Tied(nn.Module):
    """Tokens, which are the signs of the numbers, and a head tied to their embedding."""

    def __init__(self, depth: int = 2, width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, width)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, CLASSES, bias=False)
        self.lm_head.weight = self.embed.weight

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed((x > 0).long())
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.lm_head(self.norm(x)).mean(1)
        return out


class Transformer(nn.Module):
    """Torch's own encoder over four tokens."""

    def __init__(self, depth: int = 2, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(1, width)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.classifier = nn.Linear(width, CLASSES)

    @override
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.encoder(self.embed(x.unsqueeze(-1)))[:, 0])
        return out


def uneven_loader() -> DataLoader[tuple[Tensor, ...]]:
    """Return :func:`tiny_loader`'s task with a short last batch and some labels that are ignored, unevenly over the batches."""
    x, y = tiny_loader(22).dataset.tensors  # type: ignore[attr-defined]  # a TensorDataset
    ignored = torch.arange(len(y)) % 5 == 0
    return DataLoader(TensorDataset(x, y.masked_fill(ignored, -100)), batch_size=8, shuffle=True)


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """The task of :func:`tiny_loader` with noise on each sample, of all generators and of one that it keeps to itself.

    Args:
        samples: How many.
    """

    AMOUNT = 0.1
    """How much noise there is at most on a number."""

    def __init__(self, samples: int = 22) -> None:
        self.x, self.y = tiny_loader(samples).dataset.tensors  # type: ignore[attr-defined]  # a TensorDataset
        self.kept = {"own": [random.Random(0)]}  # noqa: S311 - noise

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.y)

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        numbers = random.random() * float(np.random.random()) * self.kept["own"][0].random()  # noqa: NPY002, S311 - the global ones
        return self.x[index] + self.AMOUNT * numbers * torch.rand(FEATURES), self.y[index]


def augmented_loader() -> DataLoader[tuple[Tensor, Tensor]]:
    """Return batches of samples that are never twice the same, drawn by a sampler of batches."""
    data = Augmented()
    return DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 8, drop_last=False))


def mlp(width: int = FEATURES, depth: int = 3) -> nn.Sequential:
    """Return ``depth`` linear layers with ReLU between: ``depth - 1`` blocks and a head."""
    layers: list[nn.Module] = []
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def cnn(depth: int = 2, width: int = 4) -> nn.Sequential:
    """Return convolutions with batch normalization over the numbers as a picture of 2 x 2, and a head."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 2, 2))]
    for number in range(depth):
        inside = width if number else 1
        layers += [nn.Conv2d(inside, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


_MODELS: dict[str, Callable[[], nn.Module]] = {
    "bare": Bare,
    "cnn": cnn,
    "mlp": mlp,
    "residual": Residual,
    "shared": Shared,
    "tied": Tied,
    "transformer": Transformer,
}


def tiny_models() -> Mapping[str, Callable[[], nn.Module]]:
    """Return small models by name, each as a function that builds one: every shape that trainability trips over.

    Returns:
        ``"mlp"``, ``"residual"``, ``"cnn"`` with batch normalization, ``"transformer"``, ``"tied"`` weights, a ``"shared"``
        module, ``"bare"`` parameters beside modules. All take a batch of :func:`tiny_loader`.

    Example:
        >>> tiny_models()["cnn"]()(torch.zeros(8, 4)).shape
        torch.Size([8, 2])
    """
    return MappingProxyType(_MODELS)


def tiny_loader(
    samples: int = 32,
    batch_size: int = 8,
    *,
    features: int = FEATURES,
    classes: int = CLASSES,
    seed: int = 0,
    shuffle: bool = True,
) -> DataLoader[tuple[Tensor, ...]]:
    """Return a small classification task: random numbers, and as the class whether their sum is positive.

    Args:
        samples: How many.
        batch_size: Samples of a batch.
        features: Numbers of a sample.
        classes: Number of classes, 1 or more.
        seed: Of the numbers; the global generators are left alone.
        shuffle: Whether the order is another one in each epoch.

    Example:
        >>> [x.shape for x, _ in tiny_loader(12)]
        [torch.Size([8, 4]), torch.Size([4, 4])]
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, features, generator=generator)
    y = (x.sum(1) > 0).long() % classes
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=shuffle)
