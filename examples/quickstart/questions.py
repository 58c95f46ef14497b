"""What a Python source file says in words: its docstrings, a page of its prose, questions with answers.

Everything is read from the syntax tree; nothing is imported. Used by `corpus.py`.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from zlib import crc32

PAIRS_IN_A_DOCUMENT = 8
ADDERS = frozenset({"add_docstr", "_add_docstr", "add_newdoc", "add_docstr_all"})
Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Pair(NamedTuple):
    """A question and its answer, each one paragraph."""

    question: str
    answer: str


def definitions(node: ast.AST, name: str) -> Iterator[tuple[str, Definition]]:
    """`(qualified name, node)` of the module and of the classes and functions in it, public ones only."""
    if isinstance(node, Definition):
        yield name, node
    if isinstance(node, Function):
        return
    for child in getattr(node, "body", ()):
        if isinstance(child, ast.ClassDef | Function) and not child.name.startswith("_"):
            yield from definitions(child, f"{name}.{child.name}")


def docstrings(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """`(qualified name, docstring)`: those written in place, and those that numpy and torch add by a call."""
    for name, node in definitions(tree, module):
        text = ast.get_docstring(node)
        if text:
            yield name, text
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and _dotted(call.func).rpartition(".")[2] in ADDERS and call.args:
            # numpy: add_newdoc("numpy._core", "flatiter", "text"); torch: add_docstr(torch.abs, "text")
            first, *others = call.args
            if isinstance(first, ast.Constant) and len(others) >= 2:
                target, others = f"{_literal(first)}.{_literal(others[0])}", others[1:]
            else:
                target = f"{module.partition('.')[0]}.{_dotted(first).rpartition('.')[2]}"
            text = inspect.cleandoc("\n\n".join(filter(None, map(_literal, others))))
            if text:
                yield target, text


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return ""


def _literal(node: ast.AST) -> str:
    """The text of a string expression as far as it stands in the source; `{name}` fields are left out."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp):
        return _literal(node.left) + _literal(node.right)
    if isinstance(node, ast.Tuple | ast.List):
        return " ".join(map(_literal, node.elts))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        text = _literal(node.func.value)
        if node.func.attr == "format":
            text = (
                re.sub(r"(?m)^\s*\{\w+\}\s*\n|(?<!\{)\{\w+\}(?!\})", "", text)
                .replace("{{", "{")
                .replace("}}", "}")
            )
        return text
    return ""


# ---- prose -----------------------------------------------------------------------------------------------


