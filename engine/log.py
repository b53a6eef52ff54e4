"""Logging: silent until the application asks for it."""

from __future__ import annotations

import json
import logging
import math
import sys
import warnings
from collections.abc import Generator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from contextvars import ContextVar
from typing import IO, TYPE_CHECKING, Literal, TypeAlias

from attrs import field, frozen
from typing_extensions import override

from .errors import ArgumentError, ThawlineWarning

if TYPE_CHECKING:
    from structlog.typing import Processor

    from .typing import Json

# structlog imports rich when it is imported, 75 ms together: it is loaded when there is something to render.

ROOT = "thawline"
Level: TypeAlias = Literal["debug", "info", "warning", "error"]
LEVELS: dict[Level, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

_least: ContextVar[int] = ContextVar("least", default=logging.NOTSET)


@contextmanager
def only_errors() -> Generator[None]:
    """Log nothing but errors inside, and warn of nothing: another process of the same fit says the rest."""
    token = _least.set(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ThawlineWarning)
            yield
    finally:
        _least.reset(token)


@frozen
class Log:
    """A logger of events with fields, made by :func:`get_logger`.

    An event goes, in this order, to the handler of :func:`configure_logging`; to structlog where the
    application has configured it; to the handlers of the standard library; or, where there is none of
    these, nowhere.

    Args:
        name: The name of the standard library's logger it writes to.
        fields: What is added to each event.

    Example:
        >>> log = get_logger("thawline.engine.ledger").bind(owner="LayerThaw")
        >>> log.info("thawed", layers=["head", "blocks[-1]"])  # silent: nobody configured logging
    """

    name: str
    fields: Mapping[str, object] = field(factory=dict)

    def bind(self, **fields: object) -> Log:
        """Return a logger that adds ``fields`` to each event."""
        return Log(self.name, {**self.fields, **fields})

    def debug(self, event: str, **fields: object) -> None:
        """Log what only somebody who looks for a fault wants to see."""
        self._emit("debug", event, fields)

    def info(self, event: str, **fields: object) -> None:
        """Log what happened as it should."""
        self._emit("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Log what the run survived, and somebody should look at."""
        self._emit("warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        """Log what the run did not survive."""
        self._emit("error", event, fields)

    def exception(self, event: str, **fields: object) -> None:
        """Log an error with the traceback of the exception that is being handled."""
        self._emit("error", event, {"exc_info": True, **fields})

    def _emit(self, level: Level, event: str, fields: Mapping[str, object]) -> None:
        if LEVELS[level] < _least.get():
            return
        merged = {**self.fields, **fields}
        structlog = sys.modules.get("structlog")
        if structlog is not None and structlog.is_configured() and not logging.getLogger(ROOT).handlers:
            getattr(structlog.get_logger(self.name), level)(event, **merged)
            return
        logger = logging.getLogger(self.name)
        # Without any handler the standard library prints warnings to stderr by itself. Asking first keeps the
        # library silent without a NullHandler, which would have to be attached by an import.
        if not logger.hasHandlers() or not logger.isEnabledFor(LEVELS[level]):
            return
        exc_info = merged.get("exc_info")
        if exc_info is True:
            merged["exc_info"] = exc_info = sys.exc_info()
        logger.log(
            LEVELS[level],
            _Event(merged, event=event),
            exc_info=exc_info if isinstance(exc_info, BaseException | tuple) else None,
            # By these two attributes structlog's ProcessorFormatter, ours or the application's, knows its own records.
            extra={"_logger": logger, "_name": level},
            stacklevel=3,
        )


class _Event(dict[str, object]):
    """An event's fields: a dict for structlog's formatter, a legible line for any other."""

    @override
    def __str__(self) -> str:
        rest = (f"{name}={value!r}" for name, value in self.items() if name not in ("event", "exc_info"))
        return " ".join([str(self["event"]), *rest])


def get_logger(name: str | None = None) -> Log:
    """Return a logger under ``thawline``, silent until the application configures logging.

    Args:
        name: Usually ``__name__``. A name outside ``thawline`` is put under it, so that one switch rules all.

    Example:
        >>> get_logger("thawline.engine.trainer").name, get_logger("my_algorithms").name, get_logger().name
        ('thawline.engine.trainer', 'thawline.my_algorithms', 'thawline')
    """
    if not name or name == ROOT:
        return Log(ROOT)
    return Log(name if name.startswith(f"{ROOT}.") else f"{ROOT}.{name}")


def configure_logging(
    format: Literal["console", "json"] | None = "console",  # noqa: A002 - its name in logging, too
    level: Level = "info",
    stream: IO[str] | None = None,
) -> None:
    """Write thawline's log to ``stream``. For applications; nothing in thawline calls it.

    Only the logger ``thawline`` is touched, and its records no longer reach the root logger, so that no line
    appears twice. A second call replaces the first.

    Args:
        format: ``"console"`` for people, ``"json"`` for one JSON object a line, None to be silent again.
        level: The least severe level that is written.
        stream: Where to; None is the standard error stream.

    Raises:
        ArgumentError: An unknown format or level, or a stream without ``write``.

    Example:
        >>> import io, json
        >>> out = io.StringIO()
        >>> configure_logging("json", stream=out)
        >>> get_logger("thawline.engine.ledger").info("thawed", layers=["head"])
        >>> line = json.loads(out.getvalue())
        >>> line["event"], line["level"], line["logger"], line["layers"]
        ('thawed', 'info', 'thawline.engine.ledger', ['head'])
        >>> configure_logging(None)
    """
    if format not in ("console", "json", None):
        takes = "'console', 'json', or None to be silent"
        raise ArgumentError("configure_logging(format=)", got=format, takes=takes, example="configure_logging('json')")
    if not isinstance(level, str) or level not in LEVELS:
        takes, example = f"one of {', '.join(map(repr, LEVELS))}", "configure_logging(level='info')"
        raise ArgumentError("configure_logging(level=)", got=level, takes=takes, example=example)
    if stream is not None and not hasattr(stream, "write"):
        takes, example = "a text stream, or None for the standard error stream", "configure_logging(stream=sys.stdout)"
        raise ArgumentError("configure_logging(stream=)", got=stream, takes=takes, example=example)
    logger = logging.getLogger(ROOT)
    for old in [each for each in logger.handlers if isinstance(each, _Handler)]:
        logger.removeHandler(old)
    logger.propagate = format is None
    logger.setLevel(logging.NOTSET if format is None else LEVELS[level])
    if format is not None:
        handler = _Handler(stream or sys.stderr)
        handler.setFormatter(_formatter(format, colors=_is_terminal(handler.stream)))
        logger.addHandler(handler)


class _Handler(logging.StreamHandler[IO[str]]):
    """The handler of configure_logging, known by its type when it is replaced."""


def _formatter(layout: Literal["console", "json"], *, colors: bool) -> logging.Formatter:
    import structlog

    render: list[Processor]
    if layout == "json":
        render = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_dumps)]
    else:
        # structlog's own choice shows the local variables of each frame, which may hold a key.
        plain = structlog.dev.plain_traceback
        render = [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain)]
    return structlog.stdlib.ProcessorFormatter(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            *render,
        ]
    )


def _dumps(fields: object, **_: object) -> str:
    return json.dumps(jsonable(fields), allow_nan=False)


def _is_terminal(stream: object) -> bool:
    try:
        return bool(stream.isatty())  # type: ignore[attr-defined]  # any object with write serves as a stream
    except (AttributeError, ValueError):  # no such method, or a closed file
        return False


def jsonable(value: object) -> Json:
    """Return ``value`` as strict JSON can hold it, whatever it is.

    JSON has no NaN and no infinity: they become the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which
    ``float()`` in Python and ``Number()`` in JavaScript read back. Numbers of NumPy and one-element tensors become
    plain numbers, tuples and sets lists, keys text, and anything else its ``str``.

    Example:
        >>> jsonable({"loss": float("nan"), "betas": (0.9, 0.999), "path": __import__("pathlib").PurePosixPath("a/b")})
        {'loss': 'NaN', 'betas': [0.9, 0.999], 'path': 'a/b'}
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return _finite(float(value))
    if isinstance(value, Mapping):
        return {str(key): jsonable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(each) for each in value]
    if isinstance(value, AbstractSet):
        return sorted((jsonable(each) for each in value), key=repr)
    return _of_foreign(value)


def _finite(number: float) -> float | str:
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _of_foreign(value: object) -> Json:
    item = getattr(value, "item", None)  # numbers of NumPy, tensors of one element
    if callable(item):
        try:
            number = item()
        except (RuntimeError, TypeError, ValueError):
            return str(value)
        if isinstance(number, bool | int | float):
            return jsonable(number)
    return str(value)
