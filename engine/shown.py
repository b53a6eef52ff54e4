"""The check of the conformance kit that looks on: what a fit shows on a terminal, in a file, in a log and in a picture."""

from __future__ import annotations

import io
import json
import math
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import define

from .checkpointing import Checkpointing
from .clock import Time
from .events import Event
from .log import ROOT
from .onlookers import FailingTracker, Terminal, json_log, standard_error, structured_log
from .picture import is_drawn_as_it_was
from .promises import check, fail, same, unless_alone
from .rehearsal import Outcome, Rehearsal
from .state import State
from .store import checkpoints_in, step_of

_MISSPELLED = "eval/los"
_OWN_REASON = "of the kit's own making"
_TRACKING = f"{ROOT}.engine.tracking"
_PRINTS = (
    "Print nothing: numbers are for state.log({…}), words for get_logger(__name__).info(…), which the application may silence, and "
    "progress=False means silence."
)
_SAME = "Whether somebody looks on is nothing to act by: ask state and clock alone."


@check
def is_shown_as_it_happens(rehearsal: Rehearsal) -> None:
    """With a bar, a log, a tracker that fails and a misspelled metric to save by, the fit is the same; it shows what it does, and prints nothing else."""
    unless_alone(rehearsal, _look_on)
    is_drawn_as_it_was(rehearsal)


def _look_on(rehearsal: Rehearsal) -> None:
    length = _length(rehearsal.loader)
    span = Time(rehearsal.duration)
    total = {"ep": math.ceil(span.value * length), "ba": int(span.value)}.get(span.unit, 0)
    show = _Show(rehearsal, total, length)
    with tempfile.TemporaryDirectory() as folder:
        lines = show.on_a_terminal(Path(folder))
        show.broken_off(checkpoints_in(Path(folder))[0])
    theirs = [each for each in lines if each["logger"] == _TRACKING or not each["logger"].startswith(f"{ROOT}.engine.")]
    show.in_a_file([{key: value for key, value in each.items() if key != "logger"} for each in theirs])
    show.stopped()


def _length(loader: Any) -> int:
    try:
        return len(loader)
    except TypeError:  # nobody says how many there are
        return 0


