"""Small faults planted in a Python program, one at a time: what its checks must notice, or they check nothing.

The operators are the usual ones of mutation testing (DeMillo, Lipton, Sayward, "Hints on Test Data Selection", 1978):
another comparison, another arithmetic, a number that is one more, a condition turned round, nothing returned. A fault
may change nothing that anybody could see, so that not all can be noticed.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import random
from collections.abc import Iterator

from megatron_davinci.platform.syntax import parsed

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip


def mutants(program: str, most: int) -> list[str]:
    """Programs with one fault each, inside functions; the same for the same program.

    Args:
        program: Python.
        most: How many, at most.

    Raises:
        SyntaxError: It is no Python.
    """
    tree = parsed(program)
    places = [(number, way) for number, node in enumerate(_inside(tree)) for way in range(_ways(node))]
    draw = random.Random(hashlib.blake2b(program.encode("utf-8", "surrogatepass"), digest_size=8).digest())
    draw.shuffle(places)
    found: list[str] = []
    for number, way in sorted(places[:most]):
        changed = copy.deepcopy(tree)
        _change(list(_inside(changed))[number], way)
        text = ast.unparse(ast.fix_missing_locations(changed))
        if text not in found:
            found.append(text)
    return found


def _inside(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes within functions, without what documents them."""
    seen: set[int] = set()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for statement in function.body:
            for node in ast.walk(statement):
                if id(node) not in seen:
                    seen.add(id(node))
                    yield node


def _ways(node: ast.AST) -> int:
    """In how many ways a node can be made wrong."""
    if isinstance(node, ast.Compare):
        return len(node.ops)
    if isinstance(node, ast.BinOp | ast.AugAssign):
        return int(type(node.op) in _OPERATORS)
    if isinstance(node, ast.Constant):
        return int(isinstance(node.value, int | float))
    if isinstance(node, ast.Return):
        return int(node.value is not None)
    return int(isinstance(node, ast.BoolOp | ast.If | ast.While | ast.IfExp))


def _change(node: ast.AST, way: int) -> None:
    if isinstance(node, ast.Compare):
        node.ops[way] = _COMPARISONS[type(node.ops[way])]()
    elif isinstance(node, ast.BinOp | ast.AugAssign):
        node.op = _OPERATORS[type(node.op)]()
    elif isinstance(node, ast.Constant):
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1  # type: ignore[operator]
    elif isinstance(node, ast.Return):
        node.value = ast.Constant(None)
    elif isinstance(node, ast.BoolOp):
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif isinstance(node, ast.If | ast.While | ast.IfExp):
        node.test = ast.UnaryOp(ast.Not(), node.test)
