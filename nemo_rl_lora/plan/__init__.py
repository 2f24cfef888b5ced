"""What a run would do, known before a weight is loaded."""

from nemo_rl_lora.plan.plan import Plan, make_plan
from nemo_rl_lora.plan.show import print_plan, render_plan

__all__ = ["Plan", "make_plan", "print_plan", "render_plan"]
