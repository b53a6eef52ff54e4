"""LayerMap: every parameter in exactly one layer, for the models that people fine-tune."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import MODELS, Bare, Encoder, Shared, Tied, cnn, mlp
from thawline.engine import ArgumentError, LayerError, LayerMap, ParameterLedger, SelectorError, ThawlineWarning


@pytest.mark.parametrize("text", ["blocks[]", "blocks[-]", "blocks[-:]", f"blocks[{'9' * 5000}]", "head[0]", "head[:]"])
def test_what_is_no_index_is_an_error(text: str) -> None:
    """Neither the first block, nor an error of Python's own."""
    with pytest.raises(SelectorError, match="names no"):
        LayerMap(mlp())[text]


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: LayerMap("x"), ArgumentError),  # type: ignore[arg-type]
        (lambda: LayerMap(mlp(), forward=3), ArgumentError),  # type: ignore[arg-type]
        (lambda: LayerMap(mlp(), {"blocks": 3}), LayerError),  # type: ignore[dict-item]
    ],
)
def test_what_is_no_model_function_or_list_is_an_error(make: Any, error: type[Exception]) -> None:
    """Each says what to write."""
    with pytest.raises(error, match="Write: "):
        make()


def test_a_parametrized_module_is_not_cut() -> None:
    """What weight_norm makes of a linear layer lies in one layer."""
    norm = torch.nn.utils.parametrizations.weight_norm
    model = nn.Sequential(norm(nn.Linear(4, 4)), nn.ReLU(), norm(nn.Linear(4, 4)), nn.ReLU(), norm(nn.Linear(4, 2)))
    layers = LayerMap(model)
    assert [layer.modules for layer in layers] == [("0",), ("2",), ("4",)]


class BasicBlock(nn.Module):
    """A residual block as in torchvision."""

    def __init__(self, width: int, wider: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, wider, 3, padding=1), nn.BatchNorm2d(wider)
        self.conv2, self.bn2 = nn.Conv2d(wider, wider, 3, padding=1), nn.BatchNorm2d(wider)
        self.downsample = nn.Sequential(nn.Conv2d(width, wider, 1), nn.BatchNorm2d(wider)) if width != wider else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Stem, four stages of two blocks, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        widths = [4, 4, 8, 8, 16]
        for stage in range(4):
            blocks = [BasicBlock(widths[stage], widths[stage + 1]), BasicBlock(widths[stage + 1], widths[stage + 1])]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(16, 10)


class Recurrent(nn.Module):
    """An LSTM with embedding and linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.out = nn.Embedding(9, 4), nn.LSTM(4, 4, num_layers=2), nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(self.embed(ids))[0])


class HeadFirst(nn.Module):
    """A body of blocks whose head is registered before it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.body = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.body:
            x = block(x)
        return self.head(x)


class TwoHeads(nn.Module):
    """Two layers, a policy and a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.policy_head, self.value_head = nn.Linear(4, 3), nn.Linear(4, 1)


class VisionTransformer(nn.Module):
    """Names and grouping as in timm's: bare parameters, blocks, and a norm that belongs to the last block."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 4)), nn.Parameter(torch.zeros(1, 5, 4))
        self.patch_embed = nn.Conv2d(3, 4, 2, 2)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(12)))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


class ConvNeXt(nn.Module):
    """Names and grouping as in timm's: a stage's downsampling belongs to its first block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2)
        stages = []
        for width in (4, 8):
            blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU()) for _ in range(2)))
            parts = {"blocks": blocks, "downsample": nn.Conv2d(width // 2, width, 1)}
            stages.append(nn.ModuleDict(parts))
        self.stages = nn.Sequential(*stages)
        self.norm_pre = nn.LayerNorm(8)
        self.head = nn.ModuleDict({"norm": nn.LayerNorm(8), "fc": nn.Linear(8, 2)})

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm_pre", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}


class MatchedResNet(ResNet):
    """A ResNet with timm's grouping."""

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^conv1|bn1|maxpool", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}


