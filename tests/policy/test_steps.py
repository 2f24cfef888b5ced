"""Steps of a policy, on both backends, against PEFT with the documented dropout and a plain AdamW."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nemo_rl_lora.algorithms.losses.likelihood import SftLoss
from nemo_rl_lora.algorithms.losses.policy import count_denominators
from nemo_rl_lora.seeds import derive_seed
from nemo_rl_lora.types import Batch
from tests.plain_training import BETAS, EPS, PlainTraining, assert_moved_alike
from tests.policy.dtensor.test_policy import make_policy, saved_adapter, spec
from tests.policy.megatron.twins import BOTH, masters, random_adapter, set_masters
from tests.tiny_models import VOCABULARY

SEED, KEEP = 7, 0.6
PROMPT, LENGTHS = 4, (12, 9)


class FormulaDropout(nn.Module):
    """x times 0 or 1 / KEEP, as a function of the run's seed, the optimizer step, the microbatch and the module."""

    step, microbatch = 0, 0

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        place = derive_seed(SEED, "dropout", FormulaDropout.step, FormulaDropout.microbatch)
        generator = torch.Generator().manual_seed(derive_seed(place, "dropout", self.name))
        return x * (torch.rand(x.shape, generator=generator) < KEEP) / KEEP


def rows_batch() -> Batch:
    """Two rows of other prompts, each a microbatch."""
    generator = torch.Generator().manual_seed(4)
    columns, length = torch.arange(max(LENGTHS))[None], torch.tensor(LENGTHS)
    mask = (columns >= PROMPT) & (columns < length[:, None])
    return Batch(
        token_ids=torch.randint(0, VOCABULARY, mask.shape, generator=generator),
        loss_mask=mask,
        sequence_length=length,
        prompt_length=torch.full((2,), PROMPT),
        group_index=torch.arange(2),
        denominators=count_denominators(mask),
    )


@pytest.mark.parametrize("backend", BOTH)
def test_steps_with_dropout_decay_and_a_schedule_equal_plain_ones(tiny_model, tmp_path: Path, backend: str):
    policy = make_policy(
        tiny_model("llama"),
        backend=BOTH[backend],
        spec=spec(dropout=1 - KEEP, dropout_position="pre"),
        train_micro_batch_size=1,
        max_grad_norm=0.2,
        optimizer={"kwargs": {"lr": 0.02, "weight_decay": 0.5, "betas": BETAS, "eps": EPS}},
        scheduler={"name": "wsd", "warmup_steps": 2, "decay_steps": 2, "total_steps": 5, "min_lr_ratio": 0.1},
    )
    set_masters(policy, random_adapter(policy))
    plain = PlainTraining(
        base=tiny_model("llama"),
        adapter=saved_adapter(policy, tmp_path),
        rates=[0.01, 0.02, 0.02, 0.02, 0.011],
        weight_decay=0.5,
        max_grad_norm=0.2,
    )
    for name, module in plain.model.named_modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = FormulaDropout(name.removeprefix("base_model.model."))
    batch = rows_batch()
    for number, rate in enumerate(plain.rates):
        output = policy.train_step(batch, SftLoss())
        FormulaDropout.step, logprobs = number, []
        for row, length in enumerate(LENGTHS):
            FormulaDropout.microbatch = row
            ids = batch.token_ids[row].tolist()
            logprobs.append(plain.logprobs(ids[:PROMPT], ids[PROMPT:length]))
        plain.step(-torch.cat(logprobs).mean())
        assert output.loss == pytest.approx(-torch.cat(logprobs).mean().item(), rel=1e-5)
        assert output.lr == pytest.approx(rate)
        assert output.grad_norm == pytest.approx(plain.norms[-1], rel=1e-4)
        assert_moved_alike(masters(policy), plain.adapter_tensors())
    assert max(plain.norms) > 0.2
