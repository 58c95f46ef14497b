"""What every section of the run configuration has in common."""

from __future__ import annotations

import reprlib
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 80


class Section(BaseModel):
    """A frozen group of settings. A key that is not declared is an error, never ignored; numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _a_truth_value_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads `yes` and `on` as true, which pydantic would take for 1.
        if isinstance(value, bool) and info.field_name is not None:
            annotation = cls.model_fields[info.field_name].annotation
            if {annotation, *get_args(annotation)} & {int, float}:
                raise ValueError(f"should be a number; found {value}")
        return value


def shown(value: object) -> str:
    """A value as an error message shows it: at most a line, however long or deeply nested the value is."""
    return _SHORT.repr(value)
