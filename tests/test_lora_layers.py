"""LoRA beside every kind of layer, its arguments, merging, removal, and files shared with peft."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # torch's own name for it
from typing_extensions import override

from helpers import Tied, loader, mlp
from thawline.algorithms import (
    LoRAInject,
    inject_lora,
    load_adapter,
    lora_forward,
    merge_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from thawline.algorithms.lora_convolution import lora_convolution
from thawline.algorithms.lora_forward import drop
from thawline.algorithms.lora_targets import lora_sites
from thawline.engine import (
    Algorithm,
    ArgumentError,
    CheckpointError,
    Event,
    LayerMap,
    ParameterLedger,
    SelectorError,
    State,
    SurgeryError,
    ThawlineWarning,
    Trainer,
)


def conv1d(inputs: int, outputs: int) -> nn.Module:
    """Return a Conv1D of transformers."""
    utils = pytest.importorskip("transformers.pytorch_utils")
    layer: nn.Module = utils.Conv1D(outputs, inputs)
    return layer


class Around(nn.Module):
    """One layer between others, so that it has a name, and a head."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 2)
        self.layer = layer
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self.layer, "out_proj"):
            found: Tensor = self.layer(x, x, x)[0]
            return found
        y: Tensor = self.layer(x)
        return y


def layers() -> dict[str, tuple[nn.Module, Tensor]]:
    """Return a layer of each kind and an input."""
    torch.manual_seed(0)
    images = torch.randn(2, 4, 9, 9)
    return {
        "linear": (nn.Linear(8, 6), torch.randn(3, 8)),
        "conv1D": (conv1d(8, 6), torch.randn(3, 5, 8)),
        "embedding": (nn.Embedding(9, 6, padding_idx=0), torch.randint(0, 9, (3, 5))),
        "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 9)),
        "conv2d": (nn.Conv2d(4, 6, (3, 2), padding=(1, 0)), images),
        "conv3d": (nn.Conv3d(4, 6, 3), torch.randn(2, 4, 5, 5, 5)),
        "groups": (nn.Conv2d(4, 8, 3, groups=2), images),
        "attention": (nn.MultiheadAttention(8, 2), torch.randn(5, 3, 8)),
        "dilation": (nn.Conv2d(4, 6, 3, dilation=2, stride=(2, 1)), images),
        "same": (nn.Conv1d(4, 6, 4, padding="same", dilation=3, bias=False), torch.randn(2, 4, 9)),
        "circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), images),
        "reflect": (nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect", groups=2), torch.randn(4, 9)),
    }


KINDS = (
    "linear", "conv1D", "embedding", "conv1d", "conv2d", "conv3d", "groups", "attention", "dilation", "same", "circular",
    "reflect",
)  # fmt: skip


def injected(model: nn.Module, target: Any = "layer", **options: Any) -> ParameterLedger:
    """Attach adapters and give them values of which none is zero."""
    ledger = ParameterLedger(model, partial(torch.optim.SGD, lr=0.1))
    inject_lora(ledger, target, **({"rank": 4, "alpha": 6} | options))
    stir(model)
    return ledger


def stir(model: nn.Module) -> None:
    """Draw the adapters' values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "lora_" in name:
                each.copy_(torch.randn(each.shape, generator=generator) * 0.3)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own, of its own layer
class TestEveryKind:
    """Each kind of layer against torch's own layer with the sum of the weights."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_injection_changes_no_bit_and_keeps_names(self, kind: str) -> None:
        """The output is torch's; the class a static subclass; the state dict gained only the adapter."""
        layer, x = layers()[kind]
        model = Around(layer)
        before, keys, own = model(x), list(model.state_dict()), type(layer)
        ledger = ParameterLedger(model, partial(torch.optim.SGD, lr=0.1))
        inject_lora(ledger, "layer", rank=4)
        assert torch.equal(model(x), before)
        assert model.layer is layer
        assert isinstance(layer, own)
        assert [name for name in model.state_dict() if "lora_" not in name] == keys
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), before)

    @pytest.mark.parametrize("kind", KINDS)
    def test_it_computes_what_the_layer_with_the_sum_of_the_weights_does(self, kind: str) -> None:
        """Outputs and the adapters' gradients in float64, by torch's own autograd through the merged weight."""
        layer, x = layers()[kind]
        model = Around(layer).double()
        x = x.double() if x.is_floating_point() else x
        plain = copy.deepcopy(model)
        injected(model)
        push = torch.randn(model(x).shape, dtype=torch.float64)
        (model(x) * push).sum().backward()
        weights: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if hasattr(module, "lora_deltas"):
                for weight, delta in module.lora_deltas().items():
                    weights[f"{name}.{weight}"] = plain.get_parameter(f"{name}.{weight}").detach() + delta
        got = {name: each.grad for name, each in model.named_parameters() if "lora_" in name}
        want = torch.func.functional_call(plain, weights, (x,))
        torch.testing.assert_close(model(x), want, rtol=1e-10, atol=1e-12)
        leaves = [model.get_parameter(name) for name in got]
        if (
            kind == "embedding"
        ):  # the row of padding_idx gets no gradient, as in torch's layer; the reference gives it one
            keep = torch.ones(9, dtype=torch.float64).index_fill(0, torch.tensor([0]), 0)
            weight = plain.get_parameter("layer.weight").detach()
            down, up = leaves
            want = F.embedding(x, weight + 1.5 * (up @ (down * keep + (down * (1 - keep)).detach())).t())
            del weight
        for name, theirs in zip(got, torch.autograd.grad((want * push).sum(), leaves), strict=True):
            torch.testing.assert_close(got[name], theirs, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("kind", KINDS)
    def test_merge_gives_the_same_output_and_unmerge_the_same_bits(self, kind: str) -> None:
        """In float64 to 1e-12; the original weights return exactly, and so does the output."""
        layer, x = layers()[kind]
        model = Around(layer).double()
        x = x.double() if x.is_floating_point() else x
        before = {name: value.clone() for name, value in model.state_dict().items()}
        injected(model)
        want = model(x)
        merge_lora(model)
        torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
        assert any(not torch.equal(model.state_dict()[name], value) for name, value in before.items())
        unmerge_lora(model)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
        assert torch.equal(model(x), want)
        remove_lora(model)
        assert list(model.state_dict()) == list(before)
        assert all("lora" not in type(each).__name__.lower() for each in model.modules())

    @pytest.mark.parametrize("kind", ["conv1d", "conv2d", "groups", "dilation"])
    @pytest.mark.parametrize("p", [0.0, 0.3])
    def test_gradcheck_of_convolutions(self, kind: str, p: float) -> None:
        """First and second gradients agree with finite differences, with dropout too: it is drawn again alike."""
        layer: Any = layers()[kind][0]
        spatial, groups = len(layer.stride), layer.groups
        x = torch.randn(2, 4, *[5] * spatial, dtype=torch.float64, requires_grad=True)
        shapes = [layer.weight.shape, (len(layer.weight),), (2, *layer.weight.shape[1:])]
        shapes.append((len(layer.weight), 2 // groups, *[1] * spatial))
        tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

        def convolved(*tensors: Tensor) -> Tensor:
            torch.manual_seed(0)
            return lora_convolution(
                *tensors, stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=groups,
                scaling=0.5, dropout=p, training=True,
            )  # fmt: skip

        assert torch.autograd.gradcheck(convolved, (x, *tensors))
        assert torch.autograd.gradgradcheck(convolved, (x, *tensors))

    @pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
    def test_half_precision_and_autocast(self, kind: str) -> None:
        """Within bfloat16's precision of float32; adapters stay float32."""
        layer, x = layers()[kind]
        model = Around(layer)
        injected(model)
        want = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            got = model(x)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.1)
        half = Around(layers()[kind][0]).bfloat16()
        injected(half)
        assert half.get_parameter("layer.lora_A").dtype == torch.float32
        half(x.bfloat16()).float().sum().backward()
        assert half.get_parameter("layer.lora_A").grad is not None

    def test_refusals(self) -> None:
        """An embedding that rewrites itself, a rank that groups do not divide, slices of what has none."""
        with pytest.raises(SurgeryError, match="max_norm"):
            injected(Around(nn.Embedding(4, 2, max_norm=1.0)))
        with pytest.raises(SurgeryError, match="2 groups, of which 3 is no multiple"):
            injected(Around(nn.Conv1d(4, 4, 3, groups=2)), rank=3)
        with pytest.raises(SurgeryError, match="slices are for linear layers"):
            injected(Around(nn.Embedding(9, 3)), {"layer": "q"})


class TestDropout:
    """What is dropped is drawn again in the backward pass."""

    @settings(max_examples=30)
    @given(st.integers(0, 5000), st.floats(0.001, 0.99), st.integers(0, 2**62))
    def test_elements_are_kept_or_zero_and_always_the_same(self, size: int, p: float, seed: int) -> None:
        """For any size, probability and seed."""
        x = torch.arange(1.0, size + 1)
        got = drop(x, p, seed)
        assert torch.equal(got, drop(x, p, seed))
        assert bool(((got == 0) | (got == x)).all())

    @pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
    def test_each_place_is_dropped_as_often_as_it_should(self, p: float) -> None:
        """Over a million draws, in all and in each of ten stretches, and neighbors independently: within five sigma."""
        kept = drop(torch.ones(1_000_000), p, seed=3)
        sigma = (p * (1 - p) / 1e6) ** 0.5
        assert abs(kept.mean().item() - (1 - p)) < 5 * sigma
        assert all(abs(part.mean().item() - (1 - p)) < 5 * sigma * 10**0.5 for part in kept.chunk(10))
        pairs = (kept[:-1] * kept[1:]).mean().item()
        assert abs(pairs - (1 - p) ** 2) < 10 * sigma

    @pytest.mark.parametrize("rows", [None, [[0, 2], [3, 4]]])
    def test_gradcheck(self, rows: list[list[int]] | None) -> None:
        """First and second gradients of the linear layer with dropout and slices, against finite differences."""
        height = 4 if rows is None else 3
        shapes = [(3, 5), (4, 5), (4,), (2 if rows is None else 4, 5), (height, 2)]
        tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

        def forward(*tensors: Tensor) -> Tensor:
            torch.manual_seed(0)
            return lora_forward(*tensors, scaling=0.5, dropout=0.4, training=True, rows=rows)

        assert torch.autograd.gradcheck(forward, tensors)
        assert torch.autograd.gradgradcheck(forward, tensors)

    def test_only_x_and_the_hidden_features_are_kept(self) -> None:
        """Beside the weights themselves: no mask, no dropped input, no scaled output."""
        kept: list[Tensor] = []

        def pack(each: Tensor) -> Tensor:
            kept.append(each)
            return each

        x, weight, down, up = (torch.randn(shape, requires_grad=True) for shape in ((7, 5), (4, 5), (2, 5), (4, 2)))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
            lora_forward(x, weight, None, down, up, dropout=0.5, training=True)
        inputs = {each.data_ptr() for each in (x, weight, down, up)}
        assert [tuple(each.shape) for each in kept if each.data_ptr() not in inputs] == [(7, 2)]


class TestSlices:
    """Adapters on the query's and the value's rows of a fused projection."""

    def gpt2(self) -> nn.Module:
        """Return a tiny GPT-2."""
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            n_embd=16,
            n_layer=2,
            n_head=2,
            vocab_size=50,
            n_positions=16,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        )
        model: nn.Module = transformers.GPT2LMHeadModel(config)
        return model

    def test_gpt2_is_adapted_whole_by_default_and_in_slices_where_asked(self) -> None:
        """c_attn's rows of query and value; the key's outputs stay bit-equal."""
        model: Any = self.gpt2()
        name = "transformer.h.0.attn.c_attn"
        assert lora_sites(model, LayerMap(model))[name] is None
        assert lora_sites(model, LayerMap(model), {"c_attn": "q,v"})[name] == [[0, 16], [32, 48]]
        x, layer = torch.randn(3, 16), model.get_submodule(name)
        before = layer(x)
        injected(model, {"c_attn": "q,v"})
        after = layer(x)
        assert torch.equal(after[:, 16:32], before[:, 16:32])
        assert not torch.equal(after[:, :16], before[:, :16])
        assert not torch.equal(after[:, 32:], before[:, 32:])
        assert layer.lora_A.shape == (8, 16)
        assert layer.lora_B.shape == (32, 4)
        want = before + layer.lora_deltas()["weight"].t().matmul(x.t()).t()
        torch.testing.assert_close(after, want)

    def test_grouped_queries_and_rows_of_ones_own(self) -> None:
        """Sizes come from the model's configuration, or are written; what is mixed is refused."""
        transformers = pytest.importorskip("transformers")
        model = Around(nn.Linear(16, 32))
        model.config = transformers.LlamaConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=2)
        assert lora_sites(model, LayerMap(model), {"layer": "k"}) == {"layer": [[16, 24]]}
        assert lora_sites(model, LayerMap(model), {"layer": [(0, 4), (8, 9)]}) == {"layer": [[0, 4], [8, 9]]}
        assert lora_sites(model, LayerMap(model), {"layer": None}) == {"layer": None}
        model.config = transformers.GPTNeoXConfig(hidden_size=16, num_attention_heads=4)
        with pytest.raises(SurgeryError, match="is not known. Write them"):
            lora_sites(model, LayerMap(model), {"layer": "q,v"})
        with pytest.raises(ArgumentError, match="without overlap"):
            lora_sites(model, LayerMap(model), {"layer": [[0, 4], [2, 6]]})

    @pytest.mark.parametrize("target", [{"a": "x"}, {"a": 3}, {}, {"a": "q,q"}])
    def test_bad_targets(self, target: Any) -> None:
        """Are refused at construction."""
        with pytest.raises(ArgumentError, match=r"LoRAInject\(target=\)"):
            LoRAInject(target=target)

    def test_a_description_rebuilds_it(self) -> None:
        """Mappings survive JSON."""
        algorithm = LoRAInject(
            target={"c_attn": "q,v"}, rank={"*": 4}, alpha={"*": 8}, modules_to_save=["x"], lr_ratio=4
        )
        described = json.loads(json.dumps(algorithm.describe()))
        assert Algorithm.from_description(described).describe() == algorithm.describe()


