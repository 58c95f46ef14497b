"""What a launch script would start, found without running it: assignments, arrays, expansions, simple conditions.

Nothing is executed, no file is opened and the environment is not looked at. What cannot be known that way (the
output of a command, a variable that the script never sets, a condition on the machine) stays in the text as it is
written, and is named with its line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_davinci.convert.shell_expand import Expander, Field, Value
from megatron_davinci.convert.shell_words import Token, tokens
from megatron_davinci.errors import ConfigError

_DECLARE = frozenset({"export", "declare", "local", "readonly", "typeset"})
_ELSEWHERE = frozenset({"read", "unset", "source", "."})  # what changes variables by what is not read here
_NAME = re.compile(r"[A-Za-z_]\w*")
_ELEMENT = re.compile(r"([A-Za-z_]\w*)\[[^\]]*\]\+?=")
_OPENERS = {"for": "done", "while": "done", "until": "done", "select": "done", "case": "esac"}
_REDIRECTIONS = frozenset({"<", "<<", ">", ">>", ">&", "&>", "<<<", "<&"})
_CONNECTORS = frozenset({"&&", "||"})
_LONGEST_PASSAGE = 60  # characters of what is quoted of a passage


@dataclass(frozen=True)
class Unread:
    """A passage that was not understood.

    Attributes:
        line: Where it begins.
        why: What it is.
        flags: The words in it that look like flags, each with its line.
    """

    line: int
    why: str
    flags: tuple[Field, ...] = ()


@dataclass
class Script:
    """What was understood of a script.

    Attributes:
        commands: Every simple command that it would reach, as its words.
        flags: Words of variables and arrays that begin with a flag, in the order of the script: what a file
            holds that only sets variables for another one.
        unread: What was not understood.
        because: Of a variable that a condition decides which is not known, the expansion that this lacks.
    """

    commands: list[list[Field]] = field(default_factory=list)
    flags: list[Field] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)
    because: dict[str, str] = field(default_factory=dict)


def read_script(text: str, where: str, given: Mapping[str, str]) -> Script:
    """Read a script.

    Args:
        text: The script.
        where: Its name, for messages.
        given: Variables that the caller knows; names of digits are what the script is called with. A script's own
            plain assignment wins, as it does in the shell.

    Raises:
        ConfigError: A quote or bracket that does not end, or an expansion without bounds.
    """
    try:
        reader = _Reader(tokens(text, where), where, given)
        reader.block(())
        return reader.finished()
    except RecursionError:
        raise ConfigError(
            "The script cannot be read.",
            where=where,
            found="blocks or expansions that are nested too deeply",
            do="write the launch command out: `torchrun ... pretrain_gpt.py --num-layers ...`",
        ) from None


class _Reader:
    def __init__(self, found: list[Token], where: str, given: Mapping[str, str]) -> None:
        self.tokens, self.at = found, 0
        self.script = Script()
        self.expander = Expander(where, given)
        self.assigned: dict[str, None] = {}

    def finished(self) -> Script:
        for name in self.assigned:
            words = self.expander.fields_of_variable(name)
            if words and words[0].text.startswith("--"):
                self.script.flags += words
        self.script.unread.sort(key=lambda passage: passage.line)
        return self.script

    # ---- blocks ------------------------------------------------------------------------------------------

    def block(self, closers: tuple[str, ...]) -> str | None:
        """Read statements up to a word of `closers`, and past it; which it was."""
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            word = token.plain
            if word in closers:
                self.at += 1
                return word
            if word == "if":
                self.at += 1
                self.conditional(token.line)
            elif word in _OPENERS:
                self.opaque(token, word, _OPENERS[word])
            elif word == "function" or self.begins_function():
                self.opaque(token, "{", "}", "a function")
            elif token.kind == "here":
                self.at += 1
                flags = tuple(Field(f, token.line) for f in token.text.split() if f.startswith("--"))
                self.script.unread.append(Unread(token.line, "a document inside the script", flags))
            elif self.begins_arithmetic():
                self.arithmetic(token.line)
            elif token.kind == "end" or token.kind == "operator" or word in ("{", "}", "then", "do", "done"):
                self.at += 1
            else:
                self.chain()
        return None

    def begins_function(self) -> bool:
        following = self.tokens[self.at + 1 : self.at + 3]
        return self.tokens[self.at].plain is not None and [(t.kind, t.text) for t in following] == [
            ("operator", "("),
            ("operator", ")"),
        ]

    def begins_arithmetic(self) -> bool:
        return [(t.kind, t.text) for t in self.tokens[self.at : self.at + 2]] == [("operator", "(")] * 2

    def arithmetic(self, line: int) -> None:
        """Step over `(( ... ))`, whose value is not worked out, and over what depends on it."""
        begin, depth = self.at, 0
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            depth += (token.kind == "operator") * ((token.text == "(") - (token.text == ")"))
            self.at += 1
            if depth == 0:
                break
        while self.at < len(self.tokens) and self.tokens[self.at].text in _CONNECTORS:
            self.at += 1
            self.simple_command()
        self.unknown(line, "`(( ... ))`: not known here", self.tokens[begin : self.at])

    def opaque(self, token: Token, opener: str, closer: str, what: str | None = None) -> None:
        """Step over a loop, a case or a function; list its flags and forget what it may have assigned."""
        begin, depth = self.at, 0
        while self.at < len(self.tokens):
            word = self.tokens[self.at].plain
            self.at += 1
            depth += (word in _OPENERS and _OPENERS[word] == closer) or word == opener == "{"
            depth -= word == closer
            if word == closer and depth == 0:
                break
        self.unknown(token.line, what or f"`{opener}` ... `{closer}`", self.tokens[begin : self.at])

    def unknown(self, line: int, why: str, passage: list[Token], lacking: str | None = None) -> None:
        flags: list[Field] = []
        changed = False
        for token in passage:
            assignment = token.assignment()
            if token.kind == "array" or assignment:
                name = token.text.rstrip("+") if assignment is None else assignment[0]
                self.expander.forget(name, token.line)
                changed = True
                if lacking is not None:
                    self.script.because[name] = lacking
            for word in [token, *token.items]:
                assignment = word.assignment()
                parts = assignment[2] if assignment else word.parts
                flags += [
                    Field(flag, piece.line, piece.unknown)
                    for piece in self.expander.scalar(parts)
                    for flag in piece.text.split()
                    if flag.startswith("--")
                ]
        if flags or changed:
            self.script.unread.append(Unread(line, why, tuple(flags)))

    def conditional(self, line: int) -> None:
        """Read `if ... fi`: the branch whose condition can be known, or none of them."""
        decided = False
        while True:
            begin = self.at
            while self.at < len(self.tokens) and self.tokens[self.at].plain != "then":
                self.at += 1
            truth = None if decided else self.expander.truth(self.tokens[begin : self.at])
            passage = self.tokens[begin : self.at]
            self.at += 1
            begin = self.at
            if truth and not decided:
                closer = self.block(("elif", "else", "fi"))
                decided = True
            else:
                closer = self.skip_branch()
                if truth is None and not decided:
                    closer = self.undecided(line, begin, passage, closer)
                    return
            if closer == "else":
                if decided:
                    self.skip_branch()
                else:
                    self.block(("fi",))
                return
            if closer != "elif":
                return

    def undecided(self, line: int, begin: int, condition: list[Token], closer: str | None) -> str | None:
        while closer in ("elif", "else"):
            closer = self.skip_branch()
        words = " ".join(self.expander.shown(token) for token in condition)
        words = words.replace(" ;", "").strip()
        words = words if len(words) <= _LONGEST_PASSAGE else words[: _LONGEST_PASSAGE - 3] + "..."
        lacking = self.expander.lacking(condition)
        why = f"`if {words}`: not known here, no branch is taken"
        self.unknown(line, why, self.tokens[begin : self.at], lacking[0] if lacking else None)
        return closer

    def skip_branch(self) -> str | None:
        depth = 0
        while self.at < len(self.tokens):
            word = self.tokens[self.at].plain
            self.at += 1
            if word == "if":
                depth += 1
            elif word == "fi" and depth:
                depth -= 1
            elif word in ("elif", "else", "fi") and not depth:
                return word
        return None

    # ---- statements --------------------------------------------------------------------------------------

    def chain(self) -> None:
        """Read simple commands that `&&` and `||` join, each as far as it is known to be reached."""
        status: bool | None = True
        connector = "&&"
        while True:
            simple = self.simple_command()
            if status is None:
                self.unknown(
                    simple[0].line if simple else 0, "what stands after an unknown condition", simple
                )
            elif status == (connector == "&&"):
                status = self.simple(simple)
            if self.at >= len(self.tokens):
                return
            after = self.tokens[self.at]
            if after.kind != "operator" or after.text not in _CONNECTORS:
                return
            connector = after.text
            self.at += 1
            while self.at < len(self.tokens) and self.tokens[self.at].kind == "end":
                self.at += 1

    def simple_command(self) -> list[Token]:
        """The words up to an operator that ends them; a redirection ends none, and takes the word after it."""
        found: list[Token] = []
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            if token.kind == "operator" and token.text in _REDIRECTIONS:
                self.at += 2
                continue
            if token.kind not in ("word", "array"):
                break
            begin = self.at
            self.at += 1
            if token.plain == "[[":
                while self.at < len(self.tokens) and self.tokens[self.at - 1].plain != "]]":
                    self.at += 1
            found += self.tokens[begin : self.at]
        return found

    def simple(self, found: list[Token]) -> bool | None:
        """Assign what a command assigns, keep its words; whether it succeeds, as far as that can be known."""
        if not found:
            return True
        first = found[0].plain
        if first in ("[", "[[", "test", "!"):
            return self.expander.truth(found)
        if first in ("true", "false", ":"):
            return first != "false"
        if len(found) == 1 and found[0].kind == "word" and found[0].assignment() is None:
            said = [word.text for word in self.expander.fields(found[0])]
            if said in (["true"], ["false"]):  # out of a variable
                return said == ["true"]
        if first in _ELSEWHERE:
            for token in found[1:]:
                if _NAME.fullmatch(token.plain or ""):
                    self.expander.forget(token.plain or "", token.line)
            shown = " ".join(self.expander.shown(token) for token in found)
            self.script.unread.append(
                Unread(found[0].line, f"`{shown}`: what it does to variables is not followed", ())
            )
            return None if first in ("read", "source", ".") else True
        if element := _ELEMENT.match(self.expander.shown(found[0])):
            self.expander.forget(element[1], found[0].line)
            self.script.unread.append(Unread(found[0].line, f"an element of {element[1]} is assigned", ()))
            return True
        declares = first in _DECLARE
        rest = found[1:] if declares else found
        while rest:
            token, assignment = rest[0], rest[0].assignment()
            if token.kind == "array":
                self.assign_array(token)
            elif assignment:
                name, append, parts = assignment
                self.assign(name, self.expander.scalar(parts), append)
            elif not declares:
                break
            rest = rest[1:]
        words = [word for token in rest if token.kind == "word" for word in self.expander.fields(token)]
        if words and not declares:
            self.script.commands.append(words)
        return True

    def assign(self, name: str, value: Value, append: bool) -> None:
        self.assigned[name] = None
        self.expander.assign(name, value, append)

    def assign_array(self, token: Token) -> None:
        items = [[f] for item in token.items for f in self.expander.fields(item)]
        name = token.text.removesuffix("+")
        self.assigned[name] = None
        self.expander.assign_array(name, items, token.text.endswith("+"))
