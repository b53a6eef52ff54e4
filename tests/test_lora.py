"""LoRA: the function, the adapted modules, the surgery op, and the algorithm."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # torch's own name for it
from typing_extensions import override

from helpers import Encoder, Shared, Tied, loader, mlp
from thawline.algorithms.lora import LoRAInject, inject_lora, lora_targets
from thawline.algorithms.lora_attention import LoRAMultiheadAttention
from thawline.algorithms.lora_forward import drop, lora_branch, lora_forward, new_seed
from thawline.algorithms.lora_modules import (
    LoRALinear,
    LoRANonDynamicallyQuantizableLinear,
)
from thawline.engine import (
    Algorithm,
    ArgumentError,
    Event,
    LayerMap,
    ParameterLedger,
    SelectorError,
    Stage,
    SurgeryError,
    ThawlineWarning,
    Trainer,
)

DUPLICATES: list[Callable[[nn.Module], nn.Module]] = [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]


def ledger_of(model: nn.Module, lr: float = 0.1) -> ParameterLedger:
    """Return a ledger with SGD over the model."""
    return ParameterLedger(model, partial(torch.optim.SGD, lr=lr))


def attach(model: nn.Module, *names: str, **arguments: Any) -> ParameterLedger:
    """Attach adapters to modules."""
    ledger = ledger_of(model)
    for name in names:
        ledger.attach(name, "lora", owner="test", **({"rank": 2, "alpha": 4, "dropout": 0.0} | arguments))
    return ledger


def stir(model: nn.Module, seed: int = 0) -> None:
    """Give all adapters values of which none is zero, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def baked(model: nn.Module) -> nn.Module:
    """Return the plain model whose weights have the adapters added: an independent reference."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name in [each for each in state if "lora_A" in each]:
        down, up = state.pop(name), state.pop(name.replace("lora_A", "lora_B"))
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        weight = "weight" if isinstance(module, nn.Linear) else "in_proj_weight"
        if last != "lora_A":
            weight = f"{last[-1]}_proj_weight"
        state[f"{path}.{weight}" if path else weight] += module.lora_scaling * (up @ down)
    plain = copy.deepcopy(model)
    for part in plain.modules():
        if isinstance(part, (LoRALinear, LoRAMultiheadAttention)):
            for name in [each for each in part._parameters if each.startswith("lora_")]:
                del part._parameters[name]
            known: dict[type[nn.Module], Any] = {LoRALinear: nn.Linear, LoRAMultiheadAttention: nn.MultiheadAttention}
            nn.Module.__setattr__(part, "__class__", known.get(type(part), type(part).__bases__[-1]))
    plain.load_state_dict(state)
    return plain


@contextmanager
def no_fast_path() -> Generator[None]:
    """Let torch's own modules take the path that they take in training."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# -- the function ---------------------------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 4), min_size=0, max_size=3)


