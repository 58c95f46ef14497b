"""What every section of the run configuration has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of settings. A key that is not declared is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
