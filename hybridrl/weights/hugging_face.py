"""Export of a trained model as a Hugging Face folder for transformers, vLLM and `vllm serve`."""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hybridrl.core.errors import CheckpointError
from hybridrl.core.folders import new_folder
from hybridrl.models.loading import (
    TEXT_FILES,
    VALUE_HEAD,
    VALUE_HEAD_FILE,
    load_model,
    resolve,
    weight_name,
)
from hybridrl.settings.models import ModelConfig
from hybridrl.weights.end_token_files import write_end_token
from hybridrl.weights.fragments import MASTER, FragmentReader
from hybridrl.weights.library_internals import whole_shape
from hybridrl.weights.parameters import (
    FullFineTuning,
    StudentWeights,
    WeightsKind,
)

Shapes = Mapping[str, tuple[int, ...]]
TEMPLATE = "chat_template.jinja"
"""The file with a folder's chat template. It takes precedence over one in tokenizer_config.json."""


def export(
    state: Mapping[str, torch.Tensor | NDArray[np.generic]],
    source: Path,
    folder: Path,
    template: Path | None = None,
    *,
    kind: WeightsKind = FullFineTuning,
    eos: str | None = None,
) -> None:
    """Write a model folder: the tensors of `state`, and all other files of the start model.

    The folder appears complete or not at all (core.folders.new_folder).

    Args:
        state: every tensor of StudentWeights.exported() by its name, on CPU; dtypes are kept. It
            may contain both names of tied weights. A value head is written to a separate file,
            which only loading.load_value_head reads.
        source: the folder that training started from (loading.resolve).
        folder: the folder to write; replaced if it exists.
        template: the chat template that the run trained with; None, or no such file: that of
            `source`.
        kind: the class of student weights that was trained.
        eos: model.eos, which becomes the model's end token; None: the model keeps its own.

    Raises:
        CheckpointError: a name is missing or unknown, or a shape is not that of the model.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    tensors = {name: torch.as_tensor(value).detach().contiguous() for name, value in state.items()}
    value_head = tensors.pop(VALUE_HEAD, None)
    tied = _tie(tensors, config)
    _check_export(tensors, value_head, kind, config)
    with new_folder(folder) as unfinished:
        write_text_files(source, unfinished, template, eos)
        dtype = next(iter(tensors.values())).dtype
        _write_config(unfinished / "config.json", config, dtype, tied)
        _save(tensors, unfinished / "model.safetensors")
        if value_head is not None:
            _save({VALUE_HEAD: value_head}, unfinished / VALUE_HEAD_FILE)


def write_text_files(source: Path, folder: Path, template: Path | None, eos: str | None) -> None:
    """Write configuration, tokenizer and chat template of a trained model.

    Args:
        source, template, eos: as in export.
        folder: a new folder.
    """
    _copy_text_files(source, folder)
    if template is not None and template.is_file():
        shutil.copy(template, folder / TEMPLATE)
        # transformers would prefer one of these for some conversations.
        shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    if eos is not None:
        write_end_token(folder, eos)


def _copy_text_files(source: Path, folder: Path) -> None:
    """Copy configuration, tokenizer and chat templates of a model."""
    for pattern in TEXT_FILES:
        for path in source.glob(pattern):
            if not path.name.endswith(".index.json"):  # names the source's weight shards
                copy = folder / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copy(path, copy)


def _tie(tensors: dict[str, torch.Tensor], config: PreTrainedConfig) -> bool:
    """Whether input and output embedding are tied. If so, the output embedding is removed from
    `tensors`.

    If the config ties them but `tensors` has two that differ, the config is corrected: transformers
    loads embeddings that differ as two parameters, and training changed both.
    """
    text = config.get_text_config()
    if not text.tie_word_embeddings:
        return False
    model = _outline(config)
    output = weight_name(model, model.get_output_embeddings())
    embedding = tensors.get(weight_name(model, model.get_input_embeddings()))
    if output in tensors and embedding is not None and not torch.equal(tensors[output], embedding):
        config.tie_word_embeddings = False
        text.tie_word_embeddings = False
        return False
    tensors.pop(output, None)
    return True


def _outline(config: PreTrainedConfig) -> PreTrainedModel:
    """The model on torch's meta device, with names and shapes only; tied parameters appear once."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _value_head_outline(config: PreTrainedConfig) -> torch.nn.Parameter:
    """A value head [1, H] on torch's meta device."""
    return torch.nn.Parameter(torch.empty(1, config.get_text_config().hidden_size, device="meta"))


