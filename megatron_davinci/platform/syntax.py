"""Python's syntax trees, one at a time.

CPython before 3.11.8 and 3.12.2 counts the depth of a tree that it makes in one place for all threads (gh-106905).
Where another thread parses meanwhile, as it may when garbage is collected in the middle, either may end with
SystemError, "AST constructor recursion depth mismatch". Steps that ask models parse in several threads.
"""

from __future__ import annotations

import ast
from threading import RLock
from typing import Any, Literal, overload

_alone = RLock()  # a finaliser that runs in the middle may parse too


@overload
def parsed(text: str, mode: Literal["exec"] = "exec") -> ast.Module: ...
@overload
def parsed(text: str, mode: Literal["eval"]) -> ast.Expression: ...
def parsed(text: str, mode: Literal["exec", "eval"] = "exec") -> Any:
    """As `ast.parse`, from any thread.

    Raises:
        SyntaxError: It is no Python; ValueError, RecursionError and MemoryError for what the parser cannot take.
    """
    with _alone:
        return ast.parse(text, mode=mode)


def tree_of(text: str) -> ast.Module | None:
    """A program's tree; None for what is no Python, or more than the parser can take."""
    try:
        return parsed(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


_DEEPEST = 100  # what reads a tree recursively has a stack, which a long sum of terms fills
_LARGEST = 10**18  # what is longer than some thousand digits cannot be written out again


def unwieldy(tree: ast.AST) -> str:
    """Why a tree cannot be worked on: `too_deep` or `too_large_a_number`; empty where it can."""
    level = [tree]
    for _ in range(_DEEPEST):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if any(
            isinstance(one, ast.Constant) and type(one.value) is int and one.value > _LARGEST for one in level
        ):
            return "too_large_a_number"
        if not level:
            return ""
    return "too_deep"
