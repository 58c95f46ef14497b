"""Small formulas, in TeX or in plain text, as numbers: read as syntax, never run, and evaluated at points.

Two formulas are the same if they have the same value wherever they are looked at. That is a test and no proof, needs
no simplification that could run for ever, and takes microseconds.
"""

from __future__ import annotations

import cmath
import math
import random
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

Value = Fraction | complex
Tree = tuple[Any, ...]
_POINTS = 5
_LONGEST, _DEEPEST = 2000, 60  # characters; parentheses
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?|\.\d+)|(?P<command>\\[A-Za-z]+)|(?P<name>[A-Za-z])"
    r"|(?P<mark>\*\*|[-+*/^()\[\]{}|!_=]))"
)
_SAID: tuple[tuple[str, str], ...] = (
    (r"\\[dt]frac", r"\\frac"), (r"\\(?:left|right|displaystyle|,|;|!|:|quad|qquad| )", " "), (r"\\[({})]", " "),
    (r"[$~]", " "), (r"\\cdot|\\times|×|·|⋅|∗", "*"), (r"÷|\\div", "/"), (r"[−–]", "-"), (r"π", r"\\pi "),
    (r"√", r"\\sqrt "), (r"²", "^2"), (r"³", "^3"), (r"\^?\s*\{?\\circ\}?|°", ""),
    (r"\\(?:mathrm|operatorname|mathit|mathbf)\{(\w+)\}", r"\\\1 "),
)  # fmt: skip
_FUNCTIONS: Mapping[str, Callable[[complex], complex]] = {
    "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "sinh": cmath.sinh, "cosh": cmath.cosh, "tanh": cmath.tanh,
    "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan, "asin": cmath.asin, "acos": cmath.acos,
    "atan": cmath.atan, "ln": cmath.log, "log": cmath.log, "exp": cmath.exp, "sqrt": cmath.sqrt, "abs": abs,
    "sec": lambda x: 1 / cmath.cos(x), "csc": lambda x: 1 / cmath.sin(x), "cot": lambda x: 1 / cmath.tan(x),
}  # fmt: skip
_WORDS = re.compile(
    r"(?<![\\A-Za-z])(" + "|".join(sorted(_FUNCTIONS, key=len, reverse=True)) + r"|pi)(?![A-Za-z])"
)


class NoFormula(ValueError):
    """A text is none, or has no value."""


def parsed(text: str) -> Tree:
    """The syntax of a formula.

    Raises:
        NoFormula: It is none that is known here.
    """
    if len(text) > _LONGEST:
        raise NoFormula("too long")
    for pattern, replacement in _SAID:
        text = re.sub(pattern, replacement, text)
    return _Reader(_WORDS.sub(r"\\\1 ", text)).whole()


def symbols(tree: Any) -> set[str]:
    """The unknowns of a formula."""
    if isinstance(tree, tuple):
        if tree[0] == "symbol":
            return {tree[1]}
        return set().union(*(symbols(part) for part in tree[1:])) if len(tree) > 1 else set()
    return set()


def same(one: str, other: str) -> bool:
    """Whether two formulas have the same value at all points that are tried; the unknowns are positive there.

    Raises:
        NoFormula: One of them is none, or has a value nowhere.
    """
    trees = parsed(one), parsed(other)
    names = sorted(symbols(trees[0]) | symbols(trees[1]))
    draw, seen = random.Random(11), 0
    for _ in range(_POINTS if names else 1):
        point = {name: Fraction(draw.randrange(200, 2900), 997) for name in names}
        try:
            values = [value_of(tree, point) for tree in trees]
        except (ArithmeticError, ValueError, OverflowError):
            continue
        seen += 1
        if not close(*values):
            return False
    if not seen:
        raise NoFormula("it has a value nowhere")
    return True


def close(one: Value, other: Value) -> bool:
    """Whether two numbers are the same: exactly where both are fractions, else to nine digits."""
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    try:
        return cmath.isclose(complex(one), complex(other), rel_tol=1e-9, abs_tol=1e-12)
    except OverflowError:  # one is a fraction beyond all floats, and the other a float
        return False


def number(text: str) -> Value:
    """The value of a formula without unknowns.

    Raises:
        NoFormula: It is none, has unknowns, or no value.
    """
    tree = parsed(text)
    if symbols(tree):
        raise NoFormula("it has unknowns")
    try:
        return value_of(tree, {})
    except (ArithmeticError, ValueError, OverflowError) as error:
        raise NoFormula(str(error)) from None


def value_of(tree: Tree, point: Mapping[str, Value]) -> Value:
    """The value at a point.

    Raises:
        ArithmeticError, ValueError: It has none there, or one that is too large.
    """
    kind, *parts = tree
    if kind == "number":
        return Fraction(parts[0])
    if kind == "symbol":
        return point[parts[0]]
    if kind == "constant":
        return complex(parts[0])
    values = [value_of(part, point) for part in parts if isinstance(part, tuple)]
    if kind == "call":
        found = _FUNCTIONS[parts[0]](complex(values[0]))
        return complex(found)
    if kind == "factorial":
        return _factorial(values[0])
    if kind == "binomial":
        return _factorial(values[0]) / (_factorial(values[1]) * _factorial(values[0] - values[1]))
    if kind == "power":
        return _power(values[0], values[1])
    one, other = values
    if isinstance(one, Fraction) != isinstance(other, Fraction):
        one, other = complex(one), complex(other)
    if kind == "sum":
        return one + other
    if kind == "product":
        return one * other
    return one / other


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        size = max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent.numerator)
        if size <= 10_000:
            return base**exponent.numerator
    return complex(base) ** complex(exponent)


