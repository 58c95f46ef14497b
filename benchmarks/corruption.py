"""Whether damage of checkpoints and datasets is found before a wrong value is used.

A run's folder of checkpoints, and a source of three shards, are made once. Each case copies one of them and damages
the copy in one way drawn by chance: any file of a checkpoint, its manifest too; a `.bin` or `.idx` of a source.
Then it does what a run does before it uses a value: look for the newest good checkpoint, or open the source with its
digests verified and hold it against its manifest. Damage counts as found when the damaged checkpoint is passed over
for the one before, or the source refused or, for a shard that its manifest does not name and no run reads, said to
be unlisted. Copies without damage must be accepted.

figures: corruption_detected_fraction, clean_accepted_fraction, cases, clean_cases, detected_<place>_<kind> (fraction)
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import common

Damage = Callable[[Path, Path, np.random.Generator], None]
"""Damages files of the first folder; the second is another good one of its kind."""


def flip(path: Path, generator: np.random.Generator) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    content[int(generator.integers(len(content)))] ^= 1 << int(generator.integers(8))
    path.write_bytes(content)


def cut(path: Path, generator: np.random.Generator) -> None:
    """Cut a file short: by a byte, to a part, or to nothing."""
    content = path.read_bytes()
    left = [len(content) - 1, int(generator.integers(len(content))), 0][int(generator.integers(3))]
    path.write_bytes(content[:left])


def grow(path: Path, generator: np.random.Generator) -> None:
    """Add bytes at the end."""
    path.write_bytes(path.read_bytes() + generator.bytes(int(generator.integers(1, 4096))))


def zero(path: Path, generator: np.random.Generator) -> None:
    """Lose a page to zeros, as a file system may after a crash."""
    content = bytearray(path.read_bytes())
    at = int(generator.integers(max(1, len(content) - 4096)))
    lost = bytes(min(4096, len(content) - at))
    if content[at : at + len(lost)] == lost:
        lost = b"\xff" * len(lost)
    content[at : at + len(lost)] = lost
    path.write_bytes(content)


def one_file(change: Callable[[Path, np.random.Generator], None]) -> Damage:
    """Damage of one file, drawn by chance."""

    def damage(folder: Path, other: Path, generator: np.random.Generator) -> None:
        change(pick(folder, generator), generator)

    return damage


def files(folder: Path) -> list[Path]:
    """All files of a checkpoint, or the `.bin` and `.idx` of a source, in order."""
    there = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in there if path.suffix in (".bin", ".idx")] or there


def pick(folder: Path, generator: np.random.Generator) -> Path:
    """A file by chance."""
    there = files(folder)
    return there[int(generator.integers(len(there)))]


def missing(folder: Path, other: Path, generator: np.random.Generator) -> None:
    """Lose a file."""
    pick(folder, generator).unlink()


def swapped(folder: Path, other: Path, generator: np.random.Generator) -> None:
    """Two files in each other's place."""
    there = files(folder)
    one, two = (there[int(i)] for i in generator.choice(len(there), 2, replace=False))
    between = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(between)


def of_another(folder: Path, other: Path, generator: np.random.Generator) -> None:
    """A file of another checkpoint or source under the name of one of this, where their bytes differ."""
    differing = [
        path for path in files(folder) if path.read_bytes() != (other / path.relative_to(folder)).read_bytes()
    ]
    path = differing[int(generator.integers(len(differing)))]
    shutil.copyfile(other / path.relative_to(folder), path)


def extra_in_checkpoint(folder: Path, other: Path, generator: np.random.Generator) -> None:
    """A shard too many."""
    (folder / "state" / f"__{int(generator.integers(1, 9))}_0.distcp").write_bytes(generator.bytes(1000))


def extra_in_source(folder: Path, other: Path, generator: np.random.Generator) -> None:
    """A shard too many."""
    for ending in (".bin", ".idx"):
        shutil.copyfile(folder / f"shard-00001{ending}", folder / f"shard-00009{ending}")


ANYWHERE: dict[str, Damage] = {
    "bit_flip": one_file(flip),
    "truncation": one_file(cut),
    "growth": one_file(grow),
    "zeroed_page": one_file(zero),
    "missing": missing,
    "swapped": swapped,
    "of_another": of_another,
}
CHECKPOINT = {**ANYWHERE, "extra": extra_in_checkpoint}
SOURCE = {**ANYWHERE, "extra": extra_in_source}


def checkpoint_found(checkpoints: Path) -> bool:
    """Whether a run would pass over the newest checkpoint, by name, for the one before it."""
    from megatron_davinci.train import checkpoint_files

    found, problems = checkpoint_files.newest_good(checkpoints)
    named = len(problems) == 1 and "step-00000020" in str(problems[0])
    return found is not None and found.step == 10 and named


def checkpoint_taken(checkpoints: Path) -> bool:
    """Whether a run would go on from the newest checkpoint."""
    from megatron_davinci.train import checkpoint_files

    found, problems = checkpoint_files.newest_good(checkpoints)
    return found is not None and found.step == 20 and not problems


