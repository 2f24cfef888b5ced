"""Train with SFT.

uv run examples/run_sft.py policy.dtensor_cfg.lora_cfg.enabled=true
uv run examples/run_sft.py --config FILE [--plan] [a.b=c] [+a.b=c] [++a.b=c] [~a.b]
"""

import sys

from nemo_rl_lora.command_line import driver_arguments, train_main
from nemo_rl_lora.run_control import main_guard

if __name__ == "__main__":
    sys.exit(main_guard(lambda: train_main("sft", driver_arguments("sft", __doc__))))
