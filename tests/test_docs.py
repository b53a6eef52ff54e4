"""Every example of the documentation runs, every link leads somewhere, and no file names somebody's machine."""

import doctest
import importlib
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from attrs import frozen

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
MODULES = sorted(
    f"thawline.{package}" if path.stem == "__init__" else f"thawline.{package}.{path.stem}"
    for package in ("engine", "algorithms")
    for path in (ROOT / package).glob("*.py")
)
_FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}) *(?P<info>[^`\n]*)\n(?P<code>.*?)^ *(?P=fence) *$", re.MULTILINE | re.DOTALL
)
_LINK = re.compile(
    r"(?<!\\)\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?(?P<target>[^)\s>]+)>?(?:\s+(?:\"[^\"]*\"|'[^']*'))?\s*\)"
)
_REFERENCE = re.compile(r"^ {0,3}\[[^\]]+\]:\s*<?(?P<target>[^\s>]+)", re.MULTILINE)


@frozen
class Block:
    """A fenced block of code: its info string, its first line in the page, and its code."""

    info: str
    line: int
    code: str

    @property
    def is_python(self) -> bool:
        """Whether the block is Python."""
        return self.info.partition(" ")[0] in {"python", "py", "python3"}

    @property
    def runs(self) -> bool:
        """Whether the block runs; ``python no-run: reason`` does not."""
        if not self.is_python:
            return False
        flag = self.info.partition(" ")[2].strip()
        if not flag:
            return True
        reason = flag.removeprefix("no-run:").strip() if flag.startswith("no-run:") else ""
        assert reason, f"```{self.info}``` at line {self.line}: write ```python, or ```python no-run: and the reason"
        return False


def blocks(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    for found in _FENCE.finditer(text):
        indent = len(found["indent"])
        code = "".join(
            line[min(indent, len(line) - len(line.lstrip(" "))) :] for line in found["code"].splitlines(True)
        )
        yield Block(found["info"].strip(), text.count("\n", 0, found.start("code")) + 1, code)


def prose(text: str) -> str:
    """Return a page without its code, where a bracket is no link."""
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text))


def links(text: str) -> list[str]:
    """Return the targets of the links and images of a page that lead into the repository."""
    text = prose(text)
    targets = [found["target"] for pattern in (_LINK, _REFERENCE) for found in pattern.finditer(text)]
    return [target for target in targets if not re.match(r"[a-z][a-z0-9+.-]*:", target)]


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub names them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", _FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = sum(1 for each in found if re.fullmatch(re.escape(slug) + r"(-\d+)?", each))
        found.add(f"{slug}-{number}" if number else slug)
    return found


def broken_links(page: Path) -> list[str]:
    """Return the links of a page that lead nowhere."""
    broken: list[str] = []
    for target in links(page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there.read_text("utf-8"))):
            broken.append(target)
    return broken


def run_page(page: Path, text: str) -> None:
    """Run the Python blocks of a page one after the other in one namespace."""
    namespace: dict[str, object] = {"__name__": "__main__", "__file__": str(page)}
    for block in blocks(text):
        if block.runs:
            # Line numbers of the page, so that a traceback points into it.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)


@pytest.fixture
def quiet_corner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory and seeded generators."""
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    torch.manual_seed(0)


@pytest.mark.usefixtures("quiet_corner")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_examples_of_a_page_run(page: Path) -> None:
    """Every `python` block of the page runs, in order."""
    run_page(page, page.read_text("utf-8"))


@pytest.mark.usefixtures("quiet_corner")
@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name: str) -> None:
    """Every `>>>` example in the module's docstrings prints what it says."""
    module = importlib.import_module(name)
    failed, ran = doctest.testmod(module, optionflags=doctest.ELLIPSIS, verbose=False, report=True)
    assert not failed, f"{failed} examples of {name} failed; what they printed is in the captured output"
    written = len(re.findall(r"^ *>>> ", Path(str(module.__file__)).read_text("utf-8"), re.MULTILINE))
    assert ran == written, f"{name} has {written} examples, of which doctest finds {ran}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_links_of_a_page_resolve(page: Path) -> None:
    """Every relative link leads to a file, and every anchor to a heading."""
    assert not broken_links(page)


# Written in pieces, so that this file does not name them.
_HOSTS = [
    "pypi" + ".org",
    "python" + "hosted.org",
    "registry.npm" + "js",
    "download.py" + "torch.org",
    "anaconda" + ".org",
]
_FOLDERS = ["work", "root", "home", "Users", "opt", "mnt"]
_FOREIGN = re.compile(rf"(?<![\w.~$}}/-])/(?:{'|'.join(_FOLDERS)})/|{'|'.join(map(re.escape, _HOSTS))}")


def repository_files() -> list[Path]:
    """Return the files that are or would be committed."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):  # no git, or an unpacked archive
        folders = ("engine", "algorithms", "tests", "docs", "benchmarks", ".ci")
        found = [*ROOT.glob("*.*"), *(each for folder in folders for each in (ROOT / folder).rglob("*"))]
        return [each for each in found if each.is_file() and "__pycache__" not in each.parts]
    return [path for name in listed if name and (path := ROOT / name).is_file() and not path.is_symlink()]


def test_no_file_names_a_machine_or_a_registry() -> None:
    """The repository holds no absolute path of somebody's disk and no host of a package registry."""
    found: list[str] = []
    for path in repository_files():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:  # a picture
            continue
        name = path.relative_to(ROOT)
        found += [f"{name}:{text.count(chr(10), 0, each.start()) + 1}: {each[0]}" for each in _FOREIGN.finditer(text)]
    assert not found, "\n".join(found)


# -- the tests above can fail ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("quiet_corner")
def test_blocks_of_a_page_share_a_namespace() -> None:
    """What one block defines the next can use; other languages and `no-run` blocks are left alone."""
    run_page(
        Path("page.md"),
        "```python\nx = 1\n```\ntext\n```sh\nexit 1\n```\n- a list\n\n  ```python\n  assert x == 1\n  if x:\n      x = 2\n  ```\n"
        "```python no-run: needs torchrun\nraise SystemExit\n```\n~~~python\nassert x == 2\n~~~\n",
    )


def test_a_failing_block_is_reported_at_its_line() -> None:
    """The traceback names the page and the line in it."""
    with pytest.raises(ZeroDivisionError) as caught:
        run_page(Path("page.md"), "# Page\n\n```python\nx = 1\nx / 0\n```\n")
    last = caught.traceback[-1]
    assert (Path(str(last.path)).name, last.lineno + 1) == ("page.md", 5)


@pytest.mark.parametrize("info", ["python no-run", "python no-run:", "python norun: because"])
def test_a_block_that_does_not_run_says_why(info: str) -> None:
    """Without a reason, a block may not be left out."""
    with pytest.raises(AssertionError, match="the reason"):
        run_page(Path("page.md"), f"```{info}\nx = 1\n```\n")


def test_broken_links_are_found(tmp_path: Path) -> None:
    """A missing file, a missing heading and a missing reference are found; what is right or elsewhere is not."""
    (tmp_path / "other.md").write_text("# The `loop`, told twice\n\n## The loop\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n[a](other.md) [b](other.md#the-loop-told-twice) [c](https://example.com/x) [d](#page) `[e](code.md)`\n"
        "```\n[f](block.md)\n```\n[g](gone.md) [h](other.md#gone) ![i](gone.png 'x') [j][k]\n\n[k]: gone-too.md\n"
    )
    assert broken_links(page) == ["gone.md", "other.md#gone", "gone.png", "gone-too.md"]


@pytest.mark.parametrize(
    ("text", "is_foreign"),
    [
        ("see /wo" + "rk/main", True),
        ("'/ho" + "me/me/x'", True),
        ("https://example.com/home/page", False),
        ("docs/work/x.md", False),
        ("https://" + "pypi" + ".org/simple", True),
    ],
)
def test_foreign_paths_are_found(text: str, is_foreign: bool) -> None:
    """Absolute paths of a disk and registry hosts are found; links and relative paths are not."""
    assert bool(_FOREIGN.search(text)) == is_foreign


def test_the_gallery_draws_every_picture_that_the_pages_show() -> None:
    """What lies in docs/pictures is what its code writes, no more and no less; `make claims` draws one."""
    (code,) = [block.code for block in blocks((ROOT / "docs" / "gallery.md").read_text()) if block.runs]
    drawn = set(re.findall(r'^    "([a-z-]+)": ', code, re.MULTILINE))
    assert drawn | {"claims"} == {path.stem for path in (ROOT / "docs" / "pictures").glob("*.png")}
