"""Finds the lines of a source file whose execution may depend on the device.

An expression names a device if it has an identifier that matches IDENTIFIERS, or a string that is
in STRINGS. A statement counts if it names a device, is in a block whose condition names one, or is
in a function whose name or decorator names one. The operands of its conditional expressions, `a if
c else b`, `c and a` and `c or a`, then count as lines too, because an execution of the statement
may evaluate only some of them.
"""

import ast
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

IDENTIFIERS = re.compile(
    r"cuda|nccl|(^|_)ipc|gpu|triton|on_cpu|own_process|has_launched|flash_attention"
    r"|weight_?transfer|weight_update|(send|receive|update)_weights|connect_engines|ParamMeta",
    re.IGNORECASE,
)
STRINGS = frozenset({"cpu", "cuda", "gloo", "nccl", "ipc", "GPU", "CUDA_VISIBLE_DEVICES"})
HIT = "__gpu_lines_hit__"
"""The name of the function that an instrumented line calls with the line's own name. It is added to
Python's built-ins.
"""

Function = ast.FunctionDef | ast.AsyncFunctionDef
NO_LINES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Global, ast.Nonlocal)


@dataclass(frozen=True, slots=True)
class DeviceFunction:
    """A function and those of its lines that count.

    Example: `def f(gpu): return 1 if gpu else 2` has the lines "return 1 if gpu else 2", "1 [of 1
    if gpu else 2]" and "2 [of 1 if gpu else 2]".
    """

    name: str  # qualified by its classes
    lines: tuple[str, ...]  # unique; a repeated text is followed by its number

    @property
    def digest(self) -> str:
        """A digest of all lines, equal for sources that differ only in layout and comments."""
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()[:12]


def device_functions(tree: ast.Module) -> list[DeviceFunction]:
    found = []
    for name, function in functions(tree):
        if lines := tuple(text for text, _ in named_nodes(function)):
            found.append(DeviceFunction(name, lines))
    return found


def functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """The functions of a module and the methods of its classes, by qualified name.

    Functions that are nested in another function are part of that function.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from functions(child, f"{prefix}{child.name}.")


def named_nodes(function: Function) -> Iterator[tuple[str, ast.AST]]:
    """The statements and operands of a function that count, each with a unique text."""
    seen: Counter[str] = Counter()
    decorators = [node for tree in function.decorator_list for node in ast.walk(tree)]
    everywhere = IDENTIFIERS.search(function.name) or any(map(names_device, decorators))
    for text, node, counts in texts(function, counts=bool(everywhere)):
        seen[text] += 1
        if counts:
            yield text if seen[text] == 1 else f"{text} #{seen[text]}", node


def texts(block: ast.AST, *, counts: bool) -> Iterator[tuple[str, ast.AST, bool]]:
    """Yield the statements of a block and their conditional operands in order, each with its text
    and whether it counts.

    Args:
        counts: whether all of them count, because the block itself names a device.
    """
    for statement in statements(block):
        if not isinstance(statement, NO_LINES) and not is_docstring(statement):
            own = counts or any(map(names_device, own_nodes(statement)))
            yield head(statement), statement, own
            for node in own_nodes(statement):
                for operand in operands(node):
                    yield f"{ast.unparse(operand)} [of {ast.unparse(node)}]", operand, own
            yield from texts(statement, counts=own)
        else:
            yield from texts(statement, counts=counts)


def own_nodes(statement: ast.AST) -> Iterator[ast.AST]:
    """The expressions of a statement, without those of the statements in its blocks."""
    for child in ast.iter_child_nodes(statement):
        if not isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):
            yield child
            yield from own_nodes(child)


def names_device(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and node.value in STRINGS
    for field in ("id", "attr", "arg", "name"):
        value = getattr(node, field, None)
        if isinstance(value, str) and IDENTIFIERS.search(value):
            return True
    return False


def statements(node: ast.AST) -> Iterator[ast.stmt]:
    """The statements in the blocks of a compound statement."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
        elif isinstance(child, (ast.ExceptHandler, ast.match_case)):
            yield from statements(child)


def operands(node: ast.AST) -> list[ast.expr]:
    """The operands of a conditional expression or of `and` and `or` that may not be evaluated."""
    if isinstance(node, ast.IfExp):
        return [node.body, node.orelse]
    return node.values[1:] if isinstance(node, ast.BoolOp) else []


def is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def head(statement: ast.stmt) -> str:
    """The first line of a compound statement, or a whole simple statement, as text."""
    text = ast.unparse(statement)
    return text.partition("\n")[0] if hasattr(statement, "body") else " ".join(text.split("\n"))


def of_package(package: Path) -> dict[str, list[DeviceFunction]]:
    """The functions of each file with lines that count, by the file's path relative to the
    package's parent folder.
    """
    found = {}
    for path in sorted(package.rglob("*.py")):
        if own := device_functions(ast.parse(path.read_text())):
            found[path.relative_to(package.parent).as_posix()] = own
    return found


# -- instrumented source ---------------------------------------------------------------------------


def instrumented(source: str, path: str) -> ast.Module:
    """The module, changed so that every line that counts calls HIT with its name when executed.

    Args:
        path: the path of the file, which begins the names of its lines.
    """
    tree = ast.parse(source)
    for name, function in functions(tree):
        marks = {node: f"{path}\t{name}\t{text}" for text, node in named_nodes(function)}
        Marker(marks).visit(function)
    return ast.fix_missing_locations(tree)


class Marker(ast.NodeTransformer):
    """Inserts a call of HIT before each statement, and into each operand, that has a mark."""

    def __init__(self, marks: dict[ast.AST, str]) -> None:
        self.marks = marks

    def visit(self, node: ast.AST) -> ast.AST | list[ast.AST]:
        made = self.generic_visit(node)
        mark = self.marks.get(node)
        if mark is None:
            return made
        call = ast.Call(ast.Name(HIT, ast.Load()), [ast.Constant(mark)], [])
        if isinstance(made, ast.stmt):
            return [ast.copy_location(ast.Expr(call), node), made]
        pair = ast.Tuple([call, made], ast.Load())
        return ast.copy_location(ast.Subscript(pair, ast.Constant(1), ast.Load()), node)
