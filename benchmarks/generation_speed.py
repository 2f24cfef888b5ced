"""Tokens per second of our engines and of transformers' `generate`, in turn, on the same work.

The work is a rollout of GRPO: P prompts (sums of two numbers, chat template), G completions each, a fixed number of
tokens without an end of sequence, temperature 1. The engine samples from merged weights and from base + adapter
(r = 16 on all linear layers, B not zero), `generate` from the base model. Every round runs each side once, so load
on the machine falls on all; the ratio of medians is the result, and on a busy machine with one thread the tokens
per CPU second. Prefill counts on all sides. A process has one vLLM engine: compare.py runs `--sides vllm-merged` and
`--sides vllm-adapter` in turn with the others.

    python benchmarks/generation_speed.py [--sides merged,adapter,transformers] [--prompts 8] [--completions 8] ...
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nemo_rl_lora.config.generation import GenerationConfig
from nemo_rl_lora.generation.in_process.engine import InProcessGeneration
from nemo_rl_lora.generation.protocol import Generation, generate
from nemo_rl_lora.lora.merge import merged_weight
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.models.source import resolve_model
from nemo_rl_lora.policy.offer import OfferedTensors
from nemo_rl_lora.types import GroupRequest, Prompt, SamplingParams, SyncMode, TensorInfo, WeightsRef

DIM, SCALE = 16, 2.0
SIDES = ("transformers", "merged", "adapter", "vllm-merged", "vllm-adapter")


def adapted_modules(model: PreTrainedModel) -> list[AdaptedModule]:
    return [
        AdaptedModule(
            name=name,
            in_features=module.in_features,
            out_features=module.out_features,
            dim=DIM,
            alpha=DIM * SCALE,
            scale=SCALE,
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]


def weights_ref(model: PreTrainedModel, adapted: list[AdaptedModule], mode: SyncMode) -> WeightsRef:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module in adapted:
        a = torch.randn(DIM, module.in_features, generator=generator) / module.in_features**0.5
        b = 1e-3 * torch.randn(module.out_features, DIM, generator=generator)
        if mode == "merged":
            weight = model.get_parameter(f"{module.name}.weight").detach()
            tensors[f"{module.name}.weight"] = merged_weight(weight, a, b, module.scale)
        else:
            tensors[f"base_model.model.{module.name}.lora_A.weight"] = a
            tensors[f"base_model.model.{module.name}.lora_B.weight"] = b
    manifest = tuple(TensorInfo(name=n, shape=tuple(t.shape), dtype=t.dtype) for n, t in tensors.items())
    offered = OfferedTensors({name: partial(tensors.__getitem__, name) for name in tensors}, mode)
    return WeightsRef(
        version=1,
        mode=mode,
        manifest=manifest,
        digest="benchmark",
        num_bytes=0,
        tensors=offered,
        handed=offered.handed,
    )


def sum_prompts(tokenizer: object, count: int) -> list[tuple[int, ...]]:
    prompts = []
    for i in range(count):
        message = {"role": "user", "content": f"What is {i % 9 + 1} + {(i * 5) % 9 + 1}? Answer with a number."}
        text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)  # type: ignore[attr-defined]
        prompts.append(tuple(tokenizer(text, add_special_tokens=False).input_ids))  # type: ignore[operator]
    return prompts


def vllm_engine(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    adapted: list[AdaptedModule],
    mode: SyncMode,
    args: argparse.Namespace,
) -> Generation:
    """vLLM in this process, which stops at no token."""
    from nemo_rl_lora.generation.vllm.generation import ServedModel, VllmGeneration, engine_settings, start_engine

    spec = LoraSpec(dim=DIM, alpha=DIM * SCALE)
    model = ServedModel(path=path, name=args.model, tokenizer=tokenizer, spec=spec, adapted=adapted)
    config = GenerationConfig.model_validate(
        {
            "backend": "vllm",
            "lora_sync": mode,
            "max_new_tokens": args.tokens,
            "max_concurrent_sequences": args.prompts * args.completions,
            "vllm_cfg": {"precision": args.dtype, "enforce_eager": True, "max_model_len": 512},
        }
    )
    settings = engine_settings(config, model, {}, mode)
    engine = VllmGeneration(model, settings, lambda: start_engine(settings))
    engine._eos_token_ids = frozenset()
    return engine


def engine_run(engine: Generation, prompts: list[tuple[int, ...]], args: argparse.Namespace) -> int:
    requests = [
        GroupRequest(
            prompt=Prompt(index=i, token_ids=token_ids, text="", row={}, environment=""),
            num_completions=args.completions,
            seeds=tuple(range(i * args.completions, (i + 1) * args.completions)),
            sampling=SamplingParams(max_new_tokens=args.tokens),
        )
        for i, token_ids in enumerate(prompts)
    ]
    return sum(len(c.token_ids) for group in generate(engine, requests) for c in group.completions)


def transformers_run(model: PreTrainedModel, prompts: list[tuple[int, ...]], args: argparse.Namespace) -> int:
    longest = max(map(len, prompts))
    token_ids = torch.tensor([(0,) * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([(0,) * (longest - len(p)) + (1,) * len(p) for p in prompts])
    out = model.generate(
        token_ids.repeat_interleave(args.completions, dim=0),
        attention_mask=mask.repeat_interleave(args.completions, dim=0),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=args.tokens,
        min_new_tokens=args.tokens,
        pad_token_id=0,
    )
    return out.shape[0] * (out.shape[1] - longest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--sides", default="merged,adapter,transformers", help=f"of {', '.join(SIDES)}, by commas")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    for name, default in (("prompts", 8), ("completions", 8), ("tokens", 32), ("threads", 2), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = resolve_model(args.model).path
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = sum_prompts(tokenizer, args.prompts)
    tokenizer.eos_token, model.generation_config.eos_token_id = None, None
    adapted = adapted_modules(model)
    sides: dict[str, Callable[[], int]] = {}
    syncs: dict[str, list[float]] = {}
    for side in args.sides.split(","):
        if side == "transformers":
            sides[side] = lambda: transformers_run(model, prompts, args)
            continue
        assert side in SIDES, side
        mode: SyncMode = "adapter" if side.endswith("adapter") else "merged"
        engine: Generation
        if side.startswith("vllm"):
            engine = vllm_engine(path, tokenizer, adapted, mode, args)
        else:
            engine = InProcessGeneration(
                model,
                tokenizer=tokenizer,
                spec=LoraSpec(dim=DIM, alpha=DIM * SCALE),
                adapted=adapted,
                compute_dtype=dtype,
                max_concurrent_sequences=args.prompts * args.completions,
            )
        ref = weights_ref(model, adapted, mode)
        syncs[side] = [engine.sync_weights(replace(ref, version=version)).seconds for version in range(3)]
        sides[side] = lambda engine=engine: engine_run(engine, prompts, args)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in sides}
    num_tokens: dict[str, int] = {}
    for _ in range(args.rounds + 1):  # the first is a warm-up
        for name, run in sides.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            num_tokens[name] = run()
            seconds[name].append(time.perf_counter() - start)
            cpu_seconds[name].append(time.process_time() - cpu_start)
    per_cpu = {name: num_tokens[name] / statistics.median(s[1:]) for name, s in cpu_seconds.items()}
    rates = {name: num_tokens[name] / statistics.median(s[1:]) for name, s in seconds.items()}
    print(
        json.dumps(
            {
                "tokens_per_s": {name: round(rate, 1) for name, rate in rates.items()},
                "tokens_per_cpu_s": {name: round(rate, 1) for name, rate in per_cpu.items()},
                "times_first": {name: round(rate / rates[next(iter(sides))], 2) for name, rate in rates.items()},
                "sync_seconds": {name: [round(s, 3) for s in seconds] for name, seconds in syncs.items()},
                "prompt_tokens": [len(p) for p in prompts],
                "tokens": num_tokens,
                "threads": args.threads,
                "dtype": args.dtype,
            }
        )
    )


if __name__ == "__main__":
    main()
