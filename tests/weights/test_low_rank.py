"""Adapters as a class of student weights: the trained parameters, and the weights that are sent,
exported and saved.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

from hybridrl.core.errors import CheckpointError, ConfigError
from hybridrl.models.loading import VALUE_HEAD, load_model
from hybridrl.settings.lora import LoraConfig
from hybridrl.settings.models import ModelConfig
from hybridrl.weights.adapter_folder import export_adapters
from hybridrl.weights.hugging_face import checkpoint_tensors, export
from hybridrl.weights.parameters import FullFineTuning, LowRankAdapters, merged, train_only
from hybridrl.weights.stream import unpack
from tests.support.graph import save_tiny, tiny_settings
from tests.weights.test_parameters import Engine, names, save_fragments, stream_of, update

LORA = LoraConfig(rank=2, alpha=6.0)  # scale s = alpha / rank = 3
IDS = torch.tensor([[1, 7, 20, 11, 5]])
V_PROJ = "model.layers.0.self_attn.v_proj"
KIND = partial(LowRankAdapters, lora=LORA, seed=0)


def moved(source: Path, dtype: str = "float32", value_head: nn.Parameter | None = None):
    """The weights of a student whose adapters have moved away from zero."""
    weights = LowRankAdapters(load_model(str(source), dtype), value_head, lora=LORA, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in weights.layers:
            layer.up.normal_(0, 0.05, generator=generator)
    return weights


def test_the_product_of_the_adapters_is_added_to_the_matrix_and_rounded_once():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    down, up = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [0.5]])
    assert merged(weight, down, up, scale=0.5).tolist() == [[2.0, 1.0], [3.25, 3.75]]
    third = torch.tensor([[1.0]], dtype=torch.bfloat16)
    small = torch.tensor([[2.0**-9]], dtype=torch.bfloat16)
    # 1 + 3 / 512 lies between the bfloat16 numbers 1 and 1 + 4 / 512, and is nearer to the latter.
    assert merged(third, small, third, scale=3.0).item() == 1 + 2.0**-7
    assert merged(third, small, third, scale=3.0).dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_engines_and_exports_see_the_names_of_the_model_without_adapters(
    tmp_path: Path, tied: bool
):
    source = save_tiny(tmp_path, 0, tied=tied)
    full = FullFineTuning(load_model(str(source)))
    adapted = moved(source)
    assert names(adapted.published()) == names(full.published())
    assert names(adapted.exported()) == names(full.exported())
    assert [t.shape for t in adapted.published()] == [t.shape for t in full.published()]
    assert [t.repeats for t in adapted.published()] == [t.repeats for t in full.published()]


def test_only_adapters_and_the_value_head_train_and_are_saved(tmp_path: Path):
    value_head = nn.Parameter(torch.zeros(1, 128))
    weights = moved(save_tiny(tmp_path, 0), value_head=value_head)
    saved = weights.saved()
    assert len(saved) == 2 * len(weights.layers) + 1 and saved[VALUE_HEAD] is value_head
    assert saved[f"{V_PROJ}.lora_A.weight"].shape == (2, 128)
    assert {id(p) for p in train_only(weights, weights.model)} == {id(p) for p in saved.values()}
    frozen = [p for p in weights.model.parameters() if not p.requires_grad]
    assert len(frozen) + len(saved) - 1 == len(list(weights.model.parameters()))
    assert VALUE_HEAD in names(weights.exported()) and VALUE_HEAD not in names(weights.published())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_receives_each_matrix_with_its_adapter_in_it_and_then_is_the_student(
    tmp_path: Path, dtype: str
):
    source = save_tiny(tmp_path / "model", 0)
    weights = moved(source, dtype)
    base = load_model(str(source), dtype).state_dict()
    adapters = {layer.name: layer for layer in weights.layers}
    received = dict(unpack(*stream_of(weights).pack(0)))
    for name, tensor in received.items():
        expected = base[name]
        if layer := adapters.get(name.removesuffix(".weight")):
            product = layer.up.float() @ layer.down.float()
            expected = (expected.float() + 3 * product).to(expected.dtype)
            assert not torch.equal(tensor, base[name])
        assert torch.allclose(tensor, expected, rtol=0, atol=1e-6 if dtype == "float32" else 0)
    engine = Engine.from_pretrained(save_tiny(tmp_path / "old", 1, tied=False)).to(
        getattr(torch, dtype)
    )
    update(engine, weights)
    with torch.no_grad():
        gap = (engine(IDS).logits - weights.model(IDS).logits).abs().max()
        assert gap < (1e-5 if dtype == "float32" else 0.1)


def test_the_gradient_of_an_adapter_is_that_of_the_merged_matrix_by_the_chain_rule(
    tmp_path: Path,
):
    """With W' = W + s B A: dL/dB = s dL/dW' A^T and dL/dA = s B^T dL/dW'."""
    source = save_tiny(tmp_path, 0)
    weights = moved(source)
    weights.model.double()
    train_only(weights, weights.model)
    whole = load_model(str(source)).double()
    whole.load_state_dict({t.name: t.combine(*t.sources.values()) for t in weights.published()})
    for model in (weights.model, whole):
        torch.log_softmax(model(IDS).logits, -1)[0, :-1, IDS[0, 1:]].diagonal().sum().backward()
    gradients = dict(whole.named_parameters())
    largest = 0.0
    for layer in weights.layers:
        of_matrix = gradients[f"{layer.name}.weight"].grad
        assert (layer.up.grad - 3 * of_matrix @ layer.down.T).abs().max() < 1e-10
        assert (layer.down.grad - 3 * layer.up.T @ of_matrix).abs().max() < 1e-10
        largest = max(largest, float(layer.up.grad.abs().max()))
        assert layer.weight.grad is None
    assert largest > 1e-3


