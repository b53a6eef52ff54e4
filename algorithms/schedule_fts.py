"""Schedules of finetuning-scheduler, the extension of Lightning, as phases."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
from torch import nn

from ..engine import ArgumentError, Time, nearest, warn
from .name_patterns import compact, cuts_number, guarded, precise
from .phases import Phase, Plateau
from .schedule_tree import Faults, Item, read_tree

_KEYS = ("params", "max_transition_epoch", "lr", "new_lr_scheduler", "new_optimizer")
_LONGEST_PATTERN = 500
_MOST_REPEATS = 6
"""How often a regular expression may repeat: each adds a power to the time that it takes."""


@attrs.frozen
class Callback:
    """The arguments of finetuning-scheduler's callbacks that its schedules leave to them, with its defaults.

    Args:
        epoch_transitions_only: Phases end by their epoch alone, never by early stopping.
        base_max_lr: The rate of phases after the first that name none.
        restore_best: Each phase but the last ends with its best weights.
        monitor: The metric of early stopping, by its name in thawline.
        patience: Evaluations without an improvement.
        min_delta: A change this small is none.
        mode: ``"min"``, ``"max"`` or ``"auto"``.
    """

    epoch_transitions_only: bool = False
    base_max_lr: float = 1e-5
    restore_best: bool = True
    monitor: str = "eval/loss"
    patience: int = 3
    min_delta: float = 0.0
    mode: Literal["auto", "min", "max"] = "auto"


def phases_from_fts(
    source: str | Path | Mapping[Any, Any], model: nn.Module, *, callback: Callback | None = None
) -> tuple[Phase, ...]:
    """Read a schedule of finetuning-scheduler 2.x.

    ``max_transition_epoch`` counts from the begin of the fit and ``until`` from the begin of the phase: the phases last
    as long as there where each has one and early stopping does not cut one short.

    Args:
        source: The path of the file, its text, or the same as a dict.
        model: The model whose parameters it names. A LightningModule's prefix ``model.`` may be missing in it.
        callback: How the callback was configured that ran the schedule; None for its defaults.

    Raises:
        ScheduleError: Something is wrong with the schedule, or has no place here; all of it is said at once.

    Warns:
        ThawlineWarning: What comes out trains otherwise than it looks: an expression takes more than it seems to, a
            parameter is in no phase, or a key means something else here.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> text = "0: {params: ['1.weight', '1.bias'], max_transition_epoch: 3}" + chr(10) + "1: {params: ['0.*']}"
        >>> for phase in phases_from_fts(text, model):
        ...     print(phase.thaw, phase.lr, phase.until)
        ('1',) None Plateau(monitor='eval/loss', patience=3, min_delta=0.0, mode='auto', at_most=Time('3ep'))
        ('0',) 1e-05 Plateau(monitor='eval/loss', patience=3, min_delta=0.0, mode='auto', at_most=None)
        >>> with warnings.catch_warnings(record=True, action="always") as caught:
        ...     phases = phases_from_fts("0: {params: ['1.weight']}", model, callback=Callback(restore_best=False))
        >>> str(caught[0].message)
        'the schedule: no phase names 0.weight, 0.bias, 1.bias: they stay frozen. Name them where they shall thaw.'
        >>> phases_from_fts("0: {params: ['1.*']}", model.parameters())
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: from_fts(model=) takes a torch.nn.Module, got <generator ...>. ...
        >>> phases_from_fts("0: {params: ['2.*']}", model)
        Traceback (most recent call last):
        thawline.engine.errors.ScheduleError: the schedule has 1 error:
          line 1: '2.*' matches no parameter, the nearest are '0.weight', '0.bias', ...
    """
    for argument, got, kind, last in (
        ("model", model, nn.Module, "model"),
        ("callback", callback, (Callback, type(None)), "model, callback=Callback(patience=5)"),
    ):
        if not isinstance(got, kind):
            takes = "a torch.nn.Module" if argument == "model" else "a Callback or None"
            example = f"ThawSchedule.from_fts('old.yaml', {last})"
            raise ArgumentError(f"from_fts({argument}=)", got=got, takes=takes, example=example)
    faults, notes = Faults(), list[str]()
    name, tree = read_tree(source, faults)
    entries = _numbered(tree, faults)
    names = [each for each, _ in model.named_parameters()]
    reading = _Reading(names, callback or Callback(), faults, notes)
    phases = [reading.phase(number, item, last=number == len(entries) - 1) for number, item in enumerate(entries)]
    if len(faults):
        raise faults.error(name)
    if left := [each for each in names if each not in reading.where]:
        more = f" and {len(left) - 3} more" * (len(left) > 3)
        notes.append(f"no phase names {', '.join(left[:3])}{more}: they stay frozen. Name them where they shall thaw.")
    for note in notes:
        warn(f"{name}: {note}")
    return tuple(phase for phase in phases if phase is not None)


def _numbered(tree: Item, faults: Faults) -> list[Item]:
    """Return the phases by their numbers, which begin at 0 and leave none out.

    Example:
        >>> faults = Faults()
        >>> [item.value for item in _numbered(read_tree("{1: later, 0: first}", faults)[1], faults)], len(faults)
        (['first', 'later'], 0)
        >>> for text in ("{0: a, 2: c, 4: d}", "{0: a, one: b}", "{}", "[a]"):
        ...     print(len(_numbered(read_tree(text, faults)[1], faults)), faults.found[-1][1])
        3 the phases are numbered from 0 without a gap, and 1 is missing before 2
        1 a phase's key is its number, got 'one'
        0 a schedule of finetuning-scheduler maps phase numbers to phases
        0 a schedule of finetuning-scheduler maps phase numbers to phases
    """
    if tree.kind != "map" or not tree.value:
        faults.add(tree.place, "a schedule of finetuning-scheduler maps phase numbers to phases", "0: {params: […]}")
        return []
    numbers: dict[int, Item] = {}
    for key, item in tree.value.items():
        if re.fullmatch(r"\d{1,9}", key) is None:
            faults.add(item.place, f"a phase's key is its number, got {key[:60]!r}", f"{len(numbers)}:")
        else:
            numbers[int(key)] = item
    for place, number in enumerate(sorted(numbers)):
        if number != place:
            problem = f"the phases are numbered from 0 without a gap, and {place} is missing before {number}"
            faults.add(numbers[number].place, problem, f"{place}:")
            break
    return [numbers[number] for number in sorted(numbers)]


class _Reading:
    """Reads one phase after the other; knows which parameters and epochs are taken.

    Example:
        >>> reading = _Reading(["a.w", "a.b", "b.w"], Callback(epoch_transitions_only=True, patience=5), Faults(), [])
        >>> tree = read_tree("[{params: [b.w], max_transition_epoch: 2}, {params: [a.w, a.b], lr: 1e-3}]", Faults())[1]
        >>> first = reading.phase(0, tree.value[0], last=False)
        >>> first.thaw, first.lr, first.until, first.restore, first.restore_monitor
        (('b',), None, Time('2ep'), 'best', 'eval/loss')
        >>> last = reading.phase(1, tree.value[1], last=True)
        >>> last.thaw, last.lr, last.until, last.restore, last.restore_monitor
        (('a',), 0.001, None, None, None)
        >>> reading.where
        {'b.w': 0, 'a.w': 1, 'a.b': 1}
    """

    def __init__(self, names: Sequence[str], callback: Callback, faults: Faults, notes: list[str]) -> None:
        self._names, self._callback, self._faults, self._notes = names, callback, faults, notes
        self.where: dict[str, int] = {}
        self._epoch: int | None = 0

    def phase(self, number: int, item: Item, *, last: bool) -> Phase | None:
        """Return a phase, or None where it has a fault.

        Example:
            >>> faults = Faults()
            >>> reading = _Reading(["a.w", "b.w"], Callback(), faults, [])
            >>> tree = read_tree("[{params: [a.w], rl: 1}, {params: [a.w], new_optimizer: SGD}, {}, b.w]", Faults())[1]
            >>> [reading.phase(number, item, last=False) for number, item in enumerate(tree.value)]
            [None, None, None, None]
            >>> for _, problem, write in faults.found:
            ...     print(problem, "|", write)
            unknown key 'rl', the nearest is 'lr' | lr: …
            new_optimizer has no place here: a fit keeps its optimizer, and with it what it has learned | Trainer(optimizer=[(select, factory), …]), an optimizer for each part of the model
            'a.w' thaws in phase 1, and in phase 0 already | it in one of them
            phase 2 has a list of params | params: ['classifier.weight']
            phase 3 is a mapping with params in it | params: […]
        """
        if item.kind != "map":
            if item.kind != "refused":
                self._faults.add(item.place, f"phase {number} is a mapping with params in it", "params: […]")
            return None
        before = len(self._faults)
        entries: dict[str, Item] = item.value
        self._refuse(entries)
        names = self._params(number, entries.get("params"), item)
        lr = self._lr(number, entries.get("lr"))
        until = self._until(number, entries.get("max_transition_epoch"), item, last=last)
        schedule = self._schedule(number, entries.get("new_lr_scheduler"))
        if len(self._faults) > before or not names:
            return None
        restore: Literal["best"] | None = "best" if self._callback.restore_best and not last else None
        monitor = self._callback.monitor if restore and not isinstance(until, Plateau) else None
        thaw = compact(names, self._names)
        return Phase(thaw=thaw, lr=lr, until=until, schedule=schedule, restore=restore, restore_monitor=monitor)

    def _refuse(self, entries: Mapping[str, Item]) -> None:
        for key, each in entries.items():
            if key not in _KEYS:
                near = nearest(key, _KEYS, count=1).strip("'")
                self._faults.add(each.place, f"unknown key {key[:60]!r}, the nearest is {near!r}", f"{near}: …")
        if "new_optimizer" in entries:
            problem = "new_optimizer has no place here: a fit keeps its optimizer, and with it what it has learned"
            write = "Trainer(optimizer=[(select, factory), …]), an optimizer for each part of the model"
            self._faults.add(entries["new_optimizer"].place, problem, write)

    def _params(self, number: int, item: Item | None, phase: Item) -> list[str]:
        """Return the parameters of a phase in the model's order.

        Example:
            >>> faults = Faults()
            >>> reading = _Reading(["a.w", "a.b", "b.w"], Callback(), faults, [])
            >>> item = read_tree("[b.w, 'a.*', 3]", faults)[1]
            >>> reading._params(0, item, item), faults.found
            (['a.w', 'a.b', 'b.w'], [(1, 'params are names of parameters or regular expressions', "- '3'")])
        """
        found: dict[str, None] = {}
        listed = item.value if item is not None and item.kind == "list" else ()
        if not listed:
            self._faults.add(
                (item or phase).place, f"phase {number} has a list of params", "params: ['classifier.weight']"
            )
        for each in listed:
            if each.kind == "text":
                found.update(dict.fromkeys(self._matches(each)))
            elif each.kind != "refused":
                problem = "params are names of parameters or regular expressions"
                self._faults.add(each.place, problem, f"- '{each.written or 'classifier.weight'}'")
        for name in found:
            if (other := self.where.setdefault(name, number)) != number:
                problem = f"{name!r} thaws in phase {number}, and in phase {other} already"
                self._faults.add((item or phase).place, problem, "it in one of them")
        return [name for name in self._names if name in found]

    def _matches(self, item: Item) -> list[str]:
        r"""Return the parameters that a name or an expression takes, with or without ``model.`` before it.

        Example:
            >>> faults = Faults()
            >>> reading = _Reading(["a.w", "a.w2", "b.w"], Callback(), faults, [])
            >>> [reading._matches(Item("text", text, 1)) for text in ("a.w", "a.*", "model.b.w", "model.a.*", "c", "(")]
            [['a.w'], ['a.w', 'a.w2'], ['b.w'], ['a.w', 'a.w2'], [], []]
            >>> for _, problem, write in faults.found:
            ...     print(problem, "|", write)
            'c' matches no parameter, the nearest are 'a.w', 'a.w2', 'b.w' | 'a.w', 'a.w2', 'b.w'
            '(' is no regular expression that is read here: missing ), unterminated subpattern at position 0 | - 'encoder\.layer\.1\..*'
        """
        pattern: str = item.value
        for text in dict.fromkeys((pattern, re.sub(r"^model(\\?\.)", "", pattern))):
            if text in self._names:
                return [text]
            try:
                names = self._search(text)
            except (re.error, ValueError, OverflowError, RecursionError) as error:
                problem = f"{ascii(pattern)[:60]} is no regular expression that is read here: {error}"
                self._faults.add(item.place, problem, r"- 'encoder\.layer\.1\..*'")
                return []
            if names:
                self._warn_surplus(text, names, item)
                return names
        near = nearest(pattern, self._names)
        self._faults.add(item.place, f"{ascii(pattern)[:60]} matches no parameter, the nearest are {near}", near)
        return []

    def _search(self, pattern: str) -> list[str]:
        """Return the parameters whose names begin as an expression says; one that may take long is refused.

        Example:
            >>> reading = _Reading(["a.w", "a.b", "b.a"], Callback(), Faults(), [])
            >>> reading._search("a"), reading._search(".*" * 6 + "w")
            (['a.w', 'a.b'], ['a.w'])
            >>> for pattern in ("a" * 501, ".*" * 7, "(a)+"):
            ...     try:
            ...         reading._search(pattern)
            ...     except ValueError as error:
            ...         print(error)
            it is too long, repeats too often, or repeats a group
            it is too long, repeats too often, or repeats a group
            it is too long, repeats too often, or repeats a group
            >>> reading._search("a" * 500)
            []
        """
        repeats = len(re.findall(r"[*+]|\{\d*,\d*\}", pattern))
        if len(pattern) > _LONGEST_PATTERN or repeats > _MOST_REPEATS or re.search(r"\)[*+{]", pattern):
            raise ValueError("it is too long, repeats too often, or repeats a group")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ambiguous sets, such as [[a]
            expression = re.compile(pattern)
        return [name for name in self._names if expression.match(name)]

    def _warn_surplus(self, pattern: str, names: Sequence[str], item: Item) -> None:
        r"""Note what an expression takes beyond what somebody means who reads its dots as dots, and how to write that.

        Example:
            >>> notes, names = [], ["l.1.w", "l.10.w", "l.11.w", "l.2.w"]
            >>> reading, item = _Reading(names, Callback(), Faults(), notes), Item("text", "", 4)
            >>> reading._warn_surplus("l.1", names[:3], item)
            >>> reading._warn_surplus("l.(1|2).*", names, item)
            >>> reading._warn_surplus(r"l\.1\.", names[:1], item)
            >>> reading._warn_surplus("l.1.*", names[:3], item)
            >>> for note in notes:
            ...     print(note)
            line 4: the expression 'l.1' also takes 'l.10.w' and 1 more. Write: 'l\\.1\\.'
            line 4: the expression 'l.(1|2).*' also takes 'l.10.w' and 1 more. Write: 'l.(1(?!\\d)|2(?!\\d))(?!\\d).*'
            line 4: the expression 'l.1.*' also takes 'l.10.w' and 1 more. Write: 'l\\.1\\..*'
        """
        beyond = {name for name in names if cuts_number(pattern, name)}
        write, meant = "", [name for name in names if name not in beyond]
        for corrected in (precise(pattern), *([guarded(pattern)] if beyond else [])):
            try:
                found = self._search(corrected)
            except (re.error, ValueError):  # too long now, or made of what only looked like numbers
                continue
            if found and beyond.isdisjoint(found) and set(found) < set(names):
                write, meant = repr(corrected), found
                break
        surplus = [name for name in names if name not in meant]
        if meant and surplus:
            self._notes.append(
                f"{item.where}: the expression {pattern!r} also takes {surplus[0]!r} and "
                f"{len(surplus) - 1} more. Write: {write or list(compact(meant, self._names))}"
            )

    def _lr(self, number: int, item: Item | None) -> float | None:
        """Return the rate of a phase; that of phase 0 is the optimizer's.

        Example:
            >>> faults, notes = Faults(), []
            >>> reading = _Reading(["w"], Callback(base_max_lr=2e-5), faults, notes)
            >>> rate = Item("text", "1e-3", 2, "1e-3")
            >>> reading._lr(0, None), reading._lr(1, None), reading._lr(1, rate), reading._lr(0, rate), len(notes)
            (None, 2e-05, 0.001, None, 1)
            >>> reading._lr(1, Item("number", 0, 3, "0")), faults.found
            (None, [(3, 'lr takes a number above 0, got 0', 'lr: 1.0e-5')])
        """
        if item is None or item.kind in {"null", "refused"}:
            return None if number == 0 else self._callback.base_max_lr
        try:
            lr = float(item.written)  # text such as 1e-06 as well, as there
            Phase(thaw="head", lr=lr)
        except (TypeError, ValueError):  # ArgumentError is a ValueError
            self._faults.add(
                item.place, f"lr takes a number above 0, got {item.written[:60] or item.kind}", "lr: 1.0e-5"
            )
            return None
        if number == 0:
            self._notes.append(
                f"{item.where}: the lr of phase 0 is not used by finetuning-scheduler, which trains it at the "
                f"optimizer's. Write: Trainer(optimizer=partial(AdamW, lr={lr}))"
            )
            return None
        return lr

    def _until(self, number: int, item: Item | None, phase: Item, *, last: bool) -> Time | Plateau | None:
        """Return the end of a phase.

        Example:
            >>> faults, item = Faults(), Item("number", 3, 2, "3")
            >>> early = _Reading(["w"], Callback(patience=1), faults, [])
            >>> early._until(0, item, item, last=False).at_most, early._until(1, item, item, last=True).at_most
            (Time('3ep'), None)
            >>> timed = _Reading(["w"], Callback(epoch_transitions_only=True), faults, [])
            >>> timed._until(0, item, item, last=False), timed._until(1, None, item, last=True), len(faults)
            (Time('3ep'), None, 0)
            >>> timed._until(1, None, item, last=False), faults.found
            (None, [(2, 'phase 1 ends by its epoch alone, and has none', 'max_transition_epoch: 2')])
        """
        span = self._span(number, item)
        if not self._callback.epoch_transitions_only:
            each = self._callback
            return Plateau(each.monitor, each.patience, each.min_delta, each.mode, at_most=None if last else span)
        if span is None and not last:
            problem = f"phase {number} ends by its epoch alone, and has none"
            self._faults.add((item or phase).place, problem, f"max_transition_epoch: {number + 1}")
        return None if last else span

    def _span(self, number: int, item: Item | None) -> Time | None:
        """Return how long a phase lasts at most: the epochs from the one in which it begins.

        Example:
            >>> faults, notes = Faults(), []
            >>> reading, epoch = _Reading(["w"], Callback(), faults, notes), lambda number: Item("number", number, 1, f"{number}")
            >>> [reading._span(phase, epoch(number)) for phase, number in enumerate((3, 5, 5, 7, -1, 9, 10))]
            [Time('3ep'), Time('2ep'), Time('1ep'), Time('1ep'), None, Time('9ep'), Time('1ep')]
            >>> for note in notes:
            ...     print(note)
            line 1: phase 2 has an epoch that its predecessor has used up, and lasts one epoch, as there. Write: max_transition_epoch: 6
            line 1: phase 5 ends 9 epochs after its begin, since it is not known when that is; in finetuning-scheduler at epoch 9 of the fit. Write another at_most.
            >>> reading._span(7, epoch(-2)), reading._span(7, epoch(1.5)), len(faults)
            (None, None, 2)
        """
        if item is None or item.kind == "refused" or (item.kind == "number" and item.value == -1):
            self._epoch = None
            return None
        if item.kind != "number" or not isinstance(item.value, int) or item.value < -1:
            problem = f"max_transition_epoch takes a whole number, or -1 for none, got {item.written[:60] or item.kind}"
            self._faults.add(item.place, problem, "max_transition_epoch: 3")
            return None
        begin, self._epoch = self._epoch, item.value
        if begin is None:
            self._notes.append(
                f"{item.where}: phase {number} ends {item.value} epochs after its begin, since it is not known "
                f"when that is; in finetuning-scheduler at epoch {item.value} of the fit. Write another at_most."
            )
            return Time(max(1, item.value))
        if item.value <= begin:
            self._notes.append(
                f"{item.where}: phase {number} has an epoch that its predecessor has used up, and lasts one "
                f"epoch, as there. Write: max_transition_epoch: {begin + 1}"
            )
        self._epoch = max(begin + 1, item.value)
        return Time(self._epoch - begin)

    def _schedule(self, number: int, item: Item | None) -> str | None:
        """Return the schedule of a phase that stands for its scheduler of torch.

        Example:
            >>> faults, notes = Faults(), []
            >>> reading = _Reading(["w"], Callback(), faults, notes)
            >>> entry = "{lr_scheduler_init: {class_path: torch.optim.lr_scheduler.%s}, init_pg_lrs: [0.1]}"
            >>> cosine, step = (read_tree(entry % name, faults)[1] for name in ("CosineAnnealingLR", "ConstantLR"))
            >>> reading._schedule(1, cosine), reading._schedule(1, step), reading._schedule(0, cosine), reading._schedule(1, None)
            ('cosine', None, None, None)
            >>> [fault[2] for fault in faults.found], len(notes)
            (['lr_scale: 0.5, the factor on all that trained before', 'schedule: constant', 'Trainer(schedule=cosine())'], 1)
        """
        if item is None or item.kind in {"null", "refused"}:
            return None
        scheduler = _under(item, "lr_scheduler_init", "class_path")
        path = scheduler.value if scheduler is not None and scheduler.kind == "text" else ""
        kind = str(path).rpartition(".")[2]
        if number == 0:
            problem = "new_lr_scheduler is refused in phase 0 by finetuning-scheduler as well"
            self._faults.add(item.place, problem, "Trainer(schedule=cosine())")
        elif kind == "CosineAnnealingLR":
            if item.value.keys() & {"init_pg_lrs"}:
                problem = "init_pg_lrs has no place here: rates follow parameters, not groups by number"
                self._faults.add(item.place, problem, "lr_scale: 0.5, the factor on all that trained before")
            self._notes.append(
                f"{item.where}: CosineAnnealingLR becomes schedule: cosine, from the whole rate to zero over the "
                "phase, without T_max and eta_min. Write Trainer(min_lr=) for eta_min."
            )
            return "cosine"
        else:
            write = _INSTEAD.get(kind, "schedule: cosine, linear or constant, or none for the fit's own")
            self._faults.add(item.place, f"{ascii(kind)[1:-1][:60] or 'new_lr_scheduler'} has no place here", write)
        return None


_INSTEAD = {
    "LinearLR": "warmup: 4ep, where it rises to 1; schedule: linear, where it falls",
    "ConstantLR": "schedule: constant",
    "ReduceLROnPlateau": "until: {plateau: eval/loss} and lr_scale: 0.1 in the next phase",
}


def _under(item: Item | None, *keys: str) -> Item | None:
    """Return what stands under keys of keys; None where one is missing.

    Example:
        >>> tree = read_tree("{a: {b: 1}}", Faults())[1]
        >>> _under(tree, "a", "b").value, _under(tree, "a", "c"), _under(tree, "a", "b", "c")
        (1, None, None)
    """
    for key in keys:
        item = item.value.get(key) if item is not None and item.kind == "map" else None
    return item
