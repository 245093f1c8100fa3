"""Imports go in one direction, heavy packages are imported only in certain files, and nothing
evaluates code from outside.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hybridrl"

LAYERS = [
    {"__version__"},
    {"core"},
    {"settings"},
    {"types"},
    {"tracking"},
    {"ops"},
    {"kernels"},
    {"batch"},
    {"models"},
    {"data"},
    {"weights"},
    {"rewards"},
    {"run_dir"},
    {"teachers"},
    {"objectives"},
    {"rollout", "policy"},
    {"runtime"},
    {"controller"},
    {"report"},
    {"planning"},
    {"launch"},
    {"oracle", "api"},
    {"cli"},
]
"""The parts of the package from the bottom up; the parts of one set may import each other."""

ALLOWED = {
    "ray": ("runtime/", "cli.py"),
    "vllm": ("rollout/", "weights/vllm_transfer.py", "weights/library_internals.py"),
    "deepspeed": ("policy/", "teachers/"),
    "peft": ("models/adapters.py",),
    "wandb": ("tracking/wandb_sink.py", "tracking/wandb_internals.py"),
    "wandb_workspaces": ("tracking/wandb_overview.py", "tracking/wandb_internals.py"),
    "tensorboard": (),  # through torch.utils.tensorboard
    "trackio": ("tracking/trackio_sink.py",),
    "mlflow": ("tracking/mlflow_sink.py",),
    "hydra": ("settings/compose.py", "settings/hydra_internals.py", "cli.py"),
    "omegaconf": ("settings/", "cli.py"),
}
"""The files that may import each heavy package, as beginnings of paths inside the package."""


def files(package: Path) -> Iterator[tuple[str, ast.Module]]:
    """The path of every module inside the package, and its syntax tree."""
    for path in sorted(package.rglob("*.py")):
        yield path.relative_to(package).as_posix(), parsed(path.read_text(), str(path))


@cache
def parsed(text: str, path: str) -> ast.Module:
    """The syntax tree of a file, cached for all tests, which must not change it."""
    return ast.parse(text, path)


def imports(tree: ast.Module) -> Iterator[str]:
    """The dotted names of everything that a module imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def level(part: str) -> int:
    """The index of a top-level part of the package in LAYERS. An unknown part fails, so that every
    new part must be placed in LAYERS.
    """
    return next(i for i, layer in enumerate(LAYERS) if part in layer)


def upward_imports(package: Path) -> list[str]:
    found = []
    for path, tree in files(package):
        if path == "__init__.py":
            continue
        ours = path.split("/")[0].removesuffix(".py")
        for name in imports(tree):
            if name.startswith("."):
                found.append(f"{path} imports {name}: relative")
            parts = name.split(".")
            if parts[0] == package.name and len(parts) > 1 and level(parts[1]) > level(ours):
                found.append(f"{path} imports {name}")
    return found


def misplaced_imports(package: Path) -> list[str]:
    return [
        f"{path} imports {name}"
        for path, tree in files(package)
        for name in imports(tree)
        if (homes := ALLOWED.get(name.split(".")[0])) is not None and not path.startswith(homes)
    ]


INTERNALS = ("_internals.py", "rewards/spawn.py")
"""The endings of the files that may use private names of a library. Each file states the version
that was read, and has a test that fails when a name no longer exists.
"""


DOCUMENTED = ("_exit", "_replace", "_asdict")
"""Public names that begin with an underscore: a function of os, and methods of named tuples."""


def private_uses(package: Path) -> list[str]:
    """The uses of private names of other objects than `self` or `cls`, outside of INTERNALS."""
    return [
        f"{path} uses {name}"
        for path, tree in files(package)
        if not path.endswith(INTERNALS)
        for name in [*private_attributes(tree), *private_imports(tree)]
        if name.rpartition(".")[2] not in DOCUMENTED
    ]


