"""Training steps and decoding on a GPU that computes nothing (tests/fake_gpu.py): no tensor lies on a wrong device, and
how many kernels are launched, how often memory is copied, and how often the host waits for the GPU, has bounds.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_rl_lora.algorithms.batch import longest_rows
from nemo_rl_lora.algorithms.losses.likelihood import SftLoss
from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.generation.in_process.bursts import BURST_TOKENS
from nemo_rl_lora.generation.in_process.engine import InProcessGeneration
from nemo_rl_lora.generation.protocol import generate
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.policy.device_memory import GPU_SPARE
from nemo_rl_lora.tensors import NUM_PAGES, PAGE_BYTES, tensors_digest
from nemo_rl_lora.types import Batch, SyncMode
from tests.fake_gpu import FakeGpu
from tests.generation.engine_inputs import LetterTokenizer, request
from tests.policy.batches import make_groups_batch
from tests.policy.dtensor.test_policy import make_policy, spec
from tests.policy.gpu_memory import counted_memory
from tests.policy.gpu_policies import Asked, Costs, costs_of, gpu_for_policies, model_of, table
from tests.policy.megatron.twins import BOTH
from tests.policy.parallel_ranks import loss_of
from tests.policy.test_pairs import make_chats, make_pairs
from tests.tiny_models import ALL_LINEAR, VOCABULARY

PLAIN = spec(kernels=False, targets=ALL_LINEAR)
LAYOUTS: dict[str, dict[str, Any]] = {
    "rows": {"shared_prefix": {"enabled": False}},
    "shared": {"shared_prefix": {"enabled": "auto"}},
    "packed": {
        "sequence_packing": {"enabled": True, "train_mb_tokens": 150, "logprob_mb_tokens": 150},
        "shared_prefix": {"enabled": False},
    },
    "padded": {},
}
ADAPTERS: dict[str, LoraSpec | None] = {
    "plain": PLAIN,
    "kernels": replace(PLAIN, kernels=True),
    "dropout before": replace(PLAIN, dropout=0.1, dropout_position="pre"),
    "dropout after": replace(PLAIN, dropout=0.1, dropout_position="post"),
    "fp32 adapter": replace(PLAIN, dtype="float32"),
    "all weights": None,
}
DEFAULT = {
    ("dtensor", "sft", "packed", "bfloat16", "plain"),
    ("dtensor", "grpo", "shared", "bfloat16", "dropout before"),
    ("dtensor", "dpo", "padded", "float32", "plain"),
    ("megatron", "grpo", "shared", "bfloat16", "plain"),
    ("megatron", "dpo", "rows", "float32", "dropout after"),
}


PRECISIONS = ("bfloat16", "float32")
ALL = [
    *product(BOTH, ("sft", "dpo", "grpo"), LAYOUTS, PRECISIONS, ["plain"]),
    *product(BOTH, ["grpo"], ["shared"], PRECISIONS, ADAPTERS),
    ("megatron", "dpo", "rows", "float32", "dropout after"),
]
CASES = [
    pytest.param(*case, id="-".join(case), marks=() if case in DEFAULT else pytest.mark.slow)
    for case in dict.fromkeys(ALL)
    if case[0] == "dtensor" or (case[2] != "padded" and case[4] != "kernels")  # Megatron's models have no windows
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def gpu():
    with gpu_for_policies() as gpu:
        yield gpu


def batch_of(algorithm: str) -> Batch:
    if algorithm == "sft":
        return make_chats()
    if algorithm == "dpo":
        return replace(make_pairs(), reference_logprobs=torch.zeros(8))
    batch = make_groups_batch()
    return replace(batch, reference_logprobs=torch.zeros(batch.token_ids.shape))


def test_more_logits_exist_at_a_time_than_on_a_cpu_unless_the_key_says_how_many(models):
    path = model_of("llama", 2, models)
    assert make_policy(path)._forward.chunk_tokens == 256
    with gpu_for_policies():
        assert make_policy(path)._forward.chunk_tokens == 1024
        assert make_policy(path, logprob_chunk_size=7)._forward.chunk_tokens == 7


@pytest.mark.parametrize(("backend", "algorithm", "layout", "precision", "adapter"), CASES)
def test_every_tensor_of_a_policy_is_where_it_is_computed(
    gpu: FakeGpu, models: Path, tmp_path: Path, backend: str, algorithm: str, layout: str, precision: str, adapter: str
):
    chosen = ADAPTERS[adapter]
    policy = make_policy(
        model_of("mistral" if layout == "padded" else "llama", 1, models),
        backend=BOTH[backend],
        spec=chosen,
        precision=precision,
        keep_reference=True,
        train_micro_batch_size=4,
        **LAYOUTS[layout],
    )
    batch, loss = batch_of(algorithm), loss_of(algorithm)
    policy.logprobs(batch)
    policy.reference_logprobs(batch)
    policy.train_step(batch, loss)
    assert gpu.num_launches > 0
    for master in policy._trained.masters().values():
        assert master.is_cuda
        assert master.grad is not None
        assert master.grad.is_cuda
    for mode in ("merged", "adapter") if chosen is not None else ("merged",):
        ref = policy.publish(1, mode)
        assert ref.tensors is not None
        assert all(ref.tensors[info.name].shape == info.shape for info in ref.manifest)
    if chosen is not None:  # of all weights nothing is saved that does not ask for numbers
        policy.save(tmp_path)
        policy.load(tmp_path)
        policy.train_step(batch, loss)


def costs_of_a_step(gpu: FakeGpu, models: Path, backend: str, algorithm: str, **settings: Any) -> Costs:
    """Of a microbatch and its layers."""
    batch = batch_of(algorithm)
    num_rows = len(batch.token_ids)

    def run(layers: int, microbatches: int) -> Asked:
        policy = make_policy(
            model_of("llama", layers, models),
            **{
                "backend": BOTH[backend],
                "spec": PLAIN,
                "precision": "bfloat16",
                "train_micro_batch_size": -(-num_rows // microbatches),
                **settings,
            },
        )
        gpu.reset()
        policy.train_step(batch, loss_of(algorithm))
        return Asked.of(gpu)

    return costs_of(run)


# Launches of a decoder layer, copies to the GPU and waits for it, of a microbatch; and waits of a step beside them.
STEPS = {
    ("dtensor", "sft"): (134, 1, 0, 2),
    ("dtensor", "grpo"): (165, 1, 0, 2),
    ("megatron", "sft"): (133, 1, 0, 2),
    ("megatron", "grpo"): (164, 1, 0, 2),
}


@pytest.mark.parametrize(("backend", "algorithm"), STEPS)
def test_a_microbatch_asks_for_no_more_than_this(gpu: FakeGpu, models: Path, backend: str, algorithm: str):
    costs = costs_of_a_step(gpu, models, backend, algorithm)
    launches, copies, waits, waits_of_a_step = STEPS[backend, algorithm]
    assert 0 < costs.layer.launches <= launches, table(costs.layer.operations)
    assert sum(costs.layer.copies.values()) == sum(costs.layer.waits.values()) == 0
    assert 0 < sum(costs.unit.copies.values()) <= copies, table(costs.unit.copies)
    assert sum(costs.unit.waits.values()) <= waits, table(costs.unit.waits)
    assert 0 < sum(costs.once.waits.values()) <= waits_of_a_step, table(costs.once.waits)


def engine_of(policy: Any, **settings: Any) -> InProcessGeneration:
    return InProcessGeneration(
        policy.base_model(),
        tokenizer=LetterTokenizer(),
        spec=PLAIN,
        adapted=policy.adapted,
        compute_dtype=policy.compute_dtype,
        max_concurrent_sequences=4,
        **settings,
    )


@pytest.mark.parametrize(
    ("backend", "kind", "precision", "sampling"),
    [
        ("dtensor", "llama", "bfloat16", {}),
        pytest.param("dtensor", "qwen3", "float32", {"temperature": 0.0}, marks=pytest.mark.slow),
        pytest.param("dtensor", "llama", "bfloat16", {"top_k": 5, "top_p": 0.9}, marks=pytest.mark.slow),
        pytest.param("dtensor", "llama", "float32", {"top_p": 0.9}, marks=pytest.mark.slow),
        pytest.param("dtensor", "mistral", "bfloat16", {}, marks=pytest.mark.slow),
        pytest.param("megatron", "llama", "float32", {}, marks=pytest.mark.slow),
    ],
)
def test_every_tensor_of_the_engine_in_process_is_where_it_is_computed(
    gpu: FakeGpu, models: Path, backend: str, kind: str, precision: str, sampling: dict[str, Any]
):
    policy = make_policy(model_of(kind, 1, models), backend=BOTH[backend], spec=PLAIN, precision=precision)
    engine = engine_of(policy)
    assert all(buffer.is_cuda for buffer in policy.base_model().buffers())
    requests = [  # of several lengths, more than fit at once; rows end at different times
        request(tuple(range(1, 4 + i)), num_completions=3, max_new_tokens=2 + 2 * i, **sampling) for i in range(3)
    ]
    for version, mode in enumerate(("merged", "adapter"), start=1):
        engine.sync_weights(policy.publish(version, mode))
        groups = generate(engine, requests)
        assert [len(c.token_ids) for g in groups for c in g.completions] == [2] * 3 + [4] * 3 + [6] * 3


# Launches of a decoder layer for a token, and of all else.
DECODING: dict[SyncMode, tuple[int, int]] = {"merged": (35, 60), "adapter": (63, 60)}


def costs_of_a_burst(gpu: FakeGpu, models: Path, mode: SyncMode, *, cuda_graphs: bool) -> Costs:
    """What so many tokens of every row ask for, that the host looks at together."""

    def run(layers: int, bursts: int) -> Asked:
        policy = make_policy(model_of("llama", layers, models), spec=PLAIN, precision="bfloat16")
        engine = engine_of(policy, cuda_graphs=cuda_graphs)
        engine.sync_weights(policy.publish(1, mode))
        gpu.reset()
        generate(engine, [request((3, 4, 5), num_completions=4, max_new_tokens=1 + BURST_TOKENS * bursts)])
        return Asked.of(gpu)

    return costs_of(run)


@pytest.mark.parametrize("mode", DECODING)
def test_a_token_asks_for_no_more_than_this(gpu: FakeGpu, models: Path, mode: SyncMode):
    costs = costs_of_a_burst(gpu, models, mode, cuda_graphs=False)
    launches_of_a_layer, launches = (BURST_TOKENS * number for number in DECODING[mode])
    assert 0 < costs.layer.launches <= launches_of_a_layer, table(costs.layer.operations)
    assert sum(costs.layer.copies.values()) == sum(costs.layer.waits.values()) == 0
    assert costs.unit.launches <= launches, table(costs.unit.operations)
    assert sum(costs.unit.copies.values()) == 1, table(costs.unit.copies)
    assert sum(costs.unit.waits.values()) == 1, table(costs.unit.waits)


def test_the_digest_of_a_large_tensor_takes_its_pages_in_one_copy(on_gpu, monkeypatch):
    whole, num_bytes = torch.Tensor.cpu, []

    def cpu(tensor):
        num_bytes.append(tensor.numel() * tensor.element_size())
        return whole(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    weight = torch.zeros(1024, 1024, device="cuda", dtype=torch.bfloat16)
    on_gpu.reset()

    tensors_digest({"w": weight})

    assert num_bytes == [NUM_PAGES * PAGE_BYTES]
    assert on_gpu.waits.total() == 1


@pytest.mark.parametrize("mode", DECODING)
def test_a_token_of_a_captured_step_is_one_launch(gpu: FakeGpu, models: Path, mode: SyncMode):
    costs = costs_of_a_burst(gpu, models, mode, cuda_graphs=True)  # in whose capture a copy or a wait raises
    assert costs.layer.launches == 0, table(costs.layer.operations)
    assert costs.unit.operations == {"cuda graph": BURST_TOKENS}
    assert sum(costs.unit.copies.values()) == 1, table(costs.unit.copies)
    assert sum(costs.unit.waits.values()) == 1, table(costs.unit.waits)


def test_a_step_that_cannot_be_captured_is_called(gpu: FakeGpu, models: Path, monkeypatch, caplog):
    policy = make_policy(model_of("llama", 1, models), spec=PLAIN, precision="bfloat16")
    asked = [request((3, 4, 5), num_completions=2, max_new_tokens=20)]

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", fails)
    engine = engine_of(policy)
    engine.sync_weights(policy.publish(1, "merged"))
    (group,) = generate(engine, asked)
    assert [len(c.token_ids) for c in group.completions] == [20, 20]
    assert "without CUDA graphs, since a step could not be captured: CUDA error" in caplog.text
    engine = engine_of(policy, cuda_graphs=True)
    engine.sync_weights(policy.publish(1, "merged"))
    with pytest.raises(RuntimeError, match="not permitted"):
        generate(engine, asked)


@pytest.mark.parametrize("backend", BOTH)
def test_on_a_gpu_a_step_runs_with_what_is_found_and_not_with_twice_as_much(models: Path, backend: str):
    """The moments have room, which are not there yet when the budget is found."""
    rows = longest_rows(torch.arange(16), num_prompt_tokens=1, num_tokens=64, vocabulary=VOCABULARY)
    auto: dict[str, Any] = {
        "dynamic_batching": {"enabled": True, "train_mb_tokens": "auto", "sequence_length_round": 8}
    }
    with gpu_for_policies(), counted_memory() as memory:
        policy = make_policy(model_of("llama", 2, models), backend=BOTH[backend], spec=PLAIN, **auto)
        policy._attempt(rows, 64)
        before = memory.used
        memory.reset()
        policy._attempt(rows, 300)
        moments = sum(2 * master.nbytes for master in policy._trained.masters().values())
        memory.total = int((memory.peak + moments) / (1 - GPU_SPARE))
        found = policy.find_train_tokens(rows)
        assert (found.tokens, found.reason) == (256, "1024 and 512 did not fit")
        assert memory.num_refusals == 2
        assert memory.used == memory.peak == before
        policy.train_step(rows, SftLoss())
        policy.use_train_tokens(512)
        with pytest.raises(torch.OutOfMemoryError):
            policy.train_step(rows, SftLoss())


def test_what_others_keep_is_no_room_for_microbatches(models: Path):
    rows = longest_rows(torch.arange(16), num_prompt_tokens=1, num_tokens=64, vocabulary=VOCABULARY)
    auto: dict[str, Any] = {
        "sequence_packing": {"enabled": True, "train_mb_tokens": "auto", "sequence_length_round": 8}
    }
    with gpu_for_policies(), counted_memory() as memory:
        policy = make_policy(model_of("llama", 2, models), spec=PLAIN, **auto)
        kept = memory.total - 2 * memory.used
        assert policy.find_train_tokens(rows).tokens == 1024
        with pytest.raises(ConfigError, match="policy.sequence_packing.train_mb_tokens='auto': .* of Fake GPU with 80"):
            policy.find_train_tokens(rows, kept)
