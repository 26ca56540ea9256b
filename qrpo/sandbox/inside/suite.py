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
import importlib.util
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ASSERTED", "CALL_TEST", "CAPTURE", "HANDLED", "REPLAY", "Step", "read_tests"]

REPLAY, CAPTURE, ASSERTED, HANDLED, CALL_TEST = "__replayed__", "__captured__", "__asserted__", "__handled__", "__call_test__"  # fmt: skip
_ENTRY = "__entry_point__"
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_NESTED = (ast.Lambda, *_FUNCTIONS, ast.ClassDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_RUN_TEXT = {"eval", "exec", "compile", "__import__"}
_RUN_TEXT_MODULES = {
    "pickle",
    "marshal",
    "shelve",
    "importlib",
    "runpy",
    "code",
    "codeop",
    "ctypes",
    "builtins",
    "dill",
}
_SET_UP = {"setUp", "setUpClass", "setup_method", "setup_class", "asyncSetUp"}


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
    test: str, entry_point: str, preamble_names: set[str], *, live: bool = False
) -> tuple[list[Step], dict[str, str], str, types.CodeType | None]:
    """The steps; the solution's names by the tests' names; the entry point; code for the list of
    all calls if they are known in advance and not to be made `live`."""
    return _Reading(test, entry_point.strip(), preamble_names).result(live)


