"""One pass over a loader in eval mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from .data import ResumableLoader, batch_size_of, to_device
from .errors import DataError
from .events import Event
from .forward import Forward, predictions, targets_of
from .meters import Meters, Metric
from .precision import Precision


def evaluate(
    model: nn.Module,
    loader: ResumableLoader,
    *,
    forward: Forward,
    metrics: Mapping[str, Metric],
    precision: Precision,
    device: torch.device,
    emit: Callable[..., None] | None = None,
) -> dict[str, float]:
    """Return loss and metrics over ``loader``, each under ``"eval/"``; the model's mode is put back.

    Args:
        model: The model; moved nowhere.
        loader: The evaluation data, always in the same order.
        forward: How a batch goes through the model.
        metrics: Name to metric.
        precision: Autocast of the forward pass.
        device: Where batches go.
        emit: Called as ``emit(event, microbatch=…, outputs=…, loss=…)`` around each batch.

    Raises:
        DataError: The loader yields nothing.
    """
    meters = Meters(metrics)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    seen = False
    try:
        with torch.no_grad():
            for fetched in loader.batches(0):
                seen = True
                batch = to_device(fetched.batch, device)
                if emit is not None:
                    emit(Event.EVAL_BATCH_START, microbatch=batch, outputs=None, loss=None)
                with precision.autocast():
                    outputs = forward.outputs(model, batch)
                    loss = forward.loss(outputs, batch) if _has_loss(forward, outputs, batch) else None
                value = None if loss is None else float(loss)
                weight = forward.weight(model, batch)
                samples = fetched.samples or batch_size_of(batch)
                meters.update(predictions(outputs), targets_of(batch), loss=value, weight=weight, samples=samples)
                if emit is not None:
                    emit(Event.EVAL_BATCH_END, microbatch=batch, outputs=outputs, loss=loss)
    finally:
        for module, training in modes:
            module.training = training
    if not seen:
        raise DataError(
            "the evaluation loader yields no batch. Write: trainer.fit(model, train_loader, eval_loader=None, …) for no "
            "evaluation, or give a loader with data (drop_last=True drops a single short batch)."
        )
    return meters.compute()


def _has_loss(forward: Forward, outputs: object, batch: object) -> bool:
    """Return whether evaluation data carry what a loss needs; data without labels are evaluated by metrics alone."""
    if forward.loss_fn is not None:
        return targets_of(batch) is not None
    if isinstance(outputs, torch.Tensor):
        return outputs.numel() == 1
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return loss is not None
