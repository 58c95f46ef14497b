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
