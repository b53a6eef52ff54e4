"""The peers as contestants: each is imported only where it runs, and set so that it does nothing besides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from .batches import Batches

# As it is called in tables: what is imported, and the distribution whose version is told.
PEERS = {
    "ignite": ("ignite", "pytorch-ignite"),
    "skorch": ("skorch", "skorch"),
    "accelerate": ("accelerate", "accelerate"),
    "Lightning": ("lightning", "lightning"),
    "HF": ("transformers", "transformers"),
    "fastai": ("fastai", "fastai"),
    "Composer": ("composer", "mosaicml"),
    "peft": ("peft", "peft"),
    "timm": ("timm", "timm"),
}
Entry = TypeVar("Entry")


def installed(name: str) -> bool:
    """Return whether a peer can be looked for; one that is broken is found out where it runs."""
    return find_spec(PEERS[name][0]) is not None


def absent() -> list[str]:
    """Return the peers that are not installed."""
    return [name for name in PEERS if not installed(name)]


def present(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the entries of the peers that are installed."""
    return {name: each for name, each in entries.items() if installed(name)}


def versions() -> dict[str, str]:
    """Return the versions of the peers that are installed."""
    found: dict[str, str] = {}
    for name, (_, distribution) in present(PEERS).items():
        try:
            found[name] = version(distribution)
        except PackageNotFoundError:
            found[name] = "of unknown version"
    return found