class Wrapped(nn.Module):
    """A backbone with its own grouping inside a model that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize, self.backbone, self.classifier = nn.Linear(3, 3), VisionTransformer(), nn.Linear(4, 2)
        del self.backbone.head


class Repeated(nn.Module):
    """Blocks that are used several times: registered in a list once for each use."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        blocks = {name: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for name in sorted(set(pattern))}
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(blocks[name] for name in pattern)
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.layers:
            x = x + block(x)
        return self.out(self.norm(x))


SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
TWO_STACKS: dict[str, Any] = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip
TOKENS: dict[str, Any] = {"vocab_size": 30, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def hugging_face(kind: str) -> nn.Module:
    """Return a small randomly initialized model of a known architecture."""
    import transformers as hf

    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2, **TOKENS}
    stages = {"hidden_sizes": [8, 16], "depths": [2, 2]}
    build = {
        "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL, **TOKENS)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **TOKENS)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, **TOKENS)),
        "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**t5)),
        "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**TWO_STACKS, **TOKENS)),
        "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(image_size=8, patch_size=4, **SMALL)),
        "resnet": lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=8, layer_type="basic", **stages)
        ),
        "convnext": lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(num_stages=2, **stages)),
        "swin": lambda: hf.SwinForImageClassification(
            hf.SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=2)
        ),
        "mixtral": lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(num_key_value_heads=2, num_local_experts=2, **SMALL, **TOKENS)
        ),
    }
    return build[kind]()


