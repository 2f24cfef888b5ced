"""What lies beside a model's weights: its configuration and its tokenizer, without the code that they may name.

Contract: only files of known names are copied, and no `auto_map`. Reads and writes no weight.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CODE = "auto_map"  # names Python code that a directory brings along, which is not exported
BASE_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "normalizer.json", "*.model", "*.tiktoken"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)


def known_files(directory: Path, *more: str) -> list[Path]:
    """The files of a directory that a tokenizer is known to consist of, and `more`."""
    return sorted({path for pattern in (*_TOKENIZER_FILES, *more) for path in directory.glob(pattern)})


def copy_files(directory: Path, files: Sequence[Path], target: Path) -> None:
    """Copy files of a directory to their places in another one."""
    for path in files:
        place = target / path.relative_to(directory)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)
        if path.name == "tokenizer_config.json" and isinstance(config := _read_json(path), dict) and CODE in config:
            del config[CODE]
            _write_json(place, config)


def write_config(target: Path, config: Mapping[str, Any], dtype: str | None) -> None:
    """Write config.json, with the dtype that the weights have now; None: as they had it."""
    kept = {key: value for key, value in config.items() if key != CODE}
    if dtype is not None:
        kept.pop("torch_dtype", None)
        kept["dtype"] = dtype
    _write_json(target / "config.json", kept)


def _read_json(path: Path) -> Any:
    """What a file holds; None where that is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
