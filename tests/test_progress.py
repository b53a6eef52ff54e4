"""Progress: what is shown where, and that nothing it meets stops a fit."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import define, field
from typing_extensions import override

from helpers import loader, mlp
from thawline.engine import Algorithm, Event, State, Trainer
from thawline.engine.errors import ArgumentError
from thawline.engine.progress import BarProgress, LineProgress, NoProgress, Progress, progress_for

SHOW_CURSOR, HIDE_CURSOR, ERASE_LINE = "\x1b[?25h", "\x1b[?25l", "\x1b[2K"


class Terminal(io.StringIO):
    """A terminal that keeps what is written to it."""

    @override
    def isatty(self) -> bool:
        return True


class Broken(Terminal):
    """A terminal whose other end is gone once ``gone`` is set."""

    gone = False

    @override
    def write(self, text: str) -> int:
        if self.gone:
            raise BrokenPipeError
        return super().write(text)


@define
class Seconds:
    """A clock that moves when it is told to."""

    now: float = field(default=0.0)

    def __call__(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture(autouse=True)
def _a_wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give rich the same terminal wherever the tests run."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")


def fit(progress: Progress, batches: int, *, done: int = 0, tick: Callable[[], object] = lambda: None) -> None:
    """Tell ``progress`` of a fit."""
    progress.start(batches, "fit", done=done)
    for batch in range(done + 1, batches + 1):
        tick()
        progress.update(batch, partial(dict, loss=1 / batch))


class TestProgressFor:
    """Which kind is used where."""

    def test_false_shows_nothing(self, capfd: pytest.CaptureFixture[str]) -> None:
        """Silence is silence, messages included."""
        progress = progress_for(False)
        fit(progress, 20)
        progress.message("text")
        progress.eval_start(2)
        progress.eval_update(1)
        progress.close()
        assert isinstance(progress, NoProgress)
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("mode", ["auto", True])
    def test_a_terminal_gets_a_bar_and_a_file_lines(self, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """The standard error stream decides."""
        monkeypatch.setattr(sys, "stderr", Terminal())
        assert isinstance(progress_for(mode), BarProgress)
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        assert isinstance(progress_for(mode), LineProgress)

    def test_a_terminal_that_cannot_move_its_cursor_gets_lines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """TERM=dumb, as in an editor's shell."""
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setenv("TERM", "dumb")
        assert isinstance(progress_for("auto"), LineProgress)

    @pytest.mark.parametrize("closed", [True, False])
    def test_without_a_stream_nothing_is_raised(self, closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """A closed standard error stream, or none at all, is no reason not to train."""
        stream = io.StringIO() if closed else None
        if stream is not None:
            stream.close()
        monkeypatch.setattr(sys, "stderr", stream)
        progress = progress_for("auto")
        fit(progress, 20)
        progress.message("text")
        progress.close()
        assert isinstance(progress, LineProgress)

    @pytest.mark.parametrize("mode", ["bar", None, 2, []])
    def test_another_mode_is_refused(self, mode: Any) -> None:
        """The error says what to write instead."""
        with pytest.raises(
            ArgumentError, match=r"progress= takes 'auto', True or False, got .* Write: progress='auto'"
        ):
            progress_for(mode)


class TestLineProgress:
    """Plain lines."""

    @pytest.mark.parametrize(
        "total, done, expected",
        [
            (1000, 0, [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000]),
            (25, 0, [3, 6, 9, 12, 15, 18, 21, 24, 25]),
            (3, 0, [1, 2, 3]),
            (1000, 750, [800, 900, 1000]),
        ],
    )
    def test_a_line_every_tenth_and_at_the_end(self, total: int, done: int, expected: list[int]) -> None:
        """Never more than ten, also for a resumed fit, and always one at the last batch."""
        out = io.StringIO()
        fit(LineProgress(out), total, done=done)
        assert [int(line.split()[1].split("/")[0]) for line in out.getvalue().splitlines()] == expected

    def test_without_a_length_the_lines_grow_rare(self) -> None:
        """A loader that does not know its length gets a line at each power of two."""
        out = io.StringIO()
        progress = LineProgress(out, clock=Seconds())
        progress.start(None, "fit")
        for batch in range(1, 20):
            progress.update(batch, dict)
        assert out.getvalue().splitlines() == [f"fit: {n} batches" for n in (1, 2, 4, 8, 16)]

    def test_a_line_holds_metrics_rate_and_time_left(self) -> None:
        """Rate and time left count from where a resumed fit began."""
        out, seconds = io.StringIO(), Seconds()
        progress = LineProgress(out, clock=seconds)
        progress.start(10_000, "fine-tuning", done=500)
        seconds.now = 100.0
        progress.update(1000, lambda: {"loss": 0.123456, "lr": 5e-5})
        expected = "fine-tuning: 1000/10000 (10%), loss 0.1235, lr 5e-05, 5 batches/s, 30 min 0 s left\n"
        assert out.getvalue() == expected

    @pytest.mark.parametrize(
        "seconds, expected", [(2.0, "18 s left"), (10.0, "1 min 30 s left"), (1200.0, "3 h 0 min left")]
    )
    def test_time_left_is_legible(self, seconds: float, expected: str) -> None:
        """Seconds, minutes or hours."""
        out, clock = io.StringIO(), Seconds()
        progress = LineProgress(out, clock=clock)
        progress.start(10, "fit")
        clock.now = seconds
        progress.update(1, dict)
        assert out.getvalue().endswith(f", {expected}\n")

    def test_metrics_may_be_tensors(self) -> None:
        """What becomes a float is shown as one, anything else as its text."""
        out = io.StringIO()
        progress = LineProgress(out)
        progress.start(1, "fit")
        progress.update(1, lambda: {"loss": torch.tensor(0.5), "lr": "off", "bad": float("nan")})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]
        assert "loss 0.5, lr off, bad nan" in out.getvalue()

    def test_messages_are_lines(self) -> None:
        """A message is shown as it is, before a fit as well."""
        out = io.StringIO()
        LineProgress(out).message("epoch 1: eval/loss [0.5]")
        assert out.getvalue() == "epoch 1: eval/loss [0.5]\n"

    def test_the_message_of_an_epoch_is_its_line(self, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        """One line at its end, after the evaluation, with the place in the fit; also where the fit is resumed."""
        torch.manual_seed(0)
        batches = loader()
        trainer = Trainer(loss_fn=torch.nn.functional.cross_entropy, run_dir=tmp_path, progress=True)
        first = trainer.fit(mlp(), batches, batches, duration="2ep").history
        later = trainer.fit(mlp(), batches, batches, duration="3ep", resume=True).history
        lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("training: ")]
        assert [line.split(":")[0] for line in lines if line.startswith("epoch")] == ["epoch 1", "epoch 2", "epoch 3"]
        for row, line in zip([*first, later[-1]], [line for line in lines if line.startswith("epoch")], strict=True):
            assert f"eval/loss {row['eval/loss']:.4g}  " in line
            assert f"  {int(row['batch'])}/" in line

    def test_lines_show_the_loss_before_it_is_logged(self, capfd: pytest.CaptureFixture[str]) -> None:
        """The mean of the epoch's batches so far, and the rate of the latest one, whatever ``log_every`` is."""
        torch.manual_seed(0)
        losses: list[float] = []

        class Watch(Algorithm):
            events = frozenset({Event.AFTER_LOSS})

            def apply(self, event: Event, state: State) -> None:
                assert state.loss is not None
                losses.append(state.loss.item())

        trainer = Trainer(
            algorithms=[Watch()],
            optimizer=partial(torch.optim.SGD, lr=0.5), loss_fn=torch.nn.functional.cross_entropy, progress=True,
        )  # fmt: skip
        trainer.fit(mlp(), loader(), duration="1ep")
        first = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("training: 2/4"))
        assert f"train/loss {sum(losses[:2]) / 2:.4g}, lr 0.5, " in first

    def test_no_line_shows_an_evaluation_that_is_over(self, capfd: pytest.CaptureFixture[str]) -> None:
        """Lines after an evaluation show its numbers."""
        torch.manual_seed(0)
        seen: list[float] = []

        class Watch(Algorithm):
            events = frozenset({Event.EVAL_END})

            def apply(self, event: Event, state: State) -> None:
                seen.append(state.metrics["eval/loss"])

        trainer = Trainer(
            algorithms=[Watch()], loss_fn=torch.nn.functional.cross_entropy, eval_every="1ba", progress=True
        )
        trainer.fit(mlp(), loader(), loader(), duration="3ba")
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("training: ")]
        assert len(lines) == 2
        for line, value in zip(lines, seen, strict=False):
            assert f"eval/loss {value:.4g}," in line

    def test_a_broken_pipe_is_survived(self) -> None:
        """Where nobody reads any more the fit goes on."""
        out = Broken()
        out.gone = True
        fit(LineProgress(out), 20)

    def test_nothing_is_shown_outside_a_fit(self) -> None:
        """Updates before the start and after the close are ignored."""
        out = io.StringIO()
        progress = LineProgress(out)
        progress.update(1, dict)
        progress.close()
        fit(progress, 1)
        progress.close()
        progress.update(2, dict)
        assert len(out.getvalue().splitlines()) == 1


