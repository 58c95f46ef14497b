"""What is read: the tokenizer, the training sources, the held-out sources."""

from __future__ import annotations

from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from megatron_davinci.config.section import LocalPath, Section, shown
from megatron_davinci.config.units import Tokens


def _s3_or_local(value: Any) -> Any:
    if isinstance(value, Path):
        return value
    if not isinstance(value, str):
        raise ValueError(f"should be a path or s3://BUCKET/KEY; found {shown(value)}")
    if "@" in value.partition("://")[2].partition("/")[0]:
        raise ValueError(
            "should be s3://BUCKET/KEY without credentials, which are the environment's; found an @"
        )
    # A Path would make `s3:/bucket` of `s3://bucket`.
    return value if "://" in value else Path(expanduser(value))


Location = Annotated[Path | str, BeforeValidator(_s3_or_local)]
"""A local path, or `s3://bucket/key`."""


class SourceConfig(Section):
    """One training source: a folder with `manifest.json`, or a Megatron prefix (`x_text_document`)."""

    path: Location = Field(description="The folder, or the prefix without .bin; local or s3://BUCKET/KEY")
    domain: str | None = Field(
        default=None,
        description="Reports group by it, and mixtures may name it; default: the source's name",
    )
    tokens: Tokens | None = Field(
        default=None, gt=0, description="Its size, to plan with before it is there; then its manifest's holds"
    )
    metadata: str | None = Field(
        default=None,
        min_length=1,
        description="What its documents begin with in stages with `metadata_prefix`: `URL: en.wikipedia.org`",
    )


class LoaderConfig(Section):
    """How windows get from storage to the step. Nothing here changes which sample is which."""

    kind: Literal["native", "dali"] = Field(default="native", description="dali: NVIDIA DALI, an extra")
    workers: int = Field(default=0, ge=0, le=64, description="Processes that read; 0: threads of the trainer")
    read_threads: int = Field(default=2, gt=0, le=256, description="Threads that read, with workers: in each")
    prefetch_steps: int = Field(default=2, gt=0, le=64, description="Global batches that are read ahead")


class S3Config(Section):
    """How sources with an `s3://` path are reached. Credentials are the environment's, never the config's."""

    endpoint_url: str | None = Field(default=None, description="Of an S3-compatible server; default: AWS")
    region: str | None = Field(default=None, description="Default: the environment's")
    connect_timeout_seconds: float = Field(default=10, gt=0)
    read_timeout_seconds: float = Field(default=60, gt=0, description="Without a byte arriving")
    attempts: int = Field(default=5, gt=0, description="Of one request, the first included")
    cache: LocalPath | None = Field(
        default=None, description="Folder for blocks; default: the user's cache folder"
    )
    cache_bytes: int = Field(default=8_000_000_000, ge=0, description="What the folder may hold; 0: no cache")
    block_bytes: int = Field(default=262_144, ge=4096, description="What one request asks for at least")

    @field_validator("endpoint_url")
    @classmethod
    def _no_credentials(cls, url: str | None) -> str | None:
        # It goes into the run's record. The message must not repeat what it found.
        if url is not None and ("@" in url or not url.startswith(("http://", "https://"))):
            raise ValueError(
                "should be http://HOST or https://HOST without a user name and password, which are the "
                "environment's (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY); found something else"
            )
        return url


class DataConfig(Section):
    """Sources by name. Paths are relative to the working directory; `~` is the user's folder."""

    tokenizer: LocalPath | None = Field(
        default=None, description="Folder with tokenizer.json; export copies it"
    )
    sequence_length: int = Field(gt=0, description="Tokens a sample; a window holds one more for the labels")
    sources: dict[str, SourceConfig] = Field(min_length=1)
    validation: dict[str, Location] = Field(
        default_factory=dict, description="Held-out source of each domain"
    )
    loader: LoaderConfig = LoaderConfig()
    s3: S3Config = S3Config()
    verify_digests: bool = Field(default=False, description="Hash every shard at start (reads all of it)")

    def domain(self, source: str) -> str:
        """The domain that a source is reported under."""
        return self.sources[source].domain or source