class _Reading:
    def __init__(self, test: str, entry_point: str, preamble_names: set[str]):
        tree = ast.parse(test)
        _refuse_running_text(tree)
        self.entry = entry_point
        entry_tree = ast.parse(entry_point, mode="eval").body if entry_point else None
        self.root = (
            next((n.id for n in ast.walk(entry_tree) if isinstance(n, ast.Name)), "") if entry_tree else ""
        )
        self.last = entry_tree.attr if isinstance(entry_tree, ast.Attribute) else self.root
        self.names: dict[str, str] = {}
        self.missing_imports: list[ast.stmt] = []
        body = [node for node in tree.body if not _runs_tests(node)]
        calls = [n for n in body if isinstance(n, ast.Expr) and _called_name(n.value) == "check"]
        self.checks = [node for node in body if _takes_candidate(node)]
        if self.checks and not self.entry:
            arguments = [n.value.args[0] for n in calls if isinstance(n.value, ast.Call) and n.value.args]
            if not arguments:
                raise ValueError("check(candidate) needs an entry point, and there is none")
            self.entry = ast.unparse(arguments[0])
            self.root = self.last = next(n.id for n in ast.walk(arguments[0]) if isinstance(n, ast.Name))
        body = [node for node in body if node not in calls or not self.checks]
        if entry_tree is not None and any(isinstance(n, ast.Call) for n in ast.walk(entry_tree)):
            spelled = _Spelled(ast.dump(entry_tree))
            body = [spelled.visit(node) for node in body]
            if spelled.found:
                self.names[_ENTRY] = f"lambda *a, **k: ({self.entry})(*a, **k)"
        self.body = [self._without_solution_imports(node) for node in body]
        self._find_names(preamble_names)
        self.functions = {n.name: n for n in self.body if isinstance(n, (*_FUNCTIONS, ast.ClassDef))}
        self.asserting = self._closure({n for n, node in self.functions.items() if _has_assertion(node)})
        self.must_assert = self._closure(
            {n for n, node in self.functions.items() if _has_real_assertion(node)}
        )

    def result(self, live: bool) -> tuple[list[Step], dict[str, str], str, types.CodeType | None]:
        """See `read_tests`."""
        body = self._flat_body()
        tests = [node for node in self.body if node not in self.checks and _is_test_function(node)]
        about = self._closure(set(self.names))
        variables = {name for node in body for name in _stores(node)}
        for node in body:
            if not isinstance(node, (*_FUNCTIONS, ast.ClassDef)) and _loads(node) & about:
                about = self._closure(about | _stores(node) | _loads(node) & variables)
        self._refuse_uncalled(tests)
        used = [name for name in self.names if any(name in _loads(node) for node in self.body)]
        calls = None
        if not live and len(used) == 1 and not tests and _known_in_advance(body, used[0]):
            replayed = _Replayed(used[0])
            kept = [copy.deepcopy(node) for node in body]
            body = [replayed.visit(node) for node in body]
            calls = _captures(replayed.calls)
            steps = [self._statement(*both, about) for both in zip(kept, body, strict=True)]
            for step in steps:
                step.needs_assertion = False  # the whole statement is one
        else:
            steps = [
                self._statement(node, _Instrumented().visit(copy.deepcopy(node)), about) for node in body
            ]
            for node in tests:
                steps += self._calls_of(node, about)
        if not any(step.is_test for step in steps):
            raise ValueError("they assert nothing about the solution")
        names = {name: self.names[name] for name in used}
        entry = names[used[0]] if calls is not None else self.entry
        return steps, names, entry, calls

    def _flat_body(self) -> list[ast.stmt]:
        """The statements at the top level, those of `check` among them."""
        body: list[ast.stmt] = [*self.missing_imports, *[n for n in self.body if n not in self.checks]]
        flat = len(self.checks) == 1 and not any(_leaves(node) for node in ast.walk(self.checks[0]))
        for check in self.checks:
            assert isinstance(check, ast.FunctionDef)
            parameter = check.args.args[0].arg
            self.names[parameter] = self.entry
            if flat:
                body += check.body
            else:
                body += [check, *ast.parse(f"{check.name}({parameter})").body]
        return [node for node in body if not isinstance(node, ast.Pass)]

    def _without_solution_imports(self, node: ast.stmt) -> ast.stmt:
        return _Imports(self).visit(node)  # type: ignore[no-any-return]

    def is_solution_module(self, module: str, imported: Iterable[str] | None) -> bool:
        """Whether tests mean the solution by a module that is not installed; ValueError if they
        mean something else."""
        if module == "pytest" or (module.split(".")[0] != "solution" and _is_installed(module)):
            return False
        if module in ("solution", "") or (
            imported is not None and (not self.entry or not {"*", self.root, self.last}.isdisjoint(imported))
        ):
            return True
        raise ValueError(f"they import {module!r}, which is not installed in the sandbox")

    def _find_names(self, preamble_names: set[str]) -> None:
        """Find the names that only the solution can define."""
        bound = {name for node in self.body for name in _stores(node, deep=True)}
        loaded = {name for node in self.body for name in _loads(node)}
        if self.root in bound and not self.checks and self.root in self.functions:
            raise ValueError(f"they define the entry point {self.root!r} themselves")
        unknown = (
            loaded
            - bound
            - set(dir(builtins))
            - preamble_names
            - {"__name__", "__file__"}
            - self.names.keys()
        )
        for name in sorted(unknown):
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
            if isinstance(node, ast.ClassDef) and any(
                _loads(base) & self.names.keys() for base in node.bases
            ):
                raise ValueError(f"the class {node.name!r} extends a class of the solution")

    def _closure(self, names: set[str]) -> set[str]:
        """The names and all functions and classes of the tests that use them."""
        found = set(names)
        while more := {n for n, node in self.functions.items() if n not in found and _loads(node) & found}:
            found |= more
        return found

    def _refuse_uncalled(self, tests: Sequence[ast.stmt]) -> None:
        """A function that asserts and that nothing calls would be a test that never runs."""
        used = {name for node in self.body for name in _loads(node) if getattr(node, "name", "") != name}
        for name, node in self.functions.items():
            ignored = node in tests or node in self.checks or name in used or name.startswith("_")
            if _has_assertion(node) and not ignored and not _is_fixture(node):
                raise ValueError(f"{name!r} asserts something, and nothing calls it")

    def _statement(self, node: ast.stmt, changed: Any, about: set[str]) -> Step:
        """A step for a statement; `changed` is what runs."""
        definition = isinstance(node, (*_FUNCTIONS, ast.ClassDef, ast.Import, ast.ImportFrom))
        loads = _loads(node)
        asserts = not definition and (_has_assertion(node) or bool(loads & self.asserting))
        needs = _has_real_assertion(node) or bool(loads & self.must_assert)
        return Step(
            _compiled(changed if isinstance(changed, list) else [changed]),
            is_test=asserts and bool(loads & about),
            needs_assertion=needs,
            label=f"line {node.lineno}",
            stores=[] if definition else sorted(_stores(node)),
            loads=sorted(loads),
        )

    def _calls_of(self, node: ast.stmt, about: set[str]) -> list[Step]:
        """The steps that call a test function, or the test methods of a class."""
        if isinstance(node, ast.ClassDef):
            methods = [m for m in self._methods(node) if m.name.startswith("test")]
            set_up = [m for m in self._methods(node) if m.name in _SET_UP or _is_fixture(m)]
            shared = bool({node.name} & about) and any(_loads(m) & about for m in set_up)
            targets = [(node.name, m.name, m) for m in methods if shared or self._uses(node, m, about)]
        else:
            targets = [(node.name, "", node)] if _loads(node) & about else []  # type: ignore[attr-defined]
        steps = []
        for owner, method, function in targets:
            if isinstance(function, ast.AsyncFunctionDef):
                raise ValueError(f"the test {function.name!r} is asynchronous")
            needs = _has_real_assertion(function) or bool(_loads(function) & self.must_assert)
            if not needs and not _has_assertion(function):
                raise ValueError(f"the test {function.name!r} asserts nothing")
            call = ast.parse(f"{CALL_TEST}({owner}, {method!r}, __case__)").body
            label = f"{owner}.{method}" if method else owner
            steps.append(Step(_compiled(call), True, needs, label, [], sorted(_loads(function)), owner))
        return steps

    def _methods(self, node: ast.ClassDef) -> list[Any]:
        inherited = [
            self.functions[b.id] for b in node.bases if isinstance(b, ast.Name) and b.id in self.functions
        ]
        return [
            *[m for base in inherited if isinstance(base, ast.ClassDef) for m in self._methods(base)],
            *[m for m in node.body if isinstance(m, _FUNCTIONS)],
        ]

    def _uses(
        self, owner: ast.ClassDef, method: ast.AST, about: set[str], seen: frozenset[str] = frozenset()
    ) -> bool:
        """Whether a method uses the solution, itself or through other methods of its class."""
        called = {n.attr for n in ast.walk(method) if isinstance(n, ast.Attribute)} - seen
        others = [m for m in self._methods(owner) if m.name in called and m is not method]
        return bool(_loads(method) & about) or any(self._uses(owner, m, about, seen | called) for m in others)


