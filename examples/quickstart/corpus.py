"""A four-domain corpus out of what is already on the machine: no download, the same bytes every time.

Python and the packages that this project installs carry tens of megabytes of English, source code,
mathematics and documented signatures. `build_corpus` gathers them into `general`, `code`, `science` and
`qa` by parsing files (nothing is imported), and splits each domain into training and validation text.

The split is honest: documents that come from one file, or that begin or end alike, form a family, and a
family lies on one side in all domains. So a module's docstrings never train a model that is then tested on
the module's source, and a licence that ten packages ship is not on both sides.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import json
import re
import sysconfig
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from pydoc_data.topics import topics

import questions
from documents import DOMAINS, Document, digest, letters_of, select, shuffled, size_of, split

from megatron_davinci.errors import DataError

DEFAULT_BUDGET = {"general": 8_000_000, "code": 16_000_000, "science": 10_000_000, "qa": 10_000_000}
# Roots are top-level import names, "stdlib" the standard library. Packages that are not installed are
# passed over; earlier ones are used up first when a budget does not hold them all.
SCIENCE = ("numpy", "sympy", "networkx", "mpmath", "scipy", "torch", "stdlib")
SCIENCE_WITHIN = {
    "torch": r"torch/(nn/|distributions/|linalg|special|fft|optim/|signal/|func|_torch_docs|_tensor_docs|functional)",
    "stdlib": r"(statistics|fractions|random|_pydecimal|decimal|colorsys|heapq|bisect|graphlib|numbers|turtle)\.py",
}
GENERAL = (
    "stdlib", "matplotlib", "huggingface_hub", "pydantic", "fontTools", "werkzeug", "rich", "PIL", "setuptools",
    "jinja2", "markdown", "fsspec", "tensorboard", "filelock", "pygments", "megatron", "torch",
)  # fmt: skip
CODE = (
    "stdlib", "numpy", "networkx", "megatron", "rich", "pydantic", "jinja2", "werkzeug", "fsspec", "PIL",
    "matplotlib", "mpmath", "torch",
)  # fmt: skip
QA = (
    "stdlib",
    "numpy",
    "networkx",
    "torch",
    "matplotlib",
    "sympy",
    "huggingface_hub",
    "megatron",
    *GENERAL[3:-2],
)

# Tests repeat themselves, vendored packages repeat others, tables and generated files are not text.
SKIPPED_FOLDERS = frozenset(
    "test tests testing idle_test _vendor vendor externals site-packages dist-packages __pycache__ encodings "
    "pydoc_data ensurepip lexers styles cmap mathematica tutorial".split()
)  # fmt: skip
LARGEST_SOURCE = 1_000_000
PROSE_FILES = re.compile(r"(?i)(read.?me|news|history|changes|changelog|authors|contributing|help)")
TEXT_SUFFIXES = frozenset({"", ".txt", ".md", ".rst"})
GENERATED = re.compile(r"(.*_pb2(_grpc)?|_version|test_.*)\.py")


def build_corpus(
    out: Path, budget_bytes_per_domain: Mapping[str, int] | int | None = None, seed: int = 0
) -> dict:
    """Writes `out/<domain>.train.jsonl` and `out/<domain>.valid.jsonl` for the four domains.

    Each line is `{"id", "text", "domain", "source"}`; in `qa` also `"prompt"` and `"response"`, with
    `text == prompt + response` (the response is the last answer, what is before it the prompt).

    Args:
        out: The folder to write to; it is made if it is not there.
        budget_bytes_per_domain: The most UTF-8 bytes of text to take per domain, training and validation
            together: one number, or one per domain. `DEFAULT_BUDGET` where nothing is said.
        seed: Keys which documents are kept, their order and the split.

    Returns:
        `{domain: {"train_documents", "train_bytes", "valid_documents", "valid_bytes"}}`; the bytes are of text.

    Raises:
        DataError: A domain came out empty, or the budget names a domain that there is not.
    """
    budget = _budget(budget_bytes_per_domain)
    sides = split(select(gather(), budget, seed), seed)
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, dict[str, int]] = defaultdict(dict)
    for (domain, side), documents in sides.items():
        if not documents:
            raise DataError(
                f"There is no {side} text for the domain {domain!r}.",
                where=out / f"{domain}.{side}.jsonl",
                found=f"a budget of {budget[domain]} bytes, and too little text on this machine within it",
                expected="at least two files that the domain can be taken from",
                do="install the project's requirements with their sources, or raise the budget",
            )
    for (domain, side), documents in sides.items():
        lines = [_record(document, seed) for document in shuffled(documents, seed)]
        partial = out / f".{domain}.{side}.jsonl.partial"
        partial.write_text("".join(lines), encoding="utf-8")
        partial.replace(out / f"{domain}.{side}.jsonl")
        report[domain][f"{side}_documents"] = len(documents)
        report[domain][f"{side}_bytes"] = sum(size_of(document) for document in documents)
    return dict(report)


def _budget(given: Mapping[str, int] | int | None) -> dict[str, int]:
    if given is None:
        return dict(DEFAULT_BUDGET)
    if isinstance(given, int):
        return dict.fromkeys(DOMAINS, given)
    unknown = set(given) - set(DOMAINS)
    if unknown:
        raise DataError(
            "The corpus budget names an unknown domain.",
            found=", ".join(sorted(unknown)),
            expected="some of " + ", ".join(DOMAINS),
        )
    return DEFAULT_BUDGET | dict(given)


def _record(document: Document, seed: int) -> str:
    record = {
        "id": f"{document.domain}-{digest(seed, document.source, document.title, document.text)}",
        "text": document.text,
        "domain": document.domain,
        "source": document.source,
    }
    if document.prompt:
        record |= {"prompt": document.prompt, "response": document.response}
    return json.dumps(record, ensure_ascii=False) + "\n"


# ---- gathering -------------------------------------------------------------------------------------------


def gather() -> Iterator[list[Document]]:
    """All documents of this machine, in tiers: what is best for its domain first."""
    yield [*distribution_texts(), *help_topics(), *common_licences()]
    roots = sorted({*SCIENCE, *GENERAL, *CODE, *QA})
    files = [(root, folder, path) for root in roots for folder, path in sources(root)]
    with ProcessPoolExecutor(min(8, cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        parsed = pool.map(documents_of_source, files, chunksize=64)
        by_place: dict[tuple[str, str], list[Document]] = defaultdict(list)
        for (root, _, _), documents in zip(files, parsed, strict=True):
            for document in documents:
                by_place[document.domain, root].append(document)
    for domain, order in (("general", GENERAL), ("code", CODE), ("science", SCIENCE), ("qa", QA)):
        # The standard library is enough text to be a tier; small packages are mixed with the others.
        yield by_place[domain, "stdlib"] if domain in ("general", "code") else []
        yield [d for root in order if root not in ("stdlib", "torch") for d in by_place[domain, root]]
        yield [d for root in ("stdlib", "torch") if root in order for d in by_place[domain, root]]


def sources(root: str) -> Iterator[tuple[Path, Path]]:
    """`(folder that names are relative to, file)` for each Python file of a top-level package, in order."""
    if root == "stdlib":
        folders = [(Path(sysconfig.get_path("stdlib")),) * 2]
    else:
        spec = importlib.util.find_spec(root)
        locations = spec.submodule_search_locations if spec is not None else None
        folders = [(Path(location).parent, Path(location)) for location in sorted(locations or ())]
    for base, folder in folders:
        for path in sorted(folder.rglob("*.py")):
            name = path.relative_to(base)
            if SKIPPED_FOLDERS.isdisjoint(name.parts) and not GENERATED.fullmatch(path.name):
                yield base, path


def documents_of_source(task: tuple[str, Path, Path]) -> list[Document]:
    """What one source file gives to the four domains; nothing where it cannot be read as Python."""
    root, base, path = task
    name = path.relative_to(base).as_posix()
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError):
        return []
    if len(text) > LARGEST_SOURCE:
        return []
    source = name if root != "stdlib" else f"python/{name}"
    module = re.sub(r"(/__init__)?\.py$", "", name).replace("/", ".")
    documents: list[Document] = []
    if root in CODE and is_code(text):
        documents.append(Document("code", source, module, text))
    scientific = root in SCIENCE and re.match(SCIENCE_WITHIN.get(root, ""), name) is not None
    if scientific:
        for title, doc in questions.docstrings(tree, module):
            if len(doc) >= 200:
                documents.append(Document("science", source, title, f"{title}\n\n{doc}\n"))
    elif root in GENERAL:
        prose = questions.manual(tree, module, text)
        if len(prose) >= 400:
            documents.append(Document("general", source, module, prose))
    if root in QA:
        for title, pairs in questions.question_sets(tree, module):
            prompt, response = questions.as_prompt_and_response(pairs)
            documents.append(Document("qa", source, title, prompt + response, prompt, response))
    # A string literal may hold half a surrogate pair, which no UTF-8 file can.
    return [document for document in documents if re.search("[\ud800-\udfff]", document.text) is None]


def is_code(text: str) -> bool:
    """Whether a source file is something that a person wrote, and not a table or a stub."""
    lines = text.splitlines()
    if len(text) < 400 or len(text) > 60 * len(lines):
        return False
    dense = re.sub(r"\s+", "", text)
    return sum(c.isdigit() for c in dense) < 0.15 * len(dense) and "def " in text


def distribution_texts() -> list[Document]:
    """Descriptions, licences and read-me files of the installed packages, each licence once."""
    documents: list[Document] = []
    licences: set[str] = set()
    for distribution in sorted(importlib.metadata.distributions(), key=lambda d: d.metadata["Name"].lower()):
        name = distribution.metadata["Name"]
        # What follows the first empty line of a METADATA file is the description (core metadata, version 2.1).
        body = plain((distribution.read_text("METADATA") or "").partition("\n\n")[2])
        if len(body) >= 400:
            documents.append(Document("general", f"{name}/METADATA", f"{name} description", body))
        for file in sorted(distribution.files or (), key=str):
            is_licence = re.search(r"(?i)licen[cs]e|copying|notice", file.name) is not None
            if file.suffix not in TEXT_SUFFIXES or not (is_licence or PROSE_FILES.match(file.name)):
                continue
            try:
                text = plain(Path(str(file.locate())).read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError):
                continue
            ending = letters_of(text)[-300:]
            if len(text) < 400 or (is_licence and ending in licences):
                continue
            licences.add(ending)
            documents.append(Document("general", f"{name}/{file.name}", f"{name} {file.name}", text))
    return documents


def help_topics() -> list[Document]:
    """The language reference that `help()` shows, and the help files of the standard library."""
    texts = {f"topics/{name}": text for name, text in topics.items()}
    library = Path(sysconfig.get_path("stdlib"))
    for path in [*library.glob("*.txt"), *library.glob("idlelib/*.txt"), *library.glob("idlelib/help.html")]:
        text = path.read_text(encoding="utf-8", errors="replace")
        texts[path.relative_to(library).as_posix()] = re.sub(r"<[^>]+>", "", text)
    documents = [Document("general", f"python/{name}", name, plain(text)) for name, text in texts.items()]
    return [document for document in documents if len(document.text) >= 400]


def common_licences(folder: Path = Path("/usr/share/common-licenses")) -> list[Document]:
    """The licences that Debian and its kin keep in one place; nothing on other systems."""
    paths = [path for path in sorted(folder.glob("*")) if path.is_file() and not path.is_symlink()]
    texts = [plain(path.read_text(encoding="utf-8", errors="replace")) for path in paths]
    return [
        Document("general", f"licences/{p.name}", p.name, text) for p, text in zip(paths, texts, strict=True)
    ]


def plain(text: str) -> str:
    """Text without badges, link targets, HTML tags and long gaps."""
    unwanted = r"(?m)^\s*(\[?!\[|\.\. (image|\|)|\|?:?target:|:alt:|<[^>]*>\s*$).*$"
    text = re.sub(unwanted, "", text.replace("\r\n", "\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def main() -> None:
    """Builds the corpus and prints what it holds."""
    parser = argparse.ArgumentParser(description="Build a four-domain corpus from what is on this machine.")
    parser.add_argument("out", type=Path, help="the folder to write the JSONL files to")
    parser.add_argument(
        "--budget", type=int, help="the most bytes of text per domain (default: 8 to 16 million)"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    report = build_corpus(arguments.out, arguments.budget, arguments.seed)
    for domain in DOMAINS:
        row = report[domain]
        print(
            f"{domain:8} train {row['train_documents']:6} documents {row['train_bytes'] / 1e6:7.2f} MB   "
            f"valid {row['valid_documents']:4} documents {row['valid_bytes'] / 1e6:5.2f} MB"
        )
    print(f"{time.perf_counter() - start:.0f} s, in {arguments.out}")


if __name__ == "__main__":
    main()