class Loss(nn.Module):
    """A model that returns its loss as well, as the Hugging Face Trainer wants."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    @override
    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return loss and logits."""
        logits = self.body(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def ignite_fit(model: nn.Module, batches: Batches) -> None:
    """Run the engine that ignite makes for supervised training."""
    ignite: Any = import_module("ignite.engine")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ignite.create_supervised_trainer(model, optimizer, nn.functional.cross_entropy).run(batches, max_epochs=1)


def skorch_fit(model: nn.Module, batches: Batches) -> None:
    """Run skorch's own step, which its `fit_loop` calls a batch at a time, with the callbacks it calls around it."""
    skorch: Any = import_module("skorch")
    net: Any = skorch.NeuralNet(
        model, nn.CrossEntropyLoss, lr=0.01, max_epochs=1, train_split=None, callbacks="disable", verbose=0,
        iterator_train=lambda *_, **__: batches,
    )  # fmt: skip
    net.initialize()
    net.fit_loop(torch.zeros(8, 4), torch.zeros(8, dtype=torch.long), epochs=1)


def accelerate_fit(model: nn.Module, batches: Batches) -> None:
    """Run the documented loop over a prepared model and optimizer; the batches are as ready as everybody's."""
    accelerator: Any = import_module("accelerate").Accelerator(cpu=True)
    net, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    total = 0.0
    for x, y in batches:
        with accelerator.accumulate(net):
            loss = nn.functional.cross_entropy(net(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.item()


def lightning_fit(model: nn.Module, batches: Batches) -> None:
    """Run Lightning's Trainer without logger, bar and checkpoints."""
    lightning: Any = import_module("lightning")

    class Task(lightning.LightningModule):  # type: ignore[misc]  # known only once it is imported
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return nn.functional.cross_entropy(self.body(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    lightning_trainer().fit(Task(), batches)


def lightning_trainer() -> Any:
    """Return a Trainer of Lightning's without logger, bar and checkpoints."""
    lightning: Any = import_module("lightning")
    return lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip


def hf_trainer(model: nn.Module, batches: Batches) -> Any:
    """Return a Trainer of transformers that neither logs nor saves."""
    transformers: Any = import_module("transformers")

    class Ready(transformers.Trainer):  # type: ignore[misc]  # known only once it is imported
        def get_train_dataloader(self) -> Batches:
            return batches

    arguments = transformers.TrainingArguments(
        output_dir="/nonexistent", num_train_epochs=1, report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True, use_cpu=True, max_grad_norm=0.0, optim="sgd", per_device_train_batch_size=8,
    )  # fmt: skip
    trainer = Ready(model=Loss(model), args=arguments)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def hf_fit(model: nn.Module, batches: Batches) -> None:
    """Run transformers' Trainer."""
    named = Batches({"x": x, "labels": y} for x, y in batches.ready)
    hf_trainer(model, named).train()
    batches.marks = named.marks


def fastai_fit(model: nn.Module, batches: Batches) -> None:
    """Run fastai's Learner without its recorder and bar."""
    fastai: Any = import_module("fastai.basics")
    loaders = fastai.DataLoaders(batches, [])
    learner = fastai.Learner(
        loaders, model, loss_func=nn.functional.cross_entropy, opt_func=partial(fastai.OptimWrapper, opt=torch.optim.SGD),
        lr=0.01,
    )  # fmt: skip
    learner.remove_cb(fastai.Recorder)
    with learner.no_logging():
        learner.fit(1)


def composer_fit(model: nn.Module, batches: Batches) -> None:
    """Run Composer's Trainer without bar and loggers."""
    composer_trainer(model, batches).fit()


def composer_trainer(model: nn.Module, batches: Batches) -> Any:
    """Return a Trainer of Composer's without bar and loggers."""
    composer: Any = import_module("composer")

    class Task(composer.ComposerModel):  # type: ignore[misc]  # known only once it is imported
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            logits: Tensor = self.body(batch[0])
            return logits

        def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
            return nn.functional.cross_entropy(outputs, batch[1])

    task = Task()
    return composer.Trainer(
        model=task, train_dataloader=batches, max_duration="1ep", progress_bar=False, device="cpu",
        optimizers=torch.optim.SGD(task.parameters(), lr=0.01),
    )  # fmt: skip


FITS: dict[str, Callable[[nn.Module, Batches], None]] = {
    "ignite": ignite_fit,
    "skorch": skorch_fit,
    "accelerate": accelerate_fit,
    "Lightning": lightning_fit,
    "HF": hf_fit,
    "fastai": fastai_fit,
    "Composer": composer_fit,
}
"""Train one epoch with SGD."""


def ignite_event(listeners: int) -> Callable[[], None]:
    """Return a function that fires one event of ignite's."""
    ignite: Any = import_module("ignite.engine")
    engine = ignite.Engine(lambda *_: None)
    for _ in range(listeners):
        engine.add_event_handler(ignite.Events.ITERATION_COMPLETED, lambda: None)
    return partial(engine.fire_event, ignite.Events.ITERATION_COMPLETED)


def hf_event(listeners: int) -> Callable[[], None]:
    """Return a function that calls one event of the callbacks of transformers."""
    transformers: Any = import_module("transformers")
    handler: Any = import_module("transformers.trainer_callback").CallbackHandler(
        [type("Listen", (transformers.TrainerCallback,), {})() for _ in range(listeners)], None, None, None, None
    )
    state, control = transformers.TrainerState(), transformers.TrainerControl()
    return partial(handler.on_step_end, None, state, control)


def composer_event(listeners: int) -> Callable[[], None]:
    """Return a function that runs one event of Composer's."""
    composer: Any = import_module("composer")
    trainer = composer_trainer(nn.Linear(2, 1), Batches())
    trainer.state.callbacks.extend(type("Listen", (composer.Callback,), {})() for _ in range(listeners))
    return partial(trainer.engine.run_event, composer.Event.BATCH_END)


EVENTS: dict[str, Callable[[int], Callable[[], None]]] = {
    "ignite": ignite_event,
    "HF": hf_event,
    "Composer": composer_event,
}
"""Number of listeners to a function that tells them of an event once."""


def _ignite_construction() -> None:
    model = nn.Linear(2, 1)
    ignite: Any = import_module("ignite.engine")
    ignite.create_supervised_trainer(model, torch.optim.SGD(model.parameters(), lr=0.01), nn.functional.mse_loss)


def _hf_construction() -> None:
    hf_trainer(nn.Linear(2, 1), Batches())


def _composer_construction() -> None:
    composer_trainer(nn.Linear(2, 1), Batches())


CONSTRUCTIONS: dict[str, Callable[[], object]] = {
    "ignite": _ignite_construction,
    "Lightning": lightning_trainer,
    "HF": _hf_construction,
    "Composer": _composer_construction,
}
"""Make a Trainer."""

IMPORTS = {
    "ignite": "import ignite.engine",
    "Lightning": "import lightning",
    "HF": "from transformers import Trainer",
    "Composer": "import composer",
}
"""What a program has to import before it can make a Trainer."""


def timm_average(model: nn.Module, decay: float) -> Callable[[], None]:
    """Return a function that updates timm's average of a model once."""
    timm: Any = import_module("timm.utils")
    return partial(timm.ModelEmaV3(model, decay=decay).update, model)
