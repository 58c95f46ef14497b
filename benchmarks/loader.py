"""Tokens per second of our loader, against raw reads of the same windows and against Megatron-Core's dataset.

Raw: as many threads as the loader has workers `preadv` the same windows in the same order into memory that is there
already; the order, the file descriptors and the buffers are made before the clock starts. They check nothing and hand
on nothing. The loader computes its order, checks every token against the vocabulary and gives batches to its caller,
within the clock; it begins each block with nothing read ahead.

Megatron-Core: `GPTDataset` over the same files, blended by its builder, in a torch `DataLoader` with as many workers,
in its own random order. Its index is built before the clock starts, and so are its workers: the clock starts when its
first batch is there. It gives int64 tensors, so the loader is measured again with the step's copy to int64.

All take turns, a block each, so that the machine's mood hits all alike; figures are medians over the blocks. Cold
blocks begin with `posix_fadvise(DONTNEED)` on all token files; what of them is still in memory then is in `peer`.

figures: fraction_of_pread and fraction_of_pread_cold (ours / raw), the same by processor time, which other programs
on the machine hardly change (cpu_fraction_of_pread, …_cold: raw / ours; of the process and, for ours, its workers),
{loader,pread}_cpu_us_per_window_{warm,cold}, {loader,pread,int64,megatron}_tokens_per_second_{warm,cold},
vs_megatron_{warm,cold} (ours with int64 / theirs), megatron_index_seconds. Environment: DAVINCI_NATIVE=0 measures the
loader without its C++.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import common
import numpy as np

from megatron_davinci.data import (
    Batches,
    Curriculum,
    IndexedDatasetWriter,
    Manifest,
    MixRecord,
    Shard,
    Source,
)
from megatron_davinci.data.loader import NativeLoader
from megatron_davinci.data.native import library
from megatron_davinci.data.workers import ProcessLane

LENGTH, VOCABULARY, EOD = 4096, 50_304, 0
SOURCES = {"code": "0.2", "web": "0.8"}


class Size(NamedTuple):
    """How much is measured: shards a source, documents a shard, batches a block warm and cold, blocks."""

    shards: int
    documents: int
    warm: int
    cold: int
    blocks: int


FULL, QUICK = Size(4, 90_000, 10, 2, 9), Size(2, 12_000, 2, 1, 3)


def main() -> None:
    """Measure and report."""
    parser = common.parser(__doc__ or "")
    parser.add_argument(
        "--quick", action="store_true", help="less data and fewer blocks: figures of no weight"
    )
    parser.add_argument("--workers", type=int, default=2, help="with 0, two threads read, on both sides")
    parser.add_argument("--batch", type=int, default=4096, help="samples a batch: the report's, on one rank")
    parser.add_argument("--prefetch-steps", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the data is written (default: a temporary folder)")
    parser.add_argument("--no-megatron", action="store_true", help="leave the second peer out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        seconds, peer = measure(arguments, QUICK if arguments.quick else FULL, Path(folder))
    figures = {}
    if "megatron_index_seconds" in peer:
        figures["megatron_index_seconds"] = peer.pop("megatron_index_seconds")
    for name, laps in seconds.items():
        figures[name] = statistics.median(laps)
    for state in ("warm", "cold"):
        ours, raw = (seconds[f"{who}_tokens_per_second_{state}"] for who in ("loader", "pread"))
        suffix = "_cold" if state == "cold" else ""
        ratios = [a / b for a, b in zip(ours, raw, strict=True)]
        figures["fraction_of_pread" + suffix] = statistics.median(ratios)
        ours, raw = (seconds[f"{who}_cpu_us_per_window_{state}"] for who in ("loader", "pread"))
        ratios = [b / a for a, b in zip(ours, raw, strict=True)]
        figures["cpu_fraction_of_pread" + suffix] = statistics.median(ratios)
        if theirs := seconds.get(f"megatron_tokens_per_second_{state}"):
            ours = seconds[f"int64_tokens_per_second_{state}"]
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            figures[f"vs_megatron_{state}"] = statistics.median(ratios)
    common.write(arguments.json, figures, {"blocks": seconds, **peer})


def measure(arguments: Any, size: Size, folder: Path) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Tokens a second by who and state, block by block; and what is to be known of the measurement."""
    write_sources(folder, size, arguments.seed)
    files = sorted(folder.rglob("*.bin"))
    sources = {name: Source.open(name, folder / name, LENGTH, vocab_size=VOCABULARY) for name in SOURCES}
    windows = {name: source.num_windows for name, source in sources.items()}
    curriculum = Curriculum(windows, arguments.seed, [MixRecord(0, "all", SOURCES)])
    batches = Batches(curriculum, sources)
    peer: dict[str, Any] = {
        "bytes": sum(file.stat().st_size for file in files),
        "windows": windows,
        "batch": arguments.batch,
        "workers": arguments.workers,
        "prefetch_steps": arguments.prefetch_steps,
        "native": library() is not None,
        "cached_after_dropping": [],
    }
    rates: dict[str, list[float]] = {}
    raw = RawReads(batches, arguments.batch, arguments.workers or 2)
    megatron = None if arguments.no_megatron else Megatron(folder, arguments)
    if megatron is not None:
        peer["megatron_index_seconds"] = megatron.index_seconds
    with NativeLoader(
        batches,
        workers=arguments.workers,
        prefetch_steps=arguments.prefetch_steps,
        read_threads=1 if arguments.workers else 2,
    ) as loader:
        ours = Ours(loader, arguments.batch, arguments.prefetch_steps)
        contenders: dict[str, Callable[[int, int], Lap]] = {
            "loader": ours.run,
            "pread": raw.run,
            "int64": lambda first, count: ours.run(first, count, int64=True),
        }
        if megatron is not None:
            contenders["megatron"] = megatron.run
        for state in ("warm", "cold"):
            count = size.warm if state == "warm" else size.cold
            read_all(files)
            for block in range(size.blocks + 1):
                # Who begins changes with the block.
                names = list(contenders)
                for name in names[block % len(names) :] + names[: block % len(names)]:
                    if state == "cold":
                        peer["cached_after_dropping"].append(round(drop(files), 4))
                    lap = contenders[name](block * count, count)
                    if not block:
                        continue  # the first warms up
                    rates.setdefault(f"{name}_tokens_per_second_{state}", []).append(lap.tokens / lap.wall)
                    if name in ("loader", "pread"):
                        cpu_us = lap.cpu * 1e6 * LENGTH / lap.tokens
                        rates.setdefault(f"{name}_cpu_us_per_window_{state}", []).append(cpu_us)
    return rates, peer


