"""Data Darwinism: whether documents are lost, what deduplication finds, what a run that is killed leaves, and speed.

A corpus of this machine's own text (documentation, HTML, PDF, Python sources; `--megabytes` of it) goes through
levels 0 to 3 once undisturbed, and once killed outright `--kills` times, at moments drawn over all of its tasks, and
started again. `accounting_error` is the number of documents that went in and came out nowhere, or twice, over both;
bad files (broken gzip, pictures, lines that are no JSON) are among the input.

Near-duplicates are planted: real texts and tables of numbers, each second with a copy whose words are changed until
the exact Jaccard similarity of their 5-word runs lies between 0.80 and 0.87, the others with a clean twin between
0.50 and 0.76. The peer is datatrove's own MinHash on the same texts (its default parameters, without its
normalisation of numbers).

Speed is of each step alone, on text in memory, in MB of UTF-8 a second of processor time on one core; the best of
three, or of half a second where one takes less. The peer is datatrove's stock step for the same job: `exact_dedup`
with texts compared as they are (ours keeps 128 bits of hash and the identifiers, and has them on disk at the end; its
64 bits), `dedup_pieces` with lines, `pii` with mail and IP addresses. Its word splitter is replaced by ours for it,
since its own (spaCy) is not installed and is slower.

figures: accounting_error, identical_after_kills, kills, corpus_files_megabytes,
corpus_text_megabytes, corpus_megabytes_a_second, dedup_recall,
dedup_precision, dedup_planted, dedup_clean, <step>_megabytes_a_second, <step>_against_datatrove
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import common

from tests.darwin.making import digests
from tests.darwin.planting import dedup_figures, plant

ROOTS = (
    ("debian", "/usr/share/doc", ("*.pdf", "*.html", "*.txt", "*.md", "changelog*.gz")),
    ("rust", "/root/.rustup", ("book/*.html", "reference/*.html", "std/**/*.html", "core/**/*.html")),
    ("python", sysconfig.get_path("stdlib"), ("*.py",)),
    ("packages", sysconfig.get_path("purelib"), ("*.py",)),
)
PARTS = ("kills", "dedup", "speed")
STEPS = [
    "extract_html",
    "extract_pdf",
    "normalise_text",
    {"length": {"min_characters": 200}},
    "garble",
    {"language": {"sources": ["debian", "rust"], "min_score": 0.3}},
    {"gopher_repetition": {"sources": ["debian", "rust"]}},
    {"code_quality": {"sources": ["python", "packages"]}},
    {"find_licence": {"sources": ["python", "packages"]}},
    "pii",
    "exact_dedup",
    "minhash_dedup",
    {"dedup_pieces": {"sources": ["debian", "rust"]}},
    {"classify": {"classifier": "classifier", "field": "kind", "score": "code"}},
    {"select_top": {"classifier": "classifier", "score": "code", "share": 0.9}},
]


def gather(folder: Path, megabytes: float, draw: random.Random) -> float:
    """Link files of this machine into `folder`, source by source, and a few that are broken. MB of them."""
    total = 0.0
    for name, root, patterns in ROOTS:
        (folder / name).mkdir(parents=True)
        found = [path for pattern in patterns for path in Path(root).rglob(pattern) if path.is_file()]
        draw.shuffle(found)
        have = 0.0
        for number, path in enumerate(found):
            if have > megabytes / len(ROOTS):
                break
            have += path.stat().st_size / 1e6
            os.symlink(path.resolve(), folder / name / f"{number:06d}-{path.name}")
        total += have
    text = "A sentence of a file that is cut off. " * 2000
    for number in range(5):
        whole = gzip.compress(f"{number} {text}".encode())
        (folder / "debian" / f"cut{number}.txt.gz").write_bytes(whole[: -draw.randrange(9, len(whole) // 2)])
        (folder / "debian" / f"picture{number}.txt").write_bytes(
            bytes(draw.randrange(256) for _ in range(3000))
        )
    lines = ['{"text": "one"}', "{broken", '{"no": 1}', "[]"] * 5
    (folder / "python" / "lines.jsonl").write_text("\n".join(lines))
    return total


def train_classifier(folder: Path) -> None:
    """The classifier of the recipe's selection: source code or prose."""
    from megatron_davinci.darwin.classifiers import train_and_judge

    found: dict[str, list[str]] = {"code": [], "prose": []}
    for path in sorted((folder / "raw").rglob("*")):
        label = {".py": "code", ".txt": "prose", ".md": "prose", ".html": "prose"}.get(path.suffix)
        if label is not None and path.is_file() and len(found[label]) < 120:
            found[label].append(path.read_text(encoding="utf-8", errors="ignore")[:20_000])
    texts = [*found["code"], *found["prose"]]
    labels = [label for label, own in found.items() for _ in own]
    train_and_judge(texts, labels, bits=16, epochs=3).save(folder / "classifier")