class TestBarProgress:
    """The bar."""

    def test_redraws_are_five_a_second(self) -> None:
        """A thousand batches in a second of the clock are drawn at most once each 0.2 s."""
        out, seconds = Terminal(), Seconds(100.0)
        progress = BarProgress(out, clock=seconds)
        progress.start(1000, "fit")
        before = out.getvalue().count(ERASE_LINE)
        for batch in range(1, 1001):
            seconds.now += 0.001
            progress.update(batch, lambda: {"loss": 0.5})
        assert 4 <= out.getvalue().count(ERASE_LINE) - before <= 6
        progress.close()

    def test_the_last_state_stays(self) -> None:
        """After the close the terminal shows the last batch, with its metrics, a line of its own and the cursor."""
        out, seconds = Terminal(), Seconds()
        progress = BarProgress(out, clock=seconds)

        def tick() -> None:
            seconds.now += 0.01

        fit(progress, 100, tick=tick)
        progress.close()
        last = out.getvalue().rsplit(ERASE_LINE, 1)[1]
        assert "fit" in last
        assert "100/100 (100%), loss 0.01, 100 batches/s" in last
        assert last.endswith(f"\n{SHOW_CURSOR}")

    def test_the_cursor_is_never_left_hidden(self) -> None:
        """A fit killed at any moment leaves a terminal that works: the cursor is shown while the bar runs."""
        out = Terminal()
        progress = BarProgress(out)
        progress.start(10, "fit")
        progress.update(1, dict)
        assert out.getvalue().rfind(SHOW_CURSOR) > out.getvalue().rfind(HIDE_CURSOR)
        progress.close()

    def test_closing_twice_does_no_harm(self) -> None:
        """Nothing more is written, and updates afterwards are ignored."""
        out = Terminal()
        progress = BarProgress(out)
        fit(progress, 3)
        progress.close()
        written = out.getvalue()
        progress.close()
        progress.update(4, dict)
        progress.eval_start(1)
        progress.eval_update(1)
        assert out.getvalue() == written

    def test_a_second_fit_gets_a_new_bar(self) -> None:
        """Start after start ends the first bar."""
        out = Terminal()
        progress = BarProgress(out)
        fit(progress, 3)
        fit(progress, 5)
        progress.close()
        assert "3/3 (100%)" in out.getvalue()
        assert "5/5 (100%)" in out.getvalue()

    def test_messages_stay_above_the_bar(self) -> None:
        """A message is written whole, brackets included, and the bar drawn again below it."""
        out = Terminal()
        progress = BarProgress(out)
        progress.start(2, "fit")
        progress.update(1, dict)
        progress.message("epoch 1: [bold]eval/loss 0.5")
        progress.close()
        lines = out.getvalue().splitlines()
        place = next(index for index, line in enumerate(lines) if "epoch 1: [bold]eval/loss 0.5" in line)
        assert any("1/2" in line for line in lines[place + 1 :])

    def test_a_message_outside_a_fit_is_a_line(self) -> None:
        """Before the start there is no bar to draw."""
        out = Terminal()
        BarProgress(out).message("hello")
        assert out.getvalue() == "hello\n"

    def test_evaluation_has_a_bar_of_its_own(self) -> None:
        """It appears, moves, and goes with the next update."""
        out, seconds = Terminal(), Seconds()
        progress = BarProgress(out, clock=seconds)
        progress.start(10, "fit")
        progress.eval_start(4)
        seconds.now += 1
        progress.eval_update(2)
        assert "2/4 (50%)" in out.getvalue()
        seconds.now += 1
        progress.update(1, dict)
        seconds.now += 1
        written = len(out.getvalue())
        progress.update(2, dict)
        progress.close()
        assert "evaluating" not in out.getvalue()[written:].split(ERASE_LINE)[-1]

    def test_what_the_users_code_prints_goes_above(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Print does not break the bar, and the streams are given back at the close."""
        plain = io.StringIO()
        monkeypatch.setattr(sys, "stdout", plain)
        out = Terminal()
        progress = BarProgress(out)
        progress.start(2, "fit")
        sys.stdout.write("from the user's code\n")
        progress.close()
        assert "from the user's code" in out.getvalue()
        assert sys.stdout is plain

    @pytest.mark.parametrize("moment", ["before the start", "during the fit", "before the close"])
    def test_a_terminal_that_goes_away_is_survived(self, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A broken pipe at any moment neither raises nor ends the process, and the streams are given back."""
        plain = io.StringIO()
        monkeypatch.setattr(sys, "stdout", plain)
        out, seconds = Broken(), Seconds()
        progress = BarProgress(out, clock=seconds)
        out.gone = moment == "before the start"
        progress.start(3, "fit")
        for batch in range(1, 4):
            seconds.now += 1
            out.gone |= moment == "during the fit"
            progress.update(batch, lambda: {"loss": 0.5})
            progress.message("text")
            progress.eval_start(1)
            progress.eval_update(1)
        out.gone = True
        progress.close()
        assert sys.stdout is plain

    def test_a_closed_file_is_survived(self) -> None:
        """The stream may be closed under the bar."""
        out = Terminal()
        progress = BarProgress(out, clock=Seconds())
        progress.start(3, "fit")
        out.close()
        progress.message("text")
        progress.close()

    def test_an_exception_in_the_fit_leaves_a_working_terminal(self) -> None:
        """On a real terminal: the traceback stands on lines of its own, with the cursor shown."""
        script = (
            "from thawline.engine.progress import progress_for\n"
            "progress = progress_for('auto')\n"
            "progress.start(10, 'fit')\n"
            "try:\n"
            "    progress.update(1, lambda: {'loss': 0.5})\n"
            "    raise RuntimeError('out of luck')\n"
            "finally:\n"
            "    progress.close()\n"
        )
        ours, theirs = pty.openpty()
        process = subprocess.Popen([sys.executable, "-c", script], stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        shown = read_all(ours)
        assert process.wait() == 1
        bar, error = shown.split("Traceback", 1)
        assert bar.endswith(f"\r\n{SHOW_CURSOR}")
        assert "1/10 (10%), loss 0.5" in bar
        assert error.endswith("RuntimeError: out of luck\r\n")


def read_all(descriptor: int) -> str:
    """Return what the other end of a terminal writes until it is closed."""
    parts: list[bytes] = []
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # Linux says so that the other end is closed
            part = b""
        if not part:
            os.close(descriptor)
            return b"".join(parts).decode()
        parts.append(part)
