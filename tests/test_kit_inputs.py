"""The conformance kit and what users give it: models, batches, losses and functions of any kind, and what algorithms leave behind."""

from __future__ import annotations

import importlib
import re
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, IterableDataset

from broken_algorithms import Deaf, Leaking
from thawline.algorithms import GradClip, TrainOnly
from thawline.engine import Algorithm, ArgumentError, Event, ParameterLedger, State, on
from thawline.engine.bearer import Bearer, of_every_type
from thawline.engine.surroundings import Opened, settings_kept
from thawline.engine.testing import ConformanceError, check_algorithm, tiny_models
from thawline.engine.unaided import outputs_with

AUDITS = ["follows_from_its_calls", "learns_from_its_loss", "steps_as_torch_does", "keeps_true_records"]
NUMBERS = torch.Generator().manual_seed(5)


def labels(*shape: int) -> Tensor:
    """Return random labels of five classes."""
    return torch.randint(5, shape, generator=NUMBERS)


def body(*inputs: nn.Module) -> nn.Sequential:
    """Return a small classifier of three numbers, with modules before it."""
    return nn.Sequential(*inputs, nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))


PAIRS = [(torch.randn(8, 3, generator=NUMBERS), labels(8)) for _ in range(3)]
WEIGHTS = torch.arange(1.0, 6.0)


class Vectors(nn.Module):
    """Parameters of its own, and no module with any."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale + self.shift).sum(1)


class One(nn.Module):
    """One parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale).sum(1)


