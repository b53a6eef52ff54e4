"""Losses over batches without labels, and weights that are none: typed errors in training and in evaluation."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from helpers import loader, mlp, same_weights, weights
from thawline.engine import ArgumentError, DataError, Trainer

Trainer_ = partial(Trainer, loss_fn=cross_entropy, optimizer=partial(torch.optim.SGD, lr=0.1), progress=False)
X, Y = torch.randn(8, 4), torch.randint(2, (8,))


class Keywords(nn.Module):
    """Takes ``x``, and whatever else where it is told to."""

    def __init__(self, *, anything: bool = False) -> None:
        super().__init__()
        self.layer, self.anything = nn.Linear(4, 2), anything

    def forward(self, x: Tensor, **more: Tensor) -> Tensor:
        """Return logits."""
        if more and not self.anything:
            raise TypeError(f"forward() got an unexpected keyword argument {next(iter(more))!r}")
        return self.layer(x)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X,), "a tuple of one, the model's input"),
        ([X], "a list of one, the model's input"),
        (X, "a Tensor, the model's input"),
        ({"x": X}, "a mapping of 'x', without 'labels' or 'targets'"),
    ],
)
def test_a_batch_without_targets_is_named_where_the_loss_misses_them(batch: Any, message: str) -> None:
    """In training and in evaluation; torch's own error is the cause."""
    for call in (
        lambda: Trainer_().fit(Keywords(), [batch], duration=1),
        lambda: Trainer_().fit(Keywords(), [(X, Y)], [batch], duration=1),
        lambda: Trainer_().evaluate(Keywords(), [batch]),
    ):
        with pytest.raises(
            DataError, match=rf"loss_fn is given and the batch has no targets: it is {message}.*Write: "
        ):
            call()


@pytest.mark.parametrize("name", ["label", "label_ids", "target", "y"])
@pytest.mark.parametrize("anything", [False, True])
def test_labels_under_another_name_are_to_be_renamed(name: str, anything: bool) -> None:
    """Whether the model refuses the keyword or swallows it and the loss misses it."""
    advice = rf"Rename its '{name}' to 'labels': dataset.rename_column\('{name}', 'labels'\)"
    with pytest.raises(DataError, match=advice) as caught:
        Trainer_().fit(Keywords(anything=anything), [{"x": X, name: Y}], duration=1)
    assert isinstance(caught.value.__cause__, TypeError)


def test_an_unknown_keyword_beside_labels_stays_the_models_error() -> None:
    """Renaming would not help."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        Trainer_().fit(Keywords(), [{"x": X, "labels": Y, "y": Y}], duration=1)


def test_a_loss_that_needs_no_targets_trains_and_evaluates_without() -> None:
    """The batch is refused only where the loss fails on it."""
    trainer = Trainer_(loss_fn=lambda outputs, targets: outputs.square().mean())
    net = mlp()
    metrics = trainer.fit(net, [X], [X], duration=1).metrics
    assert metrics["eval/loss"] == pytest.approx(net(X).square().mean().item())


def test_data_without_labels_are_evaluated_by_metrics_alone() -> None:
    """Where there are metrics, a loss that cannot be had is left out."""
    trainer = Trainer_(metrics={"size": lambda outputs, targets: outputs.abs().mean()})
    net = mlp()
    assert trainer.evaluate(net, [(X,)]) == pytest.approx({"eval/size": net(X).abs().mean().item()})


@pytest.mark.parametrize(
    "weight",
    ["3", None, float("nan"), float("inf"), -1.0, 10**400, torch.ones(2), {}],
    ids=lambda value: str(value)[:9],
)
def test_a_weight_that_is_no_share_is_refused(weight: Any) -> None:
    """Text, NaN, negative or infinite: in training over microbatches and in evaluation."""
    trainer = Trainer_(loss_weight=lambda batch: weight, microbatch_size=4)
    message = r"^Trainer\(loss_weight=\) takes a function of the batch that gives a finite number of at least 0, got "
    with pytest.raises(ArgumentError, match=message):
        trainer.fit(mlp(), loader(), duration=1)
    with pytest.raises(ArgumentError, match=message):
        trainer.evaluate(mlp(), loader())


def test_a_microbatch_of_weight_zero_leaves_the_gradient_to_the_others() -> None:
    """Two microbatches, of which the loss counts the first only: the step of a fit on that one."""
    finals: list[dict[str, Tensor]] = []
    for size, samples in ((4, 8), (None, 4)):
        torch.manual_seed(0)
        net = mlp()
        weigh = lambda batch: float(torch.equal(batch[0][0], X[0]))  # noqa: E731
        Trainer_(loss_weight=weigh, microbatch_size=size).fit(net, [(X[:samples], Y[:samples])], duration="1ba")
        finals.append(weights(net))
    assert same_weights(*finals)


def test_a_model_that_returns_its_loss_is_evaluated_by_it() -> None:
    """A tensor of one number, without any loss_fn: the mean over the batches."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).square().mean()

    net = Own()
    values = Trainer(progress=False).evaluate(net, [X[:4], X[4:]])
    assert values == {"eval/loss": pytest.approx(net(X).item())}


def test_batches_of_arrays_train_as_batches_of_tensors() -> None:
    """Bit for bit."""
    finals = []
    for batch in ((X, Y), (X.numpy(), Y.numpy()), {"x": X.numpy(), "labels": Y.numpy()}):
        torch.manual_seed(0)
        net = Keywords()
        Trainer_(microbatch_size=3).fit(net, [batch], duration=2)
        finals.append(weights(net))
    assert same_weights(finals[0], finals[1])
    assert same_weights(finals[0], finals[2])


class Output(nn.Module):
    """Returns a loss only where it is given labels, as the models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        """Return loss and logits."""
        logits = self.layer(x)
        return {"loss": None if labels is None else cross_entropy(logits, labels), "logits": logits}


def test_a_batch_without_labels_for_a_model_that_computes_the_loss_says_so() -> None:
    """Not that a loss_fn is missing: it would miss the labels as well."""
    with pytest.raises(DataError, match=r"a mapping of 'x', has no 'labels'.*labels=input_ids for a language model"):
        Trainer(progress=False).fit(Output(), [{"x": X}], duration=1)


@pytest.mark.parametrize("error", [AttributeError, TypeError, RuntimeError])
def test_a_model_that_fails_on_the_whole_batch_is_explained(error: type[Exception]) -> None:
    """Whatever it raises: it was given the targets as well."""

    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            raise error("on purpose")

    with pytest.raises(error) as caught:
        Trainer(progress=False).fit(Fails(), [(X, Y)], duration=1)
    assert "passes the whole batch to the model" in caught.value.__notes__[0]


def test_a_loss_that_fails_says_what_it_was_given() -> None:
    """Shapes and dtypes of both; the error stays torch's own."""
    with pytest.raises(Exception, match="batch_size") as caught:
        Trainer_().fit(mlp(), [(X, Y[:5])], duration=1)
    note = "in loss_fn(outputs of shape (8, 2), torch.float32, targets of shape (5,), torch.int64)"
    assert note in caught.value.__notes__
