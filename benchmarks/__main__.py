"""``python -m benchmarks``: measure everything in one run, print a table, write JSON."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import time
import warnings
from pathlib import Path

import attrs
import torch
from rich.console import Console
from rich.table import Table

from .figures import FIGURES
from .measure import Row
from .peers import absent, versions


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that it runs, not how fast")
    parser.add_argument("--only", choices=FIGURES, action="append", help="one figure; may be repeated")
    parser.add_argument("--device", default="cpu", help="where tensors lie: cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown, as in docs/benchmarks.md")
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers', and what they log
    logging.disable(logging.WARNING)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    console = Console(stderr=given.markdown, width=None if sys.stdout.isatty() else 200)
    if away := absent():
        console.print(f"not installed, so not measured: {', '.join(away)}")
    rows: list[Row] = []
    for name in given.only or FIGURES:
        began = time.perf_counter()
        rows += FIGURES[name](2 if given.quick else 11, torch.device(given.device))
        console.print(f"measured {name} in {time.perf_counter() - began:.0f} s")
    about = {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        **versions(),
        "device": torch.cuda.get_device_name() if given.device.startswith("cuda") else given.device,
        "threads": given.threads,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }
    if given.json is not None:
        figures = [{**attrs.asdict(row), "verdict": row.verdict} for row in rows]
        given.json.write_text(json.dumps({"versions": about, "figures": figures}, indent=2) + "\n")
    told = ", ".join(f"{name} {value}" for name, value in about.items())
    if given.markdown:
        print(f"{markdown(rows)}\n\n{told}")
    else:
        show(console, rows)
        console.print(told)


def cells(row: Row) -> tuple[str, str, str, str, str]:
    """Return a row as text: figure, value, least to most, bar, verdict."""
    bar = "" if row.bar is None else f"{row.bar:g} {row.unit}"
    return row.figure, f"{row.value:.3g} {row.unit}", row.spread, bar, row.verdict


_COLUMNS = ("figure", "median", "least to most", "bar", "")


def show(console: Console, rows: list[Row]) -> None:
    """Print the table."""
    table = Table(*_COLUMNS, "medians of CPU time (least to most; wall)")
    for row in rows:
        table.add_row(*cells(row), row.note)
    console.print(table)


def markdown(rows: list[Row]) -> str:
    """Return the table as Markdown, without the timings behind it."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    lines += [
        "| " + " | ".join(each.replace("us", "µs") if "us" in each.split() else each for each in cells(row)) + " |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
