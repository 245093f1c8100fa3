"""hybridrl from Python without any worker; tests/launch/test_train.py tests it with real
workers.
"""

import subprocess
import sys
from pathlib import Path

import pytest

import hybridrl
from hybridrl.core.errors import ConfigError


def modules_after(code: str) -> set[str]:
    """The top-level packages that a new process has imported after it ran `code`."""
    printed = "\nimport sys\nprint(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code + printed], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_hybridrl_loads_nothing_heavy() -> None:
    heavy = {"torch", "ray", "numpy", "hydra", "omegaconf", "transformers", "vllm", "deepspeed"}
    assert modules_after("import hybridrl") & heavy == set()


def test_a_wrong_setting_is_raised_before_torch_and_ray_are_loaded(tmp_path: Path) -> None:
    code = (
        "import hybridrl\nfrom hybridrl.core.errors import ConfigError\ntry:\n    "
        f"hybridrl.train(['experiment=quickstart', 'run.dir={tmp_path}/run', "
        "'train.stepz=3'])\nexcept ConfigError as error:\n    assert str(error) == "
        "'train.stepz=3: no such setting; did you mean train.steps?'\nelse:\n    raise "
        "AssertionError('nothing was raised')\n"
    )
    assert modules_after(code) & {"torch", "ray", "vllm", "deepspeed"} == set()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ("train.steps=3", r"^train\.steps=3: must be a list of texts; write \['train"),
        (["--dry-run", "experiment=quickstart"], r"^--dry-run: not KEY=VALUE"),
        (["experiment=quickstart"], r"^run\.dir is not set"),
    ],
)
def test_what_is_no_list_of_settings_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        hybridrl.train(overrides)


def test_settings_of_a_file_are_the_base_of_the_overrides(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("experiment: quickstart\ntrain: {steps: -4}\n")
    with pytest.raises(ConfigError, match=r"^train\.steps=-4: must be at least 1"):
        hybridrl.train([f"run.dir={tmp_path}/run"], config=file)
    with pytest.raises(ConfigError, match=r"^train\.steps=-5: must be at least 1"):
        hybridrl.train([f"run.dir={tmp_path}/run", "train.steps=-5"], config=str(file))


def test_the_package_has_no_other_names() -> None:
    assert hybridrl.RunResult.__name__ == "RunResult"
    assert hybridrl.StopTraining.__name__ == "StopTraining"
    with pytest.raises(AttributeError, match="module 'hybridrl' has no attribute 'trian'"):
        hybridrl.trian  # noqa: B018