class TestForward:
    """`lora_forward` against the formula."""

    @settings(max_examples=60)
    @given(SHAPES, st.integers(1, 6), st.integers(1, 6), st.integers(1, 7), st.booleans(), st.booleans())
    def test_value_and_gradients_are_those_of_the_formula_in_float64(
        self, shape: list[int], inputs: int, outputs: int, rank: int, with_bias: bool, transposed: bool
    ) -> None:
        """Whatever the shape, rank, bias and memory layout."""
        torch.manual_seed(0)
        sizes: list[tuple[int, ...]] = [
            (*shape, inputs),
            (outputs, inputs),
            (rank, inputs),
            (outputs, rank),
            (outputs,),
        ]
        x, weight, down, up, bias = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)
        given_bias = bias if with_bias else None
        layout = x.transpose(0, 1).contiguous().transpose(0, 1) if transposed and x.dim() > 2 else x
        got = lora_forward(layout, weight, given_bias, down, up, scaling=0.7)
        want = x @ weight.T + 0.7 * (x @ down.T) @ up.T + (bias if with_bias else 0)
        leaves = [x, weight, down, up, *([bias] if with_bias else [])]
        push = torch.randn_like(want)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        for mine, theirs in zip(
            torch.autograd.grad(got, leaves, push), torch.autograd.grad(want, leaves, push), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 3, 4, 5)])
    def test_gradcheck(self, shape: tuple[int, ...]) -> None:
        """Gradients, also second ones, agree with finite differences."""
        torch.manual_seed(0)
        sizes: list[tuple[int, ...]] = [shape, (4, 5), (4,), (2, 5), (4, 2)]
        tensors = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
        assert torch.autograd.gradcheck(partial(lora_forward, scaling=0.5), tensors)
        assert torch.autograd.gradgradcheck(partial(lora_forward, scaling=0.5), tensors)

    @settings(max_examples=60)
    @given(
        SHAPES, st.integers(1, 70), st.integers(1, 70), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16])
    )
    def test_with_b_zero_it_is_the_linear_layer_bit_for_bit(
        self, shape: list[int], inputs: int, outputs: int, transposed: bool, dtype: torch.dtype
    ) -> None:
        """Injection changes nothing."""
        torch.manual_seed(0)
        x = torch.randn(*shape, inputs, dtype=dtype)
        if transposed and x.dim() > 2:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        for bias in (torch.randn(outputs, dtype=dtype), None):
            weight = torch.randn(outputs, inputs, dtype=dtype)
            got = lora_forward(x, weight, bias, torch.randn(3, inputs), torch.zeros(outputs, 3), scaling=2.0)
            assert torch.equal(got, F.linear(x, weight, bias))

    def test_dropout_drops_the_adapters_input_only_in_training(self) -> None:
        """Those that `drop` drops with the next seed of the global generator, and none in evaluation."""
        x, weight = torch.randn(4, 5), torch.randn(3, 5)
        down, up = torch.randn(2, 5), torch.randn(3, 2)
        torch.manual_seed(7)
        got = lora_forward(x, weight, None, down, up, scaling=2.0, dropout=0.5, training=True)
        torch.manual_seed(7)
        dropped = 2 * drop(x, 0.5, new_seed())
        torch.testing.assert_close(got, x @ weight.T + 2 * dropped @ down.T @ up.T)
        still = lora_forward(x, weight, None, down, up, scaling=2.0, dropout=0.5, training=False)
        torch.testing.assert_close(still, x @ weight.T + 2 * x @ down.T @ up.T)

    def test_dropout_of_the_branch_alone_is_torchs_and_in_training_only(self) -> None:
        """As `functional.dropout` drops with the same seed; none in evaluation."""
        x, down, up = torch.randn(4, 5), torch.randn(2, 5), torch.randn(3, 2)
        torch.manual_seed(7)
        got = lora_branch(x, down, up, scaling=2.0, dropout=0.5, training=True)
        torch.manual_seed(7)
        torch.testing.assert_close(got, 2 * F.dropout(x, 0.5) @ down.T @ up.T)
        still = lora_branch(x, down, up, scaling=2.0, dropout=0.5, training=False)
        torch.testing.assert_close(still, 2 * x @ down.T @ up.T)

    @pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 4, 5)])
    def test_autocast_computes_in_bf16_and_gives_float32_gradients(self, shape: tuple[int, ...]) -> None:
        """As for any linear layer under autocast."""
        torch.manual_seed(0)
        x, weight = torch.randn(shape), torch.randn(3, 5)
        down, up = torch.randn(2, 5, requires_grad=True), torch.randn(3, 2, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            got = lora_forward(x, weight, None, down, up)
        assert got.dtype == torch.bfloat16
        torch.autograd.backward(got.float().sum())
        want = x @ weight.T + x @ down.T @ up.T
        torch.testing.assert_close(got.float(), want, rtol=5e-2, atol=5e-2)
        want_down, want_up = torch.autograd.grad(want.sum(), (down, up))
        assert down.grad is not None
        assert down.grad.dtype == torch.float32
        torch.testing.assert_close(down.grad, want_down, rtol=5e-2, atol=5e-2)
        torch.testing.assert_close(up.grad, want_up, rtol=5e-2, atol=5e-2)

    def test_nested_input(self) -> None:
        """A nested tensor of rows goes through as the layer takes it."""
        rows = [torch.randn(2, 5), torch.randn(3, 5)]
        weight, bias, down, up = torch.randn(4, 5), torch.randn(4), torch.randn(2, 5), torch.randn(4, 2)
        got = lora_forward(torch.nested.nested_tensor(rows, layout=torch.jagged), weight, bias, down, up)
        for mine, row in zip(got.unbind(), rows, strict=True):
            torch.testing.assert_close(mine, lora_forward(row, weight, bias, down, up))

    def test_the_branch_alone(self) -> None:
        """The branch is the whole less the base."""
        x, weight, down, up = torch.randn(4, 5), torch.randn(3, 5), torch.randn(2, 5), torch.randn(3, 2)
        whole = lora_forward(x, weight, None, down, up, scaling=0.5)
        torch.testing.assert_close(lora_branch(x, down, up, scaling=0.5), whole - x @ weight.T)


# -- the linear layer -----------------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    """A user's linear layer with its own forward, which surgery knows no class for."""

    @override
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  # as users write
        return 2 * super().forward(x)


class Known(nn.Linear):
    """A user's linear layer for which there is a class."""

    @override
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  # as users write
        return 2 * super().forward(x)


class LoRAKnown(LoRALinear, Known):
    """What the error message says to write."""

    @override
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  # as users write
        return super(LoRALinear, self).forward(x) + self.lora_branch(x)


class TestLinear:
    """An adapted `nn.Linear`."""

    def test_identity_place_and_names_stay(self) -> None:
        """The module and its weights are the same objects under the same names; the adapter's are added."""
        model = mlp()
        layer, weight, keys = model[0], model[0].weight, list(model.state_dict())
        attach(model, "0")
        assert model[0] is layer
        assert model[0].weight is weight
        assert type(layer) is LoRALinear
        assert isinstance(layer, nn.Linear)
        assert list(model.state_dict()) == [*keys[:2], "0.lora_A", "0.lora_B", *keys[2:]]

    def test_the_output_is_unchanged_at_injection(self) -> None:
        """Bit for bit."""
        model, x = mlp(width=33), torch.randn(5, 33)
        before = model(x)
        attach(model, "0", "2", "4")
        assert torch.equal(model(x), before)

    def test_gradients_are_those_of_the_formula(self) -> None:
        """Through the module, in float64."""
        model, x = nn.Sequential(nn.Linear(5, 3)).double(), torch.randn(4, 5, dtype=torch.float64)
        attach(model, "0")
        stir(model)
        layer: Any = model[0]
        model(x).square().sum().backward()
        down, up = (each.detach().clone().requires_grad_() for each in (layer.lora_A, layer.lora_B))
        (x @ layer.weight.detach().T + layer.bias.detach() + 2 * x @ down.T @ up.T).square().sum().backward()
        torch.testing.assert_close(layer.lora_A.grad, down.grad, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.lora_B.grad, up.grad, rtol=1e-12, atol=1e-12)

    def test_a_base_checkpoint_loads(self) -> None:
        """With strict=False; only the adapter's keys are missing."""
        model, other = mlp(), mlp()
        attach(model, "0")
        result = model.load_state_dict(other.state_dict(), strict=False)
        assert result.missing_keys == ["0.lora_A", "0.lora_B"]
        assert result.unexpected_keys == []

    @pytest.mark.parametrize("duplicate", DUPLICATES, ids=["deepcopy", "pickle"])
    def test_copies(self, duplicate: Callable[[nn.Module], nn.Module]) -> None:
        """An adapted model can be copied and pickled, and the copy computes the same."""
        model = nn.ModuleDict({"linear": nn.Linear(4, 4), "attention": nn.MultiheadAttention(4, 2)})
        attach(model, "linear", "attention")
        stir(model)
        twin: Any = duplicate(model)
        x = torch.randn(3, 2, 4)
        assert type(twin["linear"]) is LoRALinear
        assert torch.equal(twin["linear"](x), model["linear"](x))
        assert torch.equal(twin["attention"](x, x, x)[0], model["attention"](x, x, x)[0])

    def test_removal_restores(self) -> None:
        """Class, keys, attributes and output are the original ones."""
        model, x = mlp(), torch.randn(2, 4)
        keys, attributes, before = list(model.state_dict()), set(vars(model[0])), model(x)
        ledger = attach(model, "0")
        stir(model)
        ledger.detach("0", "lora", owner="test")
        assert type(model[0]) is nn.Linear
        assert list(model.state_dict()) == keys
        assert set(vars(model[0])) == attributes
        assert torch.equal(model(x), before)

    @pytest.mark.parametrize(
        "dtype, kept",
        [
            (torch.float64, torch.float64),
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
        ],
    )
    def test_dtype_of_the_adapter(self, dtype: torch.dtype, kept: torch.dtype) -> None:
        """The weight's own, but float32 beside half precision; the output's dtype stays."""
        model = nn.Sequential(nn.Linear(4, 4)).to(dtype)
        attach(model, "0")
        layer: Any = model[0]
        assert layer.lora_A.dtype == layer.lora_B.dtype == kept
        stir(model)
        y = model(torch.randn(3, 4, dtype=dtype))
        assert y.dtype == dtype
        y.float().sum().backward()
        assert layer.lora_A.grad.dtype == kept

    def test_initialization_is_kaiming_uniform_and_our_own(self) -> None:
        """Within ±1/sqrt(in), of the right spread, reproducible, and not from the global generator."""
        drawn = []
        for _ in range(2):
            model = nn.Sequential(nn.Linear(400, 3))
            before = torch.get_rng_state()
            attach(model, "0", rank=50)
            assert torch.equal(torch.get_rng_state(), before)
            drawn.append(model.get_parameter("0.lora_A").detach())
        assert torch.equal(*drawn)
        assert drawn[0].abs().max() <= 0.05
        assert drawn[0].std().item() == pytest.approx(0.05 / 3**0.5, rel=0.02)

    def test_a_shared_module_is_adapted_once(self) -> None:
        """One module under two names has one adapter."""
        model = Shared()
        adapters = inject_lora(ledger_of(model), "all-linear", rank=2)
        assert adapters == ("first.lora_A", "first.lora_B", "middle.lora_A", "middle.lora_B")

    def test_its_picture(self) -> None:
        """The repr shows rank and scaling."""
        model = mlp()
        attach(model, "0")
        assert "lora_rank=2, lora_scaling=2" in repr(model)

    def test_a_known_subclass_of_the_user(self) -> None:
        """A class (LoRALinear, Theirs) at module level is found, and its forward used."""
        model, x = nn.Sequential(Known(4, 3)), torch.randn(2, 4)
        before = model(x)
        attach(model, "0")
        assert type(model[0]) is LoRAKnown
        assert torch.equal(model(x), before)
        stir(model)
        layer: Any = model[0]
        torch.testing.assert_close(model(x), before + 2 * x @ layer.lora_A.T @ layer.lora_B.T)


class TestRefusals:
    """Every module that takes no adapter is a typed error that says what to write."""

    def refusal(self, model: nn.Module, name: str, **arguments: Any) -> str:
        """Return the message; the model must be as it was."""
        before, kinds = list(model.state_dict()), [type(each) for each in model.modules()]
        with pytest.raises(SurgeryError) as caught:
            attach(model, name, **arguments)
        assert list(model.state_dict()) == before
        assert [type(each) for each in model.modules()] == kinds
        return str(caught.value)

    def test_an_unknown_subclass_with_its_own_forward(self) -> None:
        """The message has the class to write."""
        message = self.refusal(nn.Sequential(Scaled(2, 2)), "0")
        assert "class LoRAScaled(LoRALinear, Scaled): def forward(self, x)" in message

    def test_an_unknown_subclass_without(self) -> None:
        """A static class is asked for here as well: a made one could not be pickled."""

        class Plain(nn.Linear):
            pass

        assert "class LoRAPlain(LoRALinear, Plain): pass" in self.refusal(nn.Sequential(Plain(2, 2)), "0")

    def test_the_output_projection_of_torch_attention(self) -> None:
        """It is never called: the message names the attention."""
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
        assert "Target the attention itself, 'attention'" in self.refusal(model, "attention.out_proj")

    def test_another_module(self) -> None:
        """What is neither linear nor attention."""
        assert "is a LayerNorm" in self.refusal(nn.Sequential(nn.LayerNorm(2)), "0")

    def test_a_forward_replaced_on_the_instance(self) -> None:
        """Would pass the adapter by."""
        model: Any = nn.Sequential(nn.Linear(2, 2))
        model[0].forward = model[0].forward
        assert "forward replaced" in self.refusal(model, "0")

    def test_twice(self) -> None:
        """A second adapter on one module."""
        model = mlp()
        ledger = attach(model, "0")
        with pytest.raises(SurgeryError, match="carries an adapter already"):
            ledger.attach("0", "lora", owner="other", rank=2, alpha=4)

    @pytest.mark.parametrize(
        "arguments",
        [
            {"rank": 0},
            {"rank": True},
            {"rank": 10**20},
            {"rank": 10**5000},
            {"alpha": 0},
            {"alpha": 10**400},
            {"dropout": 1.0},
            {"dropout": 10**400},
            {"alpha": "x"},
        ],
    )
    def test_arguments(self, arguments: dict[str, Any]) -> None:
        """Of the op itself."""
        with pytest.raises(ArgumentError, match=rf"lora\({next(iter(arguments))}=\)"):
            attach(mlp(), "0", **arguments)


# -- torch's attention ----------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True, "batch_first": True},
    "odd_heads": {"num_heads": 3, "embed_dim": 12, "batch_first": True},
    "separate": {"kdim": 5, "vdim": 7, "batch_first": True},
    "separate_all_options": {"kdim": 5, "vdim": 7, "add_bias_kv": True, "add_zero_attn": True},
}


