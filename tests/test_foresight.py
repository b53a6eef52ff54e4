"""Plans before the fit: equal to what happens, disturbing nothing, counting what torch counts."""

from __future__ import annotations

import copy
import itertools
import json
import random
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from helpers import MODELS, Bare, Tied, cnn, decay_groups, encoder, loader, mlp, same_weights, weights
from thawline.algorithms import (
    EMA,
    LISA,
    EarlyStop,
    GradClip,
    LayerFreeze,
    LayerThaw,
    LayerwiseLR,
    LoRAInject,
    TrainOnly,
)
from thawline.engine import (
    Algorithm,
    ArgumentError,
    Event,
    LayerMap,
    LedgerError,
    ParameterLedger,
    Plan,
    SelectorError,
    Stage,
    State,
    ThawlineWarning,
    Time,
    Trainer,
    cosine,
    flops,
    linear,
    warmup,
)
from thawline.engine.backward_cost import BackwardCost
from thawline.engine.flops import count_flops
from thawline.engine.footprint import state_template, template_bytes
from thawline.engine.forward import Forward
from thawline.engine.twin import meta_twin

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
CROSS_ENTROPY = nn.functional.cross_entropy


def trainer(*algorithms: Algorithm, **more: Any) -> Trainer:
    """Return a silent Trainer."""
    options: dict[str, Any] = {"optimizer": SGD, "loss_fn": CROSS_ENTROPY, "progress": False, **more}
    return Trainer(algorithms=algorithms, **options)


# -- what was planned is what happens ---------------------------------------------------------------------------------

times = st.sampled_from([1, 2, "1ba", "3ba", "5ba", "0.1dur", "0.3dur", "7sp", "16sp"])
thaws = st.builds(
    LayerThaw, times, lr_scale=st.sampled_from([1.0, 0.5]), start=st.sampled_from(["head", 1]),
    order=st.sampled_from(["top", "bottom"]), warmup=st.sampled_from([None, "2ba", "0.2dur", "9sp"]),
    limit=st.sampled_from([None, 1]), moments=st.sampled_from(["drop", "keep"]),
)  # fmt: skip
freezes = st.builds(
    LayerFreeze, start=st.sampled_from([0.0, 0.3]), level=st.sampled_from([0.5, 1.0]),
    granularity=st.sampled_from(["block", "leaf"]), at=st.sampled_from(["epoch", "batch"]),
)  # fmt: skip
others = st.one_of(
    st.builds(
        LoRAInject, rank=st.just(2), lr=st.sampled_from([None, 0.01]), train_head=st.sampled_from(["auto", True])
    ),
    st.builds(TrainOnly, st.sampled_from(["head", "blocks[-1]", "*.bias"])),
    st.builds(LayerwiseLR, st.sampled_from([0.5, 1.0])),
)
recipes = st.one_of(
    st.tuples(thaws), st.tuples(freezes), st.tuples(others), st.tuples(others, thaws), st.tuples(thaws, freezes)
)


