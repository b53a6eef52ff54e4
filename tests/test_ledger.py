"""The ledger against a plain-dict oracle, and each promise by itself."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import MODELS, OPTIMIZERS, Bare, Shared, Tied, cnn, decay_groups, mlp, optimizer_for, pseudo_gradients
from thawline.engine import (
    ArgumentError,
    Clock,
    Event,
    LedgerClosedError,
    LedgerError,
    OptimizerError,
    ParameterLedger,
    SelectorError,
    SurgeryError,
    Time,
    linear,
    warmup,
)
from thawline.engine.oracle import OWNERS, LedgerOracle, selectors_of

DURATION = Time("40ba")


operations = st.lists(
    st.tuples(
        st.sampled_from(
            (
                "freeze",
                "thaw",
                "freeze",
                "thaw",
                "scale",
                "set_lr",
                "set_options",
                "set_schedule",
                "attach",
                "detach",
                "step",
            )
        ),
        st.sampled_from(OWNERS),
        st.integers(0, 10_000),
        st.sampled_from([0.5, 0.25, 2.0, 1.0]),
        st.booleans(),
    ),
    min_size=50,
    max_size=50,
)


def course(end: float, start: int, batch: int) -> float:
    """Return the factor of a straight line over seven batches."""
    return 1 + (end - 1) * min(1.0, (batch - start) / 7)


@settings(max_examples=300)
@given(model=st.sampled_from(sorted(MODELS)), optimizer=st.sampled_from(OPTIMIZERS), plan=operations)
def test_random_operations_agree_with_the_oracle(model: str, optimizer: str, plan: list[Any]) -> None:
    """After each of 50 operations by three owners: invariants hold, and trainable set and rates are the oracle's."""
    torch.manual_seed(0)
    net = MODELS[model]()
    ledger = ParameterLedger(net, optimizer_for(optimizer, net), schedule=linear())  # type: ignore[arg-type]
    oracle = LedgerOracle(ledger)
    storage = {name: (id(each), each.data_ptr()) for name, each in ledger.parameters.items()}
    clock = Clock(batches_per_epoch=10)
    for step, (what, owner, pick, factor, flag) in enumerate(plan):
        pool = selectors_of(ledger)
        selector = pool[pick % len(pool)]
        names = ledger.select(selector)
        if what == "freeze":
            ledger.freeze(selector, owner=owner, moments="keep" if flag else "drop")
            oracle.freeze(selector, names, owner)
        elif what == "thaw":
            ledger.thaw(selector, owner=owner)
            oracle.thaw(selector, names, owner)
        elif what == "scale":
            ledger.scale(selector, factor, owner=owner)
            oracle.scale(names, factor, owner)
        elif what == "set_lr":
            ledger.set_lr(selector, None if flag else factor, owner="a")
            oracle.set_lr(names, None if flag else factor)
        elif what == "set_options":
            ledger.set_options(selector, weight_decay=None if flag else factor, owner="b")
            oracle.set_options(names, weight_decay=None if flag else factor)
        elif what == "set_schedule":
            ledger.set_schedule(selector, None if flag else linear(factor), span="7ba", owner="c")
            oracle.set_schedule(names, None if flag else partial(course, factor, ledger.clock.batch))
        elif what == "attach":
            weights = [name for name in ledger.parameters if name.endswith(".weight")]
            module = weights[pick % len(weights)].rpartition(".")[0]
            if module in oracle.attached:
                with pytest.raises(SurgeryError, match="has one already"):
                    ledger.attach(module, "gain", owner=owner)
            else:
                ledger.attach(module, "gain", owner=owner, size=3)
                # [(is_matrix, Muon), ('*', AdamW)] sends a vector to AdamW, wherever it stands.
                two = len(ledger.optimizers) == 2
                flat = next((each for each, lr in oracle.base.items() if lr == 0.01), None) if two else None
                oracle.attach(ledger, module, "gain", owner, base_lr=0.01 if two else None, like=flat)
        elif what == "detach" and oracle.attached:
            module = sorted(oracle.attached)[pick % len(oracle.attached)]
            ledger.detach(module, "gain", owner=oracle.attached.pop(module))
            oracle.detach(ledger, f"{module}.gain")
        elif what == "step":
            frozen = {name: ledger.parameters[name].detach().clone() for name in ledger.frozen}
            ledger.apply_lr(clock)
            if ledger.trainable:
                pseudo_gradients(ledger.trainable_parameters, step)
                for each in ledger.optimizers:
                    each.step()
                ledger.clear_gradients()
            assert all(torch.equal(value, ledger.parameters[name]) for name, value in frozen.items())
            clock = clock.after_batch(samples=1, duration=DURATION)
        ledger.verify()
        assert ledger.trainable == oracle.trainable()
        progress = linear()(ledger.clock.progress)
        for group in ledger.groups:
            for name in group.parameters:
                assert group.lr == pytest.approx(oracle.lr(name, progress, ledger.clock.batch), rel=1e-12)
                assert group.options["weight_decay"] == oracle.option(name, "weight_decay")
        assert {n: (id(p), p.data_ptr()) for n, p in ledger.parameters.items() if n in storage} == storage


