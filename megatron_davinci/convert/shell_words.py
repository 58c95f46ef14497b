"""The words of a shell script: quotes, continuations, comments and what stands to be expanded. Nothing is run.

The part of the language that launch scripts are written in, after the POSIX shell's grammar and bash's arrays.
Every piece of text keeps the line that it was written on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from megatron_davinci.errors import ConfigError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(\+?)=")
# `<path to data>` in a published script stands for a value; `< file` and `<file >other` are redirections.
_PLACEHOLDER = re.compile(r"<[A-Za-z][^<>\n|&;]{0,100}(?<! )>")
_SPECIAL = re.compile(r"[0-9@*#?$!-]")
_RUN = re.compile(r"[A-Za-z0-9_./:,=+@%^-]+")
_DELIMITER = re.compile(r"-?[ \t]*['\"]?([A-Za-z_0-9]+)")
_LONG = (
    4096  # characters of a piece that nothing is joined to: joining again and again would take square time
)
_OPERATORS = ("&&", "||", ";;", "<<<", "<<", ">>", ">&", "&>", "<&", ";", "&", "|", "(", ")", "<", ">")


@dataclass(frozen=True)
class Part:
    """A piece of a word.

    Attributes:
        kind: `text`; `blank` (a placeholder, `<path to data>`);
            `name` (`$X`, `${X...}`, without the braces), `sum` (`$((...))`) or `command` (`$(...)`).
        text: What is inside.
        quoted: Whether quotes keep it from being split.
        line: Where it stands.
    """

    kind: str
    text: str
    quoted: bool
    line: int


@dataclass(frozen=True)
class Token:
    """A word, an operator, the end of a line, or an array that is assigned.

    Attributes:
        kind: `word`, `operator`, `end` (of a line), `array` or `here` (a document after `<<`).
        text: The operator; the document; of an array `NAME` or `NAME+`.
        parts: Of a word.
        items: The words of an array.
        line: Where it begins.
    """

    kind: str
    line: int
    text: str = ""
    parts: tuple[Part, ...] = ()
    items: tuple[Token, ...] = ()

    @property
    def plain(self) -> str | None:
        """The text of a word without quotes and expansions; None for any other."""
        if self.kind == "word" and all(part.kind == "text" and not part.quoted for part in self.parts):
            return "".join(part.text for part in self.parts)
        return None

    def assignment(self) -> tuple[str, bool, tuple[Part, ...]] | None:
        """The name, whether it is appended to (`+=`), and the value, of a word `NAME=value`."""
        if self.kind != "word" or not self.parts or self.parts[0].kind != "text" or self.parts[0].quoted:
            return None
        first = self.parts[0]
        match = _ASSIGNMENT.match(first.text)
        if match is None:
            return None
        rest = Part("text", first.text[match.end() :], False, first.line)
        return match[1], bool(match[2]), (rest, *self.parts[1:])


@dataclass
class _Word:
    parts: list[Part] = field(default_factory=list)
    line: int = 0
    begun: bool = False

    def add(self, kind: str, text: str, quoted: bool, line: int) -> None:
        if not self.begun:
            self.begun, self.line = True, line
        last = self.parts[-1] if self.parts else None
        alike = last is not None and (last.kind, last.quoted, last.line) == (kind, quoted, line)
        if kind == "text" and last and alike and len(last.text) < _LONG:
            self.parts[-1] = Part("text", last.text + text, quoted, line)
        else:
            self.parts.append(Part(kind, text, quoted, line))


def tokens(text: str, where: str, first_line: int = 1) -> list[Token]:
    """Cut a script into tokens.

    Raises:
        ConfigError: A quote, a bracket or an array that does not end; the line is where it begins.
    """
    return _Lexer(text.replace("\r\n", "\n"), where, first_line).all()


def parts_of(text: str, where: str, line: int, quoted: bool) -> tuple[Part, ...]:
    """The parts of the text inside braces, as in `${X:-text}`, where white space ends nothing."""
    lexer = _Lexer(text, where, line)
    word = _Word()
    while lexer.at < len(text):
        if not lexer.piece(word, quoted):
            lexer.run(word, quoted)
    return tuple(word.parts)


class _Lexer:
    def __init__(self, text: str, where: str, line: int) -> None:
        self.text, self.where, self.line, self.at = text, where, line, 0
        self.here: list[str] = []
        self.documents: list[Token] = []
        self.in_array = False

    def next(self) -> str:
        character = self.text[self.at]
        self.at += 1
        self.line += character == "\n"
        return character

    def skip(self, count: int) -> None:
        self.line += self.text.count("\n", self.at, self.at + count)
        self.at += count

    def follows(self, what: str) -> bool:
        return self.text.startswith(what, self.at)

    def unended(self, what: str, line: int) -> ConfigError:
        return ConfigError(
            "The script cannot be read.",
            where=f"{self.where}:{line}",
            found=f"{what} that does not end",
            do="check that the script runs: `bash -n` says what is wrong with it",
        )

    def all(self) -> list[Token]:
        found: list[Token] = []
        while (token := self.token()) is not None:
            found.append(token)
        return found

    def token(self) -> Token | None:
        if self.documents:
            return self.documents.pop(0)
        word = _Word()
        while self.at < len(self.text):
            character = self.text[self.at]
            if character in " \t\n":
                if word.begun:
                    break
                line = self.line
                self.next()
                if character == "\n":
                    self.skip_here_documents()
                    return Token("end", line)
            elif character == "#" and not word.begun:
                while self.at < len(self.text) and self.text[self.at] != "\n":
                    self.next()
            elif character == "(" and self.array_of(word):
                return self.array(word)
            elif placeholder := _PLACEHOLDER.match(self.text, self.at):
                word.add("blank", placeholder[0], True, self.line)
                self.skip(len(placeholder[0]))
            elif operator := next((o for o in _OPERATORS if self.follows(o)), None):
                number = Token("word", word.line, parts=tuple(word.parts)).plain if word.begun else None
                if word.begun and not (operator[0] in "<>" and (number or "").isdecimal()):
                    break  # the 2 of `2>&1` is no word
                word, line = _Word(), self.line
                self.skip(len(operator))
                if operator == "<<":
                    self.note_here_document()
                return Token("operator", line, operator)
            elif not self.piece(word, False):
                self.run(word, False)
        return Token("word", word.line, parts=tuple(word.parts)) if word.begun else None

    def array_of(self, word: _Word) -> bool:
        plain = Token("word", word.line, parts=tuple(word.parts)).plain if word.begun else None
        return not self.in_array and _ASSIGNMENT.fullmatch(plain or "") is not None

    def array(self, word: _Word) -> Token:
        name = "".join(part.text for part in word.parts).removesuffix("=")
        line = self.line
        self.next()
        items: list[Token] = []
        self.in_array = True
        while (token := self.token()) is not None:
            if token.kind == "operator" and token.text == ")":
                self.in_array = False
                return Token("array", word.line, name, items=tuple(items))
            if token.kind == "word":
                items.append(token)
            elif token.kind != "end":
                raise self.unended(f"an array with {token.text} in it", line)
        raise self.unended("an array", line)

    def piece(self, word: _Word, quoted: bool) -> bool:
        """Read a quote, an escape or an expansion, if one stands here."""
        character = self.text[self.at]
        line = self.line
        if character == "\\":
            self.next()
            if self.at < len(self.text):
                escaped = self.next()
                if escaped != "\n":
                    plain = not quoted or escaped in '$`"\\'
                    word.add("text", escaped if plain else "\\" + escaped, True, line)
            return True
        if character == "'" and not quoted:
            end = self.text.find("'", self.at + 1)
            if end < 0:
                raise self.unended("a quote", line)
            self.next()
            word.add("text", "", True, line)
            self.verbatim(word, end)
            self.next()
            return True
        if character == '"':
            self.next()
            word.add("text", "", True, line)
            while self.at < len(self.text) and self.text[self.at] != '"':
                if not self.piece(word, True):
                    self.run(word, True)
            if self.at >= len(self.text):
                raise self.unended("a quote", line)
            self.next()
            return True
        if character == "`":
            end = self.text.find("`", self.at + 1)
            if end < 0:
                raise self.unended("a command in backquotes", line)
            word.add("command", self.text[self.at + 1 : end], quoted, line)
            self.skip(end + 1 - self.at)
            return True
        return character == "$" and self.expansion(word, quoted)

    def run(self, word: _Word, quoted: bool) -> None:
        """Read one ordinary character, and those after it that mean nothing anywhere."""
        line, match = self.line, _RUN.match(self.text, self.at)
        if match:
            self.at = match.end()
        word.add("text", match[0] if match else self.next(), quoted, line)

    def verbatim(self, word: _Word, end: int) -> None:
        while self.at < end:
            stop = self.text.find("\n", self.at, end) + 1 or end
            line, text = self.line, self.text[self.at : stop]
            self.skip(len(text))
            word.add("text", text, True, line)

    def expansion(self, word: _Word, quoted: bool) -> bool:
        line = self.line
        if self.follows("$(("):
            inside = self.balanced(3, "(", ")", depth=2)
            word.add("sum", inside[:-1], quoted, line)
        elif self.follows("$("):
            word.add("command", self.balanced(2, "(", ")"), quoted, line)
        elif self.follows("${"):
            word.add("name", self.balanced(2, "{", "}"), quoted, line)
        elif match := _NAME.match(self.text, self.at + 1) or _SPECIAL.match(self.text, self.at + 1):
            word.add("name", match[0], quoted, line)
            self.skip(1 + len(match[0]))
        else:
            return False
        return True

    def balanced(self, opening: int, left: str, right: str, depth: int = 1) -> str:
        """Read past a closing bracket; what stands before it."""
        line = self.line
        self.skip(opening)
        begin, quote = self.at, ""
        while self.at < len(self.text):
            character = self.next()
            if character == "\\" and self.at < len(self.text):
                self.next()
            elif quote:
                quote = "" if character == quote else quote
            elif character in "'\"":
                quote = character
            elif character == left:
                depth += 1
            elif character == right:
                depth -= 1
                if depth == 0:
                    return self.text[begin : self.at - 1]
        raise self.unended("an expansion", line)

    def note_here_document(self) -> None:
        match = _DELIMITER.match(self.text, self.at)
        if match:
            self.here.append(match[1])

    def skip_here_documents(self) -> None:
        for delimiter in self.here:
            first, begin = self.line, self.at
            while self.at < len(self.text):
                end = self.text.find("\n", self.at)
                line = self.text[self.at : end if end >= 0 else len(self.text)]
                self.skip(min(len(line) + 1, len(self.text) - self.at))
                if line.strip() == delimiter:
                    break
            self.documents.append(Token("here", first, self.text[begin : self.at]))
        self.here = []
