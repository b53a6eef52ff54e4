"""Keyword arguments that a call does not take: the error says what to write instead."""

from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from helpers import mlp
from thawline import algorithms, engine
from thawline.algorithms import GradClip, LayerThaw
from thawline.engine import ArgumentError, CallError, Event, Trainer, UnknownArgumentError
from thawline.engine.keywords import INSTEAD, LEDGER, explained

fit: Callable[..., Any] = Trainer().fit
plan: Callable[..., Any] = Trainer().plan
make: Callable[..., Any] = Trainer
NAMES = (
    {name: getattr(engine, name) for name in engine.__all__} | vars(algorithms) | {"torch": torch, "partial": partial}
)
START = "trainer.fit(model, train_loader, "


@pytest.mark.parametrize(
    ("call", "write"),
    [
        (lambda: make(lr=0.1), "Trainer(optimizer=partial(torch.optim.AdamW, lr=0.1))"),
        (lambda: make(epochs=5), START + "duration='5ep')"),
        (lambda: make(max_epochs="many"), START + "duration='3ep')"),
        (lambda: make(max_steps=200), START + "duration='200ba')"),
        (lambda: make(lr_scheduler=[1]), "Trainer(schedule=cosine())"),
        (lambda: make(duration="7ep"), START + "duration='7ep')"),
        (lambda: make(resume=True), START + "duration='3ep', resume=True)"),
        (lambda: make(algorithm=[]), "Trainer(algorithms=[])"),
        (lambda: make(learning_rates=0.1), "Trainer(optimizer=partial(torch.optim.AdamW, lr=0.1))"),
        (lambda: make(xyz=1), "help(Trainer)"),
        (lambda: fit(1, 2, epochs=4), START + "duration='4ep')"),
        (lambda: fit(1, 2, precision="bf16"), "Trainer(precision='bf16')"),
        (lambda: fit(1, 2, duration=1, layer={"head": "fc"}), "trainer.fit(layers=…)"),
        (lambda: fit(1, val_loader=2), "trainer.fit(model, train_loader, eval_loader, duration='3ep')"),
        (lambda: plan(1, 2, resume="runs/a"), START + "duration='3ep', resume='runs/a')"),
        (lambda: LayerThaw(evry=3), "LayerThaw(every=3)"),  # type: ignore[call-arg]
        (lambda: GradClip(norm=1.0), "GradClip(max_norm=1.0)"),  # type: ignore[call-arg]
        (lambda: GradClip(x=1.0), "help(GradClip)"),  # type: ignore[call-arg]
    ],
)
def test_an_unknown_keyword_is_answered_with_what_to_write(call: Callable[[], object], write: str) -> None:
    """In thawline's words, also where other arguments are wrong or missing; it is Python's TypeError as well."""
    with pytest.raises(UnknownArgumentError) as caught:
        call()
    assert caught.value.example == write
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, ArgumentError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    ("call", "problem", "write"),
    [
        (lambda: fit(1, 2), "trainer.fit(duration=) is missing", START + "duration='3ep')"),
        (lambda: fit(1, duration=3), "trainer.fit(train_loader=) is missing", START + "duration='3ep')"),
        (lambda: fit(train_loader=1), "trainer.fit(model=) is missing", START + "duration='3ep')"),
        (
            lambda: fit(1, 2, 3, "2ep"),
            "trainer.fit takes keywords after eval_loader, got '2ep'",
            START + "duration='3ep')",
        ),
        (lambda: plan(1, 2), "trainer.plan(duration=) is missing", "trainer.plan(model, train_loader, duration='3ep')"),
        (lambda: make().evaluate(1), "trainer.evaluate(loader=) is missing", "trainer.evaluate(model, loader)"),
        (lambda: make([]), "Trainer takes keywords only, got []", "Trainer(algorithms=[LayerThaw(every=2)])"),
    ],
)
def test_an_argument_that_is_missing_or_out_of_place_is_answered_with_a_call(
    call: Callable[[], object], problem: str, write: str
) -> None:
    """A typed error, before anything else is looked at; it is Python's TypeError as well."""
    with pytest.raises(CallError) as caught:
        call()
    assert str(caught.value).startswith(problem)
    assert caught.value.example == write
    assert isinstance(caught.value, (TypeError, ArgumentError))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("name", INSTEAD)
def test_what_other_trainers_call_otherwise_is_no_argument_here_and_has_an_answer_that_works(name: str) -> None:
    """What is to be given to the Trainer can be, and what is to be given to fit is taken by its signature."""
    with pytest.raises(UnknownArgumentError) as caught:
        make(**{name: 0.5 if name == "warmup_ratio" else (0.9, 0.9) if name == "betas" else 2})
    write = caught.value.example
    if "[…]" in write:
        return
    if write.startswith("Trainer("):
        assert isinstance(eval(write.replace("run_dir=2", "run_dir='2'"), dict(NAMES)), Trainer)
    else:
        taken: Callable[..., Any] = inspect.signature(Trainer.fit).bind
        bound = eval(
            write.replace("trainer.fit(", "taken(None, "),
            {
                "taken": taken,
                "model": 1,
                "train_loader": 2,
                "eval_loader": 3,
                "dataset": [1],
                "DataLoader": torch.utils.data.DataLoader,
            },
        )
        assert engine.Time(bound.arguments["duration"])


def test_signatures_stay() -> None:
    """A reader, and an editor, see the arguments and not a pair of stars."""
    assert list(inspect.signature(Trainer).parameters)[:2] == ["algorithms", "optimizer"]
    assert list(inspect.signature(Trainer.fit).parameters)[:4] == ["self", "model", "train_loader", "eval_loader"]


def test_a_type_error_of_the_function_itself_is_its_own() -> None:
    """Only the call is looked at."""

    class Doubler:
        @explained("double", "double(2)")
        def double(self, x: Any) -> Any:
            return 2 * x + "text"

    with pytest.raises(TypeError, match="unsupported operand") as caught:
        Doubler().double(x=1)
    assert not isinstance(caught.value, ArgumentError)


on: Callable[..., Any] = engine.on


def ledger() -> Any:
    """Return the ledger of a small model."""
    model = mlp()
    return engine.ParameterLedger(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: on(Event.EPOCH_END, evry="2ep"),
            "on takes no 'evry', only every, stage; got '2ep'. Write: on(every='2ep')",
        ),
        (lambda: ledger().freeze("head"), "ledger.freeze(owner=) is missing. Write: ledger.freeze('head', owner='me')"),
        (lambda: ledger().thaw("head", "me"), "ledger.thaw takes keywords after select, got 'me' without one."),
        (lambda: ledger().freeze("head", ownr="me"), "ledger.freeze takes no 'ownr'"),
        (lambda: ledger().scale("head", owner="me"), "ledger.scale(factor=) is missing."),
        (lambda: ledger().attach("0", "lora", rank=2), "ledger.attach(owner=) is missing."),
    ],
)
def test_on_and_the_ledger_say_what_to_write(call: Callable[[], Any], said: str) -> None:
    """Where a keyword is misspelled or left out."""
    with pytest.raises((CallError, UnknownArgumentError), match=re.escape(said)):
        call()


def test_the_calls_of_the_ledger_that_are_written_there_are_correct() -> None:
    """Each of them can be made."""
    for name, arguments in LEDGER.items():
        mine = ledger()
        if name == "detach":
            eval(f"mine.attach({LEDGER['attach']})", {"mine": mine, "name": "0"})
        eval(f"mine.{name}({arguments})", {"mine": mine, "name": "0"})
