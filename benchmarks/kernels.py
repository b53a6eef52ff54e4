"""What is done to all weights at once: averaging and clipping, beside torch's and timm's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from thawline.algorithms import EMA
from thawline.algorithms.grad_clip import clip_gradients
from thawline.engine import Engine, Event, ParameterLedger, State

from .measure import Row, race, ratio, told
from .peers import installed, timm_average

SIZES = ((75, 266_667), (1203, 3325))
_DECAY = 0.99


def _model(count: int, size: int, device: torch.device) -> nn.ParameterList:
    return nn.ParameterList(torch.randn(size, device=device) for _ in range(count))


def by_algorithm(model: nn.Module) -> Callable[[], None]:
    """Return a function that lets EMA see the end of one more batch."""
    state = State(model, ParameterLedger(model, partial(torch.optim.SGD, lr=0.1)), duration="1ep")
    engine = Engine([EMA(decay=_DECAY)], state)
    engine.emit(Event.BATCH_START)

    def update() -> None:
        state.tick(1)
        engine.emit(Event.BATCH_END)

    return update


def averaging(rounds: int, device: torch.device) -> list[Row]:
    """EMA update against a bare foreach lerp."""
    rows: list[Row] = []
    for (count, size), bar in zip(SIZES, (1.10, 1.25), strict=True):
        model = _model(count, size, device)
        live: list[torch.Tensor] = list(model.parameters())
        shadow = [each.detach().clone() for each in live]
        theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(_DECAY))  # type: ignore[no-untyped-call]  # torch's

        def bare(shadow: list[torch.Tensor] = shadow, live: list[torch.Tensor] = live) -> None:
            with torch.no_grad():
                torch._foreach_lerp_(shadow, live, 1 - _DECAY)

        contestants: dict[str, Callable[[], None]] = {
            "lerp": bare,
            "EMA": by_algorithm(model),
            "AveragedModel": partial(theirs.update_parameters, model),
        }
        if installed("timm"):
            contestants["timm"] = timm_average(model, _DECAY)
        timings = race(contestants, rounds * 3, device=device)
        text = f"{count * size / 1e6:.0f}M in {count:,} tensors, {{}} / lerp"
        rows += [
            ratio(f"EMA update, {text.format(name)}", timings, name, "lerp", bar if name == "EMA" else None, note=told(timings, "ms"))
            for name in timings
            if name != "lerp"
        ]  # fmt: skip
    return rows


def clipping(rounds: int, device: torch.device) -> list[Row]:
    """Clipping when nothing is clipped, against torch's."""
    rows: list[Row] = []
    for count, size in SIZES:
        parameters = list(_model(count, size, device).parameters())
        for each in parameters:
            each.grad = torch.randn_like(each)
        contestants: dict[str, Callable[[], None]] = {
            "torch": partial(_clip, torch.nn.utils.clip_grad_norm_, parameters, 1e9),
            "clip_gradients": partial(_clip, clip_gradients, parameters, max_norm=1e9),
        }
        timings = race(contestants, rounds * 3, device=device)
        figure = f"clipping, nothing clipped, {count * size / 1e6:.0f}M in {count:,} tensors, / torch"
        rows.append(ratio(figure, timings, "clip_gradients", "torch", 0.60, note=told(timings, "ms")))
    return rows


def _clip(function: Callable[..., object], *args: object, **kwargs: object) -> None:
    function(*args, **kwargs)
