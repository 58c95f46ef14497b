"""A checkpoint becomes a folder that plain transformers loads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_davinci.convert import resumable
from megatron_davinci.convert.families import family_of
from megatron_davinci.convert.family import Family
from megatron_davinci.convert.resumable import Item, Progress, unfinished, write_tensors
from megatron_davinci.convert.rules import Heads, Rule, Zeros, hf_shapes, sizes, to_hf
from megatron_davinci.convert.stored import StoredTensors
from megatron_davinci.convert.tensor_files import Planned, cast
from megatron_davinci.convert.tokenizer_files import copy_tokenizer
from megatron_davinci.errors import CheckpointError
from megatron_davinci.files import write_json

SHARD_BYTES = 5_000_000_000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_to_hf(
    state: Path,
    model: dict[str, Any],
    out: Path,
    *,
    tokenizer: Path | None = None,
    eod_id: int | None = None,
    dtype: str | None = None,
    family: Family | None = None,
    progress: Progress = lambda done, total: None,
    finish: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Write a checkpoint as a Hugging Face folder, one tensor in memory at a time.

    The folder is written beside `out` and renamed when it is whole. Interrupted, it is gone on with by the next call.

    Args:
        state: The checkpoint's `state` folder.
        model: The `model` section of the run's configuration.
        out: The folder to make; it must not exist.
        tokenizer: Folder whose tokenizer files are copied.
        eod_id: The tokenizer's end-of-document token.
        dtype: `float32`, `bfloat16` or `float16`; default: as stored.
        family: The family to write; default: the one that the model says, or that it is built like.
        progress: Is told bytes done, and bytes in all.
        finish: Is given the folder before it appears; what it raises keeps it from appearing.

    Returns:
        `out`.

    Raises:
        CheckpointError: The checkpoint lacks a tensor, has one too many, or one of the wrong shape.
        ConfigError: `out` exists, or the family cannot hold the model.
        EnvironmentProblem: The disk is full.
    """
    family = family or family_of(model)
    with unfinished(out) as folder:
        try:
            # Refuses what the family cannot hold, before anything is read.
            family.check(model)
            stored = StoredTensors(state)
            _check_tensors(stored, family, model)
            written = DTYPES[dtype] if dtype else _dtype_of(stored, family.rules_of(model))
            items = plan(stored, family, model, DTYPES[dtype] if dtype else None)
            identity = {
                "state": _identity_of(state),
                "model": model,
                "family": family.name,
                "dtype": dtype,
                "shard_bytes": SHARD_BYTES,
            }
        except BaseException:
            resumable.discard(out)
            raise
        try:
            write_tensors(folder, items, identity, SHARD_BYTES, progress)
            name = str(written).removeprefix("torch.")
            write_json(folder / "config.json", family.hf_config(model, eod_id, name))
            write_json(folder / "generation_config.json", _generation(eod_id))
            if tokenizer is not None:
                copy_tokenizer(tokenizer, folder)
            finish(folder)
        except CheckpointError:
            # What was found wrong is not gone on with.
            resumable.discard(out)
            raise
    return out


def _identity_of(state: Path) -> str:
    """Names what a checkpoint's folder holds. Two imports of one shape have the same metadata, not the same times."""
    digest = hashlib.sha256((state / ".metadata").read_bytes())
    for path in sorted(state.iterdir()):
        found = path.stat()
        digest.update(f"{path.name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def plan(
    stored: StoredTensors, family: Family, model: dict[str, Any], dtype: torch.dtype | None
) -> list[Item]:
    """The tensors to write, layer by layer; each is read when it is its turn.

    Args:
        stored: The checkpoint.
        family: The family.
        model: The `model` section of the run's configuration.
        dtype: Of what is written; None: as stored.
    """
    heads = Heads.of(model)
    rules = family.rules_of(model)
    layered = [rule for rule in rules if rule.per_layer]

    def item(rule: Rule, layer: int | None) -> Item:
        kind = dtype or stored.dtype(rule.stored)
        shapes = hf_shapes(rule, model)
        planned = [
            Planned(name.format(layer=layer), kind, shape)
            for name, shape in zip(rule.hf, shapes, strict=True)
        ]

        def make() -> list[Tensor]:
            whole = stored.read(rule.stored) if layer is None else stored.layer(rule.stored, layer)
            parts = to_hf(rule, whole, layer, heads)
            return [cast(part, kind, name, stored.state) for name, part in parts.items()]

        return Item(planned, make)

    def zeros(one: Zeros, layer: int) -> Item:
        kind = dtype or stored.dtype(layered[0].stored)
        shape = tuple(sizes(model)[name] for name in one.shape)
        return Item(
            [Planned(one.hf.format(layer=layer), kind, shape)], lambda: [torch.zeros(shape, dtype=kind)]
        )

    # As the model is computed: what comes before the layers, the layers, what comes behind them.
    first = rules.index(layered[0])
    items = [item(rule, None) for rule in rules[:first]]
    for layer in range(model["num_layers"]):
        items += [item(rule, layer) for rule in layered]
        items += [zeros(one, layer) for one in family.zeros_of(model)]
    return items + [item(rule, None) for rule in rules[first:] if not rule.per_layer]


def _check_tensors(stored: StoredTensors, family: Family, model: dict[str, Any]) -> None:
    rules = family.rules_of(model)
    expected, present = {rule.stored for rule in rules}, stored.keys()
    if present != expected:
        raise CheckpointError(
            f"The checkpoint's tensors are not those of a {family.name} model.",
            where=stored.state,
            found=f"missing: {', '.join(sorted(expected - present)) or 'none'}\n"
            f"unexpected: {', '.join(sorted(present - expected)) or 'none'}",
            do="export with the configuration that wrote the checkpoint",
        )
    differing = [
        f"{rule.stored}: shape {list(stored.shape(rule.stored))}, not {list(rule.stored_shape(model))}"
        for rule in rules
        if stored.shape(rule.stored) != rule.stored_shape(model)
    ]
    if differing:
        raise CheckpointError(
            "The checkpoint's tensors are not of the model's sizes.",
            where=stored.state,
            found="\n".join(differing),
            do="export with the configuration that wrote the checkpoint",
        )


def _dtype_of(stored: StoredTensors, rules: list[Rule]) -> torch.dtype:
    """The dtype that `config.json` names: the one of the widest tensors, should they differ."""
    return max((stored.dtype(rule.stored) for rule in rules), key=lambda dtype: dtype.itemsize)


def _generation(eod_id: int | None) -> dict[str, Any]:
    return {"bos_token_id": eod_id, "eos_token_id": eod_id, "pad_token_id": eod_id, "do_sample": False}


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed `config.json` of a Hugging Face folder.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError(f"a {type(config).__name__}")
    except FileNotFoundError:
        raise CheckpointError(
            "This is no model of Hugging Face.",
            where=folder,
            found="no config.json" if folder.is_dir() else "no folder",
            expected="a folder with config.json and safetensors files",
            do="check the path; a model on the hub is fetched with `hf download NAME --local-dir FOLDER`",
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "The model's config.json cannot be read.", where=path, found=error, do="download it again"
        ) from error
    return config
