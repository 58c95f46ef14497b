"""A checkpoint becomes a folder that plain transformers loads."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_davinci.convert.llama import family_of
from megatron_davinci.convert.rules import Family, Heads, Rule, to_hf
from megatron_davinci.convert.stored import StoredTensors
from megatron_davinci.errors import CheckpointError, ConfigError
from megatron_davinci.files import disk_errors, fsync_folder

SHARD_BYTES = 5_000_000_000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export_to_hf(
    state: Path,
    model: dict[str, Any],
    out: Path,
    *,
    tokenizer: Path | None = None,
    eod_id: int | None = None,
    dtype: str | None = None,
    family: Family | None = None,
) -> Path:
    """Write a checkpoint as a Hugging Face folder.

    The folder is written beside `out` and renamed when it is whole.

    Args:
        state: The checkpoint's `state` folder.
        model: The `model` section of the run's configuration.
        out: The folder to make; it must not exist.
        tokenizer: Folder whose tokenizer files are copied.
        eod_id: The tokenizer's end-of-document token.
        dtype: `float32` or `bfloat16`; default: as stored.
        family: The family to write; default: Qwen2 with biases on queries, keys and values, Llama without.

    Returns:
        `out`.

    Raises:
        CheckpointError: The checkpoint lacks a tensor, has one too many, or one of the wrong shape.
        ConfigError: `out` exists, or the family cannot hold the model.
        EnvironmentProblem: The disk is full.
    """
    family = family or family_of(model)
    if out.exists():
        raise ConfigError(
            "The export's folder is there already.", where=out, do="choose another, or remove it"
        )
    if model.get("experts") is not None:
        raise ConfigError(
            "A model with experts cannot be exported yet.",
            where="model.experts",
            found=f"{model['experts']['number']} experts in each layer",
            expected=f"none: a {family.name} model has one MLP in each layer",
            do="keep the checkpoint: Megatron-Core's dist_checkpointing reads it, in any layout",
        )
    # Refuses what the family cannot hold, before anything is read.
    family.hf_config(model, eod_id, dtype or "float32")
    stored = StoredTensors(state)
    rules = [rule for rule in family.rules if rule.holds(model)]
    expected = {rule.stored for rule in rules}
    if stored.keys() != expected:
        raise CheckpointError(
            f"The checkpoint's tensors are not those of a {family.name} model.",
            where=state,
            found=f"missing: {', '.join(sorted(expected - stored.keys())) or 'none'}\n"
            f"unexpected: {', '.join(sorted(stored.keys() - expected)) or 'none'}",
            do="export with the configuration that wrote the checkpoint",
        )
    _check_shapes(stored, rules, model)
    heads = Heads.of(model)
    temporary = out.with_name(f".{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    with disk_errors(out, "exporting"):
        temporary.mkdir(parents=True)
        try:
            writer = _Shards(temporary, DTYPES[dtype] if dtype else None)
            for rule in rules:
                whole = stored.read(rule.stored)
                if not rule.per_layer:
                    writer.add(to_hf(rule, whole, None, heads))
                    continue
                for layer in range(model["num_layers"]):
                    writer.add(to_hf(rule, whole[layer], layer, heads))
            written = writer.close()
            _write_configs(temporary, family, model, eod_id, written)
            if tokenizer is not None:
                for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
                    if (tokenizer / name).exists():
                        shutil.copyfile(tokenizer / name, temporary / name)
            fsync_folder(temporary)
            temporary.rename(out)
            fsync_folder(out.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return out


def _check_shapes(stored: StoredTensors, rules: list[Rule], model: dict[str, Any]) -> None:
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


def _write_configs(
    folder: Path, family: Family, model: dict[str, Any], eod_id: int | None, dtype: str
) -> None:
    config = family.hf_config(model, eod_id, dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": eod_id, "eos_token_id": eod_id, "pad_token_id": eod_id, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


class _Shards:
    """Writes tensors to safetensors files of bounded size, with an index when there is more than one."""

    def __init__(self, folder: Path, dtype: torch.dtype | None) -> None:
        self._folder, self._dtype = folder, dtype
        self._pending: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._files: list[tuple[Path, list[str]]] = []
        self._total = 0
        self._written = ""

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take tensors; a full shard is written."""
        for name, tensor in tensors.items():
            tensor = tensor.to(self._dtype) if self._dtype else tensor.clone()
            size = tensor.numel() * tensor.element_size()
            if self._pending and self._bytes + size > SHARD_BYTES:
                self._flush()
            self._pending[name] = tensor
            self._bytes += size
            self._total += size
            self._written = str(tensor.dtype).removeprefix("torch.")

    def close(self) -> str:
        """Write what is left, name the files as transformers expects, and return the dtype's name."""
        self._flush()
        count = len(self._files)
        weight_map = {}
        for index, (path, names) in enumerate(self._files, 1):
            name = "model.safetensors" if count == 1 else f"model-{index:05d}-of-{count:05d}.safetensors"
            path.rename(self._folder / name)
            weight_map.update(dict.fromkeys(names, name))
        if count > 1:
            index_file = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self._folder / "model.safetensors.index.json").write_text(
                json.dumps(index_file, indent=2) + "\n"
            )
        return self._written

    def _flush(self) -> None:
        if self._pending:
            path = self._folder / f"shard-{len(self._files)}.safetensors"
            save_file(self._pending, str(path), metadata={"format": "pt"})
            self._files.append((path, list(self._pending)))
            self._pending, self._bytes = {}, 0
