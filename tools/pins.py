"""Packages pinned by a lock file, and whether they meet the requirements that they record.

An entry of a lock file, of which the comments are optional:

    torch==2.13.0 \\
        --hash=sha256:...
        # extras: opt-einsum
        # requires: triton==3.7.1; platform_system == "Linux"
"""

import re
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

Environment = dict[str, str]
"""The variables of environment markers, e.g. {"python_version": "3.12", ...}."""

ENTRY = re.compile(
    r"^(?P<name>[\w.-]+)==(?P<version>[^\s;\\]+)"
    r"(?P<hashes>(?: \\\n    --hash=sha256:[0-9a-f]{64})*)"
    r"(?:\n    # extras: (?P<extras>[^\n]*))?"
    r"(?P<requires>(?:\n    # requires: [^\n]*)*)$",
    flags=re.MULTILINE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """One package of a lock file.

    Attributes:
        hashes: SHA-256 digests of the files that may be installed, in hexadecimal.
        extras: extras of the package that another one requires, e.g. "default" of ray[default].
        requires: requirements of the package, as its own metadata states them.
    """

    name: str
    version: str
    hashes: frozenset[str] = frozenset()
    extras: frozenset[str] = frozenset()
    requires: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The entry of the lock file."""
        hashes = [f"--hash=sha256:{digest}" for digest in sorted(self.hashes)]
        lines = [" \\\n    ".join([f"{self.name}=={self.version}", *hashes])]
        if self.extras:
            lines.append(f"    # extras: {', '.join(sorted(self.extras))}")
        lines += [f"    # requires: {text}" for text in self.requires]
        return "\n".join(lines) + "\n"


def read(text: str) -> dict[str, Pin]:
    """The pins of a lock file by package name."""
    pins = [
        Pin(
            name=canonicalize_name(entry["name"]),
            version=entry["version"],
            hashes=frozenset(re.findall(r"sha256:(\w+)", entry["hashes"])),
            extras=frozenset(re.findall(r"[\w.-]+", entry["extras"] or "")),
            requires=tuple(re.findall(r"# requires: (.*)", entry["requires"])),
        )
        for entry in ENTRY.finditer(text)
    ]
    return {pin.name: pin for pin in pins}


def project_requirements(pyproject: str, extras: Iterable[str]) -> list[str]:
    """The requirements of a project with some of its extras. An extra may include other extras.

    Args:
        pyproject: the text of pyproject.toml.
    """
    project = tomllib.loads(pyproject)["project"]
    texts = list(project["dependencies"])
    for extra in extras:
        texts += project["optional-dependencies"][extra]
    own = [text for text in texts if Requirement(text).name == project["name"]]
    others = [text for text in texts if text not in own]
    named = [extra for text in own for extra in sorted(Requirement(text).extras)]
    return others + (project_requirements(pyproject, named) if named else [])


def linux(python: str, machine: str) -> Environment:
    """The environment of CPython on Linux, e.g. of linux("3.12", "x86_64")."""
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{python}.0",
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
    }


def applies(requirement: Requirement, extra: str, environment: Environment) -> bool:
    """Whether a requirement of a package applies in an environment.

    Args:
        extra: the extra with which the package is installed; "": none.
    """
    marker = requirement.marker
    return marker is None or marker.evaluate(environment | {"extra": extra})


def unmet(
    pins: Mapping[str, Pin],
    wanted: Iterable[str],
    environment: Environment,
    left_out: Collection[str],
) -> list[str]:
    """The requirements that the pins do not meet in an environment, each as a sentence.

    Follows `wanted` and the requirements that the pins record, from package to package.

    Args:
        wanted: the requirements of the project.
        left_out: names of packages that are not installed, whatever requires them.
    """
    return [
        f"{source} requires {requirement}, but the lock has {problem}"
        for source, requirement in reached(pins, wanted, environment)
        if requirement.name not in left_out
        and (problem := fault(pins.get(canonicalize_name(requirement.name)), requirement))
    ]


def fault(pin: Pin | None, requirement: Requirement) -> str:
    """What the lock has instead of a package that meets the requirement; empty if it meets it.

    Args:
        pin: the lock's entry for the package; None: it has none.
    """
    if pin is None:
        return "no such package"
    if not requirement.specifier.contains(pin.version, prereleases=True):
        return pin.version
    missing = sorted(requirement.extras - pin.extras)
    return f"no record of the extra {missing[0]}" if missing else ""


def reached(
    pins: Mapping[str, Pin], wanted: Iterable[str], environment: Environment
) -> Iterator[tuple[str, Requirement]]:
    """Every direct and indirect requirement of `wanted` in an environment, with the name of the
    package that requires it.
    """
    followed: set[tuple[str, str]] = set()
    queue = [("pyproject.toml", r) for r in map(Requirement, wanted) if applies(r, "", environment)]
    while queue:
        source, requirement = queue.pop()
        yield source, requirement
        name = canonicalize_name(requirement.name)
        for extra in ("", *sorted(requirement.extras)):
            if name in pins and (name, extra) not in followed:
                followed.add((name, extra))
                queue += [
                    (name, r)
                    for r in map(Requirement, pins[name].requires)
                    if applies(r, extra, environment)
                    and not (extra and applies(r, "", environment))  # followed without the extra
                ]


def with_requirements(
    pins: Mapping[str, Pin],
    metadata: Mapping[str, Collection[str]],
    wanted: Collection[str],
    environments: Collection[Environment],
) -> dict[str, Pin]:
    """The pins with those extras and requirements that apply in at least one environment.

    Args:
        pins: their own extras and requirements are ignored.
        metadata: all requirements of each package, for all extras.
        wanted: the requirements of the project.
        environments: the environments in which the lock file is used.
    """
    full = {
        name: replace(pin, requires=tuple(metadata.get(name, ()))) for name, pin in pins.items()
    }
    extras: dict[str, set[str]] = {name: set() for name in pins}
    kept: dict[str, set[str]] = {name: set() for name in pins}
    for environment in environments:
        for source, requirement in reached(full, wanted, environment):
            extras.get(canonicalize_name(requirement.name), set()).update(requirement.extras)
            if source in kept:
                kept[source].add(str(requirement))
    return {
        name: replace(pin, extras=frozenset(extras[name]), requires=tuple(sorted(kept[name])))
        for name, pin in pins.items()
    }