wishes = st.lists(
    st.tuples(st.sampled_from(["freeze", "thaw", "scale"]), st.integers(0, 10_000), st.sampled_from([0.5, 0.3, 1.0])),
    max_size=6,
)


@settings(max_examples=100)
@given(
    model=st.sampled_from(sorted(MODELS)),
    optimizer=st.sampled_from(OPTIMIZERS),
    by_owner=st.tuples(wishes, wishes, wishes),
    data=st.data(),
)
def test_the_order_of_owners_calls_does_not_matter(model: str, optimizer: str, by_owner: Any, data: Any) -> None:
    """However the calls of three owners are interleaved, trainable set, groups and rates come out the same."""
    calls = [owner for owner, mine in zip(OWNERS, by_owner, strict=True) for _ in mine]
    orders = [data.draw(st.permutations(calls)), calls]
    digests = []
    for order in orders:
        torch.manual_seed(0)
        net = MODELS[model]()
        ledger = ParameterLedger(net, optimizer_for(optimizer, net))  # type: ignore[arg-type]
        pool = selectors_of(ledger)
        queues = {owner: iter(mine) for owner, mine in zip(OWNERS, by_owner, strict=True)}
        for owner in order:
            what, pick, factor = next(queues[owner])
            selector = pool[pick % len(pool)]
            if what == "scale":
                ledger.scale(selector, factor, owner=owner)
            else:
                getattr(ledger, what)(selector, owner=owner)
        ledger.verify()
        digests.append(ledger.digest())
    assert digests[0] == digests[1]


@settings(max_examples=60)
@given(model=st.sampled_from(sorted(MODELS)), optimizer=st.sampled_from(OPTIMIZERS), plan=operations)
def test_a_saved_ledger_restored_into_a_fresh_model_steps_on_bit_for_bit(
    model: str, optimizer: str, plan: list[Any]
) -> None:
    """state_dict into a fresh ledger: same digest, and the same weights after three more steps."""
    torch.manual_seed(0)
    net = MODELS[model]()
    ledger = ParameterLedger(net, optimizer_for(optimizer, net))  # type: ignore[arg-type]
    attached: set[str] = set()
    for step, (what, owner, pick, factor, flag) in enumerate(plan[:20]):
        pool = selectors_of(ledger)
        selector = pool[pick % len(pool)]
        if what == "attach" and "." in (name := list(ledger.parameters)[pick % len(ledger.parameters)]):
            module = name.rpartition(".")[0]
            if module not in attached and name.endswith(".weight"):
                ledger.attach(module, "gain", owner=owner)
                attached.add(module)
        elif what in ("freeze", "thaw"):
            more = {"moments": "keep" if flag else "drop"} if what == "freeze" else {"warmup": "5ba" if flag else None}
            getattr(ledger, what)(selector, owner=owner, **more)
        elif what == "scale":
            ledger.scale(selector, factor, owner=owner)
        elif what == "set_options":
            ledger.set_options(selector, weight_decay=None if flag else factor, owner="b")
        elif what == "set_schedule":
            ledger.set_schedule(selector, None if flag else linear(factor), span="50ba", owner="c")
        elif what == "step" and ledger.trainable:
            take_step(ledger, step)
    other = MODELS[model]()
    twin = ParameterLedger(other, optimizer_for(optimizer, other))  # type: ignore[arg-type]
    twin.load_state_dict(copy.deepcopy(ledger.state_dict()))
    other.load_state_dict(net.state_dict())
    twin.clock = ledger.clock
    twin.verify()
    assert twin.digest() == ledger.digest()
    for step in range(3):
        for each in (ledger, twin):
            each.apply_lr(Clock(batch=step + 30, progress=0.5))
            if each.trainable:
                take_step(each, step)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def take_step(ledger: ParameterLedger, seed: int) -> None:
    """Step all optimizers once with gradients that depend on the seed."""
    pseudo_gradients(ledger.trainable_parameters, seed)
    for each in ledger.optimizers:
        each.step()
    ledger.clear_gradients()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_untouched_ledger_trains_as_the_plain_optimizer(kind: str) -> None:
    """Five steps under the ledger equal five steps of the same optimizer without it, bit for bit."""
    torch.manual_seed(0)
    net = mlp()
    plain = copy.deepcopy(net)
    ledger = ParameterLedger(net, optimizer_for(kind, net))  # type: ignore[arg-type]
    bare = optimizer_for(kind, plain)
    if isinstance(bare, list):
        matrices = [each for each in plain.parameters() if each.ndim == 2]
        rest = [each for each in plain.parameters() if each.ndim != 2]
        optimizers = [bare[0][1](matrices), bare[1][1](rest)]
    else:
        optimizers = [bare if isinstance(bare, torch.optim.Optimizer) else bare(plain.parameters())]  # type: ignore[operator]
    for step in range(5):
        for model in (net, plain):
            torch.manual_seed(step)
            model(torch.randn(6, 4)).square().sum().backward()
        for each in (*ledger.optimizers, *optimizers):
            each.step()
            each.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))


