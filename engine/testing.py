"""What tests of algorithms and schedules are written with. Needs hypothesis: ``pip install 'thawline[test]'``.

- :func:`check_algorithm` and :class:`AlgorithmContract`: does an algorithm keep the engine's promises?
- Hypothesis strategies: :func:`models`, :func:`durations`, :func:`times`, :func:`schedules`, :func:`algorithms`, :func:`fits`.
- :class:`EngineMachine`: random operations against a :class:`LedgerOracle`.
- :class:`Trace`, :class:`MemoryTracker`, :func:`tiny_models`, :func:`tiny_loader`: doubles.
"""

from __future__ import annotations

from importlib.util import find_spec

from .errors import MissingExtraError

if find_spec("hypothesis") is None:
    raise MissingExtraError("thawline.engine.testing needs hypothesis. Write: pip install 'thawline[test]'")

from .conformance import CHECKS, AlgorithmContract, check_algorithm
from .doubles import tiny_loader, tiny_models
from .machine import EngineMachine
from .oracle import LedgerOracle
from .promises import ConformanceError
from .specimens import Specimen, installed, specimen
from .strategies import Fit, algorithms, durations, fits, models, schedules, times, tiny_model
from .trace import Trace
from .tracking import MemoryTracker

__all__ = [
    "CHECKS",
    "AlgorithmContract",
    "ConformanceError",
    "EngineMachine",
    "Fit",
    "LedgerOracle",
    "MemoryTracker",
    "Specimen",
    "Trace",
    "algorithms",
    "check_algorithm",
    "durations",
    "fits",
    "installed",
    "models",
    "schedules",
    "specimen",
    "times",
    "tiny_loader",
    "tiny_model",
    "tiny_models",
]
