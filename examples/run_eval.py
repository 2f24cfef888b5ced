"""Evaluate a model, or adapters on it: accuracy and pass@k.

uv run examples/run_eval.py
uv run examples/run_eval.py "eval.adapters=[results/grpo/step_30]"
uv run examples/run_eval.py --config FILE [--plan] [a.b=c] [+a.b=c] [++a.b=c] [~a.b]
"""

import sys

from nemo_rl_lora.run.cli import run

if __name__ == "__main__":
    sys.exit(run("eval", program="uv run examples/run_eval.py"))
