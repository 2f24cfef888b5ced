"""Which nodes train, from lists of nodes alone."""

import contextlib
import re

import pytest
import torch

from nemo_rl_lora.config.cluster import ClusterConfig
from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.load import load_config
from nemo_rl_lora.distributed.placement import Node, bundles_of, choose_nodes, engine_nodes


def nodes(*sizes: int, free: tuple[int, ...] | None = None, gpus: bool = False) -> list[Node]:
    return [
        Node(
            node_id=f"n{number}",
            address=f"10.0.0.{number}",
            num_gpus=size if gpus else 0,
            num_cpus=64 if gpus else size,
            num_free=size if free is None else free[number - 1],
        )
        for number, size in enumerate(sizes, start=1)
    ]


def chosen(found: list[Node], driver: str = "n1", **cluster: int) -> list[str]:
    return [node.node_id for node in choose_nodes(found, ClusterConfig(**cluster), driver=driver)]


def test_the_drivers_node_is_first_and_the_others_follow_by_address():
    assert chosen(nodes(2, 2, 2), gpus_per_node=2, num_nodes=2) == ["n1", "n2"]
    assert chosen(nodes(2, 2, 2), "n3", gpus_per_node=2, num_nodes=2) == ["n3", "n1"]


def test_a_driver_whose_node_is_too_small_trains_on_others():
    assert chosen(nodes(0, 8, 8, gpus=True), gpus_per_node=8, num_nodes=2) == ["n2", "n3"]


def test_nodes_that_are_free_come_before_those_that_are_not():
    assert chosen(nodes(2, 2, 2, free=(0, 2, 2)), gpus_per_node=2, num_nodes=2) == ["n2", "n3"]
    assert chosen(nodes(2, 2, 2, free=(0, 0, 2)), gpus_per_node=2, num_nodes=2) == ["n1", "n2"]  # they are waited for


def test_segments_are_nodes_that_follow_each_other():
    pairs = {"gpus_per_node": 4, "num_nodes": 4, "segment_size": 2}
    assert chosen(nodes(4, 1, 4, 4, 4, 4, 4), "n5", **pairs) == ["n3", "n4", "n5", "n6"]
    with pytest.raises(ConfigError, match=r"^cluster.segment_size=2: 1 segment\(s\) of nodes that follow each other"):
        chosen(nodes(4, 1, 4, 4, 1, 4), **pairs)
    with pytest.raises(ValueError, match="segment_size=2: must divide the number of nodes"):
        ClusterConfig(num_nodes=3, segment_size=2)


@pytest.mark.parametrize(
    ("found", "cluster", "has"),
    [
        (nodes(2), {"gpus_per_node": 2, "num_nodes": 2}, "2 CPUs and 2 CPUs each, and Ray has 1 such of 1 node(s)"),
        (
            nodes(4, 8, gpus=True),
            {"gpus_per_node": 8, "num_nodes": 2},
            "8 GPUs and 8 CPUs each, and Ray has 1 such of 2 node(s): 10.0.0.1 (4 GPUs, 64 CPUs), 10.0.0.2 (8 GPUs",
        ),
    ],
)
def test_too_few_nodes_are_named_with_what_ray_has(found, cluster, has):
    with pytest.raises(ConfigError, match=rf"^cluster.num_nodes={cluster['num_nodes']}, .*{re.escape(has)}"):
        chosen(found, **cluster)


def engines(found: list[Node], *overrides: str, training: int = 1, per_node: int = 8, driver: str = "n1") -> list[str]:
    """The node of each engine, beside so many nodes that train."""
    apart = ("policy.generation.backend=vllm", "policy.generation.colocated.enabled=false")
    generation = load_config(
        None, [*apart, *(f"policy.generation.{one}" for one in overrides)], "grpo"
    ).policy.generation
    places = engine_nodes(found, generation, training=found[:training], per_node=per_node, driver=driver)
    return [node.node_id for node in places]


def test_the_engine_needs_a_gpu_that_does_not_train():
    with pytest.raises(ConfigError, match=r"^policy.generation.colocated.enabled=False: 8 GPU\(s\) of 1 node\(s\)"):
        engines(nodes(8, gpus=True))
    assert engines(nodes(8, 1, gpus=True)) == ["n2"]


def test_engines_take_the_gpus_that_do_not_train_or_as_many_as_are_asked_for():
    assert engines(nodes(8, 2, gpus=True), per_node=6) == ["n1", "n1", "n2", "n2"]
    assert engines(nodes(8, 2, gpus=True), "num_engines=3", per_node=6) == ["n1", "n1", "n2"]
    assert engines(nodes(8, 2, gpus=True), "num_engines=3", per_node=6, driver="n2") == ["n2", "n2", "n1"]
    with pytest.raises(ConfigError, match=r"^policy.generation.num_engines=5: .* is room for 4 engine\(s\)"):
        engines(nodes(8, 2, gpus=True), "num_engines=5", per_node=6)


