"""The timeline of a fit: table, picture, JSON, and agreement with what the optimizers had."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import nn

from helpers import loader, mlp
from thawline.algorithms import LayerThaw, TrainOnly
from thawline.engine import (
    Algorithm,
    ArgumentError,
    Checkpointing,
    Event,
    FitResult,
    Plan,
    Stage,
    State,
    Trainer,
    constant,
    cosine,
    linear,
)
from thawline.engine.plan import _size
from timelines import stack


def thawed(**more: object) -> FitResult:
    """Return a fit in which two blocks thaw."""
    trainer = Trainer(
        algorithms=[LayerThaw(every=1)], optimizer=partial(torch.optim.SGD, lr=0.1), loss_fn=nn.functional.cross_entropy,
        progress=False, **more,  # type: ignore[arg-type]
    )  # fmt: skip
    return trainer.fit(mlp(), loader(), duration="4ep")


def planned(algorithms: list[Algorithm], depth: int, optimizer: Any = None) -> Plan:
    """Return the plan of a fit of an embedding, some blocks and a head."""
    trainer = Trainer(
        algorithms=algorithms, optimizer=optimizer or partial(torch.optim.SGD, lr=0.1),
        loss_fn=nn.functional.cross_entropy, progress=False,
    )  # fmt: skip
    return trainer.plan(stack(depth), [torch.zeros(2, 1, dtype=torch.long)] * 3, duration="1ep")


def test_spans_are_exact_at_their_ends() -> None:
    """Each span says what trains, and each group's rate at its first batch and after its last."""
    spans = thawed(schedule=linear()).timeline.spans
    assert [(span.start.batch, span.end.batch) for span in spans] == [(0, 4), (4, 8), (8, 16)]
    assert [span.trainable for span in spans] == [10, 30, 50]
    assert [span.share for span in spans] == [0.2, 0.6, 1.0]
    rates = [[(name, first, last) for name, _, first, last in span.groups] for span in spans]
    assert rates[0] == [("head", 0.1, pytest.approx(0.075))]
    assert rates[1] == [
        ("blocks[1]", pytest.approx(0.0375), pytest.approx(0.025)),
        ("head", pytest.approx(0.075), pytest.approx(0.05)),
    ]
    assert rates[2][0] == ("blocks[0]", pytest.approx(0.0125), 0.0)


def test_samples_are_what_the_optimizer_had() -> None:
    """The picture's colors are the learning rates of the groups at that batch, layer by layer."""
    seen: list[dict[str, float]] = []

    class Watch(Algorithm):
        """Reads the optimizer's groups."""

        events = frozenset({Event.BEFORE_STEP})

        def apply(self, event: Event, state: State) -> None:
            """Note the rate of each layer."""
            seen.append(
                {
                    state.layers.of(name).name: group.lr or 0.0
                    for group in state.ledger.groups
                    for name in group.parameters
                }
            )

    trainer = Trainer(
        algorithms=[LayerThaw(every=1), Watch()], optimizer=partial(torch.optim.SGD, lr=0.1), schedule=cosine(),
        loss_fn=nn.functional.cross_entropy, progress=False,
    )  # fmt: skip
    plan = trainer.fit(mlp(), loader(), duration="4ep").timeline
    assert [sample.batch for sample in plan.samples] == list(range(16))
    assert [dict(sample.rates) for sample in plan.samples] == seen


class ThereAndBack(Algorithm):
    """Freezes the head and thaws it again at each epoch's start."""

    events = frozenset({Event.EPOCH_START})
    stage = Stage.TRAINABILITY

    def apply(self, event: Event, state: State) -> None:
        """Freeze and thaw."""
        state.ledger.freeze("head", owner=self.owner)
        state.ledger.thaw("head", owner=self.owner)


def test_a_row_begins_only_where_something_changed(tmp_path: Path) -> None:
    """What ends an event as it began it changed nothing, in a resumed fit too."""
    trainer = Trainer(
        algorithms=[ThereAndBack()], optimizer=partial(torch.optim.SGD, lr=0.1), loss_fn=nn.functional.cross_entropy,
        progress=False, run_dir=tmp_path, checkpoint=Checkpointing(every="1ba", keep=99),
    )  # fmt: skip
    whole = trainer.fit(mlp(), loader(), duration=3).timeline
    assert [(span.start.batch, span.ends_with) for span in whole.spans] == [(0, "duration")]
    for path in sorted(tmp_path.glob("ba*")):
        resumed = attrs.evolve(trainer, run_dir=None, checkpoint=None).fit(mlp(), loader(), duration=3, resume=path)
        assert resumed.timeline == whole


