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
    """Return the phases by their numbers, which begin at 0 and leave none out."""
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
    """Reads one phase after the other; knows which parameters and epochs are taken."""

    def __init__(self, names: Sequence[str], callback: Callback, faults: Faults, notes: list[str]) -> None:
        self._names, self._callback, self._faults, self._notes = names, callback, faults, notes
        self.where: dict[str, int] = {}
        self._epoch: int | None = 0

    def phase(self, number: int, item: Item, *, last: bool) -> Phase | None:
        """Return a phase, or None where it has a fault."""
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
        repeats = len(re.findall(r"[*+]|\{\d*,\d*\}", pattern))
        if len(pattern) > _LONGEST_PATTERN or repeats > _MOST_REPEATS or re.search(r"\)[*+{]", pattern):
            raise ValueError("it is too long, repeats too often, or repeats a group")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ambiguous sets, such as [[a]
            expression = re.compile(pattern)
        return [name for name in self._names if expression.match(name)]

    def _warn_surplus(self, pattern: str, names: Sequence[str], item: Item) -> None:
        beyond = {name for name in names if cuts_number(pattern, name)}
        write, meant = "", [name for name in names if name not in beyond]
        for corrected in (precise(pattern), *([_guarded(pattern)] if beyond else [])):
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
        span = self._span(number, item)
        if not self._callback.epoch_transitions_only:
            each = self._callback
            return Plateau(each.monitor, each.patience, each.min_delta, each.mode, at_most=None if last else span)
        if span is None and not last:
            problem = f"phase {number} ends by its epoch alone, and has none"
            self._faults.add((item or phase).place, problem, f"max_transition_epoch: {number + 1}")
        return None if last else span

    def _span(self, number: int, item: Item | None) -> Time | None:
        """Return how long a phase lasts at most: the epochs from the one in which it begins."""
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
    for key in keys:
        item = item.value.get(key) if item is not None and item.kind == "map" else None
    return item


def precise(pattern: str) -> str:
    r"""Return a regular expression for the names that somebody means who reads ``.`` as a dot.

    Example:
        >>> precise("layer.1"), precise("layer.1.*"), precise(r"layer\.1\..*")
        ('layer\\.1\\.', 'layer\\.1\\..*', 'layer\\.1\\..*')
    """
    # Letters stand on both sides of a plain dot, or the end; a dot with a quantifier is meant as one.
    dotted = re.sub(r"(?<=[\w\])}*])(?<!\\)\.(?![*+?{])", r"\\.", pattern)
    dotted = re.sub(r"(?<=\d)\.(?=[*+])", r"\\..", dotted)
    return dotted + r"\." if re.search(r"\d$", dotted) else dotted


def cuts_number(pattern: str, name: str) -> bool:
    r"""Return whether a regular expression takes a number in a name for its first digits.

    Example:
        >>> cuts_number("layer.(1|2).*", "layer.10.w"), cuts_number(r"layer\.(1|10)\.", "layer.10.w")
        (True, False)
    """
    expression = re.compile(pattern)
    for number in re.finditer(r"\d{2,}", name):
        before, digits, after = name[: number.start()], number[0], name[number.end() :]
        forms = [digits[:count] + "x" * (len(digits) - count) for count in range(len(digits))]
        without, *cut = (bool(expression.match(before + form + after)) for form in forms)
        if any(cut) and not without:
            return True
    return False


def _guarded(pattern: str) -> str:
    """Return a regular expression in which no digit follows where a number may end."""
    return re.sub(r"(\[[^\]]*\]|\\d|(?<!\\)\d+|\))(?![*+?{\d]|\\d)", r"\1(?!\\d)", pattern)


def compact(names: Sequence[str], everything: Sequence[str]) -> tuple[str, ...]:
    """Return selectors for exactly these parameters: modules where all of a module's are among them, names elsewhere.

    Example:
        >>> compact(["a.0.w", "a.0.b", "a.1.w"], ["a.0.w", "a.0.b", "a.1.w", "a.1.b"])
        ('a.0', 'a.1.w')
    """
    chosen = set(names)
    # Not by these names: as selectors they are layers.
    mixed = {"stem", "blocks", "head"}
    for name in everything:
        if name not in chosen:
            mixed.update(_modules(name))
    return tuple(dict.fromkeys(next((each for each in _modules(name) if each not in mixed), name) for name in names))


def _modules(name: str) -> list[str]:
    """Return the modules around a parameter, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