def write_recipe(folder: Path, out: str) -> Path:
    """The recipe of the corpus."""
    sources: list[dict[str, Any]] = [
        {"name": name, "paths": [f"raw/{name}/*"], "licence": "as packaged"} for name, _, _ in ROOTS
    ]
    sources = [source for source in sources if any((folder / "raw" / source["name"]).iterdir())]
    names = {source["name"] for source in sources}
    steps = []
    for step in STEPS:
        [(name, given)] = step.items() if isinstance(step, dict) else [(step, {})]
        if "sources" in given:
            given = given | {"sources": [source for source in given["sources"] if source in names]}
        steps.append({name: given})
    path = folder / f"{out}.yaml"
    limits = {"task_bytes": 2_000_000}
    path.write_text(
        yaml.safe_dump(
            {"name": out, "out": str(folder / out), "sources": sources, "steps": steps, "limits": limits}
        )
    )
    return path


def start(recipe: Path) -> subprocess.Popen[bytes]:
    """`davinci data run`, as a group of processes of its own."""
    command = [sys.executable, "-m", "megatron_davinci.cli.main", "data", "run", str(recipe)]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def undisturbed(recipe: Path) -> float:
    """Run to the end. Seconds."""
    began = time.perf_counter()
    process = start(recipe)
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(said.decode())
    return time.perf_counter() - began