class TestArguments:
    """Ranks and alphas by pattern, rslora, LoRA+, and modules that train as a whole."""

    def test_rank_and_alpha_by_pattern(self) -> None:
        """The first glob that matches; globs for nothing and targets without one are refused."""
        model: Any = mlp()
        injected(model, "all-linear", rank={"0": 3, "*": 2}, alpha={"2": 8, "*": 3})
        assert (model[0].lora_A.shape[0], model[2].lora_A.shape[0]) == (3, 2)
        assert (model[0].lora_scaling, model[2].lora_scaling) == (1.0, 4.0)
        with pytest.raises(ArgumentError, match="no glob for '2'"):
            injected(mlp(), "all-linear", rank={"0": 6})
        with pytest.raises(ArgumentError, match="'7' that matches no target"):
            injected(mlp(), "all-linear", rank={"7": 6, "*": 2})
        for bad in ({"*": 0}, {}, {3: 4}):
            with pytest.raises(ArgumentError, match=r"LoRAInject\(rank=\)"):
                LoRAInject(rank=bad)  # type: ignore[arg-type]  # wrong on purpose

    def test_rslora_divides_by_the_root_of_the_rank(self) -> None:
        """alpha / sqrt(rank)."""
        model: Any = mlp()
        injected(model, "0", rank=4, alpha=6, rslora=True)
        assert model[0].lora_scaling == 3.0
        inject_lora(ParameterLedger(model, partial(torch.optim.SGD, lr=0.1)), "0", rank=4, alpha=6, rslora=True)

    def test_lr_ratio_is_that_of_the_rates(self) -> None:
        """lora_B at ratio times the rate of lora_A, with and without lr=."""
        for lr, base in ((None, 0.1), (0.5, 0.5)):
            ledger = ParameterLedger(mlp(), partial(torch.optim.SGD, lr=0.1))
            inject_lora(ledger, rank=2, lr=lr, lr_ratio=16)
            rates = {name: group.lr for group in ledger.groups for name in group.parameters}
            assert rates["0.lora_A"] == pytest.approx(base)
            assert rates["0.lora_B"] == pytest.approx(16 * base)
            assert rates["4.weight"] == pytest.approx(0.1)
            ledger.verify()

    def test_modules_to_save_train_as_a_whole(self) -> None:
        """They are not held, and marked; a module cannot both be adapted and train as a whole."""
        model = mlp(depth=4)
        ledger = ParameterLedger(model, partial(torch.optim.SGD, lr=0.1))
        inject_lora(ledger, ["0"], rank=2, modules_to_save=["4"], train_head=False)
        assert ledger.trainable == {"0.lora_A", "0.lora_B", "4.weight", "4.bias"}
        with pytest.raises(SurgeryError, match="either as a whole or by an adapter"):
            injected(mlp(), ["0"], modules_to_save="0")
        with pytest.raises(SelectorError, match="matches no module with parameters"):
            injected(mlp(), ["0"], modules_to_save=["1"])

    def test_tied_weights_stay_tied(self) -> None:
        """An adapter on a tied embedding acts there alone; a merge, which could not, is refused."""
        model: Any = Tied()
        ids = torch.arange(6).view(2, 3)
        injected(model, "embed")
        assert model.lm_head.weight is model.embed.weight
        before = model.lm_head(torch.ones(4))
        stir(model)
        assert torch.equal(model.lm_head(torch.ones(4)), before)
        model(ids).sum().backward()
        with pytest.raises(SurgeryError, match=r"'embed' is tied to that of 'lm_head'"):
            merge_lora(model)
        assert model.lm_head.weight is model.embed.weight


