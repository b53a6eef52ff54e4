"""Trackers: where a run's configuration, metrics and files are recorded."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol, runtime_checkable

from attrs import define, field

from .comet import CometTracker
from .errors import ArgumentError, warn
from .log import get_logger, jsonable

if TYPE_CHECKING:
    from .typing import Json

__all__ = ["CometTracker", "JsonlTracker", "MemoryTracker", "Tracker", "Trackers"]

log = get_logger(__name__)


@runtime_checkable
class Tracker(Protocol):
    """Whatever records a run. The Trainer calls it on the first rank only, and survives its failures.

    Example:
        >>> class Printer:
        ...     def log_config(self, config): pass
        ...     def log_metrics(self, metrics, *, step): print(step, metrics)
        ...     def log_artifact(self, path, *, name=None): pass
        ...     def close(self): pass
        >>> isinstance(Printer(), Tracker)
        True
    """

    def log_config(self, config: Mapping[str, Json]) -> None:
        """Record what the run was asked to do: the recipe as JSON."""

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Record numbers measured after ``step`` batches."""

    def log_artifact(self, path: Path, *, name: str | None = None) -> None:
        """Record a file or folder, under its own name or another."""

    def close(self) -> None:
        """Write what is not yet written. Called once a fit, also after a failed one."""


@define(eq=False)
class MemoryTracker:
    """Keeps everything in lists: for tests and notebooks.

    Example:
        >>> tracker = MemoryTracker()
        >>> tracker.log_metrics({"loss": 0.5}, step=10)
        >>> tracker.metrics
        [(10, {'loss': 0.5})]
    """

    config: dict[str, Json] = field(factory=dict, init=False)
    metrics: list[tuple[int, dict[str, float]]] = field(factory=list, init=False)
    artifacts: list[tuple[Path, str | None]] = field(factory=list, init=False)
    closed: bool = field(default=False, init=False)

    def log_config(self, config: Mapping[str, Json]) -> None:
        """Keep the configuration in ``config``."""
        self.config = dict(config)

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Append ``(step, metrics)`` to ``metrics``."""
        self.metrics.append((step, dict(metrics)))

    def log_artifact(self, path: Path, *, name: str | None = None) -> None:
        """Append ``(path, name)`` to ``artifacts``."""
        self.artifacts.append((path, name))

    def close(self) -> None:
        """Set ``closed``."""
        self.closed = True


def _path(path: str | os.PathLike[str]) -> Path:
    if isinstance(path, str | os.PathLike) and os.fspath(path):
        return Path(path)
    raise ArgumentError("JsonlTracker(path=)", got=path, takes="a path", example="JsonlTracker('runs/first')")


_FIXED_KEYS = frozenset({"step", "time", "artifact", "name"})


@define(eq=False)
class JsonlTracker:
    """Writes ``run.json`` and ``metrics.jsonl`` in a folder: the local truth about a run.

    Each line of ``metrics.jsonl`` is one strict JSON object: ``step``, ``time`` (seconds since 1970) and the
    metrics by name, or ``artifact`` and ``name`` for a file. NaN and infinity are the strings ``"NaN"``,
    ``"Infinity"`` and ``"-Infinity"``; a metric named like one of the four fixed keys gets ``metric/`` before its
    name. A line is with the operating system when the call returns, so a killed process loses none; a line that
    was torn by a full disk or a power cut is cut off when the file is opened again.

    Args:
        path: The folder, or a file in it that ends in ``.jsonl`` to be used instead of ``metrics.jsonl``.

    Raises:
        ArgumentError: ``path`` is not a path.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tracker = JsonlTracker(folder)
        ...     tracker.log_metrics({"loss": float("nan")}, step=10)
        ...     tracker.close()
        ...     line = json.loads(tracker.metrics_file.read_text())
        >>> line["step"], line["loss"], float(line["loss"])
        (10, 'NaN', nan)
    """

    path: Path = field(converter=_path)
    _stream: IO[bytes] | None = field(default=None, init=False, repr=False)
    _step: int = field(default=0, init=False, repr=False)

    @property
    def folder(self) -> Path:
        """The folder that holds both files."""
        return self.path.parent if self.path.suffix == ".jsonl" else self.path

    @property
    def metrics_file(self) -> Path:
        """The file with one JSON object a line."""
        return self.path if self.path.suffix == ".jsonl" else self.path / "metrics.jsonl"

    def log_config(self, config: Mapping[str, Json]) -> None:
        """Replace ``run.json`` in one move: readers see the old file or the new one."""
        text = json.dumps(jsonable(config), allow_nan=False, indent=2)
        _replace(self.folder / "run.json", [f"{text}\n".encode()])

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Append one line."""
        self._step = step
        self._append({f"metric/{name}" if name in _FIXED_KEYS else name: value for name, value in metrics.items()})

    def log_artifact(self, path: Path, *, name: str | None = None) -> None:
        """Append a line that says where the file lies: relative to the folder where it is inside."""
        place, folder = Path(path).absolute(), self.folder.absolute()
        inside = place.is_relative_to(folder)
        self._append(
            {"artifact": (place.relative_to(folder) if inside else place).as_posix(), "name": name or place.name}
        )

    def truncate_after(self, step: int) -> None:
        """Drop the lines past ``step``: for a resumed run, whose crashed self got further than its checkpoint.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     tracker = JsonlTracker(folder)
            ...     for step in (10, 20, 30):
            ...         tracker.log_metrics({"loss": 1 / step}, step=step)
            ...     tracker.truncate_after(20)
            ...     [json.loads(line)["step"] for line in tracker.metrics_file.read_text().splitlines()]
            [10, 20]
        """
        self.close()
        self._step = step
        if not self.metrics_file.exists():
            return
        with self.metrics_file.open("rb") as lines:
            _replace(self.metrics_file, (line for line in lines if _logged_by(line, step)))

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def _append(self, fields: Mapping[str, object]) -> None:
        line = {"step": self._step, "time": round(time.time(), 3), **fields}
        data = f"{json.dumps(jsonable(line), allow_nan=False)}\n".encode()
        if self._stream is None:
            self._stream = _open_whole(self.metrics_file)
        try:
            # Unbuffered: one system call a line, and nothing is kept back that a full disk would fail on again later.
            written = self._stream.write(data)
        except OSError:
            self.close()
            raise
        if written != len(data):
            self.close()  # opening it again cuts the torn line off
            raise OSError(f"{self.metrics_file}: {written} of {len(data)} bytes written; is the disk full?")


