"""The ledger: the only code that decides and records what trains, in which group, at which rate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from .clock import Time
from .errors import ArgumentError, LedgerError, SurgeryError, nearest
from .grafts import Graft, apply_graft, check_grafts, undo_graft
from .groups import Group, Origin, Slot, options_of, view_groups
from .holds import USER, Hold, Holds, Mode, Moments
from .homes import home_of_new
from .invariants import check_groups, check_options, check_parameter, check_rates
from .rates import Rates
from .selectors import Selector, covers
from .surgery import JournalEntry, Site, op_named
from .typing import Json


class ParameterLedger(Rates):
    """What trains, in which group, at which learning rate; who decided it; what was attached.

    Args:
        model: The model. Never wrapped; its parameters keep identity and storage.
        optimizer: An optimizer, a factory over parameters, or a list of ``(select, factory)``.
        layers: A LayerMap, or what its ``layers=`` takes; None finds the layers.
        schedule: Progress (0 to 1) to the factor on every group's rate.
        min_lr: Floor of every learning rate.
        seed: Seed of what surgery initializes.

    Raises:
        LayerError, OptimizerError, SelectorError: As their docstrings say.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> ledger = ParameterLedger(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        >>> ledger.freeze("blocks[0]", owner="me")
        >>> sorted(ledger.trainable), ledger.groups[0].lr
        (['2.bias', '2.weight'], 0.1)
        >>> ledger.thaw("blocks[0]", owner="me")
        >>> len(ledger.trainable)
        4
    """

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
    def frozen(self) -> frozenset[str]:
        """Names of the parameters that do not train."""
        return frozenset(self._parameters) - self._trainable

    @property
    def trainable_parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters that train, in the order of the groups; the same object until :attr:`version` moves."""
        return self._flat

    @property
    def groups(self) -> tuple[Group, ...]:
        """The parameter groups of all optimizers, named by the layers they span."""
        return view_groups(self._live, self._members, self._group_names())

    @property
    def rates(self) -> dict[str, float]:
        """The learning rate of each group now, by the group's name; cheap between two changes."""
        groups = zip(self._group_names(), self._live.values(), strict=True)
        return {name: float(group["lr"]) for name, group in groups if "lr" in group}

    @property
    def slots(self) -> tuple[Slot, ...]:
        """What each group's learning rate is a function of, in the order of :attr:`groups`."""
        return tuple(self._live)

    @property
    def journal(self) -> tuple[JournalEntry, ...]:
        """What was attached, in order."""
        return tuple(entry for entry, _ in self._journal)

    def owners(self, name: str) -> tuple[str, ...]:
        """Return who holds the parameter called ``name``."""
        return self._holds.owners(self._aliases.get(name, name))

    def select(self, select: Selector) -> tuple[str, ...]:
        """Return the canonical names that a selector means; a SelectorError where it matches nothing."""
        return tuple(self._resolve(select).names)

    # -- changing ----------------------------------------------------------------------------------------------

    def freeze(self, select: Selector, *, owner: str, moments: Moments = "drop", mode: Mode = None) -> None:
        """Add ``owner``'s hold: what anybody holds does not train.

        Frozen parameters leave their group, and lose ``.grad`` and the optimizer's state.

        Args:
            select: What to freeze.
            owner: Who holds it; only the same owner's :meth:`thaw` releases this hold.
            moments: ``"keep"`` puts the optimizer's state aside until the parameter trains again.
            mode: ``"eval"`` also puts modules that are wholly held in eval mode (dropout off); ``"train"`` lets the
                statistics of frozen normalization layers go on, where all who hold them say so.

        Raises:
            SelectorError: ``select`` matches nothing.
            LedgerClosedError: Called during forward, backward, step or evaluation.
        """
        self._check_open("freeze", owner)
        if moments not in ("drop", "keep"):
            raise ArgumentError("freeze(moments=)", got=moments, takes="'drop' or 'keep'", example="moments='drop'")
        if mode not in (None, "eval", "train"):
            raise ArgumentError("freeze(mode=)", got=mode, takes="None, 'eval' or 'train'", example="mode='eval'")
        selection = self._resolve(select)
        self._holds.freeze(selection, owner, Hold(moments, mode))
        if moments == "drop" and self._kept:
            for name in selection.names:
                self._kept.pop(name, None)
        leaving = [name for name in selection.names if name in self._trainable]
        if mode is not None:
            self._modes.asked = True
        if leaving:
            self._leave(leaving, keep=moments == "keep")
            self._regroup()
        elif self._modes.asked:
            self._modes.refresh(self._trainable, self._holds)

    def thaw(self, select: Selector, *, owner: str, warmup: Time | str | int | None = None) -> None:
        """Release ``owner``'s hold: what nobody holds any more trains.

        Args:
            select: What to release.
            owner: Whose hold is released; ``"user"`` for what was frozen before the fit.
            warmup: The rate of what begins to train now rises from zero over this time.

        Raises:
            SelectorError: ``select`` matches nothing.
            LedgerError: A parameter that cannot train, such as an integer one.
            LedgerClosedError: Called during forward, backward, step or evaluation.
        """
        self._check_open("thaw", owner)
        span = None if warmup is None else Time(warmup)
        selection = self._resolve(select)
        for name in selection.names:
            # An integer tensor is held by the user: others may release a layer with one in it, the last holder may not.
            if name not in self._homes and not set(self._holds.owners(name)) - {owner}:
                raise LedgerError(f"{name!r} has dtype {self._parameters[name].dtype} and cannot train. Thaw others.")
        released = self._holds.thaw(selection, owner, span)
        joining = self._holds.free(released)
        if joining:
            self._join(joining)
            self._regroup()
        elif released and self._modes.asked:
            self._modes.refresh(self._trainable, self._holds)

    def attach(self, module_name: str, op: str, *, owner: str, **arguments: Json) -> None:
        """Attach what a surgery op builds, and record it.

        New parameters lie in the layer of the weight they stand beside, take its optimizer options and
        factors, and train unless another owner's pattern holds them.

        Args:
            module_name: Name of the module, such as ``"encoder.layer.0.attention.self.query"``.
            op: Name of a registered op, such as ``"lora"``.
            owner: Who attaches it.
            **arguments: The op's arguments: plain JSON, written to the journal.

        Raises:
            SurgeryError: No such module or op, or the op refuses the module. The model is as before.
            LedgerClosedError: Called during forward, backward, step or evaluation.
        """
        self._check_open("attach", owner)
        module = self._module(module_name)
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{module_name}/{op}".encode()).digest()[:8]) >> 1
        site = Site(self.model, module_name, module, torch.Generator().manual_seed(seed))
        attachments = tuple(op_named(op)(site, **arguments))
        check_grafts(self.model, attachments, op)
        grafts = tuple(apply_graft(self.model, each, self._overrides) for each in attachments)
        self._journal.append((JournalEntry(module_name, op, owner, dict(arguments)), grafts))
        self._enroll(grafts, owner)

    def detach(self, module_name: str, op: str, *, owner: str) -> None:
        """Undo :meth:`attach`: the module gets its class and its parameters back as they were.

        Raises:
            SurgeryError: This owner attached no such thing, or something was attached on top of it.
        """
        self._check_open("detach", owner)
        for index in reversed(range(len(self._journal))):
            entry, grafts = self._journal[index]
            if (entry.module, entry.op, entry.owner) == (module_name, op, owner):
                break
        else:
            known = sorted({f"{entry.module} ({entry.op}, {entry.owner})" for entry, _ in self._journal}) or ["nothing"]
            raise SurgeryError(
                f"{owner!r} attached no {op!r} to {module_name!r}. Attached: {nearest(module_name, known)}."
            )
        for graft in reversed(grafts):
            undo_graft(self.model, graft, self._overrides)
        del self._journal[index]
        gone = {name for graft in grafts for name in graft.parameters}
        for name in gone & set(self._parameters):
            self.optimizers[self._homes[name].optimizer].state.pop(self._parameters[name], None)
        self._holds.forget(gone)
        for table in (self._homes, self._slots, self._origins, self._kept):
            for name in gone:
                table.pop(name, None)
        self._trainable -= gone
        self._read_names()
        self.layers.follow(tuple(self._parameters), {})
        self._modes.scan()
        self._regroup()

    def drop_moments(self, select: Selector, *, owner: str) -> None:
        """Forget the optimizer's state of parameters whose values were replaced; they go on as if fresh.

        Raises:
            SelectorError: ``select`` matches nothing.
            LedgerClosedError: Called during forward, backward, step or evaluation.
        """
        self._check_open("drop_moments", owner)
        names = [name for name in self._resolve(select).names if name in self._homes]
        for name in names:
            self._kept.pop(name, None)
            self.optimizers[self._homes[name].optimizer].state.pop(self._parameters[name], None)
        self._restore([name for name in names if name in self._trainable])

    @contextmanager
    def together(self) -> Generator[None]:
        """Derive the groups once for all changes made inside the block, also where one of them fails.

        Inside, what trains is as the changes say, and groups and rates are those of before.

        Example:
            >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
            >>> ledger = ParameterLedger(model, torch.optim.AdamW(model.parameters(), lr=0.1))
            >>> with ledger.together():
            ...     ledger.freeze("blocks[0]", owner="me")
            ...     ledger.scale("head", 0.5, owner="me")
            >>> ledger.version, ledger.groups[0].lr
            (1, 0.05)
        """
        if self._together:
            yield
            return
        self._together, self._stale = True, False
        try:
            yield
        finally:
            self._together = False
            if self._stale:
                self._regroup()

    # -- checking ----------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Check every invariant.

        Raises:
            LedgerError: Names the parameter or group that breaks one, and the call to use instead.
        """
        check_groups(self.optimizers, self._live, self._parameters, self._trainable)
        for name, parameter in self._parameters.items():
            home = self._homes.get(name)
            has_state = home is not None and parameter in self.optimizers[home.optimizer].state
            holders = self._holds.owners(name)
            check_parameter(name, parameter, trains=name in self._trainable, holders=holders, has_state=has_state)
        check_options(self._live, self._members)
        check_rates(self._live, self._members, self._factor, self._rated, self.min_lr)
        if [id(each) for _, each in self.model.named_parameters()] != [id(each) for each in self._parameters.values()]:
            raise LedgerError(
                "the model's parameters were exchanged behind the ledger. Write ledger.attach(module, op, owner=...)."
            )

    def digest(self) -> str:
        """Return a hash of what trains, in which groups, at which rates, and of what is attached; the same on all ranks."""
        facts = [
            [name, list(each.shape), str(each.dtype), each.requires_grad, name in self._trainable]
            for name, each in self._parameters.items()
        ]
        groups = [
            [
                *(slot.home.index, self._members[slot], None if slot.base_lr is None else float(group["lr"])),
                *(slot.scale, slot.set_options),
            ]
            for slot, group in self._live.items()
        ]
        journal = [[entry.module, entry.op, entry.owner, entry.arguments] for entry in self.journal]
        holds = {owner: sorted(mine) for owner, mine in self._holds.held.items()}
        text = json.dumps([facts, groups, journal, holds], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @override
    def __repr__(self) -> str:
        numel = sum(each.numel() for each in self._parameters.values())
        trains = sum(self._parameters[name].numel() for name in self._trainable)
        return f"<ParameterLedger: {trains:,} of {numel:,} parameters train, in {len(self._live)} groups, version {self.version}>"

    # -- saving ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything by name: JSON, and the tensors of the optimizer's state (not copied)."""
        state: dict[str, dict[str, Any]] = {}
        shared: list[dict[str, Any]] = []
        names = {id(each): name for name, each in self._parameters.items()}
        for optimizer in self.optimizers:
            shared.append({str(key): value for key, value in optimizer.state.items() if not isinstance(key, Tensor)})
            for parameter, values in optimizer.state.items():
                if isinstance(parameter, Tensor):
                    state[names[id(parameter)]] = {str(key): value for key, value in values.items()}
        return {
            "parameters": list(self._parameters),
            "trainable": [name for name in self._parameters if name in self._trainable],
            "holds": self._holds.state_dict(),
            "origins": {name: [str(origin.warmup), origin.start] for name, origin in self._origins.items()},
            "homes": [{"lr": home.lr, "options": home.options, "given": dict(home.given)} for home in self._home_list],
            "home_of": {name: home.index for name, home in self._homes.items()},
            "groups": [
                {"home": slot.home.index, "parameters": self._members[slot], "options": options_of(group)}
                for slot, group in self._live.items()
            ],
            "journal": [[entry.module, entry.op, entry.owner, entry.arguments] for entry in self.journal],
            "state": state,
            "shared": shared,
            "kept": {name: dict(values) for name, values in self._kept.items()},
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Make model structure, trainable set, groups and optimizer state what :meth:`state_dict` saw.

        The weights themselves are the model's: load them afterwards, once the structure is there.

        Raises:
            LedgerError: The parameters or the optimizer's groups are other ones.
        """
        self._check_open("load_state_dict", USER)
        for entry in reversed(self.journal):
            self.detach(entry.module, entry.op, owner=entry.owner)
        for module, op, owner, arguments in saved["journal"]:
            self.attach(module, op, owner=owner, **arguments)
        self._check_same(saved)
        self._holds = Holds.from_state(saved["holds"])
        self._modes.asked = any(hold.mode is not None for mine in self._holds.held.values() for hold in mine.values())
        by_index = {home.index: home for home in self._home_list}
        for home, entry in zip(self._home_list, saved["homes"], strict=True):
            home.lr, home.given = entry["lr"], dict(entry["given"])
            home.template.update({key: value for key, value in entry["options"].items() if key != "lr"})
        self._homes = {name: by_index[index] for name, index in saved["home_of"].items()}
        trainable = set(saved["trainable"])
        self._leave([name for name in self._parameters if name in self._trainable])
        self._join([name for name in self._parameters if name in trainable])
        self._origins = {name: Origin(Time(time), start) for name, (time, start) in saved["origins"].items()}
        self._interned.clear()
        self._place(self._homes)
        self._regroup()
        for (slot, group), entry in zip(self._live.items(), saved["groups"], strict=True):
            if self._members[slot] != list(entry["parameters"]):
                raise LedgerError(
                    f"the group of {self._members[slot][0]!r} cannot be restored: it was saved with other members."
                )
            # Not the rate: it is a function of the clock, and the saved one is that of the step before.
            group.update({key: value for key, value in entry["options"].items() if key != "lr"})
        self._kept = {name: self._placed(name, values) for name, values in saved["kept"].items()}
        for optimizer, values in zip(self.optimizers, saved["shared"], strict=True):
            optimizer.state.update(values)
        for name, values in saved["state"].items():
            optimizer = self.optimizers[self._homes[name].optimizer]
            optimizer.state[self._parameters[name]] = self._placed(name, values)

    # -- inside ------------------------------------------------------------------------------------------------

    def _module(self, name: str) -> nn.Module:
        try:
            return self.model.get_submodule(name)
        except (AttributeError, TypeError):
            known = nearest(str(name), [each for each, _ in self.model.named_modules() if each])
            raise SurgeryError(f"the model has no module {name!r}. Nearest: {known}.") from None

    def _enroll(self, grafts: Iterable[Graft], owner: str) -> None:
        self._read_names()
        beside = {name: graft.beside for graft in grafts for name in graft.parameters if name in self._parameters}
        beside = {name: self._aliases.get(other, other) for name, other in beside.items()}
        self.layers.follow(tuple(self._parameters), beside)
        for name, other in beside.items():
            parameter = self._parameters[name]
            parameter.requires_grad = False
            if other in self._homes and (parameter.is_floating_point() or parameter.is_complex()):
                self._homes[name] = home_of_new(
                    name, parameter, self._homes[other], homes=self._homes, parameters=self._parameters,
                    selectors=self._selectors, layers=self.layers,
                )  # fmt: skip
            self._holds.enroll(name, other, owner, lambda pattern, each: covers(pattern, each, self.layers))
        self._modes.scan()
        self._place(beside)
        self._join([name for name in beside if name in self._homes and not self._holds.is_held(name)])
        self._regroup()

    def _check_same(self, saved: Mapping[str, Any]) -> None:
        mine, theirs = list(self._parameters), list(saved["parameters"])
        if mine != theirs:
            missing = [name for name in theirs if name not in self._parameters]
            extra = sorted(set(mine) - set(theirs))
            raise LedgerError(
                f"the model is not the one that was saved: missing {missing[:3]}, unknown to the checkpoint {extra[:3]}. "
                "Build it as in the run that was saved."
            )
        if len(saved["homes"]) != len(self._home_list):
            raise LedgerError(
                f"the optimizer was saved with {len(saved['homes'])} groups of its own and has {len(self._home_list)} now. "
                "Build it as in the run that was saved."
            )
