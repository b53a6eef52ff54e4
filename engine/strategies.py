"""Hypothesis strategies for models, times, schedules, algorithms and whole fits; small, and shrinking to plain ones."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import attrs
import torch
from hypothesis import strategies as st
from torch import nn

from .algorithm import Algorithm
from .clock import Time
from .doubles import tiny_loader, tiny_models
from .errors import ArgumentError
from .promises import REFUSALS
from .randomness import Randomness
from .rehearsal import quiet
from .schedules import Schedule, constant, cosine, inverse_sqrt, join, linear, polynomial, repeat, warmup, wsd
from .specimens import installed, specimen
from .trace import Trace
from .trainer import FitResult, Trainer

_MODELS: dict[str, dict[str, Any]] = {
    "mlp": {}, "residual": {"dropout": 0.0}, "cnn": {}, "transformer": {}, "tied": {}, "bare": {}, "shared": {},
}  # fmt: skip
"""The simplest first, each with its arguments."""
_OF_ONE_DEPTH = {"bare", "shared"}


def tiny_model(name: str, seed: int, **arguments: Any) -> nn.Module:
    """Build one of :func:`tiny_models` as :func:`models` drew it. The global generators are kept.

    Args:
        name: Of the model.
        seed: Of its weights.
        **arguments: Such as ``depth``.

    Raises:
        ArgumentError: There is no model of this name.

    Example:
        >>> len(tiny_model("mlp", 0, depth=2)), tiny_model("bare", 0).scale.shape
        (3, torch.Size([4]))
    """
    kinds = tiny_models()
    if name not in kinds:
        takes = f"one of {', '.join(kinds)}"
        raise ArgumentError("tiny_model(name)", got=name, takes=takes, example="tiny_model('mlp', 0)")
    build: Callable[..., nn.Module] = kinds[name]
    with Randomness().kept():
        torch.manual_seed(seed)
        return build(**arguments)


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    """Draw a small model: an MLP, a residual network, a CNN with BatchNorm, a transformer, tied weights, a shared module, bare parameters.

    All take a batch of :func:`tiny_loader`; they shrink to the MLP of least depth and seed 0, and are shown as a call of
    :func:`tiny_model`.

    Example:
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=5)
        ... @given(models())
        ... def test(model):
        ...     assert model(torch.ones(8, 4)).shape == (8, 2)
        >>> test()
    """
    name = draw(st.sampled_from(list(_MODELS)), label="model")
    depth = draw(st.integers(2, 4), label="depth")  # for each: one with less to draw would be simpler than the MLP
    arguments = _MODELS[name] | ({} if name in _OF_ONE_DEPTH else {"depth": depth})
    fixed = {key: st.just(value) for key, value in arguments.items()}
    return draw(st.builds(tiny_model, st.just(name), st.integers(0, 3), **fixed))


def durations(most_batches: int = 12) -> st.SearchStrategy[Time]:
    """Draw how long a fit lasts: a few epochs, batches or samples; shrinks to one epoch.

    Args:
        most_batches: The most batches, where it is in batches.

    Example:
        >>> from hypothesis import given
        >>> @given(durations())
        ... def test(time):
        ...     assert time.unit in {"ep", "ba", "sp"} and time.value >= 1
        >>> test()
    """
    epochs = st.integers(1, 3).map(lambda count: Time(f"{count}ep"))
    batches = st.integers(1, most_batches).map(lambda count: Time(f"{count}ba"))
    samples = st.integers(1, 8 * most_batches).map(lambda count: Time(f"{count}sp"))
    return st.one_of(epochs, batches, samples)


def times() -> st.SearchStrategy[Time]:
    """Draw a time inside a fit, such as an interval: like :func:`durations`, or a share such as ``"0.25dur"``; never zero."""
    shares = st.sampled_from([0.5, 0.25, 0.1, 0.9, 1.0]).map(lambda share: Time(f"{share}dur"))
    return st.one_of(durations(), shares)


def schedules(depth: int = 2) -> st.SearchStrategy[Schedule]:
    """Draw a learning-rate schedule: a curve, or curves joined, repeated, or after a warmup; shrinks to ``constant()``.

    Args:
        depth: How deep they nest.

    Example:
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=20)
        ... @given(schedules(), st.floats(0, 1))
        ... def test(schedule, progress):
        ...     assert schedule(progress) >= 0
        >>> test()
    """
    shares = st.sampled_from([0.5, 0.25, 0.1, 0.75])
    ends = st.sampled_from([0.0, 0.1, 0.5])
    plain = st.one_of(
        st.builds(constant),
        st.builds(linear, end=ends),
        st.builds(cosine, end=ends),
        st.builds(polynomial, power=st.sampled_from([2.0, 0.5]), end=ends),
        st.builds(inverse_sqrt, shares),
        st.builds(wsd, warmup=st.sampled_from([0.1, 0.25]), decay=st.sampled_from([0.1, 0.25])),
    )
    if not depth:
        return plain
    inner = schedules(depth - 1)
    return st.one_of(
        plain,
        st.builds(warmup, shares, then=inner),
        st.builds(join, st.tuples(inner, inner), st.tuples(shares)),
        st.builds(repeat, inner, st.sampled_from([0.5, 0.25])),
    )


@st.composite
def algorithms(draw: st.DrawFn, kinds: Iterable[type[Algorithm]] | None = None) -> Algorithm:
    """Draw an algorithm with arguments by the types of its fields; shrinks to the first, with its usual arguments.

    Args:
        draw: Given by Hypothesis.
        kinds: Classes to draw from; None is every installed one.

    Example:
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=5)
        ... @given(algorithms([Trace]))
        ... def test(algorithm):
        ...     assert Algorithm.from_description(algorithm.describe()).describe() == algorithm.describe()
        >>> test()
    """
    usual = specimen(draw(st.sampled_from(list(installed() if kinds is None else kinds)), label="algorithm"))
    kind: Any = usual.build
    hints = get_type_hints(kind) if hasattr(kind, "__attrs_attrs__") else {}
    arguments = dict(usual.arguments)
    for name in inspect.signature(kind).parameters:
        drawn = _of_type(hints.get(name))
        if drawn is not None and draw(st.booleans(), label=f"other {name}"):
            arguments[name] = draw(drawn, label=name)
    try:
        made: Algorithm = kind(**arguments)
    except ArgumentError:  # two that exclude each other, or a number out of its range
        made = usual()
    return made


def _of_type(hint: Any) -> st.SearchStrategy[Any] | None:
    """Return what to draw for an argument of a type; None for one that has no short list of values."""
    if hint is Time:
        return times()
    if hint is type(None):
        return st.none()
    if hint is bool:
        return st.booleans()
    if hint is int:
        return st.integers(1, 4)
    if hint is float:
        return st.sampled_from([0.5, 0.9, 0.1, 1.0])
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        known = [found for each in get_args(hint) if (found := _of_type(each)) is not None]
        return st.one_of(known) if known else None
    return None


def _listed(given: Algorithm | Iterable[Algorithm]) -> tuple[Algorithm, ...]:
    return (given,) if isinstance(given, Algorithm) else tuple(given)


@attrs.frozen(eq=False)
class Fit:
    """A small fit, ready to run.

    Args:
        model: To train; a fit changes it.
        algorithms: What acts: one or several.
        duration: How long.
        schedule: Of the learning rates.
        batch_size: Samples of a batch, of 16.
        accumulate: Batches of the loader to one step.
        settings: Further arguments of the Trainer.
    """

    model: nn.Module
    algorithms: tuple[Algorithm, ...] = attrs.field(converter=_listed)
    duration: Time
    schedule: Schedule
    batch_size: int
    accumulate: int
    settings: Mapping[str, Any] = attrs.field(factory=dict)

    def run(self, **settings: Any) -> FitResult:
        """Run it under ``debug=True``; ``settings`` are further arguments of the Trainer. The global generators are kept."""
        return self._run(self.algorithms, settings)

    def trace(self) -> Trace:
        """Run it, and return what changed when."""
        trace = Trace()
        self._run((*self.algorithms, trace), {})
        return trace

    def _run(self, listed: tuple[Algorithm, ...], settings: Mapping[str, Any]) -> FitResult:
        given: dict[str, Any] = {
            "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
            "loss_fn": nn.functional.cross_entropy,
            "schedule": self.schedule,
            "accumulate": self.accumulate,
            "device": "cpu",
            "distributed": False,
            "progress": False,
            "debug": True,
        }
        data = tiny_loader(16, self.batch_size)
        with Randomness().kept(), quiet():
            trainer = Trainer(algorithms=listed, **(given | dict(self.settings) | dict(settings)))
            return trainer.fit(self.model, data, data, duration=self.duration)


_algorithms, _models = algorithms, models  # `fits` has arguments of these names


def fits(
    algorithms: st.SearchStrategy[Any] | None = None, models: st.SearchStrategy[nn.Module] | None = None
) -> st.SearchStrategy[Fit]:
    """Draw a small fit to run: a model, algorithms, a duration, a schedule, and how batches are cut.

    Args:
        algorithms: Draws an algorithm or a list of them. None draws an installed one that runs: each such fit is tried on
            a copy, and where the algorithm refuses the model, as LISA does that is to sample three layers of two,
            another is drawn. What refuses of those that you give is for your test to see.
        models: Draws the model; None draws from :func:`models`.

    Example:
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=3)
        ... @given(fits(st.just([])))
        ... def test(fit):
        ...     assert fit.run().stop_reason == "duration"
        >>> test()
    """
    drawn = st.builds(
        Fit,
        model=_models() if models is None else models,
        algorithms=_algorithms() if algorithms is None else algorithms,
        duration=durations(6),
        schedule=schedules(1),
        batch_size=st.sampled_from([8, 4]),
        accumulate=st.sampled_from([1, 2]),
    )
    return drawn.filter(_is_taken) if algorithms is None else drawn


def _is_taken(fit: Fit) -> bool:
    """Return whether no algorithm refuses the fit; what else fails is for the test to find."""
    try:
        copy.deepcopy(fit).run()
    except Exception as error:  # noqa: BLE001 - also one that cannot be copied
        return not isinstance(error, REFUSALS)
    return True
