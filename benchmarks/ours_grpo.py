"""Our side of a GRPO benchmark: the product's own configuration, start, build and loop, with a clock in its log.

Nothing of a step is done here. Settings that differ from the quick start's are overrides, listed by `overrides`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import StepRecord
from work import (
    LORA_ALPHA,
    LORA_DIM,
    LORA_TARGETS,
    NUM_COMPLETIONS,
    NUM_PROMPTS,
    Work,
    link_endless_model,
    prompt_length,
    questions,
    write_rows,
)

from nemo_rl_lora.algorithms.algorithm import Run
from nemo_rl_lora.algorithms.grpo import Grpo
from nemo_rl_lora.algorithms.loop import TrainingLoop
from nemo_rl_lora.config.load import load_config, resolved_yaml
from nemo_rl_lora.models.source import load_tokenizer, resolve_model
from nemo_rl_lora.run.control import StopRequest
from nemo_rl_lora.run.drivers import silence_vendors
from nemo_rl_lora.run.metrics import RunLog
from nemo_rl_lora.run.preflight import check_start
from nemo_rl_lora.run.start import build_run

GENERATION_TIMES = ("timing/weight_sync", "timing/generation")


class ClockedLog(RunLog):
    """A run's log that keeps the metrics of training steps, each with the time at which it was recorded."""

    def __init__(self, config: Any, resolved: str, after_step: Callable[[int], None] | None = None) -> None:
        super().__init__(config, resolved)
        self.training: list[tuple[float, dict[str, float]]] = []
        self._after_step = after_step

    def log(self, step: int, split: Any, metrics: Mapping[str, Any]) -> None:
        super().log(step, split, metrics)
        if split == "train":
            self.training.append((time.perf_counter(), {name: float(value) for name, value in metrics.items()}))
            if self._after_step is not None:
                self._after_step(step)


@dataclass(frozen=True, slots=True, kw_only=True)
class OursRun:
    """A run that is ready to train."""

    run: Run
    algorithm: Grpo
    log: ClockedLog

    def train(self) -> list[StepRecord]:
        """All steps. A step's seconds are those from the end of the one before to its own end, so nothing is left
        out."""
        begun = time.perf_counter()
        with self.run.console:
            TrainingLoop(self.run, self.algorithm).run(StopRequest())
        records = []
        for ended, metrics in self.log.training:
            records.append(
                StepRecord(
                    step_seconds=ended - begun,
                    generation_seconds=sum(metrics[name] for name in GENERATION_TIMES),
                    num_sampled_tokens=int(metrics["num_sampled_tokens"]),
                    num_trained_tokens=int(metrics["global_valid_toks"]),
                    reward=metrics["reward"],
                )
            )
            begun = ended
        return records


def base_overrides(directory: Path, *, num_steps: int, seed: int) -> list[str]:
    """What every benchmark sets: files in `directory`, no checkpoint, no validation on the way, no tensorboard."""
    return [
        f"grpo.seed={seed}",
        f"grpo.max_num_steps={num_steps}",
        "grpo.val_at_start=false",
        "grpo.val_period=0",
        "checkpointing.enabled=false",
        f"checkpointing.checkpoint_dir='{directory / 'checkpoints'}'",
        f"logger.log_dir='{directory / 'logs'}'",
        "logger.tensorboard_enabled=false",
        "logger.plot.enabled=false",
    ]


def lora_overrides() -> list[str]:
    """The adapter of the comparisons, A drawn as PEFT draws it."""
    return [
        "policy.dtensor_cfg.lora_cfg.enabled=true",
        "policy.dtensor_cfg.lora_cfg.match_all_linear=false",
        f"policy.dtensor_cfg.lora_cfg.target_modules=[{','.join(LORA_TARGETS)}]",
        f"policy.dtensor_cfg.lora_cfg.dim={LORA_DIM}",
        f"policy.dtensor_cfg.lora_cfg.alpha={LORA_ALPHA}",
        "policy.dtensor_cfg.lora_cfg.lora_A_init=uniform",
    ]


def loss_overrides() -> list[str]:
    """The objective of the comparisons, which is TRL's loss_type=grpo: the baseline and deviation of the whole group,
    the mean over tokens of each completion, the mean over completions."""
    return ["grpo.use_leave_one_out_baseline=false", "loss_fn.token_level_loss=false"]


def work_overrides(work: Work, model: str, directory: Path) -> list[str]:
    """The work of work.py: its questions in their order, its lengths and its learning rate."""
    path = resolve_model(model).path
    tokenizer = load_tokenizer(path)
    rows = directory / "questions.jsonl"
    write_rows(rows, questions(work, lambda text: prompt_length(tokenizer, text)))
    if work.forced_length:
        endless = directory / "endless-model"
        endless.mkdir()
        link_endless_model(path, endless)
        path = endless
    return [
        f"policy.model_name='{path}'",
        f"policy.max_total_sequence_length={work.max_total_tokens}",
        f"policy.generation.max_new_tokens={work.max_new_tokens}",
        f"policy.optimizer.kwargs.lr={work.lr}",
        "policy.scheduler=null",
        f"grpo.num_prompts_per_step={NUM_PROMPTS}",
        f"grpo.num_generations_per_prompt={NUM_COMPLETIONS}",
        f"policy.train_global_batch_size={NUM_PROMPTS * NUM_COMPLETIONS}",
        "~data.train.low",
        "~data.train.high",
        "~data.train.num_rows",
        "data.train.dataset_name=jsonl",
        f"++data.train.data_path='{rows}'",
        "data.shuffle=false",
        "data.validation=null",
    ]


@contextmanager
def ours_run(overrides: Sequence[str], after_step: Callable[[int], None] | None = None) -> Iterator[OursRun]:
    """The quick start under these overrides, built as its driver builds it. `after_step` gets each step's number."""
    silence_vendors()
    config = load_config(None, overrides, "grpo")
    start = check_start(config)
    log = ClockedLog(config.logger, resolved_yaml(config), after_step)
    with ExitStack() as cleanup:
        cleanup.callback(start.checkpointer.close)
        cleanup.callback(log.close)
        run = build_run(start, log, cleanup)
        assert isinstance(start.algorithm, Grpo), start.algorithm
        yield OursRun(run=run, algorithm=start.algorithm, log=log)
