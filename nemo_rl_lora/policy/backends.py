"""Which backend trains a policy: the one place that picks, and imports no more than what it picks."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.policy.protocol import PolicySetup

if TYPE_CHECKING:
    from nemo_rl_lora.policy.dtensor.policy import DTensorPolicy
    from nemo_rl_lora.policy.megatron.policy import MegatronPolicy


def build_policy(config: PolicyConfig, setup: PolicySetup) -> DTensorPolicy | MegatronPolicy:
    """The policy of `config.active_backend`, or this process's part of it where torch.distributed is up already."""
    if config.active_backend == "dtensor":
        from nemo_rl_lora.policy.dtensor.policy import DTensorPolicy

        return DTensorPolicy(config, setup)
    with warnings.catch_warnings():  # megatron-core says of each optional package that it is not there
        warnings.simplefilter("ignore")
        from nemo_rl_lora.policy.megatron.policy import MegatronPolicy
    return MegatronPolicy(config, setup)
