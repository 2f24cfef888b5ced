"""Convert an adapter between PEFT's form and megatron-bridge's two, and say beforehand how exact that is.

uv run tools/transcode_adapter.py --adapter DIR --to peft|megatron-shared|megatron-canonical --out DIR [--plan]
"""

import sys

from nemo_rl_lora.run.cli import run

if __name__ == "__main__":
    sys.exit(run("transcode", program="uv run tools/transcode_adapter.py"))
