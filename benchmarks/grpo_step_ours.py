"""The seconds and the memory of a GRPO step of this product. One JSON line at the end.

uv run --group bench benchmarks/grpo_step_ours.py [--work long] [--steps 5] [key=value ...]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from measure import print_result, reset_peak, restart_tuned, rss_mib, step_summary, versions
from work import add_choice_of_work, add_work_arguments, work_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_arguments(parser)
    add_choice_of_work(parser)
    parser.add_argument("--train-mb-tokens", type=int, default=4096, help="tokens of a training microbatch")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further overrides of the configuration")
    arguments = parser.parse_intermixed_args()
    restart_tuned(arguments.threads)
    work = work_of(arguments)

    import torch
    from ours_grpo import base_overrides, lora_overrides, loss_overrides, ours_run, work_overrides

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        overrides = [
            *base_overrides(directory, num_steps=work.num_steps, seed=work.seed),
            *work_overrides(work, arguments.model, directory),
            *lora_overrides(),
            *loss_overrides(),
            f"policy.dynamic_batching.train_mb_tokens={arguments.train_mb_tokens}",
            *arguments.overrides,
        ]
        with ours_run(overrides) as run:
            reset_peak()
            setup_mib = rss_mib(peak=False)
            records = run.train()
            prompt_tokens = run.log.training[-1][1]["mean_prompt_length"]
            forward_tokens = [int(metrics["num_forward_tokens"]) for _, metrics in run.log.training]
    print_result(
        {
            "task": "grpo_step",
            "side": "ours",
            "work": work.name,
            "micro_batch": f"{arguments.train_mb_tokens} tokens",
            **step_summary(records),
            "prompt_tokens": prompt_tokens,
            "forward_tokens": forward_tokens,
            "peak_rss_mib": rss_mib(peak=True),
            "setup_rss_mib": setup_mib,
            "threads": torch.get_num_threads(),
            "seed": work.seed,
            "overrides": arguments.overrides,
            "versions": versions("nemo-rl-lora", "torch", "transformers", "nemo-automodel"),
        }
    )


if __name__ == "__main__":
    main()
