"""The seconds and the memory of a GRPO step of TRL + PEFT on the same work. One JSON line at the end.

uv run --group bench benchmarks/grpo_step_trl.py --micro 4|8|16|64 [--generation WAY] [--work long] [--steps 5]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from measure import print_result, reset_peak, restart_tuned, rss_mib, step_summary, versions
from work import add_choice_of_work, add_work_arguments, work_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_arguments(parser)
    add_choice_of_work(parser)
    parser.add_argument("--micro", type=int, default=16, help="completions of a training forward pass")
    parser.add_argument(
        "--generation",
        choices=("generate", "continuous", "vllm"),
        default="generate",
        help="transformers' generate or its continuous batching, or vLLM in the trainer's process",
    )
    arguments = parser.parse_args()
    restart_tuned(arguments.threads)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    work = work_of(arguments)

    import torch
    from trl_grpo import TrlRun

    from nemo_rl_lora.models.source import resolve_model

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        model = resolve_model(arguments.model).path
        run = TrlRun(work, model, arguments.micro, Path(temporary), arguments.generation)
        reset_peak()
        setup_mib = rss_mib(peak=False)
        records = run.train()
    print_result(
        {
            "task": "grpo_step",
            "side": "trl",
            "work": work.name,
            "micro_batch": f"{arguments.micro} completions",
            "generation": arguments.generation,
            **step_summary(records),
            "prompt_tokens": run.prompt_tokens,
            "peak_rss_mib": rss_mib(peak=True),
            "setup_rss_mib": setup_mib,
            "threads": torch.get_num_threads(),
            "seed": work.seed,
            "versions": versions("torch", "transformers", "trl", "peft", "accelerate"),
        }
    )


if __name__ == "__main__":
    main()
