"""A reward function of one's own: found by its name, recognised by its parameters, and called.

The same in the driver's process and in a worker (worker.py). What it raises and what is no reward come back as Failed.
"""

from __future__ import annotations

import asyncio
import copy
import importlib
import importlib.util
import inspect
import math
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from nemo_rl_lora.environments.processes import Failed
from nemo_rl_lora.shipped_files import existing

Form = Literal["trl", "verl", "named", "positional"]
Rewards = tuple[float | None, ...]  # None for a completion that cannot be scored

_FORMS: dict[Form, set[str]] = {  # by the parameters that show them
    "trl": {"completions"},
    "verl": {"solution_str", "ground_truth"},
    "named": {"prompt", "completion", "row"},
}
_GIVEN = {
    "trl": {"prompts", "completions", "completion_ids", "rows"},
    "verl": {*_FORMS["verl"], "data_source", "extra_info"},
    "named": {*_FORMS["named"], "token_ids"},
}
_PLACES = (  # words of names that say what a parameter by position is
    {"prompt", "question", "query", "problem", "instruction"},
    {"completion", "response", "output", "generation", "prediction", "pred", "solution", "answer"},
    {"row", "example", "record"},
)
_NO_PLACE = {"self", "cls", "expected", "truth", "gold", "label", "reference", "target", "source", "queries"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What one call is about: a completion, or all of a rollout where the function takes lists."""

    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    token_ids: tuple[list[int] | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a function once it is imported."""

    form: Form
    is_async: bool
    file: str | None  # that holds it
    keys: tuple[str, ...] = ()  # of the rows, that one as TRL calls it cannot be called without


class RewardFunction:
    """`reference` is `path/to/file.py:function` or `package.module:function`. It is imported here; ValueError where
    that fails. `in_worker`: Ctrl-C never comes here, so that a KeyboardInterrupt is the function's own."""

    def __init__(self, reference: str, key: str, timeout_seconds: float | None, in_worker: bool) -> None:
        place, _, attribute = reference.rpartition(":")
        self._in_worker, self._timeout_seconds = in_worker, timeout_seconds
        module = self._load_file(place, key) if place.endswith(".py") else self._load_module(place, key)
        self._function = _found(module, place, attribute, key)
        is_async = any(map(inspect.iscoroutinefunction, (self._function, getattr(self._function, "__call__", None))))  # noqa: B004
        file = str(_file_of(place)) if place.endswith(".py") else getattr(module, "__file__", None)
        form, parameters = _form_of(self._function, attribute, key)
        keys = _required(parameters) - _GIVEN["trl"] if form == "trl" else ()
        self.facts = Facts(form=form, is_async=is_async, file=file, keys=tuple(sorted(keys)))
        self.is_async = is_async
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self._taken = None if takes_all else parameters.keys()

    def call(self, call: Call) -> Rewards | Failed:
        """A reward for each completion, None for one that cannot be scored. Only Ctrl-C is raised."""
        try:
            positional, named = self._arguments(call)
            return self._rewards(self._function(*positional, **named), call)
        except BaseException as error:  # the user's code may raise anything, SystemExit too
            return self._failed(error)

    async def call_async(self, call: Call) -> Rewards | Failed:
        """The same of an async function. Beyond its time it is cancelled, and not waited for."""
        task = asyncio.ensure_future(self._awaited(call))
        done, _ = await asyncio.wait({task}, timeout=self._timeout_seconds)
        if done:
            return task.result()
        task.cancel()
        return Failed(kind="timeout", text="took longer")

    async def _awaited(self, call: Call) -> Rewards | Failed:
        try:
            positional, named = self._arguments(call)
            return self._rewards(await self._function(*positional, **named), call)
        except BaseException as error:  # as above; what a task raises of these would end the event loop
            return self._failed(error)

    def _arguments(self, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rows = [copy.deepcopy(dict(row)) for row in call.rows]  # the function may change its own
        if self.facts.form == "trl":  # every key of the rows as a list
            keys = dict.fromkeys([*(key for row in rows for key in row), *self.facts.keys])
            named: dict[str, Any] = {key: [row.get(key) for row in rows] for key in keys}
            named |= {"prompts": list(call.prompts), "completions": list(call.texts), "rows": rows}
            named["completion_ids"] = list(call.token_ids)
        else:
            (prompt,), (text,), (row,), (token_ids,) = call.prompts, call.texts, rows, call.token_ids
            if self.facts.form == "positional":
                return (prompt, text, row), {}
            named = {"prompt": prompt, "completion": text, "row": row, "token_ids": token_ids}
            if self.facts.form == "verl":
                named = {"data_source": row.get("data_source"), "solution_str": text}
                named |= {"ground_truth": ground_truth_of(row), "extra_info": row.get("extra_info")}
        return (), {name: value for name, value in named.items() if self._taken is None or name in self._taken}

    def _rewards(self, returned: Any, call: Call) -> Rewards | Failed:
        values = returned
        if self.facts.form != "trl":
            is_verls = self.facts.form == "verl" and isinstance(returned, dict)
            values = [returned.get("score") if is_verls else returned]
        elif hasattr(returned, "tolist"):
            values = returned.tolist()
        if not isinstance(values, (list, tuple)) or len(values) != len(call.texts):
            text = f"takes `completions`, a list, and returned {_show(values)} for {len(call.texts)} of them"
            return Failed(kind="value", text=text, index=-1)
        rewards = []
        for index, value in enumerate(values):
            number = _number(value)
            if value is not None and number is None:
                return Failed(kind="value", text=f"returned {_show(value)}", index=index)
            rewards.append(number)
        return tuple(rewards)

    def _failed(self, error: BaseException) -> Failed:
        """What the function raised. Ctrl-C is raised on."""
        self._raise_ctrl_c(error)
        kind = "exit" if isinstance(error, SystemExit) else "exception"
        return Failed(kind=kind, text=f"raised {_named(error)}", trace="".join(traceback.format_exception(error)))

    def _raise_ctrl_c(self, error: BaseException) -> None:
        """It comes to the main thread of the driver only."""
        is_main = threading.current_thread() is threading.main_thread()
        if type(error) is KeyboardInterrupt and is_main and not self._in_worker:
            raise error

    def _load_file(self, place: str, key: str) -> ModuleType:
        path = _file_of(place)
        if not path.is_file():
            raise ValueError(f"{key}: there is no file {path}. Correct the path; it is relative to {Path.cwd()}.")
        module_name = f"_reward_function_{path.stem}_{abs(hash(path))}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None, path
        assert spec.loader is not None, path
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        neighbours = str(path.parent)
        sys.path.insert(0, neighbours)  # as where Python runs the file
        try:
            spec.loader.exec_module(module)
        except BaseException as error:  # the user's module may raise anything, SystemExit too
            self._raise_ctrl_c(error)
            sys.modules.pop(module_name, None)
            raise ValueError(f"{key}: importing {path} raised {_named(error)}. Correct the file.") from error
        finally:
            sys.path.remove(neighbours)
            if neighbours not in sys.path:
                sys.path.append(neighbours)  # for what the function imports when it is called
        return module

    def _load_module(self, place: str, key: str) -> ModuleType:
        try:
            return importlib.import_module(place)
        except BaseException as error:  # the user's module may raise anything, SystemExit too
            self._raise_ctrl_c(error)
            raise ValueError(
                f"{key}: importing {place} raised {_named(error)}. Correct the name, or give a .py file."
            ) from error


def ground_truth_of(row: Mapping[str, Any]) -> Any:
    """What verl calls the expected answer: of `reward_model`, as its files have it, or the row's own; or None."""
    nested = row.get("reward_model")
    places = [nested if isinstance(nested, Mapping) else {}, row]
    for place, key in ((places[0], "ground_truth"), (places[1], "ground_truth"), (places[1], "answer")):
        if place.get(key) is not None:
            return place[key]
    return None


def _found(module: ModuleType, place: str, attribute: str, key: str) -> Callable[..., Any]:
    function: Any = module
    owner: Any = None
    for part in attribute.split("."):
        owner, function = function, getattr(function, part, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"{key}: {place} has no function {attribute!r}. It has: {', '.join(names) or 'none'}.")
    if inspect.isclass(function):
        raise ValueError(f"{key}: is a class, and calling it makes an object, no reward. Name a function or an object.")
    stored = inspect.getattr_static(owner, part, None)
    needs_object = inspect.isfunction(stored) or inspect.ismethoddescriptor(stored)
    if inspect.isclass(owner) and needs_object and not isinstance(stored, (staticmethod, classmethod)):
        raise ValueError(
            f"{key}: is a method of the class {owner.__name__}, called without an object. Make one in the file, "
            f"`scorer = {owner.__name__}()`, and name its method: scorer.{part}."
        )
    return function


def _form_of(function: Callable[..., Any], attribute: str, key: str) -> tuple[Form, Mapping[str, inspect.Parameter]]:
    """How it is called, and its parameters. ValueError where it cannot be."""
    wrapper = f"`def reward(prompt, completion, row):` `return {attribute}(...)`"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{key}: what it takes cannot be told ({error}). Add a function that calls it: {wrapper}."
        ) from error
    parameters = signature.parameters
    forms: list[Form] = [form for form, shown_by in _FORMS.items() if shown_by <= parameters.keys()]
    form = forms[0] if forms else "positional"
    try:
        if form == "positional":
            signature.bind("prompt", "completion", {})
            _refuse_misplaced(parameters)
        else:  # the others that one as TRL calls it takes are keys of the rows
            named = _GIVEN[form] | (_required(parameters) if form == "trl" else set())
            signature.bind(**dict.fromkeys(named & parameters.keys()))
    except TypeError as error:
        raise ValueError(
            f"{key}: is called as {attribute}(prompt, completion, row), but {error}. Give it these three parameters, "
            f"or add a function that has them: {wrapper}."
        ) from error
    return form, parameters


def _required(parameters: Mapping[str, inspect.Parameter]) -> set[str]:
    """Those that have no default."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name for name, each in parameters.items() if each.default is each.empty and each.kind not in variable}


def _refuse_misplaced(parameters: Mapping[str, inspect.Parameter]) -> None:
    """TypeError where a parameter's name says that it is something else than what comes in its place."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, each in parameters.items() if each.kind in kinds]
    known = {*_NO_PLACE, *(word for words in _PLACES for word in words)}
    for name, given, place in zip(names, _PLACES, ("prompt", "completion", "row"), strict=False):
        words = set(name.lower().split("_"))
        is_list = any(word.removesuffix("s") in known - {word} for word in words)
        is_expected = place != "row" and words & _NO_PLACE  # a gold answer is no completion, and a gold row is a row
        if is_list or is_expected or (words & known and not words & given):
            raise TypeError(f"its parameter {name!r} would get the {place}")


def _number(value: Any) -> float | None:
    """A finite number as a float, anything else as None."""
    try:
        number = float(value) if hasattr(type(value), "__float__") or hasattr(type(value), "__index__") else None
    except (TypeError, ValueError, OverflowError, RuntimeError):  # an array of several, or too large
        return None
    return number if number is not None and math.isfinite(number) else None


def _show(value: Any) -> str:
    from nemo_rl_lora.config.errors import show  # with pydantic, which most workers never need

    return show(value)


def _file_of(place: str) -> Path:
    return existing(Path(place).expanduser(), place).resolve()


def _named(error: BaseException) -> str:
    return f"{type(error).__name__} ({error})"
