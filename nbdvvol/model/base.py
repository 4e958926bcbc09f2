"""The base of every model: unknown keys are errors, values are immutable unless a class says otherwise."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Model(BaseModel):
    """A strict model: extra keys are refused and fields are addressed by name or alias."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, validate_default=True)
