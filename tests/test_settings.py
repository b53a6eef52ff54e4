"""Arguments of the Trainer that no run could use: each is refused by name, with what to write."""

from __future__ import annotations

from functools import partial, wraps
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from helpers import loader, mlp
from thawline.engine import ArgumentError, Trainer
from thawline.engine.settings import can_call

Trainer_ = partial(Trainer, loss_fn=cross_entropy, optimizer=partial(torch.optim.SGD, lr=0.1), progress=False)
HUGE = [2**64, 10**30, 10**400, pytest.param(10**5000, id="10**5000")]


@pytest.mark.parametrize("value", [*HUGE, -1])
@pytest.mark.parametrize("name", ["seed", "accumulate", "microbatch_size"])
def test_whole_numbers_beyond_the_machine_are_refused(name: str, value: int) -> None:
    """The message shows the range, and can be shown whatever it got."""
    with pytest.raises(
        ArgumentError, match=rf"^Trainer\({name}=\) takes a whole number from \d to \d+.*Write: Trainer\("
    ):
        Trainer(**{name: value})


@pytest.mark.parametrize("value", [10**400, float("inf"), float("nan"), -1, "0"])
def test_a_floor_that_is_no_finite_rate_is_refused(value: Any) -> None:
    """A whole number too large for a float is as infinite as any."""
    with pytest.raises(ArgumentError, match=r"^Trainer\(min_lr=\) takes a finite number"):
        Trainer(min_lr=value)


@pytest.mark.parametrize("name", ["eval_every", "log_every"])
def test_intervals_beyond_all_training_are_refused(name: str) -> None:
    """The argument is named, not the Time inside it."""
    with pytest.raises(ArgumentError, match=rf"^Trainer\({name}=\) takes a time of at most"):
        Trainer(**{name: 10**400})


@pytest.mark.parametrize("duration", [10**16, 10**400, "1e400ba"])
def test_durations_beyond_all_training_are_refused(duration: Any) -> None:
    """Progress is a division by the duration."""
    with pytest.raises(ArgumentError, match=r"^Trainer.fit\(duration=\) takes a time above zero, at most 1e\+15"):
        Trainer_().fit(mlp(), loader(), duration=duration)


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_every_seed_that_torch_takes_trains_and_resumes(seed: int, tmp_path: Any) -> None:
    """The largest ones too, through NumPy's generator and a checkpoint."""
    trainer = Trainer_(seed=seed, run_dir=tmp_path)
    trainer.fit(mlp(), loader(), duration=1)
    assert trainer.fit(mlp(), loader(), duration=2, resume=True).clock.epoch == 2


@pytest.mark.parametrize("path", ["a\0b", "runs/\ud800"])
def test_paths_that_no_file_system_has_are_refused(path: str) -> None:
    """NUL and lone surrogates never reach the system."""
    with pytest.raises(ArgumentError, match=r"^Trainer\(run_dir=\) takes a path"):
        Trainer(run_dir=path)
    with pytest.raises(ArgumentError, match=r"^Trainer.fit\(resume=\) takes a path .* Write: trainer.fit\("):
        Trainer_().fit(mlp(), loader(), duration=1, resume=path)


def test_an_empty_path_to_resume_from_is_refused() -> None:
    """It would mean the working directory."""
    with pytest.raises(ArgumentError, match=r"resume=\) takes a path .* got ''"):
        Trainer_().fit(mlp(), loader(), duration=1, resume="")


@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_a_device_without_numbers_is_refused(device: Any) -> None:
    """On meta nothing is computed."""
    with pytest.raises(ArgumentError, match=r"^Trainer\(device=\) takes a device that holds numbers.*Write: .*'auto'"):
        Trainer(device=device)


def test_a_lazy_model_is_to_see_a_batch_first() -> None:
    """Its parameters have no shape yet; an evaluation, whose forward gives them one, is fine."""
    net = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ArgumentError, match=r"^Trainer.fit\(model=\).*'0.weight'.*Write: model\(inputs\) once"):
        Trainer_().fit(net, loader(), duration=1)
    Trainer_().evaluate(net, loader())
    assert Trainer_().fit(net, loader(), duration=1).clock.batch == 4


