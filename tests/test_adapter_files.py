"""Files of adapters beside tied weights, wrapped names, heads that are targets, and settings that nobody knows here."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import Tied, mlp
from thawline.algorithms import inject_lora, load_adapter, merge_lora, save_adapter
from thawline.engine import CheckpointError, ParameterLedger, SurgeryError, ThawlineWarning

IDS = torch.arange(6).view(2, 3)


def tied() -> nn.Module:
    """Return a language model whose head is tied to its embedding, always the same."""
    torch.manual_seed(0)
    return Tied()


def injected(model: nn.Module, target: list[str], **more: Any) -> nn.Module:
    """Attach adapters, and give everything that trains other values."""
    ledger = ParameterLedger(model, partial(torch.optim.SGD, lr=0.1))
    inject_lora(ledger, target, rank=2, alpha=3, **more)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in ledger.trainable_parameters:
            each.add_(torch.randn(each.shape, generator=generator))
    return model


def rewrite(folder: Path, keys: dict[str, str | None] | None = None, **config: Any) -> None:
    """Change names of tensors (None leaves one out) and entries of the configuration."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    renamed = {(keys or {}).get(name, name): each for name, each in load_file(path).items()}
    save_file({name: each for name, each in renamed.items() if name is not None}, path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.mark.parametrize("saved", ["embed", "lm_head"])
def test_a_tied_weight_that_trained_is_saved_under_all_its_names(saved: str, tmp_path: Path) -> None:
    """So that peft, which trains copies, has the same weight in both places."""
    model, twin = injected(tied(), ["blocks.0.0"], modules_to_save=[saved]), tied()
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {"embed", "lm_head"} <= set(config["modules_to_save"])
    load_adapter(twin, tmp_path)
    assert torch.equal(twin(IDS), model(IDS))


@pytest.mark.filterwarnings("ignore")
def test_a_tied_weight_that_trained_is_the_same_in_peft(tmp_path: Path) -> None:
    """Both ways: its outputs are ours; and where peft trained a copy alone, that is refused."""
    peft = pytest.importorskip("peft")
    model = injected(tied(), ["blocks.0.0"], modules_to_save=["embed"])
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tied(), tmp_path / "ours")
    torch.testing.assert_close(theirs(IDS), model(IDS), rtol=1e-6, atol=1e-6)
    theirs = peft.get_peft_model(tied(), peft.LoraConfig(target_modules=["blocks.0.0"], modules_to_save=["embed"]))
    with torch.no_grad():
        theirs.base_model.model.embed.modules_to_save["default"].weight.add_(1.0)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="Untie them first"):
        load_adapter(tied(), tmp_path / "theirs")


def test_a_file_that_parts_tied_weights_is_refused(tmp_path: Path) -> None:
    """Until they are untied as the message says; the model is as before."""
    save_adapter(injected(tied(), ["blocks.0.0"], modules_to_save=["embed"]), tmp_path)
    rewrite(tmp_path, {"base_model.model.lm_head.weight": None}, modules_to_save=["embed"])
    twin = tied()
    with pytest.raises(CheckpointError, match=r"'embed.weight' than for 'lm_head.weight'.*Untie them first") as caught:
        load_adapter(twin, tmp_path)
    assert torch.equal(twin(IDS), tied()(IDS))
    assert list(twin.state_dict()) == list(tied().state_dict())
    exec(str(caught.value).partition("Untie them first: ")[2].rstrip("."), {"model": twin, "torch": torch})
    load_adapter(twin, tmp_path)
    assert torch.equal(twin.get_parameter("lm_head.weight"), tied().get_parameter("lm_head.weight"))


def test_an_adapter_beside_a_weight_that_trained_as_a_whole_has_no_place_in_the_format(tmp_path: Path) -> None:
    """The embedding has an adapter, and the head that is tied to it trains."""
    with pytest.raises(SurgeryError, match="shares its weight"):
        save_adapter(injected(tied(), ["embed"], modules_to_save=["lm_head"]), tmp_path)


class Wrapped(nn.Module):
    """A model with a module of the name under which peft puts what it wraps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base_layer = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.base_layer(x))
        return y


def test_a_model_may_have_a_module_called_base_layer(tmp_path: Path) -> None:
    """Its name stays; only what peft added is taken out."""
    model, twin = injected(Wrapped(), ["base_layer.0"]), Wrapped()
    save_adapter(model, tmp_path)
    rewrite(tmp_path, {"base_model.model.head.bias": "base_model.model.head.base_layer.bias"})
    assert load_adapter(twin, tmp_path) == ("base_layer.0",)
    x = torch.ones(1, 4)
    assert torch.equal(twin(x), model(x))


def test_copies_that_peft_saves_beside_the_biases_are_passed_over(tmp_path: Path) -> None:
    """With `bias="all"` its files hold a module to save several times."""
    model, twin = injected(mlp(), ["0"]), mlp()
    save_adapter(model, tmp_path)
    copies = {"base_model.model.4.bias": "base_model.model.4.original_module.bias"}
    rewrite(tmp_path, copies)
    before = twin.get_parameter("4.bias").clone()
    load_adapter(twin, tmp_path)
    assert torch.equal(twin.get_parameter("4.bias"), before)
    assert torch.equal(twin.get_parameter("4.weight"), model.get_parameter("4.weight"))


def test_a_head_that_is_a_target_trains_by_its_adapter(tmp_path: Path) -> None:
    """Nothing trains that is not saved; a head that is to train as a whole beside it is refused."""
    model, twin = injected(mlp(), ["0", "4"]), mlp()
    twin.load_state_dict({name: each for name, each in model.state_dict().items() if "lora" not in name})
    assert {name for name, each in model.named_parameters() if each.requires_grad} == {
        f"{index}.lora_{part}" for index in (0, 4) for part in "AB"
    }
    save_adapter(model, tmp_path)
    load_adapter(twin, tmp_path)
    x = torch.ones(1, 4)
    assert torch.equal(twin(x), model(x))
    with pytest.raises(SurgeryError, match="write train_head=False"):
        injected(mlp(), ["0", "4"], train_head=True)


def test_nothing_is_loaded_into_a_merged_adapter(tmp_path: Path) -> None:
    """It would not act."""
    model, twin = injected(mlp(), ["0"]), injected(mlp(), ["0"])
    save_adapter(model, tmp_path)
    merge_lora(twin)
    before = twin(torch.ones(1, 4))
    with pytest.raises(CheckpointError, match="unmerge_lora"):
        load_adapter(twin, tmp_path)
    assert torch.equal(twin(torch.ones(1, 4)), before)


def test_a_setting_that_is_not_known_is_named(tmp_path: Path) -> None:
    """A later peft may compute something else by it; one that is off says nothing."""
    save_adapter(injected(mlp(), ["0"]), tmp_path)
    rewrite(tmp_path, use_new_thing=True, use_other_thing=False)
    with pytest.warns(ThawlineWarning, match="use_new_thing=True") as caught:
        load_adapter(mlp(), tmp_path)
    assert not any("use_other_thing" in str(each.message) for each in caught)
