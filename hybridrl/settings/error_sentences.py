"""Every sentence of an error about settings or data, read from the package's source code.

An error is raised as `raise ConfigError(f"train.lr={self.lr}: must be positive; lower it")`. The
syntax tree of that line gives the sentence with a placeholder for each value: {lr}.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
ERRORS = ("ConfigError", "DataError")
MAX_DEPTH = 8
"""Levels of strings that consist of other strings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorSentence:
    """One sentence, in its three parts.

    Example: "train.lr={lr}: must be positive; lower it" has subject="train.lr={lr}",
    rule="must be positive", remedy="lower it".
    """

    subject: str
    """the setting, file or row that it is about; empty: the sentence does not begin with one"""
    rule: str
    remedy: str
    """what to do; empty where the rule includes it"""
    file: str
    """the file that raises it, as a path in the package"""

    @property
    def setting(self) -> str:
        """The subject without its value, e.g. "train.lr"."""
        return self.subject.partition("=")[0].partition(" ")[0]


def split(text: str, file: str) -> ErrorSentence:
    subject, colon, rest = text.partition(": ")
    is_sentence = " " in subject and not re.search(r"=|\+|^--", subject)
    if not colon or is_sentence:
        subject = ""
        rest = text
    *_, end = [0, *(match.end() for match in re.finditer(r"; |\. (?=[A-Z])", rest))]
    rule = rest[:end].rstrip("; .") or rest
    return ErrorSentence(subject=subject, rule=rule, remedy=rest[end:] if end else "", file=file)


def error_sentences(package: Path = PACKAGE) -> list[ErrorSentence]:
    """The sentences of ConfigError and DataError, each once, in the order of files and lines."""
    modules = parsed_modules(package)
    values = constants(modules.values())
    sentences: dict[ErrorSentence, None] = {}
    for file, module in modules.items():
        for function, error in raised_errors(module):
            for text in Strings(module, function, error.lineno, values).of(error.args[0]):
                sentences[split(text, file)] = None
    return list(sentences)


def unread_errors(package: Path = PACKAGE) -> list[str]:
    """The places whose sentence cannot be read from the source, as "file: function"."""
    return [
        f"{file}: {function.name}"
        for file, module in parsed_modules(package).items()
        for function, error in raised_errors(module)
        if not Strings(module, function, error.lineno, {}).of(error.args[0])
    ]


def parsed_modules(package: Path) -> dict[str, ast.Module]:
    """The syntax tree of each file, by its path in the package."""
    return {
        path.relative_to(package).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(package.rglob("*.py"))
    }


def constants(modules: Iterable[ast.Module]) -> dict[str, str]:
    """The package's constants as text; a name with two values is omitted.

    Example: DTYPES = ("float32", "bfloat16") gives {"DTYPES": "float32, bfloat16"}; of a dict it is
    the keys.
    """
    texts_of: dict[str, set[str]] = {}
    for module in modules:
        for node in module.body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=value) if name.isupper():
                    with suppress(ValueError):  # a computed value is not a literal
                        literal = ast.literal_eval(value)
                        is_collection = isinstance(literal, tuple | list | dict)
                        text = ", ".join(map(str, literal)) if is_collection else str(literal)
                        texts_of.setdefault(name, set()).add(text)
    return {name: texts.pop() for name, texts in texts_of.items() if len(texts) == 1}


def raised_errors(module: ast.Module) -> Iterator[tuple[ast.FunctionDef, ast.Call]]:
    """Each error that is raised with a sentence, and the innermost function around it."""

    def visit(
        node: ast.AST, function: ast.FunctionDef | None
    ) -> Iterator[tuple[ast.FunctionDef, ast.Call]]:
        if isinstance(node, ast.FunctionDef):
            function = node
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and function is not None:
            call = node.exc
            if isinstance(call.func, ast.Name) and call.func.id in ERRORS and call.args:
                yield function, call
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    yield from visit(module, None)


