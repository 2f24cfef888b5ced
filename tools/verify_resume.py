"""Go on from a checkpoint in another process, and compare every step with the run that was not interrupted.

uv run tools/verify_resume.py --checkpoint STEP --steps K [--record LOG_DIRECTORY]
"""

import sys

from nemo_rl_lora.run.cli import run

if __name__ == "__main__":
    sys.exit(run("verify-resume", program="uv run tools/verify_resume.py"))