@settings(max_examples=60, deadline=None)
@given(
    algorithms=recipes, model=st.sampled_from(["mlp", "encoder", "bare"]), samples=st.integers(1, 13), size=st.integers(1, 4),
    drop_last=st.booleans(), accumulate=st.integers(1, 3), duration=st.sampled_from(["1ep", "3ep", "7ba", "4ba", "20sp"]),
    schedule=st.sampled_from([None, linear(), cosine(end=0.1), warmup("0.3dur")]), kind=st.sampled_from(["sgd", "groups"]),
)  # fmt: skip
def test_the_plan_is_what_happens(
    algorithms: tuple[Algorithm, ...], model: str, samples: int, size: int, drop_last: bool, accumulate: int,
    duration: str, schedule: Any, kind: str,
) -> None:  # fmt: skip
    """Of algorithms that the clock drives, every span and sample of the plan is that of the fit, or both raise alike."""
    net = MODELS[model]()
    x = torch.zeros(samples, 5, dtype=torch.long) if model == "encoder" else torch.zeros(samples, 4)
    data = DataLoader(
        TensorDataset(x, torch.zeros(samples, dtype=torch.long)), min(size, samples), shuffle=True, drop_last=drop_last
    )
    recipe = trainer(*algorithms, accumulate=accumulate, **({} if schedule is None else {"schedule": schedule}))
    optimizer = decay_groups(net) if kind == "groups" else None
    outcomes: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThawlineWarning)
        for call in (
            lambda: recipe.plan(net, data, duration=duration, optimizer=optimizer),
            lambda: recipe.fit(net, data, duration=duration, optimizer=optimizer).timeline,
        ):
            try:
                outcomes.append(call())
            except (ArgumentError, LedgerError, SelectorError) as error:
                outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1]
    if isinstance(outcomes[0], Plan):
        assert outcomes[0].spans[-1].ends_with in ("duration", "stopped: nothing trains any more")
        assert Plan.from_json(json.loads(json.dumps(outcomes[0].to_json()))).to_json() == outcomes[0].to_json()


def test_long_plans_have_the_samples_of_the_fit() -> None:
    """Where there are more batches than samples, the same ones are taken."""
    batches = [(torch.zeros(1, 4), torch.zeros(1, dtype=torch.long))] * 500
    recipe = trainer(LayerThaw("0.3dur"), schedule=cosine())
    plan = recipe.plan(mlp(), batches, duration="2ep")
    assert plan == recipe.fit(mlp(), batches, duration="2ep").timeline
    assert len(plan.samples) < 600


class RaggedBatches:
    """A batch sampler of one's own: batches of many sizes, in an order drawn from the global generator."""

    def __init__(self) -> None:
        self.epochs = 0

    def __iter__(self) -> Iterator[list[int]]:
        self.epochs += 1
        order = torch.randperm(10).tolist()
        yield from (order[:3], order[3:4], order[4:9], order[9:])

    def __len__(self) -> int:
        return 4


def test_a_batch_sampler_of_ones_own_is_drawn_from_aside() -> None:
    """Samples are counted as in the fit, and the sampler itself is not asked."""
    sampler = RaggedBatches()
    data = DataLoader(TensorDataset(torch.randn(10, 4), torch.zeros(10, dtype=torch.long)), batch_sampler=sampler)
    recipe = trainer(LayerThaw("7sp"))
    before = sampler.epochs
    plan = recipe.plan(mlp(), data, duration="3ep")
    assert sampler.epochs == before
    assert plan == recipe.fit(mlp(), data, duration="3ep").timeline


def test_what_an_earlier_fit_attached_is_known() -> None:
    """A model with adapters is planned with them, and is not given others."""
    net, data = mlp(), loader()
    recipe = trainer(LoRAInject(rank=2), LayerThaw(1))
    first = recipe.fit(net, data, duration="2ep").timeline
    assert recipe.plan(net, data, duration="2ep") == first
    detached = trainer(_Detach()).plan(net, data, duration="1ep")
    assert detached.spans[0].trainable == 50
    assert recipe.fit(net, data, duration="2ep").timeline == first


class _Detach(Algorithm):
    """Takes the adapters off."""

    events = frozenset({Event.FIT_START})

    def apply(self, event: Event, state: State) -> None:
        """Detach everything."""
        for each in reversed(state.ledger.journal):
            state.ledger.detach(each.module, each.op, owner=each.owner)


def test_a_stop_by_the_clock_is_planned() -> None:
    """What state.stop says ends the last span, planned and actual; later layers are not shown."""

    class Halt(Algorithm):
        """Stops after five batches."""

        events = frozenset({Event.BATCH_END})

        def apply(self, event: Event, state: State) -> None:
            """Stop."""
            if state.clock.batch == 5:
                state.stop("five are enough")

    recipe = trainer(LayerThaw(1), Halt())
    plan = recipe.plan(mlp(), loader(), duration="4ep")
    assert [span.ends_with for span in plan.spans] == ["LayerThaw", "stopped: five are enough"]
    assert plan == recipe.fit(mlp(), loader(), duration="4ep").timeline


