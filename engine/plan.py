"""Plan: what trains when and at which rate, as planned or as it happened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from attrs import define, field, frozen
from typing_extensions import override

from .clock import Clock
from .errors import ArgumentError, MissingExtraError
from .groups import Slot, layers_of_groups
from .layers import stretches
from .ledger import ParameterLedger

# A picture needs no more columns than it has pixels.
MAX_SAMPLES = 400


_HEADINGS = ("batches", "epochs", "trains", "share", "state", "FLOPs", "layers", "ends with", "learning rates")
_FLOPS = _HEADINGS.index("FLOPs")


@frozen
class Span:
    """A stretch of a fit in which the trainable set and the groups stay as they are.

    Args:
        start: Clock at its first batch.
        end: Clock after its last batch.
        trainable: Number of scalars that train.
        share: Their share of all.
        layers: Names of the layers in which something trains, in depth order.
        groups: Name, number of tensors, and learning rate at the start and the end, of each group.
        state_bytes: What the optimizers keep for what trains; None where that is not known.
        flops: Floating-point operations of forward and backward as a share of those that train everything; None where
            they were not counted. Only a plan counts them, so they are not compared.
        ends_with: Who changed the ledger then, or ``"duration"``, or why the fit stopped; empty while it lasts.
    """

    start: Clock
    end: Clock
    trainable: int
    share: float
    layers: tuple[str, ...]
    groups: tuple[tuple[str, int, float | None, float | None], ...]
    state_bytes: int | None = None
    flops: float | None = field(default=None, eq=False)
    ends_with: str = ""


@frozen
class Sample:
    """The highest learning rate in each layer that trains, at one batch."""

    batch: int
    epoch: float
    rates: Mapping[str, float]


@frozen
class Plan:
    """The timeline of a fit: one span for each stretch in which nothing changes.

    ``print(plan)`` shows a table, :meth:`save` draws it (layers by time, color the learning rate, frozen
    in gray), :meth:`to_json` gives plain data.

    Args:
        spans: The stretches, in order.
        samples: Learning rates at some batches, for the picture.
        layers: Names of the model's layers in depth order.
        notes: What the plan cannot know, a sentence each.
    """

    spans: tuple[Span, ...] = ()
    samples: tuple[Sample, ...] = ()
    layers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the whole timeline as JSON."""
        spans = [
            {
                **attrs.asdict(span),
                "start": span.start.to_json(),
                "end": span.end.to_json(),
                "layers": list(span.layers),
                "groups": [list(g) for g in span.groups],
            }
            for span in self.spans
        ]
        samples = [[each.batch, each.epoch, dict(each.rates)] for each in self.samples]
        return {"spans": spans, "samples": samples, "layers": list(self.layers), "notes": list(self.notes)}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Plan:
        """Build from :meth:`to_json`."""
        spans = tuple(
            Span(
                Clock.from_json(each["start"]),
                Clock.from_json(each["end"]),
                each["trainable"],
                each["share"],
                tuple(each["layers"]),
                tuple((name, count, first, last) for name, count, first, last in each["groups"]),
                each["state_bytes"],
                each["flops"],
                each["ends_with"],
            )
            for each in saved["spans"]
        )
        samples = tuple(
            Sample(int(batch), float(epoch), {name: float(rate) for name, rate in rates.items()})
            for batch, epoch, rates in saved["samples"]
        )
        return cls(spans, samples, tuple(saved["layers"]), tuple(saved["notes"]))

    @override
    def __str__(self) -> str:
        rows = [_HEADINGS, *(self._row(span) for span in self.spans)]
        if all(span.flops is None for span in self.spans):
            rows = [row[:_FLOPS] + row[_FLOPS + 1 :] for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])

    def _row(self, span: Span) -> tuple[str, ...]:
        return (
            f"{span.start.batch} - {span.end.batch}",
            f"{_epochs(span.start):.2f} - {_epochs(span.end):.2f}",
            f"{span.trainable:,}",
            f"{span.share:.1%}",
            "-" if span.state_bytes is None else _size(span.state_bytes),
            "-" if span.flops is None else f"{span.flops:.0%}",
            _contracted(span.layers, self.layers),
            span.ends_with,
            ", ".join(_rates(name, first, last) for name, _, first, last in span.groups),
        )

    def save(self, path: str | Path, *, title: str | None = None) -> Path:
        """Draw the timeline: layers by epochs, color the learning rate on a log scale, frozen in gray.

        Args:
            path: Where to write the picture; the suffix decides the format, ``.png`` where there is none.
            title: A line above it.

        Raises:
            ArgumentError: There is nothing to draw, or no such format.
            MissingExtraError: matplotlib is not installed.

        Returns:
            Where the picture is.
        """
        if not self.samples:
            raise ArgumentError(
                "Plan.save()", got="an empty timeline", takes="a fit of at least one batch", example="duration='1ep'"
            )
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.colors import LogNorm
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingExtraError("Plan.save needs matplotlib. Write: pip install 'thawline[plot]'") from error
        target = Path(path) if Path(path).suffix else Path(f"{path}.png")
        kinds = sorted(FigureCanvasAgg.get_supported_filetypes())
        if target.suffix[1:].lower() not in kinds:
            takes = f"a picture's name, ending in one of {', '.join(kinds)}; text is str(plan), data plan.to_json()"
            raise ArgumentError("Plan.save(path=)", got=str(path), takes=takes, example="plan.save('plan.png')")
        target.parent.mkdir(parents=True, exist_ok=True)
        import numpy as np

        names = list(self.layers)
        grid = np.full((len(names), len(self.samples)), np.nan)
        for column, each in enumerate(self.samples):
            for row, name in enumerate(names):
                grid[row, column] = each.rates.get(name, np.nan)  # frozen is NaN; a rate of zero is a rate
        edges = [each.epoch for each in self.samples]
        edges.append(max(_epochs(self.spans[-1].end), edges[-1] + 1e-9))
        figure = Figure(figsize=(8, 0.9 + 0.28 * len(names)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.set_facecolor("0.82")
        rate = "at which learning rate"
        if (positive := grid[grid > 0]).size:
            low, high = float(positive.min()), float(positive.max())
            varies = low < high
            low = max(low, high * 1e-4) if varies else low * 0.999
            norm = LogNorm(low, high, clip=True)
            grid = np.where(grid < low, low, grid)
            mesh = axes.pcolormesh(
                edges, np.arange(len(names) + 1), grid, cmap="viridis", norm=norm, linewidth=0, rasterized=True
            )
            if varies:
                figure.colorbar(mesh, ax=axes, label="learning rate")
            else:
                rate = f"learning rate {high:g}"
        axes.set_yticks(np.arange(len(names)) + 0.5, names)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xlabel("epochs")
        axes.set_title(title or f"what trains, {rate} (gray: frozen)", fontsize="medium")
        figure.savefig(target, dpi=150)
        return target


@define(eq=False)
class Recorder:
    """Writes down what happens: called once a batch, it does something only when something changed.

    Args:
        ledger: The ledger of the fit.
        total_batches: How long the fit is expected to be; spaces the samples of the picture.
        flops: The share of the operations that a step costs, given what trains; None where nobody counts.
    """

    ledger: ParameterLedger
    total_batches: int | None = None
    flops: Callable[[frozenset[str]], float | None] | None = None
    _spans: list[Span] = field(init=False, factory=list)
    _samples: list[Sample] = field(init=False, factory=list)
    _marks: list[Clock] = field(init=False, factory=list)
    _version: int = field(init=False, default=-1)
    _shape: str = field(init=False, default="")
    _next_sample: int = field(init=False, default=0)
    _open: Span | None = field(init=False, default=None)
    _layers_of_group: list[tuple[str, ...]] = field(init=False, factory=list)
    _slots: tuple[Slot, ...] = field(init=False, default=())

    def observe(self, clock: Clock) -> None:
        """Take note before a batch, once learning rates are set."""
        if self.ledger.version != self._version:
            self._version = self.ledger.version
            shape = self._shape_now()
            if shape != self._shape:
                self._shape = shape
                self._end(clock)
                self._begin(clock)
            elif self._open is None:  # resumed where the ledger had moved, and it came back to what it was
                self._reopen()
            self.ledger.changed_by = ()
        elif clock.batch < self._next_sample:
            return
        self._sample(clock)

    def _shape_now(self) -> str:
        """Return what a span is known by: what trains, in which groups, and what their rates follow."""
        groups = [
            (each.parameters, each.optimizer, each.base_lr, each.scale, {**each.options, "lr": None})
            for each in self.ledger.groups
        ]
        return repr((groups, [(each.origin, each.course) for each in self.ledger.slots]))

    def _reopen(self) -> None:
        self._open = self._spans.pop()
        self._layers_of_group, self._slots = self._layers(), self.ledger.slots

    def timeline(self, clock: Clock, ends_with: str = "") -> Plan:
        """Return what happened up to ``clock``, and why it ended there."""
        self._settle()
        spans = list(self._spans)
        if self._open is not None and clock.batch > self._open.start.batch:
            spans.append(self._with_end(self._open, clock))
        return Plan(_ended(spans, ends_with), tuple(self._samples), self.ledger.layers.names)

    def state_dict(self, clock: Clock) -> dict[str, Any]:
        """Return what was written down, as JSON."""
        current = self.ledger.version == self._version
        return {
            **self.timeline(clock).to_json(),
            "current": current,
            "shape": self._shape,
            "changed_by": list(self.ledger.changed_by),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned: the last span is open again.

        It is not where the ledger had moved since the last batch, as at an EPOCH_END: the next batch begins a new span.
        """
        plan = Plan.from_json(saved)
        # With those whom a migration has let begin or go since.
        self.ledger.changed_by = tuple(dict.fromkeys((*saved["changed_by"], *self.ledger.changed_by)))
        self._spans, self._samples, self._marks = list(plan.spans), list(plan.samples), []
        self._open, self._version, self._shape = None, -1, saved["shape"]
        if self._spans and saved["current"]:
            self._version = self.ledger.version
            self._reopen()
        self._next_sample = self._samples[-1].batch + self._step(len(self._samples)) if self._samples else 0

    def _end(self, clock: Clock) -> None:
        """Close the running span at ``clock``."""
        self._settle()
        span, self._open = self._open, None
        if span is not None and clock.batch > span.start.batch:
            self._spans.append(self._with_end(span, clock))
        self._spans[:] = _ended(self._spans, ", ".join(self.ledger.changed_by))
        self.ledger.changed_by = ()

    def _begin(self, clock: Clock) -> None:
        ledger = self.ledger
        numel = {name: each.numel() for name, each in ledger.parameters.items()}
        trains = sum(numel[name] for name in ledger.trainable)
        self._layers_of_group, self._slots = self._layers(), ledger.slots
        inside = {layer for layers in self._layers_of_group for layer in layers}
        names = tuple(name for name in ledger.layers.names if name in inside)
        groups = tuple((each.name, len(each.parameters), each.lr, each.lr) for each in ledger.groups)
        flops = None if self.flops is None else self.flops(ledger.trainable)
        share = trains / max(1, sum(numel.values()))
        self._open = Span(clock, clock, trains, share, names, groups, ledger.state_bytes, flops)

    def _layers(self) -> list[tuple[str, ...]]:
        return layers_of_groups((group.parameters for group in self.ledger.groups), self.ledger.layers)

    def _with_end(self, span: Span, clock: Clock) -> Span:
        ledger = self.ledger
        factor = ledger.schedule(clock.progress)
        last = [None if slot.base_lr is None else slot.lr(factor, clock, ledger.min_lr) for slot in self._slots]
        groups = tuple((*group[:3], lr) for group, lr in zip(span.groups, last, strict=True))
        return attrs.evolve(span, end=clock, groups=groups)

    def _sample(self, clock: Clock) -> None:
        self._marks.append(clock)
        count = len(self._samples) + len(self._marks)
        self._next_sample = clock.batch + self._step(count)
        if count > 2 * MAX_SAMPLES:  # a fit of unknown length: halve the resolution
            self._settle()
            del self._samples[1::2]

    def _settle(self) -> None:
        """Work out the rates at the marks of the running span, in which slots and layers stay as they are."""
        ledger = self.ledger
        for clock in self._marks:
            rates: dict[str, float] = {}
            factor = ledger.schedule(clock.progress)
            for slot, layers in zip(self._slots, self._layers_of_group, strict=True):
                lr = 0.0 if slot.base_lr is None else slot.lr(factor, clock, ledger.min_lr)
                for layer in layers:
                    rates[layer] = max(rates.get(layer, 0.0), lr)
            self._samples.append(Sample(clock.batch, _epochs(clock), rates))
        self._marks.clear()

    def _step(self, count: int) -> int:
        return max(1, (self.total_batches or 0) // MAX_SAMPLES, count // MAX_SAMPLES)


def _ended(spans: Sequence[Span], ends_with: str) -> tuple[Span, ...]:
    """Return the spans, the last one with what ended it where that is not known yet."""
    if spans and not spans[-1].ends_with:
        return (*spans[:-1], attrs.evolve(spans[-1], ends_with=ends_with))
    return tuple(spans)


def _size(count: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << power:
            return f"{count / (1 << power):.1f} {unit}"
    return f"{count} B"


def _epochs(clock: Clock) -> float:
    return clock.epoch + (clock.batch_in_epoch / clock.batches_per_epoch if clock.batches_per_epoch else 0.0)


def _rates(name: str, first: float | None, last: float | None) -> str:
    if first is None:
        return name
    return f"{name} {first:.2g}" if first == last or last is None else f"{name} {first:.2g} to {last:.2g}"


def _contracted(layers: Sequence[str], order: Sequence[str]) -> str:
    if not layers or len(layers) == len(order):
        return "all" if layers else "none"
    found = stretches(layers, order)
    texts = [each[0] if len(each) == 1 else f"{each[0]} .. {each[-1]} ({len(each)})" for each in found]
    return ", ".join(texts)