class Lap:
    """The seconds that tokens took.

    Args:
        tokens: How many there are.
        processes: Whose processor time counts beside this process's.

    Attributes:
        wall: Seconds by the clock, from the making to `end`.
        cpu: Seconds of processor time, of all threads.
    """

    def __init__(self, tokens: int, processes: list[int] | None = None) -> None:
        self.tokens = tokens
        # The kernel's number for the clock of a process's processor time: clock_getcpuclockid(3).
        self._clocks = [time.CLOCK_PROCESS_CPUTIME_ID, *((~pid << 3) | 2 for pid in processes or [])]
        self.cpu, self.wall = -self._cpu(), -time.perf_counter()

    def end(self) -> Lap:
        """Stop the clocks."""
        self.wall += time.perf_counter()
        self.cpu += self._cpu()
        return self

    def _cpu(self) -> float:
        return sum(map(time.clock_gettime, self._clocks))


class Ours:
    """The loader, driven as the training loop drives it."""

    def __init__(self, loader: NativeLoader, batch: int, prefetch_steps: int) -> None:
        self.loader, self.batch, self.ahead = loader, batch, prefetch_steps

    def run(self, first: int, count: int, int64: bool = False) -> Lap:
        """`count` batches from batch `first` on."""
        import torch

        workers = [lane.pid for lane in self.loader._lanes if isinstance(lane, ProcessLane)]
        lap = Lap(count * self.batch * LENGTH, workers)
        for k in range(first, first + min(self.ahead, count)):
            self.loader.request(self.samples(k))
        for k in range(first, first + count):
            batch = self.loader.take(self.samples(k))
            if k + self.ahead < first + count:
                self.loader.request(self.samples(k + self.ahead))
            if int64:
                torch.from_numpy(batch.tokens).long()
        return lap.end()

    def samples(self, k: int) -> np.ndarray:
        """The numbers of batch `k`."""
        return np.arange(k * self.batch, (k + 1) * self.batch)


class RawReads:
    """Threads that do nothing but `preadv`, each the same share of each batch that a worker has."""

    def __init__(self, batches: Batches, batch: int, threads: int) -> None:
        self.batches, self.batch, self.threads = batches, batch, threads
        self.nbytes = (LENGTH + 1) * batches.dtype.itemsize
        memory = memoryview(np.ones(4 * batch * self.nbytes, np.uint8))
        self.rows = [(memory[i : i + self.nbytes],) for i in range(0, len(memory), self.nbytes)]
        self.fds: dict[tuple[int, int], int] = {}

    def run(self, first: int, count: int) -> Lap:
        """The same batches."""
        located = self.batches.curriculum.locate_many(
            np.arange(first * self.batch, (first + count) * self.batch)
        )
        shares: list[list[Any]] = [[] for _ in range(self.threads)]
        for i, (source, window) in enumerate(
            zip(located.source.tolist(), located.window.tolist(), strict=True)
        ):
            shard, token = self.batches.sources[source].locate(window)
            thread = i % self.batch * self.threads // self.batch
            at = (self.fd(source, shard), self.rows[i % len(self.rows)], token * self.batches.dtype.itemsize)
            shares[thread].append(at)
        threads = [Thread(target=self.read, args=(list(zip(*share, strict=True)),)) for share in shares]
        lap = Lap(count * self.batch * LENGTH)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return lap.end()

    def read(self, share: list[tuple[Any, ...]]) -> None:
        """One thread's reads: descriptors, buffers, offsets. Not even a loop of Python is around them."""
        if set(map(os.preadv, *share)) != {self.nbytes}:
            raise OSError("a short read")

    def fd(self, source: int, shard: int) -> int:
        """The descriptor of a shard's token file."""
        if (source, shard) not in self.fds:
            path = f"{self.batches.sources[source].shard_place(shard)}.bin"
            self.fds[source, shard] = os.open(path, os.O_RDONLY)
        return self.fds[source, shard]