def test_all_who_changed_the_ledger_are_named() -> None:
    """A span ends with every owner that moved, in the order of their turns."""

    class Slows(Algorithm):
        """Halves the head's rate after four batches."""

        events = frozenset({Event.BATCH_END})

        def apply(self, event: Event, state: State) -> None:
            """Scale."""
            if state.clock.batch == 4:
                state.ledger.scale("head", 0.5, owner=self.owner)

    recipe = trainer(LayerThaw("4ba", limit=1), Slows())
    plan = recipe.plan(mlp(), loader(), duration="2ep")
    assert [span.ends_with for span in plan.spans] == ["Slows, LayerThaw", "duration"]
    assert plan == recipe.fit(mlp(), loader(), duration="2ep").timeline


def test_a_resumed_fit_names_what_ended_its_spans(tmp_path: Any) -> None:
    """Also where the checkpoint was cut after the ledger had moved, and where it was cut inside of a span."""
    whole = trainer(LayerFreeze(start=0.0), run_dir=tmp_path / "a").fit(mlp(depth=4), loader(), duration="4ep")
    assert {span.ends_with for span in whole.timeline.spans[:-1]} == {"LayerFreeze"}
    for path in sorted((tmp_path / "a").glob("ba*")):
        resumed = trainer(LayerFreeze(start=0.0)).fit(mlp(depth=4), loader(), duration="4ep", resume=path)
        assert resumed.timeline.spans == whole.timeline.spans


# -- nothing is disturbed ---------------------------------------------------------------------------------------------


