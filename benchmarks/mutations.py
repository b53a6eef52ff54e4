"""General mutations of the packages' code, found in its syntax trees and drawn by a seed.

What is never mutated: docstrings, annotations, ``assert`` and decorators, ``__all__`` and type aliases, code for type checkers,
texts, and what is said to people: the arguments of exceptions, warnings, logs, and the bodies of ``__repr__``. Neither is what
breaks at once or never: an assignment to a name is not dropped, and the arguments of ``isinstance``, ``cast`` or ``max`` are not swapped.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from attrs import frozen

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("engine", "algorithms")

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
_SAID = re.compile(r"(Error|Warning|Boom)$|^(warn|warning|info|debug|fail|same|log|logger|_?log_.*|_?warn_.*|print)$")
_FIELDS_WITHOUT_CODE = {"annotation", "returns", "decorator_list", "type_params", "bases", "keywords_of_class"}


@frozen
class Change:
    """A change of one node of a syntax tree.

    Args:
        operator: What kind of change it is.
        node: The node that shows it.
        do: Carries it out, in place.
        after: What the code becomes; None where the node shows it.
    """

    operator: str
    node: ast.AST
    do: Callable[[], None]
    after: str | None = None


@frozen
class Mutation:
    """A change of the code, by where it is.

    Args:
        module: Path without suffix, such as ``"engine/ledger"``.
        index: Its place among the changes of the module.
        line: Where.
        statement: Line of the statement in a function in which it lies; 0 where it lies outside of functions.
        operator: What kind of change it is.
        before: The code that is changed.
        key: A hash of module, names around it, operator, code and how often all that came before: what outlives other changes.
    """

    module: str
    index: int
    line: int
    statement: int
    operator: str
    before: str
    key: str

    def tree(self) -> ast.Module:
        """Return the mutated module."""
        return self._carried_out()[0]

    @property
    def after(self) -> str:
        """What the code is changed to."""
        return self._carried_out()[1]

    def _carried_out(self) -> tuple[ast.Module, str]:
        tree = parsed(self.module)
        change = list(changes(tree))[self.index]
        change.do()
        ast.fix_missing_locations(tree)
        return tree, _short(ast.unparse(change.node)) if change.after is None else change.after.format(self.before)


def modules() -> list[str]:
    """Return the modules of both packages."""
    return [f"{package}/{path.stem}" for package in PACKAGES for path in sorted((ROOT / package).glob("*.py"))]


def parsed(module: str) -> ast.Module:
    """Return a module's syntax tree."""
    return ast.parse((ROOT / f"{module}.py").read_text())


def drawn(count: int, seed: int) -> list[Mutation]:
    """Draw mutations from all that there are: those whose hashes with the seed are smallest.

    So a change of the code leaves the draw elsewhere as it was.
    """
    everything = [each for module in modules() for each in mutations(module)]
    return sorted(everything, key=lambda each: hashlib.sha256(f"{seed} {each.key}".encode()).digest())[:count]


def mutations(module: str) -> Iterator[Mutation]:
    """Yield every mutation of a module."""
    tree = parsed(module)
    around = _surroundings(tree)
    seen: dict[str, int] = {}
    for index, change in enumerate(changes(tree)):
        statement, names = around[change.node]
        before = ast.unparse(change.node)
        said = f"{module} {names} {change.operator} {before}"
        seen[said] = seen.get(said, 0) + 1
        key = hashlib.sha256(f"{said} {seen[said]}".encode()).hexdigest()[:12]
        line = getattr(change.node, "lineno", 0)
        yield Mutation(module, index, line, statement, change.operator, _short(before), key)


def _short(code: str) -> str:
    line = " ".join(code.split())
    return line if len(line) <= 100 else f"{line[:99]}…"


def _surroundings(tree: ast.Module) -> dict[ast.AST, tuple[int, str]]:
    """Return for each node the line of its statement, 0 outside of functions, and the functions and classes around it."""
    found: dict[ast.AST, tuple[int, str]] = {}

    def visit(node: ast.AST, statement: int, names: str, *, inside: bool) -> None:
        if inside and isinstance(node, ast.stmt):
            statement = node.lineno
        found[node] = (statement, names)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = f"{names}.{node.name}"
        in_body = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for name, each in _children(node):
            visit(each, statement, names, inside=in_body if name == "body" else inside)

    visit(tree, 0, "", inside=False)
    return found


def _children(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    for name, value in ast.iter_fields(node):
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, ast.AST):
                yield name, each


# -- what can be changed -----------------------------------------------------------------------------------------------


def changes(node: ast.AST) -> Iterator[Change]:
    """Yield every change of a tree, in a fixed order."""
    for operator in OPERATORS:
        yield from operator(node)
    for name, each in _children(node):
        if name not in _FIELDS_WITHOUT_CODE and not _is_left_out(each):
            yield from changes(each)