def _factorial(value: Value) -> Fraction:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= 500:
        raise ValueError("no factorial of this")
    return Fraction(math.factorial(value.numerator))


class _Reader:
    """Reads sums of products of powers, by descent."""

    def __init__(self, text: str) -> None:
        self.tokens: list[tuple[str, str]] = []
        at = 0
        text = text.rstrip(" .")
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                raise NoFormula(f"what is {text[at : at + 10]!r}?")
            self.tokens.append((str(match.lastgroup), match[str(match.lastgroup)]))
            at = match.end()
        self.at, self.depth, self.bars = 0, 0, 0

    def whole(self) -> Tree:
        if not self.tokens:
            raise NoFormula("nothing")
        tree = self.sum()
        if self.at < len(self.tokens):
            raise NoFormula(f"what is {self.tokens[self.at][1]!r} doing here?")
        return tree

    def peek(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        found = self.peek()
        if not found or (wanted and found not in wanted):
            raise NoFormula(f"{' or '.join(wanted) or 'more'} is missing")
        self.at += 1
        return found

    def sum(self) -> Tree:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise NoFormula("too deep")
        tree = self.product()
        while self.peek() in ("+", "-"):
            sign = self.take()
            other = self.product()
            tree = ("sum", tree, other if sign == "+" else ("product", ("number", "-1"), other))
        self.depth -= 1
        return tree

    def product(self) -> Tree:
        tree = self.signed()
        while True:
            found = self.peek()
            if found in ("*", "/"):
                self.take()
                tree = ("product" if found == "*" else "quotient", tree, self.signed())
            elif self.begins_factor():
                mixed = tree[0] == "number" and found == "\\frac" and "." not in tree[1]
                other = self.power()
                tree = ("sum" if mixed and not symbols(other) else "product", tree, other)
            else:
                return tree

    def begins_factor(self) -> bool:
        if self.at >= len(self.tokens):
            return False
        kind, found = self.tokens[self.at]
        return kind in ("number", "command", "name") or found in "([{" or (found == "|" and not self.bars)

    def signed(self) -> Tree:
        if self.peek() in ("+", "-"):
            sign = self.take()
            self.depth += 1
            if self.depth > _DEEPEST:
                raise NoFormula("too deep")
            tree = self.signed()
            self.depth -= 1
            return tree if sign == "+" else ("product", ("number", "-1"), tree)
        return self.power()

    def power(self) -> Tree:
        tree = self.atom()
        while self.peek() == "!":
            self.take()
            tree = ("factorial", tree)
        if self.peek() in ("^", "**"):
            self.take()
            tree = ("power", tree, self.argument() if self.peek() == "{" else self.signed())
        return tree

    def argument(self) -> Tree:
        """What TeX takes as one: a group, or a single digit or letter."""
        kind, found = self.tokens[self.at] if self.at < len(self.tokens) else ("", "")
        if kind == "number" and len(found) > 1 and "." not in found:
            self.tokens[self.at : self.at + 1] = [("number", digit) for digit in found]
        return self.atom()

    def atom(self) -> Tree:
        if self.at >= len(self.tokens):
            raise NoFormula("something is missing at its end")
        kind, found = self.tokens[self.at]
        self.at += 1
        if kind == "number":
            return ("number", found)
        if kind == "name":
            return self.named(found)
        if kind == "command":
            return self.command(found[1:])
        closes = {"(": ")", "[": "]", "{": "}"}
        if found in closes:
            bars, self.bars = self.bars, 0
            tree = self.sum()
            self.take(closes[found])
            self.bars = bars
            return tree
        if found == "|":
            self.bars += 1
            tree = self.sum()
            self.take("|")
            self.bars -= 1
            return ("call", "abs", tree)
        raise NoFormula(f"what is {found!r} doing here?")

    def named(self, name: str) -> Tree:
        if self.peek() == "_":
            self.take()
            first = self.at
            self.argument()
            return (
                "symbol",
                name + "_" + "".join(text for _, text in self.tokens[first : self.at]).strip("{}"),
            )
        if name == "e":
            return ("constant", math.e)
        return ("constant", 1j) if name == "i" else ("symbol", name)

    def command(self, name: str) -> Tree:
        if name == "pi":
            return ("constant", math.pi)
        if name == "frac":
            return ("quotient", self.argument(), self.argument())
        if name in ("binom", "dbinom", "tbinom"):
            return ("binomial", self.argument(), self.argument())
        if name == "sqrt":
            root: Tree = ("number", "2")
            if self.peek() == "[":
                self.take()
                root = self.sum()
                self.take("]")
            return ("power", self.argument(), ("quotient", ("number", "1"), root))
        if name in _FUNCTIONS:
            return self.function(name)
        if name in ("text", "infty", "pm", "in", "cup", "cap", "sum", "int", "lim", "begin", "end"):
            raise NoFormula(f"\\{name} is no number")
        return ("symbol", f"\\{name}")

    def function(self, name: str) -> Tree:
        base: Tree | None = None
        power: Tree | None = None
        while self.peek() in ("_", "^"):
            if self.take() == "_":
                base = self.argument()
            else:
                power = self.argument()
        inner = self.power()
        if power == ("product", ("number", "-1"), ("number", "1")) and f"arc{name}" in _FUNCTIONS:
            name, power = f"arc{name}", None
        tree: Tree = ("call", name, inner)
        if base is not None:
            tree = ("quotient", tree, ("call", "log", base))
        return tree if power is None else ("power", tree, power)
