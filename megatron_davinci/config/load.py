"""YAML in, dotted overrides, one typed configuration out; errors name the key, its line and the nearest key."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from megatron_davinci.config.run import RunConfig
from megatron_davinci.errors import ConfigError

Path_ = tuple[str | int, ...]


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
    _collect_lines(node, (), lines)
    for override in overrides:
        _apply(settings, override)
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
            found="\n".join(problems),
            do="mend what is named; docs/reference/configuration.md lists every key",
        ) from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _collect_lines(node: yaml.Node | None, path: Path_, lines: dict[Path_, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            child = (*path, key.value)
            if child not in lines:  # an alias may be visited twice; the first place is where it is written
                lines[child] = key.start_mark.line + 1
                _collect_lines(value, child, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*path, index)] = value.start_mark.line + 1
            _collect_lines(value, (*path, index), lines)


def _apply(settings: dict[str, Any], override: str) -> None:
    key, equals, raw = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            "An override is not of the form key=value.", found=override, expected="train.micro_batch_size=4"
        )
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise ConfigError("The value of an override is not valid YAML.", where=key, found=error) from None
    parts = key.split(".")
    target: Any = settings
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(target, list):
            if not part.isdigit() or int(part) >= len(target):
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
                found=".".join(parts[:depth]) + f" = {target!r}",
            )
        if last:
            target[index] = value
        else:
            target = target[index]


def _describe(item: Any, lines: dict[Path_, int]) -> str:
    location: Path_ = tuple(item["loc"])
    line = next((lines[location[:k]] for k in range(len(location), 0, -1) if location[:k] in lines), None)
    name = ".".join(str(part) for part in location) or "the configuration"
    prefix = name + (f" (line {line})" if line else "")
    if item["type"] == "extra_forbidden":
        keys = _keys_at(location[:-1])
        nearest = difflib.get_close_matches(str(location[-1]), keys, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]}?" if nearest else f"; keys here: {', '.join(sorted(keys))}"
        return f"{prefix}: unknown key{hint}"
    if item["type"] == "missing":
        return f"{prefix}: missing"
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    found = item.get("input")
    shown = "" if isinstance(found, dict | list) or "found" in message else f"; found {found!r}"
    return f"{prefix}: {message}{shown}"


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