def killed(recipe: Path, steps: int, kills: int, draw: random.Random) -> int:
    """Kill a run outright and start it again, so often, at moments that are drawn over all of its work.

    The moments are counts of tasks that are done, and some seconds more, so that each pass has its share of them
    however fast the machine is.

    Args:
        recipe: What is run.
        steps: Tasks of all its passes.
        kills: How often.
        draw: Where from.
    """
    folder = recipe.with_suffix("")
    done = 0
    for moment in sorted(draw.randrange(max(1, steps * 9 // 10)) for _ in range(kills)):
        process = start(recipe)
        while process.poll() is None and finished(folder) < moment:
            time.sleep(0.05)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0, 3))
        if process.poll() is not None:
            break  # it was done before: nothing is left to kill
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        done += 1
        say(f"killed {done} of {kills}, with {progress(folder)}")
    undisturbed(recipe)
    return done


def finished(folder: Path) -> int:
    """How many tasks of all passes are marked as done."""
    return sum(1 for _ in folder.glob("work/??/log/completions/*"))


def progress(folder: Path) -> str:
    """How many tasks of which pass are marked as done."""
    done = {path.name: len(list(path.glob("log/completions/*"))) for path in sorted(folder.glob("work/??"))}
    return ", ".join(f"{count} tasks of pass {name} done" for name, count in done.items()) or "nothing done"


def kill_figures(folder: Path, kills: int, draw: random.Random) -> dict[str, float]:
    """The corpus made undisturbed and made under kills: what is missing, and whether they are the same."""
    from megatron_davinci.darwin.catalogue import STEPS as CATALOGUE
    from megatron_davinci.darwin.step import GlobalStep

    train_classifier(folder)
    seconds = undisturbed(write_recipe(folder, "whole"))
    text = characters(folder / "whole") / 1e6
    say(f"made the corpus of {text:.0f} MB of text in {seconds:.0f} seconds")
    figures: dict[str, float] = {"accounting_error": lost(folder / "whole")}
    if kills:
        plan = json.loads((folder / "whole" / "plan.json").read_text())
        passes = 1 + sum(issubclass(CATALOGUE[name], GlobalStep) for name, *_ in plan["saying"]["steps"])
        steps = passes * (len(plan["deal"]) - 1)
        figures["kills"] = killed(write_recipe(folder, "killed"), steps, kills, draw)
        figures["accounting_error"] += lost(folder / "killed")
        same = [digests(folder / name) for name in ("whole", "killed")]
        for each in same:
            del each["corpus.json"]  # has the corpus's name in it
        figures["identical_after_kills"] = float(same[0] == same[1])
    return figures | {"corpus_text_megabytes": text, "corpus_megabytes_a_second": text / seconds}


def say(what: str) -> None:
    """Tell on standard error how far it is; a run takes many minutes."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def lost(folder: Path) -> int:
    """Documents that went in and came out nowhere or twice, by identifier and by count."""
    from megatron_davinci.darwin.corpus import Corpus

    corpus = Corpus.load(folder)
    seen = [
        record["id"] for kind in ("documents", "dropped", "quarantine") for record in corpus.records(kind)
    ]
    return abs(corpus.counts["input"] - len(seen)) + len(seen) - len(set(seen))


def characters(folder: Path) -> int:
    """Of all that was read, decompressed."""
    from megatron_davinci.darwin.corpus import Corpus

    return sum(source["input"]["characters"] for source in Corpus.load(folder).manifest["sources"].values())


def texts(folder: Path, megabytes: float, kind: str) -> Iterator[str]:
    """Text of the gathered files."""
    have = 0.0
    for path in sorted((folder / "raw").rglob("*")):
        if (
            path.suffix not in ((".html",) if kind == "html" else (".py", ".txt", ".md"))
            or not path.is_file()
        ):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if text.strip():
            yield text
            have += len(text.encode()) / 1e6
        if have > megabytes:
            return


def rate(documents: list[Any], action: Callable[[list[Any]], Any], megabytes: float) -> float:
    """MB a second of processor time, the best of three; of what takes milliseconds, the best of half a second."""
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < 0.5 and len(taken) < 200):
        began = time.process_time()
        action(documents)
        taken.append(time.process_time() - began)
    return megabytes / min(taken)


def speeds(folder: Path, megabytes: float) -> tuple[dict[str, float], dict[str, float]]:
    """MB a second of each step, and of datatrove's."""
    from megatron_davinci.darwin.catalogue import STEPS as CATALOGUE
    from megatron_davinci.darwin.provenance import begin

    items = [f"item {k} " + " ".join(f"word{k * j % 977}" for j in range(60)) for k in range(5000)]
    (folder / "items.jsonl").write_text("".join(json.dumps({"question": item}) + "\n" for item in items))
    ours: dict[str, float] = {}
    plain, pages = list(texts(folder, megabytes, "text")), list(texts(folder, megabytes / 4, "html"))
    for name, kind in CATALOGUE.items():
        if name == "stars" or getattr(kind, "format", "html") != "html":
            continue  # no text is looked at, or there is none of the format here
        given: dict[str, dict[str, Any]] = {
            "decontaminate": {"files": [folder / "items.jsonl"]},
            "exact_dedup": {"ignore": "nothing"},
            "dedup_pieces": {"unit": "line", "min_characters": 1},
            "pii": {"kinds": ["email", "ip"]},
        }
        fields = kind.Parameters.model_fields.items()
        if any(field.is_required() and key not in given.get(name, {}) for key, field in fields):
            continue  # a model of the user's, or a server
        step = kind(kind.Parameters.model_validate(given.get(name, {})))
        chosen = pages if name == "extract_html" else plain
        size = sum(len(text.encode()) for text in chosen) / 1e6
        origin = {"path": "x", "format": "html" if name == "extract_html" else "text"}
        documents = [begin(text, f"s/{k}", "s", "MIT", origin) for k, text in enumerate(chosen)]
        if not documents:
            continue
        step.open()
        if name == "extract_html":

            def action(documents: list[Any], step: Any = step) -> None:
                for document in documents:  # in this process, whose time is measured
                    step.extractor(document.text, True, False)
        elif hasattr(step, "sketch"):

            def action(documents: list[Any], step: Any = step) -> None:
                step.begin(folder / "sketches", 0)
                for document in documents:
                    step.sketch(document)
                step.finish()
        else:

            def action(documents: list[Any], step: Any = step) -> None:
                for document in documents:
                    _forget()
                    step.apply(document)

        ours[name] = rate(documents, action, size)
        step.close()
    return ours, peers(folder, plain)


def _forget() -> None:
    """Each step pays for the words itself, as if it were alone."""
    from megatron_davinci.darwin import words

    for cached in (words.words_of, words.plain_words_of, words.lines_of):
        cached.cache_clear()


def _text_of(document: Any) -> str:
    text: str = document.text
    return text


class Splitter:
    """Our words in the place of spaCy's."""

    def word_tokenize(self, text: str) -> list[str]:
        """Words and marks."""
        from megatron_davinci.darwin.words import words_of

        return list(words_of(text))

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Sentences, from where to where."""
        ends = [found.end() for found in re.finditer(r"[.!?][\"')\]]*(?:\s+|$)", text)]
        return list(zip([0, *ends], [*ends, len(text)], strict=True))


def peers(folder: Path, plain: list[str]) -> dict[str, float]:
    """MB a second of datatrove's stock steps."""
    from datatrove.data import Document
    from datatrove.pipeline import filters
    from datatrove.pipeline.decont import NGramsDecontConfig, NGramsDecontFilter
    from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig, ExactDedupSignature
    from datatrove.pipeline.dedup.sentence_dedup import SentDedupConfig, SentenceDedupSignature
    from datatrove.pipeline.formatters.pii import PIIFormatter

    use_splitter()
    size = sum(len(text.encode()) for text in plain) / 1e6
    documents = [Document(text=text, id=str(k)) for k, text in enumerate(plain)]
    found: dict[str, float] = {}
    chosen = {
        "gopher_quality": filters.GopherQualityFilter(),
        "gopher_repetition": filters.GopherRepetitionFilter(),
        "fineweb_quality": filters.FineWebQualityFilter(),
    }
    for name, step in chosen.items():

        def judge(documents: list[Any], step: Any = step) -> None:
            from datatrove.utils.text import split_into_parts

            for document in documents:
                split_into_parts.cache_clear()
                step.filter(document)

        found[name] = rate(documents, judge, size)
    formatter = PIIFormatter()
    found["pii"] = rate(documents, lambda all_: [formatter.format(each.text) for each in all_], size)
    c4 = filters.C4QualityFilter()

    def c4_judge(documents: list[Any]) -> None:
        for document in documents:
            c4.filter(Document(text=document.text, id=document.id))

    found["c4"] = rate(documents, c4_judge, size)
    index = folder / "index"
    index.mkdir(exist_ok=True)
    decontaminate = NGramsDecontFilter(str(index), NGramsDecontConfig(n_grams=13))
    decontaminate._index_hashes = {k * 7919: "items" for k in range(250_000)}
    found["decontaminate"] = rate(documents, lambda all_: [decontaminate.filter(each) for each in all_], size)

    def sketch(make: Callable[[Path], Any]) -> Callable[[list[Any]], None]:
        def action(documents: list[Any]) -> None:
            target = folder / "peer-sketches"
            shutil.rmtree(target, ignore_errors=True)
            step = make(target)
            for _ in step.run(iter(documents)) or ():
                pass

        return action

    found["exact_dedup"] = rate(
        documents, sketch(lambda to: ExactDedupSignature(str(to), ExactDedupConfig(_text_of))), size
    )
    lines = SentDedupConfig(n_sentences=1, split_sentences=False)
    found["dedup_pieces"] = rate(
        documents, sketch(lambda to: SentenceDedupSignature(str(to), config=lines)), size
    )
    found["minhash_dedup"] = rate(documents, sketch(lambda to: minhash_steps(to)[0]), size)
    return found


def use_splitter() -> None:
    """Give datatrove's steps our words."""
    import xxhash
    from datatrove.pipeline.decont import n_grams
    from datatrove.pipeline.dedup import minhash, sentence_dedup
    from datatrove.utils import word_tokenizers
    from datatrove.utils.hashes import xxhash as hashes

    for module in (word_tokenizers, minhash, sentence_dedup, n_grams):
        module.load_word_tokenizer = lambda language: Splitter()
    # It wants xxhash before 4, which takes strings.
    hashes.xxhash64 = lambda text: xxhash.xxh64_intdigest(text.encode())


def minhash_steps(folder: Path) -> list[Any]:
    """datatrove's first three stages of MinHash; numbers stay numbers."""
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupSignature,
    )
    from datatrove.utils.text import TextNormConfig

    config = MinhashConfig(norm_config=TextNormConfig(norm_numbers=False))
    one, two, three = (str(folder / name) for name in ("signatures", "buckets", "remove"))
    return [
        MinhashDedupSignature(one, config),
        MinhashDedupBuckets(one, two, config=config),
        MinhashDedupCluster(two, three, config=config),
    ]


