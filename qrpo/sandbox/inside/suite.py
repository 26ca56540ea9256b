"""Read tests: find out their form, what they ask of the solution, and which statements are tests.

Accepted forms: assertions in `check(candidate)` or at the top level, test functions of pytest, and
classes of unittest or pytest. Tests may use several functions and classes of the solution, by name
or by `from solution import ...`. A test is

- a statement of `check` or of the top level that asserts something about the solution;
- a test function, once per case of its parameters;
- a test method.

An assertion without any value of the solution, such as `assert True`, is no test. ValueError says
what is not understood.
"""

import ast
import builtins
import copy
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import statements
from .statements import DEFINITIONS, FUNCTIONS, called_name, has_assertion, has_real_assertion, loads, stores

_SET_UP = {"setUp", "setUpClass", "setup_method", "setup_class", "asyncSetUp"}
# what has a meaning in functions only
_LEAVES = (ast.Return, ast.Nonlocal, ast.Global, ast.Yield, ast.YieldFrom, ast.Await)


@dataclass
class Step:
    """A statement of the tests, or a call of a test function."""

    code: types.CodeType
    is_test: bool = False
    needs_assertion: bool = False
    """It has assertions that must run for it to pass."""
    label: str = ""
    stores: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    function: str = ""
    """The test function or class that it calls."""
    case: int = 0
    """Which case of the test function's parameters."""


def read_tests(
    test: str, entry_point: str, preamble_names: set[str]
) -> tuple[list[Step], dict[str, str], str, types.CodeType | None]:
    """The steps; the solution's names by the tests' names; the entry point; code for the arguments
    of all calls of the entry point if they are known in advance."""
    return _Reading(test, entry_point.strip(), preamble_names).result()


