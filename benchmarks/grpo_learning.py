"""How fast GRPO learns the sums: the reward of every step, for one side and one seed. One JSON line at the end.

uv run --group bench benchmarks/grpo_learning.py --side ours|trl --seed 0 [--steps 5]
uv run --group bench benchmarks/grpo_learning.py --side ours --quickstart [--without-lora] --eval --steps 30 --seed 0

The first form is the comparison: the same questions, adapter, objective and learning rate on both sides. The second
is the quick start as it ships (and the same without LoRA), with 64 fixed sums of 1 to 9 sampled at temperature 1
before and after, and 64 sums of 10 to 99, on which nothing is trained.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import StepRecord, print_result, restart_tuned, versions
from work import Work, add_work_arguments, work_of

EVALUATIONS = {"easy": (1, 9), "held_out": (10, 99)}
NUM_EVALUATED = 64
EVALUATION_SEED = 1234


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_arguments(parser)
    parser.add_argument("--side", choices=("ours", "trl"), required=True)
    parser.add_argument("--lr", type=float, default=1e-3, help="not used by the quick start, which has its own")
    parser.add_argument("--micro", type=int, default=16, help="trl: completions of a training forward pass")
    parser.add_argument("--eval", action="store_true", help="ours: sample the fixed prompts before and after")
    parser.add_argument("--eval-completions", type=int, default=1, help="ours: completions of each of these prompts")
    parser.add_argument(
        "--quickstart", action="store_true", help="ours: data, adapter and objective of the quick start"
    )
    parser.add_argument("--without-lora", action="store_true", help="ours: full fine-tuning")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="ours: further overrides")
    arguments = parser.parse_intermixed_args()
    only_ours = arguments.eval or arguments.quickstart or arguments.without_lora or arguments.overrides
    if arguments.side == "trl" and only_ours:
        parser.error("--side trl takes no --eval, --quickstart, --without-lora and overrides")
    restart_tuned(arguments.threads)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    work = work_of(arguments, lr=arguments.lr)

    import torch

    torch.set_num_threads(arguments.threads)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        learn = _learn_ours if arguments.side == "ours" else _learn_trl
        records, evaluations = learn(arguments, work, Path(temporary))
    rewards = [round(record.reward, 4) for record in records]
    print_result(
        {
            "task": "grpo_learning",
            "side": arguments.side,
            "seed": work.seed,
            "settings": "quickstart" if arguments.quickstart else "work",
            "lora": not arguments.without_lora,
            "rewards": rewards,
            "reward_mean_1_5": round(statistics.fmean(rewards[:5]), 4),
            "reward_mean_last_5": round(statistics.fmean(rewards[-5:]), 4),
            **evaluations,
            "seconds": round(time.perf_counter() - begun, 1),
            "overrides": arguments.overrides,
            "versions": versions("nemo-rl-lora", "torch", "transformers", "trl", "peft"),
        }
    )


def _learn_trl(arguments: argparse.Namespace, work: Work, directory: Path) -> tuple[list[StepRecord], dict[str, Any]]:
    from trl_grpo import TrlRun

    from nemo_rl_lora.models.source import resolve_model

    return TrlRun(work, resolve_model(arguments.model).path, arguments.micro, directory).train(), {}


def _learn_ours(arguments: argparse.Namespace, work: Work, directory: Path) -> tuple[list[StepRecord], dict[str, Any]]:
    from ours_grpo import ours_run

    overrides = _ours_overrides(arguments, work, directory)
    evaluations: dict[str, Any] = {}
    with ours_run(overrides) as run:
        if arguments.eval:
            evaluations |= _evaluate(run, overrides, "before", arguments.eval_completions)
        records = run.train()
        if arguments.eval:
            evaluations |= _evaluate(run, overrides, "after", arguments.eval_completions)
    return records, evaluations


def _ours_overrides(arguments: argparse.Namespace, work: Work, directory: Path) -> list[str]:
    from ours_grpo import base_overrides, lora_overrides, loss_overrides, work_overrides

    overrides = base_overrides(directory, num_steps=work.num_steps, seed=work.seed)
    if arguments.quickstart:
        overrides += [f"policy.model_name='{arguments.model}'", "policy.dtensor_cfg.lora_cfg.enabled=true"]
    else:
        overrides += [*work_overrides(work, arguments.model, directory), *lora_overrides(), *loss_overrides()]
    if arguments.without_lora:
        overrides.append("policy.dtensor_cfg.lora_cfg.enabled=false")
    return [*overrides, *arguments.overrides]


def _evaluate(run: Any, overrides: Sequence[str], when: str, num_completions: int) -> dict[str, float]:
    """Mean rewards of the fixed prompts, sampled at temperature 1 from the weights as they are now."""
    from dataclasses import replace

    from nemo_rl_lora.algorithms.batch import rewards_of
    from nemo_rl_lora.evaluation.ask import ask, group_requests
    from nemo_rl_lora.run.metrics import Stopwatch

    algorithm, generation = run.algorithm, run.run.generation
    mode = run.run.sync.mode
    generation.sync_weights(run.run.policy.publish(run.run.num_steps if when == "after" else 0, mode))
    params = replace(
        algorithm.validation_params,
        num_completions=num_completions,
        sampling=replace(algorithm.validation_params.sampling, temperature=1.0, top_p=1.0, top_k=None),
    )
    found = {}
    for name, (low, high) in EVALUATIONS.items():
        prompts = _fixed_prompts(run.run.tokenizer, overrides, low, high)
        groups, _ = ask(generation, group_requests(prompts, params, name), algorithm.environments, Stopwatch())
        found[f"{name}_reward_{when}"] = round(float(rewards_of(groups).mean()), 4)
    return found


def _fixed_prompts(tokenizer: Any, overrides: Sequence[str], low: int, high: int) -> Any:
    """The same sums in every run, as the product makes them of `data.validation`."""
    from nemo_rl_lora.config.load import load_config
    from nemo_rl_lora.data.prompts import load_prompt_sets

    section = f"{{dataset_name: generated_sums, low: {low}, high: {high}, num_rows: {NUM_EVALUATED}, "
    config = load_config(None, [*overrides, f"data.validation={section}seed: {EVALUATION_SEED}}}"], "grpo")
    prompts = load_prompt_sets(config, tokenizer)[1]
    assert prompts is not None
    return prompts[:]


if __name__ == "__main__":
    main()
