"""Variables of a script and what becomes of words: `$X`, `${X}`, `${X[@]}`, `${X:-text}`, `$((...))`, `[[ ... ]]`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_davinci.convert.shell_words import Part, Token, parts_of
from megatron_davinci.errors import ConfigError

LONGEST = 50_000  # characters of a value, or words of a command: a variable can double itself on every line
_REFERENCE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*|[0-9]+|[@*#?$!-])(?:\[([@*]|[0-9]+)\])?(.*)", re.DOTALL)
_DEFAULT = re.compile(r"(:?[-=+])(.*)", re.DOTALL)
_SUM = re.compile(r"\s*(\$\{\w+\}|\$[0-9]|\$?[A-Za-z_]\w*|[0-9]+|\*\*|.)", re.DOTALL)
_IN_SUM = re.compile(r"\$\{(\w+)\}|\$([0-9])|\$?\b([A-Za-z_]\w*)")
_NUMBER_TESTS = ("-eq", "-ne", "-lt", "-le", "-gt", "-ge")
_LARGEST = 2**63
_DEEPEST = 20  # defaults inside defaults


@dataclass(frozen=True)
class Field:
    """A word as a command would get it.

    Attributes:
        text: The word. What is not known stands in it as the script writes it.
        line: Where it is written.
        unknown: The expansions in it that are not known.
    """

    text: str
    line: int
    unknown: tuple[str, ...] = ()


Value = list[Field]
"""Pieces of a value, each with its line."""


class Expander:
    """The variables as far as the script was read."""

    def __init__(self, where: str, given: Mapping[str, str]) -> None:
        self.where = where
        self._condition: list[Token] = []
        self._inside = False
        self._depth = 0
        # A scalar is an array of one, as in bash; None: assigned, but not known to what.
        self._given: dict[str, list[Value]] = {name: [[Field(value, 0)]] for name, value in given.items()}
        self._variables: dict[str, list[Value] | None] = dict(self._given)

    def assign(self, name: str, value: Value, append: bool) -> None:
        """`NAME=value`, or `NAME+=value`."""
        before = self._variables.get(name) if append else None
        self._set(name, [[*before[0], *value], *before[1:]] if before else [value])

    def assign_array(self, name: str, items: list[Value], append: bool) -> None:
        """`NAME=(...)`, or `NAME+=(...)`."""
        before = self._variables.get(name) if append else None
        self._set(name, [*(before or []), *items])

    def forget(self, name: str, line: int) -> None:
        """Something that was not read may have assigned it: it is what the caller says, or not known."""
        self._variables[name] = self._given.get(name)

    def lacking(self, found: Sequence[Token]) -> list[str]:
        """The expansions in words that are not known."""
        words = [token for token in found if token.kind == "word"]
        return [written for token in words for piece in self.scalar(token.parts) for written in piece.unknown]

    def fields_of_variable(self, name: str) -> list[Field]:
        """The words of a variable that stands without quotes."""
        return _split([(piece, False) for value in self._values(name, "@") or [] for piece in [*value, _GAP]])

    def shown(self, token: Token) -> str:
        """A token about as it is written."""
        if token.kind != "word":
            return token.text
        return "".join(p.text if p.kind == "text" else _written(p) for p in token.parts)

    def scalar(self, parts: Sequence[Part]) -> Value:
        """The value of text that is not split: of an assignment, or between quotes."""
        return [piece for part in parts for piece in self._joined(part)]

    def fields(self, token: Token) -> list[Field]:
        """The words that a word becomes."""
        pieces: list[tuple[Field, bool]] = []
        for part in token.parts:
            every = part.kind == "name" and part.quoted and part.text.endswith("[@]")
            if part.kind == "text":
                pieces.append((Field(part.text, part.line), True))
            elif every and (values := self._values(part.text[:-3], "@")) is not None:
                for number, value in enumerate(values):
                    pieces += [(_GAP, False)] if number else []
                    pieces += [(piece, True) for piece in value]
            else:
                pieces += [(piece, part.quoted) for piece in self._joined(part)]
        fields = _split(pieces)
        if sum(len(f.text) for f in fields) > LONGEST:
            raise self._endless(token.line)
        return fields

    # ---- expansions --------------------------------------------------------------------------------------

    def _joined(self, part: Part) -> Value:
        if part.kind == "text":
            return [Field(part.text, part.line)]
        if part.kind == "sum":
            number = self._sum(part.text)
            return (
                [Field(str(number), part.line)]
                if number is not None
                else self._unknown(self._shortened(part))
            )
        if part.kind in ("command", "blank"):
            return self._unknown(part)
        match = _REFERENCE.fullmatch(part.text)
        if match is None:
            return self._unknown(part)
        name, index, rest = match[1], match[2], match[3]
        values = self._values(name, index)
        default = _DEFAULT.fullmatch(rest)
        if rest and default is None:
            return self._unknown(part)
        if default:
            given = name in self._variables
            if given and values is None:
                return self._unknown(part)
            empty = not values or (default[1][0] == ":" and not "".join(p.text for v in values for p in v))
            if empty != default[1].endswith("+"):
                self._depth += 1
                if self._depth > _DEEPEST:
                    raise RecursionError
                value = self.scalar(parts_of(default[2], self.where, part.line, part.quoted))
                self._depth -= 1
                return value
            if default[1].endswith("+"):
                return []
        if values is None:
            return self._unknown(part)
        joined: Value = []
        for value in values:
            joined += [*([Field(" ", part.line)] if joined else []), *value]
        # A given value has no line of its own.
        return [f if f.line else Field(f.text, part.line, f.unknown) for f in joined]

    def _values(self, name: str, index: str | None) -> list[Value] | None:
        values = self._variables.get(name)
        if values is None or index in ("@", "*"):
            return values
        number = int(index) if index and len(index) < 9 else 0
        return values[number : number + 1]

    def _shortened(self, part: Part) -> Part:
        """A sum with what is known of it: what its variables lack is what is to be said."""

        def known(match: re.Match[str]) -> str:
            values = self._values(match[match.lastindex or 0], None)
            text = "".join(piece.text for piece in values[0]) if values else ""
            return text if text and len(text) < 40 else match[0]

        return replace(part, text=_IN_SUM.sub(known, part.text))

    def _unknown(self, part: Part) -> Value:
        written = _written(part)
        return [Field(written, part.line, (written,))]

    def _set(self, name: str, values: list[Value]) -> None:
        if sum(len(piece.text) + 1 for value in values for piece in value) > LONGEST:
            raise self._endless(values[0][0].line)
        self._variables[name] = values

    def _endless(self, line: int) -> ConfigError:
        return ConfigError(
            "The script cannot be read.",
            where=f"{self.where}:{line}",
            found=f"a value of more than {LONGEST:,} characters",
            do="write the launch command out: `torchrun ... pretrain_gpt.py --num-layers ...`",
        )

    # ---- arithmetic --------------------------------------------------------------------------------------

    def _sum(self, text: str) -> int | None:
        """The value of `$((...))`; None for what is more than + - * / % and brackets on known integers."""
        found = [match[1] for match in _SUM.finditer(text.strip())]
        numbers: list[int] = []
        waiting: list[str] = []
        rank = {"+": 1, "-": 1, "*": 2, "/": 2, "%": 2}

        def apply() -> bool:
            operator = waiting.pop()
            if operator == "(" or len(numbers) < 2:
                return False
            right, left = numbers.pop(), numbers.pop()
            if operator in "/%":
                if right == 0:
                    return False
                # C's division: towards zero.
                quotient = abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)
                numbers.append(quotient if operator == "/" else left - quotient * right)
            else:
                numbers.append({"+": left + right, "-": left - right, "*": left * right}[operator])
            return abs(numbers[-1]) < _LARGEST

        operand = True
        for token in found:
            if token in rank and not operand:
                while waiting and waiting[-1] in rank and rank[waiting[-1]] >= rank[token]:
                    if not apply():
                        return None
                waiting.append(token)
                operand = True
            elif token == "(" and operand:
                waiting.append(token)
            elif token == ")" and not operand:
                while waiting and waiting[-1] != "(":
                    if not apply():
                        return None
                if not waiting:
                    return None
                waiting.pop()
            elif operand and (number := self._integer(token)) is not None:
                numbers.append(number)
                operand = False
            else:
                return None
        while waiting:
            if not apply():
                return None
        return numbers[0] if len(numbers) == 1 and not operand else None

    def _integer(self, token: str) -> int | None:
        name = token.strip("${}")
        if token[:1] == "$" or not name[:1].isdigit():
            values = self._values(name, None)
            name = "".join(p.text for p in values[0]).strip() if values else ""
        return int(name) if re.fullmatch(r"[1-9][0-9]{0,17}|0", name) else None

    # ---- conditions --------------------------------------------------------------------------------------

    def truth(self, found: Sequence[Token]) -> bool | None:
        """Whether a condition of `[ ]`, `[[ ]]` and `test` holds; None where that is not known, as of a command."""
        self._condition = [t for t in found if t.kind != "end" and t.text != ";"]
        self._inside = False  # brackets, where a word by itself holds if it is not empty
        truth = self._either()
        return None if self._condition else truth

    def _either(self) -> bool | None:
        truth = self._both()
        while self._next("||", "-o"):
            other = self._both()
            truth = True if True in (truth, other) else None if None in (truth, other) else False
        return truth

    def _both(self) -> bool | None:
        truth = self._one()
        while self._next("&&", "-a"):
            other = self._one()
            truth = False if False in (truth, other) else None if None in (truth, other) else True
        return truth

    def _next(self, *words: str) -> bool:
        if self._condition and self._head() in words:
            self._condition.pop(0)
            return True
        return False

    def _head(self) -> str | None:
        token = self._condition[0] if self._condition else None
        return None if token is None else token.text if token.kind == "operator" else token.plain

    def _one(self) -> bool | None:
        if self._next("!"):
            truth = self._one()
            return None if truth is None else not truth
        for opening, closing in (("[[", "]]"), ("[", "]"), ("(", ")")):
            if self._next(opening):
                if opening == "(" and self._head() == "(":
                    self._condition.clear()  # arithmetic
                    return None
                before, self._inside = self._inside, self._inside or opening != "("
                truth = self._either()
                self._inside = before
                return truth if self._next(closing) else None
        self._inside = self._next("test") or self._inside
        operator = self._head() or ""
        if operator in ("-z", "-n") and len(self._condition) > 1:
            self._condition.pop(0)
            text = self._text(self._condition.pop(0))
            return None if text is None else (text == "") == (operator == "-z")
        if re.fullmatch(r"-[a-z]", operator) and len(self._condition) > 1:
            del self._condition[:2]
            return None  # about files, which are not looked at
        if not self._condition or self._condition[0].kind != "word":
            return None
        left = self._text(self._condition.pop(0))
        comparison = self._head() or ""
        if comparison not in ("=", "==", "!=", *_NUMBER_TESTS) or len(self._condition) < 2:
            if left is None or self._inside:
                return None if left is None else left != ""
            return {"true": True, ":": True, "false": False}.get(left)
        self._condition.pop(0)
        right = self._text(self._condition.pop(0))
        if left is None or right is None:
            return None
        if comparison in _NUMBER_TESTS:
            if not (left.lstrip("-").isdecimal() and right.lstrip("-").isdecimal()):
                return None
            a, b = int(left[:19]), int(right[:19])
            return {
                "-eq": a == b, "-ne": a != b, "-lt": a < b, "-le": a <= b, "-gt": a > b, "-ge": a >= b,
            }[comparison]  # fmt: skip
        if any(mark in right for mark in "*?["):
            return None  # a pattern
        return (left == right) == (comparison != "!=")

    def _text(self, token: Token) -> str | None:
        value = self.scalar(token.parts)
        return None if any(piece.unknown for piece in value) else "".join(piece.text for piece in value)


_GAP = Field(" ", 0)


def _written(part: Part) -> str:
    if part.kind == "blank":
        return part.text
    if part.kind == "sum":
        return f"$(({part.text}))"
    if part.kind == "command":
        return f"$({part.text})"
    plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*|[0-9@*#?$!-]", part.text)
    return f"${part.text}" if plain else f"${{{part.text}}}"


def _split(pieces: Sequence[tuple[Field, bool]]) -> list[Field]:
    """Join pieces to words, and cut those that no quotes keep together at white space."""
    fields: list[Field] = []
    text: str | None = None
    line = 0
    unknown: tuple[str, ...] = ()
    for piece, quoted in pieces:
        for chunk, is_gap in [(piece.text, False)] if quoted else _chunks(piece):
            if is_gap:
                if text is not None:
                    fields.append(Field(text, line, unknown))
                    text = None
                continue
            if text is None:
                text, line, unknown = "", piece.line, ()
            text += chunk
            unknown += tuple(written for written in piece.unknown if written in chunk)
    if text is not None:
        fields.append(Field(text, line, unknown))
    return fields


def _chunks(piece: Field) -> list[tuple[str, bool]]:
    """Text and white space in turn. What is not known stays whole, though the shell might find words in it."""
    whole = "".join(f"{re.escape(written)}|" for written in piece.unknown)
    found = re.finditer(rf"({whole}[^ \t\n])|[ \t\n]+", piece.text)
    chunks: list[tuple[str, bool]] = []
    for match in found:
        if chunks and match[1] is not None and not chunks[-1][1]:
            chunks[-1] = (chunks[-1][0] + match[0], False)
        else:
            chunks.append((match[0], match[1] is None))
    return chunks