def manual(tree: ast.Module, module: str, source: str) -> str:
    """The English of one module as a page: its docstrings' and comments' paragraphs, headed by their names."""
    parts = []
    for name, text in docstrings(tree, module):
        paragraphs = [p for p in re.split(r"\n\s*\n", text) if is_prose(p)]
        if paragraphs:
            parts += [name, *paragraphs]
    for block in re.findall(r"(?m)(?:^[ \t]*#(?!!).*\n){3,}", source):
        text = re.sub(r"(?m)^[ \t]*#+:? ?", "", block)
        parts += [p.strip("\n") for p in re.split(r"\n\s*\n", text) if is_prose(p)]
    return "\n\n".join(dict.fromkeys(parts)) + "\n" if parts else ""


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as English and not as code, a table, or a licence header."""
    if re.match(r"\s*(>>>|\.\. |:\w+|[-=~*]{3,})", paragraph) or re.search(
        r"(?i)copyright|licen[cs]e", paragraph
    ):
        return False
    words = paragraph.split()
    plain = sum(
        re.fullmatch(r"[(\"'`]*[A-Za-z][A-Za-z'-]*[.,;:!?)\"'`]*", word) is not None for word in words
    )
    return len(words) >= 8 and plain >= 0.75 * len(words)


# ---- questions -------------------------------------------------------------------------------------------


def question_sets(tree: ast.Module, module: str) -> Iterator[tuple[str, list[Pair]]]:
    """`(title, pairs)`: questions about one class, or about the functions of the module, a handful a set."""
    held: dict[str, list[Pair]] = {}
    for name, node in definitions(tree, module):
        owner = name if isinstance(node, ast.Module | ast.ClassDef) else name.rpartition(".")[0]
        about = function_pairs(node, name) if isinstance(node, Function) else owner_pairs(node, name)
        held.setdefault(owner, []).extend(about)
    for owner, pairs in held.items():
        sets = -(-len(pairs) // PAIRS_IN_A_DOCUMENT)
        for number in range(sets):
            chunk = pairs[len(pairs) * number // sets : len(pairs) * (number + 1) // sets]
            if len(chunk) >= 2:
                yield f"{owner} {number}", chunk


def as_prompt_and_response(pairs: Sequence[Pair]) -> tuple[str, str]:
    """The pairs as one text in two parts: everything up to the last answer, and the last answer."""
    *before, last = pairs
    context = "".join(f"Question: {pair.question}\nAnswer: {pair.answer}\n\n" for pair in before)
    return f"{context}Question: {last.question}\nAnswer:", f" {last.answer}\n"


def owner_pairs(node: ast.Module | ast.ClassDef, name: str) -> Iterator[Pair]:
    """Questions about a module or class: its purpose, its bases, what it offers."""
    summary = first_sentence(ast.get_docstring(node) or "")
    is_class = isinstance(node, ast.ClassDef)
    kind = "class" if is_class else "module"
    if summary:
        yield Pair(
            _one_of(name, f"What is the {kind} `{name}` for?", f"Describe the {kind} `{name}`."), summary
        )
    if isinstance(node, ast.ClassDef):
        bases = [_dotted(base) for base in node.bases if _dotted(base)]
        if bases:
            yield Pair(f"Which classes does `{name}` inherit from?", f"It inherits from {_listed(bases)}.")
    for type_, word in ((Function, "methods" if is_class else "functions"), (ast.ClassDef, "classes")):
        names = [n.name for n in node.body if isinstance(n, type_) and not n.name.startswith("_")]
        if 2 <= len(names) <= 12:
            yield Pair(
                _one_of(name, f"Which public {word} does `{name}` define?", f"List the {word} of `{name}`."),
                f"It defines {_listed(names)}.",
            )


def function_pairs(node: Function, name: str) -> Iterator[Pair]:
    """Questions about a function with a docstring: purpose, arguments, defaults, result, exceptions."""
    doc = ast.get_docstring(node) or ""
    summary = first_sentence(doc)
    if not summary:
        return
    yield Pair(_one_of(name, f"What does `{name}` do?", f"What is the purpose of `{name}`?"), summary)
    short = name.rpartition(".")[2]
    arguments = signature(node)
    if arguments:
        shown = [
            f"`{argument}`" if value is None else f"`{argument}={value}`"
            for argument, value in arguments.items()
        ]
        yield Pair(f"Which arguments does `{short}` take?", f"It takes {_joined(shown)}.")
    for argument, text in described(doc, [a.lstrip("*") for a in arguments]).items():
        yield Pair(
            _one_of(
                name, f"What is `{argument}` in `{short}`?", f"In `{short}`, what does `{argument}` mean?"
            ),
            text,
        )
    with_default = [(argument, value) for argument, value in arguments.items() if value is not None]
    if with_default:
        argument, value = with_default[crc32(name.encode()) % len(with_default)]
        yield Pair(f"What is the default of `{argument}` in `{short}`?", f"The default is `{value}`.")
    returned = section(doc, r"Returns?|Yields?")
    if returned:
        yield Pair(f"What does `{short}` return?", returned)
    elif node.returns is not None and not isinstance(node.returns, ast.Constant):
        yield Pair(
            f"Which type does `{short}` return?", f"It is annotated to return `{ast.unparse(node.returns)}`."
        )
    raised = {
        _dotted(raising.exc.func if isinstance(raising.exc, ast.Call) else raising.exc)
        for raising in ast.walk(node)
        if isinstance(raising, ast.Raise) and raising.exc is not None
    }
    errors = sorted(error for error in raised if error.rpartition(".")[2][:1].isupper())
    if errors:
        yield Pair(f"Which exceptions can `{short}` raise itself?", f"It can raise {_listed(errors)}.")


def _one_of(key: str, *phrasings: str) -> str:
    return phrasings[crc32(key.encode()) % len(phrasings)]


def _joined(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _listed(names: Sequence[str]) -> str:
    return _joined([f"`{name}`" for name in names])


def first_sentence(text: str) -> str:
    """The first sentence of a docstring on one line, or nothing where it is no sentence of 4 to 60 words."""
    paragraph = " ".join(re.split(r"\n\s*\n|\n\s*[-=~*]{3,}|\n\s*>>>", text.strip(), maxsplit=1)[0].split())
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z`(])", paragraph, maxsplit=1)[0]
    return sentence if 4 <= len(sentence.split()) <= 60 else ""


def signature(node: Function) -> dict[str, str | None]:
    """Argument name -> the source of its default, None where it has none; without `self` and `cls`."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    found: dict[str, str | None] = {}
    for argument, default in zip(positional, [*defaults, *arguments.defaults], strict=True):
        found[argument.arg] = None if default is None else ast.unparse(default)
    if arguments.vararg is not None:
        found[f"*{arguments.vararg.arg}"] = None
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found[argument.arg] = None if default is None else ast.unparse(default)
    if arguments.kwarg is not None:
        found[f"**{arguments.kwarg.arg}"] = None
    return {name: value for name, value in found.items() if name not in ("self", "cls")}


