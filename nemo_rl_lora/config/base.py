"""What every config class is made of. Contract: frozen, closed to unknown keys, documented field by field.

Numbers and switches are read by the rule of nemo_rl_lora/scalars.py, in every field and inside lists and mappings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

from nemo_rl_lora.config.schema import alternatives, field_map
from nemo_rl_lora.scalars import as_number, as_switch

NOT_BLANK = r"(?s).*\S.*"


class Section(BaseModel):
    """A block of the configuration. The default stands on the field and nowhere else."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _numbers_and_switches_as_written(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        fields = field_map(cls)
        return {
            key: _as_written(value, alternatives(fields[key].annotation)) if key in fields else value
            for key, value in values.items()
        }


class _Refused:
    """A switch in place of a number, or the reverse, which pydantic would convert: no type takes this object."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __repr__(self) -> str:
        return repr(self._value)


def _as_written(value: Any, kinds: list[Any]) -> Any:
    """The value as one of these types, where it is a number or a switch."""
    if isinstance(value, Mapping | list | tuple):
        return _each_as_written(value, kinds)
    wants_number, wants_switch = int in kinds or float in kinds, bool in kinds
    if Any in kinds or not (wants_number or wants_switch) or (isinstance(value, str) and _is_a_word(value, kinds)):
        return value
    read = as_number(value) if wants_number else value
    read = as_switch(read) if wants_switch else read
    is_wrong = isinstance(read, bool) if wants_number else read is not None and not isinstance(read, bool)
    return _Refused(value) if is_wrong and not (wants_number and wants_switch) else read


def _each_as_written(value: Any, kinds: list[Any]) -> Any:
    """The elements of a list, or the values of a mapping, by the types that these types have for them."""
    if isinstance(value, Mapping):
        inner = [get_args(kind)[1] for kind in kinds if get_origin(kind) in (dict, Mapping)]
    else:
        inner = [each for kind in kinds if get_origin(kind) in (list, tuple) for each in get_args(kind)]
    found = [kind for each in inner if each is not Ellipsis for kind in alternatives(each)]
    if not found:
        return value
    if isinstance(value, Mapping):
        return {key: _as_written(item, found) for key, item in value.items()}
    return [_as_written(item, found) for item in value]


def _is_a_word(value: str, kinds: list[Any]) -> bool:
    """Whether text is meant as text: the field has text, or this very word."""
    return any(kind is str or (get_origin(kind) is Literal and value in get_args(kind)) for kind in kinds)


def matching(pattern: str, rule: str) -> AfterValidator:
    """Text of this form, as in `key: Annotated[str, matching(...)]`; `rule` is what is said of another one."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(rule)
        return text

    return AfterValidator(check)
