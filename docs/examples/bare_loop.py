"""The engine in a bare PyTorch loop: `train` gives the weights that the Trainer gives, bit for bit."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from thawline.engine import Algorithm, Clock, Engine, Event, ParameterLedger, State, linear

ADAMW = partial(torch.optim.AdamW, lr=1e-2)


def train(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    algorithms: Sequence[Algorithm],
    epochs: int,
) -> None:
    """Train ``model`` in place, with the learning rate falling to zero."""
    ledger = ParameterLedger(model, ADAMW, schedule=linear())
    clock = Clock(batches_per_epoch=len(batches))
    state = State(model, ledger, duration=f"{epochs}ep", clock=clock)
    with Engine(algorithms, state) as engine:  # attaches, and closes whatever happens
        engine.emit(Event.FIT_START)
        for _ in range(epochs):
            engine.emit(Event.EPOCH_START)
            for x, y in batches:
                engine.emit(Event.BATCH_START)  # sets the learning rates and the modes of norms
                loss_fn(model(x), y).backward()
                engine.emit(Event.BEFORE_STEP)
                ledger.optimizers[0].step()
                ledger.clear_gradients()
                state.tick(samples=len(x))  # the clock ticks before BATCH_END
                engine.emit(Event.BATCH_END)
            state.tick_epoch()
            engine.emit(Event.EPOCH_END)
        engine.emit(Event.FIT_END)
    ledger.release()  # gives requires_grad and the optimizer's groups back
