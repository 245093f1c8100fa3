"""An exported folder is read as the trained model by every library that reads it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from hybridrl.models.loading import load_model, load_tokenizer
from hybridrl.weights.hugging_face import export
from tests.models.test_loading import set_config
from tests.support.graph import save_tiny

IDS = torch.tensor([[1, 7, 20, 11]])
SIZES = {
    "vocab_size": 23,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}


def save(config: PreTrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def exported(source: Path) -> Path:
    """Export a model right after loading it, and check that its logits are the same."""
    model = load_model(str(source))
    folder = source.parent / "export"
    export(dict(model.named_parameters()), source, folder)
    with torch.no_grad():
        again = load_model(str(folder))(IDS).logits
        assert torch.equal(again, model(IDS).logits)
    return folder


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("called_tied", [True, False])
def test_two_different_embeddings_stay_two_whatever_the_config_says(
    tmp_path: Path, called_tied: bool
):
    source = save_tiny(tmp_path / "model", 0, tied=False)
    set_config(source, tie_word_embeddings=called_tied)
    folder = exported(source)
    assert config_of(folder)["tie_word_embeddings"] is False
    assert load_model(str(folder)).lm_head.weight.shape == (23, 128)


def test_an_untied_head_of_another_name_is_exported(tmp_path: Path):
    folder = exported(save(GPTNeoXConfig(**SIZES), tmp_path / "model"))
    model = load_model(str(tmp_path / "model"))
    again = load_model(str(folder))
    assert config_of(folder)["tie_word_embeddings"] is False
    head = again.get_output_embeddings().weight
    assert torch.equal(head, model.get_output_embeddings().weight)
    assert not torch.equal(head, again.get_input_embeddings().weight)


def test_one_embedding_that_both_names_hold_stays_one(tmp_path: Path):
    source = save_tiny(tmp_path / "model", 0)
    model = load_model(str(source))
    export(model.state_dict(), source, tmp_path / "export")
    assert config_of(tmp_path / "export")["tie_word_embeddings"] is True
    again = load_model(str(tmp_path / "export"))
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("rope", "older"),
    [
        ({"rope_type": "default", "rope_theta": 500000.0}, {"rope_theta": 500000.0}),
        (SCALED, {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ],
)
def test_programs_that_know_older_spellings_read_the_same_values(
    tmp_path: Path, rope: dict, older: dict
):
    source = save(LlamaConfig(**SIZES, rope_parameters=rope), tmp_path / "model")
    assert "rope_theta" not in config_of(source)
    folder = exported(source)
    older |= {"torch_dtype": "float32", "dtype": "float32"}
    assert older.items() <= config_of(folder).items()
    ours, theirs = (AutoConfig.from_pretrained(f) for f in (folder, source))
    assert ours.rope_parameters == theirs.rope_parameters


def test_a_config_of_an_older_spelling_is_exported_as_it_was(tmp_path: Path):
    source = save(LlamaConfig(**SIZES), tmp_path / "model")
    old = {k: v for k, v in config_of(source).items() if k not in ("rope_parameters", "dtype")}
    old |= {"rope_theta": 12345.0, "torch_dtype": "float32", "my_note": [1]}
    (source / "config.json").write_text(json.dumps(old))
    assert config_of(exported(source)) == old | {"dtype": "float32"}


def test_chat_templates_with_names_are_exported(tmp_path: Path):
    source = save_tiny(tmp_path / "model", 0)
    tokenizer = load_tokenizer(str(source))
    templates = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(source)
    assert load_tokenizer(str(exported(source))).chat_template == templates
    # A template of the run replaces all of them.
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages }}!")
    export(dict(load_model(str(source)).named_parameters()), source, tmp_path / "own", own)
    assert load_tokenizer(str(tmp_path / "own")).chat_template == "{{ messages }}!"
