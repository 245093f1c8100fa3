"""Weights are downloaded only where they are needed, and only the files that are read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from hybridrl.models import loading
from hybridrl.models.loading import head_rows, load_model, load_output_head, load_tokenizer
from tests.support.graph import save_tiny

NAME = "owner/model"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a simulated hub that holds one model with two weight files."""
    hub = save_tiny(tmp_path / "hub", 0, tied=False)
    weights = load_file(hub / "model.safetensors")
    (hub / "model.safetensors").unlink()
    head = {"lm_head.weight": weights.pop("lm_head.weight")}
    for file, tensors in (("model-1.safetensors", weights), ("model-2.safetensors", head)):
        save_file(tensors, hub / file, metadata={"format": "pt"})
    weight_map = dict.fromkeys(weights, "model-1.safetensors")
    weight_map |= dict.fromkeys(head, "model-2.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (hub / "model.safetensors.index.json").write_text(json.dumps(index))
    cache = tmp_path / "cache"
    cache.mkdir()

    def snapshot_download(path: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        names = [file.name for file in hub.iterdir()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copy(hub / name, cache / name)
        return str(cache)

    monkeypatch.setattr(loading, "snapshot_download", snapshot_download)
    return cache


def weights_in(cache: Path) -> list[str]:
    return sorted(file.name for file in cache.glob("*.safetensors"))


def test_a_tokenizer_and_the_size_of_a_vocabulary_need_no_weights(cache: Path):
    assert head_rows(NAME) == len(load_tokenizer(NAME)) == 23
    assert weights_in(cache) == []


def test_an_output_head_needs_only_the_file_that_holds_it(cache: Path):
    head = load_output_head(NAME, "float32")
    assert weights_in(cache) == ["model-2.safetensors"]
    assert torch.equal(head, load_model(NAME).get_output_embeddings().weight)
    assert weights_in(cache) == ["model-1.safetensors", "model-2.safetensors"]
