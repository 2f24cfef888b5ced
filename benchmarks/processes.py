"""What several processes cost: a training step of one process, of two without Ray, and of the same two as Ray actors.

All three policies are alive at once and take their steps in turn, so that a busy machine is busy for each of them. CPU
seconds are those of every process that belongs to a side: its ranks, and Ray's own servers beside them.

    benchmarks/processes.py [--pairs 6] [--steps 2] [--backend dtensor]

Ends with one line of JSON: seconds and CPU seconds of a step of each side, pair by pair, and their ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=6, help="how often the sides take turns")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of a turn")
    parser.add_argument("--backend", choices=("dtensor", "megatron"), default="dtensor")
    parser.add_argument("--layers", type=int, default=6, help="layers of the model; 576 channels as SmolLM2-135M")
    return parser.parse_args()


def make_model(directory: Path, num_layers: int) -> Path:
    """A random Llama of SmolLM2-135M's sizes, of fewer layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def make_batch(num_rows: int = 8, length: int = 192) -> Any:
    import torch

    from nemo_rl_lora.types import Batch, Denominators

    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(num_rows, length, dtype=torch.bool)
    mask[:, 0] = False
    return Batch(
        token_ids=torch.randint(0, 49152, (num_rows, length), generator=generator),
        loss_mask=mask,
        sequence_length=torch.full((num_rows,), length),
        prompt_length=torch.ones(num_rows, dtype=torch.int64),
        group_index=torch.arange(num_rows),
        denominators=Denominators(num_loss_tokens=int(mask.sum()), num_sequences=num_rows),
    )


def settings(model: Path, backend: str) -> tuple[Any, Any]:
    """The policy's configuration and setup: LoRA of rank 16 on every linear layer, in fp32."""
    from nemo_rl_lora.config.optimizer_settings import adam_settings
    from nemo_rl_lora.config.policy import PolicyConfig
    from nemo_rl_lora.lora.spec import LoraSpec
    from nemo_rl_lora.policy.protocol import PolicySetup

    config = PolicyConfig.model_validate(
        {
            "model_name": str(model),
            "precision": "float32",
            "max_total_sequence_length": 256,
            "train_micro_batch_size": 2,
            "backend": backend,
            "optimizer": {"kwargs": {"lr": 1e-4}},
        }
    )
    setup = PolicySetup(
        model_path=model,
        base_model_name="random",
        spec=LoraSpec(dim=16, alpha=32),
        seed=1,
        temperature=1.0,
        keep_reference=False,
        logprob_rows=2,
        adam=adam_settings(config, lora=True),
    )
    return config, setup


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and of all that it started."""
    import psutil

    total = 0.0
    process = psutil.Process(pid)
    for one in [process, *process.children(recursive=True)]:
        try:
            times = one.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def _plain_rank(rank: int, store: str, model: Path, backend: str, pipe: Any) -> None:
    """A rank without Ray: it takes the batch of each step from its pipe and takes its own portion of it."""
    import torch
    import torch.distributed as dist

    from nemo_rl_lora.algorithms.losses.likelihood import SftLoss
    from nemo_rl_lora.policy.backends import build_policy

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    policy = build_policy(*settings(model, backend))
    pipe.send("built")
    while (batch := pipe.recv()) is not None:
        pipe.send(policy.train_step(batch, SftLoss()).loss)
    dist.destroy_process_group()


def _side(name: str, model: Path, backend: str, pipe: Any) -> None:
    """A process that owns a side's policy, and tells the loss and the CPU seconds of `n` steps when it is sent n."""
    import torch

    from nemo_rl_lora.algorithms.losses.likelihood import SftLoss

    torch.set_num_threads(2)
    batch = make_batch()
    step, close = _SIDES[name](model, backend, batch, SftLoss())
    step()  # warm
    pipe.send("built")
    while (number := pipe.recv()) is not None:
        before, begun = cpu_seconds(os.getpid()), time.monotonic()
        losses = [step() for _ in range(number)]
        pipe.send((losses[-1], (cpu_seconds(os.getpid()) - before) / number, (time.monotonic() - begun) / number))
    close()


Step = tuple[Callable[[], float], Callable[[], None]]


def _one(model: Path, backend: str, batch: Any, loss: Any) -> Step:
    from nemo_rl_lora.policy.backends import build_policy

    policy = build_policy(*settings(model, backend))
    return lambda: policy.train_step(batch, loss).loss, policy.close


def _two(model: Path, backend: str, batch: Any, loss: Any) -> Step:
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    store = tempfile.mktemp(prefix="store-")
    pipes = [context.Pipe() for _ in range(2)]
    ranks = [
        context.Process(target=_plain_rank, args=(rank, store, model, backend, there))
        for rank, (_, there) in enumerate(pipes)
    ]
    for rank in ranks:
        rank.start()
    for here, _ in pipes:
        assert here.recv() == "built"

    def step() -> float:
        for here, _ in pipes:
            here.send(batch)
        return [here.recv() for here, _ in pipes][0]

    def close() -> None:
        for here, _ in pipes:
            here.send(None)
        for rank in ranks:
            rank.join()

    return step, close


def _ray(model: Path, backend: str, batch: Any, loss: Any) -> Step:
    from nemo_rl_lora.config.cluster import ClusterConfig
    from nemo_rl_lora.distributed.policy_group import PolicyGroup

    group = PolicyGroup(*settings(model, backend), ClusterConfig(gpus_per_node=2))
    return lambda: group.train_step(batch, loss).loss, group.close


_SIDES = {"one process, two threads": _one, "two processes": _two, "two processes, Ray": _ray}


def main() -> int:
    arguments = parse()
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(Path(directory) / "model", arguments.layers)
        pipes = {}
        for name in _SIDES:
            here, there = context.Pipe()
            side = context.Process(target=_side, args=(name, model, arguments.backend, there))
            side.start()
            assert here.recv() == "built"
            pipes[name] = here
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in pipes}
        for pair in range(arguments.pairs):
            for name in list(pipes) if pair % 2 == 0 else list(pipes)[::-1]:
                pipes[name].send(arguments.steps)
                found[name].append(pipes[name].recv())
                loss, cpu, seconds = found[name][-1]
                sys.stderr.write(f"{pair} {name}: loss {loss:.6f}, {cpu:.2f} CPU s, {seconds:.2f} s a step\n")
        for pipe in pipes.values():
            pipe.send(None)
    cpu = {name: [one[1] for one in rows] for name, rows in found.items()}
    wall = {name: [one[2] for one in rows] for name, rows in found.items()}
    one, two, ray = _SIDES
    ratios = [there / here for there, here in zip(cpu[ray], cpu[two], strict=True)]
    speedups = [here / there for here, there in zip(wall[one], wall[two], strict=True)]
    summary = {
        "cpu_seconds": cpu,
        "seconds": wall,
        "ray_cpu_ratio": statistics.median(ratios),
        "ray_cpu_ratios": ratios,
        "speedup_of_two": statistics.median(speedups),
    }
    sys.stdout.write(json.dumps(summary) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