class Script(Algorithm):
    """Calls functions of the ledger at given batches."""

    events = frozenset({Event.BATCH_START})

    def __init__(self, calls: dict[int, Any]) -> None:
        self.calls = calls

    @override
    def apply(self, event: Event, state: State) -> None:
        """Call what is due, and let the ledger check itself."""
        if state.clock.batch in self.calls:
            self.calls[state.clock.batch](state.ledger)
        state.ledger.verify()

    @override
    def describe(self) -> dict[str, Any]:
        return {"name": "Script", "arguments": {}}


class TestMidRun:
    """Injection, merge and removal between any two steps."""

    CALLS: ClassVar[dict[int, Any]] = {
        1: partial(inject_lora, target=["0", "2"], rank=2, dropout=0.2, owner="mid"),
        3: merge_lora, 4: unmerge_lora, 6: merge_lora, 7: remove_lora,
    }  # fmt: skip

    def fitted(self, duration: str, run_dir: Path | None = None) -> dict[str, Tensor]:
        """Return the weights after a fit that injects, merges, unmerges, merges again and removes."""
        torch.manual_seed(0)
        model = mlp()
        trainer = Trainer(
            algorithms=[Script(dict(self.CALLS))], optimizer=partial(torch.optim.AdamW, lr=0.05), loss_fn=F.cross_entropy,
            progress=False, run_dir=run_dir,
        )  # fmt: skip
        trainer.fit(model, loader(), duration=duration, resume=run_dir is not None)
        return model.state_dict()

    def test_the_ledger_stays_in_step(self) -> None:
        """verify() passes before every batch; what is merged at removal stays in the weights."""
        plain = mlp().state_dict()
        state = self.fitted("9ba")
        assert list(state) == list(plain)

    @pytest.mark.parametrize("stop", [2, 4, 5, 7, 8])
    def test_a_resumed_run_ends_in_the_same_bits(self, stop: int, tmp_path: Path) -> None:
        """Wherever it was stopped: with adapters, merged, unmerged, removed."""
        want = self.fitted("9ba")
        self.fitted(f"{stop}ba", tmp_path)
        got = self.fitted("9ba", tmp_path)
        assert list(got) == list(want)
        for name, value in got.items():
            assert torch.equal(value, want[name]), name

    def test_merged_adapters_are_held_and_keep_their_optimizer_state(self) -> None:
        """They neither train nor lose what AdamW knows of them."""
        model = mlp()
        ledger = ParameterLedger(model, partial(torch.optim.AdamW, lr=0.1))
        adapters = inject_lora(ledger, rank=2)
        F.cross_entropy(model(torch.randn(4, 4)), torch.tensor([0, 1, 0, 1])).backward()
        ledger.optimizers[0].step()
        model.zero_grad()
        moment = ledger.optimizers[0].state[model.get_parameter("0.lora_B")]["exp_avg"].clone()
        merge_lora(ledger)
        assert ledger.trainable == {"4.weight", "4.bias"}
        ledger.verify()
        unmerge_lora(ledger)
        assert set(adapters) <= ledger.trainable
        assert torch.equal(ledger.optimizers[0].state[model.get_parameter("0.lora_B")]["exp_avg"], moment)

    def test_a_fit_with_merged_adapters_is_refused(self) -> None:
        """Saying what to write."""
        model = mlp()
        injected(model, "0")
        merge_lora(model)
        with pytest.raises(SurgeryError, match="unmerge_lora"):
            injected(model, "0")


