"""bfloat16 that was only inherited gives way to float32 where the processor has no instructions for it."""

import argparse
from pathlib import Path

import pytest
import torch

from nemo_rl_lora.config.load import load_config
from nemo_rl_lora.run import drivers
from nemo_rl_lora.run.drivers import with_fast_precision


def chosen(driver, *overrides, config=None):
    arguments = argparse.Namespace(config=config, overrides=overrides, driver=driver)
    return with_fast_precision(load_config(config, overrides, driver), arguments)


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(drivers, "_has_bfloat16_products", lambda: False)


@pytest.mark.parametrize("driver", ["sft", "dpo", "grpo", "eval"])
def test_inherited_bfloat16_gives_way_and_whatever_refers_to_it(slow, caplog, driver):
    config = chosen(driver)
    assert config.policy.precision == "float32"
    assert not config.layers.is_set("policy.precision")
    if driver == "grpo":
        assert config.policy.generation.vllm_cfg.precision == "float32"
    assert "policy.precision: float32, because this processor has no instructions for bfloat16" in caplog.text


def test_what_the_user_set_stays_and_is_warned_of(slow, caplog, tmp_path):
    assert chosen("sft", "policy.precision=bfloat16").policy.precision == "bfloat16"
    assert "policy.precision=bfloat16: this processor has no instructions" in caplog.text
    file = tmp_path / "own.yaml"
    base = Path(drivers.__file__).parents[2] / "examples" / "configs" / "sft.yaml"
    file.write_text(f"defaults: {base}\npolicy:\n  precision: bfloat16\n")
    assert chosen("sft", config=file).policy.precision == "bfloat16"


def test_elsewhere_it_stays(monkeypatch, caplog):
    monkeypatch.setattr(drivers, "_has_bfloat16_products", lambda: True)
    assert chosen("grpo").policy.precision == "bfloat16"
    assert not caplog.records


def test_the_processor_is_asked():
    if torch.cuda.is_available():
        pytest.skip("a GPU multiplies bfloat16 matrices")
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    assert drivers._has_bfloat16_products() == ({"avx512bw", "avx512vl", "avx512dq"} <= set(flags.split()))
