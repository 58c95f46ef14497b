"""A Hugging Face model becomes a checkpoint of ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from pydantic import ValidationError
from torch import Tensor

from megatron_davinci.config.model import ModelConfig
from megatron_davinci.convert.export import DTYPES, read_config
from megatron_davinci.convert.families import FAMILIES, family_of_config
from megatron_davinci.convert.family import Family
from megatron_davinci.convert.new_tokens import NewTokens, extended
from megatron_davinci.convert.resumable import Progress
from megatron_davinci.convert.rules import Heads, Padded, Rule, from_hf, hf_shapes, sizes
from megatron_davinci.convert.tensor_files import Tensors, cast
from megatron_davinci.convert.tokenizer_files import ids_of
from megatron_davinci.convert.write_state import Source, write_state
from megatron_davinci.errors import CheckpointError, ConfigError

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_LISTED = 12  # names in a message


@dataclass(frozen=True)
class HFModel:
    """A model in a folder that can be read.

    Attributes:
        folder: The folder.
        family: Its family.
        model: The `model` section of our configuration, with the new vocabulary.
        tensors: Its tensors.
        dtype: What is written; None: as stored.
        left: What is not carried over, a line each.
        new: Rows that are added to the vocabulary.
    """

    folder: Path
    family: Family
    model: dict[str, Any]
    tensors: Tensors
    dtype: torch.dtype | None
    left: list[str]
    new: NewTokens

    @classmethod
    def of(
        cls,
        folder: Path,
        *,
        dtype: str | None = None,
        vocab_multiple: int = 128,
        new: NewTokens | None = None,
    ) -> HFModel:
        """Read all but the tensors, and check that they are those of the model. Nothing in the folder is run.

        Args:
            folder: With `config.json` and safetensors files.
            dtype: `float32`, `bfloat16` or `float16`; default: as stored, which must then be one.
            vocab_multiple: The vocabulary is padded to a multiple of it.
            new: Tokens that the vocabulary is extended by.

        Raises:
            ConfigError: It is of no family that is supported, or has settings that cannot be built here; all are
                listed.
            CheckpointError: A tensor is missing, unexpected, of another shape or dtype; or a file is damaged.
        """
        new = new or NewTokens()
        config = read_config(folder)
        family = family_of_config(config, folder / "config.json")
        section, left, problems = family.model(config)
        if problems:
            raise ConfigError(
                f"This {family.name} model has settings that cannot be built here.",
                where=folder / "config.json",
                found="\n".join(problems),
                expected="families: " + ", ".join(FAMILIES),
                do="take another model: with these settings it would compute something else",
            )
        plain = _validated(section, folder / "config.json")
        tensors = Tensors(folder)
        _check_tensors(tensors, family, plain, dtype)
        _check_tokenizer(folder, plain)
        tokens = max(plain["vocab_size"], new.first + new.count)
        padding = -tokens % vocab_multiple
        model = plain | {"vocab_size": tokens + padding, "vocab_padding": padding}
        return cls(folder, family, model, tensors, DTYPES[dtype] if dtype else None, left, new)

    def size(self) -> int:
        """Bytes of the tensors that are read."""
        return sum(
            math.prod(self.tensors[name].shape) * self.tensors[name].dtype.itemsize for name in self.tensors
        )

    def write(
        self,
        folder: Path,
        opened: Callable[[str, str], IO[bytes]] = open,
        progress: Progress = lambda done, total: None,
    ) -> None:
        """Write the weights as a checkpoint's `state`, one layer of a tensor in memory at a time.

        Args:
            folder: The folder, which exists and is empty.
            opened: Opens the large files, given name and mode.
            progress: Is told bytes done, and bytes in all.

        Raises:
            CheckpointError: A file ends early, or a tensor that must be zero, or equal to another, is not.
            EnvironmentProblem: The disk is full or failing.
        """
        self._check_what_is_left_out()
        heads, total, done = Heads.of(self.model), self.size(), 0

        def read(rule: Rule, layer: int | None) -> Tensor:
            nonlocal done
            parts = {}
            for pattern in rule.hf:
                name = pattern.format(layer=layer)
                part = self.tensors.read(name)
                done += part.numel() * part.itemsize
                where = self.tensors[name].path
                parts[name] = part if self.dtype is None else cast(part, self.dtype, name, where)
            if isinstance(rule.cut, Padded) and self.new.count:
                ((name, rows),) = parts.items()
                parts[name] = extended(rows, self.new)
            progress(min(done, total), total)
            return from_hf(rule, parts, layer, heads)

        sources = {}
        for rule in self.family.rules_of(self.model):
            kind = self.dtype or self.tensors[rule.hf[0].format(layer=0)].dtype
            one = partial(read, rule)
            layer = one if rule.per_layer else None
            sources[rule.stored] = Source(kind, rule.stored_shape(self.model), partial(one, None), layer)
        write_state(folder, sources, opened)

    def _check_what_is_left_out(self) -> None:
        """Tensors that have no place in ours must not say anything."""
        for zeros in self.family.zeros_of(self.model):
            for layer in range(self.model["num_layers"]):
                name = zeros.hf.format(layer=layer)
                if self.tensors.read(name).any():
                    raise CheckpointError(
                        "The model has a tensor that has no place here.",
                        where=self.tensors[name].path,
                        found=f"{name} is not zero",
                        expected="zeros: attention here has no bias on its output projection",
                        do="take another model: without this tensor it would be another one",
                    )
        if self.model["tie_embeddings"] and _HEAD in self.tensors:
            rows = self.tensors[_HEAD].shape[0]
            for first in range(0, rows, 4096):
                part = (first, min(first + 4096, rows))
                if not torch.equal(self.tensors.read(_HEAD, *part), self.tensors.read(_EMBEDDING, *part)):
                    raise CheckpointError(
                        "The model's embeddings are tied, but its files have two.",
                        where=self.tensors[_HEAD].path,
                        found=f"{_HEAD} differs from {_EMBEDDING} in rows {part[0]} to {part[1] - 1}",
                        expected="the same rows, or tie_word_embeddings: false",
                        do="set tie_word_embeddings as the model was trained",
                    )


def _validated(section: dict[str, Any], where: Path) -> dict[str, Any]:
    try:
        return ModelConfig.model_validate(section).model_dump(mode="json")
    except ValidationError as error:
        raise ConfigError(
            "The model's config.json does not describe a model that can be built.",
            where=where,
            found="\n".join(
                f"{'.'.join(map(str, one['loc'])) or 'model'}: {one['msg']}, found {one['input']!r:.80}"
                for one in error.errors(include_url=False)
            ),
        ) from error


def _check_tensors(tensors: Tensors, family: Family, model: dict[str, Any], dtype: str | None) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    known = sizes(model)
    # Each layer has a tensor: of those that cannot be there one is enough to name.
    layers = range(min(model["num_layers"], len(tensors) + 1))
    wanted = [(rule.hf, hf_shapes(rule, model), rule.per_layer) for rule in family.rules_of(model)]
    wanted += [((one.hf,), [tuple(known[n] for n in one.shape)], True) for one in family.zeros_of(model)]
    for names, shapes, per_layer in wanted:
        for layer in layers if per_layer else (None,):
            expected |= {name.format(layer=layer): shape for name, shape in zip(names, shapes, strict=True)}
    if model["tie_embeddings"] and _HEAD in tensors:
        expected[_HEAD] = (known["vocab"], known["hidden"])
    present = {name for name in tensors if not name.endswith(family.ignored)}
    lines = _listed("missing", [name for name in expected if name not in present])
    lines += _listed("unexpected", sorted(present - expected.keys()))
    lines += _listed(
        "of another shape",
        [
            f"{name} {list(tensors[name].shape)}, not {list(shape)}"
            for name, shape in expected.items()
            if name in present and tensors[name].shape != shape
        ],
    )
    if lines:
        raise CheckpointError(
            "The model's tensors are not those that its config.json speaks of.",
            where=tensors.folder,
            found="\n".join(lines),
            expected=f"a {family.name} model of {model['num_layers']} layers",
            do="see that config.json and the files of weights are of one model, and that all are there",
        )
    _check_dtypes(tensors, list(expected), dtype)


def _check_dtypes(tensors: Tensors, names: list[str], dtype: str | None) -> None:
    by_dtype: dict[torch.dtype, list[str]] = {}
    for name in names:
        by_dtype.setdefault(tensors[name].dtype, []).append(name)
    odd = by_dtype.keys() - set(DTYPES.values())
    if not odd and (len(by_dtype) == 1 or dtype is not None):
        return
    found = [
        f"{str(kind).removeprefix('torch.')}: {len(those)} tensors, as {those[0]}"
        for kind, those in by_dtype.items()
    ]
    raise CheckpointError(
        "The model's tensors are of dtypes that cannot be read as weights."
        if odd
        else "The model's tensors are of several dtypes.",
        where=tensors.folder,
        found="\n".join(found),
        expected="float32, bfloat16 or float16" if odd else "one dtype",
        do="take the model before it was quantised" if odd else "say which one is meant: --dtype float32",
    )


def _check_tokenizer(folder: Path, model: dict[str, Any]) -> None:
    ids = ids_of(folder)
    if ids is not None and ids > model["vocab_size"]:
        raise ConfigError(
            "The model's tokenizer has tokens that its embedding has no row for.",
            where=folder / "tokenizer.json",
            found=f"ids up to {ids - 1:,}",
            expected=f"ids up to {model['vocab_size'] - 1:,}: the embedding has {model['vocab_size']:,} rows",
            do="take the tokenizer that the model was trained with, and extend the vocabulary on import: "
            "--extend-with FOLDER",
        )


def _listed(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(names[:_LISTED])
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return [f"{what}: {shown}{more}"]
