"""The SFT driver from its command line to its files, on a tiny random model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.driver import adapter, same, without_seconds

TRAIN_METRICS = [
    "loss",
    "grad_norm",
    "lr",
    "global_valid_toks",
    "global_valid_seqs",
    "num_cut_rows",
    "num_cut_tokens",
    "total_num_tokens",
    "tokens_per_second",
    "tokens_per_second_per_gpu",
    "model_tflops_per_second_per_gpu",
    "timing/total_step_time",
    "timing/data_processing",
    "timing/policy_training",
]


def peft_val_loss(run, step: Path) -> float:
    """The mean loss of an answer's token over the rows of the run's file, by transformers and PEFT."""
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(run.model)
    base = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, step / "policy" / "adapter")
    total, count = 0.0, 0
    for line in (run.root / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        asked = [{"role": "user", "content": row["input"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        answered = [*asked, {"role": "assistant", "content": row["output"]}]
        ids = torch.tensor(tokenizer.apply_chat_template(answered, return_dict=True)["input_ids"])
        with torch.no_grad():
            logprobs = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        for t in range(len(prompt), len(ids)):
            total -= float(logprobs[t - 1, ids[t]])
            count += 1
    return total / count


def test_a_run_records_its_metrics_and_saves_an_adapter_that_peft_loads_to_the_same_loss(tiny_sft):
    ended = tiny_sft("sft.val_at_start=true", "sft.val_at_end=true", "policy.optimizer.kwargs.lr=0.01")

    assert ended.code == 0, ended.err
    for line in tiny_sft.metrics():
        assert set(TRAIN_METRICS) <= line.keys()
    start, end = tiny_sft.metrics("validation")
    assert end["val_loss"] < start["val_loss"]
    step = tiny_sft.checkpoints / "step_2"
    # fp32 on both sides; the sum of about 100 terms in another order
    assert end["val_loss"] == pytest.approx(peft_val_loss(tiny_sft, step), abs=1e-5)
    assert "num_tokens" in json.loads((step / "training_info.json").read_text())["counters"]


def test_a_resumed_run_of_a_mixture_is_the_run_that_was_interrupted(tiny_sft, tmp_path):
    tiny_sft.arguments()  # writes rows.jsonl
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"input": f"say {i}", "output": "x" * i}) + "\n" for i in range(1, 6)))
    one = f"{{dataset_name: ResponseDataset, data_path: '{tmp_path / 'rows.jsonl'}', rate: 3}}"
    two = f"{{dataset_name: ResponseDataset, data_path: '{other}', rate: 1}}"
    settings = [
        f"data.train=[{one}, {two}]",
        "sft.max_num_epochs=5",
        "policy.dtensor_cfg.lora_cfg.dropout=0.3",
        "policy.scheduler={name: cosine, warmup_steps: 2, total_steps: 8}",
    ]
    whole = tiny_sft(*settings, "sft.max_num_steps=6", f"checkpointing.checkpoint_dir={tmp_path}/whole")
    assert whole.code == 0, whole.err
    assert tiny_sft(*settings, "sft.max_num_steps=3").code == 0
    assert tiny_sft(*settings, "sft.max_num_steps=6").code == 0

    steps = tmp_path / "whole" / "step_6", tiny_sft.checkpoints / "step_6"
    assert same(*(adapter(step) for step in steps))
    assert same(*(load_file(step / "policy/optimizer/adapter.safetensors") for step in steps))
    assert without_seconds(tiny_sft.metrics()[3:]) == without_seconds(tiny_sft.metrics(experiment=3))
    of_whole, of_resumed = (json.loads((step / "training_info.json").read_text()) for step in steps)
    assert of_whole["counters"] == of_resumed["counters"]
    assert of_whole["data_position"] == of_resumed["data_position"]
    tokens = [of_whole["counters"][f"num_tokens/{name}"] for name in ("ResponseDataset", "ResponseDataset#2")]
    assert min(tokens) > 0
    assert sum(tokens) == of_whole["counters"]["num_tokens"]


def test_filling_of_microbatches_does_not_change_a_run(tiny_sft, tmp_path):
    """Rows, length-sorted and packed: the same losses and the same adapter, to fp32 rounding."""
    fills = {
        "sorted": [],
        "rows": ["policy.dynamic_batching.enabled=false", "policy.train_micro_batch_size=3"],
        "packed": ["policy.dynamic_batching.enabled=false", "policy.sequence_packing.enabled=true"],
    }
    adapters, losses = [], []
    for number, (name, settings) in enumerate(fills.items(), 1):
        ended = tiny_sft(
            *settings, f"checkpointing.checkpoint_dir={tmp_path}/{name}", "policy.optimizer.kwargs.eps=1e-4"
        )
        assert ended.code == 0, ended.err
        adapters.append(adapter(tmp_path / name / "step_2"))
        losses.append([line["loss"] for line in tiny_sft.metrics(experiment=number)])
    for other_adapter, other_losses in zip(adapters[1:], losses[1:], strict=True):
        assert other_losses == pytest.approx(losses[0], abs=1e-5)
        for name, tensor in adapters[0].items():
            assert torch.allclose(tensor, other_adapter[name], atol=1e-5), name


def test_rows_cut_at_the_limit_are_counted(tiny_sft):
    ended = tiny_sft("policy.max_total_sequence_length=12", "data.max_input_seq_length=12", "data.shuffle=false")

    assert ended.code == 0, ended.err
    # "<|user|>1 + 1?<|a|>so 2<|end|>" has 1 + 6 + 1 + 4 + 1 tokens, and rows 2 and 3 have 3 and 6 more
    first = tiny_sft.metrics()[0]
    assert (first["num_cut_rows"], first["num_cut_tokens"]) == (3, 1 + 4 + 7)


def test_rows_without_a_token_to_learn_are_refused_before_weights_are_loaded(tiny_sft):
    ended = tiny_sft("policy.max_total_sequence_length=6", "data.max_input_seq_length=6")

    assert ended.code == 2
    assert "data.train: all 12 rows are left out, nothing of their answers being within 6 tokens" in ended.err


def test_full_fine_tuning_saves_a_model(tiny_sft):
    ended = tiny_sft("policy.dtensor_cfg.lora_cfg.enabled=false", "policy.optimizer.full_finetuning_lr=0.01")

    assert ended.code == 0, ended.err
    before = AutoModelForCausalLM.from_pretrained(tiny_sft.model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tiny_sft.checkpoints / "step_2" / "policy" / "weights").state_dict()
    assert not same(before, after)


def test_a_plan_says_what_is_trained_on_and_loads_nothing(tiny_sft):
    ended = tiny_sft("--plan")

    assert ended.code == 0, ended.err + ended.out
    assert "12 of ResponseDataset to train on, 12 rows for validation (3 steps an epoch)" in " ".join(ended.out.split())
