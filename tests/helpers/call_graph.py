"""Which functions of ours a function may call, read from the source: what is needed to know which errors a command can end with.

Names are followed through imports, also those inside functions. A method is called where its class is reachable and something reachable
reads an attribute of its name. So more is found than is called, and next to nothing less.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("graphhash", "pipeline", "serving")
# A definition: its module, and its name, with the class before it.
Key = tuple[str, str]


@dataclass
class CallGraph:
    """Definitions of the packages below a folder."""

    root: Path
    defined: dict[Key, ast.stmt] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)
    _imported: dict[str, dict[str, Key]] = field(default_factory=dict)
    _methods: dict[str, list[Key]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        trees = {}
        for file in (file for package in PACKAGES for file in (self.root / package).rglob("*.py")):
            parts = file.relative_to(self.root).with_suffix("").parts
            trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(file.read_text())
        self.modules = set(trees)
        for module, tree in trees.items():
            self._imported[module] = dict(self._imports(tree.body))
            for statement in tree.body:
                self._define(module, statement)

    def _define(self, module: str, statement: ast.stmt) -> None:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            self.defined[module, statement.name] = statement
        elif isinstance(statement, ast.ClassDef):
            self.defined[module, statement.name] = statement
            for part in statement.body:
                if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    key = (module, f"{statement.name}.{part.name}")
                    self.defined[key] = part
                    self._methods.setdefault(part.name, []).append(key)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            self.defined |= {(module, target.id): statement for target in targets if isinstance(target, ast.Name)}

    def _imports(self, body: Iterable[ast.AST]) -> Iterator[tuple[str, Key]]:
        """Name -> (module, name there), or (module, "") for a module."""
        for node in body:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield alias.asname or alias.name.partition(".")[0], (alias.name if alias.asname else "", "")
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield (
                        alias.asname or alias.name,
                        (inner, "") if inner in self.modules else (node.module, alias.name),
                    )

    def _resolved(self, module: str, name: str, local: dict[str, Key]) -> Key | None:
        """The definition or module that a name means in a module."""
        for _ in range(9):
            if name not in local and (module, name) in self.defined:
                return module, name
            found = local.get(name) or self._imported.get(module, {}).get(name)
            if found is None or found[1] == "":
                return found
            (module, name), local = found, {}
        return None

    def reachable(self, start: Key, skip: Iterable[str] = ()) -> set[Key]:
        """The definitions that a function may come to.

        Args:
            skip: beginnings of modules that it does not come to.
        """
        skipped, seen, attributes, todo = tuple(skip), set[Key](), set[str](), [start]
        while todo:
            key = todo.pop()
            if key in seen or key[0].startswith(skipped):
                continue
            seen.add(key)
            found, read = self._mentioned(key)
            attributes |= read
            todo += found
            if not todo:
                called = (method for name in attributes for method in self._methods.get(name, ()))
                todo = [m for m in called if m not in seen and (m[0], m[1].partition(".")[0]) in seen]
                todo = [m for m in todo if not m[0].startswith(skipped)]
        return seen

    def _mentioned(self, key: Key) -> tuple[list[Key], set[str]]:
        """Definitions that one mentions, and names of attributes that it reads of values that are not known."""
        module, node = key[0], self.defined[key]
        parts: list[ast.AST] = [node]
        found: list[Key] = []
        if isinstance(node, ast.ClassDef):
            functions = [part for part in node.body if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))]
            parts = [part for part in [*node.bases, *node.decorator_list, *node.body] if part not in functions]
            found = [(module, f"{node.name}.{part.name}") for part in functions if part.name.startswith("__")]
        walked = [inner for part in parts for inner in ast.walk(part)]
        local, read = dict(self._imports(walked)), set[str]()
        for inner in walked:
            if isinstance(inner, ast.Name):
                resolved = self._resolved(module, inner.id, local)
                found += [resolved] if resolved in self.defined else []
            elif isinstance(inner, ast.Attribute):
                owner = inner.value.id if isinstance(inner.value, ast.Name) else ""
                place = self._resolved(module, owner, local)
                if place is not None and place[1] == "":
                    resolved = self._resolved(place[0], inner.attr, {})
                    found += [resolved] if resolved in self.defined else []
                else:
                    read.add(inner.attr)
        return found, read
