"""YAML in, dotted overrides, one typed configuration out; errors name the key, its line and the nearest key."""

from __future__ import annotations

import copy
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from megatron_davinci.config.curriculum import Stage
from megatron_davinci.config.data import DataConfig
from megatron_davinci.config.model import ModelConfig
from megatron_davinci.config.problems import Problem, Problems
from megatron_davinci.config.run import RunConfig, cross_problems
from megatron_davinci.config.section import shown
from megatron_davinci.errors import ConfigError

Path_ = tuple[str | int, ...]
Written = Mapping[Path_, int | str]
_Section = TypeVar("_Section", bound=BaseModel)
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
    settings, lines = read_settings(Path(path), "sections run, model, data, curriculum, ...")
    written: dict[Path_, int | str] = dict(lines)
    for override in overrides:
        place = _apply(settings, override)
        # What was written there, and below, is gone.
        written = {one: at for one, at in written.items() if one[: len(place)] != place}
        written[place] = override
    return validate(settings, where=str(path), lines=written)


def read_settings(path: Path, expected: str) -> tuple[dict[str, Any], dict[Path_, int]]:
    """The plain settings in a YAML file, and the line of each key.

    Args:
        path: The file.
        expected: What its top level holds, for the message.

    Raises:
        ConfigError: It cannot be read, is not YAML, is no mapping, or says something twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            "There is no such configuration.", where=path, do="check the path; examples/ has working ones"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("The configuration cannot be read.", where=path, found=error) from None
    try:
        node = yaml.compose(text, Loader=_PlainSafeLoader)
        settings = yaml.load(text, Loader=_PlainSafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError("The configuration is not valid YAML.", where=path, found=error) from None
    if not isinstance(settings, dict):
        raise ConfigError(
            "The configuration is empty or not a mapping.",
            where=path,
            found=type(settings).__name__,
            expected=expected,
        )
    lines: dict[Path_, int] = {}
    twice: list[str] = []
    _collect_lines(node, (), lines, twice, set())
    if twice:
        raise ConfigError(
            "The configuration says something twice.",
            where=path,
            found=one_screen(twice),
            do="keep one of the two; YAML alone would silently take the last",
        )
    return settings, lines


def validate(settings: dict[str, Any], where: str, lines: Written | None = None) -> RunConfig:
    """Turn plain settings into a `RunConfig`, or list every problem at once.

    Args:
        settings: Plain values, as YAML gives them.
        where: What they are from, for messages.
        lines: Where each of them is written: a line of the file, or the override that says it.

    Raises:
        ConfigError: A key is unknown, a value is impossible, or two sections contradict each other.
    """
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        items = error.errors()
        problems = [text for item in items for text in _describe(item, lines or {})]
        if not any(isinstance(item.get("ctx", {}).get("error"), Problems) for item in items):
            # One bad value keeps pydantic from looking at the whole; what is whole is looked at here.
            problems += [_located(*problem, lines or {}) for problem in _between_sections(settings)]
        raise ConfigError(
            "The configuration has a problem."
            if len(problems) == 1
            else f"The configuration has {len(problems)} problems.",
            where=where,
            found=one_screen(problems),
            do="mend what is named; docs/reference/configuration.md lists every key",
        ) from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def problems_of(error: ValidationError, root: type[BaseModel], lines: Written) -> list[str]:
    """What pydantic found wrong with another kind of file than a run configuration: a line for each problem."""
    return [said for item in error.errors() for said in _describe(item, lines, root)]


class _PlainSafeLoader(yaml.SafeLoader):
    """Refuses numbers that are others than they seem: `010`, eight, and `1:30`, ninety."""


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    made = loader.construct_yaml_int if node.tag.endswith(":int") else loader.construct_yaml_float
    value: int | float = made(node)
    digits = node.value.lstrip("+-").replace("_", "")
    if ":" in digits or (digits.isdecimal() and int(digits) != abs(value)):
        said = f"{node.value} is {value} to YAML; write it so, or in quotes where it is text"
        raise yaml.constructor.ConstructorError(None, None, said, node.start_mark)
    return value


for _kind in ("int", "float"):
    _PlainSafeLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _number)


class _Dumper(yaml.SafeDumper):
    """Escapes the line breaks that are none elsewhere; plain or in single quotes, YAML folds them."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def one_screen(problems: list[str]) -> str:
    """Problems, a line each; the first dozen."""
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


