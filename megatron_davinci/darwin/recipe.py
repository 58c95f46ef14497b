"""The recipe of a corpus: sources, steps, output. YAML in, typed and checked, every problem named at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from megatron_davinci.config.load import one_screen, problems_of, read_settings
from megatron_davinci.config.problems import Problem, Problems
from megatron_davinci.config.section import Section
from megatron_davinci.darwin.asking import StreamStep
from megatron_davinci.darwin.catalogue import STEPS
from megatron_davinci.darwin.step import Step
from megatron_davinci.errors import ConfigError

Format = Literal[
    "auto", "jsonl", "parquet", "arrow", "html", "text", "code", "pdf", "notebook", "latex", "thread", "warc"
]


class Dataset(Section):
    """A dataset of Hugging Face, as `datasets.load_dataset` finds it: on the hub, or in a local folder.

    Attributes:
        path: Its name on the hub, or a folder: one of data files, or one that `save_to_disk` wrote.
        name: Of the configuration, where it has several.
        split: One of its splits.
        revision: Of the repository on the hub; name one, so that the same data is read another day.
    """

    path: str = Field(min_length=1)
    name: str | None = None
    split: str = Field(default="train", pattern=r"^\w[\w.-]*$")
    revision: str | None = None


class SourceRecipe(Section):
    """Files that belong together.

    Attributes:
        name: Of the source: the corpus has a folder of that name.
        paths: Files or patterns (`text/**/*.html`, `**` for any folders).
        dataset: A dataset of Hugging Face, instead of paths.
        repositories: A file of JSON lines that names repositories in local folders (`path`), with what is known of
            them: `name`, `licence`, `stars`, or the fields of GitHub's answers. Paths are then patterns within each.
        exclude: Patterns of files to leave out.
        format: What they hold; `auto` goes by each file's ending. Compression (gzip, Zstandard) is seen by itself.
        licence: Of documents that do not name their own.
        text_field: Of a JSON line or a table.
        id_field: That names a document within the source; without it, its file and row do.
        licence_field: That holds its licence; of a list, the document is under all.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    paths: list[str] = Field(default=[])
    dataset: Dataset | None = None
    repositories: Path | None = None
    exclude: list[str] = Field(default=[])
    format: Format = "auto"
    licence: str | None = None
    text_field: str = "text"
    id_field: str | None = None
    licence_field: str | None = None

    @model_validator(mode="after")
    def _has_one_place(self) -> SourceRecipe:
        if bool(self.paths) == (self.dataset is not None):
            raise Problems([(("paths",), "a source has either `paths` or a `dataset`")])
        if self.dataset is not None and self.repositories is not None:
            raise Problems([(("repositories",), "repositories go with `paths`, not with a `dataset`")])
        return self


class Limits(Section):
    """What one document, file or task may take.

    Attributes:
        document_bytes: A document with more is quarantined, without being read into memory.
        task_bytes: About so many bytes of input are one task, which is what a resumed run repeats.
    """

    document_bytes: int = Field(default=32_000_000, gt=0)
    task_bytes: int = Field(default=64_000_000, gt=0)


class Output(Section):
    """How the corpus is written.

    Attributes:
        format: What `davinci data tokenize` takes: lines of JSON, plain or compressed, or Parquet.
        tokenizer: Folder of a tokenizer, to count tokens by; without one only characters are counted.
    """

    format: Literal["jsonl", "jsonl.zst", "parquet"] = "jsonl.zst"
    tokenizer: Path | None = None


class SlurmCluster(Section):
    """How tasks are submitted to Slurm, for `--executor slurm`. Nothing here changes the corpus.

    Attributes:
        partition: Of the cluster.
        time: Limit of a job of the array, as sbatch takes it.
        cpus: Cores for a task.
        memory_gb: For each of them.
        qos: Quality of service, where the cluster asks for one.
        tasks_per_job: Tasks that one job of the array does, one after another.
        max_array: Most jobs in an array; more make a second array.
        options: Of sbatch besides: `{account: NAME}`.
    """

    partition: str = Field(min_length=1)
    time: str = "04:00:00"
    cpus: int = Field(default=1, ge=1)
    memory_gb: int = Field(default=4, ge=1)
    qos: str | None = None
    tasks_per_job: int = Field(default=1, ge=1)
    max_array: int = Field(default=1000, ge=1)
    options: dict[str, str | int] = Field(default={})


class RayCluster(Section):
    """Where tasks run for `--executor ray`. Nothing here changes the corpus.

    Attributes:
        address: Of the cluster; without one, that of `RAY_ADDRESS`, else a cluster is started on this machine.
        cpus: Cores for a task.
        memory_gb: For each of them.
    """

    address: str | None = None
    cpus: int = Field(default=1, ge=1)
    memory_gb: float = Field(default=2.0, gt=0)


