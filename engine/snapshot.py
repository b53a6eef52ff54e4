"""One checkpoint on disk: a directory that is there whole or not at all.

    ba00000120/
        tensors.safetensors   the tensors, readable by any safetensors viewer
        state.json            everything else; codec.py says how
        manifest.json         sizes and SHA-256 of the two, parent, facts; signed with its own SHA-256

It is written under a temporary name, each file read back, compared, hashed and fsynced, the manifest last; then renamed,
and the rename fsynced. So a name without ``.tmp-`` in front stands for a whole checkpoint, whenever the process was
killed. The hashes find what time does to disks; they are no signature against somebody who may write to the directory.
Against him stands that nothing here can run code: reading follows no link, opens no device and knows only fixed names.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from errno import EIO, EISDIR, ELOOP, ENOENT, ENOTDIR, ENXIO
from pathlib import Path
from reprlib import repr as brief  # bounded also for what is huge or deep
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from .codec import flatten, unflatten
from .errors import ArgumentError, CheckpointError
from .jsontext import MAX_TEXT, MEMORY, dump_json, load_json
from .tensorfile import pieces_of, read_tensors

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from io import BufferedReader

    from .typing import Json

FORMAT, SCHEMA = "thawline checkpoint", 1
"""The layout described above, and its version."""
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
TEMPORARY = ".tmp-"
"""What the name of an unfinished checkpoint begins with."""
MAX_MANIFEST = 1 << 20
"""The longest manifest that is read, in bytes."""

_CHUNK = 8 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FIELDS = {"format", "schema", "parent", "info", "files"}
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What the system says of a file that is damaged or missing. Anything else (no permission, too many open files) is no
# fault of the checkpoint, which must then not be set aside.
_DAMAGE = (EIO, EISDIR, ELOOP, ENOENT, ENOTDIR, ENXIO)


class UnreadableError(CheckpointError):
    """A checkpoint that cannot be read here and now, but is not known to be damaged."""


@frozen
class Manifest:
    """What a checkpoint says of itself.

    Args:
        files: Size in bytes and SHA-256 of each file, by name.
        info: What the writer added: the store's step, metric, monitor and permanent.
        parent: The name of the checkpoint that was the newest when this one was written, None for the first.
    """

    files: Mapping[str, tuple[int, str]]
    info: Mapping[str, Any] = field(factory=dict)
    parent: str | None = None


def write_checkpoint(
    folder: str | Path,
    name: str,
    tree: object,
    *,
    parent: str | None = None,
    info: Mapping[str, object] | None = None,
) -> Path:
    """Write ``tree`` as the checkpoint ``folder/name``, which exists afterwards whole or not at all.

    Args:
        folder: An existing directory. In one that a :class:`CheckpointStore` keeps, save through the store.
        name: The new directory's name: letters, digits, ``.``, ``_`` and ``-``.
        tree: What :func:`~thawline.engine.codec.flatten` takes.
        parent: The name of the checkpoint that this one follows.
        info: Small facts for the manifest, to be read without reading the checkpoint.

    Returns:
        The checkpoint's directory.

    Raises:
        ArgumentError: A name that a checkpoint cannot have.
        CheckpointError: There is such a checkpoint, the tree holds what none can, the disk is full or fails, or what
            was written does not read back. What was there before is as it was, and nothing is left behind (but the
            whole checkpoint where only the very last fsync fails).

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = write_checkpoint(folder, "first", {"betas": (0.9, 0.999)})
        ...     path.name, read_checkpoint(path)
        ('first', {'betas': (0.9, 0.999)})
    """
    if not _NAME.fullmatch(name):
        takes = "a name of letters, digits, '.', '_' and '-' (at most 128)"
        raise ArgumentError("write_checkpoint(name=)", got=name, takes=takes, example="name='ba00000120'")
    facts, infos = flatten(dict(info or {}))
    if facts:
        raise CheckpointError(f"The info of checkpoint {name!r} holds tensors, such as {next(iter(facts))!r}.")
    contents = _contents(tree)
    folder = Path(folder)
    final = folder / name
    temporary = folder / f"{TEMPORARY}{name}-{secrets.token_hex(6)}"
    try:
        if os.path.lexists(final):
            raise CheckpointError(f"There is a {final} already, and a checkpoint is never overwritten.")
        temporary.mkdir()
        files = {file: _write(temporary / file, pieces) for file, pieces in contents.items()}
        _write(temporary / MANIFEST, [memoryview(_render(files, infos, parent))])
        sync_directory(temporary)
        temporary.rename(final)
        sync_directory(folder)
    except OSError as error:
        raise CheckpointError(
            f"Cannot write {final}: {error}. What was saved before is untouched. Make room, or give another run_dir."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already where all went well
    return final


def read_checkpoint(path: str | Path) -> Any:
    """Return the tree of the checkpoint at ``path``, after every byte of it was checked.

    Args:
        path: The checkpoint's directory, not a link to it.

    Returns:
        What was given to :func:`write_checkpoint`, its tensors on the CPU.

    Raises:
        CheckpointError: There is none, it is damaged or not thawline's, or it cannot be read.
    """
    with _verified(Path(path)) as (manifest, opened):
        size, _ = manifest.files[TENSORS]
        state = load_json(opened[STATE].read(manifest.files[STATE][0]), budget=MEMORY + size)
        return unflatten(read_tensors(opened[TENSORS], size), state)


def verify_checkpoint(path: str | Path) -> Manifest:
    """Return the manifest of the checkpoint at ``path``, after every byte of it was checked.

    Raises:
        CheckpointError: There is none, it is damaged or not thawline's, or it cannot be read.
    """
    with _verified(Path(path)) as (manifest, _):
        return manifest


def holds(path: str | Path, tree: object) -> bool:
    """Return whether the checkpoint at ``path`` is what :func:`write_checkpoint` makes of ``tree``, byte by byte.

    Raises:
        CheckpointError: It is damaged, or cannot be read; or ``tree`` holds what no checkpoint can.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = write_checkpoint(folder, "first", {"step": 1})
        ...     holds(path, {"step": 1}), holds(path, {"step": 2})
        (True, False)
    """
    files = verify_checkpoint(path).files
    return all(_digest(pieces) == files[file][1] for file, pieces in _contents(tree).items())


def read_manifest(path: str | Path) -> Manifest:
    """Return the manifest of the checkpoint at ``path``; the other files are not looked at.

    Raises:
        CheckpointError: There is none, it is damaged or not thawline's, or it cannot be read.
    """
    with _directory(Path(path)) as directory:
        return _manifest(directory)


def _contents(tree: object) -> dict[str, list[memoryview]]:
    """Return the bytes of each file that holds ``tree``, in pieces."""
    tensors, state = flatten(tree)
    text = dump_json(state, budget=MEMORY + sum(each.nbytes for each in tensors.values()))
    return {TENSORS: pieces_of(tensors), STATE: [memoryview(text)]}


def _digest(pieces: Sequence[memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _write(path: Path, pieces: Sequence[memoryview]) -> tuple[int, str]:
    """Write a new file, read it back, compare it with ``pieces``, fsync it; return its size and SHA-256.

    What is hashed is what came back. So one pass of hashing both makes the record and shows that it is the file's, and
    no checkpoint gets its name, nor is an older one deleted for it, before it was read back.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("x+b") as file, ThreadPoolExecutor(1) as pool:
        for piece in pieces:
            file.write(piece)
        file.flush()
        synced = pool.submit(os.fsync, file.fileno())  # the disk works while this thread hashes
        file.seek(0)
        for piece in pieces:
            for start in range(0, len(piece), _CHUNK):
                expected = piece[start : start + _CHUNK]
                found = bytearray(len(expected))  # compared by memcmp, which memoryviews are not
                if file.readinto(found) != len(found) or found != expected:
                    raise CheckpointError(f"{path} does not read back as it was written: disk or memory is failing.")
                digest.update(found)
                size += len(found)
        synced.result()
    return size, digest.hexdigest()


