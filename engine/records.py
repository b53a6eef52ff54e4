"""The checks of the conformance kit that hold what a fit, a plan and an evaluation say against what was done."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .algorithm import evaluated_weights
from .errors import ArgumentError
from .events import Event
from .neighbor import Before
from .plan import Plan
from .promises import REFUSALS, check, fail, same
from .rehearsal import BY_TURNS, LIVE_EVENTS, Outcome, Rehearsal, quiet, weights_of
from .state import State
from .twin import meta_twin
from .unaided import is_hooked


@check
def is_recorded_as_it_happened(rehearsal: Rehearsal) -> None:
    """The fit's timeline has every step, with what the optimizers were to change in it, and at which rates."""
    whole = rehearsal.whole
    spans = whole.timeline.spans
    mend = (
        "Rates and what trains are the ledger's, from one open event to the next: ledger.set_lr, scale, freeze, thaw; "
        "optimizer.param_groups and requires_grad are only read."
    )
    edges = [each.start.batch for each in spans] + [each.end.batch for each in spans[-1:]]
    steps = [each.batch for each in whole.steps]
    must = list(range(edges[0], edges[-1])) if edges else []
    if any(first.end != second.start for first, second in pairwise(spans)) or steps != must:
        fail(f"{rehearsal.name}: the timeline's spans begin at the batches {edges}, and the steps are {steps}. {mend}")
    samples = {each.batch: each.rates for each in whole.timeline.samples}
    for step in whole.steps:
        span = next(each for each in spans if each.start.batch <= step.batch < each.end.batch)
        said = {
            "trainable": span.trainable,
            "layers": sorted(span.layers),
            "rates": samples.get(step.batch, step.rates),
        }
        done = {"trainable": step.trainable, "layers": sorted(step.rates), "rates": step.rates}
        if span.state_bytes is not None:
            said["state_bytes"], done["state_bytes"] = span.state_bytes, step.state_bytes
        same(
            said, done, f"batch {step.batch}",
            f"{rehearsal.name}: the step of batch {step.batch} is another one than the timeline says. {mend}", tolerance=1e-12,
        )  # fmt: skip


@check
def keeps_to_its_plan(rehearsal: Rehearsal) -> None:
    """A plan changes nothing; and a fit, also one that ends inside an epoch, is as planned, where the plan notes nothing that it cannot know."""
    keeps(rehearsal, rehearsal.duration, rehearsal.whole)
    for duration in ("20sp", "5ba"):
        try:
            fit = rehearsal.fit(duration=duration)
        except REFUSALS:  # times in epochs, say, which this duration does not relate
            continue
        keeps(rehearsal, duration, fit)


def keeps(rehearsal: Rehearsal, duration: str | int, fit: Outcome, *, counts: bool = True) -> None:
    """Hold a plan against the fit that it foresees; ``counts`` the operations too, where all batches are alike."""
    algorithms, model = rehearsal.make(), rehearsal.model()
    before = {"weights": weights_of(model), "algorithms": [each.state_dict() for each in algorithms]}
    trainer = rehearsal.trainer(algorithms)
    try:
        with quiet():
            plan = trainer.plan(model, rehearsal.loader, duration=duration, optimizer=rehearsal.optimizer(model))
    except ArgumentError as error:
        if error.argument.startswith("Trainer.plan("):  # this model cannot be copied, or this loader has no length
            return
        raise
    after = {"weights": weights_of(model), "algorithms": [each.state_dict() for each in algorithms]}
    same(
        before, after, "it", f"{rehearsal.name}: a plan changes something. Keep nothing on the class or in the module."
    )
    for what, told in (("plan", plan), ("timeline", fit.timeline)):
        lines = [line for line in str(told).splitlines() if not line.startswith("Note: ")]
        if Plan.from_json(json.loads(json.dumps(told.to_json()))) != told or len(lines) != len(told.spans) + 1:
            fail(
                f"{rehearsal.name}: the {what} is not what its JSON or its table says. Log and name layers in plain text."
            )
    for each in algorithms:
        if (words := each.unplanned()) and not any(words in note for note in plan.notes):
            fail(f"{rehearsal.name}: the plan does not say that {each.owner} {words}, as its unplanned() does.")
    if not plan.notes:
        if counts and _is_countable(rehearsal, model) and not any(_COMPUTING & set(each.events) for each in algorithms):
            _check_work(rehearsal, plan, duration)
        same(
            list(plan.spans), fit.result[BY_TURNS], "the spans",
            f"{rehearsal.name}: a fit of {duration} is not as planned, and the plan does not say so. What the clock does not decide, say in "
            "unplanned(); what trains is decided in the stages SURGERY, TRAINABILITY and CONTROL, which a plan runs.",
        )  # fmt: skip


