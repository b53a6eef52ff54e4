"""Mutations of the code, and who notices them: the test suite, and the conformance kit alone.

    python -m benchmarks.mutants [--seed N] [--count N] [--only suite|kit] [--subjects N] [--jobs N] [--results FILE]

General mutations (see ``mutations.py``) are drawn by seed. torch is imported once; every trial is a fork that compiles the
mutated module from its tree in memory, before thawline is imported there. Processes that a test starts see the code as it is.

Suite: the tests that execute the mutated statement, as measured test by test once before; for code that runs at import, those that
execute anything of its module. First those in the module's own files, ``tests/test_<module>*.py``; where they do not notice,
the others, cheapest first, as many as take ``--budget`` seconds. Kit: ``check_algorithm`` alone, with the defaults, on each registered
algorithm and preset that executes the statement there, until one does not pass; with ``--subjects``, on that many of them, drawn by the
mutation: what they notice all would, so the share is a lower bound.

A trial that takes three times what was measured, and half a minute, is a timeout, counted apart. Results are appended to a file of JSON lines; what
stands in it is not tried again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console
from rich.table import Table

from .hits import (
    Plugin,
    Work,
    attempt,
    compile_instead,
    measure_subjects,
    measure_tests,
    run_kit,
    run_pytest,
    statements,
    subjects,
    warm_up,
)
from .mutations import ROOT, Mutation, drawn, modules

AGAINST = ("suite", "kit")
# The kit's own modules: a fault in a check is not what the check looks for.
KIT = frozenset({
    "engine/account", "engine/audit", "engine/audits", "engine/bearer", "engine/checks", "engine/closed_forms", "engine/conformance", "engine/derivatives", "engine/doubles", "engine/picture", "engine/drawn_fits", "engine/endings",
    "engine/examples", "engine/graphs", "engine/logbook", "engine/machine", "engine/neighbor", "engine/onlookers", "engine/oracle", "engine/other_batches", "engine/other_forms", "engine/other_loaders", "engine/other_models", "engine/promises",
    "engine/ranked", "engine/records", "engine/recovering", "engine/rehearsal", "engine/resuming", "engine/shown", "engine/specimens", "engine/strategies", "engine/surroundings", "engine/tasks", "engine/testing", "engine/trace",
    "engine/unaided", "engine/variants",
})  # fmt: skip


@attrs.frozen
class Trial:
    """What came of trying a mutation.

    Args:
        key: The mutation's.
        against: ``"suite"`` or ``"kit"``.
        verdict: ``"noticed"``, ``"survived"``, ``"timeout"``, or ``"not executed"`` where nothing executes the statement.
        by: What noticed it.
        tried: How many tests, or subjects of the kit, there were to try.
        seconds: How long it took.
    """

    key: str
    against: str
    verdict: str
    by: str
    tried: int
    seconds: float


@attrs.frozen
class Bench:
    """What trials need to know.

    Args:
        tests: Every test.
        subjects: Every subject of the kit.
        places: The places of statements, by module and line.
        budget: Seconds that tests outside of a module's own files may take.
        most: How many subjects of the kit to try; None tries all.
    """

    tests: list[Work]
    subjects: list[Work]
    places: dict[tuple[str, int], int]
    budget: float
    most: int | None = None

    def executing(self, mutation: Mutation, works: list[Work]) -> list[Work]:
        """Return what executes a mutation's statement, cheapest first."""
        module, line = mutation.module, mutation.statement
        where = [place for (name, at), place in self.places.items() if name == module and line in (0, at)]
        return sorted((each for each in works if each.executes(where)), key=lambda each: each.seconds)

    def stages(self, mutation: Mutation) -> Iterator[list[Work]]:
        """Yield the tests to try, those of the module's own files first."""
        own = f"tests/test_{mutation.module.partition('/')[2]}"
        executing = self.executing(mutation, self.tests)
        if not mutation.statement:
            executing = [each for each in self.tests if each in executing or each.name.startswith(own)]
        yield [each for each in executing if each.name.startswith(own)]
        others: list[Work] = []
        for each in executing:
            if not each.name.startswith(own) and sum(one.seconds for one in others) < self.budget:
                others.append(each)
        yield others

    def try_suite(self, mutation: Mutation) -> Trial:
        """Try a mutation against the tests."""
        tried, seconds = 0, 0.0
        for tests in self.stages(mutation):
            if not tests:
                continue
            tried += len(tests)
            ended = attempt(partial(_run_tests, mutation, [each.name for each in tests]), _limit(tests))
            seconds += ended.seconds
            if ended.code is None:
                return Trial(mutation.key, "suite", "timeout", "", tried, seconds)
            if ended.report is None:
                return Trial(mutation.key, "suite", "noticed", _last_line(ended.printed), tried, seconds)
            if ended.report:
                return Trial(mutation.key, "suite", "noticed", ended.report, tried, seconds)
        return Trial(mutation.key, "suite", "survived" if tried else "not executed", "", tried, seconds)

    def chosen(self, mutation: Mutation) -> list[Work]:
        """Return the subjects of the kit to try, cheapest first."""
        executing = self.executing(mutation, self.subjects)
        lots = {each.name: hashlib.sha256(f"{mutation.key} {each.name}".encode()).digest() for each in executing}
        drawn = sorted(lots, key=lots.__getitem__)[: self.most]
        return [each for each in executing if each.name in drawn]

    def try_kit(self, mutation: Mutation) -> Trial:
        """Try a mutation against the kit."""
        executing = self.chosen(mutation)
        if not executing:
            return Trial(mutation.key, "kit", "not executed", "", 0, 0.0)
        ended = attempt(partial(_run_kit, mutation, [each.name for each in executing]), _limit(executing))
        verdict, by = "noticed", ended.report or _last_line(ended.printed)
        if ended.code is None:
            verdict, by = "timeout", ""
        elif ended.report == "":
            verdict, by = "survived", ""
        return Trial(mutation.key, "kit", verdict, by, len(executing), ended.seconds)


