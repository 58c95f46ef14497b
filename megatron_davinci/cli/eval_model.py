"""A checkpoint's model, built on the ranks of an evaluation and filled."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_davinci.cli.convert_to_hf import Found
from megatron_davinci.config import RunConfig, validate
from megatron_davinci.config.load import value_of
from megatron_davinci.data.manifest import Manifest
from megatron_davinci.data.run_tokenizer import manifests, run_tokenizer
from megatron_davinci.data.tokenizer import Tokenizer
from megatron_davinci.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_davinci.evaluate.engine import Engine

# What may be said of how a checkpoint is computed; everything else is the checkpoint's.
SETTINGS = (
    "parallel.device",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.pipeline_layers",
    "parallel.timeout_seconds",
    "train.precision",
    "train.threads",
)


def config_of(model: dict[str, Any], overrides: Sequence[str], ranks: int | None = None) -> RunConfig:
    """The smallest whole configuration that builds a checkpoint's model.

    Args:
        model: The `model` section of the checkpoint.
        overrides: `key=value`, of the keys in `SETTINGS`.
        ranks: The size of the world; None for as many as the layout needs.

    Raises:
        ConfigError: A setting is unknown, or impossible.
    """
    settings: dict[str, dict[str, Any]] = {
        # Rank 0 may take hours over a task's data, while the others wait for work.
        "parallel": {"device": "auto", "timeout_seconds": 24 * 3600},
        "train": {"precision": "auto"},
    }
    for override in overrides:
        key, _, value = override.partition("=")
        if key not in SETTINGS:
            raise ConfigError(
                "An evaluation has no such setting.",
                where=override,
                expected=", ".join(SETTINGS),
                do="the model is the checkpoint's; only how it is computed can be said",
            )
        section, _, name = key.partition(".")
        settings[section][name] = value_of(value, key)
    length = 1
    config = validate(
        {
            "run": {"directory": "."},
            "model": {**model, "dropout": 0.0},
            "data": {"sequence_length": length, "sources": {"none": {"path": "none"}}},
            "curriculum": [
                {
                    "name": "none",
                    "tokens": length,
                    "mixture": {"none": 1.0},
                    "global_batch_size": ranks or 1,
                    "learning_rate": {"peak": 1.0},
                }
            ],
            # Attention that follows branches.
            "backends": {"attention": "sdpa"},
            **settings,
        },
        "an evaluation",
    )
    if config.parallel.model_ranks != config.parallel.tensor * config.parallel.pipeline:
        raise ConfigError(
            "An evaluation has tensor, pipeline and data-parallel ranks only.", where="parallel"
        )
    return config


@dataclass(frozen=True)
class Measured:
    """What is evaluated.

    Attributes:
        engine: This rank's.
        tokenizer: The model's.
        config: How it is computed.
        identity: What decides its answers besides the requests; JSON.
    """

    engine: Engine
    tokenizer: Tokenizer
    config: RunConfig
    identity: dict[str, Any]


@contextmanager
def on_ranks(
    found: Found, overrides: Sequence[str], tokenizer: Tokenizer, ranks: int, tokens_at_once: int
) -> Iterator[Measured]:
    """Join the ranks, build the model and fill it; leave them at the end.

    Args:
        found: The checkpoint.
        overrides: As `config_of` takes them.
        tokenizer: The model's.
        ranks: The size of the world.
        tokens_at_once: Tokens of one forward pass.
    """
    from megatron_davinci.platform.device import choose

    manifest = found.checkpoint.manifest
    if manifest.get("precision") == "fp32":
        # `auto` would round to bf16 what was never rounded, on machines that multiply it natively.
        overrides = ["train.precision=fp32", *overrides]
    config = config_of(manifest["model"], overrides, ranks)
    platform = choose(config.parallel.device, config.train.threads)
    train = config.train.model_copy(update={"precision": platform.precision(config.train.precision)})
    backends = config.backends
    if platform.device.type == "cpu":
        # One table of cosines and sines a pass, where Megatron-Core computes them in every layer, twice.
        backends = backends.model_copy(update={"rope": "davinci"})
    config = config.model_copy(update={"train": train, "backends": backends})

    import torch.distributed as dist

    from megatron_davinci.evaluate.answers import digest_of_checkpoint
    from megatron_davinci.evaluate.engine import Engine, Limits
    from megatron_davinci.model.build import build_model
    from megatron_davinci.platform import distributed
    from megatron_davinci.train.checkpoint import load_weights

    if "RANK" not in os.environ:
        # A world of one, and no trace of it in the environment.
        dist.init_process_group(platform.backend, store=dist.HashStore(), rank=0, world_size=1)
    distributed.start(
        platform,
        tensor=config.parallel.tensor,
        pipeline=config.parallel.pipeline,
        timeout_seconds=config.parallel.timeout_seconds,
    )
    try:
        chunks = build_model(config, platform)
        load_weights(found.checkpoint.folder, chunks, config.model.model_dump(mode="json"))
        identity = {
            "checkpoint": digest_of_checkpoint(manifest),
            # What ends documents stands before texts, and ends answers.
            "tokenizer": tokenizer.sha256 + ("" if tokenizer.own_end else f", end {tokenizer.eod_id}"),
            "precision": config.train.precision,
            "length": config.model.max_sequence_length,
        }
        engine = Engine(chunks[0], config.model, platform.device, Limits(tokens_at_once))
        yield Measured(engine, tokenizer, config, identity)
    finally:
        distributed.stop()


def tokenizer_for(found: Found, given: Path | None) -> Tokenizer:
    """The tokenizer of a checkpoint's model.

    Args:
        found: The checkpoint.
        given: Where the user says that it is; None for where the run says.

    Raises:
        ConfigError: Nobody says.
        DataError: It has tokens that the model has not, or is not the one that made the run's data.
    """
    path = given or (found.config.data.tokenizer if found.config is not None else None)
    if path is None:
        raise ConfigError(
            "The checkpoint does not say what its tokenizer is.",
            where=found.checkpoint.folder,
            do="name it: --tokenizer FOLDER",
        )
    sources = manifests(found.config.data if found.config is not None else None)
    tokenizer = run_tokenizer(path, sources.values())
    model = found.checkpoint.manifest["model"]
    tokens = model["vocab_size"] - (model.get("vocab_padding") or 0)
    if tokenizer.vocab_size > tokens:
        raise DataError(
            "The tokenizer is not the model's: it has more tokens.",
            where=path,
            found=f"{tokenizer.vocab_size:,} tokens",
            expected=f"at most {tokens:,}, which the model has",
            do="name the tokenizer that its data was made with: --tokenizer FOLDER",
        )
    if given is None:
        _check_made_by(tokenizer, path, sources)
    return tokenizer


def _check_made_by(tokenizer: Tokenizer, path: Path, sources: Mapping[str, Manifest]) -> None:
    """Refuse a tokenizer whose digest is not that of the run's sources, where those are still there."""
    for name, source in sources.items():
        made_by = source.tokenizer_sha256
        if made_by not in (None, tokenizer.sha256):
            raise DataError(
                "The tokenizer is not the one that made the run's data.",
                where=path,
                found=f"sha256 {tokenizer.sha256}",
                expected=f"sha256 {made_by}, by the manifest of {name}",
                do="restore it; or, if you know that it gives the same ids, name it with --tokenizer",
            )