class Moody(Dataset[tuple[Tensor, Tensor]]):
    """A dataset that draws random numbers, with a generator of its own too."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(3)
        self.opened: str | None = None

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.opened = "a file"
        noise = torch.randn(4) + random.random() + float(self.rng.random())
        return noise, torch.tensor(index % 2)


def states() -> list[Any]:
    """Return the states of the global generators."""
    return [torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())]  # noqa: NPY002


@pytest.mark.parametrize("model", ["mlp", "cnn", "tied", "shared", "bare", "encoder"])
def test_a_plan_leaves_everything_as_it_is(model: str) -> None:
    """Weights, buffers, identities, modes, flags, generators, loader, optimizer and algorithms: bit for bit."""
    torch.manual_seed(5)
    net, dataset = MODELS[model](), Moody()
    next(iter(net.parameters())).requires_grad = False
    net.eval()
    calls: list[int] = []
    net.register_forward_hook(lambda *_: calls.append(1))
    data = DataLoader(dataset, 4, shuffle=True, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=torch.tensor(0.1), foreach=False)
    target = [name for name, each in net.named_modules() if type(each) is nn.Linear and "out_proj" not in name][:1]
    algorithms = (LayerThaw("2ba", limit=1), LoRAInject(rank=2, target=target), EMA(), GradClip(1.0), EarlyStop())
    recipe, layers = trainer(*algorithms, schedule=linear()), LayerMap(net)
    kept, flags = weights(net), [each.requires_grad for each in net.parameters()]
    ids, classes = [id(each) for each in net.parameters()], [type(each) for each in net.modules()]
    groups = copy.deepcopy([{**each, "params": [id(p) for p in each["params"]]} for each in optimizer.param_groups])
    described, fields = recipe.describe(), [copy.copy(vars(each)) for each in algorithms]
    spec, rng, drawn = copy.deepcopy(vars(layers)), states(), dataset.rng.bit_generator.state
    generator = data.generator.get_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThawlineWarning)
        recipe.plan(net, data, duration="3ep", optimizer=optimizer, layers=layers)
    assert same_weights(weights(net), kept)
    assert [each.requires_grad for each in net.parameters()] == flags
    assert [id(each) for each in net.parameters()] == ids
    assert [type(each) for each in net.modules()] == classes
    assert not any(module.training for module in net.modules())
    assert [{**each, "params": [id(p) for p in each["params"]]} for each in optimizer.param_groups] == groups
    assert not optimizer.state
    assert (recipe.describe(), [vars(each) for each in algorithms]) == (described, fields)
    assert vars(layers) == spec
    assert states() == rng
    assert dataset.rng.bit_generator.state == drawn
    assert dataset.opened is None
    assert data.generator is not None
    assert torch.equal(data.generator.get_state(), generator)
    assert not calls
    assert not ParameterLedger(net, SGD).journal


def test_the_copy_holds_no_numbers() -> None:
    """A model far larger than memory is planned: 4 TB of weights on the meta device, and a shared storage stays so."""
    net = nn.Sequential(*(nn.Linear(10**6, 10**6, device="meta") for _ in range(2)), nn.Linear(10**6, 2, device="meta"))
    plan = trainer(LayerThaw("3ba"), optimizer=torch.optim.AdamW).plan(net, loader(), duration="2ep")
    assert [span.trainable for span in plan.spans] == [
        2 * 10**6 + 2,
        10**12 + 3 * 10**6 + 2,
        2 * 10**12 + 4 * 10**6 + 2,
    ]
    assert plan.spans[-1].state_bytes == 8 * plan.spans[-1].trainable + 4 * 6


def test_tied_weights_stay_tied() -> None:
    """A head tied to the embedding counts once, as in the fit."""
    ids = [(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long))] * 2
    recipe = trainer(LayerThaw(1), loss_fn=lambda out, y: CROSS_ENTROPY(out.flatten(0, 1), y.flatten()))
    plan = recipe.plan(Tied(), ids, duration="4ep")
    assert plan == recipe.fit(Tied(), ids, duration="4ep").timeline
    assert plan.spans[-1].trainable == sum(each.numel() for each in Tied().parameters())


def test_a_generator_is_not_used_up() -> None:
    """An iterator keeps all its batches, and says no length: epochs and samples are not counted, which is noted."""
    batches = iter([(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))] * 5)
    plan = trainer(LayerThaw("2ba")).plan(mlp(), batches, duration="5ba")
    assert [(span.start.batch, span.end.batch) for span in plan.spans] == [(0, 2), (2, 4), (4, 5)]
    assert plan.spans[-1].flops is None
    assert len(plan.notes) == 2
    assert len(list(batches)) == 5


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Six samples and no length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from ((torch.zeros(4), torch.tensor(0)) for _ in range(6))


def test_a_stream_is_planned_in_batches_and_samples() -> None:
    """The batch size says how many samples pass."""
    recipe = trainer(LayerThaw("4sp"))
    plan = recipe.plan(mlp(), DataLoader(Stream(), 2), duration="6sp")
    assert plan.spans == recipe.fit(mlp(), DataLoader(Stream(), 2), duration="6sp").timeline.spans


# -- what a plan cannot know ------------------------------------------------------------------------------------------


def test_what_depends_on_losses_is_said() -> None:
    """EarlyStop is not run and says when it may stop the fit, also where it watches the training loss."""
    recipe = trainer(LayerThaw(1), EarlyStop(), EarlyStop("train/loss", patience="2ep"))
    plan = recipe.plan(mlp(), loader(), duration="4ep")
    assert plan.notes == (
        "EarlyStop may stop the fit when eval/loss has not improved for 3 evaluations.",
        "EarlyStop#2 may stop the fit when train/loss has not improved for 2ep.",
    )
    assert len(plan.spans) == 3
    assert str(plan).splitlines()[-1] == f"Note: {plan.notes[1]}"


@pytest.mark.parametrize(
    ("look", "words"),
    [
        (lambda state: float(state.loss), "asks for state.loss"),
        (lambda state: len(state.batch), "asks for state.batch"),
        (lambda state: state.metrics["eval/loss"], "asks for state.metrics['eval/loss']"),
        (lambda state: state.metrics.get("train/loss"), "asks for state.metrics['train/loss']"),
        (lambda state: next(iter(state.model.parameters())).sum().item(), "looks at weights"),
        (lambda state: next(iter(state.model.parameters())).tolist(), "looks at weights"),
    ],
)
def test_an_algorithm_that_looks_at_more_than_the_clock_is_left_out(look: Any, words: str) -> None:
    """It is shown as such from its first look on; the others are planned."""

    class Looks(Algorithm):
        """Looks at something at BATCH_END."""

        events = frozenset({Event.BATCH_END})

        def apply(self, event: Event, state: State) -> None:
            """Look, and thaw."""
            look(state)
            state.ledger.freeze("head", owner=self.owner)

    plan = trainer(LayerThaw(1), Looks()).plan(mlp(), loader(), duration="3ep")
    assert len(plan.spans) == 3
    assert plan.notes == (f"Looks {words}, which only a fit has: what it does is not shown.",)


@pytest.mark.parametrize("stage", [Stage.CONTROL, Stage.TRAINABILITY, Stage.GRADIENTS, Stage.OBSERVE])
def test_an_algorithm_at_events_that_no_plan_has_is_named(stage: Stage) -> None:
    """Where it may decide what trains or when the fit ends; what works on gradients or watches changes no plan."""

    class Elsewhere(Algorithm):
        """Acts at two events that need data."""

        events = frozenset({Event.EVAL_END, Event.AFTER_LOSS, Event.BATCH_END, Event.FIT_END})

        def apply(self, event: Event, state: State) -> None:
            """Stop."""
            if event is Event.AFTER_LOSS:
                state.stop("enough")

    Elsewhere.stage = stage
    plan = trainer(Elsewhere()).plan(mlp(), loader(), duration="3ep")
    note = "Elsewhere acts at AFTER_LOSS and EVAL_END, which only a fit has: what it does there is not shown."
    assert plan.notes == ((note,) if stage in (Stage.CONTROL, Stage.TRAINABILITY) else ())


def test_its_other_faults_are_raised() -> None:
    """With the note that the engine adds."""

    class Faulty(Algorithm):
        """Raises."""

        events = frozenset({Event.EPOCH_START})

        def apply(self, event: Event, state: State) -> None:
            """Raise."""
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose") as caught:
        trainer(Faulty()).plan(mlp(), loader(), duration=1)
    assert "in Faulty.apply at EPOCH_START" in str(caught.value.__notes__)


# -- optimizer state --------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Any] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": SGD,
    "adam": partial(torch.optim.Adam, lr=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.1, foreach=False),
    "fused": partial(torch.optim.AdamW, lr=0.1, fused=True),
    "amsgrad": partial(torch.optim.Adam, lr=0.1, amsgrad=True),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1),
    "adafactor": partial(torch.optim.Adafactor, lr=0.1),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.1, centered=True, momentum=0.9),
    "muon": [
        (lambda name, parameter: parameter.ndim == 2, partial(torch.optim.Muon, lr=0.1)),
        ("*", partial(torch.optim.AdamW, lr=0.1)),
    ],
}


class Bytes(Algorithm):
    """Measures what the optimizers keep after each step."""

    events = frozenset({Event.AFTER_STEP})
    stage = Stage.OBSERVE

    def __init__(self) -> None:
        self.seen: list[int] = []

    def apply(self, event: Event, state: State) -> None:
        """Measure."""
        kept = [
            each for optimizer in state.optimizers for values in optimizer.state.values() for each in values.values()
        ]
        self.seen.append(sum(each.numel() * each.element_size() for each in kept if isinstance(each, Tensor)))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bytes_of_optimizer_state_are_those_of_the_fit(name: str, dtype: torch.dtype) -> None:
    """In every span, planned and told afterwards, against the tensors that lie in optimizer.state after a step."""
    net, measured = (
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).to(dtype),
        Bytes(),
    )
    x, y = torch.randn(8, 4, dtype=dtype), torch.zeros(8, dtype=torch.long)
    recipe = trainer(LayerThaw("2ba"), measured, optimizer=OPTIMIZERS[name])
    plan = recipe.plan(net, [(x, y)] * 6, duration="1ep")
    result = recipe.fit(net, [(x, y)] * 6, duration="1ep")
    assert [span.state_bytes for span in plan.spans] == measured.seen[::2] == measured.seen[1::2]
    assert plan == result.timeline


class Stubborn(torch.optim.SGD):
    """An optimizer that cannot be built from its options."""

    def __init__(self, params: Any, secret: int) -> None:
        super().__init__(params, lr=0.1)
        self.secret = secret


def test_the_bytes_of_complex_parameters_are_known() -> None:
    """Adam keeps two complex numbers of 8 bytes for each, and a step counter."""
    parameter = nn.Parameter(torch.zeros(3, 2, dtype=torch.complex64))
    adam = torch.optim.AdamW([parameter], lr=0.1)
    template = state_template(adam, adam.defaults, parameter.dtype, 2)
    assert template is not None
    (-parameter.abs().sum()).backward()
    adam.step()
    kept = sum(each.nbytes for each in adam.state[parameter].values())
    assert template_bytes(template, parameter.shape) == kept


def test_an_unknown_optimizer_shows_a_dash() -> None:
    """Nothing is guessed."""
    plan = trainer(optimizer=lambda ps: Stubborn(ps, 1)).plan(mlp(), loader(), duration="1ep")
    assert plan.spans[0].state_bytes is None
    assert "  -  " in str(plan)


# -- operations -------------------------------------------------------------------------------------------------------


def law(model: nn.Sequential, trains: set[int]) -> int:
    """Return the operations a sample of a stack of linear layers: forward, gradient of the input, of the weight."""
    linears = [(index, each) for index, each in enumerate(model) if isinstance(each, nn.Linear)]
    count = 0
    for index, each in linears:
        product = 2 * each.in_features * each.out_features
        count += product * (1 + any(other < index for other in trains) + (index in trains))
    return count


@given(sizes=st.lists(st.integers(1, 9), min_size=4, max_size=6), every=st.sampled_from(["1ba", "2ba"]))
@settings(max_examples=20, deadline=None)
def test_operations_follow_the_law_of_matrix_products(sizes: list[int], every: str) -> None:
    """One product forward, one for each operand that needs a gradient: in closed form, for every span of a thaw."""
    net = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))
    batches = [(torch.zeros(3, sizes[0]), torch.zeros(3, sizes[-1]))] * 20
    plan = trainer(LayerThaw(every), loss_fn=nn.functional.mse_loss).plan(net, batches, duration="1ep")
    layers = LayerMap(net)
    whole = law(net, set(range(len(net))))
    for span in plan.spans:
        trains = {int(name.partition(".")[0]) for layer in span.layers for name in layers.parameters(layer)}
        assert span.flops == pytest.approx(law(net, trains) / whole, rel=1e-9)


@pytest.mark.parametrize("algorithms", [(LayerThaw(1),), (LoRAInject(rank=2), LayerThaw(1)), (TrainOnly("stem"),)])
def test_operations_are_those_of_a_real_step(algorithms: tuple[Algorithm, ...]) -> None:
    """Against torch's counter around the real forward and backward of a transformer, in each span."""

    class Counts(Algorithm):
        """Counts the operations of each batch."""

        events = frozenset({Event.BATCH_START, Event.BEFORE_STEP})

        def __init__(self) -> None:
            self.seen: list[int] = []

        def apply(self, event: Event, state: State) -> None:
            """Begin or end."""
            if event is Event.BATCH_START:
                self.counter = FlopCounterMode(display=False)
                self.counter.__enter__()
            else:
                self.counter.__exit__(None, None, None)
                self.seen.append(self.counter.get_total_flops())

    batches = [(torch.zeros(3, 5, dtype=torch.long), torch.zeros(3, dtype=torch.long))]
    whole, counts = Counts(), Counts()
    with sdpa_kernel(SDPBackend.MATH):  # the CPU's fused kernel is not in the counter's table
        trainer(whole).fit(encoder(), batches, duration=1)
        plan = trainer(*algorithms).plan(encoder(), batches, duration="4ep")
        trainer(*algorithms, counts).fit(encoder(), batches, duration="4ep")
    expected = [count / whole.seen[0] for count in counts.seen]
    planned = [span.flops for span in plan.spans for _ in range(span.start.batch, span.end.batch)]
    assert planned == pytest.approx(expected, rel=1e-9)


