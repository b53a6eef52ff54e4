"""Schedules as text: every error with its line and the corrected line, and what is written reads back the same."""

import ast
import pickle
import random
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import Tied, cnn, encoder, mlp
from thawline.algorithms.name_patterns import compact, precise
from thawline.algorithms.phases import SCHEDULES, Phase, Plateau, number_phases
from thawline.algorithms.schedule_check import check_phases, generate_phases
from thawline.algorithms.schedule_fts import Callback, phases_from_fts
from thawline.algorithms.schedule_text import read_phases, write_phases
from thawline.algorithms.schedule_tree import MAX_BYTES, MAX_DEPTH
from thawline.engine import ArgumentError, LayerMap, ParameterLedger, ScheduleError, ThawlineWarning, Time

FULL = """\
repeat: 2
max_depth: 3
batchnorm: eval
base_max_lr: 1.0e-5
end_with_last_phase: false
phases:
- name: head first
  thaw: head
  lr: 1.0e-3
  until: {plateau: eval/accuracy, patience: 2, min_delta: 0.01, mode: max, at_most: 5ep}
- thaw: ["blocks[-1]", "*.bias"]
  freeze: [head]
  lr: {"blocks[-1]": 1.0e-4, "*.bias": 0.01}
  lr_scale: 0.5
  weight_decay: 0
  warmup: 100ba
  schedule: cosine
  until: 0.3dur
  restore: best
  restore_monitor: eval/f1
- thaw: head
  until: 2
"""


def faults(source: object) -> tuple[tuple[str, str, str], ...]:
    """Return what is wrong with a schedule."""
    with pytest.raises(ScheduleError) as caught:
        read_phases(source)
    return caught.value.faults


# -- reading ------------------------------------------------------------------------------------------------------


def test_every_key_is_read() -> None:
    """Each option and each key of a phase arrives as what it says."""
    options, phases = read_phases(FULL)
    assert options == {
        "repeat": 2, "max_depth": 3, "batchnorm": "eval", "base_max_lr": 1e-5, "end_with_last_phase": False,
    }  # fmt: skip
    plateau = Plateau("eval/accuracy", patience=2, min_delta=0.01, mode="max", at_most="5ep")
    assert phases == (
        Phase(name="head first", thaw="head", lr=1e-3, until=plateau),
        Phase(
            thaw=("blocks[-1]", "*.bias"), freeze="head", lr={"blocks[-1]": 1e-4, "*.bias": 0.01}, lr_scale=0.5,
            weight_decay=0, warmup="100ba", schedule="cosine", until="0.3dur", restore="best", restore_monitor="eval/f1",
        ),
        Phase(thaw="head", until="2ep"),
    )  # fmt: skip


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_file_its_text_and_its_data_are_the_same(tmp_path: Path, newline: str) -> None:
    """A path, a path as a string, text and dicts read alike, with either line end and a byte order mark."""
    path = tmp_path / "schedule.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + FULL.replace("\n", newline).encode())
    expected = read_phases(FULL)
    assert read_phases(path) == read_phases(str(path)) == read_phases(yaml.safe_load(FULL)) == expected


def test_a_bare_list_is_the_phases() -> None:
    """Without options the list of phases stands alone."""
    assert read_phases("- thaw: head\n") == ({}, (Phase(thaw="head"),)) == read_phases([{"thaw": ["head"]}])


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("1E-5", 1e-5), ("2.5e3", 2500.0), ("1.0e-5", 1e-5), ("3", 3), (".5", 0.5)]
)
def test_a_number_without_a_point_is_a_number(text: str, value: float) -> None:
    """`1e-5` is text to YAML 1.1 and a number to everybody else: without quotes it is taken as one."""
    assert read_phases(f"- {{thaw: head, lr: {text}, until: 1}}")[1][0].lr == value


@pytest.mark.parametrize("until", ["2ep", "100ba", "5000sp", "0.3dur", "2"])
def test_a_time_ends_a_phase(until: str) -> None:
    """Each unit is a time, and a number without one is epochs."""
    expected = Time(int(until)) if until.isdigit() else Time(until)
    assert read_phases(f"- {{thaw: head, until: {until}}}")[1][0].until == expected


# -- errors -------------------------------------------------------------------------------------------------------

