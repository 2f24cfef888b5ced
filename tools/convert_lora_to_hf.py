"""Export a checkpoint's adapter: merged into its base as a Hugging Face model, or alone in PEFT's format.

uv run tools/convert_lora_to_hf.py --adapter-ckpt STEP --hf-ckpt-path OUTPUT [--hf-model-name BASE]
uv run tools/convert_lora_to_hf.py --adapter-ckpt STEP --hf-ckpt-path OUTPUT --adapter-only
uv run tools/convert_lora_to_hf.py --adapter-ckpt RUN --hf-ckpt-path OUTPUT --all
"""

import sys

from nemo_rl_lora.run.cli import run

if __name__ == "__main__":
    sys.exit(run("export", program="uv run tools/convert_lora_to_hf.py"))