def test_on_a_cpu_one_engine_runs_unless_more_are_asked_for():
    assert engines(nodes(4, 4), per_node=1) == ["n1"]
    assert engines(nodes(1, 1, 1), per_node=1) == ["n2"]
    assert engines(nodes(1, 1, 1), "num_engines=2", per_node=1) == ["n2", "n3"]


def test_an_engine_has_its_devices_on_one_node():
    two = "vllm_cfg.tensor_parallel_size=2"
    assert engines(nodes(4, 3, 3, gpus=True), two, per_node=4) == ["n2", "n3"]  # one GPU of each is left over
    assert engines(nodes(4, 3, 4, gpus=True), two, "num_engines=3", per_node=4) == ["n2", "n3", "n3"]


def test_resources_say_how_many_engines_there_are_and_on_how_many_nodes():
    asked = ("colocated.resources.num_nodes=2", "colocated.resources.gpus_per_node=4")
    assert engines(nodes(8, 4, 8, gpus=True), *asked) == ["n2"] * 4 + ["n3"] * 4
    assert engines(nodes(8, 4, 8, gpus=True), *asked, "vllm_cfg.tensor_parallel_size=2") == ["n2"] * 2 + ["n3"] * 2
    with pytest.raises(
        ConfigError,
        match=r"^policy.generation.colocated.resources=\{num_nodes: 2, gpus_per_node: 4\}: beside 8 GPU\(s\) that "
        r"train, Ray has 1 such node\(s\) of 3 node\(s\): 10.0.0.1 \(8 GPUs",
    ):
        engines(nodes(8, 3, 8, gpus=True), *asked)


def test_the_bundles_of_a_node_are_consecutive():
    found = bundles_of(nodes(2, 2, gpus=True), 2, gpus=True)
    assert [[key for key in bundle if key.startswith("node:")][0] for bundle in found] == [
        *["node:10.0.0.1"] * 2,
        *["node:10.0.0.2"] * 2,
    ]
    assert all(bundle["GPU"] == bundle["CPU"] == 1 for bundle in found)
    assert all("GPU" not in bundle for bundle in bundles_of(nodes(2), 2, gpus=False))


def places_of(monkeypatch, found, *overrides, cuda=False):
    """The nodes of engines beside one process that trains, in a cluster that is joined, as the run's start says."""
    pytest.importorskip("ray")
    from nemo_rl_lora.distributed import engine_process

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(engine_process, "running_ray", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(engine_process, "nodes_of_ray", lambda: found.pop(0) if len(found) > 1 else found[0])
    monkeypatch.setattr(engine_process, "node_id", lambda: "n1")
    monkeypatch.setattr(engine_process, "_FREE_SECONDS", 0.0 if len(found) == 1 else 30.0)
    monkeypatch.setattr(engine_process, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    config = load_config(None, ["policy.generation.backend=vllm", *APART, *overrides], "grpo")
    return [node.node_id for node in engine_process.EngineProcesses(config.policy.generation, config.cluster).nodes]


APART = ("policy.generation.colocated.enabled=false",)


def test_engines_take_what_is_free_and_wait_a_while_for_it(monkeypatch):
    busy, free = nodes(2, 2, free=(0, 0), gpus=True), nodes(2, 2, free=(0, 1), gpus=True)
    assert places_of(monkeypatch, [free], "policy.generation.num_engines=1") == ["n2"]
    assert places_of(monkeypatch, [busy, busy, busy, free], "policy.generation.num_engines=1") == ["n2"]
    assert places_of(monkeypatch, [nodes(2, 2, free=(1, 2), gpus=True)]) == ["n1", "n2", "n2"]  # as many as are free


def test_engines_whose_places_others_use_are_refused_by_name(monkeypatch):
    busy = nodes(2, 2, free=(1, 0), gpus=True)
    says = r"room for 2 engine\(s\), and other runs use it: free are 1 of 10.0.0.1 \(2 GPUs, 64 CPUs\), 0 of 10.0.0.2"
    with pytest.raises(ConfigError, match=says):
        places_of(monkeypatch, [busy], "policy.generation.num_engines=2")


def test_beside_one_process_that_trains_engines_of_a_joined_cluster_take_no_gpu_of_its_node(monkeypatch):
    assert places_of(monkeypatch, [nodes(2, 2, gpus=True)], "policy.generation.num_engines=1", cuda=True) == ["n2"]
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS='10.0.0.1:6379' may give an engine the same one"):
        places_of(monkeypatch, [nodes(2, gpus=True)], "policy.generation.num_engines=1", cuda=True)
