"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, overload
from weakref import WeakKeyDictionary

import attrs
import torch
from torch import Tensor, nn
from typing_extensions import override

from ..engine import (
    Algorithm,
    ArgumentError,
    Clock,
    Event,
    Stage,
    State,
    ThawlineError,
    Time,
    get_logger,
    is_sharded,
    nearest,
    register,
    shard_like,
)
from .arguments import check_in_range, check_time, flag, in_range

log = get_logger(__name__)
_HALF_LIFE = Time("0.1dur")
_EXAMPLE = "EMA(half_life='0.1dur')"
# Which EMA has its average in a model's weights, while an evaluation runs.
_EVALUATED: WeakKeyDictionary[nn.Module, EMA] = WeakKeyDictionary()


@torch.no_grad()
def ema_update(shadow: Sequence[Tensor], live: Sequence[Tensor], decay: float) -> None:
    """Move each average toward the live weights: ``shadow = decay * shadow + (1 - decay) * live``, in place.

    Computed as ``shadow + (1 - decay) * (live - shadow)``, so the average of a constant stays that constant to the bit.

    Args:
        shadow: The averages; wider than ``live`` where that is float16 or bfloat16.
        live: The weights, of the same shapes. Integer tensors, such as counters, are copied.
        decay: The share of the old average that stays, 0 to 1.

    Raises:
        ArgumentError: Sequences that do not match, or a decay outside 0 to 1.

    Source:
        Polyak, Juditsky, "Acceleration of stochastic approximation by averaging", SIAM J. Control Optim. 30 (1992);
        with exponential weights as in Tarvainen, Valpola, arXiv:1703.01780.

    Example:
        >>> average = [torch.tensor([1.0, 0.0]), torch.tensor([3]), torch.zeros(1)]
        >>> ema_update(average, [torch.tensor([0.0, 1.0]), torch.tensor([4]), torch.ones(1, dtype=torch.bfloat16)], decay=0.75)
        >>> average
        [tensor([0.7500, 0.2500]), tensor([4]), tensor([0.2500])]
        >>> ema_update(average, [torch.zeros(3)], decay=0.75)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: ema_update(live=) takes as many weights as averages, of the same shapes, got ...
    """
    check_in_range("ema_update(decay=)", decay, at_least=0, at_most=1, example="ema_update(shadow, live, decay=0.999)")
    if [each.shape for each in shadow] != [each.shape for each in live]:
        got = f"{len(shadow)} averages and {len(live)} weights, or other shapes"
        takes = "as many weights as averages, of the same shapes"
        raise ArgumentError("ema_update(live=)", got=got, takes=takes, example="ema_update(shadow, live, decay=0.999)")
    for shadows, lives in _alike(shadow, live):
        _update(shadows, lives, 1 - decay)


def ema_decay(elapsed: float, half_life: float) -> float:
    """Return the decay after which a weight ``elapsed`` ago counts half as much for each ``half_life``.

    Args:
        elapsed: Time since the last update, in the unit of ``half_life``.
        half_life: Above 0.

    Example:
        >>> ema_decay(1, half_life=1), ema_decay(2, half_life=1)
        (0.5, 0.25)
    """
    return float(0.5 ** (elapsed / half_life))


def _half_life(value: object) -> Time | None:
    """Return the time; a fraction can only have been meant as a decay.

    Example:
        >>> EMA(half_life=0.999)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: EMA(half_life=) takes ... got 0.999. Write: EMA(decay=0.999)
    """
    if value is None:
        return None
    example = f"EMA(decay={value!r})" if isinstance(value, float) and 0 < value < 1 else _EXAMPLE
    return check_time("EMA(half_life=)", value, example=example, or_none=True)


def _update_every(value: str | int | Time) -> Time:
    return check_time("EMA(update_every=)", value, example="EMA(update_every='1ba')")


def _warmup(value: bool | str | int | Time) -> bool | Time:
    if isinstance(value, bool):
        return value
    try:
        return check_time("EMA(warmup=)", value, example="EMA(warmup='100ba')")
    except ArgumentError as error:
        raise ArgumentError(
            "EMA(warmup=)", got=value, takes=f"True, False or {error.takes}", example="EMA(warmup='100ba')"
        ) from None


