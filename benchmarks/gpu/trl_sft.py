"""SFT of the Llama-3.1-8B shape: ours, TRL + PEFT at its best, and the published rate.

TRL gets what makes it fast: Liger's kernels where they are installed, fused AdamW, no gradient checkpointing, and its
best micro batch of a short list, which our side has as well. Both sides train the same number of full rows a step,
every token a loss token.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from gpu.shapes import LLAMA_8B, random_model
from gpu.timing import Timed, beside_published, forget_peak, measurement, peak_gib, training_facts
from gpu.training import SFT_ROWS, full_rows, sft_step, sft_tokens
from work import LORA_ALPHA, LORA_DIM, LORA_TARGETS

from tests.gpu.checks import Check, Fact, Machine
from tests.gpu.environment import synchronize

MICRO_BATCHES = (1, 2)  # rows; by estimate the activations of 4 need more than 80 GB
NUM_WARM, NUM_TIMED = 1, 2
PUBLISHED, SOURCE = 12473.0, "NeMo Automodel, Llama-3-8B, 4096 tokens, one H100"

Rates = dict[tuple[str, int], float]  # tokens/s by side ("ours", "TRL") and rows of a micro batch


def sft_8b(machine: Machine) -> Iterator[Check]:
    rates: Rates = {}
    for side, step in (("ours", our_step), ("TRL + PEFT", trl_step)):
        for micro in MICRO_BATCHES:
            name = f"{side}, {LLAMA_8B.name}, micro batch {micro}"
            yield measurement(name, partial(step, machine, rates, micro))
    yield measurement("our best beside TRL's best", partial(beside_best, rates))


def our_step(machine: Machine, rates: Rates, micro: int) -> dict[str, Fact]:
    facts = sft_step(machine, LLAMA_8B, rows_of_microbatch=micro)
    rates["ours", micro] = _rate(facts)
    return beside_published(machine, facts, PUBLISHED, SOURCE)


def beside_best(rates: Rates) -> dict[str, Fact]:
    best: dict[str, tuple[float, int]] = {}
    for (side, micro), rate in rates.items():
        best[side] = max(best.get(side, (0.0, 0)), (rate, micro))
    for side in ("ours", "TRL"):
        if side not in best:
            return {"skipped": f"no step of one side was measured: {side}"}
    (our_rate, our_micro), (trl_rate, trl_micro) = best["ours"], best["TRL"]
    return {"times_as_fast": our_rate / trl_rate, "our_micro_batch": our_micro, "trl_micro_batch": trl_micro}


def trl_step(machine: Machine, rates: Rates, micro: int) -> dict[str, Fact]:
    if importlib.util.find_spec("trl") is None:
        return {"skipped": "trl is not installed: uv sync --group bench"}
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    config = LLAMA_8B.config(toy=not machine.has_gpu)
    with TemporaryDirectory(dir=machine.root) as directory:
        trainer, clock = make_trainer(machine, config, micro, directory, use_liger=has_liger and machine.has_gpu)
        trainer.train()
    found = Timed(seconds=median(clock.seconds[NUM_WARM:]), peak_gib=peak_gib(machine))
    facts = training_facts(machine, config, found, SFT_ROWS, sft_tokens(machine))
    rates["TRL", micro] = _rate(facts)
    if not has_liger:
        return {
            **facts,
            "liger": "not installed (uv pip install --no-deps liger-kernel): TRL is without it here",
        }
    return {**facts, "liger": "on" if machine.has_gpu else "off: no GPU"}


def make_trainer(machine: Machine, config: Any, micro: int, directory: str, *, use_liger: bool) -> tuple[Any, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    num_tokens, num_steps = sft_tokens(machine), NUM_WARM + NUM_TIMED
    rows = full_rows(config, SFT_ROWS * num_steps, num_tokens, prompt_tokens=1).token_ids.tolist()
    clock = make_clock(machine)
    trainer = SFTTrainer(
        model=random_model(config, machine.device, attention="sdpa"),
        train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in rows]),
        processing_class=two_token_tokenizer(),
        callbacks=[clock],
        peft_config=LoraConfig(
            r=LORA_DIM, lora_alpha=LORA_ALPHA, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM"
        ),
        args=SFTConfig(
            output_dir=directory,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=SFT_ROWS // micro,
            max_steps=num_steps,
            max_length=num_tokens,
            bf16=True,
            use_cpu=not machine.has_gpu,
            use_liger_kernel=use_liger,
            gradient_checkpointing=False,
            optim="adamw_torch_fused" if machine.has_gpu else "adamw_torch",
            learning_rate=1e-5,
            logging_steps=1000,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            shuffle_dataset=False,
            dataloader_pin_memory=machine.has_gpu,
        ),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, clock


def make_clock(machine: Machine) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Seconds of every step; the peak of memory counts from the end of the warm-up."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if len(self.seconds) == NUM_WARM:
                forget_peak(machine)
            synchronize(machine)
            self._begun = perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            synchronize(machine)
            self.seconds.append(perf_counter() - self._begun)

    return Clock()


def two_token_tokenizer() -> Any:
    """Rows are token ids already; TRL asks for the end of a sequence and for padding alone."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({"<end>": 0, "<pad>": 1}, unk_token="<end>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="<end>", pad_token="<pad>")


def _rate(facts: dict[str, Fact]) -> float:
    rate = facts["tokens_per_s"]
    assert isinstance(rate, float), rate
    return rate