GOLDEN: dict[str, tuple[Any, dict[str, str]]] = {
    "one block four times": (lambda: Repeated("aaaa"), {"stem": "embed", "blocks[0]": "layers", "head": "norm out"}),
    "two blocks twice": (
        lambda: Repeated("abab"),
        {"stem": "embed", "blocks[0]": "layers.0", "blocks[1]": "layers.1", "head": "norm out"},
    ),
    "an activation between plain layers": (
        lambda: nn.Sequential(nn.Linear(4, 4), act := nn.PReLU(), nn.Linear(4, 4), act, nn.Linear(4, 2), act),
        {"blocks[0]": "0 1", "blocks[1]": "2", "head": "4"},
    ),
    "mlp": (mlp, {"blocks[0]": "0", "blocks[1]": "2", "head": "4"}),
    "cnn": (cnn, {"blocks[0]": "0 1", "blocks[1]": "3 4", "head": "8"}),
    "linear": (lambda: nn.Linear(3, 2), {"head": ""}),
    "encoder": (
        lambda: Encoder(2, 0.0),
        {"stem": "embed", "blocks[0]": "encoder.layers.0", "blocks[1]": "encoder.layers.1", "head": "classifier"},
    ),
    "bare encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 3, enable_nested_tensor=False),
        {"blocks[0]": "layers.0", "blocks[1]": "layers.1", "head": "layers.2"},
    ),
    "encoder and decoder": (
        lambda: nn.Transformer(8, 2, 2, 2, 16, batch_first=True),
        {
            "blocks[0]": "encoder.layers.0", "blocks[1]": "encoder.layers.1 encoder.norm", "blocks[2]": "decoder.layers.0",
            "blocks[3]": "decoder.layers.1", "head": "decoder.norm",
        },
    ),
    "resnet": (
        ResNet,
        {"stem": "conv1 bn1"}
        | {f"blocks[{i}]": f"layer{i // 2 + 1}.{i % 2}" for i in range(8)}
        | {"head": "fc"},
    ),
    "recurrent": (Recurrent, {"stem": "embed", "blocks[0]": "lstm", "head": "out"}),
    "tied": (Tied, {"stem": "embed", "blocks[0]": "blocks.0", "blocks[1]": "blocks.1", "head": "norm"}),
    "bare": (Bare, {"stem": "scale", "blocks[0]": "body.0", "blocks[1]": "body.2", "head": "head"}),
    "shared": (Shared, {"blocks[0]": "first", "blocks[1]": "middle", "head": "head"}),
    "two heads": (TwoHeads, {"blocks[0]": "first", "blocks[1]": "second", "head": "policy_head value_head"}),
    "hf bert": (
        lambda: hugging_face("bert"),
        {
            "stem": "bert.embeddings", "blocks[0]": "bert.encoder.layer.0", "blocks[1]": "bert.encoder.layer.1",
            "head": "bert.pooler classifier",
        },
    ),
    "hf llama": (
        lambda: hugging_face("llama"),
        {
            "stem": "model.embed_tokens", "blocks[0]": "model.layers.0", "blocks[1]": "model.layers.1",
            "head": "model.norm lm_head",
        },
    ),
    "hf gpt2": (
        lambda: hugging_face("gpt2"),
        {
            "stem": "transformer.wte transformer.wpe", "blocks[0]": "transformer.h.0", "blocks[1]": "transformer.h.1",
            "head": "transformer.ln_f",
        },
    ),
    "hf t5": (
        lambda: hugging_face("t5"),
        {
            "stem": "shared", "blocks[0]": "encoder.block.0", "blocks[1]": "encoder.block.1 encoder.final_layer_norm",
            "blocks[2]": "decoder.block.0", "blocks[3]": "decoder.block.1", "head": "decoder.final_layer_norm",
        },
    ),
    "hf bart": (
        lambda: hugging_face("bart"),
        {
            "stem": "model.shared model.encoder.embed_positions", "blocks[0]": "model.encoder.layers.0",
            "blocks[1]": "model.encoder.layers.1 model.encoder.layernorm_embedding",
            "blocks[2]": "model.decoder.embed_positions model.decoder.layers.0", "blocks[3]": "model.decoder.layers.1",
            "head": "model.decoder.layernorm_embedding",
        },
    ),
    "hf vit": (
        lambda: hugging_face("vit"),
        {"stem": "vit.embeddings", "blocks[0]": "vit.layers.0", "blocks[1]": "vit.layers.1", "head": "vit.layernorm classifier"},
    ),
    "hf resnet": (
        lambda: hugging_face("resnet"),
        {"stem": "resnet.embedder"}
        | {f"blocks[{i}]": f"resnet.encoder.stages.{i // 2}.layers.{i % 2}" for i in range(4)}
        | {"head": "classifier"},
    ),
    "hf convnext": (
        lambda: hugging_face("convnext"),
        {
            "stem": "convnext.embeddings", "blocks[0]": "convnext.encoder.stages.0.layers.0",
            "blocks[1]": "convnext.encoder.stages.0.layers.1",
            "blocks[2]": "convnext.encoder.stages.1.downsampling_layer convnext.encoder.stages.1.layers.0",
            "blocks[3]": "convnext.encoder.stages.1.layers.1", "head": "convnext.layernorm classifier",
        },
    ),
    "hf swin": (
        lambda: hugging_face("swin"),
        {
            "stem": "swin.embeddings", "blocks[0]": "swin.encoder.layers.0.blocks.0",
            "blocks[1]": "swin.encoder.layers.0.blocks.1 swin.encoder.layers.0.downsample",
            "blocks[2]": "swin.encoder.layers.1.blocks.0", "blocks[3]": "swin.encoder.layers.1.blocks.1",
            "head": "swin.layernorm classifier",
        },
    ),
    "hf mixtral": (
        lambda: hugging_face("mixtral"),
        {
            "stem": "model.embed_tokens", "blocks[0]": "model.layers.0", "blocks[1]": "model.layers.1",
            "head": "model.norm lm_head",
        },
    ),
    "timm-like vit": (
        VisionTransformer,
        {"stem": "cls_token pos_embed patch_embed"}
        | {f"blocks[{i}]": f"blocks.{i}" for i in range(11)}
        | {"blocks[11]": "blocks.11 norm", "head": "head"},
    ),
    "timm-like convnext": (
        ConvNeXt,
        {
            "stem": "stem", "blocks[0]": "stages.0.blocks.0 stages.0.downsample", "blocks[1]": "stages.0.blocks.1",
            "blocks[2]": "stages.1.blocks.0 stages.1.downsample", "blocks[3]": "stages.1.blocks.1 norm_pre", "head": "head",
        },
    ),
    "timm-like resnet": (
        MatchedResNet,
        {"stem": "conv1 bn1"}
        | {f"blocks[{i}]": f"layer{i // 2 + 1}.{i % 2}" for i in range(8)}
        | {"head": "fc"},
    ),
    "wrapped": (
        Wrapped,
        {"stem": "normalize backbone.cls_token backbone.pos_embed backbone.patch_embed"}
        | {f"blocks[{i}]": f"backbone.blocks.{i}" for i in range(11)}
        | {"blocks[11]": "backbone.blocks.11 backbone.norm", "head": "classifier"},
    ),
}  # fmt: skip


