"""A reward function of one's own as an environment: `def reward(prompt: str, completion: str, row: dict) -> float`.

It runs in the driver's process, one completion after another, with no time limit.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from nemo_rl_lora.environments.protocol import Environment, Scores
from nemo_rl_lora.shipped_files import existing
from nemo_rl_lora.types import Prompt

RewardFunction = Callable[[str, str, dict[str, Any]], float]


class RewardFunctionEnvironment(Environment):
    """`reference` is `path/to/file.py:function` or `package.module:function`; it is imported here."""

    def __init__(self, name: str, reference: str) -> None:
        self.name = name
        self._key = f"env.{name}.reward_function={reference!r}"
        self._function = load_function(reference, self._key)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Which keys a function needs is known to the function alone."""

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Scores:
        return Scores(rewards=tuple(self._score(p, text) for p, text in zip(prompts, texts, strict=True)))

    def _score(self, prompt: Prompt, text: str) -> float:
        try:
            value = self._function(prompt.text, text, dict(prompt.row))
        except Exception as error:  # the user's code may raise anything
            raise ValueError(
                f"{self._key}: raised {type(error).__name__} ({error}) for row {prompt.index} and the completion "
                f"{text[:80]!r}. Return 0.0 where a completion cannot be scored."
            ) from error
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(
                f"{self._key}: returned {value!r} for row {prompt.index} and the completion {text[:80]!r}. Return a "
                f"finite float."
            )
        return float(value)


def load_function(reference: str, key: str) -> RewardFunction:
    """Import what `reference` names. Raises ValueError if it is absent or does not take three arguments."""
    place, _, attribute = reference.rpartition(":")
    module = _load_file(place, key) if place.endswith(".py") else _load_module(place, key)
    function: Any = module
    for part in attribute.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"{key}: {place} has no function {attribute!r}. It has: {', '.join(names) or 'none'}.")
    try:
        inspect.signature(function).bind("prompt", "completion", {})
    except TypeError as error:
        raise ValueError(
            f"{key}: is called as {attribute}(prompt, completion, row), but {error}. Give it these three parameters."
        ) from error
    return cast(RewardFunction, function)


def _load_file(place: str, key: str) -> ModuleType:
    path = existing(Path(place).expanduser(), place).resolve()
    if not path.is_file():
        raise ValueError(f"{key}: there is no file {path}. Correct the path; it is relative to {Path.cwd()}.")
    module_name = f"_reward_function_{path.stem}_{abs(hash(path))}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's module may raise anything
        del sys.modules[module_name]
        raise ValueError(
            f"{key}: importing {path} raised {type(error).__name__}: {error}. Correct the file."
        ) from error
    return module


def _load_module(place: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except Exception as error:  # the user's module may raise anything
        raise ValueError(
            f"{key}: importing {place} raised {type(error).__name__}: {error}. Correct the name, or give a .py file."
        ) from error