def test_freezing_frees_optimizer_state_and_gradient() -> None:
    """What freezes leaves group, state and .grad at once; Composer keeps the state, and its checkpoint fails."""
    net = mlp()
    ledger = ParameterLedger(net, partial(torch.optim.AdamW, lr=0.1))
    take_step(ledger, 0)
    pseudo_gradients(ledger.trainable_parameters, 1)
    ledger.freeze("blocks[0]", owner="me")
    frozen = net[0].weight
    assert frozen.grad is None
    assert frozen not in ledger.optimizers[0].state
    assert all(frozen is not each for group in ledger.optimizers[0].param_groups for each in group["params"])
    ledger.optimizers[0].state_dict()


def test_kept_moments_return_with_the_parameter() -> None:
    """moments="keep" puts Adam's averages aside and back; "drop" of a second owner drops them."""
    net = mlp()
    ledger = ParameterLedger(net, partial(torch.optim.AdamW, lr=0.1))
    take_step(ledger, 0)
    before = ledger.optimizers[0].state[net[0].weight]["exp_avg"].clone()
    ledger.freeze("blocks[0]", owner="me", moments="keep")
    ledger.optimizers[0].state_dict()
    ledger.thaw("blocks[0]", owner="me")
    assert torch.equal(ledger.optimizers[0].state[net[0].weight]["exp_avg"], before)
    ledger.freeze("blocks[0]", owner="me", moments="keep")
    ledger.freeze("blocks[0]", owner="other")
    ledger.thaw("blocks[0]", owner="me")
    ledger.thaw("blocks[0]", owner="other")
    assert net[0].weight not in ledger.optimizers[0].state


def test_freeze_then_thaw_restores_the_canonical_order() -> None:
    """Groups come back in the order in which they were, whatever the order of thawing."""
    net = mlp(depth=4)
    ledger = ParameterLedger(net, partial(torch.optim.SGD, lr=0.1))
    before = [group.parameters for group in ledger.groups]
    for order in itertools.permutations(["blocks[0]", "blocks[1]", "blocks[2]"]):
        ledger.freeze("blocks", owner="me")
        for block in order:
            ledger.thaw(block, owner="me")
        assert [group.parameters for group in ledger.groups] == before


def test_freeze_and_thaw_are_idempotent() -> None:
    """A second freeze or thaw changes nothing, not even the version."""
    ledger = ParameterLedger(mlp(), partial(torch.optim.SGD, lr=0.1))
    ledger.freeze("head", owner="me")
    version, digest = ledger.version, ledger.digest()
    ledger.freeze("head", owner="me")
    assert (ledger.version, ledger.digest()) == (version, digest)
    ledger.thaw("head", owner="me")
    version, digest = ledger.version, ledger.digest()
    ledger.thaw("head", owner="me")
    assert (ledger.version, ledger.digest()) == (version, digest)


def test_what_the_user_froze_is_held_by_the_user() -> None:
    """An owner's thaw does not touch what was frozen before; thaw(owner="user") does."""
    net = mlp()
    net[0].requires_grad_(False)
    ledger = ParameterLedger(net, partial(torch.optim.SGD, lr=0.1))
    ledger.freeze("blocks[0]", owner="me")
    ledger.thaw("blocks[0]", owner="me")
    assert ledger.owners("0.weight") == ("user",)
    ledger.thaw("blocks[0]", owner="user")
    assert "0.weight" in ledger.trainable


def test_an_optimizer_built_while_frozen_trains_what_thaws_later() -> None:
    """Peers never train a layer that was frozen when the optimizer was made; it takes the options of its kin."""
    net = mlp()
    net[0].requires_grad_(False)
    groups = [{"params": [net[2].weight, net[4].weight], "weight_decay": 0.1}, {"params": [net[2].bias, net[4].bias]}]
    ledger = ParameterLedger(net, torch.optim.AdamW(groups, lr=0.1, weight_decay=0.0))
    ledger.thaw("blocks[0]", owner="user")
    ledger.verify()
    decay = {name: group.options["weight_decay"] for group in ledger.groups for name in group.parameters}
    assert decay == {name: 0.1 if name.endswith("weight") else 0.0 for name in decay}
    before = net[0].weight.detach().clone()
    take_step(ledger, 0)
    assert not torch.equal(before, net[0].weight)


