"""The text of a schedule as a tree of values, each of which knows its line.

PyYAML scans and composes; what it would resolve, import or recurse into is refused here instead: anchors, aliases,
tags, keys that stand twice, numbers in other notations than the decimal, and texts that are too long or nested too deep.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import attrs
import yaml
from typing_extensions import override

from ..engine import ScheduleError
from .quoting import LONGEST_LINE, quote

MAX_BYTES = 1 << 20
"""The longest text that is read."""
MAX_DEPTH = 12
"""How deep lists and mappings may be nested."""
_MARKER = re.compile(r"[!&]\S*\s*")
_INT = re.compile(r"[+-]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?|[+-]?\.inf|\.nan", re.IGNORECASE)
_EXAMPLE = "- {thaw: head, until: 2ep}"

Kind: TypeAlias = Literal["map", "list", "text", "number", "flag", "null", "refused"]


@attrs.frozen
class Item:
    """A value of a schedule.

    Args:
        kind: What it is; ``"refused"`` where a fault was found already.
        value: A dict of items, a tuple of items, or the value itself.
        place: Where it stands: a line, or the way to it in what is no text.
        written: How it is written; for text without its quotes.
        plain: Whether it is a scalar without quotes.

    Example:
        >>> Item("null", None, 4).where, Item("null", None, "phases[2].lr").where, Item("null", None, 4).plain
        ('line 4', 'phases[2].lr', False)
    """

    kind: Kind
    value: Any
    place: int | str
    written: str = ""
    plain: bool = False

    @property
    def where(self) -> str:
        """The place in words."""
        return f"line {self.place}" if isinstance(self.place, int) else self.place


@attrs.frozen
class Faults:
    """What is found to be wrong with a schedule.

    Example:
        >>> faults = Faults()
        >>> faults.add(12, "no   end", "until: 2ep")
        >>> faults.add(3, "no phases", "phases: [{thaw: head}]")
        >>> faults.add("the end", "too long", "less")
        >>> len(faults)
        3
        >>> print(faults.error("thaw.yaml"))
        thaw.yaml has 3 errors:
          the end: too long. Write: less
          line 3: no phases. Write: phases: [{thaw: head}]
          line 12: no end. Write: until: 2ep
    """

    found: list[tuple[int | str, str, str]] = attrs.field(factory=list)

    def add(self, place: int | str, problem: str, write: str) -> None:
        """Enter one."""
        self.found.append((place, " ".join(problem.split()), write))

    def __len__(self) -> int:
        return len(self.found)

    def error(self, source: str) -> ScheduleError:
        """Return the error that says them all, in the order of their lines."""
        ordered = sorted(self.found, key=lambda each: each[0] if isinstance(each[0], int) else 0)
        named = [(f"line {at}" if isinstance(at, int) else at, problem, write) for at, problem, write in ordered]
        return ScheduleError(source, named)


def read_tree(source: object, faults: Faults) -> tuple[str, Item]:
    r"""Return how the source is called in errors, and its tree.

    Args:
        source: A path, YAML text, or what YAML could hold: dicts and lists of strings, numbers, booleans and None.
        faults: Where faults are entered that do not keep the rest from being read.

    Raises:
        ScheduleError: The source cannot be read, or is no YAML.

    Example:
        >>> name, tree = read_tree("phases:\n- {thaw: head}", Faults())
        >>> name, tree.value["phases"].value[0].value["thaw"]
        ('the schedule', Item(kind='text', value='head', place=2, written='head', plain=True))
        >>> read_tree([], Faults())
        ('the schedule', Item(kind='list', value=(), place='the top', written='', plain=False))
        >>> _ = Path("thaw.yaml").write_text("repeat: 2", encoding="utf-8")
        >>> for path in ("thaw.yaml", Path("thaw.yaml")):
        ...     name, tree = read_tree(path, Faults())
        ...     print(name, tree.value["repeat"].value)
        thaw.yaml 2
        thaw.yaml 2
        >>> read_tree(3, Faults())
        Traceback (most recent call last):
        thawline.engine.errors.ScheduleError: the schedule has 1 error:
          source: it is a path, YAML text, a dict or a list, got int. Write: 'schedule.yaml'
        >>> read_tree("- thaw: " + "x" * MAX_BYTES, Faults())
        Traceback (most recent call last):
        thawline.engine.errors.ScheduleError: the schedule has 1 error:
          the file: longer than 1 MB, which no schedule is. Write: globs and layers, such as thaw: 'blocks[2:6]', for long lists
    """
    if isinstance(source, (Mapping, list, tuple)):
        return "the schedule", from_python(source, faults)
    if not isinstance(source, (str, Path)):
        problem = f"it is a path, YAML text, a dict or a list, got {type(source).__name__}"
        raise ScheduleError("the schedule", [("source", problem, "'schedule.yaml'")])
    if isinstance(source, str) and is_text(source):
        name, text = "the schedule", source
        if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
            raise _too_long(name)
    else:
        name, text = str(source), _file_text(Path(source))
    return name, _composed(name, text, faults)


def is_text(source: str) -> bool:
    r"""Return whether a string is YAML text rather than a path: it has more than a line, or a mapping or list in it.

    Example:
        >>> is_text("schedule.yaml"), is_text("- thaw: head"), is_text("C:/runs/schedule.yaml")
        (False, True, False)
        >>> is_text("phases:"), is_text(""), is_text("a\nb"), is_text(" [a, b]")
        (True, True, True, True)
    """
    text = source.strip()
    return not text or text.startswith(("[", "{", "- ")) or re.search(r"[\r\n]|: |:$", source) is not None


def _too_long(name: str) -> ScheduleError:
    problem = f"longer than {MAX_BYTES >> 20} MB, which no schedule is"
    return ScheduleError(name, [("the file", problem, "globs and layers, such as thaw: 'blocks[2:6]', for long lists")])


def _file_text(path: Path) -> str:
    r"""Return what a file holds, without a byte order mark.

    Example:
        >>> _ = Path("a.yaml").write_bytes(b"\xef\xbb\xbf" + b" " * (MAX_BYTES - 3))
        >>> len(_file_text(Path("a.yaml")))
        1048573
        >>> _ = Path("a.yaml").write_bytes(b" " * (MAX_BYTES + 1))
        >>> _file_text(Path("a.yaml"))
        Traceback (most recent call last):
        thawline.engine.errors.ScheduleError: a.yaml has 1 error:
          the file: longer than 1 MB, which no schedule is. Write: globs and layers, such as thaw: 'blocks[2:6]', for long lists
        >>> _ = Path("b.yaml").write_bytes(b"name:\n\xff\n")
        >>> _file_text(Path("b.yaml"))
        Traceback (most recent call last):
        thawline.engine.errors.ScheduleError: b.yaml has 1 error:
          line 2: byte 0xff is not UTF-8. Write: the same text, saved as UTF-8
        >>> _file_text(Path("."))
        Traceback (most recent call last):
        thawline.engine.errors.ScheduleError: . has 1 error:
          the file: it is none. Write: the path of a YAML file, or its text
        >>> _file_text(Path("c.yaml"))
        Traceback (most recent call last):
        thawline.engine.errors.ScheduleError: c.yaml has 1 error:
          the file: it cannot be read: ... Write: the path of a YAML file, or its text
    """
    try:
        if path.exists() and not path.is_file():
            raise ScheduleError(str(path), [("the file", "it is none", "the path of a YAML file, or its text")])
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except ScheduleError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL or a lone surrogate in it
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        problem, write = f"it cannot be read: {why}", "the path of a YAML file, or its text"
        raise ScheduleError(_printable(str(path)), [("the file", problem, write)]) from None
    if len(data) > MAX_BYTES:
        raise _too_long(str(path))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = f"byte {data[error.start]:#04x} is not UTF-8"
        raise ScheduleError(str(path), [(f"line {line}", problem, "the same text, saved as UTF-8")]) from None


def _printable(text: str) -> str:
    r"""Return a path for people: lone surrogates escaped, and not longer than 200 characters.

    Example:
        >>> _printable("a\udcff"), len(_printable("a" * 200)), _printable("a" * 201)[-3:]
        ('a\\udcff', 200, "a'…")
    """
    return text.encode("utf-8", "backslashreplace").decode() if len(text) <= 200 else f"{text[:199]!a}…"


# -- YAML --------------------------------------------------------------------------------------------------------------


class _TooDeep(yaml.MarkedYAMLError):
    """Lists and mappings nested too deep."""


class _Loader(yaml.SafeLoader):
    r"""Composes nodes, and refuses anchors, aliases and tags on the way.

    Example:
        >>> faults = Faults()
        >>> text = "a: &one 1\nb: !!str 2\nc: !x '3'\nd: *one\ne: " + "[" * 11 + "]" * 11
        >>> [each.kind for each in read_tree(text, faults)[1].value.values()]
        ['number', 'number', 'text', 'refused', 'list']
        >>> for fault in faults.found:
        ...     print(*fault, sep=" | ")
        1 | &one is an anchor in YAML, which is not read here | a: 1
        2 | tag:yaml.org,2002:str is a tag in YAML, which is not read here | b: 2
        3 | !x is a tag in YAML, which is not read here | c: '3'
        4 | *one is an alias in YAML, which is not read here | d: "*one"
        >>> read_tree("[" * 13 + "]" * 13, Faults())
        Traceback (most recent call last):
        thawline.engine.errors.ScheduleError: the schedule has 1 error:
          line 1: nested deeper than 12 levels. Write: - {thaw: head, until: 2ep}
    """

    def __init__(self, text: str, faults: Faults) -> None:
        super().__init__(text)
        self._lines = text.splitlines()
        self._faults = faults
        self._depth = 0

    @override
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            self.get_event()  # type: ignore[no-untyped-call]
            self._refuse(line, f"*{event.anchor} is an alias in YAML", quote(self._written(line)))
            mark: Any = event.start_mark
            return yaml.ScalarNode("refused", "", mark)
        if event.anchor is not None:
            self._refuse(line, f"&{event.anchor} is an anchor in YAML", _MARKER.sub("", self._written(line)))
            event.anchor = None
        if event.tag is not None:
            self._refuse(line, f"{_cut(event.tag)} is a tag in YAML", _MARKER.sub("", self._written(line)))
            event.tag = None
            if isinstance(event, yaml.ScalarEvent):
                event.implicit = (event.style is None, True)
        if self._depth >= MAX_DEPTH and not isinstance(event, yaml.ScalarEvent):
            raise _TooDeep(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=event.start_mark)
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def _written(self, line: int) -> str:
        text = self._lines[line - 1] if line <= len(self._lines) else ""
        return text.strip() if len(text) <= LONGEST_LINE else ""

    def _refuse(self, line: int, problem: str, write: str) -> None:
        self._faults.add(line, f"{_cut(problem)}, which is not read here", write or "the value itself, in quotes")


def _composed(name: str, text: str, faults: Faults) -> Item:
    r"""Return the tree of a text.

    Example:
        >>> _composed("thaw.yaml", "# nothing\n\n'text'", Faults())
        Item(kind='text', value='text', place=3, written='text', plain=False)
        >>> _composed("thaw.yaml", "# nothing", Faults())
        Traceback (most recent call last):
        thawline.engine.errors.ScheduleError: thaw.yaml has 1 error:
          line 1: there is no phase in it. Write: - {thaw: head, until: 2ep}
        >>> _composed("thaw.yaml", "a: 1\nb: \x07", Faults())
        Traceback (most recent call last):
        thawline.engine.errors.ScheduleError: thaw.yaml has 1 error:
          line 2: the character '\x07' is not allowed in YAML. Write: the line without it
        >>> _composed("thaw.yaml", "a: 1\nb: [1, 2", Faults())
        Traceback (most recent call last):
        thawline.engine.errors.ScheduleError: thaw.yaml has 1 error:
          line 2: it is no YAML: expected ',' or ']', but got '<stream end>'. Write: - {thaw: head, until: 2ep}
        >>> _composed("thaw.yaml", "\n\"\\UFFFFFFFF\"", Faults())
        Traceback (most recent call last):
        thawline.engine.errors.ScheduleError: thaw.yaml has 1 error:
          line 2: it is no YAML: ... Write: - {thaw: head, until: 2ep}
    """
    node: yaml.Node | None = None
    try:
        loader = _Loader(text, faults)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        faults.add(line, f"the character {text[error.position]!a} is not allowed in YAML", "the line without it")
        raise faults.error(name) from None
    try:
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or loader.get_mark()
        _add_broken(text, mark.line + 1, str(getattr(error, "problem", None) or error), faults)
        raise faults.error(name) from None
    except (ValueError, OverflowError) as error:  # PyYAML on "\UFFFFFFFF" and on %YAML with thousands of digits
        _add_broken(text, loader.get_mark().line + 1, str(error), faults)
        raise faults.error(name) from None
    finally:
        loader.dispose()
    if node is None:
        faults.add(1, "there is no phase in it", _EXAMPLE)
        raise faults.error(name)
    return _item(node, node.start_mark.line + 1, faults)


def _add_broken(text: str, line: int, problem: str, faults: Faults) -> None:
    r"""Enter what PyYAML says of text that is no YAML, with the line as it was probably meant.

    Example:
        >>> faults = Faults()
        >>> _add_broken("until: 2ep\nthaw: @head\nlr: 1", 2, "found '@'", faults)
        >>> _add_broken("thaw: @head\nlr: 1", 2, "found '@'", faults)  # seen one line late
        >>> _add_broken("thaw: head\nlr: 1", 7, "the end", faults)
        >>> _add_broken("thaw: @head", 1, "nested deeper than 12 levels", faults)
        >>> for fault in faults.found:
        ...     print(*fault, sep=" | ")
        2 | it is no YAML: found '@' | thaw: "@head"
        1 | it is no YAML: found '@' | thaw: "@head"
        2 | it is no YAML: the end | - {thaw: head, until: 2ep}
        1 | nested deeper than 12 levels | - {thaw: head, until: 2ep}
    """
    if "nested" in problem:
        faults.add(line, problem, _EXAMPLE)
        return
    lines = text.splitlines()
    for number in (line, line - 1):  # PyYAML often notices on the next line
        written = lines[number - 1] if 0 < number <= len(lines) else ""
        write = quote(written)
        if write != written.strip():
            faults.add(number, f"it is no YAML: {problem}", write)
            return
    faults.add(min(line, max(1, len(lines))), f"it is no YAML: {problem}", _EXAMPLE)


def _item(node: yaml.Node, line: int, faults: Faults) -> Item:
    if isinstance(node, yaml.MappingNode):
        return Item("map", _entries(node, faults), line)
    if isinstance(node, yaml.SequenceNode):
        return Item("list", tuple(_item(each, each.start_mark.line + 1, faults) for each in node.value), line)
    return _scalar(node, line, faults)


def _entries(node: yaml.MappingNode, faults: Faults) -> dict[str, Item]:
    r"""Return the values of a mapping by their keys; of a key that stands twice, the first.

    Example:
        >>> faults = Faults()
        >>> tree = read_tree("a: 1\n[b]: 2\n*c : 3\nd: 4\na: 5", faults)[1]
        >>> {key: (each.value, each.where) for key, each in tree.value.items()}
        {'a': (1, 'line 1'), 'd': (4, 'line 4')}
        >>> [fault[:2] for fault in faults.found]
        [(3, '*c is an alias in YAML, which is not read here'), (2, 'a key is a word, not a list or a mapping'), (5, "the key 'a' stands twice, first in line 1")]
    """
    entries: dict[str, Item] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag == "refused":
            if key.tag != "refused":
                faults.add(line, "a key is a word, not a list or a mapping", "key: value")
            continue
        if key.value in entries:
            first = entries[key.value].place
            problem = f"the key {_cut(key.value)!r} stands twice, first in line {first}"
            faults.add(line, problem, "only one of the two lines")
            continue
        entries[key.value] = _item(value, line, faults)
    return entries


def _scalar(node: yaml.Node, line: int, faults: Faults) -> Item:
    """Return a value without others in it; numbers are decimal ones.

    Example:
        >>> faults = Faults()
        >>> text = "[head, 'head', 12, 1.5, -.inf, .nan, yes, off, ~, 010, 1:30, 1234567890123456789, 123456789012345678]"
        >>> for item in read_tree(text, faults)[1].value:
        ...     print(item.kind, item.value, item.written, item.plain)
        text head head True
        text head head False
        number 12 12 True
        number 1.5 1.5 True
        number -inf -.inf True
        number nan .nan True
        flag True yes True
        flag False off True
        null None ~ True
        refused None  False
        refused None  False
        refused None  False
        number 123456789012345678 123456789012345678 True
        >>> len(faults), faults.found[0]
        (3, (1, '010 is no decimal number of at most 18 digits', '"010", or a decimal number'))
    """
    kind, text, plain = node.tag.rpartition(":")[2], str(node.value), getattr(node, "style", None) is None
    if kind == "refused":
        return Item("refused", None, line)
    if kind == "null":
        return Item("null", None, line, text, plain)
    if kind == "bool":
        return Item("flag", text.lower() in {"yes", "true", "on"}, line, text, plain)
    if kind in {"int", "float"}:
        # YAML 1.1 also reads 010 as 8 and 1:30 as 90.
        if _INT.fullmatch(text):
            return Item("number", int(text), line, text, plain)
        if _FLOAT.fullmatch(text) and not text.isdigit():
            return Item("number", float(text.replace(".inf", "inf").replace(".nan", "nan")), line, text, plain)
        faults.add(
            line, f"{_cut(text)} is no decimal number of at most 18 digits", f'"{_cut(text)}", or a decimal number'
        )
        return Item("refused", None, line)
    return Item("text", text, line, text, plain)


def _cut(text: str) -> str:
    """Return the text, no longer than 60 characters.

    Example:
        >>> len(_cut("a" * 60)), _cut("a" * 61)[-3:], len(_cut("a" * 61))
        (60, 'aa…', 60)
    """
    return text if len(text) <= 60 else f"{text[:59]}…"


# -- Python ------------------------------------------------------------------------------------------------------------


def from_python(value: object, faults: Faults, place: str = "", depth: int = 0) -> Item:
    """Return dicts and lists as a tree, such as JSON gives them; places are paths like ``phases[2].lr``.

    Example:
        >>> faults = Faults()
        >>> tree = from_python({"phases": [{"thaw": "head", "lr": 0.1}], 2: None, "on": True, "big": 10**18, 1.5: 1}, faults)
        >>> tree.value["phases"].value[0].value["lr"]
        Item(kind='number', value=0.1, place='phases[0].lr', written='0.1', plain=False)
        >>> {key: (each.kind, each.where) for key, each in tree.value.items()}
        {'phases': ('list', 'phases'), '2': ('null', '2'), 'on': ('flag', 'on'), 'big': ('refused', 'big')}
        >>> for fault in faults.found:
        ...     print(*fault, sep=" | ")
        big | a schedule is strings, numbers, lists and dicts, got int | - {thaw: head, until: 2ep}
        the top | a key is a word, not a float | {'phases': […]}
        >>> nested = from_python([[1]], faults, depth=MAX_DEPTH - 1)
        >>> nested.value[0].kind, nested.value[0].value[0].kind, faults.found[-1][:2]
        ('list', 'refused', ('[0][0]', 'nested deeper than 12 levels'))
    """
    here = place or "the top"
    if depth > MAX_DEPTH:
        faults.add(here, f"nested deeper than {MAX_DEPTH} levels", _EXAMPLE)
        return Item("refused", None, here)
    if isinstance(value, Mapping):
        entries: dict[str, Item] = {}
        for key, each in value.items():
            if isinstance(key, str) or (isinstance(key, int) and not isinstance(key, bool)):
                path = f"{place}.{key}" if place else str(key)
                entries[str(key)] = from_python(each, faults, path, depth + 1)
            else:
                faults.add(here, f"a key is a word, not a {type(key).__name__}", "{'phases': […]}")
        return Item("map", entries, here)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        items = (from_python(each, faults, f"{place}[{index}]", depth + 1) for index, each in enumerate(value))
        return Item("list", tuple(items), here)
    if value is None or isinstance(value, (bool, str)):
        kind: Kind = "null" if value is None else "flag" if isinstance(value, bool) else "text"
        return Item(kind, value, here, str(value))
    if isinstance(value, (int, float)) and (not isinstance(value, int) or math.log10(abs(value) + 1) < 18):
        return Item("number", value, here, str(value))
    faults.add(here, f"a schedule is strings, numbers, lists and dicts, got {type(value).__name__}", _EXAMPLE)
    return Item("refused", None, here)
