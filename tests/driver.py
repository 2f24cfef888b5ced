"""Runs of the drivers on a tiny model, by the drivers' real entry."""

from __future__ import annotations

import io
import json
import logging
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch  # the driver starts its process again where torch is not yet imported
from safetensors.torch import load_file

from nemo_rl_lora.config.master import Algorithm
from nemo_rl_lora.run import cli
from nemo_rl_lora.run.metrics import is_measured

assert torch.__version__

# Rewards that differ within a group, whatever a random model writes.
REWARD = """
def reward(prompt, completion, row):
    return (sum(map(ord, completion)) % 5) / 4

def reward_of_odd(prompt, completion, row):
    return (sum(map(ord, completion)) % 5) / 4 if row["a"] % 2 else 1.0

def the_same(prompt, completion, row):
    return 1.0
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a driver ended: its exit code and what it said."""

    code: int
    out: str
    err: str


def run_driver(*arguments: str, algorithm: Algorithm = "grpo") -> Ended:
    """The driver in this process, from its arguments to its exit code."""
    return run_command(algorithm, *arguments)


def run_command(name: str, *arguments: str) -> Ended:
    """A command of `nemo-rl-lora` in this process, from its arguments to its exit code."""
    out, err = io.StringIO(), io.StringIO()
    root = logging.getLogger()
    before = list(root.handlers), root.level
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = cli.run(name, program=name, argv=arguments)
    finally:
        root.handlers[:], root.level = before
    return Ended(code=code, out=out.getvalue(), err=err.getvalue())


def _tuning_row(algorithm: Algorithm, i: int) -> dict[str, str]:
    if algorithm == "sft":
        return {"input": f"{i} + {i % 3}?", "output": "so " * (i % 4) + str(i + i % 3)}
    return {"prompt": f"{i} + {i % 3}?", "chosen": "so " * (i % 4) + str(i + i % 3), "rejected": "no " * (i % 3 + 1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyRun:
    """A run on the tiny model, in a directory of its own. GRPO: 4 prompts x 4 completions a step; SFT: 4 rows; DPO: 4
    pairs."""

    root: Path
    model: Path
    algorithm: Algorithm = "grpo"

    def arguments(self, *overrides: str) -> list[str]:
        if self.algorithm == "grpo":
            return self._grpo_arguments(*overrides)
        rows = self.root / "rows.jsonl"
        if not rows.exists():
            rows.write_text("".join(json.dumps(_tuning_row(self.algorithm, i)) + "\n" for i in range(12)))
        name = "ResponseDataset" if self.algorithm == "sft" else "BinaryPreferenceDataset"
        dataset = f"{{_override_: true, dataset_name: {name}, data_path: '{rows}'}}"
        return [
            *self._shared_arguments(),
            "policy.train_global_batch_size=4",
            "policy.max_total_sequence_length=64",
            f"{self.algorithm}.max_num_steps=2",
            f"{self.algorithm}.val_period=0",
            f"{self.algorithm}.val_at_start=false",
            f"data.train={dataset}",
            f"data.validation={dataset}",
            *overrides,
        ]

    def _shared_arguments(self) -> list[str]:
        return [
            f"policy.model_name={self.model}",
            "policy.precision=float32",
            "policy.dtensor_cfg.lora_cfg.enabled=true",
            "policy.dtensor_cfg.lora_cfg.dim=4",
            f"checkpointing.checkpoint_dir={self.checkpoints}",
            f"logger.log_dir={self.logs}",
            "logger.tensorboard_enabled=false",
            "logger.plot.enabled=false",
        ]

    def _grpo_arguments(self, *overrides: str) -> list[str]:
        reward_file = self.root / "rewards.py"
        if not reward_file.exists():
            reward_file.write_text(REWARD)
        return [
            *self._shared_arguments(),
            "policy.train_global_batch_size=16",
            "policy.generation.max_new_tokens=6",
            "grpo.num_prompts_per_step=4",
            "grpo.num_generations_per_prompt=4",
            "grpo.max_num_steps=2",
            "grpo.val_period=0",
            "grpo.val_at_start=false",
            "data.train.num_rows=32",
            "data.validation.num_rows=6",
            "data.default.env_name=tiny",
            f"+env.tiny.reward_function={reward_file}:reward",
            *overrides,
        ]

    def __call__(self, *overrides: str) -> Ended:
        return run_driver(*self.arguments(*overrides), algorithm=self.algorithm)

    @property
    def checkpoints(self) -> Path:
        return self.root / "results"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def steps(self) -> list[str]:
        return sorted(path.name for path in self.checkpoints.glob("step_*"))

    def metrics(self, split: str = "train", experiment: int = 1) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl of one split."""
        file = self.logs / f"exp_{experiment:03d}" / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        return [line for line in lines if line["split"] == split]


def adapter(step: Path) -> dict[str, torch.Tensor]:
    """The adapter of a step's directory."""
    return load_file(step / "policy" / "adapter" / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether the names are equal and every bit of the tensors."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without_seconds(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics without what a clock says."""
    return [{name: value for name, value in line.items() if not is_measured(name)} for line in lines]
