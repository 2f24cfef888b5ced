"""Every leaf of the schema is documented, and is either refused when flipped or known as one that has an effect."""

import pytest

from nemo_rl_lora.config.base import Fixed
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


@pytest.mark.parametrize("algorithm", MASTERS)
def test_fixed_keys_have_a_default_that_they_accept_and_a_remedy(algorithm) -> None:
    for path, field in leaves(MASTERS[algorithm]):
        for mark in (item for item in field.metadata if isinstance(item, Fixed)):
            assert field.default in mark.values, path
            assert mark.remedy.endswith("."), path


def test_walk_covers_every_leaf_once() -> None:
    config = load_config(None, [], "grpo")
    flipped, refused = [key for key, _ in flippable_leaves(config)], refused_leaves(config)
    assert sorted([*flipped, *refused]) == sorted(".".join(path) for path, _ in leaves(type(config)))
    assert {"policy.optimizer.kwargs.lr", "policy.precision", "policy.shared_prefix.enabled"} <= set(flipped)
    assert {"policy.dtensor_cfg.enabled", "policy.generation.top_p", "data.use_multiple_dataloader"} <= set(refused)