def private_attributes(tree: ast.Module) -> Iterator[str]:
    """The private attributes that a module uses, such as torch._dynamo."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not is_private(node.attr):
            continue
        if ast.unparse(node.value) not in ("self", "cls"):
            yield ast.unparse(node)


def private_imports(tree: ast.Module) -> Iterator[str]:
    """The private names that a module imports, such as torch.utils._pytree."""
    yield from (name for name in imports(tree) if any(map(is_private, name.split("."))))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


PICKLES = ("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib")
BANNED = (
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.load",
    "hydra.utils.instantiate",
    "instantiate",
    "hydra.utils.call",
    "get_class",
    "get_method",
)
"""Functions that run code from their arguments, or look up code by a name. Built-ins are listed
without their module.
"""


def dangerous_calls(package: Path) -> list[str]:
    """All uses of evaluation, unpickling, shells, Hydra's instantiation and trust_remote_code."""
    calls = (
        (path, node)
        for path, tree in files(package)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    )
    pickles = [
        f"{path} imports {library}"
        for path, tree in files(package)
        for library in PICKLES
        if any(name.split(".")[0] == library for name in imports(tree))
    ]
    return pickles + [
        f"{path}:{call.lineno} calls {ast.unparse(call.func)}"
        for path, call in calls
        if is_dangerous(call)
    ]


def is_dangerous(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    wanted = {
        "trust_remote_code": "False",
        "allow_pickle": "False",
        "shell": "False",
        "weights_only": "True",
    }
    if any(given.get(argument, value) != value for argument, value in wanted.items()):
        return True
    if name == "torch.load":
        return "weights_only" not in given
    pickles = name.split(".")[0] in PICKLES and name.endswith(
        (".load", ".loads", ".Unpickler", ".open")
    )
    return name.removeprefix("builtins.") in BANNED or pickles


def test_no_layer_imports_one_above_it():
    assert upward_imports(PACKAGE) == []


def file_circles(package: Path) -> list[set[str]]:
    """The sets of files that import each other, directly or indirectly."""
    trees = dict(files(package))
    modules = {module_name(package, path): path for path in trees}
    targets = {
        path: {modules[name] for name in imports(tree) if name in modules} - {path}
        for path, tree in trees.items()
    }
    reached = {path: reachable(path, targets) for path in targets}
    circles = [
        {path} | {other for other in reached[path] if path in reached[other]} for path in targets
    ]
    return [circle for circle in circles if len(circle) > 1]


def module_name(package: Path, path: str) -> str:
    """Example: module_name(hybridrl, "core/files.py") == "hybridrl.core.files"."""
    inside = path.removesuffix(".py").removesuffix("/__init__")
    return f"{package.name}.{inside.replace('/', '.')}"


def reachable(start: str, targets: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for target in targets[waiting.pop()] - found:
            found.add(target)
            waiting.append(target)
    return found


def test_no_two_files_import_each_other():
    assert file_circles(PACKAGE) == []


def test_a_planted_circle_is_found(planted):
    planted("core/a.py", "from hybridrl.core import b")
    planted("core/b.py", "import hybridrl.core.c")
    package = planted("core/c.py", "def late():\n    from hybridrl.core.a import X")
    assert {"core/a.py", "core/b.py", "core/c.py"} in file_circles(package)


def test_no_two_files_share_a_name():
    names = [path.rpartition("/")[2] for path, _ in files(PACKAGE)]
    shared = {name for name in names if names.count(name) > 1}
    assert shared == {"__init__.py"}


def test_heavy_packages_are_imported_only_where_they_belong():
    assert misplaced_imports(PACKAGE) == []


def test_private_names_of_libraries_are_used_only_where_they_are_gathered():
    assert private_uses(PACKAGE) == []


def test_ops_need_torch_and_the_standard_library_alone():
    allowed = (
        "torch",
        "triton",
        "hybridrl.ops",
        "hybridrl.settings.choices",
        *sys.stdlib_module_names,
    )
    for path, tree in files(PACKAGE):
        if path.startswith("ops/"):
            assert [
                name
                for name in imports(tree)
                if not f"{name}.".startswith(tuple(f"{a}." for a in allowed))
            ] == [], path


def test_config_and_errors_and_types_load_without_torch():
    for path, tree in files(PACKAGE):
        if path.startswith("settings/") or path in ("core/errors.py", "types.py"):
            assert not {name.split(".")[0] for name in imports(tree)} & {
                "torch",
                "transformers",
                *ALLOWED,
            } - {"hydra", "omegaconf"}, path


def test_nothing_evaluates_code_it_was_given():
    assert dangerous_calls(PACKAGE) == []


def test_transformers_and_vllm_are_told_to_trust_no_code_wherever_they_load_a_model():
    loaders = ("from_pretrained", "EngineArgs")
    calls = [
        (path, node)
        for path, tree in files(PACKAGE)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]
    loads = [
        (path, call) for path, call in calls if ast.unparse(call.func).rpartition(".")[2] in loaders
    ]
    untold = [
        f"{path}:{call.lineno}"
        for path, call in loads
        if "trust_remote_code" not in {keyword.arg for keyword in call.keywords}
    ]
    assert loads and untold == []


# -- the checkers themselves -----------------------------------------------------------------------


@pytest.fixture
def planted(tmp_path: Path):
    """A function that writes a package with one file of the given text; returns its folder."""

    def plant(path: str, text: str) -> Path:
        file = tmp_path / "hybridrl" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return tmp_path / "hybridrl"

    return plant


@pytest.mark.parametrize(
    "text",
    [
        "from hybridrl.launch.session import train",
        "from hybridrl import runtime",
        "import hybridrl.cli",
        "from ..controller import run",
        "def late():\n    from hybridrl.controller.controller import Controller",
    ],
)
def test_a_planted_upward_import_is_found(planted, text: str):
    assert len(upward_imports(planted("policy/learner.py", text))) >= 1


@pytest.mark.parametrize(
    "text",
    [
        "from hybridrl.kernels.head import X",
        "import hybridrl.policy.student",
        "from hybridrl import data",
    ],
)
def test_imports_downward_and_sideways_are_fine(planted, text: str):
    assert upward_imports(planted("policy/learner.py", text)) == []


def test_a_part_without_a_layer_is_refused(planted):
    with pytest.raises(StopIteration):
        upward_imports(planted("plugins.py", "import hybridrl.core.errors"))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("launch/session.py", "import ray"),
        ("policy/learner.py", "from ray.util import queue"),
        ("launch/session.py", "def f():\n    import vllm.config"),
        ("models/loading.py", "import deepspeed"),
        ("tracking/console.py", "import wandb"),
        ("tracking/console.py", "import tensorboard"),
        ("data/prompts.py", "from omegaconf import OmegaConf"),
    ],
)
def test_a_planted_heavy_import_is_found(planted, path: str, text: str):
    assert len(misplaced_imports(planted(path, text))) >= 1


