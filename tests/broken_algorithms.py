"""Algorithms, each with one realistic fault, and the check that is meant to find it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import attrs
import torch

from thawline.engine import Algorithm, Attachment, Event, Site, Stage, State, register, surgery_op

BROKEN: dict[type[Algorithm], str] = {}
"""Each, and the name of the check that is meant for it."""


def caught_by(check: str) -> Callable[[type[Algorithm]], type[Algorithm]]:
    """Enter a broken algorithm under the check that is meant for it."""

    def enter(kind: type[Algorithm]) -> type[Algorithm]:
        BROKEN[register(kind)] = check
        return kind

    return enter


@caught_by("resumes")
@attrs.define(slots=False, eq=False)
class Forgetful(Algorithm):
    """Halves the head's rate every third batch, and does not save how often it did."""

    events = frozenset({Event.BATCH_END})
    batches: int = attrs.field(default=0, init=False)

    def apply(self, event: Event, state: State) -> None:
        self.batches += 1
        state.ledger.scale("head", 0.5 ** (self.batches // 3), owner=self.owner)


@caught_by("leaves_the_global_generators_alone")
@attrs.define(slots=False, eq=False)
class Noisy(Algorithm):
    """Adds noise from the global generator to the gradients."""

    events = frozenset({Event.BEFORE_STEP})
    stage: ClassVar[Stage] = Stage.GRADIENTS

    def apply(self, event: Event, state: State) -> None:
        for each in state.ledger.trainable_parameters:
            if each.grad is not None:
                each.grad.add_(1e-3 * torch.randn_like(each.grad))


@caught_by("leaves_nothing_behind")
@attrs.define(slots=False, eq=False)
class Clinging(Algorithm):
    """Counts forward passes with a hook, and never removes it."""

    passes: int = attrs.field(default=0, init=False)

    def attach(self, state: State) -> None:
        state.model.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.passes += 1

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self.passes}


@caught_by("keeps_the_ledger_whole")
@attrs.define(slots=False, eq=False)
class Sneaky(Algorithm):
    """Freezes the head by hand."""

    events = frozenset({Event.EPOCH_END})

    def apply(self, event: Event, state: State) -> None:
        state.model.get_parameter(state.layers.head.parameters[0]).requires_grad_(False)


@caught_by("match_is_pure")
@attrs.define(slots=False, eq=False)
class Counting(Algorithm):
    """Counts in match(), so that asking it is acting."""

    events = frozenset({Event.BATCH_END})
    asked: int = attrs.field(default=0, init=False)

    def match(self, event: Event, state: State) -> bool:
        self.asked += 1
        return self.asked % 2 == 0

    def apply(self, event: Event, state: State) -> None:
        state.log({"asked": self.asked})

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked}


@caught_by("keeps_instances_apart")
class Shared(Algorithm):
    """Keeps the losses it has seen on the class."""

    events = frozenset({Event.BATCH_END})
    losses: ClassVar[list[float]] = []

    def apply(self, event: Event, state: State) -> None:
        if state.clock.batch == 1:
            self.losses.clear()
        self.losses.append(float(state.loss))
        state.log({"mean": sum(self.losses) / len(self.losses)})

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses)}

    def load_state_dict(self, saved: Any) -> None:
        self.losses[:] = saved["losses"]


@caught_by("does_not_depend_on_order")
@attrs.define(slots=False, eq=False)
class Jealous(Algorithm):
    """Releases what others hold, where they were first."""

    events = frozenset({Event.FIT_START})
    stage: ClassVar[Stage] = Stage.TRAINABILITY

    def apply(self, event: Event, state: State) -> None:
        for name in sorted(state.ledger.frozen):
            for owner in state.ledger.owners(name):
                state.ledger.thaw(name, owner=owner)


@caught_by("survives_an_exception")
@attrs.define(slots=False, eq=False)
class Panicking(Algorithm):
    """Tidies up by hand where the fit fails, and fails itself half-way."""

    events = frozenset({Event.FIT_ABORT})

    def apply(self, event: Event, state: State) -> None:
        for number, each in enumerate(state.model.parameters()):
            each.requires_grad_(False)
            if number == 2:
                raise KeyError(number)