def test_group_options_follow_a_parameter_through_freeze_and_thaw() -> None:
    """Weight decay and betas are those of the home, also after the whole group was gone."""
    net = mlp()
    ledger = ParameterLedger(net, optimizer_for("groups", net))  # type: ignore[arg-type]
    before = {name: dict(group.options) for group in ledger.groups for name in group.parameters}
    ledger.freeze("*.bias", owner="me")
    ledger.freeze("*", owner="you")
    assert ledger.groups == ()
    ledger.thaw("*", owner="you")
    ledger.thaw("*.bias", owner="me")
    assert {name: dict(group.options) for group in ledger.groups for name in group.parameters} == before


def test_param_names_and_keys_of_the_optimizer_stay_in_step() -> None:
    """An optimizer's own keys survive in the same dict object, and param_names lists what the group holds."""
    net = mlp()
    optimizer = torch.optim.AdamW(net.named_parameters(), lr=0.1)
    group = optimizer.param_groups[0]
    ledger = ParameterLedger(net, optimizer)
    group["counter"] = 17
    ledger.freeze("head", owner="me")
    assert optimizer.param_groups[0] is group
    assert group["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    ledger.scale("blocks[0]", 0.5, owner="me")
    assert any(each is group for each in optimizer.param_groups)
    assert [each["counter"] for each in optimizer.param_groups] == [17, 17]
    assert ledger.state_dict()["groups"][0]["options"]["counter"] == 17


def test_a_learning_rate_tensor_is_filled_in_place() -> None:
    """A capturable optimizer keeps its rate in a tensor, which must stay the same tensor."""
    net = mlp()
    rate = torch.tensor(0.1)
    ledger = ParameterLedger(net, torch.optim.AdamW(net.parameters(), lr=rate), schedule=linear())
    ledger.apply_lr(Clock(progress=0.5))
    assert ledger.optimizers[0].param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.05)


def test_a_late_group_has_its_own_warmup_and_still_follows_the_schedule() -> None:
    """lr = base x schedule(progress) x warmup since birth, to the bit, at every step."""
    net = mlp()
    ledger = ParameterLedger(net, partial(torch.optim.SGD, lr=0.1), schedule=linear())
    ledger.freeze("blocks[1]", owner="me")
    clock, duration = Clock(batches_per_epoch=20), Time("20ba")
    for step in range(20):
        ledger.clock = clock
        if step == 6:
            ledger.thaw("blocks[1]", owner="me", warmup="4ba")
        ledger.apply_lr(clock)
        rates = {name: group.lr for group in ledger.groups for name in group.parameters}
        assert rates["0.weight"] == 0.1 * (1 - step / 20)
        if step >= 6:
            assert rates["2.weight"] == pytest.approx(0.1 * (1 - step / 20) * min(1.0, (step - 6) / 4), rel=1e-15)
        clock = clock.after_batch(samples=1, duration=duration)


def test_options_set_for_some_parameters_decay_them_alone() -> None:
    """Three steps equal a plain AdamW with two groups, bit for bit, and taking it back restores one group."""
    net = mlp()
    plain = copy.deepcopy(net)
    ledger = ParameterLedger(net, partial(torch.optim.AdamW, lr=0.1, weight_decay=0.3))
    ledger.freeze("head", owner="me")
    ledger.set_options(["blocks[1]", "head"], owner="me", weight_decay=0.05)
    bare = torch.optim.AdamW(
        [{"params": list(plain[0].parameters())}, {"params": list(plain[2].parameters()), "weight_decay": 0.05}],
        lr=0.1, weight_decay=0.3,
    )  # fmt: skip
    for step in range(3):
        take_step(ledger, step)
        pseudo_gradients([each for group in bare.param_groups for each in group["params"]], step)
        bare.step()
        bare.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))
    ledger.thaw("head", owner="me")
    assert [group.options["weight_decay"] for group in ledger.groups] == [0.3, 0.05]
    ledger.set_options("*", owner="other", weight_decay=None)
    assert len(ledger.groups) == 2
    ledger.set_options("*", owner="me", weight_decay=None)
    assert [group.options["weight_decay"] for group in ledger.groups] == [0.3]
    ledger.verify()


def test_the_optimizer_is_given_back_with_its_own_options() -> None:
    """The next fit with the same optimizer begins with the weight decay that the user wrote."""
    net = mlp()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.3)
    ledger = ParameterLedger(net, optimizer)
    ledger.set_options("*", owner="me", weight_decay=0.0)
    ledger.release()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3]