def test_a_plan_survives_json() -> None:
    """to_json and from_json invert each other."""
    import json

    plan = thawed().timeline
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_table_has_a_row_a_span() -> None:
    """print(timeline): batches, epochs, parameters, share, layers, learning rates."""
    lines = str(thawed().timeline).splitlines()
    assert len(lines) == 4
    assert lines[1].split()[:3] == ["0", "-", "4"]
    assert "20.0%" in lines[1]
    assert "blocks[0] 0.025" in lines[3]


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    """A PNG with the frozen cells gray and the training ones colored."""
    from matplotlib.image import imread

    path = thawed().timeline.save(tmp_path / "plan.png")
    picture = imread(path)
    colors = {tuple(round(float(value), 2) for value in pixel[:3]) for pixel in picture.reshape(-1, 4)[::7]}
    assert (0.82, 0.82, 0.82) in colors
    assert len(colors) > 20


def test_an_empty_plan_says_what_it_needs(tmp_path: Path) -> None:
    """Nothing to draw is a typed error."""
    with pytest.raises(ArgumentError, match="at least one batch"):
        Plan().save(tmp_path / "plan.png")


def test_the_table_shows_gaps_as_gaps() -> None:
    """Layers between which others are frozen are no range."""
    text = str(planned([TrainOnly(["blocks[0]", "blocks[2:4]", "head"])], depth=5))
    assert "blocks[0], blocks[2] .. blocks[3] (2), head" in text
    assert "blocks[0]+blocks[2]..blocks[3]+head 0.1" in text


def test_the_table_names_the_optimizer_where_there_are_several() -> None:
    """Two groups of one layer are told apart."""
    optimizers = [("*.bias", partial(torch.optim.SGD, lr=0.1)), ("*", partial(torch.optim.AdamW, lr=0.2))]
    assert "blocks[0]..head (SGD) 0.1, stem..head (AdamW) 0.2" in str(planned([], depth=2, optimizer=optimizers))


@pytest.mark.parametrize("name", ["plan.json", "plan.txt"])
def test_a_name_that_is_no_pictures_is_refused(tmp_path: Path, name: str) -> None:
    """The message says what gives text and data."""
    with pytest.raises(ArgumentError, match=r"text is str\(plan\), data plan.to_json\(\)"):
        thawed().timeline.save(tmp_path / name)


def test_a_picture_is_where_it_is_said_to_be(tmp_path: Path) -> None:
    """Without a suffix it is a PNG; folders are made."""
    assert thawed().timeline.save(tmp_path / "new" / "plan") == tmp_path / "new" / "plan.png"
    assert (tmp_path / "new" / "plan.png").is_file()


@pytest.mark.parametrize(
    ("count", "text"),
    [(1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (1 << 20, "1.0 MiB"), (5 << 30, "5.0 GiB")],
)
def test_sizes_are_written_in_powers_of_1024(count: int, text: str) -> None:
    """The largest unit that is not above the size."""
    assert _size(count) == text


def test_a_constant_rate_is_written_and_has_no_scale_of_colors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only rates that differ need one."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    saved = figure.Figure.savefig

    def save(self: Any, *args: Any, **options: Any) -> None:
        drawn.append(self)
        saved(self, *args, **options)

    monkeypatch.setattr(figure.Figure, "savefig", save)
    data, trainer = [(torch.zeros(2, 4), torch.zeros(2, 1))] * 3, partial(Trainer, loss_fn=nn.functional.mse_loss)
    for schedule in (constant(), linear()):
        trainer(schedule=schedule).plan(nn.Linear(4, 1), data, duration=2).save(tmp_path / "plan.png")
    assert [len(each.axes) for each in drawn] == [1, 2]
    assert [each.axes[0].get_title().split(" (")[0] for each in drawn] == [
        "what trains, learning rate 0.0001",
        "what trains, at which learning rate",
    ]