def table(layers: LayerMap) -> dict[str, str]:
    """Return what :data:`GOLDEN` has of a model."""
    return {layer.name: " ".join(layer.modules) for layer in layers}


@pytest.mark.parametrize("name", GOLDEN)
def test_stem_blocks_and_head_are_found(name: str) -> None:
    """Each family of models has its table, and every parameter lies in one layer of it."""
    build, expected = GOLDEN[name]
    model = build()
    layers = LayerMap(model)
    assert {layer: set(paths.split()) for layer, paths in table(layers).items()} == {
        layer: set(paths.split()) for layer, paths in expected.items()
    }
    assert list(table(layers)) == list(expected)
    named = [name for layer in layers for name in layer.parameters]
    assert sorted(named) == sorted(name for name, _ in model.named_parameters())
    assert [layers.depth(layer.parameters[0]) for layer in layers] == sorted({layers.depth(name) for name in named})


def test_the_groups_of_a_matcher_are_timms() -> None:
    """The layers of a model with a group_matcher are the groups that timm makes of it."""
    timm = pytest.importorskip("timm")
    for name in ("resnet18", "convnext_atto", "vit_tiny_patch16_224"):
        model = timm.create_model(name, pretrained=False)
        groups = timm.models.group_parameters(model, model.group_matcher(coarse=False))
        assert [set(layer.parameters) for layer in LayerMap(model)] == [set(groups[index]) for index in sorted(groups)]


def test_a_matcher_may_be_a_function() -> None:
    """It gives a name's group; the first group is the stem and the last the head."""

    class Counted(ResNet):
        def group_matcher(self, coarse: bool) -> Any:
            return lambda name: 0 if name.startswith(("conv1", "bn1")) else 9 if name.startswith("fc") else int(name[5])

    layers = LayerMap(Counted())
    assert [layer.name for layer in layers] == ["stem", *(f"blocks[{index}]" for index in range(4)), "head"]
    assert layers.blocks[3].modules == ("layer4",)


def test_a_matcher_that_fails_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    """The model is then split as one without."""

    class Broken(ResNet):
        def group_matcher(self) -> Any:
            raise AssertionError

    with caplog.at_level("WARNING", logger="thawline"):
        assert table(LayerMap(Broken())) == table(LayerMap(ResNet()))
    assert "group_matcher" in caplog.text


def test_a_head_registered_first_is_found_by_a_forward_pass() -> None:
    """Without one, a warning says what to write; with one, the order of use wins over that of registration."""
    model = HeadFirst()
    with pytest.warns(ThawlineWarning, match="'head' is registered before the body of HeadFirst.*forward=lambda"):
        assert table(LayerMap(model)) == {"stem": "head", "blocks[0]": "body.0", "head": "body.1"}
    layers = LayerMap(model, forward=lambda: model(torch.randn(2, 4)))
    assert table(layers) == {"blocks[0]": "body.0", "blocks[1]": "body.1", "head": "head"}


def test_the_order_of_use_is_logged_where_it_differs(caplog: pytest.LogCaptureFixture) -> None:
    """The log names the parameters that moved, and is silent where none did."""
    first, recurrent = HeadFirst(), Recurrent()
    with caplog.at_level("INFO", logger="thawline"):
        LayerMap(recurrent, forward=lambda: recurrent(torch.zeros(2, 3, dtype=torch.long)))
        assert not caplog.text
        LayerMap(first, forward=lambda: first(torch.randn(2, 4)))
    assert "layers follow the order of use" in caplog.text
    assert "head.weight" in caplog.text


