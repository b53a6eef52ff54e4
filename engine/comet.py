"""The Comet tracker: a run recorded on comet.com, or in an archive to be uploaded later."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, field
from typing_extensions import override

from .errors import ArgumentError, MissingExtraError, warn
from .log import get_logger, jsonable

if TYPE_CHECKING:
    from comet_ml import CometExperiment

    from .typing import Json

log = get_logger(__name__)

# Comet gathers all this by itself unless told not to. Nothing leaves but what the tracker was given.
_NOTHING_AUTOMATIC: dict[str, Any] = {
    "log_code": False,
    "log_graph": False,
    "auto_param_logging": False,
    "auto_metric_logging": False,
    "auto_output_logging": False,
    "auto_log_co2": False,
    "auto_histogram_tensorboard_logging": False,
    "parse_args": False,
    "log_env_details": False,
    "log_env_gpu": False,
    "log_env_cpu": False,
    "log_env_network": False,
    "log_env_disk": False,
    "log_env_host": False,
    "log_git_metadata": False,
    "log_git_patch": False,
    "display_summary_level": 0,
}


def _folder(path: str | os.PathLike[str] | None) -> Path | None:
    if path is None or (isinstance(path, str | os.PathLike) and os.fspath(path)):
        return None if path is None else Path(path)
    example = "CometTracker(offline_directory='runs/comet')"
    raise ArgumentError("CometTracker(offline_directory=)", got=path, takes="a path or None", example=example)


def _tags(tags: Iterable[str]) -> tuple[str, ...]:
    found = tuple(tags) if isinstance(tags, Iterable) and not isinstance(tags, str) else (None,)
    texts = tuple(tag for tag in found if isinstance(tag, str))
    if len(texts) == len(found):
        return texts
    raise ArgumentError("CometTracker(tags=)", got=tags, takes="a list of texts", example="CometTracker(tags=['lora'])")


@define(eq=False)
class CometTracker:
    """Records a run on comet.com, or offline in an archive that ``comet upload`` sends later.

    It is online where Comet finds an API key (``COMET_API_KEY`` or ``~/.comet.config``), else, and where the server
    cannot be reached, offline. The key is read by Comet itself: it is no argument here and appears in no log, config
    or archive. Nothing is gathered automatically: no code, command line, output, git or machine details. No call
    raises or stops a run; what fails is logged once as a warning. The experiment begins at the first call.

    Importing comet_ml normally patches other libraries, replaces ``sys.excepthook`` and reports its own faults to a
    third party; where this class is the first to import it, it does none of these. Import it first to have them.

    Args:
        project: The project's name; None is Comet's default.
        workspace: The workspace; None is the key's default.
        name: The experiment's name.
        tags: The experiment's tags.
        offline_directory: Where the archive goes; None is ``comet`` in the run's folder, or in the current one.
        online: True or False decides; None asks whether there is a key.

    Raises:
        MissingExtraError: comet_ml is not installed.
        ArgumentError: An argument of the wrong type.

    Example:
        >>> CometTracker("reviews", tags=["lora"], online=False)
        CometTracker(project='reviews', workspace=None, name=None, tags=('lora',), offline_directory=None, online=False)
    """

    project: str | None = None
    workspace: str | None = field(default=None, kw_only=True)
    name: str | None = field(default=None, kw_only=True)
    tags: tuple[str, ...] = field(default=(), converter=_tags, kw_only=True)
    offline_directory: Path | None = field(default=None, converter=_folder, kw_only=True)
    online: bool | None = field(default=None, kw_only=True)
    archive: Path | None = field(default=None, init=False, repr=False)
    """The last offline archive, once closed."""
    _run_dir: Path = field(default=Path(), init=False, repr=False)
    _experiment: CometExperiment | None = field(default=None, init=False, repr=False)
    _console: _CometConsole | None = field(default=None, init=False, repr=False)
    _unusable: bool = field(default=False, init=False, repr=False)
    _reported: bool = field(default=False, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        for argument in ("project", "workspace", "name"):
            value = getattr(self, argument)
            if not isinstance(value, str | None):
                example = f"CometTracker({argument}='reviews')"
                raise ArgumentError(f"CometTracker({argument}=)", got=value, takes="text or None", example=example)
        if self.online not in (True, False, None):
            takes, example = "True, False, or None to ask whether there is a key", "CometTracker(online=False)"
            raise ArgumentError("CometTracker(online=)", got=self.online, takes=takes, example=example)
        if importlib.util.find_spec("comet_ml") is None:
            raise MissingExtraError("CometTracker needs comet_ml. Write: pip install 'thawline[comet]'")

    def use_run_dir(self, run_dir: Path) -> None:
        """Let archives go to ``run_dir/comet`` where no ``offline_directory`` was given."""
        self._run_dir = run_dir

    def log_config(self, config: Mapping[str, Json]) -> None:
        """Record the configuration as parameters, and whole as ``run.json``."""
        self._safely(lambda experiment: _log_config(experiment, config))

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Record numbers at a step."""
        self._safely(lambda experiment: experiment.log_metrics(dict(metrics), step=step))

    def log_artifact(self, path: Path, *, name: str | None = None) -> None:
        """Record a file, or every file of a folder, as assets."""
        self._safely(lambda experiment: _log_asset(experiment, Path(path), name))

    def close(self) -> None:
        """Send or write what is left, and end the experiment; the next call begins another."""
        if self._experiment is not None:
            self._safely(self._end)
        if self._console is not None:
            self._console.remove()
        self._experiment, self._console, self._unusable, self._reported = None, None, False, False

    def _safely(self, call: Callable[[CometExperiment], object]) -> None:
        if self._unusable:
            return
        try:
            if self._experiment is None:
                self._unusable = True  # until it is open: a failed start is not tried again at each call
                self._experiment = self._open()
                self._unusable = False
            call(self._experiment)
        except Exception as error:  # noqa: BLE001 - whatever Comet raises, the run goes on
            self._report(error)

    def _open(self) -> CometExperiment:
        with _quiet_import():
            from comet_ml import OfflineExperiment
            from comet_ml.config import get_api_key, get_config  # type: ignore[attr-defined]  # its __init__ lacks __all__
        config = get_config()
        key = get_api_key(None, config)
        self._console = _CometConsole([config["comet.api_key"], key])
        experiment: CometExperiment | None = None
        if self.online or (self.online is None and key is not None):
            experiment = self._open_online()
        if experiment is None:
            folder = self.offline_directory or self._run_dir / "comet"
            folder.mkdir(parents=True, exist_ok=True)
            experiment = OfflineExperiment(
                project_name=self.project, workspace=self.workspace, offline_directory=str(folder), **_NOTHING_AUTOMATIC
            )
        if self.name is not None:
            experiment.set_name(self.name)
        experiment.add_tags(list(self.tags))
        return experiment

    def _open_online(self) -> CometExperiment | None:
        from comet_ml import Experiment

        try:
            experiment = Experiment(project_name=self.project, workspace=self.workspace, **_NOTHING_AUTOMATIC)
        except Exception as error:  # noqa: BLE001 - whatever Comet raises, the run is recorded offline
            self._report(error)
        else:
            if experiment.alive:
                return experiment
        log.warning("Comet is out of reach: the run is recorded offline")
        return None

    def _end(self, experiment: CometExperiment) -> None:
        experiment.end()
        folder = getattr(experiment, "offline_directory", None)  # online experiments have none
        path = None if folder is None else Path(folder, f"{experiment.id}.zip")
        if path is not None and path.exists():
            self.archive = path
            log.info("Comet archive written", path=str(path), upload=f"comet upload {path}")

    def _report(self, error: Exception) -> None:
        if not self._reported:
            self._reported = True
            text = f"{type(error).__name__}: {error}"
            # The exception may carry the key, so neither it nor its traceback is logged.
            text = self._console.redact(text) if self._console else text
            log.warning("Comet failed; the run goes on", error=text)
            warn(f"Comet failed, and the run goes on without what it misses: {text}")


