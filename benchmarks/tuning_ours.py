"""The speed and the memory of an SFT or DPO step of this product. One JSON line at the end.

uv run --group bench benchmarks/tuning_ours.py --task sft|dpo --data DIR [--steps 3] [key=value ...]

The product's own start, build and loop under overrides. A DPO step has its reference pass in it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path

from measure import print_result, reset_peak, restart_tuned, rss_mib, versions
from tuning_work import BATCH_ROWS, BETA, LR, MAX_TOKENS, add_tuning_arguments, step_result, work_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_tuning_arguments(parser)
    parser.add_argument("--mb-tokens", type=int, default=2048, help="tokens of a microbatch")
    parser.add_argument(
        "--profile", type=int, default=0, metavar="N", help="print torch.profiler's N dearest operators"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further overrides of the configuration")
    arguments = parser.parse_intermixed_args()
    restart_tuned(arguments.threads)

    import torch
    from ours_grpo import ClockedLog, lora_overrides
    from torch.profiler import ProfilerActivity, profile

    from nemo_rl_lora.algorithms.loop import TrainingLoop
    from nemo_rl_lora.config.load import load_config, resolved_yaml
    from nemo_rl_lora.run.control import StopRequest
    from nemo_rl_lora.run.drivers import silence_vendors
    from nemo_rl_lora.run.preflight import check_start
    from nemo_rl_lora.run.start import build_run

    torch.set_num_threads(arguments.threads)
    silence_vendors()
    profiler = profile(activities=[ProfilerActivity.CPU])

    def after_step(step: int) -> None:
        if step == 1 and arguments.profile:
            profiler.start()

    with tempfile.TemporaryDirectory() as temporary, ExitStack() as cleanup:
        overrides = [*_overrides(arguments, Path(temporary)), *lora_overrides(), *arguments.overrides]
        config = load_config(None, overrides, arguments.task)
        start = check_start(config)
        log = ClockedLog(config.logger, resolved_yaml(config), after_step)
        cleanup.callback(log.close)
        run = build_run(start, log, cleanup)
        reset_peak()
        with run.console:
            TrainingLoop(run, start.algorithm).run(StopRequest())
    if arguments.profile:
        profiler.stop()
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=arguments.profile))
    steps = [metrics for _, metrics in log.training]
    print_result(
        {
            "task": arguments.task,
            "side": "ours",
            "micro_batch": f"{arguments.mb_tokens} tokens",
            **step_result(
                [step["timing/total_step_time"] for step in steps],
                [int(step["total_num_tokens"]) for step in steps],
                [step["loss"] for step in steps],
            ),
            "forward_tokens": [int(step["num_forward_tokens"]) for step in steps],
            "reference_s": [round(step.get("timing/policy_and_reference_logprobs", 0.0), 3) for step in steps],
            "peak_rss_mib": rss_mib(peak=True),
            "threads": torch.get_num_threads(),
            "overrides": arguments.overrides,
            "versions": versions("nemo-rl-lora", "torch", "transformers", "nemo-automodel"),
        }
    )


def _overrides(arguments: argparse.Namespace, directory: Path) -> list[str]:
    from nemo_rl_lora.models.source import load_tokenizer, resolve_model

    task = arguments.task
    rows = work_rows(task, arguments.data, arguments.steps, load_tokenizer(resolve_model(arguments.model).path))
    file = directory / "rows.jsonl"
    keys = ("input", "output") if task == "sft" else ("prompt", "chosen", "rejected")
    lines = [json.dumps(dict(zip(keys, (row.question, *row.answers), strict=True))) for row in rows]
    file.write_text("\n".join(lines), encoding="utf-8")
    dataset = "ResponseDataset" if task == "sft" else "BinaryPreferenceDataset"
    return [
        f"policy.model_name='{arguments.model}'",
        f"policy.precision={arguments.precision}",
        f"policy.train_global_batch_size={BATCH_ROWS[task]}",
        f"policy.max_total_sequence_length={MAX_TOKENS}",
        f"policy.dynamic_batching.train_mb_tokens={arguments.mb_tokens}",
        f"policy.dynamic_batching.logprob_mb_tokens={arguments.mb_tokens}",
        f"policy.optimizer.kwargs.lr={LR}",
        "policy.scheduler=null",
        f"data.train={{_override_: true, dataset_name: {dataset}, data_path: '{file}'}}",
        "data.validation=null",
        "data.shuffle=false",
        *([f"dpo.reference_policy_kl_penalty={BETA}"] if task == "dpo" else []),
        f"{task}.max_num_steps={arguments.steps}",
        f"{task}.max_num_epochs=1",
        "checkpointing.enabled=false",
        f"checkpointing.checkpoint_dir='{directory / 'checkpoints'}'",
        f"logger.log_dir='{directory / 'logs'}'",
        "logger.tensorboard_enabled=false",
        "logger.plot.enabled=false",
    ]


if __name__ == "__main__":
    main()
