"""Small models, optimizers and loops that several test modules share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from thawline.engine import Attachment, ParameterLedger, Site, surgery_op
from thawline.engine.doubles import Bare, Shared, mlp
from thawline.engine.doubles import tiny_loader as loader

__all__ = [
    "MODELS", "OPTIMIZERS", "Bare", "Encoder", "Shared", "Tied", "cnn", "decay_groups", "encoder", "gain", "group_rates", "is_matrix", "loader",
    "mlp", "optimizer_for", "pseudo_gradients", "same_weights", "weights",
]  # fmt: skip


@surgery_op("gain")
def gain(site: Site, *, size: int = 1) -> list[Attachment]:
    """Attach a learned vector beside the weight: the least that surgery can do."""
    values = torch.empty(size).uniform_(-1, 1, generator=site.generator)
    return [Attachment(site.name, parameters={"gain": nn.Parameter(values)})]


class Tied(nn.Module):
    """A language model whose head is tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)])
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 7, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


def cnn() -> nn.Sequential:
    """Return two convolutions with BatchNorm and a head, for 1 x 8 x 8 images."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10),
    )  # fmt: skip


def encoder(layers: int = 2, dropout: float = 0.0) -> nn.Module:
    """Return a torch transformer encoder with a classifier on the first token."""
    return Encoder(layers, dropout)


class Encoder(nn.Module):
    """Embedding, torch's own encoder, and a classifier on the first token."""

    def __init__(self, layers: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        block = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.classifier = nn.Linear(8, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.classifier(self.encoder(self.embed(ids))[:, 0])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp, "cnn": cnn, "tied": Tied, "shared": Shared, "bare": Bare, "encoder": encoder,
}  # fmt: skip


def decay_groups(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW with weight decay on matrices only, as most recipes have it."""
    parameters = list(model.parameters())
    flat = [each for each in parameters if each.ndim <= 1]
    deep = [each for each in parameters if each.ndim > 1]
    groups = [{"params": deep, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.02)


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Choose what Muon takes."""
    return parameter.ndim == 2


def optimizer_for(kind: str, model: nn.Module) -> object:
    """Return an optimizer of every shape that the ledger takes."""
    if kind == "sgd":
        return partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    if kind == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=0.01)
    if kind == "adamw-loop":
        return partial(torch.optim.AdamW, lr=0.01, foreach=False)
    if kind == "named":
        return torch.optim.AdamW(model.named_parameters(), lr=0.01, foreach=True)
    if kind == "groups":
        return decay_groups(model)
    if kind == "adagrad":
        return partial(torch.optim.Adagrad, lr=0.05)
    assert kind == "muon", kind
    return [(is_matrix, partial(torch.optim.Muon, lr=0.02)), ("*", partial(torch.optim.AdamW, lr=0.01))]


OPTIMIZERS = ("sgd", "adamw", "adamw-loop", "named", "groups", "adagrad", "muon")


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of everything in the state dict."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Return whether two state dicts are equal bit for bit."""
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def pseudo_gradients(parameters: Iterable[Tensor], seed: int) -> None:
    """Give parameters gradients that depend on shape and seed alone."""
    generator = torch.Generator().manual_seed(seed)
    loss = sum((each * torch.randn(each.shape, generator=generator)).sum() for each in parameters)
    assert isinstance(loss, Tensor)
    loss.backward()


def group_rates(ledger: ParameterLedger) -> dict[str, float | None]:
    """Return the learning rate of each group by its name."""
    return {group.name: group.lr for group in ledger.groups}
