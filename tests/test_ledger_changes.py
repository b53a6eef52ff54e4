"""The ledger's changes in one: several at once, surgery on many modules, schedules of a selection's own."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from helpers import group_rates, mlp, same_weights, weights  # registers the op "gain" as well
from thawline.engine import (
    ArgumentError,
    Attachment,
    Clock,
    LedgerError,
    ParameterLedger,
    SelectorError,
    Site,
    SurgeryError,
    cosine,
    linear,
    surgery_op,
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
            ledger.set_schedule("blocks[2]", linear(), owner="me", span="1dur")
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


@surgery_op("foreign")
def foreign(site: Site) -> list[Attachment]:
    """Make the module what it is not."""
    return [Attachment(site.name, new_class=torch.nn.Identity)]


def test_a_class_that_is_no_subclass_is_refused() -> None:
    """The module keeps its class, which isinstance checks go by."""
    ledger = ledger_of()
    with pytest.raises(SurgeryError, match="makes '0' a Identity, which is no subclass of its class Linear"):
        ledger.attach("0", "foreign", owner="me")
    assert (type(ledger.model.get_submodule("0")), ledger.journal) == (torch.nn.Linear, ())


def test_who_set_a_value_first_is_named_with_what_to_write() -> None:
    """Rates can be scaled by a second owner; other options cannot."""
    for name, change, advice in (
        (
            "learning rate",
            lambda ledger, value, owner: ledger.set_lr("head", value, owner=owner),
            ", or write ledger.scale(",
        ),
        ("weight_decay", lambda ledger, value, owner: ledger.set_options("head", weight_decay=value, owner=owner), "."),
    ):
        ledger = ledger_of()
        change(ledger, 0.1, "one")
        with pytest.raises(LedgerError) as caught:
            change(ledger, 0.2, "two")
        first, _, last = str(caught.value).partition(" Let one of them choose other parameters")
        assert (
            first
            == f"the {name} of '6.weight' was set to 0.1 by 'one', and 'two' sets it to 0.2: one owner a parameter."
        )
        assert last.startswith(advice)


@pytest.mark.parametrize(
    ("depth", "name"),
    [(8, "blocks[0]+blocks[2]+blocks[4]+blocks[6]..head"), (10, "blocks[0]+blocks[2]+blocks[4]+2 more")],
)
def test_a_groups_name_lists_four_stretches_of_layers_at_most(depth: int, name: str) -> None:
    """What follows is counted, so that it fits into a table."""
    ledger = ledger_of(depth=depth)
    ledger.freeze([f"blocks[{index}]" for index in range(1, depth - 2, 2)], owner="me")
    assert [each.name for each in ledger.groups] == [name]


# -- schedules of a selection's own ------------------------------------------------------------------------------------


def test_a_schedule_is_taken_back_and_saved() -> None:
    """Without it the layer joins the group of the others again; a ledger that loads has the schedules."""
    ledger, again = ledger_of(), ledger_of()
    ledger.set_schedule("blocks[0]", warmup(0.5, then=cosine(0.1)), owner="me", span="1dur")
    ledger.attach("0", "gain", owner="other", size=1)  # beside the scheduled weight
    again.load_state_dict(ledger.state_dict())
    for each in (ledger, again):
        each.apply_lr(Clock(progress=0.25))
        assert group_rates(each) == {"blocks[0]": 0.5, "blocks[1]..head": 1.0}
        assert "0.gain" in each.groups[0].parameters
    again.set_schedule("blocks[0]", None, owner="me")
    assert group_rates(again) == {"blocks[0]..head": 1.0}
    ledger.detach("0", "gain", owner="other")
    ledger.verify()


@pytest.mark.parametrize("schedule", [0.5, lambda progress: 1 - progress, warmup("10ba")])
def test_a_schedule_that_a_checkpoint_could_not_hold_is_refused(schedule: Any) -> None:
    """Functions of one's own, and lengths that only the Trainer can turn into shares."""
    with pytest.raises(ArgumentError, match=r"set_schedule\(schedule=\)"):
        ledger_of().set_schedule("head", schedule, owner="me", span="1dur")


def test_a_rate_too_large_for_a_float_is_an_error() -> None:
    """Python's ints have no end."""
    with pytest.raises(ArgumentError):
        ledger_of().scale("head", 10**400, owner="me")
    with pytest.raises(ArgumentError):
        ledger_of().set_lr("head", 10**5000, owner="me")
