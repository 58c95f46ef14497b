"""What every section of the run configuration has in common."""

from __future__ import annotations

import reprlib

from pydantic import BaseModel, ConfigDict

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 80


class Section(BaseModel):
    """A frozen group of settings. A key that is not declared is an error, never ignored; numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def shown(value: object) -> str:
    """A value as an error message shows it: at most a line, however long or deeply nested the value is."""
    return _SHORT.repr(value)
