"""Who looks on in fits of the conformance kit: a terminal, a log of two kinds, and a tracker that fails."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import IO, Any

from attrs import define, field
from typing_extensions import override

from .log import ROOT, configure_logging, jsonable


class Terminal(io.StringIO):
    """A terminal that keeps what is written to it."""

    @override
    def isatty(self) -> bool:
        return True


@define(eq=False)
class FailingTracker:
    """Fails at every call, and counts them."""

    calls: int = field(default=0, init=False)

    def _fail(self, *_: Any, **__: Any) -> None:
        self.calls += 1
        raise OSError("of the kit's own making")

    log_config = log_metrics = log_artifact = close = _fail


_STYLES = ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")


@contextmanager
def standard_error(stream: IO[str]) -> Generator[io.StringIO]:
    """Let a stream be the standard error stream, of a terminal wide enough; yield what goes to standard output. Warnings go nowhere."""
    before = {name: os.environ.pop(name, None) for name in (*_STYLES, "TERM", "COLUMNS")}
    os.environ.update(TERM="xterm", COLUMNS="4000")
    try:
        with warnings.catch_warnings(record=True), redirect_stderr(stream), redirect_stdout(io.StringIO()) as printed:
            yield printed
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


@contextmanager
def _no_handlers() -> Generator[None]:
    """Take the handlers of the application away for a while."""
    logger = logging.getLogger(ROOT)
    before = logger.handlers[:], logger.propagate, logger.level
    logger.handlers[:] = []
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = before[:2]
        logger.setLevel(before[2])


@contextmanager
def json_log(stream: IO[str]) -> Generator[None]:
    """Configure the log as an application does that reads JSON, and once before otherwise."""
    with _no_handlers():
        configure_logging("console", stream=sys.stderr)
        configure_logging("json", "debug", stream)
        try:
            yield
        finally:
            configure_logging(None)


@contextmanager
def structured_log(events: list[dict[str, Any]]) -> Generator[None]:
    """Configure structlog as an application of its own would, and list what comes."""
    import structlog

    def note(_: Any, level: str, fields: Any) -> Any:
        events.append(dict(jsonable(fields)) | {"level": level})  # type: ignore[arg-type]  # a mapping
        raise structlog.DropEvent

    before = structlog.get_config() if structlog.is_configured() else None
    structlog.configure(processors=[note], cache_logger_on_first_use=False)
    try:
        with _no_handlers():
            yield
    finally:
        structlog.reset_defaults()
        if before is not None:
            structlog.configure(**before)
