"""The checks of the conformance kit that look at how fits end, and at their lengths and numbers."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .algorithm import Algorithm
from .batches import batch_size_of
from .engine import Engine
from .errors import LedgerError
from .events import Event
from .ledger import ParameterLedger
from .promises import Check, check, fail, same, unless_alone
from .randomness import Randomness
from .rehearsal import LIVE_EVENTS, Rehearsal, copied, cut, in_float64, quiet, weights_of
from .state import State
from .surroundings import Opened

# -- ending ------------------------------------------------------------------------------------------------------------


def _marks(model: nn.Module, leave_out: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Return what could be left on a model: hooks, attributes, classes, modes, gradients, flags."""
    marks: dict[str, Any] = {}
    for name, module in model.named_modules():
        inside = vars(module)
        marks[f"hooks of {name or 'the model'}"] = {
            key: len(value) for key, value in inside.items() if "hooks" in key and isinstance(value, dict)
        }
        marks[f"mode of {name or 'the model'}"] = module.training
        # What is attached is recorded on the model itself, too.
        if not (leave_out and not name) and not any(name == each or name.startswith(f"{each}.") for each in leave_out):
            marks[f"attributes of {name or 'the model'}"] = sorted(inside)
            marks[f"class of {name or 'the model'}"] = type(module).__qualname__
            for own, parameter in module.named_parameters(recurse=False):
                hooks = [len(getattr(parameter, key, None) or ()) for key in _PARAMETER_HOOKS]
                state = {"hooks": hooks, "requires_grad": parameter.requires_grad, "grad": parameter.grad is not None}
                marks[f"parameter {name}.{own}".replace(" .", " ")] = state
    return marks


_PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_REMOVE = (
    "Remove in close() what attach() set up; it is called after errors too. What is to stay, ledger.attach() attaches."
)


_CLOSE = "Close and stop in close() what attach() opened and started, and put back what it set; it is called after errors too."


def _check_process(rehearsal: Rehearsal, before: Opened, when: str) -> None:
    """Fail where the last fit left something in the process."""
    if left := before.left():
        fail(f"{rehearsal.name} leaves {left} in the process {when}. {_CLOSE}")
    if rehearsal.changed:
        fail(f"{rehearsal.name} leaves {rehearsal.changed[0]} changed {when}. {_CLOSE}")


@check
def leaves_nothing_behind(rehearsal: Rehearsal) -> None:
    """After the fit there is no hook, attribute, mode or flag on the model, and no file, thread or handler, that was not before."""
    _ = rehearsal.whole  # what a loader, a model or a library opens once, it keeps
    model, before = rehearsal.model(), _marks(rehearsal.model())
    algorithms, opened = rehearsal.make(), Opened.now()
    with tempfile.TemporaryDirectory() as folder:
        outcome, _ = rehearsal.saved(Path(folder) / "run", every="4ba", algorithms=algorithms, model=model)
    _check_process(rehearsal, opened, "after the fit")
    after = _marks(model, outcome.journal)
    same(
        {key: before[key] for key in after if key in before}, {key: after[key] for key in after if key in before}, "the model",
        f"{rehearsal.name} leaves something on the model after the fit. {_REMOVE}",
    )  # fmt: skip
    for each in algorithms:
        each.close()


@check
def survives_an_exception(rehearsal: Rehearsal) -> None:
    """An exception at any event leaves ledger and live weights as they were then, and nothing on the model or in the process."""
    before = _marks(rehearsal.model())
    kinds = dict.fromkeys(event for event, *_ in rehearsal.whole.events)
    opened = Opened.now()
    for event in kinds:
        algorithms = rehearsal.make()  # held until the process was looked at: what they hold open is open
        times = 1 + (sum(each is event for each, *_ in rehearsal.whole.events) > 1)
        _explode(rehearsal, algorithms, event, times, before)
        _check_process(rehearsal, opened, f"after an exception at {event.name}")


# An algorithm may train at other weights than it steps from, as sharpness-aware minimization does: both are live.
_AT_REST = frozenset({Event.FIT_START, Event.EPOCH_START, Event.AFTER_STEP, Event.BATCH_END, Event.EPOCH_END})


class _Boom(Exception):  # noqa: N818 - no error of anybody's
    """Raised on purpose."""


def _look(then: dict[str, Any]) -> None:
    """Look at the ledger when a fit closes; one that ended before the exception says by itself why."""
    if not then:
        return
    try:
        then["ledger"].verify()
        then["moved"] = then["ledger"].digest() != then["digest"]
    except LedgerError as error:
        then["broken"] = error


