"""What every config class is made of. Contract: frozen, closed to unknown keys, documented field by field."""

from __future__ import annotations

import re

from pydantic import AfterValidator, BaseModel, ConfigDict

NOT_BLANK = r"(?s).*\S.*"


class Section(BaseModel):
    """A block of the configuration. The default stands on the field and nowhere else."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


def matching(pattern: str, rule: str) -> AfterValidator:
    """Text of this form, as in `key: Annotated[str, matching(...)]`; `rule` is what is said of another one."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(rule)
        return text

    return AfterValidator(check)
