"""Models, adapters and real runs to export."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.driver import TinyRun
from tests.evaluation.evaluation_runs import save_peft_adapter
from tests.tiny_models import ALL_LINEAR


@pytest.fixture(scope="session")
def bf16_llama(tiny_llama, tmp_path_factory) -> Path:
    """The tiny Llama of the drivers' tests, tied head and tokenizer, in bfloat16."""
    directory = tmp_path_factory.mktemp("bf16_llama") / "model"
    shutil.copytree(tiny_llama, directory)
    (directory / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def peft_adapter(bf16_llama, tmp_path_factory) -> Path:
    """A PEFT adapter on every linear layer of it, with ranks and alphas of their own and rank-stabilised scaling."""
    return save_peft_adapter(
        bf16_llama,
        tmp_path_factory.mktemp("adapter") / "adapter",
        seed=1,
        r=4,
        lora_alpha=6,
        target_modules=list(ALL_LINEAR),
        rank_pattern={"model.layers.1.mlp.up_proj": 2},
        alpha_pattern={"model.layers.0.self_attn.q_proj": 3},
        use_rslora=True,
    )


@pytest.fixture(scope="session")
def trained_run(tiny_llama, tmp_path_factory) -> TinyRun:
    """An SFT run with a checkpoint after each of its 3 steps."""
    run = TinyRun(root=tmp_path_factory.mktemp("trained"), model=tiny_llama, algorithm="sft")
    ended = run("sft.max_num_steps=3", "checkpointing.save_period=1", "checkpointing.keep_top_k=null", *LEARNING)
    assert ended.code == 0, ended.err
    return run


LEARNING = ("policy.optimizer.kwargs.lr=0.02", "checkpointing.metric_name=null")
