"""The package's own names, as the README shows them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import nemo_rl_lora
from nemo_rl_lora.run import drivers
from tests.driver import TinyRun

ROOT = Path(__file__).parents[1]
QUICK_START = '["policy.dtensor_cfg.lora_cfg.enabled=true"]'


def test_importing_the_names_loads_nothing_heavy():
    code = (
        "import sys; from nemo_rl_lora import load_config; assert load_config(None, [], 'sft').sft.max_num_steps;"
        "print(sorted({'torch', 'transformers', 'ray', 'vllm', 'nemo_automodel', 'megatron'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_a_name_that_the_package_lacks_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'nemo_rl_lora' has no attribute 'trian'"):
        nemo_rl_lora.trian  # noqa: B018


@pytest.mark.skipif(not hasattr(drivers, "train"), reason="command_line.train is not there yet")
def test_the_lines_of_the_readme_train(tiny_llama, tmp_path):
    """Shortened: the tiny model and its rows in place of the quick start's."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert QUICK_START in block
    run = TinyRun(root=tmp_path, model=tiny_llama, algorithm="sft")
    exec(block.replace(QUICK_START, repr(run.arguments("sft.max_num_steps=1", "checkpointing.metric_name=null"))), {})
    assert run.steps() == ["step_1"]
