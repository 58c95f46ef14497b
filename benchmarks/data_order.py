"""From nothing to the first sample of an 8-trillion-token run, and what it costs to look a sample up.

8T: the report's 28 sources (Table 2; 7.55T tokens) in more than 4,000 shards with manifests, mixed in its four
sub-stages (Table 5, 8T tokens, 1,953,128,448 samples of 4,096). Starts are fresh processes; the clock runs from
before `megatron_davinci.data` is imported until the first sample's tokens are in memory. The files are sparse:
every `.bin` and `.idx` has its true size and every `.idx` its true header, so that all that training checks of them
is checked, but the tokens and the sequence lengths are holes that read as zeros. That suits this measurement because
a source with a manifest trusts the index no further than its header and size; digests in the manifests are made up,
since nobody asks to verify 30 TB here. What the operating system has in memory of programs and manifests stays there.

10B: one source of 10M documents, its index written in full, in turns with Megatron-Core's
`BlendedMegatronDatasetBuilder` over the same files, each time with an empty cache. `megatron_time_ratio` and
`megatron_memory_ratio` compare what is left when both have done their imports, theirs over ours: the order's own
cost. The same with the imports, and for memory the whole processes, are the ratios that end in `_whole`. Ours is
given the manifest that `davinci data tokenize` writes; `bare_prefix_seconds_10b` is without one, when it checks the
whole index.

figures: start_seconds_8t, start_rss_mb_8t (peak less what the interpreter had; both end in `_imported` where the
clock starts after the imports, and in `_last` at the run's last sample), cache_bytes_8t (what appeared beside the
data and in the home folder), start_seconds_10b, bare_prefix_seconds_10b, megatron_start_seconds_10b,
megatron_time_ratio, megatron_memory_ratio, locate_per_second (scattered; `_in_order` in a row), locate_us
(scattered), locate_us_at_10, locate_us_at_2e9 (5,000 samples from there on), locate_us_ratio
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import common
import numpy as np

from megatron_davinci.data import Curriculum, Manifest, MixRecord, Shard
from megatron_davinci.data.indexed import DTYPE_CODES, HEADER, MAGIC, VERSION, read_header

LENGTH, VOCABULARY, DTYPE = 4096, 151_936, np.dtype("<i4")
SHARD_TOKENS, DOCUMENT_TOKENS = 1_800_000_000, 1000
SMALL_TOKENS = 10_000_000_000

# Billions of tokens, and the sub-stages (1-1, 1-2, 2-1, 2-2) in which the report uses the source.
SOURCES = {
    "general": {"nemotron-cc": (4280, "1111")},
    "code": {
        "github": (187, "1111"),
        "nemotron-code": (220, "1111"),
        "nemotron-code-synthetic": (171, "1111"),
        "stackexchange": (20, "1111"),
    },
    "science": {
        "megamath-web": (231, "1100"),
        "megamath-web-pro": (13, "1111"),
        "megamath-refined": (176, "0011"),
        "megamath-synth-code": (5, "1111"),
        "nemotron-cc-math-3": (81, "1100"),
        "nemotron-cc-math-4plus": (52, "1100"),
        "nemotron-cc-math-4plus-mind": (74, "1111"),
        "nemotron-cc-math-3-refined": (68, "0011"),
        "nemotron-cc-math-4plus-refined": (47, "0011"),
        "darwin-science-book": (251, "1111"),
        "darwin-science-paper": (215, "1111"),
        "darwin-science-paper-gpt": (290, "1100"),
        "darwin-science-paper-qwen": (440, "0011"),
    },
    "qa": {
        "nemotron-sft-code": (21, "0011"),
        "nemotron-sft-math": (138, "0011"),
        "nemotron-sft-general": (12, "0011"),
        "llama-nemotron-code": (5, "0011"),
        "llama-nemotron-math-rs": (10, "0011"),
        "llama-nemotron-science-rs": (0.4, "0011"),
        "megamath-qa-rs": (9, "0011"),
        "megascience-rs": (1, "0011"),
        "darwin-science-book-qa": (46, "0011"),
        "nemotron-cc-diverse-qa": (492, "0000"),
    },
}
TOKENS = {name: int(size * 10**9) for kind in SOURCES.values() for name, (size, _) in kind.items()}
LARGEST = max(TOKENS, key=TOKENS.__getitem__)

# First sample, and percent of general, code, science and qa.
STAGES = {
    "1-1": (0, ("68.20", "9.53", "22.27", "0")),
    "1-2": (976_564_224, ("55.42", "11.66", "32.92", "0")),
    "2-1": (1_464_844_288, ("10", "30", "30", "30")),
    "2-2": (1_708_986_368, ("18.84", "2.61", "8.55", "70")),
}
SAMPLES = 1_953_128_448


def main() -> None:
    """Measure and report."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--quick", action="store_true", help="one start each, and 1B tokens instead of 10B")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures, peer = measure_8t(Path(folder), arguments)
    with tempfile.TemporaryDirectory() as folder:
        figures_10b, peer_10b = measure_10b(Path(folder), arguments)
    figures |= figures_10b | measure_locate(arguments)
    common.write(arguments.json, figures, peer | peer_10b)


