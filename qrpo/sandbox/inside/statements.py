"""Parts of tests as syntax trees: what a statement is, binds and reads, and how it is rewritten."""

import ast
import importlib.util
import sys
import types
from collections.abc import Iterable
from typing import Any

ASSERTED, CALL, CALL_TEST = "__asserted__", "__call__", "__call_test__"
CAPTURE, HANDLED = "__captured__", "__handled__"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef, ast.Import, ast.ImportFrom)
_NESTED = (ast.Lambda, *FUNCTIONS, ast.ClassDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_RUN_TEXT = {"eval", "exec", "compile", "__import__"}
_RUN_TEXT_MODULES = "builtins code codeop ctypes dill importlib marshal pickle runpy shelve"
_INTERNALS = {"__globals__", "__builtins__", "__subclasses__", "__code__"}


def refuse_running_text(tree: ast.Module) -> None:
    """Refuse tests that could run what a solution returns, in the judge's process."""
    for node in ast.walk(tree):
        found = imported(node) & {*_RUN_TEXT_MODULES.split()}
        if isinstance(node, ast.Name):
            found = {node.id} & _RUN_TEXT
        elif isinstance(node, ast.Attribute):
            found = {node.attr} & _INTERNALS
        if found:
            name, line = found.pop(), node.lineno  # type: ignore[attr-defined]
            raise ValueError(f"they use {name!r} in line {line}, and tests may not run text as code")


def imported(node: ast.AST) -> set[str]:
    """The packages that a statement imports."""
    if isinstance(node, ast.ImportFrom):
        return {(node.module or "").split(".")[0]}
    return {alias.name.split(".")[0] for alias in node.names} if isinstance(node, ast.Import) else set()


def is_installed(module: str) -> bool:
    """Whether the tests can import a module."""
    root = module.split(".")[0]
    if root in sys.stdlib_module_names:
        return True
    try:
        return importlib.util.find_spec(root) is not None and root != "inside"
    except (ImportError, ValueError):
        return False


def runs_tests(node: ast.stmt) -> bool:
    """Whether a statement only starts the tests: `if __name__ == "__main__"`, `unittest.main()`."""
    if isinstance(node, ast.If) and "__name__" in loads(node.test):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        name = ast.unparse(node.value.func)
        return name in ("unittest.main", "pytest.main") or (name.startswith("test") and not node.value.args)
    return False


def called_name(node: ast.AST) -> str:
    """The name of the function that an expression calls."""
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def calls_check(node: ast.AST) -> bool:
    """Whether a statement is `check(f)`, or a function that contains nothing else."""
    if isinstance(node, ast.FunctionDef):
        return all(map(calls_check, node.body))
    return isinstance(node, ast.Expr) and called_name(node.value) == "check"


def takes_candidate(node: ast.stmt) -> bool:
    """Whether a statement defines `check(candidate)`, or a function like it."""
    if not isinstance(node, ast.FunctionDef):
        return False
    given = node.args
    plain = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    if node.name != "check":
        return plain == ["candidate"]
    if given.vararg or given.kwarg or 1 not in (len(plain), len(plain) - len(given.defaults)):
        raise ValueError("check takes one argument, the candidate")
    return True


def is_test_function(node: ast.stmt) -> bool:
    """Whether pytest or unittest would collect a function or class."""
    if isinstance(node, FUNCTIONS):
        return node.name.startswith("test") and not is_fixture(node)
    return isinstance(node, ast.ClassDef) and (
        node.name.startswith("Test")
        or any("TestCase" in ast.unparse(base) for base in node.bases)
        or any(m.name.startswith("test") for m in node.body if isinstance(m, FUNCTIONS))
    )


def is_fixture(node: Any) -> bool:
    """Whether a function is a fixture of pytest."""
    return any("fixture" in ast.unparse(decorator) for decorator in node.decorator_list)


def is_assertion_call(node: ast.AST) -> bool:
    """`self.assertEqual(...)`, `with pytest.raises(...)`, and others of their kind."""
    name = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
    name = name or called_name(node)
    return name.startswith("assert") or name == "raises"


def is_real_assertion(node: ast.AST) -> bool:
    """An assertion about a value, not a mark such as `assert False` in the place of a failure."""
    constant = isinstance(node, ast.Assert) and isinstance(node.test, ast.Constant)
    return is_assertion_call(node) or (isinstance(node, ast.Assert) and not constant)


def has_real_assertion(node: ast.AST) -> bool:
    """Whether a part is a real assertion."""
    return any(map(is_real_assertion, ast.walk(node)))


def has_assertion(node: ast.AST) -> bool:
    """Whether a part is an assertion that can fail, or raises an error."""
    return any(
        is_real_assertion(n)
        or isinstance(n, ast.Raise)
        or (isinstance(n, ast.Assert) and isinstance(n.test, ast.Constant) and not n.test.value)
        or (isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == "fail")
        for n in ast.walk(node)
    )


def loads(node: ast.AST) -> set[str]:
    """The names that a node reads."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def stores(node: ast.AST, *, deep: bool = False) -> set[str]:
    """The names that a statement binds; with `deep`, those in functions too."""
    found: set[str] = set()
    for n in ast.walk(node):
        if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load):
            found.add(n.id)
        elif isinstance(n, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in n.names}
        elif isinstance(n, (*FUNCTIONS, ast.ClassDef, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)):
            found |= {n.name} if n.name else set()
        elif isinstance(n, ast.arg) and deep:
            found.add(n.arg)
    return found


class Instrumented(ast.NodeTransformer):
    """Reports every assertion that has passed and every exception that is caught."""

    def visit_Assert(self, node: ast.Assert) -> Any:  # noqa: D102
        return [node, _call(ASSERTED, node)] if is_real_assertion(node) else node

    def visit_Expr(self, node: ast.Expr) -> Any:  # noqa: D102
        return [node, _call(ASSERTED, node)] if is_assertion_call(node.value) else node

    def visit_With(self, node: ast.With) -> Any:  # noqa: D102
        asserts = any(is_assertion_call(item.context_expr) for item in node.items)
        return [self.generic_visit(node), *([_call(ASSERTED, node)] if asserts else [])]

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> Any:  # noqa: D102
        self.generic_visit(node)
        node.body.insert(0, _call(HANDLED, node))
        return node


def _call(name: str, near: ast.AST) -> ast.stmt:
    call = ast.Expr(ast.Call(ast.Name(name, ast.Load()), [], []))
    return ast.fix_missing_locations(ast.copy_location(call, near))


class KnownCalls(ast.NodeTransformer):
    """Numbers the calls of the candidate, so that their results can be known when the tests run.

    `called` is what calls it: `f`, or `Solution().f`, which has the `name` Solution.
    """

    def __init__(self, name: str, called: str):
        self._name = name
        self._called = ast.dump(ast.parse(called, mode="eval").body)
        self.calls: list[ast.Call] = []

    def _is_call(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and ast.dump(node.func) == self._called

    def occur_in(self, node: ast.AST) -> bool:
        """Whether a part calls the candidate."""
        return any(map(self._is_call, ast.walk(node)))

    def are_all(self, body: list[ast.stmt]) -> bool:
        """Whether the candidate is only called in assertions, without variables of the test."""
        variables = {n for node in body if not isinstance(node, DEFINITIONS) for n in stores(node)}
        for node in body:
            uses = sum(isinstance(n, ast.Name) and n.id == self._name for n in ast.walk(node))
            calls = [n for n in _outside_scopes(node) if self._is_call(n)]
            if uses and (not isinstance(node, ast.Assert) or len(calls) != uses):
                return False
            read = {name for call in calls for part in (*call.args, *call.keywords) for name in loads(part)}
            if read & {*variables, self._name}:
                return False
        return True

    def visit_Call(self, node: ast.Call) -> ast.AST:  # noqa: D102
        if not self._is_call(node):
            return self.generic_visit(node)
        self.calls.append(node)
        none = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        known = [ast.Constant(len(self.calls) - 1), ast.Lambda(none, node.func)]
        function = ast.Call(ast.Name(CALL, ast.Load()), known, [])
        return ast.copy_location(ast.Call(function, node.args, node.keywords), node)

    def arguments(self) -> types.CodeType:
        """Code for the list of the arguments of all calls."""
        capture = ast.Name(CAPTURE, ast.Load())
        captured: list[ast.expr] = [ast.Call(capture, call.args, call.keywords) for call in self.calls]
        expression = ast.Expression(ast.List(captured, ast.Load()))
        return compile(ast.fix_missing_locations(expression), "<test>", "eval")


def _outside_scopes(node: ast.AST) -> Iterable[Any]:
    """The nodes evaluated at most once: none in a function or a comprehension."""
    yield node
    for inner in ast.iter_child_nodes(node):
        if not isinstance(inner, _NESTED):
            yield from _outside_scopes(inner)


def compiled(body: list[ast.stmt]) -> types.CodeType:
    """Code of statements."""
    return compile(ast.fix_missing_locations(ast.Module(body, [])), "<test>", "exec")
