"""Peak memory of one training step over 4, 8 and 16 completions of 512 tokens that share a prompt.

uv run --group bench benchmarks/memory_growth.py [--completions 4 8 16] [--tokens 512] [--prompt-tokens 64]

Each number of completions has a process of its own, in which all completions go through the model in one microbatch.
`step_mib` is the peak of `DTensorPolicy.train_step` above what the loaded policy held before it; linear growth
means that it is proportional to the number of completions. Prints a table, and one JSON line at the end.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from compare import last_json
from measure import print_result, release_free_memory, reset_peak, restart_tuned, rss_mib, versions
from work import DEFAULT_MODEL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--tokens", type=int, default=512, help="of each completion")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a directory or a Hugging Face name")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat-prompt", action="store_true", help="policy.shared_prefix.enabled=false")
    parser.add_argument("--one", action="store_true", help="measure the first number in this process")
    arguments = parser.parse_args()
    if arguments.one:
        restart_tuned(arguments.threads)
        print_result(_measure(arguments))
        return
    rows = [_in_own_process(arguments, number) for number in arguments.completions]
    first = rows[0]
    print(f"{'completions':>11}  {'forward tokens':>14}  {'step MiB':>9}  {'against first':>13}  {'if linear':>9}")
    for row in rows:
        growth = row["step_mib"] / first["step_mib"]
        linear = row["completions"] / first["completions"]
        print(
            f"{row['completions']:>11}  {row['forward_tokens']:>14}  {row['step_mib']:>9.1f}  {growth:>13.2f}  "
            f"{linear:>9.2f}"
        )
    print_result(
        {
            "task": "memory_growth",
            "tokens": arguments.tokens,
            "prompt_tokens": arguments.prompt_tokens,
            "shared_prefix": not arguments.repeat_prompt,
            "rows": rows,
            "versions": versions("nemo-rl-lora", "torch", "transformers"),
        }
    )


def _in_own_process(arguments: argparse.Namespace, number: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", "--completions", str(number), "--tokens", str(arguments.tokens)]
    command += ["--prompt-tokens", str(arguments.prompt_tokens), "--model", arguments.model]
    command += ["--threads", str(arguments.threads), *(["--repeat-prompt"] if arguments.repeat_prompt else [])]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    row = last_json(output)
    assert row is not None, output
    return row


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch
    from ours_grpo import base_overrides, lora_overrides, ours_run

    torch.set_num_threads(arguments.threads)
    number = arguments.completions[0]
    budget = number * (arguments.prompt_tokens + arguments.tokens)
    with tempfile.TemporaryDirectory() as temporary:
        overrides = [
            *base_overrides(Path(temporary), num_steps=1, seed=0),
            *lora_overrides(),
            f"policy.model_name='{arguments.model}'",
            f"policy.max_total_sequence_length={arguments.prompt_tokens + arguments.tokens}",
            f"policy.dynamic_batching.train_mb_tokens={budget}",
            f"++policy.shared_prefix.max_row_tokens={budget}",
            f"++policy.shared_prefix.enabled={'false' if arguments.repeat_prompt else 'true'}",
        ]
        with ours_run(overrides) as run:
            vocabulary = len(run.run.tokenizer)
            batch = _group(number, arguments.prompt_tokens, arguments.tokens, vocabulary)
            run.run.policy.train_step(_group(2, 8, 8, vocabulary), run.algorithm.loss)  # makes the optimizer's state
            release_free_memory()  # or the step would live in what loading has left
            before = rss_mib(peak=False)
            reset_peak()
            output = run.run.policy.train_step(batch, run.algorithm.loss)
            peak = rss_mib(peak=True)
    return {
        "completions": number,
        "forward_tokens": output.num_forward_tokens,
        "before_mib": before,
        "peak_rss_mib": peak,
        "step_mib": round(peak - before, 1),
    }


def _group(num_completions: int, num_prompt: int, num_completion: int, vocabulary: int) -> Any:
    """A batch of one group: a prompt and completions of random tokens, advantages of both signs."""
    import torch

    from nemo_rl_lora.algorithms.losses.policy import count_denominators
    from nemo_rl_lora.types import Batch

    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(vocabulary, (num_completions, num_prompt + num_completion), generator=generator)
    token_ids[:, :num_prompt] = token_ids[0, :num_prompt].clone()
    loss_mask = torch.ones_like(token_ids, dtype=torch.bool)
    loss_mask[:, :num_prompt] = False
    return Batch(
        token_ids=token_ids,
        loss_mask=loss_mask,
        sequence_length=torch.full((num_completions,), token_ids.shape[1]),
        prompt_length=torch.full((num_completions,), num_prompt),
        group_index=torch.zeros(num_completions, dtype=torch.int64),
        denominators=count_denominators(loss_mask),
        generation_logprobs=torch.full(token_ids.shape, -10.0).masked_fill(~loss_mask, 0.0),
        advantages=torch.linspace(-1.0, 1.0, num_completions),
    )


if __name__ == "__main__":
    main()