def test_many_sets_are_counted_by_few_passes() -> None:
    """Sixty random sets of a stack's layers take a few forwards, and each share is that of the closed form."""
    forwards: list[int] = []

    class Counted(nn.Sequential):
        """Counts its forwards."""

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in the class
            forwards.append(1)
            return super().forward(input)

    net = Counted(*(nn.Linear(4, 4) for _ in range(20)))
    batches = [(torch.zeros(3, 4), torch.zeros(3, 4))] * 60
    recipe = trainer(LISA(every="1ba", layers=3, always=()), loss_fn=nn.functional.mse_loss)
    plan = recipe.plan(net, batches, duration="1ep")
    assert len(plan.spans) > 50
    assert len(forwards) < 8
    layers, whole = LayerMap(net), law(net, set(range(20)))
    for span in plan.spans:
        trains = {int(name.partition(".")[0]) for layer in span.layers for name in layers.parameters(layer)}
        assert span.flops == pytest.approx(law(net, trains) / whole, rel=1e-9)


@given(
    sets=st.lists(st.frozensets(st.integers(0, 40), min_size=1), min_size=1, max_size=4),
    kind=st.sampled_from([cnn, encoder]),
)
@settings(max_examples=30, deadline=None)
def test_the_share_of_any_set_is_what_it_counts(sets: list[frozenset[int]], kind: Any) -> None:
    """Also of sets that no layer follows: a weight without its bias, a norm alone."""
    net, _ = meta_twin(kind())
    inputs = torch.zeros(3, 1, 8, 8) if kind is cnn else torch.zeros(3, 5, dtype=torch.long)
    batch, forward = (inputs, torch.zeros(3, dtype=torch.long)), Forward(loss_fn=CROSS_ENTROPY)
    counter = flops.FlopCounter(net, batch, forward, 1)
    names = [name for name, _ in net.named_parameters()]
    for each in sets:
        chosen = frozenset(names[index % len(names)] for index in each)
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(name in chosen)
        assert counter.share(chosen) == flops.count_flops(net, batch, forward)
    assert counter._graph is not None


