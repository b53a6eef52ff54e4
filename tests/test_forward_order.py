"""forward_order: the order of use, recorded without a trace."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from attrs import Factory, define
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from helpers import MODELS, Encoder, Tied, loader
from thawline.algorithms import LayerThaw
from thawline.engine import Algorithm, Event, LayerMap, Stage, State, ThawlineWarning, Trainer
from thawline.engine.data import ResumableLoader
from thawline.engine.forward_order import forward_order

WIDTH = 3


class Node(nn.Module):
    """A module that owns a bare parameter and calls its children in an order of its own, some twice, some never."""

    def __init__(self, children: list[nn.Module], order: list[int]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH))
        self.parts = nn.ModuleList(children)
        self.order = order
        self.seen: list[int] = []
        self.calls = 0
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        for index in self.order:
            x = self.parts[index](x)
        self.last = x
        return x * self.scale


class Noisy(nn.Module):
    """A layer with a buffer that it replaces, one that it writes to, and noise from every generator."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("replaced", torch.full((2,), float("nan")), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        self.replaced = torch.rand(2)
        return self.linear(x) + torch.rand(WIDTH) + random.random() + float(np.random.rand())  # noqa: NPY002


@st.composite
def trees(draw: st.DrawFn) -> nn.Module:
    """Draw a module tree: linear layers, norms, dropout, noise, containers, modules used twice and tied weights."""
    leaf = st.sampled_from(["linear", "norm", "batchnorm", "dropout", "noisy"])
    kinds = {
        "linear": lambda: nn.Linear(WIDTH, WIDTH), "norm": lambda: nn.LayerNorm(WIDTH), "noisy": Noisy,
        "batchnorm": lambda: nn.BatchNorm1d(WIDTH), "dropout": lambda: nn.Dropout(0.5),
    }  # fmt: skip

    def build(depth: int) -> nn.Module:
        if not depth or draw(st.booleans()):
            return kinds[draw(leaf)]()
        children = [build(depth - 1) for _ in range(draw(st.integers(1, 3)))]
        if draw(st.booleans()):
            children.append(draw(st.sampled_from(children)))
        if draw(st.booleans()):
            return nn.Sequential(*children)
        return Node(children, draw(st.lists(st.integers(0, len(children) - 1), max_size=4)))

    model = Node([build(3) for _ in range(draw(st.integers(1, 3)))], [0])
    model.order = draw(st.lists(st.integers(0, len(model.parts) - 1), min_size=1, max_size=4))
    linear = [each for each in model.modules() if isinstance(each, nn.Linear)]
    if len(linear) > 1 and draw(st.booleans()):
        first, second = draw(st.permutations(linear))[:2]
        second.weight = first.weight
    for each in model.modules():
        each.training = draw(st.booleans())
    for parameter in model.parameters():
        parameter.requires_grad = draw(st.booleans())
        if draw(st.booleans()):
            parameter.grad = torch.rand_like(parameter)
    return model


def trace(model: nn.Module) -> dict[str, Any]:
    """Return all that a forward pass might change, bit for bit."""
    tensors = {
        name: (
            id(each),
            each.requires_grad,
            each.detach().numpy().tobytes(),
            None if each.grad is None else id(each.grad),
        )
        for name, each in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
    }
    grads = {name: each.grad.numpy().tobytes() for name, each in model.named_parameters() if each.grad is not None}
    modules = {
        name: (id(each), each.training, list(vars(each)), list(each._forward_pre_hooks), list(each._forward_hooks))
        for name, each in model.named_modules(remove_duplicate=False)
    }
    attributes = [(each.calls, list(each.seen), each.last) for each in model.modules() if isinstance(each, Node)]
    generators = torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002
    hooks = len(torch_module._global_forward_pre_hooks)
    return {
        "tensors": tensors,
        "grads": grads,
        "modules": modules,
        "own": attributes,
        "rng": generators,
        "hooks": hooks,
    }


@settings(max_examples=60, deadline=None)
@given(model=trees(), fails=st.booleans())
@pytest.mark.filterwarnings("ignore::thawline.engine.errors.ThawlineWarning")
def test_recording_leaves_no_trace(model: nn.Module, fails: bool) -> None:
    """Weights, buffers, gradients, modes, attributes, hooks and generators are bit-equal, also where the pass fails."""

    def forward() -> None:
        model(torch.ones(2, WIDTH))
        if fails:
            raise RuntimeError("failed at the end")

    before = trace(model)
    order = forward_order(model, forward)
    assert trace(model) == before
    assert order is None if fails else sorted(order) == sorted(dict(model.named_parameters(remove_duplicate=False)))