def described(doc: str, names: Sequence[str]) -> dict[str, str]:
    """Argument name -> what the docstring says of it, in numpy's, Google's or Sphinx's manner."""
    numpy_manner = re.search(r"(?m)^\s*Parameters\s*\n\s*[-=]{3,}", doc) is not None
    lines = doc.splitlines()
    found: dict[str, str] = {}
    for number, line in enumerate(lines):
        entry = re.match(
            r"(\s*)(?::param (?:\S+ )?)?\*{0,2}`{0,2}(\w+)`{0,2}(?:\s*\([^)]*\))?\s*:(?!:)\s*(.*)$", line
        )
        if entry is None or entry[2] not in names or entry[2] in found:
            continue
        body = [] if numpy_manner else [entry[3]]
        for following in lines[number + 1 :]:
            if not following.strip() or len(following) - len(following.lstrip()) <= len(entry[1]):
                break
            body.append(following)
        text = first_sentence("\n".join(body))
        if text:
            found[entry[2]] = text
    return found


def section(doc: str, heading: str) -> str:
    """The first paragraph of a docstring's section as one line, in numpy's, Google's or Sphinx's manner."""
    found = re.search(rf"(?im)^[ \t]*:(?:{heading}):[ \t]*(.+(?:\n[ \t]+\S.*)*)", doc) or re.search(
        rf"(?m)^[ \t]*(?:{heading})(?::|[ \t]*\n[ \t]*[-=]{{3,}})[ \t]*\n\n?((?:[ \t]*\S.*\n?)+)", doc
    )
    if found is None:
        return ""
    first, *rest = found[1].rstrip().splitlines()
    # numpy's manner puts the type on a line of its own and what it means below, further in.
    deeper = [line for line in rest if len(line) - len(line.lstrip()) > len(first) - len(first.lstrip())]
    in_sphinx = found[0].lstrip().startswith(":")
    kept = rest if rest and len(deeper) == len(rest) and not in_sphinx else [first, *rest]
    text = " ".join(" ".join(kept).split())
    return text if 3 <= len(text.split()) <= 80 else ""
