"""What every section of the run configuration has in common."""

from __future__ import annotations

import reprlib
import types
from collections.abc import Iterator
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 80

LocalPath = Annotated[Path, AfterValidator(lambda path: Path(expanduser(path)))]
"""A path in the file system. A shell leaves the `~` of `run.directory=~/runs/a`, which would name a folder here."""


class Section(BaseModel):
    """A frozen group of settings. A key that is not declared is an error, never ignored; numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _a_truth_value_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads `yes` and `on` as true, which pydantic would take for 1.
        if info.field_name is None:
            return value
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and {annotation, *get_args(annotation)} & {int, float}:
            raise ValueError(f"should be a number; found {value}")
        if isinstance(value, list | dict) and {int, float} & set(_held(annotation)):
            for name, one in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(one, bool):
                    raise ValueError(f"{name} should be a number; found {one}")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any, info: ValidationInfo) -> Any:
        # Which YAML reads as false.
        if value is False and info.field_name is not None:
            annotation = cls.model_fields[info.field_name].annotation
            return "off" if "off" in get_args(annotation) else value
        return value


def _held(annotation: Any) -> Iterator[type]:
    """Of what types a list's elements and a mapping's values are; nothing of what is neither."""
    if get_origin(annotation) in (Union, types.UnionType):
        for one in get_args(annotation):
            yield from _held(one)
    elif get_origin(annotation) in (list, dict):
        inner = get_args(annotation)[-1]
        yield get_args(inner)[0] if get_origin(inner) is Annotated else inner


def shown(value: object) -> str:
    """A value as an error message shows it: at most a line, however long or deeply nested the value is."""
    return _SHORT.repr(value)
