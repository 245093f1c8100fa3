"""Loading, export and the shipped tiny models."""

import shutil
import threading
from pathlib import Path

import pytest
import torch
from countdown_models import greedy_answers, parser, train
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from hybridrl.core.errors import CheckpointError, ConfigError
from hybridrl.data.countdown_puzzles import Countdown
from hybridrl.launch.export import keep_template
from hybridrl.models.loading import (
    _build_once,
    head_rows,
    load_model,
    load_tokenizer,
    resolve,
    stop_token_ids,
)
from hybridrl.models.tiny import CHARACTERS, tiny_model, tiny_tokenizer
from hybridrl.rewards.countdown import countdown
from hybridrl.settings.compose import load_config
from hybridrl.weights.hugging_face import TEMPLATE, export

IDS = torch.tensor([[1, 7, 20, 11, 21, 6, 5, 22]])  # "3 7=21:"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with a model with random float32 weights."""
    torch.manual_seed(0)
    folder = tmp_path / "source"
    tiny_model(tiny_tokenizer()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def accuracy(name: str, num: int) -> float:
    """The share of the first `num` held-out problems that the model solves greedily."""
    equations = Countdown().heldout(num)
    model = load_model(f"builtin:{name}")
    tokenizer = load_tokenizer(f"builtin:{name}")
    answers = greedy_answers(model, tokenizer, [e.prompt for e in equations])
    numbers = [list(e.numbers) for e in equations]
    return sum(countdown(answers, numbers, [e.target for e in equations])) / num


def test_the_tiny_tokenizer_survives_saving_and_round_trips_every_character(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("3 7=21:").input_ids == IDS[0].tolist()
    ids = tokenizer(CHARACTERS).input_ids
    assert ids == [1, *range(4, 4 + len(CHARACTERS))]
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == CHARACTERS
    special = (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token)
    assert special == ("<pad>", "<bos>", "<eos>")
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_the_tiny_model_is_tiny_and_its_config_names_the_end_token() -> None:
    model = tiny_model(tiny_tokenizer())
    assert 700_000 < sum(p.numel() for p in model.parameters()) < 1_000_000
    assert model.config.eos_token_id == 2 and model.config.vocab_size == len(tiny_tokenizer()) == 23


@pytest.mark.parametrize("name", ["countdown-student", "countdown-teacher"])
def test_a_shipped_model_is_a_small_plain_llama(name: str) -> None:
    folder = resolve(f"builtin:{name}")
    assert (folder / "model.safetensors").stat().st_size < 2_500_000
    assert not list(folder.glob("*.py"))
    model = load_model(f"builtin:{name}", "bfloat16")
    assert model.config.architectures == ["LlamaForCausalLM"] and model.dtype == torch.bfloat16
    assert load_tokenizer(f"builtin:{name}")("3 7=21:").input_ids == IDS[0].tolist()


def test_the_shipped_student_is_worse_than_its_teacher_as_the_readme_says() -> None:
    student = accuracy("countdown-student", 128)
    teacher = accuracy("countdown-teacher", 128)
    # The numbers of assets/README.md; the order of float32 sums may change a few near-ties.
    assert abs(student - 0.328) < 0.05 and abs(teacher - 0.547) < 0.05
    assert teacher - student > 0.15


def test_the_script_gives_the_same_weights_for_the_same_arguments() -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        arguments = ["--out", "unused", "--steps", "2", "--batch", "4", "--seed", str(seed)]
        return train(parser().parse_args(arguments))[0].state_dict()

    first = weights(0)
    second = weights(0)
    other = weights(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("as_numpy", [False, True])
def test_an_exported_folder_gives_equal_logits_and_the_same_tokenizer(
    source: Path, tmp_path: Path, as_numpy: bool
) -> None:
    torch.manual_seed(1)
    trained = tiny_model(tiny_tokenizer()).eval()
    state = {name: t.numpy() if as_numpy else t for name, t in trained.state_dict().items()}
    export(state, source, tmp_path / "export")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded(IDS).logits, trained(IDS).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer("3 7=21:").input_ids == IDS[0].tolist()
    assert (tmp_path / "export" / "generation_config.json").is_file()
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in (tmp_path / "export").iterdir())


def test_an_export_retains_dtype_and_chat_template_and_replaces_an_older_one(
    source: Path, tmp_path: Path
) -> None:
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    state = load_model(str(source), "bfloat16").state_dict()
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "old").touch()
    export(state, source, tmp_path / "export")
    assert AutoConfig.from_pretrained(tmp_path / "export").dtype == torch.bfloat16
    loaded = load_model(str(tmp_path / "export"), "bfloat16")
    assert torch.equal(loaded.model.norm.weight, state["model.norm.weight"])
    assert load_tokenizer(str(tmp_path / "export")).chat_template == "{{ messages[0]['content'] }}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export", "source"]
    assert not (tmp_path / "export" / "old").exists()


