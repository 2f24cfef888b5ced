"""`python -m nemo_rl_lora`: the command line where no script is installed."""

import sys

from nemo_rl_lora.run.cli import main

if __name__ == "__main__":
    sys.exit(main())
