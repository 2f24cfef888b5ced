"""The other side of a GRPO benchmark: TRL's GRPOTrainer with PEFT's LoRA, and each of its ways to generate.

The same questions, lengths, adapter, optimizer and objective as ours_grpo.py, set by TRL's own options; TRL's trainer
does the step. Times are taken around it: a step from its begin to its end (what TRL does between steps is not
counted), generation around the trainer's own verb for it, which moves the weights to vLLM too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from measure import StepRecord
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from work import (
    LORA_ALPHA,
    LORA_DIM,
    LORA_TARGETS,
    NUM_COMPLETIONS,
    NUM_PROMPTS,
    Work,
    prompt_length,
    questions,
    reward,
)

NUM_ROWS = NUM_PROMPTS * NUM_COMPLETIONS
WAYS: Mapping[str, Mapping[str, Any]] = {
    "generate": {},
    "continuous": {"use_transformers_continuous_batching": True},
    "vllm": {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 512},
}
"""Of TRL to sample completions: its arguments."""


@dataclass(slots=True)
class _Step:
    seconds: float = 0.0
    generation_seconds: float = 0.0
    num_sampled_tokens: int = 0
    num_trained_tokens: int = 0
    rewards: list[float] = field(default_factory=list)


class _Clock(TrainerCallback):
    """Opens a step's record at its begin and closes it at its end."""

    def __init__(self) -> None:
        self.steps: list[_Step] = []
        self._begun = 0.0

    @property
    def step(self) -> _Step:
        return self.steps[-1]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(_Step())
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step.seconds = time.perf_counter() - self._begun


class _CountingTrainer(GRPOTrainer):
    """Counts what the loss was taken over."""

    clock: _Clock

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.clock.step.num_trained_tokens += int(inputs["completion_mask"].sum())
        return super().compute_loss(model, inputs, *args, **kwargs)


class TrlRun:
    """A trainer that is ready to train. `micro_batch` completions go through the model at once in training."""

    def __init__(
        self, work: Work, model: Path, micro_batch: int, directory: Path, generation: str = "generate"
    ) -> None:
        """`generation`: one of WAYS."""
        if NUM_ROWS % micro_batch:
            raise ValueError(f"--micro={micro_batch}: must divide the {NUM_ROWS} completions of a step.")
        tokenizer = AutoTokenizer.from_pretrained(model)
        asked = questions(work, lambda text: prompt_length(tokenizer, text))
        self.prompt_tokens = sum(prompt_length(tokenizer, question.text) for question in asked) / len(asked)
        rows = [
            {"prompt": [{"role": "user", "content": question.text}], "answer": question.answer} for question in asked
        ]
        self._clock = _Clock()
        self.trainer = _CountingTrainer(
            model=str(model),
            args=_settings(work, micro_batch, directory, WAYS[generation]),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            reward_funcs=self._score,
            peft_config=LoraConfig(
                r=LORA_DIM,
                lora_alpha=LORA_ALPHA,
                lora_dropout=0.0,
                bias="none",
                target_modules=list(LORA_TARGETS),
                task_type="CAUSAL_LM",
            ),
            callbacks=[self._clock],
        )
        self.trainer.clock = self._clock
        if work.forced_length:
            self.trainer.eos_token_ids = []  # it cuts completions at these after sampling
        self._time_generation()

    def train(self) -> list[StepRecord]:
        self.trainer.train()
        return [
            StepRecord(
                step_seconds=step.seconds,
                generation_seconds=step.generation_seconds,
                num_sampled_tokens=step.num_sampled_tokens,
                num_trained_tokens=step.num_trained_tokens,
                reward=sum(step.rewards) / len(step.rewards),
            )
            for step in self._clock.steps
        ]

    def _score(
        self, completions: Sequence[Any], completion_ids: Sequence[Any], answer: Sequence[int], **_: Any
    ) -> list[float | None]:
        scores = [reward(chat[0]["content"], right) for chat, right in zip(completions, answer, strict=True)]
        self._clock.step.num_sampled_tokens += sum(len(ids) for ids in completion_ids)
        self._clock.step.rewards += scores
        return [*scores]

    def _time_generation(self) -> None:
        generate = self.trainer._generate_single_turn

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            output = generate(*args, **kwargs)
            self._clock.step.generation_seconds += time.perf_counter() - begun
            return output

        self.trainer._generate_single_turn = timed


def _settings(work: Work, micro_batch: int, directory: Path, way: Mapping[str, Any]) -> GRPOConfig:
    return GRPOConfig(
        **way,
        output_dir=str(directory),
        use_cpu=True,
        bf16=True,
        model_init_kwargs={"dtype": "bfloat16"},
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=NUM_ROWS // micro_batch,
        generation_batch_size=NUM_ROWS,
        num_generations=NUM_COMPLETIONS,
        max_completion_length=work.max_new_tokens,
        # No end of sequence is known to `generate`, so it does no extra work to hold one back.
        generation_kwargs={"eos_token_id": None} if work.forced_length else None,
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        scale_rewards="group",
        num_iterations=1,
        epsilon=0.2,
        max_steps=work.num_steps,
        learning_rate=work.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        optim="adamw_torch",
        gradient_checkpointing=False,  # TRL's default is slower, and memory is compared at TRL's fastest
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=work.seed,
    )
