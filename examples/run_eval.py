"""Evaluate a model, or adapters on it: accuracy and pass@k.

uv run examples/run_eval.py
uv run examples/run_eval.py "eval.adapters=[results/grpo/step_30]"
uv run examples/run_eval.py --config FILE [--plan] [a.b=c] [+a.b=c] [++a.b=c] [~a.b]
"""

import sys

from nemo_rl_lora.command_line import driver_arguments
from nemo_rl_lora.evaluation.command import eval_main
from nemo_rl_lora.run_control import main_guard

if __name__ == "__main__":
    sys.exit(main_guard(lambda: eval_main(driver_arguments("eval", __doc__))))
