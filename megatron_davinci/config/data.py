"""What is read: the tokenizer, the training sources, the held-out sources."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from megatron_davinci.config.section import Section


class SourceConfig(Section):
    """One training source: a folder with `manifest.json`, or a Megatron prefix (`x_text_document`)."""

    path: Path = Field(description="The folder, or the prefix without .bin")
    domain: str | None = Field(default=None, description="Reports group by it; default: the source's name")


class DataConfig(Section):
    """Sources by name. Paths are relative to the working directory."""

    tokenizer: Path | None = Field(default=None, description="Folder with tokenizer.json; export copies it")
    sequence_length: int = Field(gt=0, description="Tokens a sample; a window holds one more for the labels")
    sources: dict[str, SourceConfig] = Field(min_length=1)
    validation: dict[str, Path] = Field(default_factory=dict, description="Held-out source of each domain")
    verify_digests: bool = Field(default=False, description="Hash every shard at start (reads all of it)")

    def domain(self, source: str) -> str:
        """The domain that a source is reported under."""
        return self.sources[source].domain or source
