"""Raw files for corpora, out of text that every Python installation carries, and what a corpus holds."""

from __future__ import annotations

import gzip
import html
import json
import sysconfig
from functools import cache
from hashlib import sha256
from pathlib import Path
from pydoc_data.topics import topics

import yaml

from megatron_davinci.darwin.corpus import Corpus
from megatron_davinci.darwin.recipe import LoadedRecipe, load_recipe
from megatron_davinci.darwin.run import run_recipe

STDLIB = Path(sysconfig.get_path("stdlib"))
MODULES = ("abc", "bisect", "copy", "csv", "heapq", "textwrap")


@cache
def prose() -> tuple[str, ...]:
    """Python's help topics of a page or two, longest first: English prose with code in it."""
    return tuple(sorted((t for t in topics.values() if len(t) < 12_000), key=len, reverse=True))


def page(text: str) -> str:
    """A web page with a text as its main content, and what pages have around it."""
    body = "".join(f"<p>{html.escape(part)}</p>" for part in text.split("\n\n"))
    return (
        "<html><head><title>A page</title><script>var x = 1;</script></head><body><nav><a href='/'>Home</a></nav>"
        f"<main><h1>Heading</h1>{body}<pre><code>def f(x):\n    return x ** 2</code></pre></main></body></html>"
    )


def raw_files(folder: Path, documents: int = 8) -> None:
    """Good files of every format: lines of JSON (plain and compressed), pages, text, source code."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = prose()
    lines = [
        json.dumps({"key": f"k{i}", "text": text, "kind": "help"}) for i, text in enumerate(texts[:documents])
    ]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with gzip.open(folder / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        for i, text in enumerate(texts[documents : documents + 3]):
            file.write(json.dumps({"key": f"z{i}", "text": text}) + "\n")
    for i, text in enumerate(texts[documents + 3 : documents + 6]):
        (folder / f"page{i}.html").write_text(page(text), encoding="utf-8")
    (folder / "again.html").write_text(page(texts[documents + 4]), encoding="utf-8")  # page1 once more
    (folder / "note.txt").write_bytes(texts[documents + 7].replace("\n", "\r\n").encode() + b"\x07")
    for name in MODULES:
        (folder / f"{name}.py").write_bytes((STDLIB / f"{name}.py").read_bytes())


SOURCES = [
    {"name": "help", "paths": ["raw/*.jsonl", "raw/*.jsonl.gz"], "id_field": "key", "licence": "PSF-2.0"},
    {"name": "pages", "paths": ["raw/*.html", "raw/*.txt"]},
    {"name": "code", "paths": ["raw/*.py"], "licence": "PSF-2.0"},
]
STEPS = [
    "extract_html",
    "normalise_text",
    {"length": {"min_characters": 100}},
    {"language": {"sources": ["help", "pages"], "min_score": 0.05}},
    {"gopher_repetition": {"sources": ["help", "pages"]}},
    {"code_quality": {"sources": ["code"]}},
    "exact_dedup",
]


def recipe(folder: Path, out: str = "corpus", **changes) -> LoadedRecipe:
    """A recipe over `folder/raw`; keys of `changes` replace its own."""
    settings = {"name": "test", "out": str(folder / out), "sources": SOURCES, "steps": STEPS} | changes
    path = folder / f"{out}.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return load_recipe(path)


def made(loaded: LoadedRecipe, **options) -> Corpus:
    return run_recipe(loaded, **{"workers": 1} | options)


def digests(folder: Path) -> dict[str, str]:
    """Every file of a corpus that does not say how long something took."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("seconds.json", "plan.json", "recipe.yaml")
    }
