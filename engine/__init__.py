"""The engine of thawline: events, state, ledger, trainer. It knows no algorithm by name."""

from .algorithm import Algorithm, Stage, register, registered, registered_names
from .clock import Clock, Time
from .engine import Engine, TraceEntry
from .errors import (
    ArgumentError,
    CheckpointError,
    DataError,
    DistributedError,
    LayerError,
    LedgerClosedError,
    LedgerError,
    LossError,
    NonFiniteError,
    OptimizerError,
    RunDirError,
    SelectorError,
    SurgeryError,
    ThawlineError,
    nearest,
)
from .events import Event
from .groups import Group
from .layers import Layer, LayerMap
from .ledger import ParameterLedger
from .log import configure_logging, get_logger
from .schedules import Schedule, constant, cosine, join, linear, warmup
from .selectors import Selector
from .state import State
from .surgery import Attachment, JournalEntry, Site, surgery_op
from .typing import Json
