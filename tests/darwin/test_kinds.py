"""What a function's parameters are likely to take: by annotation, by default, by use; anything where nothing says."""

from __future__ import annotations

import ast

import pytest

from megatron_davinci.darwin.kinds import ALL, kinds_of

NUMBERS = {"integer", "decimal"}


@pytest.mark.parametrize(
    "text,of",
    [
        ("def f(x): return x", [ALL]), ("def f(x: int, y: str | None = None): ...", [{"integer"}, {"text", "none"}]),
        ("def f(x: 'Optional[float]', y: Path, z: Thing): ...", [NUMBERS | {"none"}, {"text"}, ALL]),
        ("def f(x: Literal['a', 'b'], y: bool): ...", [{"text"}, {"truth"}]),
        ("def f(x): return x.split(',')", [{"text", "bytes"}]),
        ("def f(x): return x.rjust(3) and x + '!'", [{"text"}]),
        ("def f(x, y=3, z=None): return [x * 2, y]", [NUMBERS, {"integer"}, ALL | {"none"}]),
        ("def f(x): return chr(x)", [{"integer"}]), ("def f(x): return x['key']", [{"dict"}]),
        ("def f(x): return x in ('a', 'b')", [{"text"}]), ("def f(x): return x > 0.5", [NUMBERS]),
        ("def f(x): return x & 3", [{"integer"}]), ("def f(x): return '%s' % x", [ALL]),
        ("def f(x): return -x", [NUMBERS]),
        ("def f(x): return os.path.join(x, 'a')", [{"text"}]), ("def f(x): return ', '.join(x)", [{"list", "tuple"}]),
        ("def f(x): return x.walk()", [ALL]), ("def f(x):\n  x.append(1)\n  return x + 1", [{"list", "integer"}]),
    ],
)  # fmt: skip
def test_kinds_of_parameters(text, of):
    found = [set(kind.of) for kind in kinds_of(ast.parse(text).body[0])]
    assert found == [set(each) for each in of]


def test_kinds_of_what_is_held():
    [listed, walked] = kinds_of(ast.parse("def f(a: list[str], b):\n for x in b: x.upper()").body[0])
    assert (listed.of, listed.items) == ({"list"}, {"text"})
    assert walked.of == {"text", "bytes", "list", "tuple", "dict"} and walked.items == {"text", "bytes"}
