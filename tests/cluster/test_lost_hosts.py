"""Runs over hosts that lose one of them in the middle of a step, or their engine."""

from __future__ import annotations

import re
import time

import pytest

from tests.cluster.ray_hosts import RayHosts, assert_nothing_is_left, ended, num_steps_of, wait_until
from tests.driver import TinyRun
from tests.tiny_models import make_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NUM_STEPS = 40
MEGATRON = [
    "policy.backend=megatron",
    "policy.dtensor_cfg.lora_cfg.enabled=false",
    "policy.lora.dim=4",
]
LONG = ["sft.max_num_epochs=100", f"sft.max_num_steps={NUM_STEPS}", "checkpointing.save_period=2"]
RUN = [*MEGATRON, *LONG, "checkpointing.metric_name=null"]


@pytest.fixture
def tiny(tmp_path):
    return TinyRun(root=tmp_path, model=make_tiny_llama(tmp_path / "model"), algorithm="sft")


@pytest.fixture
def cluster(three_hosts, tmp_path):
    started = RayHosts(hosts=three_hosts, shared=tmp_path)
    started.start()
    return started


def losses(tiny: TinyRun) -> dict[int, float]:
    """The loss of each step, of the last start that did it."""
    numbers = range(1, len(list(tiny.logs.iterdir())) + 1)
    return {line["step"]: line["loss"] for number in numbers for line in tiny.metrics(experiment=number)}


def test_a_run_that_loses_a_host_goes_on_with_another_and_then_ends_with_one_paragraph(cluster, tiny, tmp_path_factory):
    """The second host is cut off while it trains, the third takes its place, and is cut off in turn."""
    first, second, third = cluster.hosts
    driver = cluster.driver(tiny, *RUN, "cluster.num_nodes=2", "cluster.max_restarts=1")
    wait_until(lambda: num_steps_of(tiny) >= 3, driver)
    second.cut()
    wait_until(lambda: num_steps_of(tiny, 2) >= 3, driver)
    third.cut()
    cut = time.monotonic()
    found = ended(driver, 120)

    assert time.monotonic() - cut < 60
    assert found.code == 1
    assert "Traceback" not in found.err
    lost = r"training process 1 \(node {}\) of 2 was lost in '\w+'; all were ended\. "
    assert re.search(lost.format(re.escape(second.address)), found.err)
    said = found.err[found.err.index("The run failed:") :]
    assert re.match("The run failed: " + lost.format(re.escape(third.address)), said)
    assert re.search(rf"\d+ of {NUM_STEPS} steps were complete. cluster.max_restarts=1: no restart is left. ", said)
    assert re.search(r"The newest checkpoint is .*/step_\d+. Continue with: uv run examples/run_sft.py ", said)
    second.join()  # what is alone there learns that it was given up
    third.join()
    for host in cluster.hosts:
        assert_nothing_is_left(host)

    alone = TinyRun(root=tmp_path_factory.mktemp("alone"), model=tiny.model, algorithm="sft")
    assert alone(*RUN).code == 0
    expected = losses(alone)
    assert {step: pytest.approx(expected[step], rel=1e-5) for step in losses(tiny)} == losses(tiny)
    assert len(losses(tiny)) >= 4
