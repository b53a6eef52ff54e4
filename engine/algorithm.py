"""The contract of an algorithm, its stages, and the registry of names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from enum import Enum, IntEnum
from typing import Any, ClassVar, Self, TypeVar, cast

import attrs
import torch
from torch import Tensor

from .clock import Time
from .errors import ArgumentError, nearest
from .events import Event
from .keywords import refuse_unknown
from .state import State
from .typing import Json

ENTRY_POINTS = "thawline.algorithms"


class Stage(IntEnum):
    """The order in which algorithms act at one event; within a stage the order of the list.

    At EVAL_START and EVAL_END, WEIGHTS come before all others: evaluation sees averaged weights, everybody else live ones.
    At EPOCH_END, CONTROL comes before all others: whoever puts weights back at the end knows that the fit ends.
    """

    SURGERY = 0
    TRAINABILITY = 1
    DATA = 2
    GRADIENTS = 3
    WEIGHTS = 4
    CONTROL = 5
    OBSERVE = 6


class _Remembering:
    """Keeps what it was constructed with. A base of its own: a class's signature is then that of its ``__init__``."""

    owner: str
    _arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Remember the arguments, for ``reset`` and ``describe``; say which there are where one is unknown."""
        _check_keywords(cls, kwargs)
        self = super().__new__(cls)
        # attrs classes may be frozen, and a copy brings its own arguments along in __dict__.
        self.__dict__.setdefault("_arguments", (args, kwargs))
        self.__dict__.setdefault("owner", cls.__name__)
        return self


class Algorithm(_Remembering):
    """Something that acts at events of a fit.

    Subclasses say at which ``events`` and what they do; everything else has a default. Arguments come
    through the constructor and stay; what changes during a fit is state, and :meth:`state_dict` saves it.
    The engine gives each instance in its list an :attr:`owner` name of its own.

    Example:
        >>> class CountSteps(Algorithm):
        ...     events = frozenset({Event.BATCH_END})
        ...     def __init__(self, log_as="steps"):
        ...         self.log_as, self.steps = log_as, 0
        ...     def apply(self, event, state):
        ...         self.steps += 1
        ...         state.log({self.log_as: self.steps})
        ...     def state_dict(self):
        ...         return {"steps": self.steps}
        >>> CountSteps("n").describe()
        {'name': 'CountSteps', 'arguments': {'log_as': 'n'}}
    """

    events: frozenset[Event] = frozenset()
    stage: ClassVar[Stage] = Stage.CONTROL

    def __init__(self) -> None:
        """Take no arguments, unless a subclass does."""

    def match(self, event: Event, state: State) -> bool:  # noqa: ARG002 - subclasses use them
        """Return whether to act now. Pure: it changes nothing."""
        return True

    def apply(self, event: Event, state: State) -> None:
        """Act. The ledger is open at the events whose ``opens_ledger`` is true."""

    def attach(self, state: State) -> None:
        """Set up hooks and caches, on fresh and on resumed fits. Never changes the ledger."""

    def close(self) -> None:
        """Remove what :meth:`attach` set up. Always called, also after an error."""

    def state_dict(self) -> dict[str, Any]:
        """Return what changes during a fit: tensors and JSON."""
        return {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned. The default sets attributes of those names."""
        for name, value in saved.items():
            setattr(self, name, value)

    def evaluated_weights(self) -> Mapping[str, Tensor]:
        """Return what evaluations run with instead of the live weights, by parameter and buffer name; empty for nothing.

        A checkpoint names them, so that :func:`~thawline.engine.load_weights` gives what a metric was measured on.
        Of several algorithms that return some, those of the first count, in the order in which they act.
        """
        return {}

    def reset(self) -> None:
        """Become as constructed, keeping the owner's name: what a fresh fit starts from."""
        args, kwargs = self._arguments
        cast("Any", self).__init__(*args, **kwargs)

    def fresh(self) -> Self:
        """Return another instance of the same arguments, as constructed."""
        args, kwargs = self._arguments
        return type(self)(*args, **kwargs)

    def unplanned(self) -> str | None:
        """Return in words what it may do that :meth:`Trainer.plan` cannot know; None where the clock decides everything.

        What depends on losses, gradients or weights is decided in the fit only. The words follow the algorithm's name,
        as in "may stop the fit when eval/loss has not improved for 3 evaluations".
        """
        return None

    def describe(self) -> dict[str, Json]:
        """Return name and arguments as JSON; :meth:`from_description` inverts it.

        Callable arguments are described by qualified name: such a description is compared, not rebuilt.
        """
        return {"name": name_of(type(self)), "arguments": {key: as_json(value) for key, value in self._bound().items()}}

    @staticmethod
    def from_description(description: Mapping[str, Any]) -> Algorithm:
        """Build the algorithm that :meth:`describe` described.

        Raises:
            ArgumentError: The name is not registered, or an argument is a callable, which cannot be rebuilt.
        """
        name = description.get("name")
        arguments = description.get("arguments", {})
        for key, value in arguments.items():
            if isinstance(value, dict) and "callable" in value:
                raise ArgumentError(
                    f"{name}({key}=)",
                    got=value,
                    takes="a callable, which a description only names",
                    example=f"{name}({key}=…)",
                )
        return registered(str(name))(**arguments)

    def _bound(self) -> dict[str, Any]:
        args, kwargs = self._arguments
        bound = inspect.signature(type(self)).bind(*args, **kwargs)
        bound.apply_defaults()
        return {key: self._converted(key, value) for key, value in bound.arguments.items()}

    def _converted(self, argument: str, value: Any) -> Any:
        """Return an argument as the class keeps it, so that ``LayerThaw(2)`` and ``LayerThaw("2ep")`` are alike."""
        kind: Any = type(self)
        fields = attrs.fields(kind) if attrs.has(kind) else ()
        kept = [each.name for each in fields if each.init and each.alias == argument]
        return getattr(self, kept[0], value) if kept else value