def attention(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.MultiheadAttention, list[Tensor]]:
    """Return a module and query, key and value of lengths 5 and 6, batch 3."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"embed_dim": 8, "num_heads": 2} | KINDS[kind]
    module = nn.MultiheadAttention(**options, dtype=dtype)
    tensors = [
        torch.randn(3, length, width, dtype=dtype)
        for length, width in ((5, module.embed_dim), (6, module.kdim), (6, module.vdim))
    ]
    if not module.batch_first:
        tensors = [each.transpose(0, 1).contiguous() for each in tensors]
    return module, tensors


def calls(kind: str, dtype: torch.dtype = torch.float32) -> Iterator[tuple[list[Tensor], dict[str, Any]]]:
    """Yield arguments: self-attention, shared key and value, three tensors; no mask and every mask."""
    module, (query, key, value) = attention(kind, dtype)
    inputs = [[query, key, value]]
    if module._qkv_same_embed_dim:
        inputs = [[query, query, query], [query, key, key], [query, key, value], [query, query.clone(), query]]
    for tensors in inputs:
        keys = tensors[1].shape[1 if module.batch_first else 0]
        padding = torch.zeros(3, keys, dtype=torch.bool)
        padding[1, -2:] = True
        mask = torch.zeros(5, keys, dtype=torch.bool)
        mask[0, 1:3] = True
        causal = torch.full((5, keys), float("-inf"), dtype=dtype).triu(1)
        for masks in (
            {},
            {"key_padding_mask": padding},
            {"attn_mask": mask},
            {"attn_mask": mask.expand(3 * module.num_heads, -1, -1), "key_padding_mask": padding},
            {"attn_mask": causal, "is_causal": True},
        ):
            for extra in ({}, {"need_weights": False}, {"average_attn_weights": False}):
                yield tensors, masks | extra


class TestAttention:
    """An adapted `nn.MultiheadAttention`."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("training", [True, False])
    def test_injection_changes_no_bit(self, kind: str, training: bool) -> None:
        """Of outputs and weights, for every option, mask and pattern of sharing."""
        plain, _ = attention(kind)
        adapted = copy.deepcopy(plain)
        attach(adapted, "")
        plain.train(training)
        adapted.train(training)
        for tensors, options in calls(kind):
            with no_fast_path():
                want, want_weights = plain(*tensors, **options)
            got, got_weights = adapted(*tensors, **options)
            assert torch.equal(got, want)
            assert (got_weights is None) == (want_weights is None)
            assert got_weights is None or torch.equal(got_weights, want_weights)

    @pytest.mark.parametrize("kind", KINDS)
    def test_it_computes_what_plain_attention_with_the_sum_of_the_weights_does(self, kind: str) -> None:
        """Outputs, weights and the gradient of the input, in float64; with and without gradients."""
        module, _ = attention(kind, torch.float64)
        attach(module, "")
        stir(module)
        plain: Any = baked(module)
        assert type(plain) is nn.MultiheadAttention
        for tensors, options in calls(kind, torch.float64):
            tensors[0].requires_grad_()
            got, got_weights = module(*tensors, **options)
            want, want_weights = plain(*tensors, **options)
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
            if got_weights is not None:
                torch.testing.assert_close(got_weights, want_weights, rtol=1e-10, atol=1e-12)
            push = torch.randn_like(got)
            mine, theirs = (torch.autograd.grad(each, tensors[0], push)[0] for each in (got, want))
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
            for mode in (module.train, module.eval):
                mode()
                with torch.no_grad():
                    assert torch.equal(module(*tensors, **options)[0], got)

    @pytest.mark.parametrize("kind", ["plain", "separate"])
    def test_gradients_of_the_adapters(self, kind: str) -> None:
        """Are those of B @ A put through float64 autograd of torch's own attention."""
        module, tensors = attention(kind, torch.float64)
        ledger = attach(module, "")
        stir(module)
        names = [name for name in ledger.parameters if "lora_" in name]
        module(*tensors)[0].square().sum().backward()
        got = {name: module.get_parameter(name).grad for name in names}
        plain: Any = baked(module)
        leaves = {name: module.get_parameter(name).detach().clone().requires_grad_() for name in names}
        weights = {}
        for name in [each for each in names if "lora_A" in each]:
            path, _, last = name.rpartition(".")
            target = "in_proj_weight" if last == "lora_A" else f"{last[-1]}_proj_weight"
            target = f"{path}.weight" if path else target
            delta = 2 * leaves[name.replace("lora_A", "lora_B")] @ leaves[name]
            weights[target] = module.get_parameter(target).detach() + delta
        out = torch.func.functional_call(plain, weights, tuple(tensors))[0]
        wanted = torch.autograd.grad(out.square().sum(), list(leaves.values()))
        for name, want in zip(leaves, wanted, strict=True):
            torch.testing.assert_close(got[name], want, rtol=1e-9, atol=1e-11)

    def test_unbatched(self) -> None:
        """Two-dimensional input, with and without weights."""
        for options in ({}, {"batch_first": True}):
            plain = nn.MultiheadAttention(8, 2, **options)
            adapted = copy.deepcopy(plain)
            attach(adapted, "")
            x, padding = torch.randn(5, 8), torch.tensor([False, False, False, False, True])
            for extra in ({}, {"need_weights": False}, {"key_padding_mask": padding}):
                want, got = plain(x, x, x, **extra), adapted(x, x, x, **extra)
                assert torch.equal(got[0], want[0])
                assert got[1] is want[1] or torch.equal(got[1], want[1])

    def test_attention_dropout_draws_as_torch_does(self) -> None:
        """Injection leaves a training run's random numbers alone."""
        plain = nn.MultiheadAttention(8, 2, dropout=0.5)
        adapted = copy.deepcopy(plain)
        attach(adapted, "")
        x = torch.randn(5, 3, 8)
        for need_weights in (True, False):
            torch.manual_seed(3)
            want = plain(x, x, x, need_weights=need_weights)[0]
            torch.manual_seed(3)
            assert torch.equal(adapted(x, x, x, need_weights=need_weights)[0], want)

    def test_names(self) -> None:
        """The packed projection has one adapter, the output projection its own; removal restores both classes."""
        module, _ = attention("plain")
        ledger = attach(module, "")
        assert [name for name in ledger.parameters if "lora_" in name] == [
            "lora_A", "lora_B", "out_proj.lora_A", "out_proj.lora_B",
        ]  # fmt: skip
        assert type(module) is LoRAMultiheadAttention
        assert type(module.out_proj) is LoRANonDynamicallyQuantizableLinear
        ledger.detach("", "lora", owner="test")
        assert type(module) is nn.MultiheadAttention
        assert type(module.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear

    def test_autocast_and_bf16(self) -> None:
        """Under autocast and in a half-precision model, within bf16's precision of float32."""
        module, _ = attention("batch_first")
        attach(module, "")
        stir(module)
        x = torch.randn(3, 5, 8)
        want = module(x, x, x)[0]
        with torch.autocast("cpu", torch.bfloat16):
            got = module(x, x, x)[0]
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.05)
        half = x.bfloat16()
        for name, parameter in module.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
        got = module(half, half, half)[0]
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.05)

    @pytest.mark.parametrize(
        "argument, options",
        [
            ("attn_mask", {"is_causal": True}),
            ("attn_mask", {"attn_mask": torch.zeros(2, 2)}),
            ("attn_mask", {"attn_mask": torch.zeros(5, 5, dtype=torch.long)}),
            ("key_padding_mask", {"key_padding_mask": torch.zeros(5, 3)}),
        ],
    )
    def test_bad_masks(self, argument: str, options: dict[str, Any]) -> None:
        """Are typed errors that name the argument."""
        module = nn.MultiheadAttention(8, 2)
        attach(module, "")
        x = torch.randn(5, 3, 8)
        with pytest.raises(ArgumentError, match=rf"\({argument}=\)"):
            module(x, x, x, **options)

    def test_nested_input_is_refused(self) -> None:
        """Only torch's fused kernel takes it, which would pass the adapters by."""
        module = nn.MultiheadAttention(8, 2, batch_first=True).eval()
        attach(module, "")
        x = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], layout=torch.jagged)
        with pytest.raises(ArgumentError, match="nested"):
            module(x, x, x)