def _is_left_out(node: ast.AST) -> bool:
    match node:
        case ast.Assert() | ast.JoinedStr() | ast.Import() | ast.ImportFrom():
            return True
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return bool(_SAID.search(name))
        case ast.FunctionDef(name=name):
            return name in {"__repr__", "__str__"}
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
        case ast.Assign(targets=[ast.Name(id="__all__")]):
            return True
        case ast.Assign(value=ast.Call(func=ast.Name(id=name))):
            return name in {"TypeVar", "ParamSpec", "NewType"}
        case ast.AnnAssign(annotation=ast.Name(id="TypeAlias")):
            return True
    return False


def negate_a_condition(node: ast.AST) -> Iterator[Change]:
    """``if a`` becomes ``if not a``."""
    match node:
        case ast.If() | ast.While() | ast.IfExp():
            yield Change("negate a condition", node.test, partial(_negate, node, "test"), "not ({})")
        case ast.UnaryOp(op=ast.Not()):
            yield Change("negate a condition", node.operand, partial(_negate, node, "operand"), "not ({})")
        case ast.comprehension(ifs=[_, *_]):
            yield Change("negate a condition", node.ifs[0], partial(_negate_first, node), "not ({})")


def _negate(node: ast.AST, name: str) -> None:
    setattr(node, name, ast.UnaryOp(ast.Not(), getattr(node, name)))


def _negate_first(node: ast.comprehension) -> None:
    node.ifs[0] = ast.UnaryOp(ast.Not(), node.ifs[0])


def move_a_comparison(node: ast.AST) -> Iterator[Change]:
    """``a < b`` becomes ``a <= b``, and ``a == b`` becomes ``a != b``."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARISONS:
        yield Change("another comparison", node, partial(_put, node.ops, _COMPARISONS[type(node.ops[0])]()))


def _put(items: list[ast.cmpop], value: ast.cmpop) -> None:
    items[0] = value


def count_off_by_one(node: ast.AST) -> Iterator[Change]:
    """``2`` becomes ``3``, ``True`` becomes ``False``."""
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield Change("the other truth value", node, partial(setattr, node, "value", not node.value))
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield Change("off by one", node, partial(setattr, node, "value", node.value + 1))


def other_arithmetic(node: ast.AST) -> Iterator[Change]:
    """``a + b`` becomes ``a - b``."""
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in _ARITHMETIC and not _is_text(node):
        yield Change("other arithmetic", node, partial(setattr, node, "op", _ARITHMETIC[type(node.op)]()))


def _is_text(node: ast.AST) -> bool:
    """Return whether a sum is one of texts, or a union of types."""
    texts = [each for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    return bool(texts) or any(isinstance(each, ast.JoinedStr) for each in ast.walk(node))


def and_or(node: ast.AST) -> Iterator[Change]:
    """``a and b`` becomes ``a or b``."""
    if isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield Change("and, or", node, partial(setattr, node, "op", other))


def swap_arguments(node: ast.AST) -> Iterator[Change]:
    """``f(a, b)`` becomes ``f(b, a)``."""
    match node:
        case ast.Call(
            func=ast.Name(id="isinstance" | "issubclass" | "cast" | "getattr" | "setattr" | "hasattr" | "max" | "min")
        ):
            return
        case ast.Call(args=[first, second, *_]) if not isinstance(first, ast.Starred) and not isinstance(
            second, ast.Starred
        ):
            yield Change("swap two arguments", node, partial(_swap, node.args))


def _swap(items: list[ast.expr]) -> None:
    items[:2] = items[1], items[0]


def return_nothing(node: ast.AST) -> Iterator[Change]:
    """``return a`` becomes ``return None``."""
    if isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        yield Change("return None", node, partial(setattr, node, "value", ast.Constant(None)))


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def drop_a_statement(node: ast.AST) -> Iterator[Change]:
    """A call, an assignment to an attribute or item, ``raise``, ``continue`` or ``break`` becomes ``pass``."""
    for name in ("body", "orelse", "finalbody"):
        statements = getattr(node, name, None)
        if isinstance(statements, list):
            for index, each in enumerate(statements):
                if _is_droppable(each):
                    yield Change("drop a statement", each, partial(statements.__setitem__, index, ast.Pass()), "pass")


def _is_droppable(node: ast.AST) -> bool:
    match node:
        case ast.Expr(value=ast.Call() | ast.Yield() | ast.YieldFrom()) as statement:
            return not _is_left_out(statement.value)
        case ast.Assign(targets=targets):
            return not any(
                isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
                for each in targets
                for part in ast.walk(each)
            )
        case ast.AugAssign():
            return not _is_text(node)
        case ast.Raise() | ast.Continue() | ast.Break() | ast.Delete():
            return True
    return False


OPERATORS: tuple[Callable[[ast.AST], Iterator[Change]], ...] = (
    negate_a_condition,
    move_a_comparison,
    count_off_by_one,
    other_arithmetic,
    and_or,
    swap_arguments,
    return_nothing,
    drop_a_statement,
)
