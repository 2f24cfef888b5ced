"""Runs of the GRPO driver on a tiny random model, with every read of a configuration key recorded.

A read is what product code asks a section for after loading: validators have run by then, and model_dump, repr and
comparison go past attribute access. LoRA blocks are read as a whole (model_dump), so the fields of the LoraSpec that
comes of them are recorded as well, apart from its own checks.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch  # before a driver's main, which would start the process again to set up one without torch
from pydantic import BaseModel

from nemo_rl_lora.config.base import Section
from nemo_rl_lora.config.master import Algorithm
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.run import drivers

assert torch.__version__


class Reads:
    """Dotted keys, and fields of LoraSpec, that were read."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.spec_fields: set[str] = set()
        self._paths: dict[int, str] = {}
        self._kept: list[BaseModel] = []

    def watch(self, config: BaseModel) -> None:
        """Record the reads of this configuration's sections."""
        self._kept.append(config)  # an id is this section's as long as the section lives
        for path, section in _sections(config, ""):
            self._paths[id(section)] = path

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Sections, and LoraSpec, report what is read of them."""

        def of_section(section: Section, name: str) -> Any:
            path = self._paths.get(id(section))
            if path is not None and name in type(section).model_fields:
                self.keys.add(path + (type(section).model_fields[name].alias or name))
            return object.__getattribute__(section, name)

        def of_spec(spec: LoraSpec, name: str) -> Any:
            if sys._getframe(1).f_code.co_name != "__post_init__":  # its own checks
                self.spec_fields.add(name)
            return object.__getattribute__(spec, name)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Section, "__getattribute__", of_section)
            patch.setattr(LoraSpec, "__getattribute__", of_spec)
            yield


def traced_run(
    reads: Reads,
    overrides: list[str],
    *,
    plan: bool = False,
    algorithm: Algorithm = "grpo",
    file: Path | None = None,
) -> int:
    """The driver's own main with these overrides; reads are recorded from the end of loading on."""
    load = drivers.load_config

    def load_and_watch(*args: Any) -> Any:
        config = load(*args)
        reads.watch(config)
        return config

    arguments = argparse.Namespace(
        driver=algorithm, config=file, overrides=overrides, plan=plan, started=time.monotonic()
    )
    with pytest.MonkeyPatch.context() as patch, reads.recording():
        patch.setattr(drivers, "load_config", load_and_watch)
        patch.setattr("nemo_rl_lora.run.console.setup_logging", lambda *_, **__: None)  # pytest has its own handlers
        return drivers.main(arguments)


def _sections(section: BaseModel, prefix: str) -> Iterator[tuple[str, BaseModel]]:
    yield prefix, section
    for name, field in type(section).model_fields.items():
        value = section.__dict__[name]
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, BaseModel):
                yield from _sections(item, f"{prefix}{field.alias or name}.")
    for name, item in (section.__pydantic_extra__ or {}).items():
        yield from _sections(item, f"{prefix}{name}.")
