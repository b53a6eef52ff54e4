"""Presets: the common ways to fine-tune, each a function that returns a list of algorithms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from ..engine import Algorithm, ArgumentError, LayerMap, Time
from .arguments import check_in_range, check_whole
from .layer_thaw import LayerThaw
from .layerwise_lr import LayerwiseLR
from .lora import LoRAInject
from .phases import Phase, Plateau
from .thaw_schedule import ThawSchedule
from .train_only import TrainOnly


def head_only(*, lr: float | None = None) -> list[Algorithm]:
    """Train the head alone: a linear probe.

    Args:
        lr: Base learning rate of the head; None is the optimizer's.

    Raises:
        ArgumentError: ``lr`` is not above 0.

    Example:
        >>> import torch
        >>> from thawline.engine import Trainer
        >>> from thawline.engine.testing import tiny_loader, tiny_models
        >>> trainer = Trainer(optimizer=lambda each: torch.optim.AdamW(each, lr=1.0), algorithms=head_only(lr=3.0))
        >>> plan = trainer.plan(tiny_models()["residual"](), tiny_loader(), duration="1ep")
        >>> plan.samples[0].rates
        {'head': 3.0}
        >>> head_only(lr=0.0)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: head_only(lr=) takes a number above 0, or None, got 0.0. Write: head_only(lr=1e-3)
    """
    return [TrainOnly("head", lr=_rates("head_only", lr=("head", lr)))]


def lora(
    *,
    rank: int = 8,
    alpha: float = 16,
    target: str | Sequence[str] = "auto",
    dropout: float = 0.0,
    lr_head: float | None = None,
    lr_lora: float | None = None,
) -> list[Algorithm]:
    """Train low-rank adapters and the head, each at a rate of its own.

    A language model's pre-trained head trains only where ``lr_head`` is given; see :class:`LoRAInject`.

    Args:
        rank: Rank of the adapters.
        alpha: Their scale is alpha / rank.
        target: As for :class:`LoRAInject`.
        dropout: On the adapters' input.
        lr_head: Base rate of the head.
        lr_lora: Base rate of the adapters.

    Raises:
        ArgumentError: An argument of the wrong type or out of range.

    Example:
        >>> import torch
        >>> from thawline.engine import Trainer
        >>> from thawline.engine.testing import tiny_loader, tiny_models
        >>> trainer = Trainer(optimizer=lambda each: torch.optim.AdamW(each, lr=1.0), algorithms=lora(lr_head=3.0, lr_lora=0.5))
        >>> plan = trainer.plan(tiny_models()["residual"](), tiny_loader(), duration="1ep")
        >>> plan.samples[0].rates
        {'stem': 0.5, 'blocks[0]': 0.5, 'blocks[1]': 0.5, 'blocks[2]': 0.5, 'head': 3.0}
        >>> [type(each).__name__ for each in lora()], [type(each).__name__ for each in lora(lr_head=3.0)]
        (['LoRAInject'], ['LoRAInject', 'LayerwiseLR'])
        >>> lora()[0].rank, lora()[0].train_head, lora(lr_head=3.0)[0].train_head
        (8, 'auto', True)
        >>> lora(lr_lora=-1.0)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: lora(lr_lora=) takes a number above 0, or None, got -1.0. Write: lora(lr_lora=1e-3)
    """
    _rates("lora", lr_head=("head", lr_head), lr_lora=("*", lr_lora))
    inject = LoRAInject(
        rank=rank,
        alpha=alpha,
        target=target,
        dropout=dropout,
        lr=lr_lora,
        train_head="auto" if lr_head is None else True,
    )
    return [inject] if lr_head is None else [inject, LayerwiseLR(decay=1.0, lr_head=lr_head)]


def partial(
    *, last: int, also: Sequence[str] = (), lr_trunk: float | None = None, lr_head: float | None = None
) -> list[Algorithm]:
    """Train the last blocks and the head.

    Args:
        last: How many blocks beside the head train; all where the model has fewer.
        also: Further selectors, such as a named part ``"structure_module"``.
        lr_trunk: Base rate of the blocks and of ``also``.
        lr_head: Base rate of the head.

    Raises:
        ArgumentError: An argument of the wrong type or out of range.

    Example:
        >>> import torch
        >>> from thawline.engine import Trainer
        >>> from thawline.engine.testing import tiny_loader, tiny_models
        >>> trainer = Trainer(optimizer=lambda each: torch.optim.AdamW(each, lr=1.0), algorithms=partial(last=2, lr_trunk=0.1))
        >>> plan = trainer.plan(tiny_models()["residual"](), tiny_loader(), duration="1ep")
        >>> plan.samples[0].rates
        {'blocks[1]': 0.1, 'blocks[2]': 0.1, 'head': 1.0}
        >>> partial(last=1, also=["stem"], lr_trunk=0.1, lr_head=3.0)
        [TrainOnly(select=('blocks[-1:]', 'head', 'stem'), lr={'blocks[-1:]': 0.1, 'head': 3.0, 'stem': 0.1})]
        >>> partial(last=1, also=["stem"])
        [TrainOnly(select=('blocks[-1:]', 'head', 'stem'), lr={})]
        >>> partial(last=0)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: partial(last=) takes a whole number, 1 or above, got 0. Write: partial(last=2)
        >>> partial(last=2, also="stem")
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: partial(also=) takes a list, got 'stem'. Write: partial(last=2, also=['structure_module'])
    """
    check_whole("partial(last=)", last, at_least=1, example="partial(last=2)")
    if isinstance(also, str) or not isinstance(also, Sequence) or not all(isinstance(each, str) for each in also):
        raise ArgumentError(
            "partial(also=)", got=also, takes="a list", example="partial(last=2, also=['structure_module'])"
        )
    trunk = f"blocks[-{last}:]"
    rates = _rates("partial", "last=2, ", lr_trunk=(trunk, lr_trunk), lr_head=("head", lr_head))
    if lr_trunk is not None:
        rates.update(dict.fromkeys(also, lr_trunk))
    return [TrainOnly([trunk, "head", *also], lr=rates)]


def full(*, lr_head: float | None = None, layer_decay: float | None = 0.9) -> list[Algorithm]:
    """Train everything, with learning rates that decay from the head to the input.

    Args:
        lr_head: Base rate of the head.
        layer_decay: Factor from a layer to the one below it; None for none.

    Raises:
        ArgumentError: An argument of the wrong type or out of range.

    Example:
        >>> import torch
        >>> from thawline.engine import Trainer
        >>> from thawline.engine.testing import tiny_loader, tiny_models
        >>> trainer = Trainer(optimizer=lambda each: torch.optim.AdamW(each, lr=1.0), algorithms=full(layer_decay=0.5))
        >>> plan = trainer.plan(tiny_models()["residual"](), tiny_loader(), duration="1ep")
        >>> plan.samples[0].rates
        {'stem': 0.0625, 'blocks[0]': 0.125, 'blocks[1]': 0.25, 'blocks[2]': 0.5, 'head': 1.0}
        >>> full(lr_head=3.0, layer_decay=None)
        [LayerwiseLR(decay=1.0, lr_head=3.0, convention='timm', lowest=None)]
        >>> full(layer_decay=1.5)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: full(layer_decay=) takes a number above 0 and 1 or below, or None, got 1.5. Write: full(layer_decay=0.9)
        >>> full(lr_head=0.0)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: full(lr_head=) takes a number above 0, ... Write: full(lr_head=1e-3)
    """
    _rates("full", lr_head=("head", lr_head))
    if layer_decay is not None:
        check_in_range(
            "full(layer_decay=)", layer_decay, above=0, at_most=1, example="full(layer_decay=0.9)", or_none=True
        )
    return [LayerwiseLR(decay=1.0 if layer_decay is None else layer_decay, lr_head=lr_head)]


def progressive(
    *,
    every: Time | str | int = 1,
    lr_scale: float = 0.5,
    limit: int | None = None,
    warmup: Time | str | int | None = None,
    order: Literal["top", "bottom"] = "top",
) -> list[Algorithm]:
    """Train the head first, then one block more from the end at each interval.

    Args:
        every: The interval.
        lr_scale: The k-th released block trains at ``lr * lr_scale ** k``.
        limit: How many layers are released at most.
        warmup: Of what is released.
        order: ``"top"`` or ``"bottom"``.

    Raises:
        ArgumentError: An argument of the wrong type or out of range.

    Source: Howard and Ruder, ULMFiT, arXiv:1801.06146.

    Example:
        >>> from thawline.engine import Trainer
        >>> from thawline.engine.testing import tiny_loader, tiny_models
        >>> trainer = Trainer(algorithms=progressive(every=2))
        >>> plan = trainer.plan(tiny_models()["residual"](), tiny_loader(), duration="6ep")
        >>> [(span.start.epoch, *span.layers) for span in plan.spans]
        [(0, 'head'), (2, 'blocks[2]', 'head'), (4, 'blocks[1]', 'blocks[2]', 'head')]
        >>> progressive(limit=2, warmup="9ba", order="bottom")
        [LayerThaw(every=Time('1ep'), start='head', limit=2, lr_scale=0.5, order='bottom', warmup=Time('9ba'), moments='drop', stem=True)]
    """
    return [LayerThaw(every, limit=limit, lr_scale=lr_scale, order=order, warmup=warmup)]


def ulmfit(
    *, every: Time | str | int = 1, lr_scale: float = 1 / 2.6, warmup: Time | str | int | None = None
) -> list[Algorithm]:
    """Unfreeze gradually from the head, each layer at 1 / 2.6 of the rate of the one above it.

    The slanted triangular rate that goes with it is the Trainer's:
    ``schedule=warmup(0.1, then=linear(end=1 / 32), start=1 / 32)``.

    Args:
        every: The interval between two layers.
        lr_scale: Factor from a layer to the one below it.
        warmup: Of what is released.

    Raises:
        ArgumentError: An argument of the wrong type or out of range.

    Source: Howard and Ruder, ULMFiT, arXiv:1801.06146, sections 3.2 and 3.3.

    Example:
        >>> from thawline.engine import Trainer
        >>> from thawline.engine.testing import tiny_loader, tiny_models
        >>> trainer = Trainer(algorithms=ulmfit())
        >>> plan = trainer.plan(tiny_models()["residual"](), tiny_loader(), duration="3ep")
        >>> [(span.start.epoch, *span.layers) for span in plan.spans]
        [(0, 'head'), (1, 'blocks[2]', 'head'), (2, 'blocks[1]', 'blocks[2]', 'head')]
        >>> {layer: round(rate, 8) for layer, rate in plan.samples[-1].rates.items()}  # of 1e-4
        {'blocks[1]': 1.479e-05, 'blocks[2]': 3.846e-05, 'head': 0.0001}
    """
    return [LayerThaw(every, lr_scale=lr_scale, warmup=warmup)]


def fine_tune(
    freeze_epochs: Time | str | int = 1, *, base_lr: float | None = None, lr_mult: float = 100
) -> list[Algorithm]:
    """Train the head, then everything, at rates from ``lr / lr_mult`` beside the input to ``lr`` at the head.

    The two one-cycle rates that go with it, the second half as high, are the Trainer's:
    ``schedule=join([warmup(0.99, start=1 / 25), warmup(0.3, then=cosine(start=0.5), start=0.1)], ["1ep"])``.

    Args:
        freeze_epochs: How long the head trains alone.
        base_lr: Base rate of all; None is the optimizer's. fastai's is 2e-3.
        lr_mult: Ratio of the head's rate to that of the layer beside the input, 1 or above.

    Raises:
        ArgumentError: An argument of the wrong type or out of range.

    Source: Howard and Gugger, fastai, ``Learner.fine_tune``.

    Example:
        >>> from thawline.engine import Trainer
        >>> from thawline.engine.testing import tiny_loader, tiny_models
        >>> trainer = Trainer(algorithms=fine_tune(freeze_epochs=2, base_lr=2e-3))
        >>> plan = trainer.plan(tiny_models()["residual"](), tiny_loader(), duration="4ep")
        >>> [(span.start.epoch, *span.layers) for span in plan.spans]
        [(0, 'head'), (2, 'stem', 'blocks[0]', 'blocks[1]', 'blocks[2]', 'head')]
        >>> {layer: round(rate, 6) for layer, rate in plan.samples[-1].rates.items()}
        {'stem': 2e-05, 'blocks[0]': 6.3e-05, 'blocks[1]': 0.0002, 'blocks[2]': 0.000632, 'head': 0.002}
        >>> len(fine_tune()), fine_tune(lr_mult=1)[1].lowest
        (2, 1.0)
        >>> fine_tune(lr_mult=0.5)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: fine_tune(lr_mult=) takes a number, 1 or above, got 0.5. Write: fine_tune(lr_mult=100)
    """
    check_in_range("fine_tune(lr_mult=)", lr_mult, at_least=1, example="fine_tune(lr_mult=100)")
    rates = _rates("fine_tune", base_lr=("*", base_lr))
    thaw = LayerThaw(freeze_epochs, order="together", lr_scale=1.0)
    return [thaw, LayerwiseLR(lowest=1 / lr_mult), *([TrainOnly("*", lr=rates)] if rates else [])]


def lp_ft(probe: Time | str | int = "0.5dur", *, lr_scale: float = 0.1) -> list[Algorithm]:
    """Train a linear probe, then fine-tune everything: what is pre-trained meets a head that fits already.

    Args:
        probe: How long the head trains alone.
        lr_scale: Of the rest, when it joins; the head keeps its rate.

    Raises:
        ArgumentError: An argument of the wrong type or out of range.

    Source: Kumar et al., Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution,
    arXiv:2202.10054.

    Example:
        >>> from thawline.engine import Trainer
        >>> from thawline.engine.testing import tiny_loader, tiny_models
        >>> trainer = Trainer(algorithms=lp_ft("2ep", lr_scale=0.01))
        >>> plan = trainer.plan(tiny_models()["residual"](), tiny_loader(), duration="4ep")
        >>> [(span.start.epoch, *span.layers) for span in plan.spans]
        [(0, 'head'), (2, 'stem', 'blocks[0]', 'blocks[1]', 'blocks[2]', 'head')]
        >>> round(plan.samples[-1].rates["stem"] / plan.samples[-1].rates["head"], 6)
        0.01
    """
    return [LayerThaw(probe, order="together", lr_scale=lr_scale)]


def chain_thaw(model: nn.Module | LayerMap, until: Time | Plateau | str | int = 1) -> list[Algorithm]:
    """Train the head, then each layer by itself from the input to the head, then everything to the end of the fit.

    Args:
        model: The model, or its layers: there is a phase for each of them.
        until: How long each phase is, or a :class:`Plateau` that ends it, such as ``Plateau("eval/loss", patience=2)``.

    Raises:
        ArgumentError: An argument of the wrong type or out of range.
        LayerError: The model cannot be split into layers.

    Source: Felbo et al., Using Millions of Emoji Occurrences to Learn Any-Domain Representations, arXiv:1708.00524.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [phase.thaw for phase in chain_thaw(model, "2ep")[0].phases]
        [('head',), ('blocks[0]',), ('blocks[1]',), ('head', 'blocks[0]')]
        >>> [phase.freeze for phase in chain_thaw(LayerMap(model), "2ep")[0].phases]
        [(), ('head',), ('blocks[0]',), ()]
        >>> [(phase.thaw, phase.until) for phase in chain_thaw(nn.Linear(4, 2))[0].phases]
        [(('head',), None)]
        >>> chain_thaw("2ep")
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: chain_thaw(model=) takes a torch.nn.Module or its LayerMap, got '2ep'. Write: chain_thaw(model, until=1)
    """
    if not isinstance(model, (nn.Module, LayerMap)):
        takes = "a torch.nn.Module or its LayerMap"
        raise ArgumentError("chain_thaw(model=)", got=model, takes=takes, example="chain_thaw(model, until=1)")
    layers = model if isinstance(model, LayerMap) else LayerMap(model)
    below = [layer.name for layer in layers if layer.name != "head"]
    phases, last = [Phase(thaw="head", until=until)], "head"
    for name in below:
        phases.append(Phase(thaw=name, freeze=last, until=until))
        last = name
    rest = ["head", *below[:-1]] if below else ["head"]
    return [ThawSchedule([*phases, Phase(thaw=rest)] if below else [Phase(thaw=rest)])]


def _rates(preset: str, before: str = "", /, **rates: tuple[str, float | None]) -> dict[str, float]:
    """Check each argument, and return selector to rate where there is one.

    Example:
        >>> _rates("full", lr_head=("head", 3.0), lr_trunk=("blocks", None))
        {'head': 3.0}
        >>> _rates("partial", "last=2, ", lr_head=("head", -1.0))
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: partial(lr_head=) takes a number above 0, ... got -1.0. Write: partial(last=2, lr_head=1e-3)
    """
    found: dict[str, float] = {}
    for name, (select, lr) in rates.items():
        if lr is not None:
            argument, example = f"{preset}({name}=)", f"{preset}({before}{name}=1e-3)"
            found[select] = check_in_range(argument, lr, above=0, example=example, or_none=True)
    return found
