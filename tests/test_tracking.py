"""Trackers: what is recorded, and that no failure of theirs stops a run."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field, frozen
from typing_extensions import override

from thawline.engine.errors import ArgumentError, MissingExtraError, ThawlineWarning
from thawline.engine.tracking import CometTracker, JsonlTracker, MemoryTracker, Tracker, Trackers

KEY = "dummyKEY0123456789abcdefghijklmnop"


def lines_of(tracker: JsonlTracker) -> list[dict[str, Any]]:
    """Read the lines back as strict JSON."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in tracker.metrics_file.read_text().splitlines()]


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what thawline warned of."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


class TestMemoryTracker:
    """The test double that ships."""

    def test_keeps_everything(self) -> None:
        """Config, metrics, artifacts and the close are there to be looked at."""
        tracker = MemoryTracker()
        metrics = {"loss": 0.5}
        tracker.log_config({"lr": 0.1})
        tracker.log_metrics(metrics, step=3)
        metrics["loss"] = 9.0
        tracker.log_artifact(Path("a.png"), name="picture")
        assert not tracker.closed
        tracker.close()
        assert tracker.config == {"lr": 0.1}
        assert tracker.metrics == [(3, {"loss": 0.5})]
        assert tracker.artifacts == [(Path("a.png"), "picture")]
        assert tracker.closed


@pytest.mark.parametrize("make", [lambda _: MemoryTracker(), JsonlTracker, lambda _: CometTracker(), Trackers])
def test_what_ships_fulfils_the_protocol(make: Any, tmp_path: Path) -> None:
    """Each class is a Tracker, Trackers included."""
    assert isinstance(make([] if make is Trackers else tmp_path), Tracker)


