"""A run directory as a run leaves it, without the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_davinci.config import dump_config
from megatron_davinci.config.run import RunConfig
from megatron_davinci.data import Journal
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train.planned import open_sources, planned_records, pool_sizes
from megatron_davinci.train.run_directory import RunDirectory
from tests.tiny import LENGTH, tiny_config


def record_run(config: RunConfig, steps: int) -> RunDirectory:
    """Write what a run of so many steps has on record."""
    directory, sources = RunDirectory(config.run.directory), open_sources(config)
    schedule, pools = Schedule(config.curriculum, LENGTH), pool_sizes(config, open_sources(config))
    directory.path.mkdir(parents=True, exist_ok=True)
    (directory.path / "config.yaml").write_text(dump_config(config))
    facts = {
        "seed": config.run.seed,
        "sequence_length": LENGTH,
        "data_fingerprints": {name: source.fingerprint for name, source in sources.items()},
        "windows": {name: source.num_windows for name, source in sources.items()},
        "pools": pools,
        "starts": [],
    }
    (directory.path / "manifest.json").write_text(json.dumps(facts))
    consumed, lines = 0, []
    for _ in range(steps):
        plan = schedule.at(consumed)
        consumed += plan.batch
        lines.append(json.dumps({"step": plan.step, "consumed_samples": consumed, "loss": 5.0}) + "\n")
    directory.metrics.write_text("".join(lines))
    journal = Journal.open(directory.journal)
    for record in planned_records(config, schedule, pools, []):
        if record.first_sample < consumed:
            journal.append(record)
    return directory


def changed(root: Path, **stages: Any) -> RunConfig:
    """The tiny configuration with other keys of stages: `second={"tokens": "8k"}`; None leaves the stage out."""
    config = tiny_config(root)
    kept = [stage.model_dump(mode="json") for stage in config.curriculum]
    curriculum = [
        {**stage, **(stages.get(stage["name"]) or {})}
        for stage in kept
        if stages.get(stage["name"], {}) is not None
    ]
    more = [
        {**kept[1], "name": name, **keys} for name, keys in stages.items() if name not in ("first", "second")
    ]
    return tiny_config(root, curriculum=[*curriculum, *more])
