"""The engine of thawline: events, state, ledger, trainer. It knows no algorithm by name."""

from .algorithm import Algorithm, Stage, register, registered, registered_names
from .batches import Unloaded
from .checkpointing import Checkpointing
from .clock import Clock, Time
from .distributed import Replicate
from .engine import Engine, TraceEntry
from .errors import (
    ArgumentError,
    CallError,
    CheckpointError,
    DataError,
    DistributedError,
    LayerError,
    LedgerClosedError,
    LedgerError,
    LossError,
    MissingExtraError,
    NonFiniteError,
    OptimizerError,
    OutOfMemoryError,
    RecompileError,
    RunDirError,
    ScheduleError,
    SelectorError,
    SurgeryError,
    ThawlineError,
    ThawlineWarning,
    UnknownArgumentError,
    nearest,
    warn,
)
from .events import Event
from .forward import targets_of
from .forward_order import untouched
from .functions import on
from .groups import Group
from .layers import Layer, LayerMap
from .ledger import ParameterLedger
from .log import configure_logging, get_logger
from .monitor import direction_of
from .plan import Plan
from .randomness import derive_seed
from .schedules import (
    Schedule,
    constant,
    cosine,
    inverse_sqrt,
    join,
    linear,
    one_cycle,
    polynomial,
    repeat,
    warmup,
    wsd,
)
from .selectors import Selector
from .state import State
from .surgery import Attachment, JournalEntry, Site, surgery_op
from .tracking import CometTracker, JsonlTracker, MemoryTracker, Tracker
from .trainer import FitResult, Trainer
from .typing import Json
from .weights import export, load_weights

__all__ = [
    "Algorithm",
    "ArgumentError",
    "Attachment",
    "CallError",
    "CheckpointError",
    "Checkpointing",
    "Clock",
    "CometTracker",
    "DataError",
    "DistributedError",
    "Engine",
    "Event",
    "FitResult",
    "Group",
    "JournalEntry",
    "Json",
    "JsonlTracker",
    "Layer",
    "LayerError",
    "LayerMap",
    "LedgerClosedError",
    "LedgerError",
    "LossError",
    "MemoryTracker",
    "MissingExtraError",
    "NonFiniteError",
    "OptimizerError",
    "OutOfMemoryError",
    "ParameterLedger",
    "Plan",
    "RecompileError",
    "Replicate",
    "RunDirError",
    "Schedule",
    "ScheduleError",
    "Selector",
    "SelectorError",
    "Site",
    "Stage",
    "State",
    "SurgeryError",
    "ThawlineError",
    "ThawlineWarning",
    "Time",
    "TraceEntry",
    "Tracker",
    "Trainer",
    "UnknownArgumentError",
    "Unloaded",
    "configure_logging",
    "constant",
    "cosine",
    "derive_seed",
    "direction_of",
    "export",
    "get_logger",
    "inverse_sqrt",
    "join",
    "linear",
    "load_weights",
    "nearest",
    "on",
    "one_cycle",
    "polynomial",
    "register",
    "registered",
    "registered_names",
    "repeat",
    "surgery_op",
    "targets_of",
    "untouched",
    "warmup",
    "warn",
    "wsd",
]