class TestFastPath:
    """Adapters act inside torch's encoder layers, whose fused kernel would pass them by."""

    TARGETS = ("layers.0.linear1", "layers.0.linear2", "layers.0.self_attn", "layers.1.linear1")

    @staticmethod
    def encoder(*, batch_first: bool = True, norm_first: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return an encoder whose two layers differ; nested tensors on where torch would take them."""
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(
            8, 2, 16, dropout=0.0, batch_first=batch_first, norm_first=norm_first, dtype=dtype
        )
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first and not norm_first)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        return model

    @staticmethod
    def inputs(batch_first: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return a batch of 3 x 5 and its padding mask, longest row first."""
        x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        padding = torch.arange(5) >= torch.tensor([[5], [4], [2]])
        return (x if batch_first else x.transpose(0, 1).contiguous()), padding

    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("norm_first", [True, False])
    @pytest.mark.parametrize("target", [*TARGETS, "layers.1.self_attn", "all"])
    def test_outputs_are_equal_with_and_without_gradients_in_train_and_eval(
        self, batch_first: bool, norm_first: bool, target: str
    ) -> None:
        """For each single target and all of them, with and without padding, against weights with the adapter added."""
        model = self.encoder(batch_first=batch_first, norm_first=norm_first, dtype=torch.float64)
        attach(model, *(self.TARGETS if target == "all" else (target,)))
        stir(model)
        plain = baked(model)
        x, padding = self.inputs(batch_first, torch.float64)
        for mask in (None, padding):
            with no_fast_path():
                want = plain.train()(x, src_key_padding_mask=mask)
            outputs = []
            for mode in (True, False):
                model.train(mode)
                outputs.append(model(x, src_key_padding_mask=mask))
                with torch.no_grad():
                    outputs.append(model(x, src_key_padding_mask=mask))
            for each in outputs:
                # Not bit for bit: layers without an adapter keep torch's fused kernels.
                torch.testing.assert_close(each, want, rtol=1e-9, atol=1e-11)

    def test_frozen_weights_do_not_bring_it_back(self) -> None:
        """torch takes the fast path also with gradients on, where no weight wants one."""
        model = self.encoder().eval()
        attach(model, "layers.0.linear1")
        stir(model)
        with no_fast_path():
            want = model(self.inputs(True)[0])
        model.requires_grad_(False)
        torch.testing.assert_close(model(self.inputs(True)[0]), want)  # layers.1 takes the fast path again

    # torch says so when it makes the nested tensors of its own fast path.
    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    @pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
    def test_the_fast_path_is_off_until_the_last_adapter_goes(self, order: tuple[int, ...]) -> None:
        """In whichever order they are removed; then everything is as it was."""
        model: Any = self.encoder()
        before = {name: (type(each), set(vars(each))) for name, each in model.named_modules()}
        x, padding = self.inputs(True)
        with torch.no_grad():
            want = model.eval()(x, src_key_padding_mask=padding)
        ledger = attach(model, *self.TARGETS)
        for index in order:
            assert model.use_nested_tensor is False
            ledger.detach(self.TARGETS[index], "lora", owner="test")
            left = [each for each in self.TARGETS if any(each == entry.module for entry in ledger.journal)]
            for number in (0, 1):
                inside = any(each.startswith(f"layers.{number}.") for each in left)
                assert model.layers[number].activation_relu_or_gelu == (0 if inside else 1)
        assert model.use_nested_tensor is True
        assert {name: (type(each), set(vars(each))) for name, each in model.named_modules()} == before
        with torch.no_grad():
            assert torch.equal(model(x, src_key_padding_mask=padding), want)


# -- targets --------------------------------------------------------------------------------------------------------


def targets(model: nn.Module, target: Any = "auto") -> tuple[str, ...]:
    """Return the targets of a model."""
    return lora_targets(model, LayerMap(model), target)


class Projections(nn.Module):
    """Blocks with projections under usual names, a feed-forward layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        make = partial(nn.Linear, 4, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"q_proj": make(), "v_proj": make(), "up": make()}) for _ in range(2))
        self.head = nn.ModuleDict({"out_proj": make()})


class Own(Projections):
    """A model that says itself where its adapters go."""

    default_peft_targets = ("up",)


class Wrapped(nn.Module):
    """A user's model around one that says where its adapters go."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Own()
        self.classifier = nn.Linear(4, 2)


def hugging_face(kind: str, head: str, **options: Any) -> nn.Module:
    """Return a tiny, randomly initialized model of transformers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{kind}{head}")(getattr(transformers, f"{kind}Config")(**options))
    return model


BERT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50,
    "max_position_embeddings": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
LLAMA = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32,
    "vocab_size": 50, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class TestTargets:
    """`lora_targets`: which modules get adapters."""

    def test_auto_on_an_mlp_is_every_linear_layer_outside_the_head(self) -> None:
        """There is no attention to prefer."""
        assert targets(mlp()) == ("0", "2")

    def test_auto_on_a_torch_encoder_is_its_attention(self) -> None:
        """`nn.MultiheadAttention` modules."""
        assert targets(Encoder(2, 0.0)) == ("encoder.layers.0.self_attn", "encoder.layers.1.self_attn")

    def test_auto_prefers_the_models_own_targets(self) -> None:
        """`default_peft_targets`, also of a wrapped model."""
        assert targets(Own()) == ("blocks.0.up", "blocks.1.up")
        assert targets(Wrapped()) == ("inner.blocks.0.up", "inner.blocks.1.up")

    def test_attention_is_found_by_usual_names_outside_the_head(self) -> None:
        """A head's `out_proj`, as RoBERTa has one, is none."""
        want = ("blocks.0.q_proj", "blocks.0.v_proj", "blocks.1.q_proj", "blocks.1.v_proj")
        assert targets(Projections()) == targets(Projections(), "attention") == want

    def test_all_linear_has_attention_but_not_its_output_projection_and_not_the_head(self) -> None:
        """The attention itself adapts its output projection."""
        layer = ("self_attn", "linear1", "linear2")
        assert targets(Encoder(1, 0.0), "all-linear") == tuple(f"encoder.layers.0.{each}" for each in layer)

    def test_a_tied_output_layer_counts_as_head(self) -> None:
        """Though its weight, the embedding's, lies in the stem."""
        assert targets(Tied(), "all-linear") == ("blocks.0.0", "blocks.1.0")

    @pytest.mark.parametrize(
        "target, want",
        [
            ("q_proj", ("blocks.0.q_proj", "blocks.1.q_proj")),
            ("blocks.1.q_proj", ("blocks.1.q_proj",)),
            (["v_proj", "q_proj"], ("blocks.0.q_proj", "blocks.0.v_proj", "blocks.1.q_proj", "blocks.1.v_proj")),
            ("blocks.0.*", ("blocks.0.q_proj", "blocks.0.v_proj", "blocks.0.up")),
            ("head.out_proj", ("head.out_proj",)),
            ("1.?_proj", ("blocks.1.q_proj", "blocks.1.v_proj")),
        ],
    )
    def test_globs(self, target: Any, want: tuple[str, ...]) -> None:
        """Over names or their ends, in the model's order; only they reach the head."""
        assert targets(Projections(), target) == want

    def test_nothing_found_lists_the_nearest_names(self) -> None:
        """For a glob, for attention, for a model that is all head."""
        with pytest.raises(SelectorError, match=r"'querry' matches no module\. Nearest: .*q_proj"):
            targets(Projections(), ["q_proj", "querry"])
        with pytest.raises(SelectorError, match=r"'atention' matches no module\. Nearest: 'attention'"):
            targets(Projections(), "atention")
        with pytest.raises(SelectorError, match=r"Nearest: 'q_proj'"):
            targets(Projections(), "q_prj")
        with pytest.raises(SelectorError, match="all-linear"):
            targets(mlp(), "attention")
        with pytest.raises(SelectorError, match="outside its head"):
            targets(nn.Sequential(nn.Linear(2, 2)))

    def test_what_matches_but_takes_none_says_why(self) -> None:
        """A glob that means only other modules."""
        with pytest.raises(SurgeryError, match="is a ReLU"):
            targets(mlp(), "1")
        with pytest.raises(SurgeryError, match="Target the attention itself"):
            targets(Encoder(1, 0.0), "out_proj")

    @pytest.mark.parametrize(
        "kind, head, options, ends",
        [
            ("Bert", "ForSequenceClassification", BERT, ("query", "value")),
            ("Roberta", "ForSequenceClassification", BERT | {"pad_token_id": 1}, ("query", "value")),
            ("DistilBert", "ForSequenceClassification",
             {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 50}, ("q_lin", "v_lin")),
            ("Llama", "ForCausalLM", LLAMA, ("q_proj", "v_proj")),
            ("Qwen2", "ForCausalLM", LLAMA, ("q_proj", "v_proj")),
            ("T5", "ForConditionalGeneration",
             {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 50}, ("q", "v")),
        ],
    )  # fmt: skip
    def test_auto_on_hugging_face_models(
        self, kind: str, head: str, options: dict[str, Any], ends: tuple[str, ...]
    ) -> None:
        """By `config.model_type`: query and value in every block."""
        model = hugging_face(kind, head, **options)
        found = targets(model)
        assert found == tuple(
            name
            for name, each in model.named_modules()
            if isinstance(each, nn.Linear) and name.rpartition(".")[2] in ends
        )
        assert len(found) >= 4


# -- injection ------------------------------------------------------------------------------------------------------


class TestInject:
    """`inject_lora`: what trains afterwards."""

    def test_adapters_and_head_train(self) -> None:
        """A new classifier must; every other weight is held."""
        model = mlp()
        ledger = ledger_of(model)
        adapters = inject_lora(ledger, rank=2, owner="me")
        assert ledger.trainable == {*adapters, "4.weight", "4.bias"}
        assert ledger.owners("0.weight") == ("me",)
        ledger.verify()

    def test_without_head(self) -> None:
        """`train_head=False` holds it as well."""
        ledger = ledger_of(mlp())
        adapters = inject_lora(ledger, rank=2, train_head=False)
        assert ledger.trainable == set(adapters)

    def test_the_head_of_a_language_model_is_held(self) -> None:
        """Unless asked for."""
        cases: list[tuple[Literal["auto", True], bool]] = [("auto", False), (True, True)]
        for train_head, want in cases:
            model = hugging_face("Llama", "ForCausalLM", **LLAMA)
            ledger = ledger_of(model)
            inject_lora(ledger, train_head=train_head)
            assert ("lm_head.weight" in ledger.trainable) is want

    def test_rate_of_the_adapters(self) -> None:
        """`lr=` sets theirs, not the head's."""
        ledger = ledger_of(mlp(), lr=0.1)
        adapters = inject_lora(ledger, rank=2, lr=0.5)
        rates = {name: group.lr for group in ledger.groups for name in group.parameters}
        assert {rates[name] for name in adapters} == {0.5}
        assert rates["4.weight"] == 0.1

    def test_two_injections_train_both(self) -> None:
        """The second does not hold the adapters of the first."""
        for first, second in (("0", "2"), ("2", "0")):
            ledger = ledger_of(mlp())
            inject_lora(ledger, first, rank=2, owner="a")
            inject_lora(ledger, second, rank=3, owner="b")
            names = {f"{index}.lora_{part}" for index in "02" for part in "AB"}
            assert ledger.trainable == names | {"4.weight", "4.bias"}

    @pytest.mark.parametrize("injected_first", [True, False])
    def test_what_another_owner_thaws_trains_its_adapters_only(self, injected_first: bool) -> None:
        """Holds add up: the base weights stay with the injection, the adapters follow whoever holds their layer."""
        ledger = ledger_of(mlp())
        if injected_first:
            inject_lora(ledger, rank=2)
        ledger.freeze(["stem", "blocks"] if ledger.layers.stem.parameters else "blocks", owner="thaw")
        if not injected_first:
            inject_lora(ledger, rank=2)
        assert ledger.trainable == {"4.weight", "4.bias"}
        ledger.thaw("blocks[-1]", owner="thaw")
        assert ledger.trainable == {"4.weight", "4.bias", "2.lora_A", "2.lora_B"}
        ledger.verify()

    def test_a_second_fit_goes_on_with_the_adapters(self) -> None:
        """A new ledger over an adapted model keeps the adapters; other settings are refused."""
        model = mlp()
        inject_lora(ledger_of(model), rank=2)
        before = model[0].lora_A
        ledger = ledger_of(model)
        adapters = inject_lora(ledger, rank=2)
        assert model[0].lora_A is before
        assert set(adapters) <= ledger.trainable
        with pytest.raises(SurgeryError, match="rank 2 already"):
            inject_lora(ledger_of(model), rank=4)

    def test_a_second_fit_of_a_model_whose_type_says_the_targets_goes_on(self) -> None:
        """As with named targets: the same settings go on, others are refused by the rank."""
        model = hugging_face("Bert", "ForSequenceClassification", **BERT)
        inject_lora(ledger_of(model), rank=2)
        ledger = ledger_of(model)
        assert set(inject_lora(ledger, rank=2)) <= ledger.trainable
        with pytest.raises(SurgeryError, match="rank 2 already"):
            inject_lora(ledger_of(model), rank=4)

    def test_a_refused_target_leaves_the_model_alone(self) -> None:
        """Nothing is attached or held before every target is known to take an adapter."""
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Scaled(4, 4), nn.ReLU(), nn.Linear(4, 2))
        ledger = ledger_of(model)
        with pytest.raises(SurgeryError):
            inject_lora(ledger, "all-linear")
        assert len(ledger.trainable) == 6
        assert ledger.journal == ()

    def test_bert_changes_no_bit_and_trains_adapters_and_head(self) -> None:
        """A real architecture of transformers."""
        model = hugging_face("Bert", "ForSequenceClassification", **BERT).eval()
        ids = torch.arange(12).view(2, 6)
        before = model(ids).logits
        ledger = ledger_of(model)
        inject_lora(ledger)
        assert torch.equal(model(ids).logits, before)
        assert all("lora_" in name or name in ledger.layers.head.parameters for name in ledger.trainable)
        assert len([name for name in ledger.trainable if "lora_" in name]) == 8