def _refuse_running_text(tree: ast.Module) -> None:
    """Refuse tests that could run what a solution returns, in the judge's process."""
    for node in ast.walk(tree):
        found = ""
        if isinstance(node, ast.Name) and node.id in _RUN_TEXT:
            found = node.id
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [getattr(node, "module", None) or "", *[alias.name for alias in node.names]]
            found = next((m for m in modules if m.split(".")[0] in _RUN_TEXT_MODULES), "")
        elif isinstance(node, ast.Attribute) and node.attr in (
            "__globals__",
            "__builtins__",
            "__subclasses__",
            "__code__",
        ):
            found = node.attr
        if found:
            raise ValueError(f"they use {found!r} in line {node.lineno}, and tests may not run text as code")  # type: ignore[attr-defined]


def _is_installed(module: str) -> bool:
    root = module.split(".")[0]
    if root in sys.stdlib_module_names:
        return True
    try:
        return importlib.util.find_spec(root) is not None and root != "inside"
    except (ImportError, ValueError):
        return False


def _runs_tests(node: ast.stmt) -> bool:
    """Whether a statement only starts the tests: `if __name__ == "__main__"`, `unittest.main()`."""
    if isinstance(node, ast.If) and any(
        isinstance(n, ast.Name) and n.id == "__name__" for n in ast.walk(node.test)
    ):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        name = ast.unparse(node.value.func)
        return name in ("unittest.main", "pytest.main") or (name.startswith("test") and not node.value.args)
    return False


def _called_name(node: ast.AST) -> str:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def _takes_candidate(node: ast.stmt) -> bool:
    if not isinstance(node, ast.FunctionDef):
        return False
    arguments = node.args
    plain = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    if node.name == "check" and (len(plain) != 1 or arguments.vararg or arguments.kwarg):
        if len(plain) - len(arguments.defaults) == 1 and not arguments.vararg and not arguments.kwarg:
            return True
        raise ValueError("check takes one argument, the candidate")
    return node.name == "check" or plain == ["candidate"]


def _is_test_function(node: ast.stmt) -> bool:
    if isinstance(node, _FUNCTIONS):
        return node.name.startswith("test") and not _is_fixture(node)
    if isinstance(node, ast.ClassDef):
        cases = any("TestCase" in ast.unparse(base) for base in node.bases)
        return (
            cases
            or node.name.startswith("Test")
            or any(m.name.startswith("test") for m in node.body if isinstance(m, _FUNCTIONS))
        )
    return False


def _is_fixture(node: Any) -> bool:
    return any("fixture" in ast.unparse(decorator) for decorator in node.decorator_list)


def _is_assertion_call(node: ast.AST) -> bool:
    """`self.assertEqual(...)`, `with pytest.raises(...)`, and others of their kind."""
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else _called_name(node)
    return name.startswith("assert") or name == "raises"


def _is_real_assertion(node: ast.AST) -> bool:
    """An assertion about a value, not a mark such as `assert False` in the place of a failure."""
    return _is_assertion_call(node) or (
        isinstance(node, ast.Assert) and not isinstance(node.test, ast.Constant)
    )


def _has_real_assertion(node: ast.AST) -> bool:
    return any(map(_is_real_assertion, ast.walk(node)))


