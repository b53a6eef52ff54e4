"""The ledger's changes in one: several at once, surgery on many modules, schedules of a selection's own."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import group_rates, mlp, same_weights, weights  # registers the op "gain" as well
from thawline.engine import (
    ArgumentError,
    Clock,
    ParameterLedger,
    SelectorError,
    SurgeryError,
    constant,
    cosine,
    join,
    linear,
    warmup,
)


def ledger_of(depth: int = 4, **arguments: Any) -> ParameterLedger:
    """Return a ledger over some linear layers at rate 1."""
    torch.manual_seed(0)
    model = mlp(depth=depth)
    return ParameterLedger(model, torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9), **arguments)


# -- at once -----------------------------------------------------------------------------------------------------------


def test_changes_at_once_end_as_changes_one_by_one() -> None:
    """In groups, rates, trainable set and invariants; the version moves once."""
    found = []
    for together in (False, True):
        ledger = ledger_of()
        with ledger.at_once() if together else nullcontext():
            ledger.freeze("blocks[0]", owner="me")
            ledger.scale("blocks[1]", 0.5, owner="me")
            ledger.set_lr("head", 3.0, owner="me")
            ledger.schedule_lr("blocks[2]", linear(), owner="me")
            ledger.freeze("blocks[2]", owner="me")
            ledger.thaw("blocks[2]", owner="me")
        assert not together or ledger.version == 1
        ledger.verify()
        found.append((ledger.groups, ledger.digest(), ledger.trainable))
    assert found[0] == found[1]


def test_an_error_inside_leaves_what_was_done_before_it_whole() -> None:
    """The groups agree with what trains, and the next change works as ever."""
    ledger = ledger_of()

    def change() -> None:
        with ledger.at_once():
            ledger.freeze("blocks[0]", owner="me")
            assert "0.weight" not in ledger.trainable
            ledger.freeze("blokcs[1]", owner="me")

    with pytest.raises(SelectorError):
        change()
    ledger.verify()
    assert "0.weight" not in {name for group in ledger.groups for name in group.parameters}


def test_one_inside_another_ends_with_the_outer() -> None:
    """An algorithm may use it inside somebody else's."""
    ledger = ledger_of()
    with ledger.at_once():
        with ledger.at_once():
            ledger.scale("head", 0.5, owner="me")
        assert ledger.version == 0
    assert (ledger.version, ledger.rates["head"]) == (1, 0.5)


# -- surgery on many modules -------------------------------------------------------------------------------------------


def test_many_modules_get_what_each_would_get_alone() -> None:
    """The same values, journal, groups and names; and it resumes so."""
    one, many = ledger_of(), ledger_of()
    names = ["0", "2", "6"]
    for name in names:
        one.attach(name, "gain", owner="me", size=3)
    many.attach(names, "gain", owner="me", size=3)
    assert same_weights(weights(one.model), weights(many.model))
    assert (one.journal, one.digest(), one.groups) == (many.journal, many.digest(), many.groups)
    again = ledger_of()
    again.load_state_dict(many.state_dict())
    assert (again.journal, again.digest()) == (many.journal, many.digest())


def test_where_one_of_many_is_refused_nothing_is_attached() -> None:
    """The model is as before, and the ledger knows nothing of it."""
    ledger = ledger_of()
    before, digest = weights(ledger.model), ledger.digest()
    for names in (["0", "2", "nowhere"], ["0", "2", "0"]):
        with pytest.raises(SurgeryError):
            ledger.attach(names, "gain", owner="me", size=3)
        assert same_weights(weights(ledger.model), before)
        assert (ledger.journal, ledger.digest()) == ((), digest)
    ledger.attach("0", "gain", owner="me", size=3)
    ledger.verify()


# -- schedules of a selection's own ------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.floats(0.05, 0.95), st.booleans())
def test_schedules_multiply(moments: list[float], edge: float, swapped: bool) -> None:
    """Rate, factor, the ledger's schedule and two owners' own; in the same bits whoever comes first."""
    ledger = ledger_of(schedule=linear(end=0.5), min_lr=1e-6)
    owners = [("first", cosine()), ("second", join([constant(), linear()], [edge]))]
    for owner, schedule in reversed(owners) if swapped else owners:
        ledger.schedule_lr("head", schedule, owner=owner)
    ledger.scale("head", 3.0, owner="first")
    for progress in moments:
        ledger.apply_lr(Clock(progress=progress))
        ledger.verify()
        late = 1.0 if progress < edge else 1 - (progress - edge) / (1 - edge)
        own = 0.5 * (1 + math.cos(math.pi * progress)) * late
        common = 1 - 0.5 * progress
        assert ledger.rates["head"] == pytest.approx(max(3 * common * own, 1e-6), rel=1e-12)
        assert group_rates(ledger)["blocks[0]..blocks[2]"] == pytest.approx(common)


def test_a_schedule_ends_by_another_and_is_saved() -> None:
    """constant() joins the group of the others again; a ledger that loads has the schedules."""
    ledger, again = ledger_of(), ledger_of()
    ledger.schedule_lr("blocks[0]", warmup(0.5, then=cosine(0.1)), owner="me")
    ledger.attach("0", "gain", owner="other", size=1)  # beside the scheduled weight
    again.load_state_dict(ledger.state_dict())
    for each in (ledger, again):
        each.apply_lr(Clock(progress=0.25))
        assert group_rates(each) == {"blocks[0]": 0.5, "blocks[1]..head": 1.0}
        assert "0.gain" in each.groups[0].parameters
    again.schedule_lr("blocks[0]", constant(), owner="me")
    assert group_rates(again) == {"blocks[0]": 1.0, "blocks[1]..head": 1.0}
    ledger.detach("0", "gain", owner="other")
    ledger.verify()


@pytest.mark.parametrize("schedule", [0.5, lambda progress: 1 - progress, warmup("10ba"), None])
def test_a_schedule_that_a_checkpoint_could_not_hold_is_refused(schedule: Any) -> None:
    """Functions of one's own, and lengths that only the Trainer can turn into shares."""
    with pytest.raises(ArgumentError, match=r"schedule_lr\(schedule=\)"):
        ledger_of().schedule_lr("head", schedule, owner="me")


def test_a_rate_too_large_for_a_float_is_an_error() -> None:
    """Python's ints have no end."""
    with pytest.raises(ArgumentError):
        ledger_of().scale("head", 10**400, owner="me")
    with pytest.raises(ArgumentError):
        ledger_of().set_lr("head", 10**5000, owner="me")
