"""Which tasks `davinci eval` runs: by name, or those of a suite."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_davinci.data.jsonl import Fields
from megatron_davinci.data.places import S3Options
from megatron_davinci.data.text_inputs import read_documents
from megatron_davinci.data.tokenizer import Tokenizer
from megatron_davinci.errors import ConfigError, DataError
from megatron_davinci.files import write_atomically

if TYPE_CHECKING:
    from megatron_davinci.cli.convert_to_hf import Found
    from megatron_davinci.evaluate.suites import Entry

SUITES = ("local", "davinci19", "knowledge", "contamination")


@dataclass(frozen=True)
class Planned:
    """A task that is to be run.

    Attributes:
        label: What it is called.
        load: Loads it, as `TaskManager.load` gives it.
        shots: Examples before each item; None for what it says itself.
        problem: Why it is not run; None where it is.
        help: What to do where its data is not there.
        entry: Of which suite's list it is; None for none.
        texts: Whether it counts the bits of texts.
    """

    label: str
    load: Callable[[], Mapping[str, Any]]
    shots: int | None = None
    problem: str | None = None
    help: str | None = None
    entry: Entry | None = None
    texts: bool = False


def task_names(words: str) -> list[str]:
    """The names in `--tasks`, each once.

    Raises:
        ConfigError: There is none.
    """
    names = list(dict.fromkeys(name.strip() for name in words.split(",") if name.strip()))
    if not names:
        raise ConfigError(
            "No task is named.", where="--tasks", found=repr(words), expected="names with commas between"
        )
    return names


def given_in(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was said beside suite, tasks and limit: whoever did not say it has not measured this."""
    said = {
        "overrides": list(arguments.overrides),
        "shots": arguments.shots,
        "texts": list(arguments.texts),
        "include_path": [str(path.resolve()) for path in arguments.include_path],
        "tokenizer": None if arguments.tokenizer is None else str(arguments.tokenizer.resolve()),
        "data": None if arguments.data is None else str(arguments.data.resolve()),
        "knowledge": None if arguments.knowledge is None else str(arguments.knowledge.resolve()),
        "samples": arguments.samples,
    }
    return {name: value for name, value in said.items() if value not in (None, [])}


def by_name(
    names: Sequence[str],
    include: Sequence[Path],
    data: Path | None,
    shots: int | None,
    *,
    both_ways: bool = False,
) -> list[Planned]:
    """Tasks of lm-eval, or of a user's folders; each by generation too, if asked."""
    from megatron_davinci.evaluate.code_tasks import CODE_TASKS, load_code_task
    from megatron_davinci.evaluate.naming import generated
    from megatron_davinci.evaluate.tasks import Tasks

    tasks = Tasks(include)
    _check(data)
    planned = []
    for name in names:
        if name in CODE_TASKS:
            load: Callable[[], Mapping[str, Any]] = partial(load_code_task, name)
            planned.append(Planned(name, partial(_with, data, load), shots, problem=_no_sandbox()))
            continue
        load = partial(tasks.manager(name).load, [name])
        planned.append(Planned(name, partial(_with, data, load), shots))
        if both_ways:
            planned.append(Planned(generated(name), partial(_with, data, partial(_turned, load)), shots))
    return planned


def _no_sandbox() -> str | None:
    """Why code that a model wrote cannot be run here; None where it can."""
    from megatron_davinci.platform.sandbox import NoSandbox, strongest_way

    try:
        strongest_way()
    except NoSandbox as error:
        reasons = str(error.found).replace("\n", "; ")
        return f"it runs code that a model wrote, and nothing here keeps that in: {reasons}"
    return None