def test_a_model_that_needs_numbers_shows_a_dash() -> None:
    """Its forward cannot run without them: the column is left out, and the plan stands."""

    class Branches(Bare):
        """Looks at its input."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum().item() > 0 else -x)

    plan = trainer(LayerThaw(1)).plan(Branches(), loader(), duration="3ep")
    assert [span.flops for span in plan.spans] == [None] * len(plan.spans)
    assert "FLOPs" not in str(plan)
    assert "FLOPs" in str(trainer().plan(Bare(), loader(), duration="3ep"))


def test_a_padded_batch_of_transformers_is_counted() -> None:
    """Hugging Face's BERT asks of its mask whether it is all ones; counted is what the real model costs."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    net, shape = transformers.BertForSequenceClassification(config), (2, 5)
    batch = {"input_ids": torch.ones(shape, dtype=torch.long), "attention_mask": torch.ones(shape, dtype=torch.long)}
    batch["labels"] = torch.zeros(2, dtype=torch.long)
    plan = trainer(LayerThaw(1), loss_fn=None).plan(net, [batch], duration="4ep")
    counts: list[int] = []
    for layers in (
        1,
        2,
        3,
        4,
        5,
    ):  # the head, a block more at each epoch, and the embeddings, which the fit does not reach
        trains = {name for layer in list(LayerMap(net))[-layers:] for name in layer.parameters}
        for name, each in net.named_parameters():
            each.requires_grad = name in trains
        with FlopCounterMode(display=False) as counter:
            net(**batch).loss.backward()
        counts.append(counter.get_total_flops())
    assert [span.flops for span in plan.spans] == pytest.approx([each / counts[-1] for each in counts[:4]], rel=1e-9)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model": 3}, r"Trainer.plan\(model=\)"),
        ({"model": nn.ReLU()}, "no parameters"),
        ({"duration": "0.5dur"}, r"Trainer.plan\(duration=\)"),
        ({"duration": None}, r"Trainer.plan\(duration=\)"),
        ({"train_loader": 3}, r"Trainer.plan\(train_loader=\)"),
        ({"train_loader": []}, "yields no batch"),
        ({"train_loader": DataLoader(Stream(), 2), "duration": "3ep"}, r"duration='200ba'"),
        ({"train_loader": iter([1]), "duration": "3sp"}, r"samples a batch"),
        ({"optimizer": 3}, "optimizer"),
        ({"layers": {"head": "nothing"}}, "matches nothing"),
    ],
)
def test_wrong_arguments_are_typed_errors(change: dict[str, Any], match: str) -> None:
    """Each names the argument and what to write."""
    arguments: dict[str, Any] = {"model": mlp(), "train_loader": loader(), "duration": Time("2ep"), **change}
    with pytest.raises(Exception, match=match) as caught:
        trainer().plan(**arguments)
    assert type(caught.value).__module__ == "thawline.engine.errors"


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    """The error says what copying said."""
    net = mlp()
    net.batches = (each for each in ())  # type: ignore[assignment]
    with pytest.raises(ArgumentError, match="generator"):
        trainer().plan(net, loader(), duration=1)


