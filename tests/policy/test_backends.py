"""The configuration says which backend is built, in one process as in a process of a group."""

import pytest

from nemo_rl_lora.policy.backends import build_policy
from tests.policy.dtensor.test_policy import make_policy, spec


@pytest.mark.parametrize("name", ["dtensor", "megatron"])
def test_the_backend_of_the_configuration_is_built(tiny_model, name):
    def configured(config, setup):
        return build_policy(config.model_copy(update={"backend": name}), setup)

    assert type(make_policy(tiny_model("llama"), backend=configured, spec=spec())).__name__.lower() == f"{name}policy"