A = "- thaw: head\n  until: 2ep\n"
WRONG = {
    # what: (text, line, a part of the problem, what to write)
    "unknown key": ("- thaw: head\n  unitl: 2ep\n", 2, "unknown key 'unitl', the nearest is 'until'", "until: 2ep"),
    "unknown option": ("phases: [{thaw: head}]\nrepaet: 2", 2, "the nearest is 'repeat'", "repeat: 2"),
    "unknown key of a plateau": (
        "- thaw: head\n  until:\n    plateau: x\n    patiance: 2", 4, "nearest is 'patience'", "patience: 3",
    ),
    "duplicate key": ("- thaw: head\n  lr: 1\n  lr: 2", 3, "stands twice, first in line 2", "only one of the two lines"),
    "alias": (A + "- thaw: *bias\n", 3, "*bias is an alias", '- thaw: "*bias"'),
    "glob without quotes": (A + "- thaw: *.bias\n", 3, "it is no YAML", '- thaw: "*.bias"'),
    "layer in a list without quotes": (
        A + "- thaw: [head, blocks[-1]]\n", 3, "it is no YAML", '- thaw: [head, "blocks[-1]"]',
    ),
    "anchor": (A + "- &a {thaw: stem}\n", 3, "&a is an anchor", "- {thaw: stem}"),
    "tag": (A + "- thaw: !!python/name:os.system stem\n", 3, "is a tag", "- thaw: stem"),
    "text for a number": ("- thaw: head\n  lr: '1e-5'", 2, "text in quotes", "lr: 1.0e-05"),
    "word for a number": ("- thaw: head\n  lr: small", 2, "got 'small'", "lr: 1.0e-3"),
    "not above zero": ("- thaw: head\n  lr: -1", 2, "a number above 0", "lr: 1.0e-3"),
    "NaN": ("- thaw: head\n  lr: .nan", 2, "got .nan", "lr: 1.0e-3"),
    "infinity": ("- thaw: head\n  lr_scale: .inf", 2, "got .inf", "lr_scale: 0.5"),
    "overflow": ("- thaw: head\n  lr: 1.0e999", 2, "a number above 0", "lr: 1.0e-3"),
    "rate of a selector": ("- thaw: head\n  lr:\n    head: 0\n", 3, "head takes a number above 0", "head: 1.0e-3"),
    "hexadecimal": ("- thaw: head\n  lr: 0x10", 2, "0x10 is no decimal number", '"0x10", or a decimal number'),
    "octal": ("- thaw: head\n  until: 010", 2, "010 is no decimal number", '"010", or a decimal number'),
    "base 60": ("- thaw: head\n  until: 1:30", 2, "1:30 is no decimal number", '"1:30", or a decimal number'),
    "yes for a layer": ("- thaw: yes", 1, "yes, which YAML reads as true", 'thaw: ["yes"]'),
    "off in a list": ("- thaw:\n  - head\n  - off", 3, "off, which YAML reads as false", 'thaw: ["off"]'),
    "on for a name": ("- thaw: head\n  name: on", 2, "on, which YAML reads as true", 'name: "on"'),
    "number for a module": ("- thaw: 0", 1, "got 0", 'thaw: ["0"]'),
    "bad time": ("- thaw: head\n  until: 2 weeks", 2, "a time", "until: 2ep"),
    "no time": ("- thaw: head\n  until: 0", 2, "above zero", "until: 2ep"),
    "list for a time": ("- thaw: head\n  until: [1]", 2, "got a list", "until: 2ep"),
    "plateau of nothing": ("- thaw: head\n  until: {patience: 2}", 2, "plateau", "until: {plateau: eval/loss}"),
    "patience": ("- thaw: head\n  until: {plateau: x, patience: 0}", 2, "patience takes a whole number", "patience: 3"),
    "mode": ("- thaw: head\n  until: {plateau: x, mode: up}", 2, "mode takes one of", "mode: min"),
    "schedule": ("- thaw: head\n  schedule: cos", 2, "'cosine', got 'cos'", "schedule: cosine"),
    "restore": ("- thaw: head\n  restore: last", 2, "'best', got 'last'", "restore: best"),
    "batchnorm": ("phases: [{thaw: head}]\nbatchnorm: frozen", 2, "'train' or 'eval'", "batchnorm: eval"),
    "flag": (
        "phases: [{thaw: head}]\nend_with_last_phase: 1", 2, "True or False", "end_with_last_phase: true",
    ),
    "empty text": ("", 1, "no phase", "- {thaw: head, until: 2ep}"),
    "comment only": ("# later\n", 1, "no phase", "- {thaw: head, until: 2ep}"),
    "empty list": ("phases: []", 1, "a list that is empty", "phases: [{thaw: head}]"),
    "no phases": ("repeat: 2", 1, "no phases", "phases: [{thaw: head}]"),
    "empty phase": (A + "- {}", 3, "a phase changes something", "thaw: head"),
    "phase of a name": (A + "- name: x", 3, "a phase changes something", "thaw: head"),
    "phase that is a word": (A + "- head", 3, "a phase is a mapping", "- {thaw: head, until: 2ep}"),
    "rate of nothing": (A + "- freeze: head\n  lr: 1", 4, "it thaws nothing", "thaw: head"),
    "thaw and freeze": ("- thaw: head\n  freeze: head", 2, "freeze names what thaw names", "freeze: [stem]"),
    "first phase": ("- freeze: head\n", 1, "the first phase thaws nothing", "thaw: head"),
    "selector twice": ("- thaw: [a, a]", 1, "each selector once", "thaw: [head, 'blocks[-1]']"),
    "no end": ("- thaw: head\n- thaw: stem", 1, "has no end", "until: 2ep"),
    "no end, repeated": ("repeat: 2\nphases:\n- thaw: head", 3, "followed by its repetition", "until: 2ep"),
    "name twice": (
        "- {thaw: a, name: x, until: 1}\n- thaw: b\n  name: x", 3, "the name 'x' stands twice", "name: x again",
    ),
    "tab": ("- thaw: head\n\tuntil: 2ep", 2, "it is no YAML", "until: 2ep"),
    "no space": ("- thaw: head\n  until:2ep\n", 2, "it is no YAML", "until: 2ep"),
    "indentation": ("- thaw: head\n  until: 2ep\n until: 3", 3, "it is no YAML", "- {thaw: head, until: 2ep}"),
    "two documents": ("- thaw: head\n---\n- thaw: head", 2, "another document", "- {thaw: head, until: 2ep}"),
    "control character": ("- thaw: head\n  name: \a", 2, r"'\x07' is not allowed", "the line without it"),
    "bad escape": ('- thaw: "\\UFFFFFFFF"\n', 1, "it is no YAML", "- {thaw: head, until: 2ep}"),
    "version": ("%YAML 1." + "9" * 5000 + "\n---\n- thaw: head", 1, "it is no YAML", "- {thaw: head, until: 2ep}"),
    "key that is a list": ("- thaw: head\n  ? [a]\n  : b", 2, "a key is a word", "key: value"),
    "nesting": ("- thaw: head\n- " + "[" * 5000, 2, f"deeper than {MAX_DEPTH}", "- {thaw: head, until: 2ep}"),
    "huge number": ("- thaw: head\n  until: " + "9" * 5000, 2, "no decimal number", "or a decimal number"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_an_error_has_its_line_and_what_to_write(what: str) -> None:
    """The fault is found at its line, with what is wrong and the corrected line."""
    text, line, problem, write = WRONG[what]
    found = faults(text)
    assert any(at == f"line {line}" and problem in said and write in fix for at, said, fix in found), found


@pytest.mark.parametrize(
    "what", [each for each in WRONG if WRONG[each][3].startswith(("thaw", "until", "lr:", "name"))]
)
def test_a_corrected_line_is_right(what: str) -> None:
    """What an error says to write is itself taken, beside what else a phase needs."""
    key, _, value = WRONG[what][3].partition(": ")
    rest = {"thaw": "thaw: head", "until": "until: 1"}
    rest[key] = f"{key}: {value}"
    assert read_phases("- " + "\n  ".join(rest.values()))[1]


def test_all_errors_are_said_at_once_in_order() -> None:
    """Faults of options, phases and values come in one error, by line."""
    text = "repaet: 2\nphases:\n- thaw: yes\n  until: 2ep\n- thaw: head\n  lr: -1\n  untl: 3\n  until: [1]\n"
    assert [at for at, _, _ in faults(text)] == ["line 1", "line 3", "line 6", "line 7", "line 8"]


def test_an_error_reads_as_text_and_survives_pickle() -> None:
    """The message is a line a fault under the name of the file; a worker process can send it on."""
    with pytest.raises(ScheduleError) as caught:
        read_phases("- thaw: head\n  unitl: 2ep\n")
    text = (
        "the schedule has 1 error:\n  line 2: unknown key 'unitl', the nearest is 'until'. Write: until: 2ep"
    )  # fmt: skip
    assert str(caught.value) == text == str(pickle.loads(pickle.dumps(caught.value)))
    assert isinstance(caught.value, ValueError)


def test_a_long_list_of_errors_is_cut() -> None:
    """A file of nothing but errors does not fill the screen."""
    with pytest.raises(ScheduleError) as caught:
        read_phases("- thaw: yes\n" * 1000)
    assert str(caught.value).splitlines()[-1].strip().startswith("and ")
    assert len(str(caught.value).splitlines()) == 42


def test_a_long_line_of_errors_is_not_repeated() -> None:
    """Aliases by the thousand in one line do not make a message of as many copies of it."""
    with pytest.raises(ScheduleError) as caught:
        read_phases("- thaw: [" + "*a, " * 10_000 + "]   \n")
    assert len(str(caught.value)) < 10_000


def test_data_in_place_of_text_is_checked_as_well() -> None:
    """In dicts and lists a fault stands at a path; what no YAML could hold, cycles included, is refused."""
    loop: list[Any] = []
    loop.append(loop)
    assert faults([{"thaw": "head", "lr": -1}])[0][0] == "[0].lr"
    assert faults({"phases": [{"thaw": object()}]})[0][:2] == (
        "phases[0].thaw", "a schedule is strings, numbers, lists and dicts, got object",
    )  # fmt: skip
    assert "deeper" in faults(loop)[0][1]
    assert "a key is a word" in faults({1.5: 2})[0][1]
    assert (
        "1e-5" in faults([{"thaw": "head", "lr": "1e-5"}])[0][1]
        or "quotes" in faults([{"thaw": "head", "lr": "1e-5"}])[0][1]
    )
    assert "got int" in faults(3)[0][1]
    assert "numbers" in faults([{"thaw": "head", "lr": 10**400}])[0][1]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file, a folder, an impossible name, bytes that are no UTF-8, and a file too long: one error each."""
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"- thaw: head\n- name: caf\xe9\n")
    assert faults(latin) == (("line 2", "byte 0xe9 is not UTF-8", "the same text, saved as UTF-8"),)
    long = tmp_path / "long.yaml"
    long.write_text("- thaw: head\n" + "#" * MAX_BYTES)
    for source in (long, long.read_text()):
        assert "longer than 1 MB" in faults(source)[0][1]
    for source in (tmp_path / "gone.yaml", "gone.yaml", tmp_path, "a\0b", "\ud800.yaml", "x" * 5000):
        [(place, _, write)] = faults(source)
        assert place == "the file"
        assert write == "the path of a YAML file, or its text"


# -- writing ------------------------------------------------------------------------------------------------------

words = st.text(min_size=1, max_size=12) | st.sampled_from(
    [
        "head",
        "blocks[-1]",
        "*.bias",
        "yes",
        "1e-5",
        "010",
        "1:30",
        "~",
        "null",
        "a: b",
        "# a",
        "<<",
        "=",
        "2001-01-01",
        " ",
    ]
)
rates = st.floats(min_value=1e-300, max_value=1e300) | st.integers(min_value=1, max_value=10**17)
times = st.builds(
    lambda n, unit: Time(f"{n}{unit}"), st.integers(1, 10**9), st.sampled_from(["ep", "ba", "sp"])
) | st.builds(lambda share: Time(f"{share!r}dur"), st.floats(min_value=1e-6, max_value=2))
plateaus = st.builds(
    Plateau, words, patience=st.integers(1, 10**9), min_delta=rates | st.just(0.0),
    mode=st.sampled_from(["auto", "min", "max"]), at_most=st.none() | times,
)  # fmt: skip


@st.composite
def schedules(draw: st.DrawFn) -> tuple[dict[str, Any], tuple[Phase, ...]]:
    """Draw options and phases that fit together."""
    phases = []
    count = draw(st.integers(1, 4))
    for number in range(count):
        names = draw(st.lists(words, min_size=1, max_size=6, unique=True))
        cut = draw(st.integers(1, len(names)))
        restore = draw(st.sampled_from([None, "best"]))
        last = number == count - 1
        phases.append(
            Phase(
                name=draw(st.none() | st.just(f"{number}{draw(words)}")), thaw=names[:cut], freeze=names[cut:],
                lr=draw(st.none() | rates | st.dictionaries(words, rates, min_size=1, max_size=3)),
                lr_scale=draw(st.none() | rates), weight_decay=draw(st.none() | rates | st.just(0.0)),
                warmup=draw(st.none() | times), schedule=draw(st.sampled_from([None, *SCHEDULES])),
                until=draw(times | plateaus | st.none() if last else times | plateaus), restore=restore,
                restore_monitor=draw(st.none() | words) if restore else None,
            )
        )  # fmt: skip
    optional = {
        "max_depth": st.none() | st.integers(1, 99), "batchnorm": st.sampled_from(["train", "eval"]),
        "base_max_lr": st.none() | rates, "end_with_last_phase": st.booleans(),
    }  # fmt: skip
    options = draw(st.fixed_dictionaries({}, optional=optional))
    if phases[-1].until is not None:
        options |= draw(st.fixed_dictionaries({}, optional={"repeat": st.integers(1, 9)}))
    return options, tuple(phases)


@given(schedules())
def test_what_is_written_reads_back_the_same(schedule: tuple[dict[str, Any], tuple[Phase, ...]]) -> None:
    """Options and phases survive writing and reading, and the text is the same the second time."""
    text = write_phases(*schedule)
    again = read_phases(text)
    assert again == schedule
    assert write_phases(*again) == text
    assert read_phases(yaml.safe_load(text)) == schedule


def test_the_text_is_made_to_be_read() -> None:
    """Phases stand one below the other, short lists in a line, defaults are left out, keys keep their order."""
    phases = [
        Phase(name="head", thaw="head", lr=1e-3, until=Plateau("eval/loss", patience=2)),
        Phase(thaw=("blocks[-1]", "*.bias"), until="2ep"),
    ]
    assert write_phases({"repeat": 2}, phases) == (
        "repeat: 2\n"
        "phases:\n"
        "- name: head\n"
        "  thaw: head\n"
        "  lr: 0.001\n"
        "  until: {plateau: eval/loss, patience: 2}\n"
        "- thaw: ['blocks[-1]', '*.bias']\n"
        "  until: 2ep\n"
    )


def test_a_function_cannot_be_written() -> None:
    """A phase that ends by a function is refused, and an option that does not exist."""
    with pytest.raises(ArgumentError, match="Plateau where the schedule is written as text"):
        write_phases({}, [Phase(thaw="head", until=lambda _state: True)])
    with pytest.raises(ArgumentError, match="takes options such as 'repeat'"):
        write_phases({"repaet": 2}, [Phase(thaw="head")])


# -- the phases themselves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {}, {"thaw": 3}, {"thaw": ["a", ""]}, {"thaw": ["a", "a"]}, {"thaw": "a", "freeze": "a"}, {"thaw": "a", "lr": 0},
        {"thaw": "a", "lr": {}}, {"thaw": "a", "lr": {"a": "x"}}, {"thaw": "a", "lr": {1: 1}}, {"freeze": "a", "lr": 1},
        {"thaw": "a", "lr_scale": float("nan")}, {"thaw": "a", "weight_decay": -1}, {"thaw": "a", "warmup": "0ba"},
        {"thaw": "a", "schedule": "cos"}, {"thaw": "a", "until": True}, {"thaw": "a", "until": 0}, {"thaw": "a", "until": Time},
        {"thaw": "a", "restore": "last"}, {"thaw": "a", "restore_monitor": "x"}, {"thaw": "a", "name": ""},
    ],
)  # fmt: skip
def test_a_wrong_phase_is_refused(arguments: dict[str, Any]) -> None:
    """Each wrong argument is an error that says what to write."""
    with pytest.raises(ArgumentError, match=r"Write: .*Phase\("):
        Phase(**arguments)


def test_phases_are_numbered_and_checked_side_by_side() -> None:
    """Names are given by place; no phase, a name twice and a missing end are errors."""
    named = number_phases([Phase(thaw="a", until=1), Phase(thaw="b", name="second", until=1), Phase(thaw="c")])
    assert [phase.name for phase in named] == ["phase 1", "second", "phase 3"]
    for phases, repeat in (
        ([], 1), ([Phase(thaw="a"), Phase(thaw="b")], 1), ([Phase(thaw="a")], 2),
        ([Phase(thaw="a", name="phase 2", until=1), Phase(thaw="b")], 1),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match="Write: "):
            number_phases(phases, repeat=repeat)


# -- beside a model -----------------------------------------------------------------------------------------------


def ledger_of(model: nn.Module) -> ParameterLedger:
    """Return a ledger that is only read."""
    return ParameterLedger(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    "model", [mlp(), cnn(), Tied(), encoder(), nn.Linear(2, 2)], ids=lambda each: type(each).__name__
)
def test_the_default_schedule_thaws_each_layer_once_from_the_head_down(model: nn.Module) -> None:
    """Its phases are the layers in reverse, cover every parameter, fit the model, and read back from text."""
    layers = LayerMap(model)
    phases = generate_phases(layers)
    assert [phase.thaw for phase in phases] == [(layer.name,) for layer in reversed(list(layers))]
    assert check_phases(phases, ledger_of(model)) == ()
    assert read_phases(write_phases({}, phases))[1] == phases
    assert sum(Time(str(phase.until)).value for phase in phases[:-1]) < 1


def test_a_weight_and_its_bias_thaw_together() -> None:
    """No layer is cut between two tensors of one module, as pairs of tensors would cut a BatchNorm."""
    ledger = ledger_of(cnn())
    for phase in generate_phases(LayerMap(cnn())):
        modules = {name.rpartition(".")[0] for name in ledger.select(list(phase.thaw))}
        assert all({f"{module}.weight", f"{module}.bias"} <= {*ledger.select(list(phase.thaw))} for module in modules)


def test_what_does_not_fit_the_model_is_said_at_once() -> None:
    """Selectors that match nothing, what thaws twice, and rates of what does not thaw, each with its phase."""
    phases = [
        Phase(name="one", thaw=("head", "clasifier"), until=1),
        Phase(thaw=("4.weight", "blocks[9]"), until=1),
        Phase(thaw="blocks[0]", lr={"0.weight": 0.1, "2.bias": 0.1}),
    ]
    with pytest.raises(ScheduleError) as caught:
        check_phases(phases, ledger_of(mlp()))
    assert [(place, problem.split(",")[0][:40]) for place, problem, _ in caught.value.faults] == [
        ("one", "the selector 'clasifier' matches nothing"),
        ("phase 2", "'4.weight' thaws '4.weight'"),
        ("phase 2", "'blocks[9]' names no block: there are 2"),
        ("phase 3", "lr sets the rate of '2.bias'"),
    ]
    assert "Nearest names" in str(caught.value)


def test_what_was_frozen_may_thaw_again_and_what_is_left_out_is_reported() -> None:
    """A freeze between two thaws makes the second right; parameters that no phase names are returned."""
    phases = [Phase(thaw="head", until=1), Phase(thaw="blocks[1]", freeze="head", until=1), Phase(thaw="head")]
    assert check_phases(phases, ledger_of(mlp())) == ("0.weight", "0.bias")


# -- finetuning-scheduler -----------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Twelve numbered layers and a classifier, so that `layer.1` is also the beginning of `layer.10`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(nn.Linear(2, 2) for _ in range(12))
        self.classifier = nn.Linear(2, 2)


def reference(text: str, model: nn.Module) -> list[set[str]]:
    """Resolve a schedule as finetuning-scheduler's documentation says: an exact name, or a regex matched from the left."""
    names = [name for name, _ in model.named_parameters()]
    loaded = yaml.safe_load(text)
    return [
        {name for each in loaded[key]["params"] for name in ([each] if each in names else names)
         if name == each or (each not in names and re.match(each, name))}
        for key in sorted(loaded)
    ]  # fmt: skip


FTS = r"""
0:
  params:
  - classifier.bias
  - classifier.weight
  max_transition_epoch: 3
1:
  params:
  - layer\.(8|9)\.
  - layer\.1[01]\..*
  max_transition_epoch: 9
  lr: 1e-06
2:
  params:
  - layer\.[0-7]\..*
"""


def test_a_schedule_of_finetuning_scheduler_thaws_the_same_parameters() -> None:
    """Each phase selects what its names and expressions match there."""
    model = Deep()
    phases = phases_from_fts(FTS, model)
    ledger = ledger_of(model)
    assert [{*ledger.select(list(phase.thaw))} for phase in phases] == reference(FTS, model)
    assert check_phases(phases, ledger) == ()


def test_its_epochs_and_rates_arrive() -> None:
    """Early stopping with its defaults becomes a plateau; epochs of the fit become those of the phase; text is a rate."""
    phases = phases_from_fts(FTS, Deep())
    assert [phase.until for phase in phases] == [
        Plateau("eval/loss", at_most="3ep"), Plateau("eval/loss", at_most="6ep"), Plateau("eval/loss"),
    ]  # fmt: skip
    assert [phase.lr for phase in phases] == [None, 1e-6, 1e-5]
    assert [phase.restore for phase in phases] == ["best", "best", None]


def test_phases_by_epochs_alone_last_as_long_as_there() -> None:
    """With epoch_transitions_only the k-th phase ends at its epoch of the fit, the last with the fit."""
    callback = Callback(epoch_transitions_only=True, base_max_lr=2e-4, restore_best=False)
    phases = phases_from_fts(
        FTS.replace("[0-7]", "[0-7]").rstrip() + "\n  max_transition_epoch: 12\n", Deep(), callback=callback
    )
    assert [phase.until for phase in phases] == [Time("3ep"), Time("6ep"), None]
    assert phases[2].lr == 2e-4
    assert {phase.restore for phase in phases} == {None}


@pytest.mark.parametrize(
    ("pattern", "corrected"), [("layer.1", r"layer\.1\."), ("layer.1.*", r"layer\.1\..*"), (r"layer\.1", r"layer\.1\.")]
)
def test_an_expression_that_takes_more_than_it_seems_to_is_said(pattern: str, corrected: str) -> None:
    """`layer.1` also takes layers 10 and 11: it is carried over as it acts, with the corrected expression."""
    rest = r"'layer\.([02-9])\.', classifier"
    with pytest.warns(ThawlineWarning, match="also takes 'layer.10.weight' and 3 more") as caught:
        phases = phases_from_fts(f"0: {{params: ['{pattern}', {rest}]}}", Deep())
    assert repr(corrected) in str(caught[0].message)
    assert phases[0].thaw == ("layer", "classifier")
    assert precise(pattern) == corrected


@pytest.mark.parametrize(
    ("pattern", "rest"),
    [
        (r"layer.(1|2).*", "03-9"), (r"layer.[12]", "03-9"), ("layer.1|layer.2", "03-9"), (r"layer\.(?:1|2).*", "03-9"),
        (r".*\.[12]", "03-9"),
    ],
)  # fmt: skip
def test_a_number_taken_for_the_begin_of_a_longer_one_is_said(pattern: str, rest: str) -> None:
    """Wherever the number stands in the expression; the corrected one takes layers 1 and 2 alone."""
    others = rf"'layer\.([{rest}])\.', classifier"
    with pytest.warns(ThawlineWarning, match="also takes 'layer.10.weight' and 3 more") as caught:
        phases = phases_from_fts(f"0: {{params: ['{pattern}', {others}]}}", Deep())
    assert phases[0].thaw == ("layer", "classifier")
    corrected = ast.literal_eval(str(caught[0].message).partition("Write: ")[2])
    names = [name for name, _ in Deep().named_parameters() if re.match(corrected, name)]
    assert names == ["layer.1.weight", "layer.1.bias", "layer.2.weight", "layer.2.bias"]


@pytest.mark.parametrize(
    "pattern", [r"layer\.\d+\..*", "layer.*", r"layer\.([0-9]|1[01])\.", ".*", r"layer\.\d{1,2}\."]
)
def test_an_expression_that_means_longer_numbers_is_taken_without_a_word(pattern: str) -> None:
    """All layers, by expressions that leave no doubt."""
    assert phases_from_fts({0: {"params": [pattern, "classifier.*"]}}, Deep())[0].thaw == ("layer", "classifier")


def test_what_is_left_out_is_said() -> None:
    """A parameter in no phase stays frozen for ever, there without a word."""
    with pytest.warns(
        ThawlineWarning, match=r"no phase names layer.0.weight, layer.0.bias, layer.1.weight and 21 more"
    ):
        phases_from_fts("0: {params: [classifier]}", Deep())


def test_a_lightning_modules_prefix_may_be_there() -> None:
    """Names of the LightningModule fit the model inside it."""
    text = r"0: {params: [model.classifier.weight, 'model.classifier.bias', 'model\.layer\..*']}"
    assert phases_from_fts(text, Deep())[0].thaw == ("layer", "classifier")


OTHER = "{params: ['layer.*']}"
REFUSED = {
    "gap": (f"0: {{params: [classifier]}}\n2: {OTHER}", 2, "1 is missing before 2", "1:"),
    "from one": (f"1: {{params: [classifier]}}\n2: {OTHER}", 1, "0 is missing before 1", "0:"),
    "word": (f"0: {{params: [classifier]}}\nlast: {OTHER}", 2, "a phase's key is its number", "1:"),
    "twice": (f"0: {{params: [classifier]}}\n0: {OTHER}", 2, "stands twice", "only one of the two lines"),
    "unknown key": ("0:\n  params: ['.*']\n  max_epoch: 3", 3, "'max_transition_epoch'", "max_transition_epoch: …"),
    "no params": ("0:\n  lr: 1.0", 1, "has a list of params", "params: ['classifier.weight']"),
    "matches nothing": ("0:\n  params:\n  - clasifier.weight", 3, "'classifier.weight'", "'classifier.weight'"),
    "no expression": ("0:\n  params:\n  - 'layer('", 3, "no regular expression", r"layer\.1"),
    "exploding": ("0:\n  params:\n  - '(a*)*b'", 3, "repeats a group", r"layer\.1"),
    "not disjoint": (f"0: {{params: [classifier, 'layer.3']}}\n1: {OTHER}", 2, "in phase 0 already", "in one of them"),
    "rate": ("0: {params: [classifier]}\n1:\n  params: ['layer.*']\n  lr: fast", 4, "lr takes a number", "lr: 1.0e-5"),
    "epoch": ("0:\n  params: ['.*']\n  max_transition_epoch: soon", 3, "a whole number", "max_transition_epoch: 3"),
    "optimizer": ("0:\n  params: ['.*']\n  new_optimizer: {}", 3, "new_optimizer has no place", "Trainer(optimizer="),
    "scheduler of phase 0": ("0:\n  params: ['.*']\n  new_lr_scheduler: {}", 3, "phase 0", "Trainer(schedule="),
    "scheduler": (
        "0: {params: [classifier]}\n1:\n  params: ['layer.*']\n  new_lr_scheduler: {lr_scheduler_init: {class_path: x.LinearLR}}",
        4, "LinearLR has no place", "warmup: 4ep",
    ),
    "list": ("- params: []", 1, "maps phase numbers", "0: {params"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_place_here_is_an_error_with_its_line(what: str) -> None:
    """What cannot be carried over says what to write instead."""
    text, line, problem, write = REFUSED[what]
    with pytest.raises(ScheduleError) as caught:
        phases_from_fts(text, Deep())
    found = caught.value.faults
    assert any(at == f"line {line}" and problem in said and write in fix for at, said, fix in found), found


def test_a_cosine_of_a_phase_arrives_with_a_word() -> None:
    """CosineAnnealingLR becomes the schedule of the phase; what is not carried over is said."""
    text = (
        "0: {params: [classifier]}\n1:\n  params: ['layer.*']\n  new_lr_scheduler:\n    lr_scheduler_init:\n"
        "      class_path: torch.optim.lr_scheduler.CosineAnnealingLR\n      init_args: {T_max: 3}\n"
    )
    with pytest.warns(ThawlineWarning, match="without T_max and eta_min"):
        phases = phases_from_fts(text, Deep())
    assert [phase.schedule for phase in phases] == [None, "cosine"]


def test_warnings_of_a_conversion_name_the_line() -> None:
    """A rate of phase 0, an epoch already used up and one counted from an unknown begin are said with their lines."""
    text = (
        "0:\n  params: [classifier]\n  lr: 0.1\n  max_transition_epoch: 3\n"
        "1:\n  params: ['layer\\.1\\.']\n  max_transition_epoch: 2\n"
        "2:\n  params: ['layer\\.2\\.']\n"
        "3:\n  params: ['layer\\.([03-9]|1.)\\.']\n  max_transition_epoch: 9\n4:\n  params: ['layer\\.1[01]']\n"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ScheduleError, match="in phase 3 already"):
            phases_from_fts(text, Deep())
        phases = phases_from_fts(text.replace("|1.", "|1[01]").partition("4:")[0], Deep())
    said = [str(each.message).partition(": ")[2].partition(":")[0] for each in caught]
    assert said == ["line 3", "line 7", "line 12"]
    assert [str(getattr(phase.until, "at_most", None)) for phase in phases] == ["3ep", "1ep", "None", "None"]


@given(st.sets(st.sampled_from([name for name, _ in Deep().named_parameters()]), min_size=1))
@settings(max_examples=50)
def test_compact_selectors_mean_exactly_the_names(names: set[str]) -> None:
    """Modules stand for their parameters only where all of them are meant."""
    ledger = ledger_of(Deep())
    ordered = [name for name in ledger.parameters if name in names]
    assert {*ledger.select(list(compact(ordered, list(ledger.parameters))))} == names


# -- mutated files ------------------------------------------------------------------------------------------------

TOKENS = [
    ":", "- ", "\t", "{", "}", "[", "]", "*a", "&a ", "!!python/object:os.system ", "|", ">", "'", '"', "? ", "%YAML 9.9\n",
    "---\n", "...\n", "<<: ", "\\", '"\\UFFFFFFFF"', "~", "yes", "1e-5", ".nan", "-1", "0x1", "1:30", "\0", "\ud7ff", "\x85",
    "é", "#", "2ep", "phases:", "until:", "9" * 5000, "[" * 200, "a: " * 50, "\ufeff", "@", "`", "\r", "=", "2001-01-01",
]  # fmt: skip


def mutated(text: str, rng: random.Random) -> bytes:
    """Return the text with one to three faults of bytes, lines or tokens."""
    data = text.encode()
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(data) + 1)
        kind = rng.randrange(7)
        if kind == 0:
            data = data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
        elif kind == 1:
            data = data[:place] + data[place + rng.randint(1, 20) :]
        elif kind == 2:
            data = data[:place] + rng.choice(TOKENS).encode() + data[place:]
        elif kind == 3:
            lines = data.splitlines(True) or [b""]
            rng.shuffle(lines)
            data = b"".join(lines)
        elif kind == 4:
            lines = data.splitlines(True) or [b""]
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
            data = b"".join(lines)
        elif kind == 5:
            words = re.split(rb"(\W+)", data)
            words[rng.randrange(len(words))] = rng.choice([*words, *(each.encode() for each in TOKENS)])
            data = b"".join(words)
        else:
            data = b"\n".join(b" " * rng.randint(0, 3) * (rng.random() < 0.2) + line for line in data.split(b"\n"))
    return data


def survives(count: int, path: Path) -> int:
    """Read mutated files; return how many were valid. Anything but a result or a ScheduleError escapes."""
    rng, model, valid = random.Random(20), Deep(), 0
    generated = write_phases({}, generate_phases(LayerMap(cnn())))
    for number in range(count):
        source = (FULL, generated, FTS)[number % 3]
        path.write_bytes(mutated(source, rng))
        try:
            if source is FTS:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ThawlineWarning)
                    phases_from_fts(path, model)
            else:
                again = read_phases(path)
                assert read_phases(write_phases(*again)) == again
            valid += 1
        except ScheduleError as error:
            said = str(error).encode("utf-8")
            if not (said and all(all(fault) for fault in error.faults)):
                raise AssertionError(error.faults) from error
    return valid


def test_mutated_files_end_in_a_result_or_an_error(tmp_path: Path) -> None:
    """300 mutated schedules: nothing but a ScheduleError or a valid result."""
    assert 0 < survives(300, tmp_path / "schedule.yaml") < 300


@pytest.mark.slow
def test_twenty_thousand_mutated_files_end_in_a_result_or_an_error(tmp_path: Path) -> None:
    """20,000 mutated schedules: nothing but a ScheduleError or a valid result."""
    assert 0 < survives(20_000, tmp_path / "schedule.yaml") < 20_000
