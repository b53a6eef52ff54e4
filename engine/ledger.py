"""The ledger: the only code that decides and records what trains, in which group, at which rate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from .clock import Clock, Time
from .errors import ArgumentError, LedgerError, SurgeryError, nearest
from .grafts import Graft, build_grafts, keep_record, record_of, undo_graft
from .groups import Origin, but_rate, options_of
from .holds import USER, Hold, Holds, Mode, Moments
from .homes import home_of_new, names_of, state_by_name
from .invariants import check_groups, check_options, check_parameter, check_rates, check_slots
from .keywords import LEDGER, explained_methods
from .rates import Rates
from .replay import journal_of
from .selectors import Selector, covers
from .surgery import JournalEntry, parents_of
from .typing import Json


@explained_methods("ledger", LEDGER)
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
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> ledger = ParameterLedger(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        >>> ledger.freeze("blocks[0]", owner="me")
        >>> sorted(ledger.trainable), ledger.groups[0].lr
        (['2.bias', '2.weight'], 0.1)
        >>> ledger.thaw("blocks[0]", owner="me")
        >>> len(ledger.trainable)
        4
    """

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

    def evaluate_frozen(self, select: Selector | None, *, owner: str) -> None:
        """Put modules in eval mode (dropout off) as long as none of their parameters trains; nothing is held.

        It is not saved: who asks for it asks again in a resumed fit.

        Args:
            select: The parameters whose modules it is; replaces what ``owner`` asked for before. None: no longer any.
            owner: Who asks.

        Raises:
            SelectorError: ``select`` matches nothing.
            LedgerClosedError: Called during forward, backward, step or evaluation.
        """
        self._check_open("evaluate_frozen", owner)
        if select is None:
            self._modes.calm.pop(owner, None)
        else:
            self._modes.calm[owner] = frozenset(self._resolve(select).names)
        self._modes.asked = True
        self._modes.refresh(self._trainable, self._holds)

    def attach(self, module_name: str | Sequence[str], op: str, *, owner: str, **arguments: Json) -> None:
        """Attach what a surgery op builds, and record it.

        New parameters lie in the layer of the weight they stand beside, take its optimizer options and
        factors, and train unless another owner's pattern holds them.

        Args:
            module_name: Name of the module, such as ``"encoder.layer.0.attention.self.query"``, or of several.
            op: Name of a registered op, such as ``"lora"``.
            owner: Who attaches it.
            **arguments: The op's arguments: plain JSON, written to the journal.

        Raises:
            SurgeryError: No such module or op, or the op refuses the module. The model is as before.
            LedgerClosedError: Called during forward, backward, step or evaluation.
        """
        self._check_open("attach", owner)
        record, parents = record_of(self.model), parents_of(self.model)
        made: list[tuple[JournalEntry, tuple[Graft, ...]]] = []
        try:
            for name in [module_name] if isinstance(module_name, str) else module_name:
                entry = JournalEntry(name, op, owner, dict(arguments))
                grafts = build_grafts(
                    self.model, name, op, arguments, overrides=record.overrides, seed=self.seed, parents=parents
                )
                made.append((entry, grafts))
        except BaseException:
            for graft in reversed([graft for _, grafts in made for graft in grafts]):
                undo_graft(self.model, graft, record.overrides)
            raise
        record.entries += made
        keep_record(self.model, record)
        self._enroll([graft for _, grafts in made for graft in grafts], owner)

    def detach(self, module_name: str, op: str, *, owner: str) -> None:
        """Undo :meth:`attach`: the module gets its class and its parameters back as they were.

        Raises:
            SurgeryError: This owner attached no such thing, or something was attached on top of it.
        """
        self._check_open("detach", owner)
        record = record_of(self.model)
        for index in reversed(range(len(record.entries))):
            entry, grafts = record.entries[index]
            if (entry.module, entry.op, entry.owner) == (module_name, op, owner):
                break
        else:
            known = sorted({f"{entry.module} ({entry.op}, {entry.owner})" for entry in self.journal}) or ["nothing"]
            raise SurgeryError(
                f"{owner!r} attached no {op!r} to {module_name!r}. Attached: {nearest(module_name, known)}."
            )
        for graft in reversed(grafts):
            undo_graft(self.model, graft, record.overrides)
        del record.entries[index]
        keep_record(self.model, record)
        gone = {name for graft in grafts for name in graft.parameters}
        for name in gone & set(self._parameters):
            self.optimizers[self._homes[name].optimizer].state.pop(self._parameters[name], None)
        self._holds.forget(gone)
        for table in (self._homes, self._slots, self._origins, self._kept):
            for name in gone:
                table.pop(name, None)
        self._trainable -= gone
        self._read_names()
        self.layers.follow(self._parameters, {})
        self._modes.scan()
        self._regroup()

    def dismiss(self, owner: str) -> None:
        """Release every hold, factor, schedule and rate of ``owner``; what it attached stays, and so does its training.

        Raises:
            LedgerClosedError: Called during forward, backward, step or evaluation.
        """
        self._check_open("dismiss", owner)
        released = self._holds.dismiss(owner)
        self._place(self._homes)
        self._join([name for name in self._holds.free(released) if name in self._homes])
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
        check_slots(self._members, self._holds)
        check_rates(self._live, self._members, self._factor, self._rated, self.min_lr)
        if [id(each) for _, each in self.model.named_parameters()] != [id(each) for each in self._parameters.values()]:
            raise LedgerError(
                "the model's parameters were exchanged behind the ledger. Write ledger.attach(module, op, owner=...)."
            )

    def facts(self) -> dict[str, Json]:
        """Return by name what trains, in which groups, at which rates, who holds what, and what is attached: plain JSON."""
        facts: dict[str, Any] = {
            name: {
                "shape": list(each.shape),
                "dtype": str(each.dtype),
                "requires_grad": each.requires_grad,
                "trains": name in self._trainable,
            }
            for name, each in self._parameters.items()
        }
        for number, (slot, group) in enumerate(self._live.items()):
            lr = None if slot.base_lr is None else float(group["lr"])
            facts[f"group {number}"] = {
                "optimizer group": slot.home.index, "parameters": self._members[slot], "lr": lr, "scale": slot.scale,
                "options": slot.set_options,
            }  # fmt: skip
        for owner, mine in self._holds.held.items():
            facts[f"held by {owner}"] = sorted(mine)
        facts["attached"] = [
            {"module": entry.module, "op": entry.op, "owner": entry.owner, "arguments": entry.arguments}
            for entry in self.journal
        ]
        return facts

    def digest(self) -> str:
        """Return a hash of :meth:`facts`; the same on all ranks."""
        text = json.dumps(self.facts(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @override
    def __repr__(self) -> str:
        numel = sum(each.numel() for each in self._parameters.values())
        trains = sum(self._parameters[name].numel() for name in self._trainable)
        return f"<ParameterLedger: {trains:,} of {numel:,} parameters train, in {len(self._live)} groups, version {self.version}>"

    # -- saving ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything by name: JSON, and the tensors of the optimizer's state (not copied)."""
        names = {id(each): name for name, each in self._parameters.items()}
        optimizers = {
            title: state_by_name(each, names)
            for title, each in zip(names_of(self.optimizers), self.optimizers, strict=True)
        }
        for entry in optimizers.values():
            entry["kept"] = {}
        for name, values in self._kept.items():
            list(optimizers.values())[self._homes[name].optimizer]["kept"][name] = dict(values)
        return {
            "parameters": list(self._parameters),
            "trainable": [name for name in self._parameters if name in self._trainable],
            "given_frozen": sorted(self._given_frozen),
            "trained": sorted(self._trained),
            "holds": self._holds.state_dict(),
            "origins": {name: [str(origin.warmup), origin.start] for name, origin in self._origins.items()},
            "layers": {layer.name: list(layer.parameters) for layer in self.layers},
            "homes": [
                {
                    "lr": home.lr,
                    "options": but_rate(home.options),
                    "given": home.given,
                    "replaced": dict(home.replaced),
                }
                for home in self._home_list
            ],
            "home_of": {name: home.index for name, home in self._homes.items()},
            "groups": [
                {"home": slot.home.index, "parameters": self._members[slot], "options": but_rate(options_of(group))}
                for slot, group in self._live.items()
            ],
            "rated": [self._factor, self._rated.to_json()],
            "journal": journal_of(self.model),
            "optimizers": optimizers,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Make model structure, trainable set, groups and optimizer state what :meth:`state_dict` saw.

        The weights themselves are the model's: load them afterwards, once the structure is there.

        Raises:
            LedgerError: The parameters or the optimizer's groups are other ones.
        """
        self._check_open("load_state_dict", USER)
        self.replay(saved["journal"])
        self._check_same(saved)
        self._holds = Holds.from_state(saved["holds"])
        moded = any(hold.mode is not None for mine in self._holds.held.values() for hold in mine.values())
        self._modes.asked = moded or bool(self._modes.calm)
        by_index = {home.index: home for home in self._home_list}
        for home, entry in zip(self._home_list, saved["homes"], strict=True):
            home.lr, home.given, home.replaced = entry["lr"], dict(entry["given"]), dict(entry["replaced"])
            home.template.update(entry["options"])
        self._homes = {name: by_index[index] for name, index in saved["home_of"].items()}
        trainable, self._trained = set(saved["trainable"]), set(saved["trained"])
        # A fit that rolls back brings optimizer state of later steps along.
        self._leave([name for name in self._parameters if name in self._trainable], keep=False)
        self._kept = {}
        for optimizer in self.optimizers:
            optimizer.state.clear()
        self._join([name for name in self._parameters if name in trainable])
        self._origins = {name: Origin(Time(time), start) for name, (time, start) in saved["origins"].items()}
        self._interned.clear()
        self._place(self._homes)
        self._factor, rated = saved["rated"]
        self.clock = Clock.from_json(rated)  # until it is set: the rates are those of before, until the next batch's
        self._regroup()
        self.changed_by = ()
        for (slot, group), entry in zip(self._live.items(), saved["groups"], strict=True):
            if self._members[slot] != list(entry["parameters"]):
                raise LedgerError(
                    f"the group of {self._members[slot][0]!r} cannot be restored: it was saved with other members."
                )
            group.update(entry["options"])
        for optimizer, entry in zip(self.optimizers, saved["optimizers"].values(), strict=True):
            for (key, values), device in zip(entry["shared"].items(), entry["shared_on"], strict=True):
                optimizer.state[key] = self._shared(optimizer, values, device)
            self._kept.update({name: self._placed(name, values) for name, values in entry["kept"].items()})
            for name, values in entry["state"].items():
                optimizer.state[self._parameters[name]] = self._placed(name, values)

    def replay(self, journal: Sequence[Sequence[Any]]) -> None:
        """Attach what a saved journal says, and nothing else; what is attached so already stays as it is."""
        if self.sharded and journal_of(self.model) == list(journal):
            return
        for entry in reversed(self.journal):
            self.detach(entry.module, entry.op, owner=entry.owner)
        for (op, owner, arguments), entries in groupby(journal, key=lambda entry: entry[1:]):
            self.attach([module for module, *_ in entries], op, owner=owner, **arguments)

    # -- inside ------------------------------------------------------------------------------------------------

    def _enroll(self, grafts: Iterable[Graft], owner: str) -> None:
        self._read_names()
        beside = {name: graft.beside for graft in grafts for name in graft.parameters if name in self._parameters}
        beside = {name: self._aliases.get(other, other) for name, other in beside.items()}
        self.layers.follow(self._parameters, beside)
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
        names, saved_names = names_of(self.optimizers), tuple(saved["optimizers"])
        if names != saved_names:
            raise LedgerError(
                f"the optimizer was saved as {', '.join(saved_names)} and is {', '.join(names)} now. Build it as in the run "
                "that was saved."
            )
        if len(saved["homes"]) != len(self._home_list):
            raise LedgerError(
                f"the optimizer was saved with {len(saved['homes'])} groups of its own and has {len(self._home_list)} now. "
                "Build it as in the run that was saved."
            )


@contextmanager
def at_rest(parameters: Iterable[nn.Parameter]) -> Generator[None]:
    """Let none of the parameters require a gradient, and give back which did: for code that records none and asks for it.

    Example:
        >>> weight = nn.Linear(2, 1).weight
        >>> with at_rest([weight]):
        ...     print(weight.requires_grad)
        False
        >>> weight.requires_grad
        True
    """
    trained = [each for each in parameters if each.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad = False
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad = True


def replace_buffer(module: nn.Module, name: str, buffer: Tensor | None) -> None:
    """Put another tensor in the place of a buffer that the module replaces itself; nothing new is attached."""
    assert name in module._buffers
    module._buffers[name] = buffer