def evaluated_weights(algorithms: Iterable[Algorithm]) -> Mapping[str, Tensor]:
    """Return what evaluations run with instead of the live weights: what the first that acts says, of those that say some.

    Raises:
        ArgumentError: One returns something else than tensors by name.
    """
    for each in sorted(algorithms, key=lambda each: each.stage):
        found: object = each.evaluated_weights()
        if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
            raise ArgumentError(
                f"{each.owner}.evaluated_weights()", got=found, takes="a mapping of parameter names to tensors to return",
                example="return dict(self.average)",
            )  # fmt: skip
        if found:
            return found
    return {}


def _check_keywords(kind: type[_Remembering], keywords: Mapping[str, Any]) -> None:
    """Raise where a class is given an argument that it does not take."""
    if not keywords:  # a copy is made without any
        return
    _, *known = inspect.signature(kind.__init__).parameters.values()
    names = [each.name for each in known]
    if not any(each.kind is each.VAR_KEYWORD for each in known):
        refuse_unknown(kind.__name__, keywords, names)


Kind = TypeVar("Kind", bound=type[Algorithm])
_REGISTRY: dict[str, type[Algorithm]] = {}


def register(kind: Kind) -> Kind:
    """Register an algorithm under its class name, by which recipes and checkpoints refer to it.

    Raises:
        ArgumentError: Another class has this name.
    """
    known = _REGISTRY.get(kind.__name__)
    if known is not None and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ArgumentError(
            "register()",
            got=kind,
            takes=f"a class whose name is free ({known.__module__} has it)",
            example="class MyEMA",
        )
    _REGISTRY[kind.__name__] = kind
    return kind


def registered(name: str) -> type[Algorithm]:
    """Return the algorithm class registered under ``name``, also by an entry point of another package.

    Raises:
        ArgumentError: None is; an import path never is one.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    from importlib.metadata import entry_points

    found = {each.name: each for each in entry_points(group=ENTRY_POINTS)}
    if name in found:
        loaded = found[name].load()
        if isinstance(loaded, type) and issubclass(loaded, Algorithm):
            return loaded
    known = nearest(name, sorted({*_REGISTRY, *found}))
    raise ArgumentError(
        "algorithm name", got=name, takes=f"a registered one ({known})", example="@register above the class"
    )


def registered_names() -> tuple[str, ...]:
    """Return the names of all algorithms registered in this process, in alphabetical order."""
    return tuple(sorted(_REGISTRY))


def name_of(kind: type[Algorithm]) -> str:
    """Return the name that a class registers under."""
    return kind.__name__


def as_json(value: object) -> Json:
    """Describe an argument as JSON: times as text, callables by qualified name, sets sorted."""
    if isinstance(value, Enum):
        return as_json(value.value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Time, torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): as_json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted((as_json(each) for each in value), key=str)
    describe: Callable[[], Json] | None = getattr(value, "describe", None)
    if callable(describe) and not isinstance(value, type):
        return describe()
    kind: Any = type(value)
    if attrs.has(kind):
        return {each.name: as_json(getattr(value, each.name)) for each in attrs.fields(kind) if each.init}
    return {"callable": _qualified(value)}


def _qualified(value: Any) -> str:
    inner = getattr(value, "func", value)  # functools.partial
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    text = f"{getattr(inner, '__module__', '?')}.{name}"
    if inner is not value:
        keywords = [f"{key}={_shown(each)}" for key, each in value.keywords.items()]
        text += f"({', '.join([*map(_shown, value.args), *keywords])})"
    return text


def _shown(value: object) -> str:
    """Show what is bound to a function, the same in every process: without addresses in memory."""
    described = as_json(value)
    return str(described["callable"]) if isinstance(described, dict) and "callable" in described else repr(described)
