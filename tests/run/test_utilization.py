"""What a step's devices did, by training process, and the peaks that it is a share of."""

import pytest
from transformers import GemmaConfig

from nemo_rl_lora.models.flops import FlopRates
from nemo_rl_lora.policy.dtensor.policy import DTensorPolicy
from nemo_rl_lora.run.metrics import is_measured
from nemo_rl_lora.run.utilization import Utilization, published_peak
from nemo_rl_lora.types import StepOutput
from tests.driver import TinyRun
from tests.tiny_models import save_byte_tokenizer, save_random_model

RATES = FlopRates(per_token=2e12, per_loss_token=1e12, per_score=0.0)


def output(peak_gpu_gib: float | None = None) -> StepOutput:
    """A step of 30 TFLOP."""
    return StepOutput(
        loss=0.0,
        grad_norm=0.0,
        lr=0.0,
        metrics={},
        num_forward_tokens=12,
        num_padding_tokens=2,
        num_loss_tokens=10,
        num_attention_scores=55,
        peak_gpu_gib=peak_gpu_gib,
    )


def measured(outputs, *, rates: FlopRates | None = RATES, peak_tflops: float | None = None) -> dict[str, float]:
    used = Utilization(num_processes=2, rates=rates, peak_tflops=peak_tflops)
    return used.metrics(outputs, num_tokens=400.0, step_seconds=10.0, training_seconds=3.0)


def test_arithmetic_is_that_of_training_over_its_seconds_and_tokens_are_over_those_of_the_step():
    found = measured([output(5.0), output(7.0)], peak_tflops=50.0)
    assert found == {
        "tokens_per_second_per_gpu": 20.0,
        "model_tflops_per_second_per_gpu": pytest.approx(60 / 3 / 2),
        "mfu": pytest.approx(0.2),
        "peak_gpu_gib": 7.0,
    }
    assert all(map(is_measured, found))


def test_what_is_not_known_is_left_out():
    assert list(measured([output()])) == ["tokens_per_second_per_gpu", "model_tflops_per_second_per_gpu"]
    assert list(measured([output()], rates=None, peak_tflops=50.0)) == ["tokens_per_second_per_gpu"]


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5, 67.0),
        ("NVIDIA H100 PCIe", 756.5, 51.2),
        ("NVIDIA H100 NVL", 835.5, 60.0),
        ("NVIDIA H200", 989.5, 67.0),
        ("NVIDIA H200 NVL", 835.5, 60.0),
        ("NVIDIA GH200 480GB", 989.5, 67.0),
        ("NVIDIA B200", 2250.0, 75.0),
        ("NVIDIA GB200", 2500.0, 80.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
        ("NVIDIA A100 80GB PCIe", 312.0, 19.5),
        ("NVIDIA L40S", 362.0, 91.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA GeForce RTX 4090 D", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None, None),
        ("NVIDIA H20", None, None),
        ("NVIDIA L40", 181.0, 90.5),
        ("NVIDIA L4", 121.0, 30.3),
        ("NVIDIA A10", 125.0, 31.2),
        ("NVIDIA A10G", None, None),
        ("NVIDIA A30", 165.0, 10.3),
        (None, None, None),
    ],
)
def test_a_gpu_is_known_by_its_name(name, bfloat16, float32):
    assert (published_peak(name, "bfloat16"), published_peak(name, "float32")) == (bfloat16, float32)


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo"])
def test_a_run_on_a_cpu_has_mfu_where_the_peak_is_given(tiny_llama, tmp_path, algorithm):
    tiny = TinyRun(root=tmp_path, model=tiny_llama, algorithm=algorithm)
    ended = tiny("logger.peak_tflops=0.05")
    assert ended.code == 0, ended.err
    assert " MFU " in ended.out
    for line in tiny.metrics():
        assert 0 < line["mfu"] == pytest.approx(line["model_tflops_per_second_per_gpu"] / 0.05)
        assert line["tokens_per_second_per_gpu"] == line["tokens_per_second"]
        assert "peak_gpu_gib" not in line
    assert tiny(f"{algorithm}.max_num_steps=3").code == 0
    assert "mfu" not in tiny.metrics(experiment=2)[0]
    assert tiny.metrics(experiment=2)[0]["model_tflops_per_second_per_gpu"] > 0


def test_the_peak_of_a_gpu_is_found_by_its_name_or_asked_for(tiny_llama, tmp_path, monkeypatch):
    for name, said in (("NVIDIA H100 PCIe", False), ("a card of tomorrow", True)):
        monkeypatch.setattr(DTensorPolicy, "gpu_name", name)
        root = tmp_path / name
        root.mkdir()
        tiny = TinyRun(root=root, model=tiny_llama, algorithm="sft")
        ended = tiny("sft.max_num_steps=1")
        assert ended.code == 0, ended.err
        assert (f"the peak of {name} is not known here. Set logger.peak_tflops." in ended.err) is said
        (line,) = tiny.metrics()
        assert line.get("mfu") == (None if said else pytest.approx(line["model_tflops_per_second_per_gpu"] / 51.2))


def test_the_arithmetic_of_a_rollout_is_that_of_all_its_optimizer_steps(tiny_llama, tmp_path):
    found = []
    for rows in (16, 8):
        root = tmp_path / str(rows)
        root.mkdir()
        tiny = TinyRun(root=root, model=tiny_llama)
        assert tiny("grpo.max_num_steps=1", f"policy.train_global_batch_size={rows}").code == 0
        (line,) = tiny.metrics()
        found.append(line["model_tflops_per_second_per_gpu"] * line["timing/policy_training"])
    assert found[1] == pytest.approx(found[0], rel=1e-9)


def test_a_model_whose_arithmetic_is_not_known_says_so(tmp_path):
    config = GemmaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=save_byte_tokenizer(tmp_path / "model"),
        eos_token_id=0,
    )
    save_random_model(config, tmp_path / "model")
    tiny = TinyRun(root=tmp_path, model=tmp_path / "model", algorithm="sft")
    ended = tiny("logger.peak_tflops=0.05")
    assert ended.code == 0, ended.err
    assert "no model_tflops_per_second_per_gpu and mfu among the metrics: the arithmetic of gemma" in ended.err
    (line, _) = tiny.metrics()
    assert not {"mfu", "model_tflops_per_second_per_gpu"} & line.keys()
    assert line["tokens_per_second_per_gpu"] > 0