@pytest.mark.parametrize("call", ["fit", "evaluate"])
def test_a_model_on_meta_is_to_be_given_weights(call: str) -> None:
    """Parameters and buffers alike."""
    arguments: dict[str, Any] = {"duration": 1} if call == "fit" else {}
    for net in (nn.Linear(4, 2, device="meta"), nn.Sequential(mlp(), nn.BatchNorm1d(2, affine=False, device="meta"))):
        with pytest.raises(ArgumentError, match=rf"^Trainer.{call}\(model=\).*device 'meta'.*Write: model.to_empty"):
            getattr(Trainer_(), call)(net, loader(), **arguments)


@pytest.mark.parametrize(
    ("loss_fn", "advice"),
    [
        (nn.CrossEntropyLoss, r"Trainer\(loss_fn=torch.nn.CrossEntropyLoss\(\)\)"),
        ("mse_loss", r"Trainer\(loss_fn=torch.nn.functional.mse_loss\)"),
        ("unheard_of", r"Trainer\(loss_fn=torch.nn.functional.cross_entropy\)"),
        (lambda outputs: outputs.sum(), r"Trainer\(loss_fn=torch.nn.functional.cross_entropy\)"),
        (cross_entropy(torch.zeros(1, 2), torch.zeros(1).long()), r"Trainer\(loss_fn=torch"),
    ],
)
def test_a_loss_that_cannot_be_called_says_what_to_write(loss_fn: Any, advice: str) -> None:
    """A class wants its brackets, a name its module."""
    with pytest.raises(
        ArgumentError, match=rf"^Trainer\(loss_fn=\) takes a function \(outputs, targets\).*Write: {advice}"
    ):
        Trainer(loss_fn=loss_fn)


@pytest.mark.parametrize(
    ("arguments", "takes"),
    [
        ({"forward_fn": nn.Linear}, r"forward_fn=\) takes a function \(model, batch\)"),
        ({"forward_fn": lambda batch: batch}, r"forward_fn=\) takes a function \(model, batch\)"),
        ({"loss_weight": lambda: 1.0}, r"loss_weight=\) takes a function \(batch\)"),
        ({"loss_weight": float}, r"loss_weight=\) takes a function \(batch\)"),
    ],
)
def test_functions_of_another_signature_are_refused(arguments: dict[str, Any], takes: str) -> None:
    """The names of their arguments are said."""
    with pytest.raises(ArgumentError, match=rf"^Trainer\({takes}"):
        Trainer(**arguments)


def test_what_can_be_called_is_asked_of_what_is_called() -> None:
    """Partials, modules, built-ins, and decorators that change the signature under the old name."""

    def one(outputs: Any) -> Any:
        return outputs

    @wraps(one)
    def two(outputs: Any, targets: Any) -> Any:
        return one(outputs), targets

    assert can_call(two, 2)
    assert can_call(max, 2)
    assert can_call(nn.CrossEntropyLoss(), 2)
    assert not can_call(nn.ReLU(), 2)
    assert can_call(partial(cross_entropy, label_smoothing=0.1), 2)
    assert not can_call(partial(one, None), 1)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("bfloat16", "bf16"), (torch.bfloat16, "bf16"), ("16-mixed", "fp16"), (torch.float16, "fp16"), ("FP32", "fp32")],
)
def test_another_name_of_a_precision_says_the_one_to_write(given: Any, meant: str) -> None:
    """As torch's dtypes and other trainers call it."""
    with pytest.raises(ArgumentError, match=rf"takes one of .*Write: Trainer\(precision='{meant}'\)"):
        Trainer(precision=given)


def test_what_compiles_is_named() -> None:
    """The whole model is not compiled: a thaw would compile it again."""
    with pytest.raises(ArgumentError, match=r"Trainer\(compile=\) takes False or 'blocks', got True"):
        Trainer(compile=True)


def test_a_wrong_loader_says_where_it_stands() -> None:
    """The example shows the loader that is wrong."""
    net, batches = nn.Linear(4, 2), [torch.zeros(2, 4)]
    with pytest.raises(ArgumentError, match=r"eval_loader=.*Write: trainer.fit\(model, train_loader, DataLoader\("):
        Trainer(progress=False).fit(net, batches, 3, duration=1)
    with pytest.raises(ArgumentError, match=r"Write: trainer.evaluate\(model, DataLoader\("):
        Trainer(progress=False).evaluate(net, 3)
