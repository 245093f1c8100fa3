"""The four methods of a class of student weights, and how the stream, an engine and an export use
them.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from hybridrl.core.errors import CheckpointError
from hybridrl.models.loading import VALUE_HEAD, VALUE_HEAD_FILE, load_model
from hybridrl.settings.models import ModelConfig
from hybridrl.weights.fragments import MASTER, Fragment, write_fragments
from hybridrl.weights.hugging_face import checkpoint_tensors, export
from hybridrl.weights.parameters import FullFineTuning, NamedTensor, StudentWeights, train_only
from hybridrl.weights.stream import WeightStream, unpack
from tests.models.test_loading import set_config
from tests.support.frozen_embedding import FrozenEmbedding
from tests.support.graph import save_tiny

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"
SHIFT = "model.norm.shift"


def names(tensors: Iterable[NamedTensor]) -> list[str]:
    return [tensor.name for tensor in tensors]


def stream_of(weights: StudentWeights) -> WeightStream:
    return WeightStream(weights.published(), lambda parameters: nullcontext())


def save_fragments(folder: Path, weights: StudentWeights) -> Path:
    """Write the checkpoint of a learner with one rank, without Adam's moments."""
    folder.mkdir()
    fragments = [
        Fragment(
            name=name,
            shape=tuple(parameter.shape),
            offset=0,
            tensors={MASTER: parameter.detach().flatten()},
        )
        for name, parameter in weights.saved().items()
    ]
    write_fragments(folder, 0, 1, fragments)
    return folder


class ShiftedNorm(FullFineTuning):
    """Trains only a vector that is added to the weight of the final norm. Engines and exports get
    the sum under the norm's own name.
    """

    def __init__(self, model: PreTrainedModel, value_head: nn.Parameter | None = None) -> None:
        super().__init__(model, value_head)
        self.norm = dict(model.named_parameters())[NORM]
        self.shift = nn.Parameter(torch.zeros_like(self.norm))

    def trained(self) -> dict[str, nn.Parameter]:
        return {SHIFT: self.shift}

    def published(self) -> list[NamedTensor]:
        shifted = NamedTensor(
            name=NORM,
            shape=tuple(self.norm.shape),
            dtype=self.norm.dtype,
            sources={NORM: self.norm, SHIFT: self.shift},
            combine=lambda weight, shift: weight + shift,
        )
        return [shifted if tensor.name == NORM else tensor for tensor in super().published()]


# -- full fine-tuning ------------------------------------------------------------------------------


def test_in_full_fine_tuning_all_trains_and_is_saved_and_a_tied_head_is_published_twice(
    tmp_path: Path,
):
    model = load_model(str(save_tiny(tmp_path, 0)))
    own = [name for name, _ in model.named_parameters()]
    weights = FullFineTuning(model)
    assert list(weights.trained()) == list(weights.saved()) == names(weights.exported()) == own
    assert HEAD not in own
    assert names(weights.published()) == [*own, HEAD]
    assert weights.published()[-1].repeats == EMBEDDING
    assert weights.published()[-1].sources == {EMBEDDING: model.lm_head.weight}


def test_an_untied_head_is_one_parameter_of_its_own(tmp_path: Path):
    weights = FullFineTuning(load_model(str(save_tiny(tmp_path, 0, tied=False))))
    assert names(weights.published()) == names(weights.exported()) == list(weights.trained())
    assert names(weights.published()).count(HEAD) == 1


class OtherNames(nn.Module):
    """A model whose output head is not called lm_head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_in = nn.Embedding(5, 2)
        self.embed_out = nn.Linear(2, 5, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.embed_out


def test_an_untied_head_of_another_name_is_also_published_under_the_name_that_engines_know():
    weights = FullFineTuning(OtherNames())
    own = ["embed_in.weight", "embed_out.weight"]
    assert names(weights.published()) == [*own, HEAD]
    assert weights.published()[-1].repeats == "embed_out.weight"
    assert names(weights.exported()) == list(weights.saved()) == own


def test_a_value_head_trains_and_is_saved_and_exported_but_no_engine_holds_it(tmp_path: Path):
    value_head = nn.Parameter(torch.zeros(1, 128))
    weights = FullFineTuning(load_model(str(save_tiny(tmp_path, 0))), value_head)
    assert weights.trained()[VALUE_HEAD] is value_head and VALUE_HEAD in weights.saved()
    assert weights.exported()[-1].sources == {VALUE_HEAD: value_head}
    assert VALUE_HEAD not in names(weights.published())


def test_only_what_the_weights_train_receives_a_gradient(tmp_path: Path):
    model = load_model(str(save_tiny(tmp_path, 0)))
    trained = train_only(FrozenEmbedding(model), model)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == [EMBEDDING]
    assert len(trained) == len(list(model.parameters())) - 1
    train_only(FullFineTuning(model), model)
    assert all(p.requires_grad for p in model.parameters())


# -- an engine's coverage --------------------------------------------------------------------------


class Engine(LlamaForCausalLM):
    """The model inside an engine. Like vLLM's model on CPUs, it has its own output head."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        own = dict(self.named_parameters())
        loaded = set()
        with torch.no_grad():
            for name, tensor in weights:
                own[name].copy_(tensor)
                loaded.add(name)
        return loaded


class Forgetful(FullFineTuning):
    """Full fine-tuning that does not publish one of its tensors."""

    forgotten: str

    def published(self) -> list[NamedTensor]:
        return [tensor for tensor in super().published() if tensor.name != self.forgotten]


