"""What a run takes of its sources: epochs by stage, from the curriculum that the trainer follows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from megatron_davinci.cli.data_inspect_answer import (
    Asked,
    SampleReader,
    counted,
    other_tokenizer,
    source_facts,
    tried,
)
from megatron_davinci.config import RunConfig, load_config
from megatron_davinci.data.census import Census
from megatron_davinci.data.curriculum import Curriculum, Location
from megatron_davinci.data.journal import Journal
from megatron_davinci.data.places import Place, S3Options, place
from megatron_davinci.data.source import Source
from megatron_davinci.data.tokenizer import Tokenizer
from megatron_davinci.data.transforms import SampleTransforms, as_seen, stage_transforms
from megatron_davinci.errors import DavinciError
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train.forecast import Forecast
from megatron_davinci.train.outlook import widened
from megatron_davinci.train.planned import Governing, governing_records, planned_records, pool_sizes
from megatron_davinci.train.run_directory import RunDirectory

Answer = dict[str, Any]
_T = TypeVar("_T")
MANY = (
    4  # epochs: up to here repeated text is nearly as good as new (Muennighoff et al. 2023, arXiv:2305.16264)
)


def inspect_run(path: str, overrides: Sequence[str], asked: Asked) -> tuple[Answer, list[DavinciError]]:
    """What the sources of a run hold, what the run takes of each, and what is wrong.

    A source that is damaged is left out of the numbers, and the others keep theirs: which samples are a source's
    does not depend on the other sources' sizes.

    Raises:
        ConfigError: The configuration is wrong, or the run has no such sample.
    """
    return _Run(load_config(path, overrides), asked).answer(path)


class _Run:
    def __init__(self, config: RunConfig, asked: Asked) -> None:
        self._config, self._asked = config, asked
        self._length = config.data.sequence_length
        self._options = S3Options(**{**dict(config.data.s3), "cache_bytes": 0})
        self._problems: list[DavinciError] = []
        self._notes: list[str] = []
        self._schedule = Schedule(config.curriculum, self._length)
        self._sources: dict[str, Source] = {}
        self._censuses: dict[str, Census] = {}
        self._tokenizer = self._tried(self._load_tokenizer)
        for name, source in config.data.sources.items():
            self._look_at(name, place(source.path, self._options))
        self._records = self._governing()
        # Sizes of sources that are not open decide nothing but where in them the run would be.
        windows = {
            name: self._sources[name].num_windows if name in self._sources else 1
            for name in config.data.sources
        }
        records = [governing.record for governing in self._records]
        self._curriculum = Curriculum(windows, config.run.seed, records)

    def answer(self, path: str) -> tuple[Answer, list[DavinciError]]:
        """All of it, and what is wrong."""
        stages = self._stages()
        sources = [self._source(name, stages) for name in self._by_domain()]
        validation = [self._held_out(domain) for domain in self._config.data.validation]
        self._compare(sources, validation)
        samples = self._samples()
        config, schedule = self._config, self._schedule
        return {
            "target": str(path),
            "kind": "run",
            "run": {
                "directory": str(config.run.directory),
                "seed": config.run.seed,
                "sequence_length": self._length,
                "steps": schedule.total_steps,
                "samples": schedule.total_samples,
                "tokens": schedule.total_samples * self._length,
                "journal_records": sum(record.number is not None for record in self._records),
            },
            "sources": sources,
            "validation": validation,
            "stages": stages,
            "samples": samples,
            "notes": self._notes,
            "problems": [str(problem) for problem in self._problems],
        }, self._problems

    # ---- what is there -----------------------------------------------------------------------------------

    def _look_at(self, name: str, where: Place) -> None:
        census = self._tried(lambda: counted(where, self._asked))
        if census is None:
            return
        self._censuses[name] = census
        self._problems += census.problems
        source = self._tried(
            lambda: Source.open(name, where, self._length, vocab_size=self._config.model.tokens)
        )
        if source is not None:
            self._sources[name] = source

    def _load_tokenizer(self) -> Tokenizer | None:
        path = self._config.data.tokenizer
        return None if path is None else Tokenizer.load(path)

    def _governing(self) -> tuple[Governing, ...]:
        """The journal's mixtures and the plan after them; the plan alone where the run's record does not serve."""
        config, path = self._config, RunDirectory(self._config.run.directory).journal
        pools = pool_sizes(config, self._sources)
        if len(self._sources) == len(config.data.sources):
            forecast = self._tried(lambda: Forecast.read(config))
            records = None if forecast is None else forecast.records
        else:
            records = self._tried(lambda: self._after(Journal.open(path, config.data.sources), pools))
        if records is None:
            self._notes.append("epochs and samples are those that the configuration plans, without a journal")
            return self._after(Journal.in_memory(), pools)
        return records

    def _after(self, journal: Journal, pools: Mapping[str, int]) -> tuple[Governing, ...]:
        """The journal's mixtures, and what the stages plan after them."""
        planned = planned_records(self._config, self._schedule, pools, journal.mixes)
        return governing_records(journal, planned)

    def _tried(self, action: Callable[[], _T]) -> _T | None:
        return tried(action, self._problems)

    # ---- what the run takes ------------------------------------------------------------------------------

    def _stages(self) -> list[Answer]:
        """The stages, each with the samples that it takes of every source."""
        total, end = self._schedule.total_samples, self._schedule.total_samples
        bounds = [self._schedule.stage_first_sample(stage) for stage in range(len(self._config.curriculum))]
        found: list[Answer] = []
        for stage in reversed(range(len(bounds))):
            first = bounds[stage]
            first = end if first is None else first
            before, after = (self._curriculum.consumed(n) for n in (first, end))
            steps = sum(segment.steps for segment in self._schedule.stage_segments(stage))
            found.append(
                {
                    "name": self._config.curriculum[stage].name,
                    "first_sample": first if first < total else None,
                    "steps": steps,
                    "samples": end - first,
                    "tokens": (end - first) * self._length,
                    "taken": {name: after[name] - before[name] for name in after},
                }
            )
            end = first
        return found[::-1]

    def _by_domain(self) -> list[str]:
        return sorted(self._config.data.sources, key=lambda name: (self._config.data.domain(name), name))

    def _source(self, name: str, stages: list[Answer]) -> Answer:
        taken = [stage["taken"][name] for stage in stages]
        windows = self._sources[name].num_windows if name in self._sources else None
        if not sum(taken):
            self._notes.append(f"{name} is never used: no stage mixes it")
        elif windows and sum(taken) > MANY * windows:
            self._notes.append(
                f"{name} is passed through {sum(taken) / windows:,.1f} times; past {MANY}, repetition adds little"
            )
        domain = self._config.data.domain(name)
        facts = {"name": name, "domain": domain, "place": str(self._config.data.sources[name].path)}
        if name in self._censuses:
            facts = source_facts(name, domain, self._censuses[name], self._length)
        return {
            **facts,
            "counted": name in self._censuses,
            "use": {
                "samples": taken,
                "total_samples": sum(taken),
                "epochs": None if windows is None else [count / windows for count in taken],
                "total_epochs": None if windows is None else sum(taken) / windows,
            },
        }

    def _held_out(self, domain: str) -> Answer:
        where = place(self._config.data.validation[domain], self._options)
        facts = {"name": domain, "domain": domain, "place": str(where)}
        census = self._tried(lambda: counted(where, self._asked))
        if census is None:
            return {**facts, "counted": False}
        self._problems += census.problems
        opened = self._tried(
            lambda: Source.open(domain, where, self._length, vocab_size=self._config.model.tokens)
        )
        for name, source in self._sources.items():
            if (
                opened is not None
                and source.fingerprint == opened.fingerprint
                and census.manifest is not None
            ):
                self._notes.append(f"the held-out source of {domain} is the training source {name}")
        return {**source_facts(domain, domain, census, self._length), "counted": True}

    def _compare(self, sources: list[Answer], validation: list[Answer]) -> None:
        """Note what the sources do not agree on."""
        for key, what in (("tokenizer_sha256", "were made with several tokenizers"),
                          ("eod_id", "end their documents with several tokens")):  # fmt: skip
            names: dict[Any, list[str]] = defaultdict(list)
            for one in sources:
                names[one.get(key)].append(one["name"])
            for one in validation:
                names[one.get(key)].append(f"{one['name']} (held out)")
            names.pop(None, None)
            if len(names) > 1:
                groups = [f"{', '.join(group)}: {str(value)[:16]}" for value, group in names.items()]
                self._notes.append(f"the sources {what}; {'; '.join(groups)}")
        if self._tokenizer is not None:
            made_by = {one["name"]: one.get("tokenizer_sha256") for one in sources}
            self._notes += other_tokenizer(self._tokenizer, made_by, "data.tokenizer")

    # ---- samples -----------------------------------------------------------------------------------------

    def _samples(self) -> list[Answer]:
        if not self._asked.samples:
            return []
        reader, config = SampleReader(self._sources, self._tokenizer, self._asked), self._config
        transforms: dict[str, SampleTransforms | None] | None = None
        if len(self._sources) == len(config.data.sources):
            wide = widened(config, [governing.record for governing in self._records])
            made = self._tried(lambda: stage_transforms(wide, self._sources))
            if made is not None:
                names = (stage.name for stage in config.curriculum)
                transforms = dict(zip(names, made, strict=True))
        found = []
        for n in self._asked.numbers(self._schedule.total_samples, "sample"):
            located = self._curriculum.locate(n)
            facts: Answer = {"n": n, "stage": located.stage, "epoch": located.epoch, "source": located.source}
            read = None
            if located.source in self._sources:
                eod_id = self._sources[located.source].eod_id
                change = None if transforms is None else partial(self._changed, n, located, transforms)
                read = self._tried(partial(reader.sample, located.source, located.window, eod_id, change))
            found.append({**facts, **(read or {"spans": None})})
        if transforms is None:
            self._notes.append("samples are shown as the sources have them, before the stages' transforms")
        if self._tokenizer is None:
            self._notes.append("data.tokenizer is not set: tokens are shown by their ids")
        return found

    def _changed(
        self,
        n: int,
        located: Location,
        transforms: dict[str, SampleTransforms | None],
        tokens: np.ndarray,
        weights: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """A sample as the model sees it; see `Change`."""
        (stage,) = (stage for stage in self._config.curriculum if stage.name == located.stage)
        transform, source = transforms[located.stage], located.source
        eod_id = self._sources[source].eod_id
        seen = as_seen(n, source, located.window, tokens, weights[1:], transform, stage.transforms, eod_id)
        # The first position is read and not predicted, whatever stands there.
        first = weights[:1] if transform is None else np.zeros(1, np.uint8)
        return seen.tokens[: len(tokens)], np.concatenate([first, seen.labels]), seen.applied
