"""A recipe as passes over the documents: a step that needs all of them ends one, and its verdicts begin the next."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_davinci.darwin.exact import UniqueIds
from megatron_davinci.darwin.inventory import InputFile, deal, take_inventory
from megatron_davinci.darwin.pipeline import (
    acquire_hash,
    acquire_settings,
    missing_extractor,
    token_counter,
)
from megatron_davinci.darwin.recipe import LoadedRecipe, Recipe
from megatron_davinci.darwin.step import GlobalStep, Step
from megatron_davinci.errors import ConfigError, DataError
from megatron_davinci.files import disk_errors, write_json

FORMAT = 1


@dataclass
class Pass:
    """One pass.

    Attributes:
        before: The global step whose verdicts it begins with; None for the first pass.
        steps: What it applies.
        after: The global step that it sketches for; None for the last pass.
    """

    before: GlobalStep | None
    steps: list[Step]
    after: GlobalStep | None


@dataclass
class Plan:
    """What will be done, the same at every start.

    Attributes:
        recipe: The recipe.
        out: The corpus's folder.
        tokenizer: That tokens are counted by; None where they are not.
        steps: All steps in order, the check of identifiers included where a source gives them.
        files: The input.
        deal: Where each task begins in `files`, and the end.
    """

    recipe: Recipe
    out: Path
    tokenizer: Path | None
    steps: list[Step]
    files: list[InputFile]
    deal: list[int]

    @property
    def tasks(self) -> int:
        """Tasks of every pass."""
        return len(self.deal) - 1

    @property
    def work(self) -> Path:
        """Where passes lie until the corpus is done."""
        return self.out / "work"

    def passes(self) -> list[Pass]:
        """The passes."""
        passes = [Pass(None, [], None)]
        for step in self.steps:
            if isinstance(step, GlobalStep):
                passes[-1].after = step
                passes.append(Pass(step, [], None))
            else:
                passes[-1].steps.append(step)
        return passes

    def operations(self) -> list[dict[str, Any]]:
        """Every operation with all its parameters, by the hash that documents name it with."""
        limit = self.recipe.limits.document_bytes
        found = [
            {
                "name": "acquire",
                "level": 0,
                "parameters": acquire_hash(source, limit),
                "settings": acquire_settings(source, limit),
            }
            for source in self.recipe.sources
        ]
        found += [
            {
                "name": step.name,
                "level": step.level,
                "version": step.version,
                "parameters": step.hash,
                "settings": step.settings,
                "sources": step.parameters.sources,
                **({"model": step.model} if step.model else {}),
                **({"whereabouts": step.whereabouts()} if step.whereabouts() else {}),
            }
            for step in self.steps
        ]
        return found


def make_plan(loaded: LoadedRecipe, restart: bool = False) -> Plan:
    """The plan of a recipe; of one that has been begun, the plan it was begun with.

    Args:
        loaded: The recipe.
        restart: Do away with what another run has left in the corpus's folder.

    Raises:
        ConfigError: Another recipe was begun in the folder, or a source names no file; what was there still is.
        DataError: The folder is something else, or an input file has changed since.
    """
    recipe, out = loaded.recipe, loaded.out
    mark = out / "plan.json"
    if out.exists() and not mark.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(
            "The corpus's folder holds something else.",
            where=out,
            found=", ".join(sorted(path.name for path in out.iterdir())[:5]) if out.is_dir() else "a file",
            expected="an empty folder, none, or a corpus that was begun",
            do="name another folder as `out`",
        )
    steps = recipe.make_steps(loaded.base)
    for step in steps:
        step.check()
    if any(source.id_field for source in recipe.sources):
        steps.insert(0, UniqueIds(UniqueIds.Parameters()))
    saying = {
        "format": FORMAT,
        "sources": [source.model_dump(mode="json") for source in recipe.sources],
        "steps": [[step.name, step.hash, step.parameters.sources] for step in steps],
        "limits": recipe.limits.model_dump(mode="json"),
        "output": recipe.output.model_dump(mode="json"),
    }
    finished = (out / "corpus.json").exists() and not restart
    if not finished:
        token_counter(loaded.tokenizer)  # what does not open is said now, not by the last pass
    if mark.exists() and not restart:
        begun = json.loads(mark.read_text())
        _compare(begun["saying"], saying, mark)
        files = [InputFile(*file) for file in begun["files"]]
        if not finished:
            _check_files(files, mark)
        return Plan(recipe, out, loaded.tokenizer, steps, files, begun["deal"])
    files = take_inventory(loaded)
    _check_formats(files, steps, loaded.path)
    dealt = deal(files, recipe.limits.task_bytes)
    if mark.exists():
        _do_away(out)
    write_json(mark, {"saying": saying, "deal": dealt, "files": files})
    return Plan(recipe, out, loaded.tokenizer, steps, files, dealt)


def _do_away(out: Path) -> None:
    """Remove a corpus; the mark that it is one of ours goes last, and that it is whole first."""
    with disk_errors(out, "doing away with a corpus"):
        (out / "corpus.json").unlink(missing_ok=True)
        for name in ("work", "documents", "dropped", "quarantine"):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in (
            "statistics.json",
            "seconds.json",
            "requests.json",
            "recipe.yaml",
            "report.html",
            "plan.json",
        ):
            (out / name).unlink(missing_ok=True)


def _check_formats(files: list[InputFile], steps: list[Step], recipe: Path) -> None:
    for file in files:
        if wanted := missing_extractor(file.format, file.source, steps):
            raise ConfigError(
                f"Files of the source {file.source!r} are no text, and no step makes text of them.",
                where=f"{recipe}: steps",
                found=f"{file.path}, read as {file.format}",
                expected=f"a step {wanted}",
                do=f"add {wanted}, or leave the files out by `exclude`; `format: text` reads them as they are",
            )


def _compare(begun: dict[str, Any], now: dict[str, Any], mark: Path) -> None:
    differ = [key for key in now if begun.get(key) != now[key]]
    if differ:
        raise ConfigError(
            "Another recipe was begun in this folder.",
            where=mark,
            found="other " + ", ".join(differ),
            expected="the recipe that it was begun with",
            do="name another folder as `out`, or begin anew with --restart",
        )


def _check_files(files: list[InputFile], mark: Path) -> None:
    changed = [file.path for file in files if not file.is_as_it_was()]
    if changed:
        raise DataError(
            "Input files have changed since the run was begun.",
            where=mark,
            found="\n".join(changed[:5]) + (f"\nand {len(changed) - 5} more" if len(changed) > 5 else ""),
            expected="the same files, of the same sizes, not written since",
            do="put them back, or begin anew with --restart",
        )
