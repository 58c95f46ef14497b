"""Where data lies: a local path, or an object in S3. The rest of the room does not ask which."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from megatron_davinci.errors import DataError

SCHEME = "s3://"


class NotThere(DataError):
    """There is no file or object at a place."""


@dataclass(frozen=True)
class S3Options:
    """How objects in S3 are reached and kept nearby.

    Attributes:
        endpoint_url: Of an S3-compatible server; None for AWS, or what AWS_ENDPOINT_URL says.
        region: None for what the environment says.
        connect_timeout_seconds: Of one attempt.
        read_timeout_seconds: Of one attempt, without a byte arriving.
        attempts: Of one request, the first included.
        cache: Folder for blocks that were read; None for the user's cache folder.
        cache_bytes: What the folder may hold; 0 for no cache.
        block_bytes: What one request asks for at least.
    """

    endpoint_url: str | None = None
    region: str | None = None
    connect_timeout_seconds: float = 10
    read_timeout_seconds: float = 60
    attempts: int = 5
    cache: Path | None = None
    cache_bytes: int = 8_000_000_000
    block_bytes: int = 1 << 18


@dataclass(frozen=True)
class S3Path:
    """An object, or a folder of objects, with the part of `pathlib`'s manners that the room needs.

    Attributes:
        bucket: Its bucket.
        key: Without a leading or trailing slash; empty for the bucket itself.
        options: How to reach it. Not part of what makes two paths equal.
    """

    bucket: str
    key: str
    options: S3Options = field(default=S3Options(), compare=False, repr=False)

    @classmethod
    def parse(cls, text: str, options: S3Options | None = None) -> S3Path:
        """From `s3://bucket/key`.

        Raises:
            DataError: It has no bucket, or a part of the key is empty, `.` or `..`.
        """
        bucket, _, key = text.removeprefix(SCHEME).partition("/")
        key = key.rstrip("/")
        if not bucket or any(part in ("", ".", "..") for part in key.split("/") if key):
            raise DataError(
                "This is no address of an object.", found=text, expected="s3://BUCKET/KEY with no empty parts"
            )
        return cls(bucket, key, options or S3Options())

    def __truediv__(self, name: str) -> S3Path:
        return replace(self, key=f"{self.key}/{name}" if self.key else name)

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}"

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> S3Path:
        """The folder that it lies in."""
        return replace(self, key=self.key.rpartition("/")[0])

    def with_name(self, name: str) -> S3Path:
        """Beside this one, under another name."""
        return self.parent / name


Place = Path | S3Path


def place(value: str | os.PathLike[str] | S3Path, s3: S3Options | None = None) -> Place:
    """A local path or an object's, by its spelling.

    Args:
        value: A path, or `s3://bucket/key`.
        s3: How to reach objects.

    Raises:
        DataError: It is an address of a kind that is not known, or no address.
    """
    if isinstance(value, S3Path):
        return value if s3 is None else replace(value, options=s3)
    text = os.fspath(value)
    if not text or "\x00" in text:
        raise DataError("This is no path.", found=repr(text), expected="a local path, or s3://BUCKET/KEY")
    if text.startswith(SCHEME):
        return S3Path.parse(text, s3)
    scheme, found, _ = text.partition("://")
    if found and "/" not in scheme:
        raise DataError(
            "Data cannot be read from this kind of address.",
            found=text,
            expected="a local path, or s3://BUCKET/KEY",
            do="mount it, or copy it to one of these",
        )
    return Path(value)


def local_path(value: str | os.PathLike[str] | S3Path) -> Path:
    """A local path, where nothing else will do: `Path` would make a folder `s3:` of an object's address.

    Raises:
        DataError: It is an object's address, or no path.
    """
    found = place(value)
    if isinstance(found, S3Path):
        raise DataError(
            "This is done on local files only.",
            found=found,
            expected="a local path",
            do="copy from or to the bucket before or after",
        )
    return found


def inside(folder: Place, relative: str) -> Place:
    """A file in a folder, from the relative path with `/` that a manifest gives."""
    return folder / str(PurePosixPath(relative))
