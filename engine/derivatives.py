"""The check of the conformance kit that holds gradients against finite differences of the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .events import Event
from .forward import predictions, targets_of
from .neighbor import Before
from .promises import check, fail
from .randomness import Randomness, derive_seed
from .rehearsal import Rehearsal, copied, cut
from .state import State
from .unaided import buffers_of, is_hooked

STEP = 1e-7
TOLERANCE = 1e-4


@check
def has_true_gradients(rehearsal: Rehearsal) -> None:
    """In float64 the gradients of the loss are its derivative along a random direction, by central differences of the loss itself."""
    loss_fn = rehearsal.loss_fn
    if loss_fn is None:
        return
    seen: dict[str, Any] = {}

    def loss_at(state: State, moved: dict[str, Tensor]) -> Tensor:
        with Randomness().kept():
            Randomness().restore(seen["generators"])
            tensors = copied(seen["buffers"]) | moved
            outputs = torch.func.functional_call(state.model, tensors, tuple(state.microbatch[:-1]))
        loss: Tensor = loss_fn(predictions(outputs), targets_of(state.microbatch))
        return loss

    def compare(event: Event, state: State) -> None:
        if event is Event.BEFORE_FORWARD:
            seen.update(generators=Randomness().states(), buffers=buffers_of(state.model))
        if event is not Event.AFTER_FORWARD or not _is_plain(state):
            return
        trained = {name: state.ledger.parameters[name] for name in state.ledger.trainable}
        loss = loss_fn(predictions(state.outputs), targets_of(state.microbatch))
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
        if abs(slope - must) > TOLERANCE * max(1.0, abs(must)):
            fail(
                f"{rehearsal.name}: in batch {state.clock.batch} the gradients say that the loss changes by {slope:.6g} along a random "
                f"direction of what trains, and it changes by {must:.6g}. Where a module or function computes its own gradient, hold "
                "it against torch.autograd.gradcheck; and the forward pass must follow from weights, inputs and torch's generator alone."
            )

    with Randomness().kept():
        batches = [part for batch in rehearsal.loader for part in cut(batch, 1)]
    rehearsal.fit(
        [Before(compare), *rehearsal.make()], model=rehearsal.model().double(), loader=batches, eval_every="1ep"
    )


def _is_plain(state: State) -> bool:
    """Return whether the model's forward pass can be run again with other numbers: no hook keeps what it has computed."""
    batch = state.microbatch
    return isinstance(batch, (tuple, list)) and not any(map(is_hooked, state.model.modules()))
