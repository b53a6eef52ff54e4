"""Algorithms to test with: each registered one as its own error messages show it, its times fitted to a small fit."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeAlias

from attrs import frozen
from typing_extensions import override

from .algorithm import ENTRY_POINTS, Algorithm, registered, registered_names
from .clock import Time
from .errors import ArgumentError

Built: TypeAlias = "Algorithm | list[Algorithm]"
SHORT = {"ba": Time("2ba"), "sp": Time("16sp")}


@frozen
class Specimen:
    """An algorithm's class, or a function that returns a list of algorithms, with arguments to call it with.

    Args:
        build: The class or function.
        arguments: By name.

    Example:
        >>> from thawline.engine import on, Event
        >>> @on(Event.BATCH_END)
        ... def do_nothing(state): ...
        >>> Specimen(do_nothing, {})
        do_nothing()
    """

    build: Callable[..., Any]
    arguments: Mapping[str, Any]

    def __call__(self) -> Any:
        """Build a new one."""
        return self.build(**self.arguments)

    @override
    def __repr__(self) -> str:
        return f"{self.build.__name__}({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"


def specimen(build: Callable[..., Any], **given: Any) -> Specimen:
    """Return a class or function with arguments that a fit of a few batches shows at work.

    Without arguments where it takes none; else those that its :class:`ArgumentError` gives as the corrected call. A default
    that is a :class:`Time` in batches or samples, which are meant for long fits, becomes a short one.

    Args:
        build: A class of algorithms, or a function that returns a list of them.
        **given: Arguments that it is to have.

    Raises:
        ArgumentError: Its messages show no call that works.

    Example:
        >>> from thawline.engine.trace import Trace
        >>> specimen(Trace)
        Trace()
    """
    arguments = _shown(build, given)
    for name, parameter in inspect.signature(build).parameters.items():
        default = parameter.default
        if isinstance(default, Time) and default.unit in SHORT and name not in arguments:
            arguments[name] = SHORT[default.unit]
    return Specimen(build, arguments)


def installed() -> tuple[type[Algorithm], ...]:
    """Return the algorithms that installed packages offer by entry point, by name; without any, what is registered.

    Example:
        >>> all(issubclass(each, Algorithm) for each in installed())
        True
    """
    names = {each.name for each in entry_points(group=ENTRY_POINTS)} or registered_names()
    return tuple(registered(name) for name in sorted(names))


def _shown(build: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call that works: none, or those of the example in the error that none gives."""
    needed = [
        name
        for name, each in inspect.signature(build).parameters.items()
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    arguments: dict[str, Any] = dict.fromkeys(needed, Nothing()) | dict(given)
    try:
        build(**arguments)
    except ArgumentError as error:
        arguments = arguments_of(error.example, build) | dict(given)
        build(**arguments)
    return arguments


class Nothing:
    """What no argument takes."""


def arguments_of(example: str, build: Callable[..., Any]) -> dict[str, Any]:
    """Read a call such as ``"GradClip(max_norm=1.0)"`` as arguments.

    They are literals, and calls of classes that stand in the module of ``build``; nothing else is run.
    """
    try:
        call = ast.parse(example, mode="eval").body
        assert isinstance(call, ast.Call)
        classes = vars(sys.modules[build.__module__])
        positional = [_value(each, classes) for each in call.args]
        named = {str(each.arg): _value(each.value, classes) for each in call.keywords}
        return dict(inspect.signature(build).bind(*positional, **named).arguments)
    except (AssertionError, KeyError, SyntaxError, ValueError, TypeError) as error:
        takes = f"a call of {build.__name__} as the example of its ArgumentError"
        example_of_ours = "ArgumentError('GradClip(max_norm=)', …, example='GradClip(max_norm=1.0)')"
        raise ArgumentError("ArgumentError(example=)", got=example, takes=takes, example=example_of_ours) from error


def _value(node: ast.expr, classes: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.List):
        return [_value(each, classes) for each in node.elts]
    if isinstance(node, ast.Call):
        assert isinstance(node.func, ast.Name)
        made = classes[node.func.id]
        assert isinstance(made, type)
        return made(
            *(_value(each, classes) for each in node.args),
            **{str(each.arg): _value(each.value, classes) for each in node.keywords},
        )
    return ast.literal_eval(node)