def test_options_that_cannot_be_set_say_which_can() -> None:
    """No such option, no number, a second owner: typed errors, and nothing was set."""
    ledger = ParameterLedger(mlp(), partial(torch.optim.SGD, lr=0.1))
    ledger.set_options("head", owner="first", momentum=0.5)
    with pytest.raises(LedgerError, match=r"momentum of '4\.weight' was set to 0\.5 by 'first', and 'second'"):
        ledger.set_options("*", owner="second", weight_decay=0.1, momentum=0.2)
    for name, value in {
        "betas": 0.9,
        "lr": 0.1,
        "params": 1.0,
        "nesterov": 1.0,
        "momentum": -1.0,
        "dampening": "x",
    }.items():
        with pytest.raises(ArgumentError, match=rf"set_options\({name}=\)"):
            ledger.set_options("*", owner="first", **{name: value})  # type: ignore[arg-type]
    assert {(g.options["momentum"], g.options["weight_decay"]) for g in ledger.groups} == {(0, 0), (0.5, 0)}


def test_a_course_of_its_own_replaces_the_fits_schedule() -> None:
    """lr = base x course since its begin, then its last factor; others follow the fit. No batch regroups."""
    ledger = ParameterLedger(mlp(), partial(torch.optim.SGD, lr=0.1), schedule=linear())
    clock, duration = Clock(batches_per_epoch=20), Time("20ba")
    for step in range(20):
        ledger.clock = clock
        if step == 5:
            ledger.set_schedule("head", linear(end=0.5), span="4ba", owner="me")
            version = ledger.version
        ledger.apply_lr(clock)
        rates = {name: group.lr for group in ledger.groups for name in group.parameters}
        assert rates["0.weight"] == 0.1 * (1 - step / 20)
        own = 1 - 0.5 * min(1.0, (step - 5) / 4) if step >= 5 else 1 - step / 20
        assert rates["4.weight"] == pytest.approx(0.1 * own, rel=1e-15)
        clock = clock.after_batch(samples=1, duration=duration)
    assert ledger.version == version
    ledger.set_schedule("head", None, owner="me")
    assert len(ledger.groups) == 1


def test_schedules_that_cannot_be_saved_or_measured_are_refused() -> None:
    """A function of one's own, times inside, no span: typed errors."""
    ledger = ParameterLedger(mlp(), partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(ArgumentError, match="a schedule of thawline.engine"):
        ledger.set_schedule("*", lambda progress: progress, owner="me", span="1ep")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"warmup\(0\.1\)"):
        ledger.set_schedule("*", warmup("10ba"), owner="me", span="1ep")
    with pytest.raises(ArgumentError, match=r"span=\) takes a time above zero"):
        ledger.set_schedule("*", linear(), owner="me")
    assert len(ledger.groups) == 1


@pytest.mark.parametrize("kind", ["adamw", "adagrad"])
def test_dropped_moments_let_a_parameter_go_on_as_if_fresh(kind: str) -> None:
    """The next step equals the first step of a new optimizer; the others keep their moments."""
    net = mlp()
    ledger = ParameterLedger(net, optimizer_for(kind, net))  # type: ignore[arg-type]
    take_step(ledger, 0)
    kept = copy.deepcopy(ledger.optimizers[0].state[net[0].weight])
    version = ledger.version
    ledger.drop_moments("head", owner="me")
    ledger.verify()
    assert ledger.version == version
    assert all(torch.equal(kept[key], ledger.optimizers[0].state[net[0].weight][key]) for key in kept)
    twin = copy.deepcopy(net)
    fresh = optimizer_for(kind, twin)
    bare = fresh if isinstance(fresh, torch.optim.Optimizer) else fresh(twin.parameters())  # type: ignore[operator]
    take_step(ledger, 1)
    pseudo_gradients(twin.parameters(), 1)
    bare.step()
    assert torch.equal(net[4].weight, twin[4].weight)
    assert not torch.equal(net[0].weight, twin[0].weight)


def test_changes_made_together_derive_the_groups_once() -> None:
    """One version for all of them, also beside one that fails; inside, what trains is current."""
    ledger = ParameterLedger(mlp(), partial(torch.optim.SGD, lr=0.1))
    with ledger.at_once():
        ledger.freeze("blocks[0]", owner="me")
        ledger.scale("head", 0.5, owner="me")
        ledger.freeze("blocks[1]", owner="me")
        ledger.thaw("blocks[0]", owner="me")
        assert ledger.trainable == {"0.weight", "0.bias", "4.weight", "4.bias"}
    ledger.verify()
    assert ledger.version == 1
    with ledger.at_once():
        ledger.freeze("head", owner="me")
        with pytest.raises(SelectorError):
            ledger.freeze("heed", owner="me")
    ledger.verify()
    assert (ledger.version, ledger.trainable) == (2, {"0.weight", "0.bias"})


