"""An incomplete, damaged or dangerous model folder is refused in one sentence."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridrl.core.errors import ConfigError
from hybridrl.models.loading import (
    VALUE_HEAD,
    VALUE_HEAD_FILE,
    is_wrongly_tied,
    load_model,
    load_outline,
    load_output_head,
    load_tokenizer,
    load_value_head,
)
from tests.support.graph import save_tiny

LOADS = (load_model, load_outline, lambda path: load_output_head(path, "float32"))
"""The functions by which learner and scorers load a model, the driver inspects it, and a teacher's
head is loaded.
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", 0, tied=False)


def rewrite(model: Path, change: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """Replace tensors of the folder, or remove them if the new value is None; returns the
    result.
    """
    file = model / "model.safetensors"
    changed = load_file(file) | change
    tensors = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(tensors, file, metadata={"format": "pt"})
    return tensors


def set_config(model: Path, **values: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    "name",
    ["model.layers.2.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight"],
)
def test_a_missing_weight_is_refused_by_name_and_not_replaced_at_random(model: Path, name: str):
    rewrite(model, {name: None})
    # load_output_head reads only the head.
    for load in LOADS if name == "lm_head.weight" else LOADS[:2]:
        with pytest.raises(
            ConfigError, match=rf"model\.path=.*: its files lack {name}, which would"
        ):
            load(str(model))


def test_many_missing_weights_are_counted(model: Path):
    tensors = load_file(model / "model.safetensors")
    rewrite(model, {name: None for name in tensors if "layers.1." in name})
    with pytest.raises(
        ConfigError, match=r"lack model\.layers\.1\.\S+, .* and 4 more, which would"
    ):
        load_model(str(model))


def test_a_weight_of_another_shape_is_refused(model: Path):
    rewrite(model, {"model.norm.weight": torch.zeros(3)})
    for load in LOADS[:2]:
        with pytest.raises(
            ConfigError,
            match=r"model\.path=.*: model\.norm\.weight has shape \[3\] in its files, .* \[128\] "
            r"\(1 such",
        ):
            load(str(model))


def test_weights_that_the_config_does_not_describe_are_named_in_a_warning(
    model: Path, caplog: pytest.LogCaptureFixture
):
    set_config(model, num_hidden_layers=3)
    load_outline(str(model))
    assert "model.layers.3." in caplog.text and "and 4 more" in caplog.text


def test_an_outline_changes_no_random_state_and_reads_no_weight(model: Path):
    before = torch.random.get_rng_state()
    outline = load_outline(str(model))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {p.device.type for p in outline.parameters()} == {"meta"}


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_head_loaded_alone_is_that_of_the_whole_model(tmp_path: Path, tied: bool):
    folder = str(save_tiny(tmp_path / "model", 0, tied=tied))
    head = load_model(folder).get_output_embeddings().weight
    assert torch.equal(load_output_head(folder, "float32"), head)


def test_two_different_embeddings_that_the_config_ties_are_loaded_as_two(model: Path):
    set_config(model, tie_word_embeddings=True)
    stored = load_file(model / "model.safetensors")
    assert not torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    loaded = load_model(str(model))
    assert torch.equal(loaded.lm_head.weight, stored["lm_head.weight"])
    assert torch.equal(load_output_head(str(model), "float32"), stored["lm_head.weight"])
    assert is_wrongly_tied(str(model))
    rewrite(model, {"lm_head.weight": stored["model.embed_tokens.weight"].clone()})
    assert not is_wrongly_tied(str(model))
    set_config(model, tie_word_embeddings=False)
    assert not is_wrongly_tied(str(model))


def test_pickled_weights_are_refused_with_the_command_that_converts_them(model: Path):
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    for load in LOADS:
        with pytest.raises(
            ConfigError,
            match=r"holds pickled weights \(pytorch_model\.bin\).*convert them once: AutoModel\S+ "
            r"and copy",
        ):
            load(str(model))
    (model / "pytorch_model.bin").unlink()
    with pytest.raises(ConfigError, match=r"holds no model\.safetensors; give a folder"):
        load_model(str(model))


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "model.safetensors",
            b"",
            r"model\.safetensors is damaged or cut off: .*copy or download the model again",
        ),
        ("model.safetensors", b"\xff" * 64, r"model\.safetensors is damaged or cut off"),
        (INDEX, b"{", r"index\.json is damaged: .*copy or download the model again"),
        (INDEX, b'{"weight_map": ["a"]}', r"index\.json is damaged"),
        (INDEX, b'{"weight_map": {"a": 3}}', r"index\.json is damaged"),
        (INDEX, b"[" * 100_000, r"index\.json is damaged"),
        (
            INDEX,
            b'{"weight_map": {"a": "b.safetensors"}}',
            r"names b\.safetensors, which is missing",
        ),
        (INDEX, b'{"weight_map": {"a": "../b.safetensors"}}', r"a file outside of the folder"),
        (
            "config.json",
            b'{"model_type": "llama", "num_hidden_layers": 1000000}',
            "num_hidden_layers=1000000, the limit is 10000",
        ),
        (
            "config.json",
            b'{"model_type": "mixtral", "num_local_experts": 1e12}',
            "num_local_experts=1000000000000, the limit",
        ),
        ("config.json", b'{"model_type": "gpt2", "n_layer": 99999}', "n_layer=99999, the limit"),
        (
            "config.json",
            b'{"model_type": "x", "text_config": {"num_layers": 99999}}',
            "num_layers=99999, the limit",
        ),
        (
            "config.json",
            b'{"model_type": "llama", "transformers_weights": "x"}',
            "transformers_weights, which is not",
        ),
    ],
)
def test_a_damaged_or_absurdly_large_folder_is_refused_in_one_sentence(
    model: Path, name: str, content: bytes, sentence: str
):
    (model / name).write_bytes(content)
    for load in LOADS:
        with pytest.raises(ConfigError, match=rf"model\.path=.*{sentence}"):
            load(str(model))
    if name == "config.json":
        with pytest.raises(ConfigError, match=sentence):
            load_tokenizer(str(model))


