"""bfloat16 that was only inherited gives way to float32 where the processor has no instructions for it."""

import argparse
import contextlib
import io
import logging
from pathlib import Path

import pytest
import torch

from nemo_rl_lora.config.load import load_config
from nemo_rl_lora.evaluation import command as evaluation
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


@pytest.mark.parametrize("driver", ["sft", "eval"])
def test_the_warning_is_shown_as_others_are(slow, capsys, monkeypatch, driver):
    """By this run's handler: what an earlier run of the process left writes to a stream that is closed."""
    closed = io.StringIO()
    closed.close()
    main = evaluation.main if driver == "eval" else drivers.main
    arguments = argparse.Namespace(config=None, overrides=["policy.precision=bfloat16"], driver=driver, plan=True)
    monkeypatch.setattr("nemo_rl_lora.run.drivers.show_plan", lambda config: 0)
    monkeypatch.setattr("nemo_rl_lora.evaluation.command.print_plan", lambda *_: None)
    with logging_through(logging.StreamHandler(closed)):
        main(arguments)
    said = capsys.readouterr().err
    assert "WARNING policy.precision=bfloat16: this processor has no instructions" in said
    assert "Logging error" not in said


@contextlib.contextmanager
def logging_through(handler):
    """The root logger as an earlier run left it; and afterwards as it was."""
    root, package = logging.getLogger(), logging.getLogger("nemo_rl_lora")
    before, level, own_level = root.handlers[:], root.level, package.level
    root.handlers[:] = [handler]
    try:
        yield
    finally:
        root.handlers[:] = before
        root.setLevel(level)
        package.setLevel(own_level)


def test_elsewhere_it_stays(monkeypatch, caplog):
    monkeypatch.setattr(drivers, "_has_bfloat16_products", lambda: True)
    assert chosen("grpo").policy.precision == "bfloat16"
    assert not caplog.records


def test_the_processor_is_asked():
    if torch.cuda.is_available():
        pytest.skip("a GPU multiplies bfloat16 matrices")
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    assert drivers._has_bfloat16_products() == ({"avx512bw", "avx512vl", "avx512dq"} <= set(flags.split()))