class Megatron:
    """`GPTDataset` in a torch `DataLoader`, as Megatron-LM's training has it."""

    def __init__(self, folder: Path, arguments: Any) -> None:
        from megatron_davinci.platform.device import choose

        choose("cpu")
        # It has no cache for its index and a tokenizer without padding, both of which are meant here.
        logging.getLogger("megatron.core").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", message="The pad token id in the tokenizer collides")
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

        prefixes, weights = [], []
        for name, weight in SOURCES.items():
            found = sorted(folder.glob(f"{name}/*.bin"))
            prefixes += [str(file)[: -len(".bin")] for file in found]
            weights += [float(weight) / len(found)] * len(found)
        config = GPTDatasetConfig(
            random_seed=arguments.seed,
            sequence_length=LENGTH,
            blend=(prefixes, weights),
            split="1,0,0",
            tokenizer=Tokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        samples = sum(os.path.getsize(prefix + ".bin") for prefix in prefixes) // 2 // LENGTH
        begin = time.perf_counter()
        self.dataset = BlendedMegatronDatasetBuilder(
            GPTDataset, [samples, 0, 0], lambda: True, config
        ).build()[0]
        self.index_seconds = time.perf_counter() - begin
        self.workers = arguments.workers

    def run(self, first: int, count: int) -> Lap:
        """128 samples for each batch of ours and 256 at least, a micro-batch of 8 at a time."""
        from torch.utils.data import DataLoader, Subset

        # Fewer samples take it long enough; they need not be the same ones, as its order is another.
        samples = range(first * 128, first * 128 + max(256, count * 128))
        chosen = Subset(self.dataset, [n % len(self.dataset) for n in samples])
        loader = iter(DataLoader(chosen, batch_size=8, num_workers=self.workers, shuffle=False))
        next(loader)
        lap = Lap(0)
        lap.tokens = sum(batch["tokens"].numel() for batch in loader)
        return lap.end()


class Tokenizer:
    """What `GPTDataset` wants to know of a tokenizer."""

    vocab_size, eod, pad = VOCABULARY, EOD, EOD
    unique_identifiers: dict[str, str] = {"class": "benchmark"}  # noqa: RUF012


def write_sources(folder: Path, size: Size, seed: int) -> None:
    """Random documents of about a thousand tokens."""
    generator = np.random.default_rng(seed)
    for name in SOURCES:
        shards = []
        for k in range(size.shards):
            lengths = generator.integers(500, 1500, size.documents)
            ends = np.cumsum(lengths)
            tokens = generator.integers(1, VOCABULARY, int(ends[-1]), dtype=np.uint16)
            tokens[ends - 1] = EOD
            with IndexedDatasetWriter(folder / name / f"shard-{k:05}", np.uint16) as writer:
                for document in np.split(tokens, ends[:-1]):
                    writer.add_document(document)
            shards.append(Shard.of(f"shard-{k:05}", writer.written))
        Manifest(
            name=name,
            domain=name,
            dtype="uint16",
            vocab_size=VOCABULARY,
            eod_id=EOD,
            tokenizer_sha256="0" * 64,
            shards=tuple(shards),
        ).save(folder / name)


def read_all(files: list[Path]) -> None:
    """Bring files into the page cache."""
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.read(1 << 22):
                pass


def drop(files: list[Path]) -> float:
    """Drop files from the page cache; returns the share of their pages that stayed."""
    resident = pages = 0
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            here, there = _resident(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)
        resident, pages = resident + here, pages + there
    return resident / pages


def _resident(fd: int, nbytes: int) -> tuple[int, int]:
    count = -(-nbytes // mmap.PAGESIZE)
    with mmap.mmap(fd, nbytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        held = (ctypes.c_ubyte * count)()
        first = ctypes.c_char.from_buffer(mapped)
        ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(nbytes), held
        )
        del first
    return int((np.frombuffer(held, np.uint8) & 1).sum()), count


if __name__ == "__main__":
    main()