def measure_8t(folder: Path, arguments: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """Cold starts of the whole run, at its first sample and at its last."""
    corpus, home = folder / "corpus", folder / "home"
    home.mkdir()
    shards = [write_source(corpus / name, name, tokens) for name, tokens in TOKENS.items()]
    headers = [read_header(file.with_suffix("")) for file in sorted(corpus.glob("*/*.idx"))]
    assert sum(header.num_tokens for header in headers) == sum(TOKENS.values())
    specification = {
        "sources": {name: str(corpus / name) for name in TOKENS},
        "length": LENGTH,
        "vocabulary": VOCABULARY,
        "seed": arguments.seed,
        "records": [[r.first_sample, r.stage, dict(r.weights)] for r in mixtures()],
        "sample": 0,
    }
    before = files(folder)
    rounds = 1 if arguments.quick else 5
    starts = [start("ours", specification, home) for _ in range(rounds)]
    late = [start("ours", specification | {"sample": SAMPLES - 1}, home) for _ in range(rounds)]
    after = files(folder)
    figures = {
        "start_seconds_8t": median(starts, "seconds"),
        "start_seconds_8t_imported": median(starts, "seconds_without_imports"),
        "start_seconds_8t_last": median(late, "seconds"),
        "start_rss_mb_8t": median(starts, "rss_mb"),
        "start_rss_mb_8t_imported": median(starts, "rss_mb_without_imports"),
        "cache_bytes_8t": sum(size - before.get(file, 0) for file, size in after.items()),
    }
    largest = [read_header(file.with_suffix("")) for file in (corpus / LARGEST).glob("*.idx")]
    peer = {
        "corpus_8t": {
            "tokens": sum(TOKENS.values()),
            "sources": len(TOKENS),
            "shards": sum(shards),
            "documents_in_largest_source": sum(header.document_bounds - 1 for header in largest),
            "bytes_on_disk": sum(file.stat().st_blocks * 512 for file in corpus.rglob("*") if file.is_file()),
        }
    }
    return figures, peer


def measure_10b(folder: Path, arguments: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """Cold starts of both on the same files, in turns."""
    tokens = SMALL_TOKENS // 10 if arguments.quick else SMALL_TOKENS
    home, source = folder / "home", folder / "text"
    home.mkdir()
    write_source(source, "text", tokens, one_shard=True)
    prefix = source / "shard-00000"
    write_index(prefix, tokens)
    specification = {
        "sources": {"text": str(source)},
        "prefix": str(prefix),
        "length": LENGTH,
        "vocabulary": VOCABULARY,
        "seed": arguments.seed,
        "records": [[0, "all", {"text": "1"}]],
        "sample": 0,
        "samples": tokens // LENGTH,
    }
    mine, bare, theirs, cached = [], [], [], []
    for turn in range(1 if arguments.quick else 3):
        cache = {"cache": str(folder / f"cache-{turn}")}
        theirs.append(start("megatron", specification | cache, home))
        mine.append(start("ours", specification, home))
        bare.append(start("ours", specification | {"sources": {"text": str(prefix)}}, home))
        cached.append(start("megatron", specification | cache, home))
    short = "without_imports"
    figures = {
        "start_seconds_10b": median(mine, f"seconds_{short}"),
        "bare_prefix_seconds_10b": median(bare, f"seconds_{short}"),
        "megatron_start_seconds_10b": median(theirs, f"seconds_{short}"),
        "megatron_time_ratio": median(theirs, f"seconds_{short}") / median(mine, f"seconds_{short}"),
        "megatron_time_ratio_whole": median(theirs, "seconds") / median(mine, "seconds"),
        # A page at least, so that a start that needed no fresh memory does not divide by nothing.
        "megatron_memory_ratio": median(theirs, f"rss_mb_{short}")
        / max(0.004, median(mine, f"rss_mb_{short}")),
        "megatron_memory_ratio_whole": median(theirs, "process_mb") / median(mine, "process_mb"),
    }
    peer = {
        "name": "megatron-core BlendedMegatronDatasetBuilder of GPTDataset",
        "tokens": tokens,
        "documents": tokens // DOCUMENT_TOKENS,
        "cache_bytes": sum(files(folder / "cache-0").values()),
        "starts": theirs,
        "starts_with_cache": cached,
        "our_starts": mine,
        "our_starts_without_manifest": bare,
    }
    return figures, peer


def measure_locate(arguments: Any) -> dict[str, float]:
    """Look-ups in the curriculum of the 8T run, many at a time and one by one."""
    windows = {}
    for name, tokens in TOKENS.items():
        sizes = shard_sizes(tokens)
        windows[name] = sum((size - 1) // LENGTH for size in sizes)
    curriculum = Curriculum(windows, arguments.seed, mixtures())
    generator = np.random.default_rng(arguments.seed)
    scattered = generator.integers(0, SAMPLES, 1_000_000)
    in_order = np.arange(1_000_000) + SAMPLES // 2
    repeats = 3 if arguments.quick else 9

    def many(ns: np.ndarray) -> float:
        laps = []
        for _ in range(repeats):
            begin = time.perf_counter()
            curriculum.locate_many(ns)
            laps.append(time.perf_counter() - begin)
        return len(ns) / statistics.median(laps)

    def one_by_one(ns: list[int]) -> float:
        laps = []
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            for n in ns:
                curriculum.locate(n)
            laps.append((time.perf_counter() - begin) / len(ns))
        return statistics.median(laps[1:]) * 1e6  # the first derives the keys of the epochs that occur

    at_10, at_2e9 = (one_by_one(list(range(n, n + 5000))) for n in (10, 2 * 10**9))
    return {
        "locate_per_second": many(scattered),
        "locate_per_second_in_order": many(in_order),
        "locate_us": one_by_one(scattered[:5000].tolist()),
        "locate_us_at_10": at_10,
        "locate_us_at_2e9": at_2e9,
        "locate_us_ratio": at_2e9 / at_10,
    }


def mixtures() -> list[MixRecord]:
    """The four sub-stages; within a kind, sources share by size."""
    records = []
    for number, (stage, (first, percents)) in enumerate(STAGES.items()):
        weights = {}
        for kind, percent in zip(SOURCES.values(), percents, strict=True):
            used = {name: TOKENS[name] for name, (_, stages) in kind.items() if stages[number] == "1"}
            for name, tokens in used.items():
                weights[name] = str(Fraction(percent) / 100 * tokens / sum(used.values()))
        records.append(MixRecord(first, stage, {name: w for name, w in weights.items() if w != "0"}))
    return records


def shard_sizes(tokens: int) -> list[int]:
    """Tokens a shard."""
    whole, rest = divmod(tokens, SHARD_TOKENS)
    return [SHARD_TOKENS] * whole + [rest] * (rest > 0)


def write_source(folder: Path, name: str, tokens: int, one_shard: bool = False) -> int:
    """Write a source of sparse shards; returns how many."""
    folder.mkdir(parents=True)
    shards = []
    for number, size in enumerate([tokens] if one_shard else shard_sizes(tokens)):
        prefix, documents = f"shard-{number:05}", size // DOCUMENT_TOKENS
        header = HEADER.pack(MAGIC, VERSION, DTYPE_CODES[DTYPE], documents, documents + 1)
        with open(folder / f"{prefix}.idx", "wb") as file:
            file.write(header)
            file.truncate(HEADER.size + 12 * documents + 8 * (documents + 1))
        with open(folder / f"{prefix}.bin", "wb") as file:
            file.truncate(size * DTYPE.itemsize)
        shards.append(
            Shard(
                prefix=prefix,
                tokens=size,
                documents=documents,
                bin_bytes=size * DTYPE.itemsize,
                bin_sha256=hashlib.sha256(f"{name}/{prefix}".encode()).hexdigest(),
            )
        )
    Manifest(
        name=name,
        domain=next((kind for kind, of in SOURCES.items() if name in of), name),
        dtype="int32",
        vocab_size=VOCABULARY,
        eod_id=0,
        tokenizer_sha256=hashlib.sha256(b"made up").hexdigest(),
        shards=tuple(shards),
    ).save(folder)
    return len(shards)


def write_index(prefix: Path, tokens: int) -> None:
    """Fill in a sparse index: documents of `DOCUMENT_TOKENS` tokens each."""
    documents = tokens // DOCUMENT_TOKENS
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(HEADER.size)
        np.full(documents, DOCUMENT_TOKENS, "<i4").tofile(file)
        (np.arange(documents, dtype="<i8") * (DOCUMENT_TOKENS * DTYPE.itemsize)).tofile(file)
        np.arange(documents + 1, dtype="<i8").tofile(file)


def start(who: str, specification: dict[str, Any], home: Path) -> dict[str, Any]:
    """One start in a process of its own, with an empty home, so that whatever it keeps is seen."""
    program = Path(__file__).with_name("data_order_start.py")
    environment = os.environ | {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
    command = [sys.executable, str(program), who, json.dumps(specification)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{who} did not start:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def files(folder: Path) -> dict[Path, int]:
    """Sizes of all files in a folder."""
    return {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}


def median(starts: list[dict[str, Any]], name: str) -> float:
    """The median of one measure."""
    return statistics.median(start[name] for start in starts)


if __name__ == "__main__":
    main()
