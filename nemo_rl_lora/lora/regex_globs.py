"""Regular expressions of module names as the globs that match the same names.

Contract: letters, digits, dots, `.*`, `^`, `$`, `[abc]` and alternatives in brackets have a glob; anything else is a
ValueError that names the key. A bare dot is taken for the dot of a name, as everybody means it.
"""

from __future__ import annotations

import re

_GROUP = re.compile(r"\((?:\?:)?([^()]*)\)(?![*+?{])")
_SIMPLE = re.compile(r"\^?(?:[\w-]|\\?\.|\.\*|\[[\w]+\])*\$?")
_MAX_GLOBS = 64


def globs_of_regex(pattern: str, key: str, *, whole: bool) -> tuple[str, ...]:
    """The globs of full names that this expression matches: all of the name (`whole`), or any part of it."""
    expressions = _alternatives(pattern)
    if not pattern or not expressions or not all(_SIMPLE.fullmatch(each) for each in expressions):
        raise ValueError(
            f"{key}={pattern!r}: is a regular expression that no list of names and globs stands for. List the modules "
            f"by name."
        )
    return tuple(dict.fromkeys(_glob(each, pattern, key, whole=whole) for each in expressions))


def _alternatives(pattern: str) -> list[str]:
    """The expressions without brackets and bars that together mean this one; none where they are too many."""
    pending, plain = [pattern], list[str]()
    while pending:
        each = pending.pop(0)
        if group := _GROUP.search(each):
            pending = [each[: group.start()] + part + each[group.end() :] for part in group[1].split("|")] + pending
        else:
            plain += each.split("|")
        if len(pending) + len(plain) > _MAX_GLOBS:
            return []
    return plain


def _glob(expression: str, pattern: str, key: str, *, whole: bool) -> str:
    starts, ends = whole or expression.startswith("^"), whole or expression.endswith("$")
    body = expression.removeprefix("^").removesuffix("$").replace(".*", "*").replace("\\.", ".")
    glob = re.sub(r"\*+", "*", f"{'' if starts else '*'}{body}{'' if ends else '*'}")
    if not any(wildcard in glob for wildcard in "*[") and "." not in glob:
        raise ValueError(
            f"{key}={pattern!r}: is compared with all of a module's name, of which {glob!r} is the last part at most. "
            f"Write [{glob}], a list."
        )
    return glob
