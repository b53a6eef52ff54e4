"""One checkpoint on disk: there whole or not at all, and every wrong byte of it found."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from typing_extensions import override

from forgeries import forge
from thawline.engine.errors import ArgumentError, CheckpointError
from thawline.engine.snapshot import (
    MANIFEST,
    SCHEMA,
    STATE,
    TENSORS,
    UnreadableError,
    _write,
    read_checkpoint,
    read_manifest,
    verify_checkpoint,
    write_checkpoint,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


FILES = (TENSORS, STATE, MANIFEST)
TREE = {"weight": torch.arange(6.0).reshape(2, 3), "betas": (0.9, 0.999), "nan": float("inf"), "step": 3}


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    """Tensors, tuples and numbers return from disk, each tensor in memory of its own."""
    tree = read_checkpoint(write_checkpoint(tmp_path, "one", TREE))
    assert torch.equal(tree.pop("weight"), TREE["weight"])  # type: ignore[arg-type]  # the tensor
    assert tree == {"betas": (0.9, 0.999), "nan": float("inf"), "step": 3}


def test_its_tensors_are_a_safetensors_file(tmp_path: Path) -> None:
    """The safetensors package itself reads them, under names that say what they are."""
    path = write_checkpoint(tmp_path, "one", {"model": TREE})
    assert torch.equal(safetensors.torch.load_file(path / TENSORS)["model/weight"], TREE["weight"])  # type: ignore[arg-type]


def test_the_manifest_has_size_and_hash_of_each_file(tmp_path: Path) -> None:
    """The manifest's sizes and hashes are those of the files, for tensors below, at and above the size of a read."""
    sizes = [1, (8 << 20) - 1, 8 << 20, (8 << 20) + 1, 0, 3]
    tree = [torch.arange(size, dtype=torch.int64).to(torch.uint8) for size in sizes]
    path = write_checkpoint(tmp_path, "one", tree)
    for name, (size, digest) in read_manifest(path).files.items():
        raw = (path / name).read_bytes()
        assert (len(raw), hashlib.sha256(raw).hexdigest()) == (size, digest)
    assert all(map(torch.equal, read_checkpoint(path), tree))


class Unsteady(list[memoryview]):
    """Memory that is another each time it is looked at, as that of a model which trains on while it is saved."""

    looks = 0

    @override
    def __iter__(self) -> Iterator[memoryview]:
        self.looks += 1
        return iter([memoryview(b"%d" % self.looks)])


def test_what_does_not_read_back_as_it_was_written_is_an_error(tmp_path: Path) -> None:
    """Whether the disk lost it or the memory changed meanwhile: such a file gets no name and no older one makes way."""
    with pytest.raises(CheckpointError, match="does not read back"):
        _write(tmp_path / "file", Unsteady())


def test_the_manifest_tells_parent_and_info_without_the_rest(tmp_path: Path) -> None:
    """What a store chooses by is read from one small file, NaN included."""
    info = {"step": 3, "metric": float("nan"), "note": "é"}
    path = write_checkpoint(tmp_path, "two", TREE, parent="one", info=info)
    (path / TENSORS).unlink()
    manifest = read_manifest(path)
    assert manifest.parent == "one"
    assert repr(manifest.info) == repr(info)