@register
@attrs.define(slots=False, eq=False)
class EMA(Algorithm):
    """Keeps an exponential moving average of the weights and evaluates with it.

    At the end of each batch whose step was taken, and where ``update_every`` has passed since the last update, the
    averages move by :func:`ema_update`. At EVAL_START they are copied into the model, at EVAL_END, or where the
    evaluation fails, the live weights come back bit for bit; parameters keep identity and storage. Training goes on
    with the live weights, and a fit leaves these in the model: :meth:`apply` with the model bakes the averages in.

    Averaged are, by name, the parameters that train or once trained, and the running statistics of their batch
    normalization; its integer counter is copied. What thaws or is attached later joins with its value from before its
    first step, which is what its average would be: until then it was constant. What freezes again stays, and
    its average goes on toward the frozen value. What never trains takes no memory. Averages of float16 and bfloat16 are
    float32.

    Of several in a list the first is evaluated, the others only track. A step that was skipped moves no average:
    an update that was due waits for the next step.

    Args:
        half_life: The time after which a weight counts half as much: ``"200ba"``, ``"5000sp"``, ``"1ep"``, ``"0.1dur"``. The decay
            of an update is ``0.5 ** (elapsed / half_life)``, elapsed since the last one. Without ``decay`` the default is
            ``"0.1dur"``. Epochs and shares of the duration need a loader with a length: they stand still in between.
        decay: Instead, the decay of every update, above 0 and below 1.
        update_every: The time between updates.
        warmup: True limits the decay of update t = 0, 1, … to ``(1 + t) / (10 + t)``, so that the first weights are
            forgotten fast. A time instead lets the memory grow from nothing to its full length over it: the decay
            is ``decay ** (1 / share)`` at that share of the time, so the half-life rises linearly.
        bias_correction: Leave the weights from before the first update out of the average: it is the mean of those after
            each update alone, weighted with ``(1 - decay) * decay ** age`` over the sum of these, as Adam corrects its
            moments. Otherwise they count as if they had always been there.

    Raises:
        ArgumentError: Both ``half_life`` and ``decay``, or an argument of the wrong type or out of range.

    Source:
        Polyak, Juditsky, SIAM J. Control Optim. 30 (1992); Tarvainen, Valpola, arXiv:1703.01780; the limit
        ``(1 + t) / (10 + t)`` is that of ``tf.train.ExponentialMovingAverage``.

    Example:
        >>> from thawline.engine import Trainer, on
        >>> from thawline.engine.testing import tiny_loader
        >>> model, weights = nn.Linear(4, 2), []
        >>> @on(Event.AFTER_STEP)
        ... def note_weight(state):
        ...     weights.append(state.model.weight.detach().clone())
        >>> averaging, first = EMA(decay=0.5), model.weight.detach().clone()
        >>> trainer = Trainer(loss_fn=nn.functional.cross_entropy, algorithms=[averaging, note_weight()])
        >>> result = trainer.fit(model, tiny_loader(), duration="2ba")
        >>> bool(torch.allclose(averaging.average["weight"], 0.25 * first + 0.25 * weights[0] + 0.5 * weights[1], atol=1e-6))
        True
        >>> EMA()
        EMA(half_life=Time('0.1dur'), decay=None, update_every=Time('1ba'), warmup=False, bias_correction=False)
        >>> EMA(half_life="1ep", decay=0.5)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: EMA(half_life=, decay=) takes only one of the two, got ...
    """

    stage: ClassVar[Stage] = Stage.WEIGHTS
    events = frozenset(
        {Event.BATCH_START, Event.BEFORE_FORWARD, Event.BATCH_END, Event.EVAL_START, Event.EVAL_END, Event.FIT_ABORT}
    )

    half_life: Time | None = attrs.field(default=None, converter=_half_life)
    decay: float | None = attrs.field(default=None, validator=in_range(above=0, below=1, example=0.999, or_none=True))
    update_every: Time = attrs.field(default=Time("1ba"), converter=_update_every)
    warmup: bool | Time = attrs.field(default=False, converter=_warmup)
    bias_correction: bool = attrs.field(default=False, validator=flag())

    updates: int = attrs.field(init=False, default=0, repr=False)
    """How often the averages moved."""
    _left: float = attrs.field(init=False, default=1.0, repr=False)  # what the weights before the first update count
    _shadow: dict[str, Tensor] = attrs.field(init=False, factory=dict, repr=False)
    _live: dict[str, Tensor] = attrs.field(init=False, factory=dict, repr=False)
    _groups: list[tuple[list[Tensor], list[Tensor]]] = attrs.field(init=False, factory=list, repr=False)
    _version: int | None = attrs.field(init=False, default=None, repr=False)
    _last: float | None = attrs.field(init=False, default=None, repr=False)
    _periods: int = attrs.field(init=False, default=0, repr=False)
    _backup: list[Tensor] | None = attrs.field(init=False, default=None, repr=False)
    _tracks_only: bool = attrs.field(init=False, default=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.decay is not None and self.half_life is not None:
            got = {"half_life": str(self.half_life), "decay": self.decay}
            raise ArgumentError("EMA(half_life=, decay=)", got=got, takes="only one of the two", example=_EXAMPLE)
        if self.decay is None and self.half_life is None:
            self.half_life = _HALF_LIFE

    @property
    def average(self) -> dict[str, Tensor]:
        """The averages by parameter and buffer name, not copied; empty before the first batch."""
        return dict(self._shadow)

    def decay_at(self, elapsed: float = 1.0, *, share: float = 1.0) -> float:
        """Return the decay of the next update.

        Args:
            elapsed: Time since the last update, in the unit of ``half_life``; a fixed decay does not ask.
            share: The share of a ``warmup=`` time that has passed, above 0, up to 1.

        Example:
            >>> EMA(half_life="2ba").decay_at(2.0), EMA(decay=0.75).decay_at(2.0), EMA(decay=0.5, warmup="9ba").decay_at(share=0.5)
            (0.5, 0.75, 0.25)
            >>> averaging = EMA(decay=0.5, warmup=True)
            >>> [averaging.decay_at() for averaging.updates in (0, 2, 99)]
            [0.1, 0.25, 0.5]
        """
        decay = ema_decay(elapsed, self.half_life.value) if self.half_life is not None else self.decay
        assert decay is not None, "one of half_life and decay is set"
        if self.warmup is True:
            return min(decay, (1 + self.updates) / (10 + self.updates))
        return float(decay ** (1 / share))

    @overload
    def apply(self, event: Event, state: State) -> None: ...

    @overload
    def apply(self, event: nn.Module) -> None: ...

    @override
    def apply(self, event: Event | nn.Module, state: State | None = None) -> None:
        """Act at an event; or, called with a model alone, bake the averages into it: ``ema.apply(model)``.

        Args:
            event: The event; or the model that was fitted, or another one with its parameter names.
            state: The state; left out with a model.

        Raises:
            ArgumentError: The model lacks what was averaged, or has it in another shape. Nothing was written.
            ThawlineError: Nothing was averaged yet.

        Example:
            >>> from thawline.engine import ParameterLedger
            >>> model, averaging = nn.Linear(1, 1, bias=False), EMA(decay=0.5)
            >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters())))
            >>> weight = nn.init.ones_(model.weight)
            >>> averaging.apply(Event.BATCH_START, state)
            >>> state.clock, weight = Clock(batch=1), nn.init.zeros_(model.weight)
            >>> averaging.apply(Event.BATCH_END, state)
            >>> averaging.apply(Event.EVAL_START, state)
            >>> weight.item()
            0.5
            >>> averaging.apply(Event.EVAL_END, state)
            >>> weight.item()
            0.0
            >>> averaging.apply(model)
            >>> weight.item()
            0.5
        """
        if isinstance(event, nn.Module):
            self._bake(event)
        elif state is None:
            raise ArgumentError(
                "EMA.apply(model)", got=event, takes="the model that was fitted", example="ema.apply(model)"
            )
        elif event is Event.EVAL_START:
            self._swap_in(state)
        elif event is Event.EVAL_END or event is Event.FIT_ABORT:
            self._swap_out()
        else:
            self._follow(state)
            if event is Event.BATCH_END and not state.step_skipped:
                self._step(state.clock)

    @override
    def close(self) -> None:
        self._swap_out()
        self._live, self._groups, self._version = {}, [], None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "shadow": dict(self._shadow), "updates": self.updates, "last": self._last, "periods": self._periods,
            "left": self._left,
        }  # fmt: skip

    @override
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self._shadow = {name: each.detach().clone() for name, each in saved["shadow"].items()}
        self.updates, self._last, self._periods = saved["updates"], saved["last"], saved["periods"]
        self._left = saved["left"]
        self._version = None

    @override
    def evaluated_weights(self) -> Mapping[str, Tensor]:
        return self.average

    # -- averaging ---------------------------------------------------------------------------------------------

    def _follow(self, state: State) -> None:
        """Let what began to train join, before its first step."""
        if self._backup is not None:  # an evaluation that was broken off in a loop without FIT_ABORT
            self._swap_out()
        if state.ledger.version == self._version:
            return
        if self._last is None:
            self._last, self._periods = self._now(state.clock), self.update_every.count(state.clock)
        self._live = _tracked(state, self._shadow)
        self._shadow = {name: _joined(self._shadow.get(name), live) for name, live in self._live.items()}
        self._groups = _alike(list(self._shadow.values()), list(self._live.values()))
        self._version = state.ledger.version

    def _now(self, clock: Clock) -> float:
        return self.half_life.elapsed(clock) if self.half_life is not None else 0.0

    def _step(self, clock: Clock) -> None:
        """Move the averages where an update is due.

        Example:
            >>> averaging = EMA(half_life="2ba", update_every="2ba", bias_correction=True)
            >>> average, live = torch.tensor([9.0]), torch.tensor([1.0])
            >>> averaging._groups, averaging._last = [([average], [live])], 0.0
            >>> averaging._step(Clock(batch=2))
            >>> live = live.fill_(4.0)
            >>> averaging._step(Clock(batch=3))  # not due
            >>> averaging._step(Clock(batch=4))
            >>> average, averaging.updates  # (0.25 * 1 + 0.5 * 4) / (0.25 + 0.5)
            (tensor([3.]), 2)
        """
        periods = self.update_every.count(clock)
        if periods <= self._periods:
            self._periods = periods  # smaller where a share of a duration was resumed with a longer one
            return
        now = self._now(clock)
        elapsed = now - (now if self._last is None else self._last)
        if self.half_life is not None and elapsed <= 0:
            self._last = now
            return
        decay = self.decay_at(elapsed, share=self._share(clock))
        self._left *= decay
        share = (1 - decay) / (1 - self._left) if self.bias_correction else 1 - decay
        with torch.no_grad():
            for shadows, lives in self._groups:
                _update(shadows, lives, share)
        self._last, self._periods = now, periods
        self.updates += 1

    def _share(self, clock: Clock) -> float:
        """Return the share of a warmup's time that has passed, never 0.

        Example:
            >>> [EMA(warmup="10ba")._share(Clock(batch=batch)) for batch in (0, 5, 20)], EMA()._share(Clock())
            ([1e-09, 0.5, 1.0], 1.0)
        """
        if not isinstance(self.warmup, Time):
            return 1.0
        # A unit that stands still, such as the epochs of a loader without a length, is at 0 for a while.
        return max(min(1.0, self.warmup.elapsed(clock) / self.warmup.value), 1e-9)

    # -- evaluating --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _swap_in(self, state: State) -> None:
        owner = _EVALUATED.get(state.model)
        if owner is not None:  # this one: EVAL_START came twice, and what lies aside is still the live weights
            if owner is not self and not self._tracks_only:
                self._tracks_only = True
                log.info("tracks only: the first EMA in the list is evaluated", owner=self.owner)
            return
        self._follow(state)
        # Aside first, then in: at no moment could an interrupt lose a live weight.
        self._backup = [each.clone() for each in self._live.values()]
        _EVALUATED[state.model] = self
        for name, live in self._live.items():
            live.copy_(self._shadow[name])

    @torch.no_grad()
    def _swap_out(self) -> None:
        if self._backup is None:
            return
        for live, value in zip(self._live.values(), self._backup, strict=True):
            live.copy_(value)
        self._backup = None
        for model in [model for model, owner in _EVALUATED.items() if owner is self]:
            del _EVALUATED[model]

    @torch.no_grad()
    def _bake(self, model: nn.Module) -> None:
        """Copy the averages into a model.

        Example:
            >>> averaging = EMA()
            >>> averaging.apply(nn.Linear(2, 2))
            Traceback (most recent call last):
            thawline.engine.errors.ThawlineError: EMA.apply(model): nothing was averaged yet. ...
            >>> averaging._shadow = {"weight": torch.ones(2, 2)}
            >>> averaging.apply(nn.Sequential(nn.Linear(2, 2)))
            Traceback (most recent call last):
            thawline.engine.errors.ArgumentError: ... got one without 'weight'; nearest: '0.weight'. Write: ema.apply(model)
        """
        if not self._shadow:
            raise ThawlineError(
                "EMA.apply(model): nothing was averaged yet. Write: trainer.fit(model, …), then ema.apply(model)"
            )
        targets = _tensors(model)
        for name, average in self._shadow.items():
            found = targets.get(name)
            if found is None or found.shape != average.shape:
                got = f"one without {name!r}; nearest: {nearest(name, targets)}"
                if found is not None:
                    got = f"one where {name!r} has shape {tuple(found.shape)} instead of {tuple(average.shape)}"
                takes = "the model that was fitted, or one with its parameter names and shapes"
                raise ArgumentError("EMA.apply(model)", got=_Words(got), takes=takes, example="ema.apply(model)")
        for name, average in self._shadow.items():
            targets[name].copy_(average)


