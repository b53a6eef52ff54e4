"""Mutations are valid code of the kinds that are said, what is no behavior is left alone, and faults are noticed in forks."""

from __future__ import annotations

import ast
import json
import random
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
from benchmarks.hits import Work
from benchmarks.mutants import Bench, Trial, trials
from benchmarks.mutations import changes, drawn, modules, mutations

ROOT = Path(__file__).resolve().parents[1]


def mutants(code: str) -> list[tuple[str, str]]:
    """Return every mutation of some code: its kind, and the code that it leads to."""
    found: list[tuple[str, str]] = []
    for index in range(len(list(changes(ast.parse(code))))):
        tree = ast.parse(code)
        change = list(changes(tree))[index]
        change.do()
        found.append((change.operator, ast.unparse(ast.fix_missing_locations(tree))))
    return found


@pytest.mark.parametrize(
    ("code", "operator", "mutated"),
    [
        ("x = 1 if a else b", "negate a condition", "x = 1 if not a else b"),
        ("while a:\n    f()", "negate a condition", "while not a:\n    f()"),
        ("x = [y for y in z if y]", "negate a condition", "x = [y for y in z if not y]"),
        ("x = a < b", "another comparison", "x = a <= b"),
        ("x = a is None", "another comparison", "x = a is not None"),
        ("x = a[2]", "off by one", "x = a[3]"),
        ("f(flag=True)", "the other truth value", "f(flag=False)"),
        ("x = a - b", "other arithmetic", "x = a + b"),
        ("x += 'text'", "other arithmetic", None),
        ("x = a and b", "and, or", "x = a or b"),
        ("x = f(a, b, c)", "swap two arguments", "x = f(b, a, c)"),
        ("x = isinstance(a, b)", "swap two arguments", None),
        ("def f():\n    return a", "return None", "def f():\n    return None"),
        ("a.b = c\nx = d", "drop a statement", "pass\nx = d"),
        ("x = d", "drop a statement", None),
        ("for each in a:\n    break", "drop a statement", "for each in a:\n    pass"),
    ],
)
def test_each_operator_makes_its_change(code: str, operator: str, mutated: str | None) -> None:
    """Exactly one change of that kind, or none where it would break at once or change a text only."""
    assert [each for kind, each in mutants(code) if kind == operator] == ([] if mutated is None else [mutated])


@pytest.mark.parametrize(
    "code",
    [
        "def f():\n    'A docstring.'",
        "x: Literal[1, 2]",
        "def f(x: Literal[1]) -> Literal[2]:\n    ...",
        "assert a < 1",
        "__all__ = [a, b][:1]",
        "@define(slots=False)\nclass A:\n    ...",
        "if TYPE_CHECKING:\n    f(1)",
        "log.info('text', a, 1)",
        "warn(f'{a + 1}', stacklevel=2)",
        "x = ArgumentError('text', got=a + 1)",
        "class A:\n    def __repr__(self):\n        return f(1)",
        "x = f'{a + 1}'",
    ],
)
def test_what_is_said_or_declared_is_left_alone(code: str) -> None:
    """Docstrings, annotations, assertions, decorators, messages."""
    assert mutants(code) == []


def test_every_mutation_compiles_and_is_another_code() -> None:
    """Some of some modules, drawn."""
    for module in random.Random(1).sample(modules(), 12):
        whole = ast.dump(ast.parse((ROOT / f"{module}.py").read_text()))
        found = list(mutations(module))
        for each in random.Random(0).sample(found, min(3, len(found))):
            tree = each.tree()
            compile(tree, module, "exec")
            assert ast.dump(tree) != whole
            assert each.before != each.after


def test_the_draw_follows_the_seed() -> None:
    """The same again, a longer draw begins with it, another seed draws others; no mutation twice."""
    few = [each.key for each in drawn(20, seed=3)]
    assert [each.key for each in drawn(30, seed=3)][:20] == few
    assert len(set(few) | {each.key for each in drawn(20, seed=4)}) > 30


def test_tests_that_execute_the_statement_are_tried_its_own_files_first() -> None:
    """Then the others, the cheapest first, within the budget."""
    (mutation, *_) = (each for each in mutations("engine/clock") if each.statement)
    works = [
        Work("tests/test_run.py::dear", 9.0, 0b01), Work("tests/test_run.py::cheap", 1.0, 0b11),
        Work("tests/test_run.py::elsewhere", 1.0, 0b10), Work("tests/test_clock.py::own", 2.0, 0b01),
        Work("tests/test_run.py::beyond", 10.0, 0b01),
    ]  # fmt: skip
    bench = Bench(works, [], {("engine/clock", mutation.statement): 0, ("engine/clock", -1): 1}, budget=5.0)
    own, others = bench.stages(mutation)
    assert [each.name for each in own] == ["tests/test_clock.py::own"]
    assert [each.name for each in others] == ["tests/test_run.py::cheap", "tests/test_run.py::dear"]


def test_so_many_subjects_of_the_kit_are_drawn_by_the_mutation() -> None:
    """Among those that execute the statement, cheapest first, always the same for one and others for another."""
    few = [each for each in mutations("engine/clock") if each.statement][:40]
    works = [Work(f"subject {number}", float(number), 0b1 if number else 0b10) for number in range(9)]
    places = {("engine/clock", each.statement): 0 for each in few}
    bench = Bench([], works, places, budget=5.0)
    assert bench.chosen(few[0]) == works[1:]
    drawn_by = [attrs.evolve(bench, most=3).chosen(each) for each in few]
    assert all(len(each) == 3 and each == sorted(each, key=lambda work: work.seconds) for each in drawn_by)
    assert {work.name for each in drawn_by for work in each} == {each.name for each in works[1:]}
    assert attrs.evolve(bench, most=3).chosen(few[0]) == drawn_by[0]


def test_trials_are_read_back(tmp_path: Path) -> None:
    """The last line about a mutation counts."""
    line = {"key": "k", "against": "kit", "verdict": "survived", "by": "", "tried": 1, "seconds": 2.0}
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(line) + "\n" + json.dumps(line | {"verdict": "noticed"}) + "\n")
    assert trials(path) == {("k", "kit"): Trial("k", "kit", "noticed", "", 1, 2.0)}


SCRIPT = """
import json, sys
from functools import partial
from benchmarks import hits, mutants, mutations

hits.WARM = ()
hits.warm_up()
for module, operator, before, test in json.loads(sys.argv[1]):
    one, *_ = (each for each in mutations.mutations(module) if (each.operator, each.before) == (operator, before))
    ended = hits.attempt(partial(mutants._run_tests, one, [test]), 120)
    print(json.dumps([ended.code, ended.report]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="waits for a process by its descriptor")
def test_a_fault_is_noticed_and_what_is_equivalent_is_not() -> None:
    """A multiple crossed at every tick fails the clock's test; a counter that is set back before anybody looks, none."""
    crossed = [
        "engine/clock",
        "another comparison",
        "self.count(after) > self.count(before)",
        "tests/test_clock.py::test_reached_and_crossed",
    ]
    counter = [
        "engine/books",
        "off by one",
        "0",
        "tests/test_ledger_changes.py::test_one_inside_another_ends_with_the_outer",
    ]
    command = [sys.executable, "-c", SCRIPT, json.dumps([crossed, counter])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[0, crossed[-1]], [0, ""]]
