"""One pass over a loader in eval mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .data import ResumableLoader, batch_size_of, to_device
from .distributed import Team
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
    team: Team | None = None,
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
        team: The ranks, each with its share of every batch; the values are then those over all of them.

    Raises:
        DataError: The loader yields nothing, or batches without the targets that ``loss_fn`` or a metric needs.
    """
    meters = Meters(metrics, team=team)
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
                    loss = _loss(forward, outputs, batch, needed=not metrics)
                value, weight = None if loss is None else float(loss), forward.weight(model, batch)
                if value is not None and weight and forward.criterion.reduction == "sum":
                    value /= weight
                samples = fetched.samples if team is not None else fetched.samples or batch_size_of(batch)
                if not samples and team is not None:  # of a batch with fewer samples than ranks, this one has none
                    value, weight = None, 0.0
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


def _loss(forward: Forward, outputs: object, batch: object, *, needed: bool) -> Tensor | None:
    """Return the loss where the data carry what it needs; data without labels are evaluated by metrics alone, if any."""
    if forward.loss_fn is not None:
        try:
            return forward.loss(outputs, batch)
        except DataError:
            if needed or targets_of(batch) is not None:
                raise
            return None
    if isinstance(outputs, Tensor):
        return forward.loss(outputs, batch) if outputs.numel() == 1 else None
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return None if loss is None else forward.loss(outputs, batch)
