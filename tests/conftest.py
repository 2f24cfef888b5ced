"""What tests of whole runs share."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """The directory of a tiny random Llama."""
    from tests.driver import make_tiny_llama

    return make_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """family -> directory of a random model in fp32."""
    from tests.policy.conftest import CONFIGS, save_random_model

    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = save_random_model(CONFIGS[family], tmp_path_factory.mktemp(family))
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
