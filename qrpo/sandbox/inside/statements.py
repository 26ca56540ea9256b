"""Parts of tests as syntax trees: what a statement is, binds and reads, and how it is rewritten."""

import ast
import importlib.util
import sys
import types
from collections.abc import Iterable
from typing import Any

__all__ = [
    "ASSERTED",
    "CALL_TEST",
    "CAPTURE",
    "ENTRY",
    "FUNCTIONS",
    "HANDLED",
    "REPLAY",
    "Instrumented",
    "Replayed",
    "Spelled",
    "called_name",
    "calls_check",
    "captures",
    "compiled",
    "has_assertion",
    "has_real_assertion",
    "imported",
    "is_assertion_call",
    "is_fixture",
    "is_installed",
    "is_real_assertion",
    "is_test_function",
    "known_in_advance",
    "leaves",
    "loads",
    "outside_scopes",
    "refuse_running_text",
    "runs_tests",
    "stores",
    "takes_candidate",
]

REPLAY, CAPTURE, ASSERTED, HANDLED, CALL_TEST = "__replayed__", "__captured__", "__asserted__", "__handled__", "__call_test__"  # fmt: skip
ENTRY = "__entry_point__"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_NESTED = (ast.Lambda, *FUNCTIONS, ast.ClassDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
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


def refuse_running_text(tree: ast.Module) -> None:
    """Refuse tests that could run what a solution returns, in the judge's process."""
    for node in ast.walk(tree):
        found = ""
        if isinstance(node, ast.Name) and node.id in _RUN_TEXT:
            found = node.id
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found = next(iter(imported(node) & _RUN_TEXT_MODULES), "")
        elif isinstance(node, ast.Attribute) and node.attr in (
            "__globals__",
            "__builtins__",
            "__subclasses__",
            "__code__",
        ):
            found = node.attr
        if found:
            raise ValueError(f"they use {found!r} in line {node.lineno}, and tests may not run text as code")  # type: ignore[attr-defined]


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
    if isinstance(node, ast.If) and any(
        isinstance(n, ast.Name) and n.id == "__name__" for n in ast.walk(node.test)
    ):
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
    arguments = node.args
    plain = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    if node.name == "check" and (len(plain) != 1 or arguments.vararg or arguments.kwarg):
        if len(plain) - len(arguments.defaults) == 1 and not arguments.vararg and not arguments.kwarg:
            return True
        raise ValueError("check takes one argument, the candidate")
    return node.name == "check" or plain == ["candidate"]


def is_test_function(node: ast.stmt) -> bool:
    """Whether pytest or unittest would collect a function or class."""
    if isinstance(node, FUNCTIONS):
        return node.name.startswith("test") and not is_fixture(node)
    if isinstance(node, ast.ClassDef):
        cases = any("TestCase" in ast.unparse(base) for base in node.bases)
        return (
            cases
            or node.name.startswith("Test")
            or any(m.name.startswith("test") for m in node.body if isinstance(m, FUNCTIONS))
        )
    return False


def is_fixture(node: Any) -> bool:
    """Whether a function is a fixture of pytest."""
    return any("fixture" in ast.unparse(decorator) for decorator in node.decorator_list)


def is_assertion_call(node: ast.AST) -> bool:
    """`self.assertEqual(...)`, `with pytest.raises(...)`, and others of their kind."""
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else called_name(node)
    return name.startswith("assert") or name == "raises"


def is_real_assertion(node: ast.AST) -> bool:
    """An assertion about a value, not a mark such as `assert False` in the place of a failure."""
    return is_assertion_call(node) or (
        isinstance(node, ast.Assert) and not isinstance(node.test, ast.Constant)
    )


def has_real_assertion(node: ast.AST) -> bool:
    """Whether a part is a real assertion."""
    return any(map(is_real_assertion, ast.walk(node)))


def has_assertion(node: ast.AST) -> bool:
    """Whether a part is an assertion that can fail, or raises an error."""
    return any(
        is_assertion_call(n)
        or isinstance(n, ast.Raise)
        or (isinstance(n, ast.Assert) and not (isinstance(n.test, ast.Constant) and n.test.value))
        or (isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == "fail")
        for n in ast.walk(node)
    )


def leaves(node: ast.AST) -> bool:
    """Whether a node has a meaning in functions only."""
    return isinstance(node, (ast.Return, ast.Nonlocal, ast.Global, ast.Yield, ast.YieldFrom, ast.Await))


def loads(node: ast.AST) -> set[str]:
    """The names that a node reads."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def stores(node: ast.AST, *, deep: bool = False) -> set[str]:
    """The names that a statement binds; with `deep`, those in functions too."""
    found: set[str] = set()
    for n in ast.walk(node):
        if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load):
            found.add(n.id)
        elif isinstance(n, ast.ExceptHandler) and n.name:
            found.add(n.name)
        elif isinstance(n, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in n.names}
        elif isinstance(n, (*FUNCTIONS, ast.ClassDef)):
            found.add(n.name)
        elif isinstance(n, ast.arg) and deep:
            found.add(n.arg)
        elif isinstance(n, (ast.MatchAs, ast.MatchStar)) and n.name:
            found.add(n.name)
    return found


class Spelled(ast.NodeTransformer):
    """Replaces the entry point's expression, spelled out in a test, by a name."""

    def __init__(self, dumped: str):
        self._dumped = dumped
        self.found = False

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:  # noqa: D102
        if ast.dump(node) != self._dumped:
            return self.generic_visit(node)
        self.found = True
        return ast.copy_location(ast.Name(ENTRY, ast.Load()), node)


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


def known_in_advance(body: list[ast.stmt], candidate: str) -> bool:
    """Whether the candidate is only called in assertions, without variables of the test."""
    bound = {
        name
        for step in body
        if not isinstance(step, (*FUNCTIONS, ast.ClassDef, ast.Import, ast.ImportFrom))
        for name in stores(step)
    }
    for step in body:
        uses = sum(isinstance(node, ast.Name) and node.id == candidate for node in ast.walk(step))
        calls = [node for node in outside_scopes(step) if called_name(node) == candidate]
        if uses and (not isinstance(step, ast.Assert) or len(calls) != uses):
            return False
        for call in calls:
            inside = {name for part in (*call.args, *call.keywords) for name in loads(part)}
            if inside & (bound | {candidate}):
                return False
    return True


def captures(calls: list[ast.Call]) -> types.CodeType:
    """Code for the list of the arguments of calls."""
    captured: list[ast.expr] = [ast.Call(ast.Name(CAPTURE, ast.Load()), c.args, c.keywords) for c in calls]
    expression = ast.Expression(ast.List(captured, ast.Load()))
    return compile(ast.fix_missing_locations(expression), "<test>", "eval")


class Replayed(ast.NodeTransformer):
    """Replaces call number i by its replay, and collects the calls."""

    def __init__(self, candidate: str):
        self._candidate = candidate
        self.calls: list[ast.Call] = []

    def visit_Call(self, node: ast.Call) -> ast.AST:  # noqa: D102
        if called_name(node) != self._candidate:
            return self.generic_visit(node)
        self.calls.append(node)
        index = ast.Constant(len(self.calls) - 1)
        return ast.copy_location(ast.Call(ast.Name(REPLAY, ast.Load()), [index], []), node)


def outside_scopes(node: ast.AST) -> Iterable[Any]:
    """The nodes evaluated at most once: none in a function or a comprehension."""
    yield node
    for inner in ast.iter_child_nodes(node):
        if not isinstance(inner, _NESTED):
            yield from outside_scopes(inner)


def compiled(body: list[ast.stmt]) -> types.CodeType:
    """Code of statements."""
    return compile(ast.fix_missing_locations(ast.Module(body, [])), "<test>", "exec")
