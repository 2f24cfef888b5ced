"""What a wrong configuration says: `<dotted.key>=<value>: <rule>. <what to do>.`, one paragraph for each mistake."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from nemo_rl_lora.config.schema import field_at, field_map, leaves, section_at

_NAMES_ITS_KEY = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*)=.+?: |([A-Za-z_]\w*(?:\.\w+)+): ", re.DOTALL)
_MAX_VALUE_CHARS = 120


class ConfigError(ValueError):
    """A configuration that the user has to change. Its text is complete: nothing has to be added."""


_RULES = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "none_required": "null",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "literal_error": "one of {expected}",
    "enum": "one of {expected}",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "union_tag_invalid": "one of {expected_tags}",
    "string_too_short": "text of at least {min_length} characters",
    "too_short": "a list of at least {min_length} elements",
    "too_long": "a list of at most {max_length} elements",
}


def show(value: Any) -> str:
    """`repr`, shortened where it is long."""
    if isinstance(value, Mapping):
        value = dict(value)
    text = reprlib.Repr(maxlevel=3, maxdict=4, maxlist=6, maxstring=_MAX_VALUE_CHARS, maxother=60).repr(value)
    return text if len(text) <= _MAX_VALUE_CHARS else text[: _MAX_VALUE_CHARS - 3] + "..."


def suggestion(key: str, names: Iterable[str]) -> str | None:
    """The name most like the key, or None where none is."""
    matches = difflib.get_close_matches(key, list(names), n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown_key(root: type[BaseModel], path: Sequence[str], value: str) -> str:
    """The paragraph on a key that the schema does not have; `value` is already shown."""
    parent, key = tuple(path[:-1]), path[-1]
    section = section_at(root, parent)
    names = sorted(field_map(section)) if section is not None else []
    similar = suggestion(key, names)
    if similar is None:
        elsewhere = [".".join(leaf) for leaf, _ in leaves(root) if leaf[-1] == key]
        similar = elsewhere[0] if elsewhere else None
    question = f"Did you mean {similar!r}? " if similar else ""
    place = ".".join(parent) or "the top level"
    return f"{'.'.join(path)}={value}: unknown key. {question}Keys of {place}: {', '.join(names) or 'none'}."


def validation_paragraphs(error: ValidationError, root: type[BaseModel], tree: Mapping[str, Any]) -> list[str]:
    """One paragraph for each key that pydantic refused, in its order."""
    by_key: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_key.setdefault(_dotted_path(detail, tree), []).append(detail)
    return [_paragraph(root, path, details) for path, details in by_key.items()]


def _dotted_path(detail: ErrorDetails, tree: Mapping[str, Any]) -> tuple[str, ...]:
    """Where the error stands in the user's tree: pydantic's location without its names of union members."""
    path: list[str] = []
    node: Any = tree
    for position, item in enumerate(detail["loc"]):
        if isinstance(node, Mapping) and item in node:
            node = node[item]
        elif isinstance(node, list) and isinstance(item, int) and item < len(node):
            node = node[item]
        elif detail["type"] != "missing" or position != len(detail["loc"]) - 1:
            continue
        path.append(str(item))
    return tuple(path)


def _paragraph(root: type[BaseModel], path: tuple[str, ...], details: list[ErrorDetails]) -> str:
    first = details[0]
    key, value = ".".join(path), show(first["input"])
    kind = first["type"]
    if kind == "extra_forbidden":
        return unknown_key(root, path, value)
    if kind in ("missing", "union_tag_not_found"):
        return f"{key}=<absent>: this key is required. Set it in the file or on the command line."
    own_words = next((d for d in details if d["type"] in ("value_error", "assertion_error")), None)
    if own_words is not None:
        return _in_own_words(root, path, value, str(own_words.get("ctx", {}).get("error", own_words["msg"])))
    if kind == "union_tag_invalid" and "discriminator" in first.get("ctx", {}):
        name = str(first["ctx"]["discriminator"]).strip("'")
        key, value = f"{key}.{name}", show(first["input"].get(name))
    rules = list(dict.fromkeys(_rule(detail) for detail in details))
    return f"{key}={value}: must be {' or '.join(rules)}. {_remedy(root, path, first)}"


def _in_own_words(root: type[BaseModel], path: tuple[str, ...], value: str, message: str) -> str:
    """A rule of ours: it names its key in full, or relative to its section, or says the rule alone."""
    named = _NAMES_ITS_KEY.match(message)
    if named is None:
        return f"{'.'.join(path)}={value}: {message}"
    if (named.group(1) or named.group(2)).split(".")[0] in field_map(root):
        return message
    return ".".join((*path, message))


def _rule(detail: ErrorDetails) -> str:
    template = _RULES.get(detail["type"])
    return template.format(**detail.get("ctx", {})) if template else f"valid ({detail['msg']})"


def _remedy(root: type[BaseModel], path: tuple[str, ...], detail: ErrorDetails) -> str:
    expected = re.findall(r"'([^']*)'", str(detail.get("ctx", {}).get("expected", "")))
    similar = suggestion(detail["input"], expected) if isinstance(detail["input"], str) else None
    if similar:
        return f"Did you mean {similar!r}?"
    field = field_at(root, path)
    default = PydanticUndefined if field is None else field.default
    if default is PydanticUndefined or isinstance(default, BaseModel):
        return "Correct the value."
    return f"Correct the value, or remove the key for the default, {default!r}."
