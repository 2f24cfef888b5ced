"""What every config class is made of. Contract: frozen, closed to unknown keys, documented field by field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import core_schema


class Section(BaseModel):
    """A block of the configuration. The default stands on the field and nowhere else."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


@dataclass(frozen=True)
class Fixed:
    """Marks a key that NeMo RL has and this product accepts only at the values given.

    Use it as `key: Annotated[bool, Fixed(False, remedy="...")] = False`. Any other value is refused by name.
    """

    values: tuple[Any, ...]
    remedy: str

    def __init__(self, *values: Any, remedy: str) -> None:
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "remedy", remedy)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: Any) -> Any:
        if value not in self.values:
            allowed = " or ".join(repr(v) for v in self.values)
            raise ValueError(f"only {allowed} is supported. {self.remedy}")
        return value
