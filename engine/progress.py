"""Progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Literal, NoReturn, Protocol, TypeAlias

from attrs import define, field
from typing_extensions import override

from .errors import ArgumentError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

# A redraw costs about 2 ms: five a second are 1% of the time.
_SECONDS_BETWEEN_DRAWS = 0.2


Metrics: TypeAlias = Callable[[], Mapping[str, float]]
"""Returns what is to be shown now."""


class Progress(Protocol):
    """What shows how far a fit is. Every method is safe to call at any time, and none ever raises."""

    def start(self, total_batches: int | None, description: str, *, done: int = 0, epoch: int = 0) -> None:
        """Begin a fit of ``total_batches`` (None: not known), of which a resumed one has ``done`` some.

        A message follows the end of each ``epoch`` batches, and of the fit, where that is given.
        """

    def update(self, batch: int, metrics: Metrics) -> None:
        """Say that ``batch`` batches are done. Cheap enough to be called for each: ``metrics`` is asked where they are drawn."""

    def message(self, text: str) -> None:
        """Show a line that stays, such as an epoch's metrics."""

    def eval_start(self, total: int | None) -> None:
        """Begin an evaluation of ``total`` batches (None: not known); the next ``update`` or ``message`` ends it."""

    def eval_update(self, n: int) -> None:
        """Say that ``n`` batches are evaluated."""

    def close(self) -> None:
        """Leave the terminal as it was. More than one call does no harm."""


def progress_for(mode: Literal["auto"] | bool) -> Progress:
    """Return what shows progress here.

    Args:
        mode: ``"auto"`` or True: a bar where the standard error stream is a terminal, plain lines elsewhere
            (files, pipes, notebooks). False: nothing.

    Raises:
        ArgumentError: ``mode`` is none of these.

    Example:
        >>> progress_for(False)
        NoProgress()
    """
    if mode not in ("auto", True, False):
        raise ArgumentError("progress=", got=mode, takes="'auto', True or False", example="progress='auto'")
    if mode is False:
        return NoProgress()
    return BarProgress() if _on_terminal() else LineProgress()


def _on_terminal() -> bool:
    try:
        terminal = sys.stderr is not None and sys.stderr.isatty()
    except (OSError, ValueError):  # closed
        return False
    return terminal and os.environ.get("TERM", "") not in ("dumb", "unknown") and _has_rich()


def _has_rich() -> bool:
    return importlib.util.find_spec("rich") is not None