def _explode(
    rehearsal: Rehearsal, algorithms: list[Algorithm], at: Event, times: int, before: Mapping[str, Any]
) -> None:
    """Let a fit end with an exception at the ``times``-th event of a kind, and look at what it leaves."""
    model, left = rehearsal.model(), times
    live: dict[str, Tensor] = {}
    rested: dict[str, Tensor] = {}
    then: dict[str, Any] = {}
    journal: set[str] = set()

    def explode(event: Event, state: State) -> None:
        nonlocal left
        if event in LIVE_EVENTS and event is not Event.FIT_ABORT:
            live.clear()
            live.update(weights_of(state.model))
        if event in _AT_REST:
            rested.clear()
            rested.update(live)
        left -= event is at
        if event is at and not left:
            journal.update(entry.module for entry in state.ledger.journal)
            then.update(ledger=state.ledger, digest=state.ledger.digest())
            raise _Boom

    where = f"{rehearsal.name}: after an exception at {at.name}"
    try:
        rehearsal.fit(algorithms, model=model, probe=explode, closing=partial(_look, then))
    except _Boom as error:
        if failed := [note for note in getattr(error, "__notes__", ()) if "failed as well" in note]:
            then["failed"] = failed[0]
    else:
        if not then:
            fail(
                f"{rehearsal.name}: {at.name} comes at other times in a second fit. Draw from the given generators alone."
            )
        fail(f"{where}, the fit goes on. Do not catch what is not yours.")
    if "broken" in then:
        fail(
            f"{where} the ledger is not valid: {then['broken']} Change it through the ledger, at open events; not at FIT_ABORT."
        )
    if then["moved"]:
        fail(f"{where} the ledger was changed. At FIT_ABORT it is closed: only put back what is the model's.")
    if "failed" in then:
        fail(
            f"{where} the end fails too: {then['failed']}. At FIT_ABORT and in close(), count on nothing that was set up."
        )
    mend = "Put live weights back at FIT_ABORT and in close()."
    now = weights_of(model)
    expected = live | {name: each for name, each in rested.items() if name in now and torch.equal(now[name], each)}
    same(expected, now, "weights", f"{where} the model does not hold the live weights. {mend}")
    after = _marks(model, frozenset(journal))
    known = {key: after[key] for key in after if key in before}
    same({key: before[key] for key in known}, known, "the model", f"{where} something is left on the model. {_REMOVE}")


# -- lengths and numbers -----------------------------------------------------------------------------------------------


@check
def takes_short_fits(rehearsal: Rehearsal) -> None:
    """A fit that ends before its first batch, and one of a single batch, work."""
    model, algorithms = rehearsal.model(), rehearsal.make()
    ledger = ParameterLedger(model, partial(torch.optim.SGD, lr=0.1))
    state = State(model, ledger, duration="1ba", seed=rehearsal.seed)
    with Randomness().kept(), quiet(), Engine(algorithms, state, debug=True) as engine:
        engine.emit(Event.FIT_START)
        saved = copied(engine.state_dict())
        engine.emit(Event.FIT_END)
    again = Engine(rehearsal.make(), state)
    again.load_state_dict(saved)
    same(saved, again.state_dict(), "state", f"{rehearsal.name}: state_dict() after load_state_dict() is another one.")
    rehearsal.fit(duration="1ba", debug=True)