def test_errors_of_the_algorithms_are_those_of_the_fit() -> None:
    """A selector that matches nothing, all parameters held, an optimizer's instance in the Trainer."""
    for recipe in (
        trainer(TrainOnly("nothing")),
        trainer(LoRAInject(target="nothing")),
        trainer(optimizer=torch.optim.SGD(mlp().parameters())),
    ):
        with pytest.raises(Exception, match=r".") as planned:
            recipe.plan(mlp(), loader(), duration=1)
        with pytest.raises(type(planned.value)) as fitted:
            recipe.fit(mlp(), loader(), duration=1)
        assert str(planned.value) == str(fitted.value)


def test_a_convolutional_net_is_counted_by_one_pass_for_any_set() -> None:
    """With groups, strides and transposed convolutions: equal to a count of each set of up to three parameters."""
    meta: dict[str, Any] = {"device": "meta"}
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, **meta), nn.BatchNorm2d(8, **meta), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=4, **meta),
        nn.ConvTranspose2d(8, 4, 2, groups=2, **meta), nn.Conv2d(4, 4, 1, **meta),
    )  # fmt: skip
    inputs, names = torch.zeros(2, 4, 9, 9, device="meta"), dict(net.named_parameters())
    cost = BackwardCost(net(inputs).sum(), names)
    through = Forward(lambda model, batch: model(batch).sum())
    with FlopCounterMode(display=False) as forward:
        net(inputs)
    for size in (1, 2, 3):
        for chosen in itertools.combinations(names, size):
            for name, each in names.items():
                each.requires_grad_(name in chosen)
            assert forward.get_total_flops() + cost.of(set(chosen)) == count_flops(net, inputs, through)
    assert cost.runs == 1
