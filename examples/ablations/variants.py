"""Sources that a design compares: code before and after selection by a model, questions by subject, pairs alone.

Level 2 and level 3 differ in one step, as in section 4.1 of the daVinci-LLM report: rules and deduplication leave
`code.level2`; a light model then ranks it, and the better part is `code.level3`. The texts are the code that the
designs have, and beside it what that leaves out: tests, generated and vendored files of the installed packages.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))

from corpus import GENERATED, LARGEST_SOURCE, SKIPPED_FOLDERS
from documents import digest

from megatron_davinci.darwin.classifiers import train_and_judge
from megatron_davinci.darwin.corpus import Corpus
from megatron_davinci.darwin.recipe import load_recipe
from megatron_davinci.darwin.run import run_recipe
from megatron_davinci.data.jsonl import Fields
from megatron_davinci.data.manifest import Manifest
from megatron_davinci.data.tokenize import Options, tokenize
from megatron_davinci.data.tokenizer import Tokenizer
from megatron_davinci.files import write_atomically

HERE = Path(__file__).resolve().parent
LEFT_OUT_BYTES = 9_000_000
"""Of files that the corpus leaves out: as much as it has of code."""
LONGEST = 100_000
ABOUT_SCIENCE = ("numpy/", "scipy/", "sympy/", "mpmath/", "networkx/", "torch/")


def code_levels(folder: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """Write the sources `code.level2` and `code.level3`; what is whole already is kept.

    Args:
        folder: Where `text/` is, and where they are to be.
        tokenizer: Of the designs.

    Returns:
        Tokens by source.
    """
    levels = {"code.level2": "level2.yaml", "code.level3": "level3.yaml"}
    if not all((folder / name / "manifest.json").exists() for name in levels):
        left_out = folder / "text" / "code.left-out.jsonl"
        if not left_out.exists():
            _write(left_out, _records(files_left_out()))
        if not (folder / "code-classifier" / "classifier.json").exists():
            train_classifier(folder / "text", folder / "code-classifier")

    def texts(recipe: str) -> list[Path]:
        write_atomically(folder / recipe, (HERE / "levels" / recipe).read_bytes())
        return _training(run_recipe(load_recipe(folder / recipe)))

    return {
        name: _tokens(folder / name, "code", tokenizer, partial(texts, recipe))
        for name, recipe in levels.items()
    }


def files_left_out() -> Iterator[tuple[str, str]]:
    """`(name, text)` of Python files beside the installed packages that the quickstart's corpus passes over.

    In an order keyed by their names, up to `LEFT_OUT_BYTES`.
    """
    import numpy

    base, left = Path(numpy.__file__).parents[1], LEFT_OUT_BYTES
    names = [path.relative_to(base) for path in base.rglob("*.py")]
    passed_over = [
        name
        for name in names
        if not SKIPPED_FOLDERS.isdisjoint(name.parts) or GENERATED.fullmatch(name.name) is not None
    ]
    for name in sorted(passed_over, key=lambda name: digest(0, "code", name.as_posix())):
        path = base / name
        if path.stat().st_size > min(LARGEST_SOURCE, LONGEST):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        left -= len(text.encode())
        if left < 0:
            return
        yield name.as_posix(), text


def train_classifier(texts: Path, out: Path) -> None:
    """A linear model that tells the standard library's code from what was left out, trained on training text only."""
    reference = [
        one["text"] for one in _read(texts / "code.train.jsonl") if one["source"].startswith("python/")
    ]
    others = [one["text"] for one in _read(texts / "code.left-out.jsonl")]
    labels = ["reference"] * len(reference) + ["other"] * len(others)
    train_and_judge([*reference, *others], labels, bits=16).save(out)


def pairs_alone(folder: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """Write the sources `qa.pairs` and `qa.valid.pairs`: a document a question, and a mask of answers.

    The designs' questions come several to a document, of which a mask would leave the last answer only.

    Args:
        folder: Where `text/` is, and where they are to be.
        tokenizer: Of the designs.

    Returns:
        Tokens to train on, by source.
    """

    def texts(side: str, name: str) -> list[Path]:
        documents = _read(folder / "text" / f"qa.{side}.jsonl")
        return [
            _write(folder / "text" / f"{name}.jsonl", (pair for one in documents for pair in _pairs(one)))
        ]

    options = Options(Fields("text", "prompt", "response"))
    found = {
        name: _tokens(folder / name, "qa", tokenizer, partial(texts, side, name), options)
        for side, name in (("train", "qa.pairs"), ("valid", "qa.valid.pairs"))
    }
    return {"qa.pairs": found["qa.pairs"]}


def _pairs(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The questions of a document with their answers, one by one."""
    for number, text in enumerate(re.split(r"\n\n(?=Question: )", document["text"].rstrip("\n"))):
        question, mark, answer = text.partition("\nAnswer:")
        if mark and answer.strip():
            pair = {"prompt": question + mark, "response": answer + "\n", "text": text + "\n"}
            yield {"id": f"{document['id']}-{number}", **pair, "domain": "qa", "source": document["source"]}


def questions_by_subject(folder: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """Write the sources `qa.science` and `qa.code`, two parts of the designs' questions.

    Args:
        folder: Where `text/` is, and where they are to be.
        tokenizer: Of the designs.

    Returns:
        Tokens by source.
    """

    def texts(subject: str) -> list[Path]:
        chosen = (
            one
            for one in _read(folder / "text" / "qa.train.jsonl")
            if one["source"].startswith(ABOUT_SCIENCE) == (subject == "science")
        )
        return [_write(folder / "text" / f"qa.{subject}.jsonl", chosen)]

    return {
        f"qa.{subject}": _tokens(folder / f"qa.{subject}", "qa", tokenizer, partial(texts, subject))
        for subject in ("science", "code")
    }


def _tokens(
    source: Path,
    domain: str,
    tokenizer: Tokenizer,
    texts: Callable[[], list[Path]],
    options: Options | None = None,
) -> int:
    """The tokens of a source, which is made of `texts` where it is not whole already."""
    if not (source / "manifest.json").exists():
        tokenize(texts(), tokenizer, source, source.name, domain, options)
    return Manifest.load(source).tokens


def _write(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    write_atomically(path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records))
    return path


def _training(corpus: Corpus) -> list[Path]:
    """The corpus's files, without those of held-out text."""
    return [path for path in corpus.files() if not path.parent.name.endswith(".valid")]


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _records(files: Iterable[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    for name, text in files:
        yield {"id": f"code-{digest(0, name)}", "text": text, "domain": "code", "source": name}
