"""Train with GRPO.

uv run examples/run_grpo.py policy.dtensor_cfg.lora_cfg.enabled=true
uv run examples/run_grpo.py --config FILE [--plan] [a.b=c] [+a.b=c] [++a.b=c] [~a.b]
"""

import sys

from nemo_rl_lora.run.cli import run

if __name__ == "__main__":
    sys.exit(run("grpo", program="uv run examples/run_grpo.py"))
