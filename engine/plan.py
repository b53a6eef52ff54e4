"""Plan: what trains when and at which rate, as planned or as it happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from attrs import define, field, frozen
from typing_extensions import override

from .clock import Clock
from .errors import ArgumentError, MissingExtraError
from .groups import Slot
from .ledger import ParameterLedger

# A picture needs no more columns than it has pixels.
MAX_SAMPLES = 400


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
    """

    start: Clock
    end: Clock
    trainable: int
    share: float
    layers: tuple[str, ...]
    groups: tuple[tuple[str, int, float | None, float | None], ...]


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
    """

    spans: tuple[Span, ...] = ()
    samples: tuple[Sample, ...] = ()
    layers: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the whole timeline as JSON."""
        spans = [
            {**attrs.asdict(span), "layers": list(span.layers), "groups": [list(g) for g in span.groups]}
            for span in self.spans
        ]
        samples = [[each.batch, each.epoch, dict(each.rates)] for each in self.samples]
        return {"spans": spans, "samples": samples, "layers": list(self.layers)}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Plan:
        """Build from :meth:`to_json`."""
        spans = tuple(
            Span(
                Clock(**each["start"]),
                Clock(**each["end"]),
                each["trainable"],
                each["share"],
                tuple(each["layers"]),
                tuple((name, count, first, last) for name, count, first, last in each["groups"]),
            )
            for each in saved["spans"]
        )
        samples = tuple(Sample(batch, epoch, dict(rates)) for batch, epoch, rates in saved["samples"])
        return cls(spans, samples, tuple(saved["layers"]))

    @override
    def __str__(self) -> str:
        rows = [("batches", "epochs", "trains", "share", "layers", "learning rates")]
        for span in self.spans:
            rates = ", ".join(_rates(name, first, last) for name, _, first, last in span.groups)
            epochs = f"{_epochs(span.start):.2f} - {_epochs(span.end):.2f}"
            rows.append(
                (
                    f"{span.start.batch} - {span.end.batch}",
                    epochs,
                    f"{span.trainable:,}",
                    f"{span.share:.1%}",
                    _contracted(span.layers, self.layers),
                    rates,
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]) for row in rows
        )

    def save(self, path: str | Path, *, title: str | None = None) -> Path:
        """Draw the timeline: layers by epochs, color the learning rate on a log scale, frozen in gray.

        Args:
            path: Where to write the picture; the suffix decides the format.
            title: A line above it.

        Raises:
            ArgumentError: There is nothing to draw.
            MissingExtraError: matplotlib is not installed.
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
        if (positive := grid[grid > 0]).size:
            low, high = float(positive.min()), float(positive.max())
            low = low * 0.999 if low == high else max(low, high * 1e-4)
            norm = LogNorm(low, high, clip=True)
            grid = np.where(grid < low, low, grid)
            mesh = axes.pcolormesh(
                edges, np.arange(len(names) + 1), grid, cmap="viridis", norm=norm, linewidth=0, rasterized=True
            )
            figure.colorbar(mesh, ax=axes, label="learning rate")
        axes.set_yticks(np.arange(len(names)) + 0.5, names)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xlabel("epochs")
        axes.set_title(title or "what trains, at which learning rate (gray: frozen)", fontsize="medium")
        target = Path(path)
        figure.savefig(target, dpi=150)
        return target


@define(eq=False)
class Recorder:
    """Writes down what happens: called once a batch, it does something only when something changed.

    Args:
        ledger: The ledger of the fit.
        total_batches: How long the fit is expected to be; spaces the samples of the picture.
    """

    ledger: ParameterLedger
    total_batches: int | None = None
    _spans: list[Span] = field(init=False, factory=list)
    _samples: list[Sample] = field(init=False, factory=list)
    _marks: list[Clock] = field(init=False, factory=list)
    _version: int = field(init=False, default=-1)
    _next_sample: int = field(init=False, default=0)
    _open: Span | None = field(init=False, default=None)
    _layers_of_group: list[tuple[str, ...]] = field(init=False, factory=list)
    _slots: tuple[Slot, ...] = field(init=False, default=())

    def observe(self, clock: Clock) -> None:
        """Take note before a batch, once learning rates are set."""
        if self.ledger.version != self._version:
            self._version = self.ledger.version
            self.end(clock)
            self._begin(clock)
        elif clock.batch < self._next_sample:
            return
        self._sample(clock)

    def end(self, clock: Clock) -> None:
        """Close the running span at ``clock``."""
        self._settle()
        span, self._open = self._open, None
        if span is not None and clock.batch > span.start.batch:
            self._spans.append(self._with_end(span, clock))

    def timeline(self, clock: Clock) -> Plan:
        """Return what happened up to ``clock``."""
        self._settle()
        spans = list(self._spans)
        if self._open is not None and clock.batch > self._open.start.batch:
            spans.append(self._with_end(self._open, clock))
        return Plan(tuple(spans), tuple(self._samples), self.ledger.layers.names)

    def state_dict(self, clock: Clock) -> dict[str, Any]:
        """Return what was written down, as JSON."""
        return {**self.timeline(clock).to_json(), "current": self.ledger.version == self._version}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned: the last span is open again.

        It is not where the ledger had moved since the last batch, as at an EPOCH_END: the next batch begins a new span.
        """
        plan = Plan.from_json(saved)
        self._spans, self._samples = list(plan.spans), list(plan.samples)
        self._open, self._version = None, -1
        if self._spans and saved["current"]:
            self._version = self.ledger.version
            self._open = self._spans.pop()
            self._layers_of_group, self._slots = self._layers(), self.ledger.slots
        self._next_sample = self._samples[-1].batch + self._step(len(self._samples)) if self._samples else 0

    def _begin(self, clock: Clock) -> None:
        ledger = self.ledger
        numel = {name: each.numel() for name, each in ledger.parameters.items()}
        trains = sum(numel[name] for name in ledger.trainable)
        self._layers_of_group, self._slots = self._layers(), ledger.slots
        inside = {layer for layers in self._layers_of_group for layer in layers}
        names = tuple(name for name in ledger.layers.names if name in inside)
        groups = tuple((each.name, len(each.parameters), each.lr, each.lr) for each in ledger.groups)
        self._open = Span(clock, clock, trains, trains / max(1, sum(numel.values())), names, groups)

    def _layers(self) -> list[tuple[str, ...]]:
        of = self.ledger.layers.of
        return [tuple(dict.fromkeys(of(name).name for name in group.parameters)) for group in self.ledger.groups]

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


def _epochs(clock: Clock) -> float:
    return clock.epoch + (clock.batch_in_epoch / clock.batches_per_epoch if clock.batches_per_epoch else 0.0)


def _rates(name: str, first: float | None, last: float | None) -> str:
    if first is None:
        return name
    return f"{name} {first:.2g}" if first == last or last is None else f"{name} {first:.2g} to {last:.2g}"


def _contracted(layers: Sequence[str], order: Sequence[str]) -> str:
    if len(layers) == sum(1 for _ in order) or not layers:
        return "all" if layers else "none"
    return layers[0] if len(layers) == 1 else f"{layers[0]} .. {layers[-1]} ({len(layers)})"
