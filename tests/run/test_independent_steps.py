"""The optimizer steps of whole runs, from their files and rollouts, against the same steps in plain torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoTokenizer

from nemo_rl_lora.generation.in_process import engine
from nemo_rl_lora.types import CompletionGroup
from tests.driver import TinyRun, adapter
from tests.evaluation.evaluation_runs import save_peft_adapter
from tests.plain_training import BETAS, EPS, PlainTraining, assert_moved_alike
from tests.tiny_models import ALL_LINEAR

LR, WEIGHT_DECAY, MAX_GRAD_NORM, TEMPERATURE, PENALTY = 0.01, 0.7, 0.3, 0.8, 0.2
# Warm-up over two steps, then a linear decay to 0 at step 6.
RATES = [LR * factor for factor in (0.5, 1.0, 1.0, 0.75, 0.5, 0.25)]
OPTIMIZER = [
    f"policy.optimizer.kwargs={{lr: {LR}, weight_decay: {WEIGHT_DECAY}, betas: {list(BETAS)}, eps: {EPS}}}",
    "policy.scheduler={_override_: true, name: linear, warmup_steps: 2, total_steps: 6}",
    f"policy.max_grad_norm={MAX_GRAD_NORM}",
    "policy.dtensor_cfg.lora_cfg.dropout=0.0",
    "checkpointing.save_period=1",
    "checkpointing.keep_top_k=null",
]


@pytest.fixture(scope="module")
def start(tiny_llama, tmp_path_factory) -> Path:
    """An adapter whose B is not zero."""
    directory = tmp_path_factory.mktemp("start")
    return save_peft_adapter(tiny_llama, directory, 5, 0.1, r=4, lora_alpha=32, target_modules=list(ALL_LINEAR))


def plain_training(run: TinyRun, start: Path, **settings: float) -> PlainTraining:
    return PlainTraining(
        base=run.model,
        adapter=start,
        rates=RATES,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        **settings,
    )


def assert_step_equals(run: TinyRun, number: int, plain: PlainTraining) -> None:
    """Adapter and moments of a step's checkpoint."""
    step = run.checkpoints / f"step_{number}"
    assert_moved_alike(adapter(step), plain.adapter_tensors())
    stored = load_file(step / "policy" / "optimizer" / "adapter.safetensors")
    for name, (first, second) in plain.moments().items():
        pair = {"exp_avg": first, "exp_avg_sq": second}
        assert_moved_alike({key: stored[f"{name}.{key}"] for key in pair}, pair, 1e-2)


