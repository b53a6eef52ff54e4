"""The books of the ledger: parameters, groups and optimizer state, made to agree, and what can be read of them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .clock import Clock
from .errors import OptimizerError
from .events import Event
from .footprint import Template, fault_on_shards, state_template, template_bytes
from .grafts import record_of
from .groups import Group, Origin, Slot, derive_groups, layers_of_groups, name_groups, view_groups
from .holds import USER, Hold, Holds
from .homes import Home, OptimizerLike, fills_state, fresh_state, kept_aside, selectors_of, settle
from .layers import LayerMap, LayerSpec
from .log import get_logger
from .modes import ModeKeeper
from .schedules import Schedule, constant
from .selectors import Selection, Selector, resolve
from .shards import is_sharded, shard_like
from .surgery import JournalEntry

log = get_logger(__name__)


class Books:
    """What :class:`~thawline.engine.ParameterLedger` keeps, and the steps by which model and optimizers follow it.

    The ledger decides; here a decision is carried out: flags, gradients, groups, optimizer state, learning
    rates, modes. Everything is keyed by parameter name.
    """

    trainable_parameters: tuple[nn.Parameter, ...]
    """The parameters that train, in the order of the groups; the same object until ``version`` moves. Not to be set."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerLike,
        layers: LayerMap | LayerSpec | None = None,
        *,
        schedule: Schedule | None = None,
        min_lr: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.layers = layers if isinstance(layers, LayerMap) else LayerMap(model, layers)
        self.schedule = constant() if schedule is None else schedule
        self._steady = self.schedule.steady
        self.min_lr = min_lr
        self.seed = seed
        self.clock = Clock()
        self.phase: Event | None = None
        self.version = 0
        self.changed_by: tuple[str, ...] = ()
        self._acting = USER
        self.sharded = False
        self._templates: dict[tuple[int, object, int], Template | None] = {}
        self._read_names()
        self.layers.check(self._parameters)
        self.optimizers, self._homes = settle(optimizer, self._parameters, self._aliases, self.layers)
        self._selectors = selectors_of(optimizer)
        self._home_list = sorted(
            {id(each): each for each in self._homes.values()}.values(), key=lambda home: home.index
        )
        rates: dict[int, Home] = {}
        for home in self._home_list:
            lr = home.template.get("lr")
            if isinstance(lr, Tensor) and rates.setdefault(id(lr), home) is not home:
                home.template["lr"] = lr.clone()  # torch puts one and the same into all groups made without
        self._fills = tuple(fills_state(each) for each in self.optimizers)
        self._in_optimizer = {id(p) for each in self.optimizers for group in each.param_groups for p in group["params"]}
        self._holds = Holds()
        self._origins: dict[str, Origin] = {}
        self._kept: dict[str, dict[str, Any]] = {}
        self._interned: dict[tuple[object, ...], Slot] = {}
        self._slots: dict[str, Slot] = {}
        self._live: dict[Slot, dict[str, Any]] = {}
        self._names: tuple[str, ...] | None = None
        self._layers_of_groups: list[tuple[str, ...]] | None = None
        self._no_rates: dict[str, float] = {}
        self._trainable_names: frozenset[str] | None = None
        self._trained: set[str] = set()
        self._trained_until = -1  # the version whose trainable set is in it
        self._modes = ModeKeeper(model)
        self._gathering = 0
        self._behind = False
        self._factor = 1.0
        self._rated = self.clock  # for which the rates were last written: the clock ticks before the next batch's are
        self._begin()

    # -- reading -----------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """All parameters by canonical name, in registration order; tied ones once."""
        return MappingProxyType(self._parameters)

    @property
    def trainable(self) -> frozenset[str]:
        """Names of the parameters that train."""
        if self._trainable_names is None:
            self._trainable_names = frozenset(self._trainable)
        return self._trainable_names

    @property
    def trained(self) -> frozenset[str]:
        """Names of the parameters that trained when some batch began."""
        return frozenset(self._trained)

    @property
    def frozen(self) -> frozenset[str]:
        """Names of the parameters that do not train."""
        return frozenset(self._parameters) - self._trainable

    @property
    def groups(self) -> tuple[Group, ...]:
        """The parameter groups of all optimizers, named by the layers they span."""
        return view_groups(self._live, self._members, self._group_names())

    @property
    def rates(self) -> dict[str, float]:
        """The highest learning rate in each layer now, 0.0 where nothing of it trains; cheap between two changes.

        The layers are always the same, while groups, and with them their names, come and go. Empty where the optimizers'
        groups have no learning rate.
        """
        if self._layers_of_groups is None:
            rated = any(home.lr is not None for home in self._home_list)
            self._no_rates = {layer.name: 0.0 for layer in self.layers} if rated else {}
            members = [self._members[slot] if rated else () for slot in self._live]
            self._layers_of_groups = layers_of_groups(members, self.layers)
        rates = self._no_rates.copy()
        for group, layers in zip(self._live.values(), self._layers_of_groups, strict=True):
            lr = float(group.get("lr", 0.0))
            for layer in layers:
                if lr > rates[layer]:
                    rates[layer] = lr
        return rates

    @property
    def slots(self) -> tuple[Slot, ...]:
        """What each group's learning rate is a function of, in the order of :attr:`groups`."""
        return tuple(self._live)

    @property
    def state_bytes(self) -> int | None:
        """What the optimizers keep for what trains, once they have stepped; None where that is not known beforehand."""
        total = 0
        for name in self._trainable:
            home, parameter = self._homes[name], self._parameters[name]
            key = (home.index, parameter.dtype, parameter.ndim)
            if key not in self._templates:
                optimizer = self.optimizers[home.optimizer]
                self._templates[key] = state_template(optimizer, home.options, parameter.dtype, parameter.ndim)
            template = self._templates[key]
            if template is None:
                return None
            total += template_bytes(template, parameter.shape)
        return total

    @property
    def journal(self) -> tuple[JournalEntry, ...]:
        """What was attached, in order."""
        return tuple(entry for entry, _ in record_of(self.model).entries)

    @property
    def left_out(self) -> frozenset[str]:
        """Names of the parameters, not frozen by the user, that the optimizer instance does not hold: held by "user"."""
        return frozenset(self._left_out - self._given_frozen)

    def owners(self, name: str) -> tuple[str, ...]:
        """Return who holds the parameter called ``name``."""
        return self._holds.owners(self._aliases.get(name, name))

    def select(self, select: Selector) -> tuple[str, ...]:
        """Return the canonical names that a selector means; a SelectorError where it matches nothing."""
        return tuple(self._resolve(select).names)

    def _resolve(self, select: Selector) -> Selection:
        return resolve(select, self._parameters, self._aliases, self.layers)

    # -- following ---------------------------------------------------------------------------------------------

    def begin_batch(self, clock: Clock) -> None:
        """Do what each batch needs before it: modes, learning rates, and a note of what trains in it."""
        if self._trained_until != self.version:
            self._trained |= self._trainable
            self._trained_until = self.version
        if self._modes.derived:
            self._modes.sync()
        self.apply_lr(clock)

    def apply_lr(self, clock: Clock) -> None:
        """Write each group's learning rate for ``clock``: ``max(base_lr * scales * schedules(progress), min_lr)``."""
        self.clock = clock
        factor = self.schedule(clock.progress) if self._steady is None else self._steady
        if factor != self._factor or self._moving:
            self._factor = factor
            self._write_lr()

    @contextmanager
    def at_once(self) -> Generator[None]:
        """Derive the groups once for all the changes inside, not once for each.

        What trains is up to date inside, also where an error ends it; :attr:`groups` and :attr:`trainable_parameters`
        are those of before until the end.

        Example:
            >>> from thawline.engine import ParameterLedger
            >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> ledger = ParameterLedger(model, lambda parameters: __import__("torch").optim.SGD(parameters, lr=1.0))
            >>> with ledger.at_once():
            ...     ledger.scale("blocks[0]", 0.25, owner="me")
            ...     ledger.scale("blocks[1]", 0.5, owner="me")
            >>> ledger.rates, ledger.version
            ({'blocks[0]': 0.25, 'blocks[1]': 0.5, 'head': 1.0}, 1)
        """
        self._gathering += 1
        try:
            yield
        finally:
            self._gathering -= 1
            if self._behind and not self._gathering:
                self._regroup()

    def clear_gradients(self) -> None:
        """Set the gradient of every trainable parameter to None."""
        for parameter in self.trainable_parameters:
            parameter.grad = None

    def put_gradients(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        """Make tensors the gradients of parameters: what several ranks have added up, None where nobody has one."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    def follow_exchange(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Take over what the model has now in place of each parameter: its shards, or the whole of them again.

        Names, groups, holds and rates stay; the optimizer's state is laid out as the parameters are.

        Args:
            meanwhile: Called while everything that can train requires a gradient.
        """
        before = self._parameters
        self._read_names()
        assert list(before) == list(self._parameters), "sharding keeps names"
        self.sharded = any(map(is_sharded, self._parameters.values()))
        if meanwhile is not None:
            for name in self._homes:
                self._parameters[name].requires_grad = True
            meanwhile()
        for name, home in self._homes.items():
            self._parameters[name].requires_grad = name in self._trainable
            state = self.optimizers[home.optimizer].state.pop(before[name], None)
            if state is not None and self.sharded:
                self.optimizers[home.optimizer].state[self._parameters[name]] = self._placed(name, state)
        self._kept = {name: self._placed(name, state) for name, state in self._kept.items()} if self.sharded else {}
        self._modes.scan()
        self._regroup()

    def check_on_shards(self, shard: Callable[[Tensor], Tensor], ranks: int) -> None:
        """Check that the optimizers step on shards as they do on whole parameters.

        Args:
            shard: Returns a tensor in shards; all ranks call this together.
            ranks: How many there are.

        Raises:
            OptimizerError: One does not, or keeps parameters to itself.
        """
        tried = {(each.index, self._parameters[name].ndim): name for name, each in self._homes.items()}
        for name in tried.values():
            home, like = self._homes[name], self._parameters[name]
            optimizer = self.optimizers[home.optimizer]
            shape = (2 * ranks + 1, 3, 2, *[1] * like.ndim)[: like.ndim]
            fault = kept_aside(optimizer) or fault_on_shards(optimizer, home.options, like, shape, shard)
            if fault is not None:
                raise OptimizerError(
                    f"{type(optimizer).__name__} does not know weights that lie in shards: {fault}. Write: optimizer=partial("
                    "torch.optim.AdamW, lr=1e-4), or Trainer(distributed=Replicate())."
                )

    def release(self) -> None:
        """Give ``requires_grad`` back as the user had it; what was attached stays and trains. Ends the ledger's work."""
        self.clear_gradients()
        for name, parameter in self._parameters.items():
            if name in self._homes:
                parameter.requires_grad = name not in self._given_frozen
        self._give_groups_back()

    def _give_groups_back(self) -> None:
        """Put the optimizers' groups back as the user made them, with their rates, so that the next fit starts alike."""
        for index, optimizer in enumerate(self.optimizers):
            optimizer.param_groups[:] = [home.template for home in self._home_list if home.optimizer == index]
        for home in self._home_list:
            names = [name for name in self._parameters if self._homes.get(name) is home and name not in self._left_out]
            home.template["params"] = [self._parameters[name] for name in names]
            if "param_names" in home.template:
                home.template["param_names"] = names
            home.template.update(home.replaced)
            if home.lr is not None:
                set_lr(home.template, home.lr)

    # -- carrying out ------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Take the model as the user gave it: what is frozen, or in no group, is held by the user."""
        self._trainable: set[str] = set()
        self._given_frozen = {name for name, each in self._parameters.items() if not each.requires_grad}
        self._left_out = {
            name
            for name, each in self._parameters.items()
            if name in self._homes and id(each) not in self._in_optimizer
        }
        if forgotten := self._left_out - self._given_frozen:
            log.warning(
                "in no optimizer group, so held by the user", parameters=len(forgotten), first=min(forgotten),
                advice="pass a factory such as partial(torch.optim.AdamW, lr=1e-4)",
            )  # fmt: skip
        held = [
            name
            for name, each in self._parameters.items()
            if not each.requires_grad or id(each) not in self._in_optimizer or name not in self._homes
        ]
        if held:
            self._holds.freeze(Selection(tuple(held)), USER, Hold())
            self._leave(held)
        self._place(self._homes)
        self._factor = self.schedule(0.0)
        for optimizer in self.optimizers:
            optimizer.param_groups[:] = []
        self._join([name for name in self._parameters if not self._holds.is_held(name)], restore=False)
        self._regroup()
        self.version, self.changed_by = 0, ()

    def _read_names(self) -> None:
        self._parameters = dict(self.model.named_parameters())
        first = {id(each): name for name, each in self._parameters.items()}
        everything = self.model.named_parameters(remove_duplicate=False)
        self._aliases = {name: first[id(each)] for name, each in everything if first[id(each)] != name}

    def _leave(self, names: Sequence[str], *, keep: bool = True) -> None:
        """Freeze tensors: no gradient, no place in a group, no optimizer state unless every holder keeps it."""
        states = [optimizer.state for optimizer in self.optimizers]
        parameters, homes = self._parameters, self._homes
        for name in names:
            parameter = parameters[name]
            parameter.requires_grad = False
            parameter.grad = None
            if name in homes:
                state = states[homes[name].optimizer].pop(parameter, None)
                if keep and state and self._holds.keeps(name):
                    self._kept[name] = state
        if self._origins:
            self._place([name for name in names if self._origins.pop(name, None) is not None])
        self._trainable.difference_update(names)

    def _join(self, names: Sequence[str], *, restore: bool = True) -> None:
        """Let tensors train: fresh or kept optimizer state, and an origin where a warmup was asked for."""
        for parameter in map(self._parameters.__getitem__, names):
            parameter.requires_grad = True
        self._trainable.update(names)
        if self._holds.warmups:
            self._warm_up(names)
        if restore and (self._kept or any(self._fills)):
            self._restore(names)

    def _warm_up(self, names: Iterable[str]) -> None:
        for name in names:
            warmups = self._holds.warmups.pop(name, None)
            if warmups:
                span = max(warmups.values(), key=lambda time: (time.unit, time.value))
                self._origins[name] = Origin(span, span.elapsed(self.clock))
                self._place((name,))

    def _restore(self, names: Iterable[str]) -> None:
        for name in names:
            home, parameter = self._homes[name], self._parameters[name]
            state = self._kept.pop(name, None)
            if state is None and self._fills[home.optimizer]:
                state = fresh_state(self.optimizers[home.optimizer], parameter, home.options)
            if state:
                self.optimizers[home.optimizer].state[parameter] = state

    def _replace(self, names: Sequence[str]) -> None:
        self._place(names)
        if not self._trainable.isdisjoint(names):
            self._regroup()

    def _place(self, names: Iterable[str]) -> None:
        """Find the slot of each name from its home, settings, factors and origin."""
        interned, holds = self._interned, self._holds
        for name in names:
            home = self._homes.get(name)
            if home is None:
                continue
            base, course = home.lr, None
            options: tuple[tuple[str, float], ...] = ()
            if holds.settings:
                values = holds.set_for(name)
                base, course = values.pop("lr", base), values.pop("schedule", None)
                options = home.take(values)
            scale = holds.factor(name) if holds.factors else 1.0
            origin = self._origins.get(name) if self._origins else None
            key = (home.index, base, scale, origin, course, options)
            slot = interned.get(key)
            if slot is None:
                slot = interned[key] = Slot(home, base, scale, origin, course, options)
            self._slots[name] = slot

    def _regroup(self) -> None:
        """Derive the groups anew and make the optimizers hold them; inside :meth:`at_once`, at its end."""
        self._trainable_names = self._names = self._layers_of_groups = None
        if self._gathering:
            self._behind = True
            return
        self._behind = False
        if len(self._interned) > 2 * len(self._live) + 100:  # a schedule that never ends must not collect slots
            used = set(self._slots.values())
            self._interned = {key: slot for key, slot in self._interned.items() if slot in used}
        self._live, self._members, dead = derive_groups(self._parameters, self._trainable, self._slots, self._live)
        for group in dead:
            group["params"] = []
        for slot, group in self._live.items():
            group["params"] = list(map(self._parameters.__getitem__, self._members[slot]))
            if "param_names" in group:
                group["param_names"] = list(self._members[slot])
            if slot.home.replaced:
                group.update(slot.set_options)
        for index, optimizer in enumerate(self.optimizers):
            optimizer.param_groups[:] = [group for slot, group in self._live.items() if slot.home.optimizer == index]
        self.trainable_parameters = tuple(chain.from_iterable(group["params"] for group in self._live.values()))
        self._moving = any(slot.moves for slot in self._live)
        self._write_lr()
        self._modes.refresh(self._trainable, self._holds)
        self.version += 1
        if self._acting not in self.changed_by:
            self.changed_by += (self._acting,)

    def _group_names(self) -> tuple[str, ...]:
        if self._names is None:
            self._names = name_groups(self._live, self._members, self.layers, self.optimizers)
        return self._names

    def _write_lr(self) -> None:
        self._rated = self.clock
        for slot, group in self._live.items():
            if slot.base_lr is None:
                continue
            set_lr(group, slot.lr(self._factor, self.clock, self.min_lr))

    def _placed(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Put a parameter's saved state on its device, in the state's own dtype; step counters as torch keeps them."""
        options = self._homes[name].options
        on_device = bool(options.get("capturable") or options.get("fused"))
        parameter = self._parameters[name]

        def placed(key: str, value: Any) -> Any:
            if isinstance(value, Tensor) and value.shape == parameter.shape and is_sharded(parameter):
                return shard_like(value, parameter).clone()
            return _copied(value, parameter.device if key != "step" or on_device else torch.device("cpu"))

        return {key: placed(key, value) for key, value in values.items()}

    def _shared(self, optimizer: Optimizer, values: Any, device: str) -> Any:
        """Put an optimizer's saved state of its own on the device of its parameters, unless it lay on the CPU."""
        first = next(chain.from_iterable(group["params"] for group in optimizer.param_groups), None)
        return _copied(values, torch.device("cpu") if device == "cpu" or first is None else first.device)


def _copied(value: Any, device: torch.device) -> Any:
    """Copy a value of an optimizer's state, with all tensors in it on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if type(value) in (list, tuple):
        return type(value)(_copied(each, device) for each in value)
    if type(value) is dict:
        return {key: _copied(each, device) for key, each in value.items()}
    return value


def set_lr(group: dict[str, Any], lr: float) -> None:
    """Write a learning rate; one that is a tensor stays the same tensor."""
    if isinstance(group.get("lr"), Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
