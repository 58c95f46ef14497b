"""What a world's program must look like, told from its syntax and from the passage that it goes by.

What is refused here is what playing it could not show: a law that quotes nothing, or only asks the world again; lots
that are drawn by the state, which nobody could foresee; a program that reaches for what plays it.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from megatron_davinci.darwin.mutants import mutants
from megatron_davinci.darwin.pair_gates import quoted
from megatron_davinci.platform.syntax import parsed, tree_of, unwieldy

MAY_IMPORT = frozenset(
    "__future__ bisect collections copy dataclasses decimal enum fractions functools heapq itertools json math "
    "operator random re statistics string typing".split()
)
LEAST_WORDS = 4  # of a quotation
_MUST_DEFINE = {"start": 1, "actions": 1, "step": 2}
_LAW, _OF_A_LAW = "law_", 3  # before, action, after
_NOT_CALLED = frozenset("__import__ breakpoint compile eval exec input open".split())
_NOT_NAMED = frozenset("__builtins__ delattr getattr globals locals setattr vars".split())
_EMPHASIS = re.compile(r"(?<!\w)[*_]{1,3}(?=\w)|(?<=\w)[*_]{1,3}(?!\w)")  # of Markdown
_LAID = "def _laid_{}():\n    pass"  # stands where a function was that is not made wrong
_MARK = re.compile(r"def _laid_(\d+)\(\):\n    pass")
_Defined = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Law(NamedTuple):
    """A law.

    Attributes:
        name: Of its function.
        quotation: Of the document: what it says that holds.
        source: The function's text, with what it uses of the rest.
    """

    name: str
    quotation: str
    source: str


class World(NamedTuple):
    """A world's program, taken apart.

    Attributes:
        program: All of it.
        goes: What it goes by: all of it, with a mark in place of each function of `laid`.
        laid: Texts of the functions that laws cannot speak of (how it starts, what may be done), and of laws.
        laws: What holds in it.
    """

    program: str
    goes: str
    laid: list[str]
    laws: list[Law]


def world_of(program: str, passage: str, longest: int, least_laws: int) -> World | str:
    """A world, or what is wrong with it as far as its syntax and the passage tell.

    Args:
        program: Python.
        passage: What its laws must quote.
        longest: Most characters of it.
        least_laws: That it must have, each with a sentence of its own.
    """
    if len(program) > longest:
        return "too_long"
    tree = tree_of(program)
    if tree is None:
        return "no_python"
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if wrong := unwieldy(tree) or _built_wrong(tree, functions):
        return wrong
    laws: list[Law] = []
    for node in (node for name, node in functions.items() if name.startswith(_LAW)):
        if _arguments(node) != _OF_A_LAW:
            return "no_law"
        if _taken(node) & _MUST_DEFINE.keys():
            return "law_asks_the_world"
        said = " ".join((ast.get_docstring(node) or "").split())
        if len(said.split()) < LEAST_WORDS or not said.isprintable() or not _is_quoted(said, passage):
            return "law_not_in_the_passage"
        laws.append(Law(node.name, said, _with_what_it_uses(node, tree, program)))
    if len({law.quotation for law in laws}) < least_laws:
        return "too_few_laws"
    if len({ast.dump(ast.Module(functions[law.name].body[1:], [])) for law in laws}) < len(laws):
        return "laws_alike"
    laid: list[str] = []
    body: list[ast.stmt] = []
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef) and _is_laid(statement.name):
            body += parsed(_LAID.format(len(laid))).body
            laid.append(ast.unparse(statement))
        else:
            body.append(statement)
    return World(program, ast.unparse(ast.Module(body, [])), laid, laws)


def faults_of(world: World, most: int) -> list[str]:
    """The world made wrong, one fault each, in what laws can speak of."""
    return [
        _MARK.sub(lambda found: world.laid[int(found[1])], fault) + "\n"
        for fault in mutants(world.goes, most)
    ]


def _is_laid(name: str) -> bool:
    return name in ("start", "actions") or name.startswith(_LAW)


def docstring_of(program: str) -> str:
    """What a program says of itself; empty where it is none, or says nothing."""
    tree = tree_of(program)
    return "" if tree is None else ast.get_docstring(tree) or ""


def _built_wrong(tree: ast.Module, functions: dict[str, ast.FunctionDef]) -> str:
    for name, count in _MUST_DEFINE.items():
        if name not in functions or _arguments(functions[name]) != count:
            return f"no_{name}"
    if any(module not in MAY_IMPORT for module in _imported(tree)):
        return "imports_other"
    if any(_reaches_out(node, _modules(tree)) for node in ast.walk(tree)):
        return "reaches_out"
    played = {name for name in functions if name in _MUST_DEFINE or name.startswith(_LAW)}
    bound = _bound(tree)
    if any(bound[name] > 1 for name in played):
        return "defined_twice"
    return "draws_lots" if _draws_lots(tree, played - {"start"}) else ""


def _arguments(node: ast.FunctionDef) -> int:
    given = node.args
    if given.vararg or given.kwarg or given.kwonlyargs or node.decorator_list:
        return -1
    return len(given.posonlyargs) + len(given.args) - len(given.defaults)


def _imported(tree: ast.Module) -> Iterator[str]:
    """What it imports, or would do outside."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _NOT_CALLED:
            yield node.func.id


