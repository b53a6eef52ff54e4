"""Schedules of phases as text: read with all their errors at once, and written so that they read back the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import yaml

from ..engine import ArgumentError, Json, Time, nearest
from .arguments import check_in_range, check_one_of, check_whole
from .phases import Phase, Plateau, Written
from .schedule_tree import Faults, Item, read_tree

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_REFUSED = object()
"""In place of a value of which a fault is entered already."""
Read: TypeAlias = Callable[[str, Item, Faults], Any]


@attrs.frozen
class Field:
    """What a key of a schedule takes.

    Args:
        read: Makes the value of an item; what it cannot make it enters as a fault.
        check: Raises an ArgumentError where the value will not do.
        example: A correct line.
    """

    read: Read
    check: Callable[[Any], object]
    example: str


def read_phases(source: str | Path | Mapping[str, Any] | Sequence[Any]) -> tuple[dict[str, Any], tuple[Phase, ...]]:
    r"""Read a schedule.

    Args:
        source: The path of a YAML file, YAML text, or the same as dicts and lists: ``phases`` and the options beside
            it, or the list of phases alone.

    Returns:
        The options that are written there, by name: ``repeat``, ``max_depth``, ``batchnorm``, ``base_max_lr`` and
        ``end_with_last_phase``; and the phases, nameless where no name is written.

    Raises:
        ScheduleError: Something is wrong with it. All of it is said at once, with the line and the corrected line.

    Example:
        >>> options, phases = read_phases("repeat: 2\nphases:\n- {thaw: head, lr: 1.0e-3, until: 2ep}\n")
        >>> options, phases[0].thaw, phases[0].until
        ({'repeat': 2}, ('head',), Time('2ep'))
        >>> phases.source, phases.lines
        ('the schedule', [{'head': 'line 3'}])
        >>> read_phases([{"thaw": "head"}])[1][0].thaw
        ('head',)
        >>> read_phases("repeat: 0\nphase: 3\n")
        Traceback (most recent call last):
        thawline.engine.errors.ScheduleError: the schedule has 3 errors:
          line 1: repeat takes a whole number, 1 or above, got 0. Write: repeat: 2
          line 1: there are no phases. Write: phases: [{thaw: head}]
          line 2: unknown key 'phase', the nearest is 'phases'. Write: phases: [{thaw: head}]
    """
    faults = Faults()
    name, tree = read_tree(source, faults)
    if tree.kind == "list":
        tree = Item("map", {"phases": tree}, tree.place)
    options: dict[str, Any] = {}
    phases: Any = []
    if tree.kind == "map":
        options = _fields(tree, _OPTIONS, faults)
        phases = options.pop("phases", [])
        if "phases" not in tree.value:
            faults.add(tree.place, "there are no phases", "phases: [{thaw: head}]")
        else:
            _check_order(tree.value["phases"], options, faults)
    elif tree.kind != "refused":
        faults.add(tree.place, f"a schedule is a list of phases, got {_shown(tree)}", "- {thaw: head, until: 2ep}")
    if len(faults):
        raise faults.error(name)
    return options, Written(phases, source=name, lines=[_lines(each) for each in tree.value["phases"].value])


def _lines(phase: Item) -> dict[str, str]:
    r"""Return the line of each selector of a phase that is text.

    Example:
        >>> _lines(read_tree("thaw: [head,\n  stem]\nlr:\n  '*.bias': 0.1\n  head: 0.2\nfreeze: out", Faults())[1])
        {'*.bias': 'line 4', 'head': 'line 1', 'stem': 'line 2', 'out': 'line 6'}
    """
    listed = [phase.value[key] for key in ("thaw", "freeze") if key in phase.value]
    each = [one for item in listed for one in (item.value if item.kind == "list" else (item,))]
    rates = phase.value.get("lr")
    named = dict(rates.value) if rates is not None and rates.kind == "map" else {}
    named |= {one.value: one for one in each}
    return {selector: one.where for selector, one in named.items() if isinstance(one.place, int)}


def write_phases(options: Mapping[str, Json], phases: Sequence[Phase]) -> str:
    """Return the YAML text from which :func:`read_phases` reads the same options and phases.

    Args:
        options: The options beside the phases.
        phases: In order. What has its default is left out.

    Raises:
        ArgumentError: A phase ends by a function, which text cannot hold; or there is no such option.

    Example:
        >>> print(write_phases({"repeat": 2}, [Phase(thaw=("head", "*.bias"), lr=1e-3, until="2ep")]), end="")
        repeat: 2
        phases:
        - thaw: [head, '*.bias']
          lr: 0.001
          until: 2ep
        >>> write_phases({"repeats": 2}, [Phase(thaw="head")])
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: write_phases(options=) takes options such as 'repeat', 'max_depth', got 'repeats'. ...
    """
    for key in options:
        if key not in _OPTIONS or key == "phases":
            names = nearest(key, [each for each in _OPTIONS if each != "phases"])
            raise ArgumentError("write_phases(options=)", got=key, takes=f"options such as {names}", example="{}")
    data = {**options, "phases": [as_data(phase) for phase in phases]}
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=100)
    return text


class _Dumper(yaml.SafeDumper):
    """Escapes what is not printable: plain YAML folds some of it."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Return a text for the dumper, in double quotes where it is not printable."""
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def as_data(phase: Phase) -> dict[str, Json]:
    """Return a phase as :func:`read_phases` takes it, without what has its default.

    Raises:
        ArgumentError: It ends by a function.

    Example:
        >>> as_data(Phase(name="all", thaw=("head", "stem"), lr={"head": 0.1}, until="2ep", restore="best"))
        {'name': 'all', 'thaw': ['head', 'stem'], 'lr': {'head': 0.1}, 'until': '2ep', 'restore': 'best'}
        >>> as_data(Phase(thaw="head", until=Plateau("eval/loss", patience=2, at_most="5ep")))
        {'thaw': 'head', 'until': {'plateau': 'eval/loss', 'patience': 2, 'at_most': '5ep'}}
        >>> as_data(Phase(thaw="head", until=lambda state: True))
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: Phase(until=) takes a time or a Plateau where the schedule is written as text, got <function ...>. ...
    """
    data: dict[str, Json] = {}
    for field in attrs.fields(Phase):
        value = getattr(phase, field.name)
        if value != field.default:
            data[field.name] = _value_as_data(value)
    return data


