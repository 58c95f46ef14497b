"""Answers for the verifier, drawn from a seed: references, other forms of them, and wrong answers that look alike."""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple


class Case(NamedTuple):
    """An answer to judge.

    Attributes:
        kind: What it is.
        right: Whether it is right.
        said: The whole of what a model says.
        reference: The right answer.
    """

    kind: str
    right: bool
    said: str
    reference: str


def answer_cases(seed: int, count: int) -> Iterator[Case]:
    """Of every kind `count` times: a right answer in another form, and its wrong twin."""
    draw = random.Random(seed)
    for _ in range(count):
        for kind, reference, right, wrong in _drawn(draw):
            for good, answer in ((True, right), (False, wrong)):
                yield Case(kind, good, _said(draw, answer), reference)


def _said(draw: random.Random, answer: str) -> str:
    before = draw.choice(
        ["First we set up the equation. So 17 goes.\n", "Let $t = 3$, then \\boxed{t} is not it.\n", ""]
    )
    return before + draw.choice(
        [f"Thus the answer is \\boxed{{{answer}}}.", f"So we get $\\boxed{{{answer}}}$", f"#### {answer}"]
        if "\n" not in answer
        else [f"\\boxed{{{answer}}}"]
    )


def _drawn(draw: random.Random) -> Iterator[tuple[str, str, str, str]]:
    a, b = draw.randrange(2, 90), draw.randrange(2, 90)
    big = draw.randrange(10_000, 900_000)
    part = Fraction(a, b * 2 + 1)
    p, q = part.numerator, part.denominator
    x = draw.choice("xyt")
    names = draw.sample(["Paris", "mitosis", "helium", "Lindqvist", "entropy"], 2)
    unit, other = draw.sample(["km", "cm", "kg", "mol", "Hz", "kPa"], 2)
    yield (
        "an integer",
        str(big),
        draw.choice([f"{big:,}", f"{big}.0", f"\\text{{{big}}}", f"${big}$"]),
        str(big + a),
    )
    yield "a sign", str(-a), f"$-{a}$", str(a)
    yield (
        "a fraction",
        f"\\frac{{{p}}}{{{q}}}",
        draw.choice([f"{p}/{q}", f"\\dfrac{{{2 * p}}}{{{2 * q}}}"]),
        f"{q}/{p + 1}",
    )
    yield "a decimal", f"{a}.{b:02d}5", f"{a}.{b:02d}50", f"{a}.{b:02d}6"
    yield "a rounded one", f"{p}/{q}", f"{p / q:.4f}", f"{p / q + 0.002:.4f}"
    yield "per cent", f"{a}%", draw.choice([f"{a}\\%", f"{a}"]), f"{a + 1}\\%"
    yield "a unit", f"{a} {unit}", draw.choice([f"{a}\\text{{ {unit}}}", f"{a}"]), f"{a} {other}"
    yield "a named value", f"{a}", f"{x} = {a}", f"{x} = {a + 1}"
    yield "a root", f"{a}\\sqrt{{2}}", f"\\sqrt{{{2 * a * a}}}", f"\\sqrt{{{2 * a * a + 2}}}"
    yield "a polynomial", f"({x}+{a})^2", f"{x}^2+{2 * a}{x}+{a * a}", f"{x}^2+{2 * a}{x}+{a * a + 1}"
    yield "an identity", f"\\sin(2{x})+{a}", f"{a}+2\\sin {x}\\cos {x}", f"{a}+2\\sin {x}\\sin {x}"
    yield "a quotient", f"\\frac{{{x}^2-{a * a}}}{{{x}-{a}}}", f"{x}+{a}", f"{x}-{a}"
    yield "a power", f"2^{{{a % 20}}}", str(2 ** (a % 20)), str(2 ** (a % 20 + 1))
    yield "a multiple of pi", f"\\frac{{{a}\\pi}}{{6}}", f"{a}π/6", f"{a}π/3"
    yield "a set", f"\\{{{a}, {b + 100}\\}}", f"{b + 100}, {a}", f"{b + 101}, {a}"
    yield "a point", f"({a}, {b + 100})", f"\\left({a}.0, {b + 100}\\right)", f"({b + 100}, {a})"
    yield "an interval", f"[{a}, {a + b})", f"\\left[{a},{a + b}\\right)", f"[{a}, {a + b}]"
    yield "two signs", f"\\pm {a}", f"{a} \\text{{ and }} -{a}", f"{a}"
    letter, not_it = draw.sample("ABCDE", 2)
    yield (
        "a letter",
        letter,
        draw.choice([f"({letter})", f"{letter}. {names[0]}", letter]),
        f"{not_it}. {names[0]}",
    )
    yield "a word", names[0], names[0].lower(), names[1]
    yield "no answer", str(a), str(a), ""


def code_cases(seed: int, count: int) -> Iterator[tuple[str, bool, str, str]]:
    """Programs with tests: kind, whether it is right, program, tests."""
    draw = random.Random(seed)
    for _ in range(count):
        a = draw.randrange(2, 50)
        tests = f"assert f([1, {a}]) == {a + 1}\nassert f([]) == 0\nassert f([-{a}]) == -{a}"
        yield (
            "right",
            True,
            draw.choice(
                ["def f(x): return sum(x)", "def f(x):\n    t = 0\n    for y in x: t += y\n    return t"]
            ),
            tests,
        )
        for kind, program in {
            "wrong": "def f(x): return max(x, default=0)",
            "raises": "def f(x): return x[0] + x[1]",
            "no syntax": "def f(x) return sum(x)",
            "leaves": f"import os\ndef f(x): os._exit({0})",
            "never ends": "def f(x):\n    while x: pass\n    return 0",
            "no function": f"answer = {a}",
        }.items():
            if kind != "never ends" or draw.random() < 0.34:
                yield kind, False, program, tests
