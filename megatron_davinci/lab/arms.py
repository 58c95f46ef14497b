"""From a design to runs: every arm at every size with every seed, each a whole run configuration."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from megatron_davinci.config import RunConfig, load_config
from megatron_davinci.data.manifest import FILE_NAME
from megatron_davinci.errors import ConfigError
from megatron_davinci.files import file_digest
from megatron_davinci.lab.design import Design, Setting
from megatron_davinci.version import __version__

# What changes nothing that a run computes.
_NO_MATTER = (
    "run.directory",
    "logging.",
    "checkpoint.",
    "snapshots.",
    "profile.",
    "data.loader.",
    "health.hang.",
)


@dataclass(frozen=True)
class Arm:
    """One side at one size, before a seed is chosen.

    Attributes:
        name: Its name in the design.
        size: Of the ladder; empty where there is none.
        words: What it is.
        setting: What it differs in from the base, by dotted key.
        config: Its configuration, with the seed of the file that it is from.
        against: The arm that it is held against; empty for a control.
    """

    name: str
    size: str
    words: str
    setting: Setting
    config: RunConfig
    against: str = ""

    def with_seed(self, seed: int) -> RunConfig:
        """Its configuration with a seed."""
        return self.config.model_copy(update={"run": self.config.run.model_copy(update={"seed": seed})})


@dataclass(frozen=True)
class Run:
    """A run of the design.

    Attributes:
        arm: Its arm.
        seed: Of weights and data order.
        identity: A digest of all that decides what it computes.
        origin: `RUN@STEP`, a checkpoint of no run of the lab's that it begins at; empty for none.
    """

    arm: Arm
    seed: int
    identity: str
    origin: str = ""

    @property
    def label(self) -> str:
        """For a reader."""
        at = f" at {self.arm.size}" if self.arm.size else ""
        return f"{self.arm.name}{at}, seed {self.seed}"


def arms_of(design: Design) -> list[Arm]:
    """Every arm at every size of the ladder; the control's are the first of their size.

    Raises:
        ConfigError: An arm's configuration is none, or tasks are asked of one without a tokenizer; the message names
            the key.
        DataError: A file is missing.
    """
    sides = _sides(design)
    control = design.control or next(iter(sides))
    own = _own_controls(design)
    found = []
    for size, changes in (design.ladder or {"": {}}).items():
        for name in sorted(sides, key=lambda one: one != control):
            path, setting, words = sides[name]
            whole = {**design.overrides, **changes, **setting}
            config = load_config(path or design.base, [as_override(*item) for item in whole.items()])
            if design.evaluate is not None and config.data.tokenizer is None:
                raise ConfigError(
                    "A design asks tasks, which are words, and an arm does not say what its tokenizer is.",
                    where=f"{path or design.base}: data.tokenizer",
                    found=f"nothing, in arm {name}",
                    do="name the tokenizer that its sources were made with, before anything is trained",
                )
            its = own.get(name, control)
            found.append(Arm(name, size, words, setting, config, "" if its == name else its))
    return found


def _named(levels: Mapping[str, str]) -> str:
    return ", ".join(f"{factor}={level}" for factor, level in levels.items())


def _own_controls(design: Design) -> dict[str, str]:
    """Of each arm the one with its own levels of the factors in `within`, and the first of all others; by name."""
    if not design.within:
        return {}
    first = {name: next(iter(factor.levels)) for name, factor in design.factors.items()}
    found = {}
    for one in _combinations(design):
        levels = dict(zip(design.factors, one))
        found[_named(levels)] = _named(first | {name: levels[name] for name in design.within})
    return found


def _sides(design: Design) -> dict[str, tuple[Path | None, Setting, str]]:
    if design.arms:
        return {name: (arm.config, arm.set, arm.words) for name, arm in design.arms.items()}
    names = list(design.factors)
    found: dict[str, tuple[Path | None, Setting, str]] = {}
    for levels in _combinations(design):
        setting = {
            design.factors[name].key: design.factors[name].levels[level] for name, level in zip(names, levels)
        }
        found[_named(dict(zip(names, levels)))] = (None, setting, "")
    return found


def _combinations(design: Design) -> Iterator[tuple[str, ...]]:
    levels = [list(factor.levels) for factor in design.factors.values()]
    control = tuple(one[0] for one in levels)
    if design.combine == "one-at-a-time":
        yield control
        for number, several in enumerate(levels):
            for level in several[1:]:
                yield (*control[:number], level, *control[number + 1 :])
        return
    for chosen in itertools.product(*levels):
        if design.combine == "half":
            *others, last = (several.index(level) for several, level in zip(levels, chosen))
            if last != sum(others) % 2:
                continue
        yield chosen


def runs_of(design: Design, arms: list[Arm] | None = None) -> list[Run]:
    """Every run, seed by seed, so that an early look has all arms."""
    arms = arms_of(design) if arms is None else arms
    return [_run(design, arm, seed) for seed in design.seeds for arm in arms]


def _run(design: Design, arm: Arm, seed: int) -> Run:
    origin = ""
    if design.branch is not None and design.branch.run is not None:
        origin = design.branch.run.replace("{seed}", str(seed)).replace("{size}", arm.size)
    return Run(arm, seed, identity(arm.with_seed(seed), origin), origin)


def as_override(key: str, value: Any) -> str:
    """A setting as `key=value`, the value in YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=2**30, allow_unicode=True)
    return f"{key}={text.removesuffix(chr(10)).removesuffix('...').strip()}"


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Plain values by dotted key."""
    if isinstance(value, Mapping) and value:
        return {k: v for name, one in value.items() for k, v in flat(one, f"{prefix}{name}.").items()}
    if isinstance(value, list) and value and any(isinstance(one, dict | list) for one in value):
        return {k: v for place, one in enumerate(value) for k, v in flat(one, f"{prefix}{place}.").items()}
    return {prefix.removesuffix("."): value}


def identity(config: RunConfig, origin: str = "") -> str:
    """A digest of all that decides what a run computes: its settings, its data, this package's version.

    Where it is recorded, how it is shown, and how often it is saved decide nothing.

    Args:
        config: The run's configuration.
        origin: `RUN@STEP` that it begins at; empty for none.
    """
    settings = {
        key: value
        for key, value in flat(config.model_dump(mode="json")).items()
        if not key.startswith(_NO_MATTER)
        and not key.endswith(".path")
        and not key.startswith("data.validation.")
    }
    data = {name: _content(str(source.path)) for name, source in config.data.sources.items()}
    held_out = {name: _content(str(path)) for name, path in config.data.validation.items()}
    begins: list[str] = []
    if origin:
        run, _, step = origin.rpartition("@")
        begins.append(_checkpoint(Path(run) / "checkpoints" / f"step-{int(step):08d}"))
    if config.checkpoint.initial_weights is not None:
        begins.append(_checkpoint(config.checkpoint.initial_weights))
    whole = json.dumps([settings, data, held_out, __version__, *begins], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:20]


def _checkpoint(folder: Path) -> str:
    """A digest of a checkpoint: its manifest, which has digests of its files; else its name."""
    manifest = folder / "manifest.json"
    return file_digest(manifest) if manifest.is_file() else str(folder)


@cache
def _content(path: str) -> str:
    """A digest of what a source is: its manifest, which has digests of its files; else its index; else its name."""
    place = Path(path)
    for file in (place / FILE_NAME, Path(f"{path}.idx")):
        if "://" not in path and file.is_file():
            return file_digest(file)
    return path