def _log_config(experiment: CometExperiment, config: Mapping[str, Json]) -> None:
    plain = {name: jsonable(value) for name, value in config.items()}
    experiment.log_parameters(plain)
    experiment.log_asset_data(json.dumps(plain, allow_nan=False, indent=2), name="run.json")


def _log_asset(experiment: CometExperiment, path: Path, name: str | None) -> None:
    if path.is_dir():
        for each in sorted(path.rglob("*")):
            if each.is_file():
                inside = each.relative_to(path).as_posix()
                experiment.log_asset(str(each), file_name=f"{name or path.name}/{inside}")
    elif path.is_file():
        experiment.log_asset(str(path), file_name=name or path.name)
    else:
        raise FileNotFoundError(f"no file or folder {str(path)!r} to log")


@contextmanager
def _quiet_import() -> Generator[None]:
    """Keep the first import of comet_ml from patching libraries, hooking exceptions and reporting home."""
    if "comet_ml" in sys.modules:
        yield
        return
    wanted = {"COMET_DISABLE_AUTO_LOGGING": "1", "COMET_ERROR_TRACKING_ENABLE": "false"}
    before = {name: os.environ.get(name) for name in wanted}
    hook = sys.excepthook
    os.environ.update(wanted)
    try:
        yield
    finally:
        sys.excepthook = hook
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _CometConsole(logging.Filter):
    """Comet's console output while a tracker is open: each warning goes to our log once, without the key."""

    def __init__(self, keys: Iterable[str | None]) -> None:
        super().__init__()
        self._keys = [key for key in keys if key]
        self._said: set[str] = set()
        self._handlers = list(logging.getLogger("comet_ml").handlers)
        for handler in self._handlers:
            handler.addFilter(self)

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.partition(".")[0] != "comet_ml":  # a handler may serve others as well, our own log among them
            return True
        message = self.redact(record.getMessage())
        if record.levelno >= logging.WARNING and message not in self._said:
            self._said.add(message)
            log.warning("Comet says", message=message)
        return False

    def redact(self, text: str) -> str:
        for key in self._keys:
            text = text.replace(key, "***")
        return text

    def remove(self) -> None:
        for handler in self._handlers:
            handler.removeFilter(self)
