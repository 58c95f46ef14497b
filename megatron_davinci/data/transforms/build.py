"""From the configuration to the transforms of each stage. The one place that knows all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_davinci.config import RunConfig
from megatron_davinci.config.curriculum import Stage
from megatron_davinci.config.source_weights import mixed_sources
from megatron_davinci.config.transform_checks import filled_sources, metadata_of
from megatron_davinci.data.document_ends import check_first_document
from megatron_davinci.data.source import Source
from megatron_davinci.data.transforms.fill_in_the_middle import FillInTheMiddle, Sentinels
from megatron_davinci.data.transforms.metadata_prefix import MetadataPrefix
from megatron_davinci.data.transforms.pipeline import SampleTransforms
from megatron_davinci.data.transforms.prompt_weight import PromptWeight
from megatron_davinci.data.transforms.sample import SampleTransform
from megatron_davinci.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_davinci.data.tokenizer import Tokenizer


def stage_transforms(config: RunConfig, sources: Mapping[str, Source]) -> list[SampleTransforms | None]:
    """What each stage does to its samples; None where they go to the model as they are read.

    Text is made tokens here, once. The order is fixed: prompt weights, which tell a prompt from what is added later;
    fill-in-the-middle, which rearranges documents; their metadata, which stays before them; then what runs past the
    end is cut.

    Args:
        config: The run configuration.
        sources: The training sources, open.

    Raises:
        ConfigError: A token is not in the vocabulary, or is one that it cannot be; or prompts have a weight, and no
            source has a mask.
        DataError: A source does not say what token ends a document, or its first document ends with another; or the
            tokenizer is damaged.
        EnvironmentProblem: A source cannot be read.
    """
    builder = _Builder(config, sources)
    return [builder.stage(number, stage) for number, stage in enumerate(config.curriculum)]


class _Builder:
    def __init__(self, config: RunConfig, sources: Mapping[str, Source]) -> None:
        self._config, self._sources = config, sources
        self._loaded: Tokenizer | None = None

    def stage(self, number: int, stage: Stage) -> SampleTransforms | None:
        where = f"curriculum.{number}.transforms"
        found: list[SampleTransform] = []
        prompt, full = stage.transforms.label_weights
        if prompt:
            self._need_masks(f"{where}.prompt_loss_weight", stage)
            found.append(PromptWeight(prompt, full))
        if stage.transforms.fill_in_the_middle is not None:
            found.append(self._filling(f"{where}.fill_in_the_middle", stage))
        if stage.transforms.metadata_prefix is not None:
            found.append(self._prefix(f"{where}.metadata_prefix", stage))
        return SampleTransforms(found) if found else None

    def _need_masks(self, where: str, stage: Stage) -> None:
        names = mixed_sources(stage, self._config.data)
        if not any(self._sources[name].has_mask for name in names):
            raise ConfigError(
                "Prompts have a weight, and nothing says what a prompt is.",
                where=where,
                found=f"no mask in {', '.join(names)}",
                expected="a source of the stage with a mask, which leaves prompts out",
                do="tokenise questions and answers with their fields, or leave out prompt_loss_weight",
            )

    def _filling(self, where: str, stage: Stage) -> FillInTheMiddle:
        settings = stage.transforms.fill_in_the_middle
        assert settings is not None
        ends = self._ends(where, filled_sources(stage, self._config.data))
        ids = [
            self._id(f"{where}.{name}", getattr(settings, name))
            for name in ("prefix_token", "suffix_token", "middle_token")
        ]
        taken = {end: f"the end of a document of {name}" for name, end in ends.items()}
        for name, token in zip(("prefix_token", "suffix_token", "middle_token"), ids, strict=True):
            if token in taken:
                raise ConfigError(
                    "A token cannot mean two things.",
                    where=f"{where}.{name}",
                    found=f"{token}, which is {taken[token]}",
                    expected="a token of its own",
                )
            taken[token] = name
        return FillInTheMiddle(
            ends, Sentinels(*ids), settings.rate, settings.spm_fraction, self._config.run.seed
        )

    def _prefix(self, where: str, stage: Stage) -> MetadataPrefix:
        settings = stage.transforms.metadata_prefix
        assert settings is not None
        texts = metadata_of(stage, self._config.data)
        prefixes = {name: self._tokens(f"data.sources.{name}.metadata", text) for name, text in texts.items()}
        ends = self._ends(where, list(texts))
        begins = DocumentBegins(self._sources, ends)
        return MetadataPrefix(prefixes, ends, settings.fraction, self._config.run.seed, begins)

    def _ends(self, where: str, names: list[str]) -> dict[str, int]:
        """What ends the documents of sources, which do end with it."""
        ends: dict[str, int] = {}
        for name in names:
            end = self._sources[name].eod_id
            if end is None:
                raise DataError(
                    "A transform needs to know which token ends a document, and a source does not say.",
                    where=where,
                    found=f"no eod_id in the manifest of {name}, or no manifest",
                    do="write the manifest with `davinci data manifest --eod-id ID`, or take the source out of it",
                )
            check_first_document(self._sources[name], end, where)
            ends[name] = end
        return ends

    def _tokens(self, where: str, text: str) -> np.ndarray:
        """The ids of a text."""
        ids = self._tokenizer.encode_batch([text])[0]
        length, size = self._config.data.sequence_length, self._config.model.tokens
        if not 0 < len(ids) < length:
            raise ConfigError(
                "Metadata has to leave room for a document.",
                where=where,
                found=f"{len(ids):,} tokens",
                expected=f"1 to {length - 1:,}: data.sequence_length is {length:,}",
            )
        if int(ids.max()) >= size:
            raise ConfigError(
                "A token is not in the model's vocabulary.",
                where=where,
                found=f"id {int(ids.max())} from the tokenizer",
                expected=f"0 to {size - 1:,}",
                do=f"set model.vocab_size to {self._tokenizer.vocab_size:,} or more, or take the sources' tokenizer",
            )
        return ids

    def _id(self, where: str, token: str | int) -> int:
        """The id of a token that no text can contain."""
        if isinstance(token, int):
            return token  # the configuration was checked against the vocabulary
        found = self._tokenizer.id_of(token)
        size = self._config.model.tokens
        if found is None or found >= size:
            raise ConfigError(
                "A token is not in the vocabulary.",
                where=where,
                found=f"{token!r}" + ("" if found is None else f", id {found}"),
                expected=f"a token of {self._config.data.tokenizer}, of an id below {size:,}",
                do="check the spelling, or give the id of a token that the vocabulary leaves unused",
            )
        if found in self._tokenizer.encode_batch([token])[0]:
            raise ConfigError(
                "A token is a piece of ordinary text to the tokenizer.",
                where=where,
                found=f"{token!r}, id {found}",
                expected="a special token, which no text can contain",
            )
        return found

    @property
    def _tokenizer(self) -> Tokenizer:
        if self._loaded is None:
            # Here, since nothing else of a start needs the tokenizers library.
            from megatron_davinci.data.tokenizer import Tokenizer

            path = self._config.data.tokenizer
            assert path is not None  # the configuration was checked
            self._loaded = Tokenizer.load(Path(path))
        return self._loaded


class DocumentBegins:
    """Whether the first token of a window begins a document: the token before it ends one, or there is none.

    Args:
        sources: Open.
        eod_ids: The token that ends a document, by source.
    """

    def __init__(self, sources: Mapping[str, Source], eod_ids: Mapping[str, int]) -> None:
        self._sources, self._eod_ids = sources, eod_ids

    def __call__(self, source: str, window: int) -> bool:
        """Reads one token.

        Raises:
            DataError: The shard is damaged.
            EnvironmentProblem: The shard cannot be read.
        """
        opened = self._sources[source]
        shard, first = opened.locate(window)
        if first == 0:
            return True
        before = np.empty(1, opened.dtype)
        opened.blob(shard).read_into((first - 1) * opened.dtype.itemsize, before.data.cast("B"))
        return int(before[0]) == self._eod_ids[source]