@define(eq=False)
class _Show:
    """Fits that are looked at.

    Args:
        rehearsal: Whose algorithm it is.
        total: Batches of the whole fit, 0 where that is not known.
        length: Batches of an epoch, 0 where that is not known.
    """

    rehearsal: Rehearsal
    total: int
    length: int

    # -- a bar and a log in JSON -------------------------------------------------------------------------------

    def on_a_terminal(self, folder: Path) -> list[dict[str, Any]]:
        """Fit with everything switched on, and a folder for checkpoints; return what the log has."""
        stream, log, broken = Terminal(), io.StringIO(), FailingTracker()
        written: list[tuple[int, Event, int, int]] = []

        def look(event: Event, state: State) -> None:
            written.append((log.getvalue().count("\n"), event, state.clock.epoch, state.clock.batch))

        policy = Checkpointing(every="1ep", keep=10_000, monitor=_MISSPELLED)
        with standard_error(stream) as printed, json_log(log):
            outcome = self.rehearsal.fit(
                probe=look, progress=True, trackers=[broken], run_dir=folder, checkpoint=policy
            )
        whole, now = ({"result": each.result, "told": each.told} for each in (self.rehearsal.whole, outcome))
        what = "with a bar, a log and a tracker that fails"
        same(whole, now, "the fit", f"{self.rehearsal.name}: {what}, the fit is another one. {_SAME}")
        self._check_bar(stream.getvalue(), printed.getvalue(), outcome)
        lines = [json.loads(line) for line in log.getvalue().splitlines()]
        self._check_log(lines, outcome, [str(each) for each in checkpoints_in(folder)], broken)
        self._check_places(lines, written)
        self._check_warnings(outcome)
        return lines

    def _check_bar(self, text: str, printed: str, outcome: Outcome) -> None:
        name, lines = self.rehearsal.name, _legible(text)
        bars, evaluations = ([each for each in lines if each.startswith(kind)] for kind in ("training ", "evaluating "))
        shown = [each for each in lines if each not in bars and each not in evaluations]
        self._check_words([*shown, *_legible(printed)], [*_rows(outcome), *_stop(outcome)])
        done = sum(event is Event.BATCH_END for event, *_ in outcome.events)
        places = [found[1] for each in bars if (found := _PLACE.match(each))]
        counts = [int(re.split(r"\D", each)[0]) for each in places]
        if (
            places != [self._place(count) for count in counts]
            or counts != sorted(counts)
            or [0, done] != counts[:1] + counts[-1:]
        ):
            fail(
                f"{name}: the bar goes through {places}, and {done} batches were trained. The clock is the loop's: never tick."
            )
        metrics = outcome.result["metrics"]
        glance = ", ".join([self._place(done), *_glance(metrics)])
        if done and not re.fullmatch(rf"training +\S+ +{re.escape(glance)}(, \S+ batches/s)?(, [^,]* left)?", bars[-1]):
            fail(f"{name}: the bar ends with {bars[-1]!r}, and the fit with {glance!r}. {_SAME}")
        begun = f"evaluating +\\S+ +{re.escape(_place(0, self.length))}"
        evaluated = sum(event is Event.EVAL_START for event, *_ in outcome.events)
        if sum(bool(re.match(begun, each)) for each in evaluations) < evaluated or bool(evaluations) > bool(evaluated):
            fail(f"{name}: of {evaluated} evaluations the bar shows {evaluations}. {_SAME}")
        _check_end(name, text, self.rehearsal.changed)

    def _place(self, count: int) -> str:
        return _place(count, self.total)

    def _check_words(self, shown: list[str], must: list[str]) -> None:
        foreign = [each for each in shown if each not in must]
        if foreign:
            fail(f"{self.rehearsal.name} prints {foreign[0]!r} in a fit. {_PRINTS}")
        what = f"{self.rehearsal.name}: what is shown of the epochs is not what history says."
        same(shown, must, "messages", f"{what} {_SAME}")

    def _check_log(
        self, lines: list[dict[str, Any]], outcome: Outcome, paths: list[str], broken: FailingTracker
    ) -> None:
        done = sum(event is Event.BATCH_END for event, *_ in outcome.events)
        plain = {"level": "warning", "logger": _TRACKING, "tracker": "FailingTracker"}
        must = [
            plain | {"event": "tracker failed; the run goes on", "call": "log_config", "error": "OSError: of the kit's own making"},
            *({"event": "checkpoint", "path": each, "level": "info", "logger": f"{ROOT}.engine.rundir"} for each in paths),
            {
                "event": "fit ended", "reason": outcome.result["stop reason"], "batches": done, "signal": None, "level": "info",
                "logger": f"{ROOT}.engine.report",
            },
            plain | {"event": "tracker failed repeatedly", "failures": broken.calls},
        ]  # fmt: skip
        times = [each.pop("timestamp") for each in lines]
        events = {each["event"] for each in must}
        now = [each for each in lines if each["event"] in events and each["logger"].startswith(f"{ROOT}.engine.")]
        same(now, must, "lines", f"{self.rehearsal.name}: what the log says of the fit is not what it did. {_SAME}")
        if times != sorted(times):
            fail(f"{self.rehearsal.name}: the log's lines are not in order of time: {times}.")

    def _check_warnings(self, outcome: Outcome) -> None:
        """Count the warnings of the tracker and of the metric that there is not."""
        doubts = {"a tracker that fails": "FailingTracker", f"Checkpointing(monitor={_MISSPELLED!r})": "'eval/loss'"}
        if "eval/loss" not in outcome.result["metrics"] or _MISSPELLED in outcome.result["metrics"]:
            doubts.popitem()
        for what, word in doubts.items():
            warned = [each for each in outcome.said if word in each and each not in self.rehearsal.whole.said]
            if len(warned) != 1:
                fail(
                    f"{self.rehearsal.name}: of {what} the fit warns {len(warned)} times: {outcome.said}. Leave metrics to state.log({{…}})."
                )

    def _check_places(self, lines: list[dict[str, Any]], written: list[tuple[int, Event, int, int]]) -> None:
        """Hold epoch and batch that lines of the log name against the clock when they were written."""
        for number, line in enumerate(lines, 1):
            found = [each for each in written if each[0] >= number]
            if not found or not {"epoch", "batch"} <= line.keys():
                continue
            _, event, *now = found[0]
            if [line["epoch"], line["batch"]] != now:
                fail(
                    f"{self.rehearsal.name}: at {event.name}, epoch {now[0]}, batch {now[1]}, the log says {line['event']!r} of epoch {line['epoch']}, "
                    f"batch {line['batch']}. Write get_logger(__name__).info(…, epoch=state.clock.epoch, batch=state.clock.batch), as others do."
                )

    # -- lines, and a log for structlog ------------------------------------------------------------------------

    def in_a_file(self, lines: list[dict[str, Any]]) -> None:
        """Fit where the standard error stream is a file; the log is an application's own."""
        stream, events = io.StringIO(), list[dict[str, Any]]()
        with standard_error(stream) as printed, structured_log(events):
            outcome = self.rehearsal.fit(progress=True, trackers=[FailingTracker()])
        name = self.rehearsal.name
        whole, now = (each.result for each in (self.rehearsal.whole, outcome))
        same(whole, now, "the fit", f"{name}: with lines of progress the fit is another one. {_SAME}")
        names = {each["event"] for each in lines}
        told = [each for each in events if each["event"] in names]
        same(told, lines, "lines", f"{name}: to structlog the log says something else than to logging. {_SAME}")
        places = r", \S+ batches/s(, [^,]* left)?$"
        shown = [re.sub(places, "", each) for each in _legible(stream.getvalue() + printed.getvalue())]
        self._check_words(shown, list(self._lines(outcome)))

    def _lines(self, outcome: Outcome) -> Iterator[str]:
        """Yield the lines that must be shown: a tenth of the fit each, where an epoch ends in the line of that."""
        rows, metrics, following = _rows(outcome), dict[str, float](), self._next_line(0)
        ends = [row["batch"] for row in outcome.result["history"]]
        done = sum(event is Event.BATCH_END for event, *_ in outcome.events)
        for batch in range(1, done + 1):
            for told in (each for at, each in outcome.told if at == batch):
                metrics.update(told)
                if batch == done and "lr" in told:
                    break  # the evaluation at the end of a fit that was stopped comes after the line
            due, at_end = batch >= following, bool(self.length) and (not batch % self.length or batch == self.total)
            following = self._next_line(batch) if due else following
            if due and not at_end:
                yield ", ".join([f"training: {self._place(batch)}", *_glance(metrics)])
            if batch in ends:
                yield rows[ends.index(batch)] + f"  {self._place(batch)}" * (due and at_end)
        yield from _stop(outcome)

    def _next_line(self, batch: int) -> int:
        if not self.total:
            return 1 << batch.bit_length()
        tenth = math.ceil(self.total / 10)
        return min((batch // tenth + 1) * tenth, self.total) if batch < self.total else self.total + 1

    # -- other ends --------------------------------------------------------------------------------------------

    def broken_off(self, checkpoint: Path) -> None:
        """Resume a fit with a bar, let it end with an exception, and look at the terminal that it leaves."""
        stream, begun = Terminal(), step_of(checkpoint)

        def break_off(event: Event, state: State) -> None:
            if event is Event.BATCH_END and state.clock.batch == begun + 2:
                raise _BrokenOffError

        with standard_error(stream) as printed, structured_log([]):
            try:
                self.rehearsal.fit(probe=break_off, progress=True, resume=checkpoint)
            except _BrokenOffError:
                pass
            else:
                return  # a fit that ends before
        lines, name = _legible(stream.getvalue()), self.rehearsal.name
        shown = [each for each in lines if not each.startswith(("training ", "evaluating "))]
        self._check_words(
            [*shown[1:], *_legible(printed.getvalue())], [each for each in _rows(self.rehearsal.whole) if each in shown]
        )
        places = [found[1] for each in lines if (found := _PLACE.match(each))]
        if not shown[0].startswith(f"resumed from {checkpoint} at ") or not shown[0].endswith(f" batch {begun}"):
            fail(f"{name}: resumed from {checkpoint}, a fit says {shown[0]!r}. {_SAME}")
        if places[:1] + places[-1:] != [self._place(begun), self._place(begun + 1)]:
            fail(
                f"{name}: resumed after {begun} batches and broken off in the second, the bar goes through {places}. {_SAME}"
            )
        _check_end(name, stream.getvalue(), self.rehearsal.changed)

    def stopped(self) -> None:
        """Stop a fit, and look for the reason at the end."""
        stream = io.StringIO()

        def stop(event: Event, state: State) -> None:
            if event is Event.BATCH_END:
                state.stop(_OWN_REASON)

        with standard_error(stream), structured_log([]):
            outcome = self.rehearsal.fit(probe=stop, progress=True)
        reason = outcome.result["stop reason"]
        if reason == self.rehearsal.whole.result["stop reason"] != "duration":  # the algorithm stops there itself
            return
        shown, must = _legible(stream.getvalue()), f"stopped: {_OWN_REASON}"
        if reason != _OWN_REASON or shown[-1] != must:
            fail(
                f"{self.rehearsal.name}: a fit that is stopped after its first batch says {shown[-1]!r}, not {must!r}. {_SAME}"
            )


class _BrokenOffError(Exception):
    """Raised on purpose."""


def _check_end(name: str, text: str, changed: Iterable[str]) -> None:
    """Look at how a terminal is left: with its cursor, at the begin of a line, and the streams as they were."""
    if not text.endswith(f"\n{_SHOW_CURSOR}") or f"{_HIDE_CURSOR}{_SHOW_CURSOR}" not in text or "sys.stdout" in changed:
        fail(
            f"{name}: the terminal is not given back at the end of a fit: {text[-80:]!r}. Leave sys.stdout and sys.stderr as they are."
        )


def _rows(outcome: Outcome) -> list[str]:
    """Return what must be shown of each epoch."""
    return [
        f"epoch {number}: " + "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name.startswith(_OF_INTEREST))
        + f"  {row['trainable']:,} parameters train"
        for number, row in enumerate(outcome.result["history"], 1)
    ]  # fmt: skip


def _stop(outcome: Outcome) -> list[str]:
    reason = outcome.result["stop reason"]
    return [] if reason == "duration" else [f"stopped: {reason}"]


def _glance(metrics: Mapping[str, float]) -> list[str]:
    """Return what must be shown of metrics beside the place in the fit."""
    measured = [f"{name} {value:.4g}" for name, value in metrics.items() if name.startswith(_OF_INTEREST)]
    return [*measured, f"lr {metrics.get('lr', 0.0):.4g}"]


def _place(count: int, total: int) -> str:
    return f"{count}/{total} ({math.floor(100 * count / total)}%)" if total else f"{count} batches"


_PLACE = re.compile(r"training +\S+ +(\d+[^,]*)")
_OF_INTEREST = ("train/", "eval/")
_SHOW_CURSOR, _HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


def _legible(text: str) -> list[str]:
    """Return the lines that were written to a terminal, without what moves its cursor or colors it."""
    lines = re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text))
    return [line.rstrip() for line in lines if line.strip()]