def _limit(works: list[Work]) -> float:
    return 30 + 3 * sum(each.seconds for each in works)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:200]


def _run_tests(mutation: Mutation, chosen: list[str], folder: Path) -> str:
    """Return what failed first, or nothing."""
    compile_instead({mutation.module: mutation.tree()})
    plugin = Plugin(chosen)
    code = run_pytest(folder, plugin, dict.fromkeys(each.partition("::")[0] for each in chosen), "-x")
    return "" if code in (0, 5) else next(iter(plugin.failed), f"pytest ended with {code}")


def _run_kit(mutation: Mutation, chosen: list[str], folder: Path) -> str:
    """Return what did not pass first, or nothing."""
    del folder
    compile_instead({mutation.module: mutation.tree()})
    try:
        known = subjects()
    except Exception as error:  # noqa: BLE001 - an author sees it too
        return f"at import: {error!r}"[:300]
    for name in chosen:
        try:
            run_kit(known, name)
        except Exception as error:  # noqa: BLE001 - reported
            return f"{name}: {error}"[:300]
    return ""


# -- the command -------------------------------------------------------------------------------------------------------

_bench: Bench


def main() -> None:
    """Draw, try, append results, print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mutants", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--count", type=int, default=200, help="mutations")
    parser.add_argument("--only", choices=AGAINST, help="one of both")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds of tests outside of a module's own files")
    parser.add_argument("--subjects", type=int, help="of the kit, to try each mutation on; all where none is given")
    parser.add_argument("--results", type=Path, default=Path("mutants.jsonl"), help="what was tried; appended to")
    parser.add_argument("--keys", nargs="*", default=[], help="only mutations whose keys begin so")
    given = parser.parse_args()
    global _bench  # noqa: PLW0603 - the forks of the pool inherit it
    mutations = [
        each for each in drawn(given.count, given.seed) if not given.keys or each.key.startswith(tuple(given.keys))
    ]
    console = Console(width=160)
    warm_up()
    against = (given.only,) if given.only else AGAINST
    measured = bench(given.results.with_suffix(".map.json"), given.jobs, given.budget, console, against)
    _bench = attrs.evolve(measured, most=given.subjects)
    done = trials(given.results)
    todo = [(one, each) for each in mutations for one in against if (each.key, one) not in done]
    with multiprocessing.get_context("fork").Pool(given.jobs) as pool, given.results.open("a") as file:
        for count, trial in enumerate(pool.imap_unordered(_try, todo), 1):
            done[trial.key, trial.against] = trial
            file.write(json.dumps(attrs.asdict(trial)) + "\n")
            file.flush()
            console.print(
                f"{count}/{len(todo)} {trial.key} {trial.against} {trial.verdict}, {trial.seconds:.0f} s",
                highlight=False,
            )
    report(mutations, done, console)


def _try(what: tuple[str, Mutation]) -> Trial:
    against, mutation = what
    return _bench.try_kit(mutation) if against == "kit" else _bench.try_suite(mutation)


def trials(file: Path) -> dict[tuple[str, str], Trial]:
    """Read what was tried."""
    lines = file.read_text().splitlines() if file.exists() else []
    found = [Trial(**json.loads(line)) for line in lines]
    return {(each.key, each.against): each for each in found}


def bench(file: Path, jobs: int, budget: float, console: Console, against: Sequence[str] = AGAINST) -> Bench:
    """Measure which test and which subject executes what, but what stands in the file and has not changed since."""
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    code = _digest([ROOT / f"{module}.py" for module in modules()])
    digests = {"the kit": code} if "kit" in against else {}
    for path in sorted((ROOT / "tests").glob("test_*.py")) if "suite" in against else ():
        digests[f"tests/{path.name}"] = code + _digest([path])
    todo = [name for name, digest in digests.items() if known.get(name, {}).get("digest") != digest]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for count, (name, found) in enumerate(pool.imap_unordered(_measure, todo), 1):
            known[name] = {"digest": digests[name], **found}
            console.print(f"measured {count}/{len(todo)} {name} {found.get('failed') or ''}", highlight=False)
            file.write_text(json.dumps(known))
    works = {
        name: [Work(each, seconds, int(hits, 16)) for each, (seconds, hits) in known[name]["found"].items()]
        for name in digests
    }
    return Bench(
        tests=[each for name, found in works.items() if name != "the kit" for each in found],
        subjects=works.get("the kit", []),
        places={where: place for place, where in enumerate(statements())},
        budget=budget,
    )


def _measure(name: str) -> tuple[str, dict[str, Any]]:
    return name, measure_subjects() if name == "the kit" else measure_tests(name)


def _digest(paths: list[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def report(mutations: list[Mutation], done: dict[tuple[str, str], Trial], console: Console) -> None:
    """Print who noticed how many, and what nobody noticed."""
    outside = [each for each in mutations if each.module not in KIT]
    table = Table(
        "against", "mutations", "noticed", "timeout", "survived", "not executed", "noticed", "of those executed"
    )
    for against, what, among in (
        ("suite", "", mutations),
        ("kit", "", mutations),
        ("kit", ", outside of its own modules", outside),
    ):
        found = Counter(done[each.key, against].verdict for each in among if (each.key, against) in done)
        noticed, decided = found["noticed"], found.total() - found["timeout"]
        shares = [f"{noticed / count:.1%}" if count else "-" for count in (decided, decided - found["not executed"])]
        counts = [str(found[name]) for name in ("noticed", "timeout", "survived", "not executed")]
        table.add_row(against + what, str(found.total()), *counts, *shares)
    console.print(table)
    for against in AGAINST:
        for each in mutations:
            trial = done.get((each.key, against))
            if trial is not None and trial.verdict != "noticed":
                console.print(
                    f"{against} {trial.verdict}: {each.key} {each.module}:{each.line} {each.operator}: {each.before} -> {each.after}",
                    markup=False, highlight=False,
                )  # fmt: skip


if __name__ == "__main__":
    main()
