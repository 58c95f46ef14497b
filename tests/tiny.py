"""A tiny dataset and a tiny run, for every test that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_davinci.config import RunConfig, validate
from megatron_davinci.data import IndexedDatasetWriter, Manifest, Shard

VOCABULARY = 256
LENGTH = 32


def write_source(
    folder: Path, name: str, seed: int, documents: int = 60, vocabulary: int = VOCABULARY
) -> Path:
    """Documents of a random walk over the vocabulary: something that a model can learn."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    with IndexedDatasetWriter(folder / "shard-00000", np.uint16) as writer:
        for _ in range(documents):
            steps = generator.integers(1, 4, size=int(generator.integers(80, 160)))
            writer.add_document((np.cumsum(steps) * (seed + 1)) % (vocabulary - 1))
    Manifest(
        name=name,
        domain=name,
        dtype="uint16",
        vocab_size=vocabulary,
        eod_id=vocabulary - 1,
        tokenizer_sha256="0" * 64,
        shards=(Shard.of("shard-00000", writer.written),),
    ).save(folder)
    return folder


def tiny_settings(root: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run on two sources in `root/data`, which are written if they are not there.

    `changes` are sections whose keys win: `parallel={"tensor": 2}`.
    """
    data = root / "data"
    for seed, name in enumerate(("a", "b")):
        if not (data / name).exists():
            write_source(data / name, name, seed)
    settings: dict[str, Any] = {
        "run": {"directory": str(root / "run"), "seed": 7},
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "ffn_hidden_size": 64,
            "vocab_size": VOCABULARY,
            "max_sequence_length": LENGTH,
        },
        "parallel": {"device": "cpu", "timeout_seconds": 60},
        "data": {
            "sequence_length": LENGTH,
            "sources": {name: {"path": str(data / name)} for name in ("a", "b")},
            "validation": {"a": str(data / "a")},
        },
        "curriculum": [
            {
                "name": "first",
                "tokens": 24 * 8 * LENGTH,
                "mixture": {"a": 0.75, "b": 0.25},
                "global_batch_size": [{"size": 4, "steps": 12}, {"size": 8}],
                "learning_rate": {"peak": 1e-2, "warmup_steps": 5},
            },
            {
                "name": "second",
                "tokens": 20 * 8 * LENGTH,
                "mixture": {"a": 0.2, "b": 0.8},
                "global_batch_size": 8,
                "learning_rate": {"shape": "cosine", "peak": 5e-3, "end": 1e-4},
            },
        ],
        "train": {"micro_batch_size": 2, "precision": "fp32", "threads": 1},
        "logging": {"progress": "none", "tensorboard": False},
    }
    for section, keys in changes.items():
        if isinstance(keys, dict):
            settings[section] = {**settings.get(section, {}), **keys}
        else:
            settings[section] = keys
    return settings


def tiny_config(root: Path, **changes: Any) -> RunConfig:
    """`tiny_settings`, validated."""
    return validate(tiny_settings(root, **changes), where="tests/tiny.py")


def train_here(settings: dict[str, Any]) -> int:
    """Train on the ranks of the pool that this runs on; returns the last step."""
    from megatron_davinci.cli.train import make_evaluator
    from megatron_davinci.platform.device import choose
    from megatron_davinci.train.loop import run

    config = validate(settings, where="tests/tiny.py")
    return run(config, choose("cpu", threads=1), make_evaluator)


def train_each(runs: list[dict[str, Any]]) -> list[int]:
    """`train_here` for each of several settings, one after the other on the same ranks; returns their last steps.

    The ranks stay together and only their groups are laid out anew, which takes a fraction of starting others.
    """
    from megatron.core import parallel_state

    from megatron_davinci.platform import distributed

    stop, steps = distributed.stop, []
    try:
        distributed.stop = parallel_state.destroy_model_parallel
        for settings in runs:
            steps.append(train_here(settings))
    finally:
        distributed.stop = stop
        stop()
    return steps
