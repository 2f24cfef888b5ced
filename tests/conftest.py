"""What tests of whole runs share."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """The directory of a tiny random Llama."""
    from tests.driver import make_tiny_llama

    return make_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


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