def _render(files: Mapping[str, tuple[int, str]], info: Json, parent: str | None) -> bytes:
    """Return the one text that a manifest of this content has, so that any other text is a damaged one."""
    records: dict[str, Json] = {name: {"size": size, "sha256": digest} for name, (size, digest) in files.items()}
    body: dict[str, Json] = {
        "format": FORMAT,
        "schema": SCHEMA,
        "parent": parent,
        "info": info,
        "files": records,
    }
    text = _signed(body)
    if len(text) > MAX_MANIFEST:
        raise CheckpointError(
            f"The manifest would have {len(text)} bytes, more than {MAX_MANIFEST}: keep its info small."
        )
    return text


def _signed(body: Json) -> bytes:
    signed: dict[str, Json] = {"manifest": body, "sha256": hashlib.sha256(dump_json(body)).hexdigest()}
    return dump_json(signed, indent=1) + b"\n"


def _parse(text: bytes) -> Manifest:
    signed = load_json(text)
    body = signed.get("manifest") if isinstance(signed, dict) else None
    if not isinstance(body, dict) or _signed(body) != text:
        raise CheckpointError("The manifest does not fit its own hash.")
    schema, parent, files = body.get("schema"), body.get("parent"), body.get("files")
    if type(schema) is int and schema > SCHEMA:
        raise UnreadableError(
            f"The checkpoint has schema {schema}, this thawline reads up to {SCHEMA}. Update thawline."
        )
    if body.keys() != _FIELDS or (body["format"], type(schema), schema) != (FORMAT, int, SCHEMA):
        raise CheckpointError("The manifest is not one that thawline writes.")
    info = unflatten({}, body["info"])
    if not isinstance(files, dict) or files.keys() != {TENSORS, STATE} or not isinstance(info, dict):
        raise CheckpointError("The manifest is not one that thawline writes.")
    if parent is not None and not isinstance(parent, str):
        raise CheckpointError(f"The manifest names the parent {brief(parent)}.")
    return Manifest({name: _record(name, record) for name, record in files.items()}, info, parent)


