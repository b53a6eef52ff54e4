"""Where the phases of a schedule come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ..engine import ArgumentError
from .phases import Phase, Written
from .schedule_text import read_phases

Source: TypeAlias = "str | Path | Mapping[str, Any] | Sequence[Phase] | Sequence[Mapping[str, Any]]"


def read_source(source: Any) -> tuple[dict[str, Any], tuple[Phase, ...]]:
    r"""Return the options and the phases of a source: phases, a YAML file, its text, or the same as dicts and lists.

    Raises:
        ScheduleError: Something is wrong with what is written.
        ArgumentError: It is none of these.

    Example:
        >>> read_source("repeat: 2\nphases: [{thaw: head, until: 2ep}]")[0]
        {'repeat': 2}
        >>> len(read_source([{"thaw": "head"}])[1]), len(read_source([Phase(thaw="head")])[1])
        (1, 1)
        >>> read_source([Phase(thaw="head"), 3])
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: ThawSchedule(source=) takes phases, ... got 3. ...
        >>> read_source({})
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: ThawSchedule(source=) takes phases, ... got {}. ...
    """
    if isinstance(source, Sequence) and not isinstance(source, str) and source:
        if all(isinstance(each, Phase) for each in source):
            return {}, Written.like(source, source)
        strange = [each for each in source if not isinstance(each, (Phase, Mapping))]
        if strange or any(isinstance(each, Phase) for each in source):
            _refuse(strange[0] if strange else source)
    elif not isinstance(source, (str, Path, Mapping)) or not source:
        _refuse(source)
    return read_phases(source)


def _refuse(source: object) -> None:
    takes = "phases, or a YAML file, its text, or the same as dicts and lists"
    example = "ThawSchedule([Phase(thaw='head', until='2ep'), Phase(thaw='blocks')])"
    raise ArgumentError("ThawSchedule(source=)", got=source, takes=takes, example=example)
