"""What a fit tells: its losses, rates and metrics to the trackers, the bar and the history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import define, field

from .log import get_logger
from .meters import RunningLoss
from .progress import Progress
from .rundir import RunDir
from .state import State

log = get_logger(__name__)


@define(eq=False)
class Report:
    """Gathers what a fit tells, and hands it to the trackers, the progress bar and the history.

    Args:
        state: Where metrics are.
        folder: Whose trackers are told.
        progress: Where messages are shown.
    """

    state: State
    folder: RunDir
    progress: Progress
    history: list[dict[str, float]] = field(factory=list, init=False)
    losses: RunningLoss = field(factory=RunningLoss, init=False)
    _noted: tuple[int, dict[str, float]] = field(default=(-1, {}), init=False)

    def log_loss(self) -> None:
        """Log the mean loss since the last time, and the rates."""
        if self.losses.count:
            self.log({"train/loss": self.losses.since_log(), **self.rates()})

    def log(self, values: Mapping[str, float]) -> None:
        """Give the trackers what was logged since the last time."""
        self.state.metrics.update(values)
        self.state.logged.update(values)
        if self.state.logged:
            self.folder.trackers.log_metrics(self.state.take_logged(), step=self.state.clock.batch)

    def glance(self) -> dict[str, float]:
        """Return what a progress display shows: the latest metrics, the loss and the rate as they are now."""
        loss = {"train/loss": self.losses.so_far()} if self.losses.count else {}
        return _of_interest(self.state.metrics | loss) | {"lr": self.rates().get("lr", 0.0)}

    def rates(self) -> dict[str, float]:
        """Return ``lr``, the highest, and ``lr/<layer>`` of each layer, of the last step where they were noted, else as they are now."""
        batch, noted = self._noted
        return noted if batch == self.state.clock.batch else self._rates_now()

    def note_rates(self) -> None:
        """Note the rates of the step that is being done: from BATCH_END on others may be set."""
        self._noted = self.state.clock.batch + 1, self._rates_now()

    def _rates_now(self) -> dict[str, float]:
        rates = self.state.ledger.rates
        return {"lr": max(rates.values())} | {f"lr/{layer}": lr for layer, lr in rates.items()} if rates else {}

    def end_epoch(self) -> None:
        """Write the row of history of an epoch in which something was trained."""
        state = self.state
        state.metrics.update(self.rates())
        numel = sum(each.numel() for each in state.ledger.trainable_parameters)
        place = {"epoch": state.clock.epoch, "batch": state.clock.batch, "trainable": numel}
        self.history.append(state.metrics | place)
        self.losses.begin_epoch()
        text = "  ".join(f"{name} {value:.4g}" for name, value in _of_interest(state.metrics).items())
        self.progress.message(f"epoch {len(self.history)}: {text}  {numel:,} parameters train")

    def end(self, reason: str, signal: object) -> None:
        """Tell why the fit ended."""
        log.info("fit ended", reason=reason, batches=self.state.clock.batch, signal=signal)
        if reason != "duration":
            self.progress.message(f"stopped: {reason}")

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it."""
        return {"history": self.history, "losses": self.losses.parts(), "rates": self.rates()}

    def load_state_dict(self, saved: Mapping[str, Any], *, batch: int) -> None:
        """Go on from what :meth:`state_dict` returned at ``batch``."""
        self.history, self.losses = list(saved["history"]), RunningLoss(*saved["losses"])
        self._noted = batch, saved["rates"]


def _of_interest(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith(("train/", "eval/"))}
