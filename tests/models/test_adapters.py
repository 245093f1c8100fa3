"""Adapters of low rank in the linear layers of a model."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hybridrl.core.errors import ConfigError
from hybridrl.models.adapters import adapted_layers, add_adapters, dropout, without_adapters
from hybridrl.models.loading import load_layout, load_model
from hybridrl.settings.lora import LoraConfig
from tests.support.graph import save_tiny

IDS = torch.tensor([[1, 7, 20, 11, 5]])
LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("adapters"), 0)


def adapted(source: Path, seed: int = 0, dtype: str = "float32", **lora) -> PreTrainedModel:
    model = load_model(str(source), dtype)
    add_adapters(model, LoraConfig(**{"rank": 2} | lora), seed)
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_with_new_adapters_computes_bit_for_bit_what_it_did(source: Path, dtype: str):
    model = adapted(source, dtype=dtype)
    assert torch.equal(logits(model), logits(load_model(str(source), dtype)))
    assert {p.dtype for layer in adapted_layers(model) for p in layer[1:]} == {model.dtype}
    assert all(not layer.up.any() and layer.down.any() for layer in adapted_layers(model))


def test_all_linear_layers_of_the_decoder_get_an_adapter_or_those_that_are_named(source: Path):
    model = load_model(str(source))
    layers = model.config.num_hidden_layers
    found = [layer.name for layer in adapted_layers(adapted(source))]
    assert sorted({name.rpartition(".")[2] for name in found}) == LINEAR
    assert len(found) == 7 * layers and all(name.startswith("model.layers.") for name in found)
    named = adapted_layers(adapted(source, targets=["v_proj"]))
    assert [layer.name for layer in named] == [
        f"model.layers.{i}.self_attn.v_proj" for i in range(layers)
    ]
    width = model.config.hidden_size
    assert named[0].down.shape == (2, width) and named[0].weight.shape[1] == width


def test_only_adapters_require_a_gradient_and_their_first_numbers_depend_on_the_seed_alone(
    source: Path,
):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = adapted(source, seed=1)
    assert torch.rand(1) == expected  # the state of the generator is unchanged
    again, other = adapted(source, seed=1), adapted(source, seed=2)
    downs = [adapted_layers(model)[3].down for model in (first, again, other)]
    assert torch.equal(downs[0], downs[1]) and not torch.equal(downs[0], downs[2])
    trained = [name for name, p in first.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(adapted_layers(first))
    assert all(".lora_" in name for name in trained)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_its_adapters_a_model_computes_bit_for_bit_what_it_did(source: Path, dtype: str):
    model = adapted(source, dtype=dtype)
    with torch.no_grad():
        for layer in adapted_layers(model):
            layer.up.fill_(0.1)
    changed, base = logits(model), logits(load_model(str(source), dtype))
    with pytest.raises(ZeroDivisionError), without_adapters(model):
        assert torch.equal(logits(model), base) and not torch.equal(changed, base)
        1 / 0  # noqa: B018
    assert torch.equal(logits(model), changed)  # also after an error
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(adapted_layers(model))


def test_the_names_and_shapes_of_adapters_need_no_weights(source: Path):
    outline = load_layout(str(source), setting="model.path")
    add_adapters(outline, LoraConfig(rank=2), 0)
    shapes = [(a.name, a.down.shape, a.up.shape) for a in adapted_layers(outline)]
    assert shapes == [(a.name, a.down.shape, a.up.shape) for a in adapted_layers(adapted(source))]
    assert {p.device.type for p in outline.parameters()} == {"meta"}


def test_dropout_applies_inside_of_its_block_alone_and_follows_the_seed(source: Path):
    model = adapted(source, dropout=0.5)
    with torch.no_grad():
        for layer in adapted_layers(model):
            layer.up.fill_(0.1)
    plain = logits(model)
    found = []
    for seed in (1, 1, 2):
        with dropout(model, seed):
            found.append(logits(model))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2]) and not torch.equal(found[0], plain)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (
            ["q_proj", "qproj"],
            r"lora\.targets=.*: 'qproj' is not a linear layer in the decoder of ",
        ),
        (
            ["lm_head"],
            r"'lm_head' is not a linear layer in the decoder of LlamaForCausalLM; it has d",
        ),
        (["embed_tokens"], r"'embed_tokens' is not a linear layer"),
    ],
)
def test_a_target_that_is_no_linear_layer_of_the_decoder_is_refused(
    source: Path, targets: list[str], sentence: str
):
    with pytest.raises(ConfigError, match=sentence):
        adapted(source, targets=targets)


def test_adapters_without_peft_are_refused_with_the_way_to_install_it(
    source: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"needs? the package peft, .*hybridrl\[lora\]"):
        adapted(source)