class Strings:
    """The strings that an expression in a function may have as its value, with placeholders.

    It follows conditions, sums, names to which the function assigns strings, loops over literal
    words, and functions of the same module that return strings.

    Example: `f"{key}: {'low' if small else 'high'}"` gives ["{key}: low / high"].
    """

    def __init__(
        self, module: ast.Module, function: ast.FunctionDef, line: int, values: Mapping[str, str]
    ) -> None:
        self._module = module
        self._function = function
        self._values = values  # constants of the package
        self._line = line  # of the expression, for the loops around it

    def of(self, value: ast.AST, depth: int = 0) -> list[str]:
        """All alternatives; empty where the source code does not determine the string."""
        if depth > MAX_DEPTH:
            return []
        match value:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                return self._joined(parts, depth)
            case ast.BinOp(op=ast.Add(), left=left, right=right):
                pairs = product(self.of(left, depth + 1), self.of(right, depth + 1))
                return [first + second for first, second in pairs]
            case ast.IfExp(body=body, orelse=other):
                return [*self.of(body, depth + 1), *self.of(other, depth + 1)]
            case ast.Name(id=name):
                return self._assigned(name, depth)
            case ast.Subscript(value=ast.Call(func=ast.Attribute(value=text, attr="splitlines"))):
                return self.of(text, depth + 1)  # its first line
            case ast.Call(func=ast.Name(id=name)):
                return self._returned(name, depth)
            case ast.Call(func=ast.Attribute(attr="join"), args=[ast.GeneratorExp() as each]):
                return self.of(each.generators[0].iter, depth + 1)  # the characters of a string
        return []

    def _joined(self, parts: list[ast.expr], depth: int) -> list[str]:
        """The alternatives of an f-string.

        Alternatives that are whole sentences, or begin one, are separate; others become "a / b".
        """
        texts = [""]
        for part in parts:
            if isinstance(part, ast.FormattedValue):
                words = self.of(part.value, depth + 1) or [self._value(part.value)]
            else:
                words = self.of(part, depth + 1)
            if part is not parts[0] and not any("; " in word for word in words):
                words = [" / ".join(dict.fromkeys(words))]
            texts = [text + word for text, word in product(texts, words)]
        return texts

    def _value(self, value: ast.expr) -> str:
        """The text of a constant of the package; a placeholder for any other value."""
        name = placeholder(value)
        text = self._values.get(name, f"{{{name}}}")
        match value:
            case ast.Call(func=ast.Attribute(value=ast.Constant(value=str(mark)), attr="join")):
                return text.replace(", ", mark)
        return text

    def _assigned(self, name: str, depth: int) -> list[str]:
        """The strings assigned to a name; empty where one of them cannot be determined."""
        texts = []
        for node in statements(self._function):
            match node:
                case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name:
                    assigned = self.of(value, depth + 1)
                    if not assigned:
                        return []
                    texts += assigned
                case ast.For(target=ast.Name(id=target), iter=ast.Tuple(elts=words)) if (
                    target == name and node.lineno <= self._line <= (node.end_lineno or 0)
                ):
                    texts.append("{" + ", ".join(t for w in words for t in self.of(w)) + "}")
        return [text for text in texts if text]

    def _returned(self, name: str, depth: int) -> list[str]:
        texts = []
        for function in ast.walk(self._module):
            if isinstance(function, ast.FunctionDef) and function.name == name:
                for node in statements(function):
                    if isinstance(node, ast.Return) and node.value is not None:
                        inside = Strings(self._module, function, node.lineno, self._values)
                        texts += inside.of(node.value, depth + 1)
        return [text for text in texts if text]


def statements(function: ast.FunctionDef) -> list[ast.stmt]:
    """All statements of a function, nested ones too, in the order of lines."""
    nodes = [node for node in ast.walk(function) if isinstance(node, ast.stmt)]
    return sorted(nodes, key=lambda node: node.lineno)


def placeholder(value: ast.AST) -> str:
    """A short name for a value in a sentence.

    Example: "lr" for self.lr, "teachers" for ", ".join(settings.teachers), "rows" for len(rows).
    """
    match value:
        case ast.Name(id=name):
            return name
        case ast.Attribute(attr="__name__"):
            return "type"
        case ast.Attribute(attr=name):
            return name
        case ast.Call(func=ast.Name(id="getattr")):
            return "value"
        case ast.Call(func=ast.Name(id="map"), args=[_, values]):
            return placeholder(values)
        case ast.Call(func=ast.Name(), args=[first, *_]):
            return placeholder(first)
        case ast.Call(func=ast.Attribute(), args=[first, *_]) if not isinstance(
            first, ast.Constant
        ):
            return placeholder(first)
        case ast.Call(func=ast.Attribute(value=of)) | ast.Subscript(value=of):
            return placeholder(of)
        case ast.GeneratorExp(generators=[first, *_]) | ast.ListComp(generators=[first, *_]):
            return placeholder(first.iter)
        case ast.Tuple(elts=[*_, last]) | ast.List(elts=[*_, last]):
            return placeholder(last)
        case ast.BoolOp(values=[first, *_]) | ast.IfExp(body=first):
            return placeholder(first)
        case ast.BinOp(left=first) | ast.Starred(value=first):
            return placeholder(first)
        case ast.Constant(value=constant):
            return str(constant)
    return "..."