def test_a_hold_can_let_statistics_go_on() -> None:
    """mode="train" keeps a frozen BatchNorm in train mode unless another holder does not say so."""
    net = cnn()
    ledger = ParameterLedger(net, partial(torch.optim.SGD, lr=0.1))
    ledger.freeze("blocks", owner="me", mode="train")
    assert net[1].training
    ledger.freeze("1.weight", owner="you")
    assert net[1].training
    ledger.freeze("blocks[0]", owner="you")
    assert not net[1].training
    ledger.thaw("blocks[0]", owner="you")
    assert net[1].training


def test_min_lr_is_a_floor() -> None:
    """lr = max(base x scales x schedule, min_lr)."""
    ledger = ParameterLedger(mlp(), partial(torch.optim.SGD, lr=0.1), schedule=linear(), min_lr=0.03)
    for progress, lr in [(0.0, 0.1), (0.5, 0.05), (0.7, pytest.approx(0.03)), (0.9, 0.03), (1.0, 0.03)]:
        ledger.apply_lr(Clock(progress=progress))
        assert ledger.groups[0].lr == lr


def test_a_second_owner_of_an_absolute_rate_is_an_error_that_names_both() -> None:
    """set_lr has one owner a parameter."""
    ledger = ParameterLedger(mlp(), partial(torch.optim.SGD, lr=0.1))
    ledger.set_lr("head", 0.5, owner="first")
    with pytest.raises(LedgerError, match="'first'.*'second'"):
        ledger.set_lr("*", 0.2, owner="second")
    assert {group.lr for group in ledger.groups} == {0.1, 0.5}
    ledger.set_lr("head", 0.4, owner="first")
    assert {group.lr for group in ledger.groups} == {0.1, 0.4}


def test_frozen_batch_norm_keeps_its_statistics_and_train_does_not_undo_it() -> None:
    """requires_grad=False alone lets statistics drift, and model.train() undoes eval(): the mode is derived."""
    net = cnn()
    ledger = ParameterLedger(net, partial(torch.optim.SGD, lr=0.1))
    ledger.freeze("blocks[0]", owner="me")
    net.train()
    ledger.begin_batch(ledger.clock)
    before = net[1].running_mean.clone()
    net(torch.randn(4, 1, 8, 8))
    assert torch.equal(net[1].running_mean, before)
    assert not torch.equal(net[4].running_mean, torch.zeros(4))
    ledger.thaw("blocks[0]", owner="me")
    assert net[1].training
    net.eval()
    ledger.begin_batch(ledger.clock)
    assert not net[4].training


def test_dropout_stops_only_where_eval_mode_is_asked_for() -> None:
    """mode="eval" puts wholly held modules in eval mode; a plain freeze leaves dropout on."""
    net = MODELS["encoder"]()
    ledger = ParameterLedger(net, partial(torch.optim.SGD, lr=0.1))
    block = net.encoder.layers[0]  # type: ignore[union-attr]
    ledger.freeze("blocks[0]", owner="me")
    assert block.dropout1.training
    assert block.self_attn.training
    ledger.freeze("blocks[0]", owner="you", mode="eval")
    assert not block.dropout1.training
    assert not block.self_attn.training
    assert net.encoder.layers[1].dropout1.training  # type: ignore[union-attr]
    ledger.thaw("blocks[0]", owner="you")
    assert block.dropout1.training


def test_tied_weights_are_one_parameter_in_the_stem() -> None:
    """The head alone does not train the embeddings it is tied to; freezing by either name freezes the one."""
    net = Tied()
    ledger = ParameterLedger(net, partial(torch.optim.SGD, lr=0.1))
    assert ledger.layers.of("embed.weight").name == "stem"
    assert ledger.layers.head.parameters == ("norm.weight", "norm.bias")
    ledger.freeze("lm_head.weight", owner="me")
    assert "embed.weight" in ledger.frozen
    assert net.lm_head.weight is net.embed.weight


def test_shared_modules_and_bare_parameters_are_found() -> None:
    """A module under two names is frozen by either; a parameter of a non-leaf module is frozen with its layer."""
    shared = ParameterLedger(Shared(), partial(torch.optim.SGD, lr=0.1))
    shared.freeze("second", owner="me")
    assert shared.frozen == {"first.weight", "first.bias"}
    bare = ParameterLedger(Bare(), partial(torch.optim.SGD, lr=0.1))
    bare.freeze("stem", owner="me")
    assert bare.frozen == {"scale"}


