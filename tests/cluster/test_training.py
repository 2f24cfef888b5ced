"""Training on two hosts of three, by both backends: the losses of one process. The engine's host is lost at the end."""

from __future__ import annotations

import re
import time

import pytest

from nemo_rl_lora.config.master import Algorithm
from tests.cluster.ray_hosts import ROOT, RayHosts, assert_nothing_is_left, ended, num_steps_of, wait_until
from tests.driver import TinyRun
from tests.hosts import hosts_up, why_no_hosts
from tests.tiny_models import make_vllm_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
BACKENDS = {
    "megatron": ["policy.backend=megatron", "policy.dtensor_cfg.lora_cfg.enabled=false", "policy.lora.dim=4"],
    "dtensor": ["policy.dtensor_cfg.lora_cfg.enabled=false", "policy.lora.dim=4"],
}
VLLM = [
    "policy.generation.backend=vllm",
    "policy.generation.vllm_cfg.enforce_eager=true",
    "policy.generation.max_concurrent_sequences=16",
]
APART = ["policy.generation.colocated.enabled=false", "policy.generation.max_generation_failures=0"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Ray cluster of three hosts, each with room for one process."""
    if reason := why_no_hosts():
        pytest.skip(reason)
    shared = tmp_path_factory.mktemp("shared")
    with hosts_up(3, [shared, ROOT]) as hosts:
        started = RayHosts(hosts=hosts, shared=shared)
        started.start()
        yield started


@pytest.fixture(scope="module")
def model(cluster):
    return make_vllm_llama(cluster.shared / "model")


@pytest.fixture
def run(request, cluster, model):
    """A run in a directory of its own that the hosts share; call it with its name and the algorithm."""

    def make(name: str, algorithm: Algorithm) -> TinyRun:
        root = cluster.shared / re.sub(r"\W", "_", request.node.name) / name
        root.mkdir(parents=True)
        return TinyRun(root=root, model=model, algorithm=algorithm)

    return make


COMBINATIONS = [("sft", "megatron"), ("grpo", "dtensor"), pytest.param("dpo", "dtensor", marks=pytest.mark.long)]


# Every combination in several processes of one host: tests/policy, test_driver.py of each backend.
@pytest.mark.parametrize(("algorithm", "backend"), COMBINATIONS)
def test_two_hosts_train_as_one_process(cluster, run, algorithm, backend):
    settings = [*BACKENDS[backend], f"{algorithm}.max_num_steps=3"]
    one = run("one", algorithm)
    assert one(*settings).code == 0
    two = run("two", algorithm)

    found = ended(cluster.driver(two, *settings, "cluster.num_nodes=2"))

    assert found.code == 0, found.err
    for name in ("loss", "grad_norm", *(("reward", "gen_kl_error") if algorithm == "grpo" else ())):
        expected = [line[name] for line in one.metrics()]
        assert [line[name] for line in two.metrics()] == pytest.approx(expected, rel=1e-5, abs=1e-5), name
    assert two.steps() == one.steps() == ["step_3"]
    for host in cluster.hosts:
        assert_nothing_is_left(host, 30)


@pytest.mark.long
def test_engines_on_three_hosts_sample_what_one_does(cluster, run):
    one, three = run("one", "grpo"), run("three", "grpo")
    settings = [*BACKENDS["dtensor"], *VLLM, "policy.generation.lora_sync=adapter", "grpo.max_num_steps=2"]
    places = "policy.generation.colocated.resources={num_nodes: 3, gpus_per_node: 1}"
    alone = ended(cluster.driver(one, *settings))
    assert alone.code == 0, alone.err

    found = ended(cluster.driver(three, *settings, "policy.generation.colocated.enabled=false", places))

    assert found.code == 0, found.err
    log = (three.logs / "exp_001" / "run.log").read_text()
    hosts = re.findall(r"generation: vLLM runs in process \d+(?: of node ([\d.]+))?$", log, re.MULTILINE)
    assert sorted(hosts) == ["", *(host.address for host in cluster.hosts[1:])]
    for name in ("loss", "reward", "gen_kl_error", "grad_norm"):
        expected = [line[name] for line in one.metrics()]
        assert [line[name] for line in three.metrics()] == pytest.approx(expected, rel=1e-5, abs=1e-5), name
    assert [line["sync_confirmed"] for line in three.metrics()] == [line["sync_confirmed"] for line in one.metrics()]
    for host in cluster.hosts:
        assert_nothing_is_left(host, 30)


def test_a_run_whose_engine_is_lost_with_its_host_ends_with_a_checkpoint_and_one_paragraph(cluster, run):
    """vLLM has the third host; the run is not allowed to start it again, nor itself. Last: the host is gone."""
    third = cluster.hosts[2]
    tiny = run("run", "grpo")
    settings = [*BACKENDS["megatron"], *VLLM, "grpo.max_num_epochs=100"]
    driver = cluster.driver(tiny, *settings, *APART, "cluster.num_nodes=2", "grpo.max_num_steps=300")
    wait_until(lambda: num_steps_of(tiny) >= 2, driver)
    assert any("_Host" in line for line in third.commands())
    third.cut()
    cut = time.monotonic()
    found = ended(driver)

    assert time.monotonic() - cut < 120
    assert found.code == 1
    assert f" of node {third.address}\n" in found.err
    num_steps = num_steps_of(tiny)
    assert {line["sync_confirmed"] for line in tiny.metrics()[1:]} == {1}
    assert all(line["gen_kl_error"] < 1e-6 for line in tiny.metrics())
    said = found.err[found.err.index("The run failed:") :]
    lost = r"policy.generation.max_generation_failures=0: the engine died during '\w+' \(\w+\), 1 times in a row. "
    assert re.match(f"The run failed: {lost}", said)
    assert f" {num_steps} of 300 steps were complete. cluster.max_restarts=0: it is not started again. " in said
    assert f"The newest checkpoint is {tiny.checkpoints / f'step_{num_steps}'}. Continue with: " in said
    third.join()  # what is alone there learns that it was given up
    for host in cluster.hosts:
        assert_nothing_is_left(host)
    one = run("one", "grpo")
    assert one(*settings, "grpo.max_num_steps=2").code == 0
    expected = [line["loss"] for line in one.metrics()]
    assert [line["loss"] for line in tiny.metrics()[:2]] == pytest.approx(expected, rel=1e-5, abs=1e-5)
