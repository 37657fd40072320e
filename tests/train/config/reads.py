"""Which fields of which classes a program reads, found in its source.

A small type inference: annotations of parameters, fields and return values say of which class an object is, and
assignments, loops, calls and `dataclasses.replace` pass that on. A container counts as its element: of
`runs: list[TrainConfig]`, `runs[0].seq_len` reads TrainConfig. What it cannot follow it does not count.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

# Reads that are no use of a value: a class checks its own fields here.
CHECKS = "__post_init__"


class Program:
    """All modules of some packages: `reads` holds "MODULE.CLASS.FIELD" of every read outside `__post_init__`."""

    def __init__(self, root: Path, packages: Iterable[str]):
        self.reads: set[str] = set()
        self.classes: dict[str, dict[str, str]] = {}  # class -> field, property or method -> class
        self._functions: dict[str, str] = {}  # function -> class of its result
        self._names: dict[str, dict[str, str]] = {}  # module -> name in it -> what it stands for
        trees = {}
        for package in packages:
            for path in sorted((root / package).rglob("*.py")):
                module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
                trees[module] = ast.parse(path.read_text(encoding="utf-8"))
                self._names[module] = self._names_of(module, trees[module])
        annotations = [entry for module, tree in trees.items() for entry in self._declare(module, tree)]
        for entry in annotations:
            self._resolve(*entry)
        for _ in range(3):  # what objects hold is known after a round, what is made of that after the next
            self.reads.clear()
            for module, tree in trees.items():
                _Scope(self, module, {}).block(tree.body)

    def qualified(self, module: str, name: str) -> str:
        """The full name of what `name` stands for in a module, past re-exports."""
        found = self._names[module].get(name, name)
        owner, _, last = found.rpartition(".")
        while owner in self._names and self._names[owner].get(last, found) != found:
            found = self._names[owner][last]
            owner, _, last = found.rpartition(".")
        return found

    def annotated(self, module: str, annotation: ast.expr | None) -> str | None:
        """The first class of the program that an annotation names."""
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        for node in ast.walk(annotation) if annotation is not None else ():
            if isinstance(node, ast.Name) and (found := self.qualified(module, node.id)) in self.classes:
                return found
        return None

    def result_of(self, function: str) -> str | None:
        return function if function in self.classes else self._functions.get(function)

    @staticmethod
    def _names_of(module: str, tree: ast.Module) -> dict[str, str]:
        names = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        own = (n for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef)))
        return names | {node.name: f"{module}.{node.name}" for node in own}

    def _declare(self, module: str, tree: ast.Module) -> list[tuple]:
        """Register the classes of a module; returns its annotations, which may name classes of any module."""
        annotations: list[tuple] = []
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                self.classes[f"{module}.{node.name}"] = {}
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        annotations.append((f"{module}.{node.name}", item.target.id, module, item.annotation))
                    elif isinstance(item, ast.FunctionDef):
                        annotations.append((f"{module}.{node.name}", item.name, module, item.returns))
            elif isinstance(node, ast.FunctionDef):
                annotations.append((f"{module}.{node.name}", None, module, node.returns))
        return annotations

    def _resolve(self, owner: str, name: str | None, module: str, annotation: ast.expr | None) -> None:
        found = self.annotated(module, annotation) or ""
        if name is None:
            self._functions[owner] = found
        else:
            self.classes[owner][name] = found


class _Scope:
    """The names of one function and the classes of what they stand for."""

    def __init__(self, program: Program, module: str, names: dict[str, str], owner: str | None = None, counts=True):
        self._program, self._module, self._names = program, module, names
        self._owner, self._counts = owner, counts

    def block(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, node: ast.AST) -> None:
        if isinstance(node, ast.ClassDef):
            owner = f"{self._module}.{node.name}"
            _Scope(self._program, self._module, dict(self._names), owner).block(node.body)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            self._function(node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            kind = self.infer(node.value) if node.value is not None else None
            if isinstance(node, ast.AnnAssign):
                kind = self._program.annotated(self._module, node.annotation) or kind
            for target in targets:
                self._bind(target, kind, node.value)
        elif isinstance(node, (ast.For, ast.comprehension)):
            self._bind(node.target, self.infer(node.iter), None)
            self._children(node, skip=(node.target, node.iter))
        elif isinstance(node, ast.withitem):
            kind = self.infer(node.context_expr)
            if node.optional_vars is not None:
                self._bind(node.optional_vars, kind, None)
        elif isinstance(node, ast.expr):
            self.infer(node)
        else:
            self._children(node)

    def _children(self, node: ast.AST, skip: tuple = ()) -> None:
        for child in ast.iter_child_nodes(node):
            if child not in skip:
                self._statement(child)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        names = dict(self._names)
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for argument in arguments:
            names[argument.arg] = self._program.annotated(self._module, argument.annotation) or ""
        if self._owner is not None and arguments and arguments[0].arg == "self":
            names["self"] = self._owner
        inner = _Scope(self._program, self._module, names, None, self._counts and node.name != CHECKS)
        inner.block([*node.decorator_list, *node.body])

    def _bind(self, target: ast.expr, kind: str | None, value: ast.expr | None) -> None:
        if isinstance(target, ast.Name):
            self._names[target.id] = kind or ""
        elif isinstance(target, ast.Tuple):
            values = value.elts if isinstance(value, ast.Tuple) else [None] * len(target.elts)
            for part, of in zip(target.elts, values):
                self._bind(part, kind if of is None else self.infer(of), of)
        elif isinstance(target, ast.Attribute) and (owner := self.infer(target.value)):
            if kind and not self._program.classes[owner].get(target.attr):
                self._program.classes[owner][target.attr] = kind

    def infer(self, node: ast.expr | None) -> str | None:
        """The class of an expression, or None; notes every read inside it."""
        if isinstance(node, ast.Name):
            return self._names.get(node.id) or None
        if isinstance(node, ast.Attribute):
            return self._read(self.infer(node.value), node.attr)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
            inner = _Scope(self._program, self._module, dict(self._names), None, self._counts)
            for generator in node.generators:
                inner._statement(generator)
            return inner.infer(node.value if isinstance(node, ast.DictComp) else node.elt) or (
                inner.infer(node.key) if isinstance(node, ast.DictComp) else None
            )
        if isinstance(node, ast.Lambda):
            inner = _Scope(self._program, self._module, dict(self._names), None, self._counts)
            return inner.infer(node.body)
        if isinstance(node, ast.NamedExpr):
            kind = self.infer(node.value)
            self._bind(node.target, kind, node.value)
            return kind
        children = [] if node is None else [c for c in ast.iter_child_nodes(node) if isinstance(c, ast.expr)]
        kinds = [self.infer(child) for child in children]
        if isinstance(node, (ast.BoolOp, ast.IfExp, ast.Subscript, ast.List, ast.Tuple, ast.Starred, ast.Dict)):
            return next((kind for kind in kinds if kind), None)
        return None

    def _read(self, kind: str | None, name: str) -> str | None:
        if kind is None or kind not in self._program.classes:
            return None
        if self._counts:
            self._program.reads.add(f"{kind}.{name}")
        return self._program.classes[kind].get(name) or None

    def _class_in(self, node: ast.Call) -> str | None:
        """The class that a call such as `from_mapping(TrainConfig, values)` makes an object of."""
        first = node.args[0] if node.args else None
        name = self._program.qualified(self._module, first.id) if isinstance(first, ast.Name) else ""
        return name if name in self._program.classes else None

    def _call(self, node: ast.Call) -> str | None:
        given = [self.infer(argument) for argument in [*node.args, *(word.value for word in node.keywords)]]
        if isinstance(node.func, ast.Name):
            name = self._program.qualified(self._module, node.func.id)
            if name == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                return self._read(given[0], node.args[1].value)
            if name == "dataclasses.replace" or name in ("list", "tuple", "sorted", "reversed", "iter", "next"):
                return given[0] if given else None
            return self._names.get(node.func.id) or self._program.result_of(name) or self._class_in(node)
        if isinstance(node.func, ast.Attribute):
            path = ast.unparse(node.func)
            head, _, rest = path.partition(".")
            name = f"{self._program.qualified(self._module, head)}.{rest}"
            if name == "dataclasses.replace":
                return given[0] if given else None
            return self.infer(node.func) or self._program.result_of(name)
        return self.infer(node.func)