def peer_dedup(folder: Path, count: int, seed: int) -> dict[str, float]:
    """Recall and precision of datatrove's MinHash on the same planted texts."""
    import struct

    from datatrove.data import Document

    use_splitter()
    duplicates, _ = plant(folder / "planted", count, seed)
    documents = [
        Document(text=record["text"], id=f"{name}/{record['id']}")
        for name in "ab"
        for record in map(json.loads, (folder / "planted" / f"{name}.jsonl").read_text().splitlines())
    ]
    signature, buckets, cluster = minhash_steps(folder / "peer")
    signature.run(iter(documents))
    for band in range(14):
        buckets.run(None, band, 14)
    cluster.run(None, 0, 1)
    [file] = (folder / "peer" / "remove").glob("*.remove")
    dropped = {documents[number].id for (number,) in struct.iter_unpack("<I", file.read_bytes())}
    return {
        "datatrove_dedup_recall": len(dropped & duplicates) / len(duplicates),
        "datatrove_dedup_precision": len(dropped & duplicates) / max(1, len(dropped)),
    }


def main() -> None:
    """Measure."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--megabytes", type=float, default=40.0, help="of raw files (default: 40)")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument(
        "--planted", type=int, default=600, help="texts with a near-duplicate or a clean twin"
    )
    parser.add_argument("--speed-megabytes", type=float, default=6.0, help="of text for each step's speed")
    parser.add_argument(
        "--part", choices=PARTS, action="append", help="measure only this; may be given again (default: all)"
    )
    arguments = parser.parse_args()
    parts = arguments.part or PARTS
    draw = random.Random(arguments.seed)
    figures: dict[str, float] = {}
    peer: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "kills" in parts or "speed" in parts:
            size = gather(folder / "raw", arguments.megabytes, draw)
            say(f"gathered {size:.0f} MB of files")
        if "kills" in parts:
            figures |= kill_figures(folder, arguments.kills, draw) | {"corpus_files_megabytes": size}
        if "dedup" in parts:
            figures |= dedup_figures(folder / "dedup", arguments.planted, arguments.seed)
            peer |= peer_dedup(folder / "peer-dedup", arguments.planted, arguments.seed)
            say("looked for planted duplicates")
        if "speed" in parts:
            ours, theirs = speeds(folder, arguments.speed_megabytes)
            for name, value in ours.items():
                figures[f"{name}_megabytes_a_second"] = value
                if name in theirs:
                    figures[f"{name}_against_datatrove"] = value / theirs[name]
                    peer[f"{name}_megabytes_a_second"] = theirs[name]
    common.write(arguments.json, figures, peer)
    for name, value in peer.items():
        print(f"peer {name}  {value:.6g}")


if __name__ == "__main__":
    main()
