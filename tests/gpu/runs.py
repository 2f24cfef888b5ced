"""Whole runs of the drivers on a tiny model: repeated, resumed, continued on the CPU, exported.

The model's heads have 16 channels, so that on a GPU in bf16 its attention is flash attention.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Literal

import peft
import torch
from transformers import AutoModelForCausalLM

from nemo_rl_lora.config.master import Algorithm
from nemo_rl_lora.policy.determinism import WORKSPACE, deterministic_algorithms
from tests.driver import TinyRun, adapter, same
from tests.gpu.checks import Answer, Check, Machine, relative, within
from tests.tiny_models import make_tiny_llama

ROOT = Path(__file__).parents[2]
RESUME_BOUND = 1e-5  # of A and B in fp32: sums in another order (1e-7), after two steps of Adam
MOVE_BOUND = 1e-3  # of A and B: the same on two devices, where Adam magnifies gradients near 0
EXPORT_BOUND = 1e-4  # of logits in fp32: products in another order
BACKEND_KEYS = {
    "dtensor": (),
    "megatron": ("policy.backend=megatron", "policy.dtensor_cfg.lora_cfg.enabled=false", "policy.lora.dim=4"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    algorithm: Algorithm
    backend: Literal["dtensor", "megatron"]
    precision: Literal["float32", "bfloat16"] = "float32"
    deterministic: bool = False  # policy.deterministic

    def __str__(self) -> str:
        mode = ", deterministic" if self.deterministic else ""
        return f"{self.algorithm} on {self.backend} in {self.precision}{mode}"


SFT = Case(algorithm="sft", backend="dtensor")
DPO = Case(algorithm="dpo", backend="megatron")
GPU_CASES = (
    *(
        Case(algorithm=algorithm, backend=backend, deterministic=deterministic)
        for algorithm in ("sft", "dpo", "grpo")
        for backend in ("dtensor", "megatron")
        for deterministic in (False, True)
    ),
    *(Case(algorithm=algorithm, backend="dtensor", precision="bfloat16") for algorithm in ("sft", "dpo", "grpo")),
)
CPU_CASES = (
    SFT,
    Case(algorithm="sft", backend="dtensor", deterministic=True),
    DPO,
    Case(algorithm="grpo", backend="dtensor"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedRun(TinyRun):
    """Runs of one algorithm read the same files of rows and rewards; each writes into a directory of its own."""

    name: str

    @property
    def checkpoints(self) -> Path:
        return self.root / self.name / "results"

    @property
    def logs(self) -> Path:
        return self.root / self.name / "logs"


def checks(machine: Machine) -> Iterator[Check]:
    model = make_tiny_llama(machine.root / "model", head_dim=16)
    runs = Runs(machine.root, model)
    for case in GPU_CASES if machine.has_gpu else CPU_CASES:
        yield Check(name=f"{case}, repeated and resumed", ask=partial(repeated_and_resumed, runs, case))
    for case in (SFT, DPO) if machine.has_gpu else (SFT,):
        yield Check(name=f"{case}, continued on the CPU", ask=partial(continued_on_cpu, runs, case))
    yield Check(name="policy.deterministic=true in a command", ask=partial(deterministic_by_key, runs, SFT))
    yield Check(name=f"{DPO}, exported and judged by PEFT", ask=partial(exported, runs, DPO))


class Runs:
    """Runs of four steps that keep steps 2 and 4, in `root`; the uninterrupted run of a case is made once."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model = root, model
        self.whole = cache(self._whole)

    def tiny(self, case: Case, name: str) -> NamedRun:
        root = self.root / case.algorithm
        root.mkdir(exist_ok=True)
        return NamedRun(
            root=root, model=self.model, algorithm=case.algorithm, name=f"{case}, {name}".replace(", ", "-")
        )

    def overrides(self, case: Case, start: str = "none") -> list[str]:
        return [
            f"policy.precision={case.precision}",
            f"{case.algorithm}.max_num_steps=4",
            "policy.optimizer.kwargs.lr=0.02",
            "checkpointing.save_period=2",
            "checkpointing.metric_name=null",
            f"checkpointing.load_path='{start}'",
            *BACKEND_KEYS[case.backend],
        ]

    def run(self, case: Case, name: str, start: str = "none") -> tuple[NamedRun, list[str]]:
        """A run, and the operations of it that torch knows no deterministic form of."""
        tiny = self.tiny(case, name)
        with determinism(case.deterministic) as operations:
            ended = tiny(*self.overrides(case, start))
        if ended.code:
            raise RuntimeError(f"exit code {ended.code}: {ended.err[-400:]}")
        return tiny, operations

    def _whole(self, case: Case) -> tuple[NamedRun, list[str]]:
        return self.run(case, "whole")