class TestJsonlTracker:
    """The local truth."""

    def test_writes_one_json_object_a_line(self, tmp_path: Path) -> None:
        """Step, time and the metrics, readable before the tracker is closed."""
        tracker = JsonlTracker(tmp_path / "new" / "run")
        tracker.log_metrics({"loss": 0.5, "lr": 1e-3}, step=1)
        tracker.log_metrics({"loss": 0.25}, step=2)
        first, second = lines_of(tracker)
        assert first["time"] <= second["time"]
        del first["time"], second["time"]
        assert (first, second) == ({"step": 1, "loss": 0.5, "lr": 1e-3}, {"step": 2, "loss": 0.25})
        tracker.close()

    def test_numbers_survive_exactly(self, tmp_path: Path) -> None:
        """Every finite float reads back as the same bits, every other as the same kind."""
        tracker = JsonlTracker(tmp_path)
        values = {"a": 0.1 + 0.2, "b": 5e-324, "c": math.nan, "d": math.inf, "e": -math.inf}
        tracker.log_metrics(values, step=1)
        tracker.close()
        (line,) = lines_of(tracker)
        assert {name: line[name] for name in "ab"} == {name: values[name] for name in "ab"}
        assert [line[name] for name in "cde"] == ["NaN", "Infinity", "-Infinity"]
        assert math.isnan(float(line["c"]))
        assert (float(line["d"]), float(line["e"])) == (math.inf, -math.inf)

    def test_a_metric_cannot_hide_the_step(self, tmp_path: Path) -> None:
        """Metrics with the names of fixed keys are told apart."""
        tracker = JsonlTracker(tmp_path)
        tracker.log_metrics({"step": 7.0, "time": 8.0, "name": 9.0}, step=1)
        tracker.close()
        (line,) = lines_of(tracker)
        assert line["step"] == 1
        assert (line["metric/step"], line["metric/time"], line["metric/name"]) == (7.0, 8.0, 9.0)

    def test_artifacts_are_lines_with_a_path(self, tmp_path: Path) -> None:
        """A path inside the folder is relative, so that the folder may move; another is absolute."""
        tracker = JsonlTracker(tmp_path / "run")
        tracker.log_metrics({}, step=4)
        tracker.log_artifact(tmp_path / "run" / "best" / "model.safetensors")
        tracker.log_artifact(tmp_path / "elsewhere.png", name="picture")
        tracker.close()
        _, inside, outside = lines_of(tracker)
        assert (inside["step"], inside["artifact"], inside["name"]) == (
            4,
            "best/model.safetensors",
            "model.safetensors",
        )
        assert (outside["artifact"], outside["name"]) == ((tmp_path / "elsewhere.png").as_posix(), "picture")

    def test_config_is_written_whole_and_replaced(self, tmp_path: Path) -> None:
        """run.json is strict JSON, replaced by the next call, with no temporary file left."""
        tracker = JsonlTracker(tmp_path)
        tracker.log_config({"lr": 0.1, "stop": None})
        tracker.log_config({"lr": math.nan, "algorithms": [{"name": "EMA"}]})
        assert json.loads((tmp_path / "run.json").read_text()) == {"lr": "NaN", "algorithms": [{"name": "EMA"}]}
        assert [path.name for path in tmp_path.iterdir()] == ["run.json"]

    def test_a_config_that_cannot_be_written_leaves_the_old_one(self, tmp_path: Path) -> None:
        """A failure while writing leaves neither half a file nor a temporary one."""
        (tmp_path / "run.json").mkdir()
        with pytest.raises(OSError, match=r"run\.json"):
            JsonlTracker(tmp_path).log_config({"lr": 0.1})
        assert [path.name for path in tmp_path.iterdir()] == ["run.json"]

    def test_a_file_can_be_named(self, tmp_path: Path) -> None:
        """A path that ends in .jsonl is the file; run.json lies beside it."""
        tracker = JsonlTracker(tmp_path / "other.jsonl")
        tracker.log_config({})
        tracker.log_metrics({"loss": 1.0}, step=1)
        tracker.close()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["other.jsonl", "run.json"]

    def test_an_existing_file_is_continued(self, tmp_path: Path) -> None:
        """A second tracker appends, and a closed one opens again."""
        first, tracker = JsonlTracker(tmp_path), JsonlTracker(tmp_path)
        first.log_metrics({}, step=1)
        first.close()
        tracker.log_metrics({}, step=2)
        tracker.close()
        tracker.log_metrics({}, step=3)
        tracker.close()
        tracker.close()
        assert [line["step"] for line in lines_of(tracker)] == [1, 2, 3]

    @pytest.mark.parametrize("torn", ['{"step": 2, "lo', "x" * 200_000])
    def test_a_torn_last_line_is_cut_off(self, tmp_path: Path, torn: str) -> None:
        """A line that a crash left unfinished does not damage the next one, however long it is."""
        whole = '{"step": 1, "time": 0.0, "loss": 1.0}\n'
        (tmp_path / "metrics.jsonl").write_text(whole + torn)
        tracker = JsonlTracker(tmp_path)
        tracker.log_metrics({}, step=2)
        tracker.close()
        assert [line["step"] for line in lines_of(tracker)] == [1, 2]

    def test_a_file_of_one_torn_line_starts_anew(self, tmp_path: Path) -> None:
        """Where no line is whole nothing is kept."""
        (tmp_path / "metrics.jsonl").write_text('{"st')
        tracker = JsonlTracker(tmp_path)
        tracker.log_metrics({}, step=1)
        tracker.close()
        assert [line["step"] for line in lines_of(tracker)] == [1]

    def test_truncate_after_drops_what_a_resumed_run_repeats(self, tmp_path: Path) -> None:
        """Lines past the step and a torn last line go; those before stay as they were, byte by byte."""
        tracker = JsonlTracker(tmp_path)
        for step in (10, 20, 30):
            tracker.log_metrics({"loss": 1 / step}, step=step)
        tracker.log_artifact(tmp_path / "at-30.png")
        kept = b"".join(tracker.metrics_file.read_bytes().splitlines(keepends=True)[:2])
        with tracker.metrics_file.open("ab") as stream:
            stream.write(b'{"step": 15, "loss"')
        tracker.truncate_after(20)
        assert tracker.metrics_file.read_bytes() == kept
        tracker.log_artifact(tmp_path / "at-20.png")
        tracker.log_metrics({}, step=30)
        tracker.close()
        assert [line["step"] for line in lines_of(tracker)] == [10, 20, 20, 30]

    def test_truncate_after_without_a_file_does_nothing(self, tmp_path: Path) -> None:
        """A run that logged nothing yet resumes like any other."""
        JsonlTracker(tmp_path).truncate_after(5)
        assert list(tmp_path.iterdir()) == []

    def test_truncate_after_drops_damaged_lines(self, tmp_path: Path) -> None:
        """What is no line of ours does not come back in the file of a resumed run."""
        good = '{"step": 1, "time": 0.0}\n'
        (tmp_path / "metrics.jsonl").write_text(good + "\x00\x00\n[1]\n{}\n" + '{"step": "x"}\n' + good)
        JsonlTracker(tmp_path).truncate_after(1)
        assert (tmp_path / "metrics.jsonl").read_text() == good + good

    def test_lines_survive_a_killed_process(self, tmp_path: Path) -> None:
        """What was logged before a SIGKILL is in the file."""
        script = (
            "import os, signal\n"
            "from thawline.engine.tracking import JsonlTracker\n"
            f"tracker = JsonlTracker({str(tmp_path)!r})\n"
            "for step in range(5): tracker.log_metrics({'loss': 1.0}, step=step)\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        done = subprocess.run([sys.executable, "-c", script], check=False)
        assert done.returncode == -9
        assert [line["step"] for line in lines_of(JsonlTracker(tmp_path))] == [0, 1, 2, 3, 4]

    def test_a_full_disk_loses_only_what_did_not_fit(self, tmp_path: Path) -> None:
        """A line that does not fit raises, and the next that fits is whole: nothing torn stays in the file."""
        script = (
            "import resource\n"
            "from thawline.engine.tracking import JsonlTracker, Trackers\n"
            f"tracker = JsonlTracker({str(tmp_path)!r})\n"
            "tracker.log_metrics({'loss': 1.0}, step=1)\n"
            "size, hard = tracker.metrics_file.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))\n"
            "for step in (2, 3):\n"
            "    try: tracker.log_metrics({'loss': 1.0}, step=step)\n"
            "    except OSError as error: print(type(error).__name__)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))\n"
            "tracker.log_metrics({'loss': 1.0}, step=4)\n"
        )
        done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
        assert done.stdout.split() == ["OSError", "OSError"]
        assert [line["step"] for line in lines_of(JsonlTracker(tmp_path))] == [1, 4]

    @pytest.mark.parametrize("path", [None, 3, ""])
    def test_what_is_no_path_is_refused(self, path: Any) -> None:
        """The error says what to write instead."""
        with pytest.raises(ArgumentError, match=r"JsonlTracker\(path=\) takes a path, got .* Write: JsonlTracker\("):
            JsonlTracker(path)


@define
class Failing(MemoryTracker):
    """Raises in every method."""

    error: BaseException = field(factory=lambda: ConnectionError("server is gone"))

    @override
    def log_config(self, config: Mapping[str, Any]) -> None:
        raise self.error

    @override
    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        raise self.error

    @override
    def log_artifact(self, path: Path, *, name: str | None = None) -> None:
        raise self.error

    @override
    def close(self) -> None:
        raise self.error


@define
class Hanging(MemoryTracker):
    """Waits in close for a server that is gone."""

    server: threading.Event

    @override
    def close(self) -> None:
        self.server.wait()


@define
class Greedy(MemoryTracker):
    """Changes what it is given."""

    @override
    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        assert isinstance(metrics, dict)
        metrics.clear()


class TestTrackers:
    """Several trackers as one that never fails."""

    def test_each_tracker_gets_every_call(self, tmp_path: Path) -> None:
        """All four methods reach all trackers, in order."""
        both = MemoryTracker(), MemoryTracker()
        trackers = Trackers(both)
        trackers.log_config({"lr": 0.1})
        trackers.log_metrics({"loss": 1.0}, step=2)
        trackers.log_artifact(tmp_path, name="run")
        trackers.close()
        for each in both:
            assert each.config == {"lr": 0.1}
            assert each.metrics == [(2, {"loss": 1.0})]
            assert each.artifacts == [(tmp_path, "run")]
            assert each.closed

    def test_a_failing_tracker_is_named_once_and_stops_nobody(self, caplog: pytest.LogCaptureFixture) -> None:
        """Whatever it raises, the others go on; one warning names it, another says at the end how often."""
        memory = MemoryTracker()
        trackers = Trackers([Failing(), memory])
        with pytest.warns(
            ThawlineWarning, match="the tracker Failing failed in log_config, .*: server is gone"
        ) as said:
            trackers.log_config({})
        assert [each.filename for each in said] == [__file__]
        for step in range(3):
            trackers.log_metrics({"loss": 1.0}, step=step)
        trackers.log_artifact(Path("x"))
        assert len(logged(caplog)) == 1
        trackers.close()
        first, last = logged(caplog)
        assert "tracker='Failing' call='log_config' error='ConnectionError: server is gone'" in first
        assert "tracker='Failing' failures=6" in last
        assert len(memory.metrics) == 3
        assert memory.closed

    def test_one_that_hangs_is_left_behind(self, caplog: pytest.LogCaptureFixture) -> None:
        """A close that never returns is given up, reported, and keeps no other from being closed."""
        server, memory = threading.Event(), MemoryTracker()
        trackers = Trackers([Hanging(server), memory], close_timeout=0.01)
        try:
            with pytest.warns(ThawlineWarning, match="Hanging failed in close"):
                trackers.close()
        finally:
            server.set()
        assert memory.closed
        (message,) = logged(caplog)
        assert "tracker='Hanging' call='close' error='TimeoutError: not closed after 0.01 s'" in message

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
    def test_the_users_interrupt_passes_through(self, error: BaseException) -> None:
        """Ctrl-C in a tracker is still a Ctrl-C, in close as well, where another thread got it."""
        trackers = Trackers([Failing(error)])
        with pytest.raises(type(error)):
            trackers.log_metrics({}, step=1)
        with pytest.raises(type(error)):
            trackers.close()

    def test_trackers_cannot_spoil_each_others_metrics(self) -> None:
        """Each gets a copy of its own, and the caller's dict stays as it was."""
        memory, metrics = MemoryTracker(), {"loss": 1.0}
        Trackers([Greedy(), memory]).log_metrics(metrics, step=1)
        assert memory.metrics == [(1, {"loss": 1.0})]
        assert metrics == {"loss": 1.0}

    def test_two_of_a_kind_are_counted_apart(self, caplog: pytest.LogCaptureFixture) -> None:
        """Failures belong to an instance, not to a class."""
        with pytest.warns(ThawlineWarning, match="Failing") as said:
            Trackers([Failing(), Failing()]).log_config({})
        assert len(said) == 2
        assert len(logged(caplog)) == 2

    @pytest.mark.parametrize("trackers", [[MemoryTracker], ["comet"], 3, [None]])
    def test_what_is_no_tracker_is_refused(self, trackers: Any) -> None:
        """A class, a name, a number or None is a typed error with the corrected call."""
        with pytest.raises(ArgumentError, match=r"trackers= takes trackers: .* Write: trackers=\[MemoryTracker\(\)\]"):
            Trackers(trackers)

    @pytest.mark.parametrize("seconds", [0, -1, math.nan, "60", True])
    def test_a_timeout_is_above_zero(self, seconds: Any) -> None:
        """Any other is a typed error."""
        with pytest.raises(ArgumentError, match=r"Trackers\(close_timeout=\) takes seconds above 0, got .* Write: "):
            Trackers((), close_timeout=seconds)


@frozen
class CometRun:
    """What a script with a CometTracker left behind."""

    folder: Path
    stdout: str
    stderr: str

    @property
    def archive(self) -> Path:
        """The one archive."""
        (path,) = self.folder.rglob("*.zip")
        return path

    def messages(self, kind: str) -> list[dict[str, Any]]:
        """Return the payloads of one type in the archive."""
        with zipfile.ZipFile(self.archive) as archive:
            entries = [json.loads(line) for line in archive.read("messages.json").splitlines()]
        return [entry["payload"] for entry in entries if entry["type"] == kind]

    def asset(self, name: str) -> bytes:
        """Return the content of an asset in the archive."""
        (upload,) = [each for each in self.messages("file_upload") if each["additional_params"]["fileName"] == name]
        with zipfile.ZipFile(self.archive) as archive:
            return archive.read(upload["file_path"])

    def everything(self) -> bytes:
        """Return all that was written: output, names and every file of the archive."""
        with zipfile.ZipFile(self.archive) as archive:
            files = [archive.read(name) for name in archive.namelist()]
            return b"\n".join(
                [*files, *map(str.encode, archive.namelist()), self.stdout.encode(), self.stderr.encode()]
            )


SCRIPT = """
import os, sys, threading, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "Comet failed")  # as it does, of the missing file
from pathlib import Path
from thawline.engine.log import configure_logging
from thawline.engine.tracking import CometTracker, Trackers
if LOGGING:
    configure_logging("console", "info")
before, hook = dict(os.environ), sys.excepthook
tracker = CometTracker(**ARGUMENTS)
trackers = Trackers([tracker], run_dir=Path("run"))
assert "comet_ml" not in sys.modules
Path("picture.png").write_bytes(b"png")
Path("best").mkdir()
Path("best", "model.bin").write_bytes(b"weights")
trackers.log_config({"lr": 0.1, "algorithms": [{"name": "EMA", "half_life": "0.1dur"}], "optimizer": {"eps": 1e-8}})
for step in (10, 20):
    trackers.log_metrics({"loss": 1 / step, "bad": float("nan")}, step=step)
trackers.log_artifact(Path("picture.png"), name="timeline")
trackers.log_artifact(Path("best"))
trackers.log_artifact(Path("missing"))
trackers.log_metrics({"loss": 0.5}, step=30)
os.environ["SHOWN"] = repr(tracker)
del os.environ["SHOWN"]
trackers.close()
assert dict(os.environ) == before and sys.excepthook is hook
assert threading.enumerate() == [threading.main_thread()]
assert tracker.archive is None or tracker.archive.exists()
"""


def run_comet(folder: Path, *, show_log: bool = True, environment: Mapping[str, str], **arguments: object) -> CometRun:
    """Run the script in ``folder`` in a fresh interpreter."""
    head = f"LOGGING, ARGUMENTS = {show_log}, {arguments!r}\n"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("COMET")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", head + SCRIPT],
        cwd=folder,
        # A home of its own: whoever runs the tests may have a key in theirs.
        env={**inherited, "HOME": str(folder), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return CometRun(folder, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> CometRun:
    """Return a run that was forced offline although a key is configured."""
    folder = tmp_path_factory.mktemp("offline")
    arguments: dict[str, Any] = {"project": "reviews", "name": "first", "tags": ["lora"], "online": False}
    return run_comet(folder, environment={"COMET_API_KEY": KEY}, **arguments)


class TestCometTracker:
    """Comet, on real offline archives that are opened and read back."""

    def test_the_archive_lies_in_the_run_directory(self, offline: CometRun) -> None:
        """Where no directory was given it is ``comet`` in the run's folder, and the log says how to upload it."""
        assert offline.archive.parent == offline.folder / "run" / "comet"
        assert f"comet upload run/comet/{offline.archive.name}" in offline.stderr

    def test_the_archive_holds_the_parameters(self, offline: CometRun) -> None:
        """The configuration is there as flat parameters and whole as run.json."""
        payloads = offline.messages("parameter_msg")
        found = [each.get("param") or each["params"] for each in payloads]
        parameters = {each["paramName"]: each["paramValue"] for each in found if each["source"] == "manual"}
        algorithms = [{"name": "EMA", "half_life": "0.1dur"}]
        assert parameters == {"lr": 0.1, "algorithms": algorithms, "optimizer|eps": 1e-8}
        assert json.loads(offline.asset("run.json")) == {
            "lr": 0.1,
            "algorithms": algorithms,
            "optimizer": {"eps": 1e-8},
        }

    def test_the_archive_holds_the_metrics(self, offline: CometRun) -> None:
        """Every value lies at its step, a NaN as well."""
        metrics = [each["metric"] for each in offline.messages("metric_msg")]
        found = {(each["metricName"], each["step"], each["metricValue"]) for each in metrics}
        expected = {("loss", 10, 0.1), ("bad", 10, "NaN"), ("loss", 20, 0.05), ("bad", 20, "NaN"), ("loss", 30, 0.5)}
        assert {each for each in found if each[0] != "process duration"} == expected

    def test_the_archive_holds_files_and_folders(self, offline: CometRun) -> None:
        """A file lies under the name it was given, those of a folder under the folder's."""
        assert offline.asset("timeline") == b"png"
        assert offline.asset("best/model.bin") == b"weights"

    def test_the_archive_holds_project_name_and_tags(self, offline: CometRun) -> None:
        """What identifies an experiment is there."""
        with zipfile.ZipFile(offline.archive) as archive:
            experiment = json.loads(archive.read("experiment.json"))
        assert (experiment["project_name"], experiment["tags"]) == ("reviews", ["lora"])
        assert {"key": "Name", "value": "first"}.items() <= offline.messages("log_other")[1].items()

    def test_the_key_appears_nowhere(self, offline: CometRun) -> None:
        """Neither the archive nor the output holds the key that was in the environment."""
        assert KEY.encode() not in offline.everything()

    def test_nothing_is_gathered_automatically(self, offline: CometRun) -> None:
        """No code, host, path of the interpreter or packages: only what the tracker was given and Comet's frame."""
        with zipfile.ZipFile(offline.archive) as archive:
            entries = [json.loads(line) for line in archive.read("messages.json").splitlines()]
        assert {entry["type"] for entry in entries} == {"log_other", "parameter_msg", "metric_msg", "file_upload"}
        others = {each["key"] for each in offline.messages("log_other")}
        assert others == {"offline_experiment", "Name", "hasNestedParams"}
        names = {each["additional_params"]["fileName"] for each in offline.messages("file_upload")}
        assert names == {"run.json", "timeline", "best/model.bin"}
        everything = offline.everything().replace(offline.stderr.encode(), b"").replace(bytes(offline.folder), b"")
        # As a word: keys are drawn at random, and a short name of a host may be a part of one, or of what was logged.
        host = re.escape(os.uname().nodename.encode())
        assert os.uname().nodename in SCRIPT or not re.search(rb"(?<![\w.-])" + host + rb"(?![\w-])", everything)
        assert sys.executable.encode() not in everything

    def test_a_missing_file_is_reported_once_and_stops_nothing(self, offline: CometRun) -> None:
        """What came after the failure is in the archive."""
        assert offline.stderr.count("Comet failed; the run goes on") == 1
        assert "no file or folder 'missing' to log" in offline.stderr

    def test_without_a_key_it_is_offline_and_silent(self, tmp_path: Path) -> None:
        """Nothing at all is printed where the application did not ask for a log."""
        run = run_comet(tmp_path, show_log=False, environment={}, offline_directory="archives")
        assert run.archive.parent == tmp_path / "archives"
        assert (run.stdout, run.stderr) == ("", "")

    def test_a_server_that_refuses_the_key_does_not_stop_the_run(self, tmp_path: Path) -> None:
        """The run is recorded offline, the log says why, and masks the key that the server repeats."""

        class Refusing(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                # 90212 is Comet's own code for a key that it does not know.
                body = json.dumps({"msg": f"bad key {KEY}", "code": 400, "sdk_error_code": 90212}).encode()
                self.send_response(400)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET  # noqa: N815 - the names are http.server's

            @override
            def log_message(self, format: str, *args: object) -> None:
                """Be silent."""

        server = HTTPServer(("127.0.0.1", 0), Refusing)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/clientlib/"
            run = run_comet(tmp_path, environment={"COMET_API_KEY": KEY, "COMET_URL_OVERRIDE": url, "no_proxy": "*"})
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
        assert "Comet is out of reach: the run is recorded offline" in run.stderr
        assert "***" in run.stderr
        assert KEY.encode() not in run.everything()
        assert len(run.messages("metric_msg")) == 6

    def test_the_repr_shows_the_arguments_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No key is an argument, so none can be shown or described."""
        monkeypatch.setenv("COMET_API_KEY", KEY)
        assert repr(CometTracker("reviews", tags=("a", "b"), online=True)) == (
            "CometTracker(project='reviews', workspace=None, name=None, tags=('a', 'b'), "
            "offline_directory=None, online=True)"
        )

    def test_a_folder_that_cannot_be_made_stops_nothing(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Where not even an archive can be begun the tracker gives up, once and aloud."""
        (tmp_path / "file").write_text("in the way")
        tracker = CometTracker(offline_directory=tmp_path / "file" / "comet", online=False)
        with pytest.warns(ThawlineWarning, match="Comet failed"):
            tracker.log_metrics({"loss": 1.0}, step=0)
        for step in (1, 2):
            tracker.log_metrics({"loss": 1.0}, step=step)
        tracker.close()
        (message,) = logged(caplog)
        assert re.search(r"Comet failed; the run goes on error=.*NotADirectoryError", message)

    def test_without_the_package_the_error_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The extra is named when the tracker is made, not in the middle of a run."""
        monkeypatch.setitem(sys.modules, "comet_ml", None)
        with pytest.raises(MissingExtraError, match=r"pip install 'thawline\[comet\]'"):
            CometTracker()

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"project": 3}, r"CometTracker\(project=\) takes text or None, got 3. Write: CometTracker\(project='rev"),
            ({"workspace": Path("x")}, r"CometTracker\(workspace=\) takes text or None"),
            ({"name": b"x"}, r"CometTracker\(name=\) takes text or None"),
            (
                {"tags": "lora"},
                r"CometTracker\(tags=\) takes a list of texts, got 'lora'. Write: CometTracker\(tags=\[",
            ),
            ({"tags": [1]}, r"CometTracker\(tags=\) takes a list of texts, got \[1\]"),
            ({"offline_directory": ""}, r"CometTracker\(offline_directory=\) takes a path or None, got ''"),
            ({"online": "yes"}, r"CometTracker\(online=\) takes True, False, or None .*, got 'yes'"),
        ],
    )
    def test_wrong_arguments_are_refused(self, arguments: dict[str, Any], message: str) -> None:
        """Each names the argument, what it got, what it takes and a corrected call."""
        with pytest.raises(ArgumentError, match=message):
            CometTracker(**arguments)
