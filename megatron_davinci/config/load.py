"""YAML in, dotted overrides, one typed configuration out; errors name the key, its line and the nearest key."""

from __future__ import annotations

import copy
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from megatron_davinci.config.run import RunConfig
from megatron_davinci.config.section import shown
from megatron_davinci.errors import ConfigError

Path_ = tuple[str | int, ...]
_ON_THE_COMMAND_LINE = 0
_MOST_PROBLEMS = 12  # more would not fit one screen, and mending twelve mends most of what follows


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run configuration.

    Args:
        path: A YAML file.
        overrides: `dotted.key=value` settings that win over the file; values are YAML, list positions are
            numbers (`curriculum.0.tokens=2M`).

    Raises:
        ConfigError: The file cannot be read, a key is unknown, or a value is impossible. Every problem is
            listed, each with its line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            "There is no such configuration.", where=path, do="check the path; examples/ has working ones"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("The configuration cannot be read.", where=path, found=error) from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        settings = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError("The configuration is not valid YAML.", where=path, found=error) from None
    if not isinstance(settings, dict):
        raise ConfigError(
            "The configuration is empty or not a mapping.",
            where=path,
            found=type(settings).__name__,
            expected="sections run, model, data, curriculum, ...",
        )
    lines: dict[Path_, int] = {}
    twice: list[str] = []
    _collect_lines(node, (), lines, twice, set())
    if twice:
        raise ConfigError(
            "The configuration says something twice.",
            where=path,
            found=_one_screen(twice),
            do="keep one of the two; YAML alone would silently take the last",
        )
    for override in overrides:
        lines[_apply(settings, override)] = _ON_THE_COMMAND_LINE
    return validate(settings, where=str(path), lines=lines)


def validate(settings: dict[str, Any], where: str, lines: dict[Path_, int] | None = None) -> RunConfig:
    """Turn plain settings into a `RunConfig`, or list every problem at once."""
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        problems = [_describe(item, lines or {}) for item in error.errors()]
        raise ConfigError(
            "The configuration has a problem."
            if len(problems) == 1
            else f"The configuration has {len(problems)} problems.",
            where=where,
            found=_one_screen(problems),
            do="mend what is named; docs/reference/configuration.md lists every key",
        ) from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Escapes the line breaks that are none elsewhere; plain or in single quotes, YAML folds them."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _one_screen(problems: list[str]) -> str:
    shown_, rest = problems[:_MOST_PROBLEMS], len(problems) - _MOST_PROBLEMS
    return "\n".join([*shown_, f"and {rest} more"] if rest > 0 else shown_)


def _collect_lines(
    node: yaml.Node | None, path: Path_, lines: dict[Path_, int], twice: list[str], seen: set[int]
) -> None:
    """Note the line of every key, and the keys that one mapping has twice.

    A node is visited once, where it is written: aliases can name it any number of times, itself included.
    """
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            child, line = (*path, key.value), key.start_mark.line + 1
            if child in lines and key.value != "<<":
                name = ".".join(str(part) for part in child)
                twice.append(f"{name} is written twice: lines {lines[child]} and {line}")
            lines[child] = line
            _collect_lines(value, child, lines, twice, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*path, index)] = value.start_mark.line + 1
            _collect_lines(value, (*path, index), lines, twice, seen)


def _apply(settings: dict[str, Any], override: str) -> Path_:
    """Set one value, and say where it is."""
    key, equals, raw = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            "An override is not of the form key=value.", found=override, expected="train.micro_batch_size=4"
        )
    try:
        value = yaml.safe_load(raw)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError("The value of an override is not valid YAML.", where=key, found=error) from None
    parts = key.split(".")
    target: Any = settings
    place: Path_ = ()
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(target, list):
            if not part.isdecimal() or int(part) >= len(target):
                raise ConfigError(
                    "An override names a position that is not there.",
                    where=".".join(parts[: depth + 1]),
                    expected=f"a number from 0 to {len(target) - 1}",
                )
            index: Any = int(part)
        elif isinstance(target, dict):
            index = part
            if not last:
                target.setdefault(part, {})
                # `mixture=null` in the file and `mixture.code=1` here: the section starts out empty.
                target[part] = {} if target[part] is None else target[part]
        else:
            raise ConfigError(
                "An override goes below a plain value.",
                where=key,
                found=".".join(parts[:depth]) + f" = {shown(target)}",
            )
        if last:
            target[index] = value
        else:
            # Copied on the way down: YAML aliases make several places of the file one object.
            target[index] = copy.copy(target[index])
            target = target[index]
        place = (*place, index)
    return place


def _describe(item: Any, lines: dict[Path_, int]) -> str:
    location: Path_ = tuple(item["loc"])
    line = next((lines[location[:k]] for k in range(len(location), 0, -1) if location[:k] in lines), None)
    name = ".".join(str(part) for part in location) or "the configuration"
    prefix = name
    if line is not None:
        prefix += " (command line)" if line == _ON_THE_COMMAND_LINE else f" (line {line})"
    if item["type"] == "extra_forbidden":
        keys = _keys_at(location[:-1])
        nearest = difflib.get_close_matches(str(location[-1]), keys, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]}?" if nearest else f"; keys here: {', '.join(sorted(keys))}"
        return f"{prefix}: unknown key{hint}"
    if item["type"] == "missing":
        return f"{prefix}: missing"
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    found = item.get("input")
    known = isinstance(found, dict | list) or "found" in message
    return f"{prefix}: {message}" + ("" if known else f"; found {shown(found)}")


def _keys_at(location: Path_) -> list[str]:
    """The keys that the schema knows at a place, found by walking the annotations."""
    annotation: Any = RunConfig
    for part in location:
        candidates = _unwrap(annotation)
        step: Any = None
        for candidate in candidates:
            if (
                isinstance(candidate, type)
                and issubclass(candidate, BaseModel)
                and part in candidate.model_fields
            ):
                step = candidate.model_fields[str(part)].annotation
            elif typing.get_origin(candidate) is dict:
                step = typing.get_args(candidate)[1]
            elif typing.get_origin(candidate) is list:
                step = typing.get_args(candidate)[0]
        annotation = step
    keys: list[str] = []
    for candidate in _unwrap(annotation):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            keys.extend(candidate.model_fields)
    return keys


def _unwrap(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return [part for option in typing.get_args(annotation) for part in _unwrap(option)]
    if origin is typing.Annotated:
        return _unwrap(typing.get_args(annotation)[0])
    return [annotation]
