"""The checks of a run's models before any worker starts."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from hybridrl.core.errors import ConfigError
from hybridrl.launch.preflight import (
    check_adapters,
    check_attention,
    check_engines,
    check_models,
)
from hybridrl.launch.preparation import prepare_prompts
from hybridrl.models.limits import CPU_HEAD_SIZES, most_positions
from hybridrl.models.loading import VALUE_HEAD, load_model, load_tokenizer
from hybridrl.settings.run import RunSettings
from hybridrl.weights.hugging_face import export
from tests.models.test_loading import rewrite, set_config
from tests.support.graph import tiny_settings

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
YARN = {**LINEAR, "rope_type": "yarn", "original_max_position_embeddings": 25}


def settings_with_reward_model(folder: Path) -> RunSettings:
    """Settings with folders of a student, a teacher and a reward model."""
    settings = tiny_settings(folder)
    source = Path(settings.model.path)
    state = load_model(str(source)).state_dict() | {VALUE_HEAD: torch.zeros(1, 128)}
    export(state, source, folder / "judge")
    judge = f"{{function:reward_model,options:{{path:{folder / 'judge'}}}}}"
    return tiny_settings(folder, f"+reward.functions.judge={judge}")


@pytest.mark.parametrize(
    ("folder", "setting"),
    [
        ("student", r"model\.path"),
        ("teacher", r"teachers\.main\.path"),
        ("judge", r"reward\.functions\.judge\.options\.path"),
    ],
)
def test_every_model_of_the_run_is_checked_and_named_by_its_setting(
    folder: str, setting: str, tmp_path: Path
):
    settings = settings_with_reward_model(tmp_path)
    check_models(settings)
    set_config(tmp_path / folder, max_position_embeddings=47)
    with pytest.raises(
        ConfigError, match=rf"rollout\.max_model_len=48: {setting}=\S+ reads at most 47 tokens"
    ):
        check_models(settings)
    rewrite(tmp_path / folder, {"model.norm.weight": None})
    with pytest.raises(ConfigError, match=rf"{setting}=\S+: its files lack model\.norm\.weight"):
        check_models(settings)


@pytest.mark.parametrize(
    ("kind", "values", "positions"),
    [
        ("llama", {"max_position_embeddings": 100}, 100),
        ("gpt2", {"n_positions": 100}, 100),
        ("mamba", {}, float("inf")),
        ("bloom", {}, float("inf")),
        ("llama", {"max_position_embeddings": 100, "rope_parameters": LINEAR}, 400),
        ("llama", {"max_position_embeddings": 100, "rope_parameters": YARN}, 100),
    ],
)
def test_the_longest_sequence_is_what_the_config_says(
    kind: str, values: dict[str, object], positions: float
):
    config: PreTrainedConfig = AutoConfig.for_model(kind, **values)
    assert most_positions(config) == positions


def test_a_reward_model_with_fewer_rows_than_the_student_is_refused(tmp_path: Path):
    settings = settings_with_reward_model(tmp_path)
    student = load_model(settings.model.path)
    student.resize_token_embeddings(32)  # padding rows, whose tokens the student can sample
    student.save_pretrained(settings.model.path)
    with pytest.raises(ConfigError, match=r"judge\.options\.path=\S+: has 23 rows .* has 32, so"):
        check_models(settings)


@pytest.mark.parametrize(("token", "refused"), [("3 ", True), ("<image>", False)])
def test_a_token_without_a_row_is_refused_only_if_the_data_has_it(
    token: str, refused: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    settings = tiny_settings(tmp_path)
    for folder in ("student", "teacher"):
        tokenizer = load_tokenizer(str(tmp_path / folder))
        tokenizer.add_tokens([token])
        tokenizer.save_pretrained(tmp_path / folder)
    if refused:
        with pytest.raises(
            ConfigError,
            match=r"model\.path=\S+: its tokenizer has 24 tokens and the model 23 rows of "
            r"embeddings, none for '3 ' in \S+; add",
        ):
            prepare_prompts(settings)
    else:
        prepare_prompts(settings)
        assert "24 tokens and the model 23 rows of embeddings; no prompt contains" in caplog.text


def test_an_end_token_without_a_row_is_refused(tmp_path: Path):
    settings = tiny_settings(tmp_path)
    for folder in ("student", "teacher"):
        tokenizer = load_tokenizer(str(tmp_path / folder))
        tokenizer.add_special_tokens({"eos_token": "<end>"})
        tokenizer.save_pretrained(tmp_path / folder)
    with pytest.raises(ConfigError, match="none for the end token '<end>'"):
        prepare_prompts(settings)


def test_a_head_size_that_the_cpu_engine_lacks_is_refused_on_cpu_only(tmp_path: Path):
    settings = tiny_settings(tmp_path)
    check_engines(settings, "cpu")
    set_config(tmp_path / "student", num_attention_heads=8, num_key_value_heads=8, head_dim=16)
    check_engines(settings, "cuda")
    with pytest.raises(
        ConfigError, match=r"model\.path=\S+: its attention heads have 16 numbers each, which the"
    ):
        check_engines(settings, "cpu")


def test_flash_attention_is_refused_on_cpus_without_its_package_and_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    flash = ("model.attention=flash_attention_2", "model.dtype=bfloat16")
    check_attention(tiny_settings(tmp_path, "model.attention=sdpa"), "cpu")
    with pytest.raises(ConfigError, match=r"^model\.attention=flash_attention_2: needs GPUs, and"):
        prepare_prompts(tiny_settings(tmp_path, *flash))
    with pytest.raises(ConfigError, match=r"; pip install flash-attn --no-build-isolation, or set"):
        check_attention(tiny_settings(tmp_path, *flash), "cuda")
    (tmp_path / "flash_attn.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    check_attention(tiny_settings(tmp_path, *flash), "cuda")
    for setting in ("model.dtype", "+teachers.main.dtype"):
        narrow = tiny_settings(tmp_path, *flash, f"{setting}=float32")
        key = setting.removeprefix("+")
        with pytest.raises(ConfigError, match=rf"^{key}=float32: model\.attention=flash_atten"):
            check_attention(narrow, "cuda")


def test_the_head_sizes_are_those_of_the_installed_engine():
    assert list(CPU_HEAD_SIZES) == CPUAttentionBackend.get_supported_head_sizes()


def test_adapters_for_layers_that_the_student_lacks_are_refused_before_a_worker_starts(
    tmp_path: Path,
):
    check_adapters(tiny_settings(tmp_path, "lora.rank=4"))
    settings = tiny_settings(tmp_path, "lora.rank=4", "lora.targets=[c_attn]")
    with pytest.raises(
        ConfigError, match=r"'c_attn' is not a linear layer in the decoder of Llama"
    ):
        prepare_prompts(settings)
