"""What the sections of the configuration have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator


class Section(BaseModel):
    """Strict and immutable: an unknown key is an error, and so is a text that no path can hold."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_null_characters(cls, value: Any) -> Any:
        # No path can hold one, and the system's calls raise errors of their own.
        if any(isinstance(item, str) and "\0" in item for item in (value if isinstance(value, list) else [value])):
            raise ValueError("text without null characters")
        return value