def _saved_outline(config: PreTrainedConfig, saved: Shapes) -> PreTrainedModel:
    """The model of a checkpoint on torch's meta device. If the config ties the two embeddings, they
    are tied unless the checkpoint holds an output embedding.
    """
    model = _outline(config)
    text = config.get_text_config()
    if not text.tie_word_embeddings:
        return model
    if weight_name(model, model.get_output_embeddings()) not in saved:
        return model
    untied = copy.deepcopy(config)
    untied.tie_word_embeddings = False
    untied.get_text_config().tie_word_embeddings = False
    return _outline(untied)


def _saves_all(weights: StudentWeights) -> bool:
    """Whether a checkpoint holds every parameter that an export is computed from."""
    saved = weights.saved()
    return all(name in saved for tensor in weights.exported() for name in tensor.sources)


def _write_config(file: Path, config: PreTrainedConfig, dtype: torch.dtype, tied: bool) -> None:
    """Change the entries of the copied config.json that depend on the weights.

    Values whose key was renamed in newer versions of transformers are written under both keys.
    Otherwise a program that reads only the older key would use its default, e.g. a rotary base of
    10000.
    """
    written = json.loads(file.read_text())
    text = next((written[key] for key in ("text_config",) if key in written), written)
    name = str(dtype).removeprefix("torch.")
    for section in (written, text):
        section |= {"dtype": name, "torch_dtype": name}
        if not tied:
            section["tie_word_embeddings"] = False
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if "rope_theta" in rope and "rope_theta" not in text:  # one for all layers
        text["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            text.setdefault("rope_scaling", {k: v for k, v in rope.items() if k != "rope_theta"})
    file.write_text(json.dumps(written, indent=2) + "\n")


def checkpoint_tensors(
    folder: Path, model: ModelConfig, dtype: str, *, kind: WeightsKind = FullFineTuning
) -> dict[str, torch.Tensor]:
    """The tensors that the learner would have exported when it saved the checkpoint, by name, on
    CPU.

    Saved parameters are rounded from fp32 to `dtype`, as in the learner. The model that training
    started from is loaded only if the class of student weights does not save all parameters that
    the export needs.

    Args:
        folder: the folder of the checkpoint; Adam's moments in it are not read.
        model: the model that training started from.
        dtype: name of the dtype of the tensors.
        kind: the class of student weights that was trained.

    Raises:
        CheckpointError: the folder does not hold a complete learner state of this model.
        ConfigError: the model that training started from no longer exists.
    """
    reader = FragmentReader(folder)
    source = resolve(model.path, model.revision, files=TEXT_FILES)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    value_head = _value_head_outline(config) if VALUE_HEAD in reader.shapes else None
    weights = kind(_saved_outline(config, reader.shapes), value_head)
    if not _saves_all(weights):
        weights = kind(load_model(model.path, dtype, model.revision), value_head)
    saved = weights.saved()
    _check(reader.shapes, {name: whole_shape(p) for name, p in saved.items()}, config)

    def whole(name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
        if name not in saved:
            return parameter.detach()
        return reader.whole(MASTER, name).to(getattr(torch, dtype))

    return {
        tensor.name: tensor.combine(*(whole(*source) for source in tensor.sources.items()))
        for tensor in weights.exported()
    }


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # files of safetensors are readable by their owner only


def _check_export(
    tensors: Mapping[str, torch.Tensor],
    value_head: torch.Tensor | None,
    kind: WeightsKind,
    config: PreTrainedConfig,
) -> None:
    """Compare the tensors with those that an export of the model must hold.

    Raises:
        CheckpointError: a name is missing or unknown, or a shape differs.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if value_head is not None:
        shapes[VALUE_HEAD] = tuple(value_head.shape)
    weights = kind(_outline(config), None if value_head is None else _value_head_outline(config))
    _check(shapes, {tensor.name: tensor.shape for tensor in weights.exported()}, config)


def _check(shapes: Shapes, expected: Shapes, config: PreTrainedConfig) -> None:
    """Compare two sets of shapes by name.

    Raises:
        CheckpointError: they differ; the message has the first differences.
    """
    problems = [f"{name} is missing" for name in expected.keys() - shapes.keys()]
    problems += [f"{name} is unknown" for name in shapes.keys() - expected.keys()]
    problems += [
        f"{name} is {list(shape)}, the model needs {list(expected[name])}"
        for name, shape in shapes.items()
        if name in expected and shape != expected[name]
    ]
    if problems:
        raise CheckpointError(
            f"not the weights of {config.architectures}: {'; '.join(sorted(problems)[:5])}"
        )
