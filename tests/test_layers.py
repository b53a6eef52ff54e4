"""LayerMap: every parameter in exactly one layer, for the models that people fine-tune."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from helpers import MODELS, Bare, Encoder, Shared, Tied, cnn, mlp
from thawline.engine import LayerError, LayerMap, SelectorError


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


def hugging_face(kind: str) -> nn.Module:
    """Return a small randomly initialized model of a known architecture."""
    import transformers as hf

    small: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    if kind == "bert":
        return hf.BertForSequenceClassification(hf.BertConfig(vocab_size=30, **small))
    if kind == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=30, **small))
    if kind == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=30, n_embd=16, n_layer=3, n_head=2))
    assert kind == "vit"
    return hf.ViTForImageClassification(hf.ViTConfig(image_size=8, patch_size=4, **small))


CASES: dict[str, tuple[Any, int, str, str]] = {
    # model, number of blocks, a parameter of the stem ("" for none), a parameter of the head
    "mlp": (mlp, 2, "", "4.weight"),
    "cnn": (cnn, 2, "", "8.weight"),
    "encoder": (lambda: Encoder(3, 0.0), 3, "embed.weight", "classifier.weight"),
    "resnet": (ResNet, 8, "bn1.bias", "fc.weight"),
    "recurrent": (Recurrent, 1, "embed.weight", "out.weight"),
    "tied": (Tied, 2, "embed.weight", "norm.weight"),
    "bare": (Bare, 2, "scale", "head.weight"),
    "shared": (Shared, 2, "", "head.weight"),
    "bert": (lambda: hugging_face("bert"), 3, "bert.embeddings.word_embeddings.weight", "bert.pooler.dense.weight"),
    "llama": (lambda: hugging_face("llama"), 3, "model.embed_tokens.weight", "model.norm.weight"),
    "gpt2": (lambda: hugging_face("gpt2"), 3, "transformer.wpe.weight", "transformer.ln_f.weight"),
    "vit": (lambda: hugging_face("vit"), 3, "vit.embeddings.cls_token", "classifier.weight"),
}


@pytest.mark.parametrize("name", CASES)
def test_stem_blocks_and_head_are_found(name: str) -> None:
    """The repeated body is the blocks, what stands before it the stem, what follows it the head."""
    build, blocks, in_stem, in_head = CASES[name]
    model = build()
    layers = LayerMap(model)
    assert len(layers.blocks) == blocks
    assert in_head in layers.head.parameters
    assert not in_stem or in_stem in layers.stem.parameters
    assert bool(layers.stem.parameters) == bool(in_stem)
    named = [name for layer in layers for name in layer.parameters]
    assert sorted(named) == sorted(name for name, _ in model.named_parameters())
    assert [layers.depth(layer.parameters[0]) for layer in layers] == sorted({layers.depth(name) for name in named})


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


def test_a_model_without_parameters_is_refused() -> None:
    """There is nothing to train or to split."""
    with pytest.raises(LayerError, match="no parameters"):
        LayerMap(nn.ReLU())


def test_the_table_shows_every_layer() -> None:
    """print(layers): name, modules, number of tensors."""
    text = str(LayerMap(MODELS["encoder"]()))
    assert [line.split()[0] for line in text.splitlines()] == ["layer", "stem", "blocks[0]", "blocks[1]", "head"]