# Who acts there may compute something of its own, which a plan does not know of.
_COMPUTING = {Event.BEFORE_FORWARD, Event.AFTER_FORWARD, Event.AFTER_LOSS, Event.AFTER_BACKWARD}


def _is_countable(rehearsal: Rehearsal, model: nn.Module) -> bool:
    """Return whether torch counts in a fit what a plan counts; attention has other kernels on the CPU than without numbers."""
    return rehearsal.own_task and not any(isinstance(each, nn.MultiheadAttention) for each in model.modules())


def _check_work(rehearsal: Rehearsal, plan: Plan, duration: str | int) -> None:
    """Hold the operations of the plan against those that torch counts in the fit, where it is the kit's own."""
    from torch.utils.flop_counter import FlopCounterMode  # looks at every operator that torch has when it is imported

    whole: Any = FlopCounterMode(display=False)
    counters: dict[int, Any] = {}

    def count(event: Event, state: State) -> None:
        batch = state.clock.batch
        if event is Event.FIT_START:
            twin, (inputs, targets) = meta_twin(state.model, full=True)[0].train(), rehearsal.batches()[0]
            with whole:
                torch.autograd.backward(cross_entropy(twin(inputs.to("meta")), targets.to("meta")))
        elif event is Event.BEFORE_FORWARD and not any(map(is_hooked, state.model.modules())):
            counters[batch] = FlopCounterMode(display=False)
            counters[batch].__enter__()
        elif event is Event.AFTER_BACKWARD and batch in counters:
            counters[batch].__exit__(None, None, None)

    outcome = rehearsal.fit([Before(count), *rehearsal.make()], duration=duration)
    for batch, counter in counters.items():
        planned = next(each.flops for each in plan.spans if each.start.batch <= batch < each.end.batch)
        if planned is None and not outcome.journal:
            fail(
                f"{rehearsal.name}: a plan does not count the operations of batch {batch}, though nothing is attached."
            )
        if planned is not None:
            same(
                planned, counter.get_total_flops() / whole.get_total_flops(), "operations",
                f"{rehearsal.name}: batch {batch} of a fit of {duration} computes another share of what a step costs that trains "
                "everything than was planned. What trains, and what is attached, is all that a plan knows of.", tolerance=1e-9,
            )  # fmt: skip


@check
def puts_live_weights_back(rehearsal: Rehearsal) -> None:
    """Evaluations run with the live weights, or those of evaluated_weights(); after them the live ones are as they were."""
    algorithms = rehearsal.make()
    live: dict[str, Tensor] = {}

    def look(event: Event, state: State) -> None:
        if event is Event.EVAL_BATCH_START:
            _compare(
                live | dict(evaluated_weights(algorithms)),
                state,
                "an evaluation runs with other weights than evaluated_weights() says. Return them",
            )
        elif event is Event.EVAL_END:
            _compare(
                live,
                state,
                "the live weights are not put back after an evaluation. Do it at EVAL_END, in the stage WEIGHTS",
            )
        if event in LIVE_EVENTS:
            live.clear()
            live.update(weights_of(state.model))

    def _compare(expected: dict[str, Any], state: State, what: str) -> None:
        now = weights_of(state.model)
        if wrong := [name for name, each in now.items() if not torch.equal(each, expected[name].to(each))]:
            fail(
                f"{rehearsal.name}: at batch {state.clock.batch}, {what}; the first that differs is {wrong[0]!r}. Training and "
                "checkpoints go on from what the model holds."
            )

    rehearsal.fit(algorithms, probe=look)
