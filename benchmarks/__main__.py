"""``python -m benchmarks``: measure everything, print a table, write JSON."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import attrs
import torch
from rich.console import Console
from rich.table import Table

from .figures import FIGURES
from .measure import Row


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that it runs, not how fast")
    parser.add_argument("--only", choices=FIGURES, action="append", help="one figure; may be repeated")
    parser.add_argument("--device", default="cpu", help="where tensors lie: cpu or cuda")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console = Console()
    rows: list[Row] = []
    for name in given.only or FIGURES:
        console.print(f"measuring: {name}")
        rows += FIGURES[name](2 if given.quick else 11, torch.device(given.device))
    show(console, rows)
    versions = {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": given.device,
        "threads": 1,
    }
    if given.json is not None:
        figures = [{**attrs.asdict(row), "verdict": row.verdict} for row in rows]
        given.json.write_text(json.dumps({"versions": versions, "figures": figures}, indent=2) + "\n")
    console.print(", ".join(f"{name} {value}" for name, value in versions.items()))


def show(console: Console, rows: list[Row]) -> None:
    """Print the table."""
    table = Table("figure", "value", "bar", "", "medians of CPU time (least to most; wall)")
    for row in rows:
        bar = "" if row.bar is None else f"{row.bar:g} {row.unit}"
        table.add_row(row.figure, f"{row.value:.3g} {row.unit}", bar, row.verdict, row.note)
    console.print(table)


if __name__ == "__main__":
    main()