@settings(max_examples=60, deadline=None)
@given(model=trees())
@pytest.mark.filterwarnings("ignore::thawline.engine.errors.ThawlineWarning")
def test_every_parameter_lies_in_one_layer(model: nn.Module) -> None:
    """Whatever the tree, with and without a pass: a partition, the same each time, with every further name resolved."""
    names = [name for name, _ in model.named_parameters()]
    for forward in (None, lambda: model(torch.ones(2, WIDTH))):
        layers = LayerMap(model, forward=forward)
        assert sorted(name for layer in layers for name in layer.parameters) == sorted(names)
        assert all(layer.parameters for layer in layers)
        assert layers.head.parameters
        assert [layer.name for layer in layers.blocks] == [f"blocks[{index}]" for index in range(len(layers.blocks))]
        again = LayerMap(model, forward=forward)
        assert str(again) == str(layers)
        assert list(again) == list(layers)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for layer in layers:
            assert all(any(parameters[name] is parameters[own] for own in names) for name in layer.tied)


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(5)))
def test_the_order_is_that_of_use(order: list[int]) -> None:
    """Children called in any order come in that order, a bare parameter where it is read, an unused one where it stands."""
    model = Node([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(5)], order[:4])
    recorded = forward_order(model, lambda: model(torch.ones(1, WIDTH))) or ()
    used = [f"parts.{index}.weight" for index in order[:4]]
    unused = f"parts.{order[4]}.weight"
    assert [name for name in recorded if name != unused] == [*used, "scale"]
    registered = ["scale", *(f"parts.{index}.weight" for index in range(5))]
    assert recorded.index(unused) == recorded.index(registered[registered.index(unused) - 1]) + 1


def test_each_name_of_a_tied_weight_has_its_place() -> None:
    """The head's name stands at the end, although the weight is read by the embedding first."""
    model = Tied()
    order = forward_order(model, lambda: model(torch.tensor([[1, 2]]))) or ()
    assert list(order)[:1] + list(order)[-1:] == ["embed.weight", "lm_head.weight"]


def test_a_weight_that_another_module_reads_is_seen() -> None:
    """Multi-head attention reads the weight of its out_proj and never calls it; also where hooks forbid its fast path."""
    model = Encoder(2, 0.1)
    order = forward_order(model, lambda: model(torch.zeros(2, 3, dtype=torch.long))) or ()
    assert order.index("encoder.layers.0.self_attn.in_proj_weight") < order.index(
        "encoder.layers.0.self_attn.out_proj.weight"
    )
    assert order.index("encoder.layers.0.self_attn.out_proj.weight") < order.index("encoder.layers.0.linear1.weight")


@pytest.mark.parametrize("name", ["mlp", "cnn", "bare", "shared", "encoder", "tied"])
def test_what_is_registered_in_order_stays_so(name: str) -> None:
    """For most models the pass confirms the layers."""
    model = MODELS[name]()
    inputs = {"cnn": torch.rand(1, 1, 8, 8), "encoder": torch.zeros(1, 3, dtype=torch.long)}
    inputs["tied"] = inputs["encoder"]
    used = LayerMap(model, forward=lambda: model(inputs.get(name, torch.rand(1, 4))))
    assert [(layer.name, layer.parameters) for layer in used] == [
        (layer.name, layer.parameters) for layer in LayerMap(model)
    ]


def test_hooks_of_the_callers_see_nothing_of_it() -> None:
    """One that records what goes through is as it was, and is there for the fit."""
    seen: list[Tensor] = []
    model = Tied()
    model.embed.register_forward_hook(lambda *arguments: seen.append(arguments[-1]))
    assert forward_order(model, lambda: model(torch.tensor([[1, 2]])))
    assert not seen
    model(torch.tensor([[1, 2]]))
    assert len(seen) == 1


def test_a_pass_that_fails_is_logged_and_ignored(caplog: pytest.LogCaptureFixture) -> None:
    """The layers are then those of registration; so they are where the pass used nothing."""
    model = Tied()
    with caplog.at_level("WARNING", logger="thawline"):
        assert str(LayerMap(model, forward=lambda: model("not a batch"))) == str(LayerMap(model))
    assert "forward order not recorded" in caplog.text
    assert forward_order(model, lambda: None) is None


# -- in a fit ----------------------------------------------------------------------------------------------------


class HeadFirst(nn.Module):
    """A head that is registered before its body."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def fitted(data: Any, layers: Any = None) -> tuple[nn.Module, Any]:
    """Fit the model whose head is registered first; return it with the layers in the fit's timeline."""
    torch.manual_seed(1)
    model = HeadFirst()
    trainer = Trainer(loss_fn=nn.functional.cross_entropy, progress=False)
    return model, trainer.fit(model, data, duration="1ep", layers=layers)


