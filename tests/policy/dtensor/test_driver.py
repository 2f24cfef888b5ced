"""Whole runs whose processes share the model, by the drivers' own entry, are the run of one process.

GRPO's rollouts are replayed from the run of one process, so that every run trains on the same ones.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_rl_lora.generation.in_process import engine
from nemo_rl_lora.generation.replay import write_replay
from nemo_rl_lora.types import CompletionGroup
from tests.driver import Ended, TinyRun, adapter

SLOW, LONG = pytest.mark.slow, (pytest.mark.slow, pytest.mark.long)
TP, SP = "policy.dtensor_cfg.tensor_parallel_size=2", "policy.dtensor_cfg.sequence_parallel=true"
WAYS = {
    "dp2": ["cluster.gpus_per_node=2", "policy.dtensor_cfg.load=broadcast"],
    "tp2": ["cluster.gpus_per_node=2", TP],
    "tp2 sp": ["cluster.gpus_per_node=2", TP, SP],
    "dp2 tp2": ["cluster.gpus_per_node=4", TP, "policy.dtensor_cfg.activation_checkpointing=true"],
    "replicate2 shard2": ["cluster.gpus_per_node=4", "policy.dtensor_cfg.dp_replicate_size=2"],
}
# Each way once at least, and each algorithm; test_sharing.py has the rest, without a driver.
RUNS = [
    ("grpo", "dp2"),
    ("sft", "tp2 sp"),
    pytest.param("dpo", "tp2", marks=LONG),
    pytest.param("grpo", "dp2 tp2", marks=SLOW),
    pytest.param("dpo", "replicate2 shard2", marks=LONG),
]
NUM_STEPS = 3


@pytest.fixture(scope="module")
def one_process(tiny_llama, tmp_path_factory):
    """The run of one process of an algorithm, begun from an adapter whose B is not zero, and what was sampled."""
    found: dict[str, tuple[TinyRun, list[str]]] = {}

    def run_of(algorithm: str) -> tuple[TinyRun, list[str]]:
        if algorithm not in found:
            root = tmp_path_factory.mktemp(algorithm)
            tiny = TinyRun(root=root, model=tiny_llama, algorithm=algorithm)
            found[algorithm] = tiny, _run_and_record(tiny)
        return found[algorithm]

    return run_of


def _run_and_record(tiny: TinyRun) -> list[str]:
    """The settings of the runs that are compared with this one."""
    ended = tiny(f"{tiny.algorithm}.max_num_steps=1", "policy.dtensor_cfg.lora_cfg.dropout=0.0")
    assert ended.code == 0, ended.err
    warm = tiny.checkpoints / "step_1" / "policy" / "adapter"
    settings = [f"policy.adapter.init_from={warm}", f"{tiny.algorithm}.max_num_steps={NUM_STEPS}"]
    if tiny.algorithm != "sft":
        settings.append("policy.adapter.reference=base")
    if tiny.algorithm == "grpo":
        settings.append("loss_fn.reference_policy_kl_penalty=0.1")
    recorded: list[CompletionGroup] = []

    class Recording(engine.InProcessGeneration):
        def collect(self, tickets):
            groups = super().collect(tickets)
            recorded.extend(groups)
            return groups

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "InProcessGeneration", Recording)
        ended = tiny(*settings, f"checkpointing.checkpoint_dir={tiny.root}/one")
    assert ended.code == 0, ended.err
    if tiny.algorithm == "grpo":
        write_replay(tiny.root / "rollouts.jsonl", recorded)
        settings += [
            "policy.generation.backend=replay",
            f"policy.generation.replay_path={tiny.root}/rollouts.jsonl",
        ]
    return settings


def run_shared(one: TinyRun, settings: list[str], root: Path, *overrides: str) -> tuple[Ended, TinyRun]:
    tiny = TinyRun(root=root, model=one.model, algorithm=one.algorithm)
    for name in ("rewards.py", "rows.jsonl"):
        if (one.root / name).exists():
            (root / name).write_bytes((one.root / name).read_bytes())
    return tiny(*settings, *overrides), tiny


def num_processes(line: dict[str, float]) -> float:
    return line["tokens_per_second"] / line["tokens_per_second_per_gpu"]


def tflop(line: dict[str, float]) -> float:
    """The arithmetic of a step, of all processes."""
    return line["model_tflops_per_second_per_gpu"] * line["timing/policy_training"] * num_processes(line)


def assert_is_the_run_of_one(shared: TinyRun, one: TinyRun) -> None:
    lines, expected = shared.metrics(), one.metrics(experiment=2)
    assert len(lines) == len(expected) == NUM_STEPS
    for line, other in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5, abs=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert tflop(line) == pytest.approx(tflop(other), rel=1e-9)
        for name in {"kl_penalty", "preference_accuracy", "reward"} & other.keys():
            assert line[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    ours, theirs = adapter(shared.checkpoints / f"step_{NUM_STEPS}"), adapter(one.root / "one" / f"step_{NUM_STEPS}")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 1e-4 * tensor.norm(), name


@pytest.mark.parametrize(("algorithm", "way"), RUNS)
def test_a_run_in_several_processes_is_the_run_of_one(one_process, tmp_path, algorithm, way):
    one, settings = one_process(algorithm)
    ended, shared = run_shared(one, settings, tmp_path, *WAYS[way])
    assert ended.code == 0, ended.err
    assert_is_the_run_of_one(shared, one)
    assert f"cluster.gpus_per_node={num_processes(shared.metrics()[0]):.3g}" in WAYS[way]


@SLOW
def test_kernels_are_off_between_tensor_parallel_ranks_and_that_is_said_once(one_process, tmp_path):
    one, settings = one_process("sft")
    asked = [*WAYS["tp2"], "policy.dtensor_cfg.lora_cfg.use_triton=true"]
    planned, _ = run_shared(one, settings, tmp_path, *asked, "--plan")
    assert planned.code == 0, planned.err
    said = " ".join(planned.out.split())
    assert "policy.dtensor_cfg.tensor_parallel_size=2 is above 1" in said
    ended, shared = run_shared(one, settings, tmp_path, *asked)
    assert ended.code == 0, ended.err
    (warning,) = [line for line in ended.err.splitlines() if "use_triton" in line]
    assert "policy.dtensor_cfg.tensor_parallel_size=2 is above 1" in warning
    assert_is_the_run_of_one(shared, one)


@SLOW
def test_a_run_goes_on_with_any_other_sharing_and_the_other_backend(one_process, tmp_path):
    one, settings = one_process("sft")
    ways = [WAYS["tp2 sp"], ["policy.backend=megatron", *_MEGATRON], WAYS["dp2"]]
    for number, way in enumerate(ways, 1):
        lora = ["policy.dtensor_cfg.lora_cfg.enabled=false", "policy.lora.dim=4"] if "megatron" in way[0] else []
        steps = f"sft.max_num_steps={number}"
        ended, shared = run_shared(one, [*settings, steps], tmp_path, *way, *lora)
        assert ended.code == 0, ended.err
    expected = [line["loss"] for line in one.metrics(experiment=2)]
    losses = [shared.metrics(experiment=number)[-1]["loss"] for number in (1, 2, 3)]
    assert losses == pytest.approx(expected, rel=1e-4)


_MEGATRON = ["cluster.gpus_per_node=2", "policy.megatron_cfg.pipeline_model_parallel_size=2"]