def value_of(raw: str, where: str) -> Any:
    """The value of a `key=value` that a user has typed.

    Args:
        raw: What follows the equals sign; YAML.
        where: The key, for the message.

    Raises:
        ConfigError: It is not YAML.
    """
    try:
        return yaml.load(raw, Loader=_PlainSafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError("The value of an override is not valid YAML.", where=where, found=error) from None


def _apply(settings: dict[str, Any], override: str) -> Path_:
    """Set one value, and say where it is."""
    key, equals, raw = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            "An override is not of the form key=value.", found=override, expected="train.micro_batch_size=4"
        )
    value = value_of(raw, key)
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
                    expected=f"a number from 0 to {len(target) - 1}"
                    if target
                    else "an item: the list is empty",
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


def _between_sections(settings: dict[str, Any]) -> Iterator[Problem]:
    """What sections that are valid by themselves say against each other."""

    def valid(kind: type[_Section], value: Any) -> _Section | None:
        try:
            return kind.model_validate(value)
        except ValidationError:
            return None

    stages = settings.get("curriculum")
    yield from cross_problems(
        [valid(Stage, stage) for stage in stages] if isinstance(stages, list) else [],
        valid(DataConfig, settings.get("data")),
        valid(ModelConfig, settings.get("model")),
    )


def _describe(item: Any, lines: Written, root: type[BaseModel] = RunConfig) -> list[str]:
    """What one error of pydantic's says: a line for each problem."""
    # Tags of a union are in angle brackets.
    location: Path_ = tuple(part for part in item["loc"] if not str(part).startswith("<"))
    error = item.get("ctx", {}).get("error")
    if isinstance(error, Problems):
        return [_located((*location, *place), said, lines) for place, said in error.problems]
    if item["type"] == "extra_forbidden":
        keys = _keys_at(location[:-1], root)
        nearest = difflib.get_close_matches(str(location[-1]), keys, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]}?" if nearest else f"; keys here: {', '.join(sorted(keys))}"
        return [_located(location, f"unknown key{hint}", lines)]
    if item["type"] == "missing":
        return [_located(location, "missing", lines)]
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    found = item.get("input")
    if item["type"] == "invalid_key" or location[-1:] == ("[key]",):
        # `no` and `on` are truth values to YAML, and 2024 is a number.
        above = location[: -2 if location[-1] == "[key]" else -1]
        return [_located(above, f"YAML reads a name as {shown(found)}; write it in quotes", lines)]
    if item["type"] == "string_type" and isinstance(found, bool | int | float | date):
        # As are `1_1`, eleven, and 2026-11-27, a date.
        said = f"should be text, and YAML reads it as {shown(found)}; write it in quotes"
        return [_located(location, said, lines)]
    known = isinstance(found, dict | list) or "found" in message
    return [_located(location, message + ("" if known else f"; found {shown(found)}"), lines)]


def _located(location: Path_, said: str, lines: Written) -> str:
    """A problem with its key, and where that is written: its line, or else the nearest key's above it."""
    at = next((location[:k] for k in range(len(location), 0, -1) if location[:k] in lines), None)
    name = ".".join(str(part) for part in location) or "the configuration"
    marks = []
    if at is not None:
        line = lines[at]
        if isinstance(line, int):
            marks.append(f"line {line}")
        else:
            marks.append("command line" if at == location else f"command line, {shown(line)}")
    # What the command line says below the key has a part in it.
    below = [text for place, text in lines.items() if isinstance(text, str) and place[:-1] == location]
    if location and below:
        marks.append(f"command line, {', '.join(shown(text) for text in below[:2])}")
    return name + (f" ({'; '.join(marks)})" if marks else "") + f": {said}"


def _keys_at(location: Path_, root: type[BaseModel] = RunConfig) -> list[str]:
    """The keys that the schema knows at a place, found by walking the annotations."""
    annotation: Any = root
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
