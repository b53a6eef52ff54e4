"""The check of the conformance kit that holds gradients against finite differences of the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .events import Event
from .forward import Forward
from .neighbor import Before
from .promises import check, fail, unless_alone
from .randomness import Randomness, derive_seed
from .rehearsal import Rehearsal, copied, cut, in_float64
from .state import State
from .unaided import buffers_of, is_hooked, outputs_with

STEP = 1e-7
TOLERANCE = 1e-6


@check
def has_true_gradients(rehearsal: Rehearsal) -> None:
    """In float64 the gradients of the loss are its derivative along a random direction, by central differences of the loss itself."""
    unless_alone(rehearsal, _differentiate)


def _differentiate(rehearsal: Rehearsal) -> None:
    loss_fn = in_float64(rehearsal.loss_fn)
    forward = Forward(loss_fn=loss_fn)
    seen: dict[str, Any] = {}

    def loss_at(state: State, moved: dict[str, Tensor]) -> Tensor:
        with Randomness().kept():
            Randomness().restore(seen["generators"])
            tensors = copied(seen["buffers"]) | moved
            outputs = outputs_with(state.model, tensors, state.microbatch, has_loss=loss_fn is not None)
        return forward.loss(outputs, state.microbatch)

    def compare(event: Event, state: State) -> None:
        if event is Event.BEFORE_FORWARD:
            seen.update(generators=Randomness().states(), buffers=buffers_of(state.model))
        if event is not Event.AFTER_FORWARD or any(map(is_hooked, state.model.modules())):
            return  # a hook may keep what it has computed
        trained = {name: state.ledger.parameters[name] for name in state.ledger.trainable}
        loss = forward.loss(state.outputs, state.microbatch)
        if not trained or not loss.requires_grad:
            return
        found = torch.autograd.grad(loss, list(trained.values()), retain_graph=True, allow_unused=True)
        generator = torch.Generator().manual_seed(derive_seed(rehearsal.seed, "direction", state.clock.batch))
        slope, ways = 0.0, {}
        for (name, each), gradient in zip(trained.items(), found, strict=True):
            ways[name] = torch.randn(each.shape, generator=generator, dtype=torch.float64)
            slope += 0.0 if gradient is None else float((gradient * ways[name]).sum())
        with torch.no_grad():
            ahead, behind = (
                float(loss_at(state, {name: each + sign * STEP * ways[name] for name, each in trained.items()}))
                for sign in (1, -1)
            )
        must = (ahead - behind) / (2 * STEP)
        if abs(slope - must) > TOLERANCE * max(1.0, abs(must), abs(ahead)):
            fail(
                f"{rehearsal.name}: in batch {state.clock.batch} the gradients say that the loss changes by {slope:.6g} along a random "
                f"direction of what trains, and it changes by {must:.6g}. Where a module or function computes its own gradient, hold "
                "it against torch.autograd.gradcheck; and the forward pass must follow from weights, inputs and torch's generator alone. "
                "Where another gradient is meant, as one straight through a rounding, leave this check out: "
                "checks=CHECKS.keys() - {'has_true_gradients'}."
            )

    batches = [part for batch in rehearsal.batches() for part in cut(batch, 1)]
    rehearsal.fit(
        [Before(compare), *rehearsal.make()],
        model=rehearsal.model().double(),
        loader=batches,
        loss_fn=loss_fn,
        eval_every="1ep",
    )