# -- files -----------------------------------------------------------------------------------------------------------

SHARED = ("linear", "conv1D", "embedding", "conv1d", "conv2d", "conv3d", "groups", "attention")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own, of its own layer
class TestFiles:
    """`save_adapter` and `load_adapter`, ours with ours."""

    @pytest.mark.parametrize("rslora", [False, True])
    @pytest.mark.parametrize("kind", KINDS)
    def test_what_was_saved_loads(self, kind: str, rslora: bool, tmp_path: Path) -> None:
        """Outputs are equal, names of tensors are peft's, and what was loaded trains on."""
        layer, x = layers()[kind]
        model = Around(layer)
        twin = copy.deepcopy(model)
        injected(model, rslora=rslora)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ThawlineWarning)
            save_adapter(model, tmp_path)
            load_adapter(twin, tmp_path)
        torch.testing.assert_close(twin(x), model(x), rtol=1e-6, atol=1e-6)
        scales = [[getattr(each, "lora_scaling", None) for each in net.modules()] for net in (model, twin)]
        assert scales[0] == scales[1]
        inject_lora(ParameterLedger(twin, partial(torch.optim.SGD, lr=0.1)), "layer", rank=4, alpha=6, rslora=rslora)

    def test_a_file_with_rslora_is_scaled_by_the_root_of_the_rank(self, tmp_path: Path) -> None:
        """As the other library writes it: alpha 6 over the root of rank 4."""
        model, twin = mlp(), mlp()
        injected(model, ["0", "2"])
        save_adapter(model, tmp_path)
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": True}))
        load_adapter(twin, tmp_path)
        assert [twin[index].lora_scaling for index in (0, 2)] == [3.0, 3.0]

    def test_the_files_are_pefts(self, tmp_path: Path) -> None:
        """Keys, configuration, and the head that trained beside the adapters."""
        load_file = pytest.importorskip("safetensors.torch").load_file
        model = mlp()
        injected(model, ["0", "2"], rank={"0": 4, "2": 2})
        save_adapter(model, tmp_path / "new")
        config = json.loads((tmp_path / "new/adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 6, {"^2": 2})
        assert (config["target_modules"], config["modules_to_save"]) == (["0", "2"], ["4"])
        names = ["0.lora_A.weight", "0.lora_B.weight", "2.lora_A.weight", "2.lora_B.weight", "4.bias", "4.weight"]
        tensors = load_file(tmp_path / "new/adapter_model.safetensors")
        assert sorted(tensors) == [f"base_model.model.{name}" for name in names]
        twin: Any = mlp()
        assert load_adapter(twin, tmp_path / "new") == ("0", "2")
        assert torch.equal(twin[4].weight, model.get_parameter("4.weight"))

    def test_a_load_within_a_ledger_keeps_it_in_step(self, tmp_path: Path) -> None:
        """The adapters join its groups."""
        model, twin = mlp(), mlp()
        injected(model, ["0"])
        save_adapter(model, tmp_path)
        ledger = ParameterLedger(twin, partial(torch.optim.SGD, lr=0.1))
        load_adapter(ledger, tmp_path)
        ledger.verify()
        assert {"0.lora_A", "0.lora_B"} <= ledger.trainable

    def test_names_that_end_alike_are_told_apart(self, tmp_path: Path) -> None:
        """A target whose name another module's ends with becomes a regular expression."""
        model = nn.ModuleDict(
            {"a": nn.Linear(8, 8), "b": nn.ModuleDict({"a": nn.Linear(8, 8)}), "head": nn.Linear(8, 8)}
        )
        injected(model, "a")
        inject_lora(ParameterLedger(model, partial(torch.optim.SGD, lr=0.1)), "a", rank=4, alpha=6)
        save_adapter(model, tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == "a"

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"use_dora": True}, "made with use_dora"),
            ({"peft_type": "IA3"}, "of type 'IA3'"),
            ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
            ({"alpha_pattern": {"(": 3}}, "no regular expression"),
            ({"lora_alpha": "x"}, "takes a number above 0"),
            ({"alpha_pattern": {"0": None}}, "takes an object of patterns"),
            ({"modules_to_save": 5}, "takes a list of names"),
            ({"use_rslora": "no"}, "takes true or false"),
        ],
    )
    def test_what_cannot_be_loaded(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        """Is a typed error, and the model is as before."""
        model, twin = mlp(), mlp()
        injected(model, ["0"])
        save_adapter(model, tmp_path)
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(CheckpointError, match=message):
            load_adapter(twin, tmp_path)
        assert list(twin.state_dict()) == list(mlp().state_dict())

    def test_files_that_do_not_fit(self, tmp_path: Path) -> None:
        """Missing, damaged, for another model, of other shapes: nothing is attached or written."""
        with pytest.raises(CheckpointError, match="holds no adapter"):
            load_adapter(mlp(), tmp_path)
        with pytest.raises(SurgeryError, match="has no adapters"):
            save_adapter(mlp(), tmp_path)
        model = mlp()
        injected(model, ["0"])
        save_adapter(model, tmp_path)
        for other in (
            mlp(width=5),
            nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(4, 2)),
        ):
            keys = list(other.state_dict())
            with pytest.raises(CheckpointError, match="has shape"):
                load_adapter(other, tmp_path)
            assert list(other.state_dict()) == keys
        with pytest.raises(CheckpointError, match="which the model lacks"):
            load_adapter(nn.ModuleDict({"x": nn.Linear(4, 4), "head": nn.Linear(4, 2)}), tmp_path)
        (tmp_path / "adapter_model.safetensors").write_bytes(b"damaged")
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_adapter(mlp(), tmp_path)

    def test_separate_projections_have_no_place_in_the_format(self, tmp_path: Path) -> None:
        """As peft says itself."""
        model = Around(nn.MultiheadAttention(8, 2, kdim=4, vdim=4))
        injected(model)
        with pytest.raises(SurgeryError, match="separate projections"):
            save_adapter(model, tmp_path)


