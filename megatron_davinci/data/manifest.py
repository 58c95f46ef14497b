"""The manifest of a source: its shards in order, what they hold, and what made them."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
    model_validator,
)

from megatron_davinci.data.indexed import DTYPE_CODES
from megatron_davinci.data.indexed_writer import Written
from megatron_davinci.data.places import S3Path, place
from megatron_davinci.data.storage import read_all, size_of
from megatron_davinci.errors import DataError
from megatron_davinci.files import write_atomically

FILE_NAME = "manifest.json"

_DTYPES = {dtype.name: dtype for dtype in DTYPE_CODES if dtype.kind in "iu"}
_Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Count = Annotated[int, Field(ge=0, le=1 << 60)]  # so that all of a source's are counted in 64 bits


class _Checked(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Shard(_Checked):
    """One indexed dataset of a source.

    Attributes:
        prefix: Path without `.bin` or `.idx`, relative to the manifest's folder, with `/`.
        tokens: Tokens in `.bin`.
        documents: Documents in `.idx`.
        bin_bytes: Size of `.bin`.
        bin_sha256: Hex digest of `.bin`.
        mask_sha256: Hex digest of `.mask`, which says what tokens carry loss; None, and not in the file, where
            every token does.
        idx_sha256: Hex digest of `.idx`; None, and not in the file, where nobody wrote it down, as once nobody did.
    """

    prefix: str = Field(min_length=1)
    tokens: _Count
    documents: _Count
    bin_bytes: _Count
    bin_sha256: _Digest
    mask_sha256: _Digest | None = None
    idx_sha256: _Digest | None = None

    @classmethod
    def of(cls, prefix: str, written: Written) -> Shard:
        """The entry of a shard that was just written."""
        return cls(
            prefix=prefix,
            tokens=written.tokens,
            documents=written.documents,
            bin_bytes=written.bin_bytes,
            bin_sha256=written.bin_sha256,
            mask_sha256=written.mask_sha256,
            idx_sha256=written.idx_sha256,
        )

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A manifest that is read and written keeps the bytes that it had.
        fields: dict[str, Any] = serialize(self)
        return {name: value for name, value in fields.items() if value is not None}

    @model_validator(mode="after")
    def _stays_in_the_folder(self) -> Shard:
        path = PurePosixPath(self.prefix)
        if path.is_absolute() or ".." in path.parts or not path.name or "\x00" in self.prefix:
            raise ValueError(f"a prefix is a path inside the manifest's folder; found {self.prefix!r}")
        return self


class Manifest(_Checked):
    """What a source consists of. Checked when made, so that no wrong one is ever saved.

    Attributes:
        format: Version of this file's format.
        name: The source's name where it was made.
        domain: The domain that reports group it by.
        dtype: Name of the tokens' dtype: `uint16`, `int32`, ...
        vocab_size: Largest id that the tokenizer can give, plus 1.
        eod_id: The token that ends each document; None if there is none.
        tokenizer_sha256: Hex digest of the tokenizer's file; None for tokens that no tokenizer made.
        shards: In the order that numbers the windows.
        packed: Tokens of a sequence, where documents are packed into sequences: one that is cut then ends where its
            sequence does, and without `eod_id`. None, and not in the file, where they are not.

    Raises:
        pydantic.ValidationError: A value is of the wrong type or impossible (`load` makes it a `DataError`).
    """

    format: Literal[1] = 1
    name: str = Field(min_length=1)
    domain: str = Field(min_length=1)
    dtype: str
    vocab_size: int = Field(gt=0)
    eod_id: _Count | None
    tokenizer_sha256: _Digest | None
    shards: tuple[Shard, ...]
    packed: int | None = Field(default=None, ge=2)

    @model_serializer(mode="wrap")
    def _as_before_there_was_packing(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        if self.packed is None:
            del fields["packed"]
        return fields

    @model_validator(mode="after")
    def _adds_up(self) -> Manifest:
        dtype = _DTYPES.get(self.dtype)
        if dtype is None:
            raise ValueError(f"dtype is one of {', '.join(_DTYPES)}; found {self.dtype!r}")
        if self.vocab_size - 1 > np.iinfo(dtype).max:
            raise ValueError(f"{self.dtype} does not hold the ids of a vocabulary of {self.vocab_size:,}")
        if self.eod_id is not None and self.eod_id >= self.vocab_size:
            raise ValueError(f"eod_id {self.eod_id} is outside the vocabulary of {self.vocab_size:,}")
        for i, shard in enumerate(self.shards):
            if shard.bin_bytes != shard.tokens * dtype.itemsize:
                raise ValueError(
                    f"shards[{i}]: {shard.tokens:,} tokens of {self.dtype} are "
                    f"{shard.tokens * dtype.itemsize:,} bytes, not bin_bytes = {shard.bin_bytes:,}"
                )
        masked = [shard.mask_sha256 is not None for shard in self.shards]
        if any(masked) and not all(masked):
            one, none = (self.shards[masked.index(there)].prefix for there in (True, False))
            raise ValueError(f"all shards have a mask or none has; {one} has one, {none} has not")
        for prefix, times in Counter(str(PurePosixPath(shard.prefix)) for shard in self.shards).items():
            if times > 1:
                raise ValueError(f"{prefix} is listed {times} times")
        return self

    @property
    def token_dtype(self) -> np.dtype:
        """The tokens' dtype, little-endian."""
        return _DTYPES[self.dtype]

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Documents in all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def has_mask(self) -> bool:
        """Whether masks say what tokens carry loss. All shards have one, or none."""
        return bool(self.shards) and self.shards[0].mask_sha256 is not None

    @property
    def fingerprint(self) -> str:
        """Hex digest of what decides the windows: the dtype and each shard's tokens, bytes and mask, in order.

        Names and folders are not in it: a moved source is the same source.
        """
        shards = [
            [shard.tokens, shard.bin_sha256, *([shard.mask_sha256] if self.has_mask else [])]
            for shard in self.shards
        ]
        content = [self.dtype, shards]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `folder/manifest.json` in one rename; an old one is replaced.

        Raises:
            EnvironmentProblem: It could not be written; an old one is whole.
        """
        write_atomically(Path(folder) / FILE_NAME, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str] | S3Path) -> Manifest:
        """Read and check `folder/manifest.json`. The shards are not touched.

        Raises:
            DataError: It is missing, is not JSON, lacks a field, has one too many, or a value is wrong.
            EnvironmentProblem: It cannot be read.
        """
        path = place(folder) / FILE_NAME
        if size_of(path) is None:
            raise DataError(
                "A source has no manifest.",
                where=path,
                found="no such file",
                do="write one with `davinci data manifest`, or give the prefix of one indexed dataset",
            )
        try:
            return cls.model_validate_json(read_all(path))
        except ValidationError as error:
            raise DataError(
                "A manifest is wrong.",
                where=path,
                found="\n".join(problem_lines(error)),
                do="restore the file, or write the source again",
            ) from error


def tokenizer_of(folder: str | os.PathLike[str] | S3Path) -> str | None:
    """Hex digest of the tokenizer that made the source in a folder; None where no manifest says so.

    Raises:
        DataError: The manifest is wrong.
    """
    there = size_of(place(folder) / FILE_NAME) is not None
    return Manifest.load(folder).tokenizer_sha256 if there else None


def problem_lines(error: ValidationError) -> list[str]:
    """What is wrong with a manifest, a line each: `shards[0].tokens: ...`."""
    problems = []
    for problem in error.errors(include_url=False):
        field = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in problem["loc"]).lstrip(".")
        problems.append(f"{field}: {problem['msg']}" if field else problem["msg"])
    return problems
