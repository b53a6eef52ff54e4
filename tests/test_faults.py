"""Faults on a running fit, in CI's counts: `python -m benchmarks.faults` is the long set."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def injected(tmp_path: Path, *rows: str) -> dict[str, int]:
    """Inject faults in a process of their own; return how many of each, all of which held."""
    report = tmp_path / "report.json"
    only = [word for row in rows for word in ("--only", row)]
    command = [sys.executable, "-m", "benchmarks.faults", "--quick", *only, "--json", str(report)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    counts = json.loads(report.read_text())
    assert not any(each["failed"] for each in counts)
    return {each["fault"]: each["injected"] for each in counts}


@pytest.mark.slow
def test_a_run_is_cut_at_every_step(tmp_path: Path) -> None:
    """Adapters, thawing, freezing, average, accumulation, dropout, BatchNorm, augmentation: bit for bit the uncut run."""
    assert injected(tmp_path, "resume") == {
        "resume at every step, 0 workers": 59, "resume at every step, 2 workers": 59, "cut five times in succession": 2,
    }  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="waits for a process by its descriptor")
def test_kills_full_disks_and_second_writers_harm_nothing(tmp_path: Path) -> None:
    """At most one interval is lost; what goes on ends as the uncut run, bit for bit."""
    assert injected(tmp_path, "kill", "full", "writers") == {
        "SIGKILL at random moments": 25, "disk full, each 64 KiB": 10, "two writers": 5,
    }  # fmt: skip


@pytest.mark.slow
def test_a_failing_step_leaves_a_whole_one(tmp_path: Path) -> None:
    """Signals, NaN under each policy, memory that runs out, an exception at each event."""
    assert injected(tmp_path, "signals", "nan", "memory", "exceptions") == {
        "SIGTERM, SIGINT, SIGUSR1": 6, "NaN at step k, on_nonfinite='raise'": 3, "NaN at step k, on_nonfinite='skip'": 3,
        "NaN at step k, on_nonfinite='rollback'": 3, "out of memory at step k": 3, "exception in each hook": 16,
    }  # fmt: skip