def _value_as_data(value: Any) -> Json:
    if isinstance(value, Time):
        return str(value)
    if isinstance(value, tuple):
        return value[0] if len(value) == 1 else list(value)
    if isinstance(value, Plateau):
        rest = {each.name: getattr(value, each.name) for each in attrs.fields(Plateau)[1:]}
        defaults = {each.name: each.default for each in attrs.fields(Plateau)[1:]}
        written = {name: _value_as_data(each) for name, each in rest.items() if each != defaults[name]}
        return {"plateau": value.monitor, **written}
    if callable(value):
        takes = "a time or a Plateau where the schedule is written as text"
        raise ArgumentError("Phase(until=)", got=value, takes=takes, example="Phase(until=Plateau('eval/loss'))")
    return dict(value) if isinstance(value, Mapping) else value


# -- reading -----------------------------------------------------------------------------------------------------------


def _fields(item: Item, table: Mapping[str, Field], faults: Faults) -> dict[str, Any]:
    r"""Return the values of the keys that are right; for each other key a fault is entered.

    Example:
        >>> faults = Faults()
        >>> _fields(read_tree("thaw: head\nlr: -1\nuntl: 2ep\nname: &a x", faults)[1], _PHASE, faults)
        {'thaw': ('head',), 'name': 'x'}
        >>> [fault[:2] for fault in faults.found]
        [(4, '&a is an anchor in YAML, which is not read here'), (2, 'lr takes a number above 0, or None, got -1'), (3, "unknown key 'untl', the nearest is 'until'")]
    """
    values: dict[str, Any] = {}
    for key, each in item.value.items():
        field = table.get(key)
        if field is None:
            near = nearest(key, table, count=1).strip("'")
            faults.add(each.place, f"unknown key {key[:60]!r}, the nearest is {near!r}", table[near].example)
            continue
        before = len(faults)
        value = field.read(key, each, faults) if each.kind != "refused" else _REFUSED
        if len(faults) > before or value is _REFUSED:
            continue
        try:
            field.check(value)
        except ArgumentError as error:
            faults.add(each.place, f"{key} takes {error.takes}, got {_shown(each)}", field.example)
            continue
        values[key] = value
    return values


