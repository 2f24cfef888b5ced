"""Transcoding from the command line: judge the conversion of an adapter, show the verdict, and convert."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from nemo_rl_lora.run.control import EXIT_OK


def declare(parser: argparse.ArgumentParser) -> None:
    """The adapter, the form that is wanted, and where it goes."""
    parser.add_argument("--adapter", type=Path, required=True, help="a step, a PEFT directory, or what this tool wrote")
    parser.add_argument("--to", choices=["peft", "megatron-shared", "megatron-canonical"], required=True)
    parser.add_argument("--out", type=Path, required=True, help="the directory to make")
    parser.add_argument("--hf-model-name", help="the base, for its shapes (default: what the adapter says it is for)")
    parser.add_argument("--plan", action="store_true", help="say how exact it would be, and write nothing")


def main(arguments: argparse.Namespace) -> int:
    """0; ValueError where the conversion is impossible or an input is wrong, before anything is written."""
    try:
        exists = arguments.out.exists()
    except OSError as error:
        raise ValueError(f"--out={str(arguments.out)!r}: cannot be made ({error.strerror}). Name another.") from error
    if exists:
        raise ValueError(f"--out={str(arguments.out)!r}: exists already. Name another directory.")
    from transformers import AutoConfig

    from nemo_rl_lora.export import transcode
    from nemo_rl_lora.lora.files import ADAPTER_CONFIG_FILE
    from nemo_rl_lora.lora.fit import adapter_directory
    from nemo_rl_lora.models.source import resolve_model
    from nemo_rl_lora.policy.megatron.families import read_family

    flag = f"--adapter={str(arguments.adapter)!r}"
    try:
        config_file = adapter_directory(arguments.adapter) / ADAPTER_CONFIG_FILE
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error
    recorded = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    source = resolve_model(arguments.hf_model_name or str(recorded or ""), "--hf-model-name", weights=False)
    family = read_family(AutoConfig.from_pretrained(source.path), source.name, 1)
    try:
        adapter = transcode.read(arguments.adapter, family)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error
    planned = transcode.plan(adapter, arguments.to, family)
    sys.stdout.write(f"{adapter.form} to {arguments.to}: {planned.label}, dim {planned.dim}\n")
    for reason in planned.reasons:
        sys.stdout.write(f"  {reason}\n")
    if planned.label == "impossible":
        raise ValueError(f"--to={arguments.to!r}: {planned.reasons[0]}. Keep PEFT's form, which any adapter has.")
    if not arguments.plan:
        transcode.write(arguments.out, adapter, arguments.to, family, planned)
        sys.stdout.write(f"Written: {arguments.out}\n")
    return EXIT_OK