def _modules(tree: ast.AST, only: str = "") -> set[str]:
    """Names that stand for a module, or for something out of one."""
    return {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if only in ("", alias.name if isinstance(node, ast.Import) else node.module)
    }


def _reaches_out(node: ast.AST, modules: set[str]) -> bool:
    """Whether it changes a module, or gets at what plays the world."""
    if isinstance(node, ast.Name):
        return node.id in _NOT_NAMED
    if not isinstance(node, ast.Attribute):
        return False
    root: ast.expr = node
    while isinstance(root, ast.Attribute | ast.Subscript):
        root = root.value
    of_a_module = isinstance(root, ast.Name) and root.id in modules
    if of_a_module and (node.attr.startswith("_") or not isinstance(node.ctx, ast.Load)):
        return True
    return node.attr.startswith(("__", "f_", "gi_", "tb_"))


def _bound(tree: ast.Module) -> Counter[str]:
    """How often each name is bound, at the top of a program or as a global."""
    found = Counter[str]()
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, _Defined):
            found[node.name] += 1
            found.update(name for one in ast.walk(node) if isinstance(one, ast.Global) for name in one.names)
            continue
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found[node.id] += 1
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.update(_modules(node))
        waiting += ast.iter_child_nodes(node)
    return found


def _draws_lots(tree: ast.Module, played: set[str]) -> bool:
    """Whether functions draw lots, themselves or by what they use."""
    lots = _modules(tree, "random")
    waiting, seen = list(played), set(played)
    while waiting:
        name = waiting.pop()
        taken = {used for node in tree.body if name in _names_of(node) for used in _taken(node)}
        if taken & lots:
            return True
        waiting += taken - seen
        seen |= taken
    return False


def _names_of(node: ast.stmt) -> set[str]:
    """What a statement at the top binds."""
    return {node.name} if isinstance(node, _Defined) else set(_bound(ast.Module([node], [])))


def _taken(node: ast.AST) -> set[str]:
    """Names that it takes from outside: those that it binds itself are its own."""
    names = [one for one in ast.walk(node) if isinstance(one, ast.Name)]
    return {one.id for one in names} - {one.id for one in names if isinstance(one.ctx, ast.Store)}


def _is_quoted(said: str, passage: str) -> bool:
    return quoted(said, passage) or quoted(_EMPHASIS.sub("", said), _EMPHASIS.sub("", passage))


def _with_what_it_uses(law: ast.FunctionDef, tree: ast.Module, program: str) -> str:
    """A law's text, behind what it takes of the rest of the program."""
    wanted, used = _taken(law), list[ast.stmt]()
    for _ in tree.body:  # what is used uses more
        for node in tree.body:
            if node is not law and node not in used and _names_of(node) & wanted:
                used.append(node)
                wanted |= _taken(node)
    parts = [node for node in tree.body if node in used] + [law]
    return "\n\n\n".join(ast.get_source_segment(program, node) or "" for node in parts)