def update(engine: Engine, weights: StudentWeights) -> None:
    """Update an engine once by the worker side of the real transfer backend."""
    from hybridrl.weights.vllm_transfer import ObjectStoreTransferEngine

    config = SimpleNamespace(parallel_config=None, model_config=None)
    transfer = ObjectStoreTransferEngine(None, config, torch.device("cpu"), engine)
    transfer.expected = {name for name, _ in engine.named_parameters()}
    manifest, packed = stream_of(weights).pack(1)
    info = ObjectStoreTransferEngine.update_info_cls
    fields = {name: getattr(manifest, name) for name in type(manifest).__slots__}
    transfer.receive_weights(info(manifest=fields, packed=packed))
    assert transfer.received_digest == manifest.digest


@pytest.mark.parametrize("kind", [FullFineTuning, FrozenEmbedding, ShiftedNorm])
def test_an_engine_accepts_what_a_class_of_weights_publishes_and_then_is_the_student(
    tmp_path: Path, kind: type[FullFineTuning]
):
    student = load_model(str(save_tiny(tmp_path / "new", 1)))
    engine = Engine.from_pretrained(save_tiny(tmp_path / "old", 0, tied=False))
    ids = torch.tensor([[1, 7, 20, 11]])
    update(engine, kind(student))
    with torch.no_grad():
        assert torch.equal(engine(ids).logits, student(ids).logits)


@pytest.mark.parametrize("name", [EMBEDDING, HEAD, NORM])
def test_an_engine_refuses_weights_of_which_one_was_not_published(tmp_path: Path, name: str):
    weights = Forgetful(load_model(str(save_tiny(tmp_path / "new", 1, tied=False))))
    weights.forgotten = name
    engine = Engine.from_pretrained(save_tiny(tmp_path / "old", 0, tied=False))
    with pytest.raises(ValueError, match=f"1 parameters were left untouched, e.g. {name}"):
        update(engine, weights)


# -- a tensor that is computed from several parameters ---------------------------------------------


def test_a_tensor_that_is_computed_from_two_parameters_is_published_and_exported_as_their_sum(
    tmp_path: Path,
):
    source = save_tiny(tmp_path / "model", 0)
    weights = ShiftedNorm(load_model(str(source)))
    with torch.no_grad():
        weights.norm.fill_(2.0)  # the weights in the source are all 1
        weights.shift.fill_(0.25)
    published = dict(unpack(*stream_of(weights).pack(0)))
    assert torch.equal(published[NORM], torch.full((128,), 2.25)) and SHIFT not in published

    state = save_fragments(tmp_path / "state", weights)
    model = ModelConfig(path=str(source))
    tensors = checkpoint_tensors(state, model, "bfloat16", kind=ShiftedNorm)
    export(tensors, source, tmp_path / "export", kind=ShiftedNorm)
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert exported.keys() == set(names(weights.exported()))
    assert torch.equal(exported[NORM], torch.full((128,), 1.25, dtype=torch.bfloat16))
    again = load_model(str(tmp_path / "export"), "bfloat16")
    assert torch.equal(again.lm_head.weight, load_model(str(source), "bfloat16").lm_head.weight)


def test_a_checkpoint_that_holds_all_is_exported_without_the_weights_that_training_started_from(
    tmp_path: Path,
):
    source = save_tiny(tmp_path / "model", 0)
    weights = FullFineTuning(load_model(str(source)), nn.Parameter(torch.full((1, 128), 0.5)))
    state = save_fragments(tmp_path / "state", weights)
    (source / "model.safetensors").unlink()
    tensors = checkpoint_tensors(state, ModelConfig(path=str(source)), "float32")
    assert tensors.keys() == weights.saved().keys()
    assert all(torch.equal(tensors[name], p) for name, p in weights.saved().items())
    export(tensors, source, tmp_path / "export")
    assert torch.equal(
        load_file(tmp_path / "export" / VALUE_HEAD_FILE)[VALUE_HEAD], tensors[VALUE_HEAD]
    )


@pytest.mark.parametrize("called_tied", [True, False])
def test_a_checkpoint_of_two_embeddings_is_exported_whole_whatever_the_config_says(
    tmp_path: Path, called_tied: bool
):
    source = save_tiny(tmp_path / "model", 0, tied=False)
    set_config(source, tie_word_embeddings=called_tied)
    weights = FullFineTuning(load_model(str(source)))
    state = save_fragments(tmp_path / "state", weights)
    tensors = checkpoint_tensors(state, ModelConfig(path=str(source)), "float32")
    assert not torch.equal(tensors[HEAD], tensors[EMBEDDING])
    assert all(torch.equal(tensors[name], p) for name, p in weights.saved().items())


def test_a_checkpoint_of_another_class_of_weights_is_refused_with_the_names(tmp_path: Path):
    source = save_tiny(tmp_path / "model", 0)
    model = load_model(str(source))
    config = ModelConfig(path=str(source))
    frozen = save_fragments(tmp_path / "frozen", FrozenEmbedding(model))
    with pytest.raises(CheckpointError, match=f"{EMBEDDING} is missing"):
        checkpoint_tensors(frozen, config, "float32")
    whole = save_fragments(tmp_path / "whole", FullFineTuning(model))
    with pytest.raises(CheckpointError, match=f"{EMBEDDING} is unknown"):
        checkpoint_tensors(whole, config, "float32", kind=FrozenEmbedding)