class UNet(nn.Module):
    """Blocks on the way down, and on the way up in reverse."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(self.block() for _ in range(3))
        self.up = nn.ModuleList(self.block() for _ in range(3))
        self.out = nn.Conv1d(4, 2, 1)

    @staticmethod
    def block() -> nn.Module:
        return nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.sub_(1.0)[..., None].repeat(1, 1, 2)
        kept = []
        for block in self.down:
            x = block(x)
            kept.append(x)
        for block in reversed(self.up):
            x = block(x + kept.pop())
        return self.out(x).mean(-1)


class LateFirst(nn.Module):
    """Plain blocks that are registered in another order than that of use."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.early, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.late(self.early(x)))


@define(slots=False, eq=False)
class Layers(Algorithm):
    """Notes the modules of each layer at the start of a fit."""

    events = frozenset({Event.FIT_START})
    stage = Stage.OBSERVE
    modules: list[tuple[str, ...]] = Factory(list)

    def apply(self, event: Event, state: State) -> None:
        self.modules = [layer.modules for layer in state.layers]


@pytest.mark.parametrize(
    ("make", "order"),
    [(UNet, ["down.0", "down.1", "down.2", "up.2", "up.1", "up.0", "out"]), (LateFirst, ["early", "late", "out"])],
)
@pytest.mark.parametrize("listed", [False, True])
def test_a_fit_and_its_plan_follow_the_order_of_use(make: type[nn.Module], order: list[str], listed: bool) -> None:
    """Registered otherwise, and no head before its body: layers are those of the pass, and thaw in its order."""
    data: Any = list(loader()) if listed else loader()
    trainer = Trainer(
        algorithms=[LayerThaw(every="1ba"), seen := Layers()], loss_fn=nn.functional.cross_entropy, progress=False
    )
    plan = trainer.plan(make(), data, duration="8ba")
    result = trainer.fit(make(), data, duration="8ba")
    assert seen.modules == [(path,) for path in order]
    assert [span.layers for span in plan.spans] == [span.layers for span in result.timeline.spans]
    assert [span.trainable for span in plan.spans] == [span.trainable for span in result.timeline.spans]


def test_the_pass_takes_two_samples_of_a_list_that_it_does_not_touch() -> None:
    """A model that writes into its inputs writes into copies."""
    sizes: list[int] = []

    class InPlace(LateFirst):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return super().forward(x.mul_(2.0))

    x, y = torch.ones(8, 4), torch.zeros(8, dtype=torch.long)
    trainer = Trainer(loss_fn=nn.functional.cross_entropy, progress=False)
    trainer.plan(InPlace(), [(x, y)], duration="1ba")
    assert sizes[0] == 2
    assert torch.equal(x, torch.ones(8, 4))


def test_a_fit_asks_the_first_samples_where_the_order_is_in_doubt() -> None:
    """The head is found, and the fit is bit-equal to one that was given its layers."""
    given_layers = {"blocks": [["body.0"], ["body.2", "body.3"]], "head": "head"}
    (found, first), (told, second) = fitted(loader()), fitted(loader(), given_layers)
    assert first.timeline.layers == second.timeline.layers == ("stem", "blocks[0]", "blocks[1]", "head")
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), told.state_dict().values(), strict=True))
    assert first.history == second.history
    assert fitted(list(loader()))[1].timeline.layers == second.timeline.layers


def test_an_iterator_is_not_read_for_it() -> None:
    """A generator gives all its batches to the fit, and a warning says what to write."""
    with pytest.warns(ThawlineWarning, match="'head' is registered before"):
        _, result = fitted(batch for batch in list(loader(samples=32, batch_size=8)))
    assert result.clock.batch == 4


def test_peeking_takes_two_samples_and_no_random_numbers() -> None:
    """Neither the sampler is asked nor a generator moved; a dataset's own augmentation comes out as before."""

    class Augmented(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Tensor:
            return torch.rand(3) + index

    def batches(*, peeks: bool) -> list[Tensor]:
        data = ResumableLoader(torch.utils.data.DataLoader(Augmented(), batch_size=4, shuffle=True), seed=0)
        if peeks:
            before = torch.get_rng_state()
            assert data.peek(2).shape == (2, 3)
            assert torch.equal(before, torch.get_rng_state())
        return [fetched.batch for fetched in data.batches(0)]

    for first, second in zip(batches(peeks=True), batches(peeks=False), strict=True):
        assert torch.equal(first, second)


def test_a_dataset_that_fails_is_not_the_layers_business(caplog: pytest.LogCaptureFixture) -> None:
    """What is wrong with the data, training tells; the layers are those of registration."""
    bad = torch.utils.data.DataLoader([1, "two"], batch_size=2)
    with (
        caplog.at_level("WARNING", logger="thawline"), pytest.warns(ThawlineWarning, match="'head'"),
        pytest.raises((TypeError, AttributeError)),
    ):  # fmt: skip
        fitted(bad)
    assert "the first batch cannot be loaded on the side" in caplog.text