def test_a_decoder_lies_where_it_is_used() -> None:
    """BART registers each stack's normalization of embeddings behind it, and uses it before."""
    model = hugging_face("bart")
    ids = torch.randint(3, 30, (2, 5))
    layers = LayerMap(model, forward=lambda: model(input_ids=ids, labels=ids))
    assert layers.of("model.encoder.layernorm_embedding.weight").name == "stem"
    assert layers.of("model.decoder.layernorm_embedding.weight").name == "blocks[2]"


def test_a_tied_head_is_shown_where_it_would_lie() -> None:
    """The table says that the head's weight lies in the stem, and Layer.tied names it."""
    layers = LayerMap(Tied())
    assert layers.head.tied == ("lm_head.weight",)
    assert "lm_head (tied, lies in stem)" in str(layers).splitlines()[-1]
    assert layers.of("embed.weight").name == "stem"


def test_a_weight_tied_to_a_later_layer_lies_in_the_earlier_one() -> None:
    """Also where the head, registered first, gives the weight its name."""
    model = HeadFirst()
    model.head = nn.Linear(4, 4, bias=False)
    model.body[0][0].weight = model.head.weight
    layers = LayerMap(model, forward=lambda: model(torch.randn(2, 4)))
    assert layers.of("head.weight").name == "blocks[0]"
    assert table(layers) == {"blocks[0]": "body.0", "head": "body.1"}
    assert layers.head.tied == ("head.weight",)


def test_blocks_that_share_all_their_weights_are_one() -> None:
    """No layer is empty, and indices have no gap."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(4)), nn.Linear(4, 2))
    model[2][0].weight, model[2][0].bias = model[1][0].weight, model[1][0].bias
    model[2][1].weight, model[2][1].bias = model[1][1].weight, model[1][1].bias
    layers = LayerMap(model)
    assert table(layers) == {"blocks[0]": "0", "blocks[1]": "1", "blocks[2]": "3", "head": "4"}


def test_a_norm_belongs_to_the_block_that_it_follows() -> None:
    """A peer cuts by pairs of tensors, so that weight and bias of a BatchNorm land in different phases."""
    layers = LayerMap(cnn())
    assert layers.blocks[0].parameters == ("0.weight", "0.bias", "1.weight", "1.bias")


def test_layers_are_named_by_index_and_slice() -> None:
    """blocks[-1], blocks[1:3], blocks, head; what does not exist says what does."""
    layers = LayerMap(mlp(depth=5))
    assert [layer.name for layer in layers["blocks[-1]"]] == ["blocks[3]"]
    assert [layer.name for layer in layers["blocks[1:3]"]] == ["blocks[1]", "blocks[2]"]
    assert [layer.name for layer in layers["blocks[-2:]"]] == ["blocks[2]", "blocks[3]"]
    assert len(layers["blocks"]) == 4
    for wrong in ("blocks[4]", "tail", "blocks[x]", "head[0]"):
        with pytest.raises(SelectorError):
            layers[wrong]
    with pytest.raises(SelectorError, match="'0.weight'"):
        layers.of("0.wait")


def test_given_layers_win_and_named_parts_are_layers() -> None:
    """layers= takes globs, module names and parts of one's own, in depth order."""
    layers = LayerMap(
        Encoder(3, 0.0),
        {"stem": "embed", "blocks": "encoder.layers.*", "head": ["classifier.weight", "classifier.bias"]},
    )
    assert [layer.name for layer in layers] == ["stem", "blocks[0]", "blocks[1]", "blocks[2]", "head"]
    parts = LayerMap(Bare(), {"stem": "scale", "blocks": [["body.0"]], "structure_module": "body.2", "head": "head"})
    assert [layer.name for layer in parts] == ["stem", "blocks[0]", "structure_module", "head"]
    assert parts.of("body.2.bias").name == "structure_module"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"head": "head"}, "leaves out 5 of 7"),
        ({"stem": "scale", "blocks": ["body.0"], "head": ["head", "body.*"]}, "both in"),
        ({"blocks": "layers.*"}, "matches no module"),
        ({"stem": "nope.*"}, "matches nothing"),
        ({"stem": 3}, "takes a glob"),
        ({}, "takes a mapping"),
        (["head"], "takes a mapping"),
        ({"my head": "head"}, "a layer's name is a word"),
    ],
)
def test_wrong_layers_say_what_to_pass(given: Any, message: str) -> None:
    """Left out, named twice, matching nothing, of another type: a LayerError each."""
    with pytest.raises(LayerError, match=message):
        LayerMap(Bare(), given)


