"""Checkpoints that somebody forged who knows the format: right hashes over wrong contents, links, devices, pipes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thawline.engine.jsontext import dump_json
from thawline.engine.snapshot import FORMAT, MANIFEST, SCHEMA, STATE, TENSORS, _signed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from thawline.engine.typing import Json

FILES = (TENSORS, STATE, MANIFEST)


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


PICKLE = b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02ls\x85R."
RECORD: dict[str, Json] = {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}


def tensor_file(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def hostile(folder: Path) -> list[str]:
    """Make a hundred checkpoints that want to do harm or to take all memory; return the names of those in ``folder``."""
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
    one, all_ = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, b'{"$tensor":"t"}'
    page = tensor_file({"t": {"dtype": "U8", "shape": [1 << 20], "data_offsets": [0, 1 << 20]}}, bytes(1 << 20))
    forge(folder, "alias-bomb", page, b"[" + b",".join([b'{"$bytes":"t"}'] * 100_000) + b"]")
    forge(
        folder, "alias-array", page, b"[" + b",".join([b'{"$array":"t","dtype":"|u1","shape":[1048576]}'] * 9999) + b"]"
    )
    forge(folder, "alias-many", tensor_file({"t": one}, b"0"), b"[" + b",".join([all_] * 1_000_000) + b"]")
    forge(folder, "shape-wrong", tensor_file({"t": {**one, "shape": [3]}}, b"0"), all_)
    forge(folder, "shape-negative", tensor_file({"t": {**one, "shape": [-1]}}, b"0"), all_)
    forge(folder, "shape-float", tensor_file({"t": {**one, "shape": [1.0]}}, b"0"), all_)
    forge(folder, "shape-other-dtype", tensor_file({"t": {**one, "dtype": "F32"}}, b"0"), all_)
    forge(folder, "dtype-object", tensor_file({"t": {**one, "dtype": "O"}}, b"0"), all_)
    forge(folder, "bool-neither", tensor_file({"t": {**one, "dtype": "BOOL"}}, b"7"), all_)
    forge(folder, "offsets-overlap", tensor_file({"t": one, "u": one}, b"0"), b'[{"$tensor":"t"},{"$tensor":"u"}]')
    forge(folder, "offsets-gap", tensor_file({"t": {**one, "data_offsets": [1, 2]}}, b"00"), all_)
    forge(folder, "offsets-outside", tensor_file({"t": {**one, "data_offsets": [0, 1 << 40]}}, b"0"), all_)
    forge(folder, "tensors-trailing", tensor_file({"t": one}, b"0" * 99), all_)
    forge(folder, "header-nan", (15).to_bytes(8, "little") + b'{"t":{"x":NaN}}')
    forge(folder, "info-nan", info={"step": {"$float": "nan"}})
    (forge(folder, "manifest-nan") / MANIFEST).write_bytes(b'{"manifest":{"info":NaN},"sha256":""}')
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