class _Reading:
    def __init__(self, test: str, entry_point: str, preamble_names: set[str]):
        tree = ast.parse(test)
        statements.refuse_running_text(tree)
        if any(isinstance(n, ast.Await) or "asyncio" in statements.imported(n) for n in ast.walk(tree)):
            raise ValueError("they are asynchronous")
        body = [node for node in tree.body if not statements.runs_tests(node)]
        self.checks = [node for node in body if statements.takes_candidate(node)]
        if self.checks:
            check_calls = [node for node in body if statements.calls_check(node)]
            body = [node for node in body if node not in check_calls]
            called = [n for node in check_calls for n in ast.walk(node) if isinstance(n, ast.Call)]
            arguments = [ast.unparse(n.args[0]) for n in called if called_name(n) == "check" and n.args]
            entry_point = entry_point or next(iter(arguments), "")
            if not entry_point:
                raise ValueError("check(candidate) needs an entry point, and there is none")
        self.entry = entry_point
        entry = ast.parse(entry_point or "''", mode="eval").body
        self.root = next((n.id for n in ast.walk(entry) if isinstance(n, ast.Name)), "")
        self.last = entry.attr if isinstance(entry, ast.Attribute) else self.root
        self.names: dict[str, str] = {}
        self.missing_imports: list[ast.stmt] = []
        self.body = [_Imports(self).visit(node) for node in body]
        self.functions = {n.name: n for n in self.body if isinstance(n, (*FUNCTIONS, ast.ClassDef))}
        self._find_names(preamble_names)
        self.asserting = self._closure({n for n, node in self.functions.items() if has_assertion(node)})
        self.must_assert = self._closure(
            {n for n, node in self.functions.items() if has_real_assertion(node)}
        )

    def result(self) -> tuple[list[Step], dict[str, str], str, types.CodeType | None]:
        """See `read_tests`."""
        body = self._flat_body()
        tests = [node for node in self.body if node not in self.checks and statements.is_test_function(node)]
        self._refuse_uncalled(tests)
        about = self._closure(set(self.names))
        variables = {name for node in body for name in stores(node)}
        for node in body:
            if not isinstance(node, (*FUNCTIONS, ast.ClassDef)) and loads(node) & about:
                about = self._closure(about | stores(node) | loads(node) & variables)
        used = [name for name in self.names if any(name in loads(node) for node in self.body)]
        entry, known = self._known_calls(body, used) if len(used) == 1 and not tests else (self.entry, None)
        steps = []
        for node in body:
            changed = copy.deepcopy(node)
            changed = statements.Instrumented().visit(known.visit(changed) if known else changed)
            steps.append(self._statement(node, changed, about))
        for node in tests:
            steps += self._calls_of(node, about)
        if not any(step.is_test for step in steps):
            raise ValueError("they assert nothing about the solution")
        names = {name: self.names[name] for name in used}
        return steps, names, entry, known.arguments() if known else None

    def _known_calls(self, body: list[ast.stmt], used: list[str]) -> tuple[str, statements.KnownCalls | None]:
        """The entry point, and its calls if all are known in advance."""
        if self.root in used and self.entry != self.root:  # `Solution().f(1)` calls a new object each time
            known = statements.KnownCalls(self.root, self.entry)
            if any(map(known.occur_in, body)) and known.are_all(body):
                return f"lambda *args, **kwargs: ({self.entry})(*args, **kwargs)", known
        known = statements.KnownCalls(used[0], used[0])
        return (self.names[used[0]], known) if known.are_all(body) else (self.entry, None)

    def _flat_body(self) -> list[ast.stmt]:
        """The statements at the top level, those of `check` among them."""
        body: list[ast.stmt] = [*self.missing_imports, *[n for n in self.body if n not in self.checks]]
        flat = len(self.checks) == 1 and not any(isinstance(n, _LEAVES) for n in ast.walk(self.checks[0]))
        for check in self.checks:
            assert isinstance(check, ast.FunctionDef)
            parameter = check.args.args[0].arg
            self.names[parameter] = self.entry
            body += check.body if flat else [check, *ast.parse(f"{check.name}({parameter})").body]
        return [node for node in body if not isinstance(node, ast.Pass)]

    def is_solution_module(self, module: str, names: Iterable[str] | None) -> bool:
        """Whether tests mean the solution by a module that is not installed; ValueError if they
        mean something else."""
        if module == "pytest" or (module.split(".")[0] != "solution" and statements.is_installed(module)):
            return False
        if module in ("solution", "") or (
            names is not None and (not self.entry or not {"*", self.root, self.last}.isdisjoint(names))
        ):
            return True
        raise ValueError(f"they import {module!r}, which is not installed in the sandbox")

    def _find_names(self, preamble_names: set[str]) -> None:
        """Find the names that only the solution can define."""
        bound = {name for node in self.body for name in stores(node, deep=True)}
        loaded = {name for node in self.body for name in loads(node)}
        if self.root in bound and not self.checks and self.root in self.functions:
            raise ValueError(f"they define the entry point {self.root!r} themselves")
        known = bound | preamble_names | self.names.keys() | {*dir(builtins), "__name__", "__file__"}
        for name in sorted(loaded - known):
            if self.entry and name in ("candidate", self.last):
                self.names[name] = self.entry
            elif name in sys.stdlib_module_names:
                self.missing_imports += ast.parse(f"import {name}").body
            elif name in typing.__all__:
                self.missing_imports += ast.parse(f"from typing import {name}").body
            else:
                self.names[name] = name
        if self.root in loaded - bound:
            self.names.setdefault(self.root, self.root)
        for node in self.body:
            if isinstance(node, ast.ClassDef) and any(loads(base) & self.names.keys() for base in node.bases):
                raise ValueError(f"the class {node.name!r} extends a class of the solution")

    def _closure(self, names: set[str]) -> set[str]:
        """The names and all functions and classes of the tests that use them."""
        found = set(names)
        while more := {n for n, node in self.functions.items() if n not in found and loads(node) & found}:
            found |= more
        return found

    def _refuse_uncalled(self, tests: Sequence[ast.stmt]) -> None:
        """A function that asserts and that nothing calls would be a test that never runs."""
        used = {name for node in self.body for name in loads(node) if getattr(node, "name", "") != name}
        for name, node in self.functions.items():
            ignored = node in tests or node in self.checks or name in used or name.startswith("_")
            if has_assertion(node) and not ignored and not statements.is_fixture(node):
                raise ValueError(f"{name!r} asserts something, and nothing calls it")

    def _statement(self, node: ast.stmt, changed: Any, about: set[str]) -> Step:
        """A step for a statement; `changed` is what runs."""
        defines = isinstance(node, DEFINITIONS)
        read = loads(node)
        asserts = not defines and (has_assertion(node) or bool(read & self.asserting))
        return Step(
            statements.compiled(changed if isinstance(changed, list) else [changed]),
            is_test=asserts and bool(read & about),
            needs_assertion=has_real_assertion(node) or bool(read & self.must_assert),
            label=f"line {node.lineno}",
            stores=[] if defines else sorted(stores(node)),
            loads=sorted(read),
        )

    def _calls_of(self, node: ast.stmt, about: set[str]) -> list[Step]:
        """The steps that call a test function, or the test methods of a class."""
        assert isinstance(node, (*FUNCTIONS, ast.ClassDef))
        targets: list[tuple[str, Any]] = [("", node)] if loads(node) & about else []
        if isinstance(node, ast.ClassDef):
            own = self._methods(node)
            shared = node.name in about and any(
                loads(m) & about for m in own if m.name in _SET_UP or statements.is_fixture(m)
            )
            tests = [m for m in own if m.name.startswith("test")]
            targets = [(m.name, m) for m in tests if shared or self._uses(node, m, about)]
        steps = []
        for method, function in targets:
            if isinstance(function, ast.AsyncFunctionDef):
                raise ValueError(f"the test {function.name!r} is asynchronous")
            marks = [ast.unparse(mark) for mark in (*function.decorator_list, *node.decorator_list)]
            if any("skip" in mark or "expectedFailure" in mark for mark in marks):
                raise ValueError(f"the test {function.name!r} is skipped or expected to fail")
            needs = has_real_assertion(function) or bool(loads(function) & self.must_assert)
            if not needs and not has_assertion(function):
                raise ValueError(f"the test {function.name!r} asserts nothing")
            call = ast.parse(f"{statements.CALL_TEST}({node.name}, {method!r}, __case__)").body
            label = f"{node.name}.{method}" if method else node.name
            read = sorted(loads(function))
            steps.append(Step(statements.compiled(call), True, needs, label, [], read, node.name))
        return steps

    def _methods(self, node: ast.ClassDef) -> list[Any]:
        bases = [self.functions.get(base.id) for base in node.bases if isinstance(base, ast.Name)]
        inherited = [m for base in bases if isinstance(base, ast.ClassDef) for m in self._methods(base)]
        return [*inherited, *[m for m in node.body if isinstance(m, FUNCTIONS)]]

    def _uses(
        self, owner: ast.ClassDef, method: ast.AST, about: set[str], seen: frozenset[str] = frozenset()
    ) -> bool:
        """Whether a method uses the solution, itself or through other methods of its class."""
        called = {n.attr for n in ast.walk(method) if isinstance(n, ast.Attribute)} - seen
        others = [m for m in self._methods(owner) if m.name in called and m is not method]
        return bool(loads(method) & about) or any(self._uses(owner, m, about, seen | called) for m in others)


class _Imports(ast.NodeTransformer):
    """Removes imports from the solution and notes their names."""

    def __init__(self, reading: _Reading):
        self._reading = reading

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt:
        names = {alias.name for alias in node.names}
        if not node.level and not self._reading.is_solution_module(node.module or "", names):
            return node
        self._reading.names |= {a.asname or a.name: a.name for a in node.names if a.name != "*"}
        return ast.copy_location(ast.Pass(), node)

    def visit_Import(self, node: ast.Import) -> ast.stmt:
        ours = [alias for alias in node.names if self._reading.is_solution_module(alias.name, None)]
        self._reading.names |= {alias.asname or alias.name: "" for alias in ours}
        node.names = [alias for alias in node.names if alias not in ours]
        return node if node.names else ast.copy_location(ast.Pass(), node)
