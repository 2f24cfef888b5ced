"""Train with DPO.

uv run examples/run_dpo.py policy.dtensor_cfg.lora_cfg.enabled=true
uv run examples/run_dpo.py --config FILE [--plan] [a.b=c] [+a.b=c] [++a.b=c] [~a.b]
"""

import sys

from nemo_rl_lora.run.cli import run

if __name__ == "__main__":
    sys.exit(run("dpo", program="uv run examples/run_dpo.py"))