def _logged_by(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):  # not JSON, or not a line of ours
        return False


def _open_whole(path: Path) -> IO[bytes]:
    """Open ``path`` for appending, without the torn line it may end in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = path.open("ab+", buffering=0)
    end = size = stream.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65536)
        stream.seek(start)
        newline = stream.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        stream.truncate(end)
    return stream


def _replace(path: Path, chunks: Iterable[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.writelines(chunks)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _trackers(trackers: Iterable[Tracker]) -> tuple[Tracker, ...]:
    found = tuple(trackers) if isinstance(trackers, Iterable) else (trackers,)
    for each in found:
        if isinstance(each, type) or not isinstance(each, Tracker):
            takes = "trackers: objects with log_config, log_metrics, log_artifact and close"
            raise ArgumentError("trackers=", got=each, takes=takes, example="trackers=[MemoryTracker()]")
    return found


@define(eq=False)
class Trackers:
    """Several trackers as one that never fails: what one of them raises is said once, and the run goes on.

    Only ``Exception`` is survived: KeyboardInterrupt and SystemExit pass through. Each ``close`` runs in a thread
    of its own and is left behind after ``close_timeout``, since a tracker may wait for a server that is gone.

    Args:
        trackers: The trackers, called in this order.
        run_dir: The run's folder, told to those that ask for it (``use_run_dir``).
        close_timeout: Seconds that each may take to close.

    Raises:
        ArgumentError: Something in ``trackers`` is no :class:`Tracker`, or the timeout is not above 0.

    Warns:
        ThawlineWarning: At the first failure of each tracker.

    Example:
        >>> import warnings
        >>> class Broken(MemoryTracker):
        ...     def log_metrics(self, metrics, *, step):
        ...         raise ConnectionError("server is gone")
        >>> trackers = Trackers([Broken(), memory := MemoryTracker()])
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     trackers.log_metrics({"loss": 0.5}, step=1)
        >>> memory.metrics, len(caught)
        ([(1, {'loss': 0.5})], 1)
    """

    trackers: tuple[Tracker, ...] = field(default=(), converter=_trackers)
    run_dir: Path | None = field(default=None, kw_only=True)
    close_timeout: float = field(default=60.0, kw_only=True)
    _failures: dict[int, int] = field(factory=dict, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        seconds = self.close_timeout
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
            takes, example = "seconds above 0", "Trackers(trackers, close_timeout=60)"
            raise ArgumentError("Trackers(close_timeout=)", got=seconds, takes=takes, example=example)
        if self.run_dir is not None:
            for use_run_dir in [getattr(tracker, "use_run_dir", None) for tracker in self.trackers]:
                if use_run_dir is not None:
                    use_run_dir(self.run_dir)

    def log_config(self, config: Mapping[str, Json]) -> None:
        """Record the configuration in each tracker."""
        self._each("log_config", lambda tracker: tracker.log_config(dict(config)))

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Record numbers in each tracker; each gets a copy of its own."""
        if self.trackers:
            self._each("log_metrics", lambda tracker: tracker.log_metrics(dict(metrics), step=step))

    def log_artifact(self, path: Path, *, name: str | None = None) -> None:
        """Record a file in each tracker."""
        self._each("log_artifact", lambda tracker: tracker.log_artifact(path, name=name))

    def close(self) -> None:
        """Close each tracker, waiting at most ``close_timeout`` for each."""
        self._each("close", lambda tracker: _within(tracker.close, self.close_timeout))
        for tracker in self.trackers:
            failures = self._failures.pop(id(tracker), 0)
            if failures > 1:
                log.warning("tracker failed repeatedly", tracker=type(tracker).__name__, failures=failures)

    def _each(self, method: str, call: Callable[[Tracker], None]) -> None:
        for tracker in self.trackers:
            try:
                call(tracker)
            except Exception as error:  # noqa: BLE001 - whatever a tracker raises, the run goes on
                failures = self._failures[id(tracker)] = self._failures.get(id(tracker), 0) + 1
                if failures == 1:
                    text = f"{type(error).__name__}: {error}"
                    name = type(tracker).__name__
                    log.warning("tracker failed; the run goes on", tracker=name, call=method, error=text)
                    warn(f"the tracker {name} failed in {method}, and the run goes on without what it misses: {text}")


def _within(call: Callable[[], None], seconds: float) -> None:
    """Run ``call`` in a thread; raise what it raised, or TimeoutError once ``seconds`` have passed."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            raised.append(error)

    thread = threading.Thread(target=run, name="thawline-close", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"not closed after {seconds:g} s")
    if raised:
        raise raised[0]
