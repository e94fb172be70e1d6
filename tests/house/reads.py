"""Which keys of the configuration the code reads, by following the schema's types through its functions."""

import ast
from collections.abc import Iterator
from pathlib import Path

from gemma4_tpu.commands import ENTRIES
from gemma4_tpu.config import machines, outputs, rollouts, schema, serving, tasks
from gemma4_tpu.config.keys import element_type, field_types, is_group

Key = tuple[str, str]
"""(name of a dataclass of the schema, field)"""
_CLASSES: dict[str, type] = {
    name: value for module in (machines, outputs, rollouts, schema, serving, tasks)
    for name, value in vars(module).items() if is_group(value)
}  # fmt: skip


def keys_read(files: list[Path], more: dict[str, type] | None = None) -> set[Key]:
    """Fields of the schema's dataclasses (and of `more`) that are read in `files`, wherever their types tell."""
    classes = _CLASSES | (more or {})
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    found: set[Key] = set()
    attributes = _Attributes(classes, trees)
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found |= _Function(classes, attributes, node).reads()
    return {(definer(classes[name], field).__name__, field) for name, field in found}


def definer(cls: type, field: str) -> type:
    """The class that defines an inherited field."""
    return next(base for base in reversed(cls.__mro__) if field in vars(base).get("__annotations__", {}))


def _named(annotation: ast.expr | None, classes: dict[str, type]) -> str | None:
    """The class of the schema that an annotation names: `X`, `X | None`, `schema.X`, `list[X]`, "X"."""
    for node in ast.walk(annotation) if annotation is not None else ():
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
        name = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else name
        if name in classes:
            return name
    return None


class _Attributes:
    """Attribute names that hold a configuration wherever they occur: annotated fields, properties, `self.x = config`;
    and the functions that return one."""

    def __init__(self, classes: dict[str, type], trees: list[ast.Module]) -> None:
        self.types: dict[str, set[str]] = {}
        self.returned: dict[str, str] = {}
        nodes = [node for tree in trees for node in ast.walk(tree)]
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        for node in functions:
            if named := _named(node.returns, classes):
                self.returned[node.name] = named
                if any(
                    isinstance(d, ast.Name) and d.id in ("property", "cached_property") for d in node.decorator_list
                ):
                    self.types.setdefault(node.name, set()).add(named)
        for node in nodes:
            if isinstance(node, ast.AnnAssign) and (named := _named(node.annotation, classes)):
                target = node.target
                name = target.id if isinstance(target, ast.Name) else getattr(target, "attr", "")
                self.types.setdefault(name, set()).add(named)
        for node in functions:
            for name, held in _Function(classes, self, node).attributes().items():
                self.types.setdefault(name, set()).update(held)


class _Function:
    """The reads of one function, nested ones included."""

    def __init__(self, classes: dict[str, type], attributes: _Attributes, function: ast.AST) -> None:
        self._classes, self._attributes = classes, attributes
        self._names: dict[str, set[str]] = {}
        self._nodes = list(ast.walk(function))
        for node in self._nodes:
            if isinstance(node, ast.AnnAssign) and (named := _named(node.annotation, self._classes)):
                self._names.setdefault(ast.unparse(node.target), set()).add(named)
            for argument in _arguments(node):
                if named := _named(argument.annotation, self._classes):
                    self._names.setdefault(argument.arg, set()).add(named)
        for _ in range(3):  # names that are given by names that are given by names
            for target, value in self._bindings():
                if isinstance(target, ast.Name) and (held := self._types(value)):
                    self._names.setdefault(target.id, set()).update(held)

    def attributes(self) -> dict[str, set[str]]:
        """Attributes that are given a configuration here."""
        given = {t.attr: self._types(v) for t, v in self._bindings() if isinstance(t, ast.Attribute)}
        return {name: held for name, held in given.items() if held}

    def _bindings(self) -> list[tuple[ast.expr, ast.expr]]:
        return [pair for node in self._nodes for pair in _bindings(node)]

    def reads(self) -> set[Key]:
        """(class, field) of every read whose owner's type is known."""
        return {
            (cls, node.attr)
            for node in self._nodes
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
            for cls in self._types(node.value)
            if node.attr in field_types(self._classes[cls])
        }

    def _types(self, node: ast.expr) -> set[str]:
        """The classes of the schema that an expression may have (of its items, for a list)."""
        if isinstance(node, ast.Name):
            return self._names.get(node.id, set())
        if isinstance(node, ast.Subscript | ast.Starred | ast.Await):
            return self._types(node.value)
        if isinstance(node, ast.IfExp):
            return self._types(node.body) | self._types(node.orelse)
        if isinstance(node, ast.BoolOp):
            return set().union(*map(self._types, node.values))
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if called in self._attributes.returned:
                return {self._attributes.returned[called]}
            if called == "load_train":
                return {"TrainRoot"}
            if called == "load" and len(node.args) == 2 and isinstance(node.args[1], ast.Name):  # load(argv, TRAIN)
                return {ENTRIES[name].schema.__name__ for name in {node.args[1].id.lower()} & set(ENTRIES)}
            if called in ("enumerate", "replace", "cast", "reversed", "sorted") and node.args:
                return set().union(*map(self._types, node.args))
            return {called} & set(self._classes)
        if isinstance(node, ast.Attribute):
            owners = self._types(node.value)
            if node.attr == "root":  # of a `Loaded[Root, Checks]`
                return owners
            inner = [field_types(self._classes[cls]).get(node.attr) for cls in owners]
            inner = [element_type(kind) or kind for kind in inner if kind is not None]
            held = {kind.__name__ for kind in inner if is_group(kind)} & set(self._classes)
            return held or (set() if owners else self._attributes.types.get(node.attr, set()))
        return set()


def _arguments(node: ast.AST) -> list[ast.arg]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return []
    a = node.args
    return [*a.posonlyargs, *a.args, *a.kwonlyargs]


def _bindings(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """(target, what it is given) of an assignment, a loop or a comprehension."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                yield from zip(target.elts, node.value.elts, strict=False)
            else:
                yield target, node.value
    elif isinstance(node, ast.NamedExpr):
        yield node.target, node.value
    elif isinstance(node, ast.For | ast.comprehension):
        yield from ((name, node.iter) for name in ast.walk(node.target) if isinstance(name, ast.Name))
