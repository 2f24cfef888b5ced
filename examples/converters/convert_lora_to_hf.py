"""NeMo RL's place for tools/convert_lora_to_hf.py: a checkpoint's adapter, merged into its base or alone for PEFT.

uv run --extra mcore python examples/converters/convert_lora_to_hf.py --base-ckpt BASE --adapter-ckpt STEP \
    --hf-model-name NAME --hf-ckpt-path OUTPUT [--adapter-only]

BASE is a Hugging Face directory, and STEP a step of a run here, of either backend (not NeMo RL's `iter_N`).
"""

import sys

from nemo_rl_lora.run.cli import run

if __name__ == "__main__":
    sys.exit(run("export", program="uv run examples/converters/convert_lora_to_hf.py"))