def _turned(load: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    from megatron_davinci.evaluate.both_ways import as_generation, has_options

    loaded = load()
    if not has_options(loaded):
        raise ConfigError("It has no options, so there is no other way to ask it.")
    return as_generation(loaded)


def in_formats(planned: Sequence[Planned]) -> list[Planned]:
    """What is planned, and before each task by likelihood the same in every other format.

    The task itself comes last, so that its record says that all of it is there. Tasks that are asked by generation
    already, and those that count the bits of texts, are left as they are.
    """
    from megatron_davinci.evaluate.formats import FORMATS, in_format
    from megatron_davinci.evaluate.naming import GENERATION, formatted

    found = []
    for one in planned:
        written = one.label.endswith(f"_{GENERATION}")
        written = written or (one.entry is not None and one.entry.protocol == GENERATION)
        if one.problem is None and not written and not one.texts:
            for form in FORMATS:
                load = partial(lambda load, form: in_format(load(), form), one.load, form)
                found.append(replace(one, label=formatted(one.label, form.name), load=load, entry=None))
        found.append(one)
    return found


def local(
    found: Found, tokenizer: Tokenizer, given: Sequence[str], folder: Path, items: int | None
) -> list[Planned]:
    """The suite of items made from held-out texts; its files are written to `folder`.

    Args:
        found: The checkpoint, whose run says where held-out sources are.
        tokenizer: The model's.
        given: `NAME=FILE` of texts to take instead, JSON lines or Parquet.
        folder: Where items are written.
        items: Of each kind and domain, at most; None for the suite's own number.
    """
    from lm_eval.tasks import TaskManager

    from megatron_davinci.evaluate.local import ITEMS, local_tasks

    texts = texts_for(found, tokenizer, given, items)
    manager = TaskManager(include_defaults=False)
    tasks = []
    for task in local_tasks(texts, items or ITEMS):
        files = {"items": task.items, "examples": task.examples}
        paths = {name: folder / f"{task.name}.{name}.jsonl" for name in files}
        for name, rows in files.items():
            write_atomically(paths[name], "".join(json.dumps(row) + "\n" for row in rows))
        settings = task.configuration(str(paths["items"]), str(paths["examples"]))
        load = partial(manager.load, [settings])
        tasks.append(Planned(task.name, load, texts=task.protocol == "text"))
    return tasks


def davinci19(data: Path | None) -> list[Planned]:
    """The report's benchmarks, in its order.

    Args:
        data: Folder with data sets in folders of their names on the hub (`data/cais/mmlu`); None for none.
    """
    from megatron_davinci.evaluate.suites import DAVINCI19, how_to_get

    _check(data)
    return [
        Planned(
            entry.name,
            partial(_load, entry, data),
            entry.shots,
            problem=_no_sandbox() if entry.code else None,
            help=how_to_get(entry),
            entry=entry,
        )
        for entry in DAVINCI19
    ]


def _check(data: Path | None) -> None:
    if data is not None and not data.is_dir():
        raise ConfigError("The folder of data sets is not there.", where=data, do="check --data")


def _with(data: Path | None, load: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    with _from_folder(data):
        return load()


def _load(entry: Entry, data: Path | None) -> Mapping[str, Any]:
    import lm_eval.tasks

    import megatron_davinci.evaluate
    from megatron_davinci.evaluate.both_ways import as_generation
    from megatron_davinci.evaluate.code_tasks import load_code_task

    if entry.code:
        return _with(data, partial(load_code_task, entry.task))
    theirs, ours = (Path(of.__file__ or "").parent for of in (lm_eval.tasks, megatron_davinci.evaluate))
    folders = [str((ours if name == "davinci19" else theirs) / name) for name in entry.folders]
    manager = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)
    load = partial(manager.load, [entry.task])
    # A task that is turned is built, and loads its data, once more.
    return _with(data, (lambda: as_generation(load())) if entry.turned else load)


@contextmanager
def _from_folder(data: Path | None) -> Iterator[None]:
    """Have data sets loaded from a folder where it has them, whatever asks for them."""
    import datasets

    load = datasets.load_dataset

    def from_folder(path: str, *arguments: Any, **named: Any) -> Any:
        here = data / path if data is not None else None
        if here is None or not here.is_dir():
            return load(path, *arguments, **named)
        name = named.get("name")
        if name is not None and not (here / "README.md").exists():
            # Files by themselves: nothing says what its parts are called but folders.
            here = here / name if (here / name).is_dir() else here
            named = {key: value for key, value in named.items() if key != "name"}
        return load(str(here), *arguments, **named)

    datasets.load_dataset = from_folder
    try:
        yield
    finally:
        datasets.load_dataset = load


def given_texts(given: Sequence[str], most: int) -> dict[str, list[str]]:
    """Texts of files, by `NAME=FILE`.

    Raises:
        ConfigError: One is not of that form, or a name is given twice.
        DataError: A file cannot be read, has a record without text, or none at all.
    """
    texts = {}
    for one in given:
        name, _, file = one.partition("=")
        if not name or not file:
            raise ConfigError("Texts are given as NAME=FILE.", where="--texts", found=one)
        if name in texts:
            raise ConfigError(
                "A name is given to two files.", where="--texts", found=one, do="give another name"
            )
        texts[name] = [document.text for document in islice(read_documents(Path(file), Fields("text")), most)]
        if not texts[name]:
            raise DataError("A file has no texts.", where=file, found="no record", expected="one at least")
    return texts


def texts_for(
    found: Found, tokenizer: Tokenizer, given: Sequence[str], items: int | None
) -> dict[str, list[str]]:
    """The texts that items are made of, by domain: more than items, since not every text is good for every kind."""
    from megatron_davinci.evaluate.local import ITEMS
    from megatron_davinci.evaluate.texts import held_out_texts

    most = 4 * (items or ITEMS)
    if given:
        return given_texts(given, most)
    config = found.config
    if config is None or not config.data.validation:
        raise ConfigError(
            "There are no held-out texts to make items of.",
            where="--suite local",
            found="a checkpoint by itself"
            if config is None
            else "no data.validation in the run's configuration",
            do="give texts: --texts NAME=FILE.jsonl",
        )
    s3 = S3Options(**dict(config.data.s3))
    return held_out_texts(config.data.validation, s3, tokenizer, config.data.sequence_length, most)