@pytest.mark.filterwarnings("ignore")
class TestPeft:
    """Files and gradients against peft, where it is installed."""

    @pytest.mark.parametrize("kind", SHARED)
    @pytest.mark.parametrize("rslora", [False, True])
    def test_files_load_in_the_other_library(self, kind: str, rslora: bool, tmp_path: Path) -> None:
        """Both ways, to 1e-6 of the output."""
        peft = pytest.importorskip("peft")
        layer, x = layers()[kind]
        base = Around(layer)
        model = copy.deepcopy(base)
        injected(model, rslora=rslora, alpha=3)
        save_adapter(model, tmp_path / "ours")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
        torch.testing.assert_close(theirs(x), model.eval()(x), rtol=1e-6, atol=2e-6)
        config = peft.LoraConfig(
            r=4, lora_alpha=3, target_modules=["layer"], use_rslora=rslora, modules_to_save=["head"]
        )
        theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
        stir(theirs)
        theirs.save_pretrained(tmp_path / "theirs")
        twin = copy.deepcopy(base)
        load_adapter(twin, tmp_path / "theirs")
        torch.testing.assert_close(twin.eval()(x), theirs(x), rtol=1e-6, atol=2e-6)

    @pytest.mark.parametrize("kind", SHARED)
    def test_gradients_are_pefts(self, kind: str, tmp_path: Path) -> None:
        """Of every adapter, in float64."""
        peft = pytest.importorskip("peft")
        layer, x = layers()[kind]
        model = Around(layer).double()
        x = x.double() if x.is_floating_point() else x
        base = copy.deepcopy(model)
        injected(model, train_head=False)
        save_adapter(model, tmp_path)
        config = {"is_trainable": True, "autocast_adapter_dtype": False}
        theirs = peft.PeftModel.from_pretrained(base, tmp_path, **config).double()
        push = torch.randn(model(x).shape, dtype=torch.float64)
        for each in (model, theirs):
            (each(x) * push).sum().backward()
        mine = [each.grad for name, each in model.named_parameters() if "lora_" in name]
        other = [each.grad for name, each in theirs.named_parameters() if "lora_" in name]
        if kind == "groups":  # peft's reads all channels: the blocks of its own group are ours
            first = [part.chunk(2, 1)[place] for place, part in enumerate(other[0].chunk(2))]
            other[0] = torch.cat(first)
        if kind == "attention":
            # peft's output projection adds its term twice, the second time past autograd, and its file holds half of
            # lora_B: so lora_A sees half of the gradient.
            order = [name for name, _ in theirs.named_parameters() if "lora_" in name]
            other = [other[place] for place in sorted(range(4), key=lambda each: "out_proj" in order[each])]
            other[2] = other[2] * 2
        for one, two in zip(mine, other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)

    def test_a_language_model_with_slices_patterns_and_a_saved_head(self, tmp_path: Path) -> None:
        """GPT-2: fused projections in slices, ranks by pattern; the logits are peft's."""
        peft = pytest.importorskip("peft")
        model: Any = TestSlices().gpt2()
        base = copy.deepcopy(model)
        target = {"c_attn": "q,v", "mlp.c_fc": None}
        injected(model, target, rank={"*.c_attn": 2, "*": 4}, alpha={"*.c_fc": 5, "*": 6})
        save_adapter(model, tmp_path)
        ids = torch.arange(12).view(2, 6)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        torch.testing.assert_close(theirs(ids).logits, model.eval()(ids).logits, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("call", [merge_lora, unmerge_lora, inject_lora, partial(save_adapter, folder="adapter")])
def test_what_is_no_model_or_has_no_adapter_is_refused(call: Callable[[Any], Any]) -> None:
    """With an error that says what to write instead."""
    with pytest.raises(ArgumentError, match=r"got 'model'|got 'str'"):
        call("model")
    with pytest.raises((ArgumentError, SurgeryError), match=r"inject_lora\("):
        call(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
