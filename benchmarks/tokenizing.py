"""Text to a source: our job against `tokenizers` on all cores, and whether memory stays flat.

Both sides are whole processes that are given the same JSONL file and `tokenizer.json` and write the same `.bin` and
`.idx` (compared by digest). The peer encodes batches by `tokenizers` on all cores in one process, or by one process a
core, whichever is faster here; it reads, checks, and writes as ours does, so that only the encoder, and what it takes
to feed it, differ.

The text is made from the seed: words whose frequencies follow the Zipf-Mandelbrot law over 20 million forms, so that
new words keep coming as they do in real text; numbers, punctuation, line breaks, code and some other scripts. How
distinct it is is measured and reported beside the figures (`peer`): distinct words among all words, and among the
words of the last tenth those that never came before.

figures: vs_tokenizers (their seconds / ours), mb_per_second, rss_growth_10x (peak memory of all our processes on ten
times the text / on the text; the smaller one fills the encoder's caches)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np

FORMS = 20_000_000
EXPONENT, SHIFT = 1.35, 8.0
VOCABULARY = 32_768
SIZES = {"speed": 400, "small": 250, "train": 12}  # MB
QUICK = {"speed": 24, "small": 24, "train": 4}
CORES = len(os.sched_getaffinity(0))

_SYLLABLES = [
    first + rest
    for first in "b c d f g h j k l m n p r s t v w z ch sh th st tr pl br qu".split()
    for rest in "a e i o u ai ea ou er an en in on ing al at es ed ly or".split()
]
_ENDS = np.array(
    [" "] * 28 + [", "] * 3 + [". "] * 2 + [".\n", ".\n\n", "; ", " (", ") ", "'s ", " - ", ": "], object
)
_RARE = np.array(
    [
        "\u6570\u636e",
        "caf\u00e9",
        "na\u00efve",
        "\u2019s",
        "\U0001f642",
        "def ",
        "return x",
        "==",
        "    ",
        "\u043c\u0438\u0440",
        "\\n",
    ],
    object,
)


class Run(NamedTuple):
    """One whole process and its children: seconds, peak bytes of memory, and what was written."""

    seconds: float
    peak_bytes: int
    sha256: str
    encoder: str


def main() -> None:
    """Measure and report."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--quick", action="store_true", help="small inputs, to see that it works")
    parser.add_argument("--folder", type=Path, help="where to put the texts (default: a temporary folder)")
    parser.add_argument("--job", nargs=4, help=argparse_suppress())
    arguments = parser.parse_args()
    if arguments.job:
        work(*arguments.job)
        return
    sizes = QUICK if arguments.quick else SIZES
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        measure(arguments, Path(name), {what: mb * 1_000_000 for what, mb in sizes.items()})


def argparse_suppress() -> str:
    """Keeps an option out of the help: the benchmark gives it to itself."""
    import argparse

    return argparse.SUPPRESS


def measure(arguments: Any, folder: Path, sizes: dict[str, int]) -> None:
    """All figures."""
    tokenizer, train = folder / "tokenizer", folder / "train.jsonl"
    write_text(train, sizes["train"], arguments.seed + 1)
    from megatron_davinci.data.tokenizer import train_bpe

    train_bpe([train], VOCABULARY if not arguments.quick else 8192, tokenizer)
    speed = folder / "speed.jsonl"
    write_text(speed, sizes["speed"], arguments.seed)
    said = distinct(speed)
    nbytes = speed.stat().st_size
    ours = start(folder, speed, tokenizer, "gigatoken", str(CORES))
    peers = {
        "one process, all cores": start(folder, speed, tokenizer, "tokenizers", "1"),
        "a process for each core": start(folder, speed, tokenizer, "tokenizers", str(max(2, CORES))),
    }
    assert {run.sha256 for run in peers.values()} == {ours.sha256}, "both sides write the same tokens"
    fastest = min(peers, key=lambda name: peers[name].seconds)
    speed.unlink()
    small, large = (memory(folder, tokenizer, sizes["small"] * times, arguments.seed) for times in (1, 10))
    figures = {
        "vs_tokenizers": peers[fastest].seconds / ours.seconds,
        "mb_per_second": nbytes / 1e6 / ours.seconds,
        "seconds": ours.seconds,
        "megabytes": nbytes / 1e6,
        "rss_growth_10x": large.peak_bytes / small.peak_bytes,
        "peak_mb": small.peak_bytes / 1e6,
        "mb_per_second_10x": 10 * sizes["small"] / 1e6 / large.seconds,
    }
    peer = {
        "name": f"{peers[fastest].encoder}, {fastest}",
        "seconds": {name: run.seconds for name, run in peers.items()},
        "mb_per_second": nbytes / 1e6 / peers[fastest].seconds,
        "peak_mb": {name: run.peak_bytes / 1e6 for name, run in peers.items()},
        "ours": ours.encoder,
        "text": said,
    }
    for name, value in said.items():
        print(f"{name:<28}{value:.6g}")
    common.write(arguments.json, figures, peer)


