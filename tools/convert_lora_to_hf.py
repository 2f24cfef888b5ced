"""Export a checkpoint's adapter: merged into its base as a Hugging Face model, or alone in PEFT's format.

uv run tools/convert_lora_to_hf.py --adapter-ckpt STEP --hf-ckpt-path OUTPUT [--hf-model-name BASE]
uv run tools/convert_lora_to_hf.py --adapter-ckpt STEP --hf-ckpt-path OUTPUT --adapter-only
uv run tools/convert_lora_to_hf.py --adapter-ckpt RUN --hf-ckpt-path OUTPUT --all
"""

import sys

from nemo_rl_lora.command_line import silence_vendors
from nemo_rl_lora.export.command import export_main, parse_arguments
from nemo_rl_lora.run_control import main_guard

if __name__ == "__main__":
    silence_vendors()
    sys.exit(main_guard(lambda: export_main(parse_arguments(__doc__))))
