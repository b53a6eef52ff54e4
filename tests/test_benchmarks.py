"""The benchmarks run and say whether each bar is met; how fast is for `make bench` on a quiet machine."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_is_printed_and_written(tmp_path: Path) -> None:
    """A quick run of the cheap figures: valid JSON, a verdict for each bar."""
    only = [word for name in ("step", "event", "freezing", "construction") for word in ("--only", name)]
    command = [sys.executable, "-m", "benchmarks", "--quick", *only, "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "figures.json").read_text())
    assert {"torch", "python", "device", "threads"} <= set(written["versions"])
    figures = {row["figure"] for row in written["figures"]}
    assert {
        "step overhead, thawline",
        "step overhead, thawline, six idle",
        "one event, 0 listeners, thawline",
    } <= figures
    assert all((row["verdict"] in ("bar met", "missed")) == (row["bar"] is not None) for row in written["figures"])
    assert "step overhead" in done.stdout
