"""Batches of other types than the model and the loss take: the part, and what to write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import mlp
from thawline.engine import DataError, Trainer
from thawline.engine.mistyped import mistyped

X, Y = torch.ones(4, 4), torch.zeros(4, dtype=torch.long)
F = nn.functional
CASES: dict[str, tuple[Any, Any, str]] = {
    "double inputs": ((X.double(), Y), F.cross_entropy, r"batch\[0\] torch.float64.*Write: batch\[0\].to\(torch.float32\)"),
    "double in a mapping": ({"input": X.double(), "labels": Y}, F.cross_entropy, r"Write: batch\['input'\].to\(torch.float32\)"),
    "whole inputs": ((X.long(), Y), F.cross_entropy, r"Write: batch\[0\].float\(\)"),
    "words": ((["a"] * 4, Y), F.cross_entropy, r"batch\[0\] is a list, \['a'.*Write: batch\[0\] as a tensor"),
    "labels with a point": ((X, Y.float()), F.cross_entropy, r"Write: batch\[1\].long\(\)"),
    "labels without one": (
        (X, torch.zeros(4, 2, dtype=torch.long)), F.binary_cross_entropy_with_logits, r"Write: batch\[1\].float\(\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_part_and_what_to_write_are_named(case: str) -> None:
    """In a fit and in an evaluation."""
    batch, loss_fn, said = CASES[case]
    trainer = Trainer(loss_fn=loss_fn, progress=False)
    with pytest.raises(DataError, match=said):
        trainer.fit(mlp(), [batch], duration="1ep")
    with pytest.raises(DataError, match=said):
        trainer.evaluate(mlp(), [batch])


class Wrong(nn.Module):
    """Makes a number of another type by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.double())


def test_an_error_of_the_models_own_stays() -> None:
    """The batch is as it should be; and what is no matter of types says so itself."""
    trainer = Trainer(loss_fn=F.cross_entropy, progress=False)
    with pytest.raises(RuntimeError, match="same dtype"):
        trainer.fit(Wrong(), [(X, Y)], duration="1ep")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trainer.fit(mlp(), [(torch.ones(4, 5), Y)], duration="1ep")
    assert mistyped(ValueError("dtype"), (X.double(), Y), mlp()) is None
