"""Models that shift their labels: a batch cut into microbatches has the gradient of the whole."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import weights
from thawline.engine import Trainer
from thawline.engine.shift import shifts_labels

SMALL = {"vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
GPT2 = {"vocab_size": 13, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "resid_pdrop": 0.0}
BART = {
    "vocab_size": 13,
    "d_model": 8,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
    "dropout": 0.0,
}
T5 = {"vocab_size": 13, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
# Architecture: the configuration, and whether its own loss leaves out the first label of each row.
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "GPT2LMHeadModel": ("GPT2Config", GPT2, True),
    "LlamaForCausalLM": ("LlamaConfig", SMALL, True),
    "BertLMHeadModel": ("BertConfig", {**SMALL, "is_decoder": True}, True),
    "BertForMaskedLM": ("BertConfig", SMALL, False),
    "BartForCausalLM": ("BartConfig", {**BART, "is_decoder": True, "is_encoder_decoder": False}, False),
    "T5ForConditionalGeneration": ("T5Config", {**T5, "decoder_start_token_id": 0}, False),
    "GPT2ForSequenceClassification": ("GPT2Config", {**GPT2, "num_labels": 3, "pad_token_id": 0}, False),
}


def build(name: str) -> nn.Module:
    """Return a tiny model of transformers, without dropout."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config, options, _ = MODELS[name]
    model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**options))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def batch_for(name: str) -> dict[str, Tensor]:
    """Return six rows of seven tokens, of which few are labeled: unevenly many a row, the first in some."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 13, (6, 7), generator=generator)
    if name.endswith("SequenceClassification"):
        return {"input_ids": ids, "labels": torch.tensor([0, -100, -100, 2, 1, -100])}
    labels = torch.where(torch.rand(6, 7, generator=generator) < 0.3, ids, -100)
    labels[::2, 0] = ids[::2, 0]
    labels[1, :] = -100
    labels[1, 0] = 3
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_microbatches_have_the_gradient_of_the_batch(name: str, size: int) -> None:
    """With many ignored labels, k microbatches equal one batch within 1e-6, whether or not the model shifts them."""
    batch, stepped = batch_for(name), []
    for micro in (None, size):
        model = build(name)
        trainer = Trainer(
            microbatch_size=micro, optimizer=partial(torch.optim.SGD, lr=1.0), progress=False, device="cpu"
        )
        trainer.fit(model, [batch], duration="1ba")
        stepped.append(weights(model))
    for key, value in stepped[0].items():
        torch.testing.assert_close(stepped[1][key], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_who_shifts_is_known(name: str) -> None:
    """The first label of each row is without effect on the loss exactly where the model is found to shift."""
    model, batch = build(name), batch_for(name)
    other = {key: value.clone() for key, value in batch.items()}
    other["labels"][..., 0] = (other["labels"][..., 0].clamp(min=0) + 1) % 3
    with torch.no_grad():
        same = model(**batch).loss == model(**other).loss
    assert bool(same) is shifts_labels(model) is MODELS[name][2]


def test_a_wrapper_is_as_the_model_inside() -> None:
    """One that hands the labels on; one that computes a loss of its own is looked at itself."""

    class HandsOn(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **batch: Tensor) -> object:
            return self.inner(**batch)

    class OwnLoss(HandsOn):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
            logits = self.inner(input_ids=input_ids).logits
            return nn.functional.cross_entropy(logits.transpose(1, 2), labels)

    wrap: Callable[[nn.Module], nn.Module] = HandsOn
    assert shifts_labels(wrap(build("GPT2LMHeadModel")))
    assert not shifts_labels(wrap(build("BertForMaskedLM")))
    assert not shifts_labels(OwnLoss(build("GPT2LMHeadModel")))


def test_another_loss_function_is_seen() -> None:
    """A loss function that the user has set on the model replaces the one of transformers."""
    model = build("LlamaForCausalLM")
    setattr(model, "loss_function", lambda logits, labels, **_: nn.functional.cross_entropy(logits.mT, labels))  # noqa: B010
    assert not shifts_labels(model)
