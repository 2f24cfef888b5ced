"""Where the seconds of one of our GRPO steps go. Prints a table, and one JSON line at the end.

uv run --group bench benchmarks/grpo_profile.py [--work long] [--steps 3] [--operators 15] [key=value ...]

Timers stand around the parts of the product; a part's seconds are without those of parts that run inside it, so the
column adds up to the step. Means over all steps but the first. `--operators` adds torch.profiler's table of the
operators with the most time of their own; it slows the step, so the table of parts is not to be read then.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import print_result, restart_tuned, versions
from work import add_choice_of_work, add_work_arguments, work_of

REST = "rest of the loop: rewards, batch, records"


class SelfTimer:
    """Seconds and calls by part, each without the parts that ran inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._inner: list[float] = []  # for each open part, the seconds of parts inside it

    def clear(self) -> None:
        """Forget what is finished, as the warm-up is."""
        self.seconds.clear()
        self.calls.clear()

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - begun
                own = elapsed - self._inner.pop()
                self.seconds[part] = self.seconds.get(part, 0.0) + own
                self.calls[part] = self.calls.get(part, 0) + 1
                if self._inner:
                    self._inner[-1] += elapsed

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_arguments(parser)
    add_choice_of_work(parser)
    parser.add_argument("--train-mb-tokens", type=int, default=4096, help="tokens of a training microbatch")
    parser.add_argument("--operators", type=int, default=0, help="lines of torch.profiler's table")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further overrides of the configuration")
    arguments = parser.parse_intermixed_args()
    if arguments.steps < 2:
        parser.error("--steps: the first step warms up, so at least 2 are needed")
    restart_tuned(arguments.threads)
    timer, seconds, operators = _profile(arguments)
    num_steps = arguments.steps - 1
    parts = {part: timer.seconds.get(part, 0.0) / num_steps for part in _parts_in_order()}
    parts[REST] = seconds / num_steps - sum(parts.values())
    print(f"{'part of a step':<46}{'seconds':>9}{'share':>8}{'calls':>8}")
    for part, own in parts.items():
        calls = timer.calls.get(part, 0) / num_steps
        print(f"{part:<46}{own:>9.3f}{own * num_steps / seconds:>8.1%}{calls:>8.0f}")
    print(f"{'step':<46}{seconds / num_steps:>9.3f}{1:>8.0%}")
    print(operators)
    print_result(
        {
            "task": "grpo_profile",
            "work": arguments.work,
            "micro_batch": f"{arguments.train_mb_tokens} tokens",
            "step_s": round(seconds / num_steps, 3),
            "parts_s": {part: round(own, 4) for part, own in parts.items()},
            "num_profiled_steps": num_steps,
            "with_operators": bool(arguments.operators),
            "overrides": arguments.overrides,
            "versions": versions("nemo-rl-lora", "torch", "transformers"),
        }
    )


def _profile(arguments: argparse.Namespace) -> tuple[SelfTimer, float, str]:
    """The timer, the seconds of all profiled steps, and torch.profiler's table."""
    import torch
    from ours_grpo import base_overrides, lora_overrides, loss_overrides, ours_run, work_overrides
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(arguments.threads)
    work = work_of(arguments)
    timer, ends = SelfTimer(), []
    profiler = profile(activities=[ProfilerActivity.CPU])

    def after_step(step: int) -> None:
        ends.append(time.perf_counter())
        if step == 1:
            timer.clear()
            if arguments.operators:
                profiler.start()

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
        with ours_run(overrides, after_step) as run:
            _watch(timer)
            run.train()
    table = ""
    if arguments.operators:
        profiler.stop()
        table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=arguments.operators)
    return timer, ends[-1] - ends[0], table


_PLACES = {
    "weight sync: digest": ("policy.trained", "TrainedPolicy.publish"),
    "weight sync: merge, copy, pack": ("generation.in_process", "InProcessGeneration.sync_weights"),
    "generation: prefill": ("generation.decode", "CausalDecoder.admit"),
    "generation: decode": ("generation.decode", "CausalDecoder.step"),
    "generation: close rows": ("generation.decode", "CausalDecoder.retire"),
    "generation: draw tokens": ("generation.in_process", "sample"),
    "generation: scheduling, stopping, text": ("generation.in_process", "InProcessGeneration.collect"),
    "training: layout, loss, bookkeeping": ("policy.dtensor", "DTensorPolicy.train_step"),
    "training: body, forward": ("policy.forward", "ForwardPass.forward"),
    "training: attention, forward": ("policy.segment_attention", "_Attend.forward"),
    "training: head, forward and its gradient": ("policy.forward", "target_logprobs"),
    "training: attention, backward": ("policy.segment_attention", "_Attend.backward"),
}
_BACKWARD, _CLIP, _OPTIMIZER = "training: body, backward", "training: gradient clipping", "training: optimizer"


def _parts_in_order() -> list[str]:
    return [*_PLACES, _BACKWARD, _CLIP, _OPTIMIZER]


def _watch(timer: SelfTimer) -> None:
    """Put timers around the parts. Only what is called through its class or module can be watched so."""
    import importlib

    import torch

    for part, (module_name, path) in _PLACES.items():
        owner: Any = importlib.import_module(f"nemo_rl_lora.{module_name}")
        *owners, name = path.split(".")
        for step in owners:
            owner = getattr(owner, step)
        timed = timer.wrap(part, getattr(owner, name))
        setattr(owner, name, staticmethod(timed) if isinstance(vars(owner)[name], staticmethod) else timed)
    torch.Tensor.backward = timer.wrap(_BACKWARD, torch.Tensor.backward)
    torch.nn.utils.clip_grad_norm_ = timer.wrap(_CLIP, torch.nn.utils.clip_grad_norm_)
    torch.optim.AdamW.step = timer.wrap(_OPTIMIZER, torch.optim.AdamW.step)


if __name__ == "__main__":
    main()