def test_a_tied_weight_may_be_given_by_any_of_its_names() -> None:
    """It lies in the earliest layer that is given one; a layer of tied weights alone is refused."""
    given = {"stem": "embed", "blocks": "blocks.*", "head": ["norm", "lm_head"]}
    layers = LayerMap(Tied(), given)
    assert layers.of("embed.weight").name == "stem"
    assert layers.head.tied == ("lm_head.weight",)
    assert LayerMap(Tied(), {"blocks": "blocks.*", "head": ["norm", "lm_head"]}).of("embed.weight").name == "head"
    with pytest.raises(LayerError, match="'lm_head.weight' alone, which is tied"):
        LayerMap(Tied(), {"stem": "embed", "blocks": [["blocks.*", "norm"]], "head": "lm_head"})


def test_parts_stand_where_they_are_given() -> None:
    """A part given before the blocks stands before them."""
    layers = LayerMap(Bare(), {"stem": "scale", "adapter": "body.0", "blocks": ["body.2"], "head": "head"})
    assert layers.names == ("stem", "adapter", "blocks[0]", "head")


@pytest.mark.parametrize(
    ("build", "message"),
    [(nn.ReLU, "no parameters"), (lambda: nn.Sequential(nn.LazyLinear(3)), "no shape yet.*Run the model once")],
)
def test_a_model_without_parameters_is_refused(build: Any, message: str) -> None:
    """There is nothing to train or to split, or its size is not known yet."""
    with pytest.raises(LayerError, match=message):
        LayerMap(build())


def test_layers_and_forward_exclude_each_other() -> None:
    """Given layers stand in the order given."""
    with pytest.raises(LayerError, match="not both"):
        LayerMap(Bare(), {"head": "*"}, forward=lambda: None)


def test_a_model_that_is_not_split_says_what_to_pass() -> None:
    """blocks[-1] of a model without blocks is an error that shows layers=."""
    with pytest.raises(SelectorError, match=r"no block: none was found in Linear. Pass them: layers=\{'stem'"):
        LayerMap(nn.Linear(3, 2))["blocks[-1]"]


def test_the_layers_of_another_model_are_refused() -> None:
    """A LayerMap passed as layers= is the model's own."""
    with pytest.raises(LayerError, match="another model"):
        ParameterLedger(Bare(), partial(torch.optim.SGD, lr=0.1), LayerMap(mlp()))


def test_the_table_shows_every_layer() -> None:
    """print(layers): name, modules, number of scalars."""
    model = MODELS["encoder"]()
    text = str(LayerMap(model))
    numbers = [int(line.split()[-1].replace(",", "")) for line in text.splitlines()[1:]]
    assert sum(numbers) == sum(each.numel() for each in model.parameters())
    assert text.splitlines()[0].split() == ["layer", "modules", "parameters"]
    assert [line.split()[0] for line in text.splitlines()] == ["layer", "stem", "blocks[0]", "blocks[1]", "head"]


def test_a_block_in_several_places_lies_in_one_layer_under_all_its_names() -> None:
    """So says the map with and without a pass, and no other layer shows a name of it."""
    model = Repeated("aaaa")
    for layers in (LayerMap(model), LayerMap(model, forward=lambda: model(torch.tensor([[1, 2]])))):
        assert [layer.name for layer in layers] == ["stem", "blocks[0]", "head"]
        assert all(not layer.tied for layer in layers)
        assert layers.blocks[0].parameters == tuple(
            f"layers.0.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")
        )