@caught_by("does_not_count_microbatches")
@attrs.define(slots=False, eq=False)
class Impatient(Algorithm):
    """Lowers the rate every second "step", counting backward passes."""

    events = frozenset({Event.AFTER_BACKWARD, Event.BATCH_END})
    steps: int = attrs.field(default=0, init=False)

    def apply(self, event: Event, state: State) -> None:
        if event is Event.AFTER_BACKWARD:
            self.steps += 1
        else:
            state.ledger.scale("*", 0.9 ** (self.steps // 2), owner=self.owner)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}


@caught_by("refuses_bad_arguments")
@attrs.define(slots=False, eq=False)
class Trusting(Algorithm):
    """Takes any factor."""

    events = frozenset({Event.FIT_START})
    factor: float = 0.5

    def apply(self, event: Event, state: State) -> None:
        state.ledger.scale("head", self.factor, owner=self.owner)


@caught_by("comes_back_from_its_description")
@attrs.define(slots=False, eq=False)
class Lossy(Algorithm):
    """Describes itself without its one argument."""

    events = frozenset({Event.FIT_START})
    select: str = attrs.field(default="head", validator=attrs.validators.instance_of(str))

    def apply(self, event: Event, state: State) -> None:
        state.ledger.scale(self.select, 0.5, owner=self.owner)

    def describe(self) -> dict[str, Any]:
        return {"name": "Lossy", "arguments": {}}


@caught_by("works_with_other_arguments")
@attrs.define(slots=False, eq=False)
class Untried(Algorithm):
    """Lowers the head's rate by the clock; with ``slowly``, by a count of its own that is not saved."""

    events = frozenset({Event.BATCH_END})
    slowly: bool = attrs.field(default=False, validator=attrs.validators.instance_of(bool))
    batches: int = attrs.field(default=0, init=False)

    def apply(self, event: Event, state: State) -> None:
        self.batches += 1
        done = self.batches // 3 if self.slowly else state.clock.batch
        state.ledger.scale("head", 0.5**done, owner=self.owner)


@caught_by("is_recorded_as_it_happened")
@attrs.define(slots=False, eq=False)
class Discreet(Algorithm):
    """Lowers the rates for the step alone, by hand, and puts them back when the batch ends."""

    events = frozenset({Event.BEFORE_STEP, Event.BATCH_END})

    def apply(self, event: Event, state: State) -> None:
        for group in (group for each in state.optimizers for group in each.param_groups):
            group["lr"] *= 0.5 if event is Event.BEFORE_STEP else 2.0


@caught_by("keeps_to_its_plan")
@attrs.define(slots=False, eq=False)
class Misplaced(Algorithm):
    """Freezes the stem after an epoch, in the stage of those who only look on."""

    events = frozenset({Event.EPOCH_END})
    stage: ClassVar[Stage] = Stage.OBSERVE

    def apply(self, event: Event, state: State) -> None:
        state.ledger.freeze("stem", owner=self.owner)


@caught_by("puts_live_weights_back")
@attrs.define(slots=False, eq=False)
class Careless(Algorithm):
    """Rounds the weights for an evaluation, and does not put back what they were."""

    events = frozenset({Event.EVAL_START})
    stage: ClassVar[Stage] = Stage.WEIGHTS

    def apply(self, event: Event, state: State) -> None:
        with torch.no_grad():
            for each in state.ledger.trainable_parameters:
                each.copy_(each.half())


@caught_by("keeps_the_ledger_whole")
@attrs.define(slots=False, eq=False)
class Clamping(Algorithm):
    """Keeps a list of the parameters from the start, and clamps them after each step, also those that others froze since."""

    events = frozenset({Event.AFTER_STEP})
    kept: list[torch.Tensor] = attrs.field(factory=list, init=False, repr=False)

    def attach(self, state: State) -> None:
        self.kept = list(state.model.parameters())

    def apply(self, event: Event, state: State) -> None:
        with torch.no_grad():
            for each in self.kept:
                each.clamp_(-0.3, 0.3)


SEEN: list[float] = []


@caught_by("starts_afresh")
class Lingering(Algorithm):
    """Logs the mean of the losses so far, which it keeps in the module."""

    events = frozenset({Event.BATCH_END})
    stage: ClassVar[Stage] = Stage.OBSERVE

    def apply(self, event: Event, state: State) -> None:
        SEEN.append(float(state.loss))
        state.log({"mean": sum(SEEN) / len(SEEN)})


@caught_by("takes_short_fits")
@attrs.define(slots=False, eq=False)
class Averaging(Algorithm):
    """Logs a mean at the end, of nothing where no batch was trained."""

    events = frozenset({Event.BATCH_END, Event.FIT_END})
    total: float = attrs.field(default=0.0, init=False)

    def apply(self, event: Event, state: State) -> None:
        if event is Event.BATCH_END:
            self.total += float(state.loss)
        else:
            state.log({"mean": self.total / state.clock.batch})

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}


@caught_by("leaves_the_loop_alone")
@attrs.define(slots=False, eq=False)
class Ticking(Algorithm):
    """Counts a skipped step for two batches, on the clock that all share."""

    events = frozenset({Event.BATCH_END})

    def apply(self, event: Event, state: State) -> None:
        if state.clock.batch == 2:
            state.tick(0)


@caught_by("follows_from_its_calls")
@attrs.define(slots=False, eq=False)
class Calming(Algorithm):
    """Stops the statistics of a block's normalization by hand, though its weights train."""

    events = frozenset({Event.BEFORE_FORWARD})

    def apply(self, event: Event, state: State) -> None:
        state.model.blocks[2].norm.eval()


@caught_by("learns_from_its_loss")
@attrs.define(slots=False, eq=False)
class Hasty(Algorithm):
    """Halves gradients as they come, and with those of a microbatch once more those of the ones before."""

    def attach(self, state: State) -> None:
        parameters = state.ledger.trainable_parameters
        self.hooks = [each.register_post_accumulate_grad_hook(self._halve) for each in parameters]

    def _halve(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(0.5)

    def close(self) -> None:
        for each in getattr(self, "hooks", ()):
            each.remove()


@caught_by("steps_as_torch_does")
@attrs.define(slots=False, eq=False)
class Decaying(Algorithm):
    """Shrinks the weights in a hook of the optimizer, also those whose weight decay is another."""

    def attach(self, state: State) -> None:
        self.hooks = [each.register_step_pre_hook(self._shrink) for each in state.optimizers]

    def _shrink(self, optimizer: Any, *_: Any) -> None:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for each in group["params"]:
                    each.mul_(1 - 0.1 * group["lr"])

    def close(self) -> None:
        for each in getattr(self, "hooks", ()):
            each.remove()


@caught_by("keeps_true_records")
@attrs.define(slots=False, eq=False)
class Sampling(Algorithm):
    """Evaluates with dropout on, and nobody who loads the checkpoint knows."""

    events = frozenset({Event.EVAL_BATCH_START})

    def apply(self, event: Event, state: State) -> None:
        for module in state.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.train()


@caught_by("does_as_its_examples_say")
@attrs.define(slots=False, eq=False)
class Outdated(Algorithm):
    """Logs the loss, less often than its documentation says.

    Example:
        >>> Outdated().every
        2
    """

    events = frozenset({Event.BATCH_END})
    every: int = 3

    def apply(self, event: Event, state: State) -> None:
        if state.loss is not None and state.clock.batch % self.every == 0:
            state.log({"seen": state.loss})


class _Square(torch.autograd.Function):
    """The square of a number, with half of its derivative."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(value)
        return value * value

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (value,) = ctx.saved_tensors
        return gradient * value


class _SquaredLinear(torch.nn.Linear):
    gain: torch.nn.Parameter

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch calls it so
        return super().forward(input) * _Square.apply(self.gain)


@surgery_op("broken_square")
def squared(site: Site) -> list[Attachment]:
    """Attach a gain that counts by its square."""
    assert isinstance(site.module, torch.nn.Linear)
    one = torch.ones((), dtype=site.module.weight.dtype, device=site.module.weight.device)
    return [Attachment(site.name, parameters={"gain": torch.nn.Parameter(one)}, new_class=_SquaredLinear)]


@caught_by("has_true_gradients")
class Squaring(Algorithm):
    """Trains the gain of the head, by a function that computes its own gradient, and not the right one."""

    events = frozenset({Event.FIT_START})
    stage: ClassVar[Stage] = Stage.SURGERY

    def apply(self, event: Event, state: State) -> None:
        if not hasattr(state.model.head, "gain"):
            state.ledger.attach("head", "broken_square", owner=self.owner)


class _LeakyLinear(torch.nn.Linear):
    gain: torch.nn.Parameter

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch calls it so
        return super().forward(input) + 1e-3 * self.gain.detach() * input.sum()


@surgery_op("broken_leak")
def leaky(site: Site) -> list[Attachment]:
    """Attach a gain that counts little, and of which no gradient knows."""
    assert isinstance(site.module, torch.nn.Linear)
    one = torch.ones((), dtype=site.module.weight.dtype)
    return [Attachment(site.name, parameters={"gain": torch.nn.Parameter(one)}, new_class=_LeakyLinear)]


@caught_by("has_true_gradients")
class Leaking(Algorithm):
    """Trains a gain that is detached by mistake."""

    events = frozenset({Event.FIT_START})
    stage: ClassVar[Stage] = Stage.SURGERY

    def apply(self, event: Event, state: State) -> None:
        if not hasattr(state.model.blocks[0].linear, "gain"):
            state.ledger.attach("blocks.0.linear", "broken_leak", owner=self.owner)


@caught_by("leaves_nothing_behind")
class Deaf(Algorithm):
    """Ignores a signal from then on."""

    def attach(self, state: State) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@caught_by("leaves_the_loop_alone")
class Centering(Algorithm):
    """Centers the inputs in place, also where the loader is a list that holds them."""

    events = frozenset({Event.BATCH_START})
    stage: ClassVar[Stage] = Stage.DATA

    def apply(self, event: Event, state: State) -> None:
        inputs = state.batch[0]
        inputs.sub_(inputs.mean(0))


@caught_by("steps_as_torch_does")
class Optimistic(Algorithm):
    """Says of every step that it was made, to have its loss counted by others."""

    events = frozenset({Event.AFTER_STEP})

    def apply(self, event: Event, state: State) -> None:
        state.step_skipped = False


@caught_by("takes_other_models")
@attrs.define(slots=False, eq=False)
class Steadying(Algorithm):
    """Lets batch normalization average ever more slowly, by a count of its own that it does not save."""

    events = frozenset({Event.BATCH_START})
    batches: int = attrs.field(default=0, init=False)

    def apply(self, event: Event, state: State) -> None:
        self.batches += 1
        for module in state.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1 / (1 + self.batches)


@caught_by("recovers_from_faults")
@attrs.define(slots=False, eq=False)
class Sobering(Algorithm):
    """Turns dropout off after the second batch, and not on again where the fit goes back to an earlier one."""

    events = frozenset({Event.BATCH_END})
    done: bool = attrs.field(default=False, init=False)
    model: Any = attrs.field(default=None, init=False)

    def attach(self, state: State) -> None:
        self.model = state.model

    def apply(self, event: Event, state: State) -> None:
        if state.clock.batch == 2:
            self.load_state_dict({"done": True})

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.done = saved["done"]
        for module in self.model.modules() if self.done else ():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0


@caught_by("is_not_resumed_as_another")
@attrs.define(slots=False, eq=False)
class Vague(Algorithm):
    """Scales the rates of the head, and does not say by how much."""

    events = frozenset({Event.FIT_START})
    factor: float = attrs.field(default=0.5, validator=attrs.validators.instance_of(float))

    def apply(self, event: Event, state: State) -> None:
        state.ledger.scale("head", self.factor, owner=self.owner)

    def describe(self) -> dict[str, Any]:
        return {"name": "Vague", "arguments": {"factor": 0.5}}


@caught_by("stays_equal_on_two_ranks")
@attrs.define(slots=False, eq=False)
class Weighing(Algorithm):
    """Keeps the mean number of samples of a batch, and counts those of its own rank."""

    events = frozenset({Event.BATCH_END})
    samples: int = attrs.field(default=0, init=False)

    def apply(self, event: Event, state: State) -> None:
        self.samples += len(state.batch[0])
        state.log({"samples_of_a_batch": self.samples / state.clock.batch})

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.samples = saved["samples"]


@caught_by("repeats_what_does_not_fit")
@attrs.define(slots=False, eq=False)
class Tallying(Algorithm):
    """Counts the samples of each forward pass, also of one that ran out of memory and is done again."""

    events = frozenset({Event.BEFORE_FORWARD, Event.BATCH_END})
    stage: ClassVar[Stage] = Stage.OBSERVE
    seen: int = attrs.field(default=0, init=False)

    def apply(self, event: Event, state: State) -> None:
        if event is Event.BEFORE_FORWARD:
            self.seen += len(state.microbatch[0])
        else:
            state.log({"seen": self.seen})

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}


@caught_by("takes_batches_in_other_forms")
@attrs.define(slots=False, eq=False)
class Measuring(Algorithm):
    """Counts the samples it has seen: those of the first part of a batch, and where that is a mapping, its keys."""

    events = frozenset({Event.BATCH_START})
    stage: ClassVar[Stage] = Stage.OBSERVE
    seen: int = attrs.field(default=0, init=False)

    def apply(self, event: Event, state: State) -> None:
        for batch in state.batch if state.accumulate > 1 else [state.batch]:
            self.seen += state.world * len(batch[0] if isinstance(batch, (list, tuple)) else batch)
        state.log({"seen": self.seen})

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}


@caught_by("holds_in_drawn_fits")
@attrs.define(slots=False, eq=False)
class Rewarming(Algorithm):
    """Halves the head's rate at each warm restart, where the schedule rises after it fell, and does not save how often."""

    events = frozenset({Event.BATCH_END})
    last: float = attrs.field(default=0.0, init=False)
    falls: bool = attrs.field(default=False, init=False)
    restarts: int = attrs.field(default=0, init=False)

    def apply(self, event: Event, state: State) -> None:
        now = state.ledger.schedule(state.clock.progress)
        if self.falls and now > self.last:
            self.restarts += 1
        self.falls, self.last = now < self.last, now
        state.ledger.scale("head", 0.5**self.restarts, owner=self.owner)

    def state_dict(self) -> dict[str, Any]:
        return {"last": self.last, "falls": self.falls}


@caught_by("is_shown_as_it_happens")
class Chatting(Algorithm):
    """Prints the loss of each epoch, over the bar and where silence was asked for."""

    events = frozenset({Event.EPOCH_END})
    stage: ClassVar[Stage] = Stage.OBSERVE

    def apply(self, event: Event, state: State) -> None:
        print(f"epoch {state.clock.epoch} ends with the loss {state.metrics['train/loss']:.2f}")  # noqa: T201 - the fault


@caught_by("computes_the_same_compiled")
@attrs.define(slots=False, eq=False)
class Tardy(Algorithm):
    """Halves what the middle block puts out in training from the second epoch on, by a hook that it sets only then."""

    events = frozenset({Event.BATCH_START})
    hooks: list[Any] = attrs.field(factory=list, init=False, repr=False)

    def apply(self, event: Event, state: State) -> None:
        if state.clock.epoch > 0 and not self.hooks:
            block = state.model.get_submodule(state.layers["blocks[1]"][0].modules[0])
            self.hooks.append(block.register_forward_hook(self._halve))

    def _halve(self, block: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        return output / 2 if block.training else output

    def close(self) -> None:
        for each in self.hooks:
            each.remove()

    def state_dict(self) -> dict[str, Any]:
        return {}
