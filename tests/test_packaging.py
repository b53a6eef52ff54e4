"""The three ways to install thawline, each beside a user's own `engine.py` and `algorithms.py`."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))

USER_ENGINE = '"""A user\'s own module."""\nNAME = "the user\'s engine"\n'
USER_ALGORITHMS = '"""A user\'s own module."""\nNAME = "the user\'s algorithms"\n'
USER_SCRIPT = """
import importlib.metadata
import sys
from pathlib import Path

import algorithms
import engine
import thawline.algorithms
import thawline.engine

home, checkout = Path(__file__).resolve().parent, Path(sys.argv[1])
assert engine.NAME == "the user's engine" and Path(engine.__file__).parent == home
assert algorithms.NAME == "the user's algorithms" and Path(algorithms.__file__).parent == home
assert getattr(sys.modules["thawline"], "__file__", None) is None, "thawline is a namespace"
for package in (thawline.engine, thawline.algorithms):
    assert checkout not in Path(package.__file__).resolve().parents, f"{package.__name__} comes from the checkout"
    assert Path(package.__file__).with_name("py.typed").exists(), "types are not shipped"
for entry in importlib.metadata.entry_points(group="thawline.algorithms"):
    assert entry.load() is getattr(thawline.algorithms, entry.name)
print(Path(thawline.engine.__file__).resolve().parent)
"""


def _run(*command: str | Path, cwd: Path) -> str:
    # Without PYTHONPATH and without the checkout in sight: what is found is what was installed.
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
    done = subprocess.run(command, cwd=cwd, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the packages are built from; building writes beside it."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("engine", "algorithms"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of a new environment that borrows torch, setuptools and pip from this one, but not thawline."""
    home = tmp_path / "environment"
    venv.create(home, symlinks=True)
    paths = {"base": str(home), "platbase": str(home)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    # A .pth file adds the folder without running the .pth files in it, so an editable install here is not seen there.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n" + sysconfig.get_path("platlib") + "\n")
    return Path(sysconfig.get_path("scripts", "venv", vars=paths)) / Path(sys.executable).name


def _install(python: Path, *what: str | Path, cwd: Path) -> None:
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps")
    _run(*pip, "--no-build-isolation", "--ignore-installed", *what, cwd=cwd)


def _build(kind: str, checkout: Path, into: Path) -> Path:
    """Build an ``sdist`` or a ``wheel`` with the project's own backend."""
    into.mkdir(exist_ok=True)
    code = f"import setuptools.build_meta as backend, sys; backend.build_{kind}(sys.argv[1])"
    _run(sys.executable, "-c", code, into, cwd=checkout)
    (built,) = into.iterdir()
    return built


def _regular(python: Path, checkout: Path) -> None:
    _install(python, ".", cwd=checkout)


def _editable(python: Path, checkout: Path) -> None:
    _install(python, "--editable", ".", cwd=checkout)


def _wheel_from_sdist(python: Path, checkout: Path) -> None:
    sdist = _build("sdist", checkout, checkout.parent / "sdist")
    unpacked = checkout.parent / "unpacked"
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    _install(python, _build("wheel", source, checkout.parent / "wheel"), cwd=checkout.parent)


@pytest.mark.parametrize("install", [_regular, _editable, _wheel_from_sdist])
def test_a_users_own_engine_does_no_harm(
    install: Callable[[Path, Path], None], checkout: Path, python: Path, tmp_path: Path
) -> None:
    """Beside a script with its own `engine.py`, both are imported, each under its own name."""
    install(python, checkout)
    home = tmp_path / "home"
    home.mkdir()
    (home / "engine.py").write_text(USER_ENGINE)
    (home / "algorithms.py").write_text(USER_ALGORITHMS)
    (home / "script.py").write_text(USER_SCRIPT)
    place = Path(_run(python, "script.py", ROOT, cwd=home))
    expected = checkout if install is _editable else python.parents[1]
    assert expected.resolve() in place.parents


def test_the_wheel_holds_the_packages_and_nothing_else(checkout: Path, tmp_path: Path) -> None:
    """No tests, no top-level `engine`, no `__init__.py` of the namespace; every module and the license."""
    names = set(zipfile.ZipFile(_build("wheel", checkout, tmp_path / "wheel")).namelist())
    code = {name for name in names if ".dist-info/" not in name}
    sources = {
        f"thawline/{path.relative_to(checkout).as_posix()}"
        for package in ("engine", "algorithms")
        for path in (checkout / package).iterdir()
        if path.is_file()
    }
    assert code == sources
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_every_extra_and_requirement_is_pinned() -> None:
    """`constraints.txt` pins whatever pyproject.toml names, so that a fresh install gets what was tested."""
    text = (ROOT / "constraints.txt").read_text("utf-8")
    pinned = {_name(line) for line in text.splitlines() if line and not line.startswith("#")}
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = {
        _name(each) for each in [*PROJECT["project"]["dependencies"], *(each for extra in extras for each in extra)]
    }
    assert wanted <= pinned


def test_the_links_for_the_tools_lead_to_the_packages() -> None:
    """`.namespace/thawline` shows the packages under their import names."""
    for package in ("engine", "algorithms"):
        link = ROOT / ".namespace" / "thawline" / package
        assert link.is_symlink()
        assert not link.readlink().is_absolute()
        assert link.resolve() == ROOT / package


def _name(requirement: str) -> str:
    name = requirement
    for mark in "<>=[;!~ ":
        name = name.partition(mark)[0]
    return name.lower().replace("_", "-")
