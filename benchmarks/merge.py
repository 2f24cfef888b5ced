"""Merging an adapter into a Llama: this product's export, or PEFT's merge_and_unload + save_pretrained. One JSON line.

uv run benchmarks/merge.py --make DIR [--shapes 1b|8b] [--num-adapters N]     a random model in bfloat16, r=16 adapters
uv run benchmarks/merge.py --side ours|peft --work DIR [--num-adapters N] [--verify none|sampled|full]

`work_s` is the time after imports; `peak_rss_mib` is how far the peak of resident memory, mapped files included, is
above what was resident after imports. With several adapters our side exports them at once, and PEFT's side one after
the other, loading the base for each, since a merge overwrites it. Outputs are removed again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from measure import print_result, reset_peak, restart_tuned, rss_mib, versions

DIM, ALPHA = 16, 32
SHARD_BYTES = 5 * 10**8
SHAPES = {  # layers, hidden, intermediate, heads, key-value heads, vocabulary
    "135m": (30, 576, 1536, 9, 3, 49152),
    "1b": (22, 2048, 5632, 32, 4, 32000),
    "8b": (32, 4096, 14336, 32, 8, 128256),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", type=Path, help="write a model and adapters into this directory, and end")
    parser.add_argument("--shapes", choices=SHAPES, default="1b")
    parser.add_argument("--side", choices=["ours", "peft"])
    parser.add_argument("--work", type=Path, help="what --make wrote; the output goes there too")
    parser.add_argument("--num-adapters", type=int, default=1)
    parser.add_argument("--verify", choices=["none", "sampled", "full"], default="sampled", help="our side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep-freed-memory", action="store_true", help="start again with glibc told to keep it")
    arguments = parser.parse_args()
    if arguments.keep_freed_memory:
        restart_tuned(arguments.threads)
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(arguments.threads)}
    if arguments.make is not None:
        make(arguments.make, arguments.shapes, arguments.num_adapters)
        return
    if arguments.side is None or arguments.work is None:
        parser.error("give --make, or --side and --work")
    merge = {"ours": merge_ours, "peft": merge_peft}[arguments.side]
    print_result(measured(merge, arguments))


def measured(merge: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(arguments.threads)
    out = arguments.work / f"out_{arguments.side}"
    shutil.rmtree(out, ignore_errors=True)
    work = merge(arguments, out)  # imports
    reset_peak()
    before, begun = rss_mib(peak=False), time.perf_counter()
    num_bytes = work()
    seconds = time.perf_counter() - begun
    peak = rss_mib(peak=True)
    shutil.rmtree(out, ignore_errors=True)
    return {
        "task": "merge",
        "side": arguments.side,
        "verify": arguments.verify if arguments.side == "ours" else "none",
        "num_adapters": arguments.num_adapters,
        "output_bytes": num_bytes,
        "work_s": round(seconds, 2),
        "peak_rss_mib": round(peak - before, 1),
        "resident_after_imports_mib": before,
        "threads": torch.get_num_threads(),
        "versions": versions("torch", "transformers", "peft", "safetensors"),
    }


def merge_ours(arguments: argparse.Namespace, out: Path) -> Any:
    from nemo_rl_lora.export.convert import ExportRequest, export

    several = arguments.num_adapters > 1
    request = ExportRequest(
        adapter=arguments.work / "run" if several else arguments.work / "run" / "step_1",
        output=out,
        model_name=str(arguments.work / "model"),
        all_steps=several,
        max_shard_bytes=SHARD_BYTES,
        verification=arguments.verify,
    )

    def work() -> int:
        exports = export(request)
        assert {item.status for item in exports} == {"written"}, exports
        return sum(path.stat().st_size for path in out.rglob("*.safetensors"))

    return work


def merge_peft(arguments: argparse.Namespace, out: Path) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    assert LlamaForCausalLM  # imported here, so that it does not count

    def work() -> int:
        num_bytes = 0
        for step in range(1, arguments.num_adapters + 1):
            model = AutoModelForCausalLM.from_pretrained(arguments.work / "model", dtype=torch.bfloat16)
            model = PeftModel.from_pretrained(model, arguments.work / "run" / f"step_{step}" / "policy" / "adapter")
            model.merge_and_unload().save_pretrained(out / f"step_{step}", max_shard_size=SHARD_BYTES)
            num_bytes += sum(path.stat().st_size for path in (out / f"step_{step}").glob("*.safetensors"))
        return num_bytes

    return work


def make(directory: Path, shapes: str, num_adapters: int) -> None:
    """A random Llama of these shapes, written a shard at a time, and random adapters on all its linear layers."""
    import torch
    from safetensors.torch import save_file

    layers, hidden, intermediate, heads, kv_heads, vocabulary = SHAPES[shapes]
    kv = hidden // heads * kv_heads
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        names |= {f"model.layers.{i}.{name}.weight": shape for name, shape in linears.items()}
        names |= {
            f"model.layers.{i}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")
        }
    names |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    torch.manual_seed(0)
    _write_model(directory / "model", names)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    (directory / "model" / "config.json").write_text(json.dumps(config))
    peft_config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": DIM, "lora_alpha": ALPHA, "bias": "none"}
    peft_config |= {"target_modules": [name.split(".")[1] for name in linears], "inference_mode": True}
    for step in range(1, num_adapters + 1):
        target = directory / "run" / f"step_{step}" / "policy" / "adapter"
        target.mkdir(parents=True)
        tensors = {}
        for name, (rows, columns) in (
            (n, s) for n, s in names.items() if n.split(".")[-2] in peft_config["target_modules"]
        ):
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{prefix}.lora_A.weight"] = (torch.rand(DIM, columns) * 2 - 1) / columns**0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, DIM) * 0.01
        save_file(tensors, target / "adapter_model.safetensors")
        (target / "adapter_config.json").write_text(json.dumps(peft_config))


def _write_model(directory: Path, names: dict[str, tuple[int, ...]]) -> None:
    """Weights that are windows of one pool of random numbers, which costs less time than numbers of their own."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    pool = (torch.randn(1 << 24) * 0.02).to(torch.bfloat16)
    shards: list[list[str]] = [[]]
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in names.items()}
    for name in names:
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + sizes[name] > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    for number, shard in enumerate(shards):
        tensors = {}
        for name in shard:
            offset = int(torch.randint(1 << 23, ()))
            repeats = -(-(sizes[name] // 2) // (1 << 23))
            tensors[name] = pool[offset : offset + (1 << 23)].repeat(repeats)[: sizes[name] // 2].view(names[name])
        save_file(tensors, directory / f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors")
    weight_map = {
        name: f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k, shard in enumerate(shards) for name in shard
    }
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main()
