"""Go on from a checkpoint in another process, and compare every step with the run that was not interrupted.

uv run tools/verify_resume.py --checkpoint STEP --steps K [--record LOG_DIRECTORY]
"""

import sys

from nemo_rl_lora.resume_check import parse_arguments, verify_resume
from nemo_rl_lora.run_control import main_guard

if __name__ == "__main__":
    sys.exit(main_guard(lambda: verify_resume(parse_arguments(__doc__))))