def test_an_export_of_a_checkpoint_is_the_merged_student(tmp_path: Path):
    source = save_tiny(tmp_path / "model", 0)
    weights = moved(source, value_head=nn.Parameter(torch.full((1, 128), 0.5)))
    state = save_fragments(tmp_path / "state", weights)
    model = ModelConfig(path=str(source))
    tensors = checkpoint_tensors(state, model, "float32", kind=KIND)
    export(tensors, source, tmp_path / "export", kind=KIND)
    exported = load_file(tmp_path / "export" / "model.safetensors")
    published = dict(unpack(*stream_of(weights).pack(0)))
    published.pop("lm_head.weight")
    assert exported.keys() == published.keys()
    assert all(torch.equal(tensor, published[name]) for name, tensor in exported.items())
    again = load_model(str(tmp_path / "export"))
    with torch.no_grad():
        assert (again(IDS).logits - weights.model(IDS).logits).abs().max() < 1e-5


def test_adapters_exported_by_themselves_make_the_student_of_the_model_in_peft(tmp_path: Path):
    source = save_tiny(tmp_path / "model", 0)
    weights = moved(source, value_head=nn.Parameter(torch.zeros(1, 128)))
    state = save_fragments(tmp_path / "state", weights)
    settings = tiny_settings(tmp_path, f"model.path={source}", "lora.rank=2", "lora.alpha=6")
    settings.model.eos = "<unk>"
    folder = tmp_path / "adapter"
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[-1]['content'] }}")
    export_adapters(state, settings, "float32", folder, template)
    again = PeftModel.from_pretrained(load_model(str(source)), folder)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, weights.model(IDS).logits)
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<unk>", "of the run"
    conversation = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(conversation, tokenize=False) == "hi"
    other = tiny_settings(tmp_path, f"model.path={source}", "lora.rank=3")
    with pytest.raises(CheckpointError, match=r"lora_A\.weight of shape \[3, .*lora\.rank=3"):
        export_adapters(state, other, "float32", folder)
    with pytest.raises(ConfigError, match=r"^--adapter: the run trained all weights"):
        export_adapters(state, tiny_settings(tmp_path), "float32", folder)


def test_a_checkpoint_of_another_rank_or_of_all_weights_is_refused(tmp_path: Path):
    source = save_tiny(tmp_path / "model", 0)
    model = ModelConfig(path=str(source))
    state = save_fragments(tmp_path / "state", moved(source))
    other = partial(LowRankAdapters, lora=LoraConfig(rank=3), seed=0)
    with pytest.raises(CheckpointError, match=r"lora_A\.weight is \[2, \d+\], the model needs \[3"):
        checkpoint_tensors(state, model, "float32", kind=other)
    with pytest.raises(CheckpointError, match=r"lora_A\.weight is unknown|is missing"):
        checkpoint_tensors(state, model, "float32")
    whole = save_fragments(tmp_path / "whole", FullFineTuning(load_model(str(source))))
    with pytest.raises(CheckpointError, match=r"lora_A\.weight is missing"):
        checkpoint_tensors(whole, model, "float32", kind=KIND)