class TestAlgorithm:
    """`LoRAInject` in a fit."""

    def test_contract(self) -> None:
        """Acts once, at the start, before everything else; its description rebuilds it."""
        algorithm = LoRAInject(rank=4, target=["query", "value"], dropout=0.1)
        assert algorithm.events == {Event.FIT_START}
        assert algorithm.stage is Stage.SURGERY
        twin = Algorithm.from_description(algorithm.describe())
        assert isinstance(twin, LoRAInject)
        assert twin.describe() == algorithm.describe()

    @pytest.mark.parametrize(
        "name, value",
        [
            ("rank", 0), ("rank", 1.5), ("rank", True), ("alpha", 0), ("alpha", "x"), ("dropout", 1.0), ("dropout", -0.1),
            ("lr", 0.0), ("lr", float("nan")), ("train_head", "yes"), ("train_head", 1), ("target", ""), ("target", 3),
            ("target", []), ("target", ["a", 1]),
        ],
    )  # fmt: skip
    def test_bad_arguments(self, name: str, value: Any) -> None:
        """Are refused at construction, by name."""
        with pytest.raises(ArgumentError, match=rf"LoRAInject\({name}=\)"):
            LoRAInject(**{name: value})

    def test_a_fit_trains_adapters_and_leaves_the_weights(self) -> None:
        """Base weights keep every bit, adapters and head move."""
        torch.manual_seed(0)
        model = mlp()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trainer = Trainer(algorithms=[LoRAInject(rank=2, lr=0.05)], loss_fn=F.cross_entropy, progress=False)
        trainer.fit(model, loader(), duration="2ep")
        after = model.state_dict()
        for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
            assert torch.equal(after[name], before[name])
        assert after["0.lora_B"].abs().max() > 0
        assert after["2.lora_B"].abs().max() > 0
        assert not torch.equal(after["4.weight"], before["4.weight"])

    def test_the_default_factor_is_two(self) -> None:
        """Alpha 16 over rank 8."""
        net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 2))
        Trainer(algorithms=[LoRAInject(target="all-linear")], loss_fn=F.cross_entropy, progress=False).fit(
            net, [(torch.randn(4, 32), torch.randint(2, (4,)))], duration="1ba"
        )
        found = [each for each in net.modules() if isinstance(each, LoRALinear)]
        assert [(len(each.lora_A), each.lora_scaling) for each in found] == [(8, 2.0)]

    def test_a_rank_above_that_of_the_weight_warns(self) -> None:
        """Once, at the call of fit; the default rank is nobody's choice."""
        trainer = Trainer(algorithms=[LoRAInject(rank=1000)], loss_fn=F.cross_entropy, progress=False)
        with pytest.warns(ThawlineWarning, match="rank 1000 at '0', which is 4 x 4.*rank=1") as said:
            trainer.fit(mlp(), loader(), duration="1ep")
        assert [each.filename for each in said] == [__file__]

    @pytest.mark.parametrize("build", [mlp, partial(Encoder, 2, 0.0)])
    def test_defaults_fit_as_they_stand(self, build: Callable[[], nn.Module]) -> None:
        """`LoRAInject()` without arguments, on an MLP and on torch's encoder, learns its training set."""
        torch.manual_seed(0)
        model = build()
        x = torch.randn(32, 4) if isinstance(model, nn.Sequential) else torch.randint(11, (32, 6))
        y = (x[:, 0] > x.median()).long()
        batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
        trainer = Trainer(
            algorithms=[LoRAInject()],
            optimizer=partial(torch.optim.AdamW, lr=0.02),
            loss_fn=F.cross_entropy,
            progress=False,
        )
        with torch.no_grad():
            before = F.cross_entropy(model.eval()(x), y).item()
        trainer.fit(model.train(), batches, duration="12ep")
        with torch.no_grad():
            assert F.cross_entropy(model.eval()(x), y).item() < 0.7 * before

    def test_list_order_does_not_matter(self) -> None:
        """Two injections in either order train the same names to the same bits."""
        states = []
        for flip in (False, True):
            torch.manual_seed(0)
            model = mlp()
            algorithms = [LoRAInject(rank=2, target="0"), LoRAInject(rank=2, target="2", lr=0.01)]
            if flip:
                algorithms.reverse()
            trainer = Trainer(algorithms=algorithms, loss_fn=F.cross_entropy, progress=False)
            trainer.fit(model, loader(shuffle=False), duration="1ep")
            states.append(model.state_dict())
        assert states[0].keys() == states[1].keys()
        for name, value in states[0].items():
            assert torch.equal(value, states[1][name]), name

    def test_a_resumed_run_ends_in_the_same_bits(self, tmp_path: Path) -> None:
        """The adapters are rebuilt from the checkpoint's journal on a plain model."""
        weights = []
        for parts in (("2ep",), ("1ep", "2ep")):
            run_dir = tmp_path / str(len(parts))
            model: nn.Module = mlp()
            for duration in parts:
                torch.manual_seed(0)
                model = mlp()
                trainer = Trainer(
                    algorithms=[LoRAInject(rank=2, dropout=0.1)],
                    loss_fn=F.cross_entropy,
                    progress=False,
                    run_dir=run_dir,
                )
                trainer.fit(model, loader(), duration=duration, resume=True)
            assert isinstance(model.get_submodule("0"), LoRALinear)
            weights.append(model.state_dict())
        assert weights[0].keys() == weights[1].keys()
        for name, value in weights[0].items():
            assert torch.equal(value, weights[1][name]), name

    def test_a_second_fit_trains_on(self) -> None:
        """The same Trainer on the same model: the adapters of the first fit go on."""
        model = mlp()
        trainer = Trainer(algorithms=[LoRAInject(rank=2)], loss_fn=F.cross_entropy, progress=False)
        trainer.fit(model, loader(), duration="1ep")
        adapter = model.get_parameter("0.lora_A")
        before = adapter.detach().clone()
        trainer.fit(model, loader(), duration="1ep")
        assert model[0].lora_A is adapter
        assert not torch.equal(adapter, before)


