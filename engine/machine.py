"""A state machine over the engine: random operations, with the ledger held against a plain-dict oracle."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn
from typing_extensions import override

from .algorithm import Algorithm
from .clock import Clock, Time
from .doubles import tiny_loader, tiny_models
from .engine import Engine
from .errors import LedgerClosedError, SurgeryError
from .events import Event
from .homes import OptimizerLike
from .ledger import ParameterLedger
from .neighbor import GAIN
from .oracle import OWNERS, LedgerOracle, selectors_of
from .randomness import Randomness
from .rehearsal import copied, difference, quiet, snapshot, weights_of
from .schedules import linear
from .state import State

DURATION = Time("40ba")
EPOCH = 5
COURSE = 7  # batches of a schedule of a parameter's own
_OPTIMIZERS: dict[str, OptimizerLike] = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=0.01),
    "adagrad": partial(torch.optim.Adagrad, lr=0.05),
}
owners = st.sampled_from(OWNERS)


def _line(end: float, start: int, batch: int) -> float:
    """Return the factor of a straight line over a few batches, after which the last stays."""
    return 1 + (end - 1) * min(1.0, (batch - start) / COURSE)


def _alone(machine: EngineMachine) -> bool:
    """Return whether no algorithm acts beside the rules."""
    return not machine.engine.algorithms[:-1]


class Saboteur(Algorithm):
    """Raises at an event, when it is told to."""

    events = frozenset(Event)

    def __init__(self) -> None:
        self.armed: Event | None = None

    @override
    def apply(self, event: Event, state: State) -> None:
        """Raise, once."""
        if event is self.armed:
            self.armed = None
            raise RuntimeError("on purpose")


class EngineMachine(RuleBasedStateMachine):
    """Random operations on an engine in a loop of its own, the ledger held against a :class:`LedgerOracle`.

    The rules: step, a step in microbatches, a step with NaN gradients, an exception at an event, freeze, thaw, scale,
    set_lr, set_options, set_schedule, inject (surgery) and merge (its undoing), a call where the ledger is closed, save, and
    load into a fresh model. After each, the invariants hold, what trains, with which options and at which rate is what the
    oracle says, parameters are the same objects, and frozen ones have the same values.

    Subclass it to add rules, or algorithms of your own through :meth:`algorithms`; run it as a test by
    ``TestMine = MyMachine.TestCase``.

    Example:
        >>> from hypothesis import settings
        >>> from hypothesis.stateful import run_state_machine_as_test
        >>> run_state_machine_as_test(EngineMachine, settings=settings(max_examples=2, stateful_step_count=5, deadline=None))
    """

    engine: Engine

    def __init__(self) -> None:
        super().__init__()
        self.saved: dict[str, Any] | None = None
        self.rated = 0.0  # the progress for which rates were last written
        self.batches = [(x, y) for x, y in tiny_loader(8 * EPOCH, shuffle=False)]

    def algorithms(self) -> list[Algorithm]:
        """Return the algorithms that act beside the rules; none, until a subclass has some."""
        return []

    @property
    def state(self) -> State:
        """The state."""
        return self.engine.state

    @property
    def ledger(self) -> ParameterLedger:
        """The ledger."""
        return self.engine.state.ledger

    @initialize(model=st.sampled_from(sorted(tiny_models())), optimizer=st.sampled_from(sorted(_OPTIMIZERS)))
    def begin(self, model: str, optimizer: str) -> None:
        """Build model, ledger and engine, and emit FIT_START."""
        self.kind, self.optimizer = model, optimizer
        self._build()
        self.oracle = LedgerOracle(self.ledger)
        with quiet():
            self.engine.emit(Event.FIT_START)
        self._remember()

    def _build(self) -> None:
        with Randomness().kept():
            torch.manual_seed(0)
            model = tiny_models()[self.kind]()
        ledger = ParameterLedger(model, _OPTIMIZERS[self.optimizer], schedule=linear())
        state = State(model, ledger, DURATION, clock=Clock(batches_per_epoch=EPOCH))
        self.saboteur = Saboteur()
        self.engine = Engine([*self.algorithms(), self.saboteur], state, debug=True)
        self.engine.attach()

    def _remember(self) -> None:
        """Keep who the parameters are."""
        self.identities = {name: (id(each), each.data_ptr()) for name, each in self.ledger.parameters.items()}

    # -- steps ---------------------------------------------------------------------------------------------------------

    @rule()
    def step(self) -> None:
        """Take a step."""
        self._step(parts=1)

    @rule()
    def microbatch(self) -> None:
        """Take a step over two microbatches."""
        self._step(parts=2)

    @rule()
    def nan_step(self) -> None:
        """Meet gradients that are not finite: the step is skipped, the clock ticks."""
        before = weights_of(self.state.model)
        self._step(parts=1, spoil=True)
        trainable = self.ledger.trainable
        assert all(torch.equal(before[name], self.ledger.parameters[name]) for name in trainable if name in before)

    def _step(self, *, parts: int, spoil: bool = False) -> None:
        emit, state = self.engine.emit, self.state
        if not state.clock.batch_in_epoch:
            emit(Event.EPOCH_START)
        x, y = self.batches[state.clock.batch_in_epoch]
        state.batch, state.step_skipped = (x, y), spoil
        emit(Event.BATCH_START)
        self.rated = state.clock.progress
        self._compare_rates(state.clock.batch)
        done = state.clock.batch
        frozen = {name: self.ledger.parameters[name].detach().clone() for name in self.ledger.frozen}
        for part in zip(x.chunk(parts), y.chunk(parts), strict=True):
            state.microbatch = part
            emit(Event.BEFORE_FORWARD)
            state.outputs = state.model(part[0])
            emit(Event.AFTER_FORWARD)
            loss = state.loss = nn.functional.cross_entropy(state.outputs, part[1]) / parts
            emit(Event.AFTER_LOSS)
            if loss.requires_grad:
                torch.autograd.backward(loss)
            emit(Event.AFTER_BACKWARD)
        if spoil:
            self._spoil()
        emit(Event.BEFORE_STEP)
        for optimizer in () if spoil else state.optimizers:
            optimizer.step()
        emit(Event.AFTER_STEP)
        self.ledger.clear_gradients()
        assert all(torch.equal(value, self.ledger.parameters[name]) for name, value in frozen.items())
        state.tick(samples=len(x))
        emit(Event.BATCH_END)
        assert state.clock.batch == done + 1, f"a step of {parts} parts counts as {state.clock.batch - done}"
        if state.clock.batch_in_epoch == EPOCH:
            state.tick_epoch()
            emit(Event.EPOCH_END)

    def _spoil(self) -> None:
        for each in self.ledger.trainable_parameters:
            if each.grad is not None:
                each.grad.fill_(float("nan"))

    @rule(event=st.sampled_from([event for event in Event if event not in (Event.FIT_START, Event.BATCH_START)]))
    @precondition(_alone)  # others would be told of an event out of its turn
    def raising_hook(self, event: Event) -> None:
        """Let an algorithm raise: the exception arrives, the ledger is as before."""
        phase, digest = self.ledger.phase, self.ledger.digest()
        self.saboteur.armed = event
        try:
            self.engine.emit(event)
        except RuntimeError as error:
            assert "Saboteur.apply" in str(error.__notes__)  # noqa: PT017 - no pytest in a user's run
        else:
            raise AssertionError(f"what an algorithm raised at {event.name} was lost")
        self.ledger.phase = phase
        assert self.ledger.digest() == digest

    # -- the ledger ----------------------------------------------------------------------------------------------------

    def _draw(self, data: st.DataObject) -> tuple[Any, tuple[str, ...]]:
        selector = data.draw(st.sampled_from(selectors_of(self.ledger)), label="select")
        return selector, self.ledger.select(selector)

    @rule(data=st.data(), owner=owners, moments=st.sampled_from(["drop", "keep"]))
    def freeze(self, data: st.DataObject, owner: str, moments: Any) -> None:
        """Freeze something."""
        selector, names = self._draw(data)
        self.ledger.freeze(selector, owner=owner, moments=moments)
        self.oracle.freeze(selector, names, owner)

    @rule(data=st.data(), owner=owners)
    def thaw(self, data: st.DataObject, owner: str) -> None:
        """Thaw something."""
        selector, names = self._draw(data)
        self.ledger.thaw(selector, owner=owner)
        self.oracle.thaw(selector, names, owner)

    @rule(data=st.data(), owner=owners, factor=st.sampled_from([1.0, 0.5, 0.25, 2.0]))
    def scale(self, data: st.DataObject, owner: str, factor: float) -> None:
        """Scale a rate."""
        selector, names = self._draw(data)
        self.ledger.scale(selector, factor, owner=owner)
        self.oracle.scale(names, factor, owner)

    @rule(data=st.data(), lr=st.sampled_from([0.1, 0.01, None]))
    @precondition(_alone)
    def set_lr(self, data: st.DataObject, lr: float | None) -> None:
        """Set a rate, or take it back."""
        selector, names = self._draw(data)
        self.ledger.set_lr(selector, lr, owner=OWNERS[0])
        self.oracle.set_lr(names, lr)

    @rule(data=st.data(), decay=st.sampled_from([0.1, 0.0, None]))
    @precondition(_alone)
    def set_options(self, data: st.DataObject, decay: float | None) -> None:
        """Set an option of the optimizer, or take it back."""
        selector, names = self._draw(data)
        self.ledger.set_options(selector, weight_decay=decay, owner=OWNERS[1])
        self.oracle.set_options(names, weight_decay=decay)

    @rule(data=st.data(), end=st.sampled_from([0.5, 0.0, None]))
    @precondition(_alone)
    def set_schedule(self, data: st.DataObject, end: float | None) -> None:
        """Set a schedule of their own, a straight line from here on, or take it back."""
        selector, names = self._draw(data)
        given = None if end is None else linear(end=end)
        self.ledger.set_schedule(selector, given, span=f"{COURSE}ba", owner=OWNERS[2])
        self.oracle.set_schedule(names, None if end is None else partial(_line, end, self.state.clock.batch))

    @rule(data=st.data(), owner=owners)
    def inject(self, data: st.DataObject, owner: str) -> None:
        """Attach a parameter; a second one to the same module is refused."""
        weights = [name for name in self.ledger.parameters if name.endswith(".weight")]
        module = data.draw(st.sampled_from(weights), label="weight").rpartition(".")[0]
        digest = self.ledger.digest()
        try:
            self.ledger.attach(module, GAIN, owner=owner)
        except SurgeryError:
            assert module in self.oracle.attached
            assert self.ledger.digest() == digest
        else:
            assert module not in self.oracle.attached
            self.oracle.attach(self.ledger, module, "gain", owner)

    @rule(data=st.data())
    @precondition(lambda self: self.oracle.attached)
    def merge(self, data: st.DataObject) -> None:
        """Take off what was attached."""
        module = data.draw(st.sampled_from(sorted(self.oracle.attached)), label="module")
        (name,) = self.ledger.select(f"{module}.gain")
        self.ledger.detach(module, GAIN, owner=self.oracle.attached.pop(module))
        self.oracle.detach(self.ledger, name)

    @rule(event=st.sampled_from([event for event in Event if not event.opens_ledger]), owner=owners)
    def call_where_it_is_closed(self, event: Event, owner: str) -> None:
        """Ask for a change where none may be made: a typed error, and nothing moves."""
        phase, digest = self.ledger.phase, self.ledger.digest()
        self.ledger.phase = event
        try:
            self.ledger.freeze("*", owner=owner)
        except LedgerClosedError:
            pass
        else:
            raise AssertionError(f"the ledger took a change at {event.name}")
        finally:
            self.ledger.phase = phase
        assert self.ledger.digest() == digest

    # -- saving --------------------------------------------------------------------------------------------------------

    @rule()
    def save(self) -> None:
        """Copy what a checkpoint would hold."""
        self.saved = {
            "ledger": copied(self.ledger.state_dict()),
            "engine": copied(self.engine.state_dict()),
            "weights": weights_of(self.state.model),
            "clock": self.state.clock,
            "rated": self.rated,
            "snapshot": snapshot(self.state, ()),
            "oracle": copy.deepcopy(self.oracle),
        }

    @rule()
    @precondition(lambda self: self.saved is not None)
    def load(self) -> None:
        """Load the copy into a fresh model, and go on there."""
        assert self.saved is not None
        self.engine.close()
        self._build()
        state, ledger, saved = self.state, self.ledger, self.saved
        ledger.load_state_dict(copied(saved["ledger"]))
        state.model.load_state_dict(saved["weights"], strict=False)  # a tied weight has one of its names there
        self.engine.load_state_dict(copied(saved["engine"]))
        state.clock = ledger.clock = saved["clock"]
        self.rated = saved["rated"]
        self.oracle = copy.deepcopy(saved["oracle"])
        self._remember()
        assert sorted(ledger.trainable) == sorted(saved["ledger"]["trainable"])
        assert not difference(saved["snapshot"], snapshot(state, ()), "saved")

    # -- what always holds ---------------------------------------------------------------------------------------------

    @invariant()
    def agrees_with_the_oracle(self) -> None:
        """Hold the ledger against the oracle."""
        ledger = getattr(self, "engine", None) and self.ledger
        if not ledger:
            return
        ledger.verify()
        others = {name for name in ledger.parameters if set(ledger.owners(name)) - set(OWNERS)}
        assert ledger.trainable == self.oracle.trainable() - others
        now = {name: (id(each), each.data_ptr()) for name, each in ledger.parameters.items()}
        assert {name: each for name, each in now.items() if name in self.identities} == {
            name: each for name, each in self.identities.items() if name in now
        }
        self._compare_rates()

    def _compare_rates(self, batch: int | None = None) -> None:
        """Hold rates and options against the oracle; those of a schedule of their own at the batch for which they were written."""
        if not _alone(self):
            return
        factor = linear()(self.rated)
        for group in self.ledger.groups:
            for name in group.parameters:
                decay, asked = group.options["weight_decay"], self.oracle.option(name, "weight_decay")
                assert decay == asked, f"{name} trains with weight_decay={decay}, not {asked}"
                if batch is not None or name not in self.oracle.courses:
                    expected, lr = self.oracle.lr(name, factor, batch or 0), group.lr
                    assert lr is not None
                    assert abs(lr - expected) <= 1e-12 * expected, f"{name} trains at {lr}, not {expected}"

    @override
    def teardown(self) -> None:
        """Close the engine."""
        if hasattr(self, "engine"):
            self.engine.close()