def test_an_existing_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    """Not a whole one, and not an empty directory, which a rename would silently replace."""
    write_checkpoint(tmp_path, "one", TREE)
    (tmp_path / "two").mkdir()
    for name in ("one", "two"):
        with pytest.raises(CheckpointError, match="never overwritten"):
            write_checkpoint(tmp_path, name, {})
    assert read_checkpoint(tmp_path / "one")["step"] == 3
    assert sorted(each.name for each in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize("name", ["", ".hidden", "..", "a/b", "/etc/x", "a\0b", "x" * 129, "a\n"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    """Names are plain: no separators, no leading dot."""
    with pytest.raises(ArgumentError, match=r"write_checkpoint\(name=\)"):
        write_checkpoint(tmp_path, name, {})


def test_what_cannot_be_saved_leaves_nothing_behind(tmp_path: Path) -> None:
    """A tree or info that no checkpoint holds is refused before anything is written."""
    wrong: list[tuple[object, dict[str, object]]]
    wrong = [(object(), {}), ({}, {"big": torch.ones(1)}), ({}, {"note": "x" * (2 << 20)})]
    for tree, info in wrong:
        with pytest.raises(CheckpointError):
            write_checkpoint(tmp_path, "one", tree, info=info)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_a_typed_error(tmp_path: Path) -> None:
    """Whatever the system says arrives as a CheckpointError that says what to do, with the cause behind it."""
    with pytest.raises(CheckpointError, match="Make room, or give another run_dir") as raised:
        write_checkpoint(tmp_path / "none", "one", TREE)
    assert isinstance(raised.value.__cause__, FileNotFoundError)
    with pytest.raises(CheckpointError, match="No such file"):
        read_checkpoint(tmp_path / "none")


def damaged(path: Path) -> bool:
    """Whether reading and verifying both refuse ``path``."""
    for read in (read_checkpoint, verify_checkpoint):
        with pytest.raises(CheckpointError):
            read(path)
    return True


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        {"size": 2},
        {"size": True, "sha256": "0" * 64},
        {"size": -1, "sha256": "0" * 64},
        {"size": 2, "sha256": "0"},
    ],
    ids=str,
)
def test_a_record_that_says_no_size_and_hash_is_refused(tmp_path: Path, record: Any) -> None:
    """Also where the manifest fits its own hash."""
    path = forge(tmp_path, "one", files={STATE: record})
    with pytest.raises(CheckpointError, match=r"The manifest describes state\.json as"):
        read_manifest(path)
    assert damaged(path)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_any_byte_is_found(tmp_path: Path, name: str) -> None:
    """Every byte of every file, one bit each, the manifest's own spaces included."""
    path = write_checkpoint(tmp_path, "one", TREE, info={"metric": 0.5})
    raw = (path / name).read_bytes()
    for at in range(len(raw)):
        flipped = bytearray(raw)
        flipped[at] ^= 1 << at % 8
        (path / name).write_bytes(flipped)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_at_any_length_is_found(tmp_path: Path, name: str) -> None:
    """From empty to one byte short, and one byte too long."""
    path = write_checkpoint(tmp_path, "one", TREE)
    raw = (path / name).read_bytes()
    for wrong in [*(raw[:length] for length in range(len(raw))), raw + b"\0", raw + b"\n"]:
        (path / name).write_bytes(wrong)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


@pytest.mark.parametrize("name", FILES)
def test_a_zeroed_page_is_found(tmp_path: Path, name: str) -> None:
    """What a file system gives for a page that never reached the disk."""
    path = write_checkpoint(tmp_path, "one", {"weight": torch.ones(3000), "list": list(range(3000))})
    raw = bytearray((path / name).read_bytes())
    raw[:4096] = bytes(min(len(raw), 4096))
    (path / name).write_bytes(raw)
    assert damaged(path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    """The error names the checkpoint and the file."""
    path = write_checkpoint(tmp_path, "one", TREE)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=rf"one: .*No such file.*{name}"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", FILES[:2])
def test_a_file_of_another_checkpoint_is_found(tmp_path: Path, name: str) -> None:
    """A file of the same size and kind, whole in itself, but of another step."""
    one = write_checkpoint(tmp_path, "one", {"weight": torch.ones(3), "step": 1})
    two = write_checkpoint(tmp_path, "two", {"weight": torch.zeros(3), "step": 2})
    shutil.copy(two / name, one / name)
    assert damaged(one)


def test_a_newer_schema_is_not_taken_for_damage(tmp_path: Path) -> None:
    """The error says to update thawline, and is of the kind that sets nothing aside."""
    path = forge(tmp_path, "future", schema=SCHEMA + 1)
    with pytest.raises(UnreadableError, match="Update thawline"):
        read_checkpoint(path)


def test_what_cannot_be_opened_here_and_now_is_not_taken_for_damage(tmp_path: Path) -> None:
    """With no file descriptor left, as without permission, the error is of the kind that sets nothing aside."""
    path = write_checkpoint(tmp_path, "one", TREE)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(UnreadableError, match="Too many open files"):
            read_checkpoint(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert read_checkpoint(path)["step"] == 3
