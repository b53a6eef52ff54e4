"""One checkpoint on disk: there whole or not at all, and every wrong byte of it found."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from typing_extensions import override

from thawline.engine.errors import ArgumentError, CheckpointError
from thawline.engine.jsontext import dump_json
from thawline.engine.snapshot import (
    FORMAT,
    MANIFEST,
    SCHEMA,
    STATE,
    TENSORS,
    UnreadableError,
    _signed,
    _write,
    read_checkpoint,
    read_manifest,
    verify_checkpoint,
    write_checkpoint,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from thawline.engine.typing import Json

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


def forge(
    folder: Path,
    name: str,
    tensors: bytes = b"\x02\0\0\0\0\0\0\0{}",
    state: bytes = b"{}",
    *,
    files: Mapping[str, Json] | None = None,
    **more: Json,
) -> Path:
    """A checkpoint with the right hashes of the wrong contents, as somebody who knows the format makes it."""
    path = folder / name
    path.mkdir(parents=True)
    (path / TENSORS).write_bytes(tensors)
    (path / STATE).write_bytes(state)
    records: dict[str, Json] = {
        each: {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        for each, raw in ((TENSORS, tensors), (STATE, state))
    }
    records |= files or {}
    kept: dict[str, Json] = {each: record for each, record in records.items() if record != "missing"}
    body: dict[str, Json] = {"format": FORMAT, "schema": SCHEMA, "parent": None, "info": {}, "files": kept}
    (path / MANIFEST).write_bytes(_signed({**body, **more}))
    return path


def test_a_forged_checkpoint_is_read_where_nothing_is_wrong_with_it(tmp_path: Path) -> None:
    """The forgeries below are refused for what is wrong with them, not because they are forged."""
    assert read_checkpoint(forge(tmp_path, "good")) == {}


PICKLE = b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02ls\x85R."
RECORD: dict[str, Json] = {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}


def tensor_file(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def hostile(folder: Path) -> list[str]:
    """Make some eighty checkpoints that want to do harm or to take all memory; return the names of those in ``folder``."""
    secret = folder.parent / "secret"
    secret.write_text("{}")
    for raw, kind in ((PICKLE, "pickle"), (b"PK\x03\x04" + bytes(60), "zip"), (b"", "empty"), (b"\x7fELF", "program")):
        forge(folder, f"tensors-{kind}", raw)
        forge(folder, f"state-{kind}", state=raw)
    forge(folder, "header-oversized", (1 << 62).to_bytes(8, "little") + b"{}")
    forge(folder, "header-deep", (100_000).to_bytes(8, "little") + b"[" * 100_000)
    nothing = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    forge(folder, "tensors-many", tensor_file({str(index): nothing for index in range(250_000)}))
    forge(folder, "shape-huge", tensor_file({"t": {"dtype": "F64", "shape": [1 << 50], "data_offsets": [0, 1 << 53]}}))
    forge(folder, "shape-rank", tensor_file({"t": {"dtype": "U8", "shape": [1] * 9999, "data_offsets": [0, 1]}}, b"0"))
    forge(folder, "shape-hidden", tensor_file({"t": {**nothing, "shape": [0, 1 << 62, 1 << 62]}}))
    forge(folder, "tensors-unused", tensor_file({"t": nothing}))
    forge(folder, "json-deep", state=b"[" * 1_000_000)
    forge(folder, "json-deep-tree", state=b'{"a":' * 90 + b"1" + b"}" * 90)
    forge(folder, "json-wide", state=b"[" + b"[]," * 5_000_000 + b"0]")
    forge(folder, "json-dicts", state=b"[" + b'{"":0},' * 2_000_000 + b"0]")
    forge(folder, "json-long", state=b'"' + b"x" * (65 << 20) + b'"')
    forge(folder, "json-digits", state=b"1" * 1_000_000)
    forge(folder, "json-nan", state=b'{"lr":NaN}')
    forge(folder, "json-overflow", state=b'{"lr":1e999}')
    forge(folder, "json-twice", state=b'{"a":1,"a":2}')
    forge(folder, "tag-unknown", state=b"{\"$eval\":\"__import__('os').system('ls')\"}")
    forge(folder, "tag-object", state=b'{"$array":"t","dtype":"O","shape":[1]}')
    forge(folder, "tag-missing", state=b'{"$tensor":"t"}')
    forge(folder, "tag-device", state=b'{"$device":"cuda:0; import os"}')
    forge(folder, "name-traversal", files={"../../secret": RECORD})
    forge(folder, "name-absolute", files={"/etc/passwd": RECORD})
    forge(folder, "name-fewer", files={TENSORS: "missing"})
    forge(folder, "size-negative", files={STATE: {**RECORD, "size": -1}})
    forge(folder, "size-true", files={STATE: {**RECORD, "size": True}})
    forge(folder, "hash-short", files={STATE: {**RECORD, "sha256": "00"}})
    forge(folder, "record-list", files={STATE: [2, "00"]})
    forge(folder, "schema-text", schema="1")
    forge(folder, "schema-old", schema=0)
    forge(folder, "parent-list", parent=["x"])
    forge(folder, "info-list", info=[1])
    forge(folder, "info-tensor", info={"$tensor": "t"})
    forge(folder, "info-tag", info={"$exec": "ls"})
    forge(folder, "format-another", format="another")
    forge(folder, "format-added", extra=1)
    forge(folder, "schema-true", schema=True)
    (forge(folder, "manifest-pickle") / MANIFEST).write_bytes(PICKLE)
    (forge(folder, "manifest-list") / MANIFEST).write_bytes(b"[]")
    (forge(folder, "manifest-long") / MANIFEST).write_bytes(b" " * (2 << 20))
    (forge(folder, "manifest-repeated") / MANIFEST).write_bytes(dump_json({"manifest": {}, "sha256": ""}))
    (forge(folder, "manifest-overflow") / MANIFEST).write_bytes(b'{"manifest":{"info":1e999},"sha256":""}')
    for depth in (100, 300, 900, 960, 990, 5000):  # parsing, writing and showing what is deep each have limits
        raw = b'{"manifest":{"a":' + b"[" * depth + b"]" * depth + b'},"sha256":""}'
        (forge(folder, f"manifest-deep-{depth}") / MANIFEST).write_bytes(raw)
        forge(folder, f"json-deep-{depth}", state=b'{"$eval":' + b"[" * depth + b"]" * depth + b"}")
        raw = b'{"t":' + b"[" * depth + b"]" * depth + b"}"
        forge(folder, f"header-deep-{depth}", len(raw).to_bytes(8, "little") + raw)
    for name in FILES:
        path = forge(folder, f"link-{name}") / name
        path.rename(folder.parent / f"real-{name}")
        path.symlink_to(folder.parent / f"real-{name}")
        path = forge(folder, f"pipe-{name}") / name
        path.unlink()
        os.mkfifo(path)
        path = forge(folder, f"directory-{name}") / name
        path.unlink()
        path.mkdir()
        path = forge(folder, f"device-{name}") / name
        path.unlink()
        path.symlink_to("/dev/zero")
    forge(folder.parent, "elsewhere")
    (folder / "link").symlink_to(folder.parent / "elsewhere")
    (folder / "file").write_bytes(PICKLE)
    os.mkfifo(folder / "pipe")
    return sorted(each.name for each in folder.iterdir())


def test_hostile_checkpoints_neither_run_code_nor_open_other_files_nor_take_all_memory(tmp_path: Path) -> None:
    """Some eighty of them, each read under an audit hook in a process of its own: CheckpointError, and nothing else."""
    names = hostile(tmp_path / "run")
    script = Path(__file__).with_name("store_faults.py")
    done = subprocess.run(
        [sys.executable, str(script), "hostile", str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    wrong = {name: outcome for name, outcome in report["outcomes"].items() if outcome != "CheckpointError"}
    assert wrong == {}
    assert sorted(report["outcomes"]) == names
    assert len(names) > 80
    assert report["events"] == []
    assert report["grown_mib"] < 200