def test_a_truncated_weight_file_is_refused(model: Path):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    for load in LOADS:
        with pytest.raises(ConfigError, match=r"model\.safetensors is damaged or cut off"):
            load(str(model))


def test_two_sets_of_weights_are_refused(model: Path):
    """Engine and learner might read different sets."""
    weights = load_file(model / "model.safetensors")
    save_file(weights, model / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(weights, "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (model / INDEX).write_text(json.dumps(index))
    with pytest.raises(
        ConfigError, match=r"two sets of weights, model\.safetensors and the files of"
    ):
        load_model(str(model))
    (model / "model.safetensors").unlink()
    assert torch.equal(load_model(str(model)).lm_head.weight, weights["lm_head.weight"])


@pytest.mark.parametrize(
    ("head", "sentence"),
    [
        (None, r"value_head/model\.safetensors is damaged"),
        (
            {"other": torch.zeros(1, 128)},
            r"value_head/model\.safetensors is damaged: .*value_head\.weight",
        ),
        (
            {VALUE_HEAD: torch.zeros(1, 64)},
            r"its value head is \[1, 64\], its model needs \[1, 128\]",
        ),
    ],
)
def test_a_value_head_that_is_damaged_or_of_another_model_is_refused(
    model: Path, head: dict[str, torch.Tensor] | None, sentence: str
):
    file = model / VALUE_HEAD_FILE
    file.parent.mkdir()
    if head is None:
        file.write_bytes(b"{}")
    else:
        save_file(head, file)
    with pytest.raises(ConfigError, match=rf"options\.path=.*{sentence}.*; give the export"):
        load_value_head(str(model), setting="options.path")