@pytest.mark.parametrize(
    "text",
    [
        "torch._dynamo.mark_dynamic(tensor, 0)",
        "from torch.utils._pytree import tree_leaves",
        "from ray import _private",
        "import ray._private.worker",
        "attention = model.config._attn_implementation",
        "self.config._attn_implementation = 'eager'",
    ],
)
def test_a_planted_private_use_is_found_outside_of_the_files_for_them(planted, text: str):
    assert len(private_uses(planted("models/loading.py", text))) >= 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("models/model_internals.py", "attention = config._attn_implementation"),
        ("models/loading.py", "self._model = cls._kind"),
        ("models/loading.py", "os._exit(1)"),
        ("models/loading.py", "names = __name__, model.__class__, self._local.__dict__"),
    ],
)
def test_private_uses_that_are_allowed_are_not_found(planted, path: str, text: str):
    assert private_uses(planted(path, text)) == []


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')",
        "exec(code)",
        "pickle.load(file)",
        "from pickle import load",
        "import dill as safe",
        "pickle.loads(data)",
        "Unpickled = pickle.Unpickler(file)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=flag)",
        "builtins.exec(code)",
        "compile(text, 'f', 'exec')",
        "joblib.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "hydra.utils.instantiate(config)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
    ],
)
def test_a_planted_danger_is_found(planted, text: str):
    assert len(dangerous_calls(planted("models/loading.py", text))) == 1
    assert (
        dangerous_calls(
            planted(
                "models/loading.py",
                "model.eval()\nf(path, trust_remote_code=False)\nre.compile('x')",
            )
        )
        == []
    )