def memory(folder: Path, tokenizer: Path, nbytes: int, seed: int) -> Run:
    """Our job on a text of this size."""
    path = folder / f"memory-{nbytes}.jsonl"
    write_text(path, nbytes, seed + 2)
    run = start(folder, path, tokenizer, "gigatoken", str(CORES))
    path.unlink()
    return run


def start(folder: Path, text: Path, tokenizer: Path, backend: str, workers: str) -> Run:
    """Run one side as a process of its own and watch it."""
    out = folder / "out"
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, __file__, "--job", str(text), str(tokenizer), str(out), f"{backend}:{workers}"]
    begun = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    peak = _Peak(process.pid)
    said, _ = process.communicate()
    seconds = time.perf_counter() - begun
    assert process.returncode == 0
    digest = hashlib.sha256()
    for path in sorted(out.glob("shard-*")):
        digest.update(path.read_bytes() if path.suffix == ".idx" else b"")
    digest.update((out / "manifest.json").read_bytes())
    subprocess.run(["rm", "-r", str(out)], check=True)
    return Run(seconds, peak.end(), digest.hexdigest(), said.strip())


def work(text: str, tokenizer: str, out: str, how: str) -> None:
    """One side: the process that is measured."""
    from megatron_davinci.data.tokenize import tokenize
    from megatron_davinci.data.tokenizer import Tokenizer

    backend, workers = how.split(":")
    made = tokenize(
        [text],
        Tokenizer.load(Path(tokenizer)),
        Path(out),
        "text",
        "text",
        workers=int(workers),
        backend=backend,  # type: ignore[arg-type]
    )
    print(made.encoder)


class _Peak:
    """The most memory that a process and its children have held together: resident, shared pages split."""

    def __init__(self, pid: int) -> None:
        self._pid, self._peak, self._over = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            self._peak = max(self._peak, sum(map(_proportional, _family(self._pid))))

    def end(self) -> int:
        """Stop watching; bytes."""
        self._over.set()
        self._thread.join()
        return self._peak


def _family(pid: int) -> Iterator[int]:
    yield pid
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _family(int(child))
    except OSError:
        return


def _proportional(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Pss:\s+(\d+) kB", lines, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def write_text(path: Path, nbytes: int, seed: int) -> None:
    """JSONL of about so many bytes, which the seed decides."""
    generator = np.random.default_rng(seed)
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < nbytes:
            pieces = words(generator, 1 << 18) + generator.choice(_ENDS, 1 << 18)
            rare = np.flatnonzero(generator.random(len(pieces)) < 0.03)
            pieces[rare] = generator.choice(_RARE, len(rare)) + generator.choice(_ENDS, len(rare))
            numbers = np.flatnonzero(generator.random(len(pieces)) < 0.02)
            pieces[numbers] = [f"{n} " for n in generator.integers(0, 100_000, len(numbers)).tolist()]
            at = 0
            while at < len(pieces):
                count = int(generator.lognormal(5.8, 1.0)) + 20
                line = json.dumps({"text": "".join(pieces[at : at + count])}, ensure_ascii=False) + "\n"
                file.write(line)
                written += len(line)
                at += count


def words(generator: np.random.Generator, count: int) -> np.ndarray:
    """Words by rank: [count] strings. The frequent are short, and no two ranks are spelt alike but by chance."""
    low, high = SHIFT ** (1 - EXPONENT), (FORMS + SHIFT) ** (1 - EXPONENT)
    ranks = ((low + generator.random(count) * (high - low)) ** (1 / (1 - EXPONENT)) - SHIFT).astype(np.int64)
    table = _Table.of()
    spelt = np.empty(count, object)
    known = ranks < len(table)
    spelt[known] = table[ranks[known]]
    spelt[~known] = [spell(rank) for rank in ranks[~known].tolist()]
    return spelt


class _Table:
    """The spelling of frequent words."""

    _words: np.ndarray | None = None

    @classmethod
    def of(cls) -> np.ndarray:
        """Those of rank 0 to 299,999."""
        if cls._words is None:
            cls._words = np.array([spell(rank) for rank in range(300_000)], object)
        return cls._words


def spell(rank: int) -> str:
    """A word: its rank, mixed, in syllables."""
    mixed = (rank * 2_654_435_761) % (1 << 32)
    base = len(_SYLLABLES)
    left = rank + base
    parts = []
    while left:
        parts.append(_SYLLABLES[(left + mixed) % base])
        left //= base
    word = "".join(parts[:-1]) or parts[0]
    return word.capitalize() if mixed % 17 == 0 else word


def distinct(path: Path) -> dict[str, float]:
    """How much of a text is new: see the module's docstring."""
    seen: set[int] = set()
    total = last = new = 0
    size = path.stat().st_size
    done = 0
    with open(path, encoding="utf-8") as file:
        for line in file:
            done += len(line)
            for word in line.split():
                total += 1
                key = hash(word)
                if done > 0.9 * size:
                    last += 1
                    new += key not in seen
                seen.add(key)
    return {"words": total, "distinct_words": len(seen), "new_in_last_tenth": new / max(1, last)}


if __name__ == "__main__":
    main()