@check
def trains_in_bf16(rehearsal: Rehearsal) -> None:
    """Under bf16 autocast the fit works, resumes, and keeps finite weights of their own dtypes."""
    kinds = {name: each.dtype for name, each in rehearsal.model().named_parameters()}
    model = rehearsal.model()
    with tempfile.TemporaryDirectory() as folder:
        whole, paths = rehearsal.saved(Path(folder) / "run", every="2ba", model=model, precision="bf16", debug=True)
        resumed = rehearsal.fit(resume=paths[(len(paths) - 1) // 2], precision="bf16")
    known = {key: each for key, each in whole.result.items() if key in resumed.result}
    what = f"{rehearsal.name}: resumed under bf16, the fit does not go on as it was."
    same(known, resumed.result, "the fit", what)
    for name, each in model.named_parameters():
        if not bool(torch.isfinite(each).all()):
            fail(
                f"{rehearsal.name}: {name!r} is not finite after a fit in bf16. Compute norms and averages in float32."
            )
        if each.dtype is not kinds.get(name, each.dtype):
            fail(
                f"{rehearsal.name}: {name!r} became {each.dtype} in a bf16 fit. Write values with copy_(), not new tensors."
            )


@check
def does_not_count_microbatches(rehearsal: Rehearsal) -> None:
    """One batch, the same in four parts with accumulate=4, and sample by sample give the same updates (float64, up to rounding)."""
    if_parts_add_up(rehearsal, _cut_up)


def _cut_up(rehearsal: Rehearsal) -> None:
    """Hold fits of batches in parts against one of whole batches."""
    batches = rehearsal.batches()
    parts = [part for batch in batches for part in cut(batch, 4)]
    wholes = [part for batch in batches for part in cut(batch, 1) if cut(batch, 4)]
    if not parts:
        fail(
            "no batch of the loader can be cut into four. Give check_algorithm(loader=) batches of 4, 8 or 16 samples."
        )
    whole = end_in_float64(rehearsal, wholes)
    quartered = end_in_float64(rehearsal, parts, accumulate=4)
    single = end_in_float64(rehearsal, wholes, microbatch_size=1)
    for cut_into, end in (("in four parts", quartered), ("sample by sample", single)):
        same(
            whole, end, "the fit",
            f"{rehearsal.name}: a batch {cut_into} gives other updates than the batch at once. Microbatch events come several "
            "times a step: count steps at BATCH_END or with state.clock, and read gradients at BEFORE_STEP, where they are whole. "
            "For one that looks at the samples of a part together, as mixup does: check_algorithm(accumulates=False).",
            tolerance=1e-7,
        )  # fmt: skip


@check
def repeats_what_does_not_fit(rehearsal: Rehearsal) -> None:
    """A batch that runs out of memory is done again in smaller microbatches, and counts once (float64, up to rounding)."""
    if_parts_add_up(rehearsal, _cramp)


def _cramp(rehearsal: Rehearsal) -> None:
    """Hold a fit of batches that do not fit against one of those that do."""
    batches = rehearsal.batches_in_float64()
    largest = max(map(batch_size_of, batches))

    def refuse(module: nn.Module, *given: Any) -> None:
        if module.training and batch_size_of(given) > largest / 2:
            raise torch.OutOfMemoryError("of the kit's own making")

    same(
        end_in_float64(rehearsal, batches), end_in_float64(rehearsal, batches, refuse), "the fit",
        f"{rehearsal.name}: where a batch does not fit and is done again in smaller parts, the fit is another one. The events of a "
        "microbatch come for what is given up, too: keep nothing from BEFORE_FORWARD to AFTER_BACKWARD that is not begun anew at BATCH_START.",
        tolerance=1e-7,
    )  # fmt: skip


def if_parts_add_up(rehearsal: Rehearsal, function: Check) -> None:
    """Run a part of a check where microbatches claim to be worth their batch; statistics and dropout of a batch are not those of its parts."""
    if rehearsal.accumulates and not any(hasattr(each, "running_mean") for each in rehearsal.model().modules()):
        try:
            unless_alone(rehearsal, function)
        except Exception:
            if not _draws_in_forward(rehearsal):  # such as the dropout of what was attached
                raise


def _draws_in_forward(rehearsal: Rehearsal) -> bool:
    """Return whether a forward pass draws random numbers from torch's global generator."""
    before, drawn = torch.get_rng_state(), False

    def look(event: Event, _: State) -> None:
        nonlocal before, drawn
        if event is Event.BEFORE_FORWARD:
            before = torch.get_rng_state()
        elif event is Event.AFTER_FORWARD:
            drawn |= not torch.equal(before, torch.get_rng_state())

    end_in_float64(rehearsal, rehearsal.batches_in_float64(), probe=look)
    return drawn


def end_in_float64(rehearsal: Rehearsal, loader: list[Any], hook: Any = None, **cuts: Any) -> dict[str, Any]:
    """Return what a fit without dropout comes to in float64; a hook is called before each forward pass."""
    model = _without_dropout(rehearsal.model().double())
    if hook is not None:
        model.register_forward_pre_hook(hook, with_kwargs=True)
    optimizer, loss_fn = partial(torch.optim.SGD, lr=0.05, momentum=0.9), in_float64(rehearsal.loss_fn)
    outcome = rehearsal.fit(model=model, loader=loader, optimizer=optimizer, loss_fn=loss_fn, eval_every="1ep", **cuts)
    return outcome.result


def _without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name in ("p", "dropout"):
            if isinstance(getattr(module, name, None), float):
                object.__setattr__(module, name, 0.0)
    return model
