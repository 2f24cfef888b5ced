"""Convert an adapter between PEFT's form and megatron-bridge's two, and say beforehand how exact that is.

uv run tools/transcode_adapter.py --adapter DIR --to peft|megatron-shared|megatron-canonical --out DIR [--plan]

Exit code: 0 done, 2 impossible or a wrong input (nothing was written).
"""

import argparse
import json
import sys
from pathlib import Path

from nemo_rl_lora.command_line import silence_vendors
from nemo_rl_lora.lora.files import ADAPTER_CONFIG_FILE
from nemo_rl_lora.lora.fit import adapter_directory
from nemo_rl_lora.model_source import resolve_model
from nemo_rl_lora.run_control import EXIT_OK, main_guard


def main(argv: list[str] | None = None) -> int:
    """Judge the conversion, show the verdict, and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="a step, a PEFT directory, or what this tool wrote")
    parser.add_argument("--to", choices=["peft", "megatron-shared", "megatron-canonical"], required=True)
    parser.add_argument("--out", type=Path, required=True, help="the directory to make")
    parser.add_argument("--hf-model-name", help="the base, for its shapes (default: what the adapter says it is for)")
    parser.add_argument("--plan", action="store_true", help="say how exact it would be, and write nothing")
    arguments = parser.parse_args(argv)
    if arguments.out.exists():
        raise ValueError(f"--out={str(arguments.out)!r}: exists already. Name another directory.")
    from transformers import AutoConfig

    from nemo_rl_lora import transcode
    from nemo_rl_lora.policy.megatron.families import read_family

    config_file = adapter_directory(arguments.adapter) / ADAPTER_CONFIG_FILE
    recorded = json.loads(config_file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    source = resolve_model(arguments.hf_model_name or recorded or "", "--hf-model-name", weights=False)
    family = read_family(AutoConfig.from_pretrained(source.path), source.name, 1)
    adapter = transcode.read(arguments.adapter, family)
    planned = transcode.plan(adapter, arguments.to, family)
    print(f"{adapter.form} to {arguments.to}: {planned.label}, dim {planned.dim}")
    for reason in planned.reasons:
        print(f"  {reason}")
    if planned.label == "impossible":
        raise ValueError(f"--to={arguments.to!r}: {planned.reasons[0]}. Keep PEFT's form, which any adapter has.")
    if not arguments.plan:
        transcode.write(arguments.out, adapter, arguments.to, family, planned)
        print(f"Written: {arguments.out}")
    return EXIT_OK


if __name__ == "__main__":
    silence_vendors()
    sys.exit(main_guard(main))