def source_found(folder: Path) -> bool:
    """Whether a run that verifies digests refuses the source, or `davinci data verify` names a shard too many."""
    from megatron_davinci.data.source import Source
    from megatron_davinci.data.verify import verify_source
    from megatron_davinci.errors import DavinciError

    try:
        Source.open("s", folder, 32, verify_digests=True)
        found = verify_source(folder)
    except DavinciError:
        return True
    return any(found.problems) or bool(found.unlisted)


def make_checkpoints(folder: Path, seed: int) -> None:
    """Checkpoints of steps 10 and 20 with other values, of a small model in this process."""
    import torch

    from megatron_davinci.config import validate
    from megatron_davinci.model.build import build_model
    from megatron_davinci.optim.build import build_optimizer, set_hyperparameters
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose
    from megatron_davinci.train.saver import Saver
    from megatron_davinci.train.step import wrap_model

    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
    sizes |= {"ffn_hidden_size": 64, "vocab_size": 256, "max_sequence_length": 32}
    stage = {"name": "all", "tokens": 10**6, "mixture": {"s": 1}, "global_batch_size": 2}
    config = validate(
        {
            "run": {"directory": str(folder), "seed": seed},
            "model": sizes,
            "parallel": {"device": "cpu"},
            "data": {"sequence_length": 32, "sources": {"s": {"path": str(folder)}}},
            "curriculum": [{**stage, "learning_rate": {"peak": 1e-3}}],
            "train": {"precision": "fp32"},
        },
        where="benchmarks",
    )
    platform = choose("cpu", threads=1)
    distributed.start(platform, seed=seed)
    chunks = build_model(config, platform)
    wrapped = wrap_model(chunks, config)
    optimizer = build_optimizer(config, wrapped)
    set_hyperparameters(optimizer, learning_rate=1e-3, weight_decay=0.1)
    saver = Saver(folder, config.checkpoint)
    for step in (10, 20):
        for chunk in wrapped:
            chunk.zero_grad_buffer()
            for parameter in chunk.parameters():
                parameter.main_grad.copy_(torch.randn_like(parameter))
        optimizer.step()
        model = config.model.model_dump(mode="json")
        saver.save(chunks, optimizer, {"step": step, "consumed_samples": 8 * step, "model": model})
    saver.finish()
    distributed.stop()


def make_source(folder: Path, seed: int) -> None:
    """Three shards of documents of one to three sequences."""
    from megatron_davinci.data import IndexedDatasetWriter, Manifest, Shard

    generator, shards = np.random.default_rng(seed), []
    folder.mkdir(parents=True)
    for number in range(3):
        name = f"shard-{number:05d}"
        with IndexedDatasetWriter(folder / name, np.uint16) as writer:
            for _ in range(40 + number):
                writer.add_document(generator.integers(0, 255, int(generator.integers(40, 160))))
        shards.append(Shard.of(name, writer.written))
    about: dict[str, Any] = {"domain": "s", "dtype": "uint16", "vocab_size": 256, "eod_id": 255}
    Manifest(name="s", tokenizer_sha256="0" * 64, shards=tuple(shards), **about).save(folder)


def measure(cases: int, seed: int, folder: Path) -> dict[str, float]:
    """Damage copies and count what is found.

    Args:
        cases: How many, half of them of checkpoints; and a third as many clean copies.
        seed: Of the damage.
        folder: An empty folder to work in.
    """
    generator = np.random.default_rng(seed)
    make_checkpoints(folder / "checkpoints", seed)
    for number in (1, 2):
        make_source(folder / f"source{number}", seed + number)
    found: dict[str, list[bool]] = defaultdict(list)
    copy = folder / "copy"

    def copied(original: str) -> Path:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder / original, copy)
        return copy

    for case in range(cases):
        if case % 2:
            kind = list(CHECKPOINT)[case // 2 % len(CHECKPOINT)]
            checkpoints = copied("checkpoints")
            CHECKPOINT[kind](checkpoints / "step-00000020", checkpoints / "step-00000010", generator)
            found[f"checkpoint_{kind}"].append(checkpoint_found(checkpoints))
        else:
            kind = list(SOURCE)[case // 2 % len(SOURCE)]
            source = copied("source1")
            SOURCE[kind](source, folder / "source2", generator)
            found[f"source_{kind}"].append(source_found(source))
    clean = []
    for case in range(max(2, cases // 3)):
        if case % 2:
            clean.append(checkpoint_taken(copied("checkpoints")))
        else:
            clean.append(not source_found(copied("source1")))
    every = [one for outcomes in found.values() for one in outcomes]
    return {
        "corruption_detected_fraction": sum(every) / len(every),
        "clean_accepted_fraction": sum(clean) / len(clean),
        "cases": len(every),
        "clean_cases": len(clean),
        **{f"detected_{name}": sum(outcomes) / len(outcomes) for name, outcomes in sorted(found.items())},
    }


def main() -> None:
    """Measure and report."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--cases", type=int, default=300)
    arguments = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments.cases, arguments.seed, Path(folder))
    figures["seconds"] = time.perf_counter() - began
    common.write(arguments.json, figures, {})


if __name__ == "__main__":
    main()
