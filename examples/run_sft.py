"""Train with SFT.

uv run examples/run_sft.py policy.dtensor_cfg.lora_cfg.enabled=true
uv run examples/run_sft.py --config FILE [--plan] [a.b=c] [+a.b=c] [++a.b=c] [~a.b]
"""

import sys

from nemo_rl_lora.run.cli import run

if __name__ == "__main__":
    sys.exit(run("sft", program="uv run examples/run_sft.py"))
