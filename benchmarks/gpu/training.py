"""Our training steps on one GPU: SFT, GRPO, with the LoRA kernels and without, and the Megatron backend.

Rows have their full length and distinct prompts, so that nothing is padded and no prompt is shared: any trainer has the
same work. The policies are the product's own, with one replacement: the DTensor backend's weights are drawn on the
device in place of being read, since a model of 16 GB takes longer to write and check than to measure.

The Triton kernels of the adapter are off except where they are measured, and there nemo-automodel's have one
configuration each, as ours do: picking one by timing compiles for a minute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from gpu.shapes import LLAMA_1B, QWEN2_HALF_B, QWEN3_4B, Shape, random_model
from gpu.timing import beside_published, measurement, timed, training_facts
from work import LORA_ALPHA, LORA_DIM

from nemo_rl_lora.algorithms.losses.likelihood import SftLoss
from nemo_rl_lora.algorithms.losses.policy import count_denominators, make_policy_loss
from nemo_rl_lora.config.lora import lora_spec_from_policy
from nemo_rl_lora.config.loss_fn import LossFnConfig
from nemo_rl_lora.config.optimizer_settings import adam_settings
from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.lora.files import AdapterBase
from nemo_rl_lora.policy.dtensor import policy as dtensor
from nemo_rl_lora.policy.protocol import PolicySetup
from nemo_rl_lora.types import Batch, LossFn
from tests.gpu.checks import Check, Fact, Machine

Backend = Literal["dtensor", "megatron"]
SFT_TOKENS, SFT_ROWS = 4096, 4  # of a row; rows of an optimizer step
GRPO_TOKENS, GRPO_PROMPT_TOKENS = 16384, 1024
TOY_TOKENS = 64
GRPO_PUBLISHED, GRPO_SOURCE = 6229.0, "prime-rl, Qwen3-4B, r 16, 16k tokens, one H100"


def sft_small(machine: Machine) -> Iterator[Check]:
    for shape in (LLAMA_1B, QWEN2_HALF_B):
        yield measurement(f"ours, {shape.name}", partial(sft_step, machine, shape, rows_of_microbatch=SFT_ROWS))


def grpo_4b(machine: Machine) -> Iterator[Check]:
    for checkpointing, name in ((True, "with"), (False, "without")):
        yield measurement(
            f"ours, {QWEN3_4B.name}, {name} activation checkpointing", partial(grpo_step, machine, checkpointing)
        )


def kernels(machine: Machine) -> Iterator[Check]:
    settings: dict[str, Literal["automodel"] | bool] = {"off": False, "ours": True, "automodel": "automodel"}
    for name, use_triton in settings.items():
        yield measurement(f"{LLAMA_1B.name}, {name}", partial(kernels_step, machine, use_triton))
    yield measurement(f"{LLAMA_1B.name}, compiled layers", partial(compiled_step, machine))


def megatron(machine: Machine) -> Iterator[Check]:
    yield measurement(f"ours, {LLAMA_1B.name}", partial(megatron_step, machine))


def sft_tokens(machine: Machine) -> int:
    """Of a row."""
    return SFT_TOKENS if machine.has_gpu else TOY_TOKENS


def sft_step(
    machine: Machine,
    shape: Shape,
    *,
    rows_of_microbatch: int,
    use_triton: Literal["automodel"] | bool = False,
    compiled: bool = False,
) -> dict[str, Fact]:
    num_tokens = sft_tokens(machine)
    config = shape.config(toy=not machine.has_gpu)
    policy = dtensor_policy(
        machine,
        config,
        num_tokens,
        microbatch_tokens=rows_of_microbatch * num_tokens,
        use_triton=use_triton,
        compiled=compiled,
    )
    return step_facts(machine, config, policy, full_rows(config, SFT_ROWS, num_tokens, prompt_tokens=1), SftLoss())


def kernels_step(machine: Machine, use_triton: Literal["automodel"] | bool) -> dict[str, Fact]:
    if use_triton and not machine.has_gpu:
        return {"skipped": "no GPU: the kernels are Triton's"}
    if use_triton == "automodel":
        from tests.gpu import kernels as pinned

        pinned.configure()
    return sft_step(machine, LLAMA_1B, rows_of_microbatch=SFT_ROWS, use_triton=use_triton)


def compiled_step(machine: Machine) -> dict[str, Fact]:
    """`policy.compile`, beside the one that is off."""
    if not machine.has_gpu:
        return {"skipped": "no GPU: compiling takes longer than all else of a toy"}
    return sft_step(machine, LLAMA_1B, rows_of_microbatch=SFT_ROWS, compiled=True)


def grpo_step(machine: Machine, checkpointing: bool) -> dict[str, Fact]:
    """One sequence, on the log-probabilities of generation, without a KL term."""
    num_tokens, prompt_tokens = (GRPO_TOKENS, GRPO_PROMPT_TOKENS) if machine.has_gpu else (TOY_TOKENS, TOY_TOKENS // 4)
    config = QWEN3_4B.config(toy=not machine.has_gpu)
    cfg = {"activation_checkpointing": checkpointing}
    policy = dtensor_policy(machine, config, num_tokens, microbatch_tokens=num_tokens, dtensor_cfg=cfg)
    batch = full_rows(config, 1, num_tokens, prompt_tokens=prompt_tokens)
    loss_fn = make_policy_loss(LossFnConfig(reference_policy_kl_penalty=0.0))
    facts = step_facts(machine, config, policy, batch, loss_fn)
    return beside_published(machine, facts, GRPO_PUBLISHED, GRPO_SOURCE)


def megatron_step(machine: Machine) -> dict[str, Fact]:
    """Its weights are read from a directory, as the product does."""
    from importlib.util import find_spec

    from nemo_rl_lora.policy.megatron.policy import MegatronPolicy

    num_tokens = sft_tokens(machine)
    config = LLAMA_1B.config(toy=not machine.has_gpu)
    with TemporaryDirectory(dir=machine.root) as directory:
        random_model(config, machine.device, attention="eager").save_pretrained(directory)
        policy = MegatronPolicy(
            *policy_inputs(Path(directory), num_tokens, microbatch_tokens=SFT_ROWS * num_tokens, backend="megatron")
        )
    batch = full_rows(config, SFT_ROWS, num_tokens, prompt_tokens=1)
    return {
        **step_facts(machine, config, policy, batch, SftLoss()),
        "transformer_engine": find_spec("transformer_engine") is not None,
    }


def step_facts(machine: Machine, config: Any, policy: Any, batch: Batch, loss_fn: LossFn) -> dict[str, Fact]:
    found = timed(machine, partial(policy.train_step, batch, loss_fn), num_warm=2, num_timed=3)
    policy.close()
    return training_facts(machine, config, found, *batch.token_ids.shape)


def full_rows(config: Any, num_rows: int, num_tokens: int, *, prompt_tokens: int) -> Batch:
    """Random tokens; every token after the prompt is a loss token. Advantages alternate in sign."""
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(config.vocab_size, (num_rows, num_tokens), generator=generator)
    loss_mask = (torch.arange(num_tokens) >= prompt_tokens).expand(num_rows, -1).clone()
    return Batch(
        token_ids=token_ids,
        loss_mask=loss_mask,
        sequence_length=torch.full((num_rows,), num_tokens),
        prompt_length=torch.full((num_rows,), prompt_tokens),
        group_index=torch.arange(num_rows),
        denominators=count_denominators(loss_mask),
        generation_logprobs=-torch.rand(num_rows, num_tokens, generator=generator) * loss_mask,
        advantages=1.0 - 2.0 * (torch.arange(num_rows) % 2),
    )


def dtensor_policy(
    machine: Machine, config: Any, num_tokens: int, *, microbatch_tokens: int, **settings: Any
) -> dtensor.DTensorPolicy:
    """LoRA of rank 16 on all linear layers of random weights."""
    with drawn_weights(machine, config):
        return dtensor.DTensorPolicy(
            *policy_inputs(Path("random"), num_tokens, microbatch_tokens=microbatch_tokens, **settings)
        )


@contextmanager
def drawn_weights(machine: Machine, config: Any) -> Iterator[None]:
    """The DTensor backend gets a random model of this config, whatever directory it loads."""
    original = dtensor.load_model
    dtensor.load_model = lambda path, *, dtype, config_overrides: random_model(
        config, machine.device, attention="eager"
    )
    try:
        yield
    finally:
        dtensor.load_model = original


def policy_inputs(
    path: Path,
    num_tokens: int,
    *,
    microbatch_tokens: int,
    backend: Backend = "dtensor",
    use_triton: Literal["automodel"] | bool = False,
    compiled: bool = False,
    dtensor_cfg: Mapping[str, Any] | None = None,
) -> tuple[PolicyConfig, PolicySetup]:
    """What a policy is built from: packed microbatches of this many tokens, everything else as it is by default."""
    config = PolicyConfig.model_validate(
        {
            "model_name": "random",
            "backend": backend,
            "max_total_sequence_length": num_tokens,
            "compile": compiled,
            "sequence_packing": {
                "enabled": True,
                "train_mb_tokens": microbatch_tokens,
                "logprob_mb_tokens": microbatch_tokens,
            },
            "lora": {
                "enabled": True,
                "dim": LORA_DIM,
                "alpha": LORA_ALPHA,
                "use_triton": use_triton,
            },
            "dtensor_cfg": dict(dtensor_cfg or {}),
        }
    )
    spec = lora_spec_from_policy(config)
    setup = PolicySetup(
        model_path=path,
        base_model_name="random",
        base=AdapterBase(name="random"),
        spec=spec,
        seed=0,
        temperature=1.0,
        keep_reference=False,
        logprob_rows=config.logprob_rows,
        adam=adam_settings(config, lora=True),
    )
    return config, setup