def test_attached_parameters_train_unless_anothers_pattern_holds_them() -> None:
    """A hold by layer covers what is attached later, a hold by name and the attacher's own do not."""
    for first in ("freeze", "attach"):
        net = mlp()
        ledger = ParameterLedger(net, partial(torch.optim.SGD, lr=0.1))
        base = [name for name in ledger.parameters if name.startswith("0.")]
        for call in (first, "attach" if first == "freeze" else "freeze"):
            if call == "attach":
                ledger.attach("0", "gain", owner="lora")
                ledger.freeze(base, owner="lora")
            else:
                ledger.freeze("blocks[0]", owner="thaw")
        assert "0.gain" in ledger.frozen
        ledger.thaw("blocks[0]", owner="thaw")
        assert "0.gain" in ledger.trainable
        assert "0.weight" in ledger.frozen
        ledger.verify()


def test_what_is_attached_is_initialized_from_its_own_generator() -> None:
    """The global generator is not touched, and the values do not depend on what was attached before."""
    values = []
    for others in ([], ["2"]):
        torch.manual_seed(0)
        net = mlp()
        ledger = ParameterLedger(net, partial(torch.optim.SGD, lr=0.1), seed=3)
        state = torch.get_rng_state()
        for module in [*others, "0"]:
            ledger.attach(module, "gain", owner="me", size=5)
        assert torch.equal(torch.get_rng_state(), state)
        values.append(dict(net.named_parameters())["0.gain"].detach().clone())
    assert torch.equal(*values)


@pytest.mark.parametrize("event", [event for event in Event if not event.opens_ledger])
def test_the_ledger_is_closed_outside_its_events(event: Event) -> None:
    """A call during forward, step or evaluation is a typed error that names the event to use."""
    ledger = ParameterLedger(mlp(), partial(torch.optim.SGD, lr=0.1))
    ledger.phase = event
    before = ledger.digest()
    with pytest.raises(LedgerClosedError, match=rf"at {event.name}.*Event\.BATCH_"):
        ledger.freeze("head", owner="me")
    assert ledger.digest() == before


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda net, opt: net[0].weight.requires_grad_(False), r"'0\.weight' has requires_grad=False"),
        (lambda net, opt: opt.param_groups.append({"params": []}), "changed behind the ledger"),
        (lambda net, opt: opt.param_groups[0].update(lr=9.0), "is 9.0"),
        (lambda net, opt: opt.param_groups[0]["params"].pop(), r"'4\.bias' trains but is in no"),
        (lambda net, opt: setattr(net, "0", nn.Linear(4, 4)), "exchanged"),
        (lambda net, opt: opt.param_groups[0]["params"].append(net[0].weight), "in two groups"),
    ],
)
def test_verify_names_what_was_edited_behind_the_ledger(edit: Any, message: str) -> None:
    """Each edit behind the ledger is found and named, with the call to use instead."""
    net = mlp()
    ledger = ParameterLedger(net, partial(torch.optim.SGD, lr=0.1))
    edit(net, ledger.optimizers[0])
    with pytest.raises(LedgerError, match=message):
        ledger.verify()


def test_a_frozen_tensor_with_a_gradient_is_found() -> None:
    """A stale .grad of a frozen tensor still moves it under AdamW, so verify names it."""
    net = mlp()
    ledger = ParameterLedger(net, partial(torch.optim.SGD, lr=0.1))
    ledger.freeze("0.weight", owner="me")
    net[0].weight.grad = torch.zeros(4, 4)
    with pytest.raises(LedgerError, match=r"'0\.weight' is frozen but has a \.grad"):
        ledger.verify()


def test_a_selector_that_matches_nothing_lists_the_nearest_names() -> None:
    """Globs, names, layers, lists and predicates alike."""
    ledger = ParameterLedger(Tied(), partial(torch.optim.SGD, lr=0.1))
    for selector in (
        "embd.weight",
        ["embed.weight", "nope.*"],
        "blocks[9]",
        lambda name, p: False,
        [],
        3,
        "blocks.1.0.wait",
    ):
        with pytest.raises(SelectorError):
            ledger.freeze(selector, owner="me")  # type: ignore[arg-type]
    with pytest.raises(SelectorError, match="'embed.weight'"):
        ledger.freeze("embd.weight", owner="me")
    assert ledger.trainable == set(ledger.parameters)