@pytest.mark.parametrize("duplicate", DUPLICATES, ids=["deepcopy", "pickle"])
class TestCopies:
    """The journal of what is attached lies on the model, and so on its copies."""

    def test_what_is_attached_to_a_copy_can_be_undone(self, duplicate: Callable[[nn.Module], nn.Module]) -> None:
        """Classes, keys and attributes return on the copy, and the original keeps its adapters."""
        model = Encoder(1, 0.0)
        attributes = {name: set(vars(module)) for name, module in model.named_modules()}
        keys = list(model.state_dict())
        attention = "encoder.layers.0.self_attn"
        journal = attach(model, attention, "encoder.layers.0.linear1").journal
        twin = duplicate(model)
        ledger = ledger_of(twin)
        assert ledger.journal == journal
        for entry in reversed(journal):
            ledger.detach(entry.module, entry.op, owner=entry.owner)
        assert list(twin.state_dict()) == keys
        assert {name: set(vars(module)) for name, module in twin.named_modules()} == attributes
        assert type(twin.get_submodule(attention)) is nn.MultiheadAttention
        assert ledger_of(model).journal == journal
        assert isinstance(model.get_submodule(attention), LoRAMultiheadAttention)

    def test_a_copy_is_fitted_again_and_resumed(
        self, duplicate: Callable[[nn.Module], nn.Module], tmp_path: Path
    ) -> None:
        """The copy's adapters train on as the original's would; resumed on a plain model, to the same bits."""

        def trainer(run_dir: Path | None = None) -> Trainer:
            algorithms = [LoRAInject(rank=2, dropout=0.1)]
            return Trainer(algorithms=algorithms, loss_fn=F.cross_entropy, progress=False, run_dir=run_dir)

        torch.manual_seed(0)
        model: nn.Module = mlp()
        trainer().fit(model, loader(), duration="1ep")
        copied = duplicate(model)
        trainer().fit(model, loader(), duration="2ep")
        trainer(tmp_path).fit(copied, loader(), duration="1ep")
        trainer(tmp_path).fit(resumed := mlp(), loader(), duration="2ep", resume=True)
        trainer().fit(again := duplicate(copied), loader(), duration="2ep", resume=tmp_path / "ba00000004")
        want = model.state_dict()
        for other in (resumed, again):
            assert list(other.state_dict()) == list(want)
            for name, value in other.state_dict().items():
                assert torch.equal(value, want[name]), name


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4)])
def test_what_follows_may_write_into_the_output(shape: tuple[int, ...]) -> None:
    """An activation in place after a layer with an adapter gives the gradients of one that is not in place."""
    found: list[list[Tensor]] = []
    for inplace in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=inplace), nn.Linear(4, 2))
        ledger = ParameterLedger(model, partial(torch.optim.SGD, lr=0.1))
        inject_lora(ledger, ["0"], rank=2)
        with torch.no_grad():
            model[0].lora_B.copy_(torch.ones(4, 2))
        model(torch.arange(float(torch.Size(shape).numel())).view(shape)).sum().backward()
        found.append([each.grad for each in ledger.trainable_parameters if each.grad is not None])
    assert len(found[0]) > 2
    assert all(map(torch.equal, *found))


def test_a_model_without_a_linear_layer_in_its_body_is_told_what_to_name() -> None:
    """A convolution of its own where it has one, and to do without adapters where it has nothing to adapt."""
    for model, write in (
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)), r"LoRAInject\(target=\['0'\]\)"),
        (nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4)), "Leave LoRAInject out"),
    ):
        ledger = ParameterLedger(model, torch.optim.SGD(model.parameters(), lr=0.1))
        with pytest.raises(SelectorError, match=write):
            inject_lora(ledger, "all-linear")
