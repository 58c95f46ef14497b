"""What kinds of plain values a function's parameters are likely to take, by how its text uses them.

A model that is held to a form writes no argument of another kind then, so fewer calls raise. It is a guess and
decides nothing else: what a call gives, the program says.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from typing import NamedTuple

from megatron_davinci.platform.syntax import parsed

_TYPES: dict[str, type] = {
    "integer": int, "decimal": float, "truth": bool, "text": str, "bytes": bytes, "list": list, "tuple": tuple,
    "dict": dict,
}  # fmt: skip
ALL = frozenset({*_TYPES, "none"})
_NUMBERS = frozenset({"integer", "decimal"})
_SIZED = frozenset({"text", "bytes", "list", "tuple", "dict"})
_ORDERED = _SIZED - {"dict"}
_LISTS = ("List", "Sequence", "Iterable", "Collection", "Iterator", "MutableSequence")
_WALK = ("len", "iter", "enumerate", "reversed", "sorted", "any", "all", "sum", "map", "filter", "zip")
_NAMES: dict[str, frozenset[str]] = {
    **{kind.__name__: frozenset({name}) for name, kind in _TYPES.items()},
    **{name: frozenset({"text"}) for name in ("Text", "AnyStr", "Path", "PathLike", "StrPath")},
    **dict.fromkeys(("float", "Number", "Real"), _NUMBERS),
    **{name: frozenset({"list"}) for name in _LISTS},
    **{name: frozenset({"dict"}) for name in ("Dict", "Mapping", "MutableMapping")},
    "Tuple": frozenset({"tuple"}), "None": frozenset({"none"}),
}  # fmt: skip
_TAKES: dict[str, frozenset[str]] = {
    **{name: frozenset({"integer"}) for name in ("range", "chr", "bin", "hex", "oct")},
    **dict.fromkeys(("abs", "round", "divmod", "pow"), _NUMBERS),
    **{name: _NUMBERS | {"text"} for name in ("int", "float")},
    **dict.fromkeys(_WALK, _SIZED),
    "ord": frozenset({"text"}),
}  # fmt: skip
_MODULES: dict[str, frozenset[str]] = {
    "os": frozenset({"text"}), "path": frozenset({"text"}), "re": frozenset({"text"}), "math": _NUMBERS,
}  # fmt: skip


class Kind(NamedTuple):
    """What a parameter is likely to take.

    Attributes:
        of: Kinds, of `ALL`.
        items: Likewise of what a list, a tuple or a dictionary holds.
    """

    of: frozenset[str] = ALL
    items: frozenset[str] = ALL


def kinds_of(function: ast.FunctionDef) -> list[Kind]:
    """Of each parameter that can be given by place, in their order."""
    given = [*function.args.posonlyargs, *function.args.args]
    defaults = [None] * (len(given) - len(function.args.defaults)) + function.args.defaults
    return [_kind(one, default, function) for one, default in zip(given, defaults, strict=True)]


def _kind(parameter: ast.arg, default: ast.expr | None, function: ast.FunctionDef) -> Kind:
    told = _annotated(parameter.annotation) if parameter.annotation is not None else None
    if told is None:
        hints = list(_uses(parameter.arg, function))
        if isinstance(default, ast.Constant) and type(default.value) in _TYPES.values():
            hints.append(_like(default.value))
        loops = [
            node.target.id
            for node in ast.walk(function)
            if isinstance(node, ast.For | ast.comprehension)
            and isinstance(node.target, ast.Name)
            and _is(node.iter, parameter.arg)
        ]
        items = _common([hint for name in loops for hint in _uses(name, function)])
        told = Kind(_common(hints), items)
    may_lack = isinstance(default, ast.Constant) and default.value is None
    return told._replace(of=told.of | {"none"}) if may_lack else told


def _common(hints: list[frozenset[str]]) -> frozenset[str]:
    """Kinds that all hints allow; those that any allows, where they contradict each other."""
    if not hints:
        return ALL
    return frozenset.intersection(*hints) or frozenset.union(*hints)


def _like(value: object) -> frozenset[str]:
    """Kinds of values that can stand where a constant stands."""
    if type(value) in (int, float):
        return _NUMBERS if isinstance(value, float) else frozenset({"integer"})
    found = [name for name, kind in _TYPES.items() if type(value) is kind]
    return frozenset(found) or ALL


def _annotated(node: ast.expr) -> Kind | None:
    """What an annotation says; None where it names what is no plain value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        try:
            return _annotated(parsed(node.value, "eval").body)
        except (SyntaxError, ValueError):
            return None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _either([node.left, node.right])
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    if isinstance(node, ast.Constant) and node.value is None:
        name = "None"
    if isinstance(node, ast.Subscript):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        outer = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
        if outer in ("Optional", "Union"):
            found = _either(inner)
            return found and found._replace(of=found.of | ({"none"} if outer == "Optional" else set()))
        if outer == "Literal":
            kinds = [_like(each.value) for each in inner if isinstance(each, ast.Constant)]
            return Kind(frozenset.union(*kinds)) if kinds else None
        held = _either([each for each in inner if not _is_dots(each)])
        of = _NAMES.get(outer)
        return Kind(of, held.of if held is not None else ALL) if of else None
    return Kind(_NAMES[name]) if name in _NAMES else None


