"""Logging: silent until the application asks, then as it chose."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import structlog
import torch

from thawline.engine.errors import ArgumentError
from thawline.engine.log import Log, configure_logging, get_logger, jsonable


@pytest.fixture(autouse=True)
def _silent_again() -> Iterator[None]:
    """Leave both logging systems as they were."""
    yield
    configure_logging(None)
    structlog.reset_defaults()


def run_script(text: str) -> subprocess.CompletedProcess[str]:
    """Run ``text`` in a fresh interpreter."""
    return subprocess.run([sys.executable, "-W", "error", "-c", text], capture_output=True, text=True, check=True)


def test_library_use_prints_nothing_and_attaches_nothing() -> None:
    """Without any configuration even an error is silent, and no handler was attached to any logger."""
    done = run_script(
        "import logging, sys\n"
        "from thawline.engine.log import get_logger\n"
        "log = get_logger('thawline.engine.trainer')\n"
        "for each in (log.debug, log.info, log.warning, log.error): each('event', loss=1.0)\n"
        "assert not logging.getLogger('thawline').handlers and not logging.root.handlers\n"
        "assert 'structlog' not in sys.modules and 'rich' not in sys.modules\n"
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_plain_handlers_of_the_application_get_a_legible_line(caplog: pytest.LogCaptureFixture) -> None:
    """An application that uses the standard library alone reads the event and its fields as text."""
    with caplog.at_level(logging.INFO, logger="thawline"):
        get_logger("thawline.engine.ledger").info("thawed", layers=["head"], lr=0.1)
    (record,) = caplog.records
    assert record.getMessage() == "thawed layers=['head'] lr=0.1"
    assert (record.name, record.levelname, record.filename) == ("thawline.engine.ledger", "INFO", "test_log.py")


def test_levels_of_the_application_are_respected(caplog: pytest.LogCaptureFixture) -> None:
    """What is below the level of the standard library's logger is not logged."""
    with caplog.at_level(logging.WARNING, logger="thawline"):
        get_logger().info("not this")
        get_logger().warning("but this")
    assert [record.getMessage() for record in caplog.records] == ["but this"]


def test_an_application_that_configured_structlog_gets_the_events_there() -> None:
    """Events go through the application's own processors, with their fields whole."""
    entries = structlog.testing.LogCapture()
    structlog.configure(processors=[entries])
    get_logger("thawline.engine.ledger").bind(owner="EMA").warning("thawed", layers=["head"])
    assert entries.entries == [{"owner": "EMA", "layers": ["head"], "event": "thawed", "log_level": "warning"}]


def test_an_application_with_structlogs_formatter_gets_the_fields_whole() -> None:
    """Structlog's ProcessorFormatter on any handler knows the records as its own."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=structlog.processors.JSONRenderer()))
    logger = logging.getLogger("thawline")
    logger.addHandler(handler)
    try:
        get_logger().warning("thawed", layers=["head"])
    finally:
        logger.removeHandler(handler)
    line = json.loads(out.getvalue())
    assert (line["event"], line["layers"]) == ("thawed", ["head"])


def test_json_is_one_strict_object_a_line() -> None:
    """Every line parses as strict JSON with event, level, logger, time and fields, NaN included."""
    out = io.StringIO()
    configure_logging("json", "debug", out)
    log = get_logger("thawline.engine.trainer").bind(run=1)
    log.debug("a", loss=float("nan"))
    log.error("b", path=Path("x"), tensor=torch.tensor(2))

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    first, second = [json.loads(line, parse_constant=refuse) for line in out.getvalue().splitlines()]
    assert first["timestamp"].endswith("Z")
    del first["timestamp"], second["timestamp"]
    logger = "thawline.engine.trainer"
    assert first == {"event": "a", "level": "debug", "logger": logger, "run": 1, "loss": "NaN"}
    assert second == {"event": "b", "level": "error", "logger": logger, "run": 1, "path": "x", "tensor": 2}


def test_console_lines_have_no_color_outside_a_terminal() -> None:
    """A file gets text without escape codes."""
    out = io.StringIO()
    configure_logging("console", stream=out)
    get_logger().info("thawed", layers=["head"])
    assert "thawed" in out.getvalue()
    assert "layers=['head']" in out.getvalue()
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize("layout", ["console", "json"])
def test_a_traceback_shows_no_local_variables(layout: str) -> None:
    """A traceback in the log names the exception, and never the values in its frames: one may be a key."""
    out = io.StringIO()
    configure_logging("json" if layout == "json" else "console", stream=out)

    def fail(key: str) -> None:
        raise RuntimeError(f"no server for a key of {len(key)} letters")

    try:
        fail("secret"[::-1])
    except RuntimeError:
        get_logger().exception("failed")
    assert "RuntimeError: no server for a key of 6 letters" in out.getvalue()
    assert "terces" not in out.getvalue()


def test_configuring_again_replaces_and_none_silences() -> None:
    """A second call leaves one handler, and None gives the logger back as it was."""
    first, second = io.StringIO(), io.StringIO()
    configure_logging("json", stream=first)
    configure_logging("json", stream=second)
    get_logger().info("once")
    logger = logging.getLogger("thawline")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1
    assert not logger.propagate
    configure_logging(None)
    assert (logger.handlers, logger.propagate, logger.level) == ([], True, logging.NOTSET)


def test_level_is_the_least_that_is_written() -> None:
    """Events below the level are dropped."""
    out = io.StringIO()
    configure_logging("console", "warning", out)
    get_logger().info("not this")
    get_logger().warning("this")
    assert "not this" not in out.getvalue()
    assert "this" in out.getvalue()


def test_names_are_put_under_thawline() -> None:
    """One switch rules all loggers, those of third-party algorithms as well."""
    assert get_logger("thawline.engine.x") == Log("thawline.engine.x")
    assert get_logger("thawlines").name == "thawline.thawlines"
    assert get_logger(None).name == get_logger("thawline").name == "thawline"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"format": "xml"}, "configure_logging\\(format=\\) takes 'console', 'json'.*got 'xml'. Write: "),
        ({"level": "loud"}, "configure_logging\\(level=\\) takes one of 'debug'.*got 'loud'. Write: "),
        ({"level": []}, "configure_logging\\(level=\\).*got \\[\\]. Write: "),
        ({"stream": "log.txt"}, "configure_logging\\(stream=\\) takes a text stream.*got 'log.txt'. Write: "),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    """Each wrong argument is a typed error with the corrected call, and changes nothing."""
    with pytest.raises(ArgumentError, match=message):
        configure_logging(**arguments)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert logging.getLogger("thawline").handlers == []


@pytest.mark.parametrize(
    "value, expected",
    [
        (float("inf"), "Infinity"),
        (-float("inf"), "-Infinity"),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array([1.0, 2.0]), "[1. 2.]"),
        (torch.tensor(0.25), 0.25),
        ({1: {"b", "a"}}, {"1": ["a", "b"]}),
        ((None, True, 2, "x"), [None, True, 2, "x"]),
        (Path("a") / "b", str(Path("a") / "b")),
    ],
)
def test_anything_becomes_strict_json(value: object, expected: object) -> None:
    """Whatever is logged becomes what strict JSON can hold."""
    result = jsonable(value)
    assert result == expected
    assert type(result) is type(expected)
    json.dumps(result, allow_nan=False)