def _check_order(listed: Item, options: Mapping[str, Any], faults: Faults) -> None:
    r"""Enter what is wrong with the phases side by side: an end that is missing, a name that stands twice.

    Example:
        >>> listed = read_tree("- {freeze: stem}\n- {name: phase 1, thaw: head,\n  until: null}\n- {thaw: out}", Faults())[1]
        >>> faults = Faults()
        >>> _check_order(listed, {}, faults)
        >>> [line for line, _, _ in faults.found]  # no end, nothing to thaw; the name again; no end
        [1, 1, 2, 3]
        >>> _check_order(listed, {"repeat": 2}, again := Faults())
        >>> again.found[-1][:2]
        (4, 'a phase that is followed by its repetition has no end')
    """
    if listed.kind != "list":
        return
    names: dict[str, int | str] = {}
    for number, phase in enumerate(listed.value, 1):
        if phase.kind != "map":
            continue
        entry = phase.value.get("name")
        name = entry.value if entry is not None and entry.kind == "text" else f"phase {number}"
        if name in names:
            at = entry.place if entry is not None and entry.kind == "text" else phase.place
            faults.add(at, f"the name {name[:60]!r} stands twice", f"name: {name[:60]} again")
        names[name] = phase.place
        until = phase.value.get("until")
        last = number == len(listed.value)
        if (until is None or until.kind == "null") and not (last and options.get("repeat", 1) == 1):
            why = "before the last" if not last else "that is followed by its repetition"
            faults.add(phase.place if until is None else until.place, f"a phase {why} has no end", "until: 2ep")
        if (
            number == 1
            and "thaw" not in phase.value
            and not phase.value.keys().isdisjoint({"freeze", "lr_scale", "schedule"})
        ):
            faults.add(phase.place, "the first phase thaws nothing, so that nothing trains", "thaw: head")


def _shown(item: Item) -> str:
    r"""Return a value as an error shows it.

    Example:
        >>> text = "[{}, [head], {a: 1}, yes, true, ~, 1.0e-3, é, " + "a" * 58 + ", " + "a" * 59 + "]"
        >>> shown = [_shown(item) for item in read_tree(text, Faults())[1].value]
        >>> shown[:-2]
        ['a mapping that is empty', 'a list', 'a mapping', 'yes, which YAML reads as true', 'true', 'nothing', '1.0e-3', "'\\xe9'"]
        >>> [(len(each), each[-2:]) for each in shown[-2:]]
        [(60, "a'"), (60, 'a…')]
    """
    if item.kind in {"map", "list"}:
        return f"a {'mapping' if item.kind == 'map' else 'list'}" + " that is empty" * (not item.value)
    if item.kind == "flag" and item.written.lower() not in {"true", "false"}:
        return f"{item.written}, which YAML reads as {str(item.value).lower()}"
    if item.kind == "null":
        return "nothing"
    shown = ascii(item.value) if item.kind == "text" else item.written
    return shown if len(shown) <= 60 else f"{shown[:59]}…"


def _text(key: str, item: Item, faults: Faults) -> Any:
    """Read text; what YAML takes for a number or a truth value wants quotes.

    Example:
        >>> faults = Faults()
        >>> [_text("name", item, faults) for item in read_tree("[head, ~, 12, on]", faults)[1].value]
        ['head', None, 12, True]
        >>> [fault[1:] for fault in faults.found]
        [('name takes text, got 12', 'name: "12"'), ('name takes text, got on, which YAML reads as true', 'name: "on"')]
    """
    if item.kind in {"flag", "number"}:
        faults.add(item.place, f"{key} takes text, got {_shown(item)}", f'{key}: "{item.written}"')
    return _plain(key, item, faults)


def _number(key: str, item: Item, faults: Faults) -> Any:
    """Read a number, also one such as 1e-5, which is text to YAML 1.1 and a number to everybody else.

    Example:
        >>> faults = Faults()
        >>> [_number("lr", item, faults) for item in read_tree("[1.5, 1e-5, '1e-5', much, .5e1]", faults)[1].value]
        [1.5, 1e-05, '1e-5', 'much', 5.0]
        >>> [fault[1:] for fault in faults.found]
        [('lr takes a number, got text in quotes', 'lr: 1.0e-05')]
    """
    if item.kind == "text" and _NUMBER.fullmatch(item.value) and len(item.value) < 60:
        if item.plain:
            return float(item.value)
        faults.add(item.place, f"{key} takes a number, got text in quotes", f"{key}: {_as_yaml(float(item.value))}")
    return _plain(key, item, faults)


def _as_yaml(value: object) -> str:
    text: str = yaml.safe_dump(value)
    return text.partition("\n")[0]


def _plain(_key: str, item: Item, _faults: Faults) -> Any:
    """Return the value with all that is in it."""
    if item.kind == "map":
        return {key: _plain(key, each, _faults) for key, each in item.value.items()}
    return [_plain("", each, _faults) for each in item.value] if item.kind == "list" else item.value