def _has_assertion(node: ast.AST) -> bool:
    return any(
        _is_assertion_call(n)
        or isinstance(n, ast.Raise)
        or (isinstance(n, ast.Assert) and not (isinstance(n.test, ast.Constant) and n.test.value))
        or (isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == "fail")
        for n in ast.walk(node)
    )


def _leaves(node: ast.AST) -> bool:
    return isinstance(node, (ast.Return, ast.Nonlocal, ast.Global, ast.Yield, ast.YieldFrom, ast.Await))


def _loads(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def _stores(node: ast.AST, *, deep: bool = False) -> set[str]:
    """The names that a statement binds; with `deep`, those in functions too."""
    found: set[str] = set()
    for n in ast.walk(node):
        if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load):
            found.add(n.id)
        elif isinstance(n, ast.ExceptHandler) and n.name:
            found.add(n.name)
        elif isinstance(n, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in n.names}
        elif isinstance(n, (*_FUNCTIONS, ast.ClassDef)):
            found.add(n.name)
        elif isinstance(n, ast.arg) and deep:
            found.add(n.arg)
        elif isinstance(n, (ast.MatchAs, ast.MatchStar)) and n.name:
            found.add(n.name)
    return found


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


class _Spelled(ast.NodeTransformer):
    """Replaces the entry point's expression, spelled out in a test, by a name."""

    def __init__(self, dumped: str):
        self._dumped = dumped
        self.found = False

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if ast.dump(node) != self._dumped:
            return self.generic_visit(node)
        self.found = True
        return ast.copy_location(ast.Name(_ENTRY, ast.Load()), node)


class _Instrumented(ast.NodeTransformer):
    """Reports every assertion that has passed and every exception that is caught."""

    def visit_Assert(self, node: ast.Assert) -> Any:
        return [node, _call(ASSERTED, node)] if _is_real_assertion(node) else node

    def visit_Expr(self, node: ast.Expr) -> Any:
        return [node, _call(ASSERTED, node)] if _is_assertion_call(node.value) else node

    def visit_With(self, node: ast.With) -> Any:
        asserts = any(_is_assertion_call(item.context_expr) for item in node.items)
        return [self.generic_visit(node), *([_call(ASSERTED, node)] if asserts else [])]

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> Any:
        self.generic_visit(node)
        node.body.insert(0, _call(HANDLED, node))
        return node


def _call(name: str, near: ast.AST) -> ast.stmt:
    call = ast.Expr(ast.Call(ast.Name(name, ast.Load()), [], []))
    return ast.fix_missing_locations(ast.copy_location(call, near))


def _known_in_advance(body: list[ast.stmt], candidate: str) -> bool:
    """Whether the candidate is only called in assertions, without variables of the test."""
    bound = {
        name
        for step in body
        if not isinstance(step, (*_FUNCTIONS, ast.ClassDef, ast.Import, ast.ImportFrom))
        for name in _stores(step)
    }
    for step in body:
        uses = sum(isinstance(node, ast.Name) and node.id == candidate for node in ast.walk(step))
        calls = [node for node in _outside_scopes(step) if _called_name(node) == candidate]
        if uses and (not isinstance(step, ast.Assert) or len(calls) != uses):
            return False
        for call in calls:
            inside = {name for part in (*call.args, *call.keywords) for name in _loads(part)}
            if inside & (bound | {candidate}):
                return False
    return True


def _captures(calls: list[ast.Call]) -> types.CodeType:
    captured: list[ast.expr] = [ast.Call(ast.Name(CAPTURE, ast.Load()), c.args, c.keywords) for c in calls]
    expression = ast.Expression(ast.List(captured, ast.Load()))
    return compile(ast.fix_missing_locations(expression), "<test>", "eval")


class _Replayed(ast.NodeTransformer):
    """Replaces call number i by its replay, and collects the calls."""

    def __init__(self, candidate: str):
        self._candidate = candidate
        self.calls: list[ast.Call] = []

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if _called_name(node) != self._candidate:
            return self.generic_visit(node)
        self.calls.append(node)
        index = ast.Constant(len(self.calls) - 1)
        return ast.copy_location(ast.Call(ast.Name(REPLAY, ast.Load()), [index], []), node)


def _outside_scopes(node: ast.AST) -> Iterable[Any]:
    """The nodes evaluated at most once: none in a function or a comprehension."""
    yield node
    for inner in ast.iter_child_nodes(node):
        if not isinstance(inner, _NESTED):
            yield from _outside_scopes(inner)


def _compiled(body: list[ast.stmt]) -> types.CodeType:
    return compile(ast.fix_missing_locations(ast.Module(body, [])), "<test>", "exec")