@contextmanager
def determinism(on: bool) -> Iterator[list[str]]:
    """As `policy.deterministic`; which operations have no such form, once it is over."""
    operations: list[str] = []
    with warnings.catch_warnings(), deterministic_algorithms(on, operations.append):
        warnings.simplefilter("always")
        yield operations
    operations.sort()


def repeated_and_resumed(runs: Runs, case: Case) -> Answer:
    """Whether a run that goes on from step 2 ends with the adapter of the one that was not interrupted.

    In bf16 this is no verdict: a rounding that differs is 2^-9.
    """
    whole, operations = runs.whole(case)
    again, _ = runs.run(case, "again")
    resumed, _ = runs.run(case, "resumed", str(whole.checkpoints / "step_2"))
    assert [line["step"] for line in resumed.metrics()] == [3, 4]
    expected, repeated, after = (adapter(run.checkpoints / "step_4") for run in (whole, again, resumed))
    answer = within(
        RESUME_BOUND,
        {"resumed": largest_distance(after, expected)},
        repeats_exactly=same(repeated, expected),
        resumes_exactly=same(after, expected),
        step_seconds=median(line["timing/total_step_time"] for line in whole.metrics()),
        **({"not_deterministic": " ".join(operations) or "nothing"} if case.deterministic else {}),
    )
    return answer if case.precision == "float32" else Answer(ok=None, facts=answer.facts)


def largest_distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(relative(found[name], expected[name]) for name in expected)


def continued_on_cpu(runs: Runs, case: Case) -> Answer:
    """From step 2 of a run of this machine, in a process that sees no GPU."""
    whole, _ = runs.whole(case)
    moved = runs.tiny(case, "moved")
    arguments = moved.arguments(*runs.overrides(case, str(whole.checkpoints / "step_2")))
    run_script(f"examples/run_{case.algorithm}.py", *arguments)
    expected, found = (adapter(run.checkpoints / "step_4") for run in (whole, moved))
    return within(MOVE_BOUND, {"difference": largest_distance(found, expected)})


def deterministic_by_key(runs: Runs, case: Case) -> Answer:
    """A run to which only its command says so, in a process that finds no workspaces for cuBLAS set."""
    asked = runs.tiny(case, "by key")
    arguments = [*asked.arguments(*runs.overrides(case)), "policy.deterministic=true"]
    run_script(f"examples/run_{case.algorithm}.py", *arguments, cpu=False)
    steps = [line["step"] for line in asked.metrics()]
    return Answer(ok=steps == [1, 2, 3, 4], facts={"steps": len(steps)})


def run_script(script: str, *arguments: str, cpu: bool = True) -> None:
    """A script of this checkout, in a process of its own; `cpu`: one that sees no GPU."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if cpu else {}
    environment.pop(WORKSPACE, None)
    done = subprocess.run(
        [sys.executable, script, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{script}: exit code {done.returncode}: {done.stderr[-400:]}")


def exported(runs: Runs, case: Case) -> Answer:
    """The logits of the merged model beside those of PEFT, which loads the same checkpoint's adapter on the base."""
    whole, _ = runs.whole(case)
    step, output = whole.checkpoints / "step_4", runs.root / "exported"
    run_script("tools/convert_lora_to_hf.py", "--adapter-ckpt", str(step), "--hf-ckpt-path", str(output))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(runs.model, dtype=torch.float32).eval()
        without = base(ids).logits
        judge = peft.PeftModel.from_pretrained(base, step / "policy" / "adapter").eval()
        expected = judge(ids).logits
        found = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()(ids).logits
    effect = relative(expected, without)
    assert effect > 100 * EXPORT_BOUND, f"the adapter changes logits by {effect}: too little to see it"
    return within(EXPORT_BOUND, {"difference": relative(found, expected)}, adapter_effect=effect)
