"""The speed and the memory of an SFT or DPO step of TRL + PEFT on the same rows. One JSON line at the end.

uv run --group bench benchmarks/tuning_trl.py --task sft|dpo --data DIR --micro 4 [--padding-free] [--precompute]

`tokens_per_s` charges a precomputed reference pass to the steps that use it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from typing import Any

from measure import print_result, reset_peak, restart_tuned, rss_mib, versions
from tuning_work import (
    BATCH_ROWS,
    BETA,
    LR,
    MAX_TOKENS,
    Answered,
    add_tuning_arguments,
    split_ids,
    step_result,
    work_rows,
)
from work import LORA_ALPHA, LORA_DIM, LORA_TARGETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_tuning_arguments(parser)
    parser.add_argument("--micro", type=int, default=4, help="rows (DPO: pairs) of a forward pass")
    parser.add_argument("--padding-free", action="store_true", help="sft: rows one after the other, without padding")
    parser.add_argument("--plain-loss", action="store_true", help="sft: transformers' loss in place of TRL's")
    parser.add_argument("--precompute", action="store_true", help="dpo: reference logprobs in a pass of their own")
    arguments = parser.parse_args()
    restart_tuned(arguments.threads)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"

    import torch
    from transformers import AutoTokenizer

    from nemo_rl_lora.models.source import resolve_model

    torch.set_num_threads(arguments.threads)
    model = resolve_model(arguments.model).path
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = work_rows(arguments.task, arguments.data, arguments.steps, tokenizer)
    with tempfile.TemporaryDirectory() as directory:
        make = _sft_trainer if arguments.task == "sft" else _dpo_trainer
        trainer, clock = make(arguments, str(model), tokenizer, rows, directory)
        reset_peak()
        trainer.train()
    share = clock.reference_seconds / len(clock.seconds)
    print_result(
        {
            "task": arguments.task,
            "side": "trl",
            "micro_batch": arguments.micro,
            "variant": _variant(arguments),
            **step_result([seconds + share for seconds in clock.seconds], clock.tokens, clock.losses),
            "reference_s": round(clock.reference_seconds, 3),
            "peak_rss_mib": rss_mib(peak=True),
            "threads": torch.get_num_threads(),
            "versions": versions("torch", "transformers", "trl", "peft"),
        }
    )


def _variant(arguments: argparse.Namespace) -> str:
    names = ("padding_free", "plain_loss", "precompute")
    return " ".join(name for name in names if getattr(arguments, name)) or "default"


def _make_clock() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Seconds and tokens of every step, from its begin to its end."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.tokens: list[int] = []
            self.losses: list[float] = []
            self.reference_seconds = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.tokens.append(0)
            self._begun = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - self._begun)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(float(logs["loss"]))

    return Clock()


def _shared_settings(arguments: argparse.Namespace, directory: str) -> dict[str, Any]:
    return {
        "output_dir": directory,
        "use_cpu": True,
        "bf16": arguments.precision == "bfloat16",
        "model_init_kwargs": {"dtype": arguments.precision},
        "per_device_train_batch_size": arguments.micro,
        "gradient_accumulation_steps": BATCH_ROWS[arguments.task] // arguments.micro,
        "max_steps": arguments.steps,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "seed": 0,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
    }


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=LORA_DIM, lora_alpha=LORA_ALPHA, bias="none", target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM"
    )


def _sft_trainer(
    arguments: argparse.Namespace, model: str, tokenizer: Any, rows: list[Answered], directory: str
) -> tuple[Any, Any]:
    from datasets import Dataset
    from transformers import Trainer
    from trl import SFTConfig, SFTTrainer

    clock = _make_clock()

    class CountingTrainer(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            clock.tokens[-1] += int(inputs["input_ids"].numel() if mask is None else mask.sum())
            return super().training_step(model, inputs, *args, **kwargs)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if not arguments.plain_loss:
                return super().compute_loss(model, inputs, *args, **kwargs)
            return Trainer.compute_loss(self, model, inputs | {"use_cache": False}, *args, **kwargs)

    def tokenised(row: Answered) -> dict[str, list[int]]:
        prompt, answer = split_ids(tokenizer, row.question, row.answers[0])
        labels = [-100] * len(prompt) + answer
        return {"input_ids": (prompt + answer)[:MAX_TOKENS], "labels": labels[:MAX_TOKENS]}

    lengths = {"padding_free": True, "max_length": None} if arguments.padding_free else {"max_length": MAX_TOKENS}
    trainer = CountingTrainer(
        model=model,
        args=SFTConfig(**_shared_settings(arguments, directory), **lengths, shuffle_dataset=False),
        train_dataset=Dataset.from_list([tokenised(row) for row in rows]),
        processing_class=tokenizer,
        peft_config=_lora(),
        callbacks=[clock],
    )
    return trainer, clock


def _dpo_trainer(
    arguments: argparse.Namespace, model: str, tokenizer: Any, rows: list[Answered], directory: str
) -> tuple[Any, Any]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    clock = _make_clock()

    class CountingTrainer(DPOTrainer):
        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            result = super()._precompute_ref_logps(*args, **kwargs)
            clock.reference_seconds += time.perf_counter() - begun
            return result

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            clock.tokens[-1] += int(inputs["attention_mask"].sum())
            return super().training_step(model, inputs, *args, **kwargs)

    def messages(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    trainer = CountingTrainer(
        model=model,
        args=DPOConfig(
            **_shared_settings(arguments, directory),
            beta=BETA,
            loss_type=["sigmoid"],
            max_length=MAX_TOKENS,
            precompute_ref_log_probs=arguments.precompute,
            precompute_ref_batch_size=arguments.micro,
        ),
        train_dataset=Dataset.from_list(
            [
                {
                    "prompt": messages("user", row.question),
                    "chosen": messages("assistant", row.answers[0]),
                    "rejected": messages("assistant", row.answers[1]),
                }
                for row in rows
            ]
        ),
        processing_class=tokenizer,
        peft_config=_lora(),
        callbacks=[clock],
    )
    return trainer, clock


if __name__ == "__main__":
    main()