def _selectors(key: str, item: Item, faults: Faults) -> Any:
    """Read a selector or a list of them.

    Example:
        >>> faults = Faults()
        >>> _selectors("thaw", read_tree("[head, stem]", faults)[1], faults), _selectors("thaw", Item("text", "head", 1), faults)
        (('head', 'stem'), ('head',))
        >>> _ = _selectors("thaw", read_tree("[head, 3, [stem]]", faults)[1], faults)
        >>> [fault[1:] for fault in faults.found]
        [('thaw takes names of layers and parameters, got 3', 'thaw: ["3"]'), ('thaw takes names of layers and parameters, got a list', 'thaw: [head]')]
        >>> _selectors("thaw", Item("list", (Item("refused", None, 1),), 1), faults) is _REFUSED
        True
    """
    listed = item.value if item.kind == "list" else (item,)
    for each in listed:
        if each.kind not in {"text", "refused"}:
            write = f'"{each.written}"' if each.kind in {"flag", "number"} else "head"
            problem = f"{key} takes names of layers and parameters, got {_shown(each)}"
            faults.add(each.place, problem, f"{key}: [{write}]")
    return _REFUSED if any(each.kind == "refused" for each in listed) else tuple(each.value for each in listed)


def _rates(key: str, item: Item, faults: Faults) -> Any:
    """Read a rate, or selectors to rates.

    Example:
        >>> faults = Faults()
        >>> _rates("lr", read_tree("{head: 1e-3, stem: 0.1}", faults)[1], faults), _rates("lr", Item("number", 0.5, 1), faults)
        ({'head': 0.001, 'stem': 0.1}, 0.5)
        >>> _rates("lr", read_tree("{head: 0, stem: 0.1}", faults)[1], faults) is _REFUSED
        True
        >>> faults.found
        [(1, 'head takes a number above 0, got 0', 'head: 1.0e-3')]
    """
    if item.kind != "map":
        return _number(key, item, faults)
    rate = Field(_number, lambda value: check_in_range("", value, above=0, example=""), "head: 1.0e-3")
    rates = _fields(item, dict.fromkeys(item.value, rate), faults)
    return rates if len(rates) == len(item.value) else _REFUSED


def _until(key: str, item: Item, faults: Faults) -> Any:
    """Read a time, or a mapping as a plateau.

    Example:
        >>> faults = Faults()
        >>> for text in ("[2ep]", "[{plateau: eval/loss, patience: 2}]", "[{patience: 2}]", "[{plateau: eval/loss, patience: 0}]"):
        ...     value = _until("until", read_tree(text, faults)[1].value[0], faults)
        ...     print("refused" if value is _REFUSED else value)
        2ep
        Plateau(monitor='eval/loss', patience=2, min_delta=0.0, mode='auto', at_most=None)
        refused
        refused
        >>> [fault[1] for fault in faults.found]
        ['until takes a time, or a mapping with plateau in it', 'patience takes a whole number, 1 or above, got 0']
    """
    if item.kind != "map":
        return _plain(key, item, faults)
    values = _fields(item, _PLATEAU, faults)
    if "plateau" not in item.value:
        faults.add(item.place, "until takes a time, or a mapping with plateau in it", "until: {plateau: eval/loss}")
    elif len(values) == len(item.value):
        return Plateau(values.pop("plateau"), **values)
    return _REFUSED


def _phases(_key: str, item: Item, faults: Faults) -> Any:
    """Read the list of phases.

    Example:
        >>> faults = Faults()
        >>> _phases("phases", Item("list", (), 1), faults), _phases("phases", Item("null", None, 2), faults)
        (None, None)
        >>> [fault[1] for fault in faults.found]
        ['phases takes a list of phases, got a list that is empty', 'phases takes a list of phases, got nothing']
    """
    if item.kind != "list" or not item.value:
        faults.add(item.place, f"phases takes a list of phases, got {_shown(item)}", "phases: [{thaw: head}]")
        return None
    return [_phase(each, faults) for each in item.value]


