"""A new run directory that goes another way from a checkpoint of another run."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from megatron_davinci.config import RunConfig, dump_config
from megatron_davinci.data.journal import Journal, MixRecord
from megatron_davinci.errors import CheckpointError, ConfigError
from megatron_davinci.files import (
    disk_errors,
    fsync_folder,
    make_private_folder,
    write_atomically,
    write_json,
)
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train import checkpoint_files
from megatron_davinci.train.checkpoint_files import Checkpoint
from megatron_davinci.train.edits import EditFile
from megatron_davinci.train.past import Past
from megatron_davinci.train.planned import CONFIGURATION, open_sources, pool_sizes
from megatron_davinci.train.run_directory import RunDirectory

_FACTS = ("seed", "sequence_length", "data_fingerprints", "windows", "pools", "model")


def branch(config: RunConfig, origin: str) -> str | None:
    """Make `run.directory` a run that has come as far as a checkpoint of another run, and shares that past.

    The past is the other run's journal, metrics and evaluations up to the checkpoint. The checkpoint's files are
    linked, or copied to another file system. What `config` changes has to lie ahead of it.

    Args:
        config: Of the new run.
        origin: The other run's directory, `RUN` for its newest checkpoint or `RUN@STEP`.

    Returns:
        A line that says what was done; None where it was done before, and the run goes on.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged.
        ConfigError: `run.directory` holds another run.
        DataError: The configuration would rewrite the past.
        EnvironmentProblem: A file could not be written. Nothing is left of it.
    """
    run, step = _parsed(origin)
    # Where it is a link to an empty folder, or `.`, that is what the branch is put in the place of.
    target = config.run.directory.resolve()
    if _is_done(target, run, step):
        return None
    found = _checkpoint(run, step)
    temporary = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    with disk_errors(target, "making a branch of a run"):
        try:
            make_private_folder(temporary)
            _fill(RunDirectory(temporary), RunDirectory(run), found)
            _check(RunDirectory(temporary), config)
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_folder(target.parent)
    return f"Branched from {run} at step {found.step:,} ({found.consumed_samples:,} samples)."


def _parsed(origin: str) -> tuple[Path, int | None]:
    run, at, step = origin.rpartition("@")
    if at and step.isdecimal():
        return Path(run), int(step)
    return Path(origin), None


def _is_done(target: Path, run: Path, step: int | None) -> bool:
    """Whether the target is this branch already: the same command, started again, goes on."""
    try:
        said = json.loads((target / "manifest.json").read_bytes()).get("branched_from")
    except (OSError, ValueError, AttributeError):
        said = None
    if said is not None and said.get("run") == str(run.resolve()) and step in (None, said.get("step")):
        return True
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(
            "A branch needs a run directory of its own.",
            where="run.directory",
            found=f"{target}, which is {'not empty' if target.is_dir() else 'a file'}"
            + ("" if said is None else f": a branch of {said.get('run')} at step {said.get('step')}"),
            do="name another run.directory; without --branch, a run that is there goes on",
        )
    return False


def _checkpoint(run: Path, step: int | None) -> Checkpoint:
    folder = RunDirectory(run).checkpoints
    there = [int(path.name.removeprefix("step-")) for path in reversed(checkpoint_files.steps(folder))]
    if step is not None and step in there:
        return checkpoint_files.read(checkpoint_files.step_folder(folder, step))
    newest = checkpoint_files.newest_good(folder)[0] if step is None else None
    if newest is None:
        raise CheckpointError(
            "There is no such checkpoint to branch from.",
            where=folder,
            found="none" if not there else "those of the steps " + ", ".join(f"{one:,}" for one in there),
            expected="a whole one" if step is None else f"one of step {step:,}",
            do="checkpoint.keep says how many of a run's newest checkpoints stay",
        )
    return newest


def _fill(new: RunDirectory, old: RunDirectory, found: Checkpoint) -> None:
    past = Past.read(old)
    if past.config is None:
        raise ConfigError(
            "The run to branch from has no configuration on record.", where=old.path / "config.yaml"
        )
    journal = Journal.open(old.journal)
    position = found.manifest.get("journal") or {}
    if not journal.extends(position.get("records", -1), position.get("digest", "")):
        raise CheckpointError(
            "The run's journal is not the one that the checkpoint was saved with.",
            where=found.folder,
            do="restore journal.jsonl, or branch from another checkpoint",
        )
    kept = _kept(journal, int(position["records"]), found.consumed_samples)
    lines = old.journal.read_bytes().splitlines(keepends=True)[:kept]
    write_atomically(new.journal, b"".join(lines))
    sealed = Journal.open(new.journal)
    write_atomically(new.path / "config.yaml", dump_config(_as_it_was(past.config, sealed)))
    for name in ("metrics", "evaluations"):
        path: Path = getattr(old, name)
        if path.exists():
            write_atomically(getattr(new, name), path.read_bytes())
    new.truncate_after(found.step)
    if old.edits.exists():
        write_atomically(new.edits, old.edits.read_bytes())
        for edit in EditFile(new.edits).read().pending(sealed.mixes):
            EditFile(new.edits).withdraw(edit.name, f"asked for in {old.path}, which this run left")
    _link(found, checkpoint_files.step_folder(new.checkpoints, found.step), sealed)
    write_json(
        new.path / "manifest.json",
        {
            "name": new.path.name,
            "starts": [],
            **{name: past.facts[name] for name in _FACTS if name in past.facts},
            "branched_from": {
                "run": str(old.path.resolve()),
                "step": found.step,
                "consumed_samples": found.consumed_samples,
                "journal_digest": sealed.digest(),
            },
        },
    )


def _kept(journal: Journal, records: int, consumed: int) -> int:
    """How many of the first records are of the past: what was decided ahead of the checkpoint is the other run's."""
    begins = [
        record.first_sample if isinstance(record, MixRecord) else record.from_sample
        for record in journal.records[:records]
    ]
    return max((number for number, first in enumerate(begins, start=1) if first < consumed), default=0)


def _as_it_was(config: RunConfig, journal: Journal) -> RunConfig:
    """The other run's configuration, with the mixtures that stages were configured to have at the checkpoint."""
    had: dict[str, dict[str, str]] = {}
    for record in journal.mixes:
        if record.origin in ("", CONFIGURATION):
            had[record.stage] = dict(record.weights)
    stages = [
        stage.model_copy(update={"mixture": had[stage.name]}) if stage.name in had else stage
        for stage in config.curriculum
    ]
    return config.model_copy(update={"curriculum": stages})


def _link(found: Checkpoint, target: Path, journal: Journal) -> None:
    """The checkpoint's files under another name, and a manifest that rests on the journal of the past."""
    for name in found.manifest["files"]:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(found.folder / name, path)
        except OSError:
            shutil.copyfile(found.folder / name, path)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    manifest: dict[str, Any] = {
        **found.manifest,
        "journal": {"records": len(journal.records), "digest": journal.digest()},
    }
    text = checkpoint_files.text_of(checkpoint_files.sealed(manifest))
    write_atomically(target / "manifest.json", text)


def _check(new: RunDirectory, config: RunConfig) -> None:
    """Refuse a configuration that would rewrite the past, before there is a run of it."""
    sources = open_sources(config)
    schedule = Schedule(config.curriculum, config.data.sequence_length)
    journal = Journal.open(new.journal, sources)
    Past.read(new).check(config, schedule, sources, journal, pool_sizes(config, sources))
