"""The schema as users see it: which dotted keys exist. Reads annotations; holds no values.

A key is written with its alias where it has one (`_v2`). Mappings of free keys (`dict[str, Any]`) accept every key.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def field_map(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a section by the name that users write."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def alternatives(annotation: Any) -> list[Any]:
    """The types that an annotation allows, without Annotated and Union around them."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return alternatives(get_args(annotation)[0])
    if origin is Union or origin is types.UnionType:
        return [member for argument in get_args(annotation) for member in alternatives(argument)]
    return [annotation]


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _step(annotation: Any, key: str) -> list[Any]:
    """The types that stand under a key of this type; empty where there is no such key."""
    if annotation is Any:
        return [Any]
    if _is_section(annotation):
        field = field_map(annotation).get(key)
        if field is None:
            return [Any] if annotation.model_config.get("extra") == "allow" else []
        return alternatives(field.annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (dict, Mapping):
        return alternatives(arguments[1])
    if annotation is dict:
        return [Any]
    if origin in (tuple, list, Sequence) and key.isdigit():
        elements = [argument for argument in arguments if argument is not Ellipsis]
        return [member for element in elements for member in alternatives(element)]
    return []


def types_at(root: type[BaseModel], path: Sequence[str]) -> list[Any]:
    """The types that the schema allows at a dotted path; empty where the path does not exist."""
    here: list[Any] = [root]
    for key in path:
        here = [found for annotation in here for found in _step(annotation, key)]
    return here


def section_at(root: type[BaseModel], path: Sequence[str]) -> type[BaseModel] | None:
    """The section at a dotted path, or None where something else stands there."""
    return next((found for found in types_at(root, path) if _is_section(found)), None)


def field_at(root: type[BaseModel], path: Sequence[str]) -> FieldInfo | None:
    """The field at a dotted path, or None where it is no field of a section."""
    section = section_at(root, path[:-1]) if path else None
    return field_map(section).get(path[-1]) if section is not None else None


def leaves(root: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every field of the schema with its path: sections are entered, lists and free mappings are leaves."""
    for name, field in field_map(root).items():
        sections = [found for found in alternatives(field.annotation) if _is_section(found)]
        if not sections:
            yield (*prefix, name), field
        seen: set[str] = set()
        for section in sections:
            for path, leaf in leaves(section, (*prefix, name)):
                if ".".join(path) not in seen:
                    seen.add(".".join(path))
                    yield path, leaf
