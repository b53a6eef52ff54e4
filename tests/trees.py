"""Syntax trees as the architecture tests read them: what a module imports, and what it assigns, deletes and calls."""

import ast
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeVar

from attrs import field, frozen

Package = Literal["engine", "algorithms"]
Place = Literal["module", "typing", "function"]
Node = TypeVar("Node", bound=ast.AST)


@frozen
class Import:
    """One import: where the name comes from, how many dots stand before it, and what is taken from it."""

    source: str
    names: tuple[str, ...]
    dots: int
    line: int
    place: Place


@frozen
class Breach:
    """What a rule objects to."""

    line: int
    what: str


@frozen(eq=False)
class Module:
    """A module of one of the packages, parsed."""

    package: Package
    name: str
    source: str
    tree: ast.Module = field(init=False)
    imports: tuple[Import, ...] = field(init=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "tree", ast.parse(self.source))
        object.__setattr__(self, "imports", tuple(_imports(self.tree)))

    def nodes(self, kind: type[Node]) -> Iterator[Node]:
        """Yield every node of a kind."""
        return (node for node in ast.walk(self.tree) if isinstance(node, kind))

    def is_one_of(self, names: Iterable[str]) -> bool:
        """Return whether this is one of the engine's modules called so."""
        return self.package == "engine" and self.name in set(names)


def _imports(node: ast.AST, place: Place = "module") -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(each.name, (), 0, child.lineno, place) for each in child.names)
        elif isinstance(child, ast.ImportFrom):
            names = tuple(each.name for each in child.names)
            yield Import(child.module or "", names, child.level, child.lineno, place)
        elif isinstance(child, ast.Call) and last_name(child.func) in {"import_module", "__import__"}:
            if child.args and isinstance(text := child.args[0], ast.Constant) and isinstance(text.value, str):
                yield Import(text.value, (), 0, child.lineno, place)
            yield from _imports(child, place)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _imports(child, "function")
        elif isinstance(child, ast.If) and last_name(child.test) == "TYPE_CHECKING":
            yield from (found for part in child.body for found in _imports(ast.Module([part], []), "typing"))
            yield from (found for part in child.orelse for found in _imports(ast.Module([part], []), place))
        else:
            yield from _imports(child, place)


def last_name(node: ast.AST) -> str:
    """Return ``c`` for ``a.b.c``, ``a.b.c[0]`` and ``a.b.c()``."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Subscript(value=inner) | ast.Call(func=inner) | ast.Starred(value=inner):
            return last_name(inner)
    return ""


def dotted(node: ast.AST) -> str:
    """Return ``"a.b.c"`` for a chain of plain attributes, else an empty string."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=inner, attr=name) if base := dotted(inner):
            return f"{base}.{name}"
    return ""


def chain(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the node and what it is reached through: for ``a.b[0].c`` also ``a.b[0]``, ``a.b`` and ``a``."""
    yield node
    match node:
        case ast.Attribute(value=inner) | ast.Subscript(value=inner) | ast.Starred(value=inner):
            yield from chain(inner)
        case ast.Call(func=inner):
            yield from chain(inner)


def is_self(node: ast.AST) -> bool:
    """Return whether this is the object whose method is being defined."""
    return isinstance(node, ast.Name) and node.id in {"self", "cls"}


def is_super(node: ast.AST) -> bool:
    """Return whether this is ``super()``."""
    return isinstance(node, ast.Call) and last_name(node.func) == "super"


_MUTATORS = frozenset(
    {"__delitem__", "__setitem__", "add", "append", "clear", "extend", "insert", "pop", "popitem", "remove"}
    | {"reverse", "setdefault", "sort", "update"}
)


def stores(module: Module) -> Iterator[ast.Attribute | ast.Subscript]:
    """Yield every attribute and item that is assigned or deleted, in whatever statement."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            yield node


def calls(module: Module, *names: str) -> Iterator[ast.Call]:
    """Yield every call of a method or function with one of these names."""
    return (node for node in module.nodes(ast.Call) if last_name(node.func) in names)


def writes(module: Module, is_target: Callable[[ast.AST], bool]) -> Iterator[ast.AST]:
    """Yield what changes a target, or an item of it, also through the variable of a loop over it."""
    loops = [
        (node.target, node.iter) for node in ast.walk(module.tree) if isinstance(node, ast.For | ast.comprehension)
    ]
    aliases = {
        name.id
        for target, source in loops
        if any(is_target(node) for node in ast.walk(source))
        for name in ast.walk(target)
        if isinstance(name, ast.Name)
    }
    assigned = (node for node in module.nodes(ast.Assign) if any(is_target(each) for each in chain(node.value)))
    aliases |= {name.id for node in assigned for name in node.targets if isinstance(name, ast.Name)}

    def reaches(node: ast.AST) -> bool:
        return is_target(node) or (isinstance(node, ast.Name) and node.id in aliases)

    for node in stores(module):
        if any(reaches(each) for each in chain(node)):
            yield node
    for call in calls(module, *_MUTATORS):
        if isinstance(call.func, ast.Attribute) and any(reaches(each) for each in chain(call.func.value)):
            yield call


def line_of(node: ast.AST) -> int:
    """Return the line of a node that has one."""
    return getattr(node, "lineno", 0)
