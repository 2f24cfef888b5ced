"""Which nodes of a Ray cluster train, on which ones engines sample, and which process runs where.

Contract: exactly `cluster.num_nodes` nodes, `cluster.gpus_per_node` processes on each, ranks numbered node by node. A
process has a GPU of its own where the cluster has GPUs, and a CPU. Nodes that are free now are preferred; of these the
driver's comes first, and the others follow by their addresses. An engine has all of its devices on one node, beside
those that train.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import PlacementGroup, placement_group

from nemo_rl_lora.config.cluster import ClusterConfig
from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.generation import GenerationConfig

_PINNED = 0.001  # of the resource that every node has one of, named by its address


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node of a Ray cluster: all that it has, and how many processes could start there now."""

    node_id: str
    address: str
    num_gpus: int
    num_cpus: int
    num_free: int

    def num_devices(self, device: str) -> int:
        return self.num_gpus if device == "GPU" else self.num_cpus

    def __str__(self) -> str:
        return f"{self.address} ({self.num_gpus} GPUs, {self.num_cpus} CPUs)"


def nodes_of_ray() -> list[Node]:
    """Those that are alive, by address."""
    free, found = available_resources_per_node(), []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        whole, left = node["Resources"], free.get(node["NodeID"], {})
        found.append(
            Node(
                node_id=node["NodeID"],
                address=node["NodeManagerAddress"],
                num_gpus=int(whole.get("GPU", 0)),
                num_cpus=int(whole.get("CPU", 0)),
                num_free=int(min((left.get(device, 0) for device in ("CPU", "GPU") if whole.get(device)), default=0)),
            )
        )
    return sorted(found, key=lambda node: (int(ipaddress.ip_address(node.address)), node.node_id))


def choose_nodes(nodes: Sequence[Node], cluster: ClusterConfig, *, driver: str) -> list[Node]:
    """The nodes that train. `driver` is the id of the driver's node. ConfigError where the cluster has too little."""
    device, wanted = device_of(nodes), cluster.gpus_per_node
    able = [node for node in nodes if node.num_devices(device) >= wanted and node.num_cpus >= wanted]
    if len(able) < cluster.num_nodes:
        raise ConfigError(
            f"cluster.num_nodes={cluster.num_nodes}, cluster.gpus_per_node={wanted}: needs {cluster.num_nodes} node(s) "
            f"with {wanted} {device}s and {wanted} CPUs each, and Ray has {len(able)} such of {_listed(nodes)}. "
            f"Add nodes to the cluster, or lower one of the two."
        )
    free = [node for node in able if node.num_free >= wanted]
    able = free if len(free) >= cluster.num_nodes else able
    if cluster.segment_size is not None and cluster.segment_size > 1:
        return _segments(nodes, able, cluster)
    first = [node for node in able if node.node_id == driver]
    return [*first, *(node for node in able if node.node_id != driver)][: cluster.num_nodes]


def device_of(nodes: Sequence[Node]) -> str:
    """What a process needs one of: GPUs where the cluster has any."""
    return "GPU" if any(node.num_gpus for node in nodes) else "CPU"


def engine_nodes(
    nodes: Sequence[Node],
    generation: GenerationConfig,
    *,
    training: Sequence[Node],
    per_node: int,
    driver: str,
    only_free: bool = False,
) -> list[Node]:
    """The node of each engine, beside `per_node` processes on each of those that train. An engine takes devices of the
    driver's node first. ConfigError where the cluster has too little; `only_free`: of what is free now."""
    device, size = device_of(nodes), generation.devices_per_engine
    taken = {node.node_id: per_node for node in training}
    has = {node.node_id: node.num_free if only_free else node.num_devices(device) for node in nodes}
    left = {node.node_id: has[node.node_id] - taken.get(node.node_id, 0) for node in nodes}
    ordered = sorted(nodes, key=lambda node: node.node_id != driver)  # stable: the others by their addresses
    resources, wanted = generation.colocated.resources, generation.known_engines
    if resources.gpus_per_node is not None:
        able = [node for node in ordered if left[node.node_id] >= resources.gpus_per_node]
        number = resources.num_nodes or 1
        if len(able) < number:
            raise ConfigError(
                f"policy.generation.colocated.resources={{num_nodes: {number}, gpus_per_node: "
                f"{resources.gpus_per_node}}}: beside {sum(taken.values())} {device}(s) that train, Ray has "
                f"{len(able)} such node(s) of {_listed(nodes)}. Add nodes to the cluster, or lower one of the two."
            )
        return [node for node in able[:number] for _ in range(resources.gpus_per_node // size)]
    places = [node for node in ordered for _ in range(max(0, left[node.node_id]) // size)]
    if wanted is None:
        wanted = max(1, len(places)) if device == "GPU" else 1
    if len(places) < wanted:
        several = f"policy.generation.num_engines={wanted}: " if wanted > 1 else ""
        raise ConfigError(
            f"{several}policy.generation.colocated.enabled=False: {sum(taken.values())} {device}(s) of "
            f"{_listed(nodes)} train, and beside them is room for {len(places)} engine(s), each of {size} {device}(s) "
            f"of one node. Lower cluster.gpus_per_node or policy.generation.num_engines, or add a node."
        )
    return places[:wanted]


def _segments(nodes: Sequence[Node], able: Sequence[Node], cluster: ClusterConfig) -> list[Node]:
    """Whole segments, the first ones: nodes that follow each other among all nodes."""
    size = cluster.segment_size
    assert size is not None
    chosen: list[Node] = []
    run: list[Node] = []
    for node in nodes:
        run = [*run, node] if node in able else []
        if len(run) == size:
            chosen, run = [*chosen, *run], []
    if len(chosen) < cluster.num_nodes:
        raise ConfigError(
            f"cluster.segment_size={size}: {len(chosen) // size} segment(s) of nodes that follow each other and have "
            f"{cluster.gpus_per_node} free devices each are in {_listed(nodes)}, and cluster.num_nodes="
            f"{cluster.num_nodes} needs {cluster.num_nodes // size}. Set cluster.segment_size=null."
        )
    return chosen[: cluster.num_nodes]


def _listed(nodes: Sequence[Node]) -> str:
    more = f" and {len(nodes) - 8} more" if len(nodes) > 8 else ""
    return f"{len(nodes)} node(s): {', '.join(map(str, nodes[:8]))}{more}"


def bundles_of(nodes: Sequence[Node], per_node: int, *, gpus: bool) -> list[dict[str, float]]:
    """What each process needs, in the order of the ranks."""
    device = {"GPU": 1.0} if gpus else {}
    return [{"CPU": 1.0, **device, f"node:{node.address}": _PINNED} for node in nodes for _ in range(per_node)]


def reserve(nodes: Sequence[Node], per_node: int, seconds: float) -> PlacementGroup:
    """Bundles on these nodes; ConfigError where they are not free within the limit."""
    gpus = any(node.num_gpus for node in nodes)
    group: Any = placement_group(bundles_of(nodes, per_node, gpus=gpus), strategy="PACK")
    if not group.wait(seconds):
        ray.util.remove_placement_group(group)
        raise ConfigError(
            f"cluster.start_timeout_seconds={seconds:g}: {per_node} {'GPU' if gpus else 'CPU'}s on each of "
            f"{_listed(nodes)} were not free in this time. Wait for the end of the cluster's other runs, or raise it."
        )
    return group