def _record(name: str, record: Json) -> tuple[int, str]:
    if isinstance(record, dict) and record.keys() == {"size", "sha256"}:
        size, digest = record["size"], record["sha256"]
        if type(size) is int and size >= 0 and isinstance(digest, str) and _SHA256.fullmatch(digest):
            return size, digest
    raise CheckpointError(f"The manifest describes {name} as {brief(record)}.")


@contextlib.contextmanager
def _verified(path: Path) -> Generator[tuple[Manifest, dict[str, BufferedReader]]]:
    """Open the files of the checkpoint at ``path`` and check sizes and hashes; they stand at the beginning then."""
    with _directory(path) as directory, contextlib.ExitStack() as stack:
        manifest = _manifest(directory)
        opened: dict[str, BufferedReader] = {}
        for name, (size, _) in manifest.files.items():
            opened[name] = file = stack.enter_context(_open(directory, name))
            length = os.fstat(file.fileno()).st_size
            if length != size:
                raise CheckpointError(f"{name} has {length} bytes, the manifest says {size}.")
            if name == STATE and size > MAX_TEXT:
                raise CheckpointError(f"{name} has {length} bytes, more than {MAX_TEXT}.")
        for name, file in opened.items():
            if hashlib.file_digest(file, "sha256").hexdigest() != manifest.files[name][1]:
                raise CheckpointError(f"{name} does not have the SHA-256 that the manifest says: it is damaged.")
            file.seek(0)
        yield manifest, opened


def _manifest(directory: int) -> Manifest:
    with _open(directory, MANIFEST) as file:
        text = file.read(MAX_MANIFEST + 1)
    if len(text) > MAX_MANIFEST:
        raise CheckpointError(f"{MANIFEST} has more than {MAX_MANIFEST} bytes.")
    return _parse(text)


@contextlib.contextmanager
def _directory(path: Path) -> Generator[int]:
    """Open the directory at ``path``; what fails inside the block is raised with the path in front."""
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        yield descriptor
    except OSError as error:
        kind = CheckpointError if error.errno in _DAMAGE else UnreadableError
        raise kind(f"Cannot read the checkpoint {path}: {error}.") from error
    except CheckpointError as error:
        raise type(error)(f"The checkpoint {path} cannot be used: {error}") from error
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _open(directory: int, name: str) -> BufferedReader:
    """Open a regular file for reading. It is looked at before: opening a device can have effects of its own."""
    if not stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
        raise CheckpointError(f"{name} is not a regular file.")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.fdopen(os.open(name, flags, dir_fd=directory), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise CheckpointError(f"{name} is not a regular file.")
    return file


def sync_directory(directory: Path) -> None:
    """Make the names in ``directory`` survive a power cut: what was made, renamed or deleted in it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