def test_an_export_carries_the_chat_template_that_the_run_trained_with(
    source: Path, tmp_path: Path
) -> None:
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages[-1]['content'] }}")
    settings = load_config(["run.dir=x", "experiment=quickstart"])
    settings.data.chat_template_file = str(own)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    keep_template(settings, run_dir)
    own.unlink()
    state = load_model(str(source), "float32").state_dict()
    export(state, source, tmp_path / "export", run_dir / TEMPLATE)
    assert load_tokenizer(str(tmp_path / "export")).chat_template == "{{ messages[-1]['content'] }}"
    settings.data.chat_template_file = None
    keep_template(settings, run_dir)
    export(state, source, tmp_path / "export", run_dir / TEMPLATE)
    assert load_tokenizer(str(tmp_path / "export")).chat_template == "{{ messages[0]['content'] }}"


def test_generation_stops_at_the_end_tokens_of_tokenizer_and_generation_settings(
    source: Path,
) -> None:
    tokenizer = tiny_tokenizer()
    assert stop_token_ids(str(source), tokenizer) == {2}
    GenerationConfig(eos_token_id=[4, 5]).save_pretrained(source)
    assert stop_token_ids(str(source), tokenizer) == {2, 4, 5}
    (source / "generation_config.json").unlink()
    assert stop_token_ids(str(source), tokenizer) == {2}


def test_an_export_of_other_weights_is_refused_and_writes_nothing(
    source: Path, tmp_path: Path
) -> None:
    state = tiny_model(tiny_tokenizer()).state_dict()
    missing = {name: t for name, t in state.items() if name != "model.norm.weight"}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):
        export(missing, source, tmp_path / "export")
    with pytest.raises(CheckpointError, match="extra is unknown"):
        export({**state, "extra": torch.zeros(1)}, source, tmp_path / "export")
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight is \[3\], the model needs \[128\]"
    ):
        export({**state, "model.norm.weight": torch.zeros(3)}, source, tmp_path / "export")
    (source / "no_file.json").mkdir()
    with pytest.raises(IsADirectoryError):
        export(state, source, tmp_path / "export")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_path_without_a_model_is_a_config_error_that_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"model\.path=builtin:countdown.*must be one of countdown-student, countdown-teacher",
    ):
        resolve("builtin:countdown")
    with pytest.raises(ConfigError, match=r"model\.path=.*holds no config\.json"):
        resolve(str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"teachers\.main\.path=/no/such/folder: there is no such folder"
    ):
        load_model("/no/such/folder", setting="teachers.main.path")
    with pytest.raises(
        ConfigError,
        match=r"model\.path=me/nothing: .*the hub cannot be reached .*download the model",
    ):
        resolve("me/nothing")  # the tests have no network
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model\.path=.*cannot be loaded"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        '{"model_type": "llama", "hidden_size": "x"}',
        '{"model_type": 3}',
        "[]",
        "{",
        "null",
        '{"model_type": "no"}',
    ],
)
def test_a_malformed_config_is_one_config_error(source: Path, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    (folder / "config.json").write_text(text)
    for load in (load_model, head_rows):
        with pytest.raises(ConfigError, match=r"model\.path=.*cannot be loaded as"):
            load(str(folder))


def test_code_of_a_models_author_is_not_run(source: Path) -> None:
    (source / "evil.py").write_text("raise SystemExit('ran')")
    config = (source / "config.json").read_text()
    mapping = (
        '{"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, '
        '"model_type": "evil",'
    )
    (source / "config.json").write_text(
        mapping + config.replace('"model_type": "llama",', "").lstrip()[1:]
    )
    with pytest.raises(ConfigError, match=r"model\.path=.*cannot be loaded"):
        load_model(str(source))


def test_a_converted_model_is_built_once_and_appears_complete(tmp_path: Path) -> None:
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "config.json").touch()
        assert not (tmp_path / "model").exists()

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("no space")

    with pytest.raises(RuntimeError, match="no space"):
        _build_once(tmp_path / "model", fail)
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == []
    for _ in range(2):
        assert _build_once(tmp_path / "model", build) == tmp_path / "model"
    assert len(built) == 1 and (tmp_path / "model" / "config.json").is_file()


def test_a_process_that_waited_for_the_conversion_uses_its_result(tmp_path: Path) -> None:
    checked = threading.Event()

    class Watched(type(tmp_path)):  # type: ignore[misc]
        def is_dir(self) -> bool:
            exists = super().is_dir()
            checked.set()
            return exists

    built: list[Path] = []
    folder = Watched(tmp_path / "model")
    waiting = threading.Thread(target=_build_once, args=(folder, built.append))
    with FileLock(f"{folder}.lock"):
        waiting.start()
        assert checked.wait(timeout=30)
        (tmp_path / "model").mkdir()
    waiting.join(timeout=30)
    assert not waiting.is_alive() and built == []