@define
class NoProgress:
    """Shows nothing."""

    def start(self, total_batches: int | None, description: str, *, done: int = 0, epoch: int = 0) -> None:
        """Do nothing."""

    def update(self, batch: int, metrics: Metrics) -> None:
        """Do nothing."""

    def message(self, text: str) -> None:
        """Do nothing."""

    def eval_start(self, total: int | None) -> None:
        """Do nothing."""

    def eval_update(self, n: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


@define(eq=False)
class LineProgress:
    """Writes a line every tenth of the fit, or where its length is not known at 1, 2, 4, 8, … batches.

    Args:
        stream: Where to; None is the standard error stream at the time of writing.
        clock: Seconds, for the rate and the time left.

    Example:
        >>> seconds = iter([0.0, 2.0])
        >>> progress = LineProgress(sys.stdout, clock=lambda: next(seconds))
        >>> progress.start(100, "fit")
        >>> for batch in range(1, 11):
        ...     progress.update(batch, lambda: {"loss": 0.7, "lr": 1e-3})
        fit: 10/100 (10%), loss 0.7, lr 0.001, 5 batches/s, 18 s left
    """

    stream: IO[str] | None = field(default=None, repr=False)
    clock: Callable[[], float] = field(default=time.monotonic, kw_only=True, repr=False)
    _run: _Run | None = field(default=None, init=False, repr=False)
    _next: int = field(default=0, init=False, repr=False)
    _epoch: int = field(default=0, init=False, repr=False)
    _held: str = field(default="", init=False, repr=False)

    def start(self, total_batches: int | None, description: str, *, done: int = 0, epoch: int = 0) -> None:
        """Begin a fit."""
        self._run = _Run(total_batches, description, done, self.clock())
        self._next = self._run.next_line(done)
        self._epoch, self._held = epoch, ""

    def update(self, batch: int, metrics: Metrics) -> None:
        """Write a line where one is due; at an epoch's end its message is that line."""
        if batch < self._next or self._run is None:
            return
        self._next = self._run.next_line(batch)
        if self._epoch and (batch % self._epoch == 0 or batch == self._run.total):
            self._held = f"  {self._run.summary(batch, {}, self.clock())}"
            return
        self.message(f"{self._run.description}: {self._run.summary(batch, metrics(), self.clock())}")

    def message(self, text: str) -> None:
        """Write a line."""
        text, self._held = text + self._held, ""
        stream = sys.stderr if self.stream is None else self.stream
        if stream is not None:  # Python without a console has none
            with suppress(OSError, ValueError):  # a broken pipe or a closed file: a fit does not end for that
                stream.write(f"{text}\n")
                stream.flush()

    def eval_start(self, total: int | None) -> None:
        """Do nothing: the epoch's message follows."""

    def eval_update(self, n: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """End the fit."""
        self._run = None


@define(eq=False)
class BarProgress:
    """Draws a bar with rich, at most five times a second and from the caller's thread.

    Args:
        stream: A terminal; None is the standard error stream at the start of the fit.
        clock: Seconds, for the rate, the time left and the redraws.
    """

    stream: IO[str] | None = field(default=None, repr=False)
    clock: Callable[[], float] = field(default=time.monotonic, kw_only=True, repr=False)
    _run: _Run | None = field(default=None, init=False, repr=False)
    _bar: RichProgress | None = field(default=None, init=False, repr=False)
    _task: TaskID | None = field(default=None, init=False, repr=False)
    _eval_task: TaskID | None = field(default=None, init=False, repr=False)
    _batch: int = field(default=0, init=False, repr=False)
    _metrics: Metrics = field(default=dict, init=False, repr=False)
    _next_draw: float = field(default=0.0, init=False, repr=False)

    def start(self, total_batches: int | None, description: str, *, done: int = 0, epoch: int = 0) -> None:  # noqa: ARG002 - the bar has no lines
        """Begin a fit and show its bar."""
        self.close()
        self._run = _Run(total_batches, description, done, self.clock())
        self._batch, self._metrics, self._next_draw = done, dict, 0.0
        self._safely(self._show)

    def update(self, batch: int, metrics: Metrics) -> None:
        """Move the bar; redraw it where that is due."""
        self._batch, self._metrics = batch, metrics
        if self.clock() >= self._next_draw:
            self._safely(self._draw)

    def message(self, text: str) -> None:
        """Write a line above the bar."""
        if self._bar is None:
            LineProgress(self.stream).message(text)
        else:
            self._safely(lambda bar: self._draw(bar, text))

    def eval_start(self, total: int | None) -> None:
        """Show a second bar."""
        self._safely(lambda bar: self._show_eval(bar, total))

    def eval_update(self, n: int) -> None:
        """Move the second bar."""
        if self.clock() >= self._next_draw:
            self._safely(lambda bar: self._draw_eval(bar, n))

    def close(self) -> None:
        """Draw the last state, give the cursor and the streams back, and end the line."""
        if self._bar is not None:
            self._safely(self._draw)
        bar, self._bar, self._run = self._bar, None, None
        if bar is not None:
            _stop(bar)

    def _safely(self, draw: Callable[[RichProgress], None]) -> None:
        try:
            if self._bar is None and self._run is not None:
                self._bar = _rich_progress(self.stream)
                self._bar.start()
                self._bar.console.show_cursor(True)  # rich hides it: a killed fit would leave the terminal so
            if self._bar is not None:
                draw(self._bar)
        except (OSError, ValueError):  # a closed terminal: a fit does not end for that
            bar, self._bar, self._run = self._bar, None, None
            if bar is not None:
                _stop(bar)

    def _show(self, bar: RichProgress) -> None:
        assert self._run is not None
        total = self._run.total
        self._task = bar.add_task(self._run.description, total=total, completed=self._batch, text="")
        self._draw(bar)

    def _draw(self, bar: RichProgress, message: str | None = None) -> None:
        assert self._run is not None
        assert self._task is not None
        now = self.clock()
        if self._eval_task is not None:
            bar.remove_task(self._eval_task)
            self._eval_task = None
        if message is not None:
            bar.console.print(message, markup=False, highlight=False)
        bar.update(self._task, completed=self._batch, text=self._run.summary(self._batch, self._metrics(), now))
        bar.refresh()
        self._next_draw = now + _SECONDS_BETWEEN_DRAWS

    def _show_eval(self, bar: RichProgress, total: int | None) -> None:
        self._draw(bar)
        self._eval_task = bar.add_task("evaluating", total=total, text=_of(0, total))
        bar.refresh()

    def _draw_eval(self, bar: RichProgress, n: int) -> None:
        if self._eval_task is not None:
            task = bar.tasks[bar.task_ids.index(self._eval_task)]
            total = None if task.total is None else int(task.total)
            bar.update(self._eval_task, completed=n, text=_of(n, total))
            bar.refresh()
            self._next_draw = self.clock() + _SECONDS_BETWEEN_DRAWS


@define
class _Run:
    """One fit: how long it is and when it began."""

    total: int | None
    description: str
    done: int
    began: float

    def next_line(self, batch: int) -> int:
        """Return the batch of the first line after ``batch``."""
        if self.total is None:
            return 1 << batch.bit_length()
        tenth = max(1, -(-self.total // 10))
        following = (batch // tenth + 1) * tenth
        return following if batch >= self.total else min(following, self.total)

    def summary(self, batch: int, metrics: Mapping[str, float], now: float) -> str:
        parts = [_of(batch, self.total), *(f"{name} {_number(value)}" for name, value in metrics.items())]
        seconds, done = now - self.began, batch - self.done
        if seconds > 0 and done > 0:
            rate = done / seconds
            parts.append(f"{rate:.0f} batches/s" if rate >= 100 else f"{rate:.3g} batches/s")
            if self.total is not None and batch < self.total:
                parts.append(f"{_duration((self.total - batch) * seconds / done)} left")
        return ", ".join(parts)


def _of(n: int, total: int | None) -> str:
    return f"{n} batches" if not total else f"{n}/{total} ({100 * n // total}%)"


def _number(value: object) -> str:
    try:
        return f"{float(value):.4g}"  # type: ignore[arg-type]  # also tensors and numbers of NumPy
    except (TypeError, ValueError):
        return str(value)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _rich_progress(stream: IO[str] | None) -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    class Terminal(Console):
        @override
        def on_broken_pipe(self) -> NoReturn:
            # rich would end the process here.
            raise BrokenPipeError

    console: Console = Terminal(file=sys.stderr if stream is None else stream)
    line = Column(no_wrap=True, overflow="ellipsis")
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=line),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[text]}", markup=False, table_column=line),
        console=console,
        auto_refresh=False,  # no thread beside the training loop
    )


def _stop(bar: RichProgress) -> None:
    # Where the terminal is closed rich raises, but only after it has given sys.stdout and sys.stderr back.
    with suppress(OSError, ValueError):
        bar.stop()