class _Words(str):
    """Text that an error shows without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def _tracked(state: State, shadow: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the live tensors to average: what trains or trained, and the statistics of its normalization.

    Example:
        >>> from thawline.engine import ParameterLedger
        >>> model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False))
        >>> state = State(model, ParameterLedger(model, torch.optim.SGD(model.parameters())))
        >>> state.ledger.freeze(["0.*", "1.bias"], owner="me")
        >>> list(_tracked(state, {}))
        ['1.weight', '2.running_mean', '2.running_var', '2.num_batches_tracked']
        >>> list(_tracked(state, {"0.bias": torch.zeros(2), "0.running_var": torch.ones(2)}))
        ['0.bias', '1.weight', '0.running_var', '2.running_mean', '2.running_var', '2.num_batches_tracked']
    """
    trainable, parameters = state.ledger.trainable, state.ledger.parameters
    tracked: dict[str, Tensor] = {
        name: each for name, each in parameters.items() if name in trainable or name in shadow
    }
    training = {id(parameters[name]) for name in trainable}
    for path, module in state.model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._NormBase) or module.running_mean is None:
            continue
        own = list(module.parameters(recurse=False))
        trains = not own or any(id(each) in training for each in own)
        buffers = dict(module.named_buffers(prefix=path, recurse=False))
        tracked.update({name: each for name, each in buffers.items() if trains or name in shadow})
    return tracked