def token_rows(run: TinyRun, rows: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of a turn each, as the tiny model's template writes them."""
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    return [
        (tokenizer(f"<|user|>{prompt}<|a|>")["input_ids"], tokenizer(f"{answer}<|end|>")["input_ids"])
        for prompt, answer in rows
    ]


def test_sft_trains_as_plain_torch_does(tiny_sft, start):
    rows = [(f"{i} + 2?", "so " * i + str(i + 2)) for i in range(4)]  # a batch holds all rows: order does not matter
    text = "".join(json.dumps({"input": prompt, "output": answer}) + "\n" for prompt, answer in rows)
    (tiny_sft.root / "rows.jsonl").write_text(text)
    ended = tiny_sft(*OPTIMIZER, f"policy.adapter.init_from={start}", "sft.max_num_steps=5", "sft.max_num_epochs=9")
    assert ended.code == 0, ended.err
    plain, lines = plain_training(tiny_sft, start), tiny_sft.metrics()
    for number in range(5):
        logprobs = torch.cat([plain.logprobs(*row) for row in token_rows(tiny_sft, rows)])
        plain.step(-logprobs.mean())
        assert lines[number]["loss"] == pytest.approx(-logprobs.mean().item(), rel=1e-4)
        assert lines[number]["grad_norm"] == pytest.approx(plain.norms[-1], rel=1e-3)
        assert lines[number]["lr"] == pytest.approx(RATES[number])
        assert_step_equals(tiny_sft, number + 1, plain)
    assert max(plain.norms) > MAX_GRAD_NORM


def test_dpo_trains_as_plain_torch_does(tiny_dpo, start):
    rows = [(f"{i} + 2?", "so " * i + str(i + 2), "no " * (3 - i) + "!") for i in range(4)]
    text = "".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), row, strict=True))) + "\n" for row in rows)
    (tiny_dpo.root / "rows.jsonl").write_text(text)
    settings = ["policy.adapter.reference=base", f"dpo.reference_policy_kl_penalty={PENALTY}"]
    settings += ["dpo.max_num_steps=4", "dpo.max_num_epochs=9"]
    ended = tiny_dpo(*OPTIMIZER, f"policy.adapter.init_from={start}", *settings)
    assert ended.code == 0, ended.err
    plain, lines = plain_training(tiny_dpo, start), tiny_dpo.metrics()
    answers = [token_rows(tiny_dpo, [(row[0], row[side]) for row in rows]) for side in (1, 2)]
    for number in range(4):
        chosen, rejected = (
            torch.stack([(plain.logprobs(*row) - plain.reference(*row)).sum() for row in side]) for side in answers
        )
        loss = -logsigmoid(PENALTY * (chosen - rejected)).mean()
        plain.step(loss)
        assert lines[number]["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert lines[number]["grad_norm"] == pytest.approx(plain.norms[-1], rel=1e-3)
        assert_step_equals(tiny_dpo, number + 1, plain)


def advantages_of(groups: Sequence[CompletionGroup]) -> list[float]:
    """Of rewards less 0.9 for a completion of six tokens, 0.45 for one of five: the baseline is the others' mean, and
    the divisor their standard deviation."""
    advantages = []
    for group in groups:
        rewards = [
            (sum(map(ord, completion.text)) % 5) / 4 - 0.45 * max(len(completion.token_ids) - 4, 0)
            for completion in group.completions
        ]
        for number, reward in enumerate(rewards):
            others = torch.tensor([other for place, other in enumerate(rewards) if place != number]).double()
            divisor = float(others.std()) + 1e-6 if len(set(others.tolist())) > 1 else 1.0
            advantages.append((reward - float(others.mean())) / divisor if len(set(rewards)) > 1 else 0.0)
    return advantages


def test_grpo_trains_as_plain_torch_does(tiny_run, start, monkeypatch):
    """Three rollouts with shaped rewards, of two optimizer steps each, with clipped ratios and a KL term."""
    steps: list[list[CompletionGroup]] = []

    class Recording(engine.InProcessGeneration):
        def collect(self, tickets):
            steps.append(super().collect(tickets))
            return steps[-1]

    monkeypatch.setattr(engine, "InProcessGeneration", Recording)
    ended = tiny_run(
        *OPTIMIZER,
        f"policy.adapter.init_from={start}",
        "policy.adapter.reference=base",
        f"loss_fn.reference_policy_kl_penalty={PENALTY}",
        "policy.train_global_batch_size=8",
        f"policy.generation.temperature={TEMPERATURE}",
        f"policy.generation.stop_token_ids={list(range(40))}",  # so that lengths differ
        "grpo.max_num_steps=3",
        "grpo.reward_shaping={enabled: true, max_response_length: 6, overlong_buffer_length: 2, "
        "overlong_buffer_penalty: 0.9}",
    )
    assert ended.code == 0, ended.err
    plain, clipped = plain_training(tiny_run, start, temperature=TEMPERATURE), 0
    plain.rates = [rate for rate in RATES[:3] for _ in range(2)]  # a schedule counts rollouts
    for number, groups in enumerate(steps):
        rows = [(group.prompt.token_ids, one.token_ids) for group in groups for one in group.completions]
        advantages = advantages_of(groups)
        assert len({len(answer) for _, answer in rows}) > 1
        losses: list[float] = []
        with torch.no_grad():
            old = [plain.logprobs(*row) for row in rows]
        for half in (range(8), range(8, 16)):
            loss, num_tokens = torch.zeros((), dtype=torch.float64), sum(len(rows[i][1]) for i in half)
            for i in half:
                now, reference = plain.logprobs(*rows[i]), plain.reference(*rows[i])
                loss = loss + grpo_terms(now, old[i], reference, advantages[i]).sum() / num_tokens
                clipped += int(((now - old[i]).exp() - 1).abs().gt(0.2).sum())
            plain.step(loss)
            losses.append(loss.item())
        line = tiny_run.metrics()[number]
        assert line["loss"] == pytest.approx(sum(losses) / 2, rel=1e-3)
        assert line["grad_norm"] == pytest.approx(sum(plain.norms[-2:]) / 2, rel=1e-3)
        assert line["lr"] == pytest.approx(RATES[number])
        assert line["advantages/max"] == pytest.approx(max(advantages), rel=1e-5)
        assert_step_equals(tiny_run, number + 1, plain)
    assert len(plain.norms) == 6
    assert clipped > 0


def grpo_terms(now: Tensor, old: Tensor, reference: Tensor, advantage: float) -> Tensor:
    ratio, difference = (now - old).exp(), reference - now
    objective = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    kl = (now - now.detach()).exp() * (difference.exp() - 1 - difference)
    return PENALTY * kl.clamp(max=10.0) - objective  # the default of loss_fn.kl_output_clamp_value