class WithLoss(nn.Module):
    """Computes its loss itself, and returns what it makes of it."""

    def __init__(self, made: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.made = body(), made

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        hidden = self.body(x)
        return self.made(cross_entropy(hidden, labels), hidden)


class Narrow(nn.Module):
    """Computes in float32 whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.body = body()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).float()


class Rounding(Narrow):
    """Rounds its outputs, and passes gradients straight through."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        return out + (torch.round(out) - out).detach()


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Samples in turn."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in PAIRS:
            yield from zip(x, y, strict=True)


def numbers(samples: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Return three batches of three numbers, and one as the target."""
    return [(torch.randn(samples, 3, generator=NUMBERS), torch.randn(samples, generator=NUMBERS)) for _ in range(3)]


GIVEN: dict[str, dict[str, Any]] = {
    "vectors alone": {"model": Vectors, "loader": numbers(), "loss_fn": mse_loss},
    "one parameter": {"model": One, "loader": numbers(), "loss_fn": mse_loss},
    "a module under two names": {"model": tiny_models()["shared"]},
    "a loss of its own": {"model": partial(WithLoss, lambda loss, _: loss), "loss_fn": None},
    "an object as output": {"model": partial(WithLoss, lambda loss, x: SimpleNamespace(loss=loss, x=x)), "loss_fn": None},
    "mappings": {
        "model": partial(WithLoss, lambda loss, x: {"loss": loss, "cache": object(), "x": x}),
        "loader": [{"x": x, "labels": y} for x, y in PAIRS],
        "loss_fn": None,
    },
    "weights of classes": {"model": body, "loss_fn": nn.CrossEntropyLoss(weight=WEIGHTS)},
    "weights in a partial": {"model": body, "loss_fn": partial(cross_entropy, weight=WEIGHTS)},
    "float32 inside": {"model": Narrow},
    "no true gradient": {"model": Rounding},
    "power iteration": {"model": lambda: body(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)))},
    "an iterable": {"model": body, "loader": DataLoader(Stream(), batch_size=8)},
    "unequal sizes": {"model": body, "loader": [(torch.randn(size, 3, generator=NUMBERS), labels(size)) for size in (8, 5, 4)]},
}  # fmt: skip


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_a_model_a_loader_or_a_loss_is_no_fault_of_the_algorithm(given: dict[str, Any]) -> None:
    """Whatever a Trainer takes, an algorithm that keeps its promises passes on."""
    known = {} if given.get("model") is tiny_models()["shared"] else {"loader": PAIRS}
    checks = [
        *AUDITS,
        "has_true_gradients",
        "does_not_count_microbatches",
        "repeats_what_does_not_fit",
        "keeps_the_ledger_whole",
        "resumes",
    ]
    check_algorithm(partial(GradClip, 1.0), **(known | given), partners=[], checks=checks)


WRONG: dict[str, list[dict[str, Any]]] = {
    "@on(Event.BATCH_END) above def": [{"factory": lambda state: None}],
    "@staticmethod above def": [{"factory": lambda self: repair()}],
    "check_algorithm(lambda: GradClip(…))": [{"factory": GradClip(1.0)}, {"factory": partial(lambda made: made, GradClip(1.0))}],
    "check_algorithm(lambda: TrainOnly(select=…))": [{"factory": TrainOnly}],
    "GradClip(max_norm=1.0)": [{"factory": GradClip}],  # its own words
    "model=lambda: ": [{"model": given} for given in (One(), nn.Linear, lambda: None, partial(lambda one: one, One()))],
    "seed=1": [{"seed": "a"}, {"seed": -1}],
    "partners=[": [{"partners": given} for given in (GradClip, [GradClip(1.0)], [None], [nn.Linear], [lambda: 3])],
    "=True": [{"thorough": "no"}], "=False": [{"accumulates": 0}], "CrossEntropyLoss()": [{"loss_fn": nn.CrossEntropyLoss}],
}  # fmt: skip


@pytest.mark.parametrize(("write", "given"), [(write, each) for write, these in WRONG.items() for each in these])
def test_a_wrong_argument_is_no_fault_of_the_algorithm(write: str, given: dict[str, Any]) -> None:
    """It is refused before any check runs, with what to write instead."""
    with pytest.raises(ArgumentError, match=f"Write: .*{re.escape(write)}"):
        check_algorithm(**({"factory": partial(GradClip, 1.0)} | given))


def test_a_second_pass_leaves_a_shared_module_with_its_own_tensors() -> None:
    """Torch's functional call would leave those of the call in a module that has two names."""
    model = tiny_models()["shared"]()
    own = {id(each) for each in model.parameters()}
    zeros = {name: torch.zeros_like(each) for name, each in model.named_parameters()}
    out = outputs_with(model, zeros, (torch.randn(2, 4), labels(2)), has_loss=True)
    assert not out.any()
    assert {id(each) for each in model.parameters()} == own


def test_what_was_held_in_eval_mode_altogether_trains_on() -> None:
    """The mode of the model itself is its caller's: it goes by no hold."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2))
    ledger = ParameterLedger(model, partial(torch.optim.SGD, lr=0.1))
    ledger.freeze("*", owner="test", mode="eval")
    assert [each.training for each in model] == [False, False, False]
    ledger.thaw("*", owner="test")
    assert [model.training, *(each.training for each in model)] == [True] * 4


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_a_small_part_of_a_gradient_is_missed() -> None:
    """A thousandth of the gradient of one number is found, and the message says how to leave the check out."""
    with pytest.raises(ConformanceError, match="leave this check out: checks=CHECKS.keys") as caught:
        check_algorithm(Leaking, partners=[], checks=["has_true_gradients"])
    assert "Leaking: in batch" in str(caught.value)


# -- examples ----------------------------------------------------------------------------------------------------------

STALE = '''
"""A module."""
from thawline.engine import Event, on

@on(Event.BATCH_END)
def note(state):
    """Log a number.

    >>> sorted(note.events)
    []
    """
    state.log({"number": 1.0})
'''


def test_the_examples_of_a_function_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of one parameter is wrapped by the engine, whose examples are not what is asked for."""
    (tmp_path / "kit_stale.py").write_text(STALE)
    monkeypatch.syspath_prepend(tmp_path)
    kit_stale = importlib.import_module("kit_stale")
    with pytest.raises(ConformanceError, match=r"note: an example in the docstring of kit_stale\.note") as caught:
        check_algorithm(kit_stale.note, checks=["does_as_its_examples_say"])
    assert "# doctest: +SKIP" in str(caught.value)


PACKAGE = {
    "shared": "def anyone():\n    pass",
    "parts": "def built():\n    pass",
    "mine": """
        from thawline.engine import Algorithm
        from .parts import built
        from .shared import anyone

        class Mine(Algorithm):
            '''Does nothing.'''
        """,
    "other": """
        from thawline.engine import Algorithm
        from .shared import anyone

        class Other(Algorithm):
            '''Does nothing.'''
        """,
}


@pytest.mark.parametrize(
    ("imports", "is_run"),
    [
        ("from .mine import Mine", True),
        ("from .parts import built", True),
        ("from .shared import anyone", False),
        ("from .mine import Mine; from .other import Other", False),
        ("from thawline.algorithms import GradClip", False),
    ],
)
def test_the_examples_of_what_builds_on_an_algorithm_are_run(
    imports: str, is_run: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module beside it that imports it, or what it alone imports; not one of several algorithms, or of none."""
    package = "kit_package"
    (tmp_path / package).mkdir()
    for name, text in PACKAGE.items():
        (tmp_path / package / f"{name}.py").write_text(textwrap.dedent(text))
    (tmp_path / package / "files.py").write_text(f"{imports}\n\ndef save():\n    '''\n    >>> 1 + 1\n    3\n    '''\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        mine, _ = (importlib.import_module(f"{package}.{name}").__dict__[name.title()] for name in ("mine", "other"))
        check_algorithm(mine, checks=["does_as_its_examples_say"])
        importlib.import_module(f"{package}.files")
        if not is_run:
            check_algorithm(mine, checks=["does_as_its_examples_say"])
            return
        with pytest.raises(ConformanceError, match=r"Mine: an example in the docstring of kit_package\.files\.save"):
            check_algorithm(mine, checks=["does_as_its_examples_say"])
        # A list of several leaves it to the check of each.
        check_algorithm(lambda: [mine(), GradClip(1.0)], checks=["does_as_its_examples_say"])
    finally:
        for name in [each for each in sys.modules if each.partition(".")[0] == package]:
            del sys.modules[name]


def test_a_class_inside_a_function_is_documented_by_itself() -> None:
    """Its example knows its name, and one that is wrong is found."""

    class Local(Algorithm):
        """Does nothing.

        >>> Local().describe()
        {'name': 'Local',
         'arguments': {}}
        """

    check_algorithm(Local, checks=["does_as_its_examples_say"])
    Local.__doc__ = ">>> Local().describe()['name']\n'Remote'"
    with pytest.raises(ConformanceError, match="in the docstring of Local"):
        check_algorithm(Local, checks=["does_as_its_examples_say"])


def test_a_module_that_is_not_listed_has_no_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that was run from a text, as some notebooks do, is passed over."""

    class Loose(Algorithm):
        """Does nothing.

        >>> 1 + 1
        3
        """

    monkeypatch.setattr(Loose, "__module__", "kit_gone")
    assert "kit_gone" not in sys.modules
    check_algorithm(Loose, checks=["does_as_its_examples_say"])


# -- what is left ------------------------------------------------------------------------------------------------------


class Writing(Algorithm):
    """Writes to a file and beside it works in a thread, and ends both in close()."""

    events = frozenset({Event.BATCH_END, Event.FIT_END})
    thread: threading.Thread | None = None

    def __init__(self) -> None:
        self.ended = threading.Event()

    def attach(self, state: State) -> None:
        self.file = Path("/dev/null").open("w")  # noqa: SIM115 - closed in close()
        self.thread = threading.Thread(target=self.ended.wait, name="writer")
        self.thread.start()

    def apply(self, event: Event, state: State) -> None:
        print(state.clock.batch, file=self.file)

    def close(self) -> None:
        if self.thread is not None:
            self.ended.set()
            self.thread.join()
            self.file.close()


class Relying(Writing):
    """Relies on FIT_END to close its file."""

    def attach(self, state: State) -> None:
        self.file = Path("/dev/null").open("w")  # noqa: SIM115 - closed at the end

    def apply(self, event: Event, state: State) -> None:
        if event is Event.FIT_END:
            self.file.close()


STOP = threading.Event()


class Unending(Writing):
    """Leaves its thread waiting, until the test has ended."""

    def attach(self, state: State) -> None:
        threading.Thread(target=STOP.wait, name="writer", daemon=True).start()

    def apply(self, event: Event, state: State) -> None: ...


BEHIND = ["leaves_nothing_behind", "survives_an_exception"]


def test_threads_and_files_that_are_ended_in_close_are_no_fault() -> None:
    """They are gone after the fit, and after an exception too."""
    check_algorithm(Writing, partners=[], checks=BEHIND)


@pytest.mark.parametrize(
    ("kind", "check", "message"),
    [
        (Relying, BEHIND[1], "leaves the open file '/dev/null' in the process after an exception at FIT_START"),
        (Unending, BEHIND[0], "leaves the thread 'writer' in the process after the fit"),
        (Deaf, BEHIND[0], "leaves the handler of SIGTERM changed after the fit"),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file that nobody closes
def test_what_is_left_in_the_process_is_named(kind: type[Algorithm], check: str, message: str) -> None:
    """Also where the fits before have left the same, and the caller's settings are put back."""
    STOP.clear()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ConformanceError, match=message) as caught:
        check_algorithm(kind, partners=[], checks=[check])
    STOP.set()
    assert "in close()" in str(caught.value)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_others_close_meanwhile_is_no_fault(tmp_path: Path) -> None:
    """Of files and threads only what is new counts."""
    file = (tmp_path / "log").open("w")
    opened = Opened.now()
    file.close()
    assert opened.left() is None
    with (tmp_path / "other").open("w"), settings_kept() as changed:
        assert opened.left() == f"the open file {str(tmp_path / 'other')!r}"
    assert changed == []


# -- which fit ---------------------------------------------------------------------------------------------------------


@on(Event.BATCH_START)
def slow_down(state: State, owner: str) -> None:
    """Lowers the rate of the head by the epochs done, of which it counts on knowing the length."""
    state.ledger.scale("head", 0.5 ** (state.clock.batch // (state.clock.batches_per_epoch or 0)), owner=owner)


@on(Event.BEFORE_STEP)
def halve_unsized(state: State) -> None:
    """Halves the rates behind the ledger's back where an epoch has no length."""
    if not state.clock.batches_per_epoch:
        for group in state.optimizers[0].param_groups:
            group["lr"] /= 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (slow_down, r"ZeroDivisionError: .*slow_down, on batches without a length and with an optimizer instance\]"),
        (halve_unsized, "halve_unsized, on batches without a length and with an optimizer instance: in batch 0 the"),
    ],
)
def test_a_fault_of_the_second_audit_says_which_fit_it_was(kind: type[Algorithm], message: str) -> None:
    """One that is right where an epoch has a length."""
    with pytest.raises(ConformanceError, match=message):
        check_algorithm(kind, partners=[], checks=["follows_from_its_calls"])


@pytest.mark.parametrize("where", ["attach", "apply"])
def test_an_algorithm_for_its_own_model_is_not_blamed_on_other_models(where: str) -> None:
    """It looks for a block that other models lack, which is an error in its code and says nothing of what it promises."""

    class Particular(Algorithm):
        events = frozenset({Event.BATCH_END})

        def attach(self, state: State) -> None:
            if where == "attach":
                self.norm = state.model.blocks[0].norm

        def apply(self, event: Event, state: State) -> None:
            state.log({"scale": float(state.model.blocks[0].norm.weight.mean())})

    check_algorithm(Particular, checks=["takes_other_models"])


# -- faults ------------------------------------------------------------------------------------------------------------


@on(Event.AFTER_LOSS, Event.BEFORE_STEP)
def repair(state: State) -> None:
    """Makes finite what is not, so that no step is left out and no fit goes back."""
    state.loss = torch.nan_to_num(state.loss)
    for each in state.ledger.trainable_parameters:
        if each.grad is not None:
            torch.nan_to_num_(each.grad, 0.0, 0.0, 0.0)


@on(Event.FIT_START)
def refuse_others(state: State) -> None:
    """Takes one optimizer only, an AdamW of one group."""
    (first, *others) = state.optimizers
    if others or not isinstance(first, torch.optim.AdamW) or len(first.param_groups) > 1:
        raise ArgumentError("refuse_others", got=state.optimizers, takes="AdamW", example="Trainer(optimizer=AdamW)")


@pytest.mark.parametrize("kind", [repair, refuse_others])
def test_an_algorithm_that_lets_no_fit_go_back_is_not_blamed(kind: type[Algorithm]) -> None:
    """One that repairs what is not finite, and one that refuses other optimizers by a typed error."""
    check_algorithm(kind, checks=["recovers_from_faults"], thorough=True)


def test_steps_by_what_is_not_finite_are_found() -> None:
    """Though the algorithm hides from the engine what it steps by."""

    @on(Event.BEFORE_STEP)
    def hide(state: State) -> None:
        state.grad_norm = torch.tensor(1.0)

    with pytest.raises(
        ConformanceError, match=r"the optimizers have moved by gradients that are not finite, in batch \d"
    ):
        check_algorithm(hide, checks=["recovers_from_faults"])


@pytest.mark.parametrize("place", ["float", "text", "keys", "views", "bits"])
def test_state_that_comes_back_otherwise_is_found(place: str) -> None:
    """By its type, its order or its bits."""
    bearer = Bearer(opened=[0])
    saved = bearer.state_dict()
    with pytest.raises(AssertionError, match=f"another state.'{place}'"):
        bearer.load_state_dict(saved | {"borne": of_every_type(0) | {place: of_every_type(1)["live"]}})
    bearer.load_state_dict(saved)