def _joined(average: Tensor | None, live: Tensor) -> Tensor:
    """Return the average of ``live``: the one there is, on its device, or a new one that starts at its value.

    Example:
        >>> _joined(None, torch.ones(2, dtype=torch.float16)), _joined(torch.zeros(2), torch.ones(2))
        (tensor([1., 1.]), tensor([0., 0.]))
        >>> _joined(torch.zeros(3), torch.ones(2, dtype=torch.int16))
        tensor([1, 1], dtype=torch.int16)
    """
    dtype = torch.float32 if live.is_floating_point() and live.dtype.itemsize < 4 else live.dtype
    if average is None or average.shape != live.shape:
        return live.detach().to(dtype, copy=True)
    return shard_like(average, live).to(live.device, dtype)


def _alike(shadow: Sequence[Tensor], live: Sequence[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Return the pairs in lists of one device and dtype each, as the foreach kernels want them."""
    groups: dict[object, tuple[list[Tensor], list[Tensor]]] = {}
    for average, weight in zip(shadow, live, strict=True):
        shadows, lives = groups.setdefault((weight.device, average.dtype, weight.dtype, is_sharded(weight)), ([], []))
        shadows.append(average)
        lives.append(weight)
    return list(groups.values())


def _update(shadows: list[Tensor], lives: list[Tensor], weight: float) -> None:
    """Average one list of a kind; counters are copied."""
    dtype = shadows[0].dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        torch._foreach_copy_(shadows, lives)  # pyright: ignore[reportPrivateImportUsage]
    elif dtype == lives[0].dtype:
        torch._foreach_lerp_(shadows, lives, weight)  # pyright: ignore[reportPrivateImportUsage]
    else:  # one at a time: widening all at once would cost a second copy of the model
        for average, live in zip(shadows, lives, strict=True):
            average.lerp_(live.to(dtype), weight)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors
