"""Which tests, and which fits of the conformance kit, execute which statements; and code that is compiled from other trees.

thawline is imported in forks only, each with code of its own, compiled from trees in memory: no file is ever changed.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import json
import mmap
import multiprocessing
import os
import resource
import runpy
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen
from typing_extensions import override

from .mutations import ROOT, modules, parsed

MEMORY = 16 << 30  # bytes of address space: a list that grows without end fails by itself
# Imported before the forks, so that none of them has to.
WARM = (
    "hypothesis.stateful", "matplotlib.pyplot", "numpy", "rich.progress", "safetensors.torch", "sklearn.metrics", "structlog",
    "torch._dynamo", "torch.utils.data", "torchmetrics", "transformers.models.bert.modeling_bert",
    "transformers.models.gpt2.modeling_gpt2", "yaml",
)  # fmt: skip


def warm_up() -> None:
    """Import what tests need besides thawline, with the settings of the suite."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    runpy.run_path(str(ROOT / "tests/conftest.py"))
    for name in WARM:
        with suppress(ImportError):
            importlib.import_module(name)
    assert not any(name.startswith("thawline") for name in sys.modules), "thawline must be imported in forks only"
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT / ".namespace"), str(ROOT / "tests")]
    os.environ["PYTHONPATH"] = str(ROOT / ".namespace")  # of what tests start


# -- forks -------------------------------------------------------------------------------------------------------------


@frozen
class Attempt:
    """How a fork ended.

    Args:
        code: Its exit code; negative for a signal; None where it was killed at its limit.
        report: What its work returned, as JSON; the traceback where it raised.
        seconds: How long it took.
        printed: The end of what it printed.
    """

    code: int | None
    report: Any
    seconds: float
    printed: str


def attempt(work: Callable[[Path], Any], limit: float) -> Attempt:
    """Do ``work``, which is given a folder of its own, in a fork that is killed after ``limit`` seconds."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if not (pid := os.fork()):
            _child(folder, work)
        descriptor = os.pidfd_open(pid)
        ended = bool(select.select([descriptor], [], [], limit)[0])
        os.close(descriptor)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # with what it started
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status) if ended else None
        report = folder / "report"
        printed = (folder / "printed").read_text(errors="replace")[-4000:]
        found = json.loads(report.read_text()) if code == 0 and report.exists() else None
    return Attempt(code, found, time.perf_counter() - began, printed)


def _child(folder: Path, work: Callable[[Path], Any]) -> None:
    code = 3
    try:
        os.setpgid(0, 0)
        multiprocessing.current_process().daemon = False  # a test may start workers of a loader
        signal.signal(signal.SIGINT, signal.default_int_handler)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        printed = os.open(folder / "printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        (folder / "tmp").mkdir()
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder / "tmp")
        (folder / "report").write_text(json.dumps(work(folder)))
        code = 0
    except BaseException:  # noqa: BLE001 - the parent sees the code and what is printed
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


# -- other code --------------------------------------------------------------------------------------------------------


def compile_instead(trees: Mapping[str, ast.Module]) -> None:
    """Let this process import modules from these trees in place of their files."""
    paths = {str((ROOT / f"{module}.py").resolve()): tree for module, tree in trees.items()}
    usual = SourceFileLoader.get_code

    def get_code(self: SourceFileLoader, fullname: str) -> Any:
        path = str(Path(self.get_filename(fullname)).resolve())
        return compile(paths[path], path, "exec") if path in paths else usual(self, fullname)

    SourceFileLoader.get_code = get_code  # type: ignore[assignment, method-assign]


def statements() -> list[tuple[str, int]]:
    """Return every statement inside a function, by module and line, in a fixed order."""
    return [(module, line) for module in modules() for line in sorted(_lines(parsed(module)))]


def _lines(tree: ast.Module) -> set[int]:
    functions = [each for each in ast.walk(tree) if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return {
        each.lineno
        for function in functions
        for one in function.body
        for each in ast.walk(one)
        if isinstance(each, ast.stmt)
    }


class _Marker(ast.NodeTransformer):
    """Puts a call before each statement inside a function."""

    def __init__(self, numbers: Mapping[int, int]) -> None:
        self.numbers = numbers

    @override
    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            found = getattr(node, name, None)
            if isinstance(found, list) and found:
                setattr(node, name, [part for each in found for part in self._marked(found, each)])
        return node

    def _marked(self, body: list[ast.stmt], each: ast.stmt) -> list[ast.stmt]:
        is_docstring = each is body[0] and isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant)
        if each.lineno not in self.numbers or is_docstring:
            return [each]
        call = ast.Call(ast.Name("__hit__", ast.Load()), [ast.Constant(self.numbers[each.lineno])], [])
        return [ast.copy_location(ast.Expr(call), each), each]


class Hits:
    """The statements executed since :meth:`clear`, by their places, in memory that a process shares with its forks."""

    def __init__(self, count: int) -> None:
        self._memory = mmap.mmap(-1, count)

    def add(self, place: int) -> None:
        """Take one in."""
        self._memory[place] = 1

    def clear(self) -> None:
        """Forget all."""
        self._memory[:] = bytes(len(self._memory))

    def packed(self) -> str:
        """Return them as the bits of a number, as text."""
        return f"{sum(1 << place for place, byte in enumerate(self._memory[:]) if byte):x}"


def note_hits() -> Hits:
    """Let this process and its forks note the statements of :func:`statements` that they execute."""
    hits = Hits(len(statements()))
    numbers: dict[str, dict[int, int]] = {}
    for place, (module, line) in enumerate(statements()):
        numbers.setdefault(module, {})[line] = place
    trees = {
        module: ast.fix_missing_locations(_Marker(found).visit(parsed(module))) for module, found in numbers.items()
    }

    def hit(place: int) -> None:
        hits.add(place)

    importlib.import_module("torch._dynamo.config").reorderable_logging_functions.add(hit)  # else no block compiles
    builtins.__hit__ = hit  # type: ignore[attr-defined]
    compile_instead(trees)
    return hits


# -- tests -------------------------------------------------------------------------------------------------------------


class Plugin:
    """Takes chosen tests in their order, and notes the first that fails, and what each executes.

    Args:
        chosen: Their ids; None takes all.
        hits: Where the statements executed appear, if anywhere.
    """

    def __init__(self, chosen: Sequence[str] | None = None, hits: Hits | None = None) -> None:
        self.order = None if chosen is None else {name: place for place, name in enumerate(chosen)}
        self.hits = hits
        self.failed: list[str] = []
        self.found: dict[str, tuple[float, str]] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Choose."""
        if (order := self.order) is not None:
            items[:] = sorted((each for each in items if each.nodeid in order), key=lambda each: order[each.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Note what it executes."""
        if self.hits is None:
            return (yield)
        self.hits.clear()
        began = time.perf_counter()
        result = yield
        self.found[item.nodeid] = (round(time.perf_counter() - began, 3), self.hits.packed())
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what fails."""
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note what cannot be imported."""
        if report.failed:
            self.failed.append(f"{report.nodeid}: not imported")


def run_pytest(folder: Path, plugin: Plugin, files: Iterable[str], *options: str) -> int:
    """Run pytest in this process."""
    given = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--assert=plain",
        "--tb=short",
        f"--basetemp={folder / 'pytest'}",
        *options,
        *files,
    ]
    return int(pytest.main(given, plugins=[plugin]))


# -- the map -----------------------------------------------------------------------------------------------------------


@frozen
class Work:
    """A test or a subject of the kit.

    Args:
        name: The test's id, the subject's name.
        seconds: How long it takes.
        hits: The statements that it executes, as the bits of a number.
    """

    name: str
    seconds: float
    hits: int

    def executes(self, places: Collection[int]) -> bool:
        """Return whether it executes any of these statements."""
        return any(self.hits >> place & 1 for place in places)


def measure_tests(file: str) -> dict[str, Any]:
    """Return what each test of a file executes; one that does not pass is left out, and named."""

    def work(folder: Path) -> dict[str, Any]:
        plugin = Plugin(hits=note_hits())
        code = run_pytest(folder, plugin, [file])
        return {"code": code, "found": plugin.found, "failed": plugin.failed}

    ended = attempt(work, 1800)
    assert ended.report is not None, f"{file}: {ended.code}\n{ended.printed}"
    failed = ended.report["failed"]
    found = {name: each for name, each in ended.report["found"].items() if name not in failed}
    return {"failed": failed, "found": found, "printed": ended.printed if failed else ""}


def measure_subjects() -> dict[str, Any]:
    """Return what the kit executes with each subject."""

    def work(_: Path) -> dict[str, Any]:
        hits = note_hits()
        found: dict[str, tuple[float, str]] = {}
        known = subjects()
        for name in known:
            hits.clear()
            began = time.perf_counter()
            run_kit(known, name)
            found[name] = (round(time.perf_counter() - began, 3), hits.packed())
        return {"found": found}

    ended = attempt(work, 1800)
    assert ended.report is not None, f"{ended.code}\n{ended.printed}"
    return dict(ended.report)


def subjects() -> dict[str, Any]:
    """Return what the kit is run on: every registered algorithm and preset of the project, by name."""
    engine, testing = (importlib.import_module(f"thawline.{name}") for name in ("engine", "engine.testing"))
    presets = importlib.import_module("thawline.algorithms.presets")
    kinds = [
        kind
        for kind in map(engine.registered, engine.registered_names())
        if kind.__module__.startswith("thawline.algorithms")
    ]
    found = {kind.__name__: testing.specimen(kind) for kind in kinds}
    for name, preset in inspect.getmembers(presets, inspect.isfunction):
        if preset.__module__ == presets.__name__ and not name.startswith("_"):
            given = (
                {"model": testing.tiny_models()["residual"]()}
                if "model" in inspect.signature(preset).parameters
                else {}
            )
            found[name] = testing.specimen(preset, **given)
    return found


def run_kit(known: Mapping[str, Any], name: str) -> None:
    """Run ``check_algorithm``, with its defaults, on a subject beside the others."""
    check = importlib.import_module("thawline.engine.testing").check_algorithm
    check(known[name], partners=[each for each in known.values() if isinstance(each.build, type)])
