"""The example package installs into an environment of its own, is found by its entry point, and passes its tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "docs" / "examples" / "thawline-plateau-freeze"
USE = """
from thawline.engine import Algorithm
print(Algorithm.from_description({"name": "PlateauFreeze", "arguments": {"patience": 3}}))
"""


def test_the_package_installs_and_passes_its_own_tests(tmp_path: Path) -> None:
    """Built from a copy, since building writes beside it; nothing is fetched."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    _run([*pip, "--no-build-isolation", "--target", str(target), str(source)], target)
    assert "PlateauFreeze(monitor='eval/loss', patience=3" in _run([sys.executable, "-c", USE], target, cwd=tmp_path)
    tests = tmp_path / "tests"
    tests.mkdir()
    shutil.copy(PACKAGE / "test_plateau_freeze.py", tests)
    told = _run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)], target, cwd=tests)
    assert " passed" in told
    assert "failed" not in told


def _run(command: list[str], target: Path, cwd: Path | None = None) -> str:
    path = os.pathsep.join([str(target), str(ROOT / ".namespace")])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