class Recipe(Section):
    """A corpus. Relative paths, all of them, count from the recipe's folder.

    Attributes:
        name: Of the corpus.
        out: The folder to make.
        sources: In order of preference: of duplicates, the first is kept.
        steps: Names of the catalogue's steps, or a mapping of a name to its parameters, in order.
        limits: What one document may take.
        output: How the corpus is written.
        slurm: What `--executor slurm` submits.
        ray: Where `--executor ray` runs.
    """

    name: str = Field(min_length=1)
    out: Path
    sources: list[SourceRecipe] = Field(min_length=1)
    steps: list[str | dict[str, Any]]
    limits: Limits = Limits()
    output: Output = Output()
    slurm: SlurmCluster | None = None
    ray: RayCluster = RayCluster()

    @field_validator("steps", mode="before")
    @classmethod
    def _steps_are_mappings_of_one(cls, value: Any) -> Any:
        for index, entry in enumerate(value if isinstance(value, list) else []):
            if isinstance(entry, dict) and len(entry) != 1:
                raise Problems([((index,), "should be a step's name, or `name: {parameters}`")])
        return value

    @model_validator(mode="after")
    def _steps_and_sources_fit(self) -> Recipe:
        problems = list(self._problems())
        if problems:
            raise Problems(problems)
        return self

    def _problems(self) -> Iterator[Problem]:
        names = [source.name for source in self.sources]
        for index, name in enumerate(names):
            if name in names[:index]:
                yield ("sources", index, "name"), f"{name!r} is another source's name too"
        readers: dict[str, set[str]] = {}
        for index, entry in enumerate(self.steps):
            name, given = _parts(entry)
            if name not in STEPS:
                yield ("steps", index), f"there is no step {name!r}" + _nearest(name, list(STEPS))
                continue
            kind = STEPS[name].Parameters
            try:
                parameters = kind.model_validate(given)
            except ValidationError as error:
                for said in problems_of(error, kind, {}):
                    place, _, what = said.partition(": ")
                    keys = tuple(place.split("."))
                    yield ("steps", index, name, *(keys if keys != ("the configuration",) else ())), what
                continue
            if name in ("extract_pdf", "ocr_pdf"):
                readers[name] = set(parameters.sources or names)
            for wanted in parameters.sources or []:
                if wanted not in names:
                    yield (
                        ("steps", index, name, "sources"),
                        f"there is no source {wanted!r}" + _nearest(wanted, names),
                    )

        # What one has made text of is no PDF any more, which the other would take it for.
        if len(readers) == 2 and (both := sorted(set.intersection(*readers.values()))):
            yield (
                ("steps",),
                f"extract_pdf and ocr_pdf both read {', '.join(both)}; name one, or set `sources`",
            )

    def make_steps(self, base: Path) -> list[Step]:
        """The steps, ready to be opened; new ones at every call.

        Args:
            base: The folder that relative paths in parameters count from.
        """
        made: list[Step] = []
        for entry in self.steps:
            name, given = _parts(entry)
            kind = STEPS[name]
            parameters = kind.Parameters.model_validate(given)
            paths = {
                key: [base / path for path in value] if isinstance(value, list) else base / value
                for key, value in parameters
                if isinstance(value, Path)
                or (isinstance(value, list) and value and isinstance(value[0], Path))
            }
            step = kind(parameters.model_copy(update=paths), base)
            if isinstance(step, StreamStep):
                step.which += sum(each.name == name and _meet(each, step) for each in made)
            made.append(step)
        return made


def _meet(one: Step, other: Step) -> bool:
    """Whether two steps look at documents of the same source."""
    theirs = one.parameters.sources, other.parameters.sources
    return None in theirs or not set(theirs[0] or ()).isdisjoint(theirs[1] or ())


def _parts(entry: str | dict[str, Any]) -> tuple[str, Any]:
    if isinstance(entry, str):
        return entry, {}
    [(name, given)] = entry.items()
    return str(name), {} if given is None else given


def _nearest(name: str, names: list[str]) -> str:
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]}?" if nearest else f"; there are {', '.join(names)}"


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and the file that it is from.

    Attributes:
        recipe: What it says.
        path: The file, from whose folder relative paths count.
    """

    recipe: Recipe
    path: Path

    @property
    def base(self) -> Path:
        """The folder that the recipe's relative paths count from."""
        return self.path.absolute().parent

    @property
    def out(self) -> Path:
        """The corpus's folder."""
        return self.base / self.recipe.out

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer's folder, if tokens are counted."""
        given = self.recipe.output.tokenizer
        return None if given is None else self.base / given


def load_recipe(path: Path) -> LoadedRecipe:
    """Read a recipe.

    Raises:
        ConfigError: The file cannot be read, or there is something wrong with it: every problem, each with its line.
    """
    settings, lines = read_settings(path, "name, out, sources, steps")
    try:
        return LoadedRecipe(Recipe.model_validate(settings), path)
    except ValidationError as error:
        problems = problems_of(error, Recipe, lines)
        raise ConfigError(
            "The recipe has a problem."
            if len(problems) == 1
            else f"The recipe has {len(problems)} problems.",
            where=path,
            found=one_screen(problems),
            do="mend what is named; `davinci data steps` lists every step with its parameters",
        ) from None
