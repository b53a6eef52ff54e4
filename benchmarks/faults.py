"""Faults on a running fit, and whether what is promised of it holds.

    python -m benchmarks.faults [--quick] [--seed N] [--only ROW] [--json FILE]

torch is imported once, and every run is a fork. Each row counts the faults that were injected and lists what did not hold.
The store's own faults, byte by byte, are in `tests/store_faults.py`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import attrs
import torch
from rich.console import Console
from rich.table import Table

from .forks import run
from .injections import INJECTIONS, Count, Injector
from .rig import fit

# A file system in memory does as a disk does but for the loss of power, which none of these faults is; and it is fast.
MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of an unforeseeable name is made in it


def main() -> None:
    """Inject what the command line asks for, print a table, and exit with 1 where something did not hold."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the counts of CI")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn: steps, delays, events")
    parser.add_argument("--only", choices=INJECTIONS, action="append", help="one row; may be repeated")
    parser.add_argument("--folder", type=Path, default=MEMORY if MEMORY.is_dir() else None, help="where the runs lie")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    given = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=140)
    rows: list[Count] = []
    with tempfile.TemporaryDirectory(prefix="faults-", dir=given.folder) as name:
        folder = Path(name)
        fit(folder / "warm", every="30ba")  # what torch imports late is imported before the forks
        code, _ = run(folder / "whole-run", lambda: fit(folder / "whole", keep=99))
        assert code == 0, (folder / "whole-run" / "stderr").read_text()
        injector = Injector(folder, quick=given.quick, seed=given.seed)
        for row in given.only or INJECTIONS:
            began = time.perf_counter()
            found = INJECTIONS[row](injector)
            for each in found:
                each.seconds = (time.perf_counter() - began) / len(found)
            rows += found
            if sys.stdout.isatty():
                console.print(f"{row}: {time.perf_counter() - began:.0f} s")
    show(console, rows)
    console.print(f"torch {torch.__version__}, python {platform.python_version()}, 1 thread, seed {given.seed}")
    if given.json is not None:
        given.json.write_text(json.dumps([attrs.asdict(each) for each in rows], indent=2) + "\n")
    sys.exit(any(row.failed for row in rows))


def show(console: Console, rows: list[Count]) -> None:
    """Print the table, and below it what did not hold."""
    table = Table("fault", "injected", "held", "s", "")
    for row in rows:
        table.add_row(row.fault, str(row.injected), str(row.injected - len(row.failed)), f"{row.seconds:.0f}", row.note)
    console.print(table)
    for row in rows:
        for each in row.failed:
            console.print(f"{row.fault}: {each}", markup=False)


if __name__ == "__main__":
    main()
