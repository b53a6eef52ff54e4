"""The part of the conformance kit that looks at the picture of a fit, pixel by pixel."""

from __future__ import annotations

import importlib.util
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from .plan import Plan
from .promises import fail
from .randomness import derive_seed
from .rehearsal import Rehearsal

_ONE_IN = 6
_FROZEN = (0.82, 0.82, 0.82)
_DPI = 150
_TEXT = re.compile(r'<text[^>]* y="([\d.]+)"[^>]*>([^<]*)</text>')
_PLAIN = "Name layers in plain text, and leave the timeline to the ledger."


def is_drawn_as_it_was(rehearsal: Rehearsal) -> None:
    """Hold the picture of a fit against its timeline, where matplotlib is installed; of one algorithm in a few, since drawing is slow."""
    drawn = rehearsal.thorough or derive_seed(rehearsal.seed, rehearsal.name, "drawn") % _ONE_IN == 0
    timeline = rehearsal.whole.timeline
    if not drawn or not timeline.samples or importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib as mpl

    with tempfile.TemporaryDirectory() as folder:
        for title, plan in ((None, timeline), ("the first batch", _leveled(timeline))):
            place = Path(folder) / str(title) / "plan"
            picture = plan.save(place)
            if picture != place.with_suffix(".png"):
                fail(f"{rehearsal.name}: the picture to be saved as {place.name} is {picture.name}.")
            frame = _check_pixels(rehearsal, plan, picture)
            with mpl.rc_context({"svg.fonttype": "none"}):
                texts = plan.save(place.with_suffix(".svg"), title=title).read_text()
            _check_texts(rehearsal, plan, texts, title)
            _check_labels(rehearsal, plan, texts, *frame[2:])


def _leveled(plan: Plan) -> Plan:
    """Return the first sample of a plan alone, with one rate wherever something trains."""
    first = plan.samples[0]
    rate = max(first.rates.values(), default=0.0)
    return attrs.evolve(plan, samples=(attrs.evolve(first, rates=dict.fromkeys(first.rates, rate)),))


def _scale(plan: Plan) -> tuple[float, float]:
    """Return the lowest and the highest rate that has a color of its own; zeros where there is none."""
    rates = [rate for each in plan.samples for rate in each.rates.values() if rate > 0]
    return (max(min(rates), max(rates) * 1e-4), max(rates)) if rates else (0.0, 0.0)


def _check_pixels(rehearsal: Rehearsal, plan: Plan, picture: Path) -> tuple[int, int, int, int]:
    """Look at the middle of each field: gray where nothing trains, else the color of the rate on a scale of logarithms; return the frame."""
    from matplotlib import colormaps
    from matplotlib.image import imread

    pixels: Any = imread(picture)[..., :3]
    left, right, top, bottom = frame = _frame(pixels)
    epochs = [each.epoch for each in plan.samples]
    end = plan.spans[-1].end
    last = end.epoch + (end.batch_in_epoch / end.batches_per_epoch if end.batches_per_epoch else 0.0)
    edges = [*epochs, max(last, epochs[-1] + 1e-9)]
    low, high = _scale(plan)
    color = colormaps["viridis"]
    for column, sample in enumerate(plan.samples):
        middle, width = (edges[column] + edges[column + 1]) / 2 - edges[0], edges[column + 1] - edges[column]
        across = (right - left) / (edges[-1] - edges[0])
        if width * across < 8:  # too narrow to have a middle
            continue
        for row, layer in enumerate(plan.layers):
            seen = pixels[
                round(bottom - (row + 0.5) * (bottom - top) / len(plan.layers)), round(left + middle * across)
            ]
            rate = sample.rates.get(layer)
            must: Any = _FROZEN
            if rate is not None and high:
                share = math.log(max(rate, low) / low) / math.log(high / low) if low < high else 1.0
                must = color(share)[:3]
            if np.abs(seen - np.array(must)).max() > 0.02:
                fail(
                    f"{rehearsal.name}: in the picture of the timeline the layer {layer!r} has another color at batch {sample.batch} than its "
                    f"rate there, {rate}. What trains, and at which rate, is the ledger's: ledger.freeze, thaw, scale, set_lr."
                )
    return frame


def _frame(pixels: Any) -> tuple[int, int, int, int]:
    """Return where the frame of the axes is: left, right, top and bottom."""
    dark = (pixels < 0.3).all(-1)
    columns = _runs(dark.sum(0))
    left, right = columns[0], columns[1]
    rows = _runs(dark[:, left:right].sum(1))
    return left, right, rows[0], rows[-1]


def _runs(counts: Any) -> list[int]:
    """Return where the counts are high, a place for each run of neighbors."""
    high = np.flatnonzero(counts > 0.8 * counts.max()).tolist()
    return [each for each in high if each - 1 not in high]


def _check_texts(rehearsal: Rehearsal, plan: Plan, written: str, title: str | None) -> None:
    """Look for what the axes are of, and the title."""
    texts = [text for _, text in _TEXT.findall(written)]
    low, high = _scale(plan)
    rate = "at which learning rate" if low != high or not high else f"learning rate {high:g}"
    must = ["epochs", title or f"what trains, {rate} (gray: frozen)", *(["learning rate"] if low < high else [])]
    if missing := [each for each in must if each not in texts]:
        fail(f"{rehearsal.name}: the picture of the timeline says {texts}, and lacks {missing}. {_PLAIN}")


def _check_labels(rehearsal: Rehearsal, plan: Plan, written: str, top: int, bottom: int) -> None:
    """Look for the name of each layer beside its row, from below."""
    places = {text: float(down) * _DPI / 72 for down, text in _TEXT.findall(written) if text in plan.layers}
    height = (bottom - top) / len(plan.layers)
    rows = [math.floor((bottom - places[each]) / height) if each in places else None for each in plan.layers]
    if rows != list(range(len(rows))):
        fail(
            f"{rehearsal.name}: in the picture of the timeline the layers {plan.layers} stand beside the rows {rows}. {_PLAIN}"
        )
