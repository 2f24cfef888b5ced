"""Look at configurations: what a file means once it is expanded, how two files differ, what another tool's is here.

uv run tools/config_cli.py expand FILE [overrides]
uv run tools/config_cli.py compare LEFT RIGHT
uv run tools/config_cli.py translate FILE [--output FILE]
"""

import sys

from nemo_rl_lora.run.cli import run

if __name__ == "__main__":
    sys.exit(run("config", program="uv run tools/config_cli.py"))
