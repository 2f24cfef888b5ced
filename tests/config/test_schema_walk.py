"""Every leaf of the schema is documented, and is either refused when flipped or known as one that has an effect."""

import pytest

from nemo_rl_lora.config.load import load_config
from nemo_rl_lora.config.master import MASTERS
from nemo_rl_lora.config.schema import leaves, types_at
from tests.config.schema_walk import flippable_leaves, refused_leaves


@pytest.mark.parametrize("algorithm", MASTERS)
def test_every_leaf_has_a_docstring(algorithm) -> None:
    undocumented = [".".join(path) for path, field in leaves(MASTERS[algorithm]) if not field.description]
    assert undocumented == []


@pytest.mark.parametrize("algorithm", MASTERS)
def test_every_leaf_can_be_addressed(algorithm) -> None:
    root = MASTERS[algorithm]
    assert all(types_at(root, path) for path, _ in leaves(root))


def test_walk_covers_every_leaf_once() -> None:
    config = load_config(None, [], "grpo")
    flipped, refused = [key for key, _ in flippable_leaves(config)], refused_leaves(config)
    assert sorted([*flipped, *refused]) == sorted(".".join(path) for path, _ in leaves(type(config)))
    assert {"policy.optimizer.kwargs.lr", "policy.precision", "policy.shared_prefix.enabled"} <= set(flipped)
    assert {"policy.dtensor_cfg.enabled", "policy.generation.top_p"} <= set(refused)
