"""Certify what merging costs a checkpoint's adapter: merge it, or send it beside the base.

uv run tools/parity.py --checkpoint DIR [--output DIR] [--model NAME]
"""

import sys

from nemo_rl_lora.run.cli import run

if __name__ == "__main__":
    sys.exit(run("parity", program="uv run tools/parity.py"))
