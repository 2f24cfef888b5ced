"""What a wrong configuration says: `<dotted.key>=<value>: <rule>. <what to do>.`, one paragraph for each mistake."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from nemo_rl_lora.config.refused_keys import names_below
from nemo_rl_lora.config.schema import field_at, field_map, leaves, section_at, types_at
from nemo_rl_lora.config.tree import lookup

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
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_CHARS else text[: _MAX_VALUE_CHARS - 3] + "..."


def did_you_mean(key: str, names: Iterable[str]) -> str:
    """The question after the name most like the key, and a blank; empty where none is like it."""
    matches = difflib.get_close_matches(key, list(names), n=1)
    return f"Did you mean {matches[0]!r}? " if matches else ""


def unknown_key(root: type[BaseModel], path: Sequence[str], value: str) -> str:
    """The paragraph on a key that the schema does not have; `value` is already shown."""
    parent, key = tuple(path[:-1]), path[-1]
    below = names_below(root, path)
    if below:
        return f"{'.'.join(path)}={value}: must be a mapping. Its keys: {', '.join(sorted(below))}."
    section = section_at(root, parent)
    accepted = names_below(root, parent)  # of NeMo RL, with one value or none that changes anything
    own = set(field_map(section)) if section is not None else accepted
    elsewhere = [".".join(leaf) for leaf, _ in leaves(root) if leaf[-1] == key]
    question = did_you_mean(key, sorted(own | accepted)) or (f"Did you mean {elsewhere[0]!r}? " if elsewhere else "")
    place = ".".join(parent) or "the top level"
    return f"{'.'.join(path)}={value}: unknown key. {question}Keys of {place}: {', '.join(sorted(own)) or 'none'}."


def validation_paragraphs(
    error: ValidationError, root: type[BaseModel], resolved: Mapping[str, Any], unresolved: Mapping[str, Any]
) -> list[str]:
    """One paragraph for each key that pydantic refused, in its order.

    Keys that only refer to another one by interpolation are left out where that other one is wrong, too.
    """
    by_key: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_key.setdefault(_dotted_path(detail, resolved), []).append(detail)
    written = [path for path in by_key if not is_reference(lookup(unresolved, path))]
    return [_paragraph(root, path, by_key[path]) for path in written or by_key]


def not_mappings(root: type[BaseModel], tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> list[str]:
    """One paragraph for each section of the schema in whose place the tree has something else, and no reference.

    null is meant for what a section is where the schema says so, and for a section without keys of its own.
    """
    found = []
    for key, value in tree.items():
        here = (*path, str(key))
        section, kinds = section_at(root, here), types_at(root, here)
        if isinstance(value, Mapping):
            found += not_mappings(root, value, here)
            continue
        if section is None or is_reference((value,)):
            continue
        may_be_null = type(None) in kinds or not field_map(section)
        may_be_list = not all(isinstance(kind, type) for kind in kinds)
        if not (value is None and may_be_null) and not (isinstance(value, list) and may_be_list):
            names = ", ".join(sorted(field_map(section)))
            lost = " null would drop all that it inherits: remove the line to keep it." if value is None else ""
            found.append(f"{'.'.join(here)}={show(value)}: must be a mapping.{lost} Its keys: {names}.")
    return found


def is_reference(found: tuple[Any] | None) -> bool:
    """Whether a value is one that another key decides. What only holds references, such as a section, is none."""
    return found is not None and isinstance(found[0], str) and "${" in found[0]


def _dotted_path(detail: ErrorDetails, tree: Mapping[str, Any]) -> tuple[str, ...]:
    """Where the error stands in the user's tree: pydantic's location without its names of union members."""
    path: list[str] = []
    node: Any = tree
    for position, item in enumerate(detail["loc"]):
        below = lookup(node, (item,))
        if below is not None:
            (node,) = below
        elif detail["type"] != "missing" or position != len(detail["loc"]) - 1:
            continue
        path.append(str(item))
    return tuple(path)


def _paragraph(root: type[BaseModel], path: tuple[str, ...], details: list[ErrorDetails]) -> str:
    first = details[0]
    key, value = ".".join(path), show(first["input"])
    kind = first["type"]
    if kind in ("extra_forbidden", "invalid_key"):
        return unknown_key(root, path, value)
    if kind in ("missing", "union_tag_not_found"):
        remedy = (
            "Set it in the file or on the command line" if len(path) > 1 else "Inherit a base file with `defaults:`"
        )
        return f"{key}=<absent>: this key is required. {remedy}."
    own_words = next((d for d in details if d["type"] in ("value_error", "assertion_error")), None)
    if own_words is not None:
        return _in_own_words(root, path, value, str(own_words.get("ctx", {}).get("error", own_words["msg"])))
    context = first.get("ctx", {})
    if kind == "union_tag_invalid":
        name = str(context["discriminator"]).strip("'")
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
    if isinstance(detail["input"], str) and (question := did_you_mean(detail["input"], expected)):
        return question.rstrip()
    field = field_at(root, path)
    default = PydanticUndefined if field is None else field.default
    if default is PydanticUndefined or isinstance(default, BaseModel):
        return "Correct the value."
    return f"Correct the value (the schema's default is {'null' if default is None else repr(default)})."