def _phase(item: Item, faults: Faults) -> Phase | None:
    """Read a phase; None where there is a fault in it.

    Example:
        >>> faults = Faults()
        >>> text = "[head, {name: a}, {freeze: head, warmup: 2ep}, {thaw: a, freeze: a}, {thaw: b}]"
        >>> [_phase(item, faults) and "a phase" for item in read_tree(text, faults)[1].value]
        [None, None, None, None, 'a phase']
        >>> for fault in faults.found:
        ...     print(*fault, sep=" | ")
        1 | a phase is a mapping, got 'head' | - {thaw: head, until: 2ep}
        1 | a phase changes something, by thaw, freeze, lr_scale or schedule | thaw: head
        1 | warmup is that of what this phase thaws, and it thaws nothing | thaw: head
        1 | freeze names what thaw names as well | freeze: [stem]
    """
    if item.kind != "map":
        if item.kind != "refused":
            faults.add(item.place, f"a phase is a mapping, got {_shown(item)}", "- {thaw: head, until: 2ep}")
        return None
    values = _fields(item, _PHASE, faults)
    if len(values) < len(item.value):
        return None
    try:
        return Phase(**values)
    except ArgumentError as error:  # of two keys together
        key = error.argument.removeprefix("Phase(").partition("=")[0]
        problem, write = _TOGETHER.get(key, _TOGETHER[""])
        faults.add(item.value[key].place if key in item.value else item.place, problem, write)
        return None


_TOGETHER = {
    "": ("a phase changes something, by thaw, freeze, lr_scale or schedule", "thaw: head"),
    "lr": ("lr is the rate of what this phase thaws, and it thaws nothing", "thaw: head"),
    "weight_decay": ("weight_decay is that of what this phase thaws, and it thaws nothing", "thaw: head"),
    "warmup": ("warmup is that of what this phase thaws, and it thaws nothing", "thaw: head"),
    "freeze": ("freeze names what thaw names as well", "freeze: [stem]"),
    "restore_monitor": ("restore_monitor stands without restore", "restore: best"),
}


def _check_phase(key: str, value: Any) -> object:
    """Check a value of a phase by itself: beside it stands what every key can stand beside."""
    arguments: dict[str, Any] = {"thaw": ("\0thaw",), "freeze": ("\0freeze",), "restore": "best", key: value}
    return Phase(**arguments)


def _check_plateau(key: str, value: Any) -> object:
    arguments: dict[str, Any] = {"monitor": "eval/loss", key: value}
    return Plateau(**arguments)


def _phase_field(key: str, read: Read, example: str) -> Field:
    return Field(read, partial(_check_phase, key), example)


def _plateau_field(key: str, read: Read, example: str) -> Field:
    return Field(read, partial(_check_plateau, key), example)


_PHASE: Mapping[str, Field] = {
    "name": _phase_field("name", _text, "name: head"),
    "thaw": _phase_field("thaw", _selectors, "thaw: [head, 'blocks[-1]']"),
    "freeze": _phase_field("freeze", _selectors, "freeze: [stem]"),
    "lr": _phase_field("lr", _rates, "lr: 1.0e-3"),
    "lr_scale": _phase_field("lr_scale", _number, "lr_scale: 0.5"),
    "weight_decay": _phase_field("weight_decay", _number, "weight_decay: 0.01"),
    "warmup": _phase_field("warmup", _plain, "warmup: 100ba"),
    "schedule": _phase_field("schedule", _text, "schedule: cosine"),
    "until": _phase_field("until", _until, "until: 2ep"),
    "restore": _phase_field("restore", _text, "restore: best"),
    "restore_monitor": _phase_field("restore_monitor", _text, "restore_monitor: eval/loss"),
}
_PLATEAU: Mapping[str, Field] = {
    "plateau": _plateau_field("monitor", _text, "plateau: eval/loss"),
    "patience": _plateau_field("patience", _plain, "patience: 3"),
    "min_delta": _plateau_field("min_delta", _number, "min_delta: 0.001"),
    "mode": _plateau_field("mode", _text, "mode: min"),
    "at_most": _plateau_field("at_most", _plain, "at_most: 5ep"),
}
_OPTIONS: Mapping[str, Field] = {
    "phases": Field(_phases, lambda _value: None, "phases: [{thaw: head}]"),
    "repeat": Field(_plain, lambda value: check_whole("", value, at_least=1, example=""), "repeat: 2"),
    "max_depth": Field(
        _plain, lambda value: value is None or check_whole("", value, at_least=1, example="", or_none=True), "max_depth: 3"
    ),
    "batchnorm": Field(_text, lambda value: check_one_of("", value, ("train", "eval"), example=""), "batchnorm: eval"),
    "base_max_lr": Field(
        _number, lambda value: value is None or check_in_range("", value, above=0, example="", or_none=True),
        "base_max_lr: 1.0e-5",
    ),
    "end_with_last_phase": Field(
        _plain, lambda value: check_one_of("", value, (True, False), example=""), "end_with_last_phase: true"
    ),
}  # fmt: skip