def test_a_module_name_does_not_take_its_longer_namesakes() -> None:
    """layer.1 is not layer.10: a peer takes names as regular expression prefixes."""
    net = nn.Sequential(*[nn.Linear(2, 2) for _ in range(12)])
    ledger = ParameterLedger(net, partial(torch.optim.SGD, lr=0.1))
    assert ledger.select("1") == ("1.weight", "1.bias")


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda net: torch.optim.LBFGS(net.parameters()), "needs a closure"),
        (lambda net: torch.optim.SGD(mlp().parameters(), lr=0.1), "not in the model"),
        (lambda net: lambda ps: torch.optim.SGD(list(ps)[:2], lr=0.1), "leaves out 4 of 6"),
        (lambda net: lambda ps: None, "no torch Optimizer"),
        (lambda net: [("head", partial(torch.optim.SGD, lr=0.1))], "leaves out 4 of 6"),
        (lambda net: [("*", partial(torch.optim.SGD, lr=0.1)), ("head", partial(torch.optim.SGD, lr=0.1))], "nothing"),
        (lambda net: "adam", "takes an optimizer"),
    ],
)
def test_an_optimizer_that_cannot_serve_is_refused(optimizer: Any, message: str) -> None:
    """Closures, foreign parameters, incomplete partitions: each an OptimizerError."""
    net = mlp()
    with pytest.raises(OptimizerError, match=message):
        ParameterLedger(net, optimizer(net))


def test_bad_arguments_name_themselves() -> None:
    """Wrong owners, factors, rates and policies say what to write."""
    ledger = ParameterLedger(mlp(), partial(torch.optim.SGD, lr=0.1))
    calls = {
        "owner": lambda: ledger.freeze("head", owner=""),
        "factor": lambda: ledger.scale("head", -1.0, owner="me"),
        "lr": lambda: ledger.set_lr("head", float("nan"), owner="me"),
        "moments": lambda: ledger.freeze("head", owner="me", moments="forget"),  # type: ignore[arg-type]
        "mode": lambda: ledger.freeze("head", owner="me", mode="sleep"),  # type: ignore[arg-type]
    }
    for name, call in calls.items():
        with pytest.raises(ArgumentError, match=rf"{name}="):
            call()


def test_surgery_that_fails_leaves_the_model_as_it_was() -> None:
    """An unknown op or module, and detaching what is not there, change nothing."""
    ledger = ParameterLedger(mlp(), partial(torch.optim.SGD, lr=0.1))
    before = ledger.digest()
    for call in (
        lambda: ledger.attach("9", "gain", owner="me"),
        lambda: ledger.attach("0", "grain", owner="me"),
        lambda: ledger.detach("0", "gain", owner="me"),
    ):
        with pytest.raises(SurgeryError):
            call()
    assert ledger.digest() == before
    ledger.attach("0", "gain", owner="me")
    ledger.detach("0", "gain", owner="me")
    assert ledger.digest() == before


def test_release_gives_requires_grad_back_as_the_user_had_it() -> None:
    """After a fit nothing of the schedule is left on the model."""
    net = mlp()
    net[0].bias.requires_grad_(False)
    ledger = ParameterLedger(net, partial(torch.optim.SGD, lr=0.1))
    ledger.freeze("blocks", owner="me")
    ledger.release()
    assert [name for name, each in net.named_parameters() if not each.requires_grad] == ["0.bias"]


def test_what_is_attached_is_known_to_the_next_ledger_over_the_model() -> None:
    """A second fit can undo and save what the first one attached, and restore it into the adapted or a fresh model."""
    net = mlp()
    factory = partial(torch.optim.AdamW, lr=0.1)
    ParameterLedger(net, factory).attach("0", "gain", owner="first")
    second = ParameterLedger(net, factory)
    take_step(second, 0)
    saved = copy.deepcopy(second.state_dict())
    assert [entry.module for entry in second.journal] == ["0"]
    for model in (net, mlp()):
        ledger = ParameterLedger(model, factory)
        ledger.load_state_dict(saved)
        ledger.verify()
        assert ledger.digest() == second.digest()
    ParameterLedger(net, factory).detach("0", "gain", owner="first")
    assert "0.gain" not in dict(net.named_parameters())


def test_the_rate_of_a_layer_is_the_highest_of_its_groups() -> None:
    """Under the same names whatever freezes, thaws, is scaled or attached; 0.0 where nothing of a layer trains."""
    model = mlp()
    ledger = ParameterLedger(model, decay_groups(model))
    changes: list[Callable[[], None]] = [
        lambda: None,
        lambda: ledger.freeze("blocks", owner="me"),
        lambda: ledger.thaw("blocks[1]", owner="me"),
        lambda: ledger.scale("2.bias", 3.0, owner="me"),
        lambda: ledger.attach("2", "gain", owner="me"),
        lambda: ledger.freeze("*", owner="you"),
        lambda: ledger.thaw("*", owner="you"),
        lambda: ledger.set_lr("head", 0.5, owner="me"),
    ]
    for change in changes:
        change()
        expected = dict.fromkeys(["blocks[0]", "blocks[1]", "head"], 0.0)
        for group in ledger.groups:
            for layer in {ledger.layers.of(name).name for name in group.parameters}:
                expected[layer] = max(expected[layer], group.lr or 0.0)
        assert ledger.rates == expected
    assert ledger.rates == {"blocks[0]": 0.0, "blocks[1]": 0.06, "head": 0.5}