def _either(nodes: list[ast.expr]) -> Kind | None:
    found = [kind for kind in map(_annotated, nodes) if kind is not None]
    if not found:
        return None
    return Kind(frozenset.union(*(kind.of for kind in found)), _common([kind.items for kind in found]))


def _is_dots(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


def _is(node: ast.AST | None, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _uses(name: str, function: ast.FunctionDef) -> Iterator[frozenset[str]]:
    """What each use of a name in a function allows."""
    for node in ast.walk(function):
        for look in _LOOKS:
            found = look(node, name)
            if found:
                yield frozenset(found)


def _of_attribute(node: ast.AST, name: str) -> set[str]:
    if isinstance(node, ast.Attribute) and _is(node.value, name):
        return {kind for kind, type_ in _TYPES.items() if hasattr(type_, node.attr)}
    return set()


def _of_call(node: ast.AST, name: str) -> set[str]:
    if not (isinstance(node, ast.Call) and any(_is(each, name) for each in node.args)):
        return set()
    if isinstance(node.func, ast.Name):
        return set(_TAKES.get(node.func.id, ()))
    if isinstance(node.func, ast.Attribute):
        owner = node.func.value
        if isinstance(owner, ast.Constant) and isinstance(owner.value, str):
            return {"list", "tuple"} if node.func.attr == "join" else set()
        module = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
        return set(_MODULES.get(module, ()))
    return set()


def _of_loop(node: ast.AST, name: str) -> set[str]:
    return set(_SIZED) if isinstance(node, ast.For | ast.comprehension) and _is(node.iter, name) else set()


def _of_subscript(node: ast.AST, name: str) -> set[str]:
    if not (isinstance(node, ast.Subscript) and _is(node.value, name)):
        return {"integer"} if isinstance(node, ast.Slice) and _is(node.lower or node.upper, name) else set()
    if isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
        return {"dict"}
    return set(_ORDERED)


def _of_operator(node: ast.AST, name: str) -> set[str]:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd | ast.Invert):
        return set(_NUMBERS) if _is(node.operand, name) else set()
    if not (isinstance(node, ast.BinOp) and (_is(node.left, name) or _is(node.right, name))):
        return set()
    other = node.right if _is(node.left, name) else node.left
    if isinstance(node.op, ast.Add):
        return set(_like(other.value)) if isinstance(other, ast.Constant) else set()
    if isinstance(node.op, ast.Mod) and _is(node.right, name):
        return set()  # what a text is filled with may be anything
    if isinstance(node.op, ast.BitAnd | ast.BitOr | ast.BitXor | ast.LShift | ast.RShift):
        return {"integer"}
    return set(_NUMBERS)


def _of_comparison(node: ast.AST, name: str) -> set[str]:
    if not isinstance(node, ast.Compare):
        return set()
    row = [node.left, *node.comparators]
    found: set[str] = set()
    for left, operator, right in zip(row, node.ops, row[1:], strict=False):
        other = right if _is(left, name) else left if _is(right, name) else None
        if other is None or isinstance(operator, ast.Is | ast.IsNot):
            continue
        if isinstance(operator, ast.In | ast.NotIn):
            if other is left:
                found |= _SIZED
            elif isinstance(other, ast.Tuple | ast.List | ast.Set):
                kinds = [_like(each.value) for each in other.elts if isinstance(each, ast.Constant)]
                found |= frozenset().union(*kinds)
            elif isinstance(other, ast.Constant):
                found |= _like(other.value)
        elif isinstance(other, ast.Constant) and other.value is not None:
            found |= _NUMBERS if type(other.value) in (int, float) else _like(other.value)
        elif not isinstance(operator, ast.Eq | ast.NotEq):
            found |= _NUMBERS
    return found


_LOOKS: list[Callable[[ast.AST, str], set[str]]] = [
    _of_attribute, _of_call, _of_loop, _of_subscript, _of_operator, _of_comparison,
]  # fmt: skip
